"""The training loop, on Accelerate: the same code for a laptop and a cluster."""

import math
import os
import sys
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    fsdp2_prepare_model,
    send_to_device,
    set_seed,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from meanflow.config import TrainConfig, check, recipe_fields
from meanflow.data.loader import Ahead, make_loader
from meanflow.data.sources import training_data
from meanflow.files import ensure, first_line, read_json, write_json
from meanflow.noise import stream_seed
from meanflow.objectives.base import Sampling
from meanflow.objectives.jvp import support_fsdp2
from meanflow.program import INTERRUPTED, environment_number, note_end
from meanflow.publishing.checkpoints import checkpoints, verify_checkpoint
from meanflow.publishing.export import export
from meanflow.publishing.hub import Pusher
from meanflow.training import checkpoint
from meanflow.training.checkpoint import CheckpointWriter, on_processes
from meanflow.training.compile import can_compile, compile_objective
from meanflow.training.ema import Averages
from meanflow.training.evaluation import Evaluation
from meanflow.training.guard import FAILED, Guard, Stop
from meanflow.training.log import Log
from meanflow.training.optimizer import make_optimizer, set_rates
from meanflow.training.preflight import Parts, Plan, make_net, preflight
from meanflow.training.samples import draw_samples
from meanflow.training.screen import show


class Trainer:
    """Trains a recipe into recipe.out, from its newest checkpoint if it has one.

    Args:
        own: what the run has of the user's own.
    Raises:
        ValueError: a choice that cannot work, before a checkpoint or log is touched.
    """

    def __init__(self, recipe: TrainConfig, own: Parts = Parts()):
        self.recipe, self.accelerator = recipe, make_accelerator(recipe)
        set_seed(recipe.seed)
        newest = [on_processes(self.accelerator, checkpoint.choose_checkpoint, recipe)]
        self.start = broadcast_object_list(newest)[0]  # the first process decides for all
        plan = on_processes(self.accelerator, self.make_parts, own, only_main=False)
        if self.start is not None:
            on_processes(self.accelerator, verify_checkpoint, self.start)
            modules = self.start, self.bare, self.averages
            on_processes(self.accelerator, checkpoint.load_modules, *modules, only_main=False)
        if recipe.compile and can_compile(self.accelerator):
            compile_objective(self.bare)
        if self.accelerator.is_fsdp2:
            plugin, dtype = self.accelerator.state.fsdp_plugin, {"no": None, "bf16": torch.bfloat16}
            shard_blocks(self.bare, plugin, dtype[recipe.mixed_precision])
            for average in self.averages.nets.values():
                shard_blocks(average, plugin, None)
        optimizer = make_optimizer(self.bare, recipe, own.optimizer)
        self.objective, self.optimizer = self.accelerator.prepare(self.bare, optimizer)
        if self.accelerator.is_fsdp2:
            for average in self.averages.nets.values():
                fsdp2_prepare_model(self.accelerator, average)
        self.trained = [p for p in self.bare.parameters() if p.requires_grad]
        self.fields = recipe_fields(recipe, plan.objective.__name__)
        self.lock = on_processes(self.accelerator, checkpoint.claim_folder, recipe.out, self.fields, self.data.metadata)
        self.pusher = Pusher(recipe) if recipe.push_to_hub and self.accelerator.is_main_process else None

    def make_parts(self, own: Parts) -> Plan:
        """Makes what each process has for itself: the data, the objective with its network, the averages."""
        recipe, accelerator = self.recipe, self.accelerator
        is_seen = self.start is None or self.start.exists()
        check(is_seen, "out", recipe.out, "on a disk that all machines share, since one does not see the checkpoint")
        self.data = training_data(recipe, own.data)
        plan = preflight(recipe, self.data, accelerator.num_processes, own, self.start)
        self.total = plan.total
        if accelerator.is_local_main_process:
            show(plan)
        share = accelerator.local_process_index, environment_number("LOCAL_WORLD_SIZE", 1)
        if recipe.verify:
            self.data.verify(*share)
        if recipe.check_data:
            self.data.read_all(*share)
        self.net = make_net(recipe, self.data, own.net)
        if recipe.init_from and self.start is None:
            checkpoint.init_weights(self.net, recipe.init_from)
        if recipe.activation_checkpointing:
            self.net.enable_gradient_checkpointing()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.tf32
        self.bare = plan.objective(self.net, recipe.objective)  # what is saved; self.objective may wrap it
        self.bare.prepare(self.data)
        self.bare.to(accelerator.device)
        self.evaluation = Evaluation(recipe, self.data, accelerator) if recipe.eval_every else None
        self.averages = Averages(self.net, {str(decay): decay for decay in recipe.ema_decay})
        return plan

    def train(self) -> None:
        """Trains to the last step, and notes in end.json how it ended.

        Raises:
            SystemExit: with a code of training/guard.py, when something ends the run before; all processes leave
                together.
        """
        progress = self.restore()
        self.step = progress["step"]
        self.best = progress.get("best", {})  # score so far, by its name
        self.log = Log(self.accelerator, self.recipe, self.fields, progress)
        code, reason = INTERRUPTED, "interrupted"
        try:
            code, reason = self.train_to_end(progress)
        except Exception as error:
            code, reason = FAILED, first_line(error)
            raise
        finally:
            if self.accelerator.is_main_process:
                with self.log.optional("end.json"):
                    write_json(self.recipe.out / "end.json", {"code": code, "reason": reason, "step": self.step})
                note_end(code, reason, self.step)
            if self.lock:
                self.lock.release()
        if code:
            sys.exit(code)

    def train_to_end(self, progress: dict) -> tuple[int, str]:
        """Returns the program's exit code, and why it ended."""
        recipe, accelerator, first_step = self.recipe, self.accelerator, self.step
        saved = self.fields, self.data.metadata, self.bare, self.averages, self.optimizer.optimizer
        self.writer = CheckpointWriter(accelerator, recipe, *saved)
        if self.step:
            accelerator.print(f"{recipe.out}: resumes after step {self.step} of {self.total}")
        steps, rank = range(self.step, self.total), accelerator.process_index
        loader = make_loader(recipe, type(self.bare), self.data, steps, rank, accelerator.num_processes)
        # What cannot be read is known two steps before: in one the guard tells all processes, in one they read it.
        self.loader = Ahead(loader, 2 * recipe.accumulation_steps + 1)
        on_processes(accelerator, self.loader.begin, only_main=False)
        self.objective.train()
        self.raw_loss, stop = 0.0, None
        is_quiet = not accelerator.is_main_process
        self.bar = tqdm(initial=self.step, total=self.total, unit="step", mininterval=1, disable=is_quiet)
        with self.bar, Guard(accelerator, recipe, progress) as self.guard:
            micro_steps = enumerate(self.log.timed(self.loader), start=self.step * recipe.accumulation_steps)
            for micro_step, batch in micro_steps:
                self.train_step(batch, micro_step)
                if accelerator.sync_gradients:
                    stop = self.after_step()
                if stop:
                    break
            self.saved = self.writer.wait()
            self.bar.close()
            if accelerator.is_main_process:
                fault = "the run was stopped" if stop else None if self.saved else "the last step is not saved"
                self.publish(fault, self.step > first_step)
        return self.leave(stop)

    def train_step(self, batch, micro_step: int) -> None:
        """One micro-batch: to the device, through the objective, backward; the last of a step moves the weights."""
        recipe, accelerator = self.recipe, self.accelerator
        # For the network's own randomness, such as dropout, so that no generator's state need be saved.
        place = micro_step * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(stream_seed(recipe.seed, place, "network"))
        batch = send_to_device(batch, accelerator.device, non_blocking=True)
        if self.data.encode is not None:
            batch = batch._replace(x=self.data.encode(*batch.x))
        with accelerator.accumulate(self.objective):
            with accelerator.autocast():
                out = self.objective(batch, self.step)
            accelerator.backward(out.loss)
            if accelerator.sync_gradients:
                self.clip()
            set_rates(self.optimizer, recipe, self.step, self.total)
            self.optimizer.step()
            self.optimizer.zero_grad()
        loss = out.loss.detach()
        self.log.add({"loss": loss, **out.metrics})
        self.raw_loss += out.metrics.get("raw_loss_channels", loss.view(1)) / recipe.accumulation_steps

    def clip(self) -> None:
        """Clips the gradient; if it is not finite, the optimiser's fused kernel will skip the step without waiting."""
        max_norm = self.recipe.max_grad_norm
        if max_norm is None:
            norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        else:
            norm = self.accelerator.clip_grad_norm_(self.trained, max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.skipped = ~norm.isfinite()
        self.optimizer.optimizer.found_inf = self.skipped.float()
        self.log.add({"grad_norm": norm, "clipped": (norm > (max_norm or math.inf)).float()})

    def after_step(self) -> Stop | None:
        """What follows an optimiser step: averages, guard, log, checkpoint, samples. Returns what ends the run."""
        recipe, log, guard = self.recipe, self.log, self.guard
        self.step += 1
        is_last = self.step == self.total
        self.averages.update(self.net)
        self.bar.update()
        stop = guard.decide()  # by the step before
        guard.is_data_unreadable = self.loader.error is not None
        guard.observe(self.raw_loss, self.skipped)
        self.raw_loss = 0.0
        if self.step % recipe.log_every == 0 or is_last:
            self.bar.set_postfix(log.write(self.step, lr=self.optimizer.param_groups[0]["lr"]))
        is_evaluated = recipe.eval_every is not None and (self.step % recipe.eval_every == 0 or is_last)
        scores = self.evaluate() if is_evaluated and not stop else {}
        is_best = any(score < self.best.get(name, math.inf) for name, score in scores.items())
        self.best |= scores if is_best else {}
        is_push = recipe.push_every is not None and self.step % recipe.push_every == 0 and not is_last
        is_due = self.step % recipe.checkpoint_every == 0 or is_last or (is_best and recipe.keep_best)
        if is_due or is_push or (stop and stop.save):
            stop = stop or guard.decide()  # by this step, too: it must be worth saving
            if guard.in_a_row and not (stop or is_last):
                tqdm.write(f"step {self.step} is not saved, since it was skipped", file=sys.stderr)
            elif not stop or stop.save:
                with log.clock("saving"):
                    progress = {"step": self.step, "scores": scores, "best": self.best}
                    self.writer.save({**progress, **guard.state, **log.state()})
                if is_push and self.writer.wait() and self.pusher:
                    with log.optional("push"):
                        self.pusher.start(checkpoints(recipe.out)[-1])
        if self.step % recipe.sample_every == 0 or is_last:
            with log.clock("samples"), log.optional("samples/"):
                picture = draw_samples(recipe, self.data, *self.sampled(), self.accelerator, self.step)
                log.track_picture(picture, self.step)
            log.draw_curves()
        return stop

    def sampled(self) -> tuple[torch.nn.Module, Sampling]:
        """The first average, and how it is sampled."""
        config = self.recipe.objective.at(self.step - 1)
        return self.averages.nets[str(self.recipe.ema_decay[0])], self.bare.sampling(config)

    def evaluate(self) -> dict[str, float]:
        """Logs how the samples compare with the reference. Returns this by its name, {} where it failed."""
        metric, score = self.recipe.eval_metric, math.nan
        with self.log.clock("samples"), self.log.optional("evaluation"):
            score = self.evaluation.score(*self.sampled())
            self.log.put(self.step, {f"eval_{metric}": score})
        return {checkpoint.score_name(self.recipe): score} if math.isfinite(score) else {}

    def publish(self, fault: str | None, trained: bool) -> None:
        """Exports a finished run into pipeline/ and pushes it; a failure of either does not touch the run.

        Args:
            fault: why there is nothing to publish, None if there is.
            trained: whether this start of the run made any step.
        """
        folder = self.recipe.out / "pipeline"
        try:
            if fault is None and not self.recipe.smoke and (trained or not folder.exists()):
                export(self.recipe.out, folder, trust_remote_code=True)  # the code is this run's own
        except Exception as error:  # of many kinds, by four packages
            fault = f"it cannot be exported: {first_line(error)}"
            print(f"{self.recipe.out}: {fault}", file=sys.stderr)
        if self.pusher:
            source = folder if fault is None and folder.exists() else None
            reason = fault or "there is no pipeline/"
            print(self.pusher.finish(source, reason, lambda: bool(self.guard.signal)), file=sys.stderr)

    def restore(self) -> dict:
        """Restores what the constructor did not, and returns the checkpoint's step.json; step 0 if there is none."""
        if self.start is None:
            return {"step": 0}
        if self.accelerator.is_main_process:
            checkpoint.set_aside_later(self.recipe.out, self.start)
        checkpoint.load_optimizer(self.start, self.bare, self.optimizer.optimizer)
        return read_json(self.start / "step.json")

    def leave(self, stop: Stop | None) -> tuple[int, str]:
        accelerator, out = self.accelerator, self.recipe.out
        code, reason = (stop.code, stop.reason) if stop else (0, "finished")
        if stop:
            where = f"saved after step {self.step}" if stop.save and self.saved else f"at step {self.step}, not saved"
            accelerator.print(f"{out}: {stop.reason}: {where}", file=sys.stderr)
        else:
            pipeline = " and pipeline/" if (out / "pipeline").exists() else ""
            accelerator.print(f"{out}: checkpoints, log.jsonl, loss.png, samples/{pipeline}")
        with self.log.optional("trackers"):
            accelerator.end_training()
        if self.loader.error:
            raise self.loader.error
        if not stop and not self.saved:
            code, reason = FAILED, "the last step could not be saved"
            advice = "make room, and give the same command again; --lr was too high if the weights are not finite"
            accelerator.print(f"error: {out}: {reason}: {advice}", file=sys.stderr)
        return code, reason


def make_accelerator(recipe: TrainConfig) -> Accelerator:
    """The Accelerator of this launch.

    Raises:
        ValueError: the launch is not what it looks like, or FSDP is set up in a way that cannot work.
    """
    world_size = environment_number("WORLD_SIZE", 1)
    is_one = {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    advice = "add --multi_gpu (on CPUs, too), or use accelerate_configs/cpu_2proc.yaml"
    ensure(not is_one, f"accelerate launch was asked for several processes and started one: {advice}")
    options = {"mixed_precision": recipe.mixed_precision, "gradient_accumulation_steps": recipe.accumulation_steps}
    options |= {"log_with": list(recipe.track) or None, "project_dir": recipe.out}
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated")  # Accelerate has no field for its successor
    # Without views, DDP's buckets would hold a copy of the gradients. Buffers are constants, or statistics of batches.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=recipe.timeout))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[ddp, patience], **options)
    is_whole = accelerator.num_processes == world_size
    ensure(is_whole, f"{world_size} processes were launched that do not know of each other")
    if accelerator.distributed_type == DistributedType.FSDP:
        prepare_sharding(accelerator)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("FSDP was asked for, but Accelerate shards only on several GPUs: use another config")
    return accelerator


def shard_blocks(module: torch.nn.Module, plugin, dtype: torch.dtype | None) -> None:
    """Shards the blocks that FSDP2 gathers one by one; they are gathered in this dtype, to which autocast rounds them.

    Accelerate shards the rest as one group, in float32: in it are the times' embedders, which need that.
    """
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in module.modules():
        if type(block).__name__ in (module._no_split_modules or ()):
            fully_shard(block, mp_policy=policy, reshard_after_forward=plugin.reshard_after_forward)
    plugin.transformer_cls_names_to_wrap = []  # fully_shard has renamed the blocks' classes


def prepare_sharding(accelerator: Accelerator) -> None:
    """For FSDP2. Accelerate would cast every input to bfloat16, including the times t and r, which need float32.

    Autocast does the casting instead.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise ValueError("FSDP must be version 2, without cpu_ram_efficient_loading: see accelerate_configs/fsdp2.yaml")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # a tensor with its tangent is one
    support_fsdp2()
