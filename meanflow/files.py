"""Files that are whole or not there, and errors in one line."""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meanflow.config import Refusal, check


def ensure(ok: bool, words: str) -> None:
    """Refuses an input that is not ok, with these words."""
    if not ok:
        raise Refusal(words)


def read_json(path: Path, **kinds: type) -> dict:
    """The JSON object in a file.

    Args:
        kinds: names that it must have, each with the type of its value.
    Raises:
        Refusal: the file is missing, holds no JSON object, or lacks a name; the message names the file.
    """
    with errors_as(f"{path} is missing or damaged"):
        fields = json.loads(path.read_text())
        ensure(isinstance(fields, dict), f"{path} is damaged: it holds no JSON object")
        for name, kind in kinds.items():
            value = fields.get(name)
            check(type(value) is kind, f"{path} is damaged: {name}", f"{value!r:.80}", f"of type {kind.__name__}")
    return fields


def write_json(path: Path, fields: dict) -> None:
    write_whole(path, json.dumps(fields, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file by a temporary name, and waits until it is on the disk."""
    with replacing(path) as temporary:
        temporary.write_text(text)
        sync(temporary)
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name with the same suffix. What is written there becomes the file at the end.

    So a reader sees the old file or the new one, and a failure leaves the old one.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file in a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def fingerprint(files: list[Path]) -> str:
    """A hash of the names and sizes of files, and of the contents of at most 16 of them, evenly spread."""
    sizes = [(path.name, path.stat().st_size) for path in files]
    contents = [checksum(path) for path in files[:: math.ceil(len(files) / 16)]]
    return hashlib.sha256(json.dumps([sizes, contents]).encode()).hexdigest()


def unused(path: Path) -> Path:
    """The path, or if it is taken the first of path-2, path-3, ... that is not."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(free for free in map(path.with_name, names) if not free.exists())


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    words = repr(error) if isinstance(error, KeyError) else str(error).strip() or repr(error)
    first, *others = words.splitlines()
    return f"{first} {others[0].strip()}" if first.endswith(":") and others else first


@contextmanager
def errors_as(words: str, kind: type[Refusal] = Refusal) -> Iterator[None]:
    """Turns any error inside, whatever package raises it, into one of `kind`: the words, then its message.

    A Refusal inside stands for itself.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise kind(f"{words}: {first_line(error)}{cause}") from None
