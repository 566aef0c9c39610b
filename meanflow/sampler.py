"""Samplers: from noise e at t = 1 to data at t = 0, for any u_fn(z, t, r) -> u."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

UFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def time_grid(num_steps: int) -> list[float]:
    """num_steps + 1 times, evenly spaced from 1 to 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    return [1 - i / num_steps for i in range(num_steps + 1)]


def sample(u_fn: UFn, e: Tensor, num_steps: int = 1, grid: Sequence[float] | None = None) -> Tensor:
    """MeanFlow sampling, eq. (12) of arXiv:2505.13447: z_r = z_t - (t - r) u(z_t, t, r). One step: x = e - u(e, 1, 0).

    Args:
        u_fn: average velocity with the labels bound; t, r are (B,).
        e: noise, (B, C, *S).
        grid: other times than num_steps even steps, falling within [0, 1], e.g. (1, 0.5, 0).
    Raises:
        ValueError: num_steps < 1 or a grid that does not fall.
    """
    grid = time_grid(num_steps) if grid is None else list(grid)
    if len(grid) < 2 or not (1 >= grid[0] and grid[-1] >= 0 and all(t > r for t, r in zip(grid, grid[1:]))):
        raise ValueError(f"grid must fall within [0, 1], got {grid}")
    z, ones = e, torch.ones(e.shape[:1], dtype=torch.promote_types(e.dtype, torch.float32), device=e.device)
    for t, r in zip(grid, grid[1:]):
        z = z - (t - r) * u_fn(z, t * ones, r * ones)
    return z


def euler(u_fn: UFn, e: Tensor, num_steps: int = 50) -> Tensor:
    """Euler's method for dz/dt = v, with the instantaneous velocity v(z, t) = u(z, t, t). Arguments as for `sample`."""
    return sample(lambda z, t, r: u_fn(z, t, t), e, num_steps)


def cfg(u_fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], y: Tensor, null_class: int, cfg_scale: float) -> UFn:
    """Classifier-free guidance while sampling: u_null + cfg_scale (u_cond - u_null), arXiv:2207.12598.

    Two evaluations a step, in one batch. It needs a null class that was trained on the intervals that are sampled.

    Args:
        u_fn: (z, t, r, y) -> u. y: (B,) int64.
    """
    labels = torch.cat([torch.full_like(y, null_class), y])

    def guided(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u_null, u_cond = u_fn(*(torch.cat([a, a]) for a in (z, t, r)), labels).chunk(2)
        return u_null + cfg_scale * (u_cond - u_null)

    return guided
