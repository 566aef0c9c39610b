"""Between two lines of the log nothing makes the host wait for the device: counted in the real, eager loop.

On a CPU nothing waits, so what would wait on a GPU is counted. tests/test_cuda.py lets PyTorch itself look.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import save_photos
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from caching.shards import write_random
from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig, TrainConfig
from meanflow.objectives.draws import Draws
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training.guard import HostCopy
from meanflow.training.trainer import Trainer

BY_NAME = {"tolist", "item", "numpy", "cpu", "__array__"} | {"tensor", "as_tensor", "from_numpy"}
BY_NAME |= {f"__{name}__" for name in ("bool", "index", "int", "float", "complex")}
BY_OPERATION = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits:
    """What made the host wait, by name, while it was watched."""

    def __init__(self):
        self.found, self.watching = [], False

    def note(self, name: str) -> None:
        if self.watching:
            self.found.append(name)

    @contextmanager
    def watch(self, watching: bool = True) -> Iterator[None]:
        before, self.watching = self.watching, watching
        yield
        self.watching = before


class Functions(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in BY_NAME:
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        indices = args[1] if name in BY_MASK else ()
        if name in BY_OPERATION or any(i is not None and i.dtype == torch.bool for i in indices):
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(trainer: Trainer, monkeypatch) -> Iterator[Waits]:
    """Counts in all steps but the last, which writes the log, a checkpoint and samples."""
    waits = Waits()

    def watched(method):
        def call(*args):
            with waits.watch(trainer.step < trainer.total - 1):
                return method(*args)

        return call

    def unwatched(method):
        def call(*args):
            with waits.watch(False):
                return method(*args)

        return call

    def read(copy: HostCopy):
        if copy.step == trainer.step - 1:  # of the step that is queued now
            waits.note("HostCopy.read")
        with waits.watch(False):
            return real_read(copy)

    def make(copy: HostCopy, tensor) -> None:
        copy.step = trainer.step - 1
        real_init(copy, tensor)

    real_read, real_init = HostCopy.read, HostCopy.__init__
    monkeypatch.setattr(HostCopy, "read", read)
    monkeypatch.setattr(HostCopy, "__init__", make)
    # These two look at values only where the tensors are on the CPU.
    monkeypatch.setattr(MeanFlow, "check_batch", unwatched(MeanFlow.check_batch))
    monkeypatch.setattr(Draws, "__post_init__", unwatched(Draws.__post_init__))
    trainer.train_step, trainer.after_step = watched(trainer.train_step), watched(trainer.after_step)
    with ExitStack() as stack:
        stack.enter_context(Functions(waits))
        stack.enter_context(Operations(waits))
        yield waits


def count(recipe: TrainConfig, monkeypatch) -> list[str]:
    trainer = Trainer(recipe)
    with counted(trainer, monkeypatch) as waits:
        trainer.train()
    return waits.found


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        out=tmp_path / "run", model="DiT-XS/4", steps=4, global_batch=16, ema_decay=(0.9, 0.5), workers=0,
        objective=MeanFlowConfig(omega=0.5, kappa=0.5, t_end=0.75),
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


SMALL = {
    "iMF": {"depth": 2, "hidden_size": 32, "num_heads": 2, "aux_head_depth": 1},
    "UNet-cifar": {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "dropout": 0.2, "augment_dim": 6},
    "UNet": {"block_out_channels": (16, 32), "attention": (False, True), "layers_per_block": 1, "dropout": 0.2},
}
CHANGES = {
    "clipping": {"max_grad_norm": 1.0, "weight_decay": 0.1},
    "accumulation": {"accumulation_steps": 2, "activation_checkpointing": True},
    "bf16": {"mixed_precision": "bf16"},
    "UNet-cifar": {"model": "UNet-cifar", "net": SMALL["UNet-cifar"], "augment": 0.5},
    "UNet": {"model": "UNet-digits", "net": SMALL["UNet"]},
    "iMF": {"model": "iMF-B/2", "net": SMALL["iMF"], "objective": ImprovedMeanFlowConfig()},
    "DiT, omega": {"net": {"takes_omega": 1}, "objective": ImprovedMeanFlowConfig(prediction="x")},
    "volumes": {"data": "shapes", "objective": MeanFlowConfig(prediction="x", channel_weights="inverse-variance")},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_no_step_waits(recipe, changes, monkeypatch):
    assert count(replace(recipe, **changes), monkeypatch) == []


def test_no_step_waits_with_cached_latents(recipe, tmp_path, monkeypatch):
    write_random(tmp_path / "cache", 32, "random", 0.5, 32)
    latents = {"data": str(tmp_path / "cache"), "vae": "random", "scaling_factor": 0.5, "resolution": 32}
    assert count(replace(recipe, model="DiT-S/2", **latents), monkeypatch) == []


def test_no_step_waits_with_images_that_are_encoded_at_each_step(recipe, tmp_path, vae, monkeypatch):
    save_photos(tmp_path / "photos", 8)
    latents = {"data": str(tmp_path / "photos"), "vae": str(vae), "scaling_factor": 0.18215, "resolution": 32}
    assert count(replace(recipe, model="DiT-S/4", **latents), monkeypatch) == []


PLANTS = {
    "item": lambda loss: loss * (1 + 0 * loss.item()),
    "__bool__": lambda loss: loss if loss > 0 else -loss,
    "tolist": lambda loss: loss + 0 * loss.view(1).tolist()[0],
    "numpy": lambda loss: loss + 0 * float(loss.detach().numpy()),
    "tensor": lambda loss: loss * torch.tensor(1.0),
    "cpu": lambda loss: loss + 0 * loss.detach().cpu(),
    "__index__": lambda loss: loss + 0 * [1, 2][loss.detach().long().clamp(0, 1)],
    "_local_scalar_dense": lambda loss: loss + 0 * torch.zeros(3)[: loss.detach().long()].sum(),
    "nonzero": lambda loss: loss + 0 * loss.detach().view(1).nonzero().sum(),
    "index": lambda loss: loss + 0 * loss.view(1)[loss.view(1) > 0].sum(),
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_waits_is_found(recipe, name, monkeypatch):
    """Planted in the objective, each of them is counted at every step that is watched."""
    weighted_loss = MeanFlow.weighted_loss
    monkeypatch.setattr(MeanFlow, "weighted_loss", lambda *args: PLANTS[name](weighted_loss(*args)))
    assert count(recipe, monkeypatch).count(name) >= 3


def test_reading_a_step_at_once_is_found(recipe, monkeypatch):
    from meanflow.training.guard import Guard

    def observe(self, *args, real=Guard.observe):
        real(self, *args)
        self.seen.read()

    monkeypatch.setattr(Guard, "observe", observe)
    assert count(recipe, monkeypatch) == ["HostCopy.read"] * 3
