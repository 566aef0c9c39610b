"""The optimiser and the schedule of its rates."""

import math

import torch


def make_optimizer(objective, recipe, make=None) -> torch.optim.Optimizer:
    """The optimiser of everything in the objective that is trained.

    Args:
        objective, recipe: an Objective and a TrainConfig.
        make: makes one of your own, from groups of parameters, each with its rate, and the recipe; default: Adam, and
            AdamW where the recipe has a weight_decay.
    Raises:
        ValueError: it cannot skip a step whose gradient is not finite.
    """
    groups = objective.parameter_groups(recipe.lr)
    if recipe.weight_decay:
        groups = split_by_decay(objective, groups, recipe.weight_decay)
    kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
    optimizer = make(groups, recipe) if make else kind(groups, recipe.lr, recipe.betas, fused=True)
    # Optimisers that can read `found_inf`, and then skip the step on the device, say so by this attribute of torch's.
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        name = type(optimizer).__name__
        raise ValueError(f"optimizer {name} cannot skip a step whose gradient is not finite: give it fused=True")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def split_by_decay(objective, groups: list[dict], weight_decay: float) -> list[dict]:
    """Each group once with the weight decay, and once without, for its norms, biases and embeddings."""
    embeddings = {id(p) for m in objective.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    embeddings |= {id(p) for name, p in objective.named_parameters() if name.endswith("_tokens")}
    split = []
    for group in groups:
        spared = [p for p in group["params"] if p.ndim < 2 or id(p) in embeddings]
        decayed = [p for p in group["params"] if p.ndim >= 2 and id(p) not in embeddings]
        split += [{**group, "params": decayed, "weight_decay": weight_decay}]
        split += [{**group, "params": spared, "weight_decay": 0.0}]
    return [group for group in split if group["params"]]


def set_rates(optimizer: torch.optim.Optimizer, recipe, step: int, total: int) -> None:
    """Gives every group the rate of optimiser step `step`: its own rate, scaled by the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, total, group["initial_lr"])


def learning_rate(recipe, step: int, total: int, lr: float) -> float:
    """The rate of optimiser step `step`, counted from 0: a linear warm-up to lr, then the schedule, which ends at 0."""
    if step < recipe.warmup_steps:
        return lr * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    schedules = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
    return lr * schedules[recipe.schedule]
