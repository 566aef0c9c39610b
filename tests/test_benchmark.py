"""What a step costs, by exact counts; and that the tool that says so runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmark import Sample, Step, build, count, sampling, steps


@pytest.fixture(scope="module")
def counts():
    """DiT of width 384, depth 6, 6 heads, on 64 tokens, batch 32: a forward and backward each."""
    net = build(Step())
    return {name: count(net, loss) for name, loss in steps(Step(), net).items()}


@pytest.mark.slow
def test_a_meanflow_step_costs_little_more_than_flow_matching(counts):
    """FLOPs at most 1.09 at ratio 0.25 (floor 1.083) and 1.35 at 1; bytes kept for the backward at most 1.05."""
    base = counts["flow matching"]
    for name, limit in (("this project, share 0.25", 1.09), ("this project, share 1", 1.35)):
        assert counts[name]["flops"] <= limit * base["flops"]
        assert counts[name]["bytes"] <= 1.05 * base["bytes"]


@pytest.mark.slow
def test_a_meanflow_step_of_the_cifar_network_does_too():
    """In full size, in training: FLOPs at most 1.27 at ratio 0.75 (floor 1.25), bytes at most 1.05."""
    options = Step(model="UNet-cifar", input_size=32, channels=3, batch=4, ratio=(0.75, 0.25))
    net = build(options).train()
    rows = {name: count(net, loss) for name, loss in steps(options, net).items()}
    base = rows["flow matching"]
    for name, limit in (("this project, share 0.75", 1.27), ("this project, share 0.25", 1.09)):
        assert rows[name]["flops"] <= limit * base["flops"]
        assert rows[name]["bytes"] <= 1.05 * base["bytes"]


@pytest.mark.slow
def test_the_usual_way_costs_what_it_is_said_to(counts):
    """Else the comparison in the README is a straw man, or the counter counts nothing."""
    base, usual = counts["flow matching"], counts["the usual way: torch.func.jvp of the whole batch"]
    assert 1.6 < usual["flops"] / base["flops"] < 1.8 and usual["bytes"] > 1.5 * base["bytes"]


@pytest.mark.slow
def test_the_tool_prints_its_table_and_writes_it(tmp_path):
    root = Path(__file__).parents[1]
    sizes = ["--hidden-size", "16", "--depth", "1", "--num-heads", "1", "--batch", "4", "--repeats", "1"]
    command = [sys.executable, "tools/benchmark.py", "step", *sizes, "--json", str(tmp_path / "out.json")]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "this project, share 0.25" in shown.stdout
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["flops_ratio"] for row in rows][0] == 1.0 and len(rows) == 4


@pytest.mark.slow
def test_reading_latents_is_compared_with_the_usual_way(tmp_path):
    """The table is complete, and ours is not the slower one: the target, 5 times, is for a quiet machine."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "tools/benchmark.py", "data", "--count", "512", "--repeats", "1"]
    shown = subprocess.run([*command, "--json", str(tmp_path / "out.json")], cwd=root, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    usual, ours, _ = json.loads((tmp_path / "out.json").read_text())
    assert ours["sequential"] > usual["sequential"] and ours["shuffled"] > usual["shuffled"]


@pytest.mark.slow
def test_sampling_is_compared_with_the_bare_forward(vae):
    """The table is complete, and more work takes more time: the target, 1.03, is for a quiet machine."""
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 2, "batch": (2,), "vae": str(vae), "repeats": 3}
    bare, one_step, decoded = sampling(Sample(**sizes))
    assert bare["ratio"] == 1 and decoded["ratio"] > one_step["ratio"] > 0.5
