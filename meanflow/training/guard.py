"""What ends a run before its last step: a signal, a diverging loss, gradients that are not finite.

Each process adds what it saw to a sum over all processes. The sum is read one step later, when an accelerator has it at
hand. So all processes decide the same, and none waits.
"""

import math
import signal
import sys
from typing import NamedTuple

import torch

# Windows has no SIGUSR1.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
# Exit codes. STOPPED: the same command goes on from a checkpoint. DIVERGED: something has to be changed first. FAILED:
# something has to be mended first. meanflow/program.py has that of a refusal.
STOPPED, DIVERGED, FAILED = 75, 3, 1

ADVICE = "lower --lr, set --max-grad-norm 1 or raise --warmup-steps; the newest checkpoint is from before"


class Stop(NamedTuple):
    code: int  # the program's exit code
    reason: str
    save: bool  # whether this step is worth a checkpoint


class HostCopy:
    """A tensor on its way to the CPU. Who reads it a step later does not wait for the step that is running then."""

    def __init__(self, tensor: torch.Tensor):
        self.copy, self.arrived = tensor, None
        if tensor.is_cuda:
            self.copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.current_stream().record_event()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.tolist()


class Guard:
    """Watches a run.

    The raw loss of each channel is compared with its running level, and this level with the lowest that it has been
    since grace_steps: a loss that grows slowly is never far above its running level.

    Args:
        state: what an earlier part of the run left in its step.json.
    """

    def __init__(self, accelerator, recipe, state: dict):
        self.accelerator, self.recipe = accelerator, recipe
        self.level = state.get("raw_loss_level")  # running mean of each channel's raw loss
        self.lowest = state.get("lowest_level")  # the lowest that it has been since grace_steps
        self.observed = state.get("observed_steps", 0)
        self.skipped, self.in_a_row = state.get("skipped_steps", 0), 0
        self.signal, self.seen, self.handlers_before = 0, None, {}
        self.is_data_unreadable = False  # of a later step, on this process
        self.warned_of_growth = False

    def __enter__(self) -> "Guard":
        handlers = dict.fromkeys(SIGNALS, self.receive)
        if hasattr(signal, "SIGCHLD"):  # torch would raise amid a step when a loading process dies; the loader finds it
            handlers[signal.SIGCHLD] = signal.SIG_DFL
        self.handlers_before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.signal = number

    @property
    def state(self) -> dict:
        levels = {"raw_loss_level": self.level, "lowest_level": self.lowest}
        return {**levels, "observed_steps": self.observed, "skipped_steps": self.skipped}

    def observe(self, raw_loss: torch.Tensor, skipped: torch.Tensor) -> None:
        """Notes a step.

        Args:
            raw_loss: of each channel, (C,).
            skipped: whether the gradient was not finite, so that the step was skipped; a scalar.
        """
        flags = [torch.full_like(raw_loss[:1], flag) for flag in (self.signal, self.is_data_unreadable)]
        mine = torch.cat([skipped.view(1), *flags, raw_loss]).float()
        self.seen = HostCopy(self.accelerator.reduce(mine.unsqueeze(0), "sum")[0] / self.accelerator.num_processes)

    def decide(self) -> Stop | None:
        """Whether the step that was noted last ends the run; it is read once."""
        if self.seen is None:
            return None
        skipped, number, unreadable, *raw_loss = self.seen.read()
        self.seen = None
        is_finite = not skipped and math.isfinite(sum(raw_loss))
        stop = self.watch(raw_loss) if is_finite else self.count_skipped()
        if stop is None and unreadable:
            return Stop(FAILED, "the data of the next step cannot be read", True)
        if stop is None and number:
            return Stop(STOPPED, "a signal asked to stop", True)
        return stop

    def count_skipped(self) -> Stop | None:
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        words = f"step skipped, {self.in_a_row} in a row, {self.skipped} in all"
        self.accelerator.print(f"a gradient was not finite: {words}", file=sys.stderr)
        if self.in_a_row < self.recipe.max_skipped:
            return None
        return Stop(DIVERGED, f"{self.in_a_row} steps in a row had gradients that are not finite: {ADVICE}", False)

    def watch(self, raw_loss: list[float]) -> Stop | None:
        """Compares each channel's raw loss with its running level, and this level with the lowest; updates both."""
        recipe, level = self.recipe, self.level or raw_loss
        self.in_a_row = 0
        is_watching = self.observed >= recipe.grace_steps
        self.observed += 1
        jump, words = largest_ratio("raw loss", raw_loss, "its running level", level)
        if is_watching and jump > recipe.halt_at:
            return Stop(DIVERGED, f"{words}: {ADVICE}", False)
        if is_watching and jump > recipe.warn_at:
            self.accelerator.print(f"warning: {words}", file=sys.stderr)
        self.level = [0.99 * old + 0.01 * min(new, recipe.warn_at * old) for new, old in zip(raw_loss, level)]
        if not is_watching:
            return None

        self.lowest = [min(pair) for pair in zip(self.level, self.lowest or self.level)]
        growth, words = largest_ratio("running level of the raw loss", self.level, "its lowest", self.lowest)
        if growth > recipe.halt_at:
            return Stop(DIVERGED, f"{words}: {ADVICE}", False)
        if growth > recipe.warn_at and not self.warned_of_growth:  # a level that is high stays so for many steps
            self.accelerator.print(f"warning: {words}", file=sys.stderr)
        self.warned_of_growth = growth > recipe.warn_at
        return None


def largest_ratio(name: str, values: list[float], other: str, references: list[float]) -> tuple[float, str]:
    """The largest value over its reference of all channels, and the same in words. The sum cannot have grown more."""
    ratios = [value / max(reference, 1e-30) for value, reference in zip(values, references)]
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    words = f"{name} {values[worst]:.4g} is {ratios[worst]:.0f} times {other} {references[worst]:.4g}"
    return ratios[worst], f"channel {worst}: {words}" if len(ratios) > 1 else words
