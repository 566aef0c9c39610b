"""By which numbers should the network be told of the interval?"""

from dataclasses import replace

from torch import Tensor, nn

from models.dit import DiT, TimestepEmbedder
from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step, fid_of_one_step
from recipes.experiments.ratio import plain

QUESTION = """By which numbers should the network be told of the interval? The paper (arXiv:2505.13447, table 1c) has
FID 61.06 for (t, t - r), 61.75 for (t, r), 63.98 for (t, r, t - r) and 63.13 for t - r alone."""


class TimesTR(DiT):
    """It is told of t and r."""

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(z, t, t - h, y)


class TimesH(DiT):
    """It is told only of t - r."""

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(z, 0 * t, h, y)


class Sum(nn.Module):
    """The embedding of two times together."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    @property
    def mlp(self) -> nn.Module:
        """By this name the network initialises the weights."""
        return self.first.mlp

    def forward(self, times: tuple[Tensor, Tensor]) -> Tensor:
        return self.first(times[0]) + self.second(times[1])


class TimesTRH(DiT):
    """It is told of t, r and t - r."""

    def reset_parameters(self) -> None:
        self.t_embedder = Sum(self.t_embedder, TimestepEmbedder(self.config.hidden_size))
        super().reset_parameters()
        for layer in (0, 2):
            nn.init.normal_(self.t_embedder.second.mlp[layer].weight, std=0.02)

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor | None = None) -> Tensor:
        return super().forward(z, (t, t - h), h, y)


PUBLISHED = {"(t, t - r)": (None, 61.06), "(t, r)": (TimesTR, 61.75), "(t, r, t - r)": (TimesTRH, 63.98)}
PUBLISHED |= {"t - r": (TimesH, 63.13)}
SIZES = {"DiT-XS/2": (2, 64, 4, 4), "DiT-B/4": (4, 768, 12, 12)}


def arms(recipe) -> dict[str, Arm]:
    sizes = dict(zip(("patch_size", "hidden_size", "depth", "num_heads"), SIZES[recipe.model]))
    return {
        name: Arm(replace(recipe, net=sizes) if kind else recipe, {"net": kind} if kind else {}, fid)
        for name, (kind, fid) in PUBLISHED.items()
    }


def judge(results: Results, metric: str) -> list[Claim]:
    values = {arm: results.mean(arm, metric) for arm in results}
    ratio = max(values.values()) / min(values.values())
    words = f"all four ways work: the worst, {max(values, key=values.get)}, is {ratio:.2f} times the best"
    return [Claim(f"{words}, {min(values, key=values.get)}", ratio < 2)]


TINY = Experiment(QUESTION, arms(digits_with()), energy_of_one_step, lambda results: judge(results, "energy"))
PAPER = Experiment(QUESTION, arms(plain(0.25)), fid_of_one_step, lambda results: judge(results, "fid"))
