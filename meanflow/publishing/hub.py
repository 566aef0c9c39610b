"""Pushing to the Hub, so that neither its faults nor its speed touch a run."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from meanflow.files import first_line
from meanflow.publishing.checkpoints import INDEX
from meanflow.publishing.export import export

DEADLINE = 300  # seconds that a finished run waits for its push
ATTEMPTS = 6  # of a push, 1, 2, 4, ... seconds apart; 3 where the Hub does not answer


def push(folder: Path, repo_id: str, private: bool = True, revision: str | None = None, space=False) -> str:
    """Uploads an exported folder, in a few attempts, and returns the commit's address.

    Args:
        space: whether it is a Space, with a page of Gradio, and not a model.
    Raises:
        ValueError: it could not be done.
    """
    import huggingface_hub.errors

    for attempt in range(ATTEMPTS):
        try:
            kind = {"repo_type": "space"} if space else {}
            sdk = {"space_sdk": "gradio"} if space else {}
            huggingface_hub.create_repo(repo_id, private=private, exist_ok=True, **kind, **sdk)
            if revision:
                huggingface_hub.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
            what = {"repo_id": repo_id, "folder_path": folder, "revision": revision, **kind}
            return huggingface_hub.upload_folder(**what, delete_patterns=["net/*", "vae/*"]).commit_url
        except Exception as error:  # of many kinds, by two packages
            status = error.response.status_code if isinstance(error, huggingface_hub.errors.HfHubHTTPError) else None
            refused = status in (400, 401, 403, 404) or isinstance(error, ValueError)
            if refused or attempt == (ATTEMPTS if status else 3) - 1:
                advice = ": log in by `hf auth login`, with a token that may write" if status in (401, 403) else ""
                raise ValueError(f"{repo_id} could not be pushed: {first_line(error)}{advice}") from None
            print(f"{first_line(error)}: again in {2**attempt} s", file=sys.stderr, flush=True)
            time.sleep(2**attempt)


class Pusher:
    """Pushes a run's checkpoints in a process of its own, one at a time; its output is in push.log."""

    def __init__(self, recipe):
        self.recipe, self.child = recipe, None
        self.log, self.log_start = recipe.out / "push.log", 0  # where the output of this push begins
        self.links = recipe.out / ".push"  # hard links to the files being pushed: the run may prune its checkpoint

    def start(self, source: Path) -> None:
        """Begins to push a checkpoint or an exported folder; does nothing while another push is under way."""
        if self.child is not None and self.child.poll() is None:
            return
        if self.child is not None and (fault := self.fault()):
            print(f"{self.recipe.push_to_hub}: a push failed, {fault}", file=sys.stderr)
        try:
            self.clear()
            unread = shutil.ignore_patterns("model", "optimizer*")
            shutil.copytree(source, self.links, copy_function=link, ignore=unread)
            environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            command = [sys.executable, "-m", "meanflow.publishing.hub", str(self.links), self.recipe.push_to_hub]
            with self.log.open("a") as log:
                self.log_start = log.tell()
                # In a session of its own, so that Ctrl-C reaches only the run. Its stdin closes when the run ends.
                how = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "start_new_session": True}
                self.child = subprocess.Popen(command, **how, env={**environment, "CUDA_VISIBLE_DEVICES": ""})
        except OSError as error:
            print(f"{self.recipe.push_to_hub}: no push, {first_line(error)}", file=sys.stderr)
            self.child = None

    def clear(self) -> None:
        for path in self.recipe.out.glob(".push*"):
            shutil.rmtree(path, ignore_errors=True)

    def fault(self) -> str | None:
        """Why the push that ended failed; None if it did not."""
        if self.child.returncode == 0:
            return None
        lines = self.log.read_text()[self.log_start :].strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"its process ended with {self.child.returncode}"

    def wait(self, end: float, interrupted) -> str | None:
        """Waits for the push under way, and returns why it failed; None if it did not."""
        while self.child is not None and self.child.poll() is None:
            if interrupted():
                return "the run was stopped"
            if time.monotonic() > end:
                return f"it did not end within {DEADLINE} s"
            time.sleep(0.1)
        return self.fault() if self.child is not None else "it could not begin"

    def finish(self, source: Path | None, reason: str, interrupted) -> str:
        """Pushes `source`, or reports `reason` if it is None; interrupted() ends the wait. Returns the message."""
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
        if any(self.recipe.out.glob("step-*/model/modeling_custom_*.py")):
            command += " --trust-remote-code"
        message = f"not pushed, {reason}\nto push: {command}" if reason else "pushed"
        return f"{self.recipe.push_to_hub}: {message}"


def link(source: str, target: str) -> None:
    """A hard link, or a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def publish(source: Path, repo_id: str, scratch: Path | None = None, trust_remote_code=False, **options) -> str:
    """Pushes a run, a checkpoint or an exported folder, and returns the commit's address.

    Args:
        scratch: the folder to export a run to; default: the system's temporary folder.
        trust_remote_code: run the network's own file, if the network is not in the zoo.
        options: private and revision, as for `push`.
    Raises:
        ValueError: it could not be exported or pushed.
    """
    if (source / INDEX).is_file():
        return push(source, repo_id, **options)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=scratch) as folder:
        export(source, Path(folder) / "pipeline", trust_remote_code=trust_remote_code)
        return push(Path(folder) / "pipeline", repo_id, **options)


def main() -> None:
    """The Pusher's child. It ends with the run, and it trusts the run's own code."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    source = Path(sys.argv[1])
    try:
        print(f"pushed: {publish(source, sys.argv[2], scratch=source.parent, trust_remote_code=True)}")
    except Exception as error:
        sys.exit(f"error: {first_line(error)}")


if __name__ == "__main__":
    main()
