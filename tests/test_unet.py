"""The U-Nets: the official CIFAR-10 network's numbers, names and sizes; and what every network of the zoo owes."""

import json

import pytest
import torch
from conftest import DEVICES, GOLDEN, ZOO, assert_golden, batch_of, perturbed
from safetensors.torch import load_file

from meanflow.config import MeanFlowConfig
from meanflow.objectives.draws import Draws
from meanflow.objectives.jvp import jvp
from meanflow.objectives.meanflow import MeanFlow, adaptive_weight
from meanflow.sampler import average_velocity, sample
from models import MODELS
from models.unet import UNetCifar

TINY = {"model_channels": 16, "channel_mult": (2, 2, 2), "num_blocks": 1, "dropout": 0.2}


@pytest.fixture(params=DEVICES)
def golden(request):
    torch.backends.cudnn.allow_tf32 = False  # float32 to its last digits
    return load_file(GOLDEN / "unet_tiny.safetensors", device=request.param)


@pytest.fixture
def net(golden) -> UNetCifar:
    net = UNetCifar(img_resolution=32, in_channels=3, out_channels=3, augment_dim=6, **TINY).eval()
    net.load_state_dict({name[2:]: value for name, value in golden.items() if name.startswith("w.")})
    return net.to(golden["t"].device)


def test_forward_and_intermediates_match_the_official_network(golden, net):
    seen = {}
    for name in ("map_layer0", "enc.16x16_block0"):
        net.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args, out)}))
    z, t, h = golden["x"], golden["t"], golden["h"]
    assert_golden(net(z, t, h), golden["out"])
    assert_golden(seen["map_layer0"][0][0], golden["emb_in"])
    (_, embedding), out = seen["enc.16x16_block0"]
    assert_golden(embedding, golden["emb_out"])
    assert_golden(out, golden["enc_out.16x16_block0"])
    assert_golden(net(z, t, h, augment_labels=golden["aug"]), golden["out_aug"])


def test_derivative_matches_the_official_numbers(golden, net):
    z, t, r = golden["x"], golden["t"], golden["r"]
    tangents = (golden["jvp.tangent"], torch.ones_like(t), torch.zeros_like(t))
    _, du_dt = jvp(lambda z, t, r: net(z, t, t - r), (z, t, r), tangents)
    assert_golden(du_dt, golden["jvp.du_dt"])


@pytest.mark.parametrize("norm_p", [1.0, 0.75, 0.5])
def test_loss_and_gradients_match_the_official_numbers(norm_p, golden, net):
    """The four samples in the order that has r != t ones first."""
    x, e, t, r, labels = (golden[name] for name in ("loss.x", "loss.e", "loss.t", "loss.r", "aug"))
    order = torch.argsort((t == r).long(), stable=True)
    config = MeanFlowConfig(meanflow_ratio=float((t != r).float().mean()), norm_p=norm_p, norm_eps=1e-3)
    draws = Draws(e[order], t[order], r[order], torch.zeros_like(t, dtype=torch.bool))
    out = MeanFlow(net, config)(batch_of(x[order], None, draws, augment_labels=labels[order]))
    raw = golden["loss.raw"]
    assert_golden(out.loss, golden[f"loss.p{norm_p}.loss"])
    assert_golden((raw * adaptive_weight(raw, norm_p, 1e-3)).mean(), golden[f"loss.p{norm_p}.loss"])
    assert_golden(out.metrics["raw_loss"], raw.mean())
    out.loss.backward()
    gradients = {name: value for name, value in golden.items() if name.startswith(f"loss.p{norm_p}.grad.")}
    assert len(gradients) == 5
    for name, value in gradients.items():
        assert_golden(net.get_parameter(name.split(".grad.")[1]).grad, value)


def test_one_step_sample_matches_the_official_one(golden, net):
    with torch.no_grad():
        x = sample(lambda z, t, r: average_velocity(net, z, t, r, {}), golden["loss.e"])
    assert_golden(x, golden["sample.one"])


def test_names_shapes_order_and_counts_are_the_official_ones():
    report = json.loads((GOLDEN / "unet_report.json").read_text())
    with torch.device("meta"):
        for augment_dim in (6, 0):
            net = MODELS["UNet-cifar"](input_size=32, in_channels=3, augment_dim=augment_dim)
            count = report["parameters"][f"augment_dim {augment_dim}"]
            assert sum(p.numel() for p in net.parameters()) == count
            names = {name: list(value.shape) for name, value in net.state_dict().items()}
            expected = {name: s for name, s in report["state_dict"].items() if augment_dim or "augment" not in name}
            assert names == expected and list(names) == list(expected)


def test_initialisation_is_xavier_with_the_published_gains():
    torch.manual_seed(0)
    net = UNetCifar(img_resolution=16, in_channels=3, out_channels=3, **TINY)
    block = net.enc["16x16_block0"]
    for layer, gain in ((block.conv0, 1), (block.conv1, 1e-5), (block.qkv, 0.2**0.5), (block.proj, 1e-5)):
        width_out, width_in, *kernel = layer.weight.shape
        taps = kernel[0] * kernel[1]
        bound = gain * (6 / (taps * (width_in + width_out))) ** 0.5
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    z, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    assert net.eval()(z, t, t / 2).abs().max() < 1e-3


def test_class_is_an_input_of_its_own_whose_null_is_nothing():
    """map_label on one-hot times sqrt(K), beside the augmentation labels; so a null class's output has no label."""
    sizes = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, **TINY}
    net = perturbed(UNetCifar(**sizes, num_classes=5), 0.05).eval()
    assert net.map_label.weight.shape == (64, 5) and net.map_label.bias is None
    z, t = torch.randn(6, 3, 8, 8), torch.rand(6)
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    outs = net(z[:1].expand(6, -1, -1, -1), t[:1].expand(6), t[:1].expand(6) / 2, y)
    assert len({round(out.flatten()[7].item(), 6) for out in outs}) == 6
    unconditional = UNetCifar(**sizes).eval()
    unconditional.load_state_dict({k: v for k, v in net.state_dict().items() if k != "map_label.weight"})
    torch.testing.assert_close(unconditional(z, t, t / 2), net(z, t, t / 2, torch.full((6,), 5)))
    embedding = net.embed(t, t / 2, y, None)
    with torch.no_grad():
        net.map_layer0.bias += 5**0.5 * net.map_layer0.weight @ net.map_label.weight[:, 3]
    torch.testing.assert_close(net.embed(t, t / 2, torch.full((6,), 5), None)[3], embedding[3])


@pytest.mark.parametrize("name", ZOO)
def test_saved_network_loads_with_equal_outputs(name, tmp_path):
    net = ZOO[name]().eval()
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    z, t, y = torch.randn(2, *net.z_shape), torch.rand(2), torch.tensor([1, 5])
    assert torch.equal(net(z, t, t / 2, y), again(z, t, t / 2, y))


@pytest.mark.parametrize("name", ZOO)
def test_bad_input_is_refused_by_name(name):
    net = ZOO[name]()
    z, t, y = torch.randn(2, *net.z_shape), torch.rand(2), torch.tensor([1, 5])
    with pytest.raises(ValueError, match=r"z must be \(B, "):
        net(z[..., :2], t, t, y)
    with pytest.raises(ValueError, match="num_classes is 5, so y must be given"):
        net(z, t, t, None)


@pytest.mark.parametrize("name", ZOO)
def test_fresh_network_returns_next_to_nothing(name):
    net = ZOO[name](fresh=True).eval()
    z, t, y = torch.randn(2, *net.z_shape), torch.rand(2), torch.tensor([1, 5])
    assert net(z, t, t / 2, y).abs().max() < (1e-3 if name == "UNet-cifar" else 1e-12)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("UNet-cifar", {"input_size": 30}, "img_resolution 30 cannot be halved 2 times"),
        ("UNet-cifar", {"input_size": (32, 16)}, "UNet-cifar takes only square images"),
        ("UNet-cifar", {"model_channels": 18}, r"num_channels \(18\) must be divisible by num_groups"),
        ("UNet-digits", {"input_size": 9}, r"input_size 9 is not \(H, W\) to be halved 1 times"),
        ("UNet-digits", {"input_size": (8, 8, 8)}, r"input_size \(8, 8, 8\) is not \(H, W\) to be halved 1 times"),
        ("UNet-digits", {"attention": (True,)}, "same number of"),
        ("DiT-XS/2", {"input_size": (4, 4, 3)}, r"input_size \(4, 4, 3\) is not a multiple of patch_size 2"),
    ],
)
def test_impossible_sizes_are_refused(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](**{"input_size": 32, "in_channels": 3, "num_classes": 5, **sizes})


def test_augmentation_labels_where_the_network_is_not_told_are_refused():
    net = ZOO["UNet"]()
    labels = UNetCifar(img_resolution=8, in_channels=3, out_channels=3, **TINY)
    z, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with pytest.raises(ValueError, match="augment_dim is 0"):
        labels(z, t, t, None, torch.zeros(2, 6))
    with pytest.raises(TypeError, match="augment_labels"):
        net(z, t, t, torch.tensor([0, 1]), augment_labels=torch.zeros(2, 6))


def test_volume_positions_share_the_width_with_the_rest_first():
    """Width 16 on 2 x 3 x 4 tokens: 8 numbers for D, 4 for H, 4 for W."""
    net = MODELS["DiT-XS/2"](input_size=(4, 6, 8), in_channels=2, num_classes=0, hidden_size=16, num_heads=2, depth=1)
    codes = net.pos_embed.view(2, 3, 4, 16)
    d, h, w = codes[:, 0, 0], codes[0, :, 0], codes[0, 0]
    assert torch.equal(codes[..., :8], d[:, None, None, :8].expand(2, 3, 4, 8))
    assert torch.equal(codes[..., 8:12], h[None, :, None, 8:12].expand(2, 3, 4, 4))
    assert torch.equal(codes[..., 12:], w[None, None, :, 12:].expand(2, 3, 4, 4))
    steps = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(d[1, :8], torch.cat([steps.sin(), steps.cos()]))
    torch.testing.assert_close(h[2, 8:12], torch.cat([(2 * steps[::2]).sin(), (2 * steps[::2]).cos()]))


def test_patch_of_a_volume_moves_only_its_own_patch_of_a_blockless_output():
    net = perturbed(MODELS["DiT-XS/2"](input_size=(4, 6, 8), in_channels=2, num_classes=0, depth=0))
    z, t = torch.randn(1, 2, 4, 6, 8), torch.rand(1)
    moved = z.clone()
    moved[:, :, 2:4, 0:2, 4:6] += 1
    changed = (net(z, t, t, None) != net(moved, t, t, None)).flatten(0, 1).any(0)
    expected = torch.zeros(4, 6, 8, dtype=torch.bool)
    expected[2:4, 0:2, 4:6] = True
    assert torch.equal(changed, expected)
