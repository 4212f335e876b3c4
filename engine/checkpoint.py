"""What a run saves: checkpoints to use, and training states to resume from.

A checkpoint (`checkpoint_N/`) is what Hugging Face loads as the base model, with coconut.json
beside it. A training state (`resume/<optimizer_step>/`) holds weights, optimizer, every rank's
random generators and the position in the run; it is kept apart, and only the newest two, so that
many checkpoints do not cost as many optimizer states. Both are written under a temporary name,
flushed and renamed (SPEC section 9). When to save is training.py's decision.

Tensors lie in safetensors files and everything else in JSON: nothing here unpickles. States are
written and read by torch.distributed.checkpoint, shard by shard, so any number of ranks goes on
from what any other number wrote.
"""

import base64
import hashlib
import json
import os
import random
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from engine import distributed
from engine.run_dir import RESUME_FOLDER, prune, state_folders, whole_directory
from utils import RunFailed, UserError, atomic_write_text, sha256_file

KEPT_STATES = 2
# It holds a sum for each file; those of a thousand ranks take well under a hundredth of this.
LARGEST_STATE_JSON_BYTES = 2**24
# What Python raises where JSON holds other values than were written.
UNREADABLE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
BASE_PREFIX = "base_causallm."
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
MODEL, OPTIMIZER = "model.", "optimizer."


@contextmanager
def _whole_directory_of_all_ranks(target: Path) -> Iterator[Path]:
    """`whole_directory`, made and renamed by rank 0, which every rank may fill.

    Where a rank fails, none goes on, and `target` stays as it was.
    """
    with whole_directory(target) if distributed.is_main() else nullcontext() as unfinished:
        # Nothing is written before the folder is there, nor renamed before all is written.
        unfinished = distributed.broadcast_from_main(unfinished)
        yield unfinished
        distributed.barrier()
    distributed.barrier()


@contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """Turn what such a disk raises inside the block, where `what` is written, into one message.

    Raises: RunFailed, which tells what is left to go on from.
    """
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        cause = error
        if isinstance(error, CheckpointException):
            _, (cause, _) = min(error.failures.items())
        reason = getattr(cause, "strerror", None) or cause
        left = "nothing was saved before it, so the same command begins anew"
        try:
            if state := newest_state(run_dir, lambda text: None):
                left = f"{state.folder} is intact, and the same command continues from it"
        except UserError as damaged:
            left = str(damaged)
        raise RunFailed(
            f"{run_dir}: {what} could not be written ({reason}); {left} once there is room"
        ) from error


def save_checkpoint(target: Path, model: nn.Module, tokenizer, settings: dict) -> None:
    """Write `target` as a Hugging Face model directory with `settings` in coconut.json.

    model: the Coconut module, wrapped or sharded. Every rank must call; rank 0 writes.
    """
    state = get_model_state_dict(model, options=GATHERED)
    if not distributed.is_main():
        return
    base = distributed.unwrap(model).base_causallm
    state = {name.removeprefix(BASE_PREFIX): tensor for name, tensor in state.items()}
    # Gathered from shards, tied weights no longer share the storage by which they are known.
    once = {name for name, _ in base.named_parameters()}
    for name, _ in base.named_parameters(remove_duplicate=False):
        if name not in once:
            del state[name]
    with writing(target.parent, target.name), whole_directory(target) as folder:
        base.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        text = json.dumps(settings, indent=2) + "\n"
        (folder / "coconut.json").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TrainingState:
    """A training state on disk whose sums are right.

    trainer: what Trainer.state_dict gave, as JSON values.
    """

    folder: Path
    trainer: dict


def save_state(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer,
    trainer: dict,
    notify: Callable[[str], None] = print,
) -> None:
    """Write `resume/<step>/` and keep the newest two. Every rank must call.

    Rank 0 writes what all ranks hold alike, and each rank the shards that it alone holds; so ranks
    on several machines need a file system that all of them see. Model configuration and tokenizer
    go along, so that going on needs nothing but this folder.

    notify: is told of every older state that cannot be removed.
    """
    generators = distributed.gather_to_main(_generator_states())
    target = run_dir / RESUME_FOLDER / str(step)
    what = f"the training state of optimizer step {step}"
    with writing(run_dir, what), _whole_directory_of_all_ranks(target) as unfinished:
        sharded = distributed.is_sharded(model)
        if sharded or distributed.is_main():
            with _quiet_without_group():
                dcp.save(
                    _state_tensors(model, optimizer),
                    storage_writer=HuggingFaceStorageWriter(str(unfinished), save_distributed=True),
                    planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                    no_dist=not sharded,
                )
        if distributed.is_main():
            distributed.unwrap(model).base_causallm.config.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            generators_file = unfinished / "generators.json"
            generators_file.write_text(json.dumps(generators), encoding="utf-8")
            # A tokenizer with several chat templates keeps them in a folder.
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            sums = {str(path.relative_to(unfinished)): sha256_file(path) for path in files}
            _write_state_json(unfinished, {"trainer": trainer, "sha256": sums})
    if not distributed.is_main():
        return
    # A later step's state was damaged and passed over, or this run would stand there.
    stale = [path for number, path in state_folders(run_dir) if number > step]
    past = [path for number, path in state_folders(run_dir) if number <= step]
    prune(stale + past[:-KEPT_STATES], notify)


def update_trainer(run_dir: Path, step: int, trainer: dict) -> None:
    """Replace what `resume/<step>/` holds of the trainer; its tensors stay as they are."""
    folder = run_dir / RESUME_FOLDER / str(step)
    with writing(run_dir, f"the position in {folder}"):
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))["content"]
        _write_state_json(folder, content | {"trainer": trainer})


def _write_state_json(folder: Path, content: dict) -> None:
    text = json.dumps({"content": content, "sha256": _sum_of(content)}, indent=2)
    atomic_write_text(folder / "state.json", text)


def _sum_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest_state(run_dir: Path, notify=print) -> TrainingState | None:
    """The newest intact training state of a run, or None when there is none at all.

    notify: is told of every damaged state that was passed over.

    Raises: UserError when states exist and none is intact.
    """
    folders = state_folders(run_dir)
    for _, folder in reversed(folders):
        try:
            return TrainingState(folder, _verified_trainer(folder))
        except (*UNREADABLE, OSError) as error:
            notify(f"{folder}: damaged, trying the one before ({error})")
    if folders:
        raise UserError(
            f"{run_dir / RESUME_FOLDER}: no training state is intact; remove the folder to start"
            " anew, or restore it from a backup"
        )
    return None


def _verified_trainer(folder: Path) -> dict:
    about = os.stat(folder / "state.json")
    if not stat.S_ISREG(about.st_mode) or about.st_size > LARGEST_STATE_JSON_BYTES:
        raise ValueError("state.json is no file of ours")
    stored = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    content = stored["content"]
    if _sum_of(content) != stored["sha256"]:
        raise ValueError("state.json does not match its sum")
    unlisted = {path.name for path in folder.glob("*.safetensors")} - content["sha256"].keys()
    if unlisted:
        raise ValueError(f"{min(unlisted)} does not belong to it")
    for name, expected in content["sha256"].items():
        # A device or a pipe could be read without end.
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256_file(folder / name) != expected:
            raise ValueError(f"{name} does not match its sum")
    return content["trainer"]


def load_state(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Put weights, optimizer and this rank's random generators back.

    Returns whether generators for this rank were stored (not so with more ranks than before).

    Raises: UserError for tensors that are missing, unlike the model's or not to be read.
    """
    tensors = _state_tensors(model, optimizer)
    try:
        with _quiet_without_group():
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(state.folder)),
                no_dist=not distributed.is_sharded(model),
            )
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise UserError(f"{state.folder}: cannot be restored (rank {rank}: {cause})") from None
    text = (state.folder / "generators.json").read_text(encoding="utf-8")
    generators = json.loads(text)
    if distributed.rank() >= len(generators):
        return False
    _restore_generators(generators[distributed.rank()])
    return True


@contextmanager
def _quiet_without_group() -> Iterator[None]:
    """A model that is not sharded needs no group to be saved, and no warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's share of weights and AdamW's moments, under names that no wrapping changes.

    The tensors are those of model and optimizer themselves: loading into them is restoring.
    """
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    # A tied weight has two names and need not be stored twice.
    names = {name for name, _ in distributed.unwrap(model).named_parameters()}
    weights = get_model_state_dict(model)
    return {f"{MODEL}{name}": tensor for name, tensor in weights.items() if name in names} | {
        f"{OPTIMIZER}{name}|{key}": tensor
        for name, values in moments.items()
        for key, tensor in values.items()
    }


def _generator_states() -> dict:
    """The states of Python's, NumPy's and torch's random generators, as JSON values.

    Of several GPUs, that of this rank's own, so it may be another one when the run goes on.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    device = distributed.device()
    cuda = _encode(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": cuda,
    }


def _restore_generators(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(states["torch"]))
    device = distributed.device()
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(_decode(states["cuda"]), device)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
