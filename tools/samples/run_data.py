"""The data that a run was trained on, opened again."""

from pathlib import Path


def data_of_run(source: Path):
    """What a run trains on, a meanflow Data with what it holds out; and whether it mirrors samples.

    Raises:
        Refusal: source is no run, or its data are not those that it was trained on.
    """
    from meanflow.config import TrainConfig, different, with_defaults
    from meanflow.data.sources import training_data
    from meanflow.files import ensure, read_json
    from meanflow.publishing.checkpoints import find_checkpoint
    from meanflow.training.checkpoint import PLACES

    ensure(not (source / "model_index.json").exists(), f"{source} is no run: an exported model has no data")
    checkpoint = find_checkpoint(source)
    fields = with_defaults(read_json(checkpoint / "recipe.json", objective=dict))
    of_data = ("data", "resolution", "vae", "scaling_factor", "normalization", "crop", "class_conditional", "held_out")
    given = {name: fields[name] for name in of_data} | {"subset": fields["subset"] and tuple(fields["subset"])}
    data = training_data(TrainConfig(out=checkpoint.parent, steps=1, smoke=fields["smoke"], **given))
    old = read_json(checkpoint / "data.json")
    diff = different(old, {name: value for name, value in data.metadata.items() if name in old}, PLACES)
    ensure(not diff, f"{fields['data']} holds other data than {source} was trained on")
    return data, fields["flip"]


def held_out(source: Path, pipe, device):
    """The reference of the samples that a run does not train on.

    Raises:
        Refusal: it is no run, holds nothing out, or its data are not what its recipe names.
    """
    from meanflow.config import Refusal
    from meanflow.evaluation.references import DataReference
    from meanflow.files import ensure

    try:
        data, _ = data_of_run(source)
    except Refusal as error:
        raise Refusal(f"{error}: name a --reference") from None
    ensure(tuple(data.shape) == pipe.shape, f"the data of {source} have another shape: name a --reference")
    ensure(data.held_out is not None, f"{source} trains on all of its data (--held-out 0): name a --reference")
    return DataReference(data.held_out, device)
