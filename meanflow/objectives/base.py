"""The protocol of an objective. A new paper is one class that follows it, here or in a file of your own.

A slot is a sample's place in the run: step * global_batch + its place in the global batch. The data loader calls
`order_slots` and `make_draws` on the CPU. The training loop calls `forward`, which draws nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from meanflow.config import ObjectiveConfig
from meanflow.sampler import Cond


class Batch(NamedTuple):
    """One micro-batch, of B samples.

    x: data, (B, C, *S).
    draws: what is random, from the objective's make_draws: tensors in a tuple, a dict or an object with `.to`.
    cond: conditions that go to the network by keyword, each (B, ...), such as y, the classes, int64.
    """

    x: Any
    draws: Any
    cond: Cond


class Output(NamedTuple):
    loss: Tensor  # the scalar to differentiate
    metrics: dict[str, Tensor]  # detached; raw_loss_channels, (C,), is watched for divergence


class Sampling(NamedTuple):
    """How a trained network is sampled; it is published with the weights."""

    prediction: str = "u"  # what the network returns: the average velocity u, or the clean sample x
    t_min: float = 0.05  # with prediction x: u = (z - x) / max(t, t_min)
    solver: str = "meanflow"  # the default: meanflow, or euler where only u(z, t, t) was trained
    num_inference_steps: int = 1
    guidance_scale: float | None = None  # the CFG scale that is trained in, or the default of those that can be chosen
    null_class: str | None = None  # where the null class was trained: "any" interval, "flow" (r = t), None (nowhere)
    guidance: str = "none trained in"  # the guidance that is trained in, in words
    guidance_range: tuple[float, float] | None = None  # the CFG scales that were trained, of a network that takes them
    guidance_interval: tuple[float, float] | None = None  # the default of the times in which guidance acts, likewise


class Objective(nn.Module):
    """objective(batch, step) -> Output(loss, metrics), for a network net(z, t, h, **cond) with h = t - r.

    DDP and FSDP wrap this module, not the network: gradients can cross them, a forward-mode derivative cannot.

    It may hold further modules. Those whose parameters are all frozen, such as a teacher, stay in evaluation mode and
    are neither saved nor averaged. The others are optimised and saved with the network, but not averaged or exported.

    Args:
        net: the bare network.
        config: the options; a frozen dataclass.
    """

    def __init__(self, net: nn.Module, config: ObjectiveConfig):
        super().__init__()
        self.net, self.config = net, config
        # The kinds of blocks that FSDP gathers one by one.
        self._no_split_modules = getattr(net, "_no_split_modules", None)

    @staticmethod
    def order_slots(config: ObjectiveConfig, slots: Sequence[int], global_batch: int) -> list[int]:
        """The slots of a micro-batch in the order in which forward wants their rows.

        Raises:
            ValueError: these slots cannot form a micro-batch; the message says what to change.
        """
        return list(slots)

    @staticmethod
    def make_draws(config: ObjectiveConfig, shape: tuple, seed: int, slots: Sequence[int], global_batch: int) -> Any:
        """Draws all random values of these slots, on the CPU: a pure function, so that a run can resume bit for bit.

        Args:
            shape: of one sample, (C, *S).
            slots: in the order of `order_slots`.
        """
        raise NotImplementedError

    def forward(self, batch: Batch, step: int) -> Output:
        """The loss and metrics of one micro-batch; step counts optimiser steps from 0, for schedules."""
        raise NotImplementedError

    @classmethod
    def sampling(cls, config: ObjectiveConfig) -> Sampling:
        """How a network that was trained by these options is sampled."""
        return Sampling()

    @classmethod
    def describe(cls, config: ObjectiveConfig, global_batch: int) -> dict[str, str]:
        """Lines for the screen before a run, by name."""
        return {"objective": cls.__name__}

    @classmethod
    def warnings(cls, config: ObjectiveConfig, global_batch: int) -> list[str]:
        """Problems that earlier runs had with such options, with figures."""
        return []

    @classmethod
    def check(cls, config: ObjectiveConfig, net: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
        """Refuses what these options cannot train.

        Args:
            net: a network in training mode; before a run it is on the meta device.
            shape: of one sample, (C, *S).
        Raises:
            ValueError: the message names the option, its value and what to do.
        """

    def prepare(self, data) -> None:
        """Reads what the loss needs from the data, a meanflow.Data; called once before training."""

    def parameter_groups(self, lr: float) -> list[dict]:
        """What is optimised, in groups as torch.optim takes them: {"params": parameters, "lr": rate}.

        The schedule scales each group's rate. lr is the recipe's.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def train(self, mode: bool = True) -> "Objective":
        super().train(mode)
        for module in self.children():
            if is_frozen(module):
                module.eval()
        return self

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the network: the state of everything that is not frozen, by name."""
        left_out = ("net.", *(f"{name}." for name, module in self.named_children() if is_frozen(module)))
        return {name: value for name, value in self.state_dict().items() if not name.startswith(left_out)}


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none of them is trained."""
    parameters = list(module.parameters())
    return len(parameters) > 0 and not any(p.requires_grad for p in parameters)
