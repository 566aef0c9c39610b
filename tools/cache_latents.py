"""Puts images through a VAE once, for training: a folder of latents that recipes take as --data.

    accelerate launch -q tools/cache_latents.py /imagenet/train --vae stabilityai/sd-vae-ft-mse --out data/imagenet256
    accelerate launch -q tools/cache_latents.py owner/name --split train --vae /models/sd-vae-ft-mse --out data/latents
    python tools/cache_latents.py --verify --out data/imagenet256
    python tools/cache_latents.py random:4096 --out data/random          # random latents, to try recipes without images

Images are cropped as ADM does and encoded with their mirror images; the posterior's mean and standard deviation are
kept in float16 (ImageNet at 256: 42 GB). The same command goes on after a kill, on any number of processes, by shards.
"""

import json
import math
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

import meanflow
from meanflow.files import checksum, read_json, sync, write_json, write_whole
from meanflow.program import end_with_launcher, environment_number, read_flags, refusals

if TYPE_CHECKING:  # numpy, torch and datasets are imported where they are needed, so that --help is quick
    import numpy as np
    import torch

SHARD_SIZE = 4096  # images in a file: 128 MiB of 4 x 32 x 32 latents


@dataclass(frozen=True)
class Options:
    out: Path
    """folder of the cache"""
    images: tyro.conf.Positional[str | None] = None
    """a folder of images with a subfolder per class, a file or folder of parquet or arrow, a Hub id; or random:COUNT"""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """folder or Hub id of an AutoencoderKL"""
    resolution: int = 256
    """height and width to which images are cropped"""
    split: str = "train"
    """split of the source"""
    batch_size: int = 32
    """images at once, in each process"""
    shard_size: int = 4096
    """images in a file; after a kill at most this many images of each process are encoded again"""
    workers: int = 2
    """processes that read images, for each process that encodes them"""
    skip_unreadable: bool = False
    """leave out images that cannot be read, and count them; without it the first one ends the work"""
    verify: bool = False
    """only read a finished cache again and compare its checksums; needs no images"""


def check(options: Options) -> None:
    object.__setattr__(options, "out", options.out.expanduser())
    for name in ("resolution", "batch_size", "shard_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(options, name)}")
    if options.workers < 0:
        raise ValueError(f"workers must be >= 0, got {options.workers}")
    if options.images is None and not options.verify:
        raise ValueError("images must be given: a folder, a parquet or arrow file, a Hub id or random:COUNT")


# An unfinished cache has a folder .progress/ with its settings and a note of each finished shard: size, checksum, count
# and the sums of which finish() makes the statistics in latents.json. meanflow/data/latents.py says what a cache holds.


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


def batches(shards: list[int], count: int, options: Options) -> list[range]:
    """The image indices of these shards in batches, none across two shards: so a shard is the same in any start."""
    found = []
    for shard in shards:
        rows = range(shard * options.shard_size, min((shard + 1) * options.shard_size, count))
        found += [rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
    return found


class Readable:
    """The images that can be read: (row, pixels or None, what is wrong)."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, row: int):
        try:
            return row, self.images.pixels(row), None
        except ValueError as error:  # not raised: the loader would put a traceback around it
            return row, None, str(error)


def claim_shards(options: Options, images, vae, shape: tuple[int, ...], num_shards: int) -> list[int] | None:
    """Starts the cache or goes on with it: the shards that are to be made, None if it is finished."""
    from meanflow.data.vae import vae_metadata

    if Path(options.images).expanduser().resolve() in options.out.resolve().parents:
        raise ValueError(f"out must not lie in the images, which it would become a part of, got {options.out}")
    settings = {**images.metadata, **vae_metadata(vae, options.vae), "shape": shape}
    settings["images"] = settings.pop("count")  # some may be skipped: the cache has a count of its own
    unfinished = [shard for shard in range(num_shards) if not is_finished(options.out, shard)]
    if not (options.out / "latents.json").exists():
        count = min(len(images), len(unfinished) * options.shard_size)
        check_disk(options.out, 2 * math.prod(shape) * count)
    is_whole = claim_cache(options.out, {**settings, "shard_size": options.shard_size})
    return None if is_whole else unfinished


def encode_both(vae, pixels: "torch.Tensor", options: Options, first_row: int) -> "torch.Tensor":
    """The posteriors of images, (B, 3, H, W) uint8, and their mirror images: (B, flip, mean / std, C, H, W) float16."""
    import torch

    from meanflow.data.vae import encode

    x = pixels.float() / 127.5 - 1
    both = [torch.stack(encode(vae, flip), dim=1) for flip in (x, x.flip(-1))]
    moments = torch.stack(both, dim=1).half().cpu()
    if not moments.isfinite().all():
        where = f"for image {first_row} or soon after"
        raise ValueError(f"{options.vae} gives latents that float16 cannot hold, {where}")
    return moments


def cache(options: Options) -> None:
    import time
    from datetime import timedelta

    import numpy as np
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from meanflow.data.images import ImageFiles
    from meanflow.data.vae import latent_shape, load_vae

    # Processes wait for each other's downloads and last shards.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():  # which downloads, if need be
        images = ImageFiles(options.images, options.resolution, options.split)
        vae = load_vae(options.vae).to(accelerator.device)
    shape = (2, 2, *latent_shape(vae, options.resolution))
    num_shards = -(-len(images) // options.shard_size)
    unfinished = [claim_shards(options, images, vae, shape, num_shards) if main else None]
    broadcast_object_list(unfinished)  # one list for all, since the first to begin change it
    if unfinished[0] is None:
        return accelerator.print(f"{options.out} is finished already; --verify checks it")

    todo = unfinished[0][rank::world]
    rows_to_do = batches(todo, len(images), options)
    loader = DataLoader(Readable(images), batch_sampler=rows_to_do, num_workers=options.workers, collate_fn=list)
    total = sum(map(len, rows_to_do))
    bar = tqdm(total=total, unit="image", desc=f"process {rank} of {world}", disable=not main, mininterval=1)
    moments, labels, begin = [], [], time.perf_counter()
    for batch in loader:
        for _, _, error in batch:
            if error and not options.skip_unreadable:
                raise ValueError(f"{error}. What is finished is kept; --skip-unreadable leaves such images out")
            if error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        rows = [row for row, _, error in batch if not error]
        if rows:
            pixels = torch.stack([image for _, image, _ in batch if image is not None])
            moments.append(encode_both(vae, pixels.to(accelerator.device), options, rows[0]))
            labels += [int(images.labels[row]) if images.labels is not None else 0 for row in rows]
        bar.update(len(batch))
        last = batch[-1][0] + 1
        if last % options.shard_size == 0 or last == len(images):
            whole = torch.cat(moments).numpy() if moments else np.zeros((0, *shape), np.float16)
            write_shard(
                options.out, (last - 1) // options.shard_size, whole, np.array(labels, np.int64), images.classes
            )
            moments, labels = [], []
    bar.close()
    seconds = time.perf_counter() - begin
    accelerator.wait_for_everyone()
    done = accelerator.reduce(torch.tensor(total, device=accelerator.device)).item()
    if main:
        metadata = finish(options.out, num_shards)
        print(
            f"{options.out}: {metadata['count']:,} latents {tuple(shape[2:])} of {len(metadata['classes'])} classes; "
            f"{metadata['images'] - metadata['count']} images skipped; {done / seconds:.1f} images/s"
        )


def verify_again(folder: Path) -> None:
    from meanflow.data.latents import read_metadata, verify_shards

    metadata = read_metadata(folder)
    verify_shards(folder, metadata["shards"])
    print(f"{folder}: {metadata['count']:,} latents, every checksum as written")


def main(options: Options) -> None:
    check(options)
    if options.verify:
        return verify_again(options.out)
    if options.images.startswith("random:"):
        count = options.images.removeprefix("random:")
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"random:COUNT must have a COUNT >= 1, got {options.images}")
        if environment_number("RANK", 0):
            return
        write_random(options.out, int(count), options.vae, 0.18215, options.resolution)
        return print(f"{options.out}: {int(count):,} random latents")
    cache(options)


if __name__ == "__main__":
    end_with_launcher()
    with refusals():
        main(read_flags(Options))
