"""Checkpoints: folders step-00050000/ that are whole or not there.

model/      the network: config.json and safetensors, as diffusers' save_pretrained writes them
ema/0.9999/ the averaged network, likewise, one folder per decay
state/      the optimiser, as Accelerate's save_state writes it
recipe.json, data.json, step.json: what was trained on what for how long
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from diffusers import ModelMixin

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.ema import Averages
from meanflow.files import sync, write_whole
from models import MODELS

# What may differ between a run and its resumption, since it changes no number (accumulation: rounding alone). Where the
# data and the VAE lie is free, too: what they are is compared.
FREE = {"out", "accumulation_steps", "log_every", "sample_every", "checkpoint_every", "keep", "track", "workers"}
FREE |= {"data", "vae", "verify", "dry_run"}
PLACES = {"source", "vae", "vae_revision", "meanflow"}


def recipe_fields(recipe: TrainConfig) -> dict:
    return json.loads(json.dumps(asdict(recipe), default=str))


def flatten(fields: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def different(a: dict, b: dict) -> set[str]:
    """The fields in which two recipes differ, but for those that change no number."""
    a, b = flatten(a), flatten(b)
    return {name for name in {*a, *b} - FREE if a.get(name) != b.get(name)}


def check_folder(recipe: TrainConfig, facts: dict) -> None:
    """Refuses a folder of another recipe or of other data, naming the fields that differ."""
    diff = []
    if (recipe.out / "recipe.json").exists():
        old, new = json.loads((recipe.out / "recipe.json").read_text()), recipe_fields(recipe)
        names, old, new = sorted(different(old, new)), flatten(old), flatten(new)
        diff += [f"{name} {old.get(name)} there, {new.get(name)} here" for name in names]
    if (recipe.out / "data.json").exists():
        old, new = json.loads((recipe.out / "data.json").read_text()), json.loads(json.dumps(facts))
        names = sorted(name for name in {*old, *new} - PLACES if old.get(name) != new.get(name))
        diff += [f"the data's {name} {short(old.get(name))} there, {short(new.get(name))} here" for name in names]
    if diff:
        raise ValueError(
            f"{recipe.out} belongs to another recipe ({', '.join(diff)}): choose another --out, or remove it"
        )


def short(value: object) -> str:
    return text if len(text := str(value)) <= 40 else f"{text[:40]}..."


def claim_folder(recipe: TrainConfig, facts: dict) -> None:
    """Marks recipe.out as this recipe's, on these data."""
    check_folder(recipe, facts)
    recipe.out.mkdir(parents=True, exist_ok=True)
    write_whole(recipe.out / "recipe.json", json.dumps(recipe_fields(recipe), indent=2) + "\n")
    write_whole(recipe.out / "data.json", json.dumps(facts, indent=2) + "\n")


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, oldest first, by step."""
    return sorted(out.glob("step-" + "[0-9]" * 8))


def save(
    accelerator: Accelerator, recipe: TrainConfig, facts: dict, step: int, net: ModelMixin, averages: Averages
) -> None:
    """Saves under a temporary name, renames when all is on the disk, and prunes to recipe.keep."""
    folder = recipe.out / f"step-{step:08d}"
    temporary = recipe.out / f".{folder.name}.tmp"
    if accelerator.is_main_process:
        remove_temporary(recipe.out)
        net.save_pretrained(temporary / "model")
        for decay, average in averages.items():
            average.save_pretrained(temporary / "ema" / str(decay))
        (temporary / "recipe.json").write_text(json.dumps(recipe_fields(recipe), indent=2) + "\n")
        (temporary / "data.json").write_text(json.dumps(facts, indent=2) + "\n")
        (temporary / "step.json").write_text(json.dumps({"step": step}) + "\n")
    accelerator.wait_for_everyone()
    # The weights are in model/ already: the hook empties the list that Accelerate would write.
    hook = accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.save_state(temporary / "state", safe_serialization=True)
    hook.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(recipe.out)
        for old in checkpoints(recipe.out)[: -recipe.keep]:
            old.rename(recipe.out / f".{old.name}.tmp")  # a kill amid the removal must not leave half of it in sight
        remove_temporary(recipe.out)


def remove_temporary(out: Path) -> None:
    for path in out.glob(".step-*.tmp"):
        shutil.rmtree(path)


def load(accelerator: Accelerator, recipe: TrainConfig, net: ModelMixin, averages: Averages) -> int:
    """Restores the newest checkpoint and returns its step; 0 if there is none."""
    if not checkpoints(recipe.out):
        return 0
    folder = checkpoints(recipe.out)[-1]
    for target, source in [(net, "model"), *((average, f"ema/{decay}") for decay, average in averages.items())]:
        target.load_state_dict(type(net).from_pretrained(folder / source).state_dict())
    hook = accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    accelerator.load_state(folder / "state")
    accelerator.step = 0  # the micro-steps of another accumulation
    hook.remove()
    return json.loads((folder / "step.json").read_text())["step"]


def load_network(folder: Path) -> tuple[ModelMixin, MeanFlowConfig]:
    """The averaged network of a checkpoint (its first decay), for sampling, and the objective it was trained by."""
    recipe = json.loads((folder / "recipe.json").read_text())
    net = MODELS[recipe["model"]].func.from_pretrained(folder / "ema" / str(recipe["ema_decay"][0]))
    objective = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe["objective"].items()}
    return net.eval(), MeanFlowConfig(**objective)
