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
    """Which predictions guidance evaluates for a batch of B rows, in shapes that are the same at every step.

    The S predictions are of u(z_t, t, t, null) and u(z_t, t, t, y); some are padding, and their results are not used.
    u(z_t, t, t, y) of an r = t row is the main forward's output: these B - k outputs are counted on after the S.
    """

    acts: Tensor  # which rows' velocity guidance changes, (B,) bool
    rows: Tensor  # the row of each prediction, (S,) int64
    null: Tensor  # which predictions are of the null class, (S,) bool
    u_null: Tensor  # the place of each row's u(z_t, t, t, null) among the predictions, (B,) int64; any, if not guided
    u_cond: Tensor  # the same of u(z_t, t, t, y)


def guidance_in_words(config: MeanFlowConfig) -> str:
    """Describes the guidance that is trained into the network."""
    if not config.guided:
        return "none trained in (omega 1, kappa 0)"
    where = f"for t in [{config.t_start:g}, {config.t_end:g}] (omega {config.omega:g}, kappa {config.kappa:g})"
    begins = f" from step {config.guidance_from_step:,} on" if config.guidance_from_step else ""
    return f"trained in, effective scale {config.effective_scale:.4g} {where}{begins}"
