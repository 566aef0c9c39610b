"""The derivative of networks, against float64 differences and torch.func."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ZOO, assert_golden, perturbed, small_dit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.objectives.jvp import finite_difference, jvp


def dit_inputs(dtype=torch.float64, batch=3, shape=(3, 4, 4)):
    torch.manual_seed(1)
    z, v = torch.randn(2, batch, *shape, dtype=dtype)
    r, t = torch.rand(2, batch, dtype=dtype).sort(0).values
    return (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)), torch.randint(6, (batch,))


def central_difference(fn, primals, tangents, step=1e-5):
    ahead, behind = (fn(*(p + sign * step * d for p, d in zip(primals, tangents))) for sign in (1, -1))
    return (ahead - behind) / (2 * step)


@pytest.mark.parametrize("name", ZOO)
def test_derivative_of_every_network_equals_central_differences_in_float64(name):
    """A wrong rule for any operation fails; from perturbed weights, since a fresh network is constant."""
    net = ZOO[name]().double().eval()
    primals, tangents, y = dit_inputs(shape=net.z_shape)
    u, du_dt = jvp(lambda z, t, r: net(z, t, t - r, y), primals, tangents)
    torch.testing.assert_close(
        du_dt, central_difference(lambda z, t, r: net(z, t, t - r, y), primals, tangents).detach(), rtol=1e-7, atol=1e-8
    )
    torch.testing.assert_close(u, net(primals[0], primals[1], primals[1] - primals[2], y), rtol=0, atol=0)


def test_total_and_partial_derivatives_match_the_official_numbers(golden, golden_net):
    z, t, r, y = golden["fwd.z_nchw"], golden["fwd.t"], golden["fwd.r"], golden["fwd.y"].long()
    v, one, zero = golden["jvp.v_nchw"], torch.ones_like(t), torch.zeros_like(t)
    for name, tangents in {
        "du_dt": (v, one, zero),
        "part_z": (v, zero, zero),
        "part_t": (torch.zeros_like(v), one, zero),
        "part_r": (torch.zeros_like(v), zero, one),
    }.items():
        _, derivative = jvp(lambda z, t, r: golden_net(z, t, t - r, y), (z, t, r), tangents)
        assert_golden(derivative, golden[f"jvp.{name}_nchw"])


def test_output_has_its_gradients_and_the_derivative_none():
    primals, tangents, y = dit_inputs()
    net = small_dit().double()
    u, du_dt = jvp(lambda z, t, r: net(z, t, t - r, y), primals, tangents)
    assert not du_dt.requires_grad
    u.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(primals[0], primals[1], primals[1] - primals[2], y).square().sum().backward()
    for gradient, p in zip(gradients, net.parameters()):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-12, atol=1e-12)


class Zoo(nn.Module):
    """A network of what other people's networks have: in-place, norms, masks, many ways to write a product."""

    def __init__(self):
        super().__init__()
        self.conv, self.transposed = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ConvTranspose2d(8, 3, 2, stride=2)
        self.group, self.batch, self.layer = nn.GroupNorm(2, 8), nn.BatchNorm2d(8).eval(), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.q = nn.Linear(8, 24)

    def forward(self, z, t):
        x = F.silu(self.batch(self.group(self.conv(z))))
        x += t.view(-1, 1, 1, 1)
        x = F.relu(x - 0.1, inplace=True) + x.clone().mul_(t.view(-1, 1, 1, 1)).sigmoid_()
        tokens = self.layer(x.flatten(2).mT)
        q, k, v = self.q(tokens).chunk(3, dim=-1)
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        heads = [a.unflatten(-1, (2, 4)).transpose(1, 2) for a in (q, k, v)]
        tokens = tokens + F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        tokens = tokens + F.scaled_dot_product_attention(*heads, is_causal=True, scale=0.3).transpose(1, 2).flatten(2)
        tokens = tokens + F.scaled_dot_product_attention(heads[0], heads[1].detach(), heads[2]).transpose(1, 2).flatten(
            2
        )
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + torch.einsum("bnd,bmd->bnm", q, k).softmax(-1) @ v / 8
        tokens = torch.cat([tokens[:, :1] * 2, 1 - tokens[:, 1:]], dim=1)
        tokens = tokens * torch.where(tokens > 0, tokens, 0.1 * tokens).amax(dim=-1, keepdim=True)
        x = F.gelu(tokens).mT.unflatten(-1, x.shape[2:])
        x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2)
        x = torch.fft.ifft2(torch.fft.fft2(x) * (1 + 2j)).real + torch.mul(x, other=x.detach())
        x = F.linear(input=x, weight=torch.eye(x.shape[-1]).to(x)) + x.to(torch.int64)
        x = self.transposed(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="nearest"))
        return x.to(z.dtype), {"mean": x.mean()}


def test_any_network_gives_the_derivative_of_torch_func_jvp():
    """Operations without a rule, in place, masked, of nested results: everything that a drop-in meets."""
    net = perturbed(Zoo()).double().requires_grad_(False)
    (z, t, _), (v, one, _), _ = dit_inputs()

    (u, rest), (du, d_rest) = jvp(net, (z, t), (v, one))
    with sdpa_kernel(SDPBackend.MATH):
        (u_twin, rest_twin), (du_twin, d_rest_twin) = torch.func.jvp(net, (z, t), (v, one))
    for actual, expected in (
        (u, u_twin),
        (du, du_twin),
        (rest["mean"], rest_twin["mean"]),
        (d_rest["mean"], d_rest_twin["mean"]),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_any_network_are_those_of_its_plain_forward():
    """All together, since some of them are 0 but for rounding."""
    net = perturbed(Zoo()).double()
    (z, t, _), (v, one, _), _ = dit_inputs()
    gradients = []
    for out in (jvp(lambda z, t: net(z, t)[0], (z, t), (v, one))[0], net(z, t)[0]):
        net.zero_grad()
        out.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[1].norm()


def test_dropout_has_one_mask_for_output_and_derivative():
    """With x -> x, output and derivative are the mask times primal and tangent: two masks would show."""
    x, d = torch.ones(1000), torch.full((1000,), 3.0)
    for drop in (
        nn.Dropout(0.5),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.dropout2d(x.view(1, 1000, 1, 1), 0.5).flatten(),
    ):
        out, tangent = jvp(drop, (x,), (d,))
        assert torch.equal(tangent, 3 * out) and 300 < (out == 0).sum() < 700


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w, b: torch.layer_norm(x, (6,), w, b, 1e-5, False),
        lambda x, w, b: torch.layer_norm(x, (6,), weight=w, bias=b, cudnn_enable=True),
        lambda x, w, b: F.layer_norm(x, normalized_shape=(6,), weight=w, bias=b, eps=1e-3),
        lambda x, w, b: torch.group_norm(x, 3, w, b, 1e-5, False),
        lambda x, w, b: F.group_norm(x, num_groups=3, weight=w, eps=1e-3),
    ],
)
def test_normalisations_of_one_name_and_two_signatures_have_the_same_rule(norm):
    """torch's functions have an argument more than those of torch.nn.functional."""
    x, v, w, b = (torch.randn(size, dtype=torch.float64) for size in ((4, 6), (4, 6), 6, 6))
    expected = torch.func.jvp(lambda x: norm(x, w, b), (x,), (v,))[1]
    torch.testing.assert_close(jvp(lambda x: norm(x, w, b), (x,), (v,))[1], expected, rtol=1e-9, atol=1e-10)


def attend(q, k, v, MAX_SCORES, monkeypatch):
    monkeypatch.setattr("meanflow.objectives.jvp.MAX_SCORES", MAX_SCORES)
    return jvp(F.scaled_dot_product_attention, (q, k, v), (q.cos(), k.sin(), v.cos()))[1]


@pytest.mark.parametrize("MAX_SCORES", [1, 2 * 3 * 7 * 4, 2 * 3 * 7 * 11 - 1])
def test_attention_in_chunks_of_queries_has_the_same_tangent(MAX_SCORES, monkeypatch):
    """One query at a time, several with a rest, and all but one; keys and queries may differ in number."""
    q, k, v = (torch.randn(2, 3, tokens, 8, dtype=torch.float64) for tokens in (11, 7, 7))
    whole, parts = (attend(q, k, v, most, monkeypatch) for most in (2**26, MAX_SCORES))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_attention_in_chunks_needs_no_score_of_every_pair(monkeypatch):
    """4,096 tokens: below a quarter of one matrix of all pairs, 64 MiB, of which a tangent at once holds four."""
    from torch.profiler import ProfilerActivity, profile

    q = torch.randn(1, 1, 4096, 8)
    held = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attend(q, q, q, 2**18, monkeypatch)
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, held)
    assert peak < 16 * 2**20


def test_attention_dropout_has_one_mask_however_it_is_given():
    """One key: the output is the value or 0, and where it is 0 the derivative is."""
    q, v = torch.randn(1, 1, 200, 8), torch.randn(1, 1, 1, 8)
    for dropped in (
        lambda v: F.scaled_dot_product_attention(q, q[:, :, :1], v, None, 0.5),
        lambda v: F.scaled_dot_product_attention(q, q[:, :, :1], v, dropout_p=0.5),
    ):
        out, tangent = jvp(dropped, (v,), (3 * v,))
        torch.testing.assert_close(tangent, 3 * out)
        assert 40 < (out == 0).all(-1).sum() < 160


def test_running_statistics_move_once():
    norms = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    x = torch.randn(8, 4)
    jvp(norms[0], (x,), (x,))
    norms[1](x)
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)
    assert norms[0].num_batches_tracked == 1


def test_constant_output_has_zero_derivative():
    out, tangent = jvp(lambda x: torch.ones(3), (torch.randn(2),), (torch.randn(2),))
    assert torch.equal(tangent, torch.zeros(3)) and torch.equal(out, torch.ones(3))


def test_checkpointed_blocks_give_the_same_gradients():
    """No tangent touches the graph: else recomputation saves other tensors than the forward, and PyTorch refuses."""
    primals, tangents, y = dit_inputs(torch.float32)
    results = []
    for checkpointed in (False, True):
        net = small_dit()
        if checkpointed:
            for block in net.blocks:
                block.forward = (
                    lambda forward: lambda *a: torch.utils.checkpoint.checkpoint(forward, *a, use_reentrant=False)
                )(block.forward)
        u, du_dt = jvp(lambda z, t, r, net=net: net(z, t, t - r, y), primals, tangents)
        u.square().sum().backward()
        results.append([du_dt, *(p.grad for p in net.parameters())])
    for plain, recomputed in zip(*results):
        assert torch.equal(plain, recomputed)


def test_bfloat16_autocast_keeps_outputs_derivative_and_gradients_near_float32():
    primals, tangents, y = dit_inputs(torch.float32, batch=16)
    results = []
    for enabled in (False, True):
        net = small_dit(hidden_size=128, num_heads=4)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            u, du_dt = jvp(lambda z, t, r, net=net: net(z, t, t - r, y).float(), primals, tangents)
        u.square().sum().backward()
        results.append([u, du_dt, torch.cat([p.grad.flatten() for p in net.parameters()])])
    for exact, rounded in zip(*results):
        assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_finite_differences_agree_within_their_documented_error():
    primals, tangents, y = dit_inputs(torch.float32)
    net = small_dit()
    u, du_dt = jvp(lambda z, t, r: net(z, t, t - r, y), primals, tangents)
    with torch.autocast("cpu", torch.bfloat16):
        out, approximate = finite_difference(lambda z, t, r: net(z, t, t - r, y), primals, tangents)
    assert (approximate - du_dt).abs().max() <= 1e-3 * du_dt.abs().max()
    assert out.requires_grad and not approximate.requires_grad


def test_mismatched_arguments_are_refused():
    x = torch.randn(2)
    with pytest.raises(ValueError, match="1 primals but 2 tangents"):
        jvp(lambda x: x, (x,), (x, x))
    with pytest.raises(ValueError, match=r"a primal is \(2,\) torch.float32, its tangent \(3,\)"):
        jvp(lambda x: x, (x,), (torch.randn(3),))
