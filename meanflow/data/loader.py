"""The loader that gives every sample of the run its data and its draws.

A slot is a sample's place in the run: step * global_batch + place in the global batch. Image, flip, noise, times and
label drop are functions of (seed, slot). So the number of processes and of accumulation steps changes only who works on
which slots, and a run resumes by starting at another step.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from meanflow.config import Refusal, check
from meanflow.data.augment import augment
from meanflow.noise import generator, noise
from meanflow.objectives.base import Batch


class SlotBatches(Sampler):
    """The micro-batches of one process, in these steps: lists of (sample index, slot).

    Slot s holds sample s % N of the permutation of epoch s // N, so an epoch has each sample once. The objective says
    in which order the slots of a micro-batch come.

    Raises:
        ValueError: the global batch does not divide, or the objective refuses such micro-batches.
    """

    def __init__(self, recipe, objective, num_samples: int, steps: range, rank=0, world_size=1):
        self.recipe, self.objective, self.num_samples = recipe, objective, num_samples
        self.steps, self.rank, self.world_size = steps, rank, world_size
        self.micro_batch, rest = divmod(recipe.global_batch, world_size * recipe.accumulation_steps)
        parts = f"processes x accumulation_steps ({world_size} x {recipe.accumulation_steps})"
        check(rest == 0, "global_batch", recipe.global_batch, f"a multiple of {parts}")
        objective.order_slots(recipe.objective, range(self.micro_batch), recipe.global_batch)  # it may refuse them

    def __iter__(self):
        G, epoch = self.recipe.global_batch, None
        for step in self.steps:
            for micro_step in range(self.recipe.accumulation_steps):
                first = step * G + (micro_step * self.world_size + self.rank) * self.micro_batch
                slots = range(first, first + self.micro_batch)
                batch = []
                for slot in self.objective.order_slots(self.recipe.objective, slots, G):
                    if slot // self.num_samples != epoch:
                        epoch = slot // self.num_samples
                        random = generator(self.recipe.seed, epoch, "order")
                        order = torch.randperm(self.num_samples, generator=random).tolist()
                    batch.append((order[slot % self.num_samples], slot))
                yield batch


class SlotData(Dataset):
    """The Batch of a list of (sample index, slot)."""

    def __init__(self, recipe, objective, data):
        self.recipe, self.objective, self.data = recipe, objective, data

    def __getitems__(self, batch: list[tuple[int, int]]) -> Batch:
        indices, slots = map(list, zip(*batch))
        recipe, shape = self.recipe, self.data.shape
        x, cond = self.data.batch(indices, [generator(recipe.seed, slot, "data") for slot in slots])
        draws = self.objective.make_draws(recipe.objective, shape, recipe.seed, slots, recipe.global_batch)
        if recipe.fixed_noise:
            draws = replace(draws, e=noise(recipe.seed, indices, shape))
        if recipe.augment:
            x, labels = augment(x, recipe.augment, [generator(recipe.seed, slot, "augment") for slot in slots])
            cond = {**cond, "augment_labels": labels}
        return Batch(x, draws, cond)


def make_loader(recipe, objective, data, steps: range, rank=0, world_size=1) -> DataLoader:
    """The DataLoader of one process's micro-batches in these steps, each a Batch on the CPU.

    Args:
        recipe, objective, data: a TrainConfig, the class of an Objective, and a Data.
    Raises:
        ValueError: the global batch does not divide, or the objective refuses such micro-batches.
    """
    batches = SlotBatches(recipe, objective, len(data), steps, rank, world_size)
    fork = "fork" if recipe.workers and sys.platform == "linux" else None  # which copies no data
    options = {"num_workers": recipe.workers, "multiprocessing_context": fork, "pin_memory": torch.cuda.is_available()}
    return DataLoader(SlotData(recipe, objective, data), batch_sampler=batches, collate_fn=default_convert, **options)


class Ahead:
    """The batches of a loader, read some steps before they are due, so that what cannot be read is known before.

    Args:
        count: how many batches wait before one is taken, unless there are no more, or one cannot be read.
    """

    def __init__(self, batches: Iterable[Batch], count: int):
        self.batches, self.count, self.waiting = iter(batches), count, deque()
        self.error: Exception | None = None  # why there are no more

    def begin(self) -> None:
        """Reads the first ones, and raises what happens."""
        self.read()
        if self.error:
            raise self.error

    def read(self) -> None:
        try:
            while self.error is None and len(self.waiting) < self.count:
                self.waiting.append(next(self.batches))
        except StopIteration:
            self.batches = iter(())
        except Exception as error:
            self.error = error
            if isinstance(error, Refusal):  # before which a loading process puts its traceback
                self.error = type(error)(str(error).split(f"{type(error).__name__}: ")[-1].strip())
            elif "DataLoader worker" in str(error) and isinstance(error, RuntimeError):
                self.error = Refusal("a process of --workers died, perhaps of too little memory: --workers 0")

    def __iter__(self) -> Iterator[Batch]:
        while self.waiting:
            yield self.waiting.popleft()
            self.read()
