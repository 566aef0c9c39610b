"""The screen before a run: its figures are right, and what cannot work is refused there."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from caching.shards import write_random
from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.data.base import InMemory
from meanflow.data.latents import Latents
from meanflow.data.sources import load_data
from meanflow.training.checkpoint import choose_checkpoint
from meanflow.training.preflight import checkpoint_bytes, gib, make_net, memory, preflight
from meanflow.training.screen import render
from meanflow.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def recipe_of(name: str) -> TrainConfig:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPE


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "latents"
    write_random(folder, 512, "stabilityai/sd-vae-ft-mse", 0.18215, 256)
    return folder


# arXiv:2505.13447 tables 1, 2 and 4, and the official networks' parameters.
PUBLISHED = {
    "imagenet_ditb4": ("131,165,248", 80, "effective scale 2 for t in [0, 1] (omega 1, kappa 0.5)"),
    "imagenet_ditb2": ("131,091,472", 240, "effective scale 2 for t in [0, 1] (omega 1, kappa 0.5)"),
    "imagenet_ditm2": ("308,019,216", 240, "effective scale 2 for t in [0, 1] (omega 1, kappa 0.5)"),
    "imagenet_ditl2": ("459,137,040", 240, "effective scale 2.5 for t in [0, 0.8] (omega 0.2, kappa 0.92)"),
    "imagenet_ditxl": ("676,440,592", 240, "effective scale 2.5 for t in [0, 0.75] (omega 0.2, kappa 0.92)"),
    "imagenet_ditxl_plus": ("676,440,592", 1000, "effective scale 2 for t in [0.3, 0.8] (omega 1, kappa 0.5)"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_imagenet_recipes_are_the_papers(name, latents):
    count, epochs, guidance = PUBLISHED[name]
    recipe = replace(recipe_of(name), data=str(latents), keep=1)
    screen = render(preflight(recipe, load_data(recipe), num_processes=8))
    for words in (
        f"{count} parameters",
        guidance,
        "256 = 32 x 8 processes x 1 accumulation steps",
        "MeanFlow, 64 of 256 samples with r != t",
        f"{2 * epochs:,} steps = {epochs:,} epochs",
        "512 x 4 x 32 x 32 by stabilityai/sd-vae-ft-mse, 1000 classes",
    ):
        assert words in screen, screen
    objective = recipe.objective
    assert (recipe.lr, recipe.betas, recipe.ema_decay, recipe.warmup_steps) == (1e-4, (0.9, 0.95), (0.9999,), 0)
    assert (objective.P_mean, objective.P_std, objective.norm_p, objective.norm_eps) == (-0.4, 1.0, 1.0, 0.01)
    assert (objective.class_dropout_prob, objective.null_class, recipe.schedule) == (0.1, "flow", "constant")


@pytest.mark.parametrize("ema_decay", [(0.9,), (0.9, 0.99)])
def test_memory_and_checkpoint_are_what_the_trainer_really_holds(ema_decay, tmp_path):
    """Within 5 %, after a step, for a network large enough that step counters and JSON do not count."""
    recipe = TrainConfig(out=tmp_path / "run", model="DiT-S/8", steps=1, global_batch=4, ema_decay=ema_decay)
    trainer = Trainer(recipe)
    trainer.train()

    def size(tensors) -> int:
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    expected = memory(recipe, trainer.net)
    optimizer = trainer.optimizer.optimizer
    held = {
        "weights": size(trainer.net.parameters()),
        "gradients": size(trainer.net.parameters()),
        "Adam": sum(size(state.values()) for state in optimizer.state.values()),
        "averages": sum(size(average.state_dict().values()) for average in trainer.averages.nets.values()),
    }
    for name, value in held.items():
        assert value == pytest.approx(expected[name], rel=0.05), name
    written = sum(path.stat().st_size for path in (recipe.out / "step-00000001").rglob("*") if path.is_file())
    assert written == pytest.approx(checkpoint_bytes(recipe, trainer.net), rel=0.05)


def test_what_resumes_is_said(tmp_path):
    recipe = TrainConfig(out=tmp_path / "run", model="DiT-XS/4", steps=2, global_batch=4)
    data = load_data(recipe)
    assert "resumes   nothing: from fresh weights" in render(preflight(recipe, data, 1))
    Trainer(replace(recipe, steps=1)).train()
    start = choose_checkpoint(recipe)
    assert f"resumes   after step 1, from {tmp_path / 'run/step-00000001'}" in render(
        preflight(recipe, data, 1, start=start)
    )


def test_too_little_disk_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    """Two are kept and one is written beside them."""
    recipe = TrainConfig(out=tmp_path / "run", model="DiT-S/8", steps=10, global_batch=4, checkpoint_every=2)
    data = load_data(recipe)
    with torch.device("meta"):
        size = checkpoint_bytes(recipe, make_net(recipe, data))
    for free, fits in ((3 * size, True), (3 * size - 1, False)):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr("shutil.disk_usage", lambda path, usage=usage: usage)
        if fits:
            assert f"a checkpoint {gib(size)}, at most 3 at once" in render(preflight(recipe, data, 1))
        else:
            with pytest.raises(ValueError, match="3 checkpoints of .* more: make room, lower --keep"):
                preflight(recipe, data, 1)


@pytest.mark.parametrize(
    "changes, processes, message",
    [
        ({"global_batch": 6}, 4, r"global_batch must be a multiple of processes x accumulation_steps \(4 x 1\), got 6"),
        ({"global_batch": 8}, 4, "a micro-batch of 2 cannot hold its exact share"),
        ({"model": "DiT-XS/3"}, 1, "model must be one of"),
        ({"model": "DiT-XS/8", "data": "12 x 12"}, 1, "12.*patch"),
        (
            {"objective": MeanFlowConfig(channel_weights=(1.0, 2.0))},
            1,
            "channel_weights must be 1 numbers, one a channel, got 2",
        ),
        ({"data": "empty"}, 1, "data: digits has no samples"),
        ({"objective": MeanFlowConfig(omega=2.0), "data": "no classes"}, 1, "must be 1 and 0 for data without classes"),
    ],
)
def test_choices_that_cannot_work_are_refused(changes, processes, message, tmp_path):
    data = changes.pop("data", None)
    recipe = TrainConfig(**{"out": tmp_path / "run", "model": "DiT-XS/4", "steps": 1, "global_batch": 8, **changes})
    images = {
        None: load_data(recipe),
        "12 x 12": InMemory(torch.zeros(9, 1, 12, 12), torch.zeros(9).long(), 1),
        "empty": InMemory(torch.zeros(0, 1, 8, 8), None, 0),
        "no classes": InMemory(torch.zeros(9, 1, 8, 8), None, 0),
    }
    with pytest.raises(ValueError, match=message):
        preflight(recipe, images[data], processes)


@pytest.mark.slow
def test_dry_run_prints_the_screen_and_leaves_nothing(latents, tmp_path):
    """By the recipe's own file, as if launched on 4 processes."""
    command = [sys.executable, "recipes/imagenet_ditb4.py", "--dry-run", "--data", str(latents), "--keep", "1"]
    environment = {"WORLD_SIZE": "4", "RANK": "0", "PATH": "", "HOME": str(tmp_path)}
    shown = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "256 = 64 x 4 processes" in shown.stdout and "dry run: nothing was trained" in shown.stderr
    assert not (tmp_path / "run").exists()


def test_the_screen_counts_the_networks_parameters(latents):
    recipe = replace(recipe_of("imagenet_ditb4"), data=str(latents), smoke=True)
    assert f"made small: {make_net(recipe, Latents(latents, recipe)).num_parameters():,}" in render(
        preflight(recipe, load_data(recipe), 1)
    )
