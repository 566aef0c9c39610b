"""What Windows and macOS lack, and what a wheel may lose. (Neither system is here: see docs/distributed.md.)"""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, default_convert

from caching.shards import write_random
from meanflow.config import TrainConfig
from meanflow.data.latents import Latents
from meanflow.data.loader import SlotBatches, SlotData, make_loader
from meanflow.objectives.meanflow import MeanFlow

ROOT = Path(__file__).parents[1]
WITHOUT_POSIX = """if True:
    import importlib, pkgutil, signal, sys
    for name in ("fcntl", "grp", "pwd", "resource", "termios"):
        sys.modules[name] = None
    del signal.SIGUSR1
    import meanflow, models
    for package in (meanflow, models):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    from meanflow.training.guard import SIGNALS
    print(len(SIGNALS))
"""


@pytest.mark.slow
def test_every_module_is_imported_without_what_windows_lacks():
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr


def test_importing_the_package_imports_nothing_heavy():
    """And yet every public name is there."""
    code = "import sys, meanflow; print(len(meanflow.__all__), {'torch', 'numpy', 'tyro'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    import meanflow

    assert done.stdout.strip() == f"{len(meanflow.__all__)} set()"
    assert all(getattr(meanflow, name) is not None for name in meanflow.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'meanflower'"):
        meanflow.meanflower  # noqa: B018


@pytest.fixture
def recipe(tmp_path) -> TrainConfig:
    write_random(tmp_path / "cache", 64, "random", 0.18215, 256)
    return TrainConfig(
        data=str(tmp_path / "cache"), vae="random", scaling_factor=0.18215, resolution=256, flip=True, steps=2,
        global_batch=8,
    )  # fmt: skip


def test_a_spawned_loading_process_opens_the_cache_and_gets_no_copy_of_it(recipe):
    latents = Latents(Path(recipe.data), recipe)
    latents.num_classes = 0  # as without classes
    slots = SlotData(recipe, MeanFlow, latents)
    assert len(pickle.dumps(slots)) < 64 * 2**10 < sum(shard["bytes"] for shard in latents.shards)
    spawn = {"num_workers": 1, "multiprocessing_context": multiprocessing.get_context("spawn")}
    batches = SlotBatches(recipe, MeanFlow, len(latents), range(2))
    spawned = DataLoader(slots, batch_sampler=batches, collate_fn=default_convert, **spawn)
    here = make_loader(replace(recipe, workers=0), MeanFlow, latents, range(2))
    for a, b in zip(spawned, here):
        assert torch.equal(a.x, b.x) and torch.equal(a.draws.t, b.draws.t) and a.cond == b.cond == {}


RECIPE = """
from pathlib import Path

from meanflow import MeanFlowConfig, TrainConfig, run

RECIPE = TrainConfig(
    out=Path("run"), model="DiT-XS/4", objective=MeanFlowConfig(class_dropout_prob=0.0), steps=5, global_batch=64,
    ema_decay=(0.5,), checkpoint_every=5,
)

if __name__ == "__main__":
    run(RECIPE)
"""


@pytest.mark.slow
def test_a_wheel_trains_and_exports_where_the_tree_is_not(tmp_path):
    """An editable install would hide a file that is missing in the package, such as the text of the model card."""

    def call(*command) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        words = list(map(str, command))
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    tree = tmp_path / "tree"  # a copy, since an older build/ in the tree would serve files that are gone
    for name in ("meanflow", "models"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tree)
    call(sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    # The dependencies are those of this environment; the editable install in it is not seen, since a .pth file in a
    # folder that a .pth file names is not read.
    (packages / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    call(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", next(tmp_path.glob("*.whl")))
    where = call(python, "-c", "import meanflow, models; print(meanflow.__file__, models.__file__)")
    assert where.count(str(packages)) == 2
    (tmp_path / "recipe.py").write_text(RECIPE)
    shown = call(python, "recipe.py")
    assert "warning" not in shown and "checkpoints, log.jsonl, loss.png, samples/ and pipeline/" in shown
    call(python, "-c", "import meanflow; meanflow.export('run', 'model')")
    assert "MeanFlow network" in (tmp_path / "model/README.md").read_text()
    assert json.loads((tmp_path / "model/model_index.json").read_text())["net"] == ["modeling_dit", "DiT"]
