"""MeanFlow on points of a plane: a ring of eight Gaussians, or a checkerboard, with an MLP, in a minute on 2 CPU cores.

    python recipes/toy2d.py                                  # the ring
    python recipes/toy2d.py --data checkerboard --out runs/checkerboard
    python tools/toy2d_report.py runs/toy2d                  # compares u with the true average velocity, and draws it

Every field is a flag. The same command resumes from --out. No paper has these figures; ours: docs/evaluation.md.
"""

import math
from pathlib import Path

import torch

from meanflow import MeanFlowConfig, TrainConfig, run
from meanflow.config import check
from meanflow.data.base import InMemory

RECIPE = TrainConfig(
    out=Path("runs/toy2d"),
    data="ring",
    class_conditional=False,
    model="MLP",
    objective=MeanFlowConfig(
        meanflow_ratio=0.5,
        time_sampler="v1",
        P_mean=0.4,
        P_std=1.6,
        P_mean_r=-2.5,
        P_std_r=1.6,
        norm_p=0.0,  # of two numbers, the weight would take the mode of the velocity for its mean
        class_dropout_prob=0.0,
    ),
    steps=2500,
    global_batch=512,
    lr=1e-3,
    betas=(0.9, 0.99),
    schedule="cosine",
    warmup_steps=100,
    max_grad_norm=1.0,
    ema_decay=(0.998,),
    workers=1,
    log_every=100,
    checkpoint_every=1250,
    sample_every=1250,
)

CENTRES = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
STD = 0.1  # of each Gaussian of the ring


def ring(count: int, seed: int) -> torch.Tensor:
    """Points of eight Gaussians around a circle of radius 1, (count, 2)."""
    random = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (count,), generator=random)
    return CENTRES[which] + STD * torch.randn(count, 2, generator=random)


def checkerboard(count: int, seed: int) -> torch.Tensor:
    """Points of the dark squares of a board of 4 x 4 in [-1, 1] x [-1, 1], (count, 2)."""
    random = torch.Generator().manual_seed(seed)
    column = torch.randint(4, (count,), generator=random)
    row = 2 * torch.randint(2, (count,), generator=random) + column % 2
    corner = torch.stack([column, row], dim=1) / 2 - 1
    return corner + torch.rand(count, 2, generator=random) / 2


POINTS = {"ring": ring, "checkerboard": checkerboard}


class Plane(InMemory):
    """50,000 points, each a sample of shape (2, 1, 1)."""

    def __init__(self, recipe: TrainConfig):
        check(recipe.data in POINTS, "data", recipe.data, f"one of {', '.join(POINTS)}")
        super().__init__(POINTS[recipe.data](50_000, seed=0).view(-1, 2, 1, 1), None, 0)

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """All points in one picture, (1, 1, 256, 256)."""
        place = ((x.view(-1, 2) + 1.6) / 3.2 * 256).long().clamp(0, 255)
        picture = torch.full((1, 1, 256, 256), -1.0)
        picture[0, 0, 255 - place[:, 1], place[:, 0]] = 1.0
        return picture


if __name__ == "__main__":
    run(RECIPE, data=Plane)
