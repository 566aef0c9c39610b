"""EDM's DDPM++ U-Net, of NVlabs/edm: weights to begin from. It denoises along another path, so it is no MeanFlow yet.

The blocks are taken; the embedders of times, labels and augmentations, and the output, are fresh. Its filters of
[1, 1] are not taken either: ours are [1, 3, 3, 1].
"""

from torch import Tensor

from importers.common import Converted, fit, pick
from importers.py_meanflow import PIXELS, make_unet
from meanflow.files import ensure
from meanflow.objectives.meanflow import MeanFlow

LICENSE = "cc-by-nc-sa-4.0"
SOURCE = "https://github.com/NVlabs/edm"
PAPER = "2206.00364"


def separate_qkv(value: Tensor) -> Tensor:
    """All channels of q, then of k, then of v; EDM has them in turn. Of a weight (3C, ...) or a bias (3C,)."""
    return value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)


def is_fresh(name: str) -> bool:
    return name.startswith("map_") or "_aux_conv." in name or name.endswith(".resample_filter")


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """A U-Net with these blocks, to be trained.

    Raises:
        Refusal: these are not the weights of such a network.
    """
    weights = pick(content)
    ensure("model.map_layer0.weight" in weights, "no weights of EDM: model.map_layer0.weight is missing")
    names, known = {}, {}
    for theirs, value in weights.items():
        name = theirs.removeprefix("model.")
        name = f"left out {name}" if is_fresh(name) else name
        names[name] = theirs
        known[name] = separate_qkv(value) if ".qkv." in name else value
    net = make_unet(known, augment_dim=6)
    fresh = [name for name in net.state_dict() if is_fresh(name)]
    fate = fit(net, known, names, fresh=fresh, left_out=("left out ",))
    return Converted(net, MeanFlow.sampling(PIXELS), None, *fate)
