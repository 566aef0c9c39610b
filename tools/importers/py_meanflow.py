"""The CIFAR-10 U-Net of Gsunshine/py-meanflow, the authors' PyTorch code: exact. Its names are ours."""

from torch import Tensor

from importers.common import Converted, fit, pick
from meanflow.config import MeanFlowConfig
from meanflow.files import ensure
from meanflow.objectives.meanflow import MeanFlow
from models.unet import UNetCifar

LICENSE = "cc-by-nc-4.0"
SOURCE = "https://github.com/Gsunshine/py-meanflow"
PAPER = "2505.13447"
PIXELS = MeanFlowConfig(meanflow_ratio=0.75, class_dropout_prob=0.0)


def make_unet(weights: dict[str, Tensor], augment_dim: int) -> UNetCifar:
    """A network of the sizes that these weights have.

    Raises:
        Refusal: these are no such weights.
    """
    first = next((name for name in weights if name.startswith("enc.") and name.endswith("_conv.weight")), None)
    ensure(first is not None, "no weights of a DDPM++ U-Net: enc.32x32_conv.weight is missing")
    model_channels, in_channels = weights[first].shape[:2]
    widths = {}  # of each level, by its side
    for name in weights:
        if name.startswith("enc.") and name.endswith("_block0.conv0.weight"):
            side = int(name.split(".")[1].split("x")[0])
            widths[side] = weights[name].shape[0]
    sides = sorted(widths, reverse=True)
    ensure(len(sides) > 0, "no weights of a DDPM++ U-Net: enc.32x32_block0.conv0.weight is missing")
    blocks = f"enc.{sides[0]}x{sides[0]}_block"
    num_blocks = len({name.split(".")[1] for name in weights if name.startswith(blocks)})
    channel_mult = tuple(widths[side] // model_channels for side in sides)
    sizes = (sides[0], in_channels, in_channels, model_channels, channel_mult, num_blocks)
    return UNetCifar(*sizes, augment_dim=augment_dim)


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """Prefers the averaged weights, net_ema.

    Raises:
        Refusal: these are not the weights of such a network.
    """
    weights = pick(content, "model")
    kinds = ("net_ema.", "net_ema1.", "net_ema2.", "net.")
    kind = next((kind for kind in kinds if any(name.startswith(kind) for name in weights)), None)
    ensure(kind is not None, f"no weights of py-meanflow: none begins with {', '.join(kinds)}")
    names = {name.removeprefix(kind): name for name in weights}
    known = {name: weights[theirs] for name, theirs in names.items()}
    augment_dim = known["map_augment.weight"].shape[1] if "map_augment.weight" in known else 0
    net = make_unet(known, augment_dim)
    left_out = tuple(other for other in kinds if other != kind)
    fate = fit(net, known, names, left_out=(*left_out, "num_updates"))
    return Converted(net, MeanFlow.sampling(PIXELS), None, *fate)
