"""A launcher that dies takes its processes along, and the next start goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_distributed import DIGITS, ENVIRONMENT, ONE, ROOT, TWO, finish, start
from test_resume import assert_same, everything

from meanflow.publishing.checkpoints import checkpoints, verify_checkpoint

LAUNCHES = {1: ONE, 2: TWO}
RUN = [*DIGITS, "--log-every", "3", "--checkpoint-every", "10", "--sample-every", "100000", "--ema-decay", "0.9"]


def processes_of(out: Path) -> list[psutil.Process]:
    """The processes whose command line names this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def kill_launcher(command: list[str], out: Path, number: int, delay: float) -> float:
    """Starts the run, sends the launcher a signal after a delay, and returns how long the last process then lived."""
    with open(os.devnull, "w") as nowhere:
        launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=nowhere, stderr=nowhere)
    time.sleep(delay)
    launcher.send_signal(number)
    begin = time.monotonic()
    while time.monotonic() < begin + 30 and (launcher.poll() is None or processes_of(out)):
        time.sleep(0.05)
    left = processes_of(out)
    for process in left:
        process.kill()
    assert not left, f"{len(left)} processes are left {delay:.2f} s after the start"
    return time.monotonic() - begin


def kill_launchers(kills: int, out: Path, processes: int, seed: int = 0) -> None:
    """Kills the launcher of one run at random moments, its start included, by two signals in turn.

    Then the run must end as an undisturbed one.
    """
    rng, straight, run = random.Random(seed), out / "straight", out / "killed"
    steps = ["--steps", str(60 + 20 * kills)]
    begin = time.monotonic()
    finish(start(*LAUNCHES[processes], *RUN, *steps, "--out", str(straight)))
    whole = time.monotonic() - begin
    for kill in range(kills):
        number = (signal.SIGKILL, signal.SIGTERM)[kill % 2]
        delay = rng.uniform(0, min(15, 0.9 * whole))
        lived = kill_launcher([*LAUNCHES[processes], *RUN, *steps, "--out", str(run)], run, number, delay)
        for folder in checkpoints(run):
            verify_checkpoint(folder)
        words = f"ended in {lived:.1f} s, {len(checkpoints(run))} checkpoints"
        print(f"{number.name} after {delay:.2f} s: {words}", flush=True)
    finish(start(*LAUNCHES[processes], *RUN, *steps, "--out", str(run)))
    assert_same(everything(run), everything(straight))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_launcher_that_dies_takes_its_processes_along(processes, tmp_path):
    """A few times; `python tests/test_launcher.py 20 FOLDER` does so 20 times for each signal."""
    kill_launchers(4, tmp_path, processes)


if __name__ == "__main__":
    for processes in (1, 2):
        kill_launchers(2 * int(sys.argv[1]), Path(sys.argv[2]) / f"{processes}", processes)
        print(f"{processes} processes: {sys.argv[1]} kills by each signal, none left, the end bit for bit undisturbed")
