"""Pictures of a run: sample grids and loss curves."""

import os
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

from meanflow.files import replacing


def save_grid(x: torch.Tensor, path: Path, columns: int) -> None:
    """Writes pixels in [-1, 1], (B, C, H, W), as a PNG grid; small ones are enlarged, to sides of 32 or more."""
    x = x.detach().float().cpu().clamp(-1, 1)
    enlarge = -(-32 // min(x.shape[2:]))
    x = x.repeat_interleave(enlarge, dim=-1).repeat_interleave(enlarge, dim=-2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_image(make_grid(x / 2 + 0.5, nrow=columns, pad_value=0.5), temporary)


def middle_slices(x: torch.Tensor) -> torch.Tensor:
    """Volumes (B, C, D, H, W) as pictures in [-1, 1], (B, 1, H, C * W): each channel's middle slice, side by side.

    A channel's darkest and brightest voxels in the slices of all are black and white.
    """
    x = x[:, :, x.shape[2] // 2]  # (B, C, H, W)
    low, high = (edge(x.transpose(0, 1).flatten(1), dim=1).view(-1, 1, 1) for edge in (torch.amin, torch.amax))
    x = 2 * (x - low) / (high - low).clamp(min=1e-12) - 1
    return x.transpose(1, 2).flatten(2).unsqueeze(1)


def save_curves(log: list[dict], path: Path) -> None:
    """Draws the raw losses of log.jsonl over the steps, logarithmically; the loss, if there are no raw losses.

    What evaluations measured is drawn with an axis of its own, on the right.
    """
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
    from matplotlib import figure, ticker

    curves, unit = {"raw_loss": "all", "raw_loss_flow": "r = t", "raw_loss_meanflow": "r ≠ t"}, "raw loss"
    if not any("raw_loss" in line for line in log):
        curves, unit = {"loss": "all"}, "loss"
    picture = figure.Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for name, label in curves.items():
        points = [(line["step"], line[name]) for line in log if name in line]
        axes.plot(*zip(*points), label=label, linewidth=2 if label == "all" else 1)
    axes.set(xlabel="step", ylabel=unit)
    # Numbers such as 200k and 0.05, also where the curve stays within one power of ten.
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3, which="both")
    scores = sorted({name for line in log for name in line if name.startswith("eval_")})
    if scores:
        right = axes.twinx()
        for number, name in enumerate(scores):
            points = [(line["step"], line[name]) for line in log if name in line]
            right.plot(*zip(*points), "o--", color=f"C{3 + number}", label=name.removeprefix("eval_"), markersize=4)
        right.set(ylabel="evaluation: lower is better")
        right.legend(loc="lower left")
    for scale in picture.axes:
        scale.set_yscale("log")
        scale.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        scale.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        scale.yaxis.set_minor_formatter(ticker.NullFormatter())
    with replacing(path) as temporary:
        picture.savefig(temporary, dpi=120)
