"""What does the derivative cost?"""

from functools import cache
from pathlib import Path

from recipes.experiments.base import Arm, Claim, Experiment, Results

QUESTION = """What does the derivative cost, as a multiple of a flow-matching step of the same network? With F one
forward, a flow-matching sample costs 3 F and a MeanFlow sample at least 4 F. One user's log has 15 times the time at
a ratio of 75 %, with a compile that broke, and 40 GB that were not enough. Times are the best of interleaved repeats
of one run."""

RATIOS = (0.25, 0.75)


@cache
def costs() -> list[dict]:
    from benchmarks.options import Step
    from benchmarks.step import step

    return step(Step(hidden_size=192, depth=4, num_heads=3, batch=32, ratio=RATIOS, usual=False, runs=1, repeats=7))


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    own = {row["mode"]: row for row in costs() if row["way"] == f"this project, share {arm.parts['ratio']:g}"}
    numbers = {name: own["eager"][f"{key}_ratio"] for name, key in {"FLOPs": "flops", "bytes kept": "bytes"}.items()}
    return numbers | {f"time, {mode}": own[mode]["seconds_ratio"] for mode in ("eager", "compiled")}


def judge(results: Results) -> list[Claim]:
    claims = []
    for ratio in RATIOS:
        name = f"{ratio:g}"
        flops, kept = (results.mean(name, metric) for metric in ("FLOPs", "bytes kept"))
        floor = 1 + ratio / 3
        claims.append(
            Claim(f"ratio {name}: {flops:.3f} times the FLOPs, the floor is {floor:.3f}", flops < floor + 0.02)
        )
        claims.append(Claim(f"ratio {name}: {kept:.3f} times the bytes kept for the backward", kept < 1.05))
    return claims


TINY = Experiment(QUESTION, {f"{ratio:g}": Arm(None, {"ratio": ratio}) for ratio in RATIOS}, measure, judge)
PAPER = None
