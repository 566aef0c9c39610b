"""DiT, of facebookresearch/DiT: weights to begin from. It predicts noise on another path, so it is no MeanFlow yet.

The patch embedding, the labels and the blocks are taken; the embedders of t and h, and the output, are fresh.
"""

from importers.common import SD_LATENTS, Converted, check_positions, fit, make_dit, pick
from meanflow.config import MeanFlowConfig
from meanflow.objectives.meanflow import MeanFlow

LICENSE = "cc-by-nc-4.0"
SOURCE = "https://github.com/facebookresearch/DiT"
PAPER = "2212.09748"
FRESH = ("t_embedder.", "h_embedder.", "final_layer.")


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """A DiT with these blocks, to be trained.

    Raises:
        Refusal: these are not the weights of a DiT.
    """
    weights = pick(content, "ema", "model")
    net = make_dit(weights, input_size, num_heads)
    check_positions(net, weights)
    # What is fresh in ours is left out under another name, so that it is reported.
    known = {f"left out {name}" if name.startswith(FRESH) else name: value for name, value in weights.items()}
    names = {name: name.removeprefix("left out ") for name in known}
    fate = fit(net, known, names, fresh=FRESH, left_out=("left out ", "pos_embed"))
    return Converted(net, MeanFlow.sampling(MeanFlowConfig()), SD_LATENTS, *fate)
