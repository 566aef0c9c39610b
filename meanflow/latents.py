"""Cached latents: what a VAE says of each image and its mirror image, in arrow files that datasets opens.

latents.json         what they are and a checksum of each shard; written last, so without it a cache is unfinished
data-00000.arrow     a shard: moments (2 flips, mean and standard deviation, C, H, W) in float16, and label
dataset_info.json, state.json   for datasets.load_from_disk
.progress/           of an unfinished cache: its settings, and a note of each finished shard

The moments are the VAE's own, neither shifted nor scaled.
"""

import bisect
import itertools
import json
import math
import shutil
import sys
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import meanflow
from meanflow.config import TrainConfig
from meanflow.files import checksum, sync, write_whole
from meanflow.images import ImageFiles
from meanflow.vae import decode, encode, fingerprint, latent_shape, load_vae, vae_facts

LATENTS = "latents.json"
SHARD_SIZE = 4096  # images, so 128 MiB of 4 x 32 x 32 latents


def shard_name(number: int) -> str:
    return f"data-{number:05d}.arrow"


def note_path(folder: Path, number: int) -> Path:
    return folder / ".progress" / f"{number:05d}.json"


def features(shape: Sequence[int], classes: Sequence[str]):
    """The columns as datasets names them. shape: (2, 2, C, H, W)."""
    from datasets import ClassLabel, Features, List, Value

    column = Value("float16")
    for size in reversed(shape):
        column = List(column, length=size)
    return Features({"moments": column, "label": ClassLabel(names=list(classes)) if classes else Value("int64")})


def write_shard(folder: Path, number: int, moments: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
    """Writes a shard so that it is whole or not there, then its note.

    Args:
        moments: (N, 2, 2, C, H, W) float16. labels: (N,) int64.
    """
    import pyarrow as pa

    schema = features(moments.shape[1:], classes).arrow_schema
    column = pa.array(moments.reshape(-1))
    for size in reversed(moments.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    path = folder / shard_name(number)
    # A name of its own, since a launcher's death leaves processes behind that still write.
    temporary = folder / ".progress" / f"{path.name}.{uuid.uuid4().hex}.tmp"
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(pa.record_batch([column, pa.array(labels)], schema=schema))
    sync(temporary)
    mean, std = (moments[:, :, i].astype(np.float64) for i in (0, 1))
    axes = (0, 1, 3, 4)
    note = {
        "file": path.name,
        "bytes": temporary.stat().st_size,
        "sha256": checksum(temporary),
        "count": len(labels),
        "count_per_class": np.bincount(labels, minlength=len(classes)).tolist() if classes else [],
        "sum": mean.sum(axes).tolist(),
        "sum_of_squares": (mean**2 + std**2).sum(axes).tolist(),
    }
    temporary.replace(path)
    sync(folder)
    write_whole(note_path(folder, number), json.dumps(note))


def is_finished(folder: Path, number: int) -> bool:
    """Whether a shard is on the disk, by its note."""
    try:
        note = json.loads(note_path(folder, number).read_text())
        return (folder / note["file"]).stat().st_size == note["bytes"]
    except (OSError, ValueError):
        return False


def claim_cache(folder: Path, settings: dict) -> bool:
    """Starts a cache, or goes on with one of the same settings. Returns whether it is finished already.

    Raises:
        ValueError: the folder holds something else; the message names what differs.
    """
    path, settings = folder / ".progress" / "settings.json", json.loads(json.dumps(settings))
    finished = (folder / LATENTS).exists()
    if not finished and not path.exists():
        if folder.exists() and any(entry.name != ".progress" for entry in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no cache: choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")
    old = read_facts(folder) if finished else json.loads(path.read_text())
    names = [name for name in settings if old.get(name) != settings[name]]
    if names:
        diff = ", ".join(f"{name} {old.get(name)} there, {settings[name]} here" for name in names)
        raise ValueError(f"{folder} is a cache of something else ({diff}): choose another --out")
    if finished:
        shutil.rmtree(path.parent, ignore_errors=True)
    for stale in path.parent.glob("*.tmp"):
        stale.unlink()
    return finished


def check_disk(folder: Path, needed: int) -> None:
    """Refuses work for which the folder's disk has no room; needed: bytes."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed / 1e9:.3g} GB more and has {free / 1e9:.3g} GB free")


def finish(folder: Path, num_shards: int) -> dict:
    """Compares the shards' checksums, writes latents.json from their notes, and returns it."""
    settings = json.loads((folder / ".progress" / "settings.json").read_text())
    notes = [json.loads(note_path(folder, number).read_text()) for number in range(num_shards)]
    count = sum(note["count"] for note in notes)
    if not count:
        raise ValueError(f"{folder}: not one image could be read")
    try:
        verify(folder, notes)
    except ValueError as error:
        for number, note in enumerate(notes):
            if str(folder / note["file"]) in str(error):
                note_path(folder, number).unlink()
        raise ValueError(f"{error}. The same command makes it anew") from None
    shape, classes = settings.pop("shape"), settings.pop("classes")
    latents_per_channel = count * shape[0] * shape[-2] * shape[-1]
    mean = np.sum([note.pop("sum") for note in notes], axis=0) / latents_per_channel
    square = np.sum([note.pop("sum_of_squares") for note in notes], axis=0) / latents_per_channel
    facts = {
        **settings,
        "dtype": "float16",
        "shape": shape,  # flips, mean and standard deviation, C, H, W
        "count": count,
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(square - mean**2).tolist(),
        "classes": classes,
        "count_per_class": np.sum([note.pop("count_per_class") for note in notes], axis=0, dtype=int).tolist(),
        "shards": notes,
        "meanflow": meanflow.__version__,
    }
    from datasets import DatasetInfo

    DatasetInfo(features=features(shape, classes)).write_to_directory(str(folder))
    state = {"_data_files": [{"filename": note["file"]} for note in notes], "_fingerprint": notes[0]["sha256"][:16]}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    write_whole(folder / "state.json", json.dumps({**state, "_split": None}, indent=2) + "\n")
    write_whole(folder / LATENTS, json.dumps(facts, indent=2) + "\n")
    shutil.rmtree(folder / ".progress")
    return facts


def read_facts(folder: Path) -> dict:
    """latents.json of a finished cache whose shards have their sizes.

    Raises:
        ValueError: it is none, is unfinished, or a shard is missing or cut; the message names the file.
    """
    if not (folder / LATENTS).is_file():
        if (folder / ".progress").exists():
            raise ValueError(f"{folder} is unfinished: give tools/cache_latents.py the same command again")
        raise ValueError(f"{folder} has no {LATENTS}: make it with tools/cache_latents.py")
    try:
        facts = json.loads((folder / LATENTS).read_text())
        shards = facts["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / LATENTS} is damaged: {error!r}") from None
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != shard["bytes"]:
            raise ValueError(f"{path} is damaged: it has {path.stat().st_size} bytes, and had {shard['bytes']}")
    return facts


def verify(folder: Path, shards: Sequence[dict], quiet: bool = False) -> None:
    """Reads shards whole, with a progress bar unless quiet.

    Raises:
        ValueError: one has not the checksum that it was written with.
    """
    for shard in tqdm(shards, "checksums", unit="shard", disable=quiet):
        if checksum(folder / shard["file"]) != shard["sha256"]:
            raise ValueError(f"{folder / shard['file']} is damaged: its checksum is not the one that was noted")


def write_random(folder: Path, count: int, vae: str, scaling_factor: float, resolution: int) -> None:
    """A finished cache of random moments, about as large as a VAE's, of 1,000 classes: to try things without images.

    vae: the name that the cache bears; its latents have 4 channels and an eighth of the resolution.
    """
    if resolution < 8 or resolution % 8:
        raise ValueError(f"resolution must be a multiple of 8, got {resolution}")
    shape, classes = (2, 2, 4, resolution // 8, resolution // 8), [str(label) for label in range(1000)]
    check_disk(folder, count * 2 * math.prod(shape))
    settings = {"source": f"random:{count}", "resolution": resolution, "shape": shape, "classes": classes}
    settings |= {"vae": vae, "vae_sha256": None, "scaling_factor": scaling_factor, "shift_factor": None}
    if claim_cache(folder, settings):
        return
    random, numbers = np.random.default_rng(0), range(-(-count // SHARD_SIZE))
    for number in numbers:
        size = min(SHARD_SIZE, count - number * SHARD_SIZE)
        moments = random.standard_normal((size, *shape), dtype=np.float32)
        mean, std = moments[:, :, 0], moments[:, :, 1]
        mean /= scaling_factor
        std[:] = 0.01 + 0.01 * std**2
        write_shard(folder, number, moments.astype(np.float16), random.integers(1000, size=size), classes)
    finish(folder, len(numbers))


def check_expected(folder: Path, facts: dict, recipe: TrainConfig) -> None:
    """Refuses a cache that was not made as the recipe expects, naming the difference."""
    wrong = [name for name in ("resolution", "scaling_factor") if facts[name] != getattr(recipe, name)]
    # Wherever a VAE lies, its weights decide. (Random latents are nobody's.)
    if facts["vae_sha256"] and recipe.vae and Path(recipe.vae).expanduser().is_dir():
        weights = fingerprint(load_vae(recipe.vae))
        if weights != facts["vae_sha256"]:
            raise ValueError(
                f"{folder} was made by another VAE than {recipe.vae}: by {facts['vae']}, with weights of SHA-256 "
                f"{str(facts['vae_sha256'])[:12]}..., not {weights[:12]}..."
            )
    elif facts["vae"] != recipe.vae:
        wrong.insert(0, "vae")
    if wrong:
        diff = ", ".join(f"{name} {facts[name]} there, {getattr(recipe, name)} here" for name in wrong)
        flags = " ".join(f"--{name.replace('_', '-')} {facts[name]}" for name in wrong)
        raise ValueError(
            f"{folder} holds other latents than the recipe expects ({diff}): make them anew, or say {flags}"
        )


class LatentSpace:
    """Model units of latents, (latent - shift) * scale, and the way back to pixels.

    Args:
        shift, scale: a number, or one a channel.
        vae: a folder or Hub id, loaded when first needed; or the AutoencoderKL.
    """

    def __init__(self, shift: float | list[float], scale: float | list[float], vae):
        self.shift, self.scale = (torch.tensor(a).view(-1, 1, 1) for a in (shift, scale))
        self.vae = vae

    def normalize(self, latents: Tensor) -> Tensor:
        return (latents - self.shift.to(latents.device)) * self.scale.to(latents.device)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Images in [-1, 1], about, (B, 3, H, W); without its VAE at hand, a third of the first three channels."""
        if isinstance(self.vae, str):
            try:
                self.vae = load_vae(self.vae)
            except ValueError as error:
                print(f"pictures show the latents themselves: {error}", file=sys.stderr)
                self.vae = None
        if self.vae is None:
            return x[:, :3] / 3
        return decode(self.vae.to(x.device), x / self.scale.to(x.device) + self.shift.to(x.device))


class Latents:
    """The latents of a cache, in model units, drawn anew from the VAE's posterior at each visit.

    Raises:
        ValueError: the cache is damaged, unfinished or not what the recipe expects.
    """

    def __init__(self, folder: Path, recipe: TrainConfig):
        import pyarrow as pa

        self.folder, self.flip = folder, recipe.flip
        facts = read_facts(folder)
        check_expected(folder, facts, recipe)
        self.shards = facts.pop("shards")
        self.shape = tuple(facts["shape"][2:])
        self.num_classes = len(facts["classes"])
        if recipe.normalization == "channel":
            shift, scale = facts["channel_mean"], [1 / std for std in facts["channel_std"]]
        else:
            shift, scale = facts["shift_factor"] or 0.0, facts["scaling_factor"]
        self.facts = {**facts, "normalization": recipe.normalization, "latents": {"shift": shift, "scale": scale}}
        self.space = LatentSpace(shift, scale, recipe.vae)
        self.moments, labels = [], []
        for shard in self.shards:
            try:
                with pa.memory_map(str(folder / shard["file"])) as file:
                    table = pa.ipc.open_stream(file).read_all()
                column = table["moments"].chunk(0)
                # Views of the file's pages: to decode the rows is ten times slower.
                while isinstance(column, pa.FixedSizeListArray):
                    column = column.flatten()
                self.moments.append(column.to_numpy().reshape(-1, *facts["shape"]))
                labels.append(table["label"].to_numpy())
            except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
                raise ValueError(f"{folder / shard['file']} is damaged: {error}") from None
        self.labels = torch.from_numpy(np.concatenate(labels))
        self.ends = list(itertools.accumulate(map(len, labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int], flips: Sequence[int]) -> Tensor:
        """The moments of these images, (B, 2, C, H, W) float16; flip 1 is the mirror image."""
        out = np.empty((len(indices), 2, *self.shape), np.float16)
        for row, (index, flip) in enumerate(zip(indices, flips)):
            shard = bisect.bisect_right(self.ends, index)
            out[row] = self.moments[shard][index - self.ends[shard], flip]  # counted from the shard's end
        return torch.from_numpy(out)

    def batch(self, indices: Sequence[int], randoms: Iterable[torch.Generator]) -> tuple[Tensor, Tensor | None]:
        flips, noise = [], torch.empty(len(indices), *self.shape)
        for row, random in enumerate(randoms):
            flips.append(int(self.flip and torch.rand((), generator=random) < 0.5))
            noise[row].normal_(generator=random)
        mean, std = self.read(indices, flips).float().unbind(1)
        y = self.labels[torch.as_tensor(indices)] if self.num_classes else None
        return self.space.normalize(torch.addcmul(mean, std, noise)), y

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.space.to_pixels(x)


class EncodedImages:
    """Image files that go through the VAE at each visit, on the training device. For small jobs: a cache is faster.

    A batch's x is (pixels, noise); `encode` makes it model units.
    """

    def __init__(self, images: ImageFiles, recipe: TrainConfig):
        if recipe.normalization == "channel":
            raise ValueError(
                "normalization must be scale without a latent cache, which has the statistics, got channel"
            )
        vae = load_vae(recipe.vae)
        if vae.config.scaling_factor != recipe.scaling_factor:
            there, here = vae.config.scaling_factor, recipe.scaling_factor
            raise ValueError(f"scaling_factor must be that of {recipe.vae}, {there}, got {here}")
        self.images, self.num_classes = images, images.num_classes
        self.shape = latent_shape(vae, recipe.resolution)
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        self.space = LatentSpace(shift, scale, vae)
        self.facts = {**images.facts, **vae_facts(vae, recipe.vae), "normalization": recipe.normalization}
        self.facts["latents"] = {"shift": shift, "scale": scale}

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], randoms: Iterable[torch.Generator]):
        randoms = list(randoms)
        pixels, y = self.images.batch(indices, randoms)
        return (pixels, torch.stack([torch.randn(self.shape, generator=random) for random in randoms])), y

    def encode(self, pixels: Tensor, noise: Tensor) -> Tensor:
        mean, std = encode(self.space.vae.to(pixels.device), pixels)
        return self.space.normalize(mean + std * noise)

    def to_pixels(self, x: Tensor) -> Tensor:
        return self.space.to_pixels(x)
