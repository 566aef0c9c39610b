"""A residual MLP for samples without space, such as points of a plane, (2, 1, 1).

This file imports nothing of the project, so that a copy of it works beside the weights.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class MLP(ModelMixin, ConfigMixin):
    """net(z, t, h, y) -> u, the average velocity over [t - h, t]; a fresh network returns 0.

    Args:
        input_size: the sample's axes after the channels.
        hidden_size, depth: width and number of the residual layers.
        num_frequencies: of the times' sines and cosines: pi / 2, pi, 2 pi, ... With higher ones u can be sharper in the
            times, and du/dt is noisier.
        num_classes: classes 0..num_classes - 1; num_classes itself is the null class. 0: unconditional, y is None.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = []

    @register_to_config
    def __init__(self, input_size, in_channels, num_classes=0, hidden_size=256, depth=4, num_frequencies=3):
        super().__init__()
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.z_shape, self.gradient_checkpointing = (in_channels, *size), False
        numbers = math.prod(self.z_shape)
        self.z_embedder = nn.Linear(numbers, hidden_size)
        self.time_embedder = nn.Linear(4 * num_frequencies, hidden_size)
        self.y_embedder = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        layers = [nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, hidden_size)) for _ in range(depth)]
        self.blocks = nn.ModuleList(layers)
        self.final_layer = nn.Linear(hidden_size, numbers)
        nn.init.zeros_(self.final_layer.weight)
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, z: Tensor, t: Tensor, h: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns u like z. z: (B, C, *S); t, h = t - r: (B,) in [0, 1]; y: (B,) int64, None if unconditional."""
        # du_dt sees this path's rounding amplified, and the path costs next to nothing.
        with torch.autocast(z.device.type, enabled=False):
            powers = torch.arange(self.config.num_frequencies, device=z.device, dtype=t.dtype)
            frequency = math.pi / 2 * 2**powers
            angle = torch.cat([t[:, None] * frequency, h[:, None] * frequency], dim=1)
            times = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.time_embedder.weight.dtype)
            times = self.time_embedder(times)
        x = self.z_embedder(z.flatten(1)) + times
        if y is not None:
            x = x + self.y_embedder(y)
        for block in self.blocks:
            x = x + (self._gradient_checkpointing_func(block, x) if self.gradient_checkpointing else block(x))
        return self.final_layer(x).view(z.shape)
