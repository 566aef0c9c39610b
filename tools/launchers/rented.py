"""A run on rented GPUs of modal.com, as a Modal app. Only the app and its options are tested, not the service.

The repository is copied into the image. Runs lie on a volume, meanflow-runs, and downloads on another, meanflow-cache,
so that a container that vanishes loses nothing: Modal starts it again, and the same command goes on.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from meanflow.config import Refusal, check
from meanflow.files import errors_as

ROOT = Path(__file__).parents[2]
THERE = "/root/meanflow"  # where the repository lies in the container
RUNS, CACHE = "/runs", "/cache"
MOST_HOURS, MOST_RETRIES, MOST_DELAY = 24, 10, 60  # Modal's limits
LEFT_OUT = [".git", ".venv", ".env*", "runs", "data", "wandb", "models/*/**", "**/__pycache__", "*.egg-info"]
KINDS = ("T4", "L4", "A10", "A100", "A100-40GB", "A100-80GB", "L40S", "H100", "H200", "B200")


def command(options, out: Path, flags: list[str]) -> list[str]:
    """What runs in the container: the launcher of this machine, so that only what should be is started again."""
    kept, skip = [], False
    for flag in flags:
        if skip or flag == "--out" or flag.startswith("--out="):
            skip = flag == "--out"
            continue
        kept.append(flag)
    recipe = options.recipe.resolve().relative_to(ROOT).as_posix()
    count = int((options.gpu.split(":") + ["1"])[1])
    config = "accelerate_configs/multi_gpu.yaml" if count > 1 else "accelerate_configs/single_gpu.yaml"
    if options.verify:
        return ["python", recipe, "--smoke", "--out", f"{RUNS}/try"]
    # The run stops with a checkpoint before Modal ends the container.
    hours = (options.hours or MOST_HOURS) * 0.97
    launcher = ["--config-file", config, "--num-processes", str(count), "--hours", f"{hours:.4g}"]
    launcher += ["--retries", str(options.retries), "--delay", f"{options.delay:g}"]
    return ["python", "tools/launch.py", recipe, *launcher, "--out", f"{RUNS}/{out.name}", *kept]


def make_train(place: str):
    """The function of the container. It is made here, since Modal sends by its content only what no module holds."""

    def train(command: list[str]) -> int:
        """What the launcher there decided is returned and not raised: only what is raised is tried again."""
        code = subprocess.run(command, cwd=place).returncode
        if code not in (0, 1, 2, 3, 75):
            raise RuntimeError(f"the launcher in the container ended with code {code}")
        return code

    return train


def make_app(options, out: Path):
    """The Modal app, and its function. No account is needed to make it.

    Raises:
        Refusal: an option is out of Modal's limits, or modal is not installed.
    """
    try:
        import modal
    except ImportError:
        raise Refusal("modal is not installed: pip install -e '.[cloud]'") from None
    kind, _, count = options.gpu.partition(":")
    check(kind in KINDS and (not count or count in map(str, range(1, 9))), "gpu", options.gpu, "such as H100 or H100:8")
    hours = options.hours or MOST_HOURS
    check(hours <= MOST_HOURS, "hours", options.hours, f"at most {MOST_HOURS}, of a Modal function")
    check(options.retries <= MOST_RETRIES, "retries", options.retries, f"at most {MOST_RETRIES}, Modal's limit")
    check(options.delay <= MOST_DELAY, "delay", options.delay, f"at most {MOST_DELAY} seconds, Modal's limit")
    is_ours = ROOT in options.recipe.resolve().parents
    check(is_ours, "recipe", options.recipe, f"in {ROOT}, which is copied into the image")
    image = (
        modal.Image.debian_slim(python_version="3.11")
        .apt_install("build-essential")  # torch.compile needs a compiler
        .add_local_dir(ROOT, THERE, copy=True, ignore=LEFT_OUT)
        .run_commands(f"cd {THERE} && pip install -c constraints.txt -e .")
        .env({"HF_HOME": f"{CACHE}/huggingface", "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor"})
    )
    app = modal.App(f"meanflow-{out.name}")
    volumes = {RUNS: modal.Volume.from_name("meanflow-runs", create_if_missing=True)}
    volumes[CACHE] = modal.Volume.from_name("meanflow-cache", create_if_missing=True)
    retries = modal.Retries(max_retries=options.retries, backoff_coefficient=1.0, initial_delay=options.delay)
    how = {"gpu": options.gpu, "timeout": round(3600 * hours), "retries": retries, "volumes": volumes}
    function = app.function(image=image, serialized=True, include_source=False, **how)(make_train(THERE))
    return app, function


def launch(options, out: Path, flags: list[str]) -> int:
    """Runs the app, and returns the run's exit code; detached, 0 as soon as it was called."""
    app, function = make_app(options, out)
    import modal

    there = command(options, out, flags)
    print(f"modal: {shlex.join(there)}", file=sys.stderr)
    detach = options.detach and not options.verify
    with errors_as("modal"), modal.enable_output(), app.run(detach=detach):
        if detach:
            call = function.spawn(there)
            print(f"{out.name}: modal app logs {app.app_id}; modal app stop {app.app_id}; call {call.object_id}")
            print(f"what it wrote: modal volume get meanflow-runs {out.name}")
            return 0
        code = function.remote(there)
    if options.verify and code == 0:
        print("the account works: a small run went there and back")
    return code
