"""The training loop, on Accelerate: the same code for a laptop and a cluster."""

import json
import math
import os
import secrets
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, gather_object, send_to_device, set_seed
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from meanflow import checkpoint
from meanflow.config import TrainConfig
from meanflow.data import Data, channel_weights, load_data, make_loader
from meanflow.ema import Averages
from meanflow.export import export
from meanflow.files import first_line, read_json, write_whole
from meanflow.guard import Guard, Stop
from meanflow.hub import Pusher
from meanflow.jvp import support_fsdp2
from meanflow.latents import EncodedImages, Latents, verify
from meanflow.noise import generator, noise, stream_seed
from meanflow.objective import MeanFlow, average_velocity
from meanflow.pictures import save_curves, save_grid
from meanflow.preflight import make_net, preflight, total_steps
from meanflow.sampler import sample


class Trainer:
    """Trains a recipe into recipe.out, from its newest checkpoint if it has one.

    Raises:
        ValueError: a choice that cannot work, before a checkpoint or log is touched.
    """

    def __init__(self, recipe: TrainConfig):
        self.recipe = recipe
        check_launch()
        how = {"cpu": not torch.cuda.is_available(), "mixed_precision": recipe.mixed_precision}
        how |= {"log_with": list(recipe.track) or None, "project_dir": recipe.out}
        self.accelerator = Accelerator(gradient_accumulation_steps=recipe.accumulation_steps, **how)
        if self.accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"{os.environ['WORLD_SIZE']} processes were launched that do not know of each other")
        if self.accelerator.distributed_type == DistributedType.FSDP:
            self.prepare_sharding()
        elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
            raise ValueError("FSDP was asked for, but Accelerate shards on several GPUs alone: use another config")
        set_seed(recipe.seed)
        self.data = load_data(recipe)
        self.total = total_steps(recipe, self.data)
        self.accelerator.print(preflight(recipe, self.data, self.accelerator.num_processes))
        checkpoint.together(self.accelerator, self.verify_latents, main=False)
        self.start = start = checkpoint.choose(recipe)
        self.net = make_net(recipe, self.data)
        if recipe.init_from and start is None:
            checkpoint.init_weights(self.net, recipe.init_from)
        self.net.to(self.accelerator.device)
        if recipe.activation_checkpointing:
            self.net.enable_gradient_checkpointing()
        self.averages = Averages(self.net, recipe.ema_decay)
        if start is not None:
            checkpoint.together(self.accelerator, checkpoint.verify, start)
            checkpoint.load_networks(start, self.net, self.averages)
        objective = replace(recipe.objective, channel_weights=channel_weights(recipe.objective, self.data))
        optimizer = torch.optim.Adam(self.net.parameters(), recipe.lr, recipe.betas, fused=True)
        self.objective, self.optimizer = self.accelerator.prepare(MeanFlow(self.net, objective), optimizer)
        if self.accelerator.is_fsdp2:
            for _, average in self.averages.items():
                fsdp2_prepare_model(self.accelerator, average)
        self.lock = checkpoint.together(self.accelerator, checkpoint.claim_folder, recipe, self.data.facts)
        self.pusher = Pusher(recipe) if recipe.push_to_hub and self.accelerator.is_main_process else None

    def verify_latents(self) -> None:
        """Reads the cache's shards once, a share on each process of a machine, so that no damage stops a run later."""
        if isinstance(self.data, Latents) and self.recipe.verify:
            share = slice(self.accelerator.local_process_index, None, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
            verify(self.data.folder, self.data.shards[share], quiet=not self.accelerator.is_main_process)

    def train(self) -> None:
        """Trains to the last step.

        Raises:
            SystemExit: with a code of meanflow.guard, when something ends the run before; all processes leave together.
        """
        recipe, accelerator, net, optimizer = self.recipe, self.accelerator, self.net, self.optimizer
        progress = self.restore()
        step = before = progress["step"]
        log = Log(accelerator, recipe, progress)
        if step:
            accelerator.print(f"{recipe.out}: resumes after step {step} of {self.total}")
        bar = tqdm(total=self.total, initial=step, unit="step", disable=not accelerator.is_main_process, mininterval=1)

        loader = make_loader(recipe, self.data, step, self.total, accelerator.process_index, accelerator.num_processes)
        self.objective.train()
        raw_loss, stop, saved = 0.0, None, True
        with Guard(accelerator, recipe, progress) as guard:
            for micro_step, batch in enumerate(loader, start=step * recipe.accumulation_steps):
                # For the network's own randomness, such as dropout: so no generator's state need be saved.
                place = micro_step * accelerator.num_processes + accelerator.process_index
                torch.manual_seed(stream_seed(recipe.seed, place, "network"))
                x, y, draws, augment_labels = send_to_device(batch, accelerator.device, non_blocking=True)
                if isinstance(self.data, EncodedImages):
                    x = self.data.encode(*x)
                with accelerator.accumulate(self.objective):
                    with accelerator.autocast():
                        out = self.objective(x, y, draws, augment_labels)
                    accelerator.backward(out.loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(net.parameters(), recipe.max_grad_norm or math.inf)
                        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                        # The optimiser's fused kernel then skips this step, without waiting for the norm.
                        optimizer.optimizer.found_inf = (~norm.isfinite()).float()
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(recipe, step, self.total)
                    optimizer.step()
                    optimizer.zero_grad()
                log.add(out.loss, out.metrics)
                raw_loss += out.metrics["raw_loss_channels"] / recipe.accumulation_steps
                if not accelerator.sync_gradients:
                    continue
                step += 1
                self.averages.update(net)
                bar.update()
                stop = guard.decide()
                guard.observe(raw_loss, ~norm.isfinite())
                raw_loss, last = 0.0, step == self.total
                if step % recipe.log_every == 0 or last:
                    bar.set_postfix(log.write(step, lr=optimizer.param_groups[0]["lr"]))
                push = recipe.push_every is not None and step % recipe.push_every == 0 and not last
                if step % recipe.checkpoint_every == 0 or push or last or (stop and stop.save):
                    stop = stop or guard.decide()
                    if not stop or stop.save:
                        note = {"data": self.data.facts, "step": {"step": step, **guard.state, **log.state()}}
                        saved = checkpoint.save(accelerator, recipe, note, net, self.averages, optimizer.optimizer)
                        if push and saved and self.pusher:
                            self.pusher.start(checkpoint.checkpoints(recipe.out)[-1])
                if step % recipe.sample_every == 0 or last:
                    draw_samples(recipe, self.data, self.averages[recipe.ema_decay[0]], accelerator, step)
                if stop:
                    break
            bar.close()
            if accelerator.is_main_process:
                fault = "the run was stopped" if stop else None if saved else "the last step is not saved"
                self.publish(fault, step > before, guard)
        self.leave(stop, saved, step)

    def publish(self, fault: str | None, trained: bool, guard: Guard) -> None:
        """A finished run as others use it, in pipeline/, and on the Hub; no fault of either is the run's."""
        folder = self.recipe.out / "pipeline"
        try:
            if fault is None and not self.recipe.smoke and (trained or not folder.exists()):
                export(self.recipe.out, folder)
        except Exception as error:  # of many kinds, by four packages
            fault = f"it cannot be exported: {first_line(error)}"
            print(f"{self.recipe.out}: {fault}", file=sys.stderr)
        if self.pusher:
            source = folder if fault is None and folder.exists() else None
            said = self.pusher.finish(source, fault or "there is no pipeline/", lambda: bool(guard.signal))
            print(said, file=sys.stderr)

    def prepare_sharding(self) -> None:
        """For FSDP2. Accelerate would round the inputs to bfloat16, so the times: autocast does it where it may."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
            wanted = "fsdp_version 2, with fsdp_cpu_ram_efficient_loading false"
            raise ValueError(f"FSDP must be of {wanted}: see accelerate_configs/fsdp2.yaml")
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        warnings.filterwarnings("ignore", ".*returned a view tensor")  # a tensor with its tangent is one
        support_fsdp2()

    def restore(self) -> dict:
        """Restores what the constructor did not, and returns the checkpoint's step.json; step 0 if there is none."""
        if self.start is None:
            return {"step": 0}
        if self.accelerator.is_main_process:
            checkpoint.go_back(self.recipe.out, self.start)
        checkpoint.load_moments(self.start, self.net, self.optimizer.optimizer)
        return read_json(self.start / "step.json")

    def leave(self, stop: Stop | None, saved: bool, step: int) -> None:
        accelerator, out = self.accelerator, self.recipe.out
        if stop:
            where = f"saved after step {step}" if stop.save and saved else f"at step {step}, not saved"
            accelerator.print(f"{out}: {stop.reason}: {where}", file=sys.stderr)
        else:
            pipeline = " and pipeline/" if (out / "pipeline").exists() else ""
            accelerator.print(f"{out}: checkpoints, log.jsonl, loss.png, samples/{pipeline}")
        accelerator.end_training()
        self.lock = None
        if stop:
            sys.exit(stop.code)
        if not saved:
            sys.exit(f"error: {out}: the last step could not be saved: make room, and give the same command again")


def check_launch() -> None:
    """Refuses the launches of accelerate that start one process where several were asked for."""
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        advice = "add --multi_gpu (on CPUs, too), or use accelerate_configs/cpu_2proc.yaml or torchrun"
        raise ValueError(f"accelerate launch was asked for several processes and started one: {advice}")


def learning_rate(recipe: TrainConfig, step: int, total: int) -> float:
    """The rate of optimiser step `step`, counted from 0: a linear warm-up, then the schedule, which ends at 0."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / (recipe.warmup_steps + 1)
    done = (step - recipe.warmup_steps) / max(1, total - recipe.warmup_steps)
    schedules = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}
    return recipe.lr * schedules[recipe.schedule]


@torch.no_grad()
def draw_samples(recipe: TrainConfig, data: Data, net: nn.Module, accelerator: Accelerator, step: int) -> None:
    """Writes samples/step-....png: one-step samples, a column per class; of fixed pairs, their images again; loss.png.

    All processes draw the same, since the network may be sharded.
    """
    columns = min(data.num_classes, 10) or 8
    rows = 8 if data.shape[-1] <= 16 else 4
    indices, y = range(columns * rows), None
    if recipe.fixed_noise:
        indices = range(min(64, len(data)))
        _, y = data.batch(indices, (generator(recipe.seed, index, "data") for index in indices))
    elif data.num_classes:
        y = torch.linspace(0, data.num_classes - 1, columns).long().repeat(rows)
    e, y = send_to_device((noise(recipe.seed, indices, data.shape), y), accelerator.device)
    x = sample(lambda z, t, r: average_velocity(net, recipe.objective, z, t, r, y), e)
    if accelerator.is_main_process:
        save_grid(data.to_pixels(x), recipe.out / "samples" / f"step-{step:08d}.png", columns)
        if (recipe.out / "log.jsonl").exists():
            save_curves(read_log(recipe.out / "log.jsonl"), recipe.out / "loss.png")


class Log:
    """log.jsonl, loss.png and the trackers: one line holds the means since the line before."""

    def __init__(self, accelerator: Accelerator, recipe: TrainConfig, progress: dict):
        self.accelerator, self.recipe, self.path = accelerator, recipe, recipe.out / "log.jsonl"
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.restore(progress.get("log", []))
        self.step, self.start = progress["step"], time.perf_counter()
        self.run_id = progress.get("run_id", secrets.token_hex(4))
        if recipe.track:
            fields = checkpoint.flatten(checkpoint.recipe_fields(recipe))
            again = {"wandb": {"id": self.run_id, "resume": "allow"}}
            again |= {"trackio": {"name": self.run_id, "resume": "allow"}}  # tensorboard's is the folder
            accelerator.init_trackers(recipe.out.name, {name: str(fields[name]) for name in fields}, again)
        if accelerator.is_main_process and self.path.exists():  # forget what the resumed run will do again
            kept = [json.dumps(line) for line in read_log(self.path) if line["step"] <= self.step]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Notes one micro-batch, without waiting for the device."""
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value, count + 1)

    def state(self) -> dict:
        """What a checkpoint keeps: the trackers' run, and the sums since the last line, of each process."""
        sums = gather_object([{name: (total.tolist(), count) for name, (total, count) in self.sums.items()}])
        return {"run_id": self.run_id, "log": sums}

    def restore(self, state: list[dict]) -> None:
        """Goes on with this process's sums; with the mean of all, if they were more or fewer then."""
        if len(state) == self.accelerator.num_processes:
            state = [state[self.accelerator.process_index]]
        for name in state[0] if state else ():
            totals = torch.tensor([sums[name][0] for sums in state], device=self.accelerator.device)
            self.sums[name] = (totals.mean(dim=0), state[0][name][1])

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


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that a crash cut short is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
