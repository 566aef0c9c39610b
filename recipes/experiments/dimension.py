"""Does the best share of r != t samples depend on the dimension of the data?"""

from dataclasses import replace
from pathlib import Path

import torch

from meanflow import MeanFlowConfig, TrainConfig
from meanflow.data.base import InMemory
from recipes.experiments.base import Arm, Claim, Experiment, Results

QUESTION = """Does the best share of r != t samples depend on the dimension of the data? A mixture of eight Gaussians
in 4, 64 and 1,024 dimensions, with an MLP; the number is the energy distance of 2,000 one-step samples to fresh
data, as a multiple of that of two sets of data. No paper has these figures. One user's log found 75 % best in 4
dimensions, and a run with it diverged in 442,368."""

DIMENSIONS, RATIOS, COUNT = (4, 64, 1024), (0.0, 0.25, 0.5, 0.75, 1.0), 2000
STD = 0.3


def mixture(dimension: int, count: int, seed: int) -> torch.Tensor:
    """Points of eight Gaussians of equal weight, whose centres have coordinates of -1 and 1, (count, dimension)."""
    centres = torch.randn(8, dimension, generator=torch.Generator().manual_seed(0)).sign()
    random = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (count,), generator=random)
    return centres[which] + STD * torch.randn(count, dimension, generator=random)


class Mixture(InMemory):
    """20,000 points of the mixture that recipe.data names, mixture-DIMENSION, each of shape (dimension, 1, 1)."""

    def __init__(self, recipe: TrainConfig):
        points = mixture(int(recipe.data.split("-")[1]), 20_000, seed=1)
        super().__init__(points.view(*points.shape, 1, 1), None, 0)

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4].reshape(-1, 1, 2, 2)


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    from meanflow.evaluation.distances import energy_distance
    from meanflow.noise import noise
    from meanflow.publishing.checkpoints import find_checkpoint, load_network
    from meanflow.sampler import average_velocity, sample

    net, dimension = load_network(find_checkpoint(run)), int(arm.recipe.data.split("-")[1])
    with torch.no_grad():
        e = noise(0, range(COUNT), (dimension, 1, 1))
        x = sample(lambda z, t, r: average_velocity(net, z, t, r, {}), e).flatten(1)
    real, other = (mixture(dimension, COUNT, seed) for seed in (2, 3))
    return {"times the floor": energy_distance(x, other) / energy_distance(real, other)}


def judge(results: Results) -> list[Claim]:
    claims = []
    for dimension in DIMENSIONS:
        arms = tuple(f"{dimension}-D, ratio {ratio:g}" for ratio in RATIOS)
        best = results.best("times the floor", arms)
        worst = max(arms, key=lambda arm: results.mean(arm, "times the floor"))
        claims.append(Claim(f"{dimension}-D: ratio 0 is the worst; best is {best}", worst == arms[0]))
    return claims


BASE = TrainConfig(
    class_conditional=False,
    model="MLP",
    objective=MeanFlowConfig(time_sampler="v1", P_mean=0.4, P_std=1.6, P_mean_r=-2.5, P_std_r=1.6, norm_p=0.0),
    steps=800,
    global_batch=128,
    lr=1e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=50,
    max_grad_norm=1.0,
    ema_decay=(0.98,),
    checkpoint_every=800,
    sample_every=100_000,
)


def arm(dimension: int, ratio: float) -> Arm:
    objective = replace(BASE.objective, meanflow_ratio=ratio)
    return Arm(replace(BASE, data=f"mixture-{dimension}", objective=objective), {"data": Mixture})


TINY = Experiment(
    QUESTION, {f"{d}-D, ratio {ratio:g}": arm(d, ratio) for d in DIMENSIONS for ratio in RATIOS}, measure, judge
)
PAPER = None
