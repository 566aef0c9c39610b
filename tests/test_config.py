"""Values out of range name themselves; the flags are known before torch is."""

import subprocess
import sys

import pytest

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.main import run


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("meanflow_ratio", 1.5, r"in \[0, 1\]"),
        ("meanflow_ratio", -0.1, r"in \[0, 1\]"),
        ("class_dropout_prob", 2.0, r"in \[0, 1\]"),
        ("t_start", -1.0, r"in \[0, 1\]"),
        ("t_end", 1.1, r"in \[0, 1\]"),
        ("norm_p", -1.0, ">= 0"),
        ("norm_eps", 0.0, "> 0"),
        ("omega", 0.0, "> 0"),
        ("kappa", 1.0, r"in \[0, 1\)"),
        ("P_std", 0.0, "> 0"),
        ("P_std_r", -1.0, "> 0"),
        ("t_min", 0.0, r"in \(0, 1\)"),
        ("time_sampler", "v2", "one of v0, v1"),
        ("prediction", "v", "one of u, x"),
        ("jvp", "fast", "one of exact, finite-difference"),
        ("null_class", "all", "one of independent, flow"),
        ("channel_weights", (1.0, -1.0), "numbers > 0"),
        ("channel_weights", (), "numbers > 0"),
        ("channel_weights", "variance", "numbers > 0, inverse-variance or None"),
        ("P_mean", float("nan"), "finite"),
        ("omega", float("inf"), "finite"),
    ],
)
def test_objective_values_out_of_range_are_refused_by_name(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be {allowed}"):
        MeanFlowConfig(**{field: value})


def test_guidance_without_a_null_class_is_refused():
    with pytest.raises(ValueError, match="objective.class_dropout_prob must be > 0 with guidance"):
        MeanFlowConfig(omega=2.0, class_dropout_prob=0.0)


def test_interval_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="t_start must be <= t_end, which is 0.2, got 0.5"):
        MeanFlowConfig(t_start=0.5, t_end=0.2)


def test_more_dropped_labels_than_flow_samples_are_refused():
    """With null_class flow only r = t samples can be dropped."""
    assert MeanFlowConfig(meanflow_ratio=0.75, null_class="flow", class_dropout_prob=0.25)
    with pytest.raises(ValueError, match="class_dropout_prob must be at most 1 - meanflow_ratio"):
        MeanFlowConfig(meanflow_ratio=0.75, null_class="flow", class_dropout_prob=0.3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "steps must be given, or epochs"),
        ({"steps": 1, "out": "run"}, "out must be a pathlib.Path, got 'run'"),
        ({"steps": 0}, "steps must be > 0"),
        ({"steps": 1, "resolution": 0}, "resolution must be > 0"),
        ({"steps": 1, "workers": -1}, "workers must be >= 0"),
        ({"steps": 1, "normalization": "batch"}, "normalization must be one of scale, channel, imf"),
        ({"steps": 1, "lr": -1.0}, "lr must be > 0"),
        ({"steps": 1, "global_batch": 0}, "global_batch must be >= 1"),
        ({"steps": 1, "ema_decay": (1.0,)}, r"ema_decay must be in \[0, 1\)"),
        ({"steps": 1, "ema_decay": ()}, r"ema_decay must be in \[0, 1\)"),
        ({"steps": 1, "schedule": "step"}, "schedule must be one of constant, cosine, linear"),
        ({"steps": 1, "subset": (0, 1)}, "subset must be >= 1"),
    ],
)
def test_recipe_values_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    "flags, steps, epochs", [([], 7, 2.0), (["--steps", "3"], 3, 2.0), (["--epochs", "5"], None, 5.0)]
)
def test_steps_and_epochs_that_are_flags_go_before_those_that_are_written(flags, steps, epochs, monkeypatch):
    seen = []
    monkeypatch.setattr("meanflow.training.screen.dry_run", lambda recipe, own: seen.append(recipe))
    monkeypatch.setattr("sys.argv", ["recipe", "--dry-run", *flags])
    run(TrainConfig(steps=7, epochs=2.0))
    assert (seen[0].steps, seen[0].epochs) == (steps, epochs)


def test_the_configuration_needs_no_heavy_import():
    """Else --help would take seconds."""
    code = "import meanflow.config, sys; print({'torch', 'diffusers', 'numpy', 'accelerate'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
