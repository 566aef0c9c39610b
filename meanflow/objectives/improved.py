"""Improved MeanFlow, arXiv:2512.02012: a loss on the velocity, and a network that takes any CFG scale.

The network is told the scale omega and the interval [t_start, t_end] of times in which guidance acts; its attribute
takes_omega says so. It may have a second head for the instantaneous velocity v, with a loss of its own:
net.trunk(z, t, h, **cond) returns what net.u and net.v read, and net.v_heads are its layers. Without that head, v is u
at h = 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from meanflow.config import ImprovedMeanFlowConfig
from meanflow.noise import generator
from meanflow.objectives.base import Batch, Output
from meanflow.objectives.draws import arrange, below, draw_slots, kept_shares, num_meanflow, rarely_exceeded
from meanflow.objectives.guidance import GuidedRows
from meanflow.objectives.meanflow import MeanFlow, raw_losses, select
from meanflow.sampler import Cond, as_velocity, expand, guidance_conditions


def draw_guidance(config: ImprovedMeanFlowConfig, uniform: Tensor, k: int) -> Cond:
    """omega, t_start and t_end, (B,), from uniform numbers (B, 3); the first k rows have r != t.

    omega has the density omega^-beta on [1, omega_max]; t_start is uniform in [0, 1/2] and t_end in [1/2, 1], and the
    r = t rows have [0, 1].
    """
    beta, share = config.omega_beta, uniform[:, 0]
    if beta == 1:
        omega = config.omega_max**share
    else:
        omega = (1 + share * (config.omega_max ** (1 - beta) - 1)) ** (1 / (1 - beta))
    is_flow = torch.arange(len(uniform)) >= k
    t_start, t_end = uniform[:, 1] / 2, (1 + uniform[:, 2]) / 2
    return {"omega": omega, "t_start": t_start.masked_fill(is_flow, 0.0), "t_end": t_end.masked_fill(is_flow, 1.0)}


def make_draws(config: ImprovedMeanFlowConfig, shape: tuple, seed: int, slots: Sequence[int], global_batch=None):
    """As draw_slots, with omega, t_start and t_end, and the rows that guidance changes."""
    draws, uniform = draw_slots(config, shape, seed, slots, global_batch), torch.empty(len(slots), 3)
    for row, slot in enumerate(slots):
        uniform[row].uniform_(generator=generator(seed, slot, "guidance"))
    cond = draw_guidance(config, uniform, num_meanflow(config, len(slots)))
    return replace(draws, cond=cond, guided=guided_rows(config, draws.t, draws.drop, cond))


def guided_rows(config: ImprovedMeanFlowConfig, t: Tensor, drop: Tensor, cond: Cond) -> GuidedRows:
    """The predictions of a step, on the CPU: every r != t row needs v, whose direction du/dt takes."""
    k = num_meanflow(config, len(t))
    acts = is_inside(t, cond) & ~drop
    return arrange(acts, torch.ones(k, dtype=torch.bool), k, k + num_null(config, len(t)))


def is_inside(t: Tensor, cond: Cond) -> Tensor:
    return (cond["t_start"] <= t) & (t <= cond["t_end"])


def num_null(config: ImprovedMeanFlowConfig, batch: int) -> int:
    """How many rows of a batch get a prediction of the null class, of which at most 1 in 2,000 batches needs more."""
    steps = 100
    edges = [below(config, step / steps) for step in range(steps + 1)]
    # A random interval holds t with probability 1 - |2 t - 1|.
    inside = sum((b - a) * (1 - abs((2 * step + 1) / steps - 1)) for step, (a, b) in enumerate(zip(edges, edges[1:])))
    (interval, flow), k = kept_shares(config), num_meanflow(config, batch)
    return rarely_exceeded(k, 1, inside * interval, batch - k, flow)


class ImprovedMeanFlow(MeanFlow):
    """The objective of arXiv:2512.02012 as a module that owns the network.

    Args:
        net: net(z, t, h, y, omega, t_start, t_end) -> u, or x_hat.
        config: the options.
    """

    make_draws = staticmethod(make_draws)

    def forward(self, batch: Batch, step: int = 0) -> Output:
        """The loss and metrics of one micro-batch; arguments as for MeanFlow.

        Returns:
            The metrics are those of MeanFlow, of the error of the velocity V = u + (t - r) du/dt; raw_loss_v is the
            squared error of the v head, summed over a sample, without weights.
        """
        (x, draws, cond), config = batch, self.config
        t, r, k = draws.t, draws.r, num_meanflow(config, len(x))
        self.check_batch(batch, k)
        z_t = (1 - expand(t, x)) * x + expand(t, x) * draws.e
        cond = {**cond, **draws.cond}
        seen = {**cond, "y": torch.where(draws.drop, self.net.config.num_classes, cond["y"])}

        # The r = t rows are the last ones, but computed first: guidance reads their v.
        flow, metrics = slice(k, None), {}
        V = v = draws.e[:0]
        if k < len(x):
            V, features = self.u_and_features(z_t[flow], t[flow], r[flow], select(seen, flow))
            v = self.v_of(features, z_t[flow], t[flow]) if self.has_v_head else V
        v_g, v_c = self.guide(draws.e - x, z_t, t, cond, v, draws.guided)
        if k:
            u_fn = partial(self.u_and_features, cond=select(seen, slice(k)))
            # The total derivative along the predicted velocity: dz/dt = v_c, dt/dt = 1, dr/dt = 0.
            tangents = v_c[:k], torch.ones_like(t[:k]), torch.zeros_like(t[:k])
            (u, features), (du_dt, _) = self.jvp(u_fn, (z_t[:k], t[:k], r[:k]), tangents)
            V = torch.cat([u + expand(t - r, x)[:k] * du_dt, V])
            if self.has_v_head:
                v = torch.cat([self.v_of(features, z_t[:k], t[:k]), v])
            metrics["du_dt"] = du_dt.flatten(1).norm(dim=1).mean()

        squared_error = (V - v_g).square()
        loss, metrics = self.weighted_loss(squared_error), {**metrics, **raw_losses(squared_error.detach(), k)}
        if self.has_v_head:
            error_v = (v - v_g).square()
            loss = loss + self.weighted_loss(error_v)
            metrics["raw_loss_v"] = error_v.detach().flatten(1).sum(dim=1).mean()
        return Output(loss, metrics)

    @property
    def has_v_head(self) -> bool:
        return hasattr(self.net, "v_heads")

    def u_and_features(self, z: Tensor, t: Tensor, r: Tensor, cond: Cond) -> tuple[Tensor, Tensor | tuple]:
        """u(z, t, r | cond), and what the v head reads, () if there is none."""
        if not self.has_v_head:
            return self.u(z, t, r, cond), ()
        features = self.net.trunk(z, t, t - r, **cond)
        return as_velocity(self.net.u(features), z, t, self.config.prediction, self.config.t_min), features

    def v_of(self, features: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The v head's prediction."""
        return as_velocity(self.net.v(features), z, t, self.config.prediction, self.config.t_min)

    def v_at(self, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v(z, t | cond), at h = 0."""
        if not self.has_v_head:
            return self.u(z, t, t, cond)
        return self.v_of(self.net.trunk(z, t, torch.zeros_like(t), **cond), z, t)

    @torch.no_grad()
    def guide(self, v: Tensor, z_t: Tensor, t: Tensor, cond: Cond, v_flow: Tensor, guided: GuidedRows):
        """The guided velocity v_g, and v_c, the network's own velocity for the class, both detached and like v.

        v_g = v + (1 - 1 / omega) (v_c - v_u), where omega counts as 1 outside of [t_start, t_end], and v_u is the null
        class's velocity. Where a label is dropped, v_g is v.

        Args:
            v_flow: v of the r = t rows, which are the last ones: the main forward's output.
        """
        omega = torch.where(is_inside(t, cond), cond["omega"], 1.0)
        null_class = torch.full_like(cond["y"], self.net.config.num_classes)
        null = {**cond, "y": null_class, **guidance_conditions(1.0, (0.0, 1.0), t)}
        own = {**cond, **guidance_conditions(1.0, (0.0, 1.0), t), "omega": omega}
        v_u, v_c = self.predict(self.v_at, guided, z_t, t, null, own, v_flow)
        v_g = v + expand(1 - 1 / omega, v) * (v_c - v_u)
        return torch.where(expand(guided.acts, v), v_g, v), v_c

    @classmethod
    def needs_guided(cls, config: ImprovedMeanFlowConfig) -> bool:
        return True

    @classmethod
    def check_guidance(cls, config: ImprovedMeanFlowConfig, net: nn.Module, num_classes: int) -> None:
        if not num_classes:
            raise ValueError("objective: ImprovedMeanFlow trains guidance, which needs data with classes")
        if not getattr(net, "takes_omega", False):
            advice = "iMF-B/2, or --net takes_omega 1 with DiT, UNet or UNet-cifar"
            raise ValueError(f"objective: ImprovedMeanFlow needs a network that takes the CFG scale: {advice}")

    @classmethod
    def warnings(cls, config: ImprovedMeanFlowConfig, global_batch: int) -> list[str]:
        found = super().warnings(config, global_batch)
        if config.meanflow_ratio == 1:
            found.append("no sample has r = t (meanflow_ratio 1), so v, which guidance reads at h = 0, is not trained")
        return found

    @classmethod
    def guidance(cls, config: ImprovedMeanFlowConfig) -> dict:
        scale, interval = config.guidance_scale, config.guidance_interval
        default = f"by default {scale:g} for t in [{interval[0]:g}, {interval[1]:g}]"
        return {
            "guidance_scale": scale,
            "guidance_interval": interval,
            "guidance_range": (1.0, config.omega_max),
            "guidance": f"at any CFG scale, trained from 1 to {config.omega_max:g}, {default}",
        }
