"""tools/sample.py and tools/export.py, as a user calls them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import perturbed
from PIL import Image

from meanflow.config import ImprovedMeanFlowConfig, MeanFlowConfig, TrainConfig
from meanflow.data.sources import load_data
from meanflow.files import checksums, write_json
from meanflow.noise import noise
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.checkpoints import load_network, load_pipeline
from meanflow.publishing.export import export
from meanflow.sampler import average_velocity, sample
from meanflow.training.trainer import Trainer
from models import MODELS

ROOT = Path(__file__).parents[1]


def test_pictures_are_those_of_the_averaged_network(digits_run, tool, tmp_path):
    """Column by column a class: by the sampler itself, and as a PNG, a folder and an npz."""
    shown = tool("sample", digits_run, "--classes", "3", "7", "--num-images", 6, "--out", tmp_path / "x.npz")
    assert "guidance none trained in (omega 1, kappa 0)" in shown
    assert f"{tmp_path / 'x.npz'}: 6 images, meanflow, 1 step, " in shown
    net = load_network(digits_run / "step-00000002")
    y = torch.tensor([3, 7] * 3)
    with torch.no_grad():
        x = sample(lambda z, t, r: average_velocity(net, z, t, r, {"y": y}), noise(0, range(6), (1, 8, 8)))
    expected = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        assert (file["arr_0"] == expected).all()
    flags = (digits_run, "--classes", "3", "7", "--num-images", 6, "--batch-size", 4, "--out")
    tool("sample", *flags, tmp_path / "folder")
    for number, image in enumerate(expected):
        assert (np.asarray(Image.open(tmp_path / f"folder/{number:06d}.png")) == image[..., 0]).all()
    tool("sample", *flags, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png"))  # of two columns: 2 pixels between, each image 4 x larger
    assert (picture[2:34:4, 36:68:4, 0] == expected[1][..., 0]).all()
    assert not list(tmp_path.glob(".*"))


def test_averages_solvers_and_seeds_differ(digits_run, tool, tmp_path):
    pictures = {}
    for name, flags in {
        "plain": (), "ema": ("--ema", 0.5), "seed": ("--seed", 1), "euler": ("--solver", "euler", "--num-steps", 3),
        "two": ("--num-steps", 2), "again": ("--seed", 0),
    }.items():  # fmt: skip
        tool("sample", digits_run, "--num-images", 10, *flags, "--out", tmp_path / f"{name}.npz")
        pictures[name] = np.load(tmp_path / f"{name}.npz")["arr_0"]
    assert (pictures.pop("again") == pictures["plain"]).all()
    others = list(pictures.values())
    assert all((a != b).any() for i, a in enumerate(others) for b in others[:i])


def test_image_depends_on_seed_and_number_alone():
    """Its noise bit for bit, whatever the batch."""
    whole = noise(5, range(64), (1, 8, 8))
    for size in (1, 3):
        parts = [noise(5, range(64)[first : first + size], (1, 8, 8)) for first in range(0, 64, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_images_hardly_depend_on_the_batch(digits_run):
    """1e-5 in floats: products of matrices of other sizes round otherwise."""
    pipe = load_pipeline(digits_run)
    pipe.set_progress_bar_config(disable=True)
    y, e = [k % 10 for k in range(64)], pipe.noise(0, range(64))
    whole = pipe(y, latents=e, output_type="pt").images
    for size in (1, 3):
        for first in range(0, 64, size):
            part = slice(first, first + size)
            torch.testing.assert_close(
                pipe(y[part], latents=e[part], output_type="pt").images, whole[part], rtol=0, atol=1e-5
            )


@pytest.mark.slow
def test_two_processes_sample_what_one_does(digits_run, tool, tmp_path):
    """On the digits to the last bit; batches of 4 among 2 processes, 30 images."""
    tool("sample", digits_run, "--num-images", 30, "--out", tmp_path / "one.npz")
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "-q", "--config_file"]
    command = [*launch, "accelerate_configs/cpu_2proc.yaml", "tools/sample.py", str(digits_run), "--batch-size", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = ["--num-images", "30", "--out"]
    subprocess.run([*command, *flags, str(tmp_path / "two.npz")], cwd=ROOT, env=environment, check=True)
    assert (np.load(tmp_path / "one.npz")["arr_0"] == np.load(tmp_path / "two.npz")["arr_0"]).all()


def test_help_needs_no_torch(tmp_path):
    """So it answers at once."""
    for name in ("sample", "export", "push_to_hub"):
        code = "import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, 'tools'); "
        code += f"runpy.run_path('tools/{name}.py', run_name='__main__')"
        code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
        shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0 and "--" in shown.stdout, shown.stderr


@pytest.fixture
def broken(digits_run, tmp_path) -> Path:
    """Copies of the run and its export with one fault each."""
    for name in ("damaged", "half"):
        shutil.copytree(digits_run, tmp_path / name)
    weights = tmp_path / "damaged/step-00000002/ema/0.9/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    (tmp_path / "half/step-00000002/ema/0.9/diffusion_pytorch_model.safetensors").unlink()
    for name in ("cut", "empty"):
        shutil.copytree(digits_run / "pipeline", tmp_path / name)
    os.truncate(tmp_path / "cut/net/diffusion_pytorch_model.safetensors", 1000)
    (tmp_path / "empty/model_index.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "checkpoint, flags, message",
    [
        ("nowhere", [], "no such folder"),
        (".", [], "is no run with a checkpoint, no checkpoint and no exported folder"),
        ("damaged", [], "ema/0.9/diffusion_pytorch_model.safetensors is missing or damaged"),
        ("half", [], "ema/0.9/diffusion_pytorch_model.safetensors is missing or damaged"),
        ("cut", [], "cut/net/diffusion_pytorch_model.safetensors is damaged: export or download it again"),
        ("empty", [], "empty cannot be loaded: KeyError\\('net'\\)"),
        ("run", ["--classes", "cat"], "no class 'cat'"),
        ("run", ["--classes", "10"], "class must be in .0, 10., got 10"),
        ("run", ["--seed", "-1"], "seed must be >= 0, got -1"),
        ("run", ["--num-images", "0"], "num_images must be >= 1, got 0"),
        ("run", ["--num-steps", "0"], "num_steps must be >= 1, got 0"),
        ("run", ["--ema", "0.7"], "ema must be one of 0.9, 0.5 for .*, got 0.7"),
        ("run", ["--variant", "bf16"], "variant bf16 is for exported folders"),
        ("run/pipeline", ["--variant", "bf16"], "variant bf16 of .* cannot be loaded: .*bf16.safetensors"),
        ("run/pipeline", ["--ema", "0.9"], "ema 0.9 is for runs"),
        ("run", ["--solver", "ddim"], "ddim"),
        ("run", ["--revision", "v1"], "revision v1 is for the Hub"),
        ("run", ["--device", "nonsense"], "device nonsense is not there: "),
        ("run", ["--out", "/proc/x/y.png"], "/proc/x"),
        ("run", ["--out", "x.jpg"], "out must be x.png, x.npz or a folder, got x.jpg"),
    ],
)
def test_bad_input_ends_with_one_line(checkpoint, flags, message, digits_run, broken, tool, tmp_path):
    source = digits_run if checkpoint == "run" else broken / checkpoint
    source = digits_run / "pipeline" if checkpoint == "run/pipeline" else source
    out = [] if "--out" in flags else ["--out", tmp_path / "x.png"]
    shown = tool("sample", source, *flags, *out)
    assert re.search(message, shown), shown
    assert not (tmp_path / "x.png").exists()


@pytest.fixture(scope="module")
def told_run(tmp_path_factory) -> Path:
    """A run whose network is told the CFG scale, with pipeline/ in it; its network is no fresh one."""
    folder = tmp_path_factory.mktemp("told")
    torch.manual_seed(0)
    net = MODELS["DiT-XS/4"](input_size=8, in_channels=1, num_classes=10, takes_omega=True)
    perturbed(net, 0.05).save_pretrained(folder / "net")
    recipe = TrainConfig(
        out=folder / "run", model="DiT-XS/4", net={"takes_omega": 1}, steps=1, global_batch=16, ema_decay=(0.9,),
        init_from=str(folder / "net"), objective=ImprovedMeanFlowConfig(),
    )  # fmt: skip
    Trainer(recipe).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return recipe.out


def test_several_scales_make_a_strip_of_the_same_noise(told_run, tool, tmp_path):
    """A row for each scale, each of them the picture that the scale alone gives."""
    flags = ("--classes", 3, 7, 5)
    assert "9 images" in tool("sample", told_run, *flags, "--cfg-scale", 1, 4, 6, "--out", tmp_path / "x.png")
    strip = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    assert strip.shape == (3 * 34 + 2, 3 * 34 + 2)
    rows = []
    for row, scale in enumerate((1, 4, 6)):
        tool("sample", told_run, *flags, "--num-images", 3, "--cfg-scale", scale, "--out", tmp_path / f"{scale}.png")
        rows.append(np.asarray(Image.open(tmp_path / f"{scale}.png").convert("L"))[2:34])
        assert (strip[2 + 34 * row :][:32] == rows[-1]).all()
    assert (rows[0] != rows[1]).any() and (rows[1] != rows[2]).any()


def test_scales_and_intervals_that_cannot_be_end_with_one_line(told_run, digits_run, tool, caplog, tmp_path):
    out = ("--out", tmp_path / "x.png")
    assert "scale 0.5 must be >= 1" in tool("sample", told_run, "--cfg-scale", 0.5, *out)
    assert "start <= end <= 1, got 0.7 0.3" in tool("sample", told_run, "--cfg-interval", 0.7, 0.3, *out)
    assert "networks that are told the CFG scale" in tool("sample", digits_run, "--cfg-interval", 0.3, 0.7, *out)
    strip = tool("sample", told_run, "--cfg-scale", 1, 2, "--out", tmp_path / "x.npz")
    assert "out must be x.png with several --cfg-scale" in strip
    assert not (tmp_path / "x.png").exists() and not (tmp_path / "x.npz").exists()
    assert "1 images" in tool("sample", told_run, "--cfg-scale", 10.5, "--num-images", 1, *out)
    assert caplog.text.count("guidance_scale 10.5 is outside of what was trained, 1 to 8") == 1


def test_card_of_a_network_that_is_told_the_scale_shows_the_strip(told_run):
    card = (told_run / "pipeline/README.md").read_text()
    assert "](scales.png)" in card and "One row for each CFG scale, 1, 2, 4, 6," in card and "arXiv:2512.02012" in card
    assert Image.open(told_run / "pipeline/scales.png").size == (10 * 34 + 2, 4 * 34 + 2)
    assert "at any CFG scale, trained from 1 to 8, by default 2 for t in [0, 1]" in card


def test_flow_matching_and_guided_checkpoints_say_what_they_are(digits_run, tool, tmp_path):
    """By what is published of how they are sampled, which this test changes."""
    for name, changes in {"flow": {"meanflow_ratio": 0.0}, "guided": {"omega": 0.5, "kappa": 0.75}}.items():
        folder = shutil.copytree(digits_run / "pipeline", tmp_path / name)
        index = json.loads((folder / "model_index.json").read_text())
        index["sampling"] = MeanFlow.sampling(MeanFlowConfig(**changes))._asdict()
        (folder / "model_index.json").write_text(json.dumps(index))
    shown = tool("sample", tmp_path / "flow", "--solver", "meanflow", "--out", tmp_path / "x.png")
    assert "solver meanflow cannot sample a network of plain flow matching: use euler with 50 steps" in shown
    assert "64 images, euler, 50 steps" in tool("sample", tmp_path / "flow", "--out", tmp_path / "x.png")
    shown = tool("sample", tmp_path / "guided", "--out", tmp_path / "x.png")
    assert "guidance trained in, effective scale 2 for t in [0, 1] (omega 0.5, kappa 0.75)" in shown
    shown = tool("sample", tmp_path / "guided", "--cfg-scale", 3, "--out", tmp_path / "x.png")
    assert "guidance is trained into this network, at scale 2, and costs nothing; 3 cannot be had by sampling" in shown


def test_finished_run_is_exported_with_its_card(digits_run):
    folder = digits_run / "pipeline"
    card = (folder / "README.md").read_text()
    for words in (
        "library_name: diffusers", "license: other", "DiT-XS/4, 1x8x8", "351,120 parameters", "trust_remote_code=True",
        '"objective.meanflow_ratio": 0.25', "pip install diffusers timm", "![samples](samples.png)",
    ):  # fmt: skip
        assert words in card
    assert str(digits_run.parent) not in card and "init_from" not in card
    assert Image.open(folder / "samples.png").size == (10 * 34 + 2, 8 * 34 + 2)


def test_export_has_variants_metrics_and_what_the_card_is_told(digits_run, tool, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    (run / "metrics.json").write_text(json.dumps({"MeanFlow, 1 step": {"accuracy": 0.98, "energy_distance": 0.19}}))
    flags = ["--variants", "bf16", "fp16", "--license", "mit", "--datasets", "user/digits"]
    tool("export", run, *flags, "--out", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    for words in ("license: mit", "- user/digits", "| MeanFlow, 1 step | 0.98 | 0.19 |", "accuracy | energy distance"):
        assert words in card
    full, half = load_pipeline(tmp_path / "model"), load_pipeline(tmp_path / "model", variant="bf16")
    net = load_network(run / "step-00000002")
    for a, b, c in zip(full.net.parameters(), half.net.parameters(), net.parameters()):
        assert torch.equal(a, c) and torch.equal(b, c.bfloat16().float())
    shown = tool("sample", tmp_path / "model", "--variant", "fp16", "--dtype", "bf16", "--out", tmp_path / "x.png")
    assert "64 images" in shown
    tool("export", run, "--ema", 0.5, "--out", tmp_path / "model")  # over it; measured were other weights
    assert "| MeanFlow, 1 step |" not in (tmp_path / "model/README.md").read_text()
    other, net = load_pipeline(tmp_path / "model"), load_network(run / "step-00000002", 0.5)
    assert all(torch.equal(a, b) for a, b in zip(other.net.parameters(), net.parameters()))
    assert not (tmp_path / "model/net/diffusion_pytorch_model.bf16.safetensors").exists()
    assert "holds something else than an exported model" in tool("export", run, "--out", run)
    assert "is no run with a checkpoint" in tool("export", tmp_path / "nowhere", "--out", tmp_path / "y")


def test_export_that_fails_leaves_what_was_there(digits_run, tmp_path, monkeypatch):
    out = shutil.copytree(digits_run / "pipeline", tmp_path / "model")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("meanflow.publishing.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(digits_run, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))


def frames(path) -> list[np.ndarray]:
    with Image.open(path) as picture:
        found = []
        for number in range(picture.n_frames):
            picture.seek(number)
            found.append(np.asarray(picture.convert("L"), dtype=float))
        return found


def test_gif_goes_from_one_noise_to_the_samples_of_both_ways(digits_run, tool, tmp_path):
    shown = tool("sample", digits_run, "--gif", "--num-steps", 5, "--num-images", 4, "--out", tmp_path / "x.gif")
    assert "4 images from noise to data, 1 step beside 5 of Euler's method" in shown
    found = frames(tmp_path / "x.gif")
    half = (found[0].shape[1] - 12) // 2
    assert len(found) > 20 and np.abs(found[0][18:, :half] - found[0][18:, -half:]).max() < 2
    assert np.abs(found[-1] - found[0]).max() > 50
    pipe = load_pipeline(digits_run)
    one = pipe([0, 1, 2, 3], latents=pipe.noise(0, range(4)), output_type="np").images[0, :, :, 0]
    corner = found[-1][18 + 2 : 18 + 2 + 48 : 6, 2 : 2 + 48 : 6]  # 8 x 8 pixels, each enlarged to 6 x 6
    assert np.abs(corner - 255 * one).max() < 8


def test_trajectory_is_that_of_the_sampler(digits_run):
    from meanflow.sampler import euler
    from samples.pictures import trajectory

    pipe = load_pipeline(digits_run)
    pipe.set_progress_bar_config(disable=True)
    e, y = pipe.noise(0, range(3)), torch.tensor([1, 2, 3])
    states = trajectory(pipe, e, y.tolist(), 4, "euler")
    with torch.no_grad():
        for steps, state in enumerate(states):
            grid = [1 - step / 4 for step in range(steps + 1)]
            z = e if steps == 0 else sample(lambda z, t, r: pipe.net(z, t, 0 * t, y), e, grid=grid)
            assert torch.allclose(state, z, atol=1e-5)
        assert torch.allclose(states[-1], euler(lambda z, t, r: pipe.net(z, t, t - r, y), e, 4), atol=1e-5)


def test_walk_has_a_row_for_each_class_from_one_noise_to_another(digits_run, tool, tmp_path):
    flags = ("--classes", 3, 7, "--num-images", 5, "--out", tmp_path / "walk.png")
    assert "5 images a row" in tool("sample", digits_run, "--walk", 4, 9, *flags)
    picture = np.asarray(Image.open(tmp_path / "walk.png").convert("L"), dtype=float)
    assert picture.shape == (2 * 50 + 2, 5 * 50 + 2)
    pipe = load_pipeline(digits_run)
    for place, seed in ((0, 4), (4, 9)):
        image = pipe([7], latents=pipe.noise(seed, [0]), output_type="np").images[0, :, :, 0]
        shown = picture[52 : 52 + 48 : 6, 50 * place + 2 : 50 * place + 2 + 48 : 6]
        assert np.abs(shown - 255 * image).max() <= 1


def test_neighbours_are_the_nearest_training_digits(digits_run, tool, tmp_path):
    shown = tool("sample", digits_run, "--neighbours", "--num-images", 3, "--out", tmp_path / "x.png")
    assert "distance to the nearest of 1,347 training samples" in shown
    pipe, real = load_pipeline(digits_run), load_data(TrainConfig(steps=1)).x
    z = pipe([0, 1, 2], latents=pipe.noise(0, range(3)), output_type="latent").images
    nearest = ((z[:, None] - real[None]) ** 2).flatten(2).sum(2).argmin(1)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("L"), dtype=float)
    for place, index in enumerate(nearest):
        below = picture[52 : 52 + 48 : 6, 50 * place + 2 : 50 * place + 2 + 48 : 6]
        assert np.abs(below - 127.5 * (real[index, 0].numpy() + 1)).max() <= 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gif", "--out", "x.png"], "out must be x.gif with --gif, got x.png"),
        (["--gif", "--solver", "heun"], "solver must be left out with --gif"),
        (["--out", "x.gif"], "out must be x.png, x.npz or a folder without --gif"),
        (["--gif", "--neighbours", "--out", "x.gif"], "picture must be one of gif, walk and neighbours"),
        (["--walk", -1, 2], "walk must be two seeds >= 0"),
        (["--walk", 1, 2, "--cfg-scale", 1, 2], "cfg_scale must be one in this picture"),
        (["--neighbours", "--num-images", 1000], "num_images must be at most 256 in this picture, got 1000"),
    ],
)
def test_pictures_that_cannot_be_are_refused(flags, message, digits_run, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in tool("sample", digits_run, *flags)


def test_neighbours_of_a_run_that_mirrors_are_looked_for_in_mirror_images_too(digits_run, tool, tmp_path):
    run = shutil.copytree(digits_run, tmp_path / "run")
    checkpoint = run / "step-00000002"
    recipe = json.loads((checkpoint / "recipe.json").read_text())
    (checkpoint / "recipe.json").write_text(json.dumps({**recipe, "flip": True}))
    write_json(checkpoint / "checksums.json", checksums_without_own(checkpoint))
    tool("sample", run, "--neighbours", "--num-images", 3, "--out", tmp_path / "x.png")
    pipe, real = load_pipeline(digits_run), load_data(TrainConfig(steps=1)).x
    z = pipe([0, 1, 2], latents=pipe.noise(0, range(3)), output_type="latent").images
    both = torch.cat([real, real.flip(-1)])
    nearest = ((z[:, None] - both[None]) ** 2).flatten(2).sum(2).argmin(1)
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("L"), dtype=float)
    for place, index in enumerate(nearest):
        below = picture[52 : 52 + 48 : 6, 50 * place + 2 : 50 * place + 2 + 48 : 6]
        assert np.abs(below - 127.5 * (both[index, 0].numpy() + 1)).max() <= 1


def checksums_without_own(folder: Path) -> dict[str, str]:
    return {name: value for name, value in checksums(folder).items() if name != "checksums.json"}


def test_neighbours_of_an_export_are_refused(digits_run, tool, tmp_path):
    shown = tool("sample", digits_run / "pipeline", "--neighbours", "--out", tmp_path / "x.png")
    assert "is no run: an exported model has no data" in shown
