"""SiT, of willisma/SiT: exact. Its time runs from noise at 0 to data at 1, and its output is x - e.

So u(z, t, t, y) = -SiT(z, 1 - t, y), and both changes can be made in the weights. A SiT with a learned sigma has twice
as many output channels, of which only the first half is the velocity.
"""

import torch
from torch import Tensor

from importers.common import SD_LATENTS, Converted, check_positions, fit, make_dit, pick
from meanflow.config import MeanFlowConfig
from meanflow.files import ensure
from meanflow.objectives.meanflow import MeanFlow
from models.dit import DiT

LICENSE = "mit"
SOURCE = "https://github.com/willisma/SiT"
PAPER = "2401.08740"
TIME = "t_embedder.mlp.0.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
FLOW = MeanFlowConfig(meanflow_ratio=0.0, null_class="flow")


def mirrored_times(weight: Tensor) -> Tensor:
    """The time embedder's first weights, (D, 2K), such that it sees 1 - t where it saw t; twice gives them back.

    Its features are cos(w t) and then sin(w t), for K frequencies w. cos(w (1 - t)) = cos w cos wt + sin w sin wt, and
    sin(w (1 - t)) = sin w cos wt - cos w sin wt.
    """
    half = weight.shape[1] // 2
    w = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * torch.arange(half) / half)
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * w.cos() + of_sin * w.sin(), of_cos * w.sin() - of_sin * w.cos()], dim=1).float()


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """The DiT that is this SiT at r = t. h = t - r has no effect until it is trained.

    Raises:
        Refusal: these are not the weights of a SiT.
    """
    weights = pick(content, "ema", "model")
    net = make_dit(weights, input_size, num_heads)
    ensure("h_embedder.mlp.0.weight" not in weights, "this network has an h_embedder already: it is no SiT")
    check_positions(net, weights)
    known = {**weights, TIME: mirrored_times(weights[TIME])}
    channels, patch = net.config.in_channels, net.config.patch_size**2
    for name in OUTPUT:
        rows = known[name].unflatten(0, (patch, -1))  # (positions in a patch, channels, ...)
        ensure(rows.shape[1] in (channels, 2 * channels), f"{name} must have {channels} or {2 * channels} channels")
        known[name] = -rows[:, :channels].flatten(0, 1)
    names = dict(zip(known, known))
    used, unused, missing = fit(net, known, names, fresh=("h_embedder.",), left_out=("pos_embed",))
    torch.nn.init.zeros_(net.h_embedder.mlp[2].weight)  # its bias is 0, too
    return Converted(net, MeanFlow.sampling(FLOW), SD_LATENTS, used, unused, missing)


def revert(net: DiT) -> tuple[dict[str, Tensor], str]:
    """The weights of a SiT that returns -u(z, 1 - t, 1 - t, y), and a sentence on what was lost.

    The embedding of h = 0 becomes a part of a bias. SiT has a learned sigma, whose rows are 0.
    """
    weights = {name: value.float() for name, value in net.state_dict().items() if not name.startswith("h_embedder.")}
    weights[TIME] = mirrored_times(weights[TIME])
    with torch.no_grad():
        at_zero = net.h_embedder.double()(torch.zeros(1, dtype=torch.float64))[0]
    bias = weights["t_embedder.mlp.2.bias"]
    weights["t_embedder.mlp.2.bias"] = (bias.double() + at_zero).float()
    for name in OUTPUT:
        rows = -weights[name].unflatten(0, (net.config.patch_size**2, -1))
        weights[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    weights["pos_embed"] = net.pos_embed[None].clone()
    return weights, "The learned sigma is 0, and only u(z, t, t, y) is kept: it is sampled as flow matching."
