"""Measures how good the samples of a checkpoint are: FID and other metrics, against one reference or several.

    python tools/evaluate.py runs/digits                              # against the digits that are not trained on
    python tools/evaluate.py runs/digits --compare                    # one step beside more steps and ODE solvers
    accelerate launch -q tools/evaluate.py user/ditxl --reference adm.npz jit.npz --metrics fid is
    python tools/evaluate.py user/ditxl --reference photos/ --metrics kid fdd --features dinov2 dinov2.safetensors

Image k depends only on --seed and k, so any number of processes measures the same. After a kill the same command goes
on, because the features of what was generated lie in --out. They also serve a further reference, by the same metrics.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meanflow.config import check
from meanflow.program import end_with_launcher, read_flags, refusals
from reports.evaluation import plot, show, verdict, write_table
from samples.run_data import held_out

COMPARED = [("meanflow", steps) for steps in (1, 2, 4)]
COMPARED += [(solver, steps) for solver in ("euler", "heun", "rk4") for steps in (10, 50, 100)]
ENOUGH = 10_000  # images, below which FID is much too high
OF_NETWORKS = {"fid", "is", "prc", "kid", "fdd"}


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[str]
    """a run (its newest checkpoint), a checkpoint, a folder of tools/export.py, or a Hub id"""
    reference: tuple[str, ...] = ("held-out",)
    """one or several. held-out: the samples that the run does not train on; an .npz file with mu and sigma, with images
    as arr_0 (uint8, N x H x W x C) or with both, such as ADM's and JiT's; a .pt file of torch-fidelity's cache; images:
    a folder, a table or a Hub id"""
    metrics: tuple[Literal["fid", "is", "prc", "kid", "fdd", "energy", "frechet"], ...] = ()
    """fid; is: the inception score; prc: precision and recall; kid: for few images; fdd: the Frechet distance of DINOv2
    features; energy and frechet: distances of the samples themselves, pixels in [-1, 1] or latents. Default: fid, is
    and prc for pictures of 32 x 32 and more, else energy and frechet"""
    num_images: int | None = None
    """default: 50,000 for metrics of networks, else 2,000"""
    compare: bool = False
    """measure MeanFlow in 1, 2 and 4 steps, and Euler, Heun and RK4 in 10, 50 and 100, at each --cfg-scale, and say
    whether one step is within 20 % of the best by the first metric"""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: the classes in turn; random: drawn. On ImageNet they differ by some 0.1 in FID"""
    cfg_scale: tuple[float, ...] = ()
    """a network that is told the CFG scale is told this; with another one: classifier-free guidance while sampling, two
    evaluations a step. Several with --compare; default: the checkpoint's, or what was trained in, if anything"""
    cfg_interval: tuple[float, float] | None = None
    """the times in which guidance acts, of a network that is told them; default: the checkpoint's"""
    num_steps: int | None = None
    """default: meanflow 1, euler 50, heun 25, rk4 12"""
    solver: Literal["meanflow", "euler", "heun", "rk4"] | None = None
    """default: meanflow; euler for a network of plain flow matching"""
    features: tyro.conf.UseAppendAction[tuple[tuple[str, str], ...]] = ()
    """NAME FILE: the weights of inception (torch-fidelity's) or dinov2 (timm's ViT-L/14): a file, or one of the Hub as
    owner/name/file; default: they are downloaded"""
    out: Path | None = None
    """the folder of the reports and features; default: evaluation/ in the run, or evaluation/NAME"""
    seed: int = 0
    """image k's noise is a function of the seed and k"""
    ema: float | None = None
    """of a run: decay of the averaged weights; default: the recipe's first"""
    revision: str | None = None
    """of a Hub id: branch, tag or commit"""
    variant: Literal["bf16", "fp16"] | None = None
    """of an exported folder or Hub id: the weights that were saved in this precision"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision of the network and the VAE; noise, times, steps and metrics are in float32 or float64"""
    batch_size: int = 64
    """images at a time, of each process"""
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""

    def __post_init__(self) -> None:
        for name, least, most in (("num_images", 10, 10**7), ("num_steps", 1, 10_000), ("batch_size", 1, 10**6)):
            value = getattr(self, name)
            check(value is None or least <= value <= most, name, value, f">= {least} and at most {most:,}")
        check(self.seed >= 0, "seed", self.seed, ">= 0")
        check(len(self.reference) > 0, "reference", "nothing", "one or several")
        check(len(set(self.reference)) == len(self.reference), "reference", self.reference, "different ones")
        check(self.compare or len(self.cfg_scale) <= 1, "cfg_scale", self.cfg_scale, "one, or several with --compare")
        is_choice = self.solver is not None or self.num_steps is not None
        check(not (self.compare and is_choice), "compare", "solver or num_steps", "without them: it takes its own")


def run_folder(options: Options, source: Path) -> Path:
    """The default of --out."""
    if options.out:
        out = options.out.expanduser()
        is_ours = any(
            (place / name).exists() for place in (out, out.parent) for name in ("step.json", "model_index.json")
        )
        check(not is_ours and not out.is_file(), "out", out, "a folder outside of checkpoints and exported models")
        return out
    if (source / "step.json").exists():
        return source.parent / "evaluation"
    if (source / "recipe.json").exists():
        return source / "evaluation"
    is_folder = Path(options.checkpoint).expanduser().exists()
    return Path("evaluation", source.name if is_folder else options.checkpoint.replace("/", "--"))


def digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


class Evaluator:
    """A checkpoint and its references, measured in one way of sampling after another."""

    def __init__(self, options: Options):
        import torch
        from accelerate import Accelerator

        import meanflow
        from meanflow.data.vae import fingerprint
        from meanflow.evaluation.evaluate import METRICS, Describe
        from meanflow.evaluation.features import make_extractor
        from meanflow.fetch import fetch
        from meanflow.publishing.checkpoints import load_pipeline
        from meanflow.publishing.export import cast

        self.options, self.accelerator = options, Accelerator(cpu=not torch.accelerator.is_available())
        self.device = self.accelerator.device
        choice = (options.ema, options.variant, options.revision, options.trust_remote_code)
        self.pipe = load_pipeline(options.checkpoint, *choice)
        source = fetch(options.checkpoint, options.revision, options.variant)
        weights = fingerprint(self.pipe.net)
        cast(self.pipe, None if options.dtype == "fp32" else options.dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        channels, *size = self.pipe.shape
        are_pictures = self.pipe.vae is not None or (len(size) == 2 and channels in (1, 3))
        is_large = self.pipe.vae is not None or min(size) >= 32
        self.metrics = options.metrics or (("fid", "is", "prc") if are_pictures and is_large else ("energy", "frechet"))
        check(
            are_pictures or not OF_NETWORKS & set(self.metrics), "metrics", self.metrics, "energy or frechet for these"
        )
        self.count = options.num_images or (50_000 if OF_NETWORKS & set(self.metrics) else 2000)
        paths = dict(options.features)
        needed = {METRICS[metric].network for metric in self.metrics} - {None}
        for name in paths.keys() - needed:
            make_extractor(name, paths[name])  # which refuses what is no network
        extractors = {name: make_extractor(name, paths.get(name)) for name in sorted(needed)}
        is_image = are_pictures and self.pipe.vae is None
        self.describe = Describe(self.metrics, extractors, is_image, lambda z: self.pipe.to_images(z, "pt"))
        self.out = run_folder(options, source)
        networks = {name: {"file": paths.get(name), "sha256": each.sha256} for name, each in extractors.items()}
        self.settings = {
            "weights_sha256": weights, "ema": options.ema, "dtype": options.dtype, "num_images": self.count,
            "labels": options.labels if self.pipe.num_classes else None, "seed": options.seed,
            "rounding": "to the nearest of 256 levels" if is_image or extractors else None,
            "batch_size": options.batch_size, "features": networks, "metrics": list(self.metrics),
            "code": meanflow.__version__,
        }  # fmt: skip
        self.references = [self.open(name, source) for name in options.reference]

    def open(self, name: str, source: Path):
        """A reference, and the folder of its features."""
        from meanflow.evaluation.evaluate import Features, needs_features
        from meanflow.evaluation.references import open_reference

        size = self.pipe.shape[-1]
        if self.pipe.vae is not None:
            size *= 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        is_own = name == "held-out"
        reference = held_out(source, self.pipe, self.device) if is_own else open_reference(name, size)
        same = {"reference": name, "sha256": reference.sha256, "count": reference.count, "size": size}
        same |= {"features": self.settings["features"], "metrics": sorted(self.metrics)}
        same |= {"batch_size": self.options.batch_size}
        folder = self.out / f"reference-{digest(same)}"
        features = Features(folder, reference.count, self.options.batch_size, reference.statistics)
        return reference, features, needs_features(self.metrics, reference, self.describe, math.prod(self.pipe.shape))

    def generate(self, indices: range, solver: str, steps: int, scale: float | None) -> dict:
        """The features of these images."""
        import torch

        from meanflow.noise import generator

        classes, y = self.pipe.num_classes, None
        if classes and self.options.labels == "balanced":
            y = [index % classes for index in indices]
        elif classes:
            seeds = (generator(self.options.seed, index, "label") for index in indices)
            y = [int(torch.randint(classes, (), generator=random)) for random in seeds]
        noise, how = self.pipe.noise(self.options.seed, indices), {"solver": solver, "guidance_scale": scale}
        how["guidance_interval"] = self.options.cfg_interval
        z = self.pipe(y, len(indices), steps, latents=noise, output_type="latent", **how).images
        return self.describe(None, z)

    def measure(self, solver: str, steps: int, scale: float | None) -> dict:
        """A report of one way of sampling; only the first process has its metrics."""
        from functools import partial

        from meanflow.evaluation.evaluate import Features, measure
        from meanflow.files import write_json

        factor = {"heun": 2, "rk4": 4}.get(solver, 1)
        is_doubled = scale not in (None, 1.0) and self.pipe.sampling.guidance_scale is None
        sampling = {"solver": solver, "num_steps": steps, "evaluations": steps * factor * (1 + is_doubled)}
        sampling |= {"cfg_scale": scale, "guidance": self.pipe.sampling.guidance}
        sampling |= {"cfg_interval": self.options.cfg_interval} if self.options.cfg_interval else {}
        settings = {**self.settings, **sampling}
        name = f"{solver}-{steps}{f'-cfg{scale:g}' if scale else ''}"
        own = Features(self.out / f"{name}-{digest(settings)}", self.count, self.options.batch_size)
        own.write(partial(self.generate, solver=solver, steps=steps, scale=scale), self.accelerator, name)
        for reference, features, is_missing in self.references:
            if is_missing:
                describe = lambda indices, other=reference: self.describe(*other.batch(list(indices)))  # noqa: E731
                features.write(describe, self.accelerator, reference.name)
        self.accelerator.wait_for_everyone()
        report = {"checkpoint": self.options.checkpoint, **settings, "references": []}
        if self.accelerator.is_main_process:
            for reference, features, _ in self.references:
                about = {"reference": reference.name, "sha256": reference.sha256, "images": reference.count}
                report["references"].append({**about, "metrics": measure(self.metrics, own, features)})
            write_json(self.out / f"{name}-{digest(report)}.json", report)
        self.accelerator.wait_for_everyone()
        return report


def choices(evaluator: Evaluator) -> list[tuple[str, int, float | None]]:
    """The ways of sampling to measure, and a line on each that the checkpoint cannot do.

    Raises:
        ValueError: what was asked for cannot be done.
    """
    from meanflow.sampler import STEPS

    options, pipe = evaluator.options, evaluator.pipe
    if not options.compare:
        solver, scale = options.solver or pipe.sampling.solver, next(iter(options.cfg_scale), None)
        pipe.check_choice(solver, scale, options.cfg_interval)
        return [(solver, options.num_steps or STEPS[solver], scale)]
    pipe.check_choice(pipe.sampling.solver, None, options.cfg_interval)
    found, left_out = [], {}
    for scale in options.cfg_scale or (None,):
        for solver, steps in COMPARED:
            try:
                pipe.check_choice(solver, scale, options.cfg_interval)
            except ValueError as error:
                left_out[solver, scale] = error
            else:
                found.append((solver, steps, scale))
    for error in left_out.values():
        evaluator.accelerator.print(f"left out: {error}", file=sys.stderr)
    check(len(found) > 0, "cfg_scale", options.cfg_scale, "one that this checkpoint can be sampled at")
    return found


def main(options: Options) -> None:
    from meanflow.files import write_json

    evaluator = Evaluator(options)
    accelerator, count = evaluator.accelerator, evaluator.count
    if count < ENOUGH and {"fid", "fdd", "is"} & set(evaluator.metrics):
        fact = f"warning: {count:,} images: FID, FDD and IS of fewer than {ENOUGH:,} are far from those of 50,000"
        accelerator.print(fact, file=sys.stderr)
    ways = choices(evaluator)
    reports = [evaluator.measure(*way) for way in ways]
    if accelerator.is_main_process:
        reports.sort(key=lambda report: report["evaluations"])
        rule = f", labels {options.labels}" if evaluator.pipe.num_classes else ""
        against = ", ".join(
            f"{part['reference']} ({part['images'] or 'mu and sigma'})" for part in reports[0]["references"]
        )
        show(reports)
        print(f"\n{count:,} images{rule}, seed {options.seed}, against {against}")
        print(f"guidance {evaluator.pipe.sampling.guidance}")
        if options.compare:
            print(verdict(reports))
            name = f"compare-{digest({'reports': reports})}"
            write_json(evaluator.out / f"{name}.json", {"reports": reports})
            write_table(reports, evaluator.out / f"{name}.csv")
            plot(reports, evaluator.out / f"{name}.png")
            print(f"{evaluator.out / name}.png, .csv and .json")
        print(f"{evaluator.out}: a report and the features of each way of sampling")
    accelerator.end_training()


if __name__ == "__main__":
    end_with_launcher()
    with refusals():
        main(read_flags(Options))
