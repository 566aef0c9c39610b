"""Where tools/sample.py puts images: a picture, a folder or an .npz file, and whether there is room."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PICTURE = 4096  # images that one picture may have


@contextmanager
def npz(path: Path, count: int) -> Iterator:
    """Writes arr_0 as it comes; the file appears when it is whole."""
    import numpy as np

    from meanflow.files import replacing

    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:

            def write(images, first: int) -> None:
                if first == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(images).tobytes())

            yield write


@contextmanager
def folder(path: Path, count: int) -> Iterator:
    """A PNG an image: 000000.png ...; a .npy a volume."""
    import numpy as np
    from PIL import Image

    from meanflow.files import replacing

    def write(images, first: int) -> None:
        if images.ndim == 5 and first == 0:
            picture(images[:16], path / "slices.png", 1)
        for number, image in enumerate(images, start=first):
            with replacing(path / f"{number:06d}.{'npy' if images.ndim == 5 else 'png'}") as temporary:
                if images.ndim == 5:
                    np.save(temporary, image)
                else:
                    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary)

    yield write


@contextmanager
def grid(path: Path, count: int, columns: int) -> Iterator:
    import numpy as np

    parts = []
    yield lambda images, first: parts.append(images)
    picture(np.concatenate(parts), path, columns)


def picture(images, path: Path, columns: int) -> None:
    import torch

    from meanflow.pictures import middle_slices, save_grid

    x = torch.from_numpy(images)
    save_grid(middle_slices(x) if x.ndim == 5 else x.permute(0, 3, 1, 2) / 127.5 - 1, path, columns)


def check_writable(out: Path, is_folder: bool) -> None:
    parent = out if is_folder else out.parent
    if out.suffix and is_folder and not out.is_dir() or out.is_dir() != is_folder and out.exists():
        raise ValueError(f"out must be x.png, x.npz or a folder, got {out}")
    for place in (out.parent, out.parent.parent):
        if (place / "step.json").exists() or (place / "model_index.json").exists():
            raise ValueError(f"out: {place} is a checkpoint or an exported model: name a place outside of it")
    is_of_run = out.name in ("loss.png", "samples.png", "samples", "pipeline") or out.name.startswith("step-")
    if (out.parent / "recipe.json").exists() and is_of_run:
        raise ValueError(f"out: {out} belongs to the run in {out.parent}: choose another name")
    if is_folder and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: the folder {out} is not empty: name another folder")
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise ValueError(f"out: {parent} cannot be written to")


def check_disk(out: Path, size: int) -> None:
    """Refuses samples for which the disk has no room; size: in bytes."""
    import shutil

    free = shutil.disk_usage(out if out.is_dir() else out.parent).free
    if size > free:
        raise ValueError(f"out: {out} has {free / 2**30:.3g} GiB free, and needs {size / 2**30:.3g} GiB")
