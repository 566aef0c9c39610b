"""The screen that a run begins with."""

import os
import sys

from meanflow.config import TrainConfig
from meanflow.data.base import Data
from meanflow.publishing.checkpoints import saved_step
from meanflow.training.preflight import Plan, gib


def render(plan: Plan) -> str:
    """The plan in lines of the form `name value`."""
    recipe, samples = plan.recipe, len(plan.data)
    begins = f"the weights of {recipe.init_from}" if recipe.init_from else "fresh weights"
    division = f"{plan.micro_batch} x {plan.num_processes} processes x {recipe.accumulation_steps} accumulation steps"
    held = ", ".join(f"{name} {gib(size)}" for name, size in plan.memory.items())
    held += "; activations come on top" + (" and the weights of two blocks" if plan.num_shards > 1 else "")
    at_once = f"at most {plan.checkpoints_at_once} at once"
    lines = {
        "network": f"{recipe.model}{', made small' if recipe.smoke else ''}: {plan.num_parameters:,} parameters",
        "data": describe_data(recipe, plan.data),
        "batch": f"{recipe.global_batch} = {division}",
        "length": f"{plan.total:,} steps = {plan.total * recipe.global_batch / samples:,.6g} epochs",
        **plan.objective,
        "memory": f"{gib(sum(plan.memory.values()))} a process: {held}",
        "disk": f"a checkpoint {gib(plan.checkpoint_size)}, {at_once}; {gib(plan.free_disk)} free in {recipe.out}",
        "resumes": f"after step {saved_step(plan.start):,}, from {plan.start}"
        if plan.start
        else f"nothing: from {begins}",
    }
    return "\n".join(f"  {name:10}{value}" for name, value in lines.items())


def describe_data(recipe: TrainConfig, data: Data) -> str:
    source = "random latents" if recipe.smoke and recipe.vae else recipe.data
    words = [f"{source}: {len(data):,} x {' x '.join(map(str, data.shape))}"]
    if recipe.vae:
        words[0] += f" by {recipe.vae}"
    if data.encode is not None:
        words.append("encoded at each step")
    words.append(f"{data.num_classes or 'no'} classes")
    if recipe.flip:
        words.append("mirrored at random")
    return ", ".join(words)


def show(plan: Plan) -> None:
    """Prints the screen, and the warnings below it; on one process."""
    print(render(plan))
    for warning in plan.warnings:
        print(f"  warning   {warning}", file=sys.stderr)


def dry_run(plan: Plan) -> None:
    """Shows the plan of a run under this launch, without a device."""
    if int(os.environ.get("RANK", 0)) == 0:
        show(plan)
        print("dry run: nothing was trained or written", file=sys.stderr)
