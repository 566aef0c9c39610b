"""The MeanFlow objective, arXiv:2505.13447: an average velocity u that agrees with the data's velocity v."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meanflow.config import MeanFlowConfig
from meanflow.guidance import guided_velocity
from meanflow.jvp import finite_difference, jvp
from meanflow.sampler import average_velocity, expand
from meanflow.time import Draws, guided_rows, num_meanflow


def mean_velocity_target(
    u_fn: Callable, z_t: Tensor, t: Tensor, r: Tensor, v: Tensor, jvp: Callable = jvp
) -> tuple[Tensor, Tensor, Tensor]:
    """The average velocity u, its regression target and du/dt, eqs. (8)-(11).

    Args:
        u_fn: (z_t, t, r) -> u with the labels bound; of the bare network, since a derivative cannot cross DDP.
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


class Output(NamedTuple):
    loss: Tensor  # the scalar to differentiate
    metrics: dict[str, Tensor]  # detached


class MeanFlow(nn.Module):
    """objective(x, y, draws) -> Output(loss, metrics), for a network net(z, t, h, y) with h = t - r.

    DDP and FSDP wrap this module, not the network: gradients can cross them, a forward-mode derivative cannot.
    """

    def __init__(self, net: nn.Module, config: MeanFlowConfig):
        super().__init__()
        self.net, self.config = net, config
        self._no_split_modules = getattr(net, "_no_split_modules", None)  # what FSDP gathers at once
        if config.channel_weights == "inverse-variance":
            raise ValueError("channel_weights must be numbers by now: meanflow.data.channel_weights computes them")
        weights = None if config.channel_weights is None else torch.tensor(config.channel_weights)
        self.register_buffer("channel_weights", weights, persistent=False)

    def u(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        net = self.net if augment_labels is None else partial(self.net, augment_labels=augment_labels)
        return average_velocity(net, self.config, z, t, r, y)

    def forward(self, x: Tensor, y: Tensor | None, draws: Draws, augment_labels: Tensor | None = None) -> Output:
        """The loss and metrics of one micro-batch.

        Args:
            x: data, (B, C, *S).
            y: classes in [0, num_classes], (B,) int64; None for an unconditional network.
            draws: the noise and times; the first k = round(B * meanflow_ratio) rows are the r != t ones.
            augment_labels: how each sample was augmented, (B, augment_dim), for networks that are told.
        Returns:
            The metrics, means over the samples that they name: raw_loss, the squared error summed over a sample,
            without weights; raw_loss_flow and raw_loss_meanflow, of the r = t and the r != t samples;
            raw_loss_channels, (C,); du_dt, the norm of the total derivative. One over no samples is left out.
        Raises:
            ValueError: a shape or, on the CPU, a class or the order of the rows is wrong.
        """
        config, k = self.config, num_meanflow(self.config, len(x))
        self.check(x, y, draws, k)
        t, r = draws.t, draws.r
        z_t = (1 - expand(t, x)) * x + expand(t, x) * draws.e
        v = draws.e - x
        if y is not None:
            y = torch.where(draws.drop, self.net.config.num_classes, y)

        def rows(part: slice) -> tuple[Tensor | None, ...]:
            return tuple(None if a is None else a[part] for a in (z_t, t, r, y, augment_labels))

        # The r = t rows are plain flow matching; they go first, since guidance reads their u.
        u = self.u(*rows(slice(k, None))) if k < len(x) else v[k:]
        u_tgt = v_g = self.guide(v, z_t, t, y, augment_labels, u, draws) if config.guided else v
        metrics = {}
        if k:
            *interval, y_k, labels_k = rows(slice(k))
            u_k, u_tgt_k, du_dt = mean_velocity_target(
                lambda z, t, r: self.u(z, t, r, y_k, labels_k), *interval, v_g[:k], JVP[config.jvp]
            )
            u, u_tgt = torch.cat([u_k, u]), torch.cat([u_tgt_k, v_g[k:]])
            metrics["du_dt"] = du_dt.flatten(1).norm(dim=1).mean()

        squared, w = (u - u_tgt).square(), self.channel_weights
        weighted = squared if w is None else squared * w.view(-1, *[1] * (x.ndim - 2))
        error = weighted.flatten(1).sum(dim=1)
        loss = (adaptive_weight(error, config.norm_p, config.norm_eps) * error).mean()

        raw = squared.detach().flatten(2).sum(dim=2)  # (B, C)
        metrics |= {"raw_loss": raw.sum(dim=1).mean(), "raw_loss_channels": raw.mean(dim=0)}
        for name, part in (("raw_loss_meanflow", raw[:k]), ("raw_loss_flow", raw[k:])):
            if len(part):
                metrics[name] = part.sum(dim=1).mean()
        return Output(loss, metrics)

    def guide(self, v, z_t, t, y, augment_labels, u_flow: Tensor, draws: Draws) -> Tensor:
        """The guided velocity, detached: v where guidance does not act, and only the rows where it does are evaluated.

        u_flow is u(z_t, t, t, y) of the r = t rows, the main forward's output. A network with active dropout
        evaluates them again without.
        """
        config, k = self.config, len(v) - len(u_flow)
        interval, flow = draws.guided or guided_rows(config, t, draws.drop)
        acting = torch.cat([interval, flow])
        again = acting if has_dropout(self.net) else interval
        again = again if config.kappa else again[:0]
        batch = torch.cat([acting, again])
        labels = torch.cat([torch.full_like(acting, self.net.config.num_classes), y[again]])
        if not len(batch):  # in vain, but FSDP's ranks have to agree on the number of forwards
            batch, labels = torch.zeros_like(y[:1]), y[:1]
        with torch.no_grad(), evaluation(self.net):
            told = None if augment_labels is None else augment_labels[batch]
            u = self.u(z_t[batch], t[batch], t[batch], labels, told)
        u_null, u_cond = u[: len(acting)], u[len(acting) : len(acting) + len(again)]
        if config.kappa and len(again) < len(acting):
            u_cond = torch.cat([u_cond, u_flow.detach()[flow - k]])
        v_g = guided_velocity(v[acting], u_null, u_cond if config.kappa else 0.0, config.omega, config.kappa)
        return v.index_copy(0, acting, v_g)

    def check_channels(self, channels: int) -> None:
        weights = self.channel_weights
        if weights is not None and len(weights) != channels:
            raise ValueError(f"channel_weights must be {channels} numbers, one a channel, got {len(weights)}")

    def check(self, x: Tensor, y: Tensor | None, draws: Draws, k: int) -> None:
        if x.shape != draws.e.shape:
            raise ValueError(f"noise must be {tuple(x.shape)} like the data, got {tuple(draws.e.shape)}")
        self.check_channels(x.shape[1])
        if y is None and self.config.guided:
            raise ValueError("omega and kappa must be 1 and 0 without classes, got guidance")
        if y is not None and (y.shape != x.shape[:1] or y.dtype != torch.int64):
            raise ValueError(f"classes must be ({len(x)},) int64, got {tuple(y.shape)} {y.dtype}")
        if self.config.jvp == "finite-difference" and has_dropout(self.net):
            raise ValueError("jvp must be exact for a network with active dropout, got finite-difference")
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return  # an accelerator would have to wait
        if y is not None and not (0 <= y.min() and y.max() <= self.net.config.num_classes):
            raise ValueError(f"classes must be in [0, {self.net.config.num_classes}], got {y.min()} to {y.max()}")
        if (draws.r[k:] != draws.t[k:]).any():
            raise ValueError(f"the first {k} of {len(x)} rows must be the r != t ones, got r = t rows first")


JVP = {"exact": jvp, "finite-difference": finite_difference}


def has_dropout(net: nn.Module) -> bool:
    """Whether a layer of net drops something now: torch's Dropout, timm's DropPath and the like."""
    layers = (layer for layer in net.modules() if layer.training and "drop" in type(layer).__name__.lower())
    return any((getattr(layer, "p", 0) or getattr(layer, "drop_prob", 0) or 0) > 0 for layer in layers)


@contextmanager
def evaluation(net: nn.Module) -> Iterator[None]:
    """Every layer of net in evaluation mode, for a while."""
    layers = [layer for layer in net.modules() if layer.training]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True
