"""Where a run stands and came from, and what may end it early: stored position, signals.

The position is stored with every training state and checked before a run goes on from it. What is
done about a signal or a failure is training.py's and run.py's decision.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from dataset import TokenizedRecords
from engine import checkpoint, distributed
from engine.config import Config, Count
from engine.metadata import CheckpointSettings, faults
from engine.tracking import Tracker
from utils import UserError

# torchrun passes a Ctrl-C on to processes that the terminal has told already.
SAME_SIGNAL_S = 1.0
# What says where the weights of a run came from; no longer asked when it goes on.
ORIGIN_FIELDS = ("model_id", "from_scratch", "new_token_init", "load_model_path")


@dataclass
class Progress:
    """Where a run stands; stored with every training state.

    epoch: the epoch in progress, from 0; steps_done: optimizer steps done in it.
    optimizer_step: optimizer steps done in all.
    loss_sum: of the losses of the epoch's steps so far.
    best_accuracy: highest validation accuracy so far, with its epoch; -1 before the first.
    """

    epoch: NonNegativeInt
    steps_done: NonNegativeInt = 0
    optimizer_step: NonNegativeInt = 0
    loss_sum: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StoredProgress(BaseModel):
    """What a training state holds beside tensors and generators."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    position: Progress
    settings: CheckpointSettings
    trajectory: dict[str, str | int | float]
    first_epoch: Count
    origin: dict[Literal[ORIGIN_FIELDS], str | bool | None] = {}
    # wandb names a folder by it, and allows in it what may stand in an address.
    wandb_id: Annotated[str, Field(pattern=r"^[^/\\#?%:\x00-\x1f]+$")] | None


def check_progress(state: checkpoint.TrainingState) -> None:
    """Raise UserError where a training state, though intact, holds no position of this program's"""
    try:
        stored = StoredProgress.model_validate_json(json.dumps(state.progress))
        problem = None
    except ValidationError as error:
        problem = faults(error)
    if problem is None and str(stored.position.optimizer_step) != state.folder.name:
        problem = f"position: optimizer_step: is {stored.position.optimizer_step}"
    if problem:
        raise UserError(
            f"{state.folder / 'state.json'}: changed by hand or of another version: {problem};"
            f" remove {state.folder} to go on from an earlier state"
        )


def restore_origin(
    config: Config, state: checkpoint.TrainingState, notify: Callable[[str], None]
) -> Config:
    """`config` with the first epoch and the source of weights that the run of `state` began with.

    notify: is told of each value written out that so has no effect; of resume and load_model_path
        `prepare` tells always.
    """
    origin = state.progress.get("origin", {}) | {"resume": state.progress["first_epoch"]}
    for name, before in origin.items():
        value = getattr(config, name)
        is_told = name in ("resume", "load_model_path")
        if name in config.model_fields_set and value != before and not is_told:
            notify(f"{name}: {value} has no effect, since this run began with {before}")
    return config.model_copy(update=origin)


def trajectory(config: Config, train: TokenizedRecords, val: TokenizedRecords) -> dict:
    """What must not change between stop and resume, or the position means something else."""
    return {
        "method": config.method,
        "seed": config.seed,
        "effective_batch_size": config.records_per_step(distributed.world_size()),
        "train_path_sha256": train.sha256,
        "val_path_sha256": val.sha256,
        "uniform_prob": config.uniform_prob,
    }


def check_trajectory(
    state: checkpoint.TrainingState, now: dict, config: Config, notify: Callable[[str], None]
) -> None:
    """Compare what `trajectory` says `now` with what it said when the run began.

    notify: is told of changed records that allow_changed_data lets pass.

    Raises: UserError when a setting that fixes the order of records has changed, or the records
        themselves and allow_changed_data is false.
    """
    files = {"train_path_sha256": config.train_path, "val_path_sha256": config.val_path}
    for name, value in now.items():
        before = state.progress["trajectory"].get(name)
        if before == value:
            continue
        if name not in files:
            raise UserError(
                f"{state.folder}: this run began with {name}={before}, now it is {value}; restore"
                " it, or choose another name to start a new run"
            )
        changed = f"{files[name]}: holds other records than when the run began"
        if not config.allow_changed_data:
            raise UserError(
                f"{changed} (sha256 {value[:12]}, was {str(before)[:12]}); restore them, write"
                " allow_changed_data: true to go on with these, or choose another name to start a"
                " new run"
            )
        notify(f"{changed}; going on, since allow_changed_data is true")


@dataclass
class Requests:
    """What signals asked for since the last step."""

    stop: int = 0
    save: bool = False
    stopped_at: float = -math.inf


@contextmanager
def listen_for_signals(tracker: Tracker) -> Iterator[Requests]:
    """Turn SIGINT and SIGTERM into a stop after the step, SIGUSR1 into a save.

    A second SIGINT or SIGTERM ends the run at once (KeyboardInterrupt).
    """
    requests = Requests()

    def on_stop(number: int, _frame: object) -> None:
        if requests.stop and time.monotonic() - requests.stopped_at > SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not requests.stop:
            requests.stopped_at = time.monotonic()
            tracker.message("stopping after this step; once more to stop at once, unsaved")
        requests.stop = number

    def on_save(_number: int, _frame: object) -> None:
        requests.save = True

    handlers = {signal.SIGINT: on_stop, signal.SIGTERM: on_stop, signal.SIGUSR1: on_save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
