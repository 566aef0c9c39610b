"""The recipes and tools as a user starts them, and the sanity experiments."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from meanflow.config import MeanFlowConfig
from meanflow.data.sources import load_data
from meanflow.noise import noise
from meanflow.publishing.checkpoints import checkpoints, load_network
from meanflow.sampler import average_velocity, euler, sample
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer
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
    """Without torch: it takes seconds by itself. (Best of three, since the machine is shared.)"""
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
        (["--steps", "many"], "invalid"),
    ],
)
def test_bad_flags_end_with_a_clear_line_and_an_error_code(flags, message, tmp_path):
    shown = python("recipes/digits_dit.py", "--out", str(tmp_path / "run"), *flags)
    assert shown.returncode != 0
    assert message in shown.stdout + shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "run").exists()


LAUNCH = [str(BIN / "accelerate"), "launch", "-q", "--config_file", "accelerate_configs/cpu.yaml"]


def test_unknown_model_ends_with_one_line(tool, tmp_path):
    shown = tool("recipes/digits_dit", "--model", "DiT-XS/3", "--out", tmp_path / "run")
    assert shown.startswith("error: model must be one of DiT-XS/2") and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_launched_recipe_trains_and_resumes(tmp_path):
    """The command of the README, with accelerate launch."""
    launch = [*LAUNCH, "recipes/digits_dit.py"]
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


def test_report_says_which_run_is_missing(tool, tmp_path):
    shown = tool("digits_report", tmp_path / "a", "--flow", tmp_path / "b")
    assert shown.startswith(f"error: {tmp_path / 'a'} has no checkpoint")


@pytest.mark.slow
def test_report_compares_two_runs(tool, tmp_path):
    """Two runs that have learnt nothing: the table is complete, the floor known, and noise far from it."""
    for name, ratio in (("mean", "0.5"), ("flow", "0")):
        tool("recipes/digits_dit", "--out", tmp_path / name, "--steps", 2, "--objective.meanflow-ratio", ratio)
    assert "MeanFlow, 1 step" in tool("digits_report", tmp_path / "mean", "--flow", tmp_path / "flow")
    rows = json.loads((tmp_path / "mean/metrics.json").read_text())
    assert len(rows) == 7
    real = rows["real digits, training to held-out"]
    assert real["accuracy"] == pytest.approx(0.991, abs=5e-4)
    assert real["energy_distance"] == pytest.approx(0.108, abs=1e-3)
    assert all(row["energy_distance"] > 10 * real["energy_distance"] for name, row in rows.items() if "step" in name)
    assert (tmp_path / "mean/samples.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("[icv]*.py")))
def test_smoke_test_trains_the_very_recipe(recipe, tool, tmp_path):
    """4 steps; of one recipe then 2 again, from the checkpoint amid them. (test_distributed.py launches one.)"""
    flags = ["--smoke", "--out", tmp_path / "run"]
    shown = tool(f"recipes/{recipe}", *flags)
    out = tmp_path / "run-smoke"
    kind = "pixels" if recipe == "imagenet_pixel_b16" else "imf" if "_imf_" in recipe else recipe[0]
    data = {
        "pixels": "digits: 1,347 x 1 x 256 x 256, 10 classes",
        "imf": "random latents: 256 x 4 x 32 x 32 by stabilityai/sd-vae-ft-mse, 1000 classes",
        "i": "random latents: 256 x 4 x 32 x 32 by stabilityai/sd-vae-ft-mse, 1000 classes",
        "c": f"digits: 1,347 x 1 x 32 x 32, {'10' if recipe == 'cifar10_unet_cond' else 'no'} classes",
        "v": "shapes: 512 x 4 x 16 x 16 x 16, no classes",
    }[kind]
    share = {"pixels": "8 of 16", "imf": "8 of 16", "i": "4 of 16", "c": "12 of 16", "v": "8 of 32"}[kind]
    for words in ("made small", data, f"{share} samples with r != t"):
        assert words in shown
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4]
    assert (out / "samples/step-00000004.png").exists()
    last = out / "step-00000004"
    assert load_network(last).config.in_channels == (1 if kind in ("c", "pixels") else 4)
    if recipe != "imagenet_ditxl":
        return
    before = (last / "model/diffusion_pytorch_model.safetensors").read_bytes()
    last.rename(tmp_path / "moved")
    assert "resumes after step 2 of 4" in tool(f"recipes/{recipe}", *flags)
    assert (last / "model/diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_photographs_to_latents_to_training_to_decoded_samples(photos, vae, tmp_path):
    """The README's commands, on real photographs and a small VAE."""
    latents, run, size = tmp_path / "latents", tmp_path / "run", ["--vae", str(vae), "--resolution", "64"]
    launch = [*LAUNCH, "tools/cache_latents.py", str(photos), *size, "--out", str(latents), "--workers", "1"]
    shown = start(*launch)
    assert shown.returncode == 0, shown.stderr
    assert "40 latents (4, 8, 8) of 2 classes" in shown.stdout
    flags = ["--data", str(latents), *size, "--out", str(run), "--model", "DiT-XS/2", "--steps", "50", "--lr", "1e-3"]
    flags += ["--global-batch", "16", "--sample-every", "50", "--log-every", "10", "--mixed-precision", "no", "--flip"]
    flags += ["--no-compile"]
    shown = start(*LAUNCH, "recipes/imagenet_ditb2.py", *flags)
    assert shown.returncode == 0, shown.stderr
    losses = [line["raw_loss"] for line in read_log(run / "log.jsonl")]
    assert len(losses) == 5 and losses[-1] < losses[0]
    picture = Image.open(run / "samples/step-00000050.png")
    assert picture.size == (2 * 66 + 2, 8 * 66 + 2)  # decoded: 64 pixels a side, not the latents' 8
    assert "pictures show the latents" not in shown.stderr


def test_pixels_and_images_through_the_vae_train_too(photos, vae, tool, tmp_path):
    """Without a cache: photographs as they are, and encoded at each step."""
    flags = ["--data", photos, "--resolution", 64, "--steps", 2, "--global-batch", 8, "--flip"]
    for name, more in (
        ("pixels", ["--model", "DiT-XS/8"]),
        ("latents", ["--vae", str(vae), "--scaling-factor", "0.18215"]),
    ):
        tool("recipes/digits_dit", *flags, *more, "--out", tmp_path / name)
        width, height = Image.open(tmp_path / name / "samples/step-00000002.png").size
        assert width == 2 * 66 + 2 and height in (4 * 66 + 2, 8 * 66 + 2)


@pytest.mark.slow
def test_full_size_ditb4_takes_three_steps_here_within_memory(tmp_path):
    """131 M parameters at the recipe's shape, by the recipe's own file; 8 GiB are enough for a global batch of 16."""
    make = python("tools/cache_latents.py", "random:64", "--out", str(tmp_path / "latents"))
    assert make.returncode == 0, make.stderr
    code = "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    flags = [
        "--data",
        str(tmp_path / "latents"),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "3",
        "--global-batch",
        "16",
    ]
    flags += ["--accumulation-steps", "2", "--log-every", "1", "--workers", "0", "--no-compile"]
    shown = python("-c", code, "recipes/imagenet_ditb4.py", *flags)
    assert shown.returncode == 0, shown.stderr
    assert "DiT-B/4: 131,165,248 parameters" in shown.stdout
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3]
    assert float(shown.stdout.split("peak")[1]) < 8 * 2**30


def test_a_recipe_without_its_data_says_how_to_make_them(tool, tmp_path):
    """Before anything is written."""
    shown = tool("recipes/imagenet_ditxl", "--data", "./nowhere", "--out", tmp_path / "run")
    assert shown.startswith("error: ./nowhere: no such file or folder") and "name it with --data" in shown
    assert not (tmp_path / "run").exists()


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

    images = load_data(recipe)
    net = load_network(checkpoints(recipe.out)[-1])
    e = noise(recipe.seed, range(len(images.x)), (1, 8, 8))

    def rmse(x):
        return (x - images.x).square().mean().sqrt().item()

    def u_fn(z, t, r):
        return average_velocity(net, z, t, r, {"y": images.y})

    with torch.no_grad():
        one_step, ode = rmse(sample(u_fn, e)), rmse(euler(u_fn, e, 50))
    print(f"RMSE: one step {one_step:.4f}, 50 Euler steps {ode:.4f}")
    limit = 0.1 if stated_only else 0.02  # the images' own deviation is 0.75
    assert ode < limit
    if objective.meanflow_ratio > 0:
        assert one_step < limit
