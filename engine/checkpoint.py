"""Directories that appear whole or not at all: checkpoints to use, and states to go on from.

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
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
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
from utils import RunFailed, UserError, atomic_write_text, fsync_directory, fsync_file, sha256_file

RESUME_FOLDER = "resume"
# What a run opens or fills where it stands; all else it replaces.
OPENED_FILES, FILLED_FOLDERS = (".lock", "config.yaml", "metrics.jsonl"), (RESUME_FOLDER, "wandb")
KEPT_STATES = 2
# It holds a sum for each file; those of a thousand ranks take well under a hundredth of this.
LARGEST_STATE_JSON_BYTES = 2**24
# What Python raises where JSON holds other values than were written.
UNREADABLE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
BASE_PREFIX = "base_causallm."
# What `whole_directory` and utils.atomic_write_text leave behind in a crash.
SET_ASIDE = re.compile(r"\.(?P<name>checkpoint_\d+|\d+)\.(?P<kind>old|part)")
UNFINISHED_FILE = re.compile(r"\..+\.\d+\.part")
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
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `target` when the block ends well.

    A crash leaves the old `target` or the new one; `recover` finishes what one interrupted.
    """
    unfinished = target.with_name(f".{target.name}.part")
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        with suppress(OSError):
            _remove(unfinished)
        raise
    for path in unfinished.rglob("*"):
        fsync_file(path)
    fsync_directory(unfinished)
    replaced = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    os.rename(unfinished, target)
    fsync_directory(target.parent)
    # What stays is in nobody's way until the next start tidies up.
    with suppress(OSError):
        _remove(replaced)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone. Nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _prune(paths: list[Path], notify: Callable[[str], None]) -> None:
    """Remove what is surplus; what cannot be removed is told of and ends no run."""
    for path in paths:
        try:
            _remove(path)
        except OSError as error:
            notify(f"{path}: no longer needed, but cannot be removed ({error.strerror or error})")


def recover(folder: Path) -> None:
    """Tidy `folder` after a crash: put a set-aside directory back, drop unfinished ones.

    Raises: UserError for one that can neither be put back nor removed.
    """
    for path in list(folder.glob(".*")):
        directory = SET_ASIDE.fullmatch(path.name)
        directory = directory if path.is_dir() else None
        try:
            if (
                directory
                and directory["kind"] == "old"
                and not (folder / directory["name"]).exists()
            ):
                os.rename(path, folder / directory["name"])
            elif directory or UNFINISHED_FILE.fullmatch(path.name):
                _remove(path)
        except OSError as error:
            raise UserError(
                f"{path}: left by an earlier start and cannot be tidied away"
                f" ({error.strerror or error}); remove it"
            ) from None


@contextmanager
def run_lock(run_dir: Path, notify: Callable[[str], None] = print) -> Iterator[None]:
    """Hold `run_dir` for one training run; the lock goes with the process, however it ends.

    A run that ends before it wrote anything leaves no folder that was not there before.

    notify: is told where the file system knows no locks.

    Raises: UserError when another process holds it or the folder cannot be written.
    """
    missing = _missing(run_dir)
    make_writable(run_dir)
    try:
        with _held_lock(run_dir, notify):
            yield
    finally:
        _remove_empty(missing)


@contextmanager
def _held_lock(run_dir: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """The lock alone, in a file that goes again when nothing else was written."""
    with open(run_dir / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{run_dir}: another training run is using this directory; wait for it, or"
                    " change name or save_path"
                ) from None
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            notify(
                f"{run_dir}: this file system knows no locks ({error.strerror}); a second run on"
                " this directory would not be noticed"
            )
        try:
            yield
        finally:
            if run_dir.is_dir() and os.listdir(run_dir) == [".lock"]:
                (run_dir / ".lock").unlink()


def check_writable(folder: Path) -> None:
    """Look whether `make_writable` would succeed, as far as can be known without writing.

    Raises: UserError when `folder` cannot be written, is a link, or holds a link or a pipe under a
        name that a run writes to.
    """
    for path in (folder, *(folder / name for name in OPENED_FILES + FILLED_FOLDERS)):
        refuse_link(path)
    for path in (folder / name for name in OPENED_FILES):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is no regular file, but a run writes to it; move it away")
    innermost = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)
        reason = None if os.access(innermost, os.W_OK) else "no permission or mounted read-only"
        reason = reason if os.path.isdir(innermost) else "Not a directory"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise _not_writable(folder, reason)


def make_writable(folder: Path) -> None:
    """Create `folder` where it is missing.

    Raises: UserError where `check_writable` does, and when `folder` cannot be made.
    """
    check_writable(folder)
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _not_writable(folder, error.strerror) from None


def _not_writable(folder: Path, reason: str) -> UserError:
    return UserError(f"save_path: {folder} cannot be written ({reason}); choose another save_path")


def refuse_link(path: Path) -> None:
    """Raise UserError where a run would write through a link, and so outside save_path."""
    if os.path.islink(path):
        raise UserError(
            f"save_path: {path} is a link to {os.readlink(path)}, but a run writes inside save_path"
            " alone; remove the link, or let save_path and name say where the run is to lie"
        )


def _missing(folder: Path) -> list[Path]:
    """The folders on the way to `folder` and itself that do not exist yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


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


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(finished epochs, directory) of the checkpoints of a run, oldest first."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        number = path.name.removeprefix("checkpoint_")
        if number.isdecimal() and (path / "coconut.json").is_file():
            found.append((int(number), path))
    return sorted(found)


def prune_checkpoints(
    run_dir: Path, newest: int, keep: int, notify: Callable[[str], None] = print
) -> None:
    """Of the checkpoints up to `newest` finished epochs, remove all but the last `keep`.

    One that the user moved and left a link to is not removed.

    notify: is told of every one that cannot be removed.
    """
    up_to_now = [path for number, path in checkpoints(run_dir) if number <= newest]
    _prune([path for path in up_to_now[:-keep] if not path.is_symlink()], notify)


def refuse_obstacles(run_dir: Path) -> None:
    """Make sure that a new run can write its names in `run_dir` without touching another's files.

    Raises: UserError for a `checkpoint_N` or `resume` that is none of ours, and for checkpoints of
        an earlier run that left no training state to go on from.
    """
    for path in sorted(run_dir.glob("checkpoint_*")) + [run_dir / RESUME_FOLDER]:
        number = path.name.removeprefix("checkpoint_")
        is_ours = path.is_dir() and (
            path.name == RESUME_FOLDER or (path / "coconut.json").is_file()
        )
        if path.exists() and (number.isdecimal() or path.name == RESUME_FOLDER) and not is_ours:
            raise UserError(
                f"{path}: is not from a run of ours, but a run writes under this name; move it away"
            )
    if checkpoints(run_dir) and not _state_folders(run_dir):
        raise UserError(
            f"{run_dir}: holds checkpoints of an earlier run but no training state to go on from;"
            " choose another name (load_model_path may start from them), or move them away"
        )


def foreign_files(run_dir: Path) -> list[str]:
    """Names in `run_dir` that no run of ours writes."""
    ours = {"config.yaml", "metrics.jsonl", "wandb", RESUME_FOLDER, ".lock"}
    ours |= {path.name for _, path in checkpoints(run_dir)}
    prefixes = ("predictions_", "nonfinite_", "eval_")
    names = sorted(path.name for path in run_dir.iterdir())
    return [name for name in names if name not in ours and not name.startswith(prefixes)]


@dataclass(frozen=True)
class TrainingState:
    """A training state on disk whose sums are right.

    progress: the JSON values that training.py stored: position, best accuracy and so on.
    """

    folder: Path
    progress: dict


def save_state(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer,
    progress: dict,
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
            _write_progress(unfinished, {"progress": progress, "sha256": sums})
    if not distributed.is_main():
        return
    # A later step's state was damaged and passed over, or this run would stand there.
    stale = [path for number, path in _state_folders(run_dir) if number > step]
    past = [path for number, path in _state_folders(run_dir) if number <= step]
    _prune(stale + past[:-KEPT_STATES], notify)


def update_progress(run_dir: Path, step: int, progress: dict) -> None:
    """Replace the position stored in `resume/<step>/`, leaving its tensors as they are."""
    folder = run_dir / RESUME_FOLDER / str(step)
    with writing(run_dir, f"the position in {folder}"):
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))["content"]
        _write_progress(folder, content | {"progress": progress})


def _write_progress(folder: Path, content: dict) -> None:
    text = json.dumps({"content": content, "sha256": _sum_of(content)}, indent=2)
    atomic_write_text(folder / "state.json", text)


def _sum_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest_state(run_dir: Path, notify=print) -> TrainingState | None:
    """The newest intact training state of a run, or None when there is none at all.

    notify: is told of every damaged state that was passed over.

    Raises: UserError when states exist and none is intact.
    """
    folders = _state_folders(run_dir)
    for _, folder in reversed(folders):
        try:
            return TrainingState(folder, _verified_progress(folder))
        except (*UNREADABLE, OSError) as error:
            notify(f"{folder}: damaged, trying the one before ({error})")
    if folders:
        raise UserError(
            f"{run_dir / RESUME_FOLDER}: no training state is intact; remove the folder to start"
            " anew, or restore it from a backup"
        )
    return None


def _verified_progress(folder: Path) -> dict:
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
    return content["progress"]


def _state_folders(run_dir: Path) -> list[tuple[int, Path]]:
    folders = (run_dir / RESUME_FOLDER).glob("*")
    return sorted((int(path.name), path) for path in folders if path.name.isdecimal())


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
