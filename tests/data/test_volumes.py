"""Volumes: files of two kinds, what is wrong with them, and a run that one channel breaks."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.data.base import InMemory, UnreadableSample
from meanflow.data.sources import load_data
from meanflow.data.volumes import shapes
from meanflow.objectives.meanflow import MeanFlow
from meanflow.pictures import middle_slices
from meanflow.publishing.checkpoints import checkpoints, load_network, verify_checkpoint
from meanflow.training.guard import DIVERGED
from meanflow.training.trainer import Trainer


@pytest.fixture
def folder(tmp_path):
    """Six volumes, (4, 8, 4, 12), half of them .npy in float16 and float64, half .safetensors."""
    x = torch.randn(6, 4, 8, 4, 12, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 5, 0.1, 2]).view(
        -1, 1, 1, 1
    )
    (tmp_path / "volumes").mkdir()
    for k, volume in enumerate(x):
        if k % 2:
            save_file({"volume": volume.bfloat16() if k == 3 else volume}, tmp_path / f"volumes/{k}.safetensors")
        else:
            np.save(tmp_path / f"volumes/{k}.npy", volume.numpy().astype(np.float16 if k == 2 else np.float64))
    return tmp_path / "volumes"


def recipe(folder, **changes) -> TrainConfig:
    return TrainConfig(**{"data": str(folder), "model": "DiT-XS/4", "steps": 2, "global_batch": 4, **changes})


def test_files_of_both_kinds_are_read_in_their_units(folder):
    data = load_data(recipe(folder))
    assert data.shape == (4, 8, 4, 12) and len(data) == 6 and data.num_classes == 0
    x, cond = data.batch(range(6), ())
    expected = torch.randn(6, 4, 8, 4, 12, generator=torch.Generator().manual_seed(0))
    expected *= torch.tensor([1, 5, 0.1, 2]).view(-1, 1, 1, 1)
    assert cond == {} and x.dtype == torch.float32
    torch.testing.assert_close(x, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(x[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


def test_weights_are_the_inverse_variances(folder):
    data = load_data(recipe(folder))
    objective = MeanFlow(nn.Identity(), MeanFlowConfig(channel_weights="inverse-variance"))
    objective.prepare(data)
    variance = data.batch(range(6), ())[0].transpose(0, 1).flatten(1).double().var(dim=1, unbiased=False)
    torch.testing.assert_close(objective.channel_weights, 1 / variance.float())
    given = MeanFlow(nn.Identity(), MeanFlowConfig(channel_weights=(1.0, 2.0)))
    given.prepare(data)
    assert given.channel_weights.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="a channel is constant"):
        objective.prepare(InMemory(torch.ones(4, 2, 3, 3), None, 0))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.npy", np.zeros((4, 8, 4, 11)), r"a.npy: .*must be .*\(4, 8, 4, 12\), got|0.npy: .*must be like a.npy"),
        ("9.npy", np.zeros((4, 8, 4, 11)), r"9.npy: a volume must be like 0.npy, \(4, 8, 4, 12\), got \(4, 8, 4, 11\)"),
        ("9.npy", np.array([{}]), "9.npy is no readable volume: "),
        ("9.npy", b"\x93NUMPY", "9.npy is no readable volume: "),
        ("9.safetensors", b"\x08\0\0\0", "9.safetensors is no readable volume: "),
        ("0.npy", np.zeros((8, 4, 12)), r"0.npy: a volume must be \(C, D, H, W\), got \(8, 4, 12\)"),
    ],
)
def test_volume_that_does_not_fit_is_named_before_the_run(name, content, message, folder):
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        np.save(folder / name, content, allow_pickle=True)  # one is a pickle, which nobody is to load
    with pytest.raises(ValueError, match=message) as error:
        load_data(recipe(folder))
    assert "\n" not in str(error.value)


def test_volume_that_changes_its_shape_is_named(folder):
    data = load_data(recipe(folder))
    np.save(folder / "0.npy", np.zeros((4, 4, 4, 4), np.float32))
    with pytest.raises(UnreadableSample, match=r"0.npy has become \(4, 4, 4, 4\), and was \(4, 8, 4, 12\)"):
        data.batch([0, 1], ())


def test_truncated_and_not_finite_volumes_and_an_empty_folder_are_named(folder, tmp_path):
    content = (folder / "0.npy").read_bytes()
    (folder / "0.npy").write_bytes(content[:-7])
    with pytest.raises(UnreadableSample, match="0.npy is no readable volume: "):
        load_data(recipe(folder))
    np.save(folder / "0.npy", np.full((4, 8, 4, 12), np.nan))
    with pytest.raises(UnreadableSample, match="0.npy is no readable volume: it has values that are not finite"):
        load_data(recipe(folder)).batch([0], ())
    (tmp_path / "empty").mkdir()
    for name, words in (("empty", "is no folder with volumes"), ("missing", "no such file or folder")):
        with pytest.raises(ValueError, match=f"/{name}:? {words}"):
            load_data(recipe(tmp_path / name))


def test_picture_shows_the_middle_slices_of_the_channels_side_by_side():
    x = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6).float()
    picture = middle_slices(x)
    assert picture.shape == (2, 1, 5, 18)
    for channel in range(3):
        part = picture[:, 0, :, 6 * channel : 6 * (channel + 1)]
        middle = x[:, channel, 2]
        torch.testing.assert_close(part, 2 * (middle - middle.min()) / (middle.max() - middle.min()) - 1)


class Broken(InMemory):
    """From the 21st batch on the third channel is a thousand times larger."""

    batches = 0

    def batch(self, indices, generators):
        self.batches += 1
        x, cond = super().batch(indices, generators)
        return (x * torch.tensor([1, 1, 1e3, 1]).view(-1, 1, 1, 1) if self.batches > 20 else x), cond


def test_channel_that_breaks_is_named_and_the_last_good_checkpoint_stays(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("meanflow.data.sources.load_data", lambda recipe: Broken(shapes(64), None, 0))
    run = recipe("shapes", out=tmp_path / "run", model="DiT-XS/8", steps=40, checkpoint_every=5, grace_steps=10)
    with pytest.raises(SystemExit) as end:
        Trainer(run).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    shown = capfd.readouterr().err
    assert end.value.code == DIVERGED and "channel 2: raw loss " in shown and "times its running level" in shown
    last = checkpoints(run.out)[-1]
    assert json.loads((last / "step.json").read_text())["step"] == 20
    verify_checkpoint(last)
    net = load_network(last)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.slow
def test_run_on_synthetic_volumes_learns_them(tmp_path, tool):
    """After a third of README.md's steps: a loss of a tenth of that of u = 0, sum(var e + E x^2), and no collapse."""
    flags = ["--data", "shapes", "--model", "DiT-XS/4", "--steps", 400, "--global-batch", 32, "--lr", 2e-3]
    flags += ["--schedule", "cosine", "--ema-decay", 0.99, "--log-every", 100, "--accumulation-steps", 1]
    tool("recipes/volumes_dit", *flags, "--out", tmp_path / "run")
    x = shapes()
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    zero = (1 + x.square().mean(dim=(0, 2, 3, 4))) * 16**3
    assert line["raw_loss"] < zero.sum() / 10
    tool("sample", tmp_path / "run", "--num-images", 256, "--out", tmp_path / "out")
    made = np.stack([np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))])
    for channel in range(4):
        a, b = made[:, channel], x[:, channel].numpy()
        spread = a.std(axis=0).mean() / b.std(axis=0).mean()  # over the samples: 0 where all are the same
        print(channel, spread, (a.mean() - b.mean()) / b.std())
        assert 0.3 < spread < 1.2 and abs(a.mean() - b.mean()) < 0.25 * b.std()
