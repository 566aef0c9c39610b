"""To and from the Hub, so that neither its faults nor its speed touch a run."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from meanflow.config import TrainConfig
from meanflow.files import first_line

DEADLINE = 300  # seconds that a finished run waits for its push
ATTEMPTS = 6  # of a push, 1, 2, 4, ... seconds apart


def fetch(source: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a path or of a Hub id, whose json and safetensors files are downloaded.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        if revision:
            raise ValueError(f"revision {revision} is for the Hub, and {source} is a folder")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    other = [f"*.{name}*" for name in ("bf16", "fp16") if name != variant]
    try:
        found = snapshot_download(
            str(source), revision=revision, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=other
        )
    except Exception as error:  # of many kinds, by two packages
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{source} is no folder, and from the Hub it cannot be had: {reason}") from None
    return Path(found)


def push(folder: Path, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """Uploads an exported folder, with a few attempts, and returns the commit's address.

    Raises:
        ValueError: it could not be done.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    for attempt in range(ATTEMPTS):
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision).commit_url
        except Exception as error:  # of many kinds, by two packages
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            refused = status in (400, 401, 403, 404) or isinstance(error, ValueError)
            if refused or attempt == ATTEMPTS - 1:
                raise ValueError(f"{repo_id} could not be pushed: {first_line(error)}") from None
            print(f"{first_line(error)}: again in {2**attempt} s", file=sys.stderr, flush=True)
            time.sleep(2**attempt)


class Pusher:
    """Pushes a run's checkpoints in a process of its own, one at a time; what it says is in push.log."""

    def __init__(self, recipe: TrainConfig):
        self.recipe, self.child, self.log = recipe, None, recipe.out / "push.log"
        self.links = recipe.out / ".push"  # of what is pushed, since the run prunes its checkpoints meanwhile

    def start(self, source: Path) -> None:
        """Begins to push a checkpoint or an exported folder, unless one is under way: a later one will do."""
        if self.child is not None and self.child.poll() is None:
            return
        shutil.rmtree(self.links, ignore_errors=True)
        shutil.copytree(source, self.links, copy_function=os.link, ignore=shutil.ignore_patterns("optimizer*"))
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        command = [sys.executable, "-m", "meanflow.hub", str(self.links), self.recipe.push_to_hub]
        with self.log.open("a") as log:
            # In a session of its own: a Ctrl-C is the run's, which decides.
            self.child = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**alone, "CUDA_VISIBLE_DEVICES": ""}
            )

    def wait(self, end: float, interrupted: Callable[[], bool]) -> str | None:
        """Waits for the push under way; why it did not end well, None if it did."""
        while self.child.poll() is None:
            if interrupted():
                return "the run was stopped"
            if time.monotonic() > end:
                return f"it did not end within {DEADLINE} s"
            time.sleep(0.1)
        said = self.log.read_text().strip().splitlines() or ["error: it said nothing"]
        return None if self.child.returncode == 0 else said[-1].removeprefix("error: ")

    def finish(self, source: Path | None, interrupted: Callable[[], bool]) -> str:
        """Pushes source, None: nothing more, as the run was stopped. Returns what is to be said."""
        end, fault = time.monotonic() + DEADLINE, "the run was stopped"
        try:
            if source is not None:
                if self.child is not None:
                    self.wait(end, interrupted)
                self.start(source)
                fault = self.wait(end, interrupted)
        except OSError as error:
            fault = first_line(error)
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        shutil.rmtree(self.links, ignore_errors=True)
        command = f"python tools/push_to_hub.py {self.recipe.out} {self.recipe.push_to_hub}"
        return f"{self.recipe.push_to_hub}: " + (
            "pushed" if fault is None else f"not pushed, {fault}\nto push: {command}"
        )


def publish(source: Path, repo_id: str, **options) -> str:
    """Pushes a run, a checkpoint or an exported folder."""
    from meanflow.export import INDEX, export

    if (source / INDEX).is_file():
        return push(source, repo_id, **options)
    with tempfile.TemporaryDirectory() as folder:
        export(source, Path(folder) / "pipeline")
        return push(Path(folder) / "pipeline", repo_id, **options)


if __name__ == "__main__":
    try:
        print(f"pushed: {publish(Path(sys.argv[1]), sys.argv[2])}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
