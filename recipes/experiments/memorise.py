"""Can the networks memorise pairs of noise and image? Whoever writes an objective looks at this first."""

from dataclasses import replace
from pathlib import Path

from meanflow.objectives.draws import sample_times
from meanflow.objectives.meanflow import MeanFlow
from recipes.experiments.base import DIGITS, Arm, Claim, Experiment, Results

QUESTION = """Can a network memorise fixed pairs of noise and image? Of each pair the velocity is known, and so the
squared error can go to 0. The numbers are mean squared errors of one pixel: of the training target at the last
steps, of the velocity u(z, t, t) and of the image that one step makes. No paper has such figures."""

DIT = {"model": "DiT-XS/4", "steps": 1300, "lr": 5e-3}
UNET = {"model": "UNet-digits", "net": {"block_out_channels": (16, 32)}, "steps": 700, "lr": 5e-3}
PIXELS = 64


class FixedTimes(MeanFlow):
    """The times, too, belong to the pair: two numbers of its noise decide them."""

    def forward(self, batch, step: int = 0):
        draws = batch.draws
        interval = draws.r < draws.t
        t, r = sample_times(self.config, draws.e.flatten(1)[:, :2].double(), interval)
        return super().forward(batch._replace(draws=replace(draws, t=t.float(), r=r.float())), step)


def pairs(kind: dict, ratio: float, norm_p: float, subset: tuple[int, int] = (4, 10)):
    """The recipe of a network on these classes and images of each, three draws of a pair in each step."""
    objective = replace(DIGITS.objective, meanflow_ratio=ratio, norm_p=norm_p)
    batch = 120 if subset[0] * subset[1] == 40 else 64
    steps = kind["steps"] if subset[0] * subset[1] == 40 else kind["steps"] // 2
    own = {"subset": subset, "fixed_noise": True, "global_batch": batch, "objective": objective}
    return replace(DIGITS, **{**kind, **own, "steps": steps, "checkpoint_every": 650, "log_every": 25})


def memorised(run: Path):
    """The network of a finished run, its images, its noise and its classes."""
    from meanflow.config import TrainConfig
    from meanflow.data.sources import load_data
    from meanflow.files import read_json
    from meanflow.noise import noise
    from meanflow.publishing.checkpoints import find_checkpoint, load_network

    fields = read_json(find_checkpoint(run) / "recipe.json")
    data = load_data(TrainConfig(steps=1, data="digits", subset=tuple(fields["subset"])))
    net = load_network(find_checkpoint(run))
    return net, data.x, noise(fields["seed"], range(len(data)), data.shape), {"y": data.y}


def error_to_pairs(run: Path, solver: str, steps: int) -> float:
    """The mean squared error of a pixel between what a solver makes of each noise and its image."""
    import torch

    from meanflow.publishing.checkpoints import find_checkpoint, read_sampling
    from meanflow.sampler import SOLVERS, average_velocity

    net, x, e, cond = memorised(run)
    if read_sampling(find_checkpoint(run))["solver"] == "euler" and solver == "meanflow":
        solver = "euler"  # a network of flow matching has never seen r != t: its one step is Euler's
    with torch.no_grad():
        made = SOLVERS[solver](lambda z, t, r: average_velocity(net, z, t, r, cond), e, steps)
    return float((made - x).square().mean())


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    import torch

    from meanflow.training.log import read_log

    log = read_log(run / "log.jsonl")
    net, x, e, cond = memorised(run)
    t, zero = torch.full((len(x),), 0.5), torch.zeros(len(x))
    with torch.no_grad():
        v = net((x + e) / 2, t, zero, **cond)
    return {
        "target": log[-1]["raw_loss"] / PIXELS,
        "velocity": float((v - (e - x)).square().mean()),
        "one step": error_to_pairs(run, "meanflow", 1),
        "target at first": log[0]["raw_loss"] / PIXELS,
        "size of v": float(v.norm() / (e - x).norm()),
    }


def judge(results: Results) -> list[Claim]:
    claims = []
    for arm in results:
        first, last = results.mean(arm, "target at first"), results.mean(arm, "target")
        size = results.mean(arm, "size of v")
        if "ratio 0," in arm:
            claims.append(Claim(f"{arm}: {last:.2g} a pixel, to be below 1e-4", last < 1e-4))
        else:
            claims.append(Claim(f"{arm}: falls from {first:.2g} to {last:.2g}", last < first))
        claims.append(Claim(f"{arm}: no collapse to zero velocity, its size is {size:.2f} of the true one", size > 0.5))
    for kind in ("DiT", "U-Net"):
        plain, weighted = (results.mean(f"{kind}, 40 pairs, ratio 0, p {p}", "target") for p in (0, 1))
        words = f"{kind}: {plain:.2g} without the weight and {weighted:.2g} with it differ by less than 1e-4"
        claims.append(Claim(words, abs(plain - weighted) < 1e-4))
    return claims


def arms() -> dict[str, Arm]:
    found = {}
    for name, kind in {"DiT": DIT, "U-Net": UNET}.items():
        for ratio, p in [(0, 0), (0, 1), (0.25, 0), (0.25, 1), (1, 1)]:
            found[f"{name}, 40 pairs, ratio {ratio}, p {p}"] = Arm(pairs(kind, float(ratio), float(p)))
        for p in (0, 1):
            fixed = Arm(pairs(kind, 0.0, float(p)), {"objective": FixedTimes})
            found[f"{name}, 40 pairs, ratio 0, p {p}, times fixed"] = fixed
        found[f"{name}, 1 pair, ratio 0, p 0"] = Arm(pairs(kind, 0.0, 0.0, (1, 1)))
        found[f"{name}, 4 pairs, ratio 0, p 0"] = Arm(pairs(kind, 0.0, 0.0, (4, 1)))
    return found


TINY = Experiment(QUESTION, arms(), measure, judge)
PAPER = None
