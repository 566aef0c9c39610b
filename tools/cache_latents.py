"""Puts images through a VAE once, for training: a folder of latents that recipes take as --data.

    accelerate launch -q tools/cache_latents.py /imagenet/train --vae stabilityai/sd-vae-ft-mse --out data/imagenet256
    accelerate launch -q tools/cache_latents.py owner/name --split train --vae /models/sd-vae-ft-mse --out data/latents
    python tools/cache_latents.py --verify --out data/imagenet256
    python tools/cache_latents.py random:4096 --out data/random          # random latents, to try recipes without images

Images are cropped as ADM does and encoded with their mirror images; the posterior's mean and standard deviation are
kept in float16 (ImageNet at 256: 42 GB). The same command goes on after a kill, on any number of processes, by shards.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


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
    """images at once, on each process"""
    shard_size: int = 4096
    """images in a file; what a kill can cost"""
    workers: int = 2
    """processes that read images, of each process"""
    skip_unreadable: bool = False
    """leave out images that cannot be read, and count them; else the first one ends the work"""
    verify: bool = False
    """only read a finished cache again and compare its checksums"""


def check(options: Options) -> None:
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


def cache(options: Options) -> None:
    import math
    import time
    from datetime import timedelta

    import numpy as np
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from meanflow.images import ImageFiles
    from meanflow.latents import check_disk, claim_cache, finish, is_finished, write_shard
    from meanflow.vae import encode, latent_shape, load_vae, vae_facts

    # Processes wait for each other's downloads and last shards.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first():  # which downloads, if need be
        images = ImageFiles(options.images, options.resolution, options.split)
        vae = load_vae(options.vae).to(accelerator.device)
    shape = (2, 2, *latent_shape(vae, options.resolution))
    num_shards = -(-len(images) // options.shard_size)
    unfinished = [None]
    if main:
        settings = {**images.facts, **vae_facts(vae, options.vae), "shape": shape}
        settings["images"] = settings.pop("count")  # some may be skipped: the cache has a count of its own
        unfinished[0] = [shard for shard in range(num_shards) if not is_finished(options.out, shard)]
        if not (options.out / "latents.json").exists():
            check_disk(options.out, 2 * math.prod(shape) * min(len(images), len(unfinished[0]) * options.shard_size))
        if claim_cache(options.out, {**settings, "shard_size": options.shard_size}):
            unfinished[0] = None
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
            x = pixels.to(accelerator.device).float() / 127.5 - 1
            both = [torch.stack(encode(vae, flip), dim=1) for flip in (x, x.flip(-1))]
            moments.append(torch.stack(both, dim=1).half().cpu())  # (B, flip, mean / std, C, H, W)
            if not moments[-1].isfinite().all():
                raise ValueError(
                    f"{options.vae} gives latents that float16 cannot hold, for image {rows[0]} or soon after"
                )
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
        facts = finish(options.out, num_shards)
        print(
            f"{options.out}: {facts['count']:,} latents {tuple(shape[2:])} of {len(facts['classes'])} classes; "
            f"{facts['images'] - facts['count']} images skipped; {done / seconds:.1f} images/s"
        )


def verify_again(folder: Path) -> None:
    from meanflow.latents import read_facts, verify

    facts = read_facts(folder)
    verify(folder, facts["shards"])
    print(f"{folder}: {facts['count']:,} latents, every checksum as written")


def main(options: Options) -> None:
    check(options)
    if options.verify:
        return verify_again(options.out)
    if options.images.startswith("random:"):
        count = options.images.removeprefix("random:")
        if not count.isdigit() or int(count) < 1:
            raise ValueError(f"random:COUNT must have a COUNT >= 1, got {options.images}")
        from meanflow.latents import write_random

        if int(os.environ.get("RANK", 0)):
            return
        write_random(options.out, int(count), options.vae, 0.18215, options.resolution)
        return print(f"{options.out}: {int(count):,} random latents")
    cache(options)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
