"""A run under SLURM: accelerate_configs/slurm.sbatch is submitted, which queues itself again after it was stopped."""

import math
import shutil
import subprocess
from pathlib import Path

from meanflow.files import ensure

SCRIPT = Path(__file__).parents[2] / "accelerate_configs/slurm.sbatch"


def submit(options, flags: list[str]) -> int:
    """Submits the script, and returns sbatch's exit code; squeue, scancel and the job's output file do the rest.

    Raises:
        Refusal: there is no sbatch here.
    """
    ensure(shutil.which("sbatch") is not None, "sbatch is not here: give this command on a login node of SLURM")
    minutes = [f"--time={math.ceil(60 * options.hours)}"] if options.hours else []
    return subprocess.run(["sbatch", *minutes, str(SCRIPT), str(options.recipe), *flags]).returncode
