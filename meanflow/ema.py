"""Averaged weights: one exponential moving average per decay, stepped once per optimiser step."""

from ema_pytorch import EMA
from torch import nn


class Averages:
    """Averages of net's weights, each starting as a copy, in evaluation mode; no warm-up of the decay."""

    def __init__(self, net: nn.Module, decays: tuple[float, ...]):
        # Buffers are copied: sharded weights and whole buffers cannot be averaged in one call.
        buffers = {name for name, _ in net.named_buffers()}
        options = {"include_online_model": False, "use_foreach": True, "param_or_buffer_names_no_ema": buffers}
        self.nets = {decay: EMA(net, beta=decay, **options) for decay in decays}
        for ema in self.nets.values():
            ema.eval()  # of what it averages: else pictures would show dropout

    def update(self, net: nn.Module) -> None:
        """ema = decay * ema + (1 - decay) * net. (EMA.update() would skip most steps and warm its decay up.)"""
        for decay, ema in self.nets.items():
            ema.update_moving_average(ema.ema_model, net, current_decay=decay)

    def __getitem__(self, decay: float) -> nn.Module:
        return self.nets[decay].ema_model

    def items(self):
        return ((decay, ema.ema_model) for decay, ema in self.nets.items())
