"""Puts images through a VAE once, for training: a folder of latents that recipes take as --data.

    accelerate launch -q tools/cache_latents.py /imagenet/train --vae stabilityai/sd-vae-ft-mse --out data/imagenet256
    accelerate launch -q tools/cache_latents.py owner/name --split train --vae /models/sd-vae-ft-mse --out data/latents
    python tools/cache_latents.py --verify --out data/imagenet256
    python tools/cache_latents.py random:4096 --out data/random          # random latents, to try recipes without images

Images are cropped as ADM does and encoded with their mirror images; the posterior's mean and standard deviation are
kept in float16 (ImageNet at 256: 42 GB). The same command goes on after a kill, on any number of processes, by shards.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from caching.shards import check_disk, claim_cache, finish, is_finished, write_random, write_shard
from meanflow.program import end_with_launcher, environment_number, read_flags, refusals

if TYPE_CHECKING:  # numpy, torch and datasets are imported where they are needed, so that --help is quick
    import torch


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
