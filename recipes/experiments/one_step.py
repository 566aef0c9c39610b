"""Is one step as good as many, with the same network?"""

from dataclasses import replace
from pathlib import Path

from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, draw, energy_to_held_out
from recipes.experiments.memorise import DIT, error_to_pairs, pairs
from recipes.imagenet_ditxl import RECIPE

QUESTION = """Is one step as good as Euler's and the Runge-Kutta method with 10, 50 and 100 steps, by the same
network? On digits by the energy distance to the held-out ones, on memorised pairs of noise and image by the mean
squared error of a pixel. The paper (arXiv:2505.13447) has FID 3.43 in one step and 2.93 in two for DiT-XL/2."""

WAYS = [("meanflow", 1), ("meanflow", 2), ("meanflow", 4)]
WAYS += [(solver, steps) for solver in ("euler", "rk4") for steps in (10, 50, 100)]


def name(solver: str, steps: int) -> str:
    return f"{solver} {steps}"


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    if arm.recipe.fixed_noise:
        return {name(*way): error_to_pairs(run, *way) for way in WAYS}
    return {name(*way): energy_to_held_out(draw(run, *way, count=450)[0]) for way in WAYS}


def judge(results: Results) -> list[Claim]:
    claims = []
    for arm in results:
        means = {metric: results.mean(arm, metric) for metric in results[arm]}
        best = min(means, key=means.get)
        behind = means["meanflow 1"] / means[best] - 1
        words = f"{arm}: one step ({means['meanflow 1']:.4g}) is within 20 % of the best, {best} ({means[best]:.4g})"
        claims.append(Claim(f"{words}: {behind:.1%} behind", behind <= 0.2))
    return claims


def measure_paper(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    from reports.evaluation import flat
    from tools.evaluate import Evaluator, Options

    evaluator = Evaluator(Options(str(run), (reference,) if reference else ("held-out",), ("fid",)))
    return {name(*way): flat(evaluator.measure(*way, None)).get("fid", float("nan")) for way in WAYS}


TINY = Experiment(
    QUESTION,
    {"digits": Arm(digits_with(steps=1250)), "memorised pairs": Arm(pairs(DIT, ratio=0.25, norm_p=1.0))},
    measure,
    judge,
    seeds=3,
)
PAPER = Experiment(QUESTION, {"DiT-XL/2": Arm(replace(RECIPE), paper=3.43)}, measure_paper, judge)
