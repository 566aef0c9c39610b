"""The files of a latent cache while it is made: shards, notes of those that are finished, and at last latents.json."""

import json
import math
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import meanflow
from meanflow.files import checksum, read_json, sync, write_json, write_whole

if TYPE_CHECKING:  # numpy, torch and datasets are imported where they are needed, so that --help is quick
    import numpy as np


# An unfinished cache has a folder .progress/ with its settings and a note of each finished shard: size, checksum, count
# and the sums of which finish() makes the statistics in latents.json. meanflow/data/latents.py says what a cache holds.
SHARD_SIZE = 4096  # images in a file: 128 MiB of 4 x 32 x 32 latents


def note_path(folder: Path, number: int) -> Path:
    return folder / ".progress" / f"{number:05d}.json"


def features(shape: Sequence[int], classes: Sequence[str]):
    """The columns as datasets names them. shape: (2, 2, C, H, W)."""
    from datasets import ClassLabel, Features, List, Value

    column = Value("float16")
    for size in reversed(shape):
        column = List(column, length=size)
    return Features({"moments": column, "label": ClassLabel(names=list(classes)) if classes else Value("int64")})


def write_shard(folder: Path, number: int, moments: "np.ndarray", labels: "np.ndarray", classes: Sequence[str]) -> None:
    """Writes a shard so that it is whole or not there, then its note.

    Args:
        moments: (N, 2, 2, C, H, W) float16. labels: (N,) int64.
    """
    import numpy as np
    import pyarrow as pa

    schema = features(moments.shape[1:], classes).arrow_schema
    column = pa.array(moments.reshape(-1))
    for size in reversed(moments.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    path = folder / f"data-{number:05d}.arrow"
    # A name of its own, since a launcher's death leaves processes behind that still write.
    temporary = folder / ".progress" / f"{path.name}.{uuid.uuid4().hex}.tmp"
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch([column, pa.array(labels)], schema=schema))
    sync(temporary)
    mean, std = (moments[:, :, i].astype(np.float64) for i in (0, 1))
    axes = (0, 1, 3, 4)
    note = {
        "file": path.name,
        "bytes": temporary.stat().st_size,
        "sha256": checksum(temporary),
        "count": len(labels),
        "count_per_class": np.bincount(labels, minlength=len(classes)).tolist() if classes else [],
        "sum": mean.sum(axes).tolist(),
        "sum_of_squares": (mean**2 + std**2).sum(axes).tolist(),
    }
    temporary.replace(path)
    sync(folder)
    write_whole(note_path(folder, number), json.dumps(note))


def is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is on the disk, by its note."""
    try:
        note = read_json(note_path(folder, number), file=str, bytes=int)
        return (folder / note["file"]).stat().st_size == note["bytes"]
    except (OSError, ValueError):
        return False


def claim_cache(folder: Path, settings: dict) -> bool:
    """Starts a cache, or goes on with one of the same settings. Returns whether it is finished already.

    Raises:
        ValueError: the folder holds something else; the message names what differs.
    """
    from meanflow.data.latents import LATENTS, read_metadata

    path, settings = folder / ".progress" / "settings.json", json.loads(json.dumps(settings))
    finished = (folder / LATENTS).exists()
    if not finished and not path.exists():
        if folder.exists() and any(entry.name != ".progress" for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no cache: choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    old = read_metadata(folder) if finished else read_json(path)
    names = [name for name in settings if old.get(name) != settings[name]]
    if names:
        diff = ", ".join(f"{name} {old.get(name)} there, {settings[name]} here" for name in names)
        source = LATENTS if finished else path.name
        raise ValueError(f"{folder} is a cache of something else (by {source} {diff}): choose another --out")
    if finished:
        shutil.rmtree(path.parent, ignore_errors=True)
    for stale in path.parent.glob("*.tmp"):
        stale.unlink()
    return finished


def check_disk(folder: Path, needed: int) -> None:
    """Refuses work for which the folder's disk has no room; needed: bytes."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed / 1e9:.3g} GB more and has {free / 1e9:.3g} GB free")


def finish(folder: Path, num_shards: int) -> dict:
    """Compares the shards' checksums, writes latents.json from their notes, and returns it."""
    import numpy as np
    from datasets import DatasetInfo

    from meanflow.data.latents import LATENTS, verify_shards

    settings = read_json(folder / ".progress" / "settings.json", shape=list, classes=list)
    notes = [read_json(note_path(folder, number), count=int) for number in range(num_shards)]
    count = sum(note["count"] for note in notes)
    if not count:
        raise ValueError(f"{folder}: not one image could be read")
    try:
        verify_shards(folder, notes)
    except ValueError as error:
        for number, note in enumerate(notes):
            if str(folder / note["file"]) in str(error):
                note_path(folder, number).unlink()
        raise ValueError(f"{error}. The same command makes it anew") from None
    shape, classes = settings.pop("shape"), settings.pop("classes")
    latents_per_channel = count * shape[0] * shape[-2] * shape[-1]
    mean = np.sum([note.pop("sum") for note in notes], axis=0) / latents_per_channel
    square = np.sum([note.pop("sum_of_squares") for note in notes], axis=0) / latents_per_channel
    metadata = {
        **settings,
        "dtype": "float16",
        "shape": shape,  # flips, mean and standard deviation, C, H, W
        "count": count,
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(square - mean**2).tolist(),
        "classes": classes,
        "count_per_class": np.sum([note.pop("count_per_class") for note in notes], axis=0, dtype=int).tolist(),
        "shards": notes,
        "meanflow": meanflow.__version__,
    }
    DatasetInfo(features=features(shape, classes)).write_to_directory(str(folder))
    state = {"_data_files": [{"filename": note["file"]} for note in notes], "_fingerprint": notes[0]["sha256"][:16]}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_whole(folder / "state.json", json.dumps({**state, "_split": None}, indent=2) + "\n")
    write_whole(folder / LATENTS, json.dumps(metadata, indent=2) + "\n")
    shutil.rmtree(folder / ".progress")
    return metadata


def write_random(folder: Path, count: int, vae: str, scaling_factor: float, resolution: int) -> None:
    """A finished cache of random moments, about as large as a VAE's, of 1,000 classes: to try things without images.

    vae: the name that the cache bears; its latents have 4 channels and an eighth of the resolution.
    """
    import numpy as np

    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution must be a multiple of 8, got {resolution}")
    shape, classes = (2, 2, 4, resolution // 8, resolution // 8), [str(label) for label in range(1000)]
    check_disk(folder, count * 2 * math.prod(shape))
    settings = {"source": f"random:{count}", "resolution": resolution, "shape": shape, "classes": classes}
    settings |= {"vae": vae, "vae_sha256": None, "scaling_factor": scaling_factor, "shift_factor": None}
    if claim_cache(folder, settings):
        return
    random, numbers = np.random.default_rng(0), range(-(-count // SHARD_SIZE))
    for number in numbers:
        size = min(SHARD_SIZE, count - number * SHARD_SIZE)
        moments = random.standard_normal((size, *shape), dtype=np.float32)
        mean, std = moments[:, :, 0], moments[:, :, 1]
        mean /= scaling_factor
        std[:] = 0.01 + 0.01 * std**2
        write_shard(folder, number, moments.astype(np.float16), random.integers(1000, size=size), classes)
    finish(folder, len(numbers))
