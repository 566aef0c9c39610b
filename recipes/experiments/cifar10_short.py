"""What do short runs look like, beside flow matching of the same length?"""

from dataclasses import replace

from recipes.cifar10_unet import RECIPE
from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step, fid_of_one_step

QUESTION = """What do short runs look like: 5, 20 and 100 epochs, with 25 % of r != t samples and without, with a
warm-up and an average that fit the length? No paper has such figures. At this scale: the digits at 16 x 16, by a
U-Net."""

EPOCHS = (5, 20, 100)


def fitting(recipe, epochs: int, samples: int, ratio: float):
    """The recipe for so many epochs: a tenth of the steps for the warm-up, an average over a twentieth."""
    steps = epochs * samples // recipe.global_batch
    decay = round(1 - 20 / max(steps, 40), 5)
    objective = replace(recipe.objective, meanflow_ratio=ratio)
    own = {"steps": steps, "epochs": None, "warmup_steps": steps // 10, "ema_decay": (decay,), "objective": objective}
    return replace(recipe, **own, checkpoint_every=max(1, steps // 2))


def judge(results: Results, metric: str) -> list[Claim]:
    claims = []
    for epochs in EPOCHS:
        flow, mean = (results.mean(f"{epochs} epochs, ratio {ratio}", metric) for ratio in ("0", "0.25"))
        words = f"{epochs} epochs: one step of MeanFlow is nearer than one of flow matching"
        claims.append(Claim(f"{words}: {mean:.4g} against {flow:.4g}", mean < flow))
    longest, shortest = (results.mean(f"{epochs} epochs, ratio 0.25", metric) for epochs in (100, 5))
    claims.append(
        Claim(f"longer is better: {shortest:.4g} after 5 epochs, {longest:.4g} after 100", longest < shortest)
    )
    return claims


def arms(recipe, samples: int) -> dict[str, Arm]:
    return {
        f"{epochs} epochs, ratio {ratio:g}": Arm(fitting(recipe, epochs, samples, ratio))
        for epochs in EPOCHS
        for ratio in (0.0, 0.25)
    }


U_NET = {"model": "UNet-digits", "net": {"block_out_channels": (16, 32)}, "resolution": 16, "lr": 3e-3}
TINY = Experiment(
    QUESTION, arms(replace(digits_with(), **U_NET), 1347), energy_of_one_step, lambda results: judge(results, "energy")
)
PAPER = Experiment(QUESTION, arms(RECIPE, 50_000), fid_of_one_step, lambda results: judge(results, "fid"))
