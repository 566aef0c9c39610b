"""The screen that a run begins with."""

import os
import sys

from meanflow import program
from meanflow.data.sources import training_data
from meanflow.publishing.checkpoints import saved_step
from meanflow.training import preflight
from meanflow.training.checkpoint import choose_checkpoint, init_weights
from meanflow.training.plan import render as render_costs
from meanflow.training.preflight import Parts, Plan, gib


def render(plan: Plan) -> str:
    """The plan in lines of the form `name value`."""
    recipe, net, G = plan.recipe, plan.net, plan.recipe.global_batch
    shards = plan.num_processes if os.environ.get("ACCELERATE_USE_FSDP") == "true" else 1
    memory = preflight.memory(recipe, net, shards)
    held = ", ".join(f"{name} {gib(size)}" for name, size in memory.items())
    held += "; activations come on top" + (" and the weights of two blocks" if shards > 1 else "")
    division = f"{plan.micro_batch} x {plan.num_processes} processes x {recipe.accumulation_steps} accumulation steps"
    size, at_once = gib(preflight.checkpoint_bytes(recipe, net)), preflight.checkpoints_at_once(recipe, plan.total)
    begins = f"the weights of {recipe.init_from}" if recipe.init_from else "fresh weights"
    resumes = f"after step {saved_step(plan.start):,}, from {plan.start}" if plan.start else f"nothing: from {begins}"
    lines = {
        "network": f"{recipe.model}{', made small' if recipe.smoke else ''}: {net.num_parameters():,} parameters",
        "data": describe_data(recipe, plan.data),
        "batch": f"{G} = {division}",
        "length": f"{plan.total:,} steps = {plan.total * G / len(plan.data):,.6g} epochs",
        **plan.objective.describe(recipe.objective, G),
        "memory": f"{gib(sum(memory.values()))} a process: {held}; on the host {size} while a checkpoint is written",
        "disk": f"a checkpoint {size}, at most {at_once} at once; {gib(plan.free_disk)} free in {recipe.out}",
        "resumes": resumes,
    }
    return "\n".join(f"  {name:10}{value}" for name, value in lines.items())


def describe_data(recipe, data) -> str:
    source = "random latents" if recipe.smoke and recipe.vae else recipe.data
    made_by = f" by {recipe.vae}" if recipe.vae else ""
    when = ", encoded at each step" if data.encode is not None else ""
    mirrored = ", mirrored at random" if recipe.flip else ""
    size = " x ".join(map(str, (f"{len(data):,}", *data.shape)))
    return f"{source}: {size}{made_by}{when}, {data.num_classes or 'no'} classes{mirrored}"


def show(plan: Plan) -> None:
    """Prints the screen, and the warnings below it; on one process."""
    print(render(plan))
    for warning in preflight.find_warnings(plan.recipe, plan.total, plan.objective):
        print(f"  warning   {warning}", file=sys.stderr)


def dry_run(recipe, own: Parts) -> None:
    """Shows what a run under this launch would be, without a device."""
    data = training_data(recipe, own.data)
    num_processes = recipe.plan[1] if recipe.plan else program.environment_number("WORLD_SIZE", 1)
    plan = preflight.preflight(recipe, data, num_processes, own, choose_checkpoint(recipe))
    if recipe.init_from and plan.start is None:
        init_weights(preflight.make_net(recipe, data, own.net), recipe.init_from)  # which may refuse them
    if program.environment_number("RANK", 0) == 0:
        show(plan)
        if recipe.plan:
            print(render_costs(plan))
        print("dry run: nothing was trained or written", file=sys.stderr)
