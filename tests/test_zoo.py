"""Every network on the same path: training, resuming, exporting, sampling, the Hub."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig, TrainConfig
from meanflow.data.sources import load_data
from meanflow.noise import generator
from meanflow.publishing.checkpoints import checkpoints, load_pipeline
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer

IMPROVED = ImprovedMeanFlowConfig(guidance_interval=(0.2, 0.9))
RECIPES = {
    "UNet": {"model": "UNet-digits", "net": {"block_out_channels": (16, 16), "dropout": 0.2}},
    "UNet-cifar": {
        "model": "UNet-cifar",
        "net": {"model_channels": 16, "num_blocks": 1, "channel_mult": (1, 1), "augment_dim": 6, "dropout": 0.2},
        "augment": 0.5,
        "objective": MeanFlowConfig(0.75, kappa=0.5),
    },
    "DiT": {
        "model": "DiT-XS/4",
        "data": "shapes",
        "objective": MeanFlowConfig(prediction="x", channel_weights="inverse-variance"),
    },
    "iMF": {
        "model": "iMF-B/2",
        "net": {"depth": 3, "hidden_size": 32, "num_heads": 2, "aux_head_depth": 2},
        "objective": IMPROVED,
    },
    "DiT, omega": {"model": "DiT-XS/4", "net": {"takes_omega": 1}, "objective": IMPROVED},
    "UNet, omega": {
        "model": "UNet-digits",
        "net": {"block_out_channels": (16, 16), "dropout": 0.2, "takes_omega": 1},
        "objective": replace(IMPROVED, prediction="x"),
    },
}


def train(recipe: TrainConfig) -> None:
    Trainer(recipe).train()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", RECIPES)
def test_network_trains_resumes_bit_for_bit_and_is_sampled_the_same_from_everywhere(name, hub, tool, tmp_path):
    """With dropout, whose masks a resumed run draws again."""
    options = {"steps": 4, "global_batch": 8, "checkpoint_every": 2, "ema_decay": (0.5,), "lr": 1e-2}
    recipe = TrainConfig(out=tmp_path / "run", **options, **RECIPES[name])
    train(recipe)
    last = checkpoints(recipe.out)[-1]
    before = {path: load_file(path) for path in last.rglob("*.safetensors")}
    assert len(before) == 3
    last.rename(tmp_path / "moved")
    train(recipe)
    for path, values in before.items():
        again = load_file(path)
        assert all(torch.equal(again[weight], value) for weight, value in values.items()), path

    volumes = recipe.data == "shapes"
    kind = "out" if volumes else "out.npz"
    tool("push_to_hub", recipe.out, "user/net")
    for number, source in enumerate((recipe.out, last, recipe.out / "pipeline", "user/net")):
        tool("sample", source, "--num-images", 4, "--seed", 3, "--out", tmp_path / f"{number}{kind}")
    pipe = DiffusionPipeline.from_pretrained(recipe.out / "pipeline", trust_remote_code=True)
    assert "models" not in type(pipe.net).__module__
    y = None if volumes else [0, 1, 2, 3]
    images = pipe(y, 4, latents=pipe.noise(3, range(4)), output_type="np").images
    if volumes:
        assert images.shape == (4, 4, 16, 16, 16) and images.dtype == np.float32
        for number in range(4):
            for k in range(4):
                np.testing.assert_allclose(
                    np.load(tmp_path / f"{number}out/{k:06d}.npy"), images[k], rtol=1e-5, atol=1e-5
                )
        assert (tmp_path / "0out/slices.png").exists()
        tool("sample", recipe.out, "--num-images", 3, "--out", tmp_path / "slices.png")
        assert "out must be a folder or x.png for volumes" in tool("sample", recipe.out, "--out", tmp_path / "x.npz")
        return
    assert images.shape == (4, 8, 8, 1)
    for number in range(4):
        assert (np.load(tmp_path / f"{number}{kind}")["arr_0"] == (images * 255).round().astype(np.uint8)).all()


@pytest.mark.parametrize("name", RECIPES)
def test_checkpointed_activations_train_the_same_network(name, tmp_path):
    """Not resumed from: with dropout, two forwards and a recomputation have to draw the same masks."""
    options = {"steps": 2, "global_batch": 8, "ema_decay": (0.5,), "lr": 1e-2}
    recipe = TrainConfig(out=tmp_path / "kept", **options, **RECIPES[name])
    train(recipe)
    train(replace(recipe, out=tmp_path / "again", activation_checkpointing=True))
    a, b = (load_pipeline(tmp_path / name).net.state_dict() for name in ("kept", "again"))
    for weight, value in a.items():
        torch.testing.assert_close(b[weight], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"net": {"width": 3}}, "net: UNet-digits cannot be made of .*'width': 3.*: .*unexpected keyword argument"),
        ({"augment": 0.1}, "net.augment_dim must be 6 with augment and 0 without, got 0"),
        ({"augment": 2.0}, r"augment must be in \[0, 1\], got 2.0"),
        ({"data": "shapes", "augment": 0.1}, "augment is for square images in pixels"),
        ({"resolution": 9}, r"is not \(H, W\) to be halved 1 times"),
        ({"data": "shapes"}, r"is not \(H, W\) to be halved 1 times"),
        ({"data": "shapes", "flip": True}, "flip is not for shapes, got True"),
        (
            {"model": "UNet-cifar", "net": {"augment_dim": 6}},
            "net.augment_dim must be 6 with augment and 0 without, got 6",
        ),
        (
            {"net": {"dropout": 0.1}, "objective": MeanFlowConfig(jvp="finite-difference")},
            "objective.jvp must be exact for a network with dropout, got finite-difference",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**{"out": tmp_path / "run", "model": "UNet-digits", "steps": 1, **changes}))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_classes_can_be_left_out(tmp_path):
    recipe = TrainConfig(out=tmp_path / "run", model="UNet-digits", steps=1, global_batch=8, class_conditional=False)
    train(recipe)
    pipe = load_pipeline(recipe.out)
    assert pipe.net.config.num_classes == 0 and pipe.id2label == {}
    assert pipe(batch_size=2, output_type="pt").images.shape == (2, 1, 8, 8)


def test_images_through_the_vae_are_weighed_as_latents_and_can_be_without_classes(photos, vae, tmp_path):
    options = {"data": str(photos), "resolution": 64, "vae": str(vae), "scaling_factor": 0.18215, "steps": 1}
    data = load_data(TrainConfig(**options, class_conditional=False))
    (pixels, e), cond = data.batch(range(40), [generator(0, row, "variance") for row in range(40)])
    assert cond == {} and data.num_classes == 0
    variance = data.encode(pixels, e).transpose(0, 1).flatten(1).double().var(dim=1, unbiased=False)
    torch.testing.assert_close(data.channel_variance(), variance, rtol=1e-3, atol=0)


def test_log_has_every_channels_loss(tmp_path):
    recipe = TrainConfig(out=tmp_path / "run", steps=1, global_batch=8, data="shapes", model="DiT-XS/8", log_every=1)
    train(recipe)
    line = read_log(recipe.out / "log.jsonl")[-1]
    assert len(line["raw_loss_channels"]) == 4
    assert sum(line["raw_loss_channels"]) == pytest.approx(line["raw_loss"], rel=1e-5)
