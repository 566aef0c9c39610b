"""The official PyTorch weights of improved MeanFlow: iMF-{B,M,L,XL}-2.pth of Lyy-iiis/imeanflow (MIT licence)."""

from safetensors.torch import load_file

from meanflow.config import ImprovedMeanFlowConfig
from meanflow.data.latents import IMF_MEAN, IMF_STD
from meanflow.files import ensure, errors_as
from meanflow.objectives.improved import ImprovedMeanFlow

LICENSE = "mit"
SOURCE = "https://github.com/Lyy-iiis/imeanflow"
PAPER = "2512.02012"
# The CFG scale and interval that the authors recommend at one step, by depth and width.
RECOMMENDED = {(12, 768): (8.0, (0.4, 0.65)), (24, 768): (10.5, (0.4, 0.6)), (32, 1024): (10.5, (0.4, 0.6))}
RECOMMENDED |= {(48, 1024): (8.0, (0.42, 0.62))}
# What the official network calls differently: its layers wrap others, and its MLP is not timm's.
NAMES = {"._flax_linear": "", "._flax_embedding": "", "mlp.w1": "mlp.fc1_g", "mlp.w3": "mlp.fc1_x", "mlp.w2": "mlp.fc2"}


def read(path) -> dict:
    """The weights of a .pth or .safetensors file by their official names.

    Raises:
        ValueError: it is neither, or holds something else than weights.
    """
    import torch

    with errors_as(f"{path} cannot be read as weights alone, and nothing else is read"):
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    is_weights = isinstance(weights, dict) and all(isinstance(value, torch.Tensor) for value in weights.values())
    ensure(is_weights, f"{path} must hold a dictionary of tensors")
    return weights


def renamed(name: str) -> str:
    """The name that models/imf.py has for an official weight."""
    name = name.removeprefix("net.")
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def convert(weights: dict, input_size: int):
    """The network with these weights, how it is sampled, the latents' units, and what became of every key.

    Args:
        weights: by their official names.
        input_size: height and width of the latents, which the weights do not tell.
    Returns:
        net; a Sampling; {"shift", "scale"}; {"used", "unused", "missing"}: lists of official names, or of ours where
        there is no official one.
    Raises:
        ValueError: these are not weights of such a network.
    """
    from models.imf import IMF

    ours = {renamed(name): name for name in weights}
    known = {name: weights[official] for name, official in ours.items()}

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in known if name.startswith(f"{kind}.")})

    try:
        width, channels, patch_size, _ = known["x_embedder.proj.weight"].shape
        head_size = len(known["u_heads.0.attn.q_norm.weight"])
        num_classes = len(known["y_embedder.embedding_table.weight"]) - 1
    except KeyError as missing:
        raise ValueError(f"no weights of improved MeanFlow: {missing.args[0]} is missing") from None
    depth, aux_head_depth = blocks("shared_blocks") + blocks("u_heads"), blocks("u_heads")
    sizes = (patch_size, channels, width, depth, width // head_size, aux_head_depth, num_classes)
    net = IMF(input_size, *sizes, v_head=False)
    wanted = net.state_dict()
    fate = {
        "used": [official for name, official in ours.items() if name in wanted],
        "unused": [official for name, official in ours.items() if name not in wanted],
        "missing": [name for name in wanted if name not in known],
    }
    others = [
        official for official in fate["unused"] if not renamed(official).startswith(("v_heads.", "v_final_layer."))
    ]
    ensure(
        not fate["missing"], f"half a match: {len(fate['missing'])} weights are missing, such as {fate['missing'][:1]}"
    )
    ensure(not others, f"half a match: {len(others)} weights are of no use, such as {others[:1]}")
    wrong = [f"{name} {tuple(known[name].shape)}" for name in wanted if known[name].shape != wanted[name].shape]
    ensure(not wrong, f"half a match: {len(wrong)} weights have another shape, such as {wrong[:1]}")
    net.load_state_dict({name: known[name] for name in wanted})
    scale, interval = RECOMMENDED.get((depth, width), RECOMMENDED[12, 768])
    config = ImprovedMeanFlowConfig(null_class="flow", guidance_scale=scale, guidance_interval=interval)
    sampling = ImprovedMeanFlow.sampling(config)
    return net, sampling, {"shift": list(IMF_MEAN), "scale": [1 / std for std in IMF_STD]}, fate
