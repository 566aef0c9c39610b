"""Cached latents: the VAE's posterior of each image and of its mirror image, in arrow files that datasets opens.

latents.json         the metadata and each shard's checksum; it is written last, so a cache without it is unfinished
data-00000.arrow     a shard: moments (2 flips, mean and standard deviation, C, H, W) in float16, and label
dataset_info.json, state.json   for datasets.load_from_disk
.progress/           only in an unfinished cache

The moments are the VAE's own, neither shifted nor scaled. tools/cache_latents.py writes caches.
"""

import bisect
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from meanflow.config import check
from meanflow.data.base import Data
from meanflow.data.vae import decode, encode, fingerprint, latent_shape, load_vae, vae_metadata
from meanflow.files import checksum, ensure, errors_as, read_json

LATENTS = "latents.json"
# Each channel's mean and standard deviation in the official code of improved MeanFlow (arXiv:2512.02012): of latents of
# ImageNet by Stable Diffusion's VAE, before any scaling.
IMF_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
IMF_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)


def is_cache(folder: Path) -> bool:
    """Whether the folder is a cache, finished or not."""
    return (folder / LATENTS).exists() or (folder / ".progress").exists()


def read_metadata(folder: Path) -> dict:
    """The content of latents.json; the cache must be finished and every shard must have its size.

    Raises:
        ValueError: it is no cache, is unfinished, or a shard is missing or cut; the message names the file.
    """
    if not (folder / LATENTS).is_file():
        if (folder / ".progress").exists():
            raise ValueError(f"{folder} is unfinished: give tools/cache_latents.py the same command again")
        raise ValueError(f"{folder} has no {LATENTS}: make it with tools/cache_latents.py")
    with errors_as(f"{folder / LATENTS} is damaged"):
        metadata = read_json(folder / LATENTS, shape=list, classes=list, count=int, shards=list)
        for shard in metadata["shards"]:
            path = folder / shard["file"]
            ensure(path.is_file(), f"{path} is missing")
            size, noted = path.stat().st_size, shard["bytes"]
            ensure(size == noted, f"{path} is damaged: it has {size} bytes, and had {noted}")
    return metadata


def verify_shards(folder: Path, shards: list[dict], quiet: bool = False) -> None:
    """Reads these shards and compares their checksums, with a progress bar unless quiet.

    Raises:
        ValueError: a shard has another checksum than when it was written.
    """
    for shard in tqdm(shards, "checksums", unit="shard", disable=quiet):
        if checksum(folder / shard["file"]) != shard["sha256"]:
            raise ValueError(f"{folder / shard['file']} is damaged: its checksum is not the one that was noted")


def check_expected(folder: Path, metadata: dict, recipe) -> None:
    """Refuses a cache that was not made as the recipe expects, naming the difference."""
    wrong = [name for name in ("resolution", "scaling_factor") if metadata[name] != getattr(recipe, name)]
    # Wherever a VAE lies, its weights decide. (Random latents are nobody's.)
    if metadata["vae_sha256"] and recipe.vae and Path(recipe.vae).expanduser().is_dir():
        weights = fingerprint(load_vae(recipe.vae))
        maker = f"{metadata['vae']}, with weights of SHA-256 {metadata['vae_sha256'][:12]}..., not {weights[:12]}..."
        ensure(weights == metadata["vae_sha256"], f"{folder} was made by another VAE than {recipe.vae}: by {maker}")
    elif metadata["vae"] != recipe.vae:
        wrong.insert(0, "vae")
    diff = ", ".join(f"{name} {metadata[name]} there, {getattr(recipe, name)} here" for name in wrong)
    flags = " ".join(f"--{name.replace('_', '-')} {metadata[name]}" for name in wrong)
    ensure(not wrong, f"{folder} holds latents of other settings ({diff}): make them anew, or say {flags}")


def model_units(recipe, shift_factor: float | None, channels: int) -> tuple:
    """The shift and scale of latents that do not depend on a cache's statistics."""
    if recipe.normalization == "scale":
        return shift_factor or 0.0, recipe.scaling_factor
    check(channels == len(IMF_MEAN), "normalization", "imf", f"another one for latents of {channels} channels")
    return list(IMF_MEAN), [1 / std for std in IMF_STD]


class LatentSpace(Data):
    """Data in the model units of latents, (latent - shift) * scale, and the way back to pixels.

    Args:
        metadata: what the latents are.
        shift, scale: one number, or one for each channel.
        vae: a folder or Hub id, which is loaded when it is first needed; or the AutoencoderKL.
    """

    def __init__(self, metadata: dict, shift: float | list[float], scale: float | list[float], vae):
        self.metadata, self.vae = {**metadata, "latents": {"shift": shift, "scale": scale}}, vae
        self.constants = [torch.tensor(a).view(-1, 1, 1) for a in (shift, scale)]

    def shift_and_scale(self, device: torch.device) -> list[torch.Tensor]:
        """Both as tensors (C, 1, 1), copied only where the device is another than before, since a copy waits for it."""
        self.constants = [a.to(device) for a in self.constants]
        return self.constants

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = self.shift_and_scale(latents.device)
        return (latents - shift) * scale

    def to_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """Images, roughly in [-1, 1], (B, 3, H, W); a third of the first three channels if the VAE cannot be loaded."""
        if isinstance(self.vae, str):
            try:
                self.vae = load_vae(self.vae)
            except ValueError as error:
                print(f"pictures show the latents themselves: {error}", file=sys.stderr)
                self.vae = None
        if self.vae is None:
            return x[:, :3] / 3
        shift, scale = self.shift_and_scale(x.device)
        return decode(self.vae.to(x.device), x / scale + shift)


class Latents(LatentSpace):
    """The latents of a cache, in model units; they are drawn anew from the VAE's posterior at each visit.

    Args:
        recipe: a TrainConfig.
    Raises:
        ValueError: the cache is damaged, unfinished or not what the recipe expects.
    """

    def __init__(self, folder: Path, recipe):
        import pyarrow as pa

        self.folder, self.recipe = folder, recipe
        metadata = read_metadata(folder)
        with errors_as(f"{folder / LATENTS} is damaged"):
            check_expected(folder, metadata, recipe)
            self.shards = metadata.pop("shards")
            self.shape, self.num_classes = tuple(metadata["shape"][2:]), len(metadata["classes"])
            if recipe.normalization == "channel":
                shift, scale = metadata["channel_mean"], [1 / std for std in metadata["channel_std"]]
            else:
                shift, scale = model_units(recipe, metadata["shift_factor"], self.shape[0])
        super().__init__({**metadata, "normalization": recipe.normalization}, shift, scale, recipe.vae)
        self.moments, labels = [], []
        for shard in self.shards:
            with errors_as(f"{folder / shard['file']} is damaged"):
                with pa.memory_map(str(folder / shard["file"])) as file:
                    table = pa.ipc.open_stream(file).read_all()
                # Views of the file's pages: to decode the rows is ten times slower.
                column = table["moments"].chunk(0).flatten(recursive=True)
                self.moments.append(column.to_numpy().reshape(-1, *metadata["shape"]))
                labels.append(table["label"].to_numpy())
        self.labels = torch.from_numpy(np.concatenate(labels)).long()
        self.ends = np.cumsum([len(part) for part in labels]).tolist()
        highest = int(self.labels.max()) if self.num_classes else -1
        if self.ends[-1] != metadata["count"] or highest >= self.num_classes:
            found = f"the shards have {self.ends[-1]} latents and the label {highest}"
            noted = f"{metadata['count']} latents and {self.num_classes} classes"
            raise ValueError(f"{folder / LATENTS} is damaged: {found}, and it notes {noted}")

    def read(self, indices: list[int], flips: list[int]) -> torch.Tensor:
        """The moments of these images, (B, 2, C, H, W) float16; flip 1 is the mirror image."""
        out = np.empty((len(indices), 2, *self.shape), np.float16)
        for row, (index, flip) in enumerate(zip(indices, flips)):
            shard = bisect.bisect_right(self.ends, index)
            out[row] = self.moments[shard][index - self.ends[shard], flip]  # counted from the shard's end
        return torch.from_numpy(out)

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[torch.Tensor, dict]:
        flips, noise = [], torch.empty(len(indices), *self.shape)
        for row, random in enumerate(generators):
            flips.append(int(self.recipe.flip and torch.rand((), generator=random) < 0.5))
            noise[row].normal_(generator=random)
        mean, std = self.read(indices, flips).float().unbind(1)
        cond = {"y": self.labels[torch.as_tensor(indices)]} if self.num_classes else {}
        return self.normalize(torch.addcmul(mean, std, noise)), cond

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        verify_shards(self.folder, self.shards[part::num_parts], quiet=part > 0)

    def __reduce__(self):
        """A process that is spawned, as on macOS and Windows, opens the files anew: it must not get their content."""
        return type(self), (self.folder, self.recipe), {"num_classes": self.num_classes, "metadata": self.metadata}


class EncodedImages(LatentSpace):
    """Images that go through the VAE at each visit, on the training device. It is for small jobs: a cache is faster.

    The x of a batch is (pixels, noise), from which `encode` makes latents in model units.
    """

    def __init__(self, images: Data, recipe):
        if recipe.normalization == "channel":
            raise ValueError(
                "normalization must be scale or imf without a cache, which has the statistics, got channel"
            )
        vae = load_vae(recipe.vae)
        factor = vae.config.scaling_factor
        check(
            factor == recipe.scaling_factor, "scaling_factor", recipe.scaling_factor, f"that of {recipe.vae}, {factor}"
        )
        self.images, self.num_classes = images, images.num_classes
        self.shape = latent_shape(vae, recipe.resolution)
        shift, scale = model_units(recipe, vae.config.shift_factor, self.shape[0])
        metadata = {**images.metadata, **vae_metadata(vae, recipe.vae), "normalization": recipe.normalization}
        super().__init__(metadata, shift, scale, vae)

    def batch(self, indices: list[int], generators: list[torch.Generator]) -> tuple[tuple, dict]:
        pixels, cond = self.images.batch(indices, generators)
        noise = torch.stack([torch.randn(self.shape, generator=random) for random in generators])
        return (pixels, noise), cond if self.num_classes else {}

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        self.images.verify(part, num_parts)

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, std = encode(self.vae.to(pixels.device), pixels)
        return self.normalize(mean + std * noise)
