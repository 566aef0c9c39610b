"""The options of tools/benchmark.py: what is measured."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meanflow.config import check


def check_sizes(options) -> None:
    """Refuses numbers that are not above 0; workers and ratio may be 0."""
    for name, value in vars(options).items():
        numbers = [
            number for number in (value if isinstance(value, tuple) else (value,)) if type(number) in (int, float)
        ]
        least = 0 if name in ("workers", "ratio") else 1
        if numbers and min(numbers) < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


@dataclass(frozen=True)
class Network:
    """A network with random weights, and where it runs."""

    model: str = "custom"
    """a name in models.MODELS; custom: a DiT of the sizes below"""
    hidden_size: int = 384
    """width of a custom DiT"""
    depth: int = 6
    """blocks of a custom DiT"""
    num_heads: int = 6
    """attention heads of a custom DiT"""
    patch_size: int = 2
    """side of a custom DiT's patches"""
    input_size: int = 16
    """height and width of the input"""
    channels: int = 4
    """channels of the input"""
    dtype: Literal["float32", "bf16"] = "float32"
    """step, scale: bf16 is autocast; sample: bf16 is of the weights, too"""
    device: str = "cpu"
    """cpu, cuda, cuda:1"""
    repeats: int = 9
    """interleaved repeats, of which the median is taken"""
    json: Path | None = None
    """also write the numbers here"""

    def __post_init__(self) -> None:
        check_sizes(self)
        if not re.fullmatch("cpu|cuda(:[0-9]+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:NUMBER, got {self.device}")


@dataclass(frozen=True)
class Step(Network):
    """One training step, forward and backward, eager and compiled: flow matching; this project's MeanFlow; and two
    usual ways: torch.func.jvp of the whole batch with its graph, and without a graph before a second forward.

    FLOPs are those of the eager step. Bytes are those alive for the backward once the forward is done, parameters
    aside; the peak is of the whole step, over what was there before. Operations: those that were launched. Host: a step
    of the same network at a width of 16, with 4 samples of few tokens, on one thread: nothing but the host costs."""

    batch: int = 32
    """samples at a time"""
    ratio: tuple[float, ...] = (0.25,)
    """shares of r != t samples"""
    guided: bool = False
    """also a guided step: omega 0.2, kappa 0.92, t to 0.75, a tenth of the labels dropped"""
    compiled: bool = True
    """also the compiled steps"""
    usual: bool = True
    """also the usual ways"""
    runs: int = 3
    """how often the repeats are made; of each way's times, the run with its lowest ratio is shown, and the highest"""


@dataclass(frozen=True)
class Scale(Network):
    """How a step's cost grows with the batch, the tokens and the depth: one is varied, the others are as given."""

    batch: tuple[int, ...] = (8, 16, 32)
    """samples at a time; the first is used where another quantity varies"""
    sizes: tuple[int, ...] = (8, 16, 32)
    """heights and widths of the input; tokens are their squares over those of patch_size"""
    depths: tuple[int, ...] = (3, 6, 12)
    """blocks of a custom DiT"""
    ratio: float = 0.25
    """share of r != t samples"""


@dataclass(frozen=True)
class Sample(Network):
    """One-step sampling, by MeanFlowPipeline from given noise to what the network makes, and with pixels; and the bare
    forward passes."""

    batch: tuple[int, ...] = (8, 64)
    """images at a time"""
    vae: str | None = None
    """folder or Hub id of an AutoencoderKL to decode with, too"""


@dataclass(frozen=True)
class Improved:
    """FLOPs of a training step of improved MeanFlow, counted on tensors without content, so that any size fits.

    This project computes du/dt for r != t rows, and guidance's predictions only where they act. The official scheme
    has, for every row, three forwards of the v path without gradients, a forward of both heads with its derivative, and
    the backward. The usual port has, for every row, two forwards of the v path and a derivative of u without gradients,
    and a forward of both heads and its backward. A derivative is counted as one more forward, which is the least."""

    models: tuple[str, ...] = ("iMF-B/2", "iMF-XL/2")
    """names in models.MODELS, of networks with a v head"""
    batch: int = 32
    """samples at a time"""
    ratio: float = 0.5
    """share of r != t samples"""

    json: Path | None = None
    """also write the numbers here"""

    def __post_init__(self) -> None:
        check_sizes(self)
        check(self.ratio <= 1, "ratio", self.ratio, "at most 1")
        known = ("iMF-B/2", "iMF-M/2", "iMF-L/2", "iMF-XL/2")
        check(set(self.models) <= set(known), "models", " ".join(self.models), f"some of {', '.join(known)}")


@dataclass(frozen=True)
class Data:
    """Reading cached latents of 256 x 256 images, warm, one process: this project's way, and the usual one, an LMDB
    with a pickled dictionary per image, read by a DataLoader. It needs lmdb: pip install -e '.[test]'."""

    count: int = 20_480
    """images; each way writes 33 kB for each, to a temporary folder"""
    batch: int = 256
    """images at a time"""
    repeats: int = 5
    """interleaved repeats, of which the median is taken"""
    folder: Path | None = None
    """where to write; default: the system's temporary folder"""
    json: Path | None = None
    """also write the numbers here"""

    def __post_init__(self) -> None:
        check_sizes(self)


@dataclass(frozen=True)
class Loader(Data):
    """Images per second that the training loop gets: draws alone (of pixels in memory, 8 x 8), latents of 256 x 256
    images, and photographs that are decoded and cropped to 64 x 64; by the number of loading processes."""

    count: int = 2_048
    """images of each pass"""
    workers: tuple[int, ...] = (0, 1, 2)
    """loading processes"""
