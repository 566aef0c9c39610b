"""tools/launch.py, with real processes: what is started again, what is not, and that nothing is left."""

import os
import random
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_distributed import DIGITS, ENVIRONMENT, ONE, ROOT, finish, start
from test_resume import assert_same, everything

from launch import Options
from launchers import rented
from launchers.run import Run
from meanflow.config import TrainConfig
from meanflow.files import read_json
from meanflow.program import END, REFUSED
from meanflow.publishing.checkpoints import checkpoints, verify_checkpoint
from meanflow.training.guard import DIVERGED, STOPPED

LAUNCH = [sys.executable, "tools/launch.py"]
ON_CPU = ["--config-file", "accelerate_configs/cpu.yaml", "--delay", "0"]
RUN = [*DIGITS, "--log-every", "3", "--checkpoint-every", "10", "--sample-every", "100000", "--ema-decay", "0.9"]


def launch(*flags: str, code: int = 0, env: dict | None = None) -> str:
    shown = subprocess.run(
        [*LAUNCH, *flags], cwd=ROOT, env=env or ENVIRONMENT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert shown.returncode == code, shown.stdout + shown.stderr
    assert "Traceback (most recent call last)" not in shown.stderr
    return shown.stdout + shown.stderr


def wait_for(happens, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def kill(run: Run, rng: random.Random) -> None:
    """Kills what trains, its launcher, or all of the run's processes, by SIGKILL."""
    living = run.processes()
    for process in rng.choice([living[:1], living[1:2] or living, living]):
        process.kill()
    wait_for(lambda: not any(process.is_running() for process in living))


@pytest.mark.slow
def test_a_run_and_its_launcher_that_are_killed_end_as_an_undisturbed_one(tmp_path):
    """Ten kills of the run at random moments, some amid its start, and two of the launcher, which follows it again."""
    kills, rng = 10, random.Random(0)
    steps = ["--steps", str(30 * kills)]
    finish(start(*ONE, *RUN, *steps, "--out", str(tmp_path / "straight")))
    command = [*RUN, *steps, *ON_CPU, "--retries", "15", "--out", str(tmp_path / "killed"), "--detach"]
    run = Run(tmp_path / "killed")
    launch(*command)
    for number in range(kills):
        wait_for(lambda count=number + 1: len(run.read_state().get("starts", [])) == count and run.processes())
        begun = run.read_state()["starts"][-1]["from"]
        if number in (3, 7):
            run.launcher().kill()
            wait_for(lambda: run.launcher() is None)
            time.sleep(rng.uniform(0, 2))
            assert "followed by process" in launch(*command)
        if number % 3 == 2:
            time.sleep(rng.uniform(0, 2))
        else:
            wait_for(lambda begun=begun: run.step() > begun)
            time.sleep(rng.uniform(0, 0.5))
        kill(run, rng)
    wait_for(lambda: run.launcher() is None)
    assert run.read_state()["ended"]["code"] == 0 and len(run.read_state()["starts"]) == kills + 1
    assert not run.processes()
    for folder in checkpoints(run.out):
        verify_checkpoint(folder)
    assert_same(everything(run.out), everything(tmp_path / "straight"))
    assert "finished at step 300" in launch("status", str(run.out))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--lr", "1000", "--grace-steps", "2", "--halt-at", "3", "--warn-at", "2"], DIVERGED, "diverged: "),
        (["--lr", "-1"], REFUSED, "refused: lr must be > 0, got -1.0"),
        (["--learning-rate", "1"], REFUSED, "refused: the command line cannot be read"),
    ],
)
def test_a_divergence_and_a_refusal_are_started_once(flags, code, words, tmp_path):
    out = tmp_path / "run"
    said = launch(*RUN, "--steps", "200", *flags, *ON_CPU, "--out", str(out), code=code)
    state = Run(out).read_state()
    assert words in said and len(state["starts"]) == 1 and state["ended"]["code"] == code


@pytest.mark.slow
def test_stop_leaves_a_checkpoint_and_no_process_and_the_same_command_goes_on(tmp_path):
    run = Run(tmp_path / "run")
    command = [*RUN, "--steps", "100000", *ON_CPU, "--out", str(run.out)]
    launch(*command, "--detach")
    wait_for(lambda: run.step() > 0)
    assert "is followed already" in launch(*command, code=2)
    assert "processes live; followed by process" in launch("status", str(run.out))
    said = launch("stop", str(run.out))
    assert "stopped at step" in said and not run.processes() and run.launcher() is None
    step = run.step()
    assert checkpoints(run.out)[-1].name == f"step-{step:08d}" and run.read_state()["ended"]["code"] == STOPPED
    assert "a signal asked to stop" in launch("logs", str(run.out))
    assert "no process lives" in launch("stop", str(run.out))

    launch(*command, "--detach")
    wait_for(lambda: run.step() > step)
    run.launcher().kill()
    wait_for(lambda: run.launcher() is None)
    other = [*RUN, "--steps", "7", *ON_CPU, "--out", str(run.out)]
    assert "a run with other flags lives in" in launch(*other, code=2)
    assert "not followed: the same command follows it again" in launch("status", str(run.out))
    assert "stopped at step" in launch("stop", str(run.out)) and not run.processes()
    assert "stopped at step" in launch("status", str(run.out))
    assert checkpoints(run.out)[-1].name == f"step-{run.step():08d}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_wish_to_stop_that_comes_while_the_run_begins_is_not_lost(processes, tmp_path):
    """Before the processes that train are there; and with two, which the launcher of torch starts."""
    run = Run(tmp_path / "run")
    config = ["--config-file", f"accelerate_configs/cpu{'_2proc' if processes == 2 else ''}.yaml", "--delay", "0"]
    command = [*RUN, "--steps", "100000", *config, "--out", str(run.out)]
    for delay in (0, 1, 3):
        launch(*command, "--detach")
        wait_for(run.processes)
        time.sleep(delay)
        begin = time.monotonic()
        launch("stop", str(run.out))
        assert time.monotonic() < begin + 40 and not run.processes() and run.launcher() is None
        assert run.read_state()["ended"]["code"] == STOPPED


@pytest.mark.slow
def test_two_processes_are_stopped_and_killed_and_go_on(tmp_path):
    run = Run(tmp_path / "run")
    command = [*RUN, "--steps", "100000", "--config-file", "accelerate_configs/cpu_2proc.yaml", "--delay", "0"]
    command += ["--num-processes", "2", "--out", str(run.out)]
    launch(*command, "--detach")
    wait_for(lambda: run.step() > 0)
    step = run.step()
    run.processes()[-1].kill()
    wait_for(lambda: len(run.read_state()["starts"]) == 2 and run.step() > step)
    launch("stop", str(run.out))
    assert checkpoints(run.out)[-1].name == f"step-{run.step():08d}" and not run.processes()


@pytest.mark.slow
def test_a_program_that_notes_no_end_is_known_by_its_exit_code(tmp_path):
    (tmp_path / "own.py").write_text("print('done')\n")
    said = launch(str(tmp_path / "own.py"), *ON_CPU, "--out", str(tmp_path / "run"))
    assert "finished" in said and len(Run(tmp_path / "run").read_state()["starts"]) == 1


@pytest.mark.slow
def test_hours_end_a_run_with_a_checkpoint(tmp_path):
    out = tmp_path / "run"
    said = launch(*RUN, "--steps", "100000", *ON_CPU, "--hours", "0.004", "--out", str(out), code=STOPPED)
    assert "the same command goes on" in said and checkpoints(out)


@pytest.mark.slow
def test_a_recipe_that_makes_no_progress_is_given_up(tmp_path):
    recipe = tmp_path / "broken.py"
    recipe.write_text("raise OSError('out of order')\n")
    out = tmp_path / "run"
    said = launch(str(recipe), *ON_CPU, "--out", str(out), code=1)
    assert "given up, since 2 restarts made no step of progress" in said
    assert len(Run(out).read_state()["starts"]) == 3
    assert "given up after 1 restarts" in launch(str(recipe), *ON_CPU, "--retries", "1", "--out", str(out), code=1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere.py"], "recipe must be a file, or status, logs or stop, got nowhere.py"),
        (["status", "nowhere"], "nowhere is not there, or was not started by tools/launch.py"),
        (["recipes/digits_dit.py", "--out", "tests/saved/export"], "is a checkpoint or an exported model"),
        (["recipes/digits_dit.py", "--retries", "-1"], "retries must be >= 0, got -1"),
        (["recipes/digits_dit.py", "--hours", "0"], "hours must be > 0"),
        (["recipes/digits_dit.py", "--out"], "out must be a folder, got nothing"),
        (["recipes/digits_dit.py", "--out", "README.md"], "out must be a folder, got "),
        (["recipes/deterministic.py", "--on", "slurm"], "sbatch is not here"),
        (["tools/toy2d_report.py"], "does not say its folder by RECIPE.out"),
        (
            ["recipes/digits_dit.py", "--on", "modal", "--gpu", "ABACUS"],
            "gpu must be such as H100 or H100:8, got ABACUS",
        ),
        (["recipes/digits_dit.py", "--on", "modal", "--hours", "48"], "hours must be at most 24"),
        (["recipes/digits_dit.py", "--on", "modal", "--gpu", "T4"], "modal: Token missing"),
        (["recipes/digits_dit.py", "--on", "slurm", "--retries", "9"], "retries and delay must be left out"),
        (["recipes/digits_dit.py", "--on", "slurm", "--num-processes", "2"], "must be left out without --on local"),
        (["recipes/digits_dit.py", "--resume", "never"], "--resume cannot be given to the launcher"),
        (["recipes/digits_dit.py", "--smoke"], "--smoke cannot be given to the launcher"),
        (["recipes/digits_dit.py", "--dry-run"], "--dry-run cannot be given to the launcher"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message):
    assert message in launch(*flags, code=2)


def test_slurm_gets_the_script_with_the_recipe_and_its_flags(tmp_path):
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "got: $@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    there = {**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = launch("recipes/imagenet_ditxl.py", "--on", "slurm", "--hours", "12", "--lr", "1e-3", env=there)
    script = ROOT / "accelerate_configs/slurm.sbatch"
    assert f"got: --time=720 {script} recipes/imagenet_ditxl.py --lr 1e-3 --out runs/ditxl" in said


def test_modal_gets_an_app_with_the_options():
    """The app object; the service itself was not tried."""
    pytest.importorskip("modal")
    options = {"gpu": "H100:4", "hours": 12.0, "retries": 5, "delay": 30.0, "verify": False}
    options = SimpleNamespace(recipe=Path("recipes/digits_dit.py"), **options)
    app, function = rented.make_app(options, Path("runs/digits"))
    assert app.name == "meanflow-digits"
    spec = function._spec_  # Modal has no public name for it
    assert spec.gpus == "H100:4" and set(spec.volumes) == {"/runs", "/cache"}
    there = rented.command(options, Path("runs/digits"), ["--lr", "1e-3", "--out", "runs/digits"])
    assert there[:3] == ["python", "tools/launch.py", "recipes/digits_dit.py"]
    assert there[-4:] == ["--out", "/runs/digits", "--lr", "1e-3"]
    assert " ".join(there[3:9]) == "--config-file accelerate_configs/multi_gpu.yaml --num-processes 4 --hours 11.64"
    tried = rented.command(SimpleNamespace(**{**vars(options), "verify": True}), Path("x"), [])
    assert tried == ["python", "recipes/digits_dit.py", "--smoke", "--out", "/runs/try"]


def test_the_container_returns_what_is_not_to_be_tried_again(tmp_path):
    train = rented.make_train(str(tmp_path))
    decided = [0, 1, REFUSED, DIVERGED, STOPPED]
    assert [train(["sh", "-c", f"exit {code}"]) for code in decided] == decided
    with pytest.raises(RuntimeError, match="ended with code -9"):
        train(["sh", "-c", "kill -9 $$"])


def test_the_launcher_and_recipes_share_only_the_flag_that_is_off_by_default():
    shared = {field.name for field in fields(Options)} & {field.name for field in fields(TrainConfig)}
    assert shared == {"verify"}  # of which recipes know --no-verify, and the launcher does not
    assert "no-verify" not in launch("--help")


def test_a_refusal_is_noted_where_the_launcher_looks(tool, tmp_path, monkeypatch):
    monkeypatch.setenv(END, str(tmp_path / "end.json"))
    tool("recipes/digits_dit", "--model", "DiT-XS/3", "--out", tmp_path / "run")
    end = read_json(tmp_path / "end.json")
    assert end["code"] == REFUSED and end["reason"].startswith("model must be one of") and end["step"] is None
    assert not (tmp_path / "run").exists()
