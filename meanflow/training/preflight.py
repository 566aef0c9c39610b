"""What a run will be, before it begins, and the refusal of what cannot work. meanflow/training/screen.py shows it."""

import math
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import ModelMixin

from meanflow.config import Refusal, TrainConfig, check, recipe_fields
from meanflow.data.base import Data, check_fits
from meanflow.data.loader import SlotBatches
from meanflow.files import ensure, first_line
from meanflow.objectives import OBJECTIVES
from meanflow.objectives.base import Objective
from meanflow.program import environment_number
from meanflow.publishing.checkpoints import checkpoints, saved_step
from meanflow.training.checkpoint import check_folder
from models import MODELS

# The networks of smoke tests.
SMALL = {"DiT": {"depth": 2, "hidden_size": 64, "num_heads": 4}, "UNet-cifar": {"model_channels": 16, "num_blocks": 1}}
SMALL |= {"iMF": {"depth": 2, "aux_head_depth": 1, "hidden_size": 64, "num_heads": 4}}
SMALL |= {"UNet": {"block_out_channels": (16, 32), "attention": (False, True), "layers_per_block": 1}}


class Parts(NamedTuple):
    """What a run has of the user's own, as for `meanflow.run`; None: what the recipe names."""

    objective: type[Objective] | None = None
    net: type[ModelMixin] | None = None
    data: Callable[[TrainConfig], Data] | None = None
    optimizer: Callable[[list[dict], TrainConfig], torch.optim.Optimizer] | None = None


class Plan(NamedTuple):
    """What a run will be. Sizes are in bytes."""

    recipe: TrainConfig
    data: Data
    objective: type[Objective]
    net: ModelMixin  # on the meta device
    num_processes: int
    micro_batch: int  # images of each process and accumulation step
    total: int  # optimiser steps
    free_disk: int
    start: Path | None  # the checkpoint to go on from


def make_net(recipe: TrainConfig, data: Data, own: type[ModelMixin] | None = None) -> ModelMixin:
    """The recipe's network, for the data's shape and classes; or the user's own, made by the same call.

    Raises:
        ValueError: there is no such network, or it does not take the data's shape.
    """
    (channels, *size), sizes, kind = data.shape, recipe.net, own or MODELS.get(recipe.model)
    check(kind is not None, "model", recipe.model, f"one of {', '.join(MODELS)}")
    if own is None:
        for name, value in sizes.items():
            least = 0 if name in ("dropout", "augment_dim", "attention", "takes_omega", "v_head") else 1e-9
            numbers = value if isinstance(value, tuple) else (value,)
            check(all(least <= n < 2**16 for n in numbers), f"net.{name}", value, "> 0 and smaller than 65,536")
        small = SMALL.get(recipe.model, SMALL.get(recipe.model.split("-")[0], {})) if recipe.smoke else {}
        sizes = {**sizes, **small}
    else:
        check(own.__module__ != "__main__", "net", own.__name__, "in a file of its own, which travels with its weights")
    try:
        net = kind(input_size=tuple(size), in_channels=channels, num_classes=data.num_classes, **sizes)
    except (TypeError, LookupError, RuntimeError) as error:  # it does not know a size, or cannot have it
        raise Refusal(f"net: {recipe.model} cannot be made of {recipe.net}: {first_line(error)}") from None
    augment_dim = net.config.get("augment_dim", 0)
    check(augment_dim == 6 * bool(recipe.augment), "net.augment_dim", augment_dim, "6 with augment and 0 without")
    return net


def memory(recipe: TrainConfig, net: torch.nn.Module, shards: int = 1) -> dict[str, int]:
    """Bytes that a process holds between steps, without activations; all of it is float32."""
    weights = 4 * net.num_parameters() // shards
    return {"weights": weights, "gradients": weights, "Adam": 2 * weights, "averages": weights * len(recipe.ema_decay)}


def checkpoint_bytes(recipe: TrainConfig, net: torch.nn.Module) -> int:
    parts = memory(recipe, net)
    return sum(parts.values()) - parts["gradients"]


def checkpoints_at_once(recipe: TrainConfig, total: int) -> int:
    """How many checkpoints the disk has to hold: one is written while the others stay."""
    milestones = total // recipe.keep_every if recipe.keep_every else 0
    most = math.ceil(total / recipe.checkpoint_every)
    most += total // recipe.eval_every if recipe.keep_best else 0
    return min(recipe.keep + 1 + recipe.keep_best + milestones, most)


def preflight(recipe: TrainConfig, data: Data, num_processes: int = 1, own=Parts(), start: Path | None = None) -> Plan:
    """What the run will be.

    Args:
        start: the checkpoint to go on from.
    Raises:
        ValueError: a choice that cannot work; the message names it.
    """
    objective = own.objective or OBJECTIVES.get(type(recipe.objective))
    options = type(recipe.objective).__name__
    ensure(objective is not None, f"objective: none goes with {options}: give one to run(objective=...)")
    for name in recipe.track:
        ensure(find_spec(name) is not None, f"track: {name} is not installed: pip install -e '.[track]'")
    ensure(len(data) > 0, f"data: {recipe.data} has no samples")
    check_launch(recipe)
    check_memory(recipe, data, num_processes)
    done = saved_step(start) if start else 0
    for folder in filter(None, (recipe.out, start)):
        check_folder(folder, recipe_fields(recipe, objective.__name__), data.metadata)
    with torch.device("meta"):
        net = make_net(recipe, data, own.net)
    total = recipe.steps or math.ceil(recipe.epochs * len(data) / recipe.global_batch)
    check(total >= done, "steps", total, f"at least {done:,}, after which {start} was saved")
    batches = SlotBatches(recipe, objective, len(data), range(total), 0, num_processes)
    objective.check(recipe.objective, net.train(), data.shape, data.num_classes)
    free_disk = check_disk(recipe, total, checkpoint_bytes(recipe, net))
    return Plan(recipe, data, objective, net, num_processes, batches.micro_batch, total, free_disk, start)


def check_launch(recipe: TrainConfig) -> None:
    """Refuses a launcher's options that say something else than the recipe, which would overrule them."""
    for name, default in (("mixed_precision", "no"), ("gradient_accumulation_steps", "1")):
        field = name.removeprefix("gradient_")
        asked, here = os.environ.get(f"ACCELERATE_{name.upper()}", default), str(getattr(recipe, field))
        flag = f"--{field.replace('_', '-')} {asked}"
        check(asked in (default, here), field, here, f"what the launcher was given, {asked}: give the recipe {flag}")


def check_memory(recipe: TrainConfig, data: Data, num_processes: int) -> None:
    """Refuses batches that do not fit into this machine's memory, or into the part of it that processes share."""
    micro_batch = recipe.global_batch // (num_processes * recipe.accumulation_steps)
    batch = 8 * math.prod(data.shape) * micro_batch  # x and e
    check_fits(2 * batch, "global_batch", recipe.global_batch)
    if recipe.workers and Path("/dev/shm").exists():
        # Each process of --workers has two batches ready, and the loop some more.
        batches = 2 * (recipe.workers + recipe.accumulation_steps) + 1
        held = batches * batch * environment_number("LOCAL_WORLD_SIZE", 1)
        free = shutil.disk_usage("/dev/shm").free
        lack = f"{gib(free)} free, and the batches of {recipe.workers} workers need {gib(held)}"
        ensure(held <= free, f"/dev/shm has {lack}: --workers 0, or more of it for a container (docker's --shm-size)")


def check_disk(recipe: TrainConfig, total: int, size: int) -> int:
    """The bytes that are free for the run's checkpoints, each of this size."""
    done = [int(path.name[5:]) for path in checkpoints(recipe.out)]
    there = next(path for path in (recipe.out, *recipe.out.absolute().parents) if path.exists())
    free, at_once = shutil.disk_usage(there).free, checkpoints_at_once(recipe, total)
    needed = max(1, at_once - len(done)) * size
    is_finished = max(done, default=0) >= total
    lack = f"{gib(free)} free, and {at_once} checkpoints of {gib(size)} need {gib(needed)} more"
    advice = "make room, lower --keep, or choose another --out"
    ensure(needed <= free or is_finished, f"out: {recipe.out} has {lack}: {advice}")
    return free


def find_warnings(recipe: TrainConfig, total: int, objective: type[Objective]) -> list[str]:
    """What past runs died of unseen, with figures; nothing about a smoke test."""
    found = []
    if recipe.smoke:
        return found
    if recipe.warmup_steps > total / 10:
        share = f"{recipe.warmup_steps / total:.0%} of the run's {total:,} steps"
        found.append(f"the warm-up of {recipe.warmup_steps:,} steps is {share}: lower --warmup-steps or train longer")
    begins = getattr(recipe.objective, "guidance_from_step", 0)
    if begins >= total:
        fact = f"guidance would begin at step {begins:,}, and the run has {total:,}: no guidance will be trained in"
        found.append(f"{fact}: lower --objective.guidance-from-step or train longer")
    for decay in recipe.ema_decay:
        if decay**total > 0.05:
            fact = f"the average with decay {decay:g} will still hold {decay**total:.0%} of the initial weights"
            found.append(f"{fact}: lower --ema-decay or train longer")
    if recipe.checkpoint_every > total:
        advice = f"--checkpoint-every {max(1, total // 4)} loses less if the run is killed"
        found.append(f"a checkpoint every {recipe.checkpoint_every:,} steps, and the run has {total:,}: {advice}")
    return found + objective.warnings(recipe.objective, recipe.global_batch)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
