"""Random numbers that are functions of a seed and a place: on the CPU, so the same on every machine.

It needs torch alone: a copy travels with every published model, beside the pipeline.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stream_seed(seed: int, index: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed} {index} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, index: int, stream: str = "draws") -> torch.Generator:
    """The random numbers of one slot, epoch or image; streams are independent of each other.

    torch keeps 32 bits of a seed: of 3e8 slots some 7 % share their numbers with another, at another time.
    """
    return torch.Generator().manual_seed(stream_seed(seed, index, stream))


def noise(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise, (len(indices), *shape), on the CPU; each image's depends on (seed, its index) alone."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index, "noise")) for index in indices])
