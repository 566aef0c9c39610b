"""A recipe's main program: first the flags, then torch, then a dry run, a smoke test or training."""

import math
import os
import sys
from dataclasses import replace

from meanflow.config import Refusal, TrainConfig, check
from meanflow.program import INTERRUPTED, end_with_launcher, environment_number, read_flags, refusals, unheard


@unheard()
def run(recipe: TrainConfig, objective: type | None = None, net: type | None = None, data=None, optimizer=None) -> None:
    """Trains a recipe. Every field is a flag; bad input ends the program with one line and code 2.

    Args:
        recipe: values only; its objective is the dataclass of the objective's options.
        objective: an `Objective` of your own; default: the one that goes with recipe.objective.
        net: a network of your own, a diffusers ModelMixin in a self-contained file. It is made by
            net(input_size=(H, W), in_channels=C, num_classes=K, **recipe.net) and has z_shape, (C, H, W).
        data: a function or class of your own: data(recipe) -> `Data`; default: what recipe.data names.
        optimizer: optimizer(groups, recipe) -> a torch optimiser of these groups of parameters; default: Adam, or AdamW
            if recipe.weight_decay > 0.
    Raises:
        SystemExit: the run cannot begin, or something ended it; training/guard.py has the codes.
    """
    end_with_launcher()
    with refusals():
        recipe = read_recipe(recipe)
        if net is not None:
            recipe = replace(recipe, model=net.__name__)
        from meanflow.training.preflight import Parts

        own = Parts(objective, net, data, optimizer)
        if recipe.dry_run:
            from meanflow.training.screen import dry_run

            return dry_run(recipe, own)
        from meanflow.training.trainer import Trainer

        trainer = Trainer(recipe, own)
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        trainer.train()
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        reason = " ".join(str(error).split("\n")[:2])
        sys.exit(f"error: compile: {reason}: leave it out, --no-compile")
    except Refusal as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def read_recipe(recipe: TrainConfig) -> TrainConfig:
    """The recipe with the fields that the command line gives.

    Raises:
        ValueError: a field is out of range.
    """
    given = read_flags(type(recipe), recipe)
    check("--epochs" not in sys.argv or given.epochs, "epochs", given.epochs, "> 0")
    if given.epochs != recipe.epochs and given.steps == recipe.steps:
        given = replace(given, steps=None)  # a flag takes precedence over what is written
    if not given.smoke:
        return given
    check(not given.dry_run, "dry_run", True, "left out, or smoke: a smoke run has no dry run")
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test of this machine, not of the network
    return smoke_test(given)


def smoke_test(recipe: TrainConfig) -> TrainConfig:
    """The recipe's smoke test, on any number of processes; on digits or shapes unless it trains on latents.

    Its network is small, so that no weights to begin from would fit.
    """
    data, flip, out = recipe.data, recipe.flip, recipe.out.with_name(f"{recipe.out.name}-smoke")
    if recipe.vae is None:
        data, flip = "digits" if data == "digits" or recipe.resolution else "shapes", False
    parts = environment_number("WORLD_SIZE", 1) * recipe.accumulation_steps
    batch = 4 * parts * math.ceil(4 / parts)
    every = {"log_every": 1, "sample_every": 4, "checkpoint_every": 2, "keep_every": None}
    every |= {"held_out": 0.0, "eval_every": None, "keep_best": False}
    every |= {"init_from": None, "compile": False}
    return replace(recipe, data=data, flip=flip, out=out, steps=4, global_batch=batch, **every)
