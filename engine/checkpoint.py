"""What a run saves: checkpoints to use, and training states to resume from.

A checkpoint (`checkpoint_N/`) is what Hugging Face loads as the base model, with coconut.json and
Coconut's own parameters, if it has any, beside it. A training state (`resume/<optimizer_step>/`)
holds weights, optimizer, every rank's random generators and the trainer's position; it is kept
apart, and only the newest two, so that many checkpoints do not cost as many optimizer states. Both
are written whole or not at all (docs/specification.md, section 9). trainer.py decides when to save.

Tensors are in safetensors files and everything else in JSON: nothing here unpickles. States are
written and read by torch.distributed.checkpoint, shard by shard, so any number of ranks resumes
from what any other number wrote.
"""

import base64
import hashlib
import json
import os
import random
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
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

from engine import distributed, parallel
from engine.metadata import EXTRA_WEIGHTS, METADATA_FILE
from engine.run_dir import RESUME_FOLDER, atomic_directory, holder, prune, states, writing
from utils import UserError, atomic_write_text, log, sha256_file

NUM_KEPT_STATES = 2
STATE_JSON = "state.json"
# It holds a checksum of each file; those of a thousand ranks take under a hundredth of this.
MAX_STATE_JSON_BYTES = 2**24
# What Python raises where JSON holds unexpected values.
UNREADABLE = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
BASE_PREFIX = "base_causallm."
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
MODEL, OPTIMIZER = "model.", "optimizer."


@contextmanager
def _shared_atomic_directory(target: Path) -> Iterator[Path]:
    """`atomic_directory`, created and renamed by rank 0, which every rank may fill.

    Where a rank fails, `target` stays as it was.
    """
    with atomic_directory(target) if distributed.is_main() else nullcontext() as unfinished:
        # No rank writes before the folder exists, nor renames it before every rank has written.
        unfinished = distributed.broadcast_from_main(unfinished)
        yield unfinished
        distributed.barrier()
    distributed.barrier()


def require_shared(run_dir: Path) -> None:
    """Check that every rank sees the `run_dir` that rank 0 holds; every rank must call.

    Raises: UserError naming the machine that does not.
    """
    expected = distributed.broadcast_from_main(holder(run_dir))

    def check() -> None:
        if holder(run_dir) != expected:
            raise UserError(
                f"save_path: {run_dir} on {socket.gethostname()} is not the folder that rank 0"
                " writes; under FSDP every rank saves its own shard there: choose a save_path on a"
                " file system that all machines share, or write parallel: ddp"
            )

    distributed.run_on_all_ranks(check)


def save_checkpoint(target: Path, model: nn.Module, tokenizer, metadata: dict) -> None:
    """Write `target` as a Hugging Face model directory with `metadata` in coconut.json.

    Parameters outside the base model go to EXTRA_WEIGHTS, under their names in the Coconut module.

    model: the Coconut module, wrapped or sharded. Every rank must call; rank 0 writes.
    """
    # Gathered from shards, tied weights no longer share the storage by which they are known.
    state = _without_duplicates(model, get_model_state_dict(model, options=GATHERED))
    if not distributed.is_main():
        return
    coconut = parallel.unwrap(model)
    extra = {name: state[name] for name in coconut.extra_parameters()}
    base = {n.removeprefix(BASE_PREFIX): t for n, t in state.items() if n.startswith(BASE_PREFIX)}
    with writing(target.parent, target.name), atomic_directory(target) as folder:
        coconut.base_causallm.save_pretrained(folder, state_dict=base)
        if extra:
            save_file(extra, folder / EXTRA_WEIGHTS)
        tokenizer.save_pretrained(folder)
        text = json.dumps(metadata, indent=2) + "\n"
        (folder / METADATA_FILE).write_text(text, encoding="utf-8")


def _without_duplicates(model: nn.Module, state: dict) -> dict:
    """`state` with each tied weight under the first of its names alone."""
    coconut = parallel.unwrap(model)
    names = {name for name, _ in coconut.named_parameters(remove_duplicate=False)}
    names -= {name for name, _ in coconut.named_parameters()}
    return {name: tensor for name, tensor in state.items() if name not in names}


@dataclass(frozen=True)
class TrainingState:
    """A training state on disk whose checksums are right.

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
) -> None:
    """Write `resume/<step>/` and keep the newest two. Every rank must call.

    Rank 0 writes what all ranks have in common, and each rank the shards that only it holds. Model
    configuration and tokenizer are included, so that resuming needs nothing but this folder.
    """
    generators = distributed.gather_to_main(_generator_states())
    target = run_dir / RESUME_FOLDER / str(step)
    what = f"the training state of optimizer step {step}"
    with writing(run_dir, what), _shared_atomic_directory(target) as unfinished:
        if parallel.is_sharded(model) or distributed.is_main():
            _save_tensors(unfinished, model, optimizer)
        if distributed.is_main():
            parallel.unwrap(model).base_causallm.config.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            generators_file = unfinished / "generators.json"
            generators_file.write_text(json.dumps(generators), encoding="utf-8")
            # A tokenizer with several chat templates keeps them in a folder.
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            checksums = {str(path.relative_to(unfinished)): sha256_file(path) for path in files}
            _write_state_json(unfinished, {"trainer": trainer, "sha256": checksums})
    if not distributed.is_main():
        return
    # A state of a later step must be damaged, or the run would have resumed from it.
    damaged = [path for number, path in states(run_dir) if number > step]
    past = [path for number, path in states(run_dir) if number <= step]
    prune(damaged + past[:-NUM_KEPT_STATES])


def _save_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    try:
        with _quiet_without_group():
            dcp.save(
                _state_tensors(model, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                no_dist=not parallel.is_sharded(model),
            )
    except CheckpointException as error:
        raise _first_cause(error) from error


def _first_cause(error: CheckpointException) -> BaseException:
    """The error of the lowest rank that failed."""
    _, (cause, _) = min(error.failures.items())
    return cause


def update_trainer(run_dir: Path, step: int, trainer: dict) -> None:
    """Replace the trainer's part of `resume/<step>/`; its tensors stay as they are."""
    folder = run_dir / RESUME_FOLDER / str(step)
    with writing(run_dir, f"the position in {folder}"):
        content = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))["content"]
        _write_state_json(folder, content | {"trainer": trainer})


def _write_state_json(folder: Path, content: dict) -> None:
    text = json.dumps({"content": content, "sha256": _checksum(content)}, indent=2)
    atomic_write_text(folder / STATE_JSON, text)


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def newest_state(run_dir: Path) -> TrainingState | None:
    """The newest intact training state of a run, None where there is none; every rank must call.

    Rank 0 alone reads all of it; the other ranks check that they see the same folder.

    Raises: UserError when there are states but none is intact, or a rank sees different ones.
    """
    state = distributed.run_on_all_ranks(
        lambda: _newest_intact(run_dir) if distributed.is_main() else None
    )
    state = distributed.broadcast_from_main(state)
    facts = {f"the list of states in {run_dir}": [step for step, _ in states(run_dir)]}
    if state is not None:
        file = state.folder / STATE_JSON
        facts[f"the sha256 of {file}"] = sha256_file(file)[:12] if file.is_file() else None
    distributed.require_same(facts)
    return state


def _newest_intact(run_dir: Path) -> TrainingState | None:
    folders = [folder for _, folder in states(run_dir)]
    for folder in reversed(folders):
        try:
            return TrainingState(folder, _verified_trainer(folder))
        except (*UNREADABLE, OSError) as error:
            log.warning(f"{folder}: damaged, trying the one before ({error})")
    if folders:
        raise UserError(
            f"{run_dir / RESUME_FOLDER}: no training state is intact; remove the folder to start"
            " over, or restore it from a backup"
        )
    return None


def _verified_trainer(folder: Path) -> dict:
    """The trainer's part of the state in `folder`, once all checksums are right.

    Raises: OSError or one of UNREADABLE for a damaged state.
    """
    about = os.stat(folder / STATE_JSON)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_STATE_JSON_BYTES:
        raise ValueError(f"{STATE_JSON} is not a file that a run wrote")
    stored = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))
    content = stored["content"]
    if _checksum(content) != stored["sha256"]:
        raise ValueError(f"{STATE_JSON} does not match its checksum")
    unlisted = {path.name for path in folder.glob("*.safetensors")} - content["sha256"].keys()
    if unlisted:
        raise ValueError(f"{min(unlisted)} does not belong to it")
    for name, expected in content["sha256"].items():
        # Reading a device or a pipe might never end.
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if sha256_file(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return content["trainer"]


def load_state(state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Put weights, optimizer and this rank's random generators back.

    Returns whether generators for this rank were stored (not so with more ranks than before).

    Raises: UserError for tensors that are missing, unlike the model's or unreadable.
    """
    tensors = _state_tensors(model, optimizer)
    try:
        with _quiet_without_group():
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(state.folder)),
                no_dist=not parallel.is_sharded(model),
            )
    except CheckpointException as error:
        cause = _first_cause(error)
        raise UserError(f"{state.folder}: cannot be restored ({cause})") from None
    generators = json.loads((state.folder / "generators.json").read_text(encoding="utf-8"))
    if distributed.rank() >= len(generators):
        return False
    _restore_generators(generators[distributed.rank()])
    return True


@contextmanager
def _quiet_without_group() -> Iterator[None]:
    """Silence the warning that there is no process group, which only a sharded model needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's share of weights and AdamW's moments, under names that no wrapping changes.

    The tensors are those of model and optimizer themselves: loading into them is restoring.
    """
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    weights = _without_duplicates(model, get_model_state_dict(model))
    return {f"{MODEL}{name}": tensor for name, tensor in weights.items()} | {
        f"{OPTIMIZER}{name}|{key}": tensor
        for name, values in moments.items()
        for key, tensor in values.items()
    }


def _generator_states() -> dict:
    """The states of Python's, NumPy's and torch's random generators, as JSON values.

    Of the GPUs only this rank's own is stored; it may be another one when the run resumes.
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
