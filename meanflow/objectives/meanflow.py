"""The MeanFlow objective, arXiv:2505.13447: it trains the average velocity u by a target made of v and du/dt."""

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from meanflow.config import MeanFlowConfig, VelocityConfig
from meanflow.objectives.base import Batch, Objective, Output, Sampling
from meanflow.objectives.draws import can_look_at, make_draws, num_meanflow, order_slots
from meanflow.objectives.guidance import GuidedRows, guidance_in_words, guided_velocity
from meanflow.objectives.jvp import finite_difference, jvp
from meanflow.sampler import STEPS, Cond, average_velocity, expand

JVP = {"exact": jvp, "finite-difference": finite_difference}
MIN_INTERVALS = 16  # r != t samples in an optimiser step; with fewer a run gets a warning


def mean_velocity_target(u_fn: Callable, z_t: Tensor, t: Tensor, r: Tensor, v: Tensor, jvp: Callable = jvp):
    """The average velocity u, its regression target and du/dt, eqs. (8)-(11).

    Args:
        u_fn: (z_t, t, r) -> u with the conditions bound, of the bare network: a derivative cannot cross DDP.
        z_t, v: a point on the path and the (guided) velocity there, (B, C, *S).
        t, r: the interval's ends in [0, 1], r <= t, (B,).
    Returns:
        u with its graph; u_tgt = v - (t - r) du/dt and du/dt, both detached; all like z_t.
    """
    # The total derivative along the path: dz/dt = v, dt/dt = 1, dr/dt = 0.
    u, du_dt = jvp(u_fn, (z_t, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    return u, (v - expand(t - r, z_t) * du_dt).detach(), du_dt


def adaptive_weight(squared_error: Tensor, norm_p: float, norm_eps: float) -> Tensor:
    """w = 1 / (squared error + norm_eps)^norm_p, detached, sec. 4.3. The error is summed over a sample, (B,)."""
    return (squared_error.detach() + norm_eps) ** -norm_p


class MeanFlow(Objective):
    """The objective of arXiv:2505.13447 as a module that owns the network.

    Args:
        net: net(z, t, h, **cond) -> u, or x_hat. With classes it has net.config.num_classes, also the null class.
        config: the options.
    """

    order_slots = staticmethod(order_slots)
    make_draws = staticmethod(make_draws)

    def __init__(self, net: nn.Module, config: VelocityConfig):
        super().__init__(net, config)
        weights = torch.tensor(config.channel_weights) if isinstance(config.channel_weights, (tuple, list)) else None
        self.register_buffer("channel_weights", weights, persistent=False)

    def prepare(self, data) -> None:
        if self.config.channel_weights == "inverse-variance":
            self.channel_weights = (1 / data.channel_variance()).float()

    def jvp(self, u_fn: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor]:
        """u_fn of the primals, with its graph, and its derivative along the tangents, detached."""
        return JVP[self.config.jvp](u_fn, primals, tangents)

    def u(self, z: Tensor, t: Tensor, r: Tensor, cond: Cond) -> Tensor:
        return average_velocity(self.net, z, t, r, cond, self.config.prediction, self.config.t_min)

    def forward(self, batch: Batch, step: int = 0) -> Output:
        """The loss and metrics of one micro-batch.

        Args:
            batch: its draws are `Draws`, of which the first k = round(B * meanflow_ratio) rows have r != t; its cond
                may hold y, classes in [0, num_classes], (B,) int64.
            step: is not used.
        Returns:
            The metrics are means over the samples that they name: raw_loss, the squared error summed over a sample,
            without weights; raw_loss_flow and raw_loss_meanflow, of the r = t and the r != t samples;
            raw_loss_channels, (C,); du_dt, the norm of the total derivative. A mean over no samples is left out.
        Raises:
            ValueError: a shape is wrong; on the CPU also a class, or the order of the rows.
        """
        (x, draws, cond), config = batch, self.config
        t, r, k = draws.t, draws.r, num_meanflow(config, len(x))
        self.check_batch(batch, k)
        z_t = (1 - expand(t, x)) * x + expand(t, x) * draws.e
        v = draws.e - x
        if "y" in cond:
            cond = {**cond, "y": torch.where(draws.drop, self.net.config.num_classes, cond["y"])}

        # The r = t rows are plain flow matching. They are the last rows, but computed first: guidance reads their u.
        flow, metrics = slice(k, None), {}
        u = self.u(z_t[flow], t[flow], r[flow], select(cond, flow)) if k < len(x) else v[flow]
        u_tgt = v_g = v if draws.guided is None else self.guide(v, z_t, t, cond, u, draws.guided)
        if k:
            u_fn = partial(self.u, cond=select(cond, slice(k)))
            u_k, u_tgt_k, du_dt = mean_velocity_target(u_fn, z_t[:k], t[:k], r[:k], v_g[:k], self.jvp)
            u, u_tgt = torch.cat([u_k, u]), torch.cat([u_tgt_k, v_g[flow]])
            metrics["du_dt"] = du_dt.flatten(1).norm(dim=1).mean()

        squared_error = (u - u_tgt).square()
        return Output(self.weighted_loss(squared_error), {**metrics, **raw_losses(squared_error.detach(), k)})

    def weighted_loss(self, squared_error: Tensor) -> Tensor:
        """The mean over the batch of the adaptively weighted squared error, sec. 4.3; squared_error is (B, C, *S)."""
        if self.config.channel_weights is not None:
            squared_error = squared_error * self.channel_weights.view(-1, *[1] * (squared_error.ndim - 2))
        error = squared_error.flatten(1).sum(dim=1)
        return (adaptive_weight(error, self.config.norm_p, self.config.norm_eps) * error).mean()

    @torch.no_grad()
    def guide(self, v: Tensor, z_t: Tensor, t: Tensor, cond: Cond, u_flow: Tensor, guided: GuidedRows) -> Tensor:
        """The guided velocity, detached, like v; where guidance does not act, it is v.

        Args:
            u_flow: u(z_t, t, t, y) of the r = t rows, which are the last ones: the main forward's output.
        """
        null = {**cond, "y": torch.full_like(cond["y"], self.net.config.num_classes)}

        def v_fn(z_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return self.u(z_t, t, t, cond)

        u_null, u_cond = self.predict(v_fn, guided, z_t, t, null, cond, u_flow)
        v_g = guided_velocity(v, u_null, u_cond, self.config.omega, self.config.kappa)
        return torch.where(expand(guided.acts, v), v_g, v)

    def predict(self, v_fn, guided: GuidedRows, z_t: Tensor, t: Tensor, null: Cond, own: Cond, flow: Tensor):
        """The velocities that guidance combines, of the null class and of each row's own, in one forward.

        Rows that need no such prediction get any. Networks with dropout are evaluated without it.

        Args:
            v_fn: (z_t, t, cond) -> v.
            guided: which predictions are needed.
            null, own: the conditions of both kinds for all rows.
            flow: the main forward's predictions of the r = t rows, which are the last ones.
        Returns:
            both for all rows, each like z_t.
        """
        rows, is_null = guided.rows, guided.null
        # The main forward's outputs have dropout.
        again = differs_in_training(self.net)
        if again:
            flow_rows = torch.arange(len(t) - len(flow), len(t), device=t.device)
            rows, is_null = torch.cat([rows, flow_rows]), torch.cat([is_null, torch.zeros_like(flow_rows).bool()])
        cond = {name: torch.where(expand(is_null, own[name]), null[name][rows], own[name][rows]) for name in own}
        with evaluation(self.net) if again else nullcontext():
            v = v_fn(z_t[rows], t[rows], cond)
        v = v if again else torch.cat([v, flow])
        return v[guided.u_null], v[guided.u_cond]

    def check_batch(self, batch: Batch, k: int) -> None:
        x, draws, y = batch.x, batch.draws, batch.cond.get("y")
        if x.shape != draws.e.shape:
            raise ValueError(f"noise must be {tuple(x.shape)} like the data, got {tuple(draws.e.shape)}")
        if self.config.channel_weights is not None and self.channel_weights is None:
            raise ValueError("channel_weights are inverse-variance, of data that are not known: call prepare(data)")
        self.check(self.config, self.net, x.shape[1:], 0 if y is None else self.net.config.num_classes)
        if self.needs_guided(self.config) and draws.guided is None:
            raise ValueError(f"draws must have guided: make them by {type(self).__name__}.make_draws")
        if y is not None and (y.shape != x.shape[:1] or y.dtype != torch.int64):
            raise ValueError(f"classes must be ({len(x)},) int64, got {tuple(y.shape)} {y.dtype}")
        if not can_look_at(x):
            return
        if y is not None and not (0 <= y.min() and y.max() <= self.net.config.num_classes):
            raise ValueError(f"classes must be in [0, {self.net.config.num_classes}], got {y.min()} to {y.max()}")
        if (draws.r[k:] != draws.t[k:]).any():
            raise ValueError(f"the first {k} of {len(x)} rows must be the r != t ones, got r = t rows first")

    @classmethod
    def needs_guided(cls, config: MeanFlowConfig) -> bool:
        """Whether guidance acts at every step."""
        return config.guided and not config.guidance_from_step

    @classmethod
    def check(cls, config: VelocityConfig, net: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
        cls.check_guidance(config, net, num_classes)
        if config.jvp == "finite-difference" and has_dropout(net):
            raise ValueError("objective.jvp must be exact for a network with dropout, got finite-difference")
        weights = config.channel_weights
        if isinstance(weights, (tuple, list)) and len(weights) != shape[0]:
            raise ValueError(f"channel_weights must be {shape[0]} numbers, one a channel, got {len(weights)}")

    @classmethod
    def check_guidance(cls, config: MeanFlowConfig, net: nn.Module, num_classes: int) -> None:
        if config.guided and not num_classes:
            raise ValueError("objective.omega and objective.kappa must be 1 and 0 for data without classes")
        if hasattr(net, "v_heads"):
            raise ValueError("model: this network has a v head, which only ImprovedMeanFlow trains: --net v_head 0")

    @classmethod
    def sampling(cls, config: VelocityConfig) -> Sampling:
        solver = "meanflow" if config.meanflow_ratio else "euler"
        null_class = {"independent": "any", "flow": "flow"}[config.null_class] if config.class_dropout_prob else None
        how = {"solver": solver, "num_inference_steps": STEPS[solver], "null_class": null_class}
        return Sampling(config.prediction, config.t_min, **how, **cls.guidance(config))

    @classmethod
    def guidance(cls, config: MeanFlowConfig) -> dict:
        """What Sampling has of the guidance that is trained in."""
        scale = config.effective_scale if config.guided else None
        return {"guidance_scale": scale, "guidance": guidance_in_words(config)}

    @classmethod
    def describe(cls, config: VelocityConfig, global_batch: int) -> dict[str, str]:
        share = f"{num_meanflow(config, global_batch)} of {global_batch} samples with r != t"
        return {"objective": f"{cls.__name__}, {share}", "guidance": cls.guidance(config)["guidance"]}

    @classmethod
    def warnings(cls, config: VelocityConfig, global_batch: int) -> list[str]:
        k = num_meanflow(config, global_batch)
        if config.meanflow_ratio == 0 or k >= MIN_INTERVALS:
            return []
        enough = math.ceil(MIN_INTERVALS / config.meanflow_ratio)
        advice = f"raise --global-batch to {enough} or more; --accumulation-steps keeps the memory"
        return [f"only {k} of the {global_batch} samples of an optimiser step have r != t: {advice}"]


def select(cond: Cond, rows: slice | Tensor) -> Cond:
    """The conditions of these rows of a batch."""
    return {name: value[rows] for name, value in cond.items()}


def raw_losses(squared_error: Tensor, k: int) -> dict[str, Tensor]:
    """The unweighted losses of a batch whose first k rows have r != t; squared_error is (B, C, *S), detached."""
    raw = squared_error.flatten(2).sum(dim=2)  # (B, C)
    losses = {"raw_loss": raw.sum(dim=1).mean(), "raw_loss_channels": raw.mean(dim=0)}
    parts = {"raw_loss_meanflow": raw[:k], "raw_loss_flow": raw[k:]}
    return losses | {name: part.sum(dim=1).mean() for name, part in parts.items() if len(part)}


def has_dropout(net: nn.Module) -> bool:
    """Whether a layer of net drops something now: torch's Dropout, timm's DropPath and the like."""
    layers = (layer for layer in net.modules() if layer.training and "drop" in type(layer).__name__.lower())
    return any((getattr(layer, "p", 0) or getattr(layer, "drop_prob", 0) or 0) > 0 for layer in layers)


def differs_in_training(net: nn.Module) -> bool:
    """Whether net returns something else now than in evaluation mode: it drops, or has statistics of batches."""
    return has_dropout(net) or any(getattr(m, "track_running_stats", False) and m.training for m in net.modules())


@contextmanager
def evaluation(net: nn.Module):
    """Inside this context every layer of net is in evaluation mode."""
    layers = [layer for layer in net.modules() if layer.training]
    try:
        yield net.eval()
    finally:
        for layer in layers:
            layer.training = True
