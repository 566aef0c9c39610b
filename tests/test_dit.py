"""The DiT against the official network's numbers, conventions and sizes."""

import pytest
import torch
from conftest import assert_golden, small_dit

from models import MODELS
from models.dit import DiT, sincos_positions


def test_forward_and_every_intermediate_match_the_official_network(golden, golden_net):
    """A wrong order of modulation, qkv, patches, sine and cosine, or an erf GELU, fails here."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    first = golden_net.blocks[0]
    for name, module in {
        "t_emb": golden_net.t_embedder,
        "h_emb": golden_net.h_embedder,
        "y_emb": golden_net.y_embedder.embedding_table,
        "x_embed": golden_net.x_embedder,
        "block0_attn": first.attn,
        "block0_mlp": first.mlp,
        "block0_out": first,
        "block1_out": golden_net.blocks[1],
        "final_tokens": golden_net.final_layer,
    }.items():
        module.register_forward_hook(keep(name))
    golden_net.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: seen.__setitem__("t_freq", inputs[0]))
    u = golden_net(golden["fwd.z_nchw"], golden["fwd.t"], golden["fwd.h"], golden["fwd.y"].long())
    assert_golden(u, golden["fwd.u_nchw"])
    assert_golden(golden_net.pos_embed, golden["fwd.pos_embed"])
    for name, value in seen.items():
        assert_golden(value, golden[f"fwd.{name}"])


def test_layer_norm_epsilon_is_the_official_one(golden, golden_net):
    """1e-5 for 1e-6 hides in the forward's tolerance; rows of tiny variance show it."""
    for norm in (golden_net.blocks[0].norm1, golden_net.blocks[1].norm2, golden_net.final_layer.norm_final):
        assert_golden(norm(golden["probe.layernorm_in"]), golden["probe.layernorm_out"])


@pytest.mark.parametrize(
    "name, count",
    [
        ("DiT-S/4", 33_142_336),
        ("DiT-B/4", 131_165_248),
        ("DiT-B/2", 131_091_472),
        ("DiT-M/2", 308_019_216),
        ("DiT-L/2", 459_137_040),
        ("DiT-XL/2", 676_440_592),
    ],
)
def test_parameter_counts_are_the_official_ones(name, count):
    with torch.device("meta"):
        net = MODELS[name](input_size=32, in_channels=4)
    assert sum(p.numel() for p in net.parameters()) == count


def test_initialisation_is_adaln_zero_with_xavier_and_normal_weights():
    """u starts as 0 and each block as the identity; the spread of each kind of weight is the official one."""
    torch.manual_seed(0)
    net = DiT(input_size=16, patch_size=2, in_channels=4, hidden_size=256, depth=2, num_heads=4, num_classes=500)
    for block in net.blocks:
        assert not block.adaLN_modulation[1].weight.any()
    assert not net.final_layer.linear.weight.any() and not net.final_layer.adaLN_modulation[1].weight.any()
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))

    def xavier(fan_in, fan_out):
        return (2 / (fan_in + fan_out)) ** 0.5

    D = 256
    for weight, std in [
        (net.blocks[1].attn.qkv.weight, xavier(D, 3 * D)),
        (net.blocks[1].attn.proj.weight, xavier(D, D)),
        (net.blocks[0].mlp.fc1.weight, xavier(D, 4 * D)),
        (net.blocks[0].mlp.fc2.weight, xavier(4 * D, D)),
        (net.x_embedder.proj.weight, xavier(16, D)),
        (net.t_embedder.mlp[0].weight, 0.02),
        (net.h_embedder.mlp[2].weight, 0.02),
        (net.y_embedder.embedding_table.weight, 0.02),
    ]:
        assert abs(weight.std().item() / std - 1) < 0.02


def test_fresh_network_returns_zero():
    z = torch.randn(2, 3, 8, 8)
    net = DiT(8, 2, 3, hidden_size=32, depth=1, num_heads=2, num_classes=0)
    assert not net(z, torch.rand(2), torch.rand(2)).any()


def test_half_of_each_position_code_is_the_column():
    """Two tokens of one column share the first half, two of one row the second."""
    table = sincos_positions(16, 3, 5).view(3, 5, 16)
    assert torch.equal(table[0, 2, :8], table[2, 2, :8])
    assert torch.equal(table[1, 0, 8:], table[1, 4, 8:])
    assert not torch.equal(table[0, 2, 8:], table[2, 2, 8:])


def test_a_patch_of_the_input_moves_only_its_own_patch_of_a_blockless_output():
    """Patches are put back where they came from, on a grid that is not square."""
    net = small_dit(input_size=(4, 8), depth=0)
    z, t, y = torch.randn(1, 3, 4, 8), torch.rand(1), torch.zeros(1, dtype=torch.long)
    other = z.clone()
    other[:, :, 2:4, 4:6] += 1
    moved = (net(z, t, t, y) != net(other, t, t, y)).any(dim=1)[0]
    assert moved[2:4, 4:6].all() and moved.sum() == 4


def test_saved_network_loads_with_equal_outputs_and_without_its_tables(tmp_path):
    net = small_dit()
    net.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    z, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 5])
    assert torch.equal(net(z, t, t / 2, y), loaded(z, t, t / 2, y))
    assert not {"pos_embed", "t_embedder.frequency"} & set(net.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_bfloat16_autocast_stays_near_float32():
    """Time embeddings stay float32 under autocast: in bfloat16, u and du_dt would be further off."""
    net = small_dit(hidden_size=128, num_heads=4)
    z, t, y = torch.randn(16, 3, 4, 4), torch.rand(16), torch.randint(5, (16,))
    with torch.autocast("cpu", torch.bfloat16):
        assert net.t_embedder(t).dtype == torch.float32
        u = net(z, t, t / 2, y)
    exact = net(z, t, t / 2, y)
    assert (u - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": 9}, "input_size 9 is not a multiple of patch_size 2"),
        ({"input_size": (8, 6), "patch_size": 4}, r"input_size \(8, 6\) is not a multiple of patch_size 4"),
        ({"num_heads": 3}, "hidden_size 32 must be a multiple of 4 and of num_heads"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_dit(**changes)


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 3, 4, 8), (2, 3, 6, 6)])
def test_wrong_input_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"z must be \(B, 3, 4, 4\)"):
        small_dit()(torch.randn(shape), torch.rand(2), torch.rand(2), torch.zeros(2, dtype=torch.long))


def test_label_where_there_are_no_classes_is_refused_and_the_reverse():
    z, t = torch.randn(1, 3, 4, 4), torch.rand(1)
    with pytest.raises(ValueError, match="y must not be given"):
        small_dit(num_classes=0)(z, t, t, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="y must be given"):
        small_dit()(z, t, t)
