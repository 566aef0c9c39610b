"""Which power should the adaptive weight have?"""

from dataclasses import replace

from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step, fid_of_one_step
from recipes.experiments.ratio import plain

QUESTION = """Which power p should the weight 1 / (squared error + eps)^p have? The paper (arXiv:2505.13447, table
1e) has FID 79.75 for 0, 63.98 for 0.5, 61.06 for 1, 66.57 for 1.5 and 69.19 for 2."""

PUBLISHED = {0.0: 79.75, 0.5: 63.98, 0.75: None, 1.0: 61.06, 1.5: 66.57, 2.0: 69.19}


def judge(results: Results, metric: str) -> list[Claim]:
    best = results.best(metric)
    return [Claim(f"a power between 0 and 2 is best: {best}", best not in ("0", "2"))]


def paper(p: float):
    base = plain(0.25)
    return replace(base, objective=replace(base.objective, norm_p=p))


TINY = Experiment(
    QUESTION,
    {f"{p:g}": Arm(digits_with(norm_p=p), paper=fid) for p, fid in PUBLISHED.items()},
    energy_of_one_step,
    lambda results: judge(results, "energy"),
)
PAPER = Experiment(
    QUESTION,
    {f"{p:g}": Arm(paper(p), paper=fid) for p, fid in PUBLISHED.items()},
    fid_of_one_step,
    lambda results: judge(results, "fid"),
)
