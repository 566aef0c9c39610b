"""Random numbers that are functions of a seed and a place. They are drawn on the CPU, so every machine has the same.

This file needs only torch: a copy of it travels with every published model, beside the pipeline.
"""

import hashlib

import torch


def stream_seed(seed: int, index: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed} {index} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, index: int, stream: str = "draws") -> torch.Generator:
    """The random numbers of one slot, epoch or image; streams are independent of each other.

    torch keeps 32 bits of a seed: of 3e8 slots some 7 % share their numbers with another slot, at another time.
    """
    return torch.Generator().manual_seed(stream_seed(seed, index, stream))


def arc(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """The noise at this share of the way from a to b, on the arc between them, so that it is as long as noise is."""
    angle = (a * b).sum().div(a.norm() * b.norm()).clamp(-1, 1).acos()
    if angle < 1e-3:
        return a
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def noise(seed: int, indices, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, (len(indices), *shape), on the CPU; image k's noise depends only on (seed, k)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index, "noise")) for index in indices])
