"""The official PyTorch weights of improved MeanFlow: iMF-{B,M,L,XL}-2.pth of Lyy-iiis/imeanflow (MIT licence)."""

from importers.common import Converted, fit, pick
from meanflow.config import ImprovedMeanFlowConfig
from meanflow.data.latents import IMF_MEAN, IMF_STD
from meanflow.files import ensure
from meanflow.objectives.improved import ImprovedMeanFlow
from models.imf import IMF

LICENSE = "mit"
SOURCE = "https://github.com/Lyy-iiis/imeanflow"
PAPER = "2512.02012"
# The CFG scale and interval that the authors recommend at one step, by depth and width.
RECOMMENDED = {(12, 768): (8.0, (0.4, 0.65)), (24, 768): (10.5, (0.4, 0.6)), (32, 1024): (10.5, (0.4, 0.6))}
RECOMMENDED |= {(48, 1024): (8.0, (0.42, 0.62))}
# What the official network calls differently: its layers wrap others, and its MLP is not timm's.
NAMES = {"._flax_linear": "", "._flax_embedding": "", "mlp.w1": "mlp.fc1_g", "mlp.w3": "mlp.fc1_x", "mlp.w2": "mlp.fc2"}


def renamed(name: str) -> str:
    """The name that models/imf.py has for an official weight."""
    name = name.removeprefix("net.")
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """The network without its v head, which only training needs.

    Args:
        input_size: height and width of the latents, which the weights do not tell; None: 32.
    Raises:
        Refusal: these are not weights of such a network.
    """
    weights = pick(content)
    names = {renamed(name): name for name in weights}
    known = {name: weights[official] for name, official in names.items()}

    def blocks(kind: str) -> int:
        return len({name.split(".")[1] for name in known if name.startswith(f"{kind}.")})

    needed = ["x_embedder.proj.weight", "u_heads.0.attn.q_norm.weight", "y_embedder.embedding_table.weight"]
    lacking = [name for name in needed if name not in known]
    ensure(not lacking, f"no weights of improved MeanFlow: {', '.join(lacking[:1])} is missing")
    width, channels, patch_size, _ = known["x_embedder.proj.weight"].shape
    heads = width // len(known["u_heads.0.attn.q_norm.weight"])
    num_classes = len(known["y_embedder.embedding_table.weight"]) - 1
    depth, aux_head_depth = blocks("shared_blocks") + blocks("u_heads"), blocks("u_heads")
    sizes = (patch_size, channels, width, depth, heads, aux_head_depth, num_classes)
    net = IMF(input_size or 32, *sizes, v_head=False)
    fate = fit(net, known, names, left_out=("v_heads.", "v_final_layer."))
    scale, interval = RECOMMENDED.get((depth, width), RECOMMENDED[12, 768])
    config = ImprovedMeanFlowConfig(null_class="flow", guidance_scale=scale, guidance_interval=interval)
    latents = {"shift": list(IMF_MEAN), "scale": [1 / std for std in IMF_STD]}
    return Converted(net, ImprovedMeanFlow.sampling(config), latents, *fate)
