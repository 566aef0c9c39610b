"""tools/experiments.py: runs that judge themselves, go on after a kill and become a page; the arms that are wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import perturbed
from safetensors.torch import load_file

from meanflow import MeanFlowConfig, TrainConfig
from meanflow.objectives.base import Batch
from meanflow.objectives.draws import make_draws
from meanflow.objectives.meanflow import mean_velocity_target
from models.dit import DiT
from recipes.experiments import cifar10, memorise, ratio, tangent, time_input
from recipes.experiments.base import Arm, Claim, Experiment, Results, digits_with, energy_of_one_step

ROOT = Path(__file__).parents[1]
SIZES = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def small(monkeypatch) -> Experiment:
    """An experiment of three steps and two seeds, under a name that has none of this scale."""
    recipe = replace(digits_with(steps=3), warmup_steps=0, checkpoint_every=1, model="DiT-XS/8", ema_decay=(0.1,))
    arms = {f"lr {lr:g}": Arm(replace(recipe, lr=lr), paper=1000 * lr) for lr in (1e-3, 1e-2)}

    def judge(results: Results) -> list[Claim]:
        return [Claim("they differ", results.mean("lr 0.001", "energy") != results.mean("lr 0.01", "energy"))]

    experiment = Experiment("What does the rate do?", arms, energy_of_one_step, judge, seeds=2)
    monkeypatch.setattr(cifar10, "TINY", experiment)
    return experiment


def test_experiment_judges_itself_and_becomes_a_page(small, tool, tmp_path, monkeypatch):
    """A second start trains nothing; the page has both arms, the paper's figures, the spread, and a plot."""
    shown = tool("experiments", "run", "cifar10", "--out", tmp_path)
    assert (
        "holds: they differ" in shown and shown.count("(was there)") == 0 and "[4/4] cifar10, lr 0.01, seed 1" in shown
    )
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("end.json")}
    assert len(times) == 4
    again = tool("experiments", "run", "cifar10", "--out", tmp_path)
    assert again.count("(was there)") == 4 and times == {path: path.stat().st_mtime_ns for path in times}
    tool("experiments", "report", "--out", tmp_path, "--page", tmp_path / "docs/found.md")
    page = (tmp_path / "docs/found.md").read_text()
    assert "- holds: they differ" in page and "| arm | paper | energy |" in page and "±" in page
    assert (tmp_path / "docs/found/cifar10.png").stat().st_size > 5000


def test_run_that_was_killed_goes_on(small, tool, tmp_path):
    """Amid an arm, of which the first checkpoints are there: the rest is trained, and the numbers are the same."""
    tool("experiments", "run", "cifar10", "--out", tmp_path / "straight")
    tool("experiments", "run", "cifar10", "--out", tmp_path / "killed")
    for folder in (tmp_path / "killed/tiny/runs").iterdir():
        for name in ("end.json", "cifar10.json", "pipeline"):
            path = folder / name
            path.unlink() if path.is_file() else path.rename(folder / "gone")
        (folder / "step-00000003").rename(folder / "later")
        break
    shown = tool("experiments", "run", "cifar10", "--out", tmp_path / "killed")
    assert shown.count("(was there)") == 3
    for folder in (tmp_path / "straight/tiny/runs").iterdir():
        one, two = (tmp_path / name / "tiny/runs" / folder.name / "cifar10.json" for name in ("straight", "killed"))
        assert json.loads(one.read_text()) == json.loads(two.read_text())


def test_criterion_that_fails_is_exit_code_1(small, tool, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "TINY", replace(small, judge=lambda _: [Claim("pigs fly", False)], seeds=1))
    ends = []
    real = sys.exit
    monkeypatch.setattr(sys, "exit", lambda code=None: ends.append(code) or real(code))
    assert "FAILS: pigs fly" in tool("experiments", "run", "cifar10", "--out", tmp_path)
    assert ends == [1]


def test_arm_that_diverges_counts_as_the_worst(small, tool, tmp_path, monkeypatch):
    """It is not trained again, and the others are."""
    wild = replace(small.arms["lr 0.01"].recipe, lr=1e38, max_skipped=1, steps=6)
    arms = {"wild": Arm(wild), **small.arms}
    judge = lambda results: [Claim("wild is infinite", results.mean("wild", "energy") == float("inf"))]  # noqa: E731
    monkeypatch.setattr(cifar10, "TINY", replace(small, arms=arms, judge=judge, seeds=1))
    for _ in range(2):
        assert "holds: wild is infinite" in tool("experiments", "run", "cifar10", "--out", tmp_path)


def test_names_are_checked(tool, tmp_path):
    assert "there is no experiment ration of scale tiny: cfg, cifar10-short," in tool("experiments", "run", "ration")
    assert "has no finished experiment" in tool("experiments", "report", "ratio", "--out", tmp_path)


def test_arms_of_one_recipe_are_one_run():
    """The base arm of the tangents is the ratio of 0.5, trained once."""
    from tools.experiments import Options, Runner

    runner = Runner(Options("run"))
    shared = {runner.place(arm, 0)[0] for arm in (tangent.TINY.arms["(v, 0, 1)"], ratio.TINY.arms["0.5"])}
    others = {runner.place(arm, seed)[0] for seed in (0, 1) for arm in tangent.TINY.arms.values()}
    assert len(shared) == 1 and shared < others and len(others) == 8


def test_wrong_tangents_are_what_they_say():
    """The target's du/dt is torch.func.jvp's along that tangent."""
    torch.manual_seed(0)
    net = perturbed(DiT(**SIZES, num_classes=0)).double()
    z, v = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
    r, t = torch.rand(2, 3, dtype=torch.float64).sort(0).values
    u_fn = lambda z, t, r: net(z, t, t - r)  # noqa: E731
    found = {}
    for name, arm in tangent.TINY.arms.items():
        kind = arm.parts.get("objective", tangent.MeanFlow)
        objective = kind(net, MeanFlowConfig())
        found[name] = mean_velocity_target(u_fn, z, t, r, v, objective.jvp)[2]
        dr, dt = (float(number) for number in name.strip("(v)").split(",")[1:])
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            expected = torch.func.jvp(u_fn, (z, t, r), (v, dt * torch.ones_like(t), dr * torch.ones_like(r)))[1]
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9)
    assert len({round(float(value.norm()), 6) for value in found.values()}) == 4


def test_networks_are_told_of_what_their_names_say(tmp_path):
    """TimesTR of t and r, TimesH of t - r alone; TimesTRH differs by r, and comes back from its file."""
    plain = perturbed(DiT(**SIZES, num_classes=0))
    z, t, h = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.6]), torch.tensor([0.5, 0.1])
    for kind, times in ((time_input.TimesTR, (t, t - h)), (time_input.TimesH, (0 * t, h))):
        net = kind(**SIZES, num_classes=0)
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(z, t, h), plain(z, *times))
    net = perturbed(time_input.TimesTRH(**SIZES, num_classes=0))
    assert not torch.equal(net(z, t, h), net(z, t + 0.1, h))
    net.save_pretrained(tmp_path)
    again = time_input.TimesTRH.from_pretrained(tmp_path)
    torch.testing.assert_close(again(z, t, h), net(z, t, h))
    assert any("second" in name for name in load_file(tmp_path / "diffusion_pytorch_model.safetensors"))


def test_fixed_times_belong_to_the_pair():
    """The same noise has the same times in any slot; other noise has others."""
    net, config = perturbed(DiT(**SIZES, num_classes=0)), MeanFlowConfig(meanflow_ratio=0.0)
    seen = []
    objective = memorise.FixedTimes(net, config)
    objective.net.forward = lambda z, t, h: seen.append(t) or torch.zeros_like(z)
    e = torch.randn(4, 1, 8, 8)
    for first in (0, 100):
        draws = replace(make_draws(config, (1, 8, 8), 0, range(first, first + 4)), e=e)
        objective(Batch(torch.randn(4, 1, 8, 8), draws, {}))
    assert torch.equal(seen[0], seen[1]) and len(set(seen[0].tolist())) == 4


def test_every_arm_has_a_recipe_that_can_be():
    """Of every experiment and scale: its batch divides, its network can be made, and it has a question."""
    from meanflow.data.loader import SlotBatches
    from meanflow.objectives.meanflow import MeanFlow
    from tools.experiments import all_experiments

    for scale in ("tiny", "paper"):
        for name, experiment in all_experiments(scale).items():
            assert "?" in experiment.question and experiment.arms, name
            for arm in experiment.arms.values():
                assert arm.recipe is None or isinstance(arm.recipe, TrainConfig)
                if arm.recipe is not None:
                    SlotBatches(arm.recipe, MeanFlow, 1000, range(1))
