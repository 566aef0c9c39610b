"""Metrics of generated samples. Their features lie in files, a file for each batch, so that work is shared and goes on.

fid, kid, prc (precision and recall) and is (the inception score) are in Inception's features; fdd is the Frechet
distance in DINOv2's. energy and frechet compare the samples themselves: pixels in [-1, 1], rounded to 8 bits as
pictures are, or what the network makes where that is no picture, such as latents. All are by torch-fidelity's code but
the energy distance.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from meanflow.config import check
from meanflow.evaluation.distances import Moments, frechet_distance, mean_distance
from meanflow.evaluation.references import Reference
from meanflow.files import ensure, errors_as, replacing

MAX_DIMENSIONS = 4096  # of the features of a Frechet distance, whose covariance it takes


class Features:
    """The features of a set of images, in one file for each batch.

    Args:
        count, batch_size: how many images there are, and how many in each batch.
        statistics: mu and sigma of features, by the features' name, that are known without the files.
    """

    def __init__(self, folder: Path, count: int, batch_size: int, statistics: dict | None = None):
        self.folder, self.count, self.batch_size, self.known = folder, count, batch_size, statistics or {}

    def write(self, make: Callable[[range], dict[str, Tensor]], accelerator, name: str) -> None:
        """Makes this process's share of the features that are not there yet.

        In an empty folder all processes make equally many, since a sharded network needs all of them.

        Args:
            make: features by name, each (B, D), of these images.
            name: for the progress bar.
        Raises:
            OSError: a file could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rank, world, size, error = accelerator.process_index, accelerator.num_processes, self.batch_size, None
        starts = range(0, self.count, size)
        bar = tqdm(range(0, len(starts), world), name, unit="batch", leave=False, delay=2, disable=rank > 0)
        for first in bar:
            number = min(first + rank, len(starts) - 1)
            is_mine, path = number == first + rank, self.folder / f"{number:06d}.safetensors"
            if is_mine and path.exists():
                continue
            features = make(range(starts[number], min(starts[number] + size, self.count)))
            try:
                if is_mine:
                    with replacing(path) as temporary:
                        save_file({name: rows.float().cpu().contiguous() for name, rows in features.items()}, temporary)
            except OSError as failure:  # the other processes wait for this one
                error = failure
        if error:
            raise error

    def batches(self, name: str) -> Iterator[Tensor]:
        paths, due = sorted(self.folder.glob("[0-9]*.safetensors")), math.ceil(self.count / self.batch_size)
        ensure(len(paths) == due, f"{self.folder} has {len(paths)} of {due} batches: do all machines share its disk?")
        for path in paths:
            with errors_as(f"{path} is damaged: remove it"):
                rows = load_file(path)[name]
            yield rows

    def rows(self, name: str) -> Tensor:
        """All rows, (N, D)."""
        return torch.cat(list(self.batches(name)))

    @cached_property
    def inner_distance(self) -> float:
        """The mean distance of two of the samples."""
        return mean_distance(self.rows("samples"), self.rows("samples"))

    def statistics(self, name: str) -> dict:
        """The rows' mean and covariance, as published or summed up batch by batch."""
        if name in self.known:
            return self.known[name]
        moments = Moments()
        for rows in self.batches(name):
            moments.add(rows)
        return moments.statistics()


class Metric(NamedTuple):
    features: str
    network: str | None  # the extractor whose features they are
    needs: str  # of the reference: statistics, rows or nothing
    is_higher_better: bool
    measure: Callable[[Features, Features], dict[str, float]]  # of generated images and a reference


def frechet(name: str, features: str) -> Callable[[Features, Features], dict[str, float]]:
    return lambda own, other: {name: frechet_distance(own.statistics(features), other.statistics(features))}


def energy(own: Features, other: Features) -> dict[str, float]:
    between = mean_distance(own.rows("samples"), other.rows("samples"))
    return {"energy": 2 * between - own.inner_distance - other.inner_distance}


def inception_score(own: Features, _) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return {"is": isc_features_to_metric(own.rows("logits"))[KEY_METRIC_ISC_MEAN]}


def kernel_distance(own: Features, other: Features) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = own.rows("inception"), other.rows("inception")
    size = min(1000, len(x), len(y))
    return {"kid": kid_features_to_metric(x, y, kid_subset_size=size, verbose=False)[KEY_METRIC_KID_MEAN]}


def precision_and_recall(own: Features, other: Features) -> dict[str, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = prc_features_to_metric(own.rows("inception"), other.rows("inception"), save_cpu_ram=True, verbose=False)
    return {name: found[name] for name in ("precision", "recall")}


METRICS = {
    "fid": Metric("inception", "inception", "statistics", False, frechet("fid", "inception")),
    "is": Metric("logits", "inception", "nothing", True, inception_score),
    "prc": Metric("inception", "inception", "rows", True, precision_and_recall),
    "kid": Metric("inception", "inception", "rows", False, kernel_distance),
    "fdd": Metric("dinov2", "dinov2", "statistics", False, frechet("fdd", "dinov2")),
    "energy": Metric("samples", None, "rows", False, energy),
    "frechet": Metric("samples", None, "statistics", False, frechet("frechet", "samples")),
}


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, rounded."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class Describe:
    """Makes the features that metrics need of a batch: (B, D) of each, by name.

    Args:
        metrics: names of METRICS.
        extractors: the networks that these need, by name.
        is_image: whether what the network makes are pictures.
        to_images: from what it makes to images in [0, 1], (B, 1 or 3, H, W).
    """

    def __init__(self, metrics: tuple[str, ...], extractors: dict[str, Callable], is_image: bool, to_images: Callable):
        self.names = {METRICS[metric].features for metric in metrics}
        self.extractors, self.is_image, self.to_images = extractors, is_image, to_images

    @torch.no_grad()
    def __call__(self, images: Tensor | None, x: Tensor | None) -> dict[str, Tensor]:
        """Of images, uint8, or of samples as the network makes them; one of both may be None."""
        if images is None and (self.is_image or self.extractors):
            images = to_bytes(self.to_images(x))
        features = {}
        if "samples" in self.names:
            is_known = self.is_image or x is not None
            ensure(is_known, "energy and frechet compare what the network makes, which this reference's images are not")
            features["samples"] = (images / 127.5 - 1 if self.is_image else x).flatten(1)
        for extractor in self.extractors.values():
            features |= extractor(images.expand(-1, 3, -1, -1))
        return {name: features[name] for name in self.names}


def needs_features(metrics: tuple[str, ...], reference: Reference, describe: Describe, numbers: int) -> bool:
    """Whether a reference's own features are needed, beside the statistics that it has.

    Args:
        numbers: how many a generated sample has.
    Raises:
        Refusal: the metrics cannot be measured against this reference.
    """
    is_small = "frechet" not in metrics or numbers <= MAX_DIMENSIONS
    check(is_small, "frechet", f"{numbers:,} numbers", f"of samples of at most {MAX_DIMENSIONS:,} numbers: use energy")
    asked = [METRICS[metric] for metric in metrics]
    unknown = {metric.features for metric in asked if metric.needs == "statistics"} - reference.statistics.keys()
    if not unknown and all(metric.needs != "rows" for metric in asked):
        return False
    check(reference.count > 1, "reference", reference.name, f"one with 2 images or more for {', '.join(metrics)}")
    there = describe(*reference.batch([0])).get("samples", torch.empty(1, numbers)).shape[1]
    ensure(there == numbers, f"generated samples have {numbers} numbers each, and those of {reference.name} {there}")
    return True


def measure(metrics: tuple[str, ...], own: Features, other: Features) -> dict[str, float]:
    """The metrics of generated images against a reference."""
    return {name: value for metric in metrics for name, value in METRICS[metric].measure(own, other).items()}
