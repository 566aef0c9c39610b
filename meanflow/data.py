"""Data, and the loader that gives every sample of the run its image and its draws.

A slot is a sample's place in the run: step * global_batch + place in the global batch. Image, noise, times and label
drop are functions of (seed, slot), so the number of processes and of accumulation steps only changes who works on which
slots, and a run resumes by starting at another step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from meanflow.config import TrainConfig
from meanflow.time import Draws, generator, make_draws, noise, order_slots


@dataclass(frozen=True)
class Images:
    """Images in memory.

    Args:
        x: (N, C, *S), pixels in [-1, 1].
        y: classes in [0, num_classes), (N,) int64; None without classes.
    """

    x: Tensor
    y: Tensor | None
    num_classes: int

    def __post_init__(self) -> None:
        if self.y is not None and not (0 <= self.y.min() and self.y.max() < self.num_classes):
            raise ValueError(f"classes must be in [0, {self.num_classes}), got {self.y.min()} to {self.y.max()}")


def digits() -> tuple[Images, Images]:
    """scikit-learn's handwritten digits, (1, 8, 8) with 17 grey levels: 1,347 to train on and 450 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.25, stratify=data.target, random_state=0)
    x_train, x_held_out, y_train, y_held_out = (torch.from_numpy(part) for part in parts)
    return tuple(
        Images((x[:, None] / 8 - 1).float(), y.long(), 10) for x, y in ((x_train, y_train), (x_held_out, y_held_out))
    )


def load_images(recipe: TrainConfig) -> Images:
    """The recipe's training images.

    Raises:
        ValueError: unknown data, or a subset that they do not hold.
    """
    if recipe.data != "digits":
        raise ValueError(f"data must be digits, got {recipe.data}")
    images, _ = digits()
    if recipe.subset is None:
        return images
    num_classes, per_class = recipe.subset
    rows = [(images.y == label).nonzero()[:per_class, 0] for label in range(num_classes)]
    if any(len(row) < per_class for row in rows):
        raise ValueError(
            f"subset must be at most 10 classes of at most {images.y.bincount().min()}, got {recipe.subset}"
        )
    rows = torch.cat(rows)
    return Images(images.x[rows], images.y[rows], num_classes)


class SlotBatches(Sampler):
    """This process's micro-batches from step `start` on: lists of (image index, slot), the r != t slots first.

    Slot s holds image s % N of epoch s // N's permutation, so an epoch's images come once each.
    """

    def __init__(self, recipe: TrainConfig, num_images: int, start: int, stop: int, process: int, num_processes: int):
        self.recipe, self.num_images, self.steps = recipe, num_images, range(start, stop)
        self.process, self.num_processes = process, num_processes
        self.micro_batch, rest = divmod(recipe.global_batch, num_processes * recipe.accumulation_steps)
        if rest:
            raise ValueError(
                f"global_batch must be a multiple of processes x accumulation_steps "
                f"({num_processes} x {recipe.accumulation_steps}), got {recipe.global_batch}"
            )
        order_slots(recipe.objective, range(self.micro_batch), recipe.global_batch)  # refuses an inexact share now

    def __len__(self) -> int:
        return len(self.steps) * self.recipe.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        G, epoch = self.recipe.global_batch, None
        for step in self.steps:
            for micro_step in range(self.recipe.accumulation_steps):
                first = step * G + (micro_step * self.num_processes + self.process) * self.micro_batch
                batch = []
                for slot in order_slots(self.recipe.objective, range(first, first + self.micro_batch), G):
                    if slot // self.num_images != epoch:
                        epoch = slot // self.num_images
                        order = torch.randperm(
                            self.num_images, generator=generator(self.recipe.seed, epoch, "order")
                        ).tolist()
                    batch.append((order[slot % self.num_images], slot))
                yield batch


class SlotData(Dataset):
    """(x, y, draws) of a list of (image index, slot)."""

    def __init__(self, recipe: TrainConfig, images: Images):
        self.recipe, self.images = recipe, images

    def __getitems__(self, batch: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None, Draws]:
        indices, slots = map(list, zip(*batch))
        recipe, images = self.recipe, self.images
        x = images.x[indices]
        y = None if images.y is None else images.y[indices]
        draws = make_draws(recipe.objective, x.shape[1:], recipe.seed, slots, recipe.global_batch)
        if recipe.fixed_noise:
            draws.e.copy_(noise(recipe.seed, indices, x.shape[1:]))
        return x, y, draws


def make_loader(
    recipe: TrainConfig, images: Images, start: int, stop: int, process: int = 0, num_processes: int = 1
) -> DataLoader:
    """Micro-batches (x, y, draws) of this process for steps start to stop - 1, on the CPU.

    Raises:
        ValueError: the global batch does not divide, or a micro-batch cannot hold the exact share of r != t samples.
    """
    batches = SlotBatches(recipe, len(images.x), start, stop, process, num_processes)
    return DataLoader(SlotData(recipe, images), batch_sampler=batches, collate_fn=lambda batch: batch)
