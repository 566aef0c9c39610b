"""Distances between two sets of images, in whatever features one gives them."""

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 2048  # rows whose distances are held at once


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| over all pairs, diagonals included, so that it is never negative.

    It is 0 only for equal distributions (Szekely and Rizzo 2013). Its unit is that of the features.

    Args:
        x, y: (N, D) and (M, D).
    """
    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def mean_distance(x: Tensor, y: Tensor) -> float:
    """The mean of |x_i - y_j| over all pairs, in float64, a block at a time."""
    blocks = ((a.double(), b.double()) for a in x.split(BLOCK) for b in y.split(BLOCK))
    return float(sum(torch.cdist(a, b, compute_mode=mode_for(x)).sum() for a, b in blocks)) / (len(x) * len(y))


def nearest(x: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The distance of each row to the nearest of other rows, and that row's number, both (N,), in float64.

    Args:
        x: (N, D).
        parts: the other rows, which come in parts, (n, D) each.
    """
    least, found, first = torch.full((len(x),), torch.inf).double(), torch.zeros(len(x)).long(), 0
    for part in parts:
        distance, row = torch.cdist(x.double(), part.double(), compute_mode=mode_for(x)).min(dim=1)
        is_nearer = distance < least
        least, found = torch.where(is_nearer, distance, least), torch.where(is_nearer, first + row, found)
        first += len(part)
    return least, found


def mode_for(x: Tensor) -> str:
    """By way of squares, which is much faster for many numbers, a distance has 8 digits and not 16."""
    return "donot_use_mm_for_euclid_dist" if x.shape[1] <= 128 else "use_mm_for_euclid_dist"


class Moments:
    """The mean and the covariance of rows that come in parts, in float64."""

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Takes more rows, (n, D)."""
        rows = rows.double()
        mean, total = rows.mean(dim=0), self.count + len(rows)
        centred, shift = rows - mean, mean - self.mean
        # The scatter of both parts, each around its own mean, and that of the two means.
        self.scatter = self.scatter + centred.T @ centred + torch.outer(shift, shift) * self.count * len(rows) / total
        self.mean, self.count = self.mean + shift * len(rows) / total, total

    @classmethod
    def of(cls, rows: Tensor) -> dict:
        """The statistics of rows that are all there."""
        moments = cls()
        moments.add(rows)
        return moments.statistics()

    def statistics(self) -> dict:
        """mu, (D,), and sigma, (D, D), as torch-fidelity takes them."""
        return {"mu": self.mean.numpy(), "sigma": (self.scatter / (self.count - 1)).numpy()}


def frechet_distance(one: dict, other: dict) -> float:
    """|mu - mu'|^2 + tr(sigma + sigma' - 2 (sigma sigma')^(1/2)), by torch-fidelity.

    Only in Inception's features is this FID (arXiv:1706.08500).

    Args:
        one, other: mu, (D,), and sigma, (D, D), of each set.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    same = [{name: value.astype("float64") for name, value in statistics.items()} for statistics in (one, other)]
    return fid_statistics_to_metric(*same, verbose=False)[KEY_METRIC_FID]
