"""What all importers share: reading a file as weights alone, and matching its names with those of a network."""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from meanflow.config import Refusal, check
from meanflow.files import ensure, errors_as
from meanflow.objectives.base import Sampling
from models import MODELS
from models.dit import DiT

UNREADABLE = "cannot be read as weights alone, and nothing else is read"
# The latents of Stable Diffusion's VAE, as DiT, SiT and MeanFlow take them: z = latent * scale.
SD_LATENTS = {"shift": [0.0] * 4, "scale": [0.18215] * 4}
# Heads of attention by width, which the weights do not tell.
HEADS = {make.keywords["hidden_size"]: make.keywords["num_heads"] for n, make in MODELS.items() if n.startswith("DiT")}


class Converted(NamedTuple):
    """A network with weights of others, and what became of every name in their file."""

    net: ModelMixin
    sampling: Sampling
    latents: dict | None  # {"shift", "scale"}, of each channel; None for pixels
    used: list[str]  # names in the file
    unused: list[str]
    missing: list[str]  # names of ours that the file does not have; they are as in a fresh network


def read(path: Path) -> dict:
    """What a file of PyTorch, safetensors or numpy (.npz) holds.

    Training checkpoints of others often have an argparse.Namespace inside, which is let in. No code is run.

    Raises:
        Refusal: it is none of these, is damaged, or holds objects of another class; the message names the class.
    """
    with errors_as(f"{path} {UNREADABLE}"):
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            foreign = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            why = f": it holds an object of {foreign[1]}" if foreign else ""  # torch's words advise to run its code
            raise Refusal(f"{path} {UNREADABLE}{why}") from None
    ensure(isinstance(content, dict), f"{path} must hold a dictionary of tensors")
    return content


def pick(content: dict, *names: str) -> dict[str, Tensor]:
    """The weights in a training checkpoint: the first of these entries that it has, or what the file holds itself.

    Raises:
        Refusal: this is no dictionary of tensors.
    """
    weights = next((content[name] for name in names if isinstance(content.get(name), dict)), content)
    others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    found = ", ".join(others[:3]) or "none"
    ensure(not others and len(weights) > 0, f"the file must hold tensors by name, got {found}")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def fit(net: ModelMixin, known: dict[str, Tensor], names: dict[str, str], fresh=(), left_out=()) -> tuple:
    """Gives the network these weights.

    Args:
        known: weights by the network's names.
        names: the file's name of each.
        fresh, left_out: beginnings of names that the file may lack, and of those that the network may not have.
    Returns:
        used, unused, missing: lists of names.
    Raises:
        Refusal: they match only by half.
    """
    wanted = net.state_dict()
    missing = [name for name in wanted if name not in known]
    unused = [name for name in known if name not in wanted]
    lacking = [name for name in missing if not name.startswith(tuple(fresh))]
    ensure(not lacking, f"half a match: {len(lacking)} weights are missing, such as {lacking[:1]}")
    others = [names[name] for name in unused if not name.startswith(tuple(left_out))]
    ensure(not others, f"half a match: {len(others)} weights are of no use, such as {others[:1]}")
    used = [name for name in wanted if name in known]
    wrong = [f"{names[name]} {tuple(known[name].shape)}" for name in used if known[name].shape != wanted[name].shape]
    ensure(not wrong, f"half a match: {len(wrong)} weights have another shape, such as {wrong[:1]}")
    infinite = [names[name] for name in used if not known[name].isfinite().all()]
    ensure(not infinite, f"{len(infinite)} weights are not finite, such as {infinite[:1]}")
    net.load_state_dict({**wanted, **{name: known[name] for name in used}})
    return [names[name] for name in used], [names[name] for name in unused], missing


def make_dit(weights: dict[str, Tensor], input_size: int | None, num_heads: int | None) -> DiT:
    """A DiT of the sizes that these weights have, by their names in facebookresearch/DiT.

    Args:
        input_size: height and width of the latents; None: as `pos_embed` tells, 32 without it.
        num_heads: of attention; None: as a DiT of this width has.
    Raises:
        Refusal: these are no such weights, or a size is another one.
    """
    needed = ["x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"]
    lacking = [name for name in needed if name not in weights]
    ensure(not lacking, f"no weights of a DiT: {lacking[:1]} is missing")
    width, channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    heads = num_heads or HEADS.get(width)
    ensure(heads is not None, f"num_heads must be given: the usual networks are {sorted(HEADS)} wide, and this {width}")
    if "pos_embed" in weights:
        side = math.isqrt(weights["pos_embed"].shape[1]) * patch_size
        check(input_size in (None, side), "input_size", input_size, f"{side}, which the file's positions are for")
        input_size = side
    if input_size is None:
        print("input_size: 32, which the file does not tell", file=sys.stderr)
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    sizes = {"input_size": input_size or 32, "patch_size": patch_size, "in_channels": channels, "hidden_size": width}
    return DiT(**sizes, depth=depth, num_heads=heads, num_classes=num_classes)


def check_positions(net: DiT, weights: dict[str, Tensor]) -> None:
    """Refuses weights whose fixed positions are not those of the network, which computes them."""
    if "pos_embed" in weights:
        gap = (weights["pos_embed"][0] - net.pos_embed).abs().max().item()
        ensure(gap < 1e-4, f"pos_embed differs from the sines and cosines of a DiT by {gap:.2g}")
