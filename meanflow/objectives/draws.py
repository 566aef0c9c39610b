"""The random draws of one training step: noise, times and dropped labels, made on the CPU.

A sample's draws are a function of the seed and its slot, which is the place that the sample has in the sequence of all
samples that the run will ever see. So they depend neither on the device nor on how many processes share the work.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from meanflow.config import MeanFlowConfig, VelocityConfig
from meanflow.noise import generator
from meanflow.objectives.guidance import GuidedRows
from meanflow.sampler import Cond


def can_look_at(x: Tensor) -> bool:
    """Whether x has values that can be read without a host sync: not on an accelerator, nor while a step is traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and torch._guards.active_fake_mode() is None


@dataclass(frozen=True)
class Draws:
    """What is random in a micro-batch, row by row; the r != t rows come first.

    Args:
        e: standard normal noise, like x, (B, C, *S).
        t, r: the interval's ends, (B,), 0 <= r <= t <= 1.
        drop: which labels become the null class, (B,) bool.
        guided: what guidance evaluates; None where it does not act.
        cond: conditions of the network that are drawn, too, each (B, ...).
    Raises:
        ValueError: a shape, a dtype or, on the CPU, a time is wrong.
    """

    e: Tensor
    t: Tensor
    r: Tensor
    drop: Tensor
    guided: GuidedRows | None = None
    cond: Cond = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.e.shape[:1]
        if not self.t.shape == self.r.shape == self.drop.shape == batch:
            shapes = [tuple(x.shape) for x in (self.t, self.r, self.drop)]
            raise ValueError(f"t, r and drop must be {tuple(batch)} like the noise's first axis, got {shapes}")
        if self.drop.dtype != torch.bool:
            raise ValueError(f"drop must be bool, got {self.drop.dtype}")
        if not can_look_at(self.t):
            return
        if not (0 <= self.r.min() and self.t.max() <= 1):
            raise ValueError(f"t and r must be in [0, 1], got {self.r.min():.4g} to {self.t.max():.4g}")
        if (self.r > self.t).any():
            row = int((self.r > self.t).nonzero()[0])
            raise ValueError(f"r must be <= t, got r = {self.r[row]:.4g} > t = {self.t[row]:.4g} in row {row}")

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Draws":
        e, t, r, drop = map(fn, (self.e, self.t, self.r, self.drop))
        cond = {name: fn(values) for name, values in self.cond.items()}
        return Draws(e, t, r, drop, self.guided and GuidedRows(*map(fn, self.guided)), cond)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Draws":
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Draws":
        """For the loader: in page-locked memory, from which a GPU copies without waiting."""
        return self.map(Tensor.pin_memory)


def num_meanflow(config: VelocityConfig, batch: int) -> int:
    """How many of `batch` samples have r != t: an exact count."""
    return round(batch * config.meanflow_ratio)


def has_interval(config: VelocityConfig, slots: Sequence[int], global_batch: int) -> Tensor:
    """Which slots have r != t, (B,) bool; every global batch has exactly num_meanflow of them, evenly spread."""
    k, j = num_meanflow(config, global_batch), torch.tensor(slots) % global_batch
    return (j + 1) * k // global_batch > j * k // global_batch


def order_slots(config: VelocityConfig, slots: Sequence[int], global_batch: int) -> list[int]:
    """The slots of a micro-batch with the r != t ones first.

    Raises:
        ValueError: the micro-batch does not hold the exact share of r != t samples.
    """
    interval, k = has_interval(config, slots, global_batch), num_meanflow(config, global_batch)
    if interval.sum() * global_batch != k * len(slots):
        share = f"the {k} r != t samples in every {global_batch} (meanflow_ratio {config.meanflow_ratio})"
        advice = "change global_batch or accumulation_steps"
        raise ValueError(f"a micro-batch of {len(slots)} cannot hold its exact share of {share}: {advice}")
    slots = torch.tensor(slots)
    return torch.cat([slots[interval], slots[~interval]]).tolist()


def logit_laws(config: VelocityConfig) -> list[tuple[float, float]]:
    """Mean and standard deviation of the two normal logits that times are made of."""
    P_mean_r = config.P_mean if config.P_mean_r is None else config.P_mean_r
    P_std_r = config.P_std if config.P_std_r is None else config.P_std_r
    return [(config.P_mean, config.P_std), (P_mean_r, P_std_r)]


def sample_times(config: VelocityConfig, normals: Tensor, interval: Tensor) -> tuple[Tensor, Tensor]:
    """t and r, (B,), from standard normal numbers (B, 2) and the rows that keep r != t, (B,) bool.

    v0, arXiv:2505.13447 sec. 4.3: t and r are the maximum and the minimum of two logit-normals. v1, the authors'
    CIFAR-10 code: t is drawn by itself and r = min(t, r), so that some of the chosen rows have r = t all the same.
    uniform: as v0, of two uniform numbers. In the other rows r = t either way.
    """
    t, r = ((mean + std * normal).sigmoid() for (mean, std), normal in zip(logit_laws(config), normals.unbind(1)))
    if config.time_sampler == "uniform":
        t, r = torch.special.ndtr(normals).unbind(1)
    if config.time_sampler != "v1":
        t, r = torch.maximum(t, r), torch.minimum(t, r)
    if config.prediction == "x":
        t = t.clamp(min=config.t_min)
    return t, torch.where(interval, torch.minimum(t, r), t)


def drop_labels(config: VelocityConfig, uniform: Tensor, interval: Tensor) -> Tensor:
    """Which labels to drop, (B,) bool, from uniform numbers (B,); with null_class "flow" none of the r != t rows."""
    if config.null_class == "independent" or config.class_dropout_prob == 0:
        return uniform < config.class_dropout_prob
    return ~interval & (uniform < config.class_dropout_prob / (1 - config.meanflow_ratio))


def draw_slots(config: VelocityConfig, shape: tuple, seed: int, slots: Sequence[int], global_batch=None) -> Draws:
    """The noise, times and dropped labels of these slots: a pure function.

    Args:
        shape: of one sample, (C, *S).
        slots: step * global_batch + the place in the global batch, in the order of `order_slots`.
        global_batch: samples per optimiser step; default: len(slots).
    Raises:
        ValueError: an r = t slot stands before an r != t slot, or the share of r != t samples is not exact.
    """
    global_batch = global_batch or len(slots)
    if list(slots) != order_slots(config, slots, global_batch):
        raise ValueError("r = t slots stand before r != t ones: put the slots in the order of order_slots")
    # In float64, then rounded: the last digit of a float32 sigmoid depends on the row's place in the batch.
    normals, uniform = torch.empty(len(slots), 2, dtype=torch.float64), torch.empty(len(slots))
    e = torch.empty(len(slots), *shape)
    for row, slot in enumerate(slots):
        random = generator(seed, slot)
        normals[row].normal_(generator=random)
        uniform[row].uniform_(generator=random)
        e[row].normal_(generator=random)
    interval = has_interval(config, slots, global_batch)
    t, r = (time.float() for time in sample_times(config, normals, interval))
    return Draws(e, t, r, drop_labels(config, uniform, interval))


def make_draws(config: MeanFlowConfig, shape: tuple, seed: int, slots: Sequence[int], global_batch=None) -> Draws:
    """As draw_slots, with the rows that guidance changes, from the step on at which it begins."""
    draws = draw_slots(config, shape, seed, slots, global_batch)
    acts = config.at(slots[0] // (global_batch or len(slots))).guided
    return replace(draws, guided=guided_rows(config, draws.t, draws.drop)) if acts else draws


def below(config: VelocityConfig, time: float) -> float:
    """The probability that t <= time."""
    if time in (0.0, 1.0):
        return time
    if config.time_sampler == "uniform":
        return time**2
    chances = [NormalDist(*law).cdf(math.log(time / (1 - time))) for law in logit_laws(config)]
    return chances[0] if config.time_sampler == "v1" else math.prod(chances)


def kept_shares(config: VelocityConfig) -> tuple[float, float]:
    """The share of the labels that are kept, of r != t samples and of r = t ones."""
    dropped = config.class_dropout_prob
    if config.null_class == "flow":
        return 1.0, 1 - dropped / (1 - config.meanflow_ratio)
    return 1 - dropped, 1 - dropped


def num_predictions(config: MeanFlowConfig, batch: int) -> int:
    """How many predictions guidance evaluates for `batch` rows: one size, so that a compiled step keeps its shapes.

    At most 1 of 2,000 micro-batches needs more; it gets the most that there can be. A guided row needs one prediction,
    and a guided r != t row a second one, if kappa > 0.
    """
    k, in_window = num_meanflow(config, batch), below(config, config.t_end) - below(config, config.t_start)
    interval, flow = (in_window * kept for kept in kept_shares(config))
    return rarely_exceeded(k, 2 if config.kappa else 1, interval, batch - k, flow)


@cache
def rarely_exceeded(k: int, needs: int, interval: float, num_flow: int, flow: float) -> int:
    """The number of predictions that at most 1 of 2,000 micro-batches exceeds, at least 1.

    Args:
        k, num_flow: rows with r != t, and with r = t.
        needs: predictions that a guided r != t row needs; a guided r = t row needs 1.
        interval, flow: the probability that such a row is guided.
    """
    chances = torch.ones(1, dtype=torch.float64)  # of each number of predictions, from 0 on
    for guided, count in [(interval, needs)] * k + [(flow, 1)] * num_flow:
        chances = (1 - guided) * F.pad(chances, (0, count)) + guided * F.pad(chances, (count, 0))
    return max(1, int((1 - chances.cumsum(0) > 1 / 2000).sum()))


def guided_rows(config: MeanFlowConfig, t: Tensor, drop: Tensor) -> GuidedRows:
    """The rows whose velocity guidance changes: t is in [t_start, t_end] and the label is kept. On the CPU."""
    acts = (config.t_start <= t) & (t <= config.t_end) & ~drop
    k = num_meanflow(config, len(t))
    return arrange(acts, acts[:k] if config.kappa else acts[:0], k, num_predictions(config, len(t)))


def arrange(acts: Tensor, conditional: Tensor, k: int, size: int) -> GuidedRows:
    """The predictions of a batch whose first k rows have r != t. On the CPU.

    Args:
        acts: which rows' velocity guidance changes, so that they need the null class's prediction, (B,) bool.
        conditional: which of the first rows need their own class's prediction, too, (up to k,) bool.
        size: how many predictions there are, with padding; if this is too few, there are as many as there can be.
    """
    null_rows, cond_rows, batch = acts.nonzero()[:, 0], conditional.nonzero()[:, 0], len(acts)
    count = len(null_rows) + len(cond_rows)
    if count > size:
        size = batch + len(conditional)
    rows, u_null, u_cond = torch.zeros(size).long(), torch.zeros(batch).long(), torch.zeros(batch).long()
    rows[:count] = torch.cat([null_rows, cond_rows])
    u_null[null_rows] = torch.arange(len(null_rows))
    u_cond[cond_rows] = torch.arange(len(null_rows), count)
    u_cond[k:] = torch.arange(size, size + batch - k)
    return GuidedRows(acts, rows, torch.arange(size) < len(null_rows), u_null, u_cond)
