"""Checkpoints: folders step-00050000/ that are whole or not there.

model/      the network: config.json and safetensors, as diffusers' save_pretrained writes them
ema/0.9999/ the averaged network, likewise, one folder per decay
optimizer.safetensors: the optimiser's moments, by the names of the weights
recipe.json, data.json, step.json: what was trained on what for how long
checksums.json: of all the others
"""

import fcntl
import json
import os
import shutil
import socket
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict
from torch.nn import Module
from torch.optim import Optimizer

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.ema import Averages
from meanflow.files import checksum, first_line, sync, write_whole
from meanflow.hub import fetch
from models import NETWORKS

# What may differ between a run and its resumption, since it changes no number (accumulation: rounding alone). Where the
# data and the VAE lie is free, too: what they are is compared.
FREE = {"out", "accumulation_steps", "log_every", "sample_every", "checkpoint_every", "keep", "track", "workers"}
FREE |= {"data", "vae", "verify", "dry_run", "resume", "activation_checkpointing"}
FREE |= {"push_to_hub", "push_every", "warn_at", "halt_at", "grace_steps", "max_skipped"}
CHECKSUMS = "checksums.json"
OPTIMIZER = "optimizer.safetensors"
# On the main process, wherever the shards are.
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
PLACES = {"source", "vae", "vae_revision", "meanflow"}


def recipe_fields(recipe: TrainConfig) -> dict:
    return json.loads(json.dumps(asdict(recipe), default=str))


def flatten(fields: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def different(old: dict, new: dict, free: set[str]) -> list[tuple[str, object, object]]:
    """Name and both values of the fields in which two flat dictionaries differ, but for those that are free to."""
    fields = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new} - free)]
    return [(name, there, here) for name, there, here in fields if there != here]


def check_folder(folder: Path, recipe: TrainConfig, facts: dict) -> None:
    """Refuses a run's or a checkpoint's folder of another recipe or of other data, naming the fields that differ."""
    diff = []
    if (folder / "recipe.json").exists():
        old, new = json.loads((folder / "recipe.json").read_text()), recipe_fields(recipe)
        fields = different(flatten(old), flatten(new), FREE)
        diff += [f"{name} {there} there, {here} here" for name, there, here in fields]
    if (folder / "data.json").exists():
        old, new = json.loads((folder / "data.json").read_text()), json.loads(json.dumps(facts))
        fields = different(old, new, PLACES)
        diff += [f"the data's {name} {short(there)} there, {short(here)} here" for name, there, here in fields]
    if diff:
        raise ValueError(f"{folder} belongs to another recipe ({', '.join(diff)}): choose another --out, or remove it")


def short(value: object) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:40]}..."


def claim_folder(recipe: TrainConfig, facts: dict) -> None:
    """Marks recipe.out as this recipe's, on these data."""
    check_folder(recipe.out, recipe, facts)
    recipe.out.mkdir(parents=True, exist_ok=True)
    write_whole(recipe.out / "recipe.json", json.dumps(recipe_fields(recipe), indent=2) + "\n")
    write_whole(recipe.out / "data.json", json.dumps(facts, indent=2) + "\n")


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first, by step."""
    return sorted(out.glob("step-" + "[0-9]" * 8))


def save(
    accelerator: Accelerator,
    recipe: TrainConfig,
    facts: dict,
    progress: dict,
    net: ModelMixin,
    averages: Averages,
    optimizer: Optimizer,
) -> bool:
    """Saves under a temporary name, renames when all is on the disk, and prunes to recipe.keep.

    progress: what step.json holds, the step among it. Returns whether it is saved; a full disk, say, is reported, and
    the older checkpoints stay.
    """
    folder = recipe.out / f"step-{progress['step']:08d}"
    temporary = recipe.out / f".{folder.name}.tmp"

    def begin() -> None:
        if accelerator.is_main_process:
            remove_temporary(recipe.out)
            temporary.mkdir(parents=True)
            for name, fields in (("recipe", recipe_fields(recipe)), ("data", facts), ("step", progress)):
                (temporary / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")

    def save_network(source: Module, place: str) -> None:
        weights = state_dict.get_model_state_dict(source, options=WHOLE)  # by all processes
        if accelerator.is_main_process:
            with torch.device("meta"):
                whole = type(net).from_config(net.config)
            whole.load_state_dict(weights, assign=True)
            whole.save_pretrained(temporary / place)

    def save_moments() -> None:
        values = moments(net, optimizer)
        if accelerator.is_main_process:
            save_file(values, temporary / OPTIMIZER)

    def finish() -> None:
        if accelerator.is_main_process:
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            sums = {str(path.relative_to(temporary)): checksum(path) for path in files}
            (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2) + "\n")
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            if folder.exists():
                folder.rename(recipe.out / f".{folder.name}.old.tmp")
            temporary.rename(folder)
            sync(recipe.out)
            for old in checkpoints(recipe.out)[: -recipe.keep]:
                old.rename(recipe.out / f".{old.name}.tmp")  # a kill amid its removal must not leave half in sight
            remove_temporary(recipe.out)

    networks = {"model": net, **{f"ema/{decay}": average for decay, average in averages.items()}}
    saves = [partial(save_network, source, place) for place, source in networks.items()]
    for part in (begin, *saves, save_moments, finish):
        if (error := together(accelerator, part)) is not None:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            accelerator.print(f"{folder} could not be saved, the older checkpoints stay: {error}", file=sys.stderr)
            return False
    return True


def moments(net: Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors as WEIGHT.exp_avg and the like, on the main process. By all processes."""
    state = state_dict.get_optimizer_state_dict(net, optimizer, options=WHOLE).get("state", {})
    return {f"{weight}.{name}": value for weight, values in state.items() for name, value in values.items()}


def together(accelerator: Accelerator, part: Callable[[], None]) -> str | None:
    """Runs a part on all processes and returns what went wrong on the first that failed, on all of them."""
    error = None
    try:
        part()
    except Exception as exception:  # by three packages: OSError, RuntimeError, SafetensorError
        error = first_line(exception)
    return next((error for error in gather_object([error]) if error is not None), None)


def remove_temporary(out: Path) -> None:
    for path in out.glob(".step-*.tmp"):
        shutil.rmtree(path)


def choose(recipe: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin anew.

    Raises:
        ValueError: recipe.resume cannot be followed.
    """
    newest = checkpoints(recipe.out)[-1] if checkpoints(recipe.out) else None
    if recipe.resume == "never" and newest:
        raise ValueError(f"resume is never, but {recipe.out} has checkpoints: choose another --out")
    if recipe.resume in ("auto", "never"):
        return newest
    folder = Path(recipe.resume).expanduser()
    if not (folder / "step.json").is_file():
        raise ValueError(f"resume must be auto, never or the folder of a checkpoint, got {recipe.resume}")
    return folder


def saved_step(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    try:
        return json.loads((folder / "step.json").read_text())["step"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{folder / 'step.json'} is missing or damaged") from None


def verify(folder: Path, part: str = "") -> None:
    """Compares a checkpoint's files, those of a part alone if one is given, with its checksums.

    Raises:
        ValueError: one is missing or damaged; the message names it and the checkpoint before.
    """
    older = [path for path in checkpoints(folder.parent) if path.name < folder.name]
    advice = f": --resume {older[-1]} goes on from the one before" if older else ""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder / CHECKSUMS} is missing or damaged{advice}") from None
    for name, value in sums.items():
        if name.startswith(part) and not ((folder / name).is_file() and checksum(folder / name) == value):
            raise ValueError(f"{folder / name} is missing or damaged{advice}")


def load_networks(folder: Path, net: ModelMixin, averages: Averages) -> None:
    """Restores the weights and their averages, before they are sharded."""
    for target, source in [(net, "model"), *((average, f"ema/{decay}") for decay, average in averages.items())]:
        target.load_state_dict(type(net).from_pretrained(folder / source).state_dict())


def load_moments(folder: Path, net: Module, optimizer: Optimizer) -> None:
    """Restores the optimiser, after the weights are sharded, or not."""
    values = state_dict.get_optimizer_state_dict(net, optimizer)
    values["state"] = defaultdict(dict)
    for key, value in load_file(folder / OPTIMIZER).items():
        weight, name = key.rsplit(".", 1)
        values["state"][weight][name] = value
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(net, optimizer, values, options=options)


def go_back(out: Path, folder: Path) -> None:
    """Renames the checkpoints newer than folder, one of them: they must not be the newest again."""
    if folder.parent.resolve() == out.resolve():
        for later in checkpoints(out):
            if later.name > folder.name:
                later.rename(later.with_name(f"{later.name}.left"))


def init_weights(net: ModelMixin, source: str) -> None:
    """Gives net the weights of a checkpoint (its model, not an average), an exported folder, a Hub id or ID@REVISION.

    Raises:
        ValueError: there are none, or they are of another shape.
    """
    folder = fetch(source)
    folder = next((folder / name for name in ("model", "net") if (folder / name).is_dir()), folder)
    try:
        net.load_state_dict(type(net).from_pretrained(folder).state_dict())
    except Exception as error:  # of many kinds
        raise ValueError(f"init_from: {source} has no weights for this network: {first_line(error)}") from None


def lock(out: Path):
    """Claims the folder for this process as long as the returned file is open.

    Raises:
        ValueError: another process has it.
    """
    file = (out / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{out} is in use by another run ({file.read().strip()}): choose another --out") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def load_network(folder: Path, decay: float | None = None) -> tuple[ModelMixin, MeanFlowConfig]:
    """The averaged network of a checkpoint (its first decay), for sampling, and the objective it was trained by.

    Raises:
        ValueError: there is no such average, or it is damaged.
    """
    recipe = json.loads((folder / "recipe.json").read_text())
    decay = recipe["ema_decay"][0] if decay is None else decay
    if decay not in recipe["ema_decay"]:
        raise ValueError(f"ema must be one of {', '.join(map(str, recipe['ema_decay']))} for {folder}, got {decay}")
    verify(folder, f"ema/{decay}/")
    average = folder / "ema" / str(decay)
    net = NETWORKS[json.loads((average / "config.json").read_text())["_class_name"]].from_pretrained(average)
    objective = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe["objective"].items()}
    return net.eval(), MeanFlowConfig(**objective)
