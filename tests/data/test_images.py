"""Images from every kind of source; the crop that ImageNet's reference statistics assume."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from meanflow.data.base import UnreadableSample
from meanflow.data.images import ImageFiles, center_crop


def test_crop_is_the_middle_square():
    """A picture whose middle third is white: a crop from a corner, or a squeezed picture, fails."""
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255
    assert np.asarray(center_crop(Image.fromarray(wide), 64)).min() == 255
    tall = Image.fromarray(wide.transpose(1, 0, 2).copy())
    assert np.asarray(center_crop(tall, 64)).min() == 255


def test_crop_halves_by_a_box_filter_before_it_scales():
    """4 x 4 pixels averaged, exactly; by one bicubic step they would weigh their neighbours."""
    random = np.random.default_rng(0)
    image = random.integers(0, 64, (32, 32, 3)) * 4  # averages of 4 x 4 round the same in two steps as in one
    expected = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    actual = np.asarray(center_crop(Image.fromarray(image.astype(np.uint8)), 8)).astype(float)
    assert np.abs(actual - expected).max() <= 1


def test_crop_of_a_right_sized_image_is_that_image():
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(image), 48)), image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    assert np.asarray(center_crop(Image.new("RGB", (40, 30)).convert(mode), 16)).shape == (16, 16, 3)


def test_every_kind_of_source_gives_the_same_images_and_classes(photos, tmp_path):
    folder = ImageFiles(str(photos), 32)
    assert len(folder) == 40 and folder.classes == ["china", "flower"] and folder.labels.bincount().tolist() == [20, 20]
    rows = datasets.load_dataset(str(photos), split="train")
    rows.to_parquet(tmp_path / "images.parquet")
    rows.save_to_disk(tmp_path / "disk")
    (tmp_path / "parquet").mkdir()
    (tmp_path / "images.parquet").rename(tmp_path / "parquet/images.parquet")
    arrow = next((tmp_path / "disk").glob("*.arrow"))
    everything = range(len(folder))
    x, cond = folder.batch(everything, ())
    assert x.shape == (40, 3, 32, 32) and -1 <= x.min() and x.max() <= 1 and x.min() < -0.9
    for source in (tmp_path / "parquet/images.parquet", tmp_path / "parquet", tmp_path / "disk", arrow):
        other = ImageFiles(str(source), 32)
        x_other, cond_other = other.batch(everything, ())
        assert (
            torch.equal(x, x_other) and torch.equal(cond["y"], cond_other["y"]) and other.classes == folder.classes
        ), source


def test_folder_names_that_look_like_splits_are_classes(photos, tmp_path):
    """datasets by itself would take bullet_train for the split of that name, and the others for none."""
    source = next(photos.rglob("*.jpg")).read_bytes()
    for name in ("bullet_train", "test_tube", "val", "cat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ILSVRC2012_val_1.jpg").write_bytes(source)
    images = ImageFiles(str(tmp_path), 16)
    assert images.classes == ["bullet_train", "cat", "test_tube", "val"] and len(images) == 4


def test_split_is_the_subfolder_of_its_name(photos, tmp_path):
    source = next(photos.rglob("*.jpg")).read_bytes()
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "val/eel"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(source)
    assert ImageFiles(str(tmp_path), 16).classes == ["cat", "dog"]
    assert ImageFiles(str(tmp_path), 16, split="val").classes == ["cat", "dog", "eel"]
    rows = datasets.DatasetDict({"val": datasets.load_dataset(str(photos), split="train")})
    rows.save_to_disk(tmp_path / "saved")
    assert len(ImageFiles(str(tmp_path / "saved"), 16, split="val")) == 40


def test_images_are_mirrored_by_their_own_generator(photos):
    plain, flipped = ImageFiles(str(photos), 16), ImageFiles(str(photos), 16, flip=True)
    x, _ = plain.batch([0] * 64, ())
    mirrored, _ = flipped.batch([0] * 64, (torch.Generator().manual_seed(slot) for slot in range(64)))
    flips = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(x, mirrored)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(x, mirrored)])
    assert torch.equal(flips, ~same) and 16 < flips.sum() < 48  # 32 +- 4 standard deviations


def test_flat_folder_has_no_classes(photos, tmp_path):
    for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:3]):
        (tmp_path / f"{number}.jpg").write_bytes(path.read_bytes())
    images = ImageFiles(str(tmp_path), 16)
    assert images.num_classes == 0 and images.batch([0, 1], ())[1] == {}


def test_unreadable_image_is_named(photos, tmp_path):
    source = next(photos.rglob("*.jpg")).read_bytes()
    for name, content in (("a/cut.jpg", source[:400]), ("b/text.jpg", b"no image")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    images = ImageFiles(str(tmp_path), 16)
    for index, name in enumerate(("a/cut.jpg", "b/text.jpg")):
        with pytest.raises(UnreadableSample, match=f"{name} is no readable image"):
            images.pixels(index)


def rows(labels: list, kind=None) -> datasets.Dataset:
    images = [Image.new("RGB", (20, 20))] * len(labels)
    kinds = datasets.Features({"image": datasets.Image(), "label": kind or datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "datasets cannot open it"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("words")), "has no column of images"),
        (lambda path: (path.mkdir(), rows([]).to_parquet(path / "a.parquet")), "no data"),
        (lambda path: rows([0, -1]).save_to_disk(path), r"row 1: its label must be in \[0, 1\), got -1"),
        (lambda path: rows([0.5], datasets.Value("float32")).save_to_disk(path), "column label must hold classes"),
        (lambda path: rows(["cat"], datasets.Value("string")).save_to_disk(path), "column label must hold classes"),
        (lambda path: rows([0, None]).save_to_disk(path), "row 1 has no label"),
        (
            lambda path: rows([0, -1], datasets.ClassLabel(names=["a", "b"])).save_to_disk(path),
            r"row 1: its label must be in \[0, 2\), got -1",
        ),
    ],
)
def test_sources_without_images_or_with_labels_that_are_no_class_are_refused(make, message, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(ValueError, match=message) as error:
        ImageFiles(str(tmp_path / "source"), 16)
    assert str(tmp_path / "source") in str(error.value) and "\n" not in str(error.value)


def cifar() -> datasets.Dataset:
    """Forty real pictures of 32 x 32 as the Hub's CIFAR-10 has them: PNGs in a column img, ten classes in label."""
    image = load_sample_images().images[0]
    tiles = [Image.fromarray(image[y : y + 32, x : x + 32]) for y in range(0, 128, 32) for x in range(0, 320, 32)]
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=CIFAR)})
    return datasets.Dataset.from_dict({"img": tiles, "label": [k % 10 for k in range(40)]}, features=kinds)


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def hub_copy(rows: datasets.Dataset, path) -> None:
    """Its parquet files; those of the other split are not to be trained on."""
    (path / "plain_text").mkdir(parents=True)
    rows.to_parquet(path / "plain_text/train-00000-of-00001.parquet")
    rows.select(range(5)).to_parquet(path / "plain_text/test-00000-of-00001.parquet")


def save_folder(rows: datasets.Dataset, path) -> None:
    for number, row in enumerate(rows):
        (path / CIFAR[row["label"]]).mkdir(parents=True, exist_ok=True)
        row["img"].save(path / CIFAR[row["label"]] / f"{number:02d}.png")


@pytest.mark.parametrize(
    "save",
    [
        lambda rows, path: (path.mkdir(), rows.to_parquet(path / "train-00000.parquet")),
        hub_copy,
        lambda rows, path: rows.save_to_disk(path),
        lambda rows, path: datasets.DatasetDict({"train": rows}).save_to_disk(path),
        save_folder,
    ],
    ids=["parquet", "copy of the Hub's", "arrow", "splits", "folder"],
)
def test_cifar_of_any_format_is_the_same(save, tmp_path):
    """Uncut, to the last bit; in memory."""
    rows = cifar()
    save(rows, tmp_path / "cifar")
    images = ImageFiles(str(tmp_path / "cifar"), 32, crop=False)
    assert len(images) == 40 and images.classes == CIFAR and images.shape == (3, 32, 32)
    x, cond = images.batch(range(40), ())
    found = {(label, pixels.numpy().tobytes()) for label, pixels in zip(cond["y"].tolist(), x)}
    for row in rows:
        pixels = torch.from_numpy(np.asarray(row["img"]).copy()).permute(2, 0, 1).float() / 127.5 - 1
        assert (row["label"], pixels.contiguous().numpy().tobytes()) in found
    assert images.memory.dtype == torch.uint8


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cat/03.png is no readable image: "),
        (lambda path: Image.new("RGB", (33, 32)).save(path), "cat/03.png is 32 x 33, not 32 x 32: --crop cuts it"),
    ],
    ids=["truncated", "size"],
)
def test_image_that_cannot_be_used_is_named_before_the_first_step(spoil, message, tool, tmp_path):
    save_folder(cifar(), tmp_path / "cifar")
    spoil(tmp_path / "cifar/cat/03.png")
    said = tool("recipes/cifar10_unet", "--data", tmp_path / "cifar", "--out", tmp_path / "run")
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_cifar_recipe_trains_on_a_copy_on_disk(tool, tmp_path):
    """Unconditional, mirrored and augmented, with the recipe's three averages."""
    save_folder(cifar(), tmp_path / "cifar")
    flags = ["--net.model-channels", 16, "--net.num-blocks", 1, "--global-batch", 8, "--steps", 2, "--workers", 0]
    flags += ["--no-compile"]
    shown = tool("recipes/cifar10_unet", "--data", tmp_path / "cifar", "--out", tmp_path / "run", *flags)
    assert "40 x 3 x 32 x 32, no classes, mirrored at random" in shown and "6 of 8 samples with r != t" in shown
    averages = {path.name for path in (tmp_path / "run/step-00000002/ema").iterdir()}
    assert averages == {"0.9999", "0.99995", "0.9996"}
    assert json.loads((tmp_path / "run/step-00000002/data.json").read_text())["classes"] == []
