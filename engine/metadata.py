"""What a checkpoint records about itself, and how that meets the configuration of a run.

Carries out SPEC section 9's coconut.json: its content, and the rules of what may be loaded into
what. Reading and writing weights is left to backbone.py and checkpoint.py.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from dataset import END_LATENT, LATENT, START_LATENT
from engine.config import LEAST_FIRST_WEIGHT, Config, Count, PositiveCount, Stages, Weight
from utils import UserError

SETTINGS_NAME = "coconut.json"
WINDOW_FIELDS = ("latent_window_size", "latent_weights", "window_scope")
# What `resume` needs to name the stage that weights without a record are evaluated at.
STAGE_FIELDS = ("epochs_per_stage", "max_latent_stage", "resume")
THOUGHT_FIELDS = (*WINDOW_FIELDS, "thought", "c_thought")
# Where the weights of a run came from; not asked again when it resumes.
ORIGIN_FIELDS = ("model_id", "from_scratch", "new_token_init", "load_model_path")


class Schedule(BaseModel):
    """The curriculum a checkpoint was trained under (SPEC section 3)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epochs_per_stage: PositiveCount
    max_latent_stage: Stages
    pad_latent_to_max: bool
    curriculum: bool


class CheckpointSettings(BaseModel):
    """The content of a checkpoint's coconut.json (SPEC section 9)."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1]
    method: Literal["coconut", "cot", "no_cot", "no_thoughts"]
    latent_token_id: NonNegativeInt
    start_latent_id: NonNegativeInt
    end_latent_id: NonNegativeInt
    eos_token_id: NonNegativeInt
    latent_window_size: PositiveCount
    latent_weights: list[Weight]
    window_scope: Literal["sequence", "pass"]
    thought: Literal["continuous", "pause"]
    c_thought: Count
    stage: Count
    epoch: Count
    schedule: Schedule

    @model_validator(mode="after")
    def _weights_fit_window(self) -> "CheckpointSettings":
        weights = self.latent_weights
        if len(weights) != self.latent_window_size or weights[0] < LEAST_FIRST_WEIGHT:
            raise ValueError(f"{weights} are no weights for {self.latent_window_size} states")
        return self


@dataclass
class Position:
    """Where a training run stands; the trainer moves it, every training state stores it.

    epoch: the current epoch, from 0; steps_done: optimizer steps done in it.
    optimizer_step: optimizer steps done in all.
    loss_sum: sum of the losses of the epoch's steps so far.
    best_accuracy: highest validation accuracy so far, with its epoch; -1 before the first.
    """

    epoch: NonNegativeInt
    steps_done: NonNegativeInt = 0
    optimizer_step: NonNegativeInt = 0
    loss_sum: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def state_dict(self) -> dict:
        """The fields as JSON values; `Position(**state_dict)` is the same position."""
        return asdict(self)

    def finish_step(self, loss: float) -> None:
        """One more optimizer step of the epoch is done."""
        self.steps_done += 1
        self.optimizer_step += 1
        self.loss_sum += loss

    def finish_epoch(self) -> None:
        """The epoch is trained and evaluated: the next one begins."""
        self.epoch += 1
        self.steps_done = 0
        self.loss_sum = 0.0


class StoredTrainer(BaseModel):
    """What a training state's state.json holds of the trainer."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    position: Position
    settings: CheckpointSettings
    trajectory: dict[str, str | int | float]
    first_epoch: Count
    origin: dict[Literal[ORIGIN_FIELDS], str | bool | None] = {}
    # wandb names a folder by it, and allows in it what may stand in an address.
    wandb_id: Annotated[str, Field(pattern=r"^[^/\\#?%:\x00-\x1f]+$")] | None


def check_stored_trainer(folder: Path, content: dict) -> None:
    """Raise UserError where the intact training state `folder` holds no position of this program's.

    content: what its state.json holds of the trainer.
    """
    try:
        stored = StoredTrainer.model_validate_json(json.dumps(content))
        problem = None
    except ValidationError as error:
        problem = faults(error)
    if problem is None and str(stored.position.optimizer_step) != folder.name:
        problem = f"position: optimizer_step: is {stored.position.optimizer_step}"
    if problem:
        raise UserError(
            f"{folder / 'state.json'}: changed by hand or of another version: {problem};"
            f" remove {folder} to resume from an earlier state"
        )


def trajectory(config: Config, world_size: int, train_sha256: str, val_sha256: str) -> dict:
    """What must not change between stop and resume, or the position means something else."""
    return {
        "method": config.method,
        "seed": config.seed,
        "effective_batch_size": config.records_per_step(world_size),
        "train_path_sha256": train_sha256,
        "val_path_sha256": val_sha256,
        "uniform_prob": config.uniform_prob,
    }


def checkpoint_settings(
    config: Config, tokenizer: PreTrainedTokenizerBase, stage: int, epoch: int = 0
) -> dict:
    """What coconut.json records about weights last trained in `epoch` (from 0), at `stage`."""
    fields = ("method", "latent_window_size", "window_scope", "thought", "c_thought")
    return CheckpointSettings(
        format_version=1,
        stage=stage,
        epoch=epoch,
        latent_weights=list(config.latent_weights[: config.latent_window_size]),
        schedule=Schedule(**{field: getattr(config, field) for field in Schedule.model_fields}),
        **{field: getattr(config, field) for field in fields},
        **token_ids(tokenizer),
    ).model_dump()


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that Coconut needs, by their names in its signature and in coconut.json."""
    return {
        "latent_token_id": tokenizer.convert_tokens_to_ids(LATENT),
        "start_latent_id": tokenizer.convert_tokens_to_ids(START_LATENT),
        "end_latent_id": tokenizer.convert_tokens_to_ids(END_LATENT),
        "eos_token_id": tokenizer.eos_token_id,
    }


def read_checkpoint_settings(path: str | Path | None) -> dict | None:
    """The coconut.json of checkpoint directory `path`; None where there is no such file.

    Raises: UserError when it is broken or of an unknown format.
    """
    file = Path(path, SETTINGS_NAME) if path else None
    if file is None or not os.path.isfile(file):
        return None
    try:
        return CheckpointSettings.model_validate_json(file.read_bytes()).model_dump()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(
            f"{file}: broken or of another version: {faults(error)}; restore the file or name"
            " another checkpoint"
        ) from error


def reconcile(config: Config, settings: dict | None, continuing: bool = False) -> Config:
    """The configuration with a checkpoint's stored settings in place of its defaults.

    Acts in evaluation and where training goes on with the same method (`resume` above 0, or
    `continuing` a run); else the configuration comes back as it is. Only settings that act under
    the method count, of latent_weights the first m up to a common factor.

    Raises: UserError showing every explicit value that differs, and for weights of another method.
    """
    source = f"{config.run_dir}, which goes on" if continuing else source_name(config)
    check_method(config, settings, source)
    goes_on = config.only_eval or config.resume > 0 or continuing
    if settings is None or settings["method"] != config.method or not goes_on:
        return config
    update, differences = {}, []
    for field, stored in _acting_settings(settings).items():
        own = getattr(config, field)
        if own == stored or (field == "latent_weights" and _same_weights(own, stored)):
            continue
        if field in config.model_fields_set:
            differences.append(
                f"{source}: {field} was {stored} in training, the configuration says"
                f" {list(own) if isinstance(own, tuple) else own}; write {field}: {stored} or leave"
                " the key out"
            )
        else:
            update[field] = type(own)(stored)
    if differences:
        raise UserError("\n".join(differences))
    reconciled = config.model_copy(update=update)
    # A stored value stands in for a default, so it must not look as if the user had written it.
    reconciled.__pydantic_fields_set__.intersection_update(config.model_fields_set)
    return reconciled


def check_method(config: Config, settings: dict | None, source: str | None = None) -> None:
    """Raise UserError where weights with these settings may not be loaded into this run.

    source: what the message calls the weights, by default the key and value that name them.
    """
    stored = settings and settings["method"]
    if stored not in (None, config.method) and (stored == "coconut" or config.only_eval):
        raise UserError(other_method(config, f"was trained as {stored}", source))


def other_method(config: Config, what: str, source: str | None = None) -> str:
    """The message for weights of another method than the run's; `what` completes "it ...\""""
    return (
        f"{source or source_name(config)}: {what}, but this run is {config.method}; name weights"
        " of that method, change the method, or give a new run another name"
    )


def weights_path(config: Config) -> str | None:
    """Where the weights come from, a folder, a file or a name; None where they are random."""
    return None if config.from_scratch else config.load_model_path or config.model_id


def require_settings(config: Config) -> None:
    """Raise UserError unless what the weights do not record is written out.

    That is the window of Coconut's, and in evaluation what names the stage.
    """
    needed = (*WINDOW_FIELDS, "c_thought") if config.method == "coconut" else ()
    if config.only_eval:
        needed += STAGE_FIELDS
    missing = [field for field in needed if field not in config.model_fields_set]
    if missing:
        raise UserError(
            f"{source_name(config)}: these weights record no settings; write"
            f" {', '.join(missing)} out in the YAML as in their training"
        )


def source_name(config: Config) -> str:
    """The key and value that name where the weights come from, to open a message with."""
    field = "load_model_path" if config.load_model_path else "model_id"
    return f"{field} {getattr(config, field)}"


def faults(error: ValidationError) -> str:
    """What pydantic found, each fault with the path to its field."""
    texts = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
    return shorten([text if len(text) < 300 else f"{text[:150]}...{text[-150:]}" for text in texts])


def shorten(names: list[str], most: int = 4) -> str:
    """The first names of a list in words, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _acting_settings(settings: dict) -> dict:
    """The stored settings, by configuration field, that change what the stored method does."""
    if settings["method"] in ("cot", "no_cot"):
        return {}
    if settings["method"] == "no_thoughts":
        return settings["schedule"]
    return {field: settings[field] for field in THOUGHT_FIELDS} | settings["schedule"]


def _same_weights(own: tuple[float, ...], stored: list[float]) -> bool:
    """Whether both make the same thoughts: the average divides by the sum of the weights."""
    own = own[: len(stored)]
    if len(own) < len(stored):
        return False
    pairs = zip(own, stored, strict=True)
    return all(math.isclose(a / sum(own), b / sum(stored), abs_tol=1e-9) for a, b in pairs)
