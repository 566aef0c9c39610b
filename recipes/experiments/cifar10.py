"""The published CIFAR-10 run."""

from recipes.cifar10_unet_paper import RECIPE
from recipes.experiments.base import Arm, Experiment, fid_of_one_step, reaches

QUESTION = "Does the CIFAR-10 recipe reach an FID below 5 in one step? The paper (arXiv:2505.13447) has 2.92."
TINY = None
PAPER = Experiment(QUESTION, {"UNet-cifar": Arm(RECIPE, paper=2.92)}, fid_of_one_step, reaches(5.0))
