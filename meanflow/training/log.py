"""The run's log: log.jsonl, loss.png and the trackers."""

import io
import json
import os
import secrets
import shutil
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from meanflow.config import TrainConfig, flatten
from meanflow.files import first_line, unused, write_whole
from meanflow.pictures import save_curves

CURVE_POINTS = 2000  # lines of a log that loss.png shows at most


class Log:
    """One line of the log holds the means of the metrics since the line before, and where the seconds went.

    Args:
        fields: the recipe as JSON has it, for the trackers.
        progress: the content of a checkpoint's step.json.
    """

    def __init__(self, accelerator, recipe: TrainConfig, fields: dict, progress: dict):
        self.accelerator, self.recipe, self.path = accelerator, recipe, recipe.out / "log.jsonl"
        self.sums: dict[str, tuple[torch.Tensor, int]] = {}
        self.restore(progress.get("log", []))
        self.step = progress["step"]
        self.run_id = progress.get("run_id", secrets.token_hex(4))
        self.unwritten, self.failed = "", set()
        if recipe.track:
            self.start_trackers(fields)
        if accelerator.is_main_process and self.path.exists():
            with self.optional("log.jsonl"):
                self.take_up()
        self.restart_clock()

    def start_trackers(self, fields: dict) -> None:
        """Begins the run in each tracker, or goes on with it; tensorboard does so by its folder."""
        recipe, settings = self.recipe, {name: str(value) for name, value in flatten(fields).items()}
        name = recipe.run_name or f"{recipe.out.name}-{self.run_id}"
        goes_on = {"wandb": {"id": self.run_id, "name": name, "resume": "allow"}}
        goes_on |= {"trackio": {"name": name, "resume": "allow"}}
        # trackio prints an address that anybody who has it can write to.
        with self.optional("trackers"), redirect_stdout(io.StringIO()):
            self.accelerator.init_trackers(recipe.project or recipe.out.name, settings, goes_on)

    def take_up(self) -> None:
        """Forgets the lines that the resumed run will write again. A damaged log is kept beside."""
        with self.path.open(errors="replace") as file:
            num_damaged = sum(line.endswith("\n") and parse(line) is None for line in file)
        if num_damaged:
            copy = unused(self.path.with_name("log.jsonl.damaged"))
            shutil.copyfile(self.path, copy)
            print(f"warning: {self.path}: {num_damaged} damaged lines are left out; {copy} has them", file=sys.stderr)
        kept = [json.dumps(line) for line in read_log(self.path) if line["step"] <= self.step]
        write_whole(self.path, "".join(f"{line}\n" for line in kept))

    @contextmanager
    def optional(self, what: str):
        """What training goes on without: where it fails, this is said once."""
        try:
            yield
        except Exception as error:  # of many kinds, by many packages
            if what not in self.failed:
                self.failed.add(what)
                words = f"{what} failed, and training goes on: {first_line(error)}"
                tqdm.write(f"warning: {self.recipe.out}: {words}", file=sys.stderr)

    def restart_clock(self) -> None:
        self.start, self.seconds = time.perf_counter(), defaultdict(float)

    @contextmanager
    def clock(self, what: str):
        """Counts the seconds inside as spent on `what`: saving or samples."""
        begin = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - begin

    def timed(self, batches):
        """The batches, one by one; counts the seconds that the loop waits for them."""
        begin = time.perf_counter()
        for batch in batches:
            self.seconds["data"] += time.perf_counter() - begin
            yield batch
            begin = time.perf_counter()

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Notes the metrics of one micro-batch, without waiting for the device."""
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value, count + 1)

    def state(self) -> dict:
        """What a checkpoint keeps: the trackers' run, and the sums since the last line, of each process."""
        sums = gather_object([{name: (total.tolist(), count) for name, (total, count) in self.sums.items()}])
        return {"run_id": self.run_id, "log": sums}

    def restore(self, state: list[dict]) -> None:
        """Goes on with this process's sums, or with the mean of all, if there were more or fewer processes."""
        if len(state) == self.accelerator.num_processes:
            state = [state[self.accelerator.process_index]]
        for name in state[0] if state else ():
            totals = torch.tensor([sums[name][0] for sums in state], device=self.accelerator.device)
            self.sums[name] = (totals.mean(dim=0), state[0][name][1])

    def write(self, step: int, lr: float) -> dict[str, str]:
        """Writes a line, and returns what the progress bar shows."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        means = {name: value.tolist() for name, value in self.accelerator.reduce(means, "mean").items()}
        training = time.perf_counter() - self.start - self.seconds["saving"] - self.seconds["samples"]
        rate = (step - self.step) * self.recipe.global_batch / max(training, 1e-9)
        seconds = {f"seconds_{what}": round(self.seconds[what], 3) for what in ("data", "saving", "samples")}
        line = {"step": step, **means, "lr": lr, "images_per_second": rate, **seconds}
        self.sums, self.step = {}, step
        self.restart_clock()
        self.put(step, line)
        shown = "raw_loss" if "raw_loss" in means else "loss"
        return {shown.replace("_", " "): f"{means[shown]:.4g}", "images/s": f"{rate:.0f}"}

    def put(self, step: int, values: dict) -> None:
        """Writes a line, and gives it to the trackers, as train/... and eval/..."""
        if self.accelerator.is_main_process:
            self.unwritten += json.dumps({"step": step, **values}) + "\n"
            with self.optional("log.jsonl"):
                append(self.path, self.unwritten)
                self.unwritten = ""
        numbers = split_channels(values)
        tracked = {f"train/{name}".replace("train/eval_", "eval/"): numbers[name] for name in numbers.keys() - {"step"}}
        with self.optional("trackers"):
            self.accelerator.log(tracked, step=step)

    def track_picture(self, path: Path, step: int) -> None:
        """Gives a picture to the trackers, as samples."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            with self.optional("trackers"), Image.open(path) as image:
                if tracker.name == "trackio":  # Accelerate's tracker has no pictures for it
                    import trackio

                    tracker.tracker.log({"samples": trackio.Image(path)}, step=step)
                else:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": np.asarray(image)[None]}, step=step, **layout)

    def draw_curves(self) -> None:
        """Draws loss.png."""
        if self.accelerator.is_main_process:
            with self.optional("loss.png"):
                save_curves(read_log(self.path, CURVE_POINTS), self.recipe.out / "loss.png")


def split_channels(line: dict) -> dict:
    """The line with every list as numbers, raw_loss_channels/0 and so on, as trackers take them."""
    numbers = {name: value for name, value in line.items() if not isinstance(value, list)}
    for name in line.keys() - numbers.keys():
        numbers |= {f"{name}/{channel}": value for channel, value in enumerate(line[name])}
    return numbers


def append(path: Path, lines: str) -> None:
    """Appends all of these lines or, where the disk is full, nothing."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(lines)
    except OSError:
        os.truncate(path, size)
        raise


def parse(line: str) -> dict | None:
    """A line of a log, None if it is damaged or another program's."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and type(fields.get("step")) is int else None


def read_log(path: Path, max_lines: int | None = None) -> list[dict]:
    """The lines of a log.jsonl, without damaged ones and a last one that a crash cut short.

    Args:
        max_lines: of a longer file, read only about this many lines, evenly spread, and those of evaluations.
    """
    with path.open(errors="replace") as file:
        length = len(file.readline())
        file.seek(0)
        every = 1 if max_lines is None or not length else max(1, path.stat().st_size // (length * max_lines))
        lines = [line for number, line in enumerate(file) if number % every == 0 or '"eval_' in line]
    return [entry for line in lines if line.endswith("\n") and (entry := parse(line))]
