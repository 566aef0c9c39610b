"""Samplers: from noise e at t = 1 to data at t = 0, for any u_fn(z, t, r) -> u.

This file needs only torch: a copy of it travels with every published model, beside the pipeline.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UFn = Callable[[Tensor, Tensor, Tensor], Tensor]
Cond = dict[str, Tensor]  # conditions that go to the network by keyword, each (B, ...)


def ensure(ok: bool, words: str) -> None:
    """Refuses an argument that is not ok, with these words."""
    if not ok:
        raise ValueError(words)


def expand(t: Tensor, z: Tensor) -> Tensor:
    """t, (B,), as (B, 1, ...) with as many axes as z."""
    return t.view(-1, *[1] * (z.ndim - 1))


def average_velocity(net: Callable, z: Tensor, t: Tensor, r: Tensor, cond: Cond, prediction="u", t_min=0.05) -> Tensor:
    """u(z_t, t, r | cond), like z; u(z_t, t, t | cond) is the instantaneous velocity.

    Args:
        net: net(z, t, h, **cond) with h = t - r.
        t, r: the interval's ends in [0, 1], r <= t, (B,).
        prediction: "u" if the network returns u; "x" if it returns x_hat, so that u = (z - x_hat) / max(t, t_min),
            arXiv:2601.22158.
    """
    return as_velocity(net(z, t, t - r, **cond), z, t, prediction, t_min)


def as_velocity(out: Tensor, z: Tensor, t: Tensor, prediction="u", t_min=0.05) -> Tensor:
    """The velocity that a network's output means; arguments as for average_velocity."""
    out = out.to(z.dtype)  # from autocast back to at least float32
    return out if prediction == "u" else (z - out) / expand(t.clamp(min=t_min), z)


def usual_interval(scale: float, interval: Sequence[float]) -> Sequence[float]:
    """The interval of a checkpoint; at scale 1, where none means anything, the middle of those that were trained.

    The network knows the middle best: at the ends the scales near 1 show through.
    """
    return (0.25, 0.75) if scale == 1 else interval


def guidance_conditions(scale: float, interval: Sequence[float], t: Tensor, is_ode: bool = False) -> Cond:
    """The conditions of a network that is told the CFG scale and the interval of times in which it acts; each (B,).

    Args:
        t: the times of the evaluation, (B,).
        is_ode: r = t, where networks are trained with the interval [0, 1]: outside of the interval the scale is then 1.
    """
    start, end = interval
    omega = torch.full_like(t, scale)
    if is_ode:
        omega = torch.where((start <= t) & (t <= end), omega, 1.0)
        start, end = 0.0, 1.0
    return {"omega": omega, "t_start": torch.full_like(t, start), "t_end": torch.full_like(t, end)}


def sample(u_fn: UFn, e: Tensor, num_steps: int = 1, grid: Sequence[float] | None = None) -> Tensor:
    """MeanFlow sampling, eq. (12) of arXiv:2505.13447: z_r = z_t - (t - r) u(z_t, t, r). One step: x = e - u(e, 1, 0).

    Args:
        u_fn: the average velocity with its conditions bound; t, r are (B,).
        e: noise, (B, C, *S).
        grid: falling times within [0, 1], such as (1, 0.5, 0); default: num_steps even steps from 1 to 0.
    Raises:
        ValueError: num_steps < 1, or a grid that does not fall.
    """
    ensure(num_steps >= 1, f"num_steps must be >= 1, got {num_steps}")
    grid = [1 - i / num_steps for i in range(num_steps + 1)] if grid is None else list(grid)
    falls = len(grid) >= 2 and all(t > r for t, r in zip(grid, grid[1:]))
    ensure(falls and grid[0] <= 1 and grid[-1] >= 0, f"grid must fall within [0, 1], got {grid}")
    z, ones = e, torch.ones(e.shape[:1], dtype=torch.promote_types(e.dtype, torch.float32), device=e.device)
    for t, r in zip(grid, grid[1:]):
        z = z - (t - r) * u_fn(z, t * ones, r * ones)
    return z


def euler(u_fn: UFn, e: Tensor, num_steps: int = 50) -> Tensor:
    """Euler's method for dz/dt = v, with the instantaneous velocity v(z, t) = u(z, t, t). Arguments as for `sample`."""
    return sample(lambda z, t, r: u_fn(z, t, t), e, num_steps)


def heun(u_fn: UFn, e: Tensor, num_steps: int = 25) -> Tensor:
    """Heun's method, of second order: two evaluations a step. Arguments as for `sample`."""

    def mean(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        v = u_fn(z, t, t)
        return (v + u_fn(z - expand(t - r, z) * v, r, r)) / 2

    return sample(mean, e, num_steps)


def rk4(u_fn: UFn, e: Tensor, num_steps: int = 12) -> Tensor:
    """The classical Runge-Kutta method, of fourth order: four evaluations a step. Arguments as for `sample`."""

    def mean(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        dt, middle = expand(t - r, z), (t + r) / 2
        a = u_fn(z, t, t)
        b = u_fn(z - dt / 2 * a, middle, middle)
        c = u_fn(z - dt / 2 * b, middle, middle)
        d = u_fn(z - dt * c, r, r)
        return (a + 2 * b + 2 * c + d) / 6

    return sample(mean, e, num_steps)


SOLVERS = {"meanflow": sample, "euler": euler, "heun": heun, "rk4": rk4}
STEPS = {"meanflow": 1, "euler": 50, "heun": 25, "rk4": 12}  # the default of each


def cfg(u_fn: Callable[[Tensor, Tensor, Tensor, Cond], Tensor], cond: Cond, null_class: int, cfg_scale: float) -> UFn:
    """Classifier-free guidance while sampling: u_null + cfg_scale (u_cond - u_null), arXiv:2207.12598.

    It evaluates both in one batch. The null class must have been trained on the intervals that are sampled.

    Args:
        u_fn: (z, t, r, cond) -> u.
        cond: its "y", (B,) int64, becomes the null class in the first half of the batch; the others stay.
    """
    null = {**cond, "y": torch.full_like(cond["y"], null_class)}
    both = {name: torch.cat([null[name], cond[name]]) for name in cond}

    def guided(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u_null, u_cond = u_fn(*(torch.cat([a, a]) for a in (z, t, r)), both).chunk(2)
        return u_null + cfg_scale * (u_cond - u_null)

    return guided
