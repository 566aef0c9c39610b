"""Starts a recipe, follows it, and starts it again when it was killed; it goes on where it was.

    python tools/launch.py recipes/imagenet_ditxl.py --out runs/ditxl --retries 5 --detach
    python tools/launch.py status runs/ditxl
    python tools/launch.py logs runs/ditxl -f
    python tools/launch.py stop runs/ditxl                              # with a checkpoint

A run is started again after a crash, a kill or a signal to stop; never after a divergence or a refusal, nor where two
restarts made no step of progress. The recipe comes first; flags that are not the launcher's go to the recipe.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meanflow.config import Refusal, check
from meanflow.files import ensure
from meanflow.program import read_flags, refusals

# Flags of a recipe that make no sense with a launcher.
ALONE = {
    "--resume": "at each restart it would go back to that checkpoint; give it to accelerate launch, and then launch",
    "--smoke": "a smoke test takes a minute, in a folder of its own: python RECIPE --smoke",
    "--dry-run": "it trains nothing: python RECIPE --dry-run",
}


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[Path]
    """the recipe's file; or status, logs or stop, and the folder of a run"""
    on: Literal["local", "slurm", "modal"] = "local"
    """local: this machine, by accelerate launch; slurm: submit accelerate_configs/slurm.sbatch; modal: a rented GPU of
    modal.com (pip install -e '.[cloud]', modal setup)"""
    config_file: Path | None = None
    """local: for accelerate launch, such as accelerate_configs/multi_gpu.yaml; default: accelerate's own"""
    num_processes: int | None = None
    """local: how many processes accelerate launch starts; default: what its config says"""
    retries: int = 5
    """how often the run may be started again"""
    delay: float = 30.0
    """seconds before it is"""
    hours: float | None = None
    """after so many hours the run is stopped with a checkpoint; default: never; slurm: the script's; modal: 24"""
    detach: bool = False
    """go on without this terminal"""
    gpu: str = "H100:8"
    """modal: the kind of GPU, and how many"""
    verify: tyro.conf.FlagCreatePairsOff[bool] = False  # --no-verify is the recipe's
    """modal: only try the account, by a small run there and back"""

    def __post_init__(self) -> None:
        check(self.retries >= 0, "retries", self.retries, ">= 0")
        check(0 <= self.delay <= 3600, "delay", self.delay, "in [0, 3600] seconds")
        check(self.hours is None or 0 < self.hours <= 10_000, "hours", self.hours, "> 0 and at most 10,000")
        check(self.recipe.is_file(), "recipe", self.recipe, "a file, or status, logs or stop")
        check(self.config_file is None or self.config_file.is_file(), "config_file", self.config_file, "a file")
        check(self.num_processes is None or self.num_processes > 0, "num_processes", self.num_processes, "> 0")
        check(self.on == "modal" or not self.verify, "verify", True, "given with --on modal")
        is_plain = self.config_file is None and self.num_processes is None
        check(self.on == "local" or is_plain, "config_file and num_processes", "one", "left out without --on local")
        is_usual = (self.retries, self.delay) == (5, 30.0)
        check(self.on != "slurm" or is_usual, "retries and delay", "one", "left out: the script queues itself again")


@dataclass(frozen=True)
class Folder:
    """status: the step, and how each start ended. stop: asks the run to save and leave, and waits until no process is
    left; what lives after ten minutes is killed. logs: what the run printed."""

    run: tyro.conf.Positional[Path]
    """the folder of a run that was started by tools/launch.py"""


@dataclass(frozen=True)
class Logs(Folder):
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False
    """go on until the launcher ends"""


def folder_of(recipe: Path, flags: list[str]) -> tuple[Path, list[str]]:
    """The run's folder, from --out or from the recipe's RECIPE, and the flags with it.

    Raises:
        Refusal: neither says it.
    """
    for number, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        if name == "--out":
            given = [value] if has_value else flags[number + 1 : number + 2]
            check(given != [], "out", "nothing", "a folder")
            return Path(given[0]).expanduser(), flags
    spec = importlib.util.spec_from_file_location("launched_recipe", recipe)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        out = module.RECIPE.out
    except Exception as error:
        raise Refusal(f"{recipe} does not say its folder by RECIPE.out ({error}): give --out FOLDER") from None
    return out, [*flags, "--out", str(out)]


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("status", "logs", "stop"):
        sys.argv[:2] = [f"{sys.argv[0]} {command}"]
        given = read_flags(Logs if command == "logs" else Folder)
        from launchers import local

        sys.exit(getattr(local, command)(*vars(given).values()))
    options, flags = read_flags(Options, others=True)
    if {"--help", "-h"} & set(flags):
        raise Refusal(f"help of the recipe: python {options.recipe} --help")
    for flag, why in ALONE.items():
        is_given = any(each.split("=")[0] == flag for each in flags)
        ensure(not is_given, f"{flag} cannot be given to the launcher: {why}")
    out, flags = folder_of(options.recipe, flags)
    if options.on == "modal":
        from launchers import rented

        sys.exit(rented.launch(options, out, flags))
    if options.on == "slurm":
        from launchers import slurm

        sys.exit(slurm.submit(options, flags))
    from launchers import local

    sys.exit(local.launch(options, out, flags))


if __name__ == "__main__":
    with refusals():
        main()
