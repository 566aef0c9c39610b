"""What a run is said to cost on GPUs that are not here."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ways import Way, count_bytes
from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig, TrainConfig
from meanflow.data.loader import make_loader
from meanflow.data.sources import load_data
from meanflow.training.plan import count, render
from meanflow.training.preflight import make_net, preflight

pytestmark = pytest.mark.apart
RECIPE = TrainConfig(
    model="DiT-XS/4", objective=MeanFlowConfig(kappa=0.5), steps=1000, global_batch=64, mixed_precision="bf16",
    dry_run=True, plan=("h100", 2),
)  # fmt: skip


def make_plan(recipe: TrainConfig):
    return preflight(recipe, load_data(recipe), recipe.plan[1])


IMPROVED = {
    "model": "iMF-B/2",
    "net": {"depth": 3, "hidden_size": 32, "num_heads": 2, "aux_head_depth": 2},
    "objective": ImprovedMeanFlowConfig(),
}


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}, IMPROVED], ids=["", "again", "improved"])
def test_counts_are_those_of_a_real_step(changes):
    """FLOPs and bytes of the same micro-batch, computed."""
    recipe = replace(RECIPE, **changes)
    plan, data = make_plan(recipe), load_data(recipe)
    objective = plan.objective(make_net(recipe, data), recipe.objective).train()
    if recipe.activation_checkpointing:
        objective.net.enable_gradient_checkpointing()
    batch = next(iter(make_loader(recipe, plan.objective, data, range(1), 0, 2)))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return objective(batch).loss

    flops, size, forwards = count(plan)
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    assert flops == counter.get_total_flops() and forwards == [True, False, True]
    assert size == pytest.approx(count_bytes(Way(objective.net, [], loss)), rel=0.01)


def test_hours_and_traffic_are_arithmetic():
    """989 TFLOP/s at 40 %; 2 GPUs send half of twice the weights; the forwards and two backwards gather bfloat16."""
    plan = make_plan(RECIPE)
    flops, _, _ = count(plan)
    text, weights = render(plan), 4 * plan.net.num_parameters()
    in_all, hours = float(re.search(r"([\d.e+]+) in all", text)[1]), float(re.search(r"([\d.]+) H100-hours", text)[1])
    assert in_all == pytest.approx(flops * 2 * 1000, rel=1e-3)
    assert hours == pytest.approx(in_all / 0.4 / 989e12 / 3600, abs=0.05)
    assert f"DDP {weights / 2**20:.1f} MiB, FSDP2 {(weights / 2 * 5 + weights) / 2 / 2**20:.1f} MiB" in text


def test_weights_that_are_read_from_the_data_do_not_hinder():
    """Volumes, whose channels are weighted by their variances."""
    config = MeanFlowConfig(prediction="x", channel_weights="inverse-variance", class_dropout_prob=0.0)
    plan = make_plan(replace(RECIPE, data="shapes", objective=config))
    assert count(plan)[2] == [True, True] and "H100-hours" in render(plan)


def test_a_plan_is_for_a_dry_run():
    with pytest.raises(ValueError, match="plan must be given with dry_run"):
        replace(RECIPE, dry_run=False)
