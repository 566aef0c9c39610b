"""Pushes a run, a checkpoint or an exported folder to the Hub, as a pipeline that diffusers loads.

    python tools/push_to_hub.py runs/digits user/digits
    python tools/push_to_hub.py models/ditxl user/ditxl --public --revision v1

The token is that of `hf auth login`, or HF_TOKEN.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from meanflow.program import read_flags, refusals


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
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""


def main(options: Options) -> None:
    from meanflow.publishing.hub import publish

    how = {"trust_remote_code": options.trust_remote_code, "private": not options.public, "revision": options.revision}
    print(f"pushed: {publish(options.source, options.repo_id, **how)}")


if __name__ == "__main__":
    with refusals():
        main(read_flags(Options))
