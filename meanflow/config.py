"""Everything that a run can be told. No torch here: `--help` has to be quick."""

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

# user/name, a repository of the Hub
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_each(config: object, names: tuple[str, ...], ok: Callable, allowed: str) -> None:
    """Checks these fields where they are not None."""
    for name in names:
        value = getattr(config, name)
        check(value is None or ok(value), name, value, allowed)


def check_values(config: object) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        check(not isinstance(value, float) or math.isfinite(value), f.name, value, "finite")
        if get_origin(f.type) is Literal:
            choices = get_args(f.type)
            check(value in choices, f.name, value, f"one of {', '.join(choices)}")


@dataclass(frozen=True)
class MeanFlowConfig:
    """The objective of arXiv:2505.13447. Flow matching is meanflow_ratio 0, plain squared error norm_p 0.

    Raises:
        ValueError: a value is out of range; the message names both.
    """

    # share of the samples with r != t, in [0, 1]; the others are flow matching
    meanflow_ratio: float = 0.25
    # v0 (the paper's): t, r = max, min of two logit-normal draws; v1: t by itself, r = min(t, r)
    time_sampler: Literal["v0", "v1"] = "v0"
    # mean of logit(t)
    P_mean: float = -0.4
    # standard deviation of logit(t), > 0
    P_std: float = 1.0
    # mean of logit(r), where it has its own
    P_mean_r: float | None = None
    # standard deviation of logit(r), where it has its own
    P_std_r: float | None = None
    # power of the adaptive weight 1 / (squared error + norm_eps)^norm_p, >= 0; 0: none, 0.5: pseudo-Huber
    norm_p: float = 1.0
    # > 0 (official code: 0.01 for ImageNet, 0.001 for CIFAR-10)
    norm_eps: float = 0.01
    # guidance in training, > 0: weight of the true velocity; effective scale omega / (1 - kappa)
    omega: float = 1.0
    # guidance in training, in [0, 1): weight of the class-conditional prediction
    kappa: float = 0.0
    # guidance acts from this t, in [0, 1] ...
    t_start: float = 0.0
    # ... to this, both included
    t_end: float = 1.0
    # share of the labels replaced by the null class, in [0, 1]; there the velocity is not guided
    class_dropout_prob: float = 0.1
    # which labels: any; or, as the official code does, those of r = t samples alone, as often overall
    null_class: Literal["independent", "flow"] = "independent"
    # what the network returns: the average velocity u; or the clean x, with u = (z - x) / max(t, t_min)
    prediction: Literal["u", "x"] = "u"
    # smallest t, in (0, 1), when the prediction is x: for the division and for the times drawn
    t_min: float = 0.05
    # how du/dt is computed; finite differences are for networks without forward-mode derivatives
    jvp: Literal["exact", "finite-difference"] = "exact"
    # weight of each channel's squared error; inverse-variance: 1 / the data's variance of each; none: 1
    channel_weights: tuple[float, ...] | Literal["inverse-variance"] | None = None

    def __post_init__(self) -> None:
        check_each(self, ("meanflow_ratio", "class_dropout_prob"), lambda x: 0 <= x <= 1, "in [0, 1]")
        check_each(self, ("t_start", "t_end"), lambda x: 0 <= x <= 1, "in [0, 1]")
        check_values(self)
        check_each(self, ("P_std", "P_std_r", "norm_eps", "omega"), lambda x: x > 0, "> 0")
        check(self.norm_p >= 0, "norm_p", self.norm_p, ">= 0")
        check(0 <= self.kappa < 1, "kappa", self.kappa, "in [0, 1)")
        check(self.t_start <= self.t_end, "t_start", self.t_start, f"<= t_end, which is {self.t_end}")
        check(0 < self.t_min < 1, "t_min", self.t_min, "in (0, 1)")
        weights = self.channel_weights
        numbers = isinstance(weights, (tuple, list)) and len(weights) > 0 and min(weights) > 0
        allowed = "numbers > 0, inverse-variance or None"
        check(numbers or weights in (None, "inverse-variance"), "channel_weights", weights, allowed)
        flow, dropped = 1 - self.meanflow_ratio, self.class_dropout_prob
        limit = f"at most 1 - meanflow_ratio ({flow}) with null_class flow"
        check(self.null_class != "flow" or dropped <= flow, "class_dropout_prob", dropped, limit)

    @property
    def guided(self) -> bool:
        """Whether guidance is trained in."""
        return (self.omega, self.kappa) != (1.0, 0.0)


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: the data, the network, the objective and how long to train. Counts of images are over all processes.

    Raises:
        ValueError: a value is out of range; the message names both.
    """

    # folder of the checkpoints, logs and pictures; the same command resumes from it
    out: Path = Path("runs/run")
    # a folder of tools/cache_latents.py; images: a folder with a subfolder per class, a file or folder of parquet or
    # arrow, a Hub id; a folder of volumes, .npy or .safetensors; digits: the 8 x 8 handwritten digits of scikit-learn;
    # or shapes: 512 synthetic volumes
    data: str = "digits"
    # height and width of the images, before a VAE; latents must have been made at it
    resolution: int | None = None
    # folder, Hub id or ID@REVISION of the AutoencoderKL that made the latents, or that images go through each time;
    # none: pixels
    vae: str | None = None
    # the VAE's, by which its latents are multiplied; a cache must have noted the same
    scaling_factor: float | None = None
    # of latents. scale: the VAE's own scaling; channel: mean 0 and deviation 1 of each channel over the cache
    normalization: Literal["scale", "channel"] = "scale"
    # cut the middle square of each image at --resolution; no-crop: images have that size, and are read at the start
    crop: bool = True
    # mirror each image with probability 1/2 at each visit
    flip: bool = False
    # probability of each of EDM's augmentations (arXiv:2206.00364), in [0, 1]; the network is told: net.augment_dim 6
    augment: float = 0.0
    # use the data's classes; no-class-conditional: as if they had none
    class_conditional: bool = True
    # train on this many classes and images of each alone
    subset: tuple[int, int] | None = None
    # give each image one fixed noise, so that a network can memorise the pairs
    fixed_noise: bool = False
    # name in models.MODELS
    model: str = "DiT-B/4"
    # sizes of the network that are not the name's, such as dropout 0.2
    net: dict[str, int | float | tuple[int, ...]] = field(default_factory=dict)
    # what is minimised, arXiv:2505.13447
    objective: MeanFlowConfig = MeanFlowConfig()
    # passes over the data
    epochs: float | None = None
    # optimiser steps; they go before epochs
    steps: int | None = None
    # images per optimiser step, over all processes and accumulation steps
    global_batch: int = 256
    # micro-batches per optimiser step and process
    accumulation_steps: int = 1
    # rate of Adam, > 0
    lr: float = 1e-4
    # betas of Adam, in [0, 1)
    betas: tuple[float, float] = (0.9, 0.95)
    # the rate after the warm-up; cosine and linear end at 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # optimiser steps over which the rate rises linearly; with 0 the first step has the full rate
    warmup_steps: int = 0
    # clip the gradient to this norm, > 0
    max_grad_norm: float | None = None
    # bf16: autocast; weights, times, the loss and the average stay float32
    mixed_precision: Literal["no", "bf16"] = "no"
    # decays of the averaged weights, in [0, 1); the first makes the sample pictures
    ema_decay: tuple[float, ...] = (0.9999,)
    # data order, noise, times and label drop are functions of the seed, the step and the place in the batch
    seed: int = 0
    # optimiser steps between lines of log.jsonl
    log_every: int = 50
    # optimiser steps between sample pictures
    sample_every: int = 1000
    # optimiser steps between checkpoints; the last step always has one
    checkpoint_every: int = 1000
    # checkpoints kept, the newest
    keep: int = 2
    # auto: go on from the newest checkpoint of --out, if there is one; never: begin anew; or a checkpoint's folder
    resume: str = "auto"
    # begin with the weights of this checkpoint, exported folder, Hub id or ID@REVISION, of a network of this shape
    init_from: str | None = None
    # compute the blocks' activations twice instead of keeping them: less memory, a forward more
    activation_checkpointing: bool = False
    # say so when the raw loss is this many times its running level, > 1
    warn_at: float = 10.0
    # halt when it is this many times its running level, > 1
    halt_at: float = 100.0
    # optimiser steps before either
    grace_steps: int = 200
    # halt after so many steps in a row whose gradients are not finite; each such step is skipped
    max_skipped: int = 10
    # Hub id to push the pipeline to, private at first; in the background, and no fault of it is the run's
    push_to_hub: str | None = None
    # optimiser steps between pushes, which have a checkpoint each; none: at the end alone
    push_every: int | None = None
    # trackers that get the log's numbers, too
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    # processes that load data, of each training process; 0: it loads by itself, between steps
    workers: int = 0
    # compare the latents' checksums before the first step
    verify: bool = True
    # print what the run would be, refuse what cannot work, and stop
    dry_run: bool = False
    # 4 steps of a small network, in a folder of their own; instead of latents, random ones; instead of images, digits;
    # instead of volumes, shapes
    smoke: bool = False

    def __post_init__(self) -> None:
        check_values(self)
        check(self.steps is not None or self.epochs is not None, "steps", self.steps, "given, or epochs")
        sizes = ("steps", "epochs", "lr", "max_grad_norm", "resolution", "scaling_factor", "push_every")
        check_each(self, sizes, lambda x: x > 0, "> 0")
        counts = ("log_every", "sample_every", "checkpoint_every", "global_batch", "accumulation_steps")
        check_each(self, (*counts, "keep", "max_skipped"), lambda x: x >= 1, ">= 1")
        check_each(self, ("warn_at", "halt_at"), lambda x: x > 1, "> 1")
        check_each(self, ("warmup_steps", "seed", "workers", "grace_steps"), lambda x: x >= 0, ">= 0")
        check_each(self, ("augment",), lambda x: 0 <= x <= 1, "in [0, 1]")
        for name, values in (("betas", self.betas), ("ema_decay", self.ema_decay)):
            check(len(values) > 0 and all(0 <= value < 1 for value in values), name, values, "in [0, 1)")
        check(self.push_every is None or self.push_to_hub, "push_to_hub", self.push_to_hub, "given with push_every")
        check_each(self, ("push_to_hub",), lambda x: re.fullmatch(HUB_ID, x), "a Hub id, user/name")
        unused = self.objective.guided and self.objective.class_dropout_prob == 0
        check(not unused, "objective.class_dropout_prob", 0.0, "> 0 with guidance, which reads the null class")
        check(self.subset is None or min(self.subset) >= 1, "subset", self.subset, ">= 1")
        unscaled = self.vae is not None and None in (self.scaling_factor, self.resolution)
        check(not unscaled, "scaling_factor and resolution", None, f"given with a vae, {self.vae}")


def smoke_test(recipe: TrainConfig) -> TrainConfig:
    """The recipe's smoke test, on any number of processes; on digits or shapes where it has no latents."""
    data, flip, out = recipe.data, recipe.flip, recipe.out.with_name(f"{recipe.out.name}-smoke")
    if recipe.vae is None:
        data, flip = "digits" if data == "digits" or recipe.resolution else "shapes", False
    parts = int(os.environ.get("WORLD_SIZE", 1)) * recipe.accumulation_steps
    batch = 4 * parts * math.ceil(4 / parts)
    every = {"log_every": 1, "sample_every": 4, "checkpoint_every": 2}
    return replace(recipe, data=data, flip=flip, out=out, steps=4, global_batch=batch, **every)


def run(recipe: TrainConfig) -> None:
    """A recipe's main program: flags first, then torch, then training. Bad input ends it with one line and code 1."""
    import tyro

    written = recipe
    recipe = tyro.cli(type(recipe), default=recipe, description=sys.modules["__main__"].__doc__)
    if recipe.epochs != written.epochs and recipe.steps == written.steps:
        recipe = replace(recipe, steps=None)  # the flag goes before what is written
    if recipe.smoke:
        recipe = smoke_test(recipe)
        os.environ["HF_HUB_OFFLINE"] = "1"  # a test of this machine, not of the network
    try:
        if recipe.dry_run:
            from meanflow.preflight import dry_run

            return dry_run(recipe)
        from meanflow.trainer import Trainer

        trainer = Trainer(recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    from meanflow.images import UnreadableImage

    try:
        trainer.train()
    except UnreadableImage as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")  # a loading process puts a traceback before it
