"""Which tangent makes du/dt the derivative along the path?"""

from meanflow.objectives.meanflow import MeanFlow
from recipes.experiments.base import Arm, Experiment, digits_with, energy_of_one_step, fid_of_one_step, smallest
from recipes.experiments.ratio import plain

QUESTION = """Which tangent makes du/dt the derivative along the path? By eq. (8) it is (v, 0, 1) for (z, r, t). The
paper (arXiv:2505.13447, table 1b) has FID 61.06 for it, 268.06 for (v, 0, 0), 329.22 for (v, 1, 0) and 137.96 for
(v, 1, 1)."""


class Tangent(MeanFlow):
    """The objective with another tangent of the times."""

    dr, dt = 0.0, 1.0

    def jvp(self, u_fn, primals: tuple, tangents: tuple):
        v, one, _ = tangents
        return super().jvp(u_fn, primals, (v, self.dt * one, self.dr * one))


class NoTime(Tangent):
    dr, dt = 0.0, 0.0


class OnlyR(Tangent):
    dr, dt = 1.0, 0.0


class Both(Tangent):
    dr, dt = 1.0, 1.0


PUBLISHED = {"(v, 0, 1)": (None, 61.06), "(v, 0, 0)": (NoTime, 268.06), "(v, 1, 0)": (OnlyR, 329.22)}
PUBLISHED |= {"(v, 1, 1)": (Both, 137.96)}


def arms(recipe) -> dict[str, Arm]:
    return {name: Arm(recipe, {"objective": kind} if kind else {}, fid) for name, (kind, fid) in PUBLISHED.items()}


TINY = Experiment(QUESTION, arms(digits_with()), energy_of_one_step, smallest("energy", "(v, 0, 1)"), seeds=3)
PAPER = Experiment(QUESTION, arms(plain(0.25)), fid_of_one_step, smallest("fid", "(v, 0, 1)"))
