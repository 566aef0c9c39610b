"""The zoo: `MODELS[name](input_size=..., in_channels=..., num_classes=...)` builds a network."""

from functools import partial

from models.dit import DiT

_DIT_SIZES = {  # depth, hidden_size, num_heads
    "XS": (4, 64, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "M": (16, 1024, 16),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

MODELS = {
    f"DiT-{size}/{patch_size}": partial(
        DiT, patch_size=patch_size, depth=depth, hidden_size=hidden_size, num_heads=num_heads
    )
    for size, (depth, hidden_size, num_heads) in _DIT_SIZES.items()
    for patch_size in (2, 4, 8)
}
