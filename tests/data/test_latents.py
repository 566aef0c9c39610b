"""Cached latents: what goes in comes out, sampled as the posterior says, and damage is refused by name."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import save_vae

from caching.shards import claim_cache, finish, is_finished, write_shard
from meanflow.config import TrainConfig
from meanflow.data.latents import Latents, read_metadata, verify_shards
from meanflow.data.loader import make_loader
from meanflow.data.sources import load_data
from meanflow.data.vae import load_vae
from meanflow.objectives.meanflow import MeanFlow
from tools.cache_latents import Options, cache

SHAPE = (2, 2, 3, 4, 4)  # flips, mean and standard deviation, C, H, W
CLASSES = ["cat", "dog", "eel"]
RECIPE = TrainConfig(resolution=32, vae="some/vae", scaling_factor=0.5, flip=True, steps=1)


def write(folder: Path, sizes: tuple[int, ...] = (5, 3, 4), **settings) -> np.ndarray:
    """A cache of shards of these sizes; returns its moments. The mirror image's mean is 100 higher."""
    random = np.random.default_rng(0)
    settings = {"shape": SHAPE, "classes": CLASSES, "vae": "some/vae", "vae_sha256": None, **settings}
    claim_cache(folder, {"resolution": 32, "scaling_factor": 0.5, "shift_factor": None, **settings})
    moments = random.standard_normal((sum(sizes), *settings["shape"])).astype(np.float16)
    moments[:, :, 1] = 0.1 + np.abs(moments[:, :, 1])
    moments[:, 1, 0] += 100
    start = 0
    for number, size in enumerate(sizes):
        rows = slice(start, start + size)
        write_shard(folder, number, moments[rows], np.arange(sum(sizes))[rows] % 3, CLASSES)
        start += size
    finish(folder, len(sizes))
    return moments


def generators(count: int):
    return [torch.Generator().manual_seed(slot) for slot in range(count)]


def test_moments_and_labels_come_back_bit_for_bit(tmp_path):
    """Across the borders of shards, in any order, for both flips."""
    moments = write(tmp_path / "cache")
    latents = Latents(tmp_path / "cache", RECIPE)
    assert len(latents) == 12 and latents.shape == SHAPE[2:] and latents.labels.tolist() == [0, 1, 2] * 4
    indices, flips = [11, 0, 4, 5, 7, 8, 0], [0, 1, 1, 0, 1, 0, 0]
    assert np.array_equal(latents.read(indices, flips).numpy(), moments[indices, flips])


def test_datasets_opens_a_cache_by_memory_map(tmp_path):
    moments = write(tmp_path / "cache")
    rows = datasets.load_from_disk(str(tmp_path / "cache"))
    assert len(rows) == 12 and rows.features["label"].names == CLASSES and rows[4]["label"] == 1
    assert np.array_equal(np.array(rows[7]["moments"], np.float16), moments[7])
    assert sorted(Path(file["filename"]).name for file in rows.cache_files) == [f"data-0000{n}.arrow" for n in range(3)]


def test_visits_have_the_mean_and_variance_of_the_moments_and_half_of_them_are_mirrored(tmp_path):
    """4,000 visits of one image: each of 2 x 48 entries within 4.5 standard errors of mean and variance (by chance one
    such test in 750 fails; the seeds are fixed), flips within 3 of a half. A standard deviation taken for a variance
    fails."""
    moments = torch.from_numpy(write(tmp_path / "cache")[2]).double()
    latents = Latents(tmp_path / "cache", replace(RECIPE, scaling_factor=0.5))
    x, cond = latents.batch([2] * 4000, generators(4000))
    z = x.double() / 0.5  # back to the VAE's units
    flipped = z.mean((1, 2, 3)) > 50
    assert abs(flipped.double().mean() - 0.5) < 3 * 0.5 / 4000**0.5 and set(cond["y"].tolist()) == {2}
    for flip in (0, 1):
        visits = z[flipped == bool(flip)]
        mean, std = moments[flip]
        assert ((visits.mean(0) - mean).abs() < 4.5 * std / len(visits) ** 0.5).all()
        assert ((visits.var(0) / std**2 - 1).abs() < 4.5 * (2 / len(visits)) ** 0.5).all()


def test_without_flip_no_visit_is_mirrored(tmp_path):
    write(tmp_path / "cache")
    x, _ = Latents(tmp_path / "cache", replace(RECIPE, flip=False)).batch(list(range(12)) * 20, generators(240))
    assert x.abs().max() < 20


def test_scaling_is_the_vaes_and_channel_normalisation_the_caches(tmp_path):
    """Over all visits each channel has mean 0 and deviation 1 under "channel"."""
    write(tmp_path / "cache", (300,), shift_factor=0.25)
    raw, _ = Latents(tmp_path / "cache", RECIPE).batch([0, 1], generators(2))
    latents = Latents(tmp_path / "cache", replace(RECIPE, normalization="channel"))
    indices = list(range(300)) * 20
    x, _ = latents.batch(indices, generators(len(indices)))
    per_channel = x.double().transpose(0, 1).flatten(1)
    assert per_channel.mean(1).abs().max() < 0.02 and (per_channel.std(1) - 1).abs().max() < 0.02
    # Both are affine maps of the same draw.
    space, channel = Latents(tmp_path / "cache", RECIPE), latents
    shift, scale = space.shift_and_scale("cpu")
    same = channel.normalize(raw / scale + shift)
    torch.testing.assert_close(latents.batch([0, 1], generators(2))[0], same, rtol=1e-4, atol=1e-4)
    assert shift.item() == 0.25 and scale.item() == 0.5


def test_normalisation_by_the_official_constants_of_improved_meanflow(tmp_path):
    """(latent - mean) / std of the latents before any scaling; only for four channels."""
    write(tmp_path / "cache", (8,), shape=(2, 2, 4, 4, 4))
    raw = Latents(tmp_path / "cache", RECIPE).batch([0, 1], generators(2))[0] / 0.5
    latents = Latents(tmp_path / "cache", replace(RECIPE, normalization="imf"))
    mean = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409]).view(4, 1, 1)
    std = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003]).view(4, 1, 1)
    torch.testing.assert_close(latents.batch([0, 1], generators(2))[0], (raw - mean) / std, rtol=1e-5, atol=1e-5)
    write(tmp_path / "three", (8,))
    with pytest.raises(ValueError, match="normalization must be another one for latents of 3 channels, got imf"):
        Latents(tmp_path / "three", replace(RECIPE, normalization="imf"))


def test_statistics_count_both_flips(tmp_path):
    moments = write(tmp_path / "cache").astype(np.float64)
    metadata = read_metadata(tmp_path / "cache")
    mean, std = moments[:, :, 0], moments[:, :, 1]
    assert metadata["channel_mean"] == pytest.approx(mean.mean((0, 1, 3, 4)))
    assert metadata["channel_std"] == pytest.approx(
        np.sqrt((mean**2 + std**2).mean((0, 1, 3, 4)) - mean.mean((0, 1, 3, 4)) ** 2)
    )
    assert metadata["count"] == 12 and metadata["count_per_class"] == [4, 4, 4]


def test_the_loader_draws_the_same_latents_however_the_run_is_divided(tmp_path):
    """Posterior draw and flip are the slot's, on 1 or 2 processes, with or without loading processes."""
    write(tmp_path / "cache", (40,))
    recipe = replace(RECIPE, steps=3, global_batch=8, data=str(tmp_path / "cache"))

    def samples(num_processes: int, workers: int) -> set:
        loaders = [
            make_loader(replace(recipe, workers=workers), MeanFlow, load_data(recipe), range(3), process, num_processes)
            for process in range(num_processes)
        ]
        return {
            (tuple(x.flatten().tolist()), t.item())
            for loader in loaders
            for b in loader
            for x, t in zip(b.x, b.draws.t)
        }

    one = samples(1, 0)
    assert len(one) == 24 and samples(2, 0) == one and samples(1, 2) == one


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: flip_a_byte(folder / "data-00001.arrow"), "data-00001.arrow is damaged: its checksum is not"),
        (
            lambda folder: (folder / "data-00002.arrow").write_bytes((folder / "data-00002.arrow").read_bytes()[:-100]),
            r"data-00002.arrow is damaged: it has \d+ bytes, and had \d+",
        ),
        (lambda folder: (folder / "data-00000.arrow").unlink(), "data-00000.arrow is missing"),
        (lambda folder: (folder / "latents.json").write_text("{"), "latents.json is missing or damaged"),
        (lambda folder: (folder / "latents.json").unlink(), "has no latents.json"),
    ],
)
def test_damage_is_refused_with_the_file_and_the_reason(harm, message, tmp_path):
    write(tmp_path / "cache")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "cache").iterdir()}
    message = message.replace("1028", str(sizes["data-00002.arrow"] - 100)).replace(
        "1128", str(sizes["data-00002.arrow"])
    )
    harm(tmp_path / "cache")
    with pytest.raises(ValueError, match=message) as error:
        verify_shards(tmp_path / "cache", Latents(tmp_path / "cache", RECIPE).shards)
    assert str(tmp_path / "cache") in str(error.value) and "\n" not in str(error.value)


def test_unfinished_cache_is_refused(tmp_path):
    claim_cache(tmp_path / "cache", {"resolution": 32})
    with pytest.raises(ValueError, match="cache is unfinished: give tools/cache_latents.py the same command again"):
        load_data(replace(RECIPE, data=str(tmp_path / "cache")))


def test_shard_that_is_damaged_before_the_end_is_not_finished(tmp_path):
    """Else the same command could never mend it; nor is one whose note a crash cut short."""
    settings = {"resolution": 32, "scaling_factor": 0.5, "shift_factor": None, "shape": SHAPE, "classes": CLASSES}
    claim_cache(tmp_path, settings)
    for number in range(3):
        write_shard(tmp_path, number, np.zeros((2, *SHAPE), np.float16), np.zeros(2, np.int64), CLASSES)
    flip_a_byte(tmp_path / "data-00001.arrow")
    with pytest.raises(ValueError, match="data-00001.arrow is damaged.* The same command makes it anew"):
        finish(tmp_path, 3)
    (tmp_path / ".progress/00002.json").write_text("")
    assert [is_finished(tmp_path, number) for number in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resolution": 64}, "resolution 32 there, 64 here.* say --resolution 32"),
        ({"scaling_factor": 0.18125}, "scaling_factor 0.5 there, 0.18125 here"),
        ({"vae": "other/vae"}, "vae some/vae there, other/vae here"),
        ({"vae": None}, "vae some/vae there, None here"),
    ],
)
def test_latents_that_the_recipe_does_not_expect_are_refused_with_the_difference(changes, message, tmp_path):
    write(tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load_data(replace(RECIPE, data=str(tmp_path / "cache"), **changes))


@pytest.fixture(scope="module")
def cached(photos, vae, tmp_path_factory) -> Path:
    """The photographs' latents, by the tool."""
    out = tmp_path_factory.mktemp("cached") / "latents"
    cache(Options(out=out, images=str(photos), vae=str(vae), resolution=32, shard_size=16, batch_size=8, workers=0))
    return out


def test_decoded_posterior_mean_is_the_vaes_own_reconstruction(cached, photos, vae):
    """To float16's rounding of the mean, for the image and its mirror image."""
    recipe = replace(RECIPE, data=str(cached), vae=str(vae), scaling_factor=0.18215)
    latents, net = load_data(recipe), load_vae(str(vae))
    pixels, cond = load_data(replace(recipe, data=str(photos), vae=None, flip=False)).batch(range(40), ())
    assert torch.equal(latents.labels, cond["y"])
    for flip in (0, 1):
        image = pixels.flip(-1) if flip else pixels
        with torch.no_grad():
            expected = net.decode(net.encode(image).latent_dist.mean).sample
        mean = latents.read(range(40), [flip] * 40)[:, 0].float()
        actual = latents.to_pixels(latents.normalize(mean))
        assert (actual - expected).abs().max() < 2e-3 * expected.abs().max()


def test_images_through_the_vae_on_the_fly_are_what_the_cache_holds(cached, photos, vae):
    """The same slot draws the same latent, up to float16's rounding of the moments."""
    recipe = replace(RECIPE, data=str(cached), vae=str(vae), scaling_factor=0.18215)
    live = load_data(replace(recipe, data=str(photos)))
    assert live.shape == (4, 4, 4) and live.num_classes == 2 and len(live) == 40
    x, cond = live.batch([3, 30], generators(2))
    expected, cached_cond = load_data(recipe).batch([3, 30], generators(2))
    torch.testing.assert_close(live.encode(*x), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(cond["y"], cached_cond["y"])


def test_the_weights_of_a_vae_decide_wherever_it_lies(cached, vae, tmp_path):
    recipe = replace(RECIPE, data=str(cached), scaling_factor=0.18215)
    assert load_data(replace(recipe, vae=str(save_vae(tmp_path / "copy"))))
    with pytest.raises(ValueError, match="was made by another VAE than .*other"):
        load_data(replace(recipe, vae=str(save_vae(tmp_path / "other", seed=1))))


def test_folders_that_are_no_vae_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text(json.dumps({"_class_name": "DiT"}))
    for name, message in (
        ("empty", "No such file or directory: .*config.json"),
        ("text", "is of DiT"),
        ("none", "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vae(str(tmp_path / name))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Reading all of a cache 8 times as large takes no more memory of the process's own: the files are mapped."""
    code = """if True:
        import sys, re
        from pathlib import Path
        sys.path += ["tests", "tests/data", "tools"]
        from test_latents import RECIPE, Latents
        for folder in sys.argv[1:]:
            latents = Latents(Path(folder), RECIPE)
            for start in range(0, len(latents), 50):
                latents.read(range(start, start + 50), [1] * 50)
            print(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])"""
    folders = [tmp_path / "small", tmp_path / "large"]
    for folder, sizes in zip(folders, ((4000,), (4000,) * 8)):
        write(folder, sizes)
    command = [sys.executable, "-c", code, *map(str, folders)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    small, large = (int(kib) * 1024 for kib in shown.stdout.split())
    size = sum(path.stat().st_size for path in folders[1].glob("*.arrow"))
    assert size > 6e6 and large - small < 0.2 * size
