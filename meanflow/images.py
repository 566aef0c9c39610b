"""What data are; image files of any source that datasets reads, cropped as ImageNet's reference statistics assume."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from meanflow.files import errors_as
from meanflow.pictures import middle_slices

CROP = "ADM centre crop"


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, size x size, RGB, as ADM prepares ImageNet (arXiv:2105.05233).

    Halved by a box filter while the shorter side is at least twice the size, then scaled to it bicubically. The
    orientation that a camera notes is not applied, as there.
    """
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_source(source: str, split: str):
    """A datasets.Dataset, its images not yet decoded.

    Args:
        source: a folder of images (class by subfolder), of parquet or of arrow files, one such file, a folder of
            save_to_disk, or a Hub id.
        split: of a Hub id or a folder that has it; a subfolder of this name counts if it has subfolders or tables, and
            tables whose names begin with it.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    if not path.exists() and (source.count("/") != 1 or source.startswith((".", "~", "/")) or path.parent.exists()):
        raise ValueError(f"{source}: no such file or folder, and no Hub id (owner/name)")
    with errors_as(f"{source}: datasets cannot open it"):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if path.is_file():
            return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
        if path.is_dir():
            inside = list((path / split).iterdir()) if (path / split).is_dir() else []
            if any(entry.is_dir() or entry.suffix in (".parquet", ".arrow") for entry in inside):
                path = path / split
            # All its files, or the split's tables: datasets by itself takes a class such as bullet_train for a split.
            tables = any(entry.suffix in (".parquet", ".arrow") for entry in path.rglob(f"{split}*"))
            return datasets.load_dataset(str(path), data_files=f"**/{split}*" if tables else "**", split="train")
        return datasets.load_dataset(source, split=split)


class Data:
    """What a network can be trained on."""

    shape: tuple[int, ...]  # of a sample as the network sees it, (C, *S)
    num_classes: int  # 0: without classes
    facts: dict  # what a sampler has to know, as JSON; count: of the samples

    def __len__(self) -> int:
        return self.facts["count"]

    def batch(self, indices: Sequence[int], randoms: Iterable[torch.Generator]) -> tuple[Any, Tensor | None]:
        """x, (B, C, *S) float32 in model units, and y, (B,) int64; a sample's randomness is its generator's."""

    def to_pixels(self, x: Tensor) -> Tensor:
        """Images in [-1, 1] to look at, (B, 1 or 3, H, W), from model units."""
        return middle_slices(x) if x.ndim == 5 else x[:, :3]


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message names it."""


class ImageFiles(Data):
    """Images of a source, (3, size, size) in [-1, 1], and their classes, if a column has any.

    The first column of type Image counts, and the first ClassLabel or one called label. Without crop images must have
    the size, and all are read now and kept in memory.

    Raises:
        ValueError: there is no such source, it is empty, it has no images, or a label is no class.
        UnreadableImage: without crop, an image cannot be read or has another size.
    """

    def __init__(self, source: str, size: int, split: str = "train", flip: bool = False, crop: bool = True):
        import datasets

        self.source, self.flip, self.crop, self.shape = source, flip, crop, (3, size, size)
        rows = open_source(source, split)
        if not len(rows):
            raise ValueError(f"{source} is empty")
        kinds = rows.features
        image = next((name for name, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            raise ValueError(f"{source} has no column of images, only {', '.join(kinds)}")
        label = "label" if "label" in kinds else None
        label = next((name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), label)
        self.files = rows.select_columns(image).cast_column(image, datasets.Image(decode=False)).with_format(None)
        self.column, self.classes, self.labels = image, [], None
        if label is not None:
            labels, kind = rows.with_format(None)[label][:], kinds[label]
            if None in labels:
                raise ValueError(f"{self.name(labels.index(None))} has no label")
            if not all(isinstance(value, int) for value in labels):
                raise ValueError(f"{source}: column {label} must hold classes as integers, got {kind}")
            self.labels = torch.tensor(labels)
            names = kind.names if isinstance(kind, datasets.ClassLabel) else range(1 + max(labels))
            self.classes = list(map(str, names))
            for row, value in enumerate(labels):
                if not 0 <= value < len(names):
                    raise ValueError(f"{self.name(row)}: its label must be in [0, {len(names)}), got {value}")
        self.num_classes = len(self.classes)
        self.facts = {"source": source, "split": split, "resolution": size, "classes": self.classes}
        self.facts |= {"transform": CROP if crop else None, "count": len(rows)}
        self.memory = None
        if not crop:
            bar = tqdm(range(len(rows)), "images", unit="image", mininterval=1, disable=len(rows) < 10_000)
            self.memory = torch.stack([self.pixels(row) for row in bar])

    def name(self, index: int) -> str:
        return (self.files[index][self.column] or {}).get("path") or f"{self.source}, row {index}"

    def pixels(self, index: int) -> Tensor:
        """One image, (3, size, size) uint8.

        Raises:
            UnreadableImage: naming it.
        """
        file = self.files[index][self.column]
        with errors_as(f"{self.name(index)} is no readable image", UnreadableImage):
            with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"]) as image:
                cropped = center_crop(image, self.shape[-1]) if self.crop else image.convert("RGB")
        if cropped.size != self.shape[1:]:
            (width, height), size = cropped.size, self.shape[1]
            raise UnreadableImage(f"{self.name(index)} is {height} x {width}, not {size} x {size}: --crop cuts it")
        return torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)

    def batch(self, indices: Sequence[int], randoms: Iterable[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        """x, (B, 3, size, size) float32 in [-1, 1], and y, (B,) int64; None without classes."""
        x = torch.stack([self.pixels(index) for index in indices]) if self.memory is None else self.memory[indices]
        x = x.float() / 127.5 - 1
        if self.flip:
            flips = torch.tensor([bool(torch.rand((), generator=random) < 0.5) for random in randoms])
            x = torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)
        return x, self.labels[torch.as_tensor(indices)] if self.num_classes else None
