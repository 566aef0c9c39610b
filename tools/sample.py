"""Samples images or volumes from a run, a checkpoint, an exported folder or a Hub id.

    python tools/sample.py runs/digits --classes 3 7 --out grid.png
    python tools/sample.py user/ditxl --classes "golden retriever" 360 --num-images 8 --out images/
    python tools/sample.py runs/digits-cfg --cfg-scale 1 2 4 6 --out scales.png
    python tools/sample.py runs/digits --gif --out noise_to_data.gif
    python tools/sample.py runs/digits --walk 0 1 --out walk.png
    python tools/sample.py runs/digits --neighbours --out copies.png
    python tools/sample.py runs/mine --cond angle 0 0.5 1.0 --trust-remote-code --out grid.png
    accelerate launch -q tools/sample.py runs/ditxl --num-images 50000 --dtype bf16 --out samples.npz

One step by default. Image k depends only on --seed and k, up to rounding, and not on the batch or on the number of
processes. What --cfg-scale can mean depends on how the network was trained; the tool says so.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import tyro

from meanflow.config import check
from meanflow.program import end_with_launcher, read_flags, refusals
from samples.writers import PICTURE, check_disk, check_writable, folder, grid, npz


@dataclass(frozen=True)
class Options:
    checkpoint: tyro.conf.Positional[str]
    """a run (its newest checkpoint), a checkpoint, a folder of tools/export.py, or a Hub id"""
    out: Path = Path("samples.png")
    """x.png: one picture, a column for each class; a folder: a PNG for each image; x.npz: arr_0, uint8 (N, H, W, C), as
    ADM's evaluation takes it, written as it comes. Volumes: a folder gets a .npy file for each, (C, D, H, W), and
    slices.png, the middle slices of the first; x.png gets these slices of all"""
    classes: tuple[str, ...] = ()
    """names or indices; with n of them image k has number k modulo n; default: all classes in turn"""
    cond: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """NAME VALUE...: a further condition of the network; with n values image k has number k modulo n; a vector is
    written with commas: 0.1,0.2. May be given several times"""
    num_images: int | None = None
    """default: 64, or 8 of each of --classes; with several --cfg-scale: for each scale, and by default one of each
    class"""
    cfg_scale: tuple[float, ...] = ()
    """a network that is told the CFG scale is told this, at no cost; with another one: classifier-free guidance while
    sampling, two evaluations a step. Several: x.png has a row for each, of the same noise. Default: the checkpoint's
    own, or what was trained in, if anything"""
    cfg_interval: tuple[float, float] | None = None
    """the times in which guidance acts, of a network that is told them, such as 0.42 0.62; default: the checkpoint's"""
    num_steps: int | None = None
    """default: meanflow 1, euler 50, heun 25, rk4 12"""
    solver: Literal["meanflow", "euler", "heun", "rk4"] | None = None
    """meanflow: by the average velocity; the others follow the instantaneous velocity; default: meanflow; euler for a
    network of plain flow matching"""
    seed: int = 0
    """image k's noise is a function of the seed and k"""
    gif: bool = False
    """x.gif: from noise to data, one step beside --num-steps of Euler's method (default: 50)"""
    walk: tuple[int, int] | None = None
    """x.png: a row for each class, from the noise of one seed to that of another, of --num-images (default: 10)"""
    neighbours: bool = False
    """of a run; x.png: samples, and under each the training sample that is nearest: are they copies?"""
    trust_remote_code: bool = False
    """run the file of a network that is not in the zoo, which lies beside its weights; read it first"""
    ema: float | None = None
    """of a run: decay of the averaged weights; default: the recipe's first"""
    revision: str | None = None
    """of a Hub id: branch, tag or commit"""
    variant: Literal["bf16", "fp16"] | None = None
    """of an exported folder or Hub id: the weights that were saved in this precision"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision of the network and the VAE; noise, times and steps stay float32"""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; default: the best there is"""
    batch_size: int = 64
    """images at a time, of each process"""

    def __post_init__(self) -> None:
        for name, most in (("num_images", 10**12), ("num_steps", 10_000), ("batch_size", 10**6)):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, ">= 1")
            check(value is None or value <= most, name, value, f"at most {most:,}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        asked = [name for name in ("gif", "walk", "neighbours") if getattr(self, name)]
        check(len(asked) <= 1, "picture", " and ".join(asked), "one of gif, walk and neighbours")
        if self.gif and self.out == Path("samples.png"):
            object.__setattr__(self, "out", Path("samples.gif"))
        check(not self.gif or self.solver is None, "solver", self.solver, "left out with --gif, which shows Euler's")
        ending = ".gif" if self.gif else ".png"
        check(not asked or self.out.suffix == ending, "out", self.out, f"x{ending} with --{''.join(asked)}")
        check(self.out.suffix != ".gif" or self.gif, "out", self.out, "x.png, x.npz or a folder without --gif")
        check(not asked or (self.num_images or 0) <= 256, "num_images", self.num_images, "at most 256 in this picture")
        check(self.walk is None or min(self.walk) >= 0, "walk", self.walk, "two seeds >= 0")
        check(not asked or len(self.cfg_scale) <= 1, "cfg_scale", self.cfg_scale, "one in this picture")
        is_strip = len(self.cfg_scale) > 1
        check(not is_strip or self.out.suffix == ".png", "out", self.out, "x.png with several --cfg-scale")
        if self.out.suffix == ".png" and (self.num_images or 0) > PICTURE:
            raise ValueError(f"num_images must be <= {PICTURE} in one picture, got {self.num_images}: name a folder")
        object.__setattr__(self, "out", self.out.expanduser())


def read_conditions(given: tuple[tuple[str, ...], ...]) -> dict:
    """The values of each condition by name, (n,) or (n, D): whole numbers as int64, others as float32.

    Raises:
        ValueError: a condition without a name or a value, or a value that is not a finite number.
    """
    import torch

    conditions = {}
    for words in given:
        if len(words) < 2:
            raise ValueError(
                f"cond must be a name and its values, such as angle 0 0.5, got: {' '.join(words) or 'nothing'}"
            )
        name, *words = words
        try:
            rows = [[float(number) for number in word.split(",")] for word in words]
            values = torch.tensor(rows)
        except ValueError:
            raise ValueError(f"cond {name} must be numbers, or vectors of one length, got {' '.join(words)}") from None
        if not values.isfinite().all():
            raise ValueError(f"cond {name} must be finite, got {' '.join(words)}")
        is_whole = all(number.lstrip("+-").isdigit() for word in words for number in word.split(","))
        values = values.long() if is_whole else values
        conditions[name] = values[:, 0] if values.shape[1] == 1 else values
    return conditions


@contextmanager
def conditions_named(cond: dict) -> Iterator[None]:
    """A network's failure names the conditions that it was given, whose shapes only the network can know."""
    from meanflow.files import first_line

    try:
        yield
    except RuntimeError as error:
        if not cond or "out of memory" in str(error):
            raise
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in cond.items())
        raise ValueError(f"the network does not take cond {shapes}: {first_line(error)}") from error


def special(options: Options, pipe, classes: list[int], solver: str, steps: int) -> str:
    """Writes the picture that is asked for instead of plain samples, and returns a line about it."""
    from meanflow.files import ensure
    from samples.pictures import write_gif, write_neighbours, write_walk

    ensure(len(pipe.shape) == 3, f"{options.checkpoint} makes volumes, of which there are no such pictures")
    ensure(not options.cond, "cond is for plain samples, and not for this picture")
    how = {"guidance_scale": next(iter(options.cfg_scale), None), "guidance_interval": options.cfg_interval}
    if options.walk:
        how |= {"num_inference_steps": steps, "solver": solver}
        return write_walk(pipe, options.out, options.walk, classes[:16], options.num_images or 10, **how)
    count = options.num_images or min(len(classes), 16) or 9
    e = pipe.noise(options.seed, range(count))
    y = [classes[number % len(classes)] for number in range(count)] if classes else None
    if options.gif:
        return write_gif(pipe, options.out, e, y, options.num_steps or 50, **how)
    how |= {"num_inference_steps": steps, "solver": solver}
    return write_neighbours(pipe, options.out, Path(options.checkpoint), e, y, **how)


def main(options: Options) -> None:
    is_folder = options.out.suffix not in (".png", ".npz", ".gif")
    check_writable(options.out, is_folder)

    import numpy as np
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from tqdm import tqdm

    from meanflow.files import ensure
    from meanflow.publishing.checkpoints import load_pipeline
    from meanflow.publishing.export import cast
    from meanflow.sampler import STEPS
    from samples.device import find_device

    accelerator = Accelerator(cpu=options.device == "cpu" or not torch.accelerator.is_available())
    rank, world = accelerator.process_index, accelerator.num_processes
    device = find_device(options.device, accelerator)
    pipe = load_pipeline(options.checkpoint, options.ema, options.variant, options.revision, options.trust_remote_code)
    solver = options.solver or pipe.sampling.solver
    scales = options.cfg_scale or (None,)
    for scale in scales:
        pipe.check_choice(solver, scale, options.cfg_interval)
    volumes = len(pipe.shape) == 4
    if len(scales) > 1:
        per_scale = options.num_images or len(options.classes) or min(pipe.num_classes, 16) or 8
    else:
        per_scale = options.num_images or (8 * len(options.classes) or 64)
    count = per_scale * len(scales)
    fits = options.out.suffix != ".png" or count <= PICTURE
    check(fits, "num_images", per_scale, f"such that one picture has at most {PICTURE} images")
    if volumes and options.out.suffix == ".npz":
        raise ValueError(f"out must be a folder or x.png for volumes, got {options.out}")
    is_picture = volumes or pipe.vae is not None or pipe.shape[0] in (1, 3)
    made = f"{options.checkpoint} makes {pipe.shape[0]} channels, latents without a VAE: pictures need one"
    ensure(is_picture, f"{made} (--vae of tools/convert.py, or of the recipe)")
    if options.classes and not pipe.num_classes:
        raise ValueError("classes are for networks with classes, and this one has none: leave them out")
    size = count * math.prod(pipe.shape)
    if volumes or options.out.suffix == ".npz":
        check_disk(options.out, size * (4 if volumes else 1))
    elif is_folder:
        check_disk(options.out, size // 10)  # PNG compresses
    classes = pipe.class_ids(options.classes) if options.classes else list(range(pipe.num_classes))
    cond = read_conditions(options.cond)
    steps = options.num_steps or STEPS[solver]
    accelerator.print(f"guidance {pipe.sampling.guidance}", file=sys.stderr)
    cast(pipe, None if options.dtype == "fp32" else options.dtype).to(device)
    pipe.set_progress_bar_config(disable=True)

    if options.gif or options.walk or options.neighbours:
        ensure(world == 1, f"--gif, --walk and --neighbours are for one process, got {world}")
        accelerator.print(special(options, pipe, classes, solver, steps))
        return accelerator.end_training()

    def draw(numbers: range):
        """The images of these numbers; each scale has the same noise."""
        rows = groupby(numbers, lambda number: number // per_scale)
        return np.concatenate([draw_at(scales[row], [number % per_scale for number in part]) for row, part in rows])

    def draw_at(scale: float | None, indices: list[int]):
        y = [classes[index % len(classes)] for index in indices] if classes else None
        rows = {name: torch.stack([values[index % len(values)] for index in indices]) for name, values in cond.items()}
        how = {"num_inference_steps": steps, "solver": solver, "cond": rows}
        how |= {"guidance_scale": scale, "guidance_interval": options.cfg_interval}
        with conditions_named(rows):
            images = pipe(y, len(indices), latents=pipe.noise(options.seed, indices), output_type="np", **how).images
        return images if volumes else (images * 255).round().astype("uint8")

    writer = {".png": grid, ".npz": npz}.get(options.out.suffix, folder)
    usual = 1 if volumes else len(classes) if 1 < len(classes) <= 16 else 8
    columns = [per_scale if len(scales) > 1 else usual] if writer is grid else []
    bar = tqdm(total=count, unit="image", disable=not accelerator.is_main_process)
    start = time.perf_counter()
    with writer(options.out, count, *columns) if accelerator.is_main_process or is_folder else nullcontext() as write:
        for first in range(0, count, options.batch_size * world):
            mine = range(count)[first + rank * options.batch_size :][: options.batch_size]
            images = draw(mine) if mine else None
            if is_folder:
                if mine:
                    write(images, mine.start)
            else:
                for number, part in enumerate(gather_object([images]) if world > 1 else [images]):
                    if accelerator.is_main_process and part is not None:
                        write(part, first + number * options.batch_size)
            bar.update(min(options.batch_size * world, count - first))
    accelerator.wait_for_everyone()
    bar.close()
    rate = count / (time.perf_counter() - start)
    what = "volumes" if volumes else "images"
    name = f"{solver}, {steps} step{'s' if steps > 1 else ''}"
    accelerator.print(f"{options.out}: {count} {what}, {name}, {rate:.3g} {what}/s")
    accelerator.end_training()


if __name__ == "__main__":
    end_with_launcher()
    with refusals():
        main(read_flags(Options))
