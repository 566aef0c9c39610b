"""What a MeanFlow step costs, as a ratio to a flow-matching step of the same run; how fast cached latents are read; and
what sampling costs over the bare network.

    python tools/benchmark.py step
    python tools/benchmark.py data
    python tools/benchmark.py sample
    python tools/benchmark.py step --model UNet-cifar --input-size 32 --channels 3 --batch 4 --ratio 0.75 0.25
    python tools/benchmark.py step --model DiT-B/4 --input-size 32 --batch 64 --dtype bf16 --device cuda --json out.json

FLOPs and bytes are exact counts, time is the median of interleaved repeats. Bytes are those alive for the backward once
the forward is done, parameters aside.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Step:
    """One training step, forward and backward, in three ways: flow matching; the usual MeanFlow, by torch.func.jvp of
    the whole batch with graph; and this project's."""

    model: str = "custom"
    """a name in models.MODELS; custom: a DiT of the sizes below"""
    hidden_size: int = 384
    """width of a custom DiT"""
    depth: int = 6
    """blocks of a custom DiT"""
    num_heads: int = 6
    """attention heads of a custom DiT"""
    patch_size: int = 2
    """side of a custom DiT's patches"""
    input_size: int = 16
    """height and width of the input"""
    channels: int = 4
    """channels of the input"""
    batch: int = 32
    """samples at a time"""
    ratio: tuple[float, ...] = (0.25, 1.0)
    """shares of r != t samples"""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16: autocast"""
    device: str = "cpu"
    """cpu, cuda, cuda:1"""
    repeats: int = 9
    """interleaved repeats, of which the median is taken"""
    json: Path | None = None
    """also write the numbers here"""


@dataclass(frozen=True)
class Data:
    """Reading cached latents of 256 x 256 images, warm, one process: this project's way, and the usual one, an LMDB
    with a pickled dictionary per image, read by a DataLoader. It needs lmdb: pip install 'meanflow[test]'."""

    count: int = 20_480
    """images; each way writes 33 kB for each, to a temporary folder"""
    batch: int = 256
    """images at a time"""
    repeats: int = 5
    """interleaved repeats, of which the median is taken"""
    folder: Path | None = None
    """where to write; default: the system's temporary folder"""
    json: Path | None = None
    """also write the numbers here"""


@dataclass(frozen=True)
class Sample:
    """One-step sampling, by MeanFlowPipeline from given noise to what the network makes, and with pixels; and the bare
    forward passes. Random weights."""

    model: str = "custom"
    """a name in models.MODELS; custom: a DiT of the sizes below"""
    hidden_size: int = 384
    """width of a custom DiT"""
    depth: int = 6
    """blocks of a custom DiT"""
    num_heads: int = 6
    """attention heads of a custom DiT"""
    patch_size: int = 2
    """side of a custom DiT's patches"""
    input_size: int = 16
    """height and width of the input"""
    channels: int = 4
    """channels of the input"""
    batch: tuple[int, ...] = (8, 64)
    """images at a time"""
    vae: str | None = None
    """folder or Hub id of an AutoencoderKL to decode with, too"""
    dtype: Literal["float32", "bf16"] = "float32"
    """bf16: of the weights, too"""
    device: str = "cpu"
    """cpu, cuda, cuda:1"""
    repeats: int = 9
    """interleaved repeats, of which the median is taken"""
    json: Path | None = None
    """also write the numbers here"""


def build(options: Step | Sample):
    import torch

    from models import MODELS
    from models.dit import DiT

    if options.model != "custom" and options.model not in MODELS:
        raise ValueError(f"model must be custom or one of {', '.join(MODELS)}, got {options.model}")
    if isinstance(options, Step) and not options.ratio:
        raise ValueError("ratio must be given, got none")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be cpu, since no GPU is here, got {options.device}")
    torch.manual_seed(0)
    if options.model == "custom":
        sizes = {name: getattr(options, name) for name in ("hidden_size", "depth", "num_heads", "patch_size")}
        net = DiT(input_size=options.input_size, in_channels=options.channels, **sizes)
    else:
        net = MODELS[options.model](input_size=options.input_size, in_channels=options.channels)
    return net.to(options.device)


def steps(options: Step, net) -> dict[str, Callable]:
    """The forward of each way, by name: functions that return the loss."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from meanflow.config import MeanFlowConfig
    from meanflow.objectives.base import Batch
    from meanflow.objectives.draws import make_draws, order_slots
    from meanflow.objectives.meanflow import MeanFlow, adaptive_weight

    shape, ways = net.z_shape, {}
    x = torch.randn(options.batch, *shape).to(options.device)
    labels = torch.randint(max(1, net.config.num_classes), (options.batch,)).to(options.device)
    cond = {"y": labels} if net.config.num_classes else {}

    def draws(config):
        slots = order_slots(config, range(options.batch), options.batch)
        return make_draws(config, shape, 0, slots).to(options.device)

    def ours(ratio: float) -> Callable:
        config = MeanFlowConfig(meanflow_ratio=ratio)
        objective, fixed = MeanFlow(net, config), draws(config)
        return lambda: objective(Batch(x, fixed, cond)).loss

    def usual(ratio: float) -> Callable:
        d = draws(MeanFlowConfig(meanflow_ratio=ratio))
        t, r = (a.view(-1, 1, 1, 1) for a in (d.t, d.r))

        def loss():
            v = d.e - x
            inputs = ((1 - t) * x + t * d.e, d.t, d.r)
            tangents = (v, torch.ones_like(d.t), torch.zeros_like(d.r))
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
                u, du_dt = torch.func.jvp(lambda z, t, r: net(z, t, t - r, **cond), inputs, tangents)
            error = (u.float() - (v - (t - r) * du_dt).detach()).square().flatten(1).sum(1)
            return (adaptive_weight(error, 1.0, 0.01) * error).mean()

        return loss

    ways["flow matching"] = ours(0.0)
    ways["the usual way: torch.func.jvp of the whole batch"] = usual(
        options.ratio[0]
    )  # its cost does not depend on the share
    ways |= {f"this project, share {ratio:g}": ours(ratio) for ratio in options.ratio}
    return ways


def count(net, loss: Callable) -> dict[str, int]:
    """FLOPs of a step, and bytes that its forward leaves for its backward."""
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    saved = {}  # storages by address; kept alive, so that no address comes twice

    def keep(tensor):
        if not tensor._is_zerotensor():  # PyTorch's zero tangent of a weight has no memory
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        size = sum(storage.nbytes() for storage in saved.values())
        value.backward()
    net.zero_grad()
    return {"flops": counter.get_total_flops(), "bytes": size}


def step(options: Step) -> list[dict]:
    """The table's rows: counts, seconds, and each as a ratio to flow matching."""
    import torch

    net = build(options)

    def autocast(loss: Callable) -> Callable:
        def cast():
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.dtype == "bf16"):
                return loss()

        return cast

    ways = {name: autocast(loss) for name, loss in steps(options, net).items()}
    rows = {name: count(net, loss) for name, loss in ways.items()}

    def backward(loss: Callable) -> Callable:
        return lambda: (loss().backward(), net.zero_grad())

    seconds = interleaved({name: backward(loss) for name, loss in ways.items()}, options)
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    base = rows["flow matching"]
    return [{"way": name, **row, **{f"{key}_ratio": row[key] / base[key] for key in row}} for name, row in rows.items()]


def sampling(options: Sample) -> list[dict]:
    """A row a batch and way: seconds, images/s and the ratio to the bare forward."""
    import torch

    from meanflow.data.vae import load_vae
    from meanflow.objectives.base import Sampling
    from meanflow.publishing.pipeline import MeanFlowPipeline

    net, vae = build(options).eval(), load_vae(options.vae).to(options.device) if options.vae else None
    if options.dtype == "bf16":
        for part in (net, vae):
            if part is not None:
                torch.nn.Module.to(part, torch.bfloat16)
    pipe = MeanFlowPipeline(net, vae, Sampling()._asdict(), {}, {"shift": 0.0, "scale": 0.18215})
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for batch in options.batch:
        e, classes = torch.randn(batch, *pipe.shape).to(options.device), net.config.num_classes
        y = [k % classes for k in range(batch)] if classes else None
        t, labels = torch.ones(batch).to(options.device), torch.tensor(y).to(options.device) if classes else None
        ways = {
            "the bare forward": lambda e=e, t=t, labels=labels: net(e.to(net.dtype), t, t, labels),
            "one step": lambda e=e, y=y: pipe(y, len(e), latents=e, output_type="latent"),
        }
        if vae:
            ways["one step, decoded"] = lambda e=e, y=y: pipe(y, len(e), latents=e, output_type="pt")
        with torch.no_grad():
            seconds = interleaved(ways, options)
        for name, value in seconds.items():
            ratio = value / seconds["the bare forward"]
            rows.append({"batch": batch, "way": name, "seconds": value, "ratio": ratio, "images": batch / value})
    return rows


def interleaved(ways: dict[str, Callable], options: Step | Sample) -> dict[str, float]:
    """The median seconds of each way: they take turns, so that a slow minute slows all."""
    from tqdm import tqdm

    times = {name: [] for name in ways}
    for repeat in tqdm(range(options.repeats + 1), desc="repeats"):
        for name, way in ways.items():
            synchronize(options.device)
            start = time.perf_counter()
            way()
            synchronize(options.device)
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_sample(rows: list[dict]) -> None:
    print("| batch | | images/s | x the bare forward's time |\n|---:|:---|---:|---:|")
    for row in rows:
        print(f"| {row['batch']} | {row['way']} | {row['images']:.3g} | {row['ratio']:.3f} |")


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


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


def data(options: Data) -> list[dict]:
    """The table's rows: images per second, the median of interleaved passes over all."""
    import pickle
    from tempfile import TemporaryDirectory

    import torch
    from cache_latents import write_random  # beside this file
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
    from tqdm import tqdm

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


def print_data(rows: list[dict]) -> None:
    print(f"\n| {'images/s':44} | sequential | x | shuffled | x |\n|:---|---:|---:|---:|---:|")
    for row in rows:
        cells = " | ".join(
            f"{row[order]:,.0f} | {row[order] / rows[0][order]:.1f}" for order in ("sequential", "shuffled")
        )
        print(f"| {row['way']:44} | {cells} |")


def print_step(rows: list[dict]) -> None:
    print(f"\n| {'step':40} | GFLOPs | x | MiB kept | x | ms | x |\n|:---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['way']:40} | {row['flops'] / 1e9:.1f} | {row['flops_ratio']:.3f} | {row['bytes'] / 2**20:.0f} "
            f"| {row['bytes_ratio']:.3f} | {row['seconds'] * 1e3:.0f} | {row['seconds_ratio']:.2f} |"
        )


def main(options: Step | Data | Sample) -> None:
    if isinstance(options, Data):
        rows = data(options)
        print_data(rows)
    elif isinstance(options, Sample):
        rows = sampling(options)
        print_sample(rows)
    else:
        rows = step(options)
        print_step(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.extras.subcommand_cli_from_dict({"step": Step, "data": Data, "sample": Sample}, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
