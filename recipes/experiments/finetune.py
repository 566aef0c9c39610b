"""Does a flow-matching network become a one-step network in a third of the steps?"""

from dataclasses import replace

from recipes.digits_flow_to_meanflow import RECIPE
from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step

QUESTION = """Does a network of flow matching become a one-step network in a third of the steps that MeanFlow takes from
scratch? zhuyu-cs/MeanFlow fine-tuned SiT-XL/2 (1,400 epochs of flow matching) in 60 epochs to FID 4.52 in one step and
2.81 in two; from scratch the paper (arXiv:2505.13447) has 3.43 and 2.93 after 240."""

FLOW = Arm(digits_with(steps=1250, meanflow_ratio=0.0))
TUNED = replace(RECIPE, init_from=None, log_every=50, checkpoint_every=300, sample_every=100_000)
NAMES = "from scratch, 1,250 steps", "fine-tuned, 417 steps"


def judge(results: Results) -> list[Claim]:
    scratch, tuned = (results.mean(name, "energy") for name in NAMES)
    ratio = tuned / scratch
    return [Claim(f"fine-tuned for 417 steps the energy distance is {ratio:.3g} times that from scratch", ratio <= 1.2)]


ARMS = {NAMES[0]: Arm(digits_with(steps=1250)), NAMES[1]: Arm(TUNED, begins_from=FLOW), "flow matching": FLOW}
TINY = Experiment(QUESTION, ARMS, energy_of_one_step, judge, seeds=3)
PAPER = None
