"""The sample pictures of a run."""

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from meanflow.config import TrainConfig
from meanflow.data.base import Data
from meanflow.noise import generator, noise
from meanflow.objectives.base import Sampling
from meanflow.pictures import save_grid
from meanflow.sampler import Cond, average_velocity, sample


@torch.no_grad()
def draw_samples(
    recipe: TrainConfig, data: Data, net: nn.Module, sampling: Sampling, accelerator: Accelerator, step: int
) -> None:
    """Writes samples/step-....png: one-step samples, a column for each class; of fixed pairs, their images again.

    All processes draw the same samples, because the network may be sharded.
    """
    columns = min(data.num_classes, 10) or 8
    rows = 8 if data.shape[-1] <= 16 else 4
    if recipe.fixed_noise:
        indices = range(min(64, len(data)))
        cond = conditions_of(data, indices, recipe.seed)
    else:
        indices = range(columns * rows)
        cond = conditions_to_show(data, indices, columns, recipe.seed)
    e, cond = send_to_device((noise(recipe.seed, indices, data.shape), cond), accelerator.device)
    x = sample(lambda z, t, r: average_velocity(net, z, t, r, cond, sampling.prediction, sampling.t_min), e)
    if accelerator.is_main_process:
        save_grid(data.to_pixels(x), recipe.out / "samples" / f"step-{step:08d}.png", columns)


def conditions_of(data: Data, indices: range, seed: int) -> Cond:
    _, cond = data.batch(indices, (generator(seed, index, "data") for index in indices))
    return cond


def conditions_to_show(data: Data, indices: range, columns: int, seed: int) -> Cond:
    """Classes that are evenly spread, one in each column; further conditions are those of the first samples."""
    cond = {}
    if set(conditions_of(data, range(1), seed)) - {"y"}:
        cond = conditions_of(data, [index % len(data) for index in indices], seed)
    if data.num_classes:
        classes = torch.linspace(0, data.num_classes - 1, columns).long()
        cond["y"] = classes.repeat(len(indices) // columns)
    return cond
