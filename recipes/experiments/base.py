"""What an experiment is, and what the experiments of this folder share: their digits, and how samples are judged.

An experiment is a file with TINY (real data, minutes on 2 CPU cores), PAPER (the published setting) or both: its arms,
which are recipes, and a criterion. tools/experiments.py runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from meanflow import TrainConfig
from recipes.digits_dit import RECIPE


@dataclass(frozen=True)
class Arm:
    """One run of an experiment.

    Args:
        recipe: its out and seed are chosen by the runner. None: there is nothing to train.
        parts: an objective, net or data of its own, as for meanflow.run.
        begins_from: another arm, whose network of the same seed it begins with.
        paper: the published figure, most often FID at one step.
    """

    recipe: TrainConfig | None
    parts: dict = field(default_factory=dict)
    paper: float | None = None
    begins_from: "Arm | None" = None


class Claim(NamedTuple):
    words: str
    holds: bool


class Results(dict):
    """The metrics of each arm: results[arm][metric] is a list, a number for each seed."""

    def mean(self, arm: str, metric: str) -> float:
        return mean(self[arm][metric])

    def spread(self, arm: str, metric: str) -> float:
        """The standard deviation over the seeds; 0 for one seed."""
        return stdev(self[arm][metric]) if len(self[arm][metric]) > 1 else 0.0

    def best(self, metric: str, among: tuple[str, ...] | None = None) -> str:
        """The arm with the smallest mean."""
        return min(among or self, key=lambda arm: self.mean(arm, metric))


@dataclass(frozen=True)
class Experiment:
    """Arms and a criterion.

    Args:
        question: what it asks, and what others found, with the source.
        arms: by name.
        measure: from the folder of a finished run, its arm and the reference of --reference to numbers by name. The
            first one is drawn.
        judge: from the results to claims, each of which holds or does not.
        seeds: how many.
    """

    question: str
    arms: dict[str, Arm]
    measure: Callable[[Path, Arm, str | None], dict[str, float]]
    judge: Callable[[Results], list[Claim]]
    seeds: int = 1


# The digits of recipes/digits_dit.py, with about half of its steps.
DIGITS = replace(RECIPE, steps=600, log_every=50, checkpoint_every=300, sample_every=100_000)  # pictures at the end
COUNT = 1000  # samples that are judged


def digits_with(steps: int | None = None, **options) -> TrainConfig:
    """The digits' recipe with other options of the objective."""
    return replace(DIGITS, objective=replace(DIGITS.objective, **options), steps=steps or DIGITS.steps)


def draw(run: Path, solver: str = "meanflow", steps: int = 1, scale: float | None = None, count: int = COUNT):
    """Samples of a run's first average, with 8 bits as pictures have them, (count, D) in [-1, 1], and their classes."""
    import torch

    from meanflow.evaluation.evaluate import to_bytes
    from meanflow.publishing.checkpoints import load_pipeline

    pipe = load_pipeline(run, trust_remote_code=True)  # the code is the experiment's own
    pipe.set_progress_bar_config(disable=True)
    if pipe.sampling.solver == "euler" and solver == "meanflow":
        solver = "euler"  # a network of flow matching has never seen r != t: its one step is Euler's
    classes = pipe.num_classes
    y = [index % classes for index in range(count)] if classes else None
    noise = pipe.noise(0, range(count))
    z = pipe(y, count, steps, scale, solver, latents=noise, output_type="latent").images
    return to_bytes(pipe.to_images(z, "pt")).float().flatten(1) / 127.5 - 1, torch.tensor(y or [0] * count)


@cache
def held_out(resolution: int = 8):
    """The 450 digits that are not trained on, as `draw` gives samples, and their classes."""
    from meanflow.data.sources import digits

    images = digits(resolution)[1]
    return ((images.x + 1) * 127.5).round().flatten(1) / 127.5 - 1, images.y


def energy_to_held_out(x) -> float:
    from meanflow.evaluation.distances import energy_distance

    return energy_distance(x, held_out(round(x.shape[1] ** 0.5))[0])


def energy_of_one_step(run: Path, arm: Arm, reference: str | None = None) -> dict[str, float]:
    """The energy distance of one-step samples to the held-out digits."""
    return {"energy": energy_to_held_out(draw(run)[0])}


def fid_of_one_step(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    """FID of 50,000 one-step samples, by tools/evaluate.py."""
    from reports.evaluation import flat
    from tools.evaluate import Evaluator, Options

    given = (reference,) if reference else ("held-out",)
    evaluator = Evaluator(Options(str(run), given, ("fid",)))
    return flat(evaluator.measure(evaluator.pipe.sampling.solver, 1, None))


def smallest(metric: str, arm: str, margin: float = 1.0) -> Callable[[Results], list[Claim]]:
    """The criterion that this arm has the smallest mean, by this factor."""

    def judge(results: Results) -> list[Claim]:
        others = [other for other in results if other != arm]
        ratio = min(results.mean(other, metric) for other in others) / results.mean(arm, metric)
        return [Claim(f"{arm} has the smallest {metric}: the next is {ratio:.2f} times it", ratio > margin)]

    return judge


def reaches(limit: float) -> Callable[[Results], list[Claim]]:
    """The criterion that every arm's FID is below a limit."""

    def judge(results: Results) -> list[Claim]:
        found = {arm: results.mean(arm, "fid") for arm in results}
        return [Claim(f"{arm}: FID {fid:.2f}, to be below {limit:g}", fid < limit) for arm, fid in found.items()]

    return judge
