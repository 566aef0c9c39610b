"""What training and sampling cost, as ratios within one run of this tool.

    python tools/benchmark.py step
    python tools/benchmark.py step --model UNet-cifar --input-size 32 --channels 3 --batch 4 --ratio 0.75
    python tools/benchmark.py step --model DiT-B/4 --input-size 32 --batch 64 --dtype bf16 --device cuda --json out.json
    python tools/benchmark.py scale
    python tools/benchmark.py improved
    python tools/benchmark.py sample
    python tools/benchmark.py loader
    python tools/benchmark.py data

FLOPs, bytes and operations are exact counts, time is the median of interleaved repeats.
"""

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from meanflow.config import check
from meanflow.program import refusals


def check_sizes(options) -> None:
    """Refuses numbers that are not above 0; workers and ratio may be 0."""
    for name, value in vars(options).items():
        numbers = [
            number for number in (value if isinstance(value, tuple) else (value,)) if type(number) in (int, float)
        ]
        least = 0 if name in ("workers", "ratio") else 1
        if numbers and min(numbers) < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


@dataclass(frozen=True)
class Network:
    """A network with random weights, and where it runs."""

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
    dtype: Literal["float32", "bf16"] = "float32"
    """step, scale: bf16 is autocast; sample: bf16 is of the weights, too"""
    device: str = "cpu"
    """cpu, cuda, cuda:1"""
    repeats: int = 9
    """interleaved repeats, of which the median is taken"""
    json: Path | None = None
    """also write the numbers here"""

    def __post_init__(self) -> None:
        check_sizes(self)
        if not re.fullmatch("cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:NUMBER, got {self.device}")


@dataclass(frozen=True)
class Step(Network):
    """One training step, forward and backward, eager and compiled: flow matching; this project's MeanFlow; and two
    usual ways: torch.func.jvp of the whole batch with its graph, and without a graph before a second forward.

    FLOPs are those of the eager step. Bytes are those alive for the backward once the forward is done, parameters
    aside; the peak is of the whole step, over what was there before. Operations: those that were launched. Host: a step
    of the same network at a width of 16, with 4 samples of few tokens, on one thread: nothing but the host costs."""

    batch: int = 32
    """samples at a time"""
    ratio: tuple[float, ...] = (0.25,)
    """shares of r != t samples"""
    guided: bool = False
    """also a guided step: omega 0.2, kappa 0.92, t to 0.75, a tenth of the labels dropped"""
    compiled: bool = True
    """also the compiled steps"""
    usual: bool = True
    """also the usual ways"""
    runs: int = 3
    """how often the repeats are made; of each way's times, the run with its lowest ratio is shown, and the highest"""


@dataclass(frozen=True)
class Scale(Network):
    """How a step's cost grows with the batch, the tokens and the depth: one is varied, the others are as given."""

    batch: tuple[int, ...] = (8, 16, 32)
    """samples at a time; the first is used where another quantity varies"""
    sizes: tuple[int, ...] = (8, 16, 32)
    """heights and widths of the input; tokens are their squares over those of patch_size"""
    depths: tuple[int, ...] = (3, 6, 12)
    """blocks of a custom DiT"""
    ratio: float = 0.25
    """share of r != t samples"""


@dataclass(frozen=True)
class Sample(Network):
    """One-step sampling, by MeanFlowPipeline from given noise to what the network makes, and with pixels; and the bare
    forward passes."""

    batch: tuple[int, ...] = (8, 64)
    """images at a time"""
    vae: str | None = None
    """folder or Hub id of an AutoencoderKL to decode with, too"""


@dataclass(frozen=True)
class Improved:
    """FLOPs of a training step of improved MeanFlow, counted on tensors without content, so that any size fits.

    This project computes du/dt for r != t rows, and guidance's predictions only where they act. The official scheme
    has, for every row, three forwards of the v path without gradients, a forward of both heads with its derivative, and
    the backward. The usual port has, for every row, two forwards of the v path and a derivative of u without gradients,
    and a forward of both heads and its backward. A derivative is counted as one more forward, which is the least."""

    models: tuple[str, ...] = ("iMF-B/2", "iMF-XL/2")
    """names in models.MODELS, of networks with a v head"""
    batch: int = 32
    """samples at a time"""
    ratio: float = 0.5
    """share of r != t samples"""

    json: Path | None = None
    """also write the numbers here"""

    def __post_init__(self) -> None:
        check_sizes(self)
        check(self.ratio <= 1, "ratio", self.ratio, "at most 1")
        known = ("iMF-B/2", "iMF-M/2", "iMF-L/2", "iMF-XL/2")
        check(set(self.models) <= set(known), "models", " ".join(self.models), f"some of {', '.join(known)}")


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

    def __post_init__(self) -> None:
        check_sizes(self)


@dataclass(frozen=True)
class Loader(Data):
    """Images per second that the training loop gets: draws alone (of pixels in memory, 8 x 8), latents of 256 x 256
    images, and photographs that are decoded and cropped to 64 x 64; by the number of loading processes."""

    count: int = 2_048
    """images of each pass"""
    workers: tuple[int, ...] = (0, 1, 2)
    """loading processes"""


# Multiplications and additions in bfloat16 without sparsity, per second, by a part of the GPU's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
NARROW = {"DiT": {"hidden_size": 16, "num_heads": 2}, "UNet-cifar": {"model_channels": 16}}


def build(options: Network, narrow: bool = False):
    """The network; with narrow at a width of 16, and a DiT of 4 tokens."""
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
        make, kind, patch_size = DiT, "DiT", options.patch_size
    elif options.model.startswith("DiT"):
        make, kind, patch_size, sizes = MODELS[options.model], "DiT", int(options.model.split("/")[1]), {}
    else:
        make, kind, patch_size, sizes = MODELS[options.model], options.model, 0, {}
    input_size = options.input_size
    if narrow:
        sizes |= NARROW.get(kind, {})
        input_size = 2 * patch_size or input_size
    return make(input_size=input_size, in_channels=options.channels, **sizes).to(options.device)


class Way(NamedTuple):
    net: Any  # a copy of its own
    parameters: list
    loss: Callable

    def step(self) -> None:
        self.loss().backward()
        for p in self.parameters:  # net.zero_grad() takes half a millisecond
            p.grad = None


class Ways:
    """The ways of a training step, by name, eager or compiled."""

    def __init__(self, options: Step, net):
        import torch

        self.options, self.net = options, net
        self.x = torch.randn(options.batch, *net.z_shape).to(options.device)
        classes = net.config.num_classes
        labels = torch.randint(max(1, classes), (options.batch,)).to(options.device)
        self.cond = {"y": labels} if classes else {}

    def names(self) -> list[str]:
        guided = [f"this project, share {self.options.ratio[0]:g}, guided"] * self.options.guided
        usual = ["torch.func.jvp of the whole batch", "jvp without graph, and a forward"] * self.options.usual
        return ["flow matching", *(f"this project, share {ratio:g}" for ratio in self.options.ratio), *guided, *usual]

    def make(self, name: str, compiled: bool) -> Way:
        from meanflow.config import MeanFlowConfig

        if name in ("torch.func.jvp of the whole batch", "jvp without graph, and a forward"):
            return self.usual(compiled, with_graph=name.startswith("torch"))
        guidance = {"omega": 0.2, "kappa": 0.92, "t_end": 0.75} if "guided" in name else {}
        ratio = 0.0 if name == "flow matching" else float(name.split("share ")[1].split(",")[0])
        return self.ours(MeanFlowConfig(meanflow_ratio=ratio, **guidance), compiled)

    def draws(self, config):
        from meanflow.objectives.draws import make_draws, order_slots

        slots = order_slots(config, range(self.options.batch), self.options.batch)
        return make_draws(config, self.net.z_shape, 0, slots).to(self.options.device)

    def ours(self, config, compiled: bool) -> Way:
        import copy

        from meanflow.objectives.base import Batch
        from meanflow.objectives.meanflow import MeanFlow
        from meanflow.training.compile import compile_objective

        objective, batch = MeanFlow(copy.deepcopy(self.net), config), Batch(self.x, self.draws(config), self.cond)
        if compiled:
            compile_objective(objective, **{"cpp.enable_kernel_profile": True})
        return Way(objective.net, list(objective.parameters()), self.cast(lambda: objective(batch).loss))

    def usual(self, compiled: bool, with_graph: bool) -> Way:
        import copy

        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from meanflow.config import MeanFlowConfig
        from meanflow.objectives.meanflow import adaptive_weight

        net, x, d = copy.deepcopy(self.net), self.x, self.draws(MeanFlowConfig(meanflow_ratio=self.options.ratio[0]))
        for module in net.modules():  # torch.func.jvp does not compile through nested regions
            whole = getattr(type(module).forward, "__marked_compile_region_fn__", None)
            if whole is not None:
                module.forward = partial(whole, module)
        t, r = (a.view(-1, 1, 1, 1) for a in (d.t, d.r))

        def loss():
            v = d.e - x
            inputs = ((1 - t) * x + t * d.e, d.t, d.r)
            tangents = (v, torch.ones_like(d.t), torch.zeros_like(d.r))
            # The fused kernels have no forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(with_graph):
                u, du_dt = torch.func.jvp(lambda z, t, r: net(z, t, t - r, **self.cond), inputs, tangents)
            if not with_graph:
                u = net(inputs[0], d.t, d.t - d.r, **self.cond)
            error = (u.float() - (v - (t - r) * du_dt).detach()).square().flatten(1).sum(1)
            return (adaptive_weight(error, 1.0, 0.01) * error).mean()

        if compiled:
            loss = torch.compile(loss, fullgraph=True, dynamic=False, options={"cpp.enable_kernel_profile": True})
        return Way(net, list(net.parameters()), self.cast(loss))

    def cast(self, loss: Callable) -> Callable:
        import torch

        def cast():
            device = torch.device(self.options.device).type
            with torch.autocast(device, torch.bfloat16, enabled=self.options.dtype == "bf16"):
                return loss()

        return cast


def count_flops(way: Way) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        way.step()
    return counter.get_total_flops()


def count_bytes(way: Way) -> int:
    """Bytes that a forward leaves for its backward."""
    from torch.autograd.graph import saved_tensors_hooks

    parameters = {p.untyped_storage().data_ptr() for p in way.net.parameters()}
    saved = {}  # storages by address; kept alive, so that no address comes twice

    def keep(tensor):
        if not tensor._is_zerotensor():  # PyTorch's zero tangent of a weight has no memory
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        value = way.loss()
    size = sum(storage.nbytes() for storage in saved.values())
    value.backward()
    way.net.zero_grad()
    return size


# Operations that launch nothing: they make views, or memory without content.
VIEWS = {"view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "narrow", "unsqueeze", "squeeze"}
VIEWS |= {"as_strided", "detach", "alias", "resolve_conj", "resolve_neg", "split", "chunk", "unbind", "_unsafe_view"}
VIEWS |= {"unflatten", "flatten", "empty", "empty_like", "empty_strided", "resize_", "_reshape_alias", "view_as"}
VIEWS |= {"_unpack_dual", "_make_dual", "_fw_primal", "_make_dual_copy", "set_data", "is_same_size"}


def profile_step(step: Callable, device: str) -> dict[str, int]:
    """How many operations a step launches, and its peak of memory over what was there before, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as profiler:
        step()
        synchronize(device)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        if event.name() == "[memory]" and str(event.device_type()).endswith("CUDA" if on_gpu else "CPU"):
            held += event.nbytes()
            peak = max(peak, held)
    if on_gpu:
        launched = sum("LaunchKernel" in event.name() for event in events)
        return {"operations": launched, "peak": peak}
    calls = [event for event in events if event.name().startswith(("aten::", "graph_"))]
    launched = 0
    for event, following in zip(calls, [*calls[1:], None]):
        is_leaf = following is None or following.start_ns() >= event.start_ns() + event.duration_ns()
        launched += is_leaf and event.name().removeprefix("aten::") not in VIEWS
    return {"operations": launched, "peak": peak}


def step(options: Step) -> list[dict]:
    """The table's rows: counts, seconds, and each as a ratio to flow matching of the same mode."""
    import torch
    from torch._inductor.utils import fresh_cache

    ways = Ways(options, build(options))
    narrow = Ways(replace(options, batch=4, ratio=tuple(snap(ratio) for ratio in options.ratio)), build(options, True))
    modes = ("eager", "compiled") if options.compiled else ("eager",)
    rows, steps, host = {}, {}, {}
    for mode in modes:
        for name, narrow_name in zip(ways.names(), narrow.names()):
            way = ways.make(name, mode == "compiled")
            begin = time.perf_counter()
            with fresh_cache():
                way.step()
            row = {"way": name, "mode": mode, "compile": time.perf_counter() - begin if mode == "compiled" else None}
            row["flops"] = rows[name, "eager"]["flops"] if mode == "compiled" else count_flops(way)
            row["bytes"] = count_bytes(way)
            rows[name, mode] = row | profile_step(way.step, options.device)
            steps[name, mode] = way.step
            host[name, mode] = narrow.make(narrow_name, mode == "compiled").step
    runs = [interleaved(steps, options) for _ in range(options.runs)]
    for way, row in rows.items():
        ratios = [run[way] / run["flow matching", way[1]] for run in runs]
        best = min(range(options.runs), key=ratios.__getitem__)
        row |= {"seconds": runs[best][way], "seconds_ratio": ratios[best], "worst_ratio": max(ratios)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for way, seconds in interleaved(host, options).items():
        rows[way]["host"] = seconds
    torch.set_num_threads(threads)
    for (_, mode), row in rows.items():
        base = rows["flow matching", mode]
        row |= {f"{key}_ratio": row[key] / base[key] for key in ("flops", "bytes", "peak", "host")}
        if options.device.startswith("cuda"):
            row |= utilisation(row)
    return list(rows.values())


def snap(ratio: float) -> float:
    """The next share that 4 samples can have."""
    return max(1, round(4 * ratio)) / 4


def utilisation(row: dict) -> dict:
    """TFLOP/s, and their share of the most that the GPU can do in bfloat16 (MFU), if its name is known."""
    import torch

    rate, name = row["flops"] / row["seconds"], torch.cuda.get_device_name()
    most = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return {"gpu": name, "tflops": rate / 1e12, "mfu": rate / most if most else None}


def scale(options: Scale) -> list[dict]:
    """The table's rows: flow matching and this project's step, compiled, by batch, tokens and depth."""
    step_options = {field: getattr(options, field) for field in Network.__dataclass_fields__}
    base = Step(**step_options, batch=options.batch[0], ratio=(options.ratio,), usual=False)
    variations = [("batch", "batch", options.batch), ("tokens", "input_size", options.sizes)]
    variations += [("depth", "depth", options.depths)] * (options.model == "custom")
    rows = []
    for quantity, field, values in variations:
        for value in values:
            changed = replace(base, **{field: value})
            ways = Ways(changed, build(changed))
            seconds = interleaved({name: ways.make(name, compiled=True).step for name in ways.names()}, options)
            shown = (value // options.patch_size) ** 2 if quantity == "tokens" else value
            flow, ours = seconds.values()
            rows.append({"quantity": quantity, "value": shown, "seconds": ours, "ratio": ours / flow})
    return rows


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


def interleaved(ways: dict, options: Network) -> dict:
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


def mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def print_step(rows: list[dict]) -> None:
    print(
        "\n| step | | GFLOPs | x | MiB kept | x | MiB peak | x | operations | host ms | x | ms | x | to | compile s |"
    )
    print("|:---|:---|" + "---:|" * 13)
    for row in rows:
        memory = " | ".join(f"{mib(row[key])} | {row[f'{key}_ratio']:.3f}" for key in ("bytes", "peak"))
        times = " | ".join(f"{row[key] * 1e3:.3g} | {row[f'{key}_ratio']:.2f}" for key in ("host", "seconds"))
        times += f" | {row['worst_ratio']:.2f}"
        flops = f"{row['flops'] / 1e9:.1f} | {row['flops_ratio']:.3f}"
        compile_seconds = f"{row['compile']:.0f}" if row["compile"] else ""
        cells = (row["way"], row["mode"], flops, memory, row["operations"], times, compile_seconds)
        print("| " + " | ".join(map(str, cells)) + " |")
    if "gpu" in rows[0]:
        print(f"\n{rows[0]['gpu']}")
        for row in rows:
            share = f"{row['mfu']:.1%} MFU" if row["mfu"] else "MFU unknown: this GPU's peak is not in PEAK_FLOPS"
            print(f"{row['way']}, {row['mode']}: {row['tflops']:.1f} TFLOP/s, {share}")


def print_scale(rows: list[dict]) -> None:
    print("\n| | | ms | x flow matching |\n|:---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['quantity']} | {row['value']} | {row['seconds'] * 1e3:.3g} | {row['ratio']:.2f} |")


def main(options: Network | Improved | Data) -> None:
    from benchmark_data import data, loader, print_data, print_loader  # these lie beside this file
    from benchmark_improved import improved, print_improved

    commands = {Step: (step, print_step), Scale: (scale, print_scale), Sample: (sampling, print_sample)}
    commands |= {Data: (data, print_data), Loader: (loader, print_loader), Improved: (improved, print_improved)}
    measure, show = commands[type(options)]
    rows = measure(options)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    names = {"step": Step, "scale": Scale, "improved": Improved, "sample": Sample, "loader": Loader, "data": Data}
    with refusals():
        main(tyro.extras.subcommand_cli_from_dict(names, description=__doc__))
