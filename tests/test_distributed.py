"""One run on any number of processes: real launches on gloo, compared with one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import perturbed
from safetensors.torch import load_file

from meanflow.training.guard import DIVERGED
from meanflow.training.log import read_log
from models import MODELS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ACCELERATE = [str(BIN / "accelerate"), "launch", "-q", "--config_file"]
ONE = [*ACCELERATE, "accelerate_configs/cpu.yaml"]
TWO = [*ACCELERATE, "accelerate_configs/cpu_2proc.yaml"]
MULTI_GPU = [*ACCELERATE, "accelerate_configs/multi_gpu.yaml", "--num_processes=2", "--main_process_port=0"]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"]

pytestmark = pytest.mark.slow


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int | None = 0) -> str:
    text, _ = process.communicate(timeout=300)
    assert code is None or process.returncode == code, text
    return text


DIGITS = ["recipes/digits_dit.py", "--model", "DiT-XS/4", "--global-batch", "16", "--objective.meanflow-ratio", "0.25"]
DIGITS += ["--objective.class-dropout-prob", "0.1", "--schedule", "constant", "--warmup-steps", "0", "--log-every", "1"]


@pytest.mark.parametrize(
    "launch, processes, recipe",
    [(MULTI_GPU, 2, ["recipes/imagenet_ditxl.py", "--smoke"]), (TORCHRUN, 2, ["recipes/imagenet_ditxl.py", "--smoke"])],
    ids=["accelerate 2 smoke", "torchrun 2 smoke"],
)
def test_launched_processes_share_one_run(launch, processes, recipe, tmp_path):
    text = finish(start(*launch, *recipe, "--out", str(tmp_path / "run")))
    assert f"16 = {16 // processes} x {processes} processes" in text
    assert text.count("resumes   nothing") == 1  # one process speaks
    out = next(tmp_path.glob("run*"))
    steps = [line["step"] for line in read_log(out / "log.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) in (2, 4)


def test_two_nodes_on_this_machine_share_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        flags = ["--num_machines=2", "--num_processes=2", f"--machine_rank={rank}", f"--main_process_port={port}"]
        command = [*ACCELERATE, "accelerate_configs/multi_node.yaml", *flags, *DIGITS, "--steps", "2", "--out"]
        nodes.append(start(*command, str(tmp_path / "run")))
    texts = [finish(node) for node in nodes]
    assert all("16 = 8 x 2 processes" in text for text in texts)  # one process of each node speaks
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2]


def test_launch_that_silently_starts_one_process_of_two_is_refused(tmp_path):
    launch = [str(BIN / "accelerate"), "launch", "-q", "--cpu", "--num_processes=2"]
    text = finish(start(*launch, *DIGITS, "--steps", "2", "--out", str(tmp_path / "run")), code=None)
    assert "asked for several processes and started one: add --multi_gpu" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "launch, flags, words",
    [
        (TWO, ["--lr", "-1"], "error: lr must be > 0, got -1"),
        (TWO, ["--data", "digit"], "error: digit: no such file or folder"),
        (TORCHRUN, ["--model", "DiT-XXL"], "error: model must be one of DiT-"),
        ([*TWO, "--mixed_precision=bf16"], [], "error: mixed_precision must be what the launcher was given, bf16"),
    ],
    ids=["range", "data", "torchrun", "precision"],
)
def test_refusal_of_two_processes_is_one_line(launch, flags, words, tmp_path):
    """Nothing of the launcher's own, which is ended, too."""
    begin = time.monotonic()
    running = start(*launch, *DIGITS, *flags, "--steps", "2", "--out", str(tmp_path / "run"))
    text = finish(running, code=None)
    lines = [line for line in text.splitlines() if "OMP_NUM_THREADS" not in line]
    assert running.returncode != 0 and len(lines) == 1 and lines[0].startswith(words), text
    assert not (tmp_path / "run").exists() and time.monotonic() - begin < 60


# Adam makes full steps of the rounding of gradients that are exactly 0, such as those of the keys' biases. So the rate
# is small: five steps still move the weights by 30 times the tolerance and more.
RATE = "2e-6"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A network that is no fresh one, whose gradients are zero nearly everywhere."""
    return save_weights("DiT-XS/4", tmp_path_factory.mktemp("weights"))


def save_weights(model: str, folder: Path, std: float = 0.1, **sizes) -> Path:
    torch.manual_seed(0)
    perturbed(MODELS[model](input_size=8, in_channels=1, num_classes=10, **sizes), std).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of a checkpoint, flat: weights, average, and Adam's state (after one step 0.1 of the gradient)."""
    found = {}
    for kind in ("model", "ema/0.95"):
        values = load_file(folder / kind / "diffusion_pytorch_model.safetensors")
        found[kind] = torch.cat([values[name].flatten() for name in sorted(values)]).double()
    state = load_file(folder / "optimizer.safetensors")
    found["gradient"] = torch.cat([state[name].flatten() for name in sorted(state) if name.endswith(".exp_avg")])
    return found


def apart(a: Path, b: Path) -> dict[str, float]:
    """L2 of the difference over L2, all tensors of a kind together."""
    a, b = tensors(a), tensors(b)
    return {kind: ((a[kind] - b[kind]).norm() / a[kind].norm()).item() for kind in a}


def five_steps(launch: list[str], weights: Path, out: Path, *flags: str) -> str:
    more = ["--steps", "5", "--lr", RATE, "--checkpoint-every", "1", "--keep", "9", "--init-from", str(weights)]
    return finish(start(*launch, *DIGITS, *more, *flags, "--out", str(out)))


@pytest.fixture(scope="module")
def one(weights, tmp_path_factory) -> Path:
    """Five steps by one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    five_steps([*ACCELERATE, "accelerate_configs/single_gpu.yaml"], weights, out)
    return out


def test_one_process_two_and_two_with_accumulation_train_the_same_network(one, weights, tmp_path):
    """The first step's whole gradient, and weights and average after 5 steps, to 1e-6."""
    for name, flags in (("two", ()), ("accumulated", ("--accumulation-steps", "2"))):
        text = five_steps(TWO, weights, tmp_path / name, *flags)
        assert f"x 2 processes x {1 + len(flags) // 2} accumulation" in text and text.count("network   DiT") == 1
        first = apart(one / "step-00000001", tmp_path / name / "step-00000001")
        last = apart(one / "step-00000005", tmp_path / name / "step-00000005")
        print(name, first, last)
        assert first["gradient"] < 1e-6 and last["model"] < 1e-6 and last["ema/0.95"] < 1e-6
        assert apart(one / "step-00000001", tmp_path / name / "step-00000005")["model"] > 3e-5
        for line, other in zip(read_log(one / "log.jsonl"), read_log(tmp_path / name / "log.jsonl")):
            assert other["raw_loss"] == pytest.approx(line["raw_loss"], rel=1e-5)


def test_processes_that_bypass_the_wrapper_train_another_network(one, weights, tmp_path):
    """What the test above would see: gradients that stay local."""
    bypass = tmp_path / "bypass.py"
    bypass.write_text(
        "import runpy, sys, torch\n"
        "torch.nn.parallel.DistributedDataParallel.forward = lambda self, *x, **y: self.module(*x, **y)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    five_steps([*TORCHRUN, str(bypass)], weights, tmp_path / "two")
    assert apart(one / "step-00000001", tmp_path / "two/step-00000001")["gradient"] > 1e-2


def test_run_goes_on_with_another_number_of_processes(weights, tmp_path):
    """10 steps on 1 process, against 5 on 2 and 5 on 1."""
    flags = ["--steps", "10", "--lr", RATE, "--checkpoint-every", "5", "--init-from", str(weights)]
    finish(start(*ONE, *DIGITS, *flags, "--out", str(tmp_path / "one")))
    finish(start(*TWO, *DIGITS, *flags, "--out", str(tmp_path / "two")))
    (tmp_path / "two/step-00000010").rename(tmp_path / "moved")
    text = finish(start(*ONE, *DIGITS, *flags, "--out", str(tmp_path / "two")))
    assert "resumes after step 5 of 10" in text
    difference = apart(tmp_path / "one/step-00000010", tmp_path / "two/step-00000010")
    print(difference)
    assert difference["model"] < 1e-6 and difference["ema/0.95"] < 1e-6


@pytest.mark.parametrize("launch", [ONE, TWO], ids=["1 process", "2 processes"])
def test_compiled_run_trains_the_same_network_and_resumes_bit_for_bit(launch, weights, tmp_path):
    """Guided, against one eager process."""
    flags = ["--objective.kappa", "0.5", "--steps", "10", "--lr", RATE, "--checkpoint-every", "1", "--keep", "10"]
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    for command, out, more in ((ONE, eager, []), (launch, compiled, ["--compile"])):
        text = finish(start(*command, *DIGITS, *flags, *more, "--init-from", str(weights), "--out", str(out)))
    assert text.count("the first step is compiled") == 1
    assert apart(eager / "step-00000001", compiled / "step-00000001")["gradient"] < 1e-5
    last = apart(eager / "step-00000010", compiled / "step-00000010")
    assert last["model"] < 1e-6 and last["ema/0.95"] < 1e-6
    for step in range(6, 11):
        (compiled / f"step-{step:08d}").rename(tmp_path / f"{step}")
    text = finish(start(*launch, *DIGITS, *flags, "--compile", "--init-from", str(weights), "--out", str(compiled)))
    assert "resumes after step 5 of 10" in text
    before, after = tensors(tmp_path / "10"), tensors(compiled / "step-00000010")
    assert all(torch.equal(before[kind], after[kind]) for kind in before)


def test_compiling_is_refused_or_left_out_in_one_line(tmp_path, monkeypatch):
    """Sharded, and without a C++ compiler."""
    flags = [*DIGITS, "--compile", "--steps", "2", "--out"]
    text = finish(start(*on_cpu(tmp_path), *flags, str(tmp_path / "sharded")), code=None)
    assert "\nerror: compile: FSDP2's hooks" in text
    monkeypatch.setitem(ENVIRONMENT, "CXX", "no-such-compiler")
    text = finish(start(*ONE, *flags, str(tmp_path / "eager")))
    assert "warning: the step is not compiled" in text and (tmp_path / "eager/step-00000002").exists()


def test_sigterm_saves_the_step_on_both_processes_and_leaves(tmp_path):
    launch = [*TORCHRUN, "--signals-to-handle=SIGTERM,SIGUSR1"]
    out = tmp_path / "run"
    running = start(*launch, *DIGITS, "--steps", "100000", "--out", str(out))
    while running.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    begin = time.perf_counter()
    text = finish(running, code=None)
    assert time.perf_counter() - begin < 30 and running.returncode != 0
    saved = [path.name for path in out.glob("step-*")]
    assert len(saved) == 1, text
    step = int(saved[0][5:])
    assert f"a signal asked to stop: saved after step {step}" in text
    assert read_log(out / "log.jsonl")[-1]["step"] == step
    again = start(*TWO, *DIGITS, "--steps", str(100000), "--out", str(out))
    while again.poll() is None and read_log(out / "log.jsonl")[-1]["step"] <= step:
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    assert f"resumes after step {step} of 100000" in finish(again, code=None)


def test_slurm_job_that_is_to_end_saves_and_is_queued_again(tmp_path):
    """The script itself, with stand-ins for SLURM's two commands; the processes and their signal are real."""
    for name, lines in {
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path}/requeued; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "here"}
    job |= {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    out = tmp_path / "run"
    command = ["bash", "accelerate_configs/slurm.sbatch", *DIGITS, "--steps", "100000", "--out", str(out)]
    running = subprocess.Popen(
        command, cwd=ROOT, env={**ENVIRONMENT, **job}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while running.poll() is None and not (out / "log.jsonl").exists():
        time.sleep(0.1)
    (step,) = psutil.Process(running.pid).children()  # to which SLURM sends the signal
    step.send_signal(signal.SIGUSR1)
    text = finish(running, code=None)
    assert "16 = 8 x 2 processes" in text and "a signal asked to stop: saved after step" in text
    assert len(list(out.glob("step-*"))) == 1
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr", "1e30", "--max-skipped", "3"], "3 steps in a row had gradients that are not finite: lower --lr"),
        (["--lr", "0.3", "--grace-steps", "1"], "times its running level"),
    ],
    ids=["not finite", "diverging"],
)
def test_both_processes_end_a_run_that_cannot_go_on(flags, words, weights, tmp_path):
    out = tmp_path / "run"
    flags = [*flags, "--steps", "200", "--init-from", str(weights), "--out", str(out)]
    text = finish(start(*TWO, *DIGITS, *flags), code=None)
    assert words in text and "not saved" in text and f"exitcode  : {DIVERGED} " in text
    assert not list(out.glob("step-*"))


ON_CPU = """if True:  # accelerate turns FSDP on only for accelerators; everything else is as it is there
    import runpy, sys
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        real(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


CIFAR = {"model_channels": 16, "num_blocks": 1, "dropout": 0.0}
IMPROVED = ["--objective.meanflow-ratio", "0.5", "--objective.guidance-scale", "3"]
# A recipe, its network's name and sizes, and further flags.
NETWORKS = {
    "UNet-cifar": (
        "digits_dit", "UNet-cifar", {**CIFAR, "augment_dim": 6}, ["--augment", "0.5", "--objective.kappa", "0.5"],
    ),
    "iMF": ("imf", "iMF-B/2", {"depth": 3, "hidden_size": 32, "num_heads": 2, "aux_head_depth": 2}, IMPROVED),
    "DiT, omega": ("imf", "DiT-XS/4", {"takes_omega": 1}, IMPROVED),
    "UNet, omega": ("imf", "UNet-cifar", {**CIFAR, "takes_omega": 1}, IMPROVED),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_shards_and_accumulation_train_the_same_network(name, tmp_path):
    """As one process; with guidance, and augmented where the network takes it."""
    recipe, model, sizes, flags = NETWORKS[name]
    if recipe == "imf":
        (tmp_path / "imf.py").write_text(IMF)
    words = [str(tmp_path / "imf.py"), *DIGITS[3:]] if recipe == "imf" else DIGITS
    flags = [*words, "--model", model, "--net", *(str(word) for size in sizes.items() for word in size), *flags]
    flags += ["--steps", "5", "--lr", RATE, "--checkpoint-every", "1", "--keep", "9"]
    flags += ["--init-from", str(save_weights(model, tmp_path / "weights", 0.05, **sizes))]
    ways = {"one": ONE, "two": TWO, "sharded": on_cpu(tmp_path), "accumulated": TWO}
    for out, launch in ways.items():
        more = ["--accumulation-steps", "2"] if out == "accumulated" else []
        finish(start(*launch, *flags, *more, "--out", str(tmp_path / out)))
    for out in ("two", "sharded", "accumulated"):
        first = apart(tmp_path / "one/step-00000001", tmp_path / out / "step-00000001")
        last = apart(tmp_path / "one/step-00000005", tmp_path / out / "step-00000005")
        print(out, first, last)
        assert first["gradient"] < 1e-6 and last["model"] < 1e-6 and last["ema/0.95"] < 1e-6


# A recipe of improved MeanFlow that names no sizes.
IMF = """
import sys
sys.path.insert(0, ".")
from dataclasses import replace

from meanflow import run
from recipes.digits_cfg import RECIPE

run(replace(RECIPE, net={}))
"""


def on_cpu(folder: Path) -> list[str]:
    """A launch of two sharded processes here."""
    (folder / "on_cpu.py").write_text(ON_CPU)
    launch = [*ACCELERATE, "accelerate_configs/fsdp2.yaml", "--num_processes=2", "--main_process_port=0"]
    return [*launch, str(folder / "on_cpu.py")]


def test_sharded_processes_train_save_and_resume_the_same_network(weights, tmp_path):
    """FSDP2 of blocks and root, of averages and Adam: saved as one process does, and resumed by either."""
    sharded = on_cpu(tmp_path)
    more = ["--objective.kappa", "0.5", "--steps", "8", "--lr", RATE, "--checkpoint-every", "1", "--keep", "9"]
    one, two = tmp_path / "one", tmp_path / "two"
    for launch, out in ((ONE, one), (sharded, two)):
        finish(start(*launch, *DIGITS, *more, "--init-from", str(weights), "--out", str(out)))
    assert apart(one / "step-00000001", two / "step-00000001")["gradient"] < 1e-6
    last = apart(one / "step-00000005", two / "step-00000005")
    print(last)
    assert last["model"] < 1e-6 and last["ema/0.95"] < 1e-6
    for launch in (ONE, sharded):
        for step in (6, 7, 8):
            (two / f"step-{step:08d}").rename(tmp_path / f"{step} before {Path(launch[-1]).name}")
        text = finish(start(*launch, *DIGITS, *more, "--init-from", str(weights), "--out", str(two)))
        assert "resumes after step 5 of 8" in text
        last = apart(one / "step-00000008", two / "step-00000008")
        print(last)
        assert last["model"] < 1e-6 and last["ema/0.95"] < 1e-6 and last["gradient"] < 1e-6


def test_sharded_processes_train_the_same_network_in_bf16(weights, tmp_path):
    """Blocks are gathered as autocast rounds them, and computed twice; times and their embedders stay float32.

    A bfloat16 has 8 bits, and the gradients of a step's forwards are added in it: 2^-8.
    """
    more = ["--mixed-precision", "bf16", "--activation-checkpointing", "--objective.kappa", "0.5", "--steps", "5"]
    more += ["--lr", RATE, "--checkpoint-every", "1", "--keep", "9", "--init-from", str(weights), "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    for launch, out in ((ONE, one), (on_cpu(tmp_path), two)):
        finish(start(*launch, *DIGITS, *more, str(out)))
    first, last = (apart(one / step, two / step) for step in ("step-00000001", "step-00000005"))
    print(first, last)
    assert first["gradient"] < 2**-8 and last["model"] < 1e-5 and last["ema/0.95"] < 1e-5
    for line, other in zip(read_log(one / "log.jsonl"), read_log(two / "log.jsonl")):
        assert other["du_dt"] == pytest.approx(line["du_dt"], rel=1e-3)


WEIGHTED = """
from pathlib import Path

import torch
from torch import nn

from meanflow import MeanFlow, MeanFlowConfig, Output, TrainConfig, run


class Weighted(MeanFlow):
    def __init__(self, net, config):
        super().__init__(net, config)
        self.weighting = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, batch, step):
        out = super().forward(batch, step)
        log_variance = self.weighting(torch.ones_like(out.loss).view(1, 1)).sum()
        return Output(out.loss / log_variance.exp() + log_variance, out.metrics)


RECIPE = TrainConfig(
    out=Path("run"), model="DiT-XS/4", objective=MeanFlowConfig(kappa=0.5), steps=6, global_batch=16, lr=2e-6,
    ema_decay=(0.95,), checkpoint_every=3, keep=9, log_every=1,
)

if __name__ == "__main__":
    run(RECIPE, objective=Weighted)
"""


def test_a_weighting_of_ones_own_is_sharded_saved_and_resumed(weights, tmp_path):
    """On two shards as on one process; saved by one and resumed by the other."""
    (tmp_path / "recipe.py").write_text(WEIGHTED)
    flags = [str(tmp_path / "recipe.py"), "--init-from", str(weights), "--out"]
    for launch, out in ((ONE, "one"), (on_cpu(tmp_path), "two")):
        finish(start(*launch, *flags, str(tmp_path / out)))
    one, two = (load_file(tmp_path / f"{out}/step-00000006/objective.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() == {f"weighting.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-5 * value.norm(), name
    assert apart(tmp_path / "one/step-00000003", tmp_path / "two/step-00000003")["gradient"] < 1e-5
    assert apart(tmp_path / "one/step-00000006", tmp_path / "two/step-00000006")["model"] < 1e-6
    (tmp_path / "two/step-00000006").rename(tmp_path / "moved")
    assert "resumes after step 3 of 6" in finish(start(*ONE, *flags, str(tmp_path / "two")))
    assert apart(tmp_path / "one/step-00000006", tmp_path / "two/step-00000006")["model"] < 1e-6
