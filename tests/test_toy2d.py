"""The plane: the exact velocity and average velocity against closed forms, and the recipe."""

import json
import sys

import pytest
import torch

from recipes.experiments.plane import CENTRES, POINTS, STD
from tools.toy2d_report import exact_average_velocity, exact_velocity


def test_exact_velocity_is_the_mean_of_all_paths_through_a_point():
    """By a weighted mean over many data: E[e - x | z_t = z], each weighted by how likely it leads through z."""
    x = POINTS["ring"](400_000, seed=0).double()
    z = torch.tensor([[0.6, 0.2], [0.0, -0.7], [0.3, 0.3]], dtype=torch.float64)
    for t in (0.3, 0.6, 0.95):
        e = (z[:, None] - (1 - t) * x) / t  # (3, N, 2): the noise that leads from x through z
        weights = (-e.square().sum(dim=2, keepdim=True) / 2).softmax(dim=1)
        expected = (weights * (e - x)).sum(dim=1)
        found = exact_velocity(z, torch.full((3,), t, dtype=torch.float64), CENTRES.double(), STD)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_average_velocity_of_one_gaussian_has_its_closed_form():
    """z_t scales with the standard deviation of z_t; at r = t it is the velocity."""
    std, z = 0.3, torch.randn(5, 2, dtype=torch.float64)
    sigma = lambda t: ((1 - t) ** 2 * std**2 + t**2) ** 0.5  # noqa: E731
    centre = torch.zeros(1, 2, dtype=torch.float64)
    for t, r in ((1.0, 0.0), (0.8, 0.3), (0.4, 0.1)):
        expected = z * (1 - sigma(r) / sigma(t)) / (t - r)
        torch.testing.assert_close(exact_average_velocity(z, t, r, centre, std), expected, rtol=1e-6, atol=1e-9)
    now = torch.full((5,), 0.4, dtype=torch.float64)
    expected = exact_velocity(z, now, centre, std)
    torch.testing.assert_close(exact_average_velocity(z, 0.4, 0.4, centre, std), expected)


def test_points_lie_where_they_should():
    """Of the checkerboard in the dark squares, each equally often; of the ring around the circle."""
    board = POINTS["checkerboard"](8000, seed=1)
    square = ((board + 1) * 2).long()
    assert ((square.sum(dim=1) % 2) == 0).all()
    counts = torch.bincount(4 * square[:, 1] + square[:, 0], minlength=16)
    assert (counts > 0).sum() == 8 and counts[counts > 0].min() > 850
    assert (POINTS["ring"](1000, seed=1).norm(dim=1) - 1).abs().mean() < STD


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ring", "checkerboard"])
def test_recipe_and_report(data, tool, tmp_path, monkeypatch):
    """Few steps: pictures, an animation and the numbers; no more is asked of so short a run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = tmp_path / "run"
    flags = ("--steps", 20, "--workers", 0, "--ema-decay", 0.5, "--out", run)
    tool("recipes/toy2d", "--data", data, *flags)
    shown = tool("toy2d_report", run)
    assert "one step is " in shown and ("relative error of u" in shown) == (data == "ring")
    for name in ("toy2d.png", "particles.gif"):
        assert (run / name).stat().st_size > 10_000
    assert json.loads((run / "toy2d.json").read_text())["ratio"] > 1
    assert "data must be one of ring, checkerboard, got blobs" in tool(
        "recipes/toy2d", "--data", "blobs", *flags[:-1], tmp_path / "x"
    )
    assert "belongs to another recipe (data.json's points ring there" in tool(
        "recipes/toy2d", "--data", "checkerboard", *flags
    ) or (data == "checkerboard")
