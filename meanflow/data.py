"""Data, and the loader that gives every sample of the run its image and its draws.

A slot is a sample's place in the run: step * global_batch + place in the global batch. Image, flip, noise, times and
label drop are functions of (seed, slot), so the number of processes and of accumulation steps only changes who works on
which slots, and a run resumes by starting at another step.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from meanflow.augment import augment
from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.images import Data, ImageFiles
from meanflow.latents import LATENTS, EncodedImages, Latents
from meanflow.noise import generator, noise
from meanflow.time import Draws, make_draws, order_slots
from meanflow.volumes import SUFFIXES, Volumes, shapes


@dataclass
class Images(Data):
    """Images or volumes in memory.

    Args:
        x: (N, C, *S), pixels in [-1, 1], latents in model units, or volumes.
        y: classes in [0, num_classes), (N,) int64; None without classes.
        latents: the shift and scale of latents, for a sampler.
    """

    x: Tensor
    y: Tensor | None
    num_classes: int
    latents: dict | None = None

    def __post_init__(self) -> None:
        if self.y is not None and not (0 <= self.y.min() and self.y.max() < self.num_classes):
            raise ValueError(f"classes must be in [0, {self.num_classes}), got {self.y.min()} to {self.y.max()}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def facts(self) -> dict:
        return {"count": len(self.x), "classes": list(map(str, range(self.num_classes))), "latents": self.latents}

    def batch(self, indices: Sequence[int], randoms: Iterable[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        return self.x[indices], self.y[indices] if self.num_classes else None


def digits(resolution: int = 8) -> tuple[Images, Images]:
    """scikit-learn's handwritten digits, (1, 8, 8) with 17 grey levels: 1,347 to train on and 450 held out.

    Another resolution: they are scaled to it bilinearly.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x, y = torch.from_numpy(data.images[:, None] / 8 - 1).float(), torch.from_numpy(data.target).long()
    if resolution != 8:
        x = F.interpolate(x, (resolution, resolution), mode="bilinear", align_corners=False)
    train, held_out = train_test_split(range(len(y)), test_size=0.25, stratify=data.target, random_state=0)
    return Images(x[train], y[train], 10), Images(x[held_out], y[held_out], 10)


def load_data(recipe: TrainConfig) -> Data:
    """The recipe's training data.

    Raises:
        ValueError: there are none, they are damaged, or they are not what the recipe expects; the message says what.
    """
    data = open_data(recipe)
    if not recipe.class_conditional:
        data.num_classes = 0
        data.facts["classes"] = []
    if recipe.augment and (len(data.shape) != 3 or data.shape[1] != data.shape[2] or recipe.vae):
        raise ValueError(f"augment is for square images in pixels, got {recipe.augment} for {recipe.data}")
    return data


def open_data(recipe: TrainConfig) -> Data:
    folder = Path(recipe.data).expanduser()
    if recipe.smoke and recipe.vae:
        return random_latents(recipe)
    if recipe.data != "digits" and recipe.subset:
        raise ValueError(f"subset is for digits, got data {recipe.data}")
    files = recipe.resolution is None and folder.is_dir() and any(path.suffix in SUFFIXES for path in folder.iterdir())
    for name in ("vae", "flip"):
        if getattr(recipe, name) and (files or recipe.data in ("digits", "shapes")):
            raise ValueError(f"{name} is not for {recipe.data}, got {getattr(recipe, name)}: say where the --data are")
    if recipe.data == "digits":
        images = digits(recipe.resolution or 8)[0]
        return subset(images, recipe.subset) if recipe.subset else images
    if recipe.data == "shapes":
        return Images(shapes(), None, 0)
    if (folder / LATENTS).exists() or (folder / ".progress").exists():
        return Latents(folder, recipe)
    if files:
        return Volumes(folder)
    if recipe.resolution is None:
        raise ValueError(f"resolution must be given for images, got None, and {folder} is no folder with volumes")
    if recipe.vae and recipe.data.startswith(".") and not folder.exists():
        raise ValueError(f"{recipe.data}: no such folder: say where with --data; tools/cache_latents.py makes latents")
    images = ImageFiles(recipe.data, recipe.resolution, flip=recipe.flip, crop=recipe.crop)
    return images if recipe.vae is None else EncodedImages(images, recipe)


def channel_weights(objective: MeanFlowConfig, data: Data) -> tuple[float, ...] | None:
    """The objective's, where they are numbers; else 1 / the variance of each channel, of 1,024 samples at most."""
    if objective.channel_weights != "inverse-variance":
        return objective.channel_weights
    sums = torch.zeros(2, data.shape[0], dtype=torch.float64)
    rows = torch.linspace(0, len(data) - 1, min(len(data), 1024)).long().tolist()
    for row in rows:
        x, _ = data.batch([row], [generator(0, row, "variance")])
        x = (data.encode(*x) if isinstance(x, tuple) else x)[0].double().flatten(1)
        sums += torch.stack([x.mean(dim=1), x.square().mean(dim=1)]) / len(rows)
    variance = sums[1] - sums[0] ** 2
    if not (variance > 0).all():
        raise ValueError(f"channel_weights: a channel is constant, the variances are {variance.tolist()}")
    return tuple((1 / variance).tolist())


def random_latents(recipe: TrainConfig) -> Images:
    """A smoke test's data: 256 latents as Stable Diffusion's VAE shapes them, of 1,000 classes."""
    size, random = recipe.resolution // 8, torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 4, size, size, generator=random), torch.randint(1000, (256,), generator=random)
    return Images(x, y, num_classes=1000, latents={"shift": 0.0, "scale": recipe.scaling_factor})


def subset(images: Images, size: tuple[int, int]) -> Images:
    """The first images of the first classes; size: how many classes, and how many images of each."""
    num_classes, per_class = size
    rows = [(images.y == label).nonzero()[:per_class, 0] for label in range(num_classes)]
    if any(len(row) < per_class for row in rows):
        raise ValueError(f"subset must be at most 10 classes of at most {images.y.bincount().min()}, got {size}")
    return Images(images.x[torch.cat(rows)], images.y[torch.cat(rows)], num_classes)


class SlotBatches(Sampler):
    """This process's micro-batches from step `start` on: lists of (image index, slot), the r != t slots first.

    Slot s holds image s % N of epoch s // N's permutation, so an epoch's images come once each.
    """

    def __init__(self, recipe: TrainConfig, num_images: int, start: int, stop: int, process: int, num_processes: int):
        self.recipe, self.num_images, self.steps = recipe, num_images, range(start, stop)
        self.process, self.num_processes = process, num_processes
        self.micro_batch, rest = divmod(recipe.global_batch, num_processes * recipe.accumulation_steps)
        if rest:
            parts = f"processes x accumulation_steps ({num_processes} x {recipe.accumulation_steps})"
            raise ValueError(f"global_batch must be a multiple of {parts}, got {recipe.global_batch}")
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
                        random = generator(self.recipe.seed, epoch, "order")
                        order = torch.randperm(self.num_images, generator=random).tolist()
                    batch.append((order[slot % self.num_images], slot))
                yield batch


class SlotData(Dataset):
    """(x, y, draws, augment_labels) of a list of (image index, slot)."""

    def __init__(self, recipe: TrainConfig, data: Data):
        self.recipe, self.data = recipe, data

    def __getitems__(self, batch: list[tuple[int, int]]) -> tuple[Any, Tensor | None, Draws, Tensor | None]:
        indices, slots = map(list, zip(*batch))
        recipe, shape = self.recipe, self.data.shape
        x, y = self.data.batch(indices, (generator(recipe.seed, slot, "data") for slot in slots))
        draws = make_draws(recipe.objective, shape, recipe.seed, slots, recipe.global_batch)
        if recipe.fixed_noise:
            draws.e.copy_(noise(recipe.seed, indices, shape))
        if not recipe.augment:
            return x, y, draws, None
        x, labels = augment(x, recipe.augment, (generator(recipe.seed, slot, "augment") for slot in slots))
        return x, y, draws, labels


def make_loader(
    recipe: TrainConfig, data: Data, start: int, stop: int, process: int = 0, num_processes: int = 1
) -> DataLoader:
    """Micro-batches (x, y, draws, augment_labels) of this process for steps start to stop - 1, on the CPU.

    Raises:
        ValueError: the global batch does not divide, or a micro-batch cannot hold the exact share of r != t samples.
    """
    batches = SlotBatches(recipe, len(data), start, stop, process, num_processes)
    fork = "fork" if recipe.workers and sys.platform == "linux" else None  # which copies no data
    options = {"num_workers": recipe.workers, "multiprocessing_context": fork, "pin_memory": torch.cuda.is_available()}
    return DataLoader(SlotData(recipe, data), batch_sampler=batches, collate_fn=default_convert, **options)
