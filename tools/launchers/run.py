"""A run of tools/launch.py as it can be seen from outside: its processes, its steps, its log."""

import json
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from meanflow.files import ensure, read_json
from meanflow.program import END


class Run:
    """What can be seen of a run from outside. Its folder need not be there."""

    def __init__(self, out: Path):
        self.out = out.expanduser().resolve()
        self.folder = self.out / ".launch"
        self.end, self.log, self.state = (self.folder / name for name in ("end.json", "log.txt", "state.json"))

    def processes(self) -> list[psutil.Process]:
        """All that live, `accelerate launch` first."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has ended, or is another user's
                is_dead = process.status() == psutil.STATUS_ZOMBIE
                if not is_dead and process.environ().get(END) == str(self.end):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def ask_to_stop(self, asked: set[int]) -> None:
        """Sends SIGTERM to the processes that train, once to each: accelerate launch does not pass it on.

        Args:
            asked: those that have got it; it grows. Some may begin later than the wish to stop.
        """
        living = self.processes()
        known = {process.pid for process in living}
        for process in living:
            with suppress(psutil.Error):
                is_launcher = "accelerate.commands.launch" in " ".join(process.cmdline())
                has_launcher = process.ppid() in known and is_launching(process.parent())
                trains = not is_launcher and (has_launcher or process.ppid() not in known)
                if trains and process.pid not in asked:
                    asked.add(process.pid)
                    process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def step(self) -> int:
        """The furthest step that is saved or logged."""
        saved = [int(path.name[5:]) for path in self.out.glob("step-" + "[0-9]" * 8)]
        lines = (self.out / "log.jsonl").read_text().splitlines() if (self.out / "log.jsonl").exists() else []
        logged = 0
        for line in lines[-3:]:
            with suppress(ValueError):  # the line is being written
                logged = json.loads(line).get("step", logged)
        return max([0, logged, *saved])

    def read_state(self) -> dict:
        return read_json(self.state) if self.state.exists() else {}

    def launcher(self) -> psutil.Process | None:
        """The process that follows the run, if it lives."""
        state = self.read_state()
        with suppress(psutil.Error, KeyError):
            process = psutil.Process(state["launcher"])
            is_it = abs(process.create_time() - state["launcher_began"]) < 2  # and no later process of this number
            if is_it and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


def is_launching(process: psutil.Process | None) -> bool:
    return process is not None and "accelerate.commands.launch" in " ".join(process.cmdline())


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def show_from(log: Path, place: int) -> int:
    """Prints a file from this byte on, and returns where it ended."""
    with log.open("rb") as file:
        file.seek(place)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return place + len(text)


def known_run(out: Path) -> Run:
    run = Run(out)
    ensure(run.state.exists(), f"{out} is not there, or was not started by tools/launch.py")
    return run
