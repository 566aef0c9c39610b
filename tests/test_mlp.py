"""The MLP: what every network of the zoo must do, on points of a plane."""

import torch
from conftest import perturbed

from meanflow.objectives.jvp import jvp
from models.mlp import MLP

SIZES = {"input_size": (1, 1), "in_channels": 2, "num_classes": 3, "hidden_size": 16, "depth": 2}


def inputs(dtype: torch.dtype = torch.float64) -> tuple:
    z, v = torch.randn(2, 5, 2, 1, 1, dtype=dtype)
    r, t = torch.rand(2, 5, dtype=dtype).sort(0).values
    return z, v, t, r, torch.arange(5) % 4  # 3 is the null class


def test_fresh_network_returns_0():
    z, _, t, r, y = inputs(torch.float32)
    assert (MLP(**SIZES)(z, t, t - r, y) == 0).all()


def test_derivative_is_that_of_torch_func_jvp():
    net, (z, v, t, r, y) = perturbed(MLP(**SIZES)).double(), inputs()
    u_fn = lambda z, t, r: net(z, t, t - r, y)  # noqa: E731
    primals, tangents = (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r))
    torch.testing.assert_close(
        jvp(u_fn, primals, tangents), torch.func.jvp(u_fn, primals, tangents), rtol=1e-10, atol=1e-10
    )


def test_checkpointed_gradients_and_saved_weights_are_the_same(tmp_path):
    net, (z, _, t, r, y) = perturbed(MLP(**SIZES)), inputs(torch.float32)
    net.save_pretrained(tmp_path)
    again = MLP.from_pretrained(tmp_path).train()
    again.enable_gradient_checkpointing()
    for each in (net.train(), again):
        each(z, t, t - r, y).square().sum().backward()
    for one, other in zip(net.parameters(), again.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
