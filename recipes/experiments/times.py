"""Which law should the times have?"""

from dataclasses import replace

from recipes.cifar10_unet_paper import RECIPE as CIFAR10
from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step, fid_of_one_step
from recipes.experiments.ratio import plain

QUESTION = """Which law should the times have? The paper (arXiv:2505.13447, table 1d, t and r as the maximum and
minimum of two draws) has FID 65.90 for uniform ones, and for logit-normal ones with mean and standard deviation
(-0.2, 1) 63.83, (-0.2, 1.2) 64.72, (-0.4, 1) 61.06, (-0.4, 1.2) 61.79. Its choice for CIFAR-10 is (-2, 2)."""

PUBLISHED = {(-0.2, 1.0): 63.83, (-0.2, 1.2): 64.72, (-0.4, 1.0): 61.06, (-0.4, 1.2): 61.79}
OTHERS = [(-2.0, 2.0), (0.0, 1.0)]


def law(place: tuple[float, float]) -> dict:
    return {"time_sampler": "v0", "P_mean": place[0], "P_std": place[1], "P_mean_r": None, "P_std_r": None}


def name(place: tuple[float, float]) -> str:
    return f"({place[0]:g}, {place[1]:g})"


def judge(results: Results, metric: str) -> list[Claim]:
    best, uniform = results.best(metric), results.mean("uniform", metric)
    value = results.mean(best, metric)
    is_other = best != "uniform"
    return [Claim(f"some law beats the uniform one: {best}, {value:.4g} against {uniform:.4g}", is_other)]


tiny = {name(place): Arm(digits_with(**law(place)), paper=PUBLISHED.get(place)) for place in [*PUBLISHED, *OTHERS]}
tiny["uniform"] = Arm(digits_with(time_sampler="uniform"), paper=65.90)
tiny["v1: t (0.2, 1.4), r (-3, 1.4)"] = Arm(digits_with())
base = plain(0.25)
paper = {
    name(p): Arm(replace(base, objective=replace(base.objective, **law(p))), paper=v) for p, v in PUBLISHED.items()
}
paper["uniform"] = Arm(replace(base, objective=replace(base.objective, time_sampler="uniform")), paper=65.90)
paper |= {
    f"CIFAR-10, {name(p)}": Arm(replace(CIFAR10, objective=replace(CIFAR10.objective, **law(p))))
    for p in [(-2.0, 2.0), (-0.4, 1.0), (0.0, 1.0)]
}

TINY = Experiment(QUESTION, tiny, energy_of_one_step, lambda results: judge(results, "energy"))
PAPER = Experiment(QUESTION, paper, fid_of_one_step, lambda results: judge(results, "fid"))
