"""The trainer, on the real digits: what it leaves behind, and that a stopped run goes on as if it had not been."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.main import run
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import checkpoints, load_network, read_sampling
from meanflow.training.log import read_log
from meanflow.training.optimizer import learning_rate
from meanflow.training.trainer import Trainer


def train(recipe: TrainConfig) -> None:
    Trainer(recipe).train()


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        out=tmp_path / "run", model="DiT-XS/4", steps=8, global_batch=16, lr=1e-3, ema_decay=(0.9, 0.5),
        max_grad_norm=1.0, schedule="cosine", log_every=2, checkpoint_every=2, sample_every=4, keep=3,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process, else


def weights(folder):
    return {name: p for kind in ("model", "ema/0.9", "ema/0.5") for name, p in load(folder / kind).items()}


def load(folder):
    from safetensors.torch import load_file

    return {f"{folder.name}.{k}": v for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()}


def test_run_leaves_checkpoints_log_curve_and_samples(recipe):
    train(recipe)
    assert [path.name for path in checkpoints(recipe.out)] == ["step-00000004", "step-00000006", "step-00000008"]
    lines = read_log(recipe.out / "log.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert all(math.isfinite(line["raw_loss"]) and line["images_per_second"] > 0 for line in lines)
    # The logged losses are means: a quarter of the samples is r != t.
    line = lines[-1]
    assert abs(line["raw_loss"] - 0.25 * line["raw_loss_meanflow"] - 0.75 * line["raw_loss_flow"]) < 1e-3
    assert sorted(path.name for path in (recipe.out / "samples").iterdir()) == [
        "step-00000004.png",
        "step-00000008.png",
    ]
    assert Image.open(recipe.out / "samples/step-00000008.png").size == (10 * 34 + 2, 8 * 34 + 2)
    assert Image.open(recipe.out / "loss.png").size[0] > 500
    assert not list(recipe.out.glob(".step*")), "temporary files are left"
    assert not load_network(recipe.out / "step-00000008").training
    assert read_sampling(recipe.out / "step-00000008") == MeanFlow.sampling(recipe.objective)._asdict()


def test_no_file_of_a_checkpoint_is_a_pickle_of_ours(recipe):
    train(recipe)
    folder = recipe.out / "step-00000008"
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors") or path.parent == folder / "state"
    for path in (folder / "state").glob("*.bin"):
        torch.load(path, weights_only=True)


def test_resumed_run_ends_with_the_weights_and_the_log_of_an_uninterrupted_one(recipe, tmp_path):
    """Stopped after step 4, with a half-written checkpoint and log lines that will be written again."""
    train(recipe)
    straight = weights(recipe.out / "step-00000008")
    log = [(line["step"], line["raw_loss"]) for line in read_log(recipe.out / "log.jsonl")]
    for name in ("step-00000006", "step-00000008"):
        (recipe.out / name).rename(tmp_path / name)
    (recipe.out / ".step-00000006.tmp").mkdir()
    with (recipe.out / "log.jsonl").open("a") as file:
        file.write('{"step": 10, "raw')
    train(recipe)
    assert [(line["step"], line["raw_loss"]) for line in read_log(recipe.out / "log.jsonl")] == log
    for name, value in weights(recipe.out / "step-00000008").items():
        assert torch.equal(value, straight[name]), name


def test_run_resumes_with_another_accumulation(recipe, tmp_path):
    """Micro-steps are counted anew: else a step would end amid a global batch."""
    one = replace(recipe, schedule="constant", steps=4, keep=9, checkpoint_every=1)
    train(one)
    straight = weights(one.out / "step-00000004")
    for name in ("step-00000002", "step-00000003", "step-00000004"):
        (one.out / name).rename(tmp_path / name)
    train(replace(one, accumulation_steps=4))
    resumed = weights(one.out / "step-00000004")
    start = load(one.out / "step-00000001" / "model")
    moved = sum((straight[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((straight[name] - resumed[name]).square().sum() for name in start).sqrt()
    assert apart < 0.01 * moved


def test_logged_rate_is_the_optimisers_and_follows_the_schedule(recipe):
    train(replace(recipe, warmup_steps=3, log_every=1))
    rates = [line["lr"] for line in read_log(recipe.out / "log.jsonl")]
    warmed_up = replace(recipe, warmup_steps=3)
    assert rates == pytest.approx([learning_rate(warmed_up, step, 8, recipe.lr) for step in range(8)])


def test_clipping_bounds_the_first_step(recipe, monkeypatch):
    """By the gradient that reaches the optimiser: its norm is the bound."""
    norms = []
    step = torch.optim.Adam.step

    def spy(optimizer, *arguments, **options):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    train(replace(recipe, steps=2, max_grad_norm=1e-3))
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_accumulation_trains_the_same_network(recipe, tmp_path):
    """Up to rounding. A gradient summed for averaged, or an average stepped per micro-batch, fails."""
    one = replace(recipe, lr=1e-4, schedule="constant")
    train(one)
    train(replace(one, accumulation_steps=4, out=tmp_path / "accumulated"))
    a, b = (weights(out / "step-00000008") for out in (one.out, tmp_path / "accumulated"))
    start = weights_at_start(replace(one, out=tmp_path / "start"))
    moved = sum((a[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((a[name] - b[name]).square().sum() for name in a).sqrt()
    assert apart < 0.02 * moved


def weights_at_start(recipe):
    train(replace(recipe, steps=1, lr=1e-30))
    return load(recipe.out / "step-00000001" / "model")


def test_average_is_over_optimiser_steps(recipe):
    """After one step at decay d it is d times the start plus 1 - d times the network, with accumulation too."""
    one = replace(recipe, steps=1, accumulation_steps=2)
    train(one)
    folder = one.out / "step-00000001"
    start = weights_at_start(replace(one, out=one.out / "start"))
    net, average = load(folder / "model"), load(folder / "ema/0.9")
    for name, value in start.items():
        expected = 0.9 * value + 0.1 * net[name]
        torch.testing.assert_close(average[name.replace("model", "0.9", 1)], expected, rtol=1e-5, atol=1e-7)


def test_bf16_run_keeps_float32_weights_and_nearly_the_loss(recipe, tmp_path):
    train(replace(recipe, steps=4))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(replace(recipe, mixed_precision="bf16", steps=4, out=tmp_path / "bf16"))
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16" / "step-00000004").values())
    exact, rounded = (read_log(out / "log.jsonl")[-1]["raw_loss"] for out in (recipe.out, tmp_path / "bf16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)


def test_epochs_are_passes_over_the_data(recipe):
    """0.02 of 1,347 digits are 27 images, so 2 steps of 16."""
    train(replace(recipe, steps=None, epochs=0.02))
    assert checkpoints(recipe.out)[-1].name == "step-00000002"


def test_finished_run_is_left_alone(recipe):
    train(recipe)
    before = {path: path.stat().st_mtime_ns for path in recipe.out.glob("step-*/**/*")}
    train(recipe)
    assert {path: path.stat().st_mtime_ns for path in recipe.out.glob("step-*/**/*")} == before


def test_tracker_that_is_not_installed_is_refused(recipe, monkeypatch):
    """Accelerate would leave it out without a word."""
    monkeypatch.setattr("meanflow.training.preflight.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="track: wandb is not installed: pip install"):
        train(replace(recipe, track=("wandb",)))
    assert not recipe.out.exists()


def test_folder_of_another_recipe_is_refused_with_the_difference_and_not_touched(recipe):
    train(replace(recipe, steps=2))
    before = (recipe.out / "recipe.json").read_text()
    objective = MeanFlowConfig(norm_p=0.5)
    with pytest.raises(ValueError, match=r"belongs to another recipe \(objective.norm_p 1.0 there, 0.5 here\)"):
        train(replace(recipe, steps=2, objective=objective))
    assert (recipe.out / "recipe.json").read_text() == before


def test_folder_of_other_data_is_refused_and_moved_data_are_not(recipe, photos, tmp_path):
    """What the data are decides, not where they lie."""
    images = replace(recipe, data=str(photos), resolution=16, steps=1, model="DiT-XS/4")
    train(images)
    copied = shutil.copytree(photos, tmp_path / "elsewhere")
    train(replace(images, data=str(copied)))
    next(copied.rglob("*.jpg")).unlink()
    with pytest.raises(ValueError, match="belongs to another recipe .data.json's count 40 there, 39 here"):
        train(replace(images, data=str(copied)))


@pytest.mark.parametrize("flag", ["--verify", "--no-verify"])
def test_unreadable_image_ends_the_run_with_one_line(flag, recipe, photos, tmp_path, monkeypatch, capfd):
    """By its header, and by a loading process, which wraps its errors in a traceback."""
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/text.jpg").write_bytes(b"no image")
    flags = ["--data", str(tmp_path / "images"), "--resolution", "16", "--workers", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["recipe", *flags, flag])
    with pytest.raises(SystemExit) as error:
        run(replace(recipe, steps=1))
    shown = str(error.value.code) if flag == "--no-verify" else capfd.readouterr().err
    assert shown.strip().splitlines()[-1].startswith(f"error: {tmp_path}/images/a/text.jpg is no readable image: ")


def test_unknown_model_is_refused_before_a_folder_is_made(recipe):
    for changes, message in (
        ({"model": "DiT-XXL/2"}, "model must be one of DiT-XS/2"),
        ({"global_batch": 4}, "cannot hold"),
    ):
        with pytest.raises(ValueError, match=message):
            train(replace(recipe, accumulation_steps=2, **changes))
    assert not recipe.out.exists()


@pytest.mark.parametrize(
    "schedule, warmup_steps, expected",
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0, [(1 + math.cos(math.pi * n / 5)) / 2 for n in range(5)]),
        ("constant", 3, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 3, [0.25, 0.5, 0.75, 1, 0.5]),
    ],
)
def test_learning_rate_starts_full_without_warm_up_and_would_be_0_at_the_end(schedule, warmup_steps, expected):
    recipe = TrainConfig(steps=5, lr=2.0, schedule=schedule, warmup_steps=warmup_steps)
    rates = [learning_rate(recipe, step, 5, recipe.lr) for step in range(5)]
    assert rates == pytest.approx([2 * value for value in expected])


def test_checkpoints_say_that_guidance_is_trained_in_from_the_step_on_at_which_it_begins(recipe, tmp_path):
    objective = MeanFlowConfig(omega=0.5, kappa=0.6, guidance_from_step=3)
    train(replace(recipe, objective=objective, steps=4, checkpoint_every=1, keep=4))
    scales = [read_sampling(folder)["guidance_scale"] for folder in checkpoints(recipe.out)]
    assert scales == [None, None, None, pytest.approx(1.25)]
    assert "effective scale 1.25" in (recipe.out / "pipeline/README.md").read_text()
