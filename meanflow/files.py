"""Files that are whole or not there, and errors in one line."""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, fields: dict) -> None:
    write_whole(path, json.dumps(fields, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that a reader sees the old text or the new text, and never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


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


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    words = repr(error) if isinstance(error, KeyError) else str(error).strip() or repr(error)
    return words.splitlines()[0]


@contextmanager
def errors_as(words: str, kind: type[ValueError] = ValueError):
    """Turns any error inside, whatever package raises it, into one of `kind`: the words, then its message."""
    try:
        yield
    except Exception as error:
        cause = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
        raise kind(f"{words}: {first_line(error)}{cause}") from None
