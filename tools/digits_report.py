"""Compares what runs on the digits generate with the held-out digits.

    python tools/digits_report.py runs/digits --flow runs/digits-flow
    python tools/digits_report.py runs/digits_unet

Prints a table and writes metrics.json, samples.png and neighbours.png into the run. Copies are the samples that are
nearer to a training digit than 99 % of the held-out digits are.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import tyro

from meanflow.program import read_flags, refusals


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """the MeanFlow run"""
    flow: Path | None = None
    """its flow-matching twin: same network, steps and seed"""


def read_recipe(options: Options) -> dict:
    """The run's recipe.

    Raises:
        ValueError: a run is not finished or not on the digits, or the flow-matching run is no twin of the other.
    """
    from meanflow.config import FREE_ON_RESUME, different, with_defaults
    from meanflow.files import read_json
    from meanflow.publishing.checkpoints import JSON, checkpoints, verify_checkpoint

    recipes = []
    for folder in filter(None, (options.run, options.flow)):
        if not checkpoints(folder):
            raise FileNotFoundError(f"{folder} has no checkpoint: train it first")
        newest = checkpoints(folder)[-1]
        verify_checkpoint(newest, JSON)
        recipe, metadata = with_defaults(read_json(newest / "recipe.json")), read_json(newest / "data.json")
        recipes.append(recipe)
        subset = recipe.get("subset")
        if recipe["data"] != "digits" or subset or not metadata["classes"]:
            settings = f"data {recipe['data']}, subset {subset}, {len(metadata['classes'])} classes"
            raise ValueError(f"{folder} must be a run on all digits and their classes, got {settings}")
        total = recipe["steps"] or math.ceil(recipe["epochs"] * metadata["count"] / recipe["global_batch"])
        if newest.name != f"step-{total:08d}":
            raise ValueError(f"{folder} is at {newest.name} of {total}: finish it first")
    if recipes[0]["objective"]["meanflow_ratio"] == 0:
        raise ValueError(f"{options.run} is flow matching: give a MeanFlow run, and this one as --flow")
    if options.flow and recipes[-1]["objective"]["meanflow_ratio"] != 0:
        raise ValueError(f"{options.flow} is no flow matching: train it with --objective.meanflow-ratio 0")
    diff = different(recipes[0], recipes[-1], FREE_ON_RESUME | {"objective.meanflow_ratio"})
    if diff:
        names = ", ".join(name for name, _, _ in diff)
        raise ValueError(f"{options.flow} is no twin of {options.run}: they differ in {names}")
    return recipes[0]


def report(options: Options) -> None:
    import torch
    from sklearn.svm import SVC

    from meanflow.data.sources import digits
    from meanflow.evaluation.distances import Moments, energy_distance, frechet_distance, nearest
    from meanflow.files import write_json
    from meanflow.noise import noise
    from meanflow.pictures import save_grid
    from meanflow.publishing.checkpoints import checkpoints, load_network, read_sampling
    from meanflow.sampler import average_velocity, euler, guidance_conditions, sample, usual_interval

    recipe = read_recipe(options)
    real, held_out = digits(recipe["resolution"] or 8)

    def pixels(x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) * 8).round().clamp(0, 16).flatten(1)

    target, known = pixels(held_out.x), pixels(real.x)
    classifier = SVC(C=10).fit(known, real.y)
    reach = nearest(target, [known])[0].quantile(0.01)

    def measure(x, y) -> dict[str, float]:
        return {
            "accuracy": float((classifier.predict(x) == y.numpy()).mean()),
            "energy_distance": energy_distance(x, target),
            "frechet_distance": frechet_distance(Moments.of(x), Moments.of(target)),
            "copies": (nearest(x, [known])[0] < reach).double().mean().item(),
        }

    e, y = noise(1, range(len(real.y)), real.x.shape[1:]), real.y

    @torch.no_grad()
    def generate(folder: Path, solver, num_steps: int) -> torch.Tensor:
        net, how = load_network(folder), read_sampling(folder)
        scale = how.get("guidance_scale")
        interval = usual_interval(scale, how.get("guidance_interval"))

        def u_fn(z, t, r):
            told = guidance_conditions(scale, interval, t, is_ode=solver is euler) if how.get("guidance_range") else {}
            return average_velocity(net, z, t, r, {"y": y, **told}, how["prediction"], how["t_min"])

        return solver(u_fn, e, num_steps)

    rows = {"real digits, training to held-out": measure(known, y)}
    of_held_out = measure(target, held_out.y)
    rows["real digits, training to held-out"] |= {name: of_held_out[name] for name in ("accuracy", "copies")}
    for name, folder, settings in (
        ("MeanFlow", options.run, ((sample, 1), (sample, 2), (sample, 4), (euler, 50))),
        ("flow matching", options.flow, ((sample, 1), (euler, 50)) if options.flow else ()),
    ):
        for solver, num_steps in settings:
            x = generate(checkpoints(folder)[-1], solver, num_steps)
            plural, ode = "s" if num_steps > 1 else "", " (Euler)" if solver is euler else ""
            rows[f"{name}, {num_steps} step{plural}{ode}"] = measure(pixels(x), y)
            if folder == options.run and num_steps == 1:
                picture = x

    print(f"\n{'':36}{'class accuracy':>16}{'energy distance':>17}{'Frechet distance':>18}{'copies':>9}")
    for name, row in rows.items():
        distances = f"{row['energy_distance']:17.3f}{row['frechet_distance']:18.1f}"
        print(f"{name:36}{row['accuracy']:16.3f}{distances}{row['copies']:9.1%}")
    write_json(options.run / "metrics.json", rows)
    first = [(y == label).nonzero()[:8, 0] for label in range(10)]
    save_grid(picture[torch.stack(first, dim=1).flatten()], options.run / "samples.png", columns=10)
    shown = picture[torch.stack(first, dim=1)[:2].flatten()]
    beside = real.x[nearest(pixels(shown), [known])[1]]
    rows_shown = [rows for pair in zip(shown.split(10), beside.split(10)) for rows in pair]
    save_grid(torch.cat(rows_shown), options.run / "neighbours.png", columns=10)
    print(f"\n{options.run / 'neighbours.png'}: samples, and under each the training digit that is nearest")
    print(f"{options.run / 'samples.png'}: one-step samples, a column per class; {options.run / 'metrics.json'}")


if __name__ == "__main__":
    with refusals():
        report(read_flags(Options))
