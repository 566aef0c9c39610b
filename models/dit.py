"""The MeanFlow DiT: a transformer on patches, conditioned on (t, h) and a class by adaLN-Zero; of images or volumes.

Architecture of "Scalable Diffusion Models with Transformers" (arXiv:2212.09748) with the time inputs of MeanFlow
(arXiv:2505.13447). Parameter names are those of facebookresearch/DiT, so that its checkpoints map one to one.

Shapes: B batch, C channels, S input size, (H, W) or (D, H, W), p patch size, N = prod(S) / p^axes tokens, D hidden
size.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from timm.layers import Attention, Mlp, PatchEmbed
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, N, D) tokens; shift, scale: (B, 1, D)."""
    return x * (1 + scale) + shift


def sincos_positions(width: int, *grid: int) -> Tensor:
    """Fixed position table (N, width) of a grid of tokens, an even share of the width for each axis.

    Of images the column's code comes first, as in DiT; of volumes the order is D, H, W, and D gets what is left over.
    """
    positions = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    share = 2 * (width // (2 * len(grid)))
    codes = []
    for axis, position in enumerate(positions[::-1] if len(grid) == 2 else positions):
        half = (share if axis else width - share * (len(grid) - 1)) // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = position.reshape(-1, 1) * frequency
        codes += [angle.sin(), angle.cos()]
    return torch.cat(codes, dim=1).float()


class PatchEmbed3d(nn.Module):
    """timm's PatchEmbed for volumes: (B, C, D, H, W) -> (B, N, D)."""

    def __init__(self, size: tuple[int, ...], patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.grid_size = tuple(side // patch_size for side in size)
        self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Embeds a time in [0, 1], not multiplied by 1000: (B,) -> (B, D), in float32 under autocast too."""

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


class DiTBlock(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x: (B, N, D) tokens; c: (B, 1, D) conditioning."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(ModelMixin, ConfigMixin):
    """net(z, t, h, y) -> u, the average velocity over [t - h, t]; a fresh network returns 0.

    Args:
        input_size: (H, W) of images, one number for a square; (D, H, W) of volumes. Multiples of patch_size.
        hidden_size: width D; a multiple of 4 and of num_heads.
        depth, num_heads: how many blocks, and the heads of the attention of each.
        mlp_ratio: width of the hidden layer of a block's MLP, as a multiple of D.
        num_classes: classes 0..num_classes - 1; num_classes itself is the null class. 0: unconditional, y is None.
        takes_omega: whether it is told the CFG scale and the times in which guidance acts.
    Raises:
        ValueError: a size that does not divide, or a z of another shape.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]

    @register_to_config
    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        mlp_ratio=4.0,
        num_classes=1000,
        takes_omega=False,
    ):
        super().__init__()
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        sizes = (*size, patch_size, in_channels, hidden_size, num_heads, mlp_ratio)
        if min(sizes) <= 0:
            raise ValueError(f"input_size, patch_size, in_channels, ..., mlp_ratio must be > 0, got {sizes}")
        if any(side % patch_size for side in size):
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads ({num_heads})")
        self.z_shape = (in_channels, *size)
        self.takes_omega = takes_omega
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() sets it
        embed = PatchEmbed if len(size) == 2 else PatchEmbed3d
        self.x_embedder = embed(size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.h_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            # The table's last row is the null class.
            self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        if takes_omega:
            self.omega_embedder = TimestepEmbedder(hidden_size)
            self.t_start_embedder = TimestepEmbedder(hidden_size)
            self.t_end_embedder = TimestepEmbedder(hidden_size)
        self.register_buffer("pos_embed", sincos_positions(hidden_size, *self.x_embedder.grid_size), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size ** len(size) * in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initialisation: adaLN-Zero, so that every block starts as the identity and u as 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.out_channels, -1))
        nn.init.zeros_(patch.bias)
        for embedder in (module for module in self.children() if isinstance(module, TimestepEmbedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, z, t, h, y=None, omega=None, t_start=None, t_end=None) -> Tensor:
        """Returns u like z.

        Args:
            z: (B, C, *S). t, h = t - r: (B,) in [0, 1].
            y: classes in [0, num_classes], (B,) int64; None if unconditional.
            omega: with takes_omega the CFG scale, >= 1, (B,); None: 1, no guidance.
            t_start, t_end: the times in which guidance acts, in [0, 1], (B,); None: 0 and 1.
        """
        if z.shape[1:] != self.z_shape:
            raise ValueError(f"z must be (B, {', '.join(map(str, self.z_shape))}), got {tuple(z.shape)}")
        if (y is None) != (self.config.num_classes == 0):
            must = "must" if y is None else "must not"
            raise ValueError(f"num_classes is {self.config.num_classes}, so y {must} be given")
        if omega is not None and not self.takes_omega:
            raise ValueError("takes_omega is False, so omega must not be given")
        x = self.x_embedder(z).contiguous() + self.pos_embed  # (B, N, D); PatchEmbed leaves it transposed
        c = self.t_embedder(t) + self.h_embedder(h)  # (B, D)
        if y is not None:
            c = c + self.y_embedder.embedding_table(y)
        if self.takes_omega:
            c = c + self.embed_guidance(t, omega, t_start, t_end)
        c = c.unsqueeze(1)  # (B, 1, D)
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block, x, c) if self.gradient_checkpointing else block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def embed_guidance(self, t: Tensor, omega, t_start, t_end) -> Tensor:
        """(B, D). As in arXiv:2512.02012, omega enters as 1 - 1 / omega."""
        omega = torch.ones_like(t) if omega is None else omega
        t_start = torch.zeros_like(t) if t_start is None else t_start
        t_end = torch.ones_like(t) if t_end is None else t_end
        return self.omega_embedder(1 - 1 / omega) + self.t_start_embedder(t_start) + self.t_end_embedder(t_end)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, p * p * C) -> (B, C, *S); a token's features are ordered (row, column, channel), or (D, H, W, C)."""
        grid = self.x_embedder.grid_size
        axes = len(grid)
        x = x.unflatten(1, grid).unflatten(-1, (*[self.config.patch_size] * axes, -1))  # (B, *grid, p, p, C)
        order = [0, -1]  # the batch, the channels, and then each axis of the grid beside the same axis of the patches
        for axis in range(1, axes + 1):
            order += [axis, axis + axes]
        return x.permute(*order).reshape(-1, *self.z_shape)
