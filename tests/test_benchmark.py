"""What a step costs, by exact counts; and that the tool that says so runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.improved import improved
from benchmarks.options import Improved, Sample, Step
from benchmarks.sample import sampling
from benchmarks.ways import Ways, build, count_bytes, count_flops, profile_step

ROOT = Path(__file__).parents[1]


def counts(options: Step, net) -> dict[str, dict[str, int]]:
    ways = Ways(options, net)
    made = {name: ways.make(name, compiled=False) for name in ways.names()}
    return {name: {"flops": count_flops(way), "bytes": count_bytes(way)} for name, way in made.items()}


@pytest.fixture(scope="module")
def dit() -> dict[str, dict[str, int]]:
    """DiT of width 384, depth 6, 6 heads, on 64 tokens, batch 32: a forward and backward each."""
    options = Step(ratio=(0.25, 1.0), guided=True)
    return counts(options, build(options))


@pytest.mark.slow
def test_a_meanflow_step_costs_little_more_than_flow_matching(dit):
    """FLOPs at most 1.09 at ratio 0.25 (floor 1.083) and 1.35 at 1; bytes kept for the backward at most 1.05."""
    base = dit["flow matching"]
    for name, limit in (("this project, share 0.25", 1.09), ("this project, share 1", 1.35)):
        assert dit[name]["flops"] <= limit * base["flops"]
        assert dit[name]["bytes"] <= 1.05 * base["bytes"]


@pytest.mark.slow
def test_a_guided_step_costs_at_most_4_5_forwards(dit):
    """With omega, kappa, times to 0.75 and dropped labels, padding included. A flow-matching step is 3 forwards."""
    assert dit["this project, share 0.25, guided"]["flops"] <= 4.5 / 3 * dit["flow matching"]["flops"]


@pytest.mark.slow
def test_a_meanflow_step_of_the_cifar_network_does_too():
    """In full size, in training: FLOPs at most 1.27 at ratio 0.75 (floor 1.25), bytes at most 1.05."""
    options = Step(model="UNet-cifar", input_size=32, channels=3, batch=4, ratio=(0.75, 0.25), usual=False)
    rows = counts(options, build(options).train())
    base = rows["flow matching"]
    for name, limit in (("this project, share 0.75", 1.27), ("this project, share 0.25", 1.09)):
        assert rows[name]["flops"] <= limit * base["flops"]
        assert rows[name]["bytes"] <= 1.05 * base["bytes"]


@pytest.mark.slow
def test_the_usual_ways_cost_what_they_are_said_to(dit):
    """Else the comparison in the README is a straw man, or the counter counts nothing."""
    base, usual = dit["flow matching"], dit["torch.func.jvp of the whole batch"]
    assert 1.6 < usual["flops"] / base["flops"] < 1.8 and usual["bytes"] > 1.5 * base["bytes"]
    again = dit["jvp without graph, and a forward"]
    assert 1.95 < again["flops"] / base["flops"] < 2.1 and again["bytes"] < 1.05 * base["bytes"]


@pytest.mark.slow
def test_memory_and_operations_are_counted():
    """A forward keeps its bytes until the backward frees them, so the peak is more; twice the depth launches more."""
    options = Step(hidden_size=64, depth=2, num_heads=2)
    shallow, deep = (Ways(o, build(o)).make("flow matching", False) for o in (options, replace(options, depth=4)))
    few, many = (profile_step(way.step, "cpu") for way in (shallow, deep))
    assert count_bytes(shallow) <= few["peak"] < 2 * count_bytes(shallow)
    assert 1.5 < many["operations"] / few["operations"] < 2


@pytest.mark.slow
def test_the_tool_prints_its_table_and_writes_it(tmp_path):
    sizes = ["--hidden-size", "16", "--depth", "1", "--num-heads", "1", "--batch", "4", "--repeats", "1"]
    command = [sys.executable, "tools/benchmark.py", "step", *sizes, "--no-usual", "--json", str(tmp_path / "out.json")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "this project, share 0.25 | compiled" in shown.stdout
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["flops_ratio"] for row in rows][0] == 1.0 and len(rows) == 4
    # Fused: several operations are launched as one.
    assert rows[3]["operations"] < rows[1]["operations"] / 2 and rows[3]["compile"] > 1


@pytest.mark.slow
def test_the_loader_is_measured_by_kind_of_data_and_processes(tmp_path):
    command = [sys.executable, "tools/benchmark.py", "loader", "--count", "64", "--batch", "32", "--repeats", "1"]
    shown = subprocess.run([*command, "--workers", "0", "1"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("| 0 |") == shown.stdout.count("| 1 |") == 3


@pytest.mark.slow
def test_reading_latents_is_compared_with_the_usual_way(tmp_path):
    """The table is complete, and ours is not the slower one: the target, 5 times, is for a quiet machine."""
    command = [sys.executable, "tools/benchmark.py", "data", "--count", "512", "--repeats", "1"]
    shown = subprocess.run([*command, "--json", str(tmp_path / "out.json")], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    usual, ours, _ = json.loads((tmp_path / "out.json").read_text())
    assert ours["sequential"] > usual["sequential"] and ours["shuffled"] > usual["shuffled"]


@pytest.mark.slow
def test_sampling_is_compared_with_the_bare_forward(vae):
    """The table is complete, and more work takes more time: the target, 1.03, is for a quiet machine."""
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 2, "batch": (2,), "vae": str(vae), "repeats": 3}
    bare, one_step, decoded = sampling(Sample(**sizes))
    assert bare["ratio"] == 1 and decoded["ratio"] > one_step["ratio"] > 0.5


@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.parametrize("model", ["iMF-B/2", "iMF-XL/2"])
def test_a_step_of_improved_meanflow_costs_less_than_the_official_scheme(model):
    """At least 1.25 times fewer FLOPs at ratio 0.5, in full size, padding included."""
    ours, official, port = improved(Improved(models=(model,)))
    assert official["ratio"] >= 1.25 and port["ratio"] >= 1.2
    assert ours["flops"] > 0
