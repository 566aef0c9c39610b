"""The parts of tools/benchmark.py that read data."""

import statistics
import time
from pathlib import Path


def write_lmdb(path: str, latents):
    """The same latents the usual way, each image a pickled dictionary; returns the open database."""
    import pickle

    import lmdb

    environment = lmdb.open(path, map_size=2**40)
    with environment.begin(write=True) as transaction:
        for index in range(len(latents)):
            moments, flipped = (latents.read([index], [flip])[0] for flip in (0, 1))
            entry = {"moments": moments, "moments_flip": flipped, "label": int(latents.labels[index])}
            transaction.put(str(index).encode(), pickle.dumps(entry))
    return environment


def data(options) -> list[dict]:
    """The table's rows: images per second, the median of interleaved passes over all."""
    import pickle
    from tempfile import TemporaryDirectory

    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
    from tqdm import tqdm

    from caching.shards import write_random
    from meanflow.config import MeanFlowConfig, TrainConfig
    from meanflow.data.latents import Latents
    from meanflow.data.loader import SlotData
    from meanflow.objectives.draws import order_slots
    from meanflow.objectives.meanflow import MeanFlow

    if options.count % options.batch:
        raise ValueError(f"count must be a multiple of batch {options.batch}, got {options.count}")
    recipe = TrainConfig(vae="random", scaling_factor=0.18215, resolution=256, steps=1, global_batch=options.batch)

    class Ours:
        """Batches of moments as one gather from the mapped files."""

        def __init__(self, latents):
            self.latents = latents

        def __getitems__(self, indices):
            return self.latents.read(indices, [0] * len(indices)), self.latents.labels[indices]

    class Pickles:
        """What we are compared with; it reads nothing but what was pickled below, in this process."""

        def __init__(self, environment):
            self.transaction = environment.begin(buffers=True)

        def __getitem__(self, index):
            entry = pickle.loads(self.transaction.get(str(index).encode()))
            return entry["moments"], entry["label"]

    class Steps:
        """What a training step gets: a posterior draw, noise and times, each from its slot's generator."""

        def __init__(self, latents):
            self.data = SlotData(recipe, MeanFlow, latents)

        def __getitems__(self, indices):
            slots = order_slots(MeanFlowConfig(), range(len(indices)), len(indices))
            return self.data.__getitems__(list(zip(indices, slots)))

    with TemporaryDirectory(dir=options.folder) as folder:
        write_random(Path(folder) / "latents", options.count, "random", 0.18215, 256)
        latents = Latents(Path(folder) / "latents", recipe)
        environment = write_lmdb(f"{folder}/lmdb", latents)
        order, shuffled = SequentialSampler(range(options.count)), RandomSampler(range(options.count))

        def batches(dataset, sampler):
            sampler = BatchSampler(sampler, options.batch, drop_last=True)
            return DataLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch)

        ways = {}
        for name, sampler in (("sequential", order), ("shuffled", shuffled)):
            ways["LMDB with pickles", name] = DataLoader(Pickles(environment), options.batch, sampler=sampler)
            ways["this project", name] = batches(Ours(latents), sampler)
            ways["this project, with posterior draw, noise and times", name] = batches(Steps(latents), sampler)
        seconds = {way: [] for way in ways}
        for _ in tqdm(range(options.repeats + 1), desc="repeats"):  # the first pass warms up
            for way, loader in ways.items():
                begin = time.perf_counter()
                for _ in loader:
                    pass
                seconds[way].append(time.perf_counter() - begin)
        same = torch.equal(latents.read([7], [0])[0], Pickles(environment)[7][0])
        assert same, "the two do not hold the same"
    rates = {way: options.count / statistics.median(times[1:]) for way, times in seconds.items()}
    names = dict.fromkeys(name for name, _ in ways)
    return [{"way": name, **{order: rates[name, order] for order in ("sequential", "shuffled")}} for name in names]


def loader(options) -> list[dict]:
    """The table's rows: images per second of make_loader, by kind of data and number of loading processes."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    from caching.shards import write_random
    from meanflow.config import TrainConfig
    from meanflow.data.base import InMemory
    from meanflow.data.images import ImageFiles
    from meanflow.data.latents import Latents
    from meanflow.data.loader import make_loader
    from meanflow.objectives.meanflow import MeanFlow

    steps = range(max(1, options.count // options.batch))
    recipe = TrainConfig(vae="random", scaling_factor=0.18215, resolution=256, steps=1, global_batch=options.batch)
    with TemporaryDirectory(dir=options.folder) as folder:
        write_random(Path(folder) / "latents", options.count, "random", 0.18215, 256)
        photos = Path(folder) / "photos"
        photos.mkdir()
        noise = np.random.default_rng(0).integers(0, 255, (64, 12, 16, 3), np.uint8)
        for number, pixels in enumerate(noise):
            Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(photos / f"{number}.jpg")
        kinds = {
            "draws alone, 8 x 8": InMemory(torch.zeros(options.count, 1, 8, 8), None, 0),
            "latents, 4 x 32 x 32": Latents(Path(folder) / "latents", recipe),
            "photographs of 400 x 300, 3 x 64 x 64": ImageFiles(str(photos), 64),
        }
        rows = []
        for name, source in tqdm(kinds.items(), desc="kinds"):
            for workers in options.workers:
                times = []
                for _ in range(options.repeats + 1):  # the first pass warms up
                    begin = time.perf_counter()
                    for _ in make_loader(replace(recipe, workers=workers), MeanFlow, source, steps):
                        pass
                    times.append(time.perf_counter() - begin)
                rate = len(steps) * options.batch / statistics.median(times[1:])
                rows.append({"data": name, "workers": workers, "images": rate})
    return rows


def print_loader(rows: list[dict]) -> None:
    print("\n| images/s | loading processes | |\n|:---|---:|---:|")
    for row in rows:
        print(f"| {row['data']} | {row['workers']} | {row['images']:,.0f} |")


def print_data(rows: list[dict]) -> None:
    print(f"\n| {'images/s':44} | sequential | x | shuffled | x |\n|:---|---:|---:|---:|---:|")
    for row in rows:
        cells = " | ".join(
            f"{row[order]:,.0f} | {row[order] / rows[0][order]:.1f}" for order in ("sequential", "shuffled")
        )
        print(f"| {row['way']:44} | {cells} |")
