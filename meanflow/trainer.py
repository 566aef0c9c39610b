"""The training loop, on Accelerate: the same code for a laptop and a cluster."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from meanflow import checkpoint
from meanflow.config import TrainConfig
from meanflow.data import Data, load_data, make_loader
from meanflow.ema import Averages
from meanflow.files import write_whole
from meanflow.latents import EncodedImages, Latents, verify, write_random
from meanflow.objective import MeanFlow, average_velocity
from meanflow.pictures import save_curves, save_grid
from meanflow.preflight import make_net, preflight, total_steps
from meanflow.sampler import sample
from meanflow.time import generator, noise


class Trainer:
    """Trains a recipe into recipe.out, from its newest checkpoint if it has one.

    Raises:
        ValueError: a choice that cannot work, before a checkpoint or log is touched.
    """

    def __init__(self, recipe: TrainConfig):
        self.recipe = recipe
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulation_steps,
            log_with=list(recipe.track) or None,
            project_dir=recipe.out,
        )
        set_seed(recipe.seed)
        if recipe.smoke and recipe.vae:
            recipe = self.recipe = self.with_random_latents(recipe)
        self.data = load_data(recipe)
        self.total = total_steps(recipe, self.data)
        self.accelerator.print(preflight(recipe, self.data, self.accelerator.num_processes))
        self.verify_latents()
        self.net = make_net(recipe, self.data).to(self.accelerator.device)
        self.averages = Averages(self.net, recipe.ema_decay)
        optimizer = torch.optim.Adam(self.net.parameters(), recipe.lr, recipe.betas, fused=True)
        self.objective, self.optimizer = self.accelerator.prepare(MeanFlow(self.net, recipe.objective), optimizer)
        if self.accelerator.is_main_process:
            checkpoint.claim_folder(recipe, self.data.facts)
        self.accelerator.wait_for_everyone()

    def with_random_latents(self, recipe: TrainConfig) -> TrainConfig:
        """The smoke test's recipe, on 256 random latents of the recipe's shape, in its own folder."""
        recipe = replace(recipe, data=str(recipe.out / "latents"))
        if self.accelerator.is_main_process:
            write_random(recipe.out / "latents", 256, recipe.vae, recipe.scaling_factor, recipe.resolution)
        self.accelerator.wait_for_everyone()
        return recipe

    def verify_latents(self) -> None:
        """Reads the cache's shards once, a share on each process of a machine, so that no damage stops a run later."""
        if isinstance(self.data, Latents) and self.recipe.verify:
            share = slice(self.accelerator.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            verify(self.data.folder, self.data.shards[share], quiet=not self.accelerator.is_main_process)

    def loader(self, start: int) -> DataLoader:
        place = (self.accelerator.process_index, self.accelerator.num_processes)
        return make_loader(self.recipe, self.data, start, self.total, *place)

    def train(self) -> None:
        recipe, accelerator, net, optimizer = self.recipe, self.accelerator, self.net, self.optimizer
        step = checkpoint.load(accelerator, recipe, net, self.averages)
        log = Log(accelerator, recipe, step)
        if step:
            accelerator.print(f"{recipe.out}: resumes after step {step} of {self.total}")
        bar = tqdm(total=self.total, initial=step, unit="step", disable=not accelerator.is_main_process, mininterval=1)

        self.objective.train()
        for batch in self.loader(step):
            x, y, draws = send_to_device(batch, accelerator.device, non_blocking=True)
            if isinstance(self.data, EncodedImages):
                x = self.data.encode(*x)
            with accelerator.accumulate(self.objective):
                out = self.objective(x, y, draws)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients and recipe.max_grad_norm:
                    accelerator.clip_grad_norm_(self.objective.parameters(), recipe.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, step, self.total)
                optimizer.step()
                optimizer.zero_grad()
            log.add(out.loss, out.metrics)
            if not accelerator.sync_gradients:
                continue
            step += 1
            self.averages.update(net)
            bar.update()
            last = step == self.total
            if step % recipe.log_every == 0 or last:
                bar.set_postfix(log.write(step, lr=optimizer.param_groups[0]["lr"]))
            if step % recipe.checkpoint_every == 0 or last:
                checkpoint.save(accelerator, recipe, self.data.facts, step, net, self.averages)
            if (step % recipe.sample_every == 0 or last) and accelerator.is_main_process:
                draw_samples(recipe, self.data, self.averages[recipe.ema_decay[0]], accelerator.device, step)
                log.draw()
        bar.close()
        accelerator.print(f"{recipe.out}: checkpoints, log.jsonl, loss.png and samples/")
        accelerator.end_training()


def learning_rate(recipe: TrainConfig, step: int, total: int) -> float:
    """The rate of optimiser step `step`, counted from 0: a linear warm-up, then the schedule, which ends at 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    return (
        recipe.lr * {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[recipe.schedule]
    )


@torch.no_grad()
def draw_samples(recipe: TrainConfig, data: Data, net: ModelMixin, device: torch.device, step: int) -> None:
    """Writes samples/step-....png: one-step samples, a column per class; of fixed pairs, their images again."""
    columns = min(data.num_classes, 10) or 8
    rows = 8 if data.shape[-1] <= 16 else 4
    if recipe.fixed_noise:
        indices = range(min(64, len(data)))
        _, y = data.batch(indices, (generator(recipe.seed, index, "data") for index in indices))
    elif data.num_classes:
        y = torch.linspace(0, data.num_classes - 1, columns).long().repeat(rows)
    else:
        y = None
    e = noise(recipe.seed, range(len(y) if y is not None else columns * rows), data.shape).to(device)
    y = y if y is None else y.to(device)
    x = sample(lambda z, t, r: average_velocity(net, recipe.objective, z, t, r, y), e)
    save_grid(data.to_pixels(x), recipe.out / "samples" / f"step-{step:08d}.png", columns)


class Log:
    """log.jsonl, loss.png and the trackers: one line holds the means since the line before."""

    def __init__(self, accelerator: Accelerator, recipe: TrainConfig, step: int):
        self.accelerator, self.recipe, self.path = accelerator, recipe, recipe.out / "log.jsonl"
        self.sums: dict[str, list[Tensor]] = {}
        self.step, self.start = step, time.perf_counter()
        if recipe.track:
            fields = checkpoint.flatten(checkpoint.recipe_fields(recipe))
            accelerator.init_trackers(recipe.out.name, {name: str(value) for name, value in fields.items()})
        if accelerator.is_main_process and self.path.exists():  # forget what the resumed run will do again
            kept = [json.dumps(line) for line in read_log(self.path) if line["step"] <= step]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Notes one micro-batch, without waiting for the device."""
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value, count + 1)

    def write(self, step: int, lr: float) -> dict[str, str]:
        """Writes a line and returns what the progress bar shows."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        means = {name: value.tolist() for name, value in self.accelerator.reduce(means, "mean").items()}
        rate = (step - self.step) * self.recipe.global_batch / (time.perf_counter() - self.start)
        line = {"step": step, **means, "lr": lr, "images_per_second": rate}
        self.sums, self.step, self.start = {}, step, time.perf_counter()
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        for name, value in list(line.items()):
            if isinstance(value, list):
                line |= {f"{name}/{channel}": v for channel, v in enumerate(line.pop(name))}
        self.accelerator.log(line, step=step)
        return {"raw loss": f"{means['raw_loss']:.4g}", "images/s": f"{rate:.0f}"}

    def draw(self) -> None:
        if self.accelerator.is_main_process and self.path.exists():
            save_curves(read_log(self.path), self.recipe.out / "loss.png")


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a crash cut short is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
