"""Samplers, against the official numbers and flows that are known exactly."""

import pytest
import torch
from conftest import assert_golden

from meanflow.sampler import average_velocity, cfg, euler, heun, rk4, sample


def test_one_and_four_steps_match_the_official_samples(golden, golden_net):
    """Step by step, on the official grid."""
    e, y = golden["sample.noise_nchw"], golden["sample.y"].long()

    def u_fn(z, t, r):
        return average_velocity(golden_net, z, t, r, {"y": y})

    assert_golden(sample(u_fn, e), golden["sample.one_nchw"])
    assert_golden(sample(u_fn, e, num_steps=4), golden["sample.four_step4_nchw"])
    grid = golden["sample.t_steps4"].tolist()
    for step in range(1, 5):
        assert_golden(sample(u_fn, e, grid=grid[: step + 1]), golden[f"sample.four_step{step}_nchw"])


def test_euler_converges_to_the_flow_with_first_order():
    """dz/dt = z has the flow e^-1; twice the steps halve the error. It asks for u at r = t only."""
    e = torch.ones(1, 1, dtype=torch.float64)

    def u_fn(z, t, r):
        assert torch.equal(t, r)
        return z

    errors = [abs(euler(u_fn, e, n) - torch.exp(-e)).item() for n in (200, 400)]
    assert errors[1] < 1e-3 and abs(errors[0] / errors[1] - 2) < 0.02


@pytest.mark.parametrize("solver, order", [(heun, 2), (rk4, 4)])
def test_heun_and_rk4_converge_with_their_orders(solver, order):
    """dz/dt = t z has the flow e^(-1/2); twice the steps divide the error by 2^order. They ask for u at r = t only."""
    e = torch.ones(1, 1, 1, dtype=torch.float64)

    def u_fn(z, t, r):
        assert torch.equal(t, r)
        return t.view(-1, 1, 1) * z

    errors = [(solver(u_fn, e, n) - torch.exp(-0.5 * e)).abs().item() for n in (50, 100)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


def test_cfg_extrapolates_from_the_null_class():
    """Scale 1 is only the class, 0 only the null class; other conditions stay."""
    y, z = torch.tensor([0, 1]), torch.randn(2, 3)
    t = torch.ones(2)

    def u_fn(z, t, r, cond):
        return z * cond["y"].view(-1, 1) + t.view(-1, 1) * cond["size"]

    given = {"y": y, "size": torch.tensor([[2.0], [3.0]])}
    null, cond = u_fn(z, t, t, {**given, "y": torch.full_like(y, 9)}), u_fn(z, t, t, given)
    for scale in (0.0, 1.0, 2.5):
        torch.testing.assert_close(cfg(u_fn, given, 9, scale)(z, t, t), null + scale * (cond - null))


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"grid": (1, 1, 0)}, {"grid": (0, 1)}, {"grid": (1.5, 0)}, {"grid": (1,)}]
)
def test_impossible_steps_are_refused(options):
    with pytest.raises(ValueError, match="num_steps must be >= 1|grid must fall"):
        sample(lambda z, t, r: z, torch.ones(1, 1), **options)
