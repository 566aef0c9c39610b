"""A run on this machine: started, followed, and started again.

The launcher is one process, and `accelerate launch` another, in a session of its own: the launcher may be killed, and a
later one follows the run that still lives. A run is found by a variable of its environment, which all of its processes
have. What the launcher knows is in the folder .launch of the run.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from launchers.run import Run, known_run, lives, show_from
from meanflow.config import check
from meanflow.files import ensure, read_json, write_json
from meanflow.program import END, REFUSED

# Exit codes of a run, of meanflow/training/guard.py, which imports torch.
DIVERGED, STOPPED, GAVE_UP = 3, 75, 1
FINAL = {0: "finished", REFUSED: "refused", DIVERGED: "diverged"}
DETACHED = "MEANFLOW_DETACHED"  # the environment variable of a launcher that nobody watches
PATIENCE = 600  # seconds in which processes may save and leave, before they are killed
IDLE = 2  # restarts without a step of progress, after which the launcher gives up


def launch(options, out: Path, flags: list[str]) -> int:
    """Starts the launcher, here or detached, and returns its exit code.

    Raises:
        Refusal: another launcher follows this run, or a run with other flags lives in the folder.
    """
    run = Run(out)
    config = ["--config_file", str(options.config_file)] if options.config_file else []
    config += ["--num_processes", str(options.num_processes)] if options.num_processes else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", *config, str(options.recipe), *flags]
    check(not run.out.exists() or run.out.is_dir(), "out", run.out, "a folder")
    is_model = any((run.out / name).exists() for name in ("model_index.json", "step.json"))
    ensure(not is_model, f"out: {out} is a checkpoint or an exported model: choose the folder of a run")
    other = run.launcher()
    followed = f"python tools/launch.py status {out}"
    ensure(other is None, f"{out} is followed already, by process {other and other.pid}: {followed}")
    same = run.read_state().get("command") == command
    ensure(same or not run.processes(), f"a run with other flags lives in {out}: python tools/launch.py stop {out}")
    run.folder.mkdir(parents=True, exist_ok=True)
    if not options.detach:
        return Launcher(run, command, options).follow()
    arguments = [argument for argument in sys.argv if argument != "--detach"]
    with (run.folder / "launcher.txt").open("a") as log:
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, DETACHED: "1"}, **how)
    while process.poll() is None and run.launcher() is None:
        time.sleep(0.05)
    if process.poll():
        print((run.folder / "launcher.txt").read_text().strip().splitlines()[-1], file=sys.stderr)
        return process.returncode
    print(f"{out}: followed by process {process.pid}: python tools/launch.py status {out}; or logs, or stop")
    return 0


class Launcher:
    """Follows one run to its end."""

    def __init__(self, run: Run, command: list[str], options):
        self.run, self.command, self.options = run, command, options
        self.lock = FileLock(run.folder / "lock", timeout=0)
        self.is_asked_to_stop = False
        self.child = None  # `accelerate launch`, if this launcher started it
        self.is_shown = False  # whether the run's output is shown here
        self.place = 0  # in the log, up to where it was shown

    def follow(self) -> int:
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"{self.run.out} is followed already, by another launcher") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # which network file systems without locks give
                raise
            print(f"warning: {self.run.folder} cannot be locked: see that only one launcher follows it")
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGINT)):
            signal.signal(number, self.receive)
        known = self.run.read_state() if self.run.processes() else {}
        self.state = {"starts": [], "began": time.time(), **known, "command": self.command, "ended": None}
        self.state |= {"launcher": os.getpid(), "launcher_began": psutil.Process().create_time()}
        self.place = self.run.log.stat().st_size if self.run.log.exists() else 0
        self.is_shown = DETACHED not in os.environ
        self.save()
        code, reason = self.follow_to_end()
        self.state["ended"] = {"code": code, "reason": reason, "at": time.time()}
        self.save()
        self.say(f"{self.run.out}: {reason}")
        return code

    def follow_to_end(self) -> tuple[int, str]:
        """Returns the exit code, and why the run is not started again."""
        while True:
            if not self.run.processes():
                if self.is_asked_to_stop or self.is_late():
                    return STOPPED, f"stopped at step {self.run.step():,}; the same command goes on"
                self.start()
            elif not self.state["starts"]:  # what was known of the run is lost
                self.state["starts"].append({"from": self.run.step(), "began": time.time()})
            self.wait()
            code, why = self.read_end()
            if code is None and self.is_asked_to_stop:
                why = "it was stopped before it could save"
            start, step = self.state["starts"][-1], self.run.step()
            start |= {"code": code, "reason": why, "step": step, "ended": time.time()}
            self.save()
            if code in FINAL:
                return code, f"{FINAL[code]} at step {step:,}" if code == 0 else f"{FINAL[code]}: {why}"
            if self.is_asked_to_stop:
                return STOPPED, f"stopped at step {step:,}; the same command goes on"
            restarts = self.state["starts"][1:]
            idle = [restart for restart in restarts[-IDLE:] if restart["step"] <= restart["from"]]
            if len(idle) == IDLE:
                return GAVE_UP, f"given up, since {IDLE} restarts made no step of progress: {why}"
            if len(restarts) >= self.options.retries:
                return GAVE_UP, f"given up after {len(restarts)} restarts: {why}"
            self.say(f"{self.run.out}: {why}, at step {step:,}: again in {self.options.delay:g} s")
            self.pause(self.options.delay)

    def read_end(self) -> tuple[int | None, str]:
        """The code and the reason that the run noted, or what can be known of one that did not."""
        if self.run.end.exists():
            end = read_json(self.run.end)
            return end["code"], end["reason"]
        code = self.child.poll() if self.child else None
        return (0, "finished") if code == 0 else (None, "it crashed, or its processes were killed")

    def start(self) -> None:
        self.run.end.unlink(missing_ok=True)
        furthest = max([self.run.step(), *(start["step"] for start in self.state["starts"])])
        self.state["starts"].append({"from": furthest, "began": time.time()})
        self.save()
        environment = {**os.environ, END: str(self.run.end)}
        with self.run.log.open("a") as log:
            how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self.child = subprocess.Popen(self.command, env=environment, **how)

    def wait(self) -> None:
        """Until no process of the run lives.

        What lives PATIENCE seconds after `accelerate launch` has ended, or after it was asked to stop, is killed.
        """
        head, asked, leaving = self.run.processes()[:1], set(), None
        while True:
            has_head = any(map(lives, head))
            self.show()
            if not has_head and not self.run.processes():
                return
            self.is_asked_to_stop |= self.is_late()
            if self.is_asked_to_stop:
                self.run.ask_to_stop(asked)
            if self.is_asked_to_stop or not has_head:
                leaving = leaving or time.monotonic()
                if time.monotonic() > leaving + PATIENCE:
                    self.run.kill()
            time.sleep(0.2)

    def is_late(self) -> bool:
        hours = self.options.hours
        return hours is not None and time.time() > self.state["began"] + 3600 * hours

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.is_asked_to_stop:
            time.sleep(0.1)

    def receive(self, number: int, _) -> None:
        self.is_asked_to_stop = True

    def save(self) -> None:
        write_json(self.run.state, self.state)

    def say(self, words: str) -> None:
        stamp = datetime.now().isoformat(" ", "seconds")
        with self.run.log.open("a") as log:
            log.write(f"\n[{stamp}] {words}\n")
        self.show()
        if not self.is_shown:
            print(words, flush=True)

    def show(self) -> None:
        if self.is_shown and self.run.log.exists():
            self.place = show_from(self.run.log, self.place)


def status(out: Path) -> int:
    """Prints how a run is doing."""
    run = known_run(out)
    state, launcher, living = run.read_state(), run.launcher(), run.processes()
    ended = state["ended"]
    followed = f"followed by process {launcher.pid}" if launcher else "not followed: the same command follows it again"
    alive = f"{len(living)} processes live" if living else "no process lives"
    now = ended["reason"] if ended else f"{alive}; {followed}"
    print(f"{out}: saved or logged up to step {run.step():,}; {now}")
    for number, start in enumerate(state["starts"]):
        began = datetime.fromtimestamp(start["began"]).isoformat(" ", "seconds")
        end = f"to step {start['step']:,}: {start['reason']}" if "ended" in start else "so far"
        print(f"  {'start' if number == 0 else f'restart {number}':10} {began}  from step {start['from']:,} {end}")
    return 0


def logs(out: Path, follow: bool = False) -> int:
    """Prints what the run printed."""
    run = known_run(out)
    place = 0
    while True:
        launcher = run.launcher()
        place = show_from(run.log, place) if run.log.exists() else 0
        if not follow or launcher is None:
            return 0
        time.sleep(0.3)


def stop(out: Path) -> int:
    """Stops a run with a checkpoint, and waits until no process is left."""
    run = known_run(out)
    launcher = run.launcher()
    if launcher is None and not run.processes():
        print(f"{out}: no process lives, step {run.step():,}")
        return 0
    if launcher is not None:
        with suppress(psutil.Error):  # it has just ended
            launcher.send_signal(signal.SIGTERM)
    begin, asked = time.monotonic(), set()
    while run.launcher() is not None or run.processes():
        if run.launcher() is None:
            run.ask_to_stop(asked)
        if time.monotonic() > begin + PATIENCE + 10:  # a launcher that lives kills them earlier
            run.kill()
        time.sleep(0.2)
    words = f"stopped at step {run.step():,}; the same command goes on"
    if launcher is None:  # which would have noted it
        write_json(run.state, run.read_state() | {"ended": {"code": STOPPED, "reason": words, "at": time.time()}})
    print(f"{out}: {words}")
    return 0
