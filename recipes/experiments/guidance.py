"""What does guidance that is trained in do to one-step samples?"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from recipes.experiments.base import (
    Arm,
    Claim,
    Experiment,
    Results,
    digits_with,
    draw,
    energy_to_held_out,
    fid_of_one_step,
    held_out,
)
from recipes.imagenet_ditb4 import RECIPE

QUESTION = """What does guidance that is trained in do to one-step samples? The paper (arXiv:2505.13447, tables 1f
and 4, DiT-B/4) has FID 61.06, 33.33, 20.15, 15.53 and 20.75 for omega 1, 1.5, 2, 3 and 5, and, at an effective scale
of 2, 20.15, 19.15, 19.10, 18.63 and 19.17 for kappa 0, 0.5, 0.8, 0.9 and 0.95. Here the class accuracy is that of a
support vector machine fitted on the real training digits, and the spread is the mean standard deviation of a pixel
within a class, as a share of that of the real held-out digits."""

OMEGA = {1.0: 61.06, 1.5: 33.33, 2.0: 20.15, 3.0: 15.53, 5.0: 20.75}
KAPPA = {0.5: 19.15, 0.8: 19.10, 0.9: 18.63, 0.95: 19.17}  # at an effective scale of 2


@cache
def classifier():
    from sklearn.svm import SVC

    from meanflow.data.sources import digits

    real = digits()[0]
    return SVC(C=10).fit(((real.x + 1) * 8).flatten(1), real.y)


def spread(x, y) -> float:
    return float(sum(x[y == label].std(dim=0).mean() for label in range(10)) / 10)


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    x, y = draw(run)
    accuracy = float((classifier().predict((x + 1) * 8) == y.numpy()).mean())
    return {"accuracy": accuracy, "spread": spread(x, y) / spread(*held_out()), "energy": energy_to_held_out(x)}


def judge(results: Results) -> list[Claim]:
    plain, guided = (results.mean(f"omega {omega}", "accuracy") for omega in (1, 2))
    narrow = results.mean("omega 5", "spread") / results.mean("omega 1", "spread")
    return [
        Claim(f"guidance raises the accuracy: {plain:.3f} without, {guided:.3f} at scale 2", guided > plain),
        Claim(f"and lowers the spread: at scale 5 it is {narrow:.2f} times that without", narrow < 1),
    ]


def arms(change) -> dict[str, Arm]:
    """Of the changed recipe for (omega, kappa)."""
    found = {f"omega {omega:g}": Arm(change(omega, 0.0), paper=fid) for omega, fid in OMEGA.items()}
    for kappa, fid in KAPPA.items():
        found[f"omega {2 * (1 - kappa):.2g}, kappa {kappa:g}"] = Arm(change(2 * (1 - kappa), kappa), paper=fid)
    return found


def tiny(omega: float, kappa: float):
    return digits_with(steps=400, omega=omega, kappa=kappa, class_dropout_prob=0.1)


def paper(omega: float, kappa: float):
    return replace(RECIPE, objective=replace(RECIPE.objective, omega=omega, kappa=kappa))


def judge_paper(results: Results) -> list[Claim]:
    best = results.best("fid", tuple(f"omega {omega:g}" for omega in OMEGA))
    return [Claim(f"omega 3 is best: {best} is", best == "omega 3")]


TINY = Experiment(QUESTION, arms(tiny), measure, judge, seeds=3)
PAPER = Experiment(QUESTION, arms(paper), fid_of_one_step, judge_paper)
