"""The protocol of data. Data of your own are one class that follows it."""

import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from meanflow.config import Refusal, check
from meanflow.noise import generator, stream_seed
from meanflow.pictures import middle_slices
from meanflow.program import speaks_first


class UnreadableSample(Refusal):
    """A sample that cannot be decoded; the message names it."""


def check_fits(size: int, name: str, value: object) -> None:
    """Refuses a value that needs more memory than this machine has; size: in bytes."""
    import psutil

    total = psutil.virtual_memory().total
    check(size <= total, name, value, f"such that {size / 2**30:.3g} GiB fit into memory, of {total / 2**30:.3g} GiB")


def say_left_out(folder: Path, left_out: list[str]) -> None:
    """Says which files of a folder of data are not taken, apart from hidden ones."""
    left_out = [path for path in left_out if not os.path.basename(path).startswith(".")]
    if left_out and speaks_first():
        examples = ", ".join(sorted(left_out)[:3])
        print(f"warning: {folder}: {len(left_out)} files or empty folders are left out: {examples}", file=sys.stderr)


class Data:
    """What a network can be trained on."""

    shape: tuple[int, ...]  # of one sample as the network sees it, (C, *S)
    num_classes: int = 0  # 0: without classes
    metadata: dict  # JSON that says what the data are; count: how many samples; classes: the classes' names
    held_out: "Data | None" = None  # samples that are not trained on, which generated ones are compared with

    def __len__(self) -> int:
        return self.metadata["count"]

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor | tuple, dict]:
        """These samples, and the conditions that go to the network by keyword.

        Args:
            generators: one for each sample; all that is random about the sample, such as a flip, is drawn from it.
        Returns:
            x, (B, C, *S) float32 in model units, and a dict of tensors (B, ...): y, the classes, (B,) int64, if there
            are any, and further conditions by name. Where the data have an `encode`, x may be a tuple of its arguments.
        """
        raise NotImplementedError

    # Data that are made ready on the training device, such as images that go through a VAE, have a method
    # encode(*x) -> x in model units.
    encode = None

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Reads of files what is quickly read, one part of it, so that no damage stops a run later.

        Raises:
            ValueError: a file is damaged; the message names it.
        """

    def read_all(self, part: int = 0, num_parts: int = 1) -> None:
        """Reads every sample of one part.

        Raises:
            UnreadableSample: the first that cannot be read.
        """
        for index in tqdm(range(part, len(self), num_parts), "samples", disable=part > 0):
            self.batch([index], [generator(0, index, "data")])

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] to look at, (B, 1 or 3, H, W), from model units."""
        return middle_slices(x) if x.ndim == 5 else x[:, :3]

    def channel_variance(self, max_samples: int = 1024) -> torch.Tensor:
        """The variance of each channel, (C,) float64, over samples that are evenly spread.

        Raises:
            ValueError: a channel is constant.
        """
        sums = torch.zeros(2, self.shape[0], dtype=torch.float64)
        rows = torch.linspace(0, len(self) - 1, min(len(self), max_samples)).long().tolist()
        for row in rows:
            x, _ = self.batch([row], [generator(0, row, "variance")])
            x = (self.encode(*x) if isinstance(x, tuple) else x)[0].double().flatten(1)
            sums += torch.stack([x.mean(dim=1), x.square().mean(dim=1)]) / len(rows)
        variance = sums[1] - sums[0] ** 2
        if not (variance > 0).all():
            raise ValueError(f"channel_weights: a channel is constant, the variances are {variance.tolist()}")
        return variance


class InMemory(Data):
    """Images or volumes in memory.

    Args:
        x: (N, C, *S), pixels in [-1, 1], latents in model units, or volumes.
        y: classes in [0, num_classes), (N,) int64; None without classes.
        latents: {"shift", "scale"} of latents, for a sampler.
    Raises:
        ValueError: a class is out of range.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor | None, num_classes: int, latents: dict | None = None):
        if y is not None and not (0 <= y.min() and y.max() < num_classes):
            raise ValueError(f"classes must be in [0, {num_classes}), got {y.min()} to {y.max()}")
        self.x, self.y, self.num_classes = x, y, num_classes
        self.shape = tuple(x.shape[1:])
        self.metadata = {"count": len(x), "classes": list(map(str, range(num_classes))), "latents": latents}

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor, dict]:
        return self.x[indices], {"y": self.y[indices]} if self.num_classes else {}


class Part(Data):
    """Some of the samples of other data; rows: their indices."""

    def __init__(self, data: Data, rows: list[int], share: float):
        self.data, self.rows, self.shape, self.num_classes = data, rows, data.shape, data.num_classes
        self.encode, self.to_pixels, self.verify = data.encode, data.to_pixels, data.verify
        self.metadata = {**data.metadata, "count": len(rows), "held_out": share}

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor | tuple, dict]:
        return self.data.batch([self.rows[index] for index in indices], generators)


def hold_out(data: Data, share: float) -> Data:
    """The samples to train on; about this share, picked by a hash of their indices, becomes their held_out.

    Raises:
        Refusal: one of both is empty, or the data have a held-out part of their own.
    """
    if share == 0:
        return data
    check(data.held_out is None, "held_out", share, "0 for these data, which have samples held out as they are")
    are_held = [stream_seed(0, index, "held-out") < share * 2**64 for index in range(len(data))]
    held, kept = ([index for index, is_held in enumerate(are_held) if is_held == side] for side in (True, False))
    check(held and kept, "held_out", share, f"such that it leaves samples on both sides, of {len(data)}")
    training = Part(data, kept, share)
    training.held_out = Part(data, held, share)
    return training
