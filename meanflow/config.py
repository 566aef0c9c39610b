"""Every option of a run, with its range, and how a recipe is written down. No torch here: `--help` has to be quick."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

# A repository of the Hub: user/name.
HUB_ID = r"[\w-][\w.-]*/[\w.-]+"

# Fields that may change when a run resumes, because they change no number, or only by rounding (accumulation_steps).
# Where the data and the VAE lie may change too: their content is compared instead.
FREE_ON_RESUME = {
    *("out", "data", "vae", "verify", "resume", "dry_run", "workers", "track"),
    *("log_every", "sample_every", "checkpoint_every", "keep", "push_to_hub", "push_every"),
    *("accumulation_steps", "activation_checkpointing", "compile", "plan", "timeout"),
    *("warn_at", "halt_at", "grace_steps", "max_skipped", "check_data", "allow_data_change"),
    *("eval_every", "eval_metric", "eval_reference", "eval_images", "eval_features", "keep_best", "keep_every"),
    *("project", "run_name"),
    *("objective.guidance_scale", "objective.guidance_interval"),  # of sampling
}


class Refusal(ValueError):
    """What is wrong with an input, in one line that names it."""


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise Refusal(f"{name} must be {allowed}, got {value}")


# Ranges of numbers: what is said of them, and whether a number is in one.
POSITIVE = ("> 0", lambda x: x > 0)
SPAN = ("> 0 and at most 1e9", lambda x: 0 < x <= 1e9)
NOT_NEGATIVE = (">= 0", lambda x: x >= 0)
COUNT = (">= 1", lambda x: x >= 1)
TEN = (">= 10", lambda x: x >= 10)
ABOVE_1 = ("> 1", lambda x: x > 1)
SHARE = ("in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_1 = ("in [0, 1)", lambda x: 0 <= x < 1)
INSIDE = ("in (0, 1)", lambda x: 0 < x < 1)
SEED = ("in [0, 2^32)", lambda x: 0 <= x < 2**32)


def check_values(config: object) -> None:
    """Checks each field: its range, if its type is Annotated with one, which holds for each number of several.

    Floats must be finite, texts must have letters, and a Literal has one of its values.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for allowed, holds in getattr(f.type, "__metadata__", ()):
            check(value is None or (len(numbers) > 0 and all(map(holds, numbers))), f.name, value, allowed)
        check(not isinstance(value, float) or math.isfinite(value), f.name, value, "finite")
        check(not isinstance(value, int) or abs(value) < 2**40, f.name, value, "smaller than 2^40")
        check(value != "", f.name, "nothing", "left out or given a value")
        if get_origin(f.type) is Literal:
            choices = get_args(f.type)
            check(value in choices, f.name, value, f"one of {', '.join(choices)}")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The base of every objective's options: the fields of a subclass are the flags --objective.NAME.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    def __post_init__(self) -> None:
        check_values(self)

    def at(self, step: int) -> "ObjectiveConfig":
        """The options as they act at an optimiser step."""
        return self


@dataclass(frozen=True)
class VelocityConfig(ObjectiveConfig):
    """What the objectives of average velocities share: times, the weight of the loss, labels, the network's output.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    # share of the samples that may have r != t, in [0, 1]; the others have r = t, so they are flow matching. With
    # time_sampler v1 some of the share have r = t, too
    meanflow_ratio: Annotated[float, SHARE] = 0.25
    # v0 (the paper's): t and r are the maximum and the minimum of two logit-normal draws; v1 (the authors' CIFAR-10
    # code): t is drawn by itself, and r = min(t, r); uniform: the maximum and the minimum of two uniform draws
    time_sampler: Literal["v0", "v1", "uniform"] = "v0"
    # mean of logit(t)
    P_mean: float = -0.4
    # standard deviation of logit(t), > 0
    P_std: Annotated[float, POSITIVE] = 1.0
    # mean of logit(r); default: P_mean
    P_mean_r: float | None = None
    # standard deviation of logit(r), > 0; default: P_std
    P_std_r: Annotated[float | None, POSITIVE] = None
    # power of the adaptive weight 1 / (squared error + norm_eps)^norm_p, >= 0; 0: no weight, 0.5: pseudo-Huber
    norm_p: Annotated[float, NOT_NEGATIVE] = 1.0
    # added to the squared error in the adaptive weight, > 0 (official code: 0.01 for ImageNet, 0.001 for CIFAR-10)
    norm_eps: Annotated[float, POSITIVE] = 0.01
    # share of the labels that become the null class, in [0, 1]; their velocity is not guided
    class_dropout_prob: Annotated[float, SHARE] = 0.1
    # which labels may become the null class. independent: any; flow: only those of r = t samples, as in the official
    # code; the dropped share of all labels stays class_dropout_prob
    null_class: Literal["independent", "flow"] = "independent"
    # what the network returns. u: the average velocity; x: the clean sample, so that u = (z - x) / max(t, t_min)
    prediction: Literal["u", "x"] = "u"
    # with prediction x: the smallest t that is drawn and that is divided by, in (0, 1)
    t_min: Annotated[float, INSIDE] = 0.05
    # how du/dt is computed; finite-difference is for networks that have no forward-mode derivative
    jvp: Literal["exact", "finite-difference"] = "exact"
    # weight of each channel's squared error: numbers; inverse-variance: 1 / the variance of each channel of the data;
    # none: 1
    channel_weights: tuple[float, ...] | Literal["inverse-variance"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = self.channel_weights
        are_numbers = isinstance(weights, (tuple, list)) and len(weights) > 0 and min(weights) > 0
        allowed = "numbers > 0, inverse-variance or None"
        check(are_numbers or weights in (None, "inverse-variance"), "channel_weights", weights, allowed)
        flow, dropped = 1 - self.meanflow_ratio, self.class_dropout_prob
        limit = f"at most 1 - meanflow_ratio ({flow}) with null_class flow"
        check(self.null_class != "flow" or dropped <= flow, "class_dropout_prob", dropped, limit)


LEARNS_NULL = "> 0 with guidance, which reads the null class"


@dataclass(frozen=True)
class MeanFlowConfig(VelocityConfig):
    """The objective of arXiv:2505.13447. Flow matching is meanflow_ratio 0; plain squared error is norm_p 0.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    # guidance in training: weight of the true velocity, > 0; the effective scale is omega / (1 - kappa)
    omega: Annotated[float, POSITIVE] = 1.0
    # guidance in training: weight of the class-conditional prediction, in [0, 1)
    kappa: Annotated[float, BELOW_1] = 0.0
    # guidance acts only on times t >= t_start, in [0, 1]
    t_start: Annotated[float, SHARE] = 0.0
    # guidance acts only on times t <= t_end, in [0, 1]
    t_end: Annotated[float, SHARE] = 1.0
    # guidance begins at this optimiser step, >= 0; fine-tuning a flow-matching network wants some epochs without it
    guidance_from_step: Annotated[int, NOT_NEGATIVE] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.t_start <= self.t_end, "t_start", self.t_start, f"<= t_end, which is {self.t_end}")
        learns_null = not self.guided or self.class_dropout_prob > 0
        check(learns_null, "objective.class_dropout_prob", self.class_dropout_prob, LEARNS_NULL)

    def at(self, step: int) -> "MeanFlowConfig":
        """Before guidance begins: the options without it."""
        return self if step >= self.guidance_from_step else replace(self, omega=1.0, kappa=0.0)

    @property
    def guided(self) -> bool:
        """Whether guidance is trained in."""
        return (self.omega, self.kappa) != (1.0, 0.0)

    @property
    def effective_scale(self) -> float:
        """The CFG scale that omega and kappa train in; 1 is none."""
        return self.omega / (1 - self.kappa)


@dataclass(frozen=True)
class ImprovedMeanFlowConfig(VelocityConfig):
    """The objective of arXiv:2512.02012, whose network is told the CFG scale, so that it can be sampled at any.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    # share of the samples that may have r != t, in [0, 1]; the others have r = t, so they are flow matching
    meanflow_ratio: Annotated[float, SHARE] = 0.5
    # CFG scales omega are trained from 1 to this, > 1
    omega_max: Annotated[float, ABOVE_1] = 8.0
    # beta, >= 0: the density of omega is proportional to omega^-beta
    omega_beta: Annotated[float, NOT_NEGATIVE] = 1.0
    # the CFG scale that sampling uses unless told otherwise, >= 1
    guidance_scale: Annotated[float, COUNT] = 2.0
    # the times in which guidance acts when sampling, unless told otherwise, in [0, 1]
    guidance_interval: Annotated[tuple[float, float], SHARE] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        start, end = self.guidance_interval
        check(start <= end, "guidance_interval", self.guidance_interval, "a start, and an end that is not before it")
        check(self.class_dropout_prob > 0, "objective.class_dropout_prob", self.class_dropout_prob, LEARNS_NULL)


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: the data, the network, the objective and how long to train. Counts of images are over all processes.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    # folder of the checkpoints, logs and pictures; the same command resumes from it
    out: Path = Path("runs/run")
    # what to train on. A folder of tools/cache_latents.py; images: a folder with a subfolder per class, a file or
    # folder of parquet or arrow, or a Hub id; a folder of volumes, .npy or .safetensors; digits: the 8 x 8 handwritten
    # digits of scikit-learn; shapes: 512 synthetic volumes
    data: str = "digits"
    # height and width of the images before a VAE; a latent cache must have been made at it
    resolution: Annotated[int | None, POSITIVE] = None
    # folder, Hub id or ID@REVISION of the AutoencoderKL that made the latents, or that encodes the images at each
    # step; none: train on pixels
    vae: str | None = None
    # the factor that the VAE's latents are multiplied by; a latent cache must have noted the same
    scaling_factor: Annotated[float | None, POSITIVE] = None
    # how latents are normalised. scale: by the scaling factor; channel: each channel of the cache to mean 0 and
    # standard deviation 1; imf: by the constants of the official code of improved MeanFlow, for Stable Diffusion's VAE
    normalization: Literal["scale", "channel", "imf"] = "scale"
    # crop: cut the middle square of each image at --resolution; no-crop: the images have that size already, and are
    # read into memory at the start
    crop: bool = True
    # mirror each image with probability 1/2 at each visit
    flip: bool = False
    # probability of each of EDM's augmentations (arXiv:2206.00364), in [0, 1]; the network is told of them and needs
    # net.augment_dim 6
    augment: Annotated[float, SHARE] = 0.0
    # use the data's classes; no-class-conditional: train as if there were none
    class_conditional: bool = True
    # train on only this many classes, and on this many images of each
    subset: Annotated[tuple[int, int] | None, COUNT] = None
    # share of the samples that are not trained on, in [0, 1), but compared with generated ones; the same samples for
    # any seed and number of processes. Digits have 450 of their own
    held_out: Annotated[float, BELOW_1] = 0.0
    # give each image one fixed noise, so that a network can memorise the pairs
    fixed_noise: bool = False
    # name of the network, in models.MODELS
    model: str = "DiT-B/4"
    # sizes that replace those of the named network, such as dropout 0.2. Where the recipe names sizes, each is a flag,
    # --net.NAME VALUE; where it names none: --net NAME VALUE NAME VALUE
    net: dict[str, int | float | tuple[int, ...]] = field(default_factory=dict)
    # what is minimised: by default the objective of arXiv:2505.13447
    objective: ObjectiveConfig = MeanFlowConfig()
    # passes over the data
    epochs: Annotated[float | None, SPAN] = None
    # optimiser steps; they take precedence over epochs
    steps: Annotated[int | None, POSITIVE] = None
    # images per optimiser step, over all processes and accumulation steps
    global_batch: Annotated[int, COUNT] = 256
    # micro-batches per optimiser step and process
    accumulation_steps: Annotated[int, COUNT] = 1
    # learning rate, > 0
    lr: Annotated[float, POSITIVE] = 1e-4
    # betas of Adam, in [0, 1)
    betas: Annotated[tuple[float, float], BELOW_1] = (0.9, 0.95)
    # decoupled weight decay, >= 0: 0 trains by Adam, more by AdamW, which spares norms, biases and embeddings
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    # the learning rate after the warm-up; cosine and linear end at 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    # optimiser steps over which the learning rate rises linearly; with 0 the first step has the full rate
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    # clip the gradient to this norm, > 0; none: no clipping
    max_grad_norm: Annotated[float | None, POSITIVE] = None
    # bf16: autocast; weights, times, the loss and the averages stay float32
    mixed_precision: Literal["no", "bf16"] = "no"
    # tf32: GPUs multiply float32 matrices in TF32, with 10 bits of mantissa; no-tf32: in float32
    tf32: bool = False
    # compile the step by torch.compile: the first step takes minutes, the others less time
    compile: bool = False
    # decays of the averaged weights, in [0, 1); the sample pictures use the first average
    ema_decay: Annotated[tuple[float, ...], BELOW_1] = (0.9999,)
    # data order, noise, times and label drop are functions of the seed, the step and the place in the batch
    seed: Annotated[int, SEED] = 0
    # optimiser steps between lines of log.jsonl
    log_every: Annotated[int, COUNT] = 50
    # optimiser steps between sample pictures
    sample_every: Annotated[int, COUNT] = 1000
    # optimiser steps between checkpoints; the last step always has one
    checkpoint_every: Annotated[int, COUNT] = 1000
    # how many of the newest checkpoints are kept
    keep: Annotated[int, COUNT] = 2
    # optimiser steps between checkpoints that are kept for good, a multiple of checkpoint_every; none: no such ones
    keep_every: Annotated[int | None, POSITIVE] = None
    # keep the checkpoint whose evaluation was the best, too; each best one so far is saved
    keep_best: bool = False
    # optimiser steps between evaluations, in which one-step samples of the first average are compared with a reference;
    # none: no evaluation
    eval_every: Annotated[int | None, POSITIVE] = None
    # energy and frechet: distances of the samples themselves, pixels in [-1, 1] or latents; fid and kid: of features of
    # Inception; fdd: of features of DINOv2. The lower the better
    eval_metric: Literal["energy", "frechet", "fid", "kid", "fdd"] = "energy"
    # held-out: the samples that are not trained on; or a reference as tools/evaluate.py takes it
    eval_reference: str = "held-out"
    # images that are generated in each evaluation; FID is known of 50,000, and of few it is much higher
    eval_images: Annotated[int, TEN] = 1000
    # weights of Inception or DINOv2: a file, or one of the Hub, owner/name/file; none: they are downloaded
    eval_features: str | None = None
    # auto: go on from the newest checkpoint of --out, if there is one; never: refuse a folder that has one; or the
    # folder of a checkpoint to go on from
    resume: str = "auto"
    # begin with the weights of this checkpoint, exported folder, Hub id or ID@REVISION, of a network of this shape
    init_from: str | None = None
    # compute the blocks' activations twice instead of keeping them: less memory for one more forward
    activation_checkpointing: bool = False
    # warn when a channel's raw loss is this many times its running level, or when this level is this many times the
    # lowest that it has been, > 1
    warn_at: Annotated[float, ABOVE_1] = 10.0
    # as warn_at, but halt the run, > 1
    halt_at: Annotated[float, ABOVE_1] = 100.0
    # optimiser steps before the run can warn or halt
    grace_steps: Annotated[int, NOT_NEGATIVE] = 200
    # halt after so many steps in a row whose gradients are not finite; each such step is skipped
    max_skipped: Annotated[int, COUNT] = 10
    # Hub id to push the pipeline to, private at first; it is pushed in the background, and a failure does not touch
    # the run
    push_to_hub: str | None = None
    # optimiser steps between pushes; each also writes a checkpoint; none: push only at the end
    push_every: Annotated[int | None, POSITIVE] = None
    # trackers that get the log's numbers and the sample pictures, too
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    # the project's name for the trackers; none: the name of --out
    project: str | None = None
    # the run's name for the trackers; none: the name of --out, and a few letters
    run_name: str | None = None
    # processes that load data for each training process; 0: it loads between the steps
    workers: Annotated[int, NOT_NEGATIVE] = 0
    # before the first step, compare the checksums of a latent cache, and read the header of every image and volume
    verify: bool = True
    # before the first step, read every sample
    check_data: bool = False
    # go on with other data than the checkpoint's, such as after samples that cannot be read were repaired or removed
    allow_data_change: bool = False
    # minutes that a process waits for the others, such as for the first one to write a checkpoint
    timeout: Annotated[float, SPAN] = 30.0
    # print what the run would be, refuse what cannot work, and stop
    dry_run: bool = False
    # with --dry-run: what the run costs on so many of these GPUs, such as h100 64
    plan: tuple[Literal["a100", "h100", "h200"], int] | None = None
    # train 4 steps of a small network in a folder of its own, on random latents instead of a cache, on digits instead
    # of images, on shapes instead of volumes
    smoke: bool = False

    def __post_init__(self) -> None:
        check_values(self)
        check(isinstance(self.out, Path), "out", repr(self.out), "a pathlib.Path")
        object.__setattr__(self, "out", self.out.expanduser())
        check(self.out.name not in ("", ".."), "out", self.out, "a folder with a name, such as runs/mine")
        check(str(self.out).isprintable(), "out", repr(str(self.out)), "a name in UTF-8 that can be printed")
        check(self.steps is not None or self.epochs is not None, "steps", self.steps, "given, or epochs")
        check(self.push_every is None or self.push_to_hub, "push_to_hub", self.push_to_hub, "given with push_every")
        is_id = self.push_to_hub is None or re.fullmatch(HUB_ID, self.push_to_hub)
        check(is_id, "push_to_hub", self.push_to_hub, "a Hub id, user/name")
        exact = getattr(self.objective, "jvp", "exact") == "exact"
        check(exact or not self.tf32, "tf32", self.tf32, "off with objective.jvp finite-difference, for its precision")
        check(self.eval_every or not self.keep_best, "eval_every", self.eval_every, "given with keep_best")
        is_saved = not self.keep_every or self.keep_every % self.checkpoint_every == 0
        check(is_saved, "keep_every", self.keep_every, f"a multiple of checkpoint_every, {self.checkpoint_every}")
        check(self.plan is None or self.dry_run, "plan", self.plan, "given with dry_run")
        check(self.plan is None or self.plan[1] >= 1, "plan", self.plan, "1 GPU or more")
        unscaled = self.vae is not None and None in (self.scaling_factor, self.resolution)
        check(not unscaled, "scaling_factor and resolution", None, f"given with a vae, {self.vae}")


def flatten(nested: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat = {}
    for name, value in nested.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def recipe_fields(recipe: TrainConfig, objective_class: str = "MeanFlow") -> dict:
    """The recipe as recipe.json has it: nested dictionaries, lists for tuples, the name of the objective's class."""
    return json.loads(json.dumps({**asdict(recipe), "objective_class": objective_class}, default=str))


def with_defaults(old: dict) -> dict:
    """The content of a recipe.json; the fields that are newer than it have their defaults, which it was trained by."""
    complete = {**recipe_fields(TrainConfig(steps=1)), **old}
    options = {"MeanFlow": MeanFlowConfig, "ImprovedMeanFlow": ImprovedMeanFlowConfig}.get(complete["objective_class"])
    if options is not None:
        defaults = recipe_fields(TrainConfig(steps=1, objective=options()))
        complete["objective"] = {**defaults["objective"], **old["objective"]}
    return complete


def different(old: dict, new: dict, free: set[str]) -> list[tuple[str, object, object]]:
    """The name and both values of each field in which two nested dictionaries differ, except the fields in `free`."""
    old, new = flatten(old), flatten(new)
    names = sorted({*old, *new} - free)
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]
