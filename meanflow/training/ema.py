"""Averaged weights: exponential moving averages by name, stepped once per optimiser step."""

from ema_pytorch import EMA


class Averages:
    """Averages of net's weights. Each starts as a copy, is in evaluation mode, and has no warm-up of its decay.

    Args:
        decays: the decay of each average, in [0, 1), by the name that it is saved under; nets has them by these names.
    """

    def __init__(self, net, decays: dict[str, float]):
        # Buffers are copied: sharded weights and whole buffers cannot be averaged in one call.
        buffers = {name for name, _ in net.named_buffers()}
        options = {"include_online_model": False, "use_foreach": True, "param_or_buffer_names_no_ema": buffers}
        self.averaging = {name: EMA(net, beta=decay, **options) for name, decay in decays.items()}
        # eval() returns the averaged network: otherwise pictures would show dropout.
        self.nets = {name: ema.eval() for name, ema in self.averaging.items()}

    def update(self, net) -> None:
        """ema = decay * ema + (1 - decay) * net. (EMA.update() would skip most steps and warm its decay up.)"""
        for ema in self.averaging.values():
            ema.update_moving_average(ema.ema_model, net, current_decay=ema.beta)
