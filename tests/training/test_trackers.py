"""Each tracker gets the log and the pictures, without a network; one that dies does not stop training."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import small_disk
from test_resume import in_child, short_recipe, train

from meanflow.config import TrainConfig
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Iterator[TrainConfig]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio"}.items():
        monkeypatch.setenv(name, str(value))
    yield replace(short_recipe(tmp_path / "run"), project="mine", run_name="first", log_every=5, eval_images=50)
    AcceleratorState._reset_state(reset_partial_state=True)


def logged(recipe: TrainConfig, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_log(recipe.out / "log.jsonl") if name in line}


def with_held_out(recipe: TrainConfig) -> TrainConfig:
    """All digits, some of which are not trained on."""
    return replace(recipe, subset=None, eval_every=10)


def test_tensorboard_gets_numbers_scores_and_pictures(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(with_held_out(replace(recipe, track=("tensorboard",), sample_every=10)))
    reader = EventAccumulator(str(recipe.out / "mine"))
    reader.Reload()
    for tag, name in {"train/raw_loss": "raw_loss", "eval/energy": "eval_energy"}.items():
        assert {e.step: e.value for e in reader.Scalars(tag)} == pytest.approx(logged(recipe, name))
    assert [picture.step for picture in reader.Images("samples")] == [10, 20]


@pytest.mark.slow
def test_trackio_gets_numbers_scores_and_pictures_and_prints_no_address(recipe, tmp_path, capfd):
    assert in_child(with_held_out(replace(recipe, track=("trackio",)))) == 0
    shown = "".join(capfd.readouterr())
    assert "token" not in shown and "http" not in shown, shown
    trackio = Path(sys.executable).parent / "trackio"

    def ask(*words: str) -> str:
        return subprocess.run([trackio, *words], capture_output=True, text=True, check=True).stdout

    assert "first" in ask("list", "runs", "--project", "mine")
    for metric, name in {"train/loss": "loss", "eval/energy": "eval_energy"}.items():
        found = json.loads(ask("get", "metric", "--project", "mine", "--run", "first", "--metric", metric, "--json"))
        assert {v["step"]: v["value"] for v in found["values"]} == pytest.approx(logged(recipe, name))
    assert list((tmp_path / "trackio").rglob("*.png"))


@pytest.mark.slow
def test_wandb_gets_pictures_and_takes_a_resumed_run_for_the_same(recipe, tmp_path):
    """By its id; the run's name may change."""
    tracked = replace(recipe, track=("wandb",))
    assert in_child(tracked) == 0
    (recipe.out / f"step-{recipe.steps:08d}").rename(tmp_path / "moved")
    assert in_child(replace(tracked, run_name="second")) == 0
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert list((tmp_path / "wandb").rglob("media/images/samples*.png"))
    assert in_child(replace(tracked, out=tmp_path / "another")) == 0
    assert len({folder.name.rpartition("-")[2] for folder in (tmp_path / "wandb").glob("offline-run-*")}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_full_disk_of_a_tracker_does_not_stop_training(tracker, recipe, tmp_path, monkeypatch, capfd):
    """From the third step on it cannot write a byte."""
    place = tmp_path / "small"
    monkeypatch.setenv("TRACKIO_DIR", str(place))
    monkeypatch.setenv("WANDB_DIR", str(place))
    recipe.out.mkdir()
    (recipe.out / "mine").symlink_to(place)

    def fill() -> None:
        real = Trainer.after_step

        def after_step(self):
            if self.step == 2:
                with (place / "room").open("wb", buffering=0) as file:
                    try:
                        while file.write(bytes(4096)) == 4096:
                            pass
                    except OSError:
                        pass
            return real(self)

        Trainer.after_step = after_step

    with small_disk(place, "8m"):
        assert in_child(replace(recipe, track=(tracker,), log_every=1, sample_every=4), fill) == 0
    assert list(logged(recipe, "loss")) == list(range(1, recipe.steps + 1)), capfd.readouterr().err


@pytest.mark.slow
def test_dead_server_of_a_tracker_does_not_stop_training(recipe, monkeypatch, capfd):
    """wandb online, where nobody listens."""
    for name, value in {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "API_KEY": 40 * "0"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    assert in_child(replace(recipe, track=("wandb",))) == 0
    shown = capfd.readouterr().err
    assert shown.count("trackers failed, and training goes on") == 1 and 40 * "0" not in shown
    assert os.environ["WANDB_MODE"] == "online" and list(logged(recipe, "loss"))[-1] == recipe.steps
