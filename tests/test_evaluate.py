"""tools/evaluate.py, as a user calls it: on one process and two, killed and started again, and refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from meanflow.data.sources import digits
from meanflow.evaluation.distances import energy_distance
from meanflow.publishing.checkpoints import load_pipeline

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "tools/evaluate.py"]
TWO = [str(Path(sys.executable).parent / "accelerate"), "launch", "-q", "--config_file"]
TWO += ["accelerate_configs/cpu_2proc.yaml", "tools/evaluate.py"]


def report(folder: Path, pattern: str = "meanflow-1-*.json") -> dict:
    (path,) = folder.glob(pattern)
    return json.loads(path.read_text())


def test_energy_distance_is_that_of_the_sampled_pictures(digits_run, tool, tmp_path):
    """Of tools/sample.py's own images, to the held-out digits; the report says how it was measured."""
    shown = tool("evaluate", digits_run, "--num-images", 100, "--batch-size", 30, "--out", tmp_path / "e")
    tool("sample", digits_run, "--num-images", 100, "--out", tmp_path / "x.npz")
    drawn = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).flatten(1) / 127.5 - 1
    held_out = ((digits()[1].x + 1) * 127.5).round().flatten(1) / 127.5 - 1
    found = report(tmp_path / "e")
    assert found["references"][0]["metrics"]["energy"] == pytest.approx(energy_distance(drawn, held_out), rel=1e-6)
    assert found["references"][0]["images"] == 450 and found["num_images"] == 100
    expected = {"solver": "meanflow", "num_steps": 1, "labels": "balanced", "seed": 0, "ema": None, "dtype": "fp32"}
    assert expected.items() <= found.items() and found["rounding"] == "to the nearest of 256 levels"
    assert "against held-out (450)" in shown and "labels balanced" in shown


def test_classes_come_in_turn_or_are_drawn(digits_run, tool, tmp_path, monkeypatch):
    seen = []
    pipeline = type(load_pipeline(digits_run))
    real = pipeline.__call__
    monkeypatch.setattr(pipeline, "__call__", lambda self, y, *a, **k: seen.append(y) or real(self, y, *a, **k))
    for labels in ("balanced", "random"):
        tool("evaluate", digits_run, "--num-images", 40, "--labels", labels, "--out", tmp_path / labels)
    assert seen[0] == 4 * list(range(10))
    assert seen[1] != seen[0] and set(seen[1]) <= set(range(10)) and len(set(seen[1])) > 5


@pytest.mark.slow
def test_two_processes_and_a_kill_change_no_figure(digits_run, tmp_path):
    """To the last bit; killed after the second batch, on two processes, it goes on with what is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [str(digits_run), "--num-images", "300", "--batch-size", "8", "--solver", "euler", "--num-steps", "50"]
    flags += ["--metrics", "energy", "frechet"]
    for name, command in {"one": COMMAND, "two": TWO}.items():
        subprocess.run([*command, *flags, "--out", tmp_path / name], cwd=ROOT, env=environment, check=True)
    killed = subprocess.Popen([*TWO, *flags, "--out", tmp_path / "killed"], cwd=ROOT, env=environment)
    while len(list(tmp_path.glob("killed/euler-*/0*.safetensors"))) < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGTERM)
    killed.wait(60)
    (folder,) = tmp_path.glob("killed/euler-*")
    there = {path: path.stat().st_mtime_ns for path in folder.glob("0*.safetensors")}
    assert 2 <= len(there) < 38 and not list(tmp_path.glob("killed/*.json"))
    subprocess.run([*COMMAND, *flags, "--out", tmp_path / "killed"], cwd=ROOT, env=environment, check=True)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    one, two, killed = (report(tmp_path / name, "euler-50-*.json") for name in ("one", "two", "killed"))
    assert one == two == killed


def test_comparison_is_sorted_by_cost_and_judges_one_step(digits_run, tool, tmp_path):
    """A table, a plot and both files; a scale doubles the evaluations, and what cannot be done is left out and said."""
    flags = ("--num-images", 20, "--metrics", "energy", "--cfg-scale", 1, 2, "--out", tmp_path)
    shown = tool("evaluate", digits_run, "--compare", *flags)
    (path,) = tmp_path.glob("compare-*.json")
    reports = json.loads(path.read_text())["reports"]
    costs = [part["evaluations"] for part in reports]
    assert costs == sorted(costs) and len(reports) == 2 * 12
    rows = {(part["solver"], part["num_steps"], part["cfg_scale"]): part["evaluations"] for part in reports}
    assert rows["meanflow", 4, 1.0] == 4 and rows["heun", 10, 1.0] == 20 and rows["rk4", 50, 2.0] == 400
    table = list(csv.reader(path.with_suffix(".csv").open()))
    assert table[0] == ["solver", "num_steps", "evaluations", "cfg_scale", "energy"] and len(table) == 25
    assert path.with_suffix(".png").stat().st_size > 10_000
    values = {key: float(row[4]) for key, row in zip(rows, table[1:])}
    ones = [value for (solver, steps, _), value in values.items() if (solver, steps) == ("meanflow", 1)]
    is_near = min(ones) <= 1.2 * min(values.values())
    assert ("not within 20 % of the best" in shown) != is_near and "within 20 % of the best" in shown
    again = tool("evaluate", digits_run, "--compare", *flags)
    assert again.count("\n") == shown.count("\n") and len(list(tmp_path.glob("compare-*.json"))) == 1


def test_several_references_have_columns_of_their_own(digits_run, tool, tmp_path):
    images = ((digits()[0].x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "train.npz", arr_0=images)
    shown = tool("evaluate", digits_run, "--reference", "held-out", tmp_path / "train.npz", "--num-images", 50,
                 "--out", tmp_path / "e")  # fmt: skip
    parts = report(tmp_path / "e")["references"]
    assert [part["images"] for part in parts] == [450, 1347] and len(parts[1]["sha256"]) == 64
    assert "energy held-out" in shown and "frechet train.npz" in shown


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--reference", "nothing.npz"), "reference must be a file that is there, got nothing.npz"),
        (("--reference", "/no/such/place"), "/no/such/place: no such file or folder"),
        (("--reference", "held-out", "held-out"), "reference must be different ones"),
        (("--num-images", "0"), "num_images must be >= 10 and at most 10,000,000, got 0"),
        (("--solver", "euler", "--compare"), "compare must be without them: it takes its own"),
        (("--cfg-scale", "1", "2"), "cfg_scale must be one, or several with --compare"),
        (("--features", "vgg", "x.pth"), "features must be one of inception, dinov2, before a file, got vgg"),
        (("--metrics", "fid", "--features", "inception", "x.pth"), "features inception must be a file"),
        (("--out", "RUN/step-00000002"), "out must be a folder outside of checkpoints"),
        (("--seed", "-1"), "seed must be >= 0, got -1"),
        (("--reference", "STATS"), "one with 2 images or more for energy, frechet"),
        (("--reference", "WRONG"), "has mu (3,) and sigma (3, 3), not (D,) and (D, D) with D [2048, 1024]"),
        (("--reference", "EMPTY"), "has neither mu and sigma nor arr_0, only x"),
        (("--reference", "OTHER"), "generated samples have 64 numbers each, and those of"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, words, digits_run, tool, tmp_path):
    places = {"STATS": {"mu": np.zeros(2048), "sigma": np.eye(2048)}, "WRONG": {"mu": np.zeros(3), "sigma": np.eye(3)}}
    places |= {"EMPTY": {"x": np.zeros(3)}, "OTHER": {"arr_0": np.zeros((5, 4, 4, 1), np.uint8)}}
    for name in set(flags) & set(places):
        np.savez(tmp_path / f"{name}.npz", **places[name])
    given = [
        str(tmp_path / f"{flag}.npz") if flag in places else flag.replace("RUN", str(digits_run)) for flag in flags
    ]
    out = () if "--out" in flags else ("--out", tmp_path / "e")
    count = () if "--num-images" in flags else ("--num-images", "10")
    shown = tool("evaluate", digits_run, *given, *out, *count)
    assert words in shown and "Traceback" not in shown, shown


def test_export_has_no_held_out_samples_and_a_folder_may_be_the_reference(digits_run, tool, tmp_path, monkeypatch):
    """The default place of its report is in the current folder."""
    flags = (digits_run / "pipeline", "--num-images", 20, "--metrics", "energy")
    assert "is no run: an exported model has no data: name a --reference" in tool("evaluate", *flags)
    images = ((digits()[0].x[:50] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", arr_0=images)
    monkeypatch.chdir(tmp_path)
    tool("evaluate", *flags, "--reference", tmp_path / "x.npz")
    assert report(tmp_path / "evaluation/pipeline")["references"][0]["images"] == 50
