"""A pipeline in memory, from a run, a checkpoint, an exported folder or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import AutoencoderKL

from meanflow.data.vae import fingerprint, load_vae
from meanflow.fetch import fetch
from meanflow.files import first_line, read_json
from meanflow.publishing.checkpoints import (
    find_checkpoint,
    load_network,
    network_class,
    read_sampling,
    sampling_of_meanflow,
)
from meanflow.publishing.pipeline import MeanFlowPipeline

INDEX = "model_index.json"
CUSTOM = "modeling_custom_"  # how the file of a network that is not in the zoo begins


def load_pipeline(
    source: str | Path,
    ema: float | None = None,
    variant: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MeanFlowPipeline:
    """The pipeline of a run (its newest checkpoint), a checkpoint, an exported folder or a Hub id, in float32.

    Args:
        ema: of a run, the decay of the average to take; default: the recipe's first.
        variant: of an exported folder, bf16 or fp16: the precision that its weights were saved in.
        trust_remote_code: run the network's own file, if the network is not in the zoo. No other code is run.
    Raises:
        ValueError: it is none of these, is not whole, has no such average or variant, or its code is not trusted.
    """
    folder = fetch(source, revision, variant, code=trust_remote_code)
    if (folder / INDEX).is_file():
        if ema is not None:
            raise ValueError(f"ema {ema} is for runs: {source} holds one average")
        return read_export(folder, variant, trust_remote_code)
    folder = find_checkpoint(folder)
    if variant is not None:
        raise ValueError(f"variant {variant} is for exported folders, and {folder} is a checkpoint")
    with names_place(folder):
        recipe, metadata = (read_json(folder / f"{name}.json") for name in ("recipe", "data"))
        net = load_network(folder, ema, trust_remote_code)
        vae = load_vae(recipe["vae"]) if recipe["vae"] else None
        if vae is not None and metadata.get("vae_sha256") not in (None, fingerprint(vae)):
            raise ValueError(f"vae: {recipe['vae']} has other weights than in training")
        id2label = dict(enumerate(metadata.get("classes", [])))
        return MeanFlowPipeline(net, vae, read_sampling(folder), id2label, metadata.get("latents"))


def read_export(folder: Path, variant: str | None, trust_remote_code: bool) -> MeanFlowPipeline:
    """The pipeline of an exported folder. The only code there that may run is that of a custom network."""
    with names_place(f"variant {variant} of {folder}" if variant else folder):
        index, options = read_json(folder / INDEX), {"variant": variant, "use_safetensors": True}
        module, name = index["net"]
        code = folder / "net" / f"{module}.py" if module.startswith(CUSTOM) else None
        net = network_class(name, code, trust_remote_code).from_pretrained(folder / "net", **options)
        has_vae = (index.get("vae") or [None])[0]
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options) if has_vae else None
        sampling = sampling_of_meanflow(index["objective"]) if "objective" in index else index["sampling"]
        return MeanFlowPipeline(net.eval(), vae, sampling, index.get("id2label"), index.get("latents"))


@contextmanager
def names_place(place: str | Path) -> Iterator[None]:
    """Turns an error about a file's content, of the many kinds that packages raise, into one that names the place."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise  # it is one of ours, which says enough
        raise ValueError(f"{place} cannot be loaded, {type(error).__name__}: {first_line(error)}") from None
