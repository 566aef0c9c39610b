"""What ends a run before its last step: a signal, a diverging loss, gradients that are not finite.

Each process adds what it saw to a sum over all, which is read one step later, when an accelerator has it at hand: so
all processes decide the same, and none waits.
"""

import math
import signal
import sys
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from meanflow.config import TrainConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED, DIVERGED = 75, 3  # exit codes: start again, it goes on from a checkpoint; do not, before something is changed

ADVICE = "lower --lr, set --max-grad-norm 1 or raise --warmup-steps; the newest checkpoint is of before"


class Stop(NamedTuple):
    code: int  # the program's exit code
    reason: str
    save: bool  # whether this step is worth a checkpoint


class Guard:
    """Watches a run. state: what an earlier part of the run left in its checkpoint."""

    def __init__(self, accelerator: Accelerator, recipe: TrainConfig, state: dict):
        self.accelerator, self.recipe = accelerator, recipe
        self.level = state.get("raw_loss_level")  # running mean of each channel's raw loss
        self.observed = state.get("observed_steps", 0)
        self.skipped, self.in_a_row = state.get("skipped_steps", 0), 0
        self.signal, self.seen, self.before = 0, None, {}

    def __enter__(self) -> "Guard":
        self.before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.signal = number

    @property
    def state(self) -> dict:
        return {"raw_loss_level": self.level, "observed_steps": self.observed, "skipped_steps": self.skipped}

    def observe(self, raw_loss: Tensor, skipped: Tensor) -> None:
        """Notes a step: its raw loss by channel, (C,), and whether its gradient was not finite, so it was skipped."""
        mine = torch.cat([skipped.view(1), torch.full_like(raw_loss[:1], self.signal), raw_loss]).float()
        self.seen = self.accelerator.reduce(mine.unsqueeze(0), "sum")[0] / self.accelerator.num_processes

    def decide(self) -> Stop | None:
        """Whether the step noted last ends the run; it is read once."""
        if self.seen is None:
            return None
        recipe, (skipped, number, *raw_loss) = self.recipe, self.seen.tolist()
        self.seen = None
        if skipped or not math.isfinite(sum(raw_loss)):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            self.say(f"a gradient was not finite: step skipped, the {self.in_a_row}. in a row, {self.skipped} in all")
            if self.in_a_row >= recipe.max_skipped:
                words = f"{self.in_a_row} steps in a row had gradients that are not finite"
                return Stop(DIVERGED, f"{words}: {ADVICE}", False)
        else:
            self.in_a_row = 0
            if (stop := self.diverges(raw_loss)) is not None:
                return stop
        return Stop(STOPPED, "a signal asked to stop", True) if number else None

    def diverges(self, raw_loss: list[float]) -> Stop | None:
        """By the channel that grew most: the whole loss cannot have grown more."""
        recipe, levels = self.recipe, self.level or raw_loss
        times = [now / max(level, 1e-30) for now, level in zip(raw_loss, levels)]
        worst = max(range(len(times)), key=times.__getitem__)
        words = f"raw loss {raw_loss[worst]:.4g} is {times[worst]:.0f} times its running level {levels[worst]:.4g}"
        if len(times) > 1:
            words = f"channel {worst}: {words}"
        if self.observed >= recipe.grace_steps:
            if times[worst] > recipe.halt_at:
                return Stop(DIVERGED, f"{words}: {ADVICE}", False)
            if times[worst] > recipe.warn_at:
                self.say(f"warning: {words}")
        self.level = [0.99 * level + 0.01 * min(now, recipe.warn_at * level) for now, level in zip(raw_loss, levels)]
        self.observed += 1
        return None

    def say(self, words: str) -> None:
        if self.accelerator.is_main_process:
            print(words, file=sys.stderr, flush=True)
