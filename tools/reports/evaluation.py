"""What tools/evaluate.py prints, draws and writes of its reports."""

import csv
from pathlib import Path


def flat(report: dict) -> dict[str, float]:
    """The metrics of a report by name; of several references each name has its own."""
    names = [part["reference"] for part in report["references"]]
    short = [Path(name).name for name in names]
    suffixes = [""] if len(names) == 1 else [f" {name}" for name in (short if len({*short}) == len(names) else names)]
    parts = zip(report["references"], suffixes)
    return {f"{metric}{suffix}": value for part, suffix in parts for metric, value in part["metrics"].items()}


def show(reports: list[dict]) -> None:
    names = list(flat(reports[0]))
    widths = [max(11, len(name) + 2) for name in names]
    heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths))
    print(f"\n{'solver':10}{'steps':>6}{'evaluations':>13}{'cfg scale':>11}{heads}")
    for report in reports:
        scale = "" if report["cfg_scale"] is None else f"{report['cfg_scale']:g}"
        values = "".join(f"{value:>{width}.4g}" for value, width in zip(flat(report).values(), widths))
        print(f"{report['solver']:10}{report['num_steps']:6}{report['evaluations']:13}{scale:>11}{values}")


def verdict(reports: list[dict]) -> str:
    """Whether one step is within 20 % of the best, by the first metric."""
    from meanflow.evaluation.evaluate import METRICS

    name = next(iter(flat(reports[0])))
    metric = METRICS.get(name.split()[0], METRICS["prc"])
    values = [flat(report)[name] for report in reports]
    best = max(values) if metric.is_higher_better else min(values)
    winner = reports[values.index(best)]
    ones = [v for report, v in zip(reports, values) if (report["solver"], report["num_steps"]) == ("meanflow", 1)]
    words = f"best {name}: {best:.4g}, {winner['solver']} with {winner['evaluations']} evaluations"
    if not ones:
        return words
    one = max(ones) if metric.is_higher_better else min(ones)
    behind = abs(one - best) / abs(best) if best else float(one != best)
    inside = "within 20 % of the best" if behind <= 0.2 else "not within 20 % of the best"
    return f"{words}; one step: {one:.4g}, {behind:.1%} behind, {inside}"


def plot(reports: list[dict], path: Path) -> None:
    """The first metric against the number of evaluations, a line for each solver and scale."""
    import os

    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import figure, ticker

    from meanflow.files import replacing

    name = next(iter(flat(reports[0])))
    picture = figure.Figure(figsize=(8, 5), layout="constrained")
    axes = picture.subplots()
    for solver, scale in dict.fromkeys((report["solver"], report["cfg_scale"]) for report in reports):
        line = [report for report in reports if (report["solver"], report["cfg_scale"]) == (solver, scale)]
        label = solver if scale is None else f"{solver}, CFG scale {scale:g}"
        axes.plot([r["evaluations"] for r in line], [flat(r)[name] for r in line], "o-", label=label)
    axes.set(xlabel="network evaluations for one image", ylabel=name, xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    with replacing(path) as temporary:
        picture.savefig(temporary, dpi=120)


def write_table(reports: list[dict], path: Path) -> None:
    from meanflow.files import replacing

    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        columns = ["solver", "num_steps", "evaluations", "cfg_scale"]
        writer = csv.writer(file)
        writer.writerow([*columns, *flat(reports[0])])
        writer.writerows([[report[column] for column in columns] + list(flat(report).values()) for report in reports])
