"""Writing checkpoints, and resuming from them. publishing/checkpoints.py says what they hold, and reads them."""

import errno
import json
import os
import shutil
import socket
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from threading import Thread

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict
from torch.distributed.tensor import DTensor

from meanflow.config import FREE_ON_RESUME, Refusal, TrainConfig, check, different, flatten, with_defaults
from meanflow.fetch import fetch
from meanflow.files import checksums, ensure, errors_as, first_line, read_json, sync, unused, write_json
from meanflow.objectives.base import Objective
from meanflow.program import Shared, speaks_first
from meanflow.publishing.checkpoints import (
    CHECKSUMS,
    INDEX,
    check_finite,
    checkpoints,
    verify_checkpoint,
    verify_export,
)
from meanflow.publishing.pipeline import network_file

OPTIMIZER, OBJECTIVE = "optimizer.safetensors", "objective.safetensors"
# The state of all shards, on the main process.
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
# What may differ between the metadata of the same data: where they lie, and the version that wrote them.
PLACES = {"source", "vae", "vae_revision", "meanflow"}
# What a run writes beside its checkpoints.
WRITTEN = ("data.json", "log.jsonl", "loss.png", "samples", "pipeline", "push.log", "end.json", ".owner", INDEX)


def check_folder(folder: Path, fields: dict, metadata: dict) -> None:
    """Refuses the folder of a run or checkpoint of another recipe or of other data, naming what differs.

    Args:
        fields: the recipe as recipe.json has it.
        metadata: the data's.
    """
    diff, advice = [], f"choose another --out; --init-from {folder} begins with its weights"
    if (folder / "recipe.json").exists():
        old = with_defaults(read_json(folder / "recipe.json", objective=dict, ema_decay=list))
        is_constant = old["schedule"] == fields["schedule"] == "constant"
        diff += different(old, fields, FREE_ON_RESUME | {"steps", "epochs"} if is_constant else FREE_ON_RESUME)
    elif not checkpoints(folder):
        foreign = ", ".join(name for name in WRITTEN if (folder / name).exists())
        ensure(not foreign, f"{folder} has {foreign}, which no run of this program wrote: choose another --out")
    if (folder / "data.json").exists() and not fields["allow_data_change"]:
        old = read_json(folder / "data.json", count=int)
        differing = different(old, {name: metadata[name] for name in metadata if name in old}, PLACES)
        diff += [(f"data.json's {name}", there, here) for name, there, here in differing]
        advice = "--allow-data-change goes on where samples were only repaired or removed" if differing else advice
    words = ", ".join(f"{name} {there!s:.80} there, {here!s:.80} here" for name, there, here in diff)
    ensure(not diff, f"{folder} belongs to another recipe ({words}): {advice}")


def claim_folder(folder: Path, fields: dict, metadata: dict) -> FileLock:
    """Marks a run's folder as this recipe's, on these data, and locks it until the lock is released.

    Raises:
        ValueError: it belongs to another recipe, or another process has it.
    """
    check_folder(folder, fields, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / ".lock", timeout=0), folder / ".owner"
    try:
        lock.acquire()
    except Timeout:
        name = owner.read_text().strip() if owner.exists() else "unknown"
        raise ValueError(f"{folder} is in use by another run ({name}): choose another --out") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # which network file systems without locks give
            raise
        print(f"warning: {folder} cannot be locked: see that only one run uses it", file=sys.stderr)
    owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    write_json(folder / "recipe.json", fields)
    write_json(folder / "data.json", metadata)
    return lock


def on_processes(accelerator, part, *args, only_main: bool = True):
    """Runs part(*args) on the main process, or on all, while the others wait; returns its result, None elsewhere.

    Raises:
        Shared: on all processes, what went wrong on the first that failed.
    """
    result = error = None
    try:
        if accelerator.is_main_process or not only_main:
            result = part(*args)
    except Exception as exception:
        error = exception
    lines = [line for line in gather_object([error and first_line(error)]) if line is not None]
    if error is not None and not isinstance(error, (ValueError, OSError, SafetensorError)):
        raise error  # a fault of the code, which needs its traceback
    if lines:
        raise Shared(lines[0])
    return result


class CheckpointWriter:
    """Saves the steps of a run. Sharded weights are gathered, so that every checkpoint is what one process writes."""

    def __init__(self, accelerator, recipe, fields, metadata, objective: Objective, averages, optimizer):
        self.accelerator, self.recipe, self.fields, self.metadata = accelerator, recipe, fields, metadata
        self.objective, self.averages, self.optimizer = objective, averages, optimizer
        self.thread, self.error = None, None
        self.is_pending, self.is_saved = False, True

    def save(self, progress: dict) -> None:
        """Copies a step to memory, and begins to write it beside training.

        It is written under a temporary name, and renamed when everything is on the disk. A failure, such as a full
        disk, is reported, and the older checkpoints stay.

        Args:
            progress: the content of step.json; its "step" names the folder.
        """
        self.wait()
        sources = {"model": self.objective.net, **{f"ema/{k}": net for k, net in self.averages.nets.items()}}
        nets = {place: self.copy_network(source) for place, source in sources.items()}
        states = self.copy_states()
        self.is_pending = True
        if self.accelerator.is_main_process:
            self.thread = Thread(target=self.write, args=(progress, nets, states))
            self.thread.start()

    def wait(self) -> bool:
        """Waits until the step that was saved last is on the disk. Returns whether it is, on all processes."""
        if self.is_pending:
            if self.thread:
                self.thread.join()
            self.is_saved = all(error is None for error in gather_object([self.error]))
            self.thread, self.error, self.is_pending = None, None, False
        return self.is_saved

    def write(self, progress: dict, nets: dict[str, torch.nn.Module], states: dict[str, dict]) -> None:
        folder = self.recipe.out / f"step-{progress['step']:08d}"
        temporary = self.recipe.out / f".{folder.name}.tmp"
        try:
            self.begin(temporary, progress)
            for place, net in nets.items():
                check_finite(net, f"{folder}/{place}")
                net.save_pretrained(temporary / place)
                name, code = network_file(type(net))
                if name.startswith("modeling_custom_"):
                    shutil.copyfile(code, temporary / place / f"{name}.py")
            for name, state in states.items():
                save_file(state, temporary / name)
            self.finish(temporary, folder)
        except Exception as error:  # by three packages: OSError, RuntimeError, SafetensorError
            self.error = first_line(error)
            shutil.rmtree(temporary, ignore_errors=True)
            print(f"{folder} could not be saved, the older checkpoints stay: {self.error}", file=sys.stderr)

    def begin(self, temporary: Path, progress: dict) -> None:
        remove_temporary(self.recipe.out)
        temporary.mkdir(parents=True)
        last = self.recipe.objective.at(progress["step"] - 1)  # the step that was trained last
        sampling = self.objective.sampling(last)._asdict()
        parts = {"recipe": self.fields, "data": self.metadata, "sampling": sampling, "step": progress}
        for name, fields in parts.items():
            write_json(temporary / f"{name}.json", fields)

    def copy(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The whole tensors on the CPU, apart from those that training goes on with."""
        whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}  # by all processes
        apart = torch.Tensor.clone if self.accelerator.device.type == "cpu" else torch.Tensor.cpu
        return {k: apart(v) for k, v in whole.items()}

    def copy_network(self, source: torch.nn.Module) -> torch.nn.Module | None:
        weights = self.copy(state_dict.get_model_state_dict(source, options=WHOLE))
        if not self.accelerator.is_main_process:
            return None
        net = self.objective.net
        with torch.device("meta"):
            whole = type(net).from_config(net.config)
        whole.load_state_dict(weights, assign=True)
        return whole

    def copy_states(self) -> dict[str, dict]:
        optimizer = state_dict.get_optimizer_state_dict(self.objective, self.optimizer, options=WHOLE)
        states = {OPTIMIZER: flatten(optimizer.get("state", {})), OBJECTIVE: self.objective.own_state()}
        copies = {name: self.copy(state) for name, state in states.items()}
        return {name: state for name, state in copies.items() if state or name == OPTIMIZER}

    def finish(self, temporary: Path, folder: Path) -> None:
        write_json(temporary / CHECKSUMS, checksums(temporary))
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        out = self.recipe.out
        if folder.exists():
            folder.rename(out / f".{folder.name}.old.tmp")
        temporary.rename(folder)
        sync(out)
        for old in superfluous(self.recipe):
            with suppress(OSError):  # that an old one cannot be removed does not matter
                old.rename(out / f".{old.name}.tmp")  # so that a kill during its removal leaves no half of it in sight
        remove_temporary(out)


def score_name(recipe: TrainConfig) -> str:
    """Scores of one name can be compared."""
    return f"{recipe.eval_metric} of {recipe.eval_images} images against {recipe.eval_reference}"


def read_score(folder: Path, recipe: TrainConfig) -> float | None:
    """What the evaluation at a checkpoint gave, None if there was none or this cannot be read."""
    try:
        return read_json(folder / "step.json").get("scores", {}).get(score_name(recipe))
    except Refusal:
        return None


def superfluous(recipe: TrainConfig) -> list[Path]:
    """The checkpoints that are neither among the newest, nor the best, nor kept for good."""
    done, every = checkpoints(recipe.out), recipe.keep_every
    kept = set(done[-recipe.keep :]) | {path for path in done if every and int(path.name[5:]) % every == 0}
    scores = {path: read_score(path, recipe) for path in done if recipe.keep_best}
    scored = [path for path in scores if scores[path] is not None]
    kept |= set(sorted(scored, key=scores.get)[:1])
    return [path for path in done if path not in kept]


def remove_temporary(out: Path) -> None:
    for path in out.glob(f".step-{8 * '[0-9]'}*.tmp"):
        with suppress(OSError):
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def choose_checkpoint(recipe: TrainConfig) -> Path | None:
    """The checkpoint to go on from, None to begin anew.

    Raises:
        ValueError: recipe.resume cannot be followed.
    """
    is_run = not (recipe.out / "step.json").exists()
    ensure(is_run, f"out: {recipe.out} is a checkpoint: --out is the run's folder, and --resume takes a checkpoint")
    newest = next(reversed(checkpoints(recipe.out)), None)
    is_fresh = recipe.resume != "never" or newest is None
    ensure(is_fresh, f"resume is never, but {recipe.out} has checkpoints: choose another --out")
    if recipe.resume in ("auto", "never"):
        return newest
    folder = Path(recipe.resume).expanduser()
    check((folder / "step.json").is_file(), "resume", recipe.resume, "auto, never or the folder of a checkpoint")
    return folder


def load_modules(folder: Path, objective: Objective, averages) -> None:
    """Restores the network, its averages and the objective's own modules, before they are sharded."""
    places = {"model": objective.net, **{f"ema/{name}": average for name, average in averages.nets.items()}}
    with errors_as(f"{folder} does not fit the recipe's network"):
        for place, net in places.items():
            net.load_state_dict(type(objective.net).from_pretrained(folder / place).state_dict())
        if (folder / OBJECTIVE).exists():
            objective.load_state_dict(load_file(folder / OBJECTIVE), strict=False)


def load_optimizer(folder: Path, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimiser's state, after the weights were sharded, if they are."""
    values = state_dict.get_optimizer_state_dict(objective, optimizer) | {"state": defaultdict(dict)}
    saved = load_file(folder / OPTIMIZER)
    # Checkpoints of version 0.1 name the weights as the network does, not as the objective does.
    prefix = "" if any(key.startswith("net.") for key in saved) else "net."
    for key, value in saved.items():
        weight, name = key.rsplit(".", 1)
        # The file's own memory would keep the room that the file takes on the disk, after it is pruned.
        values["state"][prefix + weight][name] = value.clone()
    options = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_optimizer_state_dict(objective, optimizer, values, options=options)


def set_aside_later(out: Path, folder: Path) -> None:
    """Renames the run's checkpoints that are newer than this one of them, so that it is the newest again."""
    if folder.parent.resolve() == out.resolve():
        for later in checkpoints(out):
            if later.name > folder.name:
                later.rename(unused(later.with_name(f"{later.name}.left")))


def init_weights(net: torch.nn.Module, source: str) -> None:
    """Gives net the weights of a checkpoint (its model, not an average), an exported folder, a Hub id or ID@REVISION.

    Raises:
        ValueError: there are none, or they are of another shape.
    """
    folder = fetch(source)
    ensure(folder.is_dir(), f"init_from: {source} is a file: tools/convert.py makes a folder of weights from elsewhere")
    folder = next(reversed(checkpoints(folder)), folder)
    if (folder / "step.json").exists():
        verify_checkpoint(folder, "model/")
    if (folder / INDEX).exists():
        verify_export(folder)
    folder = next((folder / name for name in ("model", "net") if (folder / name).is_dir()), folder)
    with errors_as(f"init_from: {source} has no weights for this network"):
        other = check_finite(type(net).from_pretrained(folder), source)
        lacks_v_head = net.config.get("v_head", False) and not other.config.get("v_head")
        missing, _ = net.load_state_dict(other.state_dict(), strict=not lacks_v_head)
        ensure(all(name.startswith("v_") for name in missing), f"it lacks {missing[:1]}")
        if lacks_v_head and speaks_first():
            print(f"{source} has no v head, as exports have none: the v head starts afresh", file=sys.stderr)
    sizes = (json.loads(network.to_json_string()) for network in (other, net))
    for name, there, here in different(*sizes, {"dropout", "input_size", "img_resolution", "v_head"}):
        if not name.startswith("_"):  # a size that the shapes of the weights may not show
            raise Refusal(f"init_from: {source} has {name} {there}, and this network {here}: --net {name} {there}")
