"""The recipes and tools as a user starts them, and the sanity experiments."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meanflow import checkpoint
from meanflow.config import MeanFlowConfig
from meanflow.data import load_images
from meanflow.objective import average_velocity
from meanflow.sampler import euler, sample
from meanflow.time import noise
from meanflow.trainer import Trainer, read_log
from recipes.deterministic import RECIPE

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def start(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def python(*command: str) -> subprocess.CompletedProcess:
    return start(sys.executable, *command)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("[a-z]*.py")))
def test_help_is_quick_and_names_every_flag(recipe):
    """Without torch: that alone takes seconds. (Best of three, since the machine is shared.)"""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        shown = python(f"recipes/{recipe}", "--help")
        seconds.append(time.perf_counter() - begin)
    assert shown.returncode == 0 and min(seconds) < 2
    for flag in ("--out", "--objective.meanflow-ratio", "--objective.norm-p", "--global-batch", "--ema-decay"):
        assert flag in shown.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--meanflow-ratio", "0.5"], "Unrecognized options: --meanflow-ratio"),
        (["--objective.meanflow-ratio", "1.5"], "meanflow_ratio must be in [0, 1], got 1.5"),
        (["--objective.class-dropout-prob", "-0.1"], "class_dropout_prob must be in [0, 1], got -0.1"),
        (["--objective.t-start", "0.9", "--objective.t-end", "0.1"], "t_start must be <= t_end, which is 0.1, got 0.9"),
        (["--objective.norm-p", "-1"], "norm_p must be >= 0, got -1.0"),
        (["--model", "DiT-XS/3"], "error: model must be one of DiT-XS/2"),
        (["--steps", "many"], "invalid"),
    ],
)
def test_bad_flags_end_with_a_clear_line_and_an_error_code(flags, message, tmp_path):
    shown = python("recipes/digits_dit.py", "--out", str(tmp_path / "run"), *flags)
    assert shown.returncode != 0
    assert message in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()


def test_launched_recipe_trains_resumes_and_refuses_another_recipe(tmp_path):
    """The command of the README, with accelerate launch."""
    launch = [
        str(BIN / "accelerate"),
        "launch",
        "-q",
        "--config_file",
        "accelerate_configs/cpu.yaml",
        "recipes/digits_dit.py",
    ]
    flags = ["--out", str(tmp_path / "run"), "--steps", "4", "--checkpoint-every", "2", "--log-every", "2"]
    shown = start(*launch, *flags)
    assert shown.returncode == 0, shown.stderr
    assert "raw loss=" in shown.stderr and "images/s=" in shown.stderr
    checkpoint_ = tmp_path / "run/step-00000004"
    first = (checkpoint_ / "model/diffusion_pytorch_model.safetensors").read_bytes()
    checkpoint_.rename(tmp_path / "moved")
    shown = start(*launch, *flags)
    assert shown.returncode == 0 and "resumes after step 2 of 4" in shown.stdout
    assert (checkpoint_ / "model/diffusion_pytorch_model.safetensors").read_bytes() == first
    shown = start(*launch, *flags, "--objective.norm-p", "0")
    assert shown.returncode != 0 and "objective.norm_p 0.5 there, 0.0 here" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_report_says_which_run_is_missing(tmp_path):
    shown = python("tools/digits_report.py", str(tmp_path / "a"), "--flow", str(tmp_path / "b"))
    assert shown.returncode != 0 and f"{tmp_path / 'a'} has no checkpoint" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.slow
def test_report_compares_two_runs(tmp_path):
    """Two runs that have learnt nothing: the table is complete, the floor known, and noise far from it."""
    for name, ratio in (("mean", "0.5"), ("flow", "0")):
        shown = python(
            "recipes/digits_dit.py", "--out", str(tmp_path / name), "--steps", "2", "--objective.meanflow-ratio", ratio
        )
        assert shown.returncode == 0, shown.stderr
    shown = python("tools/digits_report.py", str(tmp_path / "mean"), "--flow", str(tmp_path / "flow"))
    assert shown.returncode == 0, shown.stderr
    import json

    rows = json.loads((tmp_path / "mean/metrics.json").read_text())
    assert len(rows) == 7
    real = rows["real digits, training to held-out"]
    assert real["accuracy"] == pytest.approx(0.991, abs=5e-4)
    assert real["energy_distance"] == pytest.approx(0.108, abs=1e-3)
    assert all(row["energy_distance"] > 10 * real["energy_distance"] for name, row in rows.items() if "step" in name)
    assert (tmp_path / "mean/samples.png").stat().st_size > 1000


PIXELS = 64
EXPERIMENTS = {
    "2.1 flow matching": {"objective": {"meanflow_ratio": 0.0, "norm_p": 0.0}},
    "2.2 flow matching, adaptive weight": {"objective": {"meanflow_ratio": 0.0}},
    "2.3 and 3.1 a quarter r != t": {"objective": {}},
    "2.4 all r != t": {"objective": {"meanflow_ratio": 1.0}},
    "3.2 forty images, flow matching": {"objective": {"meanflow_ratio": 0.0}, "subset": (4, 10)},
    "3.2 forty images, a quarter r != t": {"objective": {}, "subset": (4, 10)},
    "3.3 a quarter r != t, no weight": {"objective": {"norm_p": 0.0}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_fixed_pairs_are_memorised(name, tmp_path):
    """Raw loss below 1e-4 a pixel, and samples that are the images: a network that returns 0, or ignores r, fails."""
    changes, stated_only = dict(EXPERIMENTS[name]), name.startswith("3.2")
    objective = MeanFlowConfig(**{"class_dropout_prob": 0.0, **changes.pop("objective")})
    recipe = replace(RECIPE, out=tmp_path / "run", objective=objective, steps=700, **changes)
    Trainer(recipe).train()
    last = read_log(recipe.out / "log.jsonl")[-1]
    print(name, {key: value / PIXELS for key, value in last.items() if key.startswith("raw_loss") and key[-1] != "s"})
    if not stated_only:
        assert last["raw_loss"] / PIXELS < 1e-4

    images = load_images(recipe)
    net, config = checkpoint.load_network(checkpoint.checkpoints(recipe.out)[-1])
    e = noise(recipe.seed, range(len(images.x)), (1, 8, 8))

    def rmse(x):
        return (x - images.x).square().mean().sqrt().item()

    def u_fn(z, t, r):
        return average_velocity(net, config, z, t, r, images.y)

    with torch.no_grad():
        one_step, ode = rmse(sample(u_fn, e)), rmse(euler(u_fn, e, 50))
    print(f"RMSE: one step {one_step:.4f}, 50 Euler steps {ode:.4f}")
    limit = 0.1 if stated_only else 0.02  # the images' own deviation is 0.75
    assert ode < limit
    if config.meanflow_ratio > 0:
        assert one_step < limit
