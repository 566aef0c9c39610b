"""Evaluation amid training: one-step samples of the averaged network against a reference."""

import math
import shutil
from functools import partial

import torch
from accelerate.utils import broadcast_object_list

from meanflow.config import check
from meanflow.data.vae import load_vae
from meanflow.evaluation.evaluate import METRICS, Describe, Features, measure, needs_features
from meanflow.evaluation.features import make_extractor
from meanflow.evaluation.references import DataReference, open_reference
from meanflow.training.checkpoint import on_processes
from meanflow.training.samples import one_step

BATCH = 128  # images that each process generates at a time


class Evaluation:
    """Compares the samples of a run with its reference, by recipe.eval_metric.

    Args:
        recipe, data: a TrainConfig and a Data.
    Raises:
        ValueError: they cannot be compared, there is no such reference, or a network's weights are missing.
    """

    def __init__(self, recipe, data, accelerator):
        self.recipe, self.data, self.accelerator, metrics = recipe, data, accelerator, (recipe.eval_metric,)
        network, name = METRICS[recipe.eval_metric].network, recipe.eval_reference
        is_image = recipe.vae is None and len(data.shape) == 3 and data.shape[0] in (1, 3)
        check(is_image or recipe.vae or not network, "eval_metric", recipe.eval_metric, "energy or frechet for volumes")
        check(data.held_out or name != "held-out", "held_out", recipe.held_out, "> 0, or name an --eval-reference")
        if network and recipe.vae:
            load_vae(recipe.vae)  # pictures would do without it
        extractors = {network: make_extractor(network, recipe.eval_features)} if network else {}
        self.describe = Describe(metrics, extractors, is_image, lambda x: data.to_pixels(x) / 2 + 0.5)
        if name == "held-out":
            self.reference = DataReference(data.held_out, accelerator.device)
        else:
            self.reference = open_reference(name, recipe.resolution or data.shape[-1])
        self.needs_features = needs_features(metrics, self.reference, self.describe, math.prod(data.shape))
        self.folder, self.has_begun = recipe.out / ".evaluation", False
        self.other = Features(self.folder / "reference", self.reference.count, BATCH, self.reference.statistics)

    def score(self, net: torch.nn.Module, sampling) -> float:
        """The metric of the averaged network, on all processes.

        Args:
            sampling: how it is sampled, a Sampling.
        Raises:
            Shared: on all processes, what failed on one.
        """
        accelerator, metric = self.accelerator, self.recipe.eval_metric
        own = Features(self.folder / "samples", self.recipe.eval_images, BATCH)
        on_processes(accelerator, remove, own.folder if self.has_begun else self.folder)
        if self.needs_features and not self.has_begun:
            on_processes(accelerator, self.other.write, self.of_reference, accelerator, "reference", only_main=False)
        self.has_begun = True
        make = partial(self.generate, net, sampling)
        on_processes(accelerator, own.write, make, accelerator, "samples", only_main=False)
        found = on_processes(accelerator, measure, (metric,), own, self.other)
        return broadcast_object_list([found and found[metric]])[0]

    def of_reference(self, indices: range) -> dict[str, torch.Tensor]:
        return self.describe(*self.reference.batch(list(indices)))

    def generate(self, net: torch.nn.Module, sampling, indices: range) -> dict[str, torch.Tensor]:
        """The features of these samples, whose classes come in turn."""
        classes = self.data.num_classes
        y = torch.tensor(indices) % classes if classes else None
        return self.describe(None, one_step(self.recipe, self.data, net, sampling, indices, y, self.accelerator.device))


def remove(folder) -> None:
    if folder.exists():
        shutil.rmtree(folder)
