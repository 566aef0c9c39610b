"""A run and an export that were saved by version 0.1 still load, resume and sample."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.publishing.checkpoints import load_pipeline
from meanflow.publishing.export import export
from meanflow.training.trainer import Trainer

SAVED = Path(__file__).parent / "saved"
RECIPE = TrainConfig(
    model="DiT-XS/4", net={"depth": 1, "hidden_size": 16, "num_heads": 2}, objective=MeanFlowConfig(kappa=0.5),
    steps=20, global_batch=16, lr=1e-2, ema_decay=(0.9,), checkpoint_every=10, sample_every=10, log_every=5,
    schedule="cosine", warmup_steps=2,
)  # fmt: skip


@pytest.fixture
def expected() -> dict[str, torch.Tensor]:
    return load_file(SAVED / "expected.safetensors")


def images(pipe, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe([3, 7, 1], latents=pipe.noise(0, range(3)), output_type="np", **options).images)


def test_a_run_is_sampled_as_before(expected):
    pipe = load_pipeline(SAVED / "run")
    torch.testing.assert_close(images(pipe), expected["run.images"], rtol=0, atol=1e-6)
    assert pipe.sampling.guidance == "trained in, effective scale 2 for t in [0, 1] (omega 1, kappa 0.5)"


def test_a_run_resumes_and_ends_as_before(expected, tmp_path):
    """With Adam's state, whose names have changed; the fields that are new in the recipe have their defaults."""
    run = shutil.copytree(SAVED / "run", tmp_path / "run")
    Trainer(replace(RECIPE, out=run)).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in load_file(run / "step-00000020/model/diffusion_pytorch_model.safetensors").items():
        old = expected[f"run.end.{name}"]
        if name.endswith("qkv.bias"):  # softmax ignores the keys' bias: what Adam makes of it is rounding, enlarged
            value, old = (torch.cat([x[:16], x[32:]]) for x in (value, old))
        torch.testing.assert_close(value, old, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"belongs to another recipe \(weight_decay 0.0 there, 0.1 here\)"):
        Trainer(replace(RECIPE, out=run, weight_decay=0.1))


def test_a_run_can_be_exported_now(expected, tmp_path):
    export(SAVED / "run", tmp_path / "model")
    torch.testing.assert_close(images(load_pipeline(tmp_path / "model")), expected["run.images"], rtol=0, atol=1e-6)


def test_an_export_is_sampled_as_before(expected):
    pipe = load_pipeline(SAVED / "export")
    torch.testing.assert_close(images(pipe), expected["export.images"], rtol=0, atol=1e-6)
    guided = images(pipe, guidance_scale=2.0, num_inference_steps=2)
    torch.testing.assert_close(guided, expected["export.guided"], rtol=0, atol=1e-6)


BY_ITS_OWN_CODE = """if True:
    import sys, numpy as np
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
    np.save(sys.argv[2], pipe([3, 7, 1], latents=pipe.noise(0, range(3)), output_type="np").images)
"""


def test_an_export_is_sampled_as_before_by_its_own_code(expected, tmp_path):
    """In a process and a cache of its own: diffusers keeps the code of all local folders in one place."""
    command = [sys.executable, "-c", BY_ITS_OWN_CODE, str(SAVED / "export"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, env={**os.environ, "HF_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(tmp_path / "images.npy"))
    torch.testing.assert_close(found, expected["export.images"], rtol=0, atol=1e-6)
