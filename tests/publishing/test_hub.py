"""To and from a Hub on localhost: what is pushed, who may read it, and faults, which must not touch a run."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import hub_server
import numpy as np
import pytest
import torch
from conftest import save_vae, small_disk
from PIL import Image
from safetensors.torch import load_file

import meanflow.publishing.hub
from meanflow.config import TrainConfig
from meanflow.data.vae import fingerprint, load_vae, vae_metadata
from meanflow.publishing.checkpoints import load_pipeline
from meanflow.training.checkpoint import init_weights
from meanflow.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SAMPLE = [sys.executable, "tools/sample.py"]


@pytest.fixture
def planted(hub, monkeypatch) -> hub_server.Hub:
    """The Hub, for processes with a login name that must not leak."""
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "planted-login")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return hub


def call(command: list, code: int | None = 0, **environment) -> str:
    environment = {**os.environ, **environment}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert code is None or done.returncode == code, done.stderr
    return done.stdout + done.stderr


def arr(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["arr_0"]


BY_HAND = """if True:
    import sys, numpy as np, torch
    from meanflow.noise import noise
    from meanflow.sampler import average_velocity
    from meanflow.sampler import sample
    from models.dit import DiT

    net = DiT.from_pretrained("user/digits", subfolder="net").eval()
    y = torch.arange(20) % 10
    with torch.no_grad():
        x = sample(lambda z, t, r: average_velocity(net, z, t, r, {"y": y}), noise(3, range(20), (1, 8, 8)))
    pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    np.savez(sys.argv[1], pixels.numpy())
"""

BY_A_STRANGER = """if True:
    import sys, numpy as np
    from diffusers import DiffusionPipeline
    try:
        import meanflow
    except ImportError:
        pipe = DiffusionPipeline.from_pretrained("user/digits", trust_remote_code=True)
        images = pipe([k % 10 for k in range(20)], latents=pipe.noise(3, range(20)), output_type="np").images
        np.savez(sys.argv[1], (images * 255).round().astype("uint8"))
"""


@pytest.mark.slow
def test_four_ways_from_one_seed_give_the_same_pixels(hub, digits_run, tool, tmp_path):
    """Each in a process of its own; the last where this project cannot be imported."""
    run = digits_run
    if given := os.environ.get("MEANFLOW_TEST_RUN"):  # another run on the digits, such as that of make demo
        run = Path(given)
    tool("push_to_hub", run, "user/digits")
    flags = ["--num-images", 20, "--seed", 3, "--out"]
    call([*SAMPLE, run, *flags, tmp_path / "run.npz"])
    call([*SAMPLE, "user/digits", *flags, tmp_path / "id.npz"])
    call([sys.executable, "-c", BY_HAND, tmp_path / "hand.npz"])
    call([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    packages = tmp_path / "venv/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "others.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")) + "\n")
    # A .pth within a .pth's folder is not read: so the editable install of this project is not there.
    stranger = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", BY_A_STRANGER, str(tmp_path / "stranger.npz")],
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, capture_output=True, text=True,
    )  # fmt: skip
    assert stranger.returncode == 0, stranger.stderr
    expected = arr(tmp_path / "run.npz")
    assert expected.shape == (20, 8, 8, 1) and len(np.unique(expected)) > 20
    for name in ("id", "hand", "stranger"):
        assert (arr(tmp_path / f"{name}.npz") == expected).all(), name


def test_private_repository_needs_the_token_and_revisions_are_kept_apart(hub, digits_run, tool, monkeypatch):
    assert "pushed: " in tool("push_to_hub", digits_run / "pipeline", "user/private")
    assert hub.repos["user/private"]["private"]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the Hub does not give it: 401"):
        patch.delenv("HF_TOKEN")
        load_pipeline("user/private")
    tool("push_to_hub", digits_run, "user/private", "--revision", "v1")
    assert hub.files("user/private", "v1").keys() == hub.files("user/private").keys()
    for revision in (None, "v1"):
        assert load_pipeline("user/private", revision=revision).id2label[3] == "3"
    with pytest.raises(ValueError, match="Revision v2 not found"):
        load_pipeline("user/private", revision="v2")
    tool("push_to_hub", digits_run / "pipeline", "user/open", "--public")
    assert not hub.repos["user/open"]["private"]
    monkeypatch.delenv("HF_TOKEN")
    load_pipeline("user/open")


def test_push_leaves_no_weights_of_an_earlier_one(hub, digits_run, tool, tmp_path):
    """Else variant="bf16" would load older weights than float32; files of others stay."""
    tool("export", digits_run, "--variants", "bf16", "--out", tmp_path / "model")
    tool("push_to_hub", tmp_path / "model", "user/digits")
    half, repo = "net/diffusion_pytorch_model.bf16.safetensors", hub.repos["user/digits"]
    assert half in hub.files("user/digits")
    hub.commit(repo, "main", {**repo["commits"][-1][1], "LICENSE": (b"MIT", False)})
    tool("push_to_hub", digits_run / "pipeline", "user/digits")
    assert half not in hub.files("user/digits") and "LICENSE" in hub.files("user/digits")
    assert "net/diffusion_pytorch_model.safetensors" in hub.files("user/digits")


@pytest.mark.parametrize("token, message", [("hf_wrong", "401"), (hub_server.READ_TOKEN, "403")])
def test_push_without_permission_ends_with_one_line(token, message, hub, digits_run, tool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    shown = tool("push_to_hub", digits_run / "pipeline", "user/digits")
    assert shown.startswith("error: user/digits could not be pushed: ") and message in shown
    assert "\n" not in shown and token not in shown


@pytest.mark.slow
def test_full_disk_for_the_cache_ends_with_one_line(hub, digits_run, tool, tmp_path):
    tool("push_to_hub", digits_run / "pipeline", "user/digits")
    small = tmp_path / "small"
    with small_disk(small, "1m"):
        shown = call([*SAMPLE, "user/digits", "--out", tmp_path / "x.png"], code=2, HF_HOME=str(small))
        assert "error: user/digits is no folder, and the Hub does not give it: " in shown and "space" in shown


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "planted-folder"
    (folder / "class").mkdir(parents=True)
    for number in range(32):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class/{number}.png")
    return folder


def short_recipe(out: Path, images: Path) -> TrainConfig:
    return TrainConfig(
        out=out, data=str(images), resolution=8, model="DiT-XS/8", steps=6, global_batch=8,
        ema_decay=(0.9,), log_every=1, checkpoint_every=2, sample_every=10**6, keep=1,
    )  # fmt: skip


@pytest.fixture
def recipe(images, tmp_path) -> TrainConfig:
    return short_recipe(tmp_path / "run", images)


def trained(recipe: TrainConfig, deadline: float = 120, number: int | None = None) -> int:
    """Trains in a process of its own, with a signal once it waits for the Hub if one is given; its exit code."""

    def work():
        meanflow.publishing.hub.DEADLINE = deadline
        Trainer(recipe).train()

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    if number is not None:
        while child.is_alive() and not (recipe.out / "pipeline").exists():
            time.sleep(0.1)
        time.sleep(1)
        os.kill(child.pid, number)
    child.join()
    return child.exitcode


def digest(out: Path) -> str:
    """Of all that was trained: weights, average and Adam."""
    values = {}
    for path in sorted((out / "step-00000006").rglob("*.safetensors")):
        values |= {f"{path.parent.name}.{name}": value for name, value in load_file(path).items()}
    return hashlib.sha256(b"".join(values[name].numpy().tobytes() for name in sorted(values))).hexdigest()


@pytest.fixture(scope="module")
def plain(images, tmp_path_factory) -> str:
    """What a run without a push ends with."""
    recipe = short_recipe(tmp_path_factory.mktemp("plain") / "run", images)
    assert trained(recipe) == 0
    return digest(recipe.out)


@pytest.mark.slow
def test_run_pushes_as_it_goes_and_at_its_end(planted, recipe, plain, capfd):
    """The exported model, private, with no token, login or place of this machine in it or in what was printed."""
    pushing = replace(recipe, push_to_hub="user/run", push_every=2)
    assert trained(pushing) == 0
    said = capfd.readouterr()
    assert "user/run: pushed" in said.err
    files = planted.files("user/run")
    assert (
        files["net/diffusion_pytorch_model.safetensors"]
        == (recipe.out / "pipeline/net/diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert planted.repos["user/run"]["private"] and not any("optimizer" in name for name in files)
    everything = b"".join(files.values()) + (said.out + said.err + (recipe.out / "push.log").read_text()).encode()
    assert hub_server.TOKEN.encode() not in everything and b"planted-login" not in everything
    pushed = b"".join(files.values())
    assert b"planted-folder" not in pushed and str(recipe.out.parent).encode() not in pushed
    assert not (recipe.out / ".push").exists()
    assert digest(recipe.out) == plain


def down(handler, path) -> bool:
    handler.close_connection = True
    handler.connection.close()
    return True


def hanging(handler, path) -> bool:
    time.sleep(60)
    return down(handler, path)


def broken(handler, path) -> bool:
    handler.read_body()
    handler.answer(503, {"error": "later"})
    return True


def cut(handler, path) -> bool:
    """Closes the connection amid the upload of a large file."""
    if not path.startswith("/lfs/"):
        return False
    handler.rfile.read(1000)
    return down(handler, path)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [down, hanging, broken, cut, "401", "403"])
def test_faults_of_the_hub_do_not_touch_the_run(fault, planted, recipe, plain, capfd, monkeypatch):
    """The weights are those of a run that does not push; the command that it names completes the push."""
    if isinstance(fault, str):
        monkeypatch.setenv("HF_TOKEN", {"401": "hf_wrong", "403": hub_server.READ_TOKEN}[fault])
    else:
        planted.fault = fault
    pushing = replace(recipe, push_to_hub="user/run", push_every=3)
    assert trained(pushing, deadline=15) == 0
    shown = capfd.readouterr().err
    assert "user/run: not pushed, " in shown
    command = shown.rpartition("to push: python ")[2].splitlines()[0].split()
    assert "hf_wrong" not in shown and hub_server.READ_TOKEN not in shown
    assert digest(recipe.out) == plain
    if fault not in (cut, "401"):
        return
    planted.fault = lambda handler, path: False
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert "pushed: " in call([sys.executable, *command])
    assert "net/diffusion_pytorch_model.safetensors" in planted.files("user/run")


def test_push_is_tried_again(hub, digits_run, tool):
    """After two answers of 503."""
    faults = iter([True, True])
    hub.fault = lambda handler, path: next(faults, False) and broken(handler, path)
    shown = tool("push_to_hub", digits_run / "pipeline", "user/digits")
    assert "again in 1 s" in shown and "pushed: " in shown


@pytest.mark.slow
def test_full_disk_for_the_cache_does_not_touch_the_run(planted, recipe, plain, tmp_path, capfd, monkeypatch):
    """An upload needs none: it is pushed all the same."""
    small = tmp_path / "small"
    with small_disk(small, "1m"):
        with pytest.raises(OSError, match="No space left"):
            (small / "full").write_bytes(bytes(2**21))
        monkeypatch.setenv("HF_HOME", str(small / "hf"))
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        assert trained(replace(recipe, push_to_hub="user/run", push_every=3)) == 0
    assert "user/run: pushed" in capfd.readouterr().err and digest(recipe.out) == plain


def test_vae_of_the_hub_is_that_of_its_revision(hub, vae, tmp_path):
    """And the commit is noted."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("user/vae")
    first = api.upload_folder(repo_id="user/vae", folder_path=vae).oid
    api.create_branch("user/vae", branch="v1")
    api.upload_folder(repo_id="user/vae", folder_path=save_vae(tmp_path / "other", seed=1))
    old, new = load_vae("user/vae@v1"), load_vae("user/vae")
    assert fingerprint(old) == fingerprint(load_vae(str(vae))) != fingerprint(new)
    assert vae_metadata(old, "user/vae@v1")["vae_revision"] == first
    with pytest.raises(ValueError, match="vae: user/vae@v2 is no folder, and .*Revision v2 not found"):
        load_vae("user/vae@v2")


def test_push_that_cannot_begin_is_said_and_no_fault_of_the_run(recipe, tmp_path, capfd, monkeypatch):
    """Such as on a disk that is full; without hard links the files are copied."""
    pusher = meanflow.publishing.hub.Pusher(replace(recipe, push_to_hub="user/run"))
    pusher.start(tmp_path / "nowhere")
    assert pusher.child is None and "user/run: no push, " in capfd.readouterr().err
    assert "not pushed, it could not begin" in pusher.finish(tmp_path / "nowhere", "", lambda: False)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    (tmp_path / "a").write_text("text")
    meanflow.publishing.hub.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"
    with pytest.raises(ValueError, match="push_to_hub must be a Hub id, user/name, got a//b"):
        replace(recipe, push_to_hub="a//b")


@pytest.mark.slow
def test_signal_does_not_wait_for_the_hub(planted, recipe, capfd):
    planted.fault = hanging
    begin = time.perf_counter()
    assert trained(replace(recipe, push_to_hub="user/run"), deadline=300, number=signal.SIGTERM) == 0
    assert time.perf_counter() - begin < 60
    assert "user/run: not pushed, the run was stopped" in capfd.readouterr().err


def test_training_begins_with_weights_from_the_hub(hub, digits_run, tool):
    tool("push_to_hub", digits_run / "pipeline", "user/start", "--revision", "v1")
    net, expected = load_pipeline(digits_run).net, load_pipeline(digits_run / "pipeline").net
    torch.nn.init.zeros_(net.final_layer.linear.weight)
    init_weights(net, "user/start@v1")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected.parameters()))
    with pytest.raises(ValueError, match="user/start@v2 is no folder, and the Hub does not give it: 404"):
        init_weights(net, "user/start@v2")
