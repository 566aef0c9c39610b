"""Images of any source that datasets reads, cropped as ImageNet's reference statistics assume."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from meanflow.config import Refusal, check
from meanflow.data.base import Data, UnreadableSample, say_left_out
from meanflow.files import ensure, errors_as

TABLES = (".parquet", ".arrow")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


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
    check_source(source)
    path, cache = Path(source).expanduser(), datasets.config.HF_DATASETS_CACHE
    with errors_as(f"{source}: datasets cannot open it, with its own files in {cache} (HF_HOME names another place)"):
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        if path.is_file():
            return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
        if not path.is_dir():
            return datasets.load_dataset(source, split=split)
        # Names the files itself: datasets by itself would take a class such as bullet_train for a split.
        path = split_folder(path, split)
        tables = {entry.name for entry in path.rglob("*") if entry.suffix in TABLES}
        has_split_tables = any(name.startswith(split) for name in tables)
        others = sorted(name for name in tables if name.startswith(SPLITS))
        is_clear = has_split_tables or not others
        ensure(is_clear, f"{source} has no {split}, only {', '.join(others)}: name one of the files")
        pattern = f"**/{split}*" if has_split_tables else "**"
        rows = datasets.load_dataset(str(path), data_files=pattern, split="train")
        if not tables:
            say_unread(path, rows)
        return rows


def check_source(source: str, others: str = "") -> None:
    """Refuses a path where nothing is, unless it can be a Hub id, which looks like owner/name; and files of no use."""
    path = Path(source).expanduser()
    is_path = source.startswith((".", "~", "/")) or path.parent.exists() or source.count("/") != 1
    ensure(path.exists() or not is_path, f"{source}: no such file or folder, and no Hub id (owner/name){others}")
    is_readable = path.suffix in TABLES or not path.is_file()
    ensure(is_readable, f"{source} must be a folder, or a file that ends with {' or '.join(TABLES)}")


def split_folder(path: Path, split: str) -> Path:
    """The subfolder of a split, or the folder itself where its subfolders are classes, of whatever name.

    Raises:
        Refusal: the folder has only other splits.
    """
    folders = [entry for entry in path.iterdir() if entry.is_dir()]
    splits = sorted(folder.name for folder in folders if folder.name == split or folder.name.lower() in SPLITS)
    # A split has classes or tables in it; there are also folders of splits alone, with images in them.
    inside = (entry for name in splits for entry in (path / name).iterdir())
    if not splits or (len(splits) < len(folders) and not any(e.is_dir() or e.suffix in TABLES for e in inside)):
        return path
    ensure(split in splits, f"{path} has no {split}, only {', '.join(splits)}: name one of these folders")
    return path / split


def say_unread(folder: Path, rows) -> None:
    """Says which files of a folder of images are not in its rows, and which of its folders are empty."""
    walked = list(os.walk(folder))
    files = [os.path.join(root, name) for root, _, names in walked for name in names]
    left_out = [root for root, folders, names in walked if not folders and not names]
    if len(files) != len(rows) and "image" in rows.column_names:
        column = rows.data.column(rows.column_names.index("image")).combine_chunks()
        taken = {os.path.realpath(path) for path in column.field("path").to_pylist()}
        left_out += [path for path in files if os.path.realpath(path) not in taken]
    say_left_out(folder, left_out)


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
        ensure(len(rows) > 0, f"{source} is empty")
        self.column = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        ensure(self.column is not None, f"{source} has no column of images, only {', '.join(rows.features)}")
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
            raise Refusal(f"{self.name(labels.index(None))} has no label")
        are_classes = all(isinstance(value, int) for value in labels)
        ensure(are_classes, f"{self.source}: column {label} must hold classes as integers, got {kind}")
        names = kind.names if isinstance(kind, datasets.ClassLabel) else range(1 + max(labels))
        is_plausible = isinstance(kind, datasets.ClassLabel) or len(names) <= max(len(labels), 10_000)
        check(is_plausible, f"{self.source}: column {label}", max(labels), "of type ClassLabel for so many classes")
        for row, value in enumerate(labels):
            if not 0 <= value < len(names):
                raise Refusal(f"{self.name(row)}: its label must be in [0, {len(names)}), got {value}")
        return [str(name) for name in names], torch.tensor(labels)

    def name(self, index: int) -> str:
        name = (self.files[index][self.column] or {}).get("path") or f"{self.source}, row {index}"
        return name if name.isprintable() else repr(name)

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """One image, of which only the header has been read.

        Raises:
            UnreadableSample: it cannot be read; the message names it.
        """
        file = self.files[index][self.column]
        with errors_as(f"{self.name(index)} is no readable image", UnreadableSample):
            with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] else file["path"]) as image:
                if image.mode[0] in "IF" or ";16" in str(image.tile):
                    raise ValueError(f"its mode is {image.mode} of more than 8 bits, and 8 bits a channel are read")
                yield image

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        if self.memory is None:
            rows = range(part, len(self), num_parts)
            for index in tqdm(rows, "headers", unit="image", mininterval=1, disable=part > 0 or len(rows) < 10_000):
                with self.opened(index):
                    pass

    def pixels(self, index: int) -> torch.Tensor:
        """One image, (3, size, size) uint8.

        Raises:
            UnreadableSample: it cannot be read, or has another size; the message names it.
        """
        with self.opened(index) as image:
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
