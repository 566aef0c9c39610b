"""A trained network as others use it: a pipeline in memory or a folder, from a run, a folder or the Hub."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template

import torch
from diffusers import AutoencoderKL

from meanflow import checkpoint
from meanflow.config import MeanFlowConfig
from meanflow.files import first_line, read_json
from meanflow.hub import fetch
from meanflow.pictures import middle_slices, save_grid
from meanflow.pipeline import MeanFlowPipeline
from meanflow.preflight import guidance_in_words, parameters
from meanflow.vae import fingerprint, load_vae
from models import NETWORKS

INDEX = "model_index.json"


def load_pipeline(
    source: str | Path, ema: float | None = None, variant: str | None = None, revision: str | None = None
) -> MeanFlowPipeline:
    """The pipeline of a run (its newest checkpoint), a checkpoint, an exported folder or a Hub id, in float32.

    Args:
        ema: decay of the average to take from a run; default: the recipe's first.
        variant: of an exported folder: bf16 or fp16, the precision that its weights were saved in.
    Raises:
        ValueError: it is none of these, not whole, or has no such average or variant.
    """
    folder = fetch(source, revision, variant)
    if (folder / INDEX).is_file():
        if ema is not None:
            raise ValueError(f"ema {ema} is for runs: {source} holds one average")
        return read_export(folder, variant)
    folder = find_checkpoint(folder)
    if variant is not None:
        raise ValueError(f"variant {variant} is for exported folders, and {folder} is a checkpoint")
    with named(folder):
        recipe, facts = (read_json(folder / f"{name}.json") for name in ("recipe", "data"))
        net, _ = checkpoint.load_network(folder, ema)
        vae = load_vae(recipe["vae"]) if recipe["vae"] else None
        if vae is not None and facts.get("vae_sha256") not in (None, fingerprint(vae)):
            raise ValueError(f"vae: {recipe['vae']} has other weights than in training")
        return MeanFlowPipeline(net, vae, recipe["objective"], dict(enumerate(facts["classes"])), facts.get("latents"))


@contextmanager
def named(place: str | Path) -> Iterator[None]:
    """Makes an error of a file's content, of many kinds by three packages, one that names the place."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise  # by us: it says enough
        raise ValueError(f"{place} cannot be loaded, {type(error).__name__}: {first_line(error)}") from None


def find_checkpoint(folder: Path) -> Path:
    """A run's newest checkpoint, or the checkpoint itself."""
    found = [folder] if (folder / "step.json").is_file() else checkpoint.checkpoints(folder)
    if not found:
        raise ValueError(f"{folder} is no run with a checkpoint, no checkpoint and no exported folder")
    return found[-1]


def read_export(folder: Path, variant: str | None) -> MeanFlowPipeline:
    """Without running the code that lies there."""
    with named(f"variant {variant} of {folder}" if variant else folder):
        index, how = read_json(folder / INDEX), {"variant": variant, "use_safetensors": True}
        net = NETWORKS[index["net"][1]].from_pretrained(folder / "net", **how)
        has_vae = (index.get("vae") or [None])[0]
        vae = AutoencoderKL.from_pretrained(folder / "vae", **how) if has_vae else None
        facts = {name: index.get(name) for name in ("objective", "id2label", "latents", "sampling")}
        return MeanFlowPipeline(net.eval(), vae, **facts)


def export(
    source: Path, out: Path, ema: float | None = None, variants: tuple[str, ...] = (), license="other", datasets=()
) -> None:
    """Writes the pipeline folder of a run or checkpoint, with its model card, whole or not at all.

    Args:
        variants: bf16, fp16: the weights once more in these precisions.
        license, datasets: for the model card, in the Hub's words; a word, and several.
    Raises:
        ValueError: source has no whole checkpoint, or out holds something else.
    """
    ours = (out / INDEX).is_file() and "MeanFlowPipeline" in (out / INDEX).read_text() and not (out / ".git").exists()
    if out.exists() and not ours and any(out.iterdir()):
        raise ValueError(f"{out} holds something else than an exported model: choose another folder")
    source = find_checkpoint(source)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipe = load_pipeline(source, ema)
        pipe.save_pretrained(temporary)
        newest = ema is None and source in checkpoint.checkpoints(source.parent)[-1:]
        measured = metrics(source.parent / "metrics.json") if newest else ""
        (temporary / "README.md").write_text(card(source, pipe, license, datasets, measured))
        drawn = source.parent / "samples" / f"step-{checkpoint.saved_step(source):08d}.png"
        if drawn.exists() and ema is None and pipe.config.sampling["solver"] == "meanflow":
            shutil.copyfile(drawn, temporary / "samples.png")
        else:
            picture(pipe, temporary / "samples.png")
        for variant in variants:
            cast(load_pipeline(source, ema), variant).save_pretrained(temporary, variant=variant)
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cast(pipe: MeanFlowPipeline, dtype: str | None) -> MeanFlowPipeline:
    """The pipeline with its weights in bf16 or fp16."""
    for part in (pipe.net, pipe.vae):
        if part is not None and dtype is not None:
            torch.nn.Module.to(part, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])  # diffusers' own warns
    return pipe


def picture(pipe: MeanFlowPipeline, path: Path) -> None:
    """A sample of each of up to ten classes, as they are best: so in one step by MeanFlow."""
    num_classes = pipe.net.config.num_classes
    columns = min(num_classes, 10) or 8
    y = torch.linspace(0, num_classes - 1, columns).long().tolist() if num_classes else None
    pipe.set_progress_bar_config(disable=True)
    x = pipe(y, columns, latents=pipe.noise(0, range(columns)), output_type="pt").images
    save_grid(middle_slices(x) if x.ndim == 5 else 2 * x - 1, path, columns)


def card(source: Path, pipe: MeanFlowPipeline, license: str, datasets: tuple[str, ...], measured: str) -> str:
    """The model card. It names no place on this machine: fields that do are left out of the recipe."""
    from huggingface_hub import ModelCardData

    recipe, facts = (read_json(source / f"{name}.json") for name in ("recipe", "data"))
    tags = ["meanflow", "one-step", "class-conditional" if pipe.id2label else "unconditional"]
    vae = facts["vae"].partition("@")[0] if facts.get("vae_revision") else None  # of the Hub: a folder has no revision
    about = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    data = ModelCardData(license=license, datasets=list(datasets) or None, base_model=vae, **about)
    fields = checkpoint.flatten(recipe)
    names = sorted({*fields} - checkpoint.FREE - {"init_from", "smoke"})
    return Template(Path(__file__).with_name("card.md").read_text()).substitute(
        {**recipe, **pipe.config.sampling},  # model, global_batch; solver, num_inference_steps
        metadata=data.to_yaml(),
        shape="x".join(map(str, pipe.shape)),
        kind="A MeanFlow" if pipe.config.sampling["solver"] == "meanflow" else "A flow-matching",
        parameters=f"{parameters(pipe.net):,}",
        steps=f"{checkpoint.saved_step(source):,}",
        num_classes=len(pipe.id2label),
        guidance=guidance_in_words(MeanFlowConfig(**recipe["objective"])),
        call=f"class_labels=[{next(iter(pipe.id2label.values()))!r}]" if pipe.id2label else "batch_size=4",
        measured=measured,
        recipe=json.dumps({name: fields[name] for name in names if fields[name] is not None}, indent=2),
    )


def metrics(path: Path) -> str:
    """What was measured on the run, as a table: of {row: {metric: value}}."""
    if not path.is_file():
        return ""
    rows = read_json(path)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | {' | '.join(f'{row[name]:.4g}' if name in row else '' for name in names)} |")
    return "## Measured\n\n" + "\n".join(lines) + "\n\n"
