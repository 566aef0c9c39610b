"""The official JAX weights of MeanFlow, of Gsunshine/meanflow: exact, in both directions.

A .npz file has the arrays of `ema_params` by their paths, such as net/blocks/layers_0/attn/qkv/_flax_linear/kernel.
"""

from torch import Tensor

from importers.common import SD_LATENTS, Converted, fit, make_dit, pick
from meanflow.files import ensure
from meanflow.objectives.base import Sampling
from models.dit import DiT

LICENSE = "mit"
SOURCE = "https://github.com/Gsunshine/meanflow"
PAPER = "2505.13447"


def flax_path(name: str) -> str:
    """blocks.0.attn.qkv.weight -> net/blocks/layers_0/attn/qkv/_flax_linear/kernel."""
    if name.startswith("y_embedder."):
        return "net/y_embedder/embedding_table/_flax_embedding/embedding"
    *parts, leaf = name.split(".")
    parts = [f"layers_{part}" if part.isdecimal() else part for part in parts]
    is_convolution = name.startswith("x_embedder.proj.")
    parts += [] if is_convolution else ["_flax_linear"]
    return "/".join(["net", *parts, "kernel" if leaf == "weight" else leaf])


def transposed(path: str, value: Tensor) -> Tensor:
    """From flax's layout to PyTorch's: kernels of (in, out) or (height, width, in, out)."""
    if not path.endswith("/kernel"):
        return value
    return (value.T if value.ndim == 2 else value.permute(3, 2, 0, 1)).contiguous()


def dotted(path: str) -> str:
    """The inverse of flax_path."""
    path = path.removeprefix("net/").replace("/_flax_linear", "").replace("/_flax_embedding", "")
    name = path.replace("/layers_", "/").replace("/", ".")
    return name.replace(".kernel", ".weight").replace(".embedding_table.embedding", ".embedding_table.weight")


def convert(content: dict, input_size: int | None, num_heads: int | None) -> Converted:
    """The same network.

    Raises:
        Refusal: these are not the weights of the official network.
    """
    arrays = pick(content)
    is_tree = any(path.startswith("net/") for path in arrays)
    ensure(is_tree, f"no official ema_params: they begin with net/, and these with {next(iter(arrays))}")
    names = {dotted(path): path for path in arrays}
    known = {name: transposed(path, arrays[path]) for name, path in names.items()}
    net = make_dit(known, input_size, num_heads)
    fate = fit(net, known, names)
    guidance = "as trained; the official runs of B, L and XL have it trained in"
    return Converted(net, Sampling(guidance=guidance), SD_LATENTS, *fate)


def revert(net: DiT) -> tuple[dict[str, Tensor], str]:
    """The arrays by their paths, and a sentence on what was lost."""
    arrays = {}
    for name, value in net.state_dict().items():
        path, value = flax_path(name), value.float()
        if path.endswith("/kernel"):
            value = value.T if value.ndim == 2 else value.permute(2, 3, 1, 0)
        arrays[path] = value.contiguous()
    side = net.z_shape[-1]
    return arrays, f"Nothing is lost but the size of the input: --input-size {side} when it is converted back."
