"""Evaluation amid training: what is held out, what is measured, and which checkpoints it keeps."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from test_resume import assert_same, everything, in_child, short_recipe

from meanflow.config import Refusal, TrainConfig
from meanflow.data.base import InMemory, hold_out
from meanflow.data.loader import make_loader
from meanflow.data.sources import digits, training_data
from meanflow.evaluation.distances import energy_distance
from meanflow.files import read_json
from meanflow.noise import noise
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import checkpoints, load_network
from meanflow.sampler import average_velocity, sample
from meanflow.training.evaluation import Evaluation
from meanflow.training.log import read_log
from meanflow.training.trainer import Trainer


@pytest.fixture
def recipe(tmp_path) -> Iterator[TrainConfig]:
    every = {"eval_every": 4, "checkpoint_every": 4, "eval_images": 130, "keep": 1}
    yield replace(short_recipe(tmp_path / "run"), subset=None, **every)
    AcceleratorState._reset_state(reset_partial_state=True)


def scores(out: Path) -> dict[int, float]:
    return {line["step"]: line["eval_energy"] for line in read_log(out / "log.jsonl") if "eval_energy" in line}


def numbered(count: int) -> InMemory:
    """Data whose samples are their own index."""
    return InMemory(torch.arange(count).view(-1, 1, 1, 1).float(), torch.zeros(count, dtype=torch.long), 1)


def test_held_out_samples_are_never_trained_on():
    """About the share; the same ones for any seed, process and step; every other sample is in an epoch once."""
    held = {}
    for seed in (0, 1):
        recipe = TrainConfig(steps=1, held_out=0.05, seed=seed, global_batch=190, subset=None)
        data = hold_out(numbered(2000), recipe.held_out)
        held[seed] = {int(x) for x in data.held_out.batch(list(range(len(data.held_out))), [])[0]}
        assert 60 < len(held[seed]) < 140 and len(data) + len(data.held_out) == 2000
        steps = len(data) // 190
        loaders = [make_loader(replace(recipe), MeanFlow, data, range(steps), rank, 2) for rank in (0, 1)]
        trained = [int(x) for loader in loaders for batch in loader for x in batch.x]
        assert not held[seed] & set(trained) and len(set(trained)) == len(trained) == 190 * steps
    assert held[0] == held[1]


def test_share_that_leaves_nothing_is_refused():
    for count, share in ((3, 0.001), (3, 0.999)):
        with pytest.raises(Refusal, match=f"held_out must be such that it leaves .*, of 3, got {share}"):
            hold_out(numbered(count), share)
    with pytest.raises(Refusal, match="held_out must be 0 for these data"):
        training_data(TrainConfig(steps=1, held_out=0.1))


@pytest.mark.slow
def test_every_kind_of_data_holds_out(tmp_path, vae):
    """Images in pixels and through a VAE, and volumes: whole batches of both sides, and a run that is evaluated."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(20):
            picture = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"images/{name}/{number}.png")
    (tmp_path / "volumes").mkdir()
    for number in range(20):
        np.save(tmp_path / f"volumes/{number}.npy", random.normal(size=(2, 4, 4, 4)).astype(np.float32))
    pixels = {"data": str(tmp_path / "images"), "resolution": 16, "model": "DiT-XS/4"}
    kinds = {"pixels": pixels, "volumes": {"data": str(tmp_path / "volumes"), "model": "DiT-XS/4"}}
    kinds["latents"] = {**pixels, "vae": str(vae), "scaling_factor": 0.18215, "model": "DiT-XS/2"}
    for name, fields in kinds.items():
        run = TrainConfig(
            out=tmp_path / f"run-{name}", steps=2, global_batch=4, held_out=0.5, eval_every=2, eval_images=10, **fields
        )
        assert in_child(run) == 0, name
        assert list(scores(run.out)) == [2] and read_json(run.out / "data.json")["held_out"] == 0.5


def test_score_is_the_energy_distance_of_one_step_samples(recipe):
    """Of the averaged network, by the sampler itself; the run's own held-out digits are 450."""
    assert in_child(recipe) == 0
    net, count = load_network(checkpoints(recipe.out)[-1]), recipe.eval_images
    y = torch.arange(count) % 10
    with torch.no_grad():
        x = sample(
            lambda z, t, r: average_velocity(net, z, t, r, {"y": y}), noise(recipe.seed, range(count), (1, 8, 8))
        )
    rounded = [((part.clamp(-1, 1) + 1) * 127.5).round().flatten(1) / 127.5 - 1 for part in (x, digits()[1].x)]
    found = scores(recipe.out)
    assert list(found) == [4, 8, 12, 16, 20] and found[20] == pytest.approx(energy_distance(*rounded), rel=1e-5)
    scored = read_json(checkpoints(recipe.out)[-1] / "step.json")["scores"]
    assert scored == {"energy of 130 images against held-out": found[20]}


@pytest.mark.slow
def test_two_processes_measure_what_one_does(recipe):
    one, two = recipe, replace(recipe, out=recipe.out.with_name("two"))
    assert in_child(one) == 0 and in_child(two, processes=2) == 0
    assert list(scores(one.out).values()) == pytest.approx(list(scores(two.out).values()), rel=1e-3)


def scripted(values: dict[int, float], kill_at: int | None = None):
    """Evaluations that give these values, by the step; the process dies after a step, whatever is being written."""

    def patch() -> None:
        real = Trainer.after_step

        def after_step(self):
            Evaluation.score = lambda *_: values[self.step]
            stop = real(self)
            if self.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return stop

        Trainer.after_step = after_step

    return patch


def test_best_checkpoint_and_milestones_survive_kills(recipe):
    """The best is neither the newest nor a milestone, and is saved though no checkpoint was due."""
    run = replace(recipe, keep_best=True, keep_every=8, checkpoint_every=8, eval_every=2)
    values = dict.fromkeys(range(2, 21, 2), 5.0) | {6: 1.0, 12: 2.0}
    straight = replace(run, out=run.out.with_name("straight"))
    assert in_child(straight, scripted(values)) == 0
    for step in (5, 10, 17):
        assert in_child(run, scripted(values, kill_at=step)) == -signal.SIGKILL
    assert in_child(run, scripted(values)) == 0
    for out in (straight.out, run.out):
        assert [path.name[-2:] for path in checkpoints(out)] == ["06", "08", "16", "20"]
        assert list(read_json(checkpoints(out)[-1] / "step.json")["best"].values()) == [1.0]
    assert_same(everything(straight.out), everything(run.out))


def test_evaluation_that_fails_does_not_end_the_run(recipe, capfd):
    """It is said once, and no checkpoint counts as scored."""

    def patch() -> None:
        Evaluation.generate = lambda *_: 1 / 0

    assert in_child(replace(recipe, keep_best=True), patch) == 0
    assert capfd.readouterr().err.count("evaluation failed, and training goes on: division by zero") == 1
    assert [path.name for path in checkpoints(recipe.out)] == ["step-00000020"] and scores(recipe.out) == {}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"eval_reference": "no.npz"}, "reference must be a file that is there, got no.npz"),
        ({"subset": (10, 40)}, "held_out must be > 0, or name an --eval-reference, got 0.0"),
        ({"eval_metric": "fid", "eval_features": "no.pth"}, "features inception must be a file"),
        (
            {"data": "shapes", "held_out": 0.2, "eval_metric": "fid"},
            "eval_metric must be energy or frechet for volumes",
        ),
    ],
)
def test_evaluation_that_cannot_be_is_refused_before_training(changes, words, recipe):
    with pytest.raises(ValueError, match=words):
        Trainer(replace(recipe, **changes))
    assert not recipe.out.exists()


def test_choices_without_a_sense_are_refused():
    for changes, words in (
        ({"keep_best": True}, "eval_every must be given with keep_best"),
        ({"keep_every": 1500}, "keep_every must be a multiple of checkpoint_every, 1000, got 1500"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"eval_metric": "is"}, "eval_metric must be one of"),
    ):
        with pytest.raises(Refusal, match=words):
            TrainConfig(steps=1, **changes)
