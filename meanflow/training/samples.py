"""The sample pictures of a run."""

import torch
from accelerate.utils import send_to_device

from meanflow.noise import generator, noise
from meanflow.pictures import save_grid
from meanflow.sampler import average_velocity, sample


@torch.no_grad()
def draw_samples(recipe, data, net, sampling, accelerator, step: int) -> None:
    """Writes samples/step-....png: one-step samples, a column for each class; of fixed pairs, their images again.

    Conditions beside the class are those of the first samples. All processes draw the same samples, because the network
    may be sharded.

    Args:
        recipe, data: a TrainConfig and a Data.
        net: the averaged network.
        sampling: how it is sampled, a Sampling.
        step: the optimiser step, for the name of the picture.
    """
    columns = min(data.num_classes, 10) or 8
    rows = 8 if data.shape[-1] <= 16 else 4
    count = min(64, len(data)) if recipe.fixed_noise else columns * rows
    _, cond = data.batch([0], [generator(recipe.seed, 0, "data")])
    if recipe.fixed_noise or cond.keys() - {"y"}:  # the conditions of the first samples
        indices = [index % len(data) for index in range(count)]
        _, cond = data.batch(indices, [generator(recipe.seed, index, "data") for index in indices])
    if data.num_classes and not recipe.fixed_noise:
        cond["y"] = torch.linspace(0, data.num_classes - 1, columns).long().repeat(rows)
    e, cond = send_to_device((noise(recipe.seed, range(count), data.shape), cond), accelerator.device)
    x = sample(lambda z, t, r: average_velocity(net, z, t, r, cond, sampling.prediction, sampling.t_min), e)
    if accelerator.is_main_process:
        save_grid(data.to_pixels(x), recipe.out / "samples" / f"step-{step:08d}.png", columns)
