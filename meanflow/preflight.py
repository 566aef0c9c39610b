"""What a run will be, in one screen, before it begins; and the refusal of what cannot work."""

import math
import os
import shutil
import sys
from importlib.util import find_spec

import torch
from diffusers import ModelMixin

from meanflow.checkpoint import check_folder, checkpoints, choose, saved_step
from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.data import Data, SlotBatches, load_data
from meanflow.latents import EncodedImages
from meanflow.objective import MeanFlow, has_dropout
from meanflow.time import num_meanflow
from models import MODELS

# The networks of smoke tests.
SMALL = {"DiT": {"depth": 2, "hidden_size": 64, "num_heads": 4}, "UNet-cifar": {"model_channels": 16, "num_blocks": 1}}
SMALL |= {"UNet": {"block_out_channels": (16, 32), "attention": (False, True), "layers_per_block": 1}}


def make_net(recipe: TrainConfig, data: Data) -> ModelMixin:
    """The recipe's network, for the data's shape and classes.

    Raises:
        ValueError: there is no such network, or it does not take the data's shape.
    """
    if recipe.model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {recipe.model}")
    channels, *size = data.shape
    small = SMALL.get(recipe.model, SMALL[recipe.model.split("-")[0]]) if recipe.smoke else {}
    sizes = {**recipe.net, **small}
    try:
        net = MODELS[recipe.model](input_size=tuple(size), in_channels=channels, num_classes=data.num_classes, **sizes)
    except TypeError as error:  # it does not know a size
        raise ValueError(f"net: {recipe.model} cannot be made of {recipe.net}: {error}") from None
    told = net.config.get("augment_dim", 0)
    if told != (6 if recipe.augment else 0):
        raise ValueError(f"net.augment_dim must be 6 with augment and 0 without, got {told}")
    return net


def total_steps(recipe: TrainConfig, data: Data) -> int:
    return recipe.steps or math.ceil(recipe.epochs * len(data) / recipe.global_batch)


def memory(recipe: TrainConfig, net: ModelMixin, shards: int = 1) -> dict[str, int]:
    """Bytes that a process holds between steps, activations aside; all is float32."""
    weights = 4 * parameters(net) // shards
    return {"weights": weights, "gradients": weights, "Adam": 2 * weights, "averages": weights * len(recipe.ema_decay)}


def checkpoint_bytes(recipe: TrainConfig, net: ModelMixin) -> int:
    return sum(memory(recipe, net).values()) - memory(recipe, net)["gradients"]


def preflight(recipe: TrainConfig, data: Data, num_processes: int) -> str:
    """The screen.

    Raises:
        ValueError: a choice that cannot work; the message names it.
    """
    for name in recipe.track:
        if find_spec(name) is None:
            raise ValueError(f"track: {name} is not installed: pip install 'meanflow[track]'")
    check_folder(recipe.out, recipe, data.facts)
    start = choose(recipe)
    if start is not None:
        check_folder(start, recipe, data.facts)
    with torch.device("meta"):
        net = make_net(recipe, data)
    if recipe.objective.jvp == "finite-difference" and has_dropout(net.train()):
        raise ValueError("objective.jvp must be exact for a network with dropout, got finite-difference")
    objective, G, total = recipe.objective, recipe.global_batch, total_steps(recipe, data)
    micro_batch = SlotBatches(recipe, len(data), 0, total, 0, num_processes).micro_batch
    if objective.guided and not data.num_classes:
        raise ValueError("objective.omega and objective.kappa must be 1 and 0 for data without classes, got guidance")
    if objective.channel_weights != "inverse-variance":
        MeanFlow(net, objective).check_channels(data.shape[0])

    done = [int(path.name[5:]) for path in checkpoints(recipe.out)]
    size, written = checkpoint_bytes(recipe, net), math.ceil(total / recipe.checkpoint_every)
    there = next(path for path in (recipe.out, *recipe.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    at_once = min(recipe.keep + 1, written)  # one is being written while the others stay
    needed = max(1, at_once - len(done)) * size
    if needed > free and max(done, default=0) < total:
        lack = f"{gib(free)} free, and {at_once} checkpoints of {gib(size)} need {gib(needed)} more"
        raise ValueError(f"out: {recipe.out} has {lack}: make room, lower --keep, or choose another --out")

    shards = num_processes if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    parts = memory(recipe, net, shards)
    held = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    held += "; activations come on top" + (" and the weights of two blocks" if shards > 1 else "")
    source = "random latents" if recipe.smoke and recipe.vae else recipe.data
    made = f" by {recipe.vae}" if recipe.vae else ""
    made += ", encoded at each step" if isinstance(data, EncodedImages) else ""
    made += f", {data.num_classes or 'no'} classes" + (", mirrored at random" if recipe.flip else "")
    division = f"{micro_batch} x {num_processes} processes x {recipe.accumulation_steps}"
    begins = f"the weights of {recipe.init_from}" if recipe.init_from else "fresh weights"
    lines = {
        "network": f"{recipe.model}{', made small' if recipe.smoke else ''}: {parameters(net):,} parameters",
        "data": f"{source}: {len(data):,} x {' x '.join(map(str, data.shape))}{made}",
        "batch": f"{G} = {division} accumulation steps; {num_meanflow(objective, G)} of {G} with r != t",
        "length": f"{total:,} steps = {total * G / len(data):,.6g} epochs",
        "guidance": guidance_in_words(objective),
        "memory": f"{gib(sum(parts.values()))} a process: {held}",
        "disk": f"a checkpoint {gib(size)}, at most {at_once} at once; {gib(free)} free in {recipe.out}",
        "resumes": f"after step {saved_step(start):,}, from {start}" if start else f"nothing: from {begins}",
    }
    return "\n".join(f"  {name:10}{value}" for name, value in lines.items())


def parameters(net: ModelMixin) -> int:
    return sum(p.numel() for p in net.parameters())


def guidance_in_words(config: MeanFlowConfig) -> str:
    """What one step of the trained network does without a CFG scale, in words."""
    if not config.guided:
        return "none trained in (omega 1, kappa 0)"
    scale = config.omega / (1 - config.kappa)
    where = f"for t in [{config.t_start:g}, {config.t_end:g}] (omega {config.omega:g}, kappa {config.kappa:g})"
    return f"trained in, effective scale {scale:.4g} {where}"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def dry_run(recipe: TrainConfig) -> None:
    """Prints the screen of a run under this launch, without a device."""
    if recipe.smoke:
        raise ValueError("smoke runs have no dry run: leave out one of --smoke and --dry-run")
    screen = preflight(recipe, load_data(recipe), int(os.environ.get("WORLD_SIZE", 1)))
    if int(os.environ.get("RANK", 0)) == 0:
        print(screen)
        print("dry run: nothing was trained or written", file=sys.stderr)
