"""Points of a plane, for recipes/toy2d.py: a ring of eight Gaussians, and a checkerboard."""

import math

import torch

from meanflow import TrainConfig
from meanflow.config import check
from meanflow.data.base import InMemory

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
        self.metadata["points"] = recipe.data  # so that a run does not go on with others

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """All points in one picture, (1, 1, 256, 256)."""
        place = ((x.view(-1, 2).cpu() + 1.6) / 3.2 * 256).long().clamp(0, 255)
        picture = torch.full((1, 1, 256, 256), -1.0)
        picture[0, 0, 255 - place[:, 1], place[:, 0]] = 1.0
        return picture
