"""What every program here does: it ends with its launcher, and refuses bad input in one line."""

import ctypes
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

from meanflow.config import Refusal, check
from meanflow.files import write_json

REFUSED, INTERRUPTED = 2, 128 + signal.SIGINT  # exit codes
END = "MEANFLOW_END"  # the environment variable with the file in which a run notes how it ended, for its launcher
LAUNCHERS = r"accelerate launch|accelerate\.commands|torchrun|torch\.distributed"  # words of their command lines
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Shared(Refusal):
    """A refusal that every process raises, and of which the first one speaks."""


def environment_number(name: str, default: int) -> int:
    """An environment variable that a launcher sets.

    Raises:
        ValueError: it is no whole number.
    """
    value = os.environ.get(name, str(default))
    check(value.isdecimal(), f"the environment variable {name}", value, "a whole number")
    return int(value)


def speaks_first() -> bool:
    """Whether this process speaks for all that torch's launcher started, or was not started by it."""
    return os.environ.get("RANK", "0") == "0" or "TORCHELASTIC_RUN_ID" not in os.environ


def note_end(code: int, reason: str, step: int | None = None) -> None:
    """Tells the launcher, if there is one that asks, how this run ended, also where it has no folder yet."""
    if os.environ.get(END):
        with suppress(OSError):
            write_json(Path(os.environ[END]), {"code": code, "reason": reason, "step": step})


def find_launcher():
    """The launcher that started this process, as a psutil.Process; None if none did.

    Raises:
        SystemExit: it has died.
    """
    import psutil

    if not {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
        return None
    parent = psutil.Process(os.getppid())
    if re.search(LAUNCHERS, " ".join(parent.cmdline())):
        return parent
    if parent.pid == 1 or parent.name() == "systemd":  # which adopts the processes of a launcher that has died
        sys.exit("error: the launcher of this process has died")
    return None


def end_with_launcher() -> None:
    """Makes the death of this process's launcher a SIGTERM to it; without a launcher, does nothing.

    Otherwise a process that waits for the others would wait for ever, and keep its memory.
    """
    launcher = find_launcher()
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        find_launcher()  # it may have died just before
    elif launcher:
        threading.Thread(target=end_after, args=(launcher,), daemon=True).start()


def end_after(launcher) -> None:
    launcher.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def read_flags(kind: type, default=None, others: bool = False):
    """A dataclass of this kind from the command line; by default its fields are those of `default`.

    Args:
        others: let unknown flags be, and return them, too, as a list.
    Raises:
        Refusal: a field is out of range.
        SystemExit: the command line cannot be read, or asks for help.
    """
    import tyro

    about = {"description": sys.modules["__main__"].__doc__, "console_outputs": speaks_first()}
    given = {} if default is None else {"default": default}
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(kind, **given, **about, return_unknown_args=others)
    except SystemExit as end:
        cause = end
        while cause is not None and not isinstance(cause, Refusal):
            cause = cause.__context__
        if cause is not None:
            raise Shared(str(cause)) from None
        print(box.getvalue(), end="", file=sys.stderr)
        raise


class Unheard:
    """A stream that goes on when nobody reads it any more, such as after `| head`, or when it is closed."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self) -> None:
        self.write("")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def unheard() -> Iterator[None]:
    """What is printed inside never ends the program."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Unheard, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


@contextmanager
def refusals() -> Iterator[None]:
    """Ends the program with one line and code 2 where what is inside refuses its input.

    torch's launcher would report each of several processes in some 40 lines: the one that speaks ends it, and its death
    ends the others.
    """
    try:
        with unheard():
            yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as end:  # tyro has spoken
        if end.code != REFUSED:
            raise
        speaks, reason = speaks_first(), "the command line cannot be read"
    except (ValueError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        speaks, reason = speaks_first() or not isinstance(error, Shared), str(error) or "out of memory"
        if speaks:
            print(f"error: {reason}", file=sys.stderr, flush=True)
    else:
        return
    if speaks:
        note_end(REFUSED, reason)
    launcher = find_launcher() if "TORCHELASTIC_RUN_ID" in os.environ and os.name != "nt" else None
    if launcher and speaks:
        launcher.send_signal(signal.SIGUSR2)
    elif launcher:
        time.sleep(5)  # until its death ends this process
    sys.exit(REFUSED)
