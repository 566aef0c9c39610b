"""Images of any source that datasets reads, cropped as ImageNet's reference statistics assume."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from meanflow.data.base import Data, UnreadableSample
from meanflow.files import errors_as

TABLES = (".parquet", ".arrow")


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
        split: of a Hub id or of a folder that has it: a subfolder of this name, if it has subfolders or tables, or
            tables whose names begin with it.
    Raises:
        ValueError: there is no such source, or datasets cannot open it.
    """
    import datasets

    datasets.disable_progress_bars()
    path = Path(source).expanduser()
    # A Hub id looks like owner/name, and not like a path whose last part is missing.
    is_path = source.startswith((".", "~", "/")) or path.parent.exists() or source.count("/") != 1
    if is_path and not path.exists():
        raise ValueError(f"{source}: no such file or folder, and no Hub id (owner/name)")
    with errors_as(f"{source}: datasets cannot open it"):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if path.is_file():
            return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
        if not path.is_dir():
            return datasets.load_dataset(source, split=split)
        # Names the files itself: datasets by itself would take a class such as bullet_train for a split.
        inside = list((path / split).iterdir()) if (path / split).is_dir() else []
        if any(entry.is_dir() or entry.suffix in TABLES for entry in inside):
            path = path / split
        has_split_tables = any(entry.suffix in TABLES for entry in path.rglob(f"{split}*"))
        return datasets.load_dataset(str(path), data_files=f"**/{split}*" if has_split_tables else "**", split="train")


class ImageFiles(Data):
    """Images of a source, (3, size, size) in [-1, 1], and their classes, if a column has any.

    The first column of type Image counts, and the first ClassLabel or the one called label. Without crop the images
    must have the size, and all are read now and kept in memory.

    Raises:
        ValueError: there is no such source, it is empty, it has no images, or a label is no class.
        UnreadableSample: without crop, an image cannot be read or has another size.
    """

    def __init__(self, source: str, size: int, split: str = "train", flip: bool = False, crop: bool = True):
        import datasets

        self.source, self.flip, self.crop, self.shape = source, flip, crop, (3, size, size)
        rows = open_source(source, split)
        if not len(rows):
            raise ValueError(f"{source} is empty")
        self.column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        if self.column is None:
            raise ValueError(f"{source} has no column of images, only {', '.join(rows.features)}")
        files = rows.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))
        self.files = files.with_format(None)
        self.classes, self.labels = self.read_labels(rows)
        self.num_classes = len(self.classes)
        self.metadata = {"source": source, "split": split, "resolution": size, "classes": self.classes}
        self.metadata |= {"transform": "ADM centre crop" if crop else None, "count": len(rows)}
        self.memory = None
        if not crop:
            bar = tqdm(range(len(rows)), "images", unit="image", mininterval=1, disable=len(rows) < 10_000)
            self.memory = torch.stack([self.pixels(row) for row in bar])

    def read_labels(self, rows) -> tuple[list[str], torch.Tensor | None]:
        """The classes' names and every sample's class, (N,) int64; [] and None without classes."""
        import datasets

        label = "label" if "label" in rows.features else None
        label = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), label)
        if label is None:
            return [], None
        labels, kind = rows.with_format(None)[label][:], rows.features[label]
        if None in labels:
            raise ValueError(f"{self.name(labels.index(None))} has no label")
        if not all(isinstance(value, int) for value in labels):
            raise ValueError(f"{self.source}: column {label} must hold classes as integers, got {kind}")
        names = kind.names if isinstance(kind, datasets.ClassLabel) else range(1 + max(labels))
        for row, value in enumerate(labels):
            if not 0 <= value < len(names):
                raise ValueError(f"{self.name(row)}: its label must be in [0, {len(names)}), got {value}")
        return [str(name) for name in names], torch.tensor(labels)

    def name(self, index: int) -> str:
        return (self.files[index][self.column] or {}).get("path") or f"{self.source}, row {index}"

    def pixels(self, index: int) -> torch.Tensor:
        """One image, (3, size, size) uint8.

        Raises:
            UnreadableSample: naming it.
        """
        file = self.files[index][self.column]
        with errors_as(f"{self.name(index)} is no readable image", UnreadableSample):
            with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"]) as image:
                cropped = center_crop(image, self.shape[-1]) if self.crop else image.convert("RGB")
        if cropped.size != self.shape[1:]:
            (width, height), size = cropped.size, self.shape[1]
            raise UnreadableSample(f"{self.name(index)} is {height} x {width}, not {size} x {size}: --crop cuts it")
        return torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1)

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor, dict]:
        x = torch.stack([self.pixels(index) for index in indices]) if self.memory is None else self.memory[indices]
        x = x.float() / 127.5 - 1
        if self.flip:
            flips = torch.tensor([bool(torch.rand((), generator=random) < 0.5) for random in generators])
            x = torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)
        return x, {"y": self.labels[torch.as_tensor(indices)]} if self.num_classes else {}
