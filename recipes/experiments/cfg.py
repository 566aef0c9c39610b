"""Does one checkpoint follow the CFG scale that it is told, in one step?"""

from dataclasses import replace
from pathlib import Path

from recipes.digits_cfg import RECIPE as ANY_SCALE
from recipes.digits_dit import RECIPE as PLAIN
from recipes.experiments.base import Arm, Claim, Experiment, Results, draw, energy_to_held_out
from recipes.experiments.guidance import classifier

QUESTION = """Does one checkpoint follow the CFG scale that it is told, in one step? Improved MeanFlow
(arXiv:2512.02012) has FID 1.72 at one step with one. Here recipes/digits_cfg.py is sampled at scales 1, 2, 4 and 6,
beside recipes/digits_dit.py, which has no guidance, at equal steps. The spread is the mean distance of two samples of a
class."""

SCALES = (1, 2, 4, 6)
COUNT = 5000  # samples of each scale, since accuracies are near 1


def spread(x, y) -> float:
    """The mean distance of two samples of a class, over the classes."""
    from torch.nn.functional import pdist

    return sum(float(pdist(x[y == label]).mean()) for label in range(10)) / 10


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    """Of each scale; the plain recipe has only scale 1."""
    found = {}
    for scale in SCALES if arm.recipe.objective != PLAIN.objective else (1,):
        x, y = draw(run, scale=scale, count=COUNT)
        accuracy = float((classifier().predict((x + 1) * 8) == y.numpy()).mean())
        numbers = {"energy": energy_to_held_out(x), "accuracy": accuracy, "spread": spread(x, y)}
        found |= {f"{metric} at {scale}": value for metric, value in numbers.items()}
    return found


def judge(results: Results) -> list[Claim]:
    told = results["any scale"]

    def pairs(metric: str) -> list[tuple[float, float]]:
        return list(zip(told[f"{metric} at 1"], told[f"{metric} at 4"]))

    def shown(metric: str) -> str:
        return ", ".join(f"{one:.3f} and {four:.3f}" for one, four in pairs(metric))

    ratio = results.mean("any scale", "energy at 1") / results.mean("plain", "energy at 1")
    return [
        Claim(
            f"accuracy at scale 4 is above that at 1 for every seed: {shown('accuracy')}",
            all(one < four for one, four in pairs("accuracy")),
        ),
        Claim(
            f"spread at scale 4 is below that at 1 for every seed: {shown('spread')}",
            all(one > four for one, four in pairs("spread")),
        ),
        Claim(f"at scale 1 the energy distance is {ratio:.2f} times the plain recipe's", ratio <= 1.25),
    ]


def quiet(recipe):
    """With as many steps as the recipe of any scale, and pictures only at the end."""
    return replace(recipe, steps=ANY_SCALE.steps, sample_every=100_000, checkpoint_every=625)


TINY = Experiment(QUESTION, {"plain": Arm(quiet(PLAIN)), "any scale": Arm(quiet(ANY_SCALE))}, measure, judge, seeds=3)
PAPER = None
