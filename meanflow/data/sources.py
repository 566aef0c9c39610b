"""Which data a recipe means, and the small data sets that need no file."""

from collections.abc import Callable
from pathlib import Path

import torch

from meanflow.config import check
from meanflow.data.base import Data, InMemory, check_fits, hold_out
from meanflow.data.images import ImageFiles, check_source
from meanflow.data.latents import EncodedImages, Latents, is_cache
from meanflow.data.volumes import Volumes, has_volumes, shapes
from meanflow.files import ensure


def training_data(recipe, own: Callable | None = None) -> Data:
    """What the recipe trains on, by a function of the user's own or by `load_data`, without what it holds out."""
    return hold_out((own or load_data)(recipe), recipe.held_out)


def load_data(recipe) -> Data:
    """The recipe's data; recipe: a TrainConfig.

    Raises:
        ValueError: there are none, they are damaged, or they are not what the recipe expects; the message says what.
    """
    data = random_latents(recipe) if recipe.smoke and recipe.vae else open_data(recipe)
    if not recipe.class_conditional:
        data.num_classes = 0
        data.metadata["classes"] = []
    is_square_image = len(data.shape) == 3 and data.shape[1] == data.shape[2]
    if recipe.augment and (recipe.vae or not is_square_image):
        raise ValueError(f"augment is for square images in pixels, got {recipe.augment} for {recipe.data}")
    return data


def open_data(recipe) -> Data:
    """Tries one kind of data after the other: built-in ones, a latent cache, volumes, images."""
    folder = Path(recipe.data).expanduser()
    are_volumes = recipe.resolution is None and has_volumes(folder)
    ensure(recipe.data == "digits" or not recipe.subset, f"subset is for digits, got data {recipe.data}")
    for name in ("vae", "flip"):
        value = getattr(recipe, name)
        if value and (are_volumes or recipe.data in ("digits", "shapes")):
            raise ValueError(f"{name} is not for {recipe.data}, got {value}: name a folder of images with --data")
    if recipe.data == "digits":
        images, others = digits(recipe.resolution or 8)
        if recipe.subset:
            return subset(images, recipe.subset)
        images.held_out = others
        return images
    if recipe.data == "shapes":
        return InMemory(shapes(), None, 0)
    check_source(recipe.data, ", and none of digits, shapes: name it with --data; tools/cache_latents.py makes latents")
    if folder.is_dir() and recipe.out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out must not lie in the data, which it would become a part of, got {recipe.out}")
    if is_cache(folder):
        return Latents(folder, recipe)
    if are_volumes:
        return Volumes(folder)
    ensure(recipe.resolution, f"resolution must be given for images, got None, and {folder} is no folder with volumes")
    check_fits(12 * 3 * recipe.resolution**2, "resolution", recipe.resolution)
    images = ImageFiles(recipe.data, recipe.resolution, flip=recipe.flip, crop=recipe.crop)
    return images if recipe.vae is None else EncodedImages(images, recipe)


def digits(resolution: int = 8) -> tuple[InMemory, InMemory]:
    """scikit-learn's handwritten digits, (1, 8, 8) with 17 grey levels: 1,347 to train on, and 450 held out.

    At another resolution they are scaled bilinearly.
    """
    from sklearn import datasets, model_selection

    data = datasets.load_digits()
    check_fits(4 * len(data.images) * resolution**2, "resolution", resolution)
    x, y = torch.from_numpy(data.images[:, None] / 8 - 1).float(), torch.from_numpy(data.target).long()
    if resolution != 8:
        x = torch.nn.functional.interpolate(x, (resolution, resolution), mode="bilinear", align_corners=False)
    train, test = model_selection.train_test_split(range(len(y)), test_size=0.25, stratify=data.target, random_state=0)
    return InMemory(x[train], y[train], 10), InMemory(x[test], y[test], 10)


def subset(images: InMemory, size: tuple[int, int]) -> InMemory:
    """The first images of the first classes; size: how many classes, and how many images of each."""
    num_classes, per_class = size
    rows = [(images.y == label).nonzero()[:per_class, 0] for label in range(num_classes)]
    if any(len(row) < per_class for row in rows):
        raise ValueError(f"subset must be at most 10 classes of at most {images.y.bincount().min()}, got {size}")
    return InMemory(images.x[torch.cat(rows)], images.y[torch.cat(rows)], num_classes)


def random_latents(recipe) -> InMemory:
    """A smoke test's data: 256 latents as Stable Diffusion's VAE shapes them, of 1,000 classes."""
    check(recipe.resolution % 8 == 0, "resolution", recipe.resolution, "a multiple of 8 with a vae")
    size, random = recipe.resolution // 8, torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 4, size, size, generator=random), torch.randint(1000, (256,), generator=random)
    return InMemory(x, y, num_classes=1000, latents={"shift": 0.0, "scale": recipe.scaling_factor})
