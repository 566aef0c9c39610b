"""The zoo: `MODELS[name](input_size=..., in_channels=..., num_classes=...)` builds a network.

Other sizes of a network are given by name, too: `MODELS["UNet-cifar"](..., model_channels=32)`.
"""

from functools import partial

from models.dit import DiT
from models.imf import IMF
from models.mlp import MLP
from models.unet import UNet, UNetCifar

# The classes that are imported above, by the names that saved networks have in their config.json.
NETWORKS = {name: value for name, value in globals().items() if hasattr(value, "from_pretrained")}

# depth, hidden_size, num_heads
_DIT_SIZES = {"XS": (4, 64, 4), "S": (12, 384, 6), "B": (12, 768, 12)}
_DIT_SIZES |= {"M": (16, 1024, 16), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_IMF_SIZES = {"B": (12, 768, 12), "M": (24, 768, 12), "L": (32, 1024, 16), "XL": (48, 1024, 16)}


def _unet_cifar(input_size: int | tuple[int, ...], in_channels: int, **options) -> UNetCifar:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(f"UNet-cifar takes only square images, got {input_size}")
    return UNetCifar(img_resolution=size[0], in_channels=in_channels, out_channels=in_channels, **options)


MODELS = {
    f"DiT-{size}/{patch_size}": partial(DiT, patch_size=patch_size, depth=depth, hidden_size=width, num_heads=heads)
    for size, (depth, width, heads) in _DIT_SIZES.items()
    for patch_size in (2, 4, 8, 16)
} | {
    **{
        f"iMF-{size}/2": partial(IMF, patch_size=2, depth=depth, hidden_size=width, num_heads=heads)
        for size, (depth, width, heads) in _IMF_SIZES.items()
    },
    "MLP": MLP,
    "UNet-cifar": _unet_cifar,
    "UNet-digits": partial(UNet, block_out_channels=(32, 64), attention=(False, True), layers_per_block=1),
    # For 32 x 32 pixels, and for the 32 x 32 x 4 latents of 256 x 256 images.
    "UNet-pixels": partial(UNet, block_out_channels=(128, 256, 256), attention=(False, True, False), dropout=0.1),
    "UNet-latents": partial(UNet, block_out_channels=(192, 384, 768), attention=(False, True, True)),
}
