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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict
from torch.nn import Module
from torch.optim import Optimizer

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.ema import Averages
from meanflow.files import checksum, errors_as, first_line, read_json, sync, write_json
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
    for file, new, free, whose in (("recipe", recipe_fields(recipe), FREE, ""), ("data", facts, PLACES, "the data's ")):
        if (folder / f"{file}.json").exists():
            old, new = flatten(read_json(folder / f"{file}.json")), flatten(json.loads(json.dumps(new)))
            fields = different(old, new, free)
            diff += [f"{whose}{name} {there!s:.80} there, {here!s:.80} here" for name, there, here in fields]
    if diff:
        raise ValueError(f"{folder} belongs to another recipe ({', '.join(diff)}): choose another --out, or remove it")


def claim_folder(recipe: TrainConfig, facts: dict):
    """Marks recipe.out as this recipe's, on these data, and locks it."""
    check_folder(recipe.out, recipe, facts)
    recipe.out.mkdir(parents=True, exist_ok=True)
    held = lock(recipe.out)
    write_json(recipe.out / "recipe.json", recipe_fields(recipe))
    write_json(recipe.out / "data.json", facts)
    return held


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first, by step."""
    return sorted(out.glob("step-" + "[0-9]" * 8))


def save(
    accelerator: Accelerator, recipe: TrainConfig, note: dict, net: ModelMixin, averages: Averages, optimizer: Optimizer
) -> bool:
    """Saves under a temporary name, renames when all is on the disk, and prunes to recipe.keep.

    note: what data.json and step.json hold, the step among it. Returns whether it is saved; a full disk, say, is
    reported, and the older checkpoints stay.
    """
    folder = recipe.out / f"step-{note['step']['step']:08d}"
    temporary = recipe.out / f".{folder.name}.tmp"

    def begin() -> None:
        remove_temporary(recipe.out)
        temporary.mkdir(parents=True)
        for name, fields in {"recipe": recipe_fields(recipe), **note}.items():
            write_json(temporary / f"{name}.json", fields)

    def save_network(source: Module, place: str) -> None:
        weights = state_dict.get_model_state_dict(source, options=WHOLE)  # by all processes
        if accelerator.is_main_process:
            with torch.device("meta"):
                whole = type(net).from_config(net.config)
            whole.load_state_dict(weights, assign=True)
            whole.save_pretrained(temporary / place)

    def save_moments() -> None:
        state = state_dict.get_optimizer_state_dict(net, optimizer, options=WHOLE).get("state", {})  # by all processes
        if accelerator.is_main_process:
            save_file(flatten(state), temporary / OPTIMIZER)

    def finish() -> None:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        write_json(temporary / CHECKSUMS, {str(path.relative_to(temporary)): checksum(path) for path in files})
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            folder.rename(recipe.out / f".{folder.name}.old.tmp")
        temporary.rename(folder)
        sync(recipe.out)
        for old in checkpoints(recipe.out)[: -recipe.keep]:
            old.rename(recipe.out / f".{old.name}.tmp")  # a kill amid its removal must not leave half in sight
        remove_temporary(recipe.out)

    try:
        together(accelerator, begin)
        together(accelerator, save_network, net, "model", main=False)
        for decay, average in averages.items():
            together(accelerator, save_network, average, f"ema/{decay}", main=False)
        together(accelerator, save_moments, main=False)
        together(accelerator, finish)
    except ValueError as error:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.print(f"{folder} could not be saved, the older checkpoints stay: {error}", file=sys.stderr)
        return False
    return True


def together(accelerator: Accelerator, part: Callable, *args, main: bool = True) -> Any:
    """part(*args) of the main process (None elsewhere), or of all; all wait.

    Raises:
        ValueError: on all of them, what went wrong on the first that failed.
    """
    result = error = None
    try:
        if accelerator.is_main_process or not main:
            result = part(*args)
    except Exception as exception:  # by three packages: OSError, RuntimeError, SafetensorError
        error = first_line(exception)
    errors = [error for error in gather_object([error]) if error is not None]
    if errors:
        raise ValueError(errors[0])
    return result


def remove_temporary(out: Path) -> None:
    for path in out.glob(".step-*.tmp"):
        shutil.rmtree(path)


def choose(recipe: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin anew.

    Raises:
        ValueError: recipe.resume cannot be followed.
    """
    newest = next(reversed(checkpoints(recipe.out)), None)
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
    with errors_as(f"{folder / 'step.json'} is missing or damaged"):
        return read_json(folder / "step.json")["step"]


def verify(folder: Path, part: str = "") -> None:
    """Compares a checkpoint's files, those of a part alone if one is given, with its checksums.

    Raises:
        ValueError: one is missing or damaged; the message names it and the checkpoint before.
    """
    older = [path for path in checkpoints(folder.parent) if path.name < folder.name]
    advice = f": --resume {older[-1]} goes on from the one before" if older else ""
    with errors_as(f"{folder / CHECKSUMS} is missing or damaged{advice}"):
        sums = read_json(folder / CHECKSUMS)
    for name, value in sums.items():
        if name.startswith(part) and not ((folder / name).is_file() and checksum(folder / name) == value):
            raise ValueError(f"{folder / name} is missing or damaged{advice}")


def load_networks(folder: Path, net: ModelMixin, averages: Averages) -> None:
    """Restores the weights and their averages, before they are sharded."""
    for target, source in [(net, "model"), *((average, f"ema/{decay}") for decay, average in averages.items())]:
        target.load_state_dict(type(net).from_pretrained(folder / source).state_dict())


def load_moments(folder: Path, net: Module, optimizer: Optimizer) -> None:
    """Restores the optimiser, after the weights are sharded, or not."""
    values = state_dict.get_optimizer_state_dict(net, optimizer) | {"state": defaultdict(dict)}
    for key, value in load_file(folder / OPTIMIZER).items():
        weight, name = key.rsplit(".", 1)
        values["state"][weight][name] = value
    whole = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(net, optimizer, values, options=whole)


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
    with errors_as(f"init_from: {source} has no weights for this network"):
        net.load_state_dict(type(net).from_pretrained(folder).state_dict())


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
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return file


def load_network(folder: Path, decay: float | None = None) -> tuple[ModelMixin, MeanFlowConfig]:
    """The averaged network of a checkpoint (its first decay), for sampling, and the objective it was trained by.

    Raises:
        ValueError: there is no such average, or it is damaged.
    """
    recipe = read_json(folder / "recipe.json")
    decay = recipe["ema_decay"][0] if decay is None else decay
    if decay not in recipe["ema_decay"]:
        raise ValueError(f"ema must be one of {', '.join(map(str, recipe['ema_decay']))} for {folder}, got {decay}")
    verify(folder, f"ema/{decay}/")
    average = folder / "ema" / str(decay)
    net = NETWORKS[read_json(average / "config.json")["_class_name"]].from_pretrained(average)
    objective = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe["objective"].items()}
    return net.eval(), MeanFlowConfig(**objective)
