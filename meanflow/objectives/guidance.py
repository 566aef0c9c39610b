"""Classifier-free guidance that is trained in, arXiv:2505.13447 sec. 4.2, so that one step needs one evaluation."""

from typing import NamedTuple

from torch import Tensor

from meanflow.config import MeanFlowConfig


def guided_velocity(v: Tensor, u_null: Tensor | float, u_cond: Tensor | float, omega: float, kappa: float) -> Tensor:
    """v_g = omega v + (1 - omega - kappa) u(z_t, t, t, null) + kappa u(z_t, t, t, y), like v.

    From the paper's appendix; its effective scale is omega / (1 - kappa). Where a weight is 0, its prediction may be
    given as 0.
    """
    return omega * v + (1 - omega - kappa) * u_null + kappa * u_cond


class GuidedRows(NamedTuple):
    """Indices of the rows whose velocity guidance changes, int64: those with r != t, and those with r = t."""

    interval: Tensor
    flow: Tensor


def guidance_in_words(config: MeanFlowConfig) -> str:
    """Describes the guidance that is trained into the network."""
    if not config.guided:
        return "none trained in (omega 1, kappa 0)"
    where = f"for t in [{config.t_start:g}, {config.t_end:g}] (omega {config.omega:g}, kappa {config.kappa:g})"
    return f"trained in, effective scale {config.effective_scale:.4g} {where}"
