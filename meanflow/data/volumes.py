"""Volumes, such as the latents of scans: a folder of files, and a synthetic set to try things with."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from meanflow.data.base import Data, UnreadableSample, say_left_out
from meanflow.files import ensure, errors_as, fingerprint

SUFFIXES = (".npy", ".safetensors")


def has_volumes(folder: Path) -> bool:
    return folder.is_dir() and any(may_be_volume(path) for path in folder.iterdir())


def may_be_volume(path: Path) -> bool:
    return path.suffix in SUFFIXES and path.is_file()


class Volumes(Data):
    """The volumes of a folder's .npy files, and of its .safetensors files with the key volume: each (C, D, H, W).

    They stay in the units that they have. They have no classes.

    Raises:
        ValueError: one has another shape; the message names the file.
    """

    def __init__(self, folder: Path):
        self.files = [path for path in sorted(folder.iterdir()) if may_be_volume(path)]
        say_left_out(folder, [str(path) for path in folder.iterdir() if not may_be_volume(path)])
        first, *others = self.files
        self.shape = volume(first, shape_only=True)
        is_volume = len(self.shape) == 4 and 0 not in self.shape
        ensure(is_volume, f"{first}: a volume must be (C, D, H, W), got {self.shape}")
        for path in others:
            shape = volume(path, shape_only=True)
            ensure(shape == self.shape, f"{path}: a volume must be like {first.name}, {self.shape}, got {shape}")
        self.metadata = {"source": str(folder), "count": len(self.files), "classes": []}
        self.metadata["fingerprint"] = fingerprint(self.files)

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor, dict]:
        volumes = [volume(self.files[index]) for index in indices]
        for index, x in zip(indices, volumes):
            if x.shape != self.shape:
                raise UnreadableSample(f"{self.files[index]} has become {tuple(x.shape)}, and was {self.shape}")
        return torch.stack(volumes), {}


def volume(path: Path, shape_only: bool = False) -> torch.Tensor | tuple[int, ...]:
    """A file's volume in float32, or its shape without reading the rest.

    Raises:
        UnreadableSample: naming it.
    """
    with errors_as(f"{path} is no readable volume", UnreadableSample):
        if path.suffix == ".npy":
            entry = np.load(path, mmap_mode="r")
            kind, shape = entry.dtype, entry.shape
            holds_numbers = kind.kind in "fiu"
        else:
            entry = safe_open(path, "pt").get_slice("volume")
            kind, shape = entry.get_dtype(), tuple(entry.get_shape())
            holds_numbers = kind not in ("BOOL", "C64")
        if not holds_numbers:
            raise ValueError(f"its numbers are {kind}, and must be floating-point numbers or integers")
        if shape_only:
            return shape
        x = torch.from_numpy(np.array(entry, np.float32)) if path.suffix == ".npy" else entry[:].float()
        if not x.isfinite().all():
            raise ValueError("it has values that are not finite")
    return x


def shapes(count: int = 512, side: int = 16) -> torch.Tensor:
    """Smooth random balls, (count, 4, side, side, side); each channel has a mean and a deviation of its own."""
    random, axis = torch.Generator().manual_seed(0), torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))  # (3, D, H, W)
    centre = torch.rand(count, 4, 3, 1, 1, 1, generator=random) - 0.5
    radius = 0.3 + 0.4 * torch.rand(count, 4, 1, 1, 1, generator=random)
    balls = torch.sigmoid(6 * (1 - (grid - centre).norm(dim=2) / radius))
    shift, scale = (torch.tensor(values).view(-1, 1, 1, 1) for values in ([-0.3, 0.5, 0.4, -0.2], [1.0, 3.0, 0.5, 2.0]))
    return (balls - shift) * scale
