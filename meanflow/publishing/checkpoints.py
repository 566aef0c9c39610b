"""Reading what runs and exports hold: lists, checksums, networks, pipelines. training/checkpoint.py writes checkpoints.

A checkpoint is a folder step-00050000/ that is whole or not there:

model/      the network: config.json and safetensors, as diffusers' save_pretrained writes them; a network that is not
            in the zoo has its own file beside them, modeling_custom_NAME.py
ema/0.9999/ the averaged network, likewise, one folder for each decay
optimizer.safetensors: the optimiser's state, by the names of the weights
objective.safetensors: the trainable modules that the objective has beside the network, if there are any
recipe.json, data.json, step.json: what was trained, on what, for how long
sampling.json: how the network is sampled
checksums.json: the checksum of every other file
"""

import importlib.util
import re
import sys
from pathlib import Path

from diffusers import AutoencoderKL, ModelMixin

from meanflow.config import MeanFlowConfig, Refusal, check
from meanflow.data.vae import fingerprint, load_vae
from meanflow.fetch import fetch
from meanflow.files import checksum, ensure, errors_as, read_json
from meanflow.objectives.meanflow import MeanFlow
from meanflow.publishing.pipeline import MeanFlowPipeline
from models import NETWORKS

CHECKSUMS = "checksums.json"
JSON = ("recipe.json", "data.json", "step.json", "sampling.json")
INDEX = "model_index.json"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first, by step."""
    return sorted(run.glob("step-" + "[0-9]" * 8))


def find_checkpoint(folder: Path) -> Path:
    """A run's newest checkpoint, or the checkpoint itself.

    Raises:
        ValueError: the folder is neither.
    """
    is_checkpoint = folder in checkpoints(folder.parent) or (folder / "step.json").is_file()
    found = [folder] if is_checkpoint else checkpoints(folder)
    ensure(len(found) > 0, f"{folder} is no run with a checkpoint, no checkpoint and no exported folder")
    return found[-1]


def saved_step(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    verify_checkpoint(folder, JSON)
    step = read_json(folder / "step.json", step=int)["step"]
    is_named = not re.fullmatch(r"step-\d{8}", folder.name) or int(folder.name[5:]) == step
    ensure(is_named, f"{folder} holds step {step}: give it its name again, step-{step:08d}")
    return step


def verify_checkpoint(folder: Path, parts: str | tuple[str, ...] = "") -> None:
    """Compares the files of a checkpoint with their checksums; with parts, only the files whose paths begin so.

    Raises:
        Refusal: a file is missing or damaged; the message names it and the checkpoint before.
    """
    older = [path for path in checkpoints(folder.parent) if path.name < folder.name]
    advice = f": --resume {older[-1]} goes on from the one before, and tools take that folder, too" if older else ""
    try:
        sums = read_json(folder / CHECKSUMS, **{"recipe.json": str})
    except Refusal as error:
        raise Refusal(f"{error}{advice}") from None
    for name in filter(lambda name: name.startswith(parts), sums):
        is_whole = (folder / name).is_file() and checksum(folder / name) == sums[name]
        ensure(is_whole, f"{folder / name} is missing or damaged{advice}")


def verify_export(folder: Path) -> None:
    """Compares the weights in an exported folder, and the sizes of its networks, with their checksums.

    Raises:
        Refusal: a file is damaged; the message names it.
    """
    sums = read_json(folder / CHECKSUMS) if (folder / CHECKSUMS).exists() else {}  # version 0.1 wrote none
    for name, value in sums.items():
        path = folder / name
        # The model card and the names of classes may be edited, and a download leaves out other variants.
        is_read = "/" in name and path.suffix in (".json", ".safetensors") and path.exists()
        ensure(not is_read or checksum(path) == value, f"{path} is damaged: export or download it again")


def check_finite(net: ModelMixin, place: str | Path) -> ModelMixin:
    """The network, if all of its weights are finite.

    Raises:
        Refusal: one is not; the message names the place.
    """
    for name, weight in net.state_dict().items():
        is_finite = bool(weight.isfinite().all())
        ensure(is_finite, f"{place} has weights that are not finite, such as {name}: take an older checkpoint")
    return net


def load_network(folder: Path, ema: float | None = None, trust_remote_code: bool = False) -> ModelMixin:
    """The averaged network of a checkpoint, in evaluation mode.

    Args:
        ema: decay of the average; default: the recipe's first.
        trust_remote_code: run the network's own file, if it is not in the zoo.
    Raises:
        ValueError: there is no such average, it is damaged, or its code is not trusted.
    """
    verify_checkpoint(folder, JSON)
    decays = read_json(folder / "recipe.json")["ema_decay"]
    decay = decays[0] if ema is None else ema
    check(decay in decays, "ema", decay, f"one of {', '.join(map(str, decays))} for {folder}")
    verify_checkpoint(folder, f"ema/{decay}/")
    average = folder / "ema" / str(decay)
    name, code = read_json(average / "config.json")["_class_name"], next(average.glob("modeling_*.py"), None)
    return check_finite(network_class(name, code, trust_remote_code).from_pretrained(average).eval(), average)


def network_class(name: str, code: Path | None, trust_remote_code: bool) -> type[ModelMixin]:
    """The class of a saved network: of the zoo, or from the file of its own.

    Args:
        code: the file, for a network that is not in the zoo.
    Raises:
        ValueError: there is no such network, or its file is not trusted.
    """
    if code is None:
        ensure(name in NETWORKS, f"{name} is no network of the zoo, and has no file of its own")
        return NETWORKS[name]
    advice = "read it, then give --trust-remote-code (in Python: trust_remote_code=True)"
    ensure(trust_remote_code, f"{code} is not this project's code, and would have been run: {advice}")
    with errors_as(f"{code} cannot be run"):
        spec = importlib.util.spec_from_file_location(code.stem, code)
        module = sys.modules[code.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)


def read_sampling(folder: Path) -> dict:
    """How the network of a checkpoint is sampled: the fields of `Sampling`."""
    if (folder / "sampling.json").is_file():
        return read_json(folder / "sampling.json")
    return sampling_of_meanflow(read_json(folder / "recipe.json")["objective"])


def sampling_of_meanflow(objective: dict) -> dict:
    """For checkpoints and exports of version 0.1, which have the fields of MeanFlowConfig instead."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in objective.items()}
    return MeanFlow.sampling(MeanFlowConfig(**options))._asdict()


def load_pipeline(source, ema=None, variant=None, revision=None, trust_remote_code=False) -> MeanFlowPipeline:
    """The pipeline of a run (its newest checkpoint), a checkpoint, an exported folder or a Hub id, in float32.

    Args:
        source: a path or an id.
        ema: of a run, the decay of the average to take; default: the recipe's first.
        variant: of an exported folder, bf16 or fp16: the precision that its weights were saved in.
        revision: of a Hub id: a branch, tag or commit.
        trust_remote_code: run the network's own file, if the network is not in the zoo. No other code is run.
    Raises:
        ValueError: it is none of these, is not whole, has no such average or variant, or its code is not trusted.
    """
    folder = fetch(source, revision, variant, code=trust_remote_code)
    if (folder / INDEX).is_file():
        ensure(ema is None, f"ema {ema} is for runs: {source} holds one average")
        return read_export(folder, variant, trust_remote_code)
    folder = find_checkpoint(folder)
    ensure(variant is None, f"variant {variant} is for exported folders, and {folder} is a checkpoint")
    with errors_as(f"{folder} cannot be loaded"):
        net = load_network(folder, ema, trust_remote_code)
        if hasattr(net, "drop_v_head"):  # which only training needs
            net.drop_v_head()
        recipe, metadata = (read_json(folder / f"{name}.json") for name in ("recipe", "data"))
        vae = load_vae(recipe["vae"]) if recipe["vae"] else None
        is_same = vae is None or metadata.get("vae_sha256") in (None, fingerprint(vae))
        ensure(is_same, f"vae: {recipe['vae']} has other weights than in training")
        id2label = dict(enumerate(metadata.get("classes", [])))
        return MeanFlowPipeline(net, vae, read_sampling(folder), id2label, metadata.get("latents"))


def read_export(folder: Path, variant: str | None, trust_remote_code: bool) -> MeanFlowPipeline:
    """The pipeline of an exported folder. The only code there that may run is that of a custom network."""
    with errors_as(f"{f'variant {variant} of ' if variant else ''}{folder} cannot be loaded"):
        index, options = read_json(folder / INDEX), {"variant": variant, "use_safetensors": True}
        module, name = index["net"]
        code = folder / "net" / f"{module}.py" if module.startswith("modeling_custom_") else None
        verify_export(folder)
        net = network_class(name, code, trust_remote_code).from_pretrained(folder / "net", **options)
        check_finite(net, folder)
        has_vae = (index.get("vae") or [None])[0]
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options).requires_grad_(False) if has_vae else None
        sampling = sampling_of_meanflow(index["objective"]) if "objective" in index else index["sampling"]
        return MeanFlowPipeline(net.eval(), vae, sampling, index.get("id2label"), index.get("latents"))
