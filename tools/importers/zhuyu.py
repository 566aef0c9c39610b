"""The checkpoints of zhuyu-cs/MeanFlow, a PyTorch port of MeanFlow: exact. Its r_embedder takes t - r."""

from importers.common import Converted, check_positions, fit, make_dit, pick
from meanflow.data.latents import IMF_MEAN, IMF_STD
from meanflow.files import ensure
from meanflow.objectives.base import Sampling

LICENSE = "mit"
SOURCE = "https://github.com/zhuyu-cs/MeanFlow"
PAPER = "2505.13447"


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """Prefers the averaged weights, `ema`.

    Raises:
        Refusal: these are not the weights of such a network.
    """
    weights = pick(content, "ema", "model")
    ensure("r_embedder.mlp.0.weight" in weights, "no weights of zhuyu-cs/MeanFlow: r_embedder.mlp.0.weight is missing")
    net = make_dit(weights, input_size, num_heads)
    check_positions(net, weights)
    outputs, wanted = len(weights["final_layer.linear.bias"]), net.final_layer.linear.out_features
    ensure(outputs != 2 * wanted, "a network with a learned sigma: that it keeps SiT's direction of time is not known")
    names = {name.replace("r_embedder.", "h_embedder."): name for name in weights}
    known = {name: weights[theirs] for name, theirs in names.items()}
    fate = fit(net, known, names, left_out=("pos_embed",))
    args = content.get("args")
    trained = {name: getattr(args, name) for name in ("cfg_omega", "cfg_kappa") if hasattr(args, name)}
    guidance = ", ".join(f"{name} {value}" for name, value in trained.items()) or "not known from the file"
    # The port's own evaluation decodes z / scale + shift with these numbers.
    latents = {"shift": list(IMF_MEAN), "scale": [0.5 / std for std in IMF_STD]}
    return Converted(net, Sampling(guidance=f"as trained: {guidance}"), latents, *fate)
