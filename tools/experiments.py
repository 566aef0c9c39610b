"""Runs the experiments of recipes/experiments/, each of which judges itself.

    python tools/experiments.py list
    python tools/experiments.py run ratio tangent                 # on real digits, minutes on 2 CPU cores
    python tools/experiments.py run all
    python tools/experiments.py report                            # one table, a plot of each, a page of Markdown
    accelerate launch -q tools/experiments.py run cifar10 --scale paper --reference cifar10-train.npz

The arms run one after another. After a kill the same command goes on. The exit code is 1 where a criterion fails.
"""

import gc
import hashlib
import importlib
import json
import math
import os
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from meanflow.program import end_with_launcher, read_flags, refusals
from reports.experiments import markdown, plot, print_table, table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes/experiments"


@dataclass(frozen=True)
class Options:
    command: tyro.conf.Positional[Literal["list", "run", "report"]]
    """list: what there is; run: train and judge; report: what was found so far"""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """the experiments, or all"""
    scale: Literal["tiny", "paper"] = "tiny"
    """tiny: real data that ship with packages, on 2 CPU cores; paper: the published setting"""
    out: Path = Path("runs/experiments")
    """the folder of the runs and results"""
    data: str | None = None
    """paper: what to train on, instead of what the recipes name"""
    reference: str | None = None
    """paper: what FID is measured against, as for tools/evaluate.py; default: what the run holds out"""
    page: Path | None = None
    """report: the page to write; the plots go into a folder of its name; default: report.md in the folder"""


def all_experiments(scale: str) -> dict:
    """Every experiment that has this scale, by name."""
    names = [path.stem for path in sorted(FOLDER.glob("[a-z]*.py")) if path.stem not in ("base", "plane")]
    modules = {name.replace("_", "-"): importlib.import_module(f"recipes.experiments.{name}") for name in names}
    found = {name: getattr(module, scale.upper()) for name, module in modules.items()}
    return {name: experiment for name, experiment in found.items() if experiment is not None}


def chosen(options: Options) -> dict:
    """The experiments that are named.

    Raises:
        Refusal: there is no such experiment.
    """
    from meanflow.files import ensure

    known = all_experiments(options.scale)
    names = list(known) if options.names in ((), ("all",)) else list(options.names)
    for name in names:
        ensure(name in known, f"there is no experiment {name} of scale {options.scale}: {', '.join(known)}")
    return {name: known[name] for name in names}


class Runner:
    """Trains and measures arms, each of them once: several experiments may have one in common."""

    def __init__(self, options: Options):
        self.options, self.folder = options, options.out.expanduser() / options.scale

    def place(self, arm, seed: int) -> tuple[Path, object]:
        """The folder of a run, by a hash of its recipe, and the recipe itself."""
        from meanflow.config import recipe_fields

        parts = {name: getattr(part, "__qualname__", part) for name, part in arm.parts.items()}
        if arm.recipe is None:
            key, recipe = {"parts": parts}, None
        else:
            recipe = replace(arm.recipe, seed=seed, data=self.options.data or arm.recipe.data, out=Path("run"))
            if "net" in arm.parts:
                recipe = replace(recipe, model=arm.parts["net"].__name__)
            key = {"recipe": recipe_fields(recipe), "parts": parts}
        if arm.begins_from:
            before, _ = self.place(arm.begins_from, seed)
            key["begins_from"], recipe = before.name, replace(recipe, init_from=str(before))
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        folder = self.folder / "runs" / digest
        return folder, recipe and replace(recipe, out=folder)

    def train(self, recipe, parts: dict, place: Path) -> bool:
        """Trains to the end, if that has not been done. Returns whether it ended well, and not by divergence."""
        from accelerate.state import AcceleratorState

        from meanflow.files import read_json
        from meanflow.training.guard import DIVERGED
        from meanflow.training.trainer import Parts, Trainer

        ended = place / "end.json"
        code = read_json(ended, code=int)["code"] if ended.exists() else None
        if code in (0, DIVERGED):
            return code == 0
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                Trainer(recipe, Parts(**parts)).train()
        except SystemExit as stopped:
            if stopped.code != DIVERGED:
                raise
            return False
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            gc.collect()
        return True

    def run(self, experiment, name: str, arm_name: str, seed: int) -> dict[str, float] | None:
        """The numbers of an arm; those of a run that diverged are None."""
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import broadcast_object_list

        from meanflow.files import read_json, write_json

        arm = experiment.arms[arm_name]
        place, recipe = self.place(arm, seed)
        result = self.result(place, name)
        if result.exists():
            return read_json(result)["metrics"]
        if arm.begins_from:
            before, first = self.place(arm.begins_from, seed)
            self.train(first, arm.begins_from.parts, before)
        is_whole = recipe is None or self.train(recipe, arm.parts, place)
        metrics = experiment.measure(place, replace(arm, recipe=recipe), self.options.reference) if is_whole else None
        metrics = broadcast_object_list([metrics])[0]  # only the first process may have them
        if PartialState().is_main_process:
            place.mkdir(parents=True, exist_ok=True)
            write_json(result, {"arm": arm_name, "seed": seed, "metrics": metrics})
        AcceleratorState._reset_state(reset_partial_state=True)  # the next arm may have another precision
        return metrics

    def result(self, place: Path, name: str) -> Path:
        """The file of a run's numbers, which belong to the experiment and to the reference."""
        reference = self.options.reference
        return place / f"{name}{'-' + hashlib.sha256(reference.encode()).hexdigest()[:8] if reference else ''}.json"

    def experiment(self, name: str, experiment, only_known: bool = False):
        """The results of all arms and seeds; with only_known those that are there, None if one is missing."""
        from recipes.experiments.base import Results

        jobs = [(seed, arm) for seed in range(experiment.seeds) for arm in experiment.arms]
        results = Results({arm: {} for arm in experiment.arms})
        for number, (seed, arm) in enumerate(jobs, start=1):
            begin = time.perf_counter()
            is_there = self.result(self.place(experiment.arms[arm], seed)[0], name).exists()
            if only_known and not is_there:
                return None
            metrics = self.run(experiment, name, arm, seed)
            for metric, value in (metrics or {}).items():
                results[arm].setdefault(metric, []).append(value)
            if not only_known:
                first = next(iter(metrics.items())) if metrics else ("diverged", math.nan)
                how = "was there" if is_there else f"{time.perf_counter() - begin:.0f} s"
                words = f"[{number}/{len(jobs)}] {name}, {arm}, seed {seed}: {first[0]} {first[1]:.4g} ({how})"
                print(words, file=sys.stderr, flush=True)
        for arm in results:
            metrics = {metric: None for values in results.values() for metric in values} or {"diverged": None}
            lost = experiment.seeds - len(next(iter(results[arm].values()), []))
            for metric in metrics if lost else ():
                results[arm].setdefault(metric, []).extend([math.inf] * lost)
        return results


def list_experiments(options: Options) -> None:
    for scale in ("tiny", "paper"):
        for name, experiment in all_experiments(scale).items():
            runs = f"{len(experiment.arms)} arms, {experiment.seeds} seed{'s' * (experiment.seeds > 1)}"
            question = " ".join(experiment.question.split()).partition("?")[0]
            print(f"{scale:6}{name:16}{runs:20}{question}?")


def run(options: Options) -> bool:
    from meanflow.files import ensure

    given = options.scale == "tiny" or options.reference
    ensure(given, "reference must be given at the scale of the paper: it holds no images out, got None")
    runner, all_hold = Runner(options), True
    for name, experiment in chosen(options).items():
        results = runner.experiment(name, experiment)
        claims = experiment.judge(results)
        print(f"\n{name}")
        print_table(table(experiment, results))
        for claim in claims:
            print(f"  {'holds' if claim.holds else 'FAILS'}: {claim.words}")
        all_hold &= all(claim.holds for claim in claims)
    return all_hold


def report(options: Options) -> bool:
    from meanflow.files import ensure, write_whole

    runner, parts, all_hold, verdicts = Runner(options), [], True, []
    page = options.page or runner.folder / "report.md"
    for name, experiment in chosen(options).items():
        results = runner.experiment(name, experiment, only_known=True)
        if results is None:
            print(f"{name}: not finished", file=sys.stderr)
            continue
        claims = experiment.judge(results)
        picture = page.with_suffix("") / f"{name}.png"
        plot(name, experiment, results, picture)
        parts.append(markdown(name, experiment, results, claims, f"{page.stem}/{name}.png"))
        holding = sum(claim.holds for claim in claims)
        verdicts.append(f"| [{name}](#{name}) | {len(results)} | {experiment.seeds} | {holding} of {len(claims)} |")
        all_hold &= holding == len(claims)
    ensure(len(parts) > 0, f"{runner.folder} has no finished experiment: python tools/experiments.py run all")
    head = f"""# Experiments, at the scale {options.scale}

This page was written by `python tools/experiments.py report`, from `python tools/experiments.py run all`.

| experiment | arms | seeds | criteria that hold |
|---|---:|---:|---:|
"""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, head + "\n".join(verdicts) + "\n\n" + "\n".join(parts))
    print(f"{page}: {len(parts)} experiments, with a plot of each beside it")
    return all_hold


def main(options: Options) -> None:
    sys.path.insert(0, str(ROOT))
    if options.command == "list":
        return list_experiments(options)
    if not {"run": run, "report": report}[options.command](options):
        sys.exit(1)


if __name__ == "__main__":
    end_with_launcher()
    with refusals():
        main(read_flags(Options))
