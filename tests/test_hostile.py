"""Bad input to the recipes and the tools: each ends with words that name it, without a traceback, and no file changes.

A few cases are no errors, and end well with a warning. Every case has a minute and 8 GiB.
"""

import json
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import small_disk
from PIL import Image
from safetensors.torch import load_file, save_file

from caching.shards import write_random
from meanflow.files import checksum
from meanflow.training.guard import DIVERGED, SIGNALS

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 60, 8 * 2**30  # of one call
BOX = dict.fromkeys(map(ord, "╭╮╰╯│─"), " ")  # what a box around a message is drawn of

DIGITS = {"--model": "DiT-XS/8", "--steps": 2, "--global-batch": 16, "--schedule": "constant", "--warmup-steps": 0}
VOLUMES = {"--model": "DiT-XS/4", "--steps": 2, "--global-batch": 4, "--accumulation-steps": 1, "--warmup-steps": 0}
VOLUMES |= {"--ema-decay": 0.9}
LATENTS = {"--model": "DiT-XS/8", "--steps": 2, "--global-batch": 16, "--ema-decay": 0.9, "--vae": "vae"}
LATENTS |= {"--mixed-precision": "no", "--workers": 0}

WEIGHTS = "diffusion_pytorch_model.safetensors"
EMA = f"ema/0.95/{WEIGHTS}"


class TooSlow(Exception):
    """A call that did not end."""


def stop(*_) -> None:
    raise TooSlow(f"it did not end within {SECONDS} s")


@contextmanager
def limits():
    """Ends what takes too long, and refuses it more memory than MEMORY."""
    before, wanted = resource.getrlimit(resource.RLIMIT_AS), psutil.Process().memory_info().vms + MEMORY
    most = wanted if before[1] == resource.RLIM_INFINITY else min(wanted, before[1])
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def same_process():
    """Puts back what a program changes in its process."""
    environment, folder = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call(name: str, *flags) -> object:
    """Runs a recipe or a tool in this process, and returns the code that it ended with."""
    path = ROOT / (f"{name}.py" if "/" in name else f"tools/{name}.py")
    with same_process(), limits(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [str(path), *map(str, flags)])
        patch.syspath_prepend(path.parent)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            return end.code
    return None


@pytest.fixture
def ended(capfd, monkeypatch) -> Callable[..., tuple]:
    """Runs a recipe or a tool; its exit code, and what it said on a single line: its last words or its output."""

    def run(name: str, *flags) -> tuple:
        monkeypatch.setenv("COLUMNS", "1000")  # so that no box breaks a word
        capfd.readouterr()
        code = call(name, *flags)
        shown = "".join(capfd.readouterr())
        assert "Traceback" not in shown, shown
        said = code if isinstance(code, str) else shown
        return code, " ".join(said.translate(BOX).split())

    return run


@pytest.fixture
def refused(ended) -> Callable[..., str]:
    """Runs what must be refused; the refusal."""

    def run(name: str, *flags) -> str:
        code, said = ended(name, *flags)
        assert code not in (None, 0), f"it was accepted: {said}"
        assert not isinstance(code, str) or (code.startswith("error: ") and "\n" not in code.strip()), code
        return said

    return run


@pytest.fixture
def accepted(ended) -> Callable[..., str]:
    """Runs what must end well; the output."""

    def run(name: str, *flags) -> str:
        code, said = ended(name, *flags)
        assert code in (None, 0), said
        return said

    return run


@pytest.fixture
def here(tmp_path_factory, monkeypatch) -> Path:
    """An empty folder, whose name says nothing of the case, with the working directory in it."""
    folder = tmp_path_factory.mktemp("x")
    (folder / "cwd").mkdir()
    monkeypatch.chdir(folder / "cwd")
    return folder


def flags_of(defaults: dict, flags: tuple) -> list:
    """The defaults that are not among the flags, then the flags."""
    out = {"--out": "run", **defaults}
    return [word for name, value in out.items() if name not in flags for word in (name, value)] + list(flags)


def digits(*flags) -> tuple:
    """A short run on the digits, into cwd/run."""
    return "recipes/digits_dit", *flags_of(DIGITS, flags)


def images(folder: Path, *flags) -> tuple:
    """A short run on images of 8 x 8."""
    return digits("--data", folder, "--resolution", 8, *flags)


def volumes(folder: Path, *flags) -> tuple:
    return "recipes/volumes_dit", *flags_of(VOLUMES, ("--data", folder, *flags))


def latents(folder: Path, *flags) -> tuple:
    return "recipes/imagenet_ditb4", *flags_of(LATENTS, ("--data", folder, "--no-compile", *flags))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_said(words: str, said: str) -> None:
    assert re.search(words, said), f"no {words!r} in: {said}"


def save_images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def save_volumes(folder: Path, *names: str, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(seed)
    for name in names:
        np.save(folder / name, random.standard_normal((4, 8, 8, 8)).astype(np.float32))
    return folder


def renew_checksums(folder: Path) -> None:
    """Makes the checksums of a checkpoint or an export, if it has any, those of its files."""
    path = folder / "checksums.json"
    if path.exists():
        path.write_text(json.dumps({name: checksum(folder / name) for name in json.loads(path.read_text())}))


def plant_nan(folder: Path, name: str) -> None:
    """Makes one number of these weights NaN, as if they had been saved so."""
    weights = load_file(folder / name)
    first = sorted(weights)[0]
    weights[first] = weights[first].clone()
    weights[first].view(-1)[0] = float("nan")
    save_file(weights, folder / name, {"format": "pt"})
    renew_checksums(folder)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run of two steps, each with a checkpoint and a line of the log."""
    folder = tmp_path_factory.mktemp("x") / "run"
    assert call(*digits("--checkpoint-every", 1, "--log-every", 1, "--out", folder)) in (None, 0)
    return folder


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("x") / "model"
    assert call("export", finished, "--out", folder) in (None, 0)
    return folder


@pytest.fixture(scope="session")
def cached(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("x") / "latents"
    write_random(folder, 64, "vae", 0.18215, 256)
    return folder


@pytest.fixture
def run(finished, here) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, here / "run")


@pytest.fixture
def model(exported, here) -> Path:
    """A copy of the export, to be damaged."""
    return shutil.copytree(exported, here / "model")


# Values of a recipe.


@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(["--out", ""], "out must be", id="out-empty"),
        pytest.param(["--out", "."], "out must be", id="out-here"),
        pytest.param(["--out", ".."], "out must be", id="out-above"),
        pytest.param(["--out", "/"], "out must be", id="out-root"),
        pytest.param(["--init-from", ""], "init_from must", id="init-from-empty"),
        pytest.param(["--data", ""], "data must", id="data-empty"),
        pytest.param(["--resume", ""], "resume must", id="resume-empty"),
        pytest.param(["--epochs", "None"], "epochs must", id="epochs-none"),
        pytest.param(["--seed", "4294967296"], "seed must .*4294967296", id="seed-of-33-bits"),
        pytest.param(["--data", "digit"], "digit.*(digits, shapes)", id="data-misspelt"),
        pytest.param(["--net", "num_heads", "0"], r"net.*num_heads.*\b0\b", id="num-heads-0"),
        pytest.param(["--net", "hidden_size", "0"], r"net.*hidden_size.*\b0\b", id="hidden-size-0"),
        pytest.param(["--net", "hidden_size", "-64"], "net.*hidden_size.*-64", id="hidden-size-negative"),
        pytest.param(["--net", "patch_size", "0"], r"net.*patch_size.*\b0\b", id="patch-size-0"),
        pytest.param(["--net", "mlp_ratio", "-1"], "net.*mlp_ratio.*-1", id="mlp-ratio-negative"),
        pytest.param(["--net", "depth", "0"], r"net.*depth.*\b0\b", id="depth-0"),
        pytest.param(
            ["--model", "UNet-digits", "--net", "layers_per_block", "0"],
            r"net.*layers_per_block.*\b0\b", id="layers-per-block-0",
        ),
        pytest.param(
            ["--model", "UNet-cifar", "--net", "model_channels", "0"],
            r"net.*model_channels.*\b0\b", id="model-channels-0",
        ),
        pytest.param(
            ["--model", "UNet-cifar", "--net", "num_blocks", "0"], r"net.*num_blocks.*\b0\b", id="num-blocks-0"
        ),
        pytest.param(["--resolution", "100000"], "resolution.*100000", id="resolution-huge"),
        pytest.param(["--global-batch", "1000000000"], "global_batch.*1000000000", id="batch-huge"),
    ],
)  # fmt: skip
def test_value_that_no_run_can_have_is_named(flags, words, here, refused):
    assert_said(words, refused(*digits(*flags, "--dry-run")))
    assert snapshot(here) == {}


def test_huge_batch_is_refused_without_a_dry_run(here, refused):
    assert_said("global_batch.*1000000000", refused(*digits("--global-batch", "1000000000")))
    assert snapshot(here) == {}


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_folder_that_is_no_runs_own_is_refused_to_a_smoke_test(out, here, refused):
    assert_said("out must be", refused(*digits("--smoke", "--out", out)))
    assert snapshot(here) == {}


def test_smoke_test_without_pixels_is_refused(here, refused):
    said = refused("recipes/imagenet_ditb4", "--smoke", "--resolution", 4, "--out", "run")
    assert_said(r"resolution.*\b4\b", said)
    assert snapshot(here) == {}


@pytest.mark.parametrize(
    "flags", [pytest.param([], id="pixels-unsaid"), pytest.param(["--resolution", 8], id="pixels-said")]
)
def test_single_image_is_no_data(flags, here, refused):
    save_images(here, "a.png")
    assert_said(r"a\.png.*(folder|parquet)", refused(*digits("--data", here / "a.png", *flags, "--dry-run")))


def test_missing_folder_of_volumes_is_called_missing(here, refused):
    said = refused(*volumes(here / "missing", "--dry-run"))
    assert_said("missing.*no such file or folder", said)


@pytest.mark.parametrize("flags", [pytest.param([], id="run"), pytest.param(["--dry-run"], id="dry-run")])
def test_number_of_processes_that_is_no_number_is_named(flags, here, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert_said("WORLD_SIZE must .*two", refused(*digits(*flags)))
    assert snapshot(here) == {}


@pytest.mark.parametrize(
    "name, value, words",
    [
        pytest.param("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision.*launcher.*bf16", id="precision"),
        pytest.param(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulation_steps.*launcher.*4", id="accumulation"
        ),
    ],
)
def test_launcher_that_asks_for_something_else_is_refused(name, value, words, here, refused, monkeypatch):
    monkeypatch.setenv(name, value)
    assert_said(words, refused(*digits()))
    assert snapshot(here) == {}


def test_cache_folder_of_datasets_that_cannot_be_written_is_named(here, refused, monkeypatch):
    import datasets  # which reads the variable only once

    assert "nowhere" not in str(datasets.config.HF_DATASETS_CACHE)
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/nowhere/datasets"))
    folder = save_images(here / "photos", "a/0.png", "b/1.png")
    assert_said("HF_HOME", refused(*images(folder, "--dry-run")))


def test_count_of_random_latents_must_be_a_number(here, refused):
    assert_said("COUNT.*²", refused("cache_latents", "random:²", "--out", here / "cache"))
    assert snapshot(here) == {}


def test_loading_processes_without_shared_memory_are_refused(here, refused, monkeypatch):
    """Their batches of half a megabyte would not fit."""
    real, small = shutil.disk_usage, type("usage", (), {"total": 2**20, "used": 0, "free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: small if str(path) == "/dev/shm" else real(path))
    assert_said("/dev/shm.*--workers 0", refused(*digits("--workers", 2, "--global-batch", 1024)))
    assert snapshot(here) == {}


# Values of the other tools.


@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(["--batch", "0"], r"batch must.*\b0\b", id="batch-0"),
        pytest.param(["--batch", "-3"], "batch must.*-3", id="batch-negative"),
        pytest.param(["--num-heads", "0"], r"num_heads must.*\b0\b", id="num-heads-0"),
        pytest.param(["--device", "gpu"], "device must.*gpu", id="device-unknown"),
        pytest.param(["--repeats", "0"], r"repeats must.*\b0\b", id="repeats-0"),
    ],
)
def test_benchmark_of_nothing_is_refused(flags, words, here, refused):
    small = {"--hidden-size": 32, "--depth": 1, "--num-heads": 2, "--input-size": 8, "--repeats": 1, "--batch": 4}
    defaults = [word for name, value in small.items() if name not in flags for word in (name, value)]
    said = refused("benchmark", "step", *defaults, "--runs", 1, "--no-compiled", "--no-usual", *flags)
    assert_said(words, said)


def test_benchmark_of_no_data_is_refused(here, refused):
    said = refused("benchmark", "data", "--count", 0, "--repeats", 1, "--folder", here)
    assert_said(r"count must.*\b0\b", said)


@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(["--device", "meta"], "device.*meta", id="device-without-numbers"),
        pytest.param(["--cfg-scale", "nan"], "(cfg_scale|guidance_scale).*nan", id="scale-nan"),
        pytest.param(["--cfg-scale", "inf"], "(cfg_scale|guidance_scale).*inf", id="scale-inf"),
        pytest.param(["--cfg-scale", "-5"], "(cfg_scale|guidance_scale).*-5", id="scale-negative"),
        pytest.param(["--num-images", 10**12], "num_images.*1000000000000", id="too-many-for-memory"),
        pytest.param(["--num-images", 10**12, "--out", "x.npz"], "free", id="too-many-for-a-file"),
        pytest.param(["--num-images", 10**12, "--out", "folder"], "free", id="too-many-for-a-folder"),
    ],
)
def test_samples_that_cannot_be_had_are_refused(flags, words, digits_run, here, refused):
    out = [] if "--out" in flags else ["--out", "x.png"]
    assert_said(words, refused("sample", digits_run, *flags, *out))
    assert snapshot(here) == {}


# Files of the user.


def test_folder_with_the_log_of_something_else_is_left_alone(here, refused):
    (here / "mine").mkdir()
    (here / "mine/log.jsonl").write_text('{"epoch": 1}\n')
    (here / "mine/loss.png").write_bytes(b"a picture")
    before = snapshot(here)
    assert_said(r"mine.*log\.jsonl", refused(*digits("--out", here / "mine")))
    assert snapshot(here) == before


def test_folder_with_the_recipe_of_something_else_is_left_alone(here, refused):
    (here / "mine").mkdir()
    (here / "mine/recipe.json").write_text('{"recipe": "pancakes"}')
    before = snapshot(here)
    assert_said(r"recipe\.json", refused(*digits("--out", here / "mine")))
    assert snapshot(here) == before


@pytest.mark.parametrize("name", ["notes.txt", "README.md"])
def test_export_does_not_replace_what_the_user_wrote(name, finished, model, refused):
    with (model / name).open("a") as file:
        file.write("my own words\n")
    before = snapshot(model)
    assert_said(re.escape(name), refused("export", finished, "--out", model))
    assert snapshot(model) == before


def test_samples_do_not_replace_someone_elses(finished, here, refused):
    save_images(here / "mine", "000000.png")
    before = snapshot(here)
    said = refused("sample", finished, "--num-images", 2, "--out", here / "mine")
    assert_said("mine.*(not empty|another folder|belongs to the run)", said)
    assert snapshot(here) == before


def test_samples_do_not_go_into_a_checkpoint(run, refused):
    before = snapshot(run)
    said = refused("sample", run, "--num-images", 2, "--out", run / "step-00000001")
    assert_said("step-00000001.*(not empty|another folder|belongs to the run)", said)
    assert snapshot(run) == before


def test_picture_stays_when_the_disk_is_full(finished, here, refused):
    with small_disk(here / "disk", "64k"):
        (here / "disk/x.png").write_bytes(b"mine")
        with pytest.raises(OSError), (here / "disk/full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        before = snapshot(here)
        assert_said("No space", refused("sample", finished, "--out", here / "disk/x.png"))
        assert snapshot(here) == before


def test_run_does_not_go_into_its_images(here, refused):
    folder = save_images(here / "photos", "a/0.png", "b/1.png")
    before = snapshot(folder)
    assert_said("out must not .*", refused(*images(folder, "--out", folder / "run", "--dry-run")))
    assert snapshot(folder) == before


def test_run_does_not_go_into_its_volumes(here, refused):
    folder = save_volumes(here / "scans", "0.npy", "1.npy")
    before = snapshot(folder)
    assert_said("out must not .*", refused(*volumes(folder, "--out", folder / "run", "--dry-run")))
    assert snapshot(folder) == before


@pytest.mark.parametrize("program", ["recipe", "export", "sample"])
def test_tilde_is_the_home_folder(program, finished, here, accepted, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    (here / "home").mkdir()
    what = {"recipe": digits(), "export": ("export", finished), "sample": ("sample", finished)}[program]
    name = {"recipe": "run", "export": "model", "sample": "x.png"}[program]
    words = [word for word in what if word not in ("--out", "run")]
    accepted(*words, "--out", f"~/{name}")
    assert (here / "home" / name).exists()
    assert not list((here / "cwd").iterdir())


# Weights that are not finite.


@pytest.mark.parametrize("program", ["export", "sample"])
def test_run_whose_average_is_not_finite_is_refused(program, run, here, refused):
    plant_nan(run / "step-00000002", EMA)
    before = snapshot(here)
    assert_said("not finite", refused(program, run, "--out", {"export": "model", "sample": "x.png"}[program]))
    assert snapshot(here) == before


def test_export_whose_weights_are_not_finite_is_refused(model, here, refused):
    plant_nan(model, f"net/{WEIGHTS}")
    before = snapshot(here)
    assert_said("not finite", refused("sample", model, "--out", "x.png"))
    assert snapshot(here) == before


def test_weights_to_begin_with_must_be_finite(run, here, refused):
    plant_nan(run / "step-00000002", f"model/{WEIGHTS}")
    assert_said("not finite", refused(*digits("--init-from", run / "step-00000002")))


@pytest.mark.parametrize("lr, every", [pytest.param("1e38", 2, id="skipped"), pytest.param("1e39", 1, id="first-step")])
def test_run_that_bursts_leaves_no_checkpoint_that_is_not_finite(lr, every, here, ended):
    """The first step's own gradient is finite, and its weights are not with the higher rate."""
    flags = ["--lr", lr, "--keep", 1, "--checkpoint-every", every, "--log-every", 1, "--steps", 20]
    code, said = ended(*digits(*flags, "--max-skipped", 5, "--out", here / "run"))
    assert code == DIVERGED, said
    for path in (here / "run").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


# Data.


def test_volume_without_numbers_is_named(here, refused):
    for number, shape in enumerate([(4, 0, 8, 8), (0, 8, 8, 8)]):
        folder = here / f"scans{number}"
        folder.mkdir()
        np.save(folder / "flat.npy", np.zeros(shape, np.float32))
        assert_said(r"flat\.npy.*(shape|volume must)", refused(*volumes(folder, "--dry-run")))


def save_deep_png(folder: Path) -> str:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "a/deep.png")
    return "deep.png"


def save_float_tiff(folder: Path) -> str:
    Image.fromarray(np.arange(64, dtype=np.float32).reshape(8, 8) / 64).save(folder / "a/deep.tif")
    return "deep.tif"


@pytest.mark.parametrize(
    "save", [pytest.param(save_deep_png, id="16-bits"), pytest.param(save_float_tiff, id="floats")]
)
def test_image_that_would_lose_its_values_is_named(save, here, refused):
    folder = save_images(here / "photos", "a/0.png", "a/1.png", "b/2.png", "b/3.png")
    name = save(folder)
    assert_said(f"{re.escape(name)}.*mode", refused(*images(folder)))


def save_array(kind: type) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        random = np.random.default_rng(3)
        np.save(folder / "odd.npy", (random.standard_normal((4, 8, 8, 8)) > 0).astype(kind))
        return "odd.npy"

    return save


def save_bools(folder: Path) -> str:
    save_file({"volume": torch.rand(4, 8, 8, 8) > 0.5}, folder / "odd.safetensors")
    return "odd.safetensors"


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(save_array(np.complex64), id="complex"),
        pytest.param(save_array(np.bool_), id="bool"),
        pytest.param(save_bools, id="bool-safetensors"),
    ],
)
def test_volume_of_another_kind_of_number_is_named(save, here, refused):
    folder = save_volumes(here / "scans", "0.npy", "1.npy", "2.npy")
    name = save(folder)
    assert_said(re.escape(name), refused(*volumes(folder)))


def test_volume_that_is_not_finite_is_found_by_check_data(here, refused):
    folder = save_volumes(here / "scans", "0.npy", "1.npy", "2.npy", "odd.npy")
    np.save(folder / "odd.npy", np.full((4, 8, 8, 8), np.nan, np.float32))
    assert_said(r"odd\.npy", refused(*volumes(folder, "--check-data")))
    assert not (here / "cwd/run/log.jsonl").exists()


def test_split_that_is_not_there_is_named(vae, here, refused):
    folder = save_images(here / "photos", "train/cat/0.png", "train/dog/1.png", "val/cat/2.png", "val/dog/3.png")
    flags = ["--vae", vae, "--resolution", 32, "--workers", 0, "--out", here / "cache"]
    said = refused("cache_latents", folder, "--split", "validation", *flags)
    assert_said("validation.*(train, val)", said)
    assert not (here / "cache").exists()


def test_folders_that_are_splits_are_not_taken_for_classes(here, refused):
    folder = save_images(here / "photos", "training/cat/0.png", "training/dog/1.png", "validation/cat/2.png")
    assert_said("train.*(training, validation)", refused(*images(folder, "--dry-run")))


def test_class_without_images_is_spoken_of(here, accepted):
    folder = save_images(here / "photos", "a/0.png", "b/1.png")
    (folder / "eel").mkdir()
    assert_said("left out.*eel", accepted(*images(folder, "--dry-run")))


def test_link_to_nothing_is_spoken_of(here, accepted):
    folder = save_images(here / "photos", "a/0.png", "b/1.png")
    (folder / "b/eel.png").symlink_to(here / "nothing.png")
    assert_said(r"left out.*eel\.png", accepted(*images(folder, "--dry-run")))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["a.npy", "b.npy", "c.npy", "d.npy"], id="other-names"),
        pytest.param(["0.npy", "1.npy", "2.npy", "3.npy"], id="same-names"),
    ],
)
def test_other_volumes_are_not_taken_for_those_of_before(names, here, accepted, refused):
    folder = save_volumes(here / "scans", "0.npy", "1.npy", "2.npy", "3.npy")
    accepted(*volumes(folder))
    shutil.rmtree(folder)
    save_volumes(folder, *names, seed=1)
    before = snapshot(here / "cwd")
    assert_said("data.*--allow-data-change", refused(*volumes(folder, "--steps", 4)))
    assert snapshot(here / "cwd") == before
    accepted(*volumes(folder, "--steps", 4, "--allow-data-change"))


def test_label_of_billions_is_named(here, refused):
    import datasets

    pictures = [Image.new("RGB", (8, 8))] * 3
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1234567890, 1]}, features=kinds)
    rows.to_parquet(here / "images.parquet")
    assert_said("1234567890", refused(*images(here / "images.parquet", "--dry-run")))


def test_cache_with_labels_that_are_no_classes_is_refused(cached, here, refused):
    folder = shutil.copytree(cached, here / "cache")
    metadata = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps({**metadata, "classes": metadata["classes"][:5]}))
    assert_said(r"latents\.json|label", refused(*latents(folder, "--dry-run")))


def test_export_that_is_damaged_is_refused(model, here, refused):
    flip_bit(model / f"net/{WEIGHTS}")
    assert_said("damaged", refused("sample", model, "--out", "x.png"))
    assert not (here / "cwd/x.png").exists()


# Files of JSON that are something else.

BAD = {"empty": b"", "cut": b"{", "binary": b"\x80\x81\xff", "list": b"[1, 2]", "no-fields": b"{}"}


def damaged(name: str, **wrong) -> list:
    """Cases of a file, each with its fault: a content, or fields of a wrong type."""
    return [pytest.param(name, fault, id=f"{name}-{label}") for label, fault in {**BAD, "type": wrong}.items()]


def damage(path: Path, fault: bytes | dict) -> None:
    """Writes the fault to a file of JSON: as it is, or as fields that replace those of the same names."""
    content = fault if isinstance(fault, bytes) else json.dumps({**json.loads(path.read_text()), **fault}).encode()
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, fault",
    [
        *damaged("recipe.json", objective=3),
        *damaged("data.json", classes=3),
        *damaged("step-00000002/recipe.json", objective=3),
        *damaged("step-00000002/data.json", classes=3),
        *damaged("step-00000002/step.json", step="x"),
        *damaged("step-00000002/checksums.json", **{"recipe.json": 3}),
    ],
)
def test_run_with_a_damaged_file_does_not_go_on(name, fault, run, refused):
    damage(run / name, fault)
    before = snapshot(run)
    assert_said(re.escape(Path(name).name), refused(*digits("--out", run)))
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "name, fault",
    [
        *damaged("recipe.json", ema_decay=3),
        *damaged("data.json", classes=3),
        *damaged("checksums.json", **{"recipe.json": 3}),
    ],
)
def test_checkpoint_with_a_damaged_file_is_not_sampled(name, fault, run, here, refused):
    damage(run / "step-00000002" / name, fault)
    before = snapshot(here)
    assert_said(re.escape(name), refused("sample", run, "--out", "x.png"))
    assert snapshot(here) == before


@pytest.mark.parametrize("name, fault", damaged("step.json", step="x"))
def test_checkpoint_with_a_damaged_file_is_not_exported(name, fault, run, here, refused):
    damage(run / "step-00000002" / name, fault)
    before = snapshot(here)
    assert_said(re.escape(name), refused("export", run, "--out", "model"))
    assert snapshot(here) == before


METRICS = [case for case in damaged("metrics.json", **{"MeanFlow, 1 step": 3}) if "no-fields" not in case.id]


@pytest.mark.parametrize("name, fault", METRICS)
def test_damaged_metrics_are_not_exported(name, fault, run, here, refused):
    (run / name).write_text(json.dumps({"MeanFlow, 1 step": {"accuracy": 0.9}}))
    damage(run / name, fault)
    before = snapshot(here)
    assert_said(r"metrics\.json", refused("export", run, "--out", "model"))
    assert snapshot(here) == before


@pytest.mark.parametrize("name, fault", damaged("latents.json", shards=3))
def test_cache_with_a_damaged_file_is_not_trained_on(name, fault, cached, here, refused):
    folder = shutil.copytree(cached, here / "cache")
    damage(folder / name, fault)
    assert_said(r"latents\.json", refused(*latents(folder, "--dry-run")))


@pytest.mark.parametrize("name, fault", damaged("settings.json", shape=3))
def test_cache_with_damaged_settings_does_not_go_on(name, fault, cached, here, refused):
    folder = shutil.copytree(cached, here / "cache")
    (folder / ".progress").mkdir()
    (folder / "latents.json").rename(folder / ".progress" / name)
    damage(folder / ".progress" / name, fault)
    before = snapshot(folder)
    said = refused("cache_latents", "random:64", "--vae", "vae", "--out", folder)
    assert_said(r"settings\.json", said)
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b'{"step": 1, "lo\n', id="cut"),
        pytest.param(bytes(512) + b"\n", id="zeros"),
        pytest.param(b"\x80\x81\xff\n", id="binary"),
        pytest.param(b'{"epoch": 3, "loss": 0.5}\n', id="another-tools"),
        pytest.param(b"[1, 2]\n", id="list"),
    ],
)
def test_log_with_a_bad_line_is_kept_and_the_run_goes_on(bad, run, accepted):
    path = run / "log.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(good[0] + bad + good[1])
    before = path.read_bytes()
    said = accepted(*digits("--steps", 4, "--log-every", 1, "--out", run))
    assert_said(r"log\.jsonl.*(left out|damaged)", said)
    assert (run / "log.jsonl.damaged").read_bytes() == before
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:2] == [json.loads(line) for line in good] and [line["step"] for line in lines] == [1, 2, 3, 4]


# Advice.


def test_changed_recipe_is_not_told_to_remove_the_run(run, refused):
    before = snapshot(run)
    said = refused(*digits("--lr", 1e-3, "--out", run, "--dry-run"))
    assert_said("--init-from", said)
    assert "remove it" not in said
    assert snapshot(run) == before


def test_finished_run_goes_on_with_more_steps(run, accepted):
    accepted(*digits("--steps", 4, "--out", run))
    assert (run / "step-00000004").exists()


def test_finished_run_whose_rate_fell_to_zero_does_not_go_on(here, accepted, refused):
    accepted(*digits("--schedule", "cosine"))
    before = snapshot(here)
    assert_said("--init-from", refused(*digits("--schedule", "cosine", "--steps", 4)))
    assert snapshot(here) == before


def empty_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    return "step-00000002"


def lose_step(folder: Path) -> str:
    (folder / "step.json").unlink()
    return r"step\.json"


def flip_average(folder: Path) -> str:
    flip_bit(folder / EMA)
    return re.escape(EMA)


FAULTS = [
    pytest.param(empty_checkpoint, id="empty"),
    pytest.param(lose_step, id="no-step-json"),
    pytest.param(flip_average, id="flipped-bit"),
]


@pytest.mark.parametrize("spoil", FAULTS)
def test_damaged_checkpoint_is_named_with_the_way_on(spoil, run, refused):
    words = spoil(run / "step-00000002")
    before = snapshot(run)
    assert_said(f"{words}.*--resume .*step-00000001", refused(*digits("--out", run)))
    assert snapshot(run) == before


@pytest.mark.parametrize("spoil", FAULTS)
def test_damaged_checkpoint_is_not_sampled_and_the_older_one_offered(spoil, run, here, refused):
    words = spoil(run / "step-00000002")
    before = snapshot(here)
    assert_said(f"{words}.*step-00000001", refused("sample", run, "--out", "x.png"))
    assert snapshot(here) == before


def test_older_checkpoint_may_be_gone_on_from_twice(run, accepted):
    for _ in range(2):
        accepted(*digits("--out", run, "--resume", run / "step-00000001"))
    assert (run / "step-00000002").exists()


@pytest.mark.parametrize("token", [pytest.param(None, id="no-token"), pytest.param("hf_wrong", id="bad-token")])
def test_push_without_a_login_says_how_to_log_in(token, exported, here, hub, refused, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    assert_said("hf auth login", refused("push_to_hub", exported, "user/digits"))
    assert not hub.repos


def test_report_on_a_run_by_epochs_has_a_table_or_a_line(here, accepted, ended):
    name, *flags = digits("--epochs", 0.02)
    place = flags.index("--steps")
    accepted(name, *flags[:place], *flags[place + 2 :])
    code, said = ended("digits_report", "run")
    assert code in (None, 0) or said.startswith("error: "), said


@pytest.mark.parametrize(
    "flags, words",
    [
        pytest.param(["--subset", 2, 10], "subset", id="subset"),
        pytest.param(["--no-class-conditional"], "class", id="no-classes"),
    ],
)
def test_report_on_other_digits_than_all_ten_is_refused(flags, words, here, accepted, refused):
    accepted(*digits(*flags))
    before = snapshot(here)
    said = refused("digits_report", "run")
    assert said.startswith("error: ")
    assert_said(words, said)
    assert snapshot(here) == before


# What belongs to a run or an export already.


def test_export_does_not_go_into_a_checkpoint(run, refused):
    """Which has checksums, as an export has."""
    before = snapshot(run)
    for name in ("step-00000001", "step-00000002"):
        assert_said("holds something else than an exported model", refused("export", run, "--out", run / name))
    assert snapshot(run) == before


def test_run_does_not_go_into_a_checkpoint_or_an_export(run, refused):
    before = snapshot(run)
    said = refused(*digits("--out", run / "step-00000002"))
    assert_said("is a checkpoint: --out is the run's folder, and --resume takes a checkpoint", said)
    assert_said("pipeline has .*model_index.json.*another --out", refused(*digits("--out", run / "pipeline")))
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "name", ["loss.png", "samples.png", "step-00000009", "samples", "pipeline/x.png", "step-00000002/x.npz"]
)
def test_samples_do_not_take_a_name_of_the_runs_own(name, run, refused):
    before = snapshot(run)
    assert_said("another name|outside of it", refused("sample", run, "--out", run / name))
    assert snapshot(run) == before


def test_checkpoint_with_another_name_is_refused(run, refused):
    """Else the steps after it would be pruned as older ones."""
    (run / "step-00000002").rename(run / "step-00000099")
    assert_said("step-00000099 holds step 2: give it its name again, step-00000002", refused(*digits("--out", run)))


def test_old_checkpoint_on_another_disk_does_not_hinder_saving(run, here, accepted):
    (run / "step-00000001").rename(here / "moved")
    (run / "step-00000001").symlink_to(here / "moved")
    before = snapshot(here / "moved")
    accepted(*digits("--steps", 6, "--checkpoint-every", 1, "--keep", 1, "--out", run))
    assert [path.name for path in run.glob("*step-*")] == ["step-00000006"] and snapshot(here / "moved") == before


def test_network_to_begin_with_is_compared(run, model, refused):
    """Its bits, and the sizes that no weight shows."""
    said = refused(*digits("--init-from", run / "step-00000002", "--net", "num_heads", 2))
    assert_said("num_heads 4, and this network 2: --net num_heads 4", said)
    flip_bit(run / f"step-00000002/model/{WEIGHTS}")
    assert_said("is missing or damaged", refused(*digits("--init-from", run / "step-00000002")))
    flip_bit(model / f"net/{WEIGHTS}")
    assert_said("is damaged", refused(*digits("--init-from", model)))


def test_run_may_begin_with_another_run(run, accepted):
    accepted(*digits("--init-from", run, "--lr", 1e-3))


def test_export_with_other_sizes_is_refused(model, refused):
    path = model / "net/config.json"
    path.write_text(path.read_text().replace('"num_heads": 4', '"num_heads": 2'))
    assert_said("config.json is damaged", refused("sample", model, "--out", "x.png"))


def test_twin_of_a_report_must_be_flow_matching(run, finished, refused):
    assert_said("is no flow matching", refused("digits_report", run, "--flow", finished))


# More of data and values.


def test_deep_colours_are_refused(here, refused):
    """48 bits a pixel, which Pillow reads as 24."""
    folder = save_images(here / "photos", "a/0.png", "b/1.png")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(range(48)) for _ in range(8)))
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (folder / "a/deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert_said(r"deep\.png.*8 bits a channel", refused(*images(folder)))


def test_files_that_are_no_volumes_are_spoken_of(here, accepted):
    folder = save_volumes(here / "scans", "0.npy", "1.npy", "2.NPY")
    (folder / "2.NPY.npy").rename(folder / "2.NPY")
    os.mkfifo(folder / "pipe.npy")
    assert_said("2 files or empty folders are left out: .*NPY, .*pipe.npy", accepted(*volumes(folder, "--dry-run")))


def test_links_in_a_circle_do_not_hang(here, accepted):
    folder = save_images(here / "photos", "a/0.png", "b/1.png")
    for link in ("a/up", "b/up", "here"):
        (folder / link).symlink_to(folder)
    accepted(*images(folder, "--dry-run"))


HUGE = "1" + 400 * "0"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--steps", HUGE], "steps must"),
        (["--epochs", "1e308"], "epochs must"),
        (["--global-batch", HUGE], "global_batch must"),
        (["--resolution", HUGE], "resolution must"),
        (["--warmup-steps", HUGE], "warmup_steps must"),
        (["--timeout", "1e300"], "timeout must"),
        (["--net", "mlp_ratio", "inf"], "net.mlp_ratio must"),
        (["--net", "hidden_size", "1000000000000"], "net.hidden_size must"),
        (["--out", "v\udcff"], "out must be a name in UTF-8"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_value_beyond_all_bounds_is_named(flags, words, here, refused):
    assert_said(words, refused(*digits(*flags, "--dry-run")))
    assert snapshot(here) == {}


@pytest.mark.parametrize("flag, name", [("--num-images", "num_images"), ("--num-steps", "num_steps")])
def test_samples_beyond_all_bounds_are_refused(flag, name, finished, here, refused):
    assert_said(f"{name} must be at most", refused("sample", finished, flag, HUGE, "--out", here / "samples"))


def test_refusal_is_heard_whatever_the_rank(here, refused, monkeypatch):
    """Unless a launcher of several processes is there."""
    monkeypatch.setenv("RANK", "1")
    assert_said("steps must be > 0, got 0", refused(*digits("--steps", 0)))
    assert_said("Unrecognized options: --sede", refused(*digits("--sede", 0)))
