"""A run that is killed, stopped, or cannot save goes on as if it had not been."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from conftest import perturbed, small_disk
from safetensors.torch import load_file

from meanflow import files
from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.publishing.checkpoints import checkpoints, load_network, verify_checkpoint
from meanflow.training import checkpoint, trainer
from meanflow.training.guard import DIVERGED, FAILED, STOPPED
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer
from models import MODELS

STEPS, EVERY = 20, 4


def short_recipe(out: Path) -> TrainConfig:
    """20 steps of 24 of 400 images: an epoch ends amid a step."""
    return TrainConfig(
        out=out, subset=(10, 40), model="DiT-XS/8", steps=STEPS, global_batch=24, lr=1e-3,
        ema_decay=(0.9,), log_every=3, checkpoint_every=EVERY, sample_every=1000, keep=2, schedule="cosine",
    )  # fmt: skip


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield short_recipe(tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)


def train(recipe: TrainConfig) -> None:
    Trainer(recipe).train()


def in_child(recipe: TrainConfig, patch: Callable[[], None] = lambda: None, processes: int = 1) -> int:
    """Trains in processes of its own and returns the first's exit code; negative: the signal that killed it.

    The first is patched. As a launcher does, it kills the others when one ends otherwise than well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int):
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if rank == 0:
            patch()
        train(recipe)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=(rank,)) for rank in range(processes)]
    for child in children:
        child.start()
    children[0].join()
    for child in children[1:]:
        child.join(30 if children[0].exitcode == 0 else 0)
        child.kill()
        child.join()
    return children[0].exitcode


def everything(out: Path) -> dict:
    """The last checkpoint's tensors and the log without its speeds."""
    folder = checkpoints(out)[-1]
    found = {"step": folder.name}
    for kind in ("model", "ema/0.9"):
        found |= {f"{kind}.{k}": v for k, v in load_file(folder / kind / "diffusion_pytorch_model.safetensors").items()}
    found |= load_file(folder / "optimizer.safetensors")
    log = read_log(out / "log.jsonl")
    lines = [{k: v for k, v in line.items() if k != "images_per_second" and "seconds" not in k} for line in log]
    return {**found, "log": lines}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def kill_at(owner: object, name: str, call: int, after: bool = False) -> Callable[[], None]:
    """Kills the process at the given call of a function: before it, or after."""

    def patch() -> None:
        real, calls = getattr(owner, name), iter(range(10**6))

        def killing(*args, **kwargs):
            here = next(calls) == call
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, killing)

    return patch


def half_written(owner: object, call: int) -> Callable[[], None]:
    """Kills the process amid a file: half of it is written."""

    def patch() -> None:
        real, calls = owner.save_file, iter(range(10**6))

        def killing(tensors, path, **kwargs):
            real(tensors, path, **kwargs)
            if next(calls) == call:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        owner.save_file = killing

    return patch


KILLS = {
    "before saving": kill_at(checkpoint.CheckpointWriter, "save", 1),
    "amid the network": half_written(safetensors.torch, 2),
    "amid the average": half_written(safetensors.torch, 3),
    "before the optimiser": kill_at(checkpoint, "save_file", 1),
    "amid the optimiser": half_written(checkpoint, 1),
    "amid checksums": kill_at(files, "checksum", 12),
    "before a sync": kill_at(checkpoint, "sync", 18),
    "before the rename": kill_at(Path, "rename", 1),
    "after the rename": kill_at(Path, "rename", 1, after=True),
    "amid pruning": kill_at(shutil, "rmtree", 0),
    "between": kill_at(trainer, "stream_seed", 6),
    "between, later": kill_at(trainer, "stream_seed", 17),
}


def kill_in_phases(recipe: TrainConfig, phases: list[str], processes: int) -> None:
    """Weights, average, optimiser and log (each step once) of a run that was not killed; every checkpoint reads."""
    straight = replace(recipe, out=recipe.out.with_name("straight"))
    assert in_child(straight, processes=processes) == 0
    expected = everything(straight.out)
    for number, name in enumerate(phases):
        run = replace(recipe, out=recipe.out.with_name(f"killed-{number}"))
        assert in_child(run, KILLS[name], processes) == -signal.SIGKILL, name
        for folder in checkpoints(run.out):
            verify_checkpoint(folder)
        assert in_child(run, processes=processes) == 0, name
        assert_same(everything(run.out), expected)
        assert not list(run.out.glob(".step*")), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_in_any_phase_goes_on_bit_for_bit(processes, recipe):
    """Half of the phases each; `python tests/test_resume.py 100 FOLDER` has all of them for both."""
    kill_in_phases(recipe, list(KILLS)[processes - 1 :: 2], processes)


def soak(kills: int, out: Path, seed: int = 0) -> None:
    """Kills one run at random moments, again and again, until so many kills; then it must end as an undisturbed one."""
    recipe = TrainConfig(
        out=out / "straight", model="DiT-XS/8", steps=40 * kills, global_batch=32, lr=1e-3, ema_decay=(0.9,),
        log_every=3, checkpoint_every=10, sample_every=10**6, keep=2,
    )  # fmt: skip
    assert in_child(recipe) == 0
    expected, run, rng = everything(recipe.out), replace(recipe, out=out / "killed"), random.Random(seed)
    done = 0
    while done < kills:
        child = multiprocessing.get_context("fork").Process(target=train, args=(run,))
        child.start()
        child.join(rng.uniform(0.3, 2.5))
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        done += 1
        for folder in checkpoints(run.out):
            verify_checkpoint(folder)
    assert in_child(run) == 0
    assert_same(everything(run.out), expected)
    print(f"{done} kills, 0 unreadable checkpoints, the end bit for bit that of an undisturbed run")


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path):
    """A short soak; `python tests/test_resume.py 100 FOLDER` is the long one."""
    soak(3, tmp_path)


def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_offered(recipe):
    train(replace(recipe, steps=8))
    path = recipe.out / "step-00000008/ema/0.9/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    before = recipe.out / "step-00000004"
    with pytest.raises(ValueError, match=f"{path} is missing or damaged: --resume {before} goes on"):
        train(replace(recipe, steps=8))
    train(replace(recipe, steps=8, resume=str(before)))
    verify_checkpoint(recipe.out / "step-00000008")
    assert [path.name for path in recipe.out.glob("*.left")] == ["step-00000008.left"]


def test_resume_never_and_from_elsewhere(recipe, tmp_path):
    train(replace(recipe, steps=4, schedule="constant"))
    with pytest.raises(ValueError, match="resume is never, but .* has checkpoints"):
        train(replace(recipe, steps=4, schedule="constant", resume="never"))
    with pytest.raises(ValueError, match="resume must be auto, never or the folder of a checkpoint, got ./nowhere"):
        train(replace(recipe, steps=4, schedule="constant", resume="./nowhere"))
    other = replace(recipe, steps=4, schedule="constant", out=tmp_path / "other", lr=2e-3)
    with pytest.raises(ValueError, match="belongs to another recipe .lr 0.001 there, 0.002 here"):
        train(replace(other, resume=str(recipe.out / "step-00000004")))


def test_weights_to_begin_with_are_those_of_a_network_or_a_checkpoint(recipe, tmp_path):
    net = perturbed(MODELS["DiT-XS/8"](input_size=8, in_channels=1, num_classes=10))
    net.save_pretrained(tmp_path / "net")
    one = replace(recipe, steps=1, lr=1e-30, init_from=str(tmp_path / "net"))
    train(one)
    train(replace(one, out=tmp_path / "again", init_from=str(one.out / "step-00000001")))
    for out in (one.out, tmp_path / "again"):
        loaded = load_network(out / "step-00000001")  # the average, too, starts there
        for a, b in zip(loaded.parameters(), net.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    MODELS["DiT-XS/4"](input_size=8, in_channels=1, num_classes=10).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="init_from: .*larger has no weights for this network"):
        train(replace(one, out=tmp_path / "third", init_from=str(tmp_path / "larger")))


def test_two_runs_in_one_folder_are_refused(recipe):
    first = Trainer(recipe)
    with pytest.raises(
        ValueError, match=f"is in use by another run .process {os.getpid()} on .*: choose another --out"
    ):
        Trainer(replace(recipe, keep=7))
    assert json.loads((recipe.out / "recipe.json").read_text())["keep"] == 2
    del first
    train(replace(recipe, steps=STEPS))


def test_folder_that_cannot_be_written_is_refused(recipe):
    with pytest.raises((ValueError, OSError), match="/proc/run"):
        train(replace(recipe, out=Path("/proc/run")))


def test_training_goes_on_while_a_checkpoint_is_written(recipe, monkeypatch):
    """The first checksum waits for two further steps; what is written is of the step that was to be saved."""
    straight = replace(recipe, out=recipe.out.with_name("straight"))
    train(straight)
    AcceleratorState._reset_state(reset_partial_state=True)
    later, real_checksum, real_step = threading.Event(), files.checksum, Trainer.after_step

    def checksum(path):
        assert later.wait(timeout=60), "training waits for the checkpoint"
        return real_checksum(path)

    def after_step(self):
        stop = real_step(self)
        if self.step == EVERY + 2:
            later.set()
        return stop

    monkeypatch.setattr(files, "checksum", checksum)
    monkeypatch.setattr(Trainer, "after_step", after_step)
    train(replace(recipe, keep=9))
    assert_same(everything(straight.out), everything(recipe.out))
    expected = load_file(straight.out / "step-00000016/model/diffusion_pytorch_model.safetensors")
    found = load_file(recipe.out / "step-00000016/model/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_full_disk_while_saving_is_said_and_the_run_goes_on(recipe, capfd):
    """A small disk in memory with room for one checkpoint and a half: the first stays, the run ends with an error."""
    with small_disk(recipe.out, "7m"):
        real = shutil.disk_usage
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda path: real("/"))  # the preflight would refuse it
            with pytest.raises(SystemExit, match=str(FAILED)):
                train(replace(recipe, steps=12))
        shown = capfd.readouterr().err
        assert "the last step could not be saved: make room" in shown
        assert "step-00000008 could not be saved, the older checkpoints stay: " in shown and "No space left" in shown
        assert [path.name for path in checkpoints(recipe.out)] == ["step-00000004"]
        verify_checkpoint(recipe.out / "step-00000004")
        assert read_log(recipe.out / "log.jsonl")[-1]["step"] == 12
        assert not list(recipe.out.glob(".step*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_the_step_and_leaves_with_its_code(number, recipe):
    long = replace(recipe, steps=100_000, checkpoint_every=100_000, schedule="constant", log_every=1)
    child = multiprocessing.get_context("fork").Process(target=train, args=(long,))
    child.start()
    while child.is_alive() and not (long.out / "log.jsonl").exists():
        time.sleep(0.02)
    os.kill(child.pid, number)
    child.join(30)
    assert child.exitcode == STOPPED
    (folder,) = checkpoints(long.out)
    assert read_log(long.out / "log.jsonl")[-1]["step"] == json.loads((folder / "step.json").read_text())["step"]


def plant(value: float, first: int, last: int) -> Callable[[], None]:
    """Multiplies the data of these micro-steps."""

    def patch() -> None:
        from meanflow.data.loader import SlotData

        real, calls = SlotData.__getitems__, iter(range(10**6))

        def planted(self, batch):
            batch = real(self, batch)
            return batch._replace(x=batch.x * value) if first <= next(calls) <= last else batch

        SlotData.__getitems__ = planted

    return patch


def test_step_whose_gradient_is_not_finite_is_skipped(recipe, capfd):
    """Weights and Adam's state stay, and it is saved only where it is the last one; the run goes on."""
    short = replace(recipe, steps=4, checkpoint_every=1, keep=9, log_every=1)
    assert in_child(short, plant(float("nan"), 2, 2)) == 0
    assert [int(path.name[5:]) for path in checkpoints(short.out)] == [1, 2, 4]
    assert "step 3 is not saved, since it was skipped" in capfd.readouterr().err
    ended = replace(short, out=recipe.out.with_name("ended"), steps=3, schedule="constant")
    assert in_child(ended, plant(float("nan"), 2, 2)) == 0
    folders = [ended.out / f"step-{n:08d}" for n in (1, 2, 3)]
    states = [load_file(folder / "optimizer.safetensors") for folder in folders]
    for name, value in states[1].items():
        assert torch.equal(value, states[2][name])
        assert not name.endswith(".step") or not torch.equal(value, states[0][name])
    before, after = (load_file(folder / "model/diffusion_pytorch_model.safetensors") for folder in folders[1:])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "a gradient was not finite: step skipped, 1 in a row, 1 in all" in capfd.readouterr().err
    assert json.loads((short.out / "step-00000004/step.json").read_text())["skipped_steps"] == 1


def test_gradients_that_stay_not_finite_halt_the_run_with_the_last_good_checkpoint(recipe, capfd):
    run = replace(recipe, max_skipped=3)
    assert in_child(run, plant(float("nan"), 6, 99)) == DIVERGED
    assert "3 steps in a row had gradients that are not finite: lower --lr" in capfd.readouterr().err
    assert [path.name for path in checkpoints(run.out)] == ["step-00000004"]  # step 8 was skipped
    net = load_network(run.out / "step-00000004")
    assert all(p.isfinite().all() for p in net.parameters())


def test_diverging_raw_loss_warns_and_halts(recipe, capfd):
    """The adaptive loss stays near 1 meanwhile."""
    run = replace(recipe, grace_steps=5, objective=MeanFlowConfig(class_dropout_prob=0.0))
    assert in_child(run, plant(5.0, 8, 8)) == 0
    assert "warning: raw loss " in capfd.readouterr().err
    run = replace(run, out=run.out.with_name("halted"))
    assert in_child(run, plant(50.0, 8, 99)) == DIVERGED
    shown = capfd.readouterr().err
    assert "times its running level" in shown and "lower --lr" in shown
    assert [path.name for path in checkpoints(run.out)] == ["step-00000004", "step-00000008"]


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    for processes in (1, 2):
        kill_in_phases(short_recipe(folder / f"{processes}" / "run"), list(KILLS), processes)
        print(f"{processes} processes killed in {len(KILLS)} phases: the end bit for bit that of an undisturbed run")
    soak(int(sys.argv[1]), folder)
