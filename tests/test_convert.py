"""Weights of others: what is read, what is refused, and that what comes out serves as an export of ours."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_golden, perturbed, small_dit
from safetensors.torch import load_file, save_file

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig, TrainConfig
from meanflow.data.base import InMemory
from meanflow.files import read_json
from meanflow.publishing.checkpoints import load_pipeline
from meanflow.publishing.pipeline import MeanFlowPipeline
from meanflow.training.preflight import Parts
from meanflow.training.trainer import Trainer
from models.dit import DiT
from models.unet import UNetCifar

SIZE = ("--input-size", 8)


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    """A tiny network of the official PyTorch code, by its names, as its wrapper saves them."""
    golden = load_file(GOLDEN / "imf_torch.safetensors")
    return {f"net.{name[2:]}": value for name, value in golden.items() if name.startswith("w.")}


@pytest.fixture
def checkpoint(official, tmp_path):
    torch.save(official, tmp_path / "iMF-tiny-2.pth")
    return tmp_path / "iMF-tiny-2.pth"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_weights_give_the_official_output(suffix, official, tool, tmp_path):
    source = tmp_path / f"weights{suffix}"
    torch.save(official, source) if suffix == ".pth" else save_file(official, source)
    said = tool("convert", source, "--format", "imf", "--out", tmp_path / "out", *SIZE)
    unused = [name for name in official if name.startswith("net.v_final_layer.")]  # its v_heads are not in the file
    used = len(official) - len(unused)
    assert f"used: {used}, such as net." in said and f"unused: {len(unused)}, such as {unused[0]}" in said
    assert len(unused) == 3 and "missing: none" in said
    golden = load_file(GOLDEN / "imf_torch.safetensors")
    net = load_pipeline(tmp_path / "out").net
    cond = {"y": golden["y"].long(), "omega": golden["omega"], "t_start": golden["t_min"], "t_end": golden["t_max"]}
    with torch.no_grad():
        assert_golden(net(golden["x"], golden["t"], golden["h"], **cond), golden["u"])
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card and "github.com/Lyy-iiis/imeanflow" in card
    assert f"Of the {len(official)} tensors in weights{suffix} {used} were used" in card
    assert f"unused: 3, such as {unused[0]};" in card
    assert "missing, so that they are as in a fresh network: none." in card
    fate = read_json(tmp_path / "out/conversion.json")
    assert sorted(fate["used"] + fate["unused"]) == sorted(official) and fate["missing"] == []


def test_what_comes_out_is_sampled_pushed_and_begun_from(checkpoint, hub, vae, tool, tmp_path, capfd):
    out = tmp_path / "out"
    tool("convert", checkpoint, "--format", "imf", "--out", tmp_path / "bare", *SIZE)
    assert "makes 4 channels, latents without a VAE" in tool("sample", tmp_path / "bare", "--out", tmp_path / "x.png")
    tool("convert", checkpoint, "--format", "imf", "--vae", vae, "--out", out, *SIZE)
    pipe = load_pipeline(out)
    assert (pipe.sampling.guidance_scale, tuple(pipe.sampling.guidance_interval)) == (8.0, (0.4, 0.65))
    assert pipe.config.latents["scale"][0] == pytest.approx(1 / 4.85503674)
    assert "pushed" in tool("push_to_hub", out, "user/imf")
    images = [load_pipeline(source)([1, 2], latents=pipe.noise(0, range(2)), output_type="latent").images
              for source in (out, "user/imf")]  # fmt: skip
    assert torch.equal(*images)
    flags = ("--cfg-scale", 1, 4, "--cfg-interval", 0.3, 0.7, "--classes", 3, 7, "--out", tmp_path / "x.png")
    assert "4 images, meanflow, 1 step" in tool("sample", out, *flags)
    sizes = {"depth": 4, "hidden_size": 64, "num_heads": 4, "aux_head_depth": 2}
    recipe = TrainConfig(
        out=tmp_path / "run", model="iMF-B/2", net=sizes, init_from=str(out), steps=1, global_batch=8, lr=1e-6,
        objective=ImprovedMeanFlowConfig(),
    )  # fmt: skip
    data = InMemory(torch.randn(16, 4, 8, 8), torch.arange(16) % 10, 10)
    trainer = Trainer(recipe, Parts(data=lambda recipe: data))
    assert "has no v head, as exports have none: the v head starts afresh" in capfd.readouterr().err
    weights = trainer.net.state_dict()
    begun = pipe.net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in begun.items()) and "v_heads.0.attn_scale" in weights
    trainer.lock.release()


class Foreign:
    """No class that is let in."""


class Trap:
    """It makes a file when somebody loads it as a pickle, which torch.save writes."""

    def __reduce__(self):
        return Path.touch, (Path("trap"),)


def changed(official: dict, change: str) -> object:
    first = "net.shared_blocks.0.attn.q_proj._flax_linear.weight"
    if change == "missing":
        return {name: value for name, value in official.items() if name != first}
    if change == "more":
        return {**official, "net.extra.weight": torch.zeros(3)}
    if change == "shape":
        return {**official, first: torch.zeros(64, 32)}
    if change == "infinite":
        return {**official, first: torch.full_like(official[first], torch.nan)}
    if change == "nothing":
        return {}
    if change == "other":
        return {"weight": torch.zeros(3)}
    return {"model": official, "args": Trap()}


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "half a match: 1 weights are missing, such as ['shared_blocks.0.attn.q_proj.weight']"),
        ("more", "half a match: 1 weights are of no use, such as ['net.extra.weight']"),
        (
            "shape",
            "1 weights have another shape, such as ['net.shared_blocks.0.attn.q_proj._flax_linear.weight (64, 32)']",
        ),
        ("infinite", "1 weights are not finite"),
        ("other", "no weights of improved MeanFlow: x_embedder.proj.weight is missing"),
        ("nothing", "the file must hold tensors by name, got none"),
        ("pickle", "cannot be read as weights alone, and nothing else is read: it holds an object of getattr"),
    ],
)
def test_half_matches_and_foreign_objects_are_refused(change, message, official, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(changed(official, change), tmp_path / "x.pth")
    assert message in tool("convert", tmp_path / "x.pth", "--format", "imf", "--out", tmp_path / "out", *SIZE)
    assert not (tmp_path / "out").exists() and not (tmp_path / "trap").exists()


def test_a_file_that_is_missing_or_cut_is_refused(checkpoint, tool, tmp_path):
    flags = ("--format", "imf", "--out", tmp_path / "out", *SIZE)
    assert "nowhere.pth is no file" in tool("convert", tmp_path / "nowhere.pth", *flags)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert "iMF-tiny-2.pth cannot be read as weights alone" in tool("convert", checkpoint, *flags)
    checkpoint.write_bytes(b"")
    assert "iMF-tiny-2.pth cannot be read as weights alone" in tool("convert", checkpoint, *flags)
    (tmp_path / "x.safetensors").write_bytes(b"no weights")
    assert "x.safetensors cannot be read as weights alone" in tool("convert", tmp_path / "x.safetensors", *flags)
    assert not (tmp_path / "out").exists()


HEADS = ("--num-heads", 4)


def weights_of(golden: dict) -> dict[str, torch.Tensor]:
    return {name[2:]: value for name, value in golden.items() if name.startswith("w.")}


@pytest.fixture
def sit(tmp_path):
    """The golden SiT as its training code saves it, and the numbers that were recorded from it."""
    golden = load_file(GOLDEN / "sit.safetensors")
    content = {"model": {}, "ema": weights_of(golden), "opt": {"state": {}}, "args": Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "sit.pt")
    return tmp_path / "sit.pt", golden


def test_a_sit_gives_its_output_with_time_and_sign_mapped(sit, vae, tool, tmp_path):
    path, golden = sit
    said = tool("convert", path, "--format", "sit", *HEADS, "--out", tmp_path / "out")
    assert "used: 31, such as" in said and "unused: 1, such as pos_embed" in said and "missing: 4" in said
    pipe, t = load_pipeline(tmp_path / "out"), 1 - golden["t"]
    with torch.no_grad():
        for h in (torch.zeros_like(t), t / 2):  # h has no effect before it is trained
            assert_golden(pipe.net(golden["x"], t, h, golden["y"].long()), -golden["out"])
    assert pipe.sampling.solver == "euler" and pipe.sampling.null_class == "flow"
    tool("convert", path, "--format", "sit", *HEADS, "--vae", vae, "--out", tmp_path / "with-vae")
    flags = ("--classes", 3, "--num-images", 2, "--out", tmp_path / "x.png")
    assert "2 images, euler, 50 steps" in tool("sample", tmp_path / "with-vae", *flags)


def test_a_sit_comes_back(sit, tool, tmp_path):
    path, golden = sit
    tool("convert", path, "--format", "sit", *HEADS, "--out", tmp_path / "out")
    said = tool("convert", tmp_path / "out", "--to", "sit", "--out", tmp_path / "b.safetensors")
    assert "The learned sigma is 0" in said
    back, weights = load_file(tmp_path / "b.safetensors"), weights_of(golden)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        if name.startswith("final_layer.linear."):
            velocity, sigma = back[name].unflatten(0, (4, 2, 4)).unbind(1)  # positions in a patch, kind, channels
            assert torch.equal(velocity, value.unflatten(0, (4, 2, 4))[:, 0]) and not sigma.any()
        elif name == "t_embedder.mlp.0.weight":
            assert (back[name] - value).abs().max() <= 1e-6
        else:
            assert torch.equal(back[name], value), name


def test_a_trained_network_becomes_the_sit_of_its_instantaneous_velocity(tool, tmp_path):
    net = perturbed(DiT(8, 2, 4, 64, 2, 4, num_classes=10)).eval()
    MeanFlowPipeline(net, None, {**SAMPLING, "guidance": "none"}, {}).save_pretrained(tmp_path / "ours")
    tool("convert", tmp_path / "ours", "--to", "sit", "--out", tmp_path / "there.safetensors")
    tool("convert", tmp_path / "there.safetensors", "--format", "sit", *HEADS, "--out", tmp_path / "again")
    again = load_pipeline(tmp_path / "again").net
    z, t, y = torch.randn(6, 4, 8, 8), torch.rand(6), torch.arange(6)
    with torch.no_grad():
        assert_golden(again(z, t, torch.zeros(6), y), net(z, t, torch.zeros(6), y))


SAMPLING = {"prediction": "u", "t_min": 0.05, "solver": "meanflow", "num_inference_steps": 1, "guidance_scale": None}
SAMPLING |= {"null_class": None}


@pytest.fixture
def tree(tmp_path):
    """The golden official ema_params as a .npz by flax path, in flax's layout, and all that was recorded."""
    golden = load_file(GOLDEN / "meanflow_dit.safetensors")
    about = json.loads((GOLDEN / "meanflow_dit.json").read_text())["flax"]
    arrays = {}
    for name, value in weights_of(golden).items():
        entry, value = about[f"w.{name}"], value.numpy()
        # The file says how flax's array became PyTorch's.
        if entry["flax_to_torch"].startswith("transpose"):
            axes = [int(axis) for axis in entry["flax_to_torch"].split("(")[1].split(")")[0].split(",")]
            value = value.transpose(np.argsort(axes))
        assert list(value.shape) == entry["flax_shape"]
        arrays[entry["flax_path"]] = value
    np.savez(tmp_path / "tree.npz", **arrays)
    return arrays, golden


def test_an_official_tree_gives_the_official_output_and_comes_back_to_the_bit(tree, tool, tmp_path):
    arrays, golden = tree
    flags = ("--format", "meanflow-jax", *HEADS, *SIZE, "--out", tmp_path / "out")
    said = tool("convert", tmp_path / "tree.npz", *flags)
    assert f"used: {len(arrays)}" in said and "unused: none" in said and "missing: none" in said
    z, t, h, y = (golden[f"fwd.{name}"] for name in ("z_nchw", "t", "h", "y"))
    with torch.no_grad():
        assert_golden(load_pipeline(tmp_path / "out").net(z, t, h, y.long()), golden["fwd.u_nchw"])
    said = tool("convert", tmp_path / "out", "--to", "meanflow-jax", "--out", tmp_path / "back.npz")
    assert "--input-size 8 when it is converted back" in said
    back = np.load(tmp_path / "back.npz", allow_pickle=False)
    assert set(back.files) == set(arrays)
    assert all(np.array_equal(back[path], array) and back[path].dtype == array.dtype for path, array in arrays.items())


def test_a_checkpoint_of_the_port_gives_its_output(tool, tmp_path):
    golden = load_file(GOLDEN / "meanflow_dit.safetensors")
    ours = weights_of(golden)
    ema = {name.replace("h_embedder.", "r_embedder."): value for name, value in ours.items()}
    ema["pos_embed"] = golden["fwd.pos_embed"].reshape(1, 16, 64)
    worse = {name: value + 1 for name, value in ema.items()}
    content = {"model": worse, "ema": ema, "opt": {}, "args": Namespace(cfg_omega=0.2, cfg_kappa=0.92), "steps": 3}
    torch.save(content, tmp_path / "0000003.pt")
    tool("convert", tmp_path / "0000003.pt", "--format", "zhuyu", *HEADS, "--out", tmp_path / "out")
    pipe = load_pipeline(tmp_path / "out")
    z, t, h, y = (golden[f"fwd.{name}"] for name in ("z_nchw", "t", "h", "y"))
    with torch.no_grad():
        assert_golden(pipe.net(z, t, h, y.long()), golden["fwd.u_nchw"])
    assert pipe.sampling.guidance == "as trained: cfg_omega 0.2, cfg_kappa 0.92"
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        ema[name] = ema[name].repeat(2, *[1] * (ema[name].ndim - 1))
    torch.save({**content, "args": Foreign()}, tmp_path / "foreign.pt")
    said = tool("convert", tmp_path / "foreign.pt", "--format", "zhuyu", *HEADS, "--out", tmp_path / "out2")
    assert "it holds an object of test_convert.Foreign" in said and not (tmp_path / "out2").exists()
    torch.save(content, tmp_path / "sigma.pt")
    flags = ("--format", "zhuyu", *HEADS, "--out", tmp_path / "out2")
    assert "a network with a learned sigma" in tool("convert", tmp_path / "sigma.pt", *flags)


@pytest.fixture
def unet():
    return load_file(GOLDEN / "unet_tiny.safetensors")


def test_the_official_unet_gives_its_output(unet, tool, tmp_path):
    weights = weights_of(unet)
    content = {f"net_ema.{name}": value for name, value in weights.items()} | {"num_updates": torch.tensor(3)}
    content |= {f"{kind}.{name}": value + 1 for kind in ("net", "net_ema1") for name, value in weights.items()}
    torch.save({"model": content, "args": Namespace(), "epoch": 3}, tmp_path / "x.pth")
    said = tool("convert", tmp_path / "x.pth", "--format", "py-meanflow", "--out", tmp_path / "out")
    assert f"used: {len(weights)}, such as net_ema." in said and f"unused: {2 * len(weights) + 1}" in said
    with torch.no_grad():
        assert_golden(load_pipeline(tmp_path / "out").net(unet["x"], unet["t"], unet["h"]), unet["out"])
    assert "license: cc-by-nc-4.0" in (tmp_path / "out/README.md").read_text()
    assert "64 images, meanflow, 1 step" in tool("sample", tmp_path / "out", "--out", tmp_path / "x.png")


def test_weights_of_edm_become_blocks_with_their_channels_sorted(unet, tool, tmp_path):
    """In EDM the channels of q, k and v come in turn."""
    weights = weights_of(unet)
    theirs = {f"model.{name}": value for name, value in weights.items() if not name.endswith("resample_filter")}
    for name, value in theirs.items():
        if ".qkv." in name:
            theirs[name] = value.unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1).contiguous()
    theirs["model.map_layer0.weight"] = torch.zeros(64, 16)
    theirs["model.map_augment.weight"] = torch.zeros(64, 9)
    theirs["model.enc.16x16_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2) / 4
    save_file(theirs, tmp_path / "edm.safetensors")
    said = tool("convert", tmp_path / "edm.safetensors", "--format", "edm", "--out", tmp_path / "out")
    assert "unused: 8, such as model." in said
    net = load_pipeline(tmp_path / "out").net
    blocks = [name for name in weights if ".qkv." in name or ".norm0." in name or ".affine." in name]
    assert len(blocks) > 20 and all(torch.equal(net.state_dict()[name], weights[name]) for name in blocks)
    assert "These are weights to begin training from" in (tmp_path / "out/README.md").read_text()
    trainer = begin(tmp_path, "UNet-cifar", {"model_channels": 16, "num_blocks": 1, "augment_dim": 6}, (3, 32, 32))
    assert torch.equal(trainer.net.state_dict()[blocks[0]], weights[blocks[0]])
    trainer.lock.release()


def begin(tmp_path, model: str, sizes: dict, shape: tuple, num_classes: int = 0) -> Trainer:
    """A run that begins with the folder `out`."""
    recipe = TrainConfig(
        out=tmp_path / "run", model=model, net=sizes, init_from=str(tmp_path / "out"), steps=1, global_batch=8,
        augment=0.1 if "augment_dim" in sizes else 0.0, objective=MeanFlowConfig(class_dropout_prob=0.0),
    )  # fmt: skip
    y = torch.arange(8) % num_classes if num_classes else None
    return Trainer(recipe, Parts(data=lambda recipe: InMemory(torch.randn(8, *shape), y, num_classes)))


def test_weights_of_a_dit_are_begun_from(tool, tmp_path):
    weights = weights_of(load_file(GOLDEN / "sit.safetensors"))  # of a DiT by name and shape
    torch.save(weights, tmp_path / "dit.pt")
    said = tool("convert", tmp_path / "dit.pt", "--format", "dit", *HEADS, "--out", tmp_path / "out")
    assert "used: 23" in said and "unused: 9" in said and "missing: 12" in said
    fate = read_json(tmp_path / "out/conversion.json")
    assert sorted(fate["used"] + fate["unused"]) == sorted(weights)
    trainer = begin(tmp_path, "DiT-S/2", {"depth": 2, "hidden_size": 64, "num_heads": 4}, (4, 8, 8), 10)
    state = trainer.net.state_dict()
    assert all(torch.equal(state[name], weights[name]) for name in fate["used"]) and len(fate["used"]) == 23
    assert not state["final_layer.linear.weight"].any()
    trainer.lock.release()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--format", "sit", *HEADS, "--input-size", 32), "input_size must be 8"),
        (("--format", "zhuyu", *HEADS), "r_embedder.mlp.0.weight is missing"),
        (("--format", "meanflow-jax", *HEADS), "the file must hold tensors by name, got model, ema, opt"),
        (("--format", "sit", "--to", "sit"), "format must be given, or --to instead of it"),
        ((), "format must be given, or --to instead of it"),
        (("--to", "sit", "--num-heads", 4), "vae, input_size and num_heads must be left out with --to"),
        (("--to", "sit"), "out must be a file that ends with .safetensors"),
        (("--format", "sit", "--num-heads", 0), "num_heads must be > 0, got 0"),
    ],
)
def test_what_is_not_what_it_is_called_is_refused(flags, message, sit, tool, tmp_path):
    assert message in tool("convert", sit[0], *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_network_are_refused(sit, tool, tmp_path):
    save_file(weights_of(sit[1]), tmp_path / "sit.safetensors")
    messages = {"meanflow-jax": "no official ema_params", "py-meanflow": "no weights of py-meanflow"}
    for name, message in {**messages, "edm": "no weights of EDM"}.items():
        assert message in tool("convert", tmp_path / "sit.safetensors", "--format", name, "--out", tmp_path / "out")
    save_file(DiT(8, 2, 4, 32, 2, 2, num_classes=10).state_dict(), tmp_path / "narrow.safetensors")
    said = tool("convert", tmp_path / "narrow.safetensors", "--format", "dit", "--out", tmp_path / "out")
    assert "num_heads must be given" in said and "and this 32" in said


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: {k: v for k, v in w.items() if k != "t_embedder.mlp.0.weight"}, "t_embedder.mlp.0.weight"),
        (lambda w: {**w, "pos_embed": torch.zeros(1, 9, 64)}, "pos_embed differs from the sines and cosines"),
        (lambda w: {**w, "final_layer.linear.bias": torch.zeros(7)}, "cannot be converted as sit"),
        (lambda w: {**w, "x_embedder.proj.weight": torch.zeros(64, 16)}, "cannot be converted as sit"),
        (lambda w: {**w, 3: torch.zeros(3)}, "cannot be converted as sit"),
    ],
    ids=["missing", "positions", "output", "patches", "number"],
)
def test_a_damaged_file_is_refused_in_one_line(change, message, sit, tool, tmp_path):
    torch.save(change(weights_of(sit[1])), tmp_path / "x.pt")
    said = tool("convert", tmp_path / "x.pt", "--format", "sit", *HEADS, "--out", tmp_path / "out")
    assert said.startswith("error: ") and message in said and not (tmp_path / "out").exists()


def test_a_thousand_classes_are_those_of_imagenet(tool, tmp_path):
    save_file(DiT(8, 2, 4, 32, 2, 2, num_classes=1000).state_dict(), tmp_path / "narrow.safetensors")
    flags = ("--format", "dit", "--num-heads", 2, *SIZE, "--out", tmp_path / "out")
    tool("convert", tmp_path / "narrow.safetensors", *flags)
    pipe = load_pipeline(tmp_path / "out")
    assert pipe.class_ids(["golden retriever", "crane", 360]) == [207, 517, 360] and pipe.id2label[360] == "otter"
    assert len(set(pipe.id2label.values())) == 1000


def test_a_vae_of_other_latents_is_refused(sit, vae, unet, tool, tmp_path):
    golden = sit[1]
    weights = weights_of(golden)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :2].contiguous()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = weights[name][:8].contiguous()
    save_file(weights, tmp_path / "two.safetensors")
    flags = ("--format", "sit", *HEADS, "--vae", vae, "--out", tmp_path / "out")
    assert "has not the 2 channels of these latents" in tool("convert", tmp_path / "two.safetensors", *flags)
    save_file({f"net.{name}": value for name, value in weights_of(unet).items()}, tmp_path / "unet.safetensors")
    flags = ("--format", "py-meanflow", "--vae", vae, "--out", tmp_path / "out")
    assert "is of pixels, and needs none" in tool("convert", tmp_path / "unet.safetensors", *flags)


def test_networks_that_have_no_place_in_others_are_refused(tool, tmp_path):
    nets = {"omega": small_dit(takes_omega=True), "unet": UNetCifar(16, 3, 3, 16, (1, 2), 1)}
    for name, net in nets.items():
        MeanFlowPipeline(net, None, {**SAMPLING, "guidance": "none"}, {}).save_pretrained(tmp_path / name)
        said = tool("convert", tmp_path / name, "--to", "meanflow-jax", "--out", tmp_path / "x.npz")
        assert "must be a DiT of images with classes that returns u and is told no CFG scale" in said
