"""The ways of a training step that are compared, and how one is counted and timed."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .options import Network, Step

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


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
