"""Distances, against their definitions and closed forms; the digits' own floor."""

import numpy as np
import torch

from meanflow.data.sources import digits
from meanflow.evaluation import distances
from meanflow.evaluation.distances import Moments, energy_distance, frechet_distance, nearest


def test_energy_distance_is_its_definition(monkeypatch):
    """By a double loop; it is 0 between a set and itself, whatever the blocks."""
    monkeypatch.setattr(distances, "BLOCK", 7)
    x, y = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 20, 3)))
    y = y[:15]

    def mean(a, b):
        return np.mean([np.linalg.norm(p - q) for p in a for q in b])

    assert abs(energy_distance(x, y) - (2 * mean(x, y) - mean(x, x) - mean(y, y))) < 1e-12
    assert abs(energy_distance(x, x)) < 1e-12


def test_moments_of_parts_are_those_of_the_whole():
    """Far from the origin, where sums of squares would lose their digits; parts of one row, too."""
    rows = torch.from_numpy(1e4 + np.random.default_rng(0).normal(size=(40, 5)))
    moments = Moments()
    for part in rows.split([1, 13, 25, 1]):
        moments.add(part)
    found = moments.statistics()
    np.testing.assert_allclose(found["mu"], rows.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found["sigma"], np.cov(rows.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_frechet_distance_of_commuting_covariances_has_its_closed_form():
    """For diagonal covariances it is |mu - nu|^2 + sum (a - b)^2 of the standard deviations; one of them 0."""
    unit = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1.0]]) * np.sqrt(3 / 4)  # covariance: the identity
    a, b, shift = np.array([1.0, 2.0, 0.0]), np.array([3.0, 1.0, 0.0]), np.array([1.0, 0.0, 2.0])
    one, other = (Moments.of(torch.from_numpy(rows)) for rows in (unit * a, unit * b + shift))
    assert abs(frechet_distance(one, other) - (5 + (4 + 1))) < 1e-6  # by the roots of the product's eigenvalues


def test_real_digits_have_their_known_distance_to_the_held_out_ones():
    """The floor that every generator is compared with."""
    real, held_out = (((part.x + 1) * 8).flatten(1) for part in digits())
    assert abs(energy_distance(real, held_out) - 0.108) < 0.001
    assert abs(frechet_distance(Moments.of(real), Moments.of(held_out)) - 22.6) < 0.1
    assert real.shape == (1347, 64)


def test_nearest_is_found_in_any_parts():
    x, y = torch.randn(7, 20), torch.randn(50, 20)
    expected, rows = torch.cdist(x.double(), y.double()).min(dim=1)
    for size in (1, 8, 50):
        least, found = nearest(x, y.split(size))
        assert torch.allclose(least, expected) and torch.equal(found, rows)
