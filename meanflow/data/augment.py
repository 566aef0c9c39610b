"""Augmentation by EDM (arXiv:2206.00364): it does not leak into the samples, because the network is told of it."""

import math

import torch
import torch.nn.functional as F


def augment(x: torch.Tensor, p: float, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors, scales, stretches and shifts images at random, with the settings of the authors' CIFAR-10 runs.

    EDM resamples through a wavelet; here it is bicubic. Beyond the edges the image is reflected.

    Args:
        x: square images in [-1, 1], (B, C, H, W).
        p: probability of each in [0, 1], except the mirroring, whose probability is 1/2.
        generators: one for each sample.
    Returns:
        The images, and the labels (B, 6): whether it is mirrored; log2 of the scale, in units of 0.2; log2 of the
        stretch, in units of 0.2, times the cosine and the sine of its axis; the shift in x and in y, in eighths of the
        side. A label is 0 where nothing was done.
    """
    draws = [(torch.rand(6, generator=random), torch.randn(4, generator=random)) for random in generators]
    uniform, normal = (torch.stack(numbers).unbind(1) for numbers in zip(*draws))
    mirror = uniform[0] < 0.5
    scale, stretch = (torch.where(uniform[i + 1] < p, normal[i], 0.0) for i in (0, 1))
    angle = torch.where(uniform[3] < 0.5, (2 * uniform[4] - 1) * math.pi, 0.0)  # half of the stretches are along x
    shift_x, shift_y = (torch.where(uniform[5] < p, normal[i], 0.0) for i in (2, 3))
    labels = torch.stack([mirror.float(), scale, stretch * angle.cos(), stretch * angle.sin(), shift_x, shift_y], dim=1)

    def matrix(*rows) -> torch.Tensor:  # (B, 3, 3)
        return torch.stack([torch.stack([torch.zeros_like(scale) + a for a in row], dim=-1) for row in rows], dim=1)

    def zoom(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return matrix((1 / a, 0, 0), (0, 1 / b, 0), (0, 0, 1))

    def turn(a: torch.Tensor) -> torch.Tensor:
        return matrix((a.cos(), a.sin(), 0), (-a.sin(), a.cos(), 0), (0, 0, 1))

    # From a place in the result to its place in x; coordinates are in [-1, 1], so an eighth of the side is 0.25.
    shift = matrix((1, 0, -0.25 * shift_x), (0, 1, -0.25 * shift_y), (0, 0, 1))
    grow, widen = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    place = zoom(grow, grow) @ turn(angle) @ zoom(widen, 1 / widen) @ turn(-angle) @ shift
    x = torch.where(mirror.view(-1, 1, 1, 1), x.flip(-1), x)
    grid = F.affine_grid(place[:, :2], list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(-1, 1)
    return torch.where(labels[:, 1:].any(dim=1).view(-1, 1, 1, 1), moved, x), labels
