"""Pushes a run, a checkpoint or an exported folder to the Hub, as a pipeline that diffusers loads.

    python tools/push_to_hub.py runs/digits user/digits
    python tools/push_to_hub.py models/ditxl user/ditxl --public --revision v1
    python tools/push_to_hub.py runs/digits user/digits --space user/digits-page   # and the page of tools/app.py

The token is that of `hf auth login`, or HF_TOKEN.
"""

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

from meanflow.config import HUB_ID, check
from meanflow.program import read_flags, refusals

CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
models: [{model}]
---

A page to play with [{model}](https://huggingface.co/{model}), a one-step image generator.
"""
GRADIO = "6.31.0"  # the version that the page was tested with
PACKAGES = ("accelerate", "diffusers", "timm", "torch", "torchvision", "tyro")


@dataclass(frozen=True)
class Options:
    source: tyro.conf.Positional[Path]
    """a run, of which the newest checkpoint is taken, a checkpoint, or a folder of tools/export.py"""
    repo_id: tyro.conf.Positional[str]
    """user/name on the Hub; made if it is not there"""
    public: bool = False
    """a new repository is for all to see; default: private"""
    revision: str | None = None
    """branch to push to; made if it is not there"""
    space: str | None = None
    """user/name of a Space to push, too: the page of tools/app.py, for this model"""
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""

    def __post_init__(self) -> None:
        is_id = self.space is None or (re.fullmatch(HUB_ID, self.space) and self.space != self.repo_id)
        check(bool(is_id), "space", self.space, "a Hub id, user/name, and not the model's")
        has_user = self.space is None or re.fullmatch(HUB_ID, self.repo_id)
        check(bool(has_user), "repo_id", self.repo_id, "user/name with --space, which loads the model by this id")


def write_space(folder: Path, options: Options) -> None:
    """What a Space needs: the page's file, the model's id, the packages, and a card."""
    shutil.copyfile(Path(__file__).with_name("app.py"), folder / "app.py")
    (folder / "space.json").write_text(json.dumps({"model": options.repo_id, "revision": options.revision}) + "\n")
    versions = [f"{name}=={version(name).partition('+')[0]}" for name in PACKAGES]
    (folder / "requirements.txt").write_text("\n".join(versions) + "\n")
    title = options.repo_id.split("/")[1]
    (folder / "README.md").write_text(CARD.format(title=title, gradio=GRADIO, model=options.repo_id))


def main(options: Options) -> None:
    from meanflow.publishing.hub import publish, push

    private = not options.public
    how = {"trust_remote_code": options.trust_remote_code, "private": private, "revision": options.revision}
    print(f"pushed: {publish(options.source, options.repo_id, **how)}")
    if options.space:
        with tempfile.TemporaryDirectory() as folder:
            write_space(Path(folder), options)
            push(Path(folder), options.space, private=private, space=True)
        print(f"pushed: https://huggingface.co/spaces/{options.space}")
        if private:
            print(f"{options.repo_id} is private: give the Space a secret HF_TOKEN that may read it")


if __name__ == "__main__":
    with refusals():
        main(read_flags(Options))
