"""Weights of others: what is read, what is refused, and that what comes out serves as an export of ours."""

from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, assert_golden
from safetensors.torch import load_file, save_file

from meanflow.config import ImprovedMeanFlowConfig, TrainConfig
from meanflow.publishing.checkpoints import load_pipeline
from meanflow.training.trainer import Trainer

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
    assert len(unused) == 3 and "missing: 0" in said
    golden = load_file(GOLDEN / "imf_torch.safetensors")
    net = load_pipeline(tmp_path / "out").net
    cond = {"y": golden["y"].long(), "omega": golden["omega"], "t_start": golden["t_min"], "t_end": golden["t_max"]}
    with torch.no_grad():
        assert_golden(net(golden["x"], golden["t"], golden["h"], **cond), golden["u"])
    card = (tmp_path / "out/README.md").read_text()
    assert "license: mit" in card and "github.com/Lyy-iiis/imeanflow" in card
    assert (
        f"Of the {len(official)} tensors in weights{suffix} {used} were used; unused: 3, such as {unused[0]}." in card
    )


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
    from meanflow.data.base import InMemory

    sizes = {"depth": 4, "hidden_size": 64, "num_heads": 4, "aux_head_depth": 2}
    recipe = TrainConfig(
        out=tmp_path / "run", model="iMF-B/2", net=sizes, init_from=str(out), steps=1, global_batch=8, lr=1e-6,
        objective=ImprovedMeanFlowConfig(),
    )  # fmt: skip
    from meanflow.training.preflight import Parts

    data = InMemory(torch.randn(16, 4, 8, 8), torch.arange(16) % 10, 10)
    trainer = Trainer(recipe, Parts(data=lambda recipe: data))
    assert "has no v head, as exports have none: the v head starts afresh" in capfd.readouterr().err
    weights = trainer.net.state_dict()
    begun = pipe.net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in begun.items()) and "v_heads.0.attn_scale" in weights
    trainer.lock.release()


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
            "half a match: 1 weights have another shape, such as ['shared_blocks.0.attn.q_proj.weight (64, 32)']",
        ),
        ("other", "no weights of improved MeanFlow: x_embedder.proj.weight is missing"),
        ("pickle", "cannot be read as weights alone, and nothing else is read"),
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
