"""How does improved MeanFlow compare with MeanFlow on the same small budget?"""

from dataclasses import replace
from pathlib import Path

from recipes.digits_cfg import RECIPE
from recipes.experiments.base import (
    DIGITS,
    Arm,
    Claim,
    Experiment,
    Results,
    digits_with,
    draw,
    energy_to_held_out,
    fid_of_one_step,
)
from recipes.experiments.guidance import classifier
from recipes.imagenet_imf_b import RECIPE as IMF_B
from recipes.imagenet_imf_l import RECIPE as IMF_L
from recipes.imagenet_imf_m import RECIPE as IMF_M
from recipes.imagenet_imf_xl import RECIPE as IMF_XL

QUESTION = """How does improved MeanFlow (arXiv:2512.02012) compare with MeanFlow on the same small budget? On ImageNet
its FID at one step is 3.39, 2.27, 1.86 and 1.72 for the sizes B, M, L and XL, and 3.43 for MeanFlow's XL. Here all arms
have equal steps, batches and rates, and about as many parameters. Networks that are told the CFG scale are told 1."""


def measure(run: Path, arm: Arm, reference: str | None) -> dict[str, float]:
    x, y = draw(run, scale=1.0)
    accuracy = float((classifier().predict((x + 1) * 8) == y.numpy()).mean())
    return {"energy": energy_to_held_out(x), "accuracy": accuracy}


def judge(results: Results) -> list[Claim]:
    """There is no figure to reach: it is reported as it comes out."""
    names = ", ".join(f"{arm} {results.mean(arm, 'energy'):.3f}" for arm in results)
    return [Claim(f"energy distances of one step: {names}", True)]


def judge_paper(results: Results) -> list[Claim]:
    found = {arm: results.mean(arm, "fid") for arm in results}
    published = {name: arm.paper for name, arm in PUBLISHED.items()}
    return [
        Claim(f"{arm}: FID {fid:.2f}, published {published[arm]}", fid < 1.1 * published[arm])
        for arm, fid in found.items()
    ]


# More scales near 1, since that is the one to be judged.
STEPS = replace(
    RECIPE,
    objective=replace(RECIPE.objective, omega_beta=3.0),
    steps=DIGITS.steps,
    log_every=50,
    checkpoint_every=300,
    sample_every=100_000,
)
ARMS = {
    "MeanFlow, DiT": Arm(digits_with()),
    "improved, DiT": Arm(STEPS),
    "improved, iMF": Arm(
        replace(STEPS, model="iMF-B/2", net={"depth": 4, "hidden_size": 64, "num_heads": 4, "aux_head_depth": 2})
    ),
}
PUBLISHED = {
    "B": Arm(IMF_B, paper=3.39),
    "M": Arm(IMF_M, paper=2.27),
    "L": Arm(IMF_L, paper=1.86),
    "XL": Arm(IMF_XL, paper=1.72),
}

TINY = Experiment(QUESTION, ARMS, measure, judge, seeds=3)
PAPER = Experiment(QUESTION, PUBLISHED, fid_of_one_step, judge_paper)
