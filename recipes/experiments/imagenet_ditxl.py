"""The published ImageNet run of this size."""

from recipes.experiments.base import Arm, Experiment, fid_of_one_step, reaches
from recipes.imagenet_ditxl import RECIPE

QUESTION = "Does the recipe reach the published FID in one step? The paper (arXiv:2505.13447) has 3.43."
TINY = None
PAPER = Experiment(QUESTION, {RECIPE.model: Arm(RECIPE, paper=3.43)}, fid_of_one_step, reaches(1.05 * 3.43))
