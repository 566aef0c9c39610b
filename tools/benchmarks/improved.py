"""The floating-point operations of a step of improved MeanFlow, by three schemes; a part of tools/benchmark.py."""

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from meanflow.config import ImprovedMeanFlowConfig
from meanflow.objectives.base import Batch
from meanflow.objectives.draws import order_slots
from meanflow.objectives.improved import ImprovedMeanFlow, make_draws
from meanflow.objectives.jvp import jvp
from models import MODELS


class Schemes:
    """Three ways to make the same step of a network with a v head, on tensors without content."""

    def __init__(self, model: str, batch: int, ratio: float):
        null_class = "flow" if ratio < 0.9 else "independent"
        config = ImprovedMeanFlowConfig(meanflow_ratio=ratio, null_class=null_class)
        draws = make_draws(config, (4, 32, 32), 0, order_slots(config, range(batch), batch))
        self.fake = FakeTensorMode()
        with self.fake:
            self.net = MODELS[model](input_size=32, in_channels=4, num_classes=1000)
            x, y = torch.empty(batch, 4, 32, 32), torch.zeros(batch, dtype=torch.int64)
            draws = draws.map(self.fake.from_tensor)
            self.tangents = x, torch.ones(batch), torch.zeros(batch)
        self.objective, self.batch = ImprovedMeanFlow(self.net, config), Batch(x, draws, {"y": y})
        self.point, self.cond = (x, draws.t, draws.r), {"y": y, **draws.cond}

    def u(self, z, t, r):
        return self.net(z, t, t - r, **self.cond)

    def both(self, z, t, r):
        features = self.net.trunk(z, t, t - r, **self.cond)
        return self.net.u(features), self.net.v(features)

    def v_without_gradients(self) -> None:
        z, t, _ = self.point
        with torch.no_grad():
            self.net.v(self.net.trunk(z, t, t, **self.cond))

    def this_project(self) -> None:
        self.objective(self.batch).loss.backward()

    def official(self) -> None:
        for _ in range(3):
            self.v_without_gradients()
        (u, v), _ = jvp(self.both, self.point, self.tangents)
        (u + v).sum().backward()

    def port(self) -> None:
        for _ in range(2):
            self.v_without_gradients()
        with torch.no_grad():
            jvp(self.u, self.point, self.tangents)
        u, v = self.both(*self.point)
        (u + v).sum().backward()

    def count(self, step) -> int:
        with self.fake, FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()


def improved(options) -> list[dict]:
    """A row for each network and scheme: FLOPs, and their ratio to this project's; options: an Improved."""
    rows = []
    for model in options.models:
        schemes = Schemes(model, options.batch, options.ratio)
        ours = schemes.count(schemes.this_project)
        ways = {"the official scheme": schemes.official, "the usual port": schemes.port}
        flops = {"this project": ours, **{name: schemes.count(step) for name, step in ways.items()}}
        rows += [{"model": model, "step": name, "flops": n, "ratio": n / ours} for name, n in flops.items()]
    return rows


def print_improved(rows: list[dict]) -> None:
    print("\n| network | step | TFLOPs | x this project's |\n|:---|:---|---:|---:|")
    for row in rows:
        print(f"| {row['model']} | {row['step']} | {row['flops'] / 1e12:.2f} | {row['ratio']:.3f} |")
