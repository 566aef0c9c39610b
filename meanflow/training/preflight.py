"""What a run will be, before it begins, and the refusal of what cannot work. meanflow/training/screen.py shows it."""

import inspect
import math
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from meanflow.config import TrainConfig
from meanflow.data.base import Data
from meanflow.data.loader import SlotBatches
from meanflow.objectives import OBJECTIVES
from meanflow.objectives.base import Objective
from meanflow.publishing.checkpoints import checkpoints
from meanflow.training.checkpoint import check_folder, choose_checkpoint
from models import MODELS

# The networks of smoke tests.
SMALL = {"DiT": {"depth": 2, "hidden_size": 64, "num_heads": 4}, "UNet-cifar": {"model_channels": 16, "num_blocks": 1}}
SMALL |= {"UNet": {"block_out_channels": (16, 32), "attention": (False, True), "layers_per_block": 1}}

NetClass = type[ModelMixin]


@dataclass(frozen=True)
class Plan:
    """What a run will be. Sizes are in bytes."""

    recipe: TrainConfig
    data: Data
    num_parameters: int
    num_processes: int
    micro_batch: int  # images of each process and accumulation step
    total: int  # optimiser steps
    objective: dict[str, str]  # lines about the objective, by name
    memory: dict[str, int]  # of a process, without activations
    num_shards: int
    checkpoint_size: int
    checkpoints_at_once: int
    free_disk: int
    start: Path | None  # the checkpoint to go on from
    warnings: list[str]


def objective_class(recipe: TrainConfig, own: type[Objective] | None = None) -> type[Objective]:
    """The user's own objective, or the one that goes with the recipe's options.

    Raises:
        ValueError: there is none for these options.
    """
    options = type(recipe.objective)
    if own is None and options not in OBJECTIVES:
        raise ValueError(
            f"objective: no objective goes with {options.__name__}: give yours to run(RECIPE, objective=...)"
        )
    return own or OBJECTIVES[options]


def make_net(recipe: TrainConfig, data: Data, own: NetClass | None = None) -> ModelMixin:
    """The recipe's network, for the data's shape and classes; or the user's own, made by the same call.

    Raises:
        ValueError: there is no such network, or it does not take the data's shape.
    """
    if own is None and recipe.model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {recipe.model}")
    if own is not None and not is_own_file(own):
        raise ValueError(f"net: {own.__name__} must stand in a file of its own, which travels with its weights")
    channels, *size = data.shape
    sizes = recipe.net
    if recipe.smoke and own is None:
        sizes = {**sizes, **SMALL.get(recipe.model, SMALL[recipe.model.split("-")[0]])}
    kind = own or MODELS[recipe.model]
    try:
        net = kind(input_size=tuple(size), in_channels=channels, num_classes=data.num_classes, **sizes)
    except TypeError as error:  # it does not know a size
        raise ValueError(f"net: {recipe.model} cannot be made of {recipe.net}: {error}") from None
    augment_dim = net.config.get("augment_dim", 0)
    if augment_dim != (6 if recipe.augment else 0):
        raise ValueError(f"net.augment_dim must be 6 with augment and 0 without, got {augment_dim}")
    return net


def is_own_file(network: type) -> bool:
    """Whether a network stands in a file that can be imported without running a recipe."""
    return network.__module__ != "__main__" and Path(inspect.getfile(network)).is_file()


def total_steps(recipe: TrainConfig, data: Data) -> int:
    return recipe.steps or math.ceil(recipe.epochs * len(data) / recipe.global_batch)


def num_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def memory(recipe: TrainConfig, net: nn.Module, shards: int = 1) -> dict[str, int]:
    """Bytes that a process holds between steps, without activations; all of it is float32."""
    weights = 4 * num_parameters(net) // shards
    return {"weights": weights, "gradients": weights, "Adam": 2 * weights, "averages": weights * len(recipe.ema_decay)}


def checkpoint_bytes(recipe: TrainConfig, net: nn.Module) -> int:
    parts = memory(recipe, net)
    return sum(parts.values()) - parts["gradients"]


def preflight(
    recipe: TrainConfig,
    data: Data,
    num_processes: int = 1,
    objective: type[Objective] | None = None,
    net: NetClass | None = None,
) -> Plan:
    """What the run will be.

    Args:
        objective, net: the user's own, if they are not those that the recipe names.
    Raises:
        ValueError: a choice that cannot work; the message names it.
    """
    objective = objective_class(recipe, objective)
    for name in recipe.track:
        if find_spec(name) is None:
            raise ValueError(f"track: {name} is not installed: pip install 'meanflow[track]'")
    check_folder(recipe.out, recipe, objective, data.metadata)
    start = choose_checkpoint(recipe)
    if start is not None:
        check_folder(start, recipe, objective, data.metadata)
    with torch.device("meta"):
        network = make_net(recipe, data, net)
    total = total_steps(recipe, data)
    micro_batch = SlotBatches(recipe, objective, len(data), 0, total, 0, num_processes).micro_batch
    objective.check(recipe.objective, network, data.shape, data.num_classes)
    size = checkpoint_bytes(recipe, network)
    at_once = min(recipe.keep + 1, math.ceil(total / recipe.checkpoint_every))  # one is written while the others stay
    free = check_disk(recipe, total, size, at_once)
    shards = num_processes if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    return Plan(
        recipe=recipe,
        data=data,
        num_parameters=num_parameters(network),
        num_processes=num_processes,
        micro_batch=micro_batch,
        total=total,
        objective=objective.describe(recipe.objective, recipe.global_batch),
        memory=memory(recipe, network, shards),
        num_shards=shards,
        checkpoint_size=size,
        checkpoints_at_once=at_once,
        free_disk=free,
        start=start,
        warnings=[] if recipe.smoke else find_warnings(recipe, total, objective),
    )


def check_disk(recipe: TrainConfig, total: int, size: int, at_once: int) -> int:
    """The bytes that are free for checkpoints of this size, of which so many are there at once."""
    done = [int(path.name[5:]) for path in checkpoints(recipe.out)]
    there = next(path for path in (recipe.out, *recipe.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    needed = max(1, at_once - len(done)) * size
    if needed > free and max(done, default=0) < total:
        lack = f"{gib(free)} free, and {at_once} checkpoints of {gib(size)} need {gib(needed)} more"
        raise ValueError(f"out: {recipe.out} has {lack}: make room, lower --keep, or choose another --out")
    return free


def find_warnings(recipe: TrainConfig, total: int, objective: type[Objective]) -> list[str]:
    """What past runs died of unseen, with figures."""
    found = []
    if recipe.warmup_steps > total / 10:
        share = f"{recipe.warmup_steps / total:.0%} of the run's {total:,} steps"
        found.append(f"the warm-up of {recipe.warmup_steps:,} steps is {share}: lower --warmup-steps or train longer")
    for decay in recipe.ema_decay:
        left = decay**total
        if left > 0.05:
            advice = "lower --ema-decay or train longer"
            found.append(
                f"the average with decay {decay:g} will still hold {left:.0%} of the initial weights: {advice}"
            )
    if recipe.checkpoint_every > total:
        advice = f"--checkpoint-every {max(1, total // 4)} loses less if the run is killed"
        found.append(f"a checkpoint every {recipe.checkpoint_every:,} steps, and the run has {total:,}: {advice}")
    return found + objective.warnings(recipe.objective, recipe.global_batch)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
