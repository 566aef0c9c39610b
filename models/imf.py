"""The network of improved MeanFlow (arXiv:2512.02012): a transformer whose conditions are tokens before the patches.

It is given the scale of classifier-free guidance and the interval of times in which guidance acts, so that one set of
weights serves any scale. A second head predicts the instantaneous velocity v, for training. Names of parameters are
the official ones, up to those of timm's SwiGLU; tools/convert.py reads the official weights.

Shapes: B batch, C channels, S input size, (H, W), p patch size, D hidden size,
N tokens: those of the conditions, and one for each patch.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from timm.layers import PatchEmbed, SwiGLU
from torch import Tensor, nn

# The tokens of each condition, in their order in the sequence.
TOKENS = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}


class ScalarEmbedder(nn.Module):
    """Embeds a number, not multiplied by 1000: (B,) -> (B, D), in float32 under autocast too."""

    def __init__(self, hidden_size: int, num_features: int = 256):
        super().__init__()
        half = num_features // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequency", frequency, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        # du_dt sees this path's rounding amplified, and the path costs next to nothing.
        with torch.autocast(t.device.type, enabled=False):
            angle = t[:, None] * self.frequency
            features = torch.cat([angle.cos(), angle.sin()], dim=-1)
            return self.mlp(features.to(self.mlp[0].weight.dtype))


class RMSNorm(nn.RMSNorm):
    """With the weight in the input's precision, as autocast has it for linear layers: the fused kernel needs that."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def rotary_angles(num_tokens: int, head_size: int) -> Tensor:
    """The angle by which each pair of channels is rotated at each place, (N, head_size / 2)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    return torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequency


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: turns the pairs of channels (2j, 2j + 1) of x, (B, heads, N, head size).

    The result has the first channels of all pairs before the second ones. Attention does not depend on this order.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([a * cos + b * -sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Attention with normalised queries and keys and rotary positions; (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = RMSNorm(hidden_size // num_heads, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, N, head size)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(norm(a), cos, sin).to(v.dtype) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class IMFBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.attn_scale = nn.Parameter(torch.zeros(hidden_size))
        self.norm2 = RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size, int(hidden_size * 8 / 3), bias=False)
        self.mlp_scale = nn.Parameter(torch.zeros(hidden_size))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, N, D); cos, sin: (N, head size / 2)."""
        x = x + self.attn(self.norm1(x), cos, sin) * self.attn_scale
        return x + self.mlp(self.norm2(x)) * self.mlp_scale


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class IMF(ModelMixin, ConfigMixin):
    """net(z, t, h, y, omega, t_start, t_end) -> u, the average velocity over [t - h, t]; a fresh network returns 0.

    As in the official code, of the times only h enters.

    Args:
        input_size: (H, W), one number for a square; multiples of patch_size.
        hidden_size: width D; a multiple of 2 * num_heads.
        depth: how many blocks a path from z to u has.
        aux_head_depth: how many of them are the u head's own; the v head has as many.
        num_classes: classes 0..num_classes - 1; num_classes itself is the null class. 0: unconditional, y is None.
        v_head: whether it has the head for v, which only training needs.
    Raises:
        ValueError: a size that does not divide, or a z of another shape.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["IMFBlock"]
    takes_omega = True

    @register_to_config
    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        aux_head_depth=8,
        num_classes=1000,
        v_head=True,
    ):
        super().__init__()
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(size) != 2 or any(side % patch_size for side in size):
            raise ValueError(f"input_size {input_size} is not (H, W), multiples of patch_size {patch_size}")
        if hidden_size % (2 * num_heads):
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 2 * num_heads ({2 * num_heads})")
        if not 0 < aux_head_depth <= depth:
            raise ValueError(f"aux_head_depth must be in [1, depth], got {aux_head_depth} of {depth}")
        self.z_shape, self.gradient_checkpointing = (in_channels, *size), False
        self.x_embedder = PatchEmbed(size, patch_size, in_channels, hidden_size)
        self.h_embedder = ScalarEmbedder(hidden_size)
        self.omega_embedder = ScalarEmbedder(hidden_size)
        self.cfg_t_start_embedder = ScalarEmbedder(hidden_size)
        self.cfg_t_end_embedder = ScalarEmbedder(hidden_size)
        if num_classes:
            # The table's last row is the null class.
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.counts = {name: count for name, count in TOKENS.items() if num_classes or name != "class"}
        for name, count in self.counts.items():
            self.register_parameter(f"{name}_tokens", nn.Parameter(torch.empty(count, hidden_size)))
        num_tokens = sum(self.counts.values()) + self.x_embedder.num_patches
        angles = rotary_angles(num_tokens, hidden_size // num_heads)
        self.register_buffer("rotary_cos", angles.cos().float(), persistent=False)
        self.register_buffer("rotary_sin", angles.sin().float(), persistent=False)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(IMFBlock(hidden_size, num_heads) for _ in range(count))

        self.shared_blocks, self.u_heads = blocks(depth - aux_head_depth), blocks(aux_head_depth)
        self.u_final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        if v_head:
            self.v_heads = blocks(aux_head_depth)
            self.v_final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initialisation, so that every block starts as the identity and u as 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = 0.32 if "blocks." in name or "heads." in name else 1.0
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (module for module in self.children() if isinstance(module, FinalLayer)):
            nn.init.zeros_(layer.linear.weight)
        std = 1 / math.sqrt(self.config.hidden_size)
        for name in self.counts:
            nn.init.normal_(self.get_parameter(f"{name}_tokens"), std=std)
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=std)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
        nn.init.zeros_(patch.bias)

    def forward(self, z, t, h, y=None, omega=None, t_start=None, t_end=None) -> Tensor:
        """Returns u like z.

        Args:
            z: (B, C, H, W). t, h = t - r: (B,) in [0, 1].
            y: classes in [0, num_classes], (B,) int64; None if unconditional.
            omega: the scale of guidance, >= 1, (B,); None: 1.
            t_start, t_end: the interval of times in which guidance acts, in [0, 1], (B,); None: 0 and 1.
        """
        return self.u(self.trunk(z, t, h, y, omega, t_start, t_end))

    def trunk(self, z, t, h, y=None, omega=None, t_start=None, t_end=None) -> Tensor:
        """What both heads read, (B, N, D); arguments as for forward."""
        if z.shape[1:] != self.z_shape:
            raise ValueError(f"z must be (B, {', '.join(map(str, self.z_shape))}), got {tuple(z.shape)}")
        if (y is None) != (self.config.num_classes == 0):
            must = "must" if y is None else "must not"
            raise ValueError(f"num_classes is {self.config.num_classes}, so y {must} be given")
        omega = torch.ones_like(t) if omega is None else omega
        t_start = torch.zeros_like(t) if t_start is None else t_start
        t_end = torch.ones_like(t) if t_end is None else t_end
        embedded = {
            "omega": self.omega_embedder(1 - 1 / omega),
            "t_min": self.cfg_t_start_embedder(t_start),
            "t_max": self.cfg_t_end_embedder(t_end),
            "time": self.h_embedder(h),
        }
        if y is not None:
            embedded["class"] = self.y_embedder.embedding_table(y)
        tokens = [self.get_parameter(f"{name}_tokens") + embedded[name].unsqueeze(1) for name in self.counts]
        x = torch.cat([*tokens, self.x_embedder(z)], dim=1)
        return self.run(self.shared_blocks, x)

    def u(self, x: Tensor) -> Tensor:
        """The average velocity, (B, C, H, W), of what trunk returned."""
        return self.unpatchify(self.u_final_layer(self.patches(self.run(self.u_heads, x))))

    def v(self, x: Tensor) -> Tensor:
        """The instantaneous velocity, likewise; only with v_head."""
        return self.unpatchify(self.v_final_layer(self.patches(self.run(self.v_heads, x))))

    def run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        call = self._gradient_checkpointing_func if self.gradient_checkpointing else IMFBlock.__call__
        for block in blocks:
            x = call(block, x, self.rotary_cos, self.rotary_sin)
        return x

    def patches(self, x: Tensor) -> Tensor:
        return x[:, sum(self.counts.values()) :]

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p * p * C) -> (B, C, H, W); a token's features are ordered (row, column, channel)."""
        p, (rows, columns) = self.config.patch_size, self.x_embedder.grid_size
        x = x.unflatten(1, (rows, columns)).unflatten(-1, (p, p, -1))  # (B, rows, columns, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.z_shape)

    def drop_v_head(self) -> None:
        """Removes the head that only training needs."""
        if self.config.v_head:
            del self.v_heads, self.v_final_layer
            self.register_to_config(v_head=False)
