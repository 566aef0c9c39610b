"""What a run samples while it trains: its pictures, and what it compares with a reference."""

from pathlib import Path

import torch
from accelerate.utils import send_to_device

from meanflow.noise import generator, noise
from meanflow.pictures import save_grid
from meanflow.sampler import average_velocity, euler, guidance_conditions, sample, usual_interval


def draw_samples(recipe, data, net, sampling, accelerator, step: int) -> Path:
    """Writes samples/step-....png: one-step samples, a column for each class; of fixed pairs, their images again.

    Conditions beside the class are those of the first samples. All processes draw the same samples, because the network
    may be sharded.

    Args:
        recipe, data: a TrainConfig and a Data.
        net: the averaged network.
        sampling: how it is sampled, a Sampling.
        step: the optimiser step, for the name of the picture.
    Returns:
        the picture's path.
    """
    columns = min(data.num_classes, 10) or 8
    rows = 8 if data.shape[-1] <= 16 else 4
    count = min(64, len(data)) if recipe.fixed_noise else columns * rows
    shown = torch.linspace(0, data.num_classes - 1, columns).long().repeat(rows) if data.num_classes else None
    x = one_step(recipe, data, net, sampling, range(count), None if recipe.fixed_noise else shown, accelerator.device)
    path = recipe.out / "samples" / f"step-{step:08d}.png"
    if accelerator.is_main_process:
        save_grid(data.to_pixels(x), path, columns)
    return path


@torch.no_grad()
def one_step(recipe, data, net, sampling, indices: range, y: torch.Tensor | None, device) -> torch.Tensor:
    """One-step samples in model units, (B, C, *S), of the noise of these indices.

    Args:
        y: their classes, (B,); None: those of the training samples, as further conditions always are.
    """
    _, cond = data.batch([0], [generator(recipe.seed, 0, "data")])
    if cond and (y is None or cond.keys() - {"y"}):
        places = [index % len(data) for index in indices]
        _, cond = data.batch(places, [generator(recipe.seed, place, "data") for place in places])
    cond = cond if y is None else {**cond, "y": y}
    is_ode = sampling.solver != "meanflow"  # without r != t, u is known only at r = t
    if sampling.guidance_range is not None:
        scale, ones = sampling.guidance_scale, torch.ones(len(indices))
        cond |= guidance_conditions(scale, usual_interval(scale, sampling.guidance_interval), ones, is_ode)
    e, cond = send_to_device((noise(recipe.seed, indices, data.shape), cond), device)
    solver = euler if is_ode else sample
    return solver(lambda z, t, r: average_velocity(net, z, t, r, cond, sampling.prediction, sampling.t_min), e, 1)
