"""The loader: the same run, however it is divided; digits as published."""

import pytest
import torch

from meanflow.config import MeanFlowConfig, TrainConfig
from meanflow.data.base import InMemory
from meanflow.data.loader import make_loader
from meanflow.data.sources import digits, load_data
from meanflow.objectives.meanflow import MeanFlow


def recipe(**changes) -> TrainConfig:
    objective = MeanFlowConfig(class_dropout_prob=0.3)
    return TrainConfig(**{"steps": 10, "global_batch": 16, "objective": objective, **changes})


def images(count: int = 23) -> InMemory:
    """Each image is its own number."""
    return InMemory(torch.arange(count).float().view(-1, 1, 1, 1), torch.arange(count) % 3, 3)


def samples(recipe: TrainConfig, num_processes: int = 1, start: int = 0, stop: int = 10) -> list[set]:
    """What each step trains on, over all processes and micro-batches."""
    steps = [set() for _ in range(start, stop)]
    for process in range(num_processes):
        loader = make_loader(recipe, MeanFlow, images(), range(start, stop), process, num_processes)
        for number, (x, draws, cond) in enumerate(loader):
            rows = zip(x.flatten().tolist(), cond["y"].tolist(), draws.e.flatten().tolist(), *(
                column.tolist() for column in (draws.t, draws.r, draws.drop)))  # fmt: skip
            steps[number // recipe.accumulation_steps] |= set(rows)
    return steps


def test_processes_and_accumulation_divide_one_and_the_same_run():
    """Image, noise, times and drop of every sample, for 1, 2 and 4 processes by 1, 2 and 4 accumulation steps."""
    half = {"objective": MeanFlowConfig(0.5, class_dropout_prob=0.3), "global_batch": 32}
    one = samples(recipe(**half))
    for num_processes in (1, 2, 4):
        for accumulation_steps in (1, 2, 4):
            assert samples(recipe(**half, accumulation_steps=accumulation_steps), num_processes) == one


def test_resumed_loader_continues_mid_epoch_where_the_other_stopped():
    assert samples(recipe(), start=4) == samples(recipe())[4:]


def test_every_image_comes_once_an_epoch_in_another_order_each_time():
    """23 images and steps of 16, so that steps mix epochs."""
    orders = torch.cat(
        [x.flatten() for x, *_ in make_loader(recipe(objective=MeanFlowConfig(0.0)), MeanFlow, images(), range(9))]
    )
    first, second = orders[:23].tolist(), orders[23:46].tolist()
    assert sorted(first) == sorted(second) == list(range(23)) and first != second
    other_seed = torch.cat(
        [
            x.flatten()
            for x, *_ in make_loader(recipe(seed=1, objective=MeanFlowConfig(0.0)), MeanFlow, images(), range(2))
        ]
    )
    assert other_seed[:23].tolist() != first


def test_fixed_noise_belongs_to_the_image():
    seen = {}
    for x, draws, _ in make_loader(recipe(fixed_noise=True), MeanFlow, images(), range(6)):
        for image, e in zip(x.flatten().tolist(), draws.e.flatten().tolist()):
            assert seen.setdefault(image, e) == e
    assert len(set(seen.values())) == 23


def test_digits_are_split_and_scaled_as_published():
    """1,347 and 450 digits, every class in its proportion; [-1, 1] gives back the 17 grey levels."""
    real, held_out = digits()
    assert (len(real.x), len(held_out.x)) == (1347, 450) and real.x.shape[1:] == (1, 8, 8)
    assert (real.y.bincount() / 1347 - held_out.y.bincount() / 450).abs().max() < 0.002
    levels = (real.x + 1) * 8
    assert torch.equal(levels, levels.round()) and levels.min() == 0 and levels.max() == 16


def test_subset_holds_so_many_images_of_so_many_classes():
    few = load_data(recipe(subset=(4, 10)))
    assert few.y.bincount().tolist() == [10] * 4 and few.num_classes == 4 and len(few.x.unique(dim=0)) == 40


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: make_loader(recipe(global_batch=15), MeanFlow, images(), range(1), 0, 2),
            r"global_batch must be a multiple .*\(2 x 1\), got 15",
        ),
        (
            lambda: make_loader(recipe(accumulation_steps=8), MeanFlow, images(), range(1)),
            "a micro-batch of 2 cannot hold",
        ),
        (lambda: load_data(recipe(data="./cifar")), "./cifar: no such file or folder"),
        (lambda: load_data(recipe(data="uoft-cs/cifar10")), "resolution must be given for images"),
        (lambda: load_data(recipe(data="./cifar", resolution=32)), "./cifar: no such file or folder"),
        (lambda: load_data(recipe(flip=True)), "flip is not for digits, got True"),
        (lambda: load_data(recipe(data="./cifar", subset=(2, 2))), "subset is for digits"),
        (lambda: load_data(recipe(subset=(11, 1))), "subset must be at most 10 classes"),
        (lambda: load_data(recipe(subset=(2, 500))), "subset must be at most 10 classes of at most 131"),
        (
            lambda: InMemory(torch.zeros(2, 1, 1, 1), torch.tensor([0, 3]), 3),
            r"classes must be in \[0, 3\), got 0 to 3",
        ),
    ],
)
def test_impossible_data_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
