"""U-Nets for MeanFlow: UNetCifar, the network of the CIFAR-10 results, and UNet, diffusers' blocks at any size.

Both are conditioned on (t, h) and, if asked, on a class.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


def time_features(half: int, *times: Tensor) -> Tensor:
    """Sines and cosines of n times, each (B,): (B, 2 * n * half), each time's sines first."""
    exponent = torch.arange(half, dtype=torch.float32, device=times[0].device) / (half - 1)
    angles = (time[:, None] * torch.exp(-math.log(10000.0) * exponent) for time in times)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def guidance_features(half: int, t: Tensor, omega: Tensor | None, t_start: Tensor | None, t_end: Tensor | None):
    """Returns time_features of 1 - 1 / omega, as in arXiv:2512.02012, and of the times in which guidance acts."""
    omega = torch.ones_like(t) if omega is None else omega
    t_start = torch.zeros_like(t) if t_start is None else t_start
    t_end = torch.ones_like(t) if t_end is None else t_end
    return time_features(half, 1 - 1 / omega, t_start, t_end)


def check_inputs(net: ModelMixin, z: Tensor, y: Tensor | None, omega: Tensor | None) -> None:
    if z.shape[1:] != net.z_shape:
        raise ValueError(f"z must be (B, {', '.join(map(str, net.z_shape))}), got {tuple(z.shape)}")
    if (y is None) != (net.config.num_classes == 0):
        raise ValueError(f"num_classes is {net.config.num_classes}, so y must {'' if y is None else 'not '}be given")
    if omega is not None and not net.takes_omega:
        raise ValueError("takes_omega is False, so omega must not be given")


class Conv(nn.Conv2d):
    """A convolution that keeps the size; before it, the picture may be resampled by the filter [1, 3, 3, 1]."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, gain: float = 1.0, resample: str = ""):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        xavier(self, gain)
        self.resample = resample
        if resample:
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
            self.register_buffer("resample_filter", taps.outer(taps)[None, None] / taps.sum() ** 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample:
            weight = self.resample_filter.tile(x.shape[1], 1, 1, 1)
            if self.resample == "up":
                x = F.conv_transpose2d(x, 4 * weight, stride=2, padding=1, groups=x.shape[1])
            else:
                x = F.conv2d(x, weight, stride=2, padding=1, groups=x.shape[1])
        return super().forward(x)


def xavier(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """A residual block, then attention with one head if asked: (B, in_channels, H, W) -> (B, out_channels, H', W').

    resample: "up" doubles H and W, "down" halves them.
    """

    def __init__(self, in_channels, out_channels, embedding_size, dropout, attention=False, resample=""):
        super().__init__()
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample=resample)
        self.affine = xavier(nn.Linear(embedding_size, out_channels))
        self.norm1 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv(out_channels, out_channels, 3, gain=1e-5)
        same = in_channels == out_channels and not resample
        self.skip = nn.Identity() if same else Conv(in_channels, out_channels, 1, resample=resample)
        self.attention = attention
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv(out_channels, out_channels, 1, gain=1e-5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        skip = self.skip(x)
        x = self.conv0(F.silu(self.norm0(x))) + self.affine(embedding)[:, :, None, None]
        x = self.conv1(self.dropout(F.silu(self.norm1(x))))
        x = (x + skip) * math.sqrt(0.5)  # so that the sum keeps the variance
        if self.attention:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, HW, C)
            a = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
            x = (x + self.proj(a)) * math.sqrt(0.5)
        return x


class UNetCifar(ModelMixin, ConfigMixin):
    """The DDPM++ U-Net of EDM (arXiv:2206.00364) with the time inputs of MeanFlow: net(z, t, h, y) -> u.

    Names, order and initialisation are those of the MeanFlow authors' CIFAR-10 network, so that their checkpoints map
    one to one; the class input is ours. A fresh network returns almost 0.

    Args:
        img_resolution: height and width of z; each level after the first halves them.
        model_channels: width, of which a level has channel_mult times as much; from 128 on a multiple of 32, else of 4.
        num_blocks: residual blocks a level, one more on the way up.
        augment_dim: numbers that say how a sample was augmented; 0: none.
        num_classes: classes 0..num_classes - 1; num_classes itself is the null class. 0: unconditional, y is None.
        takes_omega: whether it is told the CFG scale and the times in which guidance acts.
    Raises:
        ValueError: a size that does not divide, or a z of another shape.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UNetBlock"]

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (2, 2, 2),
        num_blocks: int = 4,
        dropout: float = 0.2,
        augment_dim: int = 0,
        num_classes: int = 0,
        takes_omega: bool = False,
    ):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times")
        self.z_shape, self.takes_omega = (in_channels, img_resolution, img_resolution), takes_omega
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        embedding_size = 4 * model_channels
        if augment_dim:
            self.map_augment = xavier(nn.Linear(augment_dim, embedding_size, bias=False))
        if num_classes:
            self.map_label = xavier(nn.Linear(num_classes, embedding_size, bias=False))
        if takes_omega:
            self.map_guidance = xavier(nn.Linear(6 * model_channels, embedding_size, bias=False))
        self.map_layer0 = xavier(nn.Linear(embedding_size, embedding_size))
        self.map_layer1 = xavier(nn.Linear(embedding_size, embedding_size))

        def block(width_in: int, width_out: int, **options) -> UNetBlock:
            return UNetBlock(width_in, width_out, embedding_size, dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        sides = [img_resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{side}x{side}", model_channels * mult) for side, mult in zip(sides, channel_mult)]
        first, last = levels[0][0], levels[-1][0]
        self.enc[f"{first}_conv"] = Conv(in_channels, model_channels, 3)
        widths = [model_channels]  # of what the encoder's layers return
        for name, level_width in levels:
            if name != first:
                self.enc[f"{name}_down"] = block(widths[-1], widths[-1], resample="down")
                widths.append(widths[-1])
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(widths[-1], level_width, attention=name == "16x16")
                widths.append(level_width)
        width = widths[-1]
        self.dec[f"{last}_in0"] = block(width, width, attention=True)
        self.dec[f"{last}_in1"] = block(width, width)
        for name, level_width in reversed(levels):
            if name != last:
                self.dec[f"{name}_up"] = block(width, width, resample="up")
            for i in range(num_blocks + 1):
                attention = name == "16x16" and i == num_blocks
                self.dec[f"{name}_block{i}"] = block(width + widths.pop(), level_width, attention=attention)
                width = level_width
        self.dec[f"{first}_aux_norm"] = group_norm(width)
        self.dec[f"{first}_aux_conv"] = Conv(width, out_channels, 3, gain=1e-5)

    def forward(self, z, t, h, y=None, augment_labels=None, omega=None, t_start=None, t_end=None) -> Tensor:
        """The average velocity over [t - h, t], like z.

        Args:
            z: (B, C, H, W). t, h: (B,), in [0, 1].
            y: classes in [0, num_classes], (B,) int64.
            augment_labels: (B, augment_dim); None: the sample is as it was.
            omega: with takes_omega the CFG scale, >= 1, (B,); None: 1, no guidance.
            t_start, t_end: the times in which guidance acts, in [0, 1], (B,); None: 0 and 1.
        """
        check_inputs(self, z, y, omega)
        embedding = self.embed(t, h, y, augment_labels, omega, t_start, t_end)
        run = self._gradient_checkpointing_func if self.gradient_checkpointing else UNetBlock.__call__
        skips, x = [], z
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else run(layer, x, embedding)
            skips.append(x)
        *blocks, (_, norm), (_, conv) = self.dec.items()
        for name, layer in blocks:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run(layer, x, embedding)
        return conv(F.silu(norm(x)))

    def embed(self, t, h, y, augment_labels, omega=None, t_start=None, t_end=None) -> Tensor:
        """(B, 4 * model_channels), in float32 under autocast too: du_dt sees this path's rounding amplified."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.map_layer0.weight.dtype
            x = time_features(self.config.model_channels, t, h).to(dtype)
            if augment_labels is not None:
                if not self.config.augment_dim:
                    raise ValueError("augment_dim is 0, so augment_labels must not be given")
                x = x + self.map_augment(augment_labels.to(dtype))
            if y is not None:
                K = self.config.num_classes
                one_hot = (y[:, None] == torch.arange(K, device=y.device)).to(dtype)  # of the null class: zeros
                x = x + self.map_label(one_hot * math.sqrt(K))
            if self.takes_omega:
                features = guidance_features(self.config.model_channels, t, omega, t_start, t_end)
                x = x + self.map_guidance(features.to(dtype))
            return F.silu(self.map_layer1(F.silu(self.map_layer0(x))))


class UNet(ModelMixin, ConfigMixin):
    """diffusers' UNet2DModel as net(z, t, h, y) -> u; a fresh network returns 0.

    Args:
        input_size: height and width of z, one number for a square; each level after the first halves them.
        block_out_channels: width of each level; multiples of 8, where attention is.
        attention: of each level, True if it has attention.
        num_classes: classes 0..num_classes - 1; num_classes itself is the null class. 0: unconditional, y is None.
        takes_omega: whether it is told the CFG scale and the times in which guidance acts.
    Raises:
        ValueError: a size that does not divide, or a z of another shape.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D"]

    @register_to_config
    def __init__(
        self,
        input_size,
        in_channels,
        block_out_channels,
        attention,
        layers_per_block=2,
        dropout=0.0,
        num_classes=0,
        takes_omega=False,
    ):
        super().__init__()
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(size) != 2 or any(side % 2 ** (len(block_out_channels) - 1) for side in size):
            raise ValueError(f"input_size {input_size} is not (H, W) to be halved {len(block_out_channels) - 1} times")
        self.z_shape, self.takes_omega = (in_channels, *size), takes_omega
        sizes = {"in_channels": in_channels, "out_channels": in_channels, "layers_per_block": layers_per_block}
        self.unet = UNet2DModel(
            **sizes,
            block_out_channels=tuple(block_out_channels),
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
            dropout=dropout,
            norm_num_groups=math.gcd(32, *block_out_channels),
            resnet_time_scale_shift="scale_shift",
            # Its own time embedding rounds to float32 and counts in thousands: it gets 0, and ours as the class's.
            class_embed_type="identity",
        )
        width = 4 * block_out_channels[0]
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        if num_classes:
            self.y_embedder = nn.Embedding(num_classes + 1, width)
        if takes_omega:
            self.guidance_mlp = nn.Sequential(nn.Linear(384, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, z, t, h, y=None, omega=None, t_start=None, t_end=None) -> Tensor:
        """The average velocity over [t - h, t], like z: (B, C, H, W); arguments as for UNetCifar."""
        check_inputs(self, z, y, omega)
        # In float32 under autocast too: du_dt sees this path's rounding amplified.
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.time_mlp[0].weight.dtype
            c = self.time_mlp(time_features(64, t, h).to(dtype))
            if self.takes_omega:
                c = c + self.guidance_mlp(guidance_features(64, t, omega, t_start, t_end).to(dtype))
        if y is not None:
            c = c + self.y_embedder(y)
        return self.unet(z, t.new_zeros(()), class_labels=c).sample  # a number would be copied to the device
