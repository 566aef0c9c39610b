"""To and from the Hub, so that neither its faults nor its speed touch a run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from meanflow.config import HUB_ID, TrainConfig
from meanflow.files import first_line

DEADLINE = 300  # seconds that a finished run waits for its push
ATTEMPTS = 6  # of a push, 1, 2, 4, ... seconds apart


def fetch(source: str | Path, revision: str | None = None, variant: str | None = None) -> Path:
    """The folder of a path, of a Hub id or of ID@REVISION, whose json and safetensors files are downloaded.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        if revision:
            raise ValueError(f"revision {revision} is for the Hub, and {source} is a folder")
        return folder
    repo_id, _, at = str(source).partition("@")
    if not re.fullmatch(HUB_ID, repo_id):
        raise ValueError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = {"allow_patterns": ["*.json", "*.safetensors"]}
    patterns["ignore_patterns"] = [f"*.{name}*" for name in ("bf16", "fp16") if name != variant]
    try:
        return Path(snapshot_download(repo_id, revision=revision or at or None, **patterns))
    except Exception as error:  # of many kinds, by two packages
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{source} is no folder, and from the Hub it cannot be had: {reason}") from None


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
            what = {"repo_id": repo_id, "folder_path": folder, "revision": revision}
            return api.upload_folder(**what, delete_patterns=["net/*", "vae/*"]).commit_url
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
        self.recipe, self.child, self.log, self.said = recipe, None, recipe.out / "push.log", 0
        self.links = recipe.out / ".push"  # of what is pushed, since the run prunes its checkpoints meanwhile

    def start(self, source: Path) -> None:
        """Begins to push a checkpoint or an exported folder, unless one is under way: a later one will do."""
        if self.child is not None and self.child.poll() is None:
            return
        if self.child is not None and (fault := self.fault()):
            print(f"{self.recipe.push_to_hub}: a push failed, {fault}", file=sys.stderr)
        try:
            self.clear()
            unread = shutil.ignore_patterns("model", "optimizer*")
            shutil.copytree(source, self.links, copy_function=link, ignore=unread)
            alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            command = [sys.executable, "-m", "meanflow.hub", str(self.links), self.recipe.push_to_hub]
            with self.log.open("a") as log:
                self.said = log.tell()
                # In a session of its own: a Ctrl-C is the run's, which decides. It ends with the run, by its stdin.
                how = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
                self.child = subprocess.Popen(command, **how, env={**alone, "CUDA_VISIBLE_DEVICES": ""})
        except OSError as error:
            print(f"{self.recipe.push_to_hub}: no push, {first_line(error)}", file=sys.stderr)
            self.child = None

    def clear(self) -> None:
        for path in self.recipe.out.glob(".push*"):
            shutil.rmtree(path, ignore_errors=True)

    def fault(self) -> str | None:
        """Why the push that ended did not end well, None if it did."""
        if self.child.returncode == 0:
            return None
        said = self.log.read_text()[self.said :].strip().splitlines()
        return said[-1].removeprefix("error: ") if said else f"its process ended with {self.child.returncode}"

    def wait(self, end: float, interrupted: Callable[[], bool]) -> str | None:
        """Waits for the push under way; why it did not end well, None if it did."""
        while self.child is not None and self.child.poll() is None:
            if interrupted():
                return "the run was stopped"
            if time.monotonic() > end:
                return f"it did not end within {DEADLINE} s"
            time.sleep(0.1)
        return self.fault() if self.child is not None else "it could not begin"

    def finish(self, source: Path | None, reason: str, interrupted: Callable[[], bool]) -> str:
        """Pushes source; None: nothing more, for this reason. Returns what is to be said."""
        end = time.monotonic() + DEADLINE
        if source is not None:
            self.wait(end, interrupted)
            self.start(source)
            reason = self.wait(end, interrupted)
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.clear()
        command = f"python tools/push_to_hub.py {shlex.quote(str(self.recipe.out))} {self.recipe.push_to_hub}"
        said = f"not pushed, {reason}\nto push: {command}" if reason else "pushed"
        return f"{self.recipe.push_to_hub}: {said}"


def link(source: str, target: str) -> None:
    """A hard link, or a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def publish(source: Path, repo_id: str, scratch: Path | None = None, **options) -> str:
    """Pushes a run, a checkpoint or an exported folder; scratch: where to export to."""
    from meanflow.export import INDEX, export

    if (source / INDEX).is_file():
        return push(source, repo_id, **options)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=scratch) as folder:
        export(source, Path(folder) / "pipeline")
        return push(Path(folder) / "pipeline", repo_id, **options)


def main() -> None:
    """Pusher's child."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    source = Path(sys.argv[1])
    try:
        print(f"pushed: {publish(source, sys.argv[2], scratch=source.parent)}")
    except Exception as error:
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    main()
