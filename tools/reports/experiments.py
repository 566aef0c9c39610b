"""The tables, plots and pages of tools/experiments.py."""

import math
import os
from pathlib import Path


def table(experiment, results) -> list[list[str]]:
    """The rows of a table: the arm, the paper's figure, and mean and spread of each metric."""
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    has_paper = any(arm.paper for arm in experiment.arms.values())
    rows = [["arm", *["paper"] * has_paper, *metrics]]
    for arm, values in results.items():
        paper = experiment.arms[arm].paper
        row = [arm, *[f"{paper:g}" if paper else ""] * has_paper]
        for metric in metrics:
            number = f"{results.mean(arm, metric):.4g}" if metric in values else ""
            many = experiment.seeds > 1 and metric in values and math.isfinite(results.mean(arm, metric))
            row.append(number + (f" ± {results.spread(arm, metric):.2g}" if many else ""))
        rows.append(row)
    return rows


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (cell.ljust(width) if not n else cell.rjust(width) for n, (cell, width) in
                          enumerate(zip(row, widths)))  # fmt: skip
        print("  " + "  ".join([first, *others]))


def plot(name: str, experiment, results, path: Path) -> None:
    """The first metric of every arm, or all metrics of one or two; the paper's figures as crosses, on another axis."""
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import figure

    from meanflow.files import replacing

    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    picture = figure.Figure(figsize=(8, 0.9 + 0.34 * max(4, len(results))), layout="constrained")
    axes = picture.subplots()
    arms = list(results)[::-1]
    for number, metric in enumerate(metrics if len(results) <= 2 else metrics[:1]):
        for place, arm in enumerate(arms):
            values = [value for value in results[arm].get(metric, []) if math.isfinite(value)]
            label = metric if place == 0 else None
            axes.plot(values, [place] * len(values), "o", color=f"C{number}", alpha=0.7, label=label)
    axes.set_yticks(range(len(arms)), arms)
    axes.set(title=name, xlabel=metrics[0] if len(results) > 2 else "", xscale="log")
    papers = [(experiment.arms[arm].paper, place) for place, arm in enumerate(arms) if experiment.arms[arm].paper]
    if papers:
        above = axes.twiny()
        above.plot(*zip(*papers), "x", color="grey", label="paper (FID)")
        above.set(xlabel="paper: FID of ImageNet", xscale="log")
        above.legend(loc="lower right")
    if len(results) <= 2:
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.savefig(temporary, dpi=80)


def markdown(name: str, experiment, results, claims: list, picture: str) -> str:
    head, *rows = table(experiment, results)
    lines = [f"## {name}", "", experiment.question, "", f"| {' | '.join(head)} |"]
    lines += [f"|---|{'---:|' * (len(head) - 1)}"] + [f"| {' | '.join(row)} |" for row in rows]
    seeds = f" (mean and standard deviation over {experiment.seeds} seeds)" if experiment.seeds > 1 else " (one seed)"
    lines += ["", f"Criteria{seeds}:", ""]
    lines += [f"- {'holds' if claim.holds else '**does not hold**'}: {claim.words}" for claim in claims]
    return "\n".join([*lines, "", f"![{name}]({picture})", ""])
