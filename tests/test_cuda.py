"""What only a GPU shows: `pytest --cuda` answers all of it. The golden numbers run there, too."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import GUIDED, GUIDED_ZOO, ZOO, batch_of, guided, perturbed
from safetensors.torch import load_file

from meanflow.config import ImprovedMeanFlowConfig, TrainConfig
from meanflow.data.loader import make_loader
from meanflow.data.sources import digits, load_data
from meanflow.evaluation.distances import energy_distance
from meanflow.noise import noise
from meanflow.objectives.draws import order_slots
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import checkpoints, load_network
from meanflow.sampler import average_velocity, sample
from meanflow.training.compile import compile_objective
from meanflow.training.log import read_log
from meanflow.training.optimizer import make_optimizer
from meanflow.training.trainer import Trainer

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not --cuda")]
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        out=tmp_path / "run", model="DiT-XS/4", objective=GUIDED, steps=8, global_batch=32, lr=1e-3,
        ema_decay=(0.9,), checkpoint_every=4, keep=9, log_every=1000, sample_every=1000,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


def on_gpu(objective: MeanFlow, step: int):
    """A guided batch of 32 on the GPU."""
    net, config = objective.net, objective.config
    slots = order_slots(config, range(step * 32, step * 32 + 32), 32)
    draws = objective.make_draws(config, net.z_shape, 0, slots).to("cuda")
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, *net.z_shape, generator=generator)
    return batch_of(x.to("cuda"), torch.randint(5, (32,), generator=generator).to("cuda"), draws)


def loss_and_gradient(objective: MeanFlow, step: int) -> tuple[float, torch.Tensor]:
    torch.manual_seed(step)
    objective.zero_grad()
    loss = objective(on_gpu(objective, step)).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def test_evaluation_on_a_gpu_is_that_on_the_cpu(recipe):
    """Of the same averaged network, by the sampler itself."""
    Trainer(replace(recipe, eval_every=8, eval_images=200)).train()
    (found,) = [line["eval_energy"] for line in read_log(recipe.out / "log.jsonl") if "eval_energy" in line]
    net, y = load_network(checkpoints(recipe.out)[-1]), torch.arange(200) % 10
    with torch.no_grad():
        x = sample(lambda z, t, r: average_velocity(net, z, t, r, {"y": y}), noise(0, range(200), (1, 8, 8)))
    rounded = [((part.clamp(-1, 1) + 1) * 127.5).round().flatten(1) / 127.5 - 1 for part in (x, digits()[1].x)]
    assert found == pytest.approx(energy_distance(*rounded), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"triton.cudagraphs": True}], ids=["compiled", "in CUDA graphs"])
@pytest.mark.parametrize("name", GUIDED_ZOO)
def test_compiled_steps_are_the_eager_ones(name, options):
    """With dropout by PyTorch's own generator; in CUDA graphs without dropout, whose masks would differ."""
    torch._dynamo.reset()
    objective, compiled = guided(name).cuda(), guided(name).cuda()
    if options:
        objective.eval(), compiled.eval()
    compile_objective(compiled, fallback_random=not options, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            (loss, gradient), (found, found_gradient) = (loss_and_gradient(o, step) for o in (objective, compiled))
            assert found == pytest.approx(loss, rel=1e-5)
            assert (found_gradient - gradient).norm() < 1e-4 * gradient.norm()


IMF = {"model": "iMF-B/2", "net": {"depth": 3, "hidden_size": 64, "num_heads": 4, "aux_head_depth": 2}}
WAITLESS = {
    "DiT": {"model": "DiT-XS/4"},
    "UNet": {"model": "UNet-digits"},
    "iMF": {**IMF, "objective": ImprovedMeanFlowConfig()},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("changes", WAITLESS.values(), ids=WAITLESS)
def test_no_step_waits_for_the_gpu(recipe, changes, compiled, monkeypatch):
    """PyTorch raises where the host would wait; watched from the third step on, when everything is compiled."""

    def watch(method):
        def watched(self, *args):
            is_watched = 2 <= self.step < self.total - 1 and self.step % 4 != 3  # no checkpoint
            torch.cuda.set_sync_debug_mode("error" if is_watched else "default")
            try:
                return method(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return watched

    for name in ("train_step", "after_step"):
        monkeypatch.setattr(Trainer, name, watch(getattr(Trainer, name)))
    Trainer(replace(recipe, **changes, compile=compiled)).train()


def test_draws_are_in_pinned_memory(recipe):
    batch = next(iter(make_loader(recipe, MeanFlow, load_data(recipe), range(1))))
    assert batch.x.is_pinned() and batch.draws.e.is_pinned() and batch.draws.guided.rows.is_pinned()


def test_a_step_with_an_infinite_gradient_moves_nothing(recipe):
    """The fused optimiser reads found_inf on the device."""
    objective = MeanFlow(ZOO["DiT"]().cuda(), GUIDED)
    optimizer = make_optimizer(objective, recipe)
    for p in objective.parameters():
        p.grad = torch.full_like(p, torch.inf)
    before = [p.clone() for p in objective.parameters()]
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(objective.parameters(), before))


def test_bf16_is_near_the_official_numbers(golden, golden_net):
    """Times stay float32, so the error is that of the layers."""
    z, t, r, y = (golden[f"fwd.{name}"].cuda() for name in ("z_nchw", "t", "r", "y"))
    net = golden_net.cuda()
    exact = net(z, t, t - r, y.long())
    with torch.autocast("cuda", torch.bfloat16):
        rounded = net(z, t, t - r, y.long())
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(recipe, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        Trainer(replace(recipe, compile=compiled)).train()
        last = recipe.out / "step-00000008"
        last.rename(tmp_path / "straight")
        Trainer(replace(recipe, compile=compiled)).train()
    finally:
        torch.use_deterministic_algorithms(False)
    for part in ("model/diffusion_pytorch_model", "ema/0.9/diffusion_pytorch_model", "optimizer"):
        straight, resumed = (load_file(folder / f"{part}.safetensors") for folder in (tmp_path / "straight", last))
        assert all(torch.equal(resumed[name], value) for name, value in straight.items()), part


@pytest.mark.parametrize("config", ["multi_gpu.yaml", "fsdp2.yaml"], ids=["NCCL", "FSDP2"])
def test_a_launch_on_one_gpu_trains_as_without_it(config, recipe, tmp_path):
    """A process group of one process, and shards of one GPU."""
    weights = perturbed(Trainer(replace(recipe, out=tmp_path / "none")).net.cpu())
    weights.save_pretrained(tmp_path / "weights")
    AcceleratorState._reset_state(reset_partial_state=True)
    begin = replace(recipe, init_from=str(tmp_path / "weights"), lr=2e-6)
    Trainer(begin).train()
    flags = ["--model", "DiT-XS/4", "--steps", "8", "--global-batch", "32", "--lr", "2e-6", "--ema-decay", "0.9"]
    flags += ["--objective.meanflow-ratio", "0.25", "--objective.time-sampler", "v0", "--objective.P-mean", "-0.4"]
    flags += ["--objective.P-std", "1", "--objective.P-mean-r", "None", "--objective.P-std-r", "None"]
    flags += ["--objective.norm-p", "1", "--objective.omega", "0.2", "--objective.kappa", "0.92", "--objective.t-end"]
    flags += ["0.75", "--objective.class-dropout-prob", "0.1", "--schedule", "constant", "--warmup-steps", "0"]
    flags += ["--betas", "0.9", "0.95", "--init-from", str(tmp_path / "weights"), "--out", str(tmp_path / "launched")]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "-q", "--num_processes=1", "--config_file"]
    command = [*launch, f"accelerate_configs/{config}", "recipes/digits_dit.py", *flags]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    place = "step-00000008/model/diffusion_pytorch_model.safetensors"
    alone, launched = load_file(recipe.out / place), load_file(tmp_path / "launched" / place)
    for name, value in alone.items():
        assert (launched[name] - value).norm() <= 1e-5 * value.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("name", GUIDED_ZOO)
def test_loss_and_gradients_are_those_of_the_cpu(name):
    """Guided, so that every kind of row is there; without TF32."""
    objective, found = guided(name).eval(), []
    net, config = objective.net, objective.config
    draws = objective.make_draws(config, net.z_shape, 0, order_slots(config, range(8), 8))
    x, y = torch.randn(8, *net.z_shape), torch.randint(5, (8,))
    for device in ("cpu", "cuda"):
        objective.to(device).zero_grad()
        loss = objective(batch_of(x.to(device), y.to(device), draws.to(device))).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients).cpu()))
    (loss, gradient), (loss_gpu, gradient_gpu) = found
    assert loss_gpu == pytest.approx(loss, rel=1e-4)
    assert (gradient_gpu - gradient).norm() < 1e-3 * gradient.norm()


def test_dropout_drops_the_same_in_u_and_in_du_dt():
    """PyTorch's fused kernel has a branch of its own in the derivative."""
    from torch.nn.functional import dropout

    from meanflow.objectives.jvp import jvp

    x = torch.ones(10_000, device="cuda")
    u, du = jvp(lambda x: dropout(x, 0.25), (x,), (3 * x,))
    torch.testing.assert_close(du, 3 * u)
    assert 0.7 < (u != 0).float().mean() < 0.8
