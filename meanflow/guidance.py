"""Classifier-free guidance that is trained in, arXiv:2505.13447 sec. 4.2, so that one step needs one evaluation."""

from torch import Tensor


def guided_velocity(v: Tensor, u_null: Tensor | float, u_cond: Tensor | float, omega: float, kappa: float) -> Tensor:
    """v_g = omega v + (1 - omega - kappa) u(z_t, t, t, null) + kappa u(z_t, t, t, y), like v.

    From the paper's appendix; its effective scale is omega / (1 - kappa). A prediction of weight 0 may be 0.
    """
    return omega * v + (1 - omega - kappa) * u_null + kappa * u_cond
