"""The next paper in files of one's own: those of docs/extending.md, outside the repository."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the two files of the page, and nothing else."""
    folder = tmp_path_factory.mktemp("project")
    page = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"## [^\n]*: (\w+\.py)\n.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["alpha_flow.py", "circle_net.py"]
    for name, code in blocks:
        (folder / name).write_text(code)
    return folder


def call(command: list, cwd: Path, code: int = 0, **environment) -> str:
    command, environment = list(map(str, command)), {**ENVIRONMENT, **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


RECIPE = [
    sys.executable,
    "alpha_flow.py",
    "--steps",
    "40",
    "--objective.anneal-from",
    "0",
    "--objective.anneal-to",
    "30",
]
RECIPE += ["--checkpoint-every", "8", "--log-every", "1", "--sample-every", "40"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.parent.name} {k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture(scope="module")
def straight(project) -> Path:
    call([*RECIPE, "--out", "straight"], project)
    return project / "straight"


def test_the_page_counts_lines_as_it_says(project):
    """A recipe of under 120 code lines, with an objective of under 60."""
    lines = [line for line in (project / "alpha_flow.py").read_text().splitlines() if line.strip()]
    first = next(number for number, line in enumerate(lines) if line.startswith("class AlphaFlowConfig"))
    last = next(number for number, line in enumerate(lines) if line.startswith("class Blobs"))
    assert len(lines) < 120 and last - first < 60


def test_a_run_of_ones_own_learns_and_follows_its_schedule(straight):
    import json

    log = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    alphas = [line["alpha"] for line in log]
    assert alphas[0] == 1 and alphas[-1] == 0 and sorted(alphas, reverse=True) == alphas and 0 < alphas[15] < 1
    assert log[-1]["raw_loss"] < 0.7 * log[0]["raw_loss"]
    assert (straight / "samples/step-00000040.png").exists() and (straight / "pipeline/net").is_dir()


def test_a_killed_run_of_ones_own_resumes_bit_for_bit(project, straight):
    killed = project / "killed"
    running = subprocess.Popen([*RECIPE, "--out", "killed"], cwd=project, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (killed / "step-00000008").exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert "resumes after step" in call([*RECIPE, "--out", "killed"], project)
    expected, found = (weights(run / "step-00000040") for run in (straight, killed))
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())


def test_two_processes_train_what_one_does(project):
    """Weights and average after 5 steps, to 1e-6, at a rate at which Adam does not magnify rounding."""
    flags = ["alpha_flow.py", *RECIPE[2:], "--steps", "5", "--lr", "2e-6", "--out"]
    call([sys.executable, *flags, "one"], project)
    call([BIN / "torchrun", "--standalone", "--nproc-per-node=2", *flags, "two"], project)
    one, two = (weights(project / name / "step-00000005") for name in ("one", "two"))
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-6 * value.norm(), name


def test_a_condition_of_ones_own_is_sampled_if_the_code_is_trusted(project, straight):
    tool = [sys.executable, ROOT / "tools/sample.py", straight, "--cond", "angle", "0", "1.5", "--num-images", "4"]
    refused = call([*tool, "--out", project / "x.npz"], ROOT, code=2)
    code = straight / "step-00000040/ema/0.98/modeling_custom_circle_net.py"
    assert f"{code} is not this project's code, and would have been run: read it, then give" in refused
    assert refused.startswith("error: ") and refused.count("\n") == 1
    assert not (project / "x.npz").exists()
    call([*tool, "--out", project / "x.npz", "--trust-remote-code"], ROOT)
    images = np.load(project / "x.npz")["arr_0"]
    assert images.shape == (4, 8, 8, 1)
    wrong = [sys.executable, ROOT / "tools/sample.py", straight, "--trust-remote-code", "--out", project / "y.npz"]
    assert "cond must have angle: this network cannot do without" in call(wrong, ROOT, code=2)
    assert "cond size is not known to this network, which takes angle" in call([*wrong, "--cond", "size", "1"], ROOT, 2)
    assert "cond angle must be numbers" in call([*wrong, "--cond", "angle", "up"], ROOT, code=2)
    assert "cond angle must be finite, got 0 nan" in call([*wrong, "--cond", "angle", "0", "nan"], ROOT, code=2)
    assert "cond must be a name and its values, such as angle 0 0.5, got: angle" in call(
        [*wrong, "--cond", "angle"], ROOT, code=2
    )
    assert "the network does not take cond angle (64, 2): " in call([*wrong, "--cond", "angle", "0,1"], ROOT, code=2)


BY_A_STRANGER = """if True:
    import sys, numpy as np
    from diffusers import DiffusionPipeline
    for name in ("meanflow", "circle_net"):
        try:
            __import__(name)
        except ImportError:
            continue
        sys.exit(f"{name} can be imported")
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
    e = pipe.noise(0, range(4))
    images = pipe(batch_size=4, latents=e, cond={"angle": [0.0, 1.5, 0.0, 1.5]}, output_type="np").images
    np.savez(sys.argv[2], (images * 255).round().astype("uint8"))
"""


def test_its_export_is_loaded_without_the_project_and_without_the_files(project, straight, tmp_path):
    export = [sys.executable, ROOT / "tools/export.py", straight, "--out", tmp_path / "model"]
    assert "is not this project's code" in call(export, ROOT, code=2)
    call([*export, "--trust-remote-code"], ROOT)
    tool = [sys.executable, ROOT / "tools/sample.py", tmp_path / "model", "--cond", "angle", "0", "1.5"]
    call([*tool, "--num-images", "4", "--trust-remote-code", "--out", tmp_path / "a.npz"], ROOT)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    # Without site, so that no .pth file of an editable install is read.
    stranger = [sys.executable, "-S", "-c", BY_A_STRANGER, tmp_path / "model", tmp_path / "b.npz"]
    call(stranger, tmp_path, PYTHONPATH=packages, HF_HOME=str(tmp_path / "home"))
    a, b = (np.load(tmp_path / name)["arr_0"] for name in ("a.npz", "b.npz"))
    assert (a == b).all() and (a[0] != a[1]).any()
