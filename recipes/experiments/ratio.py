"""Which share of the samples should have r != t?"""

from dataclasses import replace

from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step, fid_of_one_step
from recipes.imagenet_ditb4 import RECIPE

PUBLISHED = {0.0: 328.91, 0.25: 61.06, 0.5: 63.14, 0.75: None, 1.0: 67.32}
QUESTION = """Which share of the samples should have r != t? The paper (arXiv:2505.13447, table 1a, DiT-B/4 on
ImageNet, 80 epochs, without guidance) has FID 328.91 for none, 61.06 for 25 %, 63.14 for 50 % and 67.32 for all. On
CIFAR-10 its choice is 75 %."""


def judge(results: Results, metric: str) -> list[Claim]:
    others = [results.mean(arm, metric) for arm in results if arm != "0"]
    factor = results.mean("0", metric) / max(others)
    best = results.best(metric)
    return [
        Claim(f"ratio 0 is worst at one step by far: {factor:.1f} times the next worst", factor > 2),
        Claim(f"a ratio between 0 and 1 is best: {best}", best not in ("0", "1")),
    ]


def plain(ratio: float):
    """The recipe without guidance."""
    options = replace(
        RECIPE.objective, meanflow_ratio=ratio, kappa=0.0, class_dropout_prob=0.0, null_class="independent"
    )
    return replace(RECIPE, objective=options)


TINY = Experiment(
    QUESTION,
    {f"{ratio:g}": Arm(digits_with(meanflow_ratio=ratio), paper=fid) for ratio, fid in PUBLISHED.items()},
    energy_of_one_step,
    lambda results: judge(results, "energy"),
    seeds=3,
)
PAPER = Experiment(
    QUESTION,
    {f"{ratio:g}": Arm(plain(ratio), paper=fid) for ratio, fid in PUBLISHED.items()},
    fid_of_one_step,
    lambda results: judge(results, "fid"),
)
