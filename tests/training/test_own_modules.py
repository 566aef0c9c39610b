"""An objective that holds further modules: a frozen teacher, and a weighting that is trained with the network."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from meanflow.config import TrainConfig
from meanflow.objectives.base import Batch, Output
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import checkpoints, load_pipeline
from meanflow.training.optimizer import make_optimizer
from meanflow.training.preflight import Parts
from meanflow.training.trainer import Trainer


class Distillation(MeanFlow):
    """Half of the velocity is a teacher's; each time's error has a learned log-variance, of EDM2's kind."""

    def __init__(self, net, config):
        super().__init__(net, config)
        self.teacher = nn.Sequential(copy.deepcopy(net), nn.Dropout(0.5)).requires_grad_(False)
        self.weighting = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, batch: Batch, step: int) -> Output:
        self.seen.append((step, self.teacher.training, self.weighting.training))
        x, draws, cond = batch
        t = draws.t.view(-1, 1, 1, 1)
        z_t = (1 - t) * x + t * draws.e
        v = (draws.e - x + self.teacher[0](z_t, draws.t, 0 * draws.t, cond["y"])) / 2
        error = (self.u(z_t, draws.t, draws.t, cond) - v).square().flatten(1).mean(dim=1)
        log_variance = self.weighting(draws.t[:, None])[:, 0]
        loss = (self.scale * error / log_variance.exp() + log_variance).mean()
        return Output(loss, {"error": error.detach().mean()})

    def parameter_groups(self, lr: float) -> list[dict]:
        own = [*self.weighting.parameters(), self.scale]
        return [{"params": list(self.net.parameters()), "lr": lr}, {"params": own, "lr": 10 * lr}]


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    yield TrainConfig(
        out=tmp_path / "run", model="DiT-XS/8", steps=6, global_batch=16, lr=1e-3, ema_decay=(0.9,),
        schedule="cosine", log_every=1, checkpoint_every=3, keep=9,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)


def train(recipe: TrainConfig) -> Trainer:
    trainer = Trainer(recipe, Parts(objective=Distillation))
    trainer.train()
    return trainer


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.name} {k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}


def test_a_teacher_is_in_no_checkpoint_and_a_weighting_resumes_bit_for_bit(recipe, tmp_path):
    """Weights, running statistics, Adam's state of both, and a parameter of the objective itself."""
    trainer = train(recipe)
    saved = load_file(recipe.out / "step-00000006/objective.safetensors")
    assert saved.keys() == {"scale", *(f"weighting.{name}" for name in trainer.bare.weighting.state_dict())}
    assert not torch.equal(saved["scale"], torch.ones(())) and saved["weighting.1.num_batches_tracked"] == 6
    everything = tensors(recipe.out / "step-00000006")
    assert not any("teacher" in name for name in everything)
    assert "optimizer.safetensors weighting.0.weight.exp_avg" in everything
    (recipe.out / "step-00000006").rename(tmp_path / "moved")
    train(recipe)
    again = tensors(recipe.out / "step-00000006")
    assert again.keys() == everything.keys()
    assert all(torch.equal(value, again[name]) for name, value in everything.items())


def test_a_frozen_teacher_stays_in_evaluation_mode_and_does_not_move(recipe):
    trainer = train(recipe)
    assert [step for step, *_ in trainer.bare.seen] == list(range(6))
    assert all(not teacher and weighting for _, teacher, weighting in trainer.bare.seen)
    fresh = Trainer(replace(recipe, out=recipe.out.with_name("fresh")), Parts(objective=Distillation))
    for a, b in zip(trainer.bare.teacher.parameters(), fresh.bare.teacher.parameters()):
        assert torch.equal(a, b)


def test_an_export_holds_only_the_network(recipe):
    trainer = train(recipe)
    assert [path.parent.name for path in (recipe.out / "pipeline").rglob("*.safetensors")] == ["net"]
    pipe = load_pipeline(recipe.out / "pipeline")
    for a, b in zip(pipe.net.parameters(), trainer.averages.nets["0.9"].parameters()):
        assert torch.equal(a, b)


def test_the_schedule_scales_each_groups_own_rate(recipe):
    trainer = train(recipe)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates[1] == pytest.approx(10 * rates[0]) and 0 < rates[0] < 1e-3
    resumed = Trainer(replace(recipe, resume=str(checkpoints(recipe.out)[0])), Parts(objective=Distillation))
    resumed.restore()
    assert [group["initial_lr"] for group in resumed.optimizer.param_groups] == pytest.approx([1e-3, 1e-2])


def test_weight_decay_spares_norms_biases_and_embeddings(recipe):
    trainer = Trainer(replace(recipe, weight_decay=0.1), Parts(objective=Distillation))
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is torch.optim.AdamW
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {id(p): name for name, p in trainer.bare.named_parameters() if p.requires_grad}
    assert decayed | spared == names.keys() and not decayed & spared
    assert {names[p] for p in spared} >= {"net.y_embedder.embedding_table.weight", "weighting.1.weight", "scale"}
    assert all(names[p].endswith("weight") and "norm" not in names[p] for p in decayed)


def test_an_optimiser_that_cannot_skip_a_step_is_refused(recipe):
    """It would take the step whose gradient is not finite."""
    objective = Distillation(nn.Linear(2, 2), recipe.objective)
    for fused in (True, False):
        with_momentum = lambda groups, recipe, fused=fused: torch.optim.SGD(groups, recipe.lr, 0.9, fused=fused)  # noqa: E731
        if fused:
            assert len(make_optimizer(objective, recipe, with_momentum).param_groups) == 2
        else:
            with pytest.raises(ValueError, match="optimizer SGD cannot skip a step whose gradient is not finite: give"):
                make_optimizer(objective, recipe, with_momentum)


def test_an_optimiser_of_ones_own_trains(recipe):
    def momentum(groups, recipe):
        return torch.optim.SGD(groups, recipe.lr, 0.9, fused=True)

    trainer = Trainer(recipe, Parts(optimizer=momentum))
    trainer.train()
    assert any(
        name.endswith("momentum_buffer") for name in load_file(recipe.out / "step-00000006/optimizer.safetensors")
    )
