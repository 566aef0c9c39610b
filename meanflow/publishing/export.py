"""A run as a folder that diffusers loads, with a model card."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory

import torch

from meanflow.config import FREE_ON_RESUME, check, flatten
from meanflow.files import checksum, checksums, ensure, errors_as, read_json, write_json
from meanflow.pictures import middle_slices, save_grid
from meanflow.publishing.checkpoints import CHECKSUMS, INDEX, checkpoints, find_checkpoint, load_pipeline, saved_step

# The papers of the objectives.
PAPERS = {"MeanFlow": "2505.13447", "ImprovedMeanFlow": "2512.02012"}


def export(source: Path, out: Path, ema=None, variants=(), license="other", datasets=(), trust_remote_code=False):
    """Writes the pipeline folder of a run or checkpoint, with its model card, whole or not at all.

    Args:
        source, out: paths; strings will do.
        ema: decay of the average to take; default: the recipe's first.
        variants: names among bf16 and fp16: the weights once more in these precisions.
        license, datasets: for the model card, in the Hub's words: a name, and several names.
        trust_remote_code: run the network's own file, if the network is not in the zoo.
    Raises:
        ValueError: source has no whole checkpoint, out holds something else, or the network's file is not trusted.
    """
    source = find_checkpoint(Path(source).expanduser())
    with export_folder(Path(out).expanduser()) as folder:
        pipe = load_pipeline(source, ema, trust_remote_code=trust_remote_code)
        pipe.save_pretrained(folder)
        metrics = source.parent / "metrics.json"
        is_newest = ema is None and source in checkpoints(source.parent)[-1:]
        measured = metrics_table(metrics) if is_newest and metrics.is_file() else ""
        save_picture(source, pipe, folder / "samples.png", is_first_average=ema is None)
        more = save_scales(pipe, folder / "scales.png") + measured
        (folder / "README.md").write_text(model_card(source, pipe, license, datasets, more))
        for variant in variants:
            pipe = load_pipeline(source, ema, trust_remote_code=trust_remote_code)
            cast(pipe, variant).save_pretrained(folder, variant=variant)


@contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which then gets its checksums and becomes `out`; if filling it fails, `out` stays as it was.

    Raises:
        ValueError: out holds something else than an exported model.
    """
    check(out.name not in ("", "..") and (out.is_dir() or not out.exists()), "out", out, "a folder with a name")
    is_export = (out / INDEX).is_file() and (out / CHECKSUMS).is_file()  # checkpoints have checksums, too
    known = {CHECKSUMS: checksum(out / CHECKSUMS), **read_json(out / CHECKSUMS)} if is_export else {}
    files = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    foreign = next((name for name in files if name not in known or checksum(out / name) != known[name]), None)
    found = f"{out} holds something else than an exported model, such as {foreign}"
    ensure(foreign is None, f"{found}: choose another folder, or move that file away")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        temporary = Path(scratch) / "pipeline"
        yield temporary
        write_json(temporary / CHECKSUMS, checksums(temporary))
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        temporary.rename(out)


def save_picture(source: Path, pipe, path: Path, is_first_average: bool) -> None:
    """The picture that the run drew at this step, if it did; else one sample of each of up to ten classes."""
    drawn = source.parent / "samples" / f"step-{saved_step(source):08d}.png"
    if drawn.exists() and is_first_average and pipe.sampling.solver == "meanflow":
        shutil.copyfile(drawn, path)
    elif not pipe.condition_names(required=True):  # which only its user could choose
        x = one_of_each_class(pipe)
        save_grid(middle_slices(x) if x.ndim == 5 else 2 * x - 1, path, len(x))


def save_scales(pipe, path: Path) -> str:
    """Of a network that is told the CFG scale: one sample of each of up to ten classes, a row for each trained scale.

    Returns:
        what the model card says of the picture; nothing where there is none.
    """
    is_image = pipe.vae is not None or (len(pipe.shape) == 3 and pipe.shape[0] in (1, 3))
    if pipe.sampling.guidance_range is None or pipe.condition_names(required=True) or not is_image:
        return ""
    scales = [scale for scale in (1, 2, 4, 6) if scale <= pipe.sampling.guidance_range[1]]
    rows = [one_of_each_class(pipe, guidance_scale=scale) for scale in scales]
    save_grid(2 * torch.cat(rows) - 1, path, len(rows[0]))
    shown = ", ".join(map(str, scales))
    picture = f"![samples at CFG scales {shown}]({path.name})"
    fact = f"One row for each CFG scale, {shown}, of the same noise."
    return f"{picture}\n\n{fact} `pipe(..., guidance_scale=2.0)` chooses one, at no cost.\n\n"


def one_of_each_class(pipe, **how) -> torch.Tensor:
    """One sample of each of up to ten classes, or eight without classes, in [0, 1], of the same noise each time."""
    count = min(pipe.num_classes, 10) or 8
    y = torch.linspace(0, pipe.num_classes - 1, count).long().tolist() if pipe.num_classes else None
    pipe.set_progress_bar_config(disable=True)
    return pipe(y, count, latents=pipe.noise(0, range(count)), output_type="pt", **how).images


def cast(pipe, dtype: str | None):
    """The MeanFlowPipeline with its weights in bf16 or fp16; as it is if dtype is None."""
    for part in (pipe.net, pipe.vae):
        if part is not None and dtype is not None:
            torch.nn.Module.to(part, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])  # diffusers' own warns
    return pipe


def model_card(source: Path, pipe, license: str, datasets: tuple[str, ...], more: str) -> str:
    """The model card. It names no place on this machine: the fields of the recipe that do are left out.

    Args:
        more: what it says before the recipe.
    """
    from huggingface_hub import ModelCardData

    recipe, metadata = (read_json(source / f"{name}.json") for name in ("recipe", "data"))
    tags = ["meanflow", "one-step", "class-conditional" if pipe.id2label else "unconditional"]
    # Only a VAE of the Hub has a revision; a folder has none.
    vae = metadata["vae"].partition("@")[0] if metadata.get("vae_revision") else None
    about = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": tags}
    data = ModelCardData(license=license, datasets=list(datasets) or None, base_model=vae, **about)
    fields = flatten(recipe)
    names = sorted({*fields} - FREE_ON_RESUME - {"init_from", "smoke"})
    return Template(Path(__file__).with_name("card.md").read_text()).substitute(
        {**recipe, **vars(pipe.sampling)},  # model, global_batch; solver, num_inference_steps, guidance
        metadata=data.to_yaml(),
        shape="x".join(map(str, pipe.shape)),
        kind="A MeanFlow" if pipe.sampling.solver == "meanflow" else "A flow-matching",
        parameters=f"{pipe.net.num_parameters():,}",
        steps=f"{saved_step(source):,}",
        num_classes=len(pipe.id2label),
        call=f"class_labels=[{next(iter(pipe.id2label.values()))!r}]" if pipe.id2label else "batch_size=4",
        more=more,
        paper=PAPERS.get(recipe.get("objective_class"), PAPERS["MeanFlow"]),
        recipe=json.dumps({name: fields[name] for name in names if fields[name] is not None}, indent=2),
    )


def metrics_table(path: Path) -> str:
    """What was measured on the run, as a table: of {row: {metric: value}}."""
    with errors_as(f"{path} is damaged"):
        rows = read_json(path)
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines = [f"| | {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * (len(names) + 1) + "|"]
        for label, row in rows.items():
            lines.append(f"| {label} | {' | '.join(f'{row[name]:.4g}' if name in row else '' for name in names)} |")
    return "## Measured\n\n" + "\n".join(lines) + "\n\n"
