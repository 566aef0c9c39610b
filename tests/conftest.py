"""What several tests share.

GPUs are hidden, so that what is asserted of CPUs stays true on a machine that has one; `pytest --cuda` shows them.
"""

import multiprocessing
import os
import runpy
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from local_hub import HUB
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig
from meanflow.objectives import OBJECTIVES, improved
from meanflow.objectives.base import Batch, Objective
from meanflow.objectives.draws import Draws, guided_rows
from models.dit import DiT
from models.imf import IMF
from models.unet import UNet, UNetCifar


def pytest_addoption(parser) -> None:
    parser.addoption("--cuda", action="store_true", help="show the GPUs, and run only the tests that need one")


def pytest_configure(config) -> None:
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch has not looked yet


def pytest_collection_modifyitems(config, items) -> None:
    needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
    others = [item for item in items if not item.get_closest_marker("cuda")]
    items[:], left_out = (needs_gpu, others) if config.getoption("--cuda") else (others, needs_gpu)
    config.hook.pytest_deselected(items=left_out)


def pytest_pyfunc_call(pyfuncitem) -> bool | None:
    """Runs a test that is marked `apart` in a fork of this process.

    A backward of fake tensors starts threads of autograd, after which the tests that fork could not train any more.
    """
    if pyfuncitem.get_closest_marker("apart") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        try:
            pyfuncitem.obj(**arguments)
            sender.send(None)
        except BaseException:
            sender.send(traceback.format_exc())

    child = context.Process(target=work)
    child.start()
    sender.close()
    try:
        failure = receiver.recv()
    except EOFError:
        failure = "the process ended without a word"
    child.join()
    assert failure is None, failure
    return True


torch.set_num_threads(1)  # pytest-xdist runs one process per core
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def hub(monkeypatch) -> hub_server.Hub:
    """The Hub, empty and without faults, and a token that may write."""
    HUB.__init__()
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    return HUB


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """The folder as a disk of its own in memory, which fills up for real; only root may mount one."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mount needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # a tracker may still be closing its files


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the expected tensor's largest entry, in float32."""
    error = (actual.detach() - expected).abs().max()
    assert error <= 1e-5 * expected.abs().max(), f"off by {error:.3g}, largest entry {expected.abs().max():.3g}"


def perturbed(net: nn.Module, std: float = 0.1) -> nn.Module:
    """The network with noise on its weights: a fresh one returns 0, of which nearly everything holds."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=generator).to(p)
    return net


def batch_of(x: Tensor, y: Tensor | None, draws, **cond: Tensor) -> Batch:
    """What an objective's forward takes."""
    return Batch(x, draws, cond if y is None else {"y": y, **cond})


def guided_draws(config, e: Tensor, t: Tensor, r: Tensor, drop: Tensor, **cond: Tensor) -> Draws:
    """The draws with the rows that guidance changes, as make_draws finds them."""
    draws, rows = Draws(e, t, r, drop, cond=cond).to("cpu"), None
    if isinstance(config, ImprovedMeanFlowConfig):
        rows = improved.guided_rows(config, draws.t, draws.drop, draws.cond)
    elif config.guided:
        rows = guided_rows(config, draws.t, draws.drop)
    return replace(draws, guided=rows).to(e.device)


def small_dit(**changes) -> DiT:
    settings = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return perturbed(DiT(**{**settings, "num_classes": 5, **changes}))


def zoo(make: Callable[..., nn.Module], fresh: bool = False) -> nn.Module:
    """A small network with 5 classes; perturbed, unless it is to be fresh."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make(num_classes=5)
    return net if fresh else perturbed(net, 0.05)


ZOO = {
    "DiT": partial(zoo, partial(DiT, 4, 2, 3, 32, 2, 2)),
    "DiT of volumes": partial(zoo, partial(DiT, (2, 4, 6), 2, 3, 32, 2, 2)),
    "UNet": partial(zoo, partial(UNet, 8, 3, (16, 32), (False, True), 1, 0.2)),
    # 16 x 16, where it has attention on the way down and up.
    "UNet-cifar": partial(zoo, partial(UNetCifar, 16, 3, 3, 16, (1, 2), 1, 0.2, 6)),
}  # name: a constructor
# Networks that are told the CFG scale.
TOLD = {
    "iMF": partial(zoo, partial(IMF, 4, 2, 3, 32, 3, 2, aux_head_depth=2)),
    "DiT, omega": partial(zoo, partial(DiT, 4, 2, 3, 32, 2, 2, takes_omega=True)),
    "UNet, omega": partial(zoo, partial(UNet, 8, 3, (16, 32), (False, True), 1, takes_omega=True)),
    "UNet-cifar, omega": partial(zoo, partial(UNetCifar, 8, 3, 3, 16, (1, 1), 1, 0.0, takes_omega=True)),
}

# Each network with the guided objective that goes with it.
GUIDED = MeanFlowConfig(omega=0.2, kappa=0.92, t_end=0.75)
GUIDED_ZOO = {name: (make, GUIDED) for name, make in ZOO.items()}
GUIDED_ZOO |= {name: (make, ImprovedMeanFlowConfig()) for name, make in TOLD.items()}


def guided(name: str) -> Objective:
    make, config = GUIDED_ZOO[name]
    return OBJECTIVES[type(config)](make(), config)


def save_photos(folder: Path, count: int) -> None:
    """Real photographs, `count` of each class: crops of scikit-learn's two sample images, of many sizes, as JPEG."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    for name, image in zip(("china", "flower"), load_sample_images().images):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            height, width = random.integers(40, 300, size=2)
            top, left = random.integers(image.shape[0] - height), random.integers(image.shape[1] - width)
            crop = image[top : top + height, left : left + width]
            Image.fromarray(crop).save(folder / name / f"{number:03d}.jpg", quality=95)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, 20)
    return folder


def save_vae(folder: Path, seed: int = 0) -> Path:
    """A small AutoencoderKL of random weights with the shape of Stable Diffusion's: 1/8 of the side, 4 channels."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae"))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def golden(request) -> dict[str, Tensor]:
    torch.backends.cudnn.allow_tf32 = False  # float32 to its last digits
    return load_file(GOLDEN / "meanflow_dit.safetensors", device=request.param)


@pytest.fixture
def golden_net(golden: dict[str, Tensor]) -> DiT:
    net = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=10)
    net.to(golden["fwd.t"].device)
    net.load_state_dict({name[2:]: value for name, value in golden.items() if name.startswith("w.")})
    return net


def imf_weights(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the golden improved MeanFlow by the names of models/imf.py, whose MLP is timm's."""
    for old, new in {"mlp.w1": "mlp.fc1_g", "mlp.w3": "mlp.fc1_x", "mlp.w2": "mlp.fc2"}.items():
        official = {name.replace(old, new): value for name, value in official.items()}
    return official


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory) -> Path:
    """A run on the digits that is over, with pipeline/ in it; its network is no fresh one."""
    from accelerate.state import AcceleratorState

    from meanflow.config import TrainConfig
    from meanflow.training.trainer import Trainer
    from models import MODELS

    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    perturbed(MODELS["DiT-XS/4"](input_size=8, in_channels=1, num_classes=10), 0.02).save_pretrained(folder / "net")
    recipe = TrainConfig(
        out=folder / "run", model="DiT-XS/4", steps=2, global_batch=16, ema_decay=(0.9, 0.5),
        init_from=str(folder / "net"),
    )  # fmt: skip
    Trainer(recipe).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return recipe.out


@pytest.fixture
def tool(monkeypatch, capfd) -> Callable[..., str]:
    """Runs a tool or a recipe in this process; what it printed, or the line it ended with."""

    from accelerate.state import AcceleratorState

    root = Path(__file__).parents[1]

    def call(name: str, *flags) -> str:
        path = root / (f"{name}.py" if "/" in name else f"tools/{name}.py")
        monkeypatch.setattr("sys.argv", [str(path), *map(str, flags)])
        monkeypatch.setenv("HF_HUB_OFFLINE", "")  # which --smoke sets: to be restored
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            shown = capfd.readouterr()
            errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
            return str(end.code) if isinstance(end.code, str) else errors[-1] if errors else shown.out + shown.err
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return "".join(capfd.readouterr())

    return call
