"""The log: what a line holds, and what its rate does not count."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from meanflow.config import TrainConfig
from meanflow.data.base import InMemory
from meanflow.data.sources import digits
from meanflow.training.checkpoint import CheckpointWriter
from meanflow.training.log import read_log
from meanflow.training.preflight import Parts
from meanflow.training.trainer import Trainer


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        out=tmp_path / "run", model="DiT-XS/8", steps=6, global_batch=16, lr=1e-3, ema_decay=(0.9,), log_every=2,
        checkpoint_every=1, sample_every=1,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gradients_norm_and_share_of_clipped_steps_are_logged(recipe):
    """The norm is the one before clipping, per optimiser step, with accumulation too."""
    Trainer(replace(recipe, accumulation_steps=2)).train()
    free = read_log(recipe.out / "log.jsonl")
    assert all(line["clipped"] == 0 for line in free)
    bound = free[0]["grad_norm"] * 1e-3
    Trainer(replace(recipe, accumulation_steps=2, out=recipe.out.with_name("clipped"), max_grad_norm=bound)).train()
    clipped = read_log(recipe.out.with_name("clipped") / "log.jsonl")
    assert all(line["clipped"] == 1 for line in clipped)
    # Adam's first step does not depend on the gradient's length, so the second gradient is nearly the same.
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=0.05)


class SlowData(InMemory):
    def batch(self, indices, generators):
        time.sleep(0.05)
        return super().batch(indices, generators)


def test_seconds_are_counted_where_they_are_spent(recipe, monkeypatch):
    """A step waits 0.05 s for its data and 0.6 s for its checkpoint; the rate counts only the first.

    The last three steps wait for no data, since batches are read three steps ahead.
    """
    real = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda self, progress: (time.sleep(0.6), real(self, progress))[1])
    images = digits()[0]
    Trainer(replace(recipe, steps=9), Parts(data=lambda recipe: SlowData(images.x, images.y, 10))).train()
    for line in read_log(recipe.out / "log.jsonl")[1:3]:
        assert line["seconds_data"] >= 0.1 and line["seconds_saving"] >= 1.2
        training = 2 * recipe.global_batch / line["images_per_second"]
        assert line["seconds_data"] <= training < line["seconds_saving"] + line["seconds_data"]


def test_a_long_log_is_read_sparsely(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "raw_loss": 1 / step}) for step in range(1, 20_001)]
    path.write_text("\n".join(lines) + '\n{"step": 20001, "ra')
    assert len(read_log(path)) == 20_000
    steps = torch.tensor([line["step"] for line in read_log(path, max_lines=500)])
    assert 250 <= len(steps) <= 1000 and steps[0] == 1 and steps[-1] > 19_900
    assert (steps.diff() == steps.diff()[0]).all()
    path.write_text("")
    assert read_log(path, max_lines=500) == []
