"""Compares a network of recipes/toy2d.py with what is known exactly, and draws it.

    python tools/toy2d_report.py runs/toy2d

For the ring the velocity has a closed form, so that the true average velocity is known, too. Prints the energy distance
of one-step samples to the data, as a multiple of that of two sets of data, and the error of u for several (t, r).

Writes
toy2d.png and particles.gif into the run: particles from noise to data, in one step beside fifty.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from meanflow.program import read_flags, refusals

ROOT = Path(__file__).parents[1]
COUNT = 2000  # points of each set
SETS = 8  # of data, over which distances are averaged
PAIRS = [(1.0, 0.0), (1.0, 0.5), (0.7, 0.3), (0.5, 0.0), (0.5, 0.5)]  # (t, r)
EDGE = 2.0  # of the part of the plane that is looked at


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    """a run of recipes/toy2d.py"""
    seed: int = 0
    """of the noise and of the data that are compared"""


def exact_velocity(z, t, centres, std: float):
    """v(z, t) = E[e - x | z_t = z] for data of Gaussians of equal weight, (B, 2) float64.

    Given the Gaussian, z_t is normal with mean (1 - t) m and variance (1 - t)^2 std^2 + t^2, and the expectations of x
    and e are linear in z.

    Args:
        z: (B, 2); t: (B,) in (0, 1]; centres: (K, 2).
    """
    t = t.view(-1, 1, 1)
    variance = (1 - t) ** 2 * std**2 + t**2
    offset = z.unsqueeze(1) - (1 - t) * centres  # (B, K, 2)
    share = (-offset.square().sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
    x = centres + (1 - t) * std**2 / variance * offset
    e = t / variance * offset
    return (share * (e - x)).sum(dim=1)


def exact_average_velocity(z, t: float, r: float, centres, std: float, steps: int = 400):
    """u(z, t, r), (B, 2): where the exact flow takes z from t to r, by the classical Runge-Kutta method."""
    import torch

    from meanflow.sampler import rk4

    def v(z, t, _):
        return exact_velocity(z, t, centres, std)

    if t == r:
        return v(z, torch.full(z.shape[:1], t, dtype=z.dtype), None)
    # The sampler goes from 1 to 0: of a time s it sees t - (1 - s) (t - r), at which z moves (t - r) as fast.
    end = rk4(lambda z, s, _: (t - r) * v(z, t - (1 - s) * (t - r), None), z, steps)
    return (z - end) / (t - r)


def plane(side: int):
    """Points of the plane, (side^2, 2) float64."""
    import torch

    axis = torch.linspace(-EDGE, EDGE, side, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)


def scatter(axes, points, title: str) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0)
    axes.set(title=title, xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])


def draw(path: Path, sets: dict, errors: dict, side: int) -> None:
    """The points above, and below the error of u over the plane for each (t, r)."""
    from matplotlib import figure

    from meanflow.files import replacing

    columns = max(len(sets), len(errors))
    picture = figure.Figure(figsize=(3 * columns, 6.4 if errors else 3.3), layout="constrained")
    axes = picture.subplots(2 if errors else 1, columns, squeeze=False)
    for axis, (name, points) in zip(axes[0], sets.items()):
        scatter(axis, points, name)
    for axis in [*axes[0][len(sets) :], *(axes[1][len(errors) :] if errors else [])]:
        axis.axis("off")
    for axis, ((t, r), error) in zip(axes[-1], errors.items()):
        shown = axis.imshow(error.view(side, side), origin="lower", extent=(-EDGE, EDGE) * 2, vmin=0, vmax=0.5)
        axis.set(title=f"|u - true u|, t = {t:g}, r = {r:g}", xticks=[], yticks=[])
    if errors:
        picture.colorbar(shown, ax=axes[1], shrink=0.8)
    with replacing(path) as temporary:
        picture.savefig(temporary, dpi=80)


def animate(path: Path, ways: dict, frames: int = 40) -> None:
    """Particles on their way from noise to data.

    Args:
        ways: the points at times that are evenly spread, (frames, N, 2), by the title.
    """
    from matplotlib import figure
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from meanflow.files import replacing

    picture = figure.Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots(1, len(ways))

    def show(frame: int) -> list:
        for axis, (title, points) in zip(axes, ways.items()):
            axis.clear()
            scatter(axis, points[min(frame, frames - 1)], title)
        return []

    with replacing(path) as temporary:
        FuncAnimation(picture, show, frames + 10).save(temporary, PillowWriter(fps=15), dpi=60)


def report(options: Options) -> None:
    import os

    os.environ["MPLBACKEND"] = "agg"
    import torch

    from meanflow.evaluation.distances import energy_distance
    from meanflow.files import ensure, read_json, write_json
    from meanflow.noise import noise
    from meanflow.publishing.checkpoints import find_checkpoint, load_network
    from meanflow.sampler import average_velocity, euler, sample

    sys.path.insert(0, str(ROOT))
    from recipes.experiments.plane import CENTRES, POINTS, STD

    checkpoint = find_checkpoint(options.run.expanduser())
    data = read_json(checkpoint / "recipe.json")["data"]
    ensure(data in POINTS, f"{options.run} must be a run of recipes/toy2d.py, and has data {data}")
    net, points, centres = load_network(checkpoint), POINTS[data], CENTRES.double()

    @torch.no_grad()
    def u(z, t, r):
        return average_velocity(net, z, t, r, {})

    e = noise(options.seed, range(COUNT), (2, 1, 1))
    one, fifty = (solver(u, e, steps).view(-1, 2) for solver, steps in ((sample, 1), (euler, 50)))
    real, *others = (points(COUNT, seed) for seed in range(options.seed + 1, options.seed + 2 + SETS))
    other = others[0]

    def distance(x) -> float:
        """The mean over several sets of data, since that of two sets of data varies by its half."""
        return sum(energy_distance(x, each) for each in others) / SETS

    pairs = zip([real, *others], others)
    distances = {"two sets of data": sum(energy_distance(*pair) for pair in pairs) / SETS}
    distances |= {"one step": distance(one), "50 Euler steps": distance(fifty)}
    ratio = distances["one step"] / distances["two sets of data"]
    for name, value in distances.items():
        print(f"energy distance to the data, {name}: {value:.5f}")
    print(f"one step is {ratio:.2f} times as far from the data as other data are")
    errors, side = {}, 41
    for t, r in PAIRS if data == "ring" else []:
        grid = plane(side)
        true = exact_average_velocity(grid, t, r, centres, STD)
        with torch.no_grad():
            learned = u(grid.float().view(-1, 2, 1, 1), *(torch.full((len(grid),), time) for time in (t, r))).view(
                -1, 2
            )
        errors[t, r] = (learned - true).norm(dim=1)
        # Where samples are: z_t of data and noise.
        z_t = (1 - t) * real.double() + t * noise(options.seed + 3, range(COUNT), (2,)).double()
        true = exact_average_velocity(z_t, t, r, centres, STD)
        with torch.no_grad():
            learned = u(z_t.float().view(-1, 2, 1, 1), *(torch.full((COUNT,), time) for time in (t, r))).view(-1, 2)
        relative = (learned - true).norm() / true.norm()
        print(f"relative error of u where samples are, t = {t:g}, r = {r:g}: {relative:.3f}")
        distances[f"error of u, t = {t:g}, r = {r:g}"] = float(relative)
    write_json(options.run / "toy2d.json", {**distances, "ratio": ratio})
    draw(options.run / "toy2d.png", {"data": other, "one step": one, "50 Euler steps": fifty}, errors, side)
    start, end, frames = e.view(-1, 2), one, 40
    straight = [start + (end - start) * frame / (frames - 1) for frame in range(frames)]
    path, z = [start], e
    for step in range(50):
        t = torch.full((COUNT,), 1 - step / 50)
        z = z - u(z, t, t) / 50
        path.append(z.view(-1, 2))
    curved = [path[round(frame * 50 / (frames - 1))] for frame in range(frames)]
    animate(options.run / "particles.gif", {"one step": straight, "50 Euler steps": curved}, frames)
    print(f"{options.run}: toy2d.png, particles.gif, toy2d.json")


if __name__ == "__main__":
    with refusals():
        report(read_flags(Options))
