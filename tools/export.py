"""Writes a run as a folder that diffusers loads, with a model card: for others, and for the Hub.

    python tools/export.py runs/digits --out models/digits
    python tools/export.py runs/ditxl --ema 0.9999 --variants bf16 --license mit --out models/ditxl

Anybody who has diffusers and timm, without this project, then writes
DiffusionPipeline.from_pretrained("models/digits", trust_remote_code=True).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meanflow.program import read_flags, refusals


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """a run, of which the newest checkpoint is taken, or a checkpoint"""
    out: Path
    """the folder to write; an exported model there is replaced"""
    ema: float | None = None
    """decay of the average to take; default: the recipe's first"""
    variants: tuple[Literal["bf16", "fp16"], ...] = ()
    """the weights once more in each of these precisions, for from_pretrained(..., variant="bf16")"""
    license: str = "other"
    """for the model card, as the Hub names it"""
    datasets: tuple[str, ...] = ()
    """for the model card: Hub ids of the data"""
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""


def main(options: Options) -> None:
    from meanflow.publishing.export import export

    choices = (options.ema, options.variants, options.license, options.datasets, options.trust_remote_code)
    export(options.run, options.out, *choices)
    print(f"{options.out}: a pipeline for diffusers, README.md and samples.png")


if __name__ == "__main__":
    with refusals():
        main(read_flags(Options))
