"""Networks that nobody here wrote, as they come from timm, torchvision, diffusers and torch.

`jvp` runs some operations by rules of its own and the others by PyTorch's forward mode. An operation that it takes for
the wrong kind, or writing into a tangent that shares memory with another, shows in one of these networks and seldom in
ours: as an error, as a wrong derivative, or as wrong gradients.
"""

import diffusers
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import perturbed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.objectives.jvp import jvp


class Cells(nn.Module):
    """An LSTM and a GRU, written as a loop."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(6, 8), nn.GRUCell(8, 8)

    def forward(self, x):
        state, hidden = None, None
        for step in x:
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
        return hidden


class Wrapped(nn.Module):
    """A network of diffusers as a function of the image and the time."""

    def __init__(self, net, *conditions):
        super().__init__()
        self.net, self.conditions = net, conditions

    def forward(self, x, t):
        return self.net(x, timestep=t, **{name: torch.ones(1, *shape).to(x) for name, shape in self.conditions}).sample


def swin_v2():
    return timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    )


def unet_with_conditions():
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    return Wrapped(net, ("encoder_hidden_states", (4, 8)))


def stable_diffusion_3():
    net = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return Wrapped(net, ("encoder_hidden_states", (4, 8)), ("pooled_projections", (8,)))


def swin_of_videos():
    return torchvision.models.video.SwinTransformer3d(
        [2, 4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 3, 3], num_classes=5
    )


IMAGE = ((1, 3, 32, 32),)
LATENT = ((1, 4, 8, 8), (1,))
SEQUENCE = ((5, 2, 6),)
NETWORKS = {
    "SwinV2": (swin_v2, IMAGE),
    "XCiT": (lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=1), IMAGE),
    "EdgeNeXt": (lambda: timm.create_model("edgenext_xx_small"), IMAGE),
    "GhostNet": (lambda: timm.create_model("ghostnet_050"), IMAGE),
    "MobileNetV3": (lambda: timm.create_model("mobilenetv3_small_050"), IMAGE),
    "Swin of videos": (swin_of_videos, ((1, 3, 4, 16, 16),)),
    "UNet2DConditionModel": (unet_with_conditions, LATENT),
    "SD3Transformer2DModel": (stable_diffusion_3, LATENT),
    "LSTM": (lambda: nn.LSTM(6, 8, 2, bidirectional=True, proj_size=3), SEQUENCE),
    "cells": (Cells, SEQUENCE),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2),
        SEQUENCE,
    ),
}  # name: a constructor and the shapes of its arguments


def assert_same_as_torch_func_jvp(net, *shapes):
    """Its output and gradients are those of the plain call, its derivative that of torch.func.jvp; with one seed."""
    primals = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
    tangents = tuple(map(torch.randn_like, primals))

    def call(*x):
        torch.manual_seed(2)
        out = net(*x)
        return out[0] if isinstance(out, tuple) else out

    u, du = jvp(call, primals, tangents)
    plain = call(*primals)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(call, primals, tangents)[1]

    torch.testing.assert_close(u, plain, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 0
    assert (du - expected).abs().max() <= 1e-10 * expected.abs().max()
    gradients = []
    for out in (u, plain):
        net.zero_grad()
        out.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-10 * gradients[1].norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_foreign_network_has_the_derivative_of_torch_func_jvp_and_plain_gradients(name):
    make, shapes = NETWORKS[name]
    assert_same_as_torch_func_jvp(perturbed(make(), 0.03).double().eval(), *shapes)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_network_drops_the_same_for_output_and_derivative(make):
    assert_same_as_torch_func_jvp(make(6, 8, 3, dropout=0.5).double().train(), *SEQUENCE)


class Writer(nn.Module):
    """A network that writes into views and sums by a trained weight."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x):
        half = torch.cat([x, x.sin()], dim=1)[:, :4]
        half *= self.gate
        shifted = x + 1
        shifted *= 2
        narrow = x.sin().narrow(1, 0, 4)
        narrow.mul_(self.gate)
        return torch.cat([half, shifted, narrow, x], dim=1)


def test_writing_into_a_view_or_a_sum_changes_no_other_tangent():
    assert_same_as_torch_func_jvp(Writer().double(), (2, 6))


def test_a_tangent_carries_no_graph():
    """Else a checkpointed block saves more tensors than when it runs again without tangents, and PyTorch refuses."""
    norm, scale = nn.BatchNorm1d(6).eval(), nn.Parameter(torch.ones(6))

    def net(x):
        return torch.utils.checkpoint.checkpoint(lambda x: (x / scale).sin(), norm(x), use_reentrant=False)

    x, d = torch.randn(2, 3, 6)
    jvp(net, (x,), (d,))[0].sum().backward()
    assert scale.grad.abs().max() > 0


class Score(nn.Module):
    """A gradient of an energy and a map over the batch, both by torch.func."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return torch.func.grad(lambda x: self.energy(x).sum())(x) + torch.func.vmap(lambda row: row.softmax(0) * row)(x)


def test_a_network_may_use_torch_func_inside():
    net = Score().double()
    x, d = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(jvp(net, (x,), (d,)), torch.func.jvp(net, (x,), (d,)), rtol=1e-12, atol=1e-12)


def test_a_compiled_network_has_its_derivative():
    """Compiled code would lose it, without an error."""
    net = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)).double()
    x, d = torch.randn(2, 3, 6, dtype=torch.float64)
    compiled = torch.compile(net, backend="aot_eager")
    torch.testing.assert_close(jvp(compiled, (x,), (d,)), jvp(net, (x,), (d,)), rtol=0, atol=0)


def test_an_operation_that_would_lose_the_derivative_is_refused():
    """PyTorch and torch.func.jvp give 0 for it."""
    x, offset, weight = torch.randn(1, 3, 8, 8), torch.randn(1, 18, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(NotImplementedError, match=r"torchvision\.deform_conv2d has no forward-mode derivative"):
        jvp(lambda x: F.relu(torchvision.ops.deform_conv2d(x, offset, weight, padding=1)), (x,), (x,))
