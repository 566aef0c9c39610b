"""The folder of a path or of a Hub id. Nothing that is downloaded is run."""

import re
from pathlib import Path

from meanflow.config import HUB_ID


def fetch(source: str | Path, revision: str | None = None, variant: str | None = None, code: bool = False) -> Path:
    """The folder of a path, of a Hub id or of ID@REVISION, of which the json and safetensors files are downloaded.

    Args:
        variant: bf16 or fp16, to download the weights that were saved in this precision.
        code: download Python files, too.
    Raises:
        ValueError: there is no such folder, and the Hub does not give it; the message says why.
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

    wanted = ["*.json", "*.safetensors"] + ["*.py"] * code
    other_variants = [f"*.{name}*" for name in ("bf16", "fp16") if name != variant]
    choice = {"revision": revision or at or None, "allow_patterns": wanted, "ignore_patterns": other_variants}
    try:
        return Path(snapshot_download(repo_id, **choice))
    except Exception as error:  # of many kinds, by two packages
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{source} is no folder, and the Hub does not give it: {reason}") from None
