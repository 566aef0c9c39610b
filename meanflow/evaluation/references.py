"""What generated samples are compared with: images, a run's held-out samples, or statistics that others published."""

import hashlib
import json
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from meanflow.config import check
from meanflow.data.base import Data
from meanflow.data.images import ImageFiles
from meanflow.files import checksum, ensure, errors_as, fingerprint
from meanflow.noise import generator

# Whose features statistics of this many dimensions are.
FEATURES = {2048: "inception", 1024: "dinov2"}


class Reference:
    """Images, samples, or statistics of their features.

    Attributes:
        name: as the user gave it.
        sha256: of the file, a fingerprint of a folder, or a hash of what a run noted of its data; None for the Hub.
        count: how many images or samples there are; 0 if there are only statistics.
        statistics: mu and sigma of features, by the features' name, that are known without any images.
    """

    def __init__(self, name: str, sha256: str | None = None):
        self.name, self.sha256, self.count, self.statistics = name, sha256, 0, {}

    def batch(self, indices: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Images, (B, C, H, W) uint8, and samples in model units; one of both may be None."""
        raise NotImplementedError


class Statistics(Reference):
    """mu and sigma of an .npz file (ADM's, which has images as arr_0, too, or JiT's) or of torch-fidelity's cache."""

    def __init__(self, path: Path):
        super().__init__(str(path), checksum(path))
        with errors_as(f"reference {path} cannot be read"):
            known = read_cache(path) if path.suffix == ".pt" else np.load(path, allow_pickle=False)
            names = ", ".join(map(str, known))
            if "mu" in known:
                mu, sigma = (np.asarray(known[name], np.float64) for name in ("mu", "sigma"))
                is_of_set = mu.ndim == 1 and sigma.shape == 2 * mu.shape and len(mu) in FEATURES
                shapes = f"mu {mu.shape} and sigma {sigma.shape}"
                ensure(is_of_set, f"reference {path} has {shapes}, not (D,) and (D, D) with D {list(FEATURES)}")
                self.statistics[FEATURES[len(mu)]] = {"mu": mu, "sigma": sigma}
            shape, kind = array_header(path, "arr_0") if "arr_0" in known else (None, None)
        is_known = len(self.statistics) > 0 or shape is not None
        ensure(is_known, f"reference {path} has neither mu and sigma nor arr_0, only {names}")
        if shape is not None:
            is_image = len(shape) == 4 and shape[-1] in (1, 3) and kind == np.uint8 and shape[0] > 0
            ensure(is_image, f"reference {path}: arr_0 must be uint8 (N, H, W, 1 or 3), got {kind} {shape}")
            self.count = shape[0]

    @cached_property
    def images(self) -> np.ndarray:
        with errors_as(f"reference {self.name} cannot be read"):
            return np.load(self.name, allow_pickle=False)["arr_0"]  # an array of objects would be a pickle

    def batch(self, indices: list[int]) -> tuple[Tensor, None]:
        return torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2), None


class ImageReference(Reference):
    """The images of a folder, a table or a Hub id, cut to the size of the generated ones."""

    def __init__(self, source: str, size: int):
        super().__init__(source, contents(source))
        self.images = ImageFiles(source, size)
        self.count = len(self.images)

    def batch(self, indices: list[int]) -> tuple[Tensor, None]:
        return torch.stack([self.images.pixels(index) for index in indices]), None


class DataReference(Reference):
    """Samples of a Data, such as those that a run holds out."""

    def __init__(self, data: Data, device: torch.device):
        about = json.dumps(data.metadata, sort_keys=True, default=str)
        super().__init__("held-out", hashlib.sha256(about.encode()).hexdigest())
        self.data, self.device, self.count = data, device, len(data)

    def batch(self, indices: list[int]) -> tuple[None, Tensor]:
        x, _ = self.data.batch(indices, [generator(0, index, "reference") for index in indices])
        on_device = [part.to(self.device) for part in (x if isinstance(x, tuple) else (x,))]
        return None, self.data.encode(*on_device) if isinstance(x, tuple) else on_device[0]


def open_reference(source: str, size: int) -> Reference:
    """The reference of a path or a Hub id.

    Args:
        size: height and width of the images that it is compared with.
    Raises:
        ValueError: there is no such thing, or it holds something else.
    """
    path = Path(source).expanduser()
    if path.suffix in (".npz", ".pt"):
        check(path.is_file(), "reference", source, "a file that is there")
        return Statistics(path)
    return ImageReference(source, size)


def contents(source: str) -> str | None:
    """A fingerprint of the files of a folder or of one file; None if it is neither."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return fingerprint(files) if files else None


def read_cache(path: Path) -> dict:
    """mu and sigma of a file of torch-fidelity's cache; nothing in it is run."""
    from numpy._core import multiarray

    kinds = [multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]
    with torch.serialization.safe_globals(kinds):
        known = torch.load(path, weights_only=True)
    ensure(isinstance(known, dict), "it holds no mu and sigma")
    return known


def array_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of an .npz file, of which no more is read."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
    return shape, kind
