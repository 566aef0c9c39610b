"""What ends a run early, on curves of raw losses; test_resume.py and test_distributed.py have whole runs."""

import math

import pytest
import torch
from accelerate import Accelerator

from meanflow.config import TrainConfig
from meanflow.training.guard import DIVERGED, Guard, Stop

RECIPE = TrainConfig(steps=1)


def watch(curve, state: dict, recipe: TrainConfig = RECIPE) -> tuple[int, Stop | None, dict]:
    """Shows the guard a curve of raw losses, (C,) a step: the step at which it halts, why, and its state then."""
    guard = Guard(Accelerator(cpu=True), recipe, state)
    for step, raw_loss in enumerate(curve):
        guard.observe(torch.tensor(raw_loss), torch.tensor(False))
        if stop := guard.decide():
            return step, stop, guard.state
    return len(curve), None, guard.state


def lost_run() -> list[tuple[float, ...]]:
    """The raw loss of a run that was lost, by channel: channel 0 grows steadily, the others do not."""
    knots = [(24, 274.0), (99, 553.0), (124, 4034.0), (199, 367835.0), (224, 2177681.0)]  # epochs of 30 steps
    curve = []
    for step in range(30 * 224):
        epoch = step / 30
        after = next(number for number, (end, _) in enumerate(knots) if epoch < end)
        (begin, low), (end, high) = knots[max(after - 1, 0)], knots[after]
        done = (epoch - begin) / (end - begin) if after else 0
        curve.append((math.exp((1 - done) * math.log(low) + done * math.log(high)), 160.0, 45.0, 44.0))
    return curve


def test_a_run_that_grows_steadily_is_warned_of_and_halted(capfd):
    """It is never 10 times its running level. It halts before its raw loss is 200 times the first level."""
    curve = lost_run()
    step, stop, _ = watch(curve, {})
    warning = capfd.readouterr().err
    assert (
        warning.count("warning: channel 0: running level of the raw loss ") == 1 and "times its lowest 274" in warning
    )
    assert stop.code == DIVERGED and not stop.save
    assert stop.reason.startswith("channel 0: running level of the raw loss") and "lower --lr" in stop.reason
    print(step, curve[step][0] / curve[0][0])
    assert 100 < curve[step][0] / curve[0][0] < 200
    assert not any(now[0] > 10 * before[0] for before, now in zip(curve, curve[100:]))


def test_the_lowest_level_is_kept_in_the_checkpoint_and_may_be_absent():
    """A run that is stopped and resumed halts at the same step; one of version 0.1 starts to watch anew."""
    curve = lost_run()
    step, _, _ = watch(curve, {})
    _, stop, state = watch(curve[: step - 500], {})
    assert stop is None and state["lowest_level"][0] == pytest.approx(274, rel=1e-3)
    assert watch(curve[step - 500 :], state)[0] == 500
    old = {name: value for name, value in state.items() if name != "lowest_level"}
    assert watch(curve[step - 500 :], old)[0] > 500


def test_a_jump_halts_at_once_and_a_run_that_falls_goes_on():
    falling = [(1000 * 0.99**step + 1,) for step in range(2000)]
    assert watch(falling, {})[1] is None
    step, stop, _ = watch([*falling[:500], (1e5,)], {})
    assert step == 500 and "times its running level" in stop.reason


def test_nothing_halts_before_grace_steps():
    assert watch([(1.0,)] * 199 + [(1e9,)], {})[1] is None
    assert watch([(1.0,)] * 200 + [(1e9,)], {})[1] is not None
