"""What happens to a run from outside: a full disk, a file that cannot be read, a folder that is gone. It goes on."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import small_disk
from test_resume import assert_same, everything, in_child, kill_at, short_recipe, train
from torch.utils.data import get_worker_info

from meanflow import files, main
from meanflow.config import MeanFlowConfig, Refusal, TrainConfig
from meanflow.data.base import InMemory
from meanflow.data.loader import SlotBatches
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import checkpoints
from meanflow.training import checkpoint
from meanflow.training.guard import DIVERGED, FAILED, Guard
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer, make_accelerator

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield replace(short_recipe(tmp_path / "run"), log_every=1)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def undisturbed(recipe) -> dict:
    """The end of the run where nothing happens."""
    straight = replace(recipe, out=recipe.out.with_name("straight"))
    assert in_child(straight) == 0
    return everything(straight.out)


def at_steps(actions: dict[int, Callable[[], None]]) -> Callable[[], None]:
    """Does something at the end of these steps, before the log, while no checkpoint is being written."""

    def patch() -> None:
        real = Trainer.after_step

        def after_step(self):
            if self.step + 1 in actions:
                self.writer.wait()
                actions[self.step + 1]()
            return real(self)

        Trainer.after_step = after_step

    return patch


def ended(out: Path) -> tuple[int, int]:
    """The code and the step in end.json."""
    end = files.read_json(out / "end.json", code=int, reason=str, step=int)
    return end["code"], end["step"]


@pytest.mark.parametrize("when", ["while it trains", "after it has ended"])
def test_run_on_a_full_disk_ends_as_an_undisturbed_one_once_room_is_made(when, recipe, undisturbed, capfd):
    """12 MB, filled to the last byte amid training; at step 8 neither the log nor a checkpoint can be written."""
    run, room = replace(recipe, keep=1, sample_every=4), recipe.out / "room"

    def fill() -> None:
        with room.open("wb", buffering=0) as file:
            while True:
                try:
                    if file.write(bytes(4096)) < 4096:
                        return
                except OSError:
                    return

    with small_disk(recipe.out, "12m"):
        actions = {6: fill} | ({15: room.unlink} if when == "while it trains" else {})
        code = in_child(run, at_steps(actions))
        shown = capfd.readouterr().err
        assert shown.count("log.jsonl failed, and training goes on: ") == 1
        assert "step-00000008 could not be saved, the older checkpoints stay" in shown and "Traceback" not in shown
        if when == "after it has ended":
            assert code == FAILED and "the last step could not be saved: make room" in shown
            assert [path.name for path in checkpoints(run.out)] == ["step-00000004"]
            room.unlink()
            code = in_child(run)
        assert code == 0 and ended(run.out) == (0, run.steps)
        assert_same(everything(run.out), undisturbed)
        assert not list(run.out.glob(".step*"))


def volumes(folder: Path, count: int = 16) -> Path:
    folder.mkdir()
    for number, x in enumerate(np.random.default_rng(0).standard_normal((count, 2, 4, 4, 4), np.float32)):
        np.save(folder / f"{number:02d}.npy", x)
    return folder


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 1), (2, 0)])
def test_run_stopped_by_an_unreadable_sample_ends_as_an_undisturbed_one_once_it_is_repaired(
    processes, workers, tmp_path, capfd
):
    """It is saved after the last step that can be made; the sample is one of the last process's."""
    run = TrainConfig(
        out=tmp_path / "run", data=str(volumes(tmp_path / "scans")), model="DiT-XS/4", steps=12,
        global_batch=2 * processes, workers=workers, log_every=1, checkpoint_every=100, sample_every=100,
        ema_decay=(0.9,), objective=MeanFlowConfig(meanflow_ratio=0.0, class_dropout_prob=0.0),
    )  # fmt: skip
    straight = replace(run, out=tmp_path / "straight")
    assert in_child(straight, processes=processes) == 0
    step = 8 // processes - 1  # the last one of the first epoch, counted from 0
    ((index, _), *_) = next(iter(SlotBatches(run, MeanFlow, 16, range(step, 12), processes - 1, processes)))
    bad = tmp_path / "scans" / f"{index:02d}.npy"
    good = bad.read_bytes()
    np.save(bad, np.full((2, 4, 4, 4), np.nan, np.float32))
    assert in_child(run, processes=processes) == FAILED
    shown = capfd.readouterr().err
    assert f"saved after step {step}" in shown and f"{bad} is no readable volume: it has values that are" in shown
    assert [path.name for path in checkpoints(run.out)] == [f"step-{step:08d}"]
    assert ended(run.out)[0] == FAILED
    bad.write_bytes(good)
    assert in_child(run, processes=processes) == FAILED  # the data are not those of the first start
    assert "--allow-data-change" in capfd.readouterr().err
    assert in_child(replace(run, allow_data_change=True), processes=processes) == 0
    assert_same(everything(run.out), everything(straight.out))


def test_run_whose_loading_process_dies_saves_and_ends(recipe, capfd):
    """As the system ends a process when memory runs out."""

    def die_at_step_8() -> None:
        real = InMemory.batch

        def batch(self, indices, generators):
            if get_worker_info() is not None and next(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, indices, generators)

        calls = iter(range(100))
        InMemory.batch = batch

    assert in_child(replace(recipe, workers=1), die_at_step_8) == FAILED
    shown = capfd.readouterr().err
    assert "the data of the next step cannot be read: saved after step" in shown
    assert shown.count("a process of --workers died") == 1
    assert 4 <= ended(recipe.out)[1] < 8 and checkpoints(recipe.out)


def test_second_interrupt_leaves_no_traceback(recipe, monkeypatch):
    """The first one saves the step (test_resume.py), and a second one raises amid it."""

    monkeypatch.setattr(Trainer, "train_step", lambda *_: guard.receive(signal.SIGINT, None))
    guard = Guard(None, recipe, {})
    guard.receive(signal.SIGINT, None)
    monkeypatch.setattr("sys.argv", ["recipe"])
    with pytest.raises(SystemExit) as end:
        main.run(recipe)
    assert end.value.code == ended(recipe.out)[0] == 128 + signal.SIGINT


def test_run_that_nobody_hears_any_more_goes_on(tmp_path):
    """As with `| head -1`, or where the terminal has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "recipes/digits_dit.py", "--smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0 and ended(tmp_path / "run-smoke") == (0, 4)


def test_run_whose_folder_is_deleted_goes_on(recipe, capfd):
    """What it writes afterwards is there."""
    assert in_child(recipe, at_steps({6: lambda: shutil.rmtree(recipe.out)})) == 0
    assert "log.jsonl failed, and training goes on: " in capfd.readouterr().err
    assert [path.name for path in checkpoints(recipe.out)][-1] == f"step-{recipe.steps:08d}"
    steps = [line["step"] for line in read_log(recipe.out / "log.jsonl")]
    assert steps == list(range(6, recipe.steps + 1)) and (recipe.out / "loss.png").exists()


def test_backend_of_a_notebook_does_not_end_a_run(tmp_path):
    """Matplotlib would refuse it when it is imported."""
    command = [sys.executable, "recipes/digits_dit.py", "--smoke", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.no_such_backend"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "loss.png failed" not in done.stderr, done.stderr
    assert (tmp_path / "run-smoke/loss.png").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_said(number, recipe, monkeypatch, capfd):
    """Of one that knows no flock at all (ENOSYS) filelock speaks, and locks by other means."""

    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    train(replace(recipe, steps=4))
    assert f"warning: {recipe.out} cannot be locked" in capfd.readouterr().err


def test_all_processes_go_on_from_the_checkpoint_that_the_first_sees(recipe):
    """To the second one a newer checkpoint is there, too."""
    run, straight = replace(recipe, keep=9), replace(recipe, keep=9, out=recipe.out.with_name("straight"))
    assert in_child(straight, processes=2) == 0
    shutil.copytree(straight.out, run.out)
    for later in checkpoints(run.out)[2:]:
        shutil.rmtree(later)

    def see_only_the_first() -> None:
        checkpoint.choose_checkpoint = lambda recipe: checkpoints(recipe.out)[0]

    assert in_child(run, see_only_the_first, processes=2) == 0
    assert_same(everything(run.out), everything(straight.out))


def test_machine_that_does_not_see_the_checkpoint_is_told_so(recipe, monkeypatch):
    monkeypatch.setattr(checkpoint, "choose_checkpoint", lambda recipe: Path("/nowhere/step-00000004"))
    with pytest.raises(Refusal, match="out must be on a disk that all machines share"):
        Trainer(recipe)


def test_processes_wait_as_long_as_the_recipe_says(recipe):
    handler = make_accelerator(replace(recipe, timeout=7.0)).init_handler
    assert handler.timeout == timedelta(minutes=7)


def test_how_a_run_ended_is_noted(recipe):
    """A start that finds it finished notes so, too."""
    assert in_child(recipe) == 0 and ended(recipe.out) == (0, recipe.steps)
    assert in_child(recipe) == 0 and ended(recipe.out) == (0, recipe.steps)
    burst = replace(recipe, out=recipe.out.with_name("burst"), lr=1e38, max_skipped=3, keep=1, checkpoint_every=2)
    assert in_child(burst) == DIVERGED and ended(burst.out)[0] == DIVERGED
    assert not checkpoints(burst.out)
    killed = replace(recipe, out=recipe.out.with_name("killed"))
    assert in_child(killed, kill_at(Trainer, "train_step", 6)) < 0 and not (killed.out / "end.json").exists()
