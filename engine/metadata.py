"""What a checkpoint records in coconut.json, and how that combines with a run's configuration.

Holds the schema of the file and the rules for what may be loaded where (docs/specification.md,
section 9). Reading weights is left to weights.py, writing to checkpoint.py.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from coconut import initial_weights
from dataset import END_LATENT, LATENT, START_LATENT
from engine.config import METHODS, MIN_FIRST_WEIGHT, Config, Count, PositiveCount, Stages, Weight
from utils import UserError

METADATA_FILE = "coconut.json"
# Coconut's parameters outside the base model: learned weights, those of a subclass.
EXTRA_WEIGHTS = "coconut.safetensors"
# What makes a thought, by the names that configuration, coconut.json and Coconut share.
WINDOW_FIELDS = ("latent_window_size", "latent_weights", "window_scope")
THOUGHT_FIELDS = (*WINDOW_FIELDS, "thought", "thought_norm")
# What `resume` needs to name the stage that weights without metadata are evaluated at.
STAGE_FIELDS = ("epochs_per_stage", "max_latent_stage", "resume")
# Where the weights of a run came from; not asked again when it resumes.
ORIGIN_FIELDS = ("model_id", "from_scratch", "new_token_init", "load_model_path")


class Schedule(BaseModel):
    """The curriculum of a checkpoint's training (docs/specification.md, section 3)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epochs_per_stage: PositiveCount
    max_latent_stage: Stages
    pad_latent_to_max: bool
    curriculum: bool


class Metadata(BaseModel):
    """The content of a checkpoint's coconut.json (docs/specification.md, section 9).

    stage, epoch: those last trained, from 0.
    latent_weights: as long as the window; "learned": they are parameters in coconut.safetensors.
    learned_weights: the values of learned weights at the time of saving, for readers.
    coconut_class: "module:Class" of a subclass of Coconut, None for Coconut itself.
    provenance: commit, versions, machine and data of the run that trained it, for readers.
    Version 1 had no learned_weights, thought_norm and coconut_class; it is read as version 2.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    format_version: Literal[1, 2] = 2
    method: Literal["coconut", "cot", "no_cot", "no_thoughts"]
    latent_token_id: NonNegativeInt
    start_latent_id: NonNegativeInt
    end_latent_id: NonNegativeInt
    eos_token_id: NonNegativeInt
    latent_window_size: PositiveCount
    latent_weights: list[Weight] | Literal["learned"]
    learned_weights: list[Weight] | None = None
    window_scope: Literal["sequence", "pass"]
    thought: Literal["continuous", "pause", "pause_multipass"]
    thought_norm: Literal["average"] | PositiveFloat | None = None
    coconut_class: str | None = None
    c_thought: Count
    stage: Count
    epoch: Count
    schedule: Schedule
    provenance: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _weights_fit_window(self) -> "Metadata":
        # Learned weights may be arbitrarily close to 0.
        for weights, least in (
            (self.latent_weights, MIN_FIRST_WEIGHT),
            (self.learned_weights, 0),
        ):
            if isinstance(weights, list) and (
                len(weights) != self.latent_window_size or weights[0] < least
            ):
                raise ValueError(f"{weights} are not weights of {self.latent_window_size} states")
        return self

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        coconut_class: type | None = None,
    ) -> "Metadata":
        """What a run's checkpoints record, before its first epoch."""
        names = ("method", "latent_window_size", "window_scope", "thought", "c_thought")
        return cls(
            latent_weights=_window_weights(config),
            thought_norm=config.thought_norm,
            coconut_class=class_name(coconut_class),
            stage=0,
            epoch=0,
            schedule=Schedule(**{name: getattr(config, name) for name in Schedule.model_fields}),
            **{name: getattr(config, name) for name in names},
            **token_ids(tokenizer),
        )

    def at(self, stage: int, epoch: int, learned_weights: list[float] | None = None) -> "Metadata":
        """The same after `epoch` (from 0) at `stage`, with the current learned weights."""
        update = {"stage": stage, "epoch": epoch, "learned_weights": learned_weights}
        return self.model_copy(update=update)

    @classmethod
    def read(cls, folder: str | Path) -> "Metadata | None":
        """The metadata of checkpoint directory `folder`; None where it has no coconut.json.

        Raises: UserError when the file is broken or of an unknown format.
        """
        file = Path(folder, METADATA_FILE)
        if not os.path.isfile(file):
            return None
        try:
            return cls.model_validate_json(file.read_bytes()).model_copy(
                update={"format_version": 2}
            )
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise UserError(
                f"{file}: broken or of another version: {describe_faults(error)}; restore the file"
                " or name another checkpoint"
            ) from error


@dataclass
class Position:
    """How far a training run has come; the trainer updates it, every training state stores it.

    epoch: the current epoch, from 0; steps_done: optimizer steps done in it.
    optimizer_step: optimizer steps done in total.
    loss_sum, seconds: sum of the losses of the epoch's steps so far, and the time they took.
    best_accuracy, best_epoch: the highest validation accuracy so far; -1 before the first.
    stage: that of the last evaluation; stage_best_accuracy, stage_best_epoch: the highest in it.
    train_seconds, eval_seconds: of all steps and all evaluations after epochs, in all starts.
    """

    epoch: NonNegativeInt
    steps_done: NonNegativeInt = 0
    optimizer_step: NonNegativeInt = 0
    loss_sum: float = 0.0
    seconds: NonNegativeFloat = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = -1
    stage: int = -1
    stage_best_accuracy: float = -1.0
    stage_best_epoch: int = -1
    train_seconds: NonNegativeFloat = 0.0
    eval_seconds: NonNegativeFloat = 0.0

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    def state_dict(self) -> dict:
        """The fields as JSON values; `Position(**state_dict)` is the same position."""
        return asdict(self)

    def finish_step(self, loss: float, seconds: float) -> None:
        """Count one more optimizer step of the epoch."""
        self.steps_done += 1
        self.optimizer_step += 1
        self.loss_sum += loss
        self.seconds += seconds
        self.train_seconds += seconds

    def finish_evaluation(self, stage: int, accuracy: float, seconds: float) -> bool:
        """Record the epoch's evaluation at `stage`; whether its accuracy is the best so far."""
        self.eval_seconds += seconds
        if stage != self.stage or accuracy > self.stage_best_accuracy:
            self.stage_best_accuracy, self.stage_best_epoch = accuracy, self.epoch
        self.stage = stage
        is_best = accuracy > self.best_accuracy
        if is_best:
            self.best_accuracy, self.best_epoch = accuracy, self.epoch
        return is_best

    def start_epoch(self) -> None:
        """Move on to the next epoch, once this one is trained, evaluated and stored."""
        self.epoch += 1
        self.steps_done = 0
        self.loss_sum = self.seconds = 0.0


class StoredTrainer(BaseModel):
    """What a training state's state.json holds of the trainer."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    position: Position
    metadata: Metadata
    trajectory: dict[str, str | int | float | None]
    first_epoch: Count
    origin: dict[Literal[ORIGIN_FIELDS], str | bool | None]
    # wandb names a folder after it, and allows the characters of a URL path.
    wandb_id: Annotated[str, Field(pattern=r"^[^/\\#?%:\x00-\x1f]+$")] | None


def check_stored_trainer(folder: Path, content: dict) -> None:
    """Raise UserError where the intact training state `folder` has a position of another version.

    content: what its state.json holds of the trainer.
    """
    try:
        stored = StoredTrainer.model_validate_json(json.dumps(content))
        problem = None
    except ValidationError as error:
        problem = describe_faults(error)
    if problem is None and str(stored.position.optimizer_step) != folder.name:
        problem = f"position: optimizer_step: is {stored.position.optimizer_step}"
    if problem:
        raise UserError(
            f"{folder / 'state.json'}: changed by hand or of another version: {problem};"
            f" remove {folder} to resume from an earlier state"
        )


def trajectory(config: Config, world_size: int, train_sha256: str, val_sha256: str) -> dict:
    """What must not change between stop and resume, or the position would mean something else."""
    return {
        "method": config.method,
        "seed": config.seed,
        "effective_batch_size": config.records_per_step(world_size),
        "train_path_sha256": train_sha256,
        "val_path_sha256": val_sha256,
        "uniform_prob": config.uniform_prob,
        "max_train_records": config.max_train_records,
    }


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids that Coconut needs, by their names in its signature and in coconut.json."""
    return {
        "latent_token_id": tokenizer.convert_tokens_to_ids(LATENT),
        "start_latent_id": tokenizer.convert_tokens_to_ids(START_LATENT),
        "end_latent_id": tokenizer.convert_tokens_to_ids(END_LATENT),
        "eos_token_id": tokenizer.eos_token_id,
    }


def class_name(coconut_class: type | None) -> str | None:
    """The `module:Class` by which coconut.json records a class; None for Coconut itself.

    A class defined in the script that Python was started with is recorded under the script's own
    name, by which other programs import it.
    """
    if coconut_class is None or coconut_class.__module__ == "coconut":
        return None
    module = coconut_class.__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    if module == "__main__" and script:
        module = Path(script).stem
    return f"{module}:{coconut_class.__qualname__}"


def require_class(metadata: Metadata | None, coconut_class: type | None, name: str) -> None:
    """Raise UserError unless the class (or one above it) is the one that the metadata names.

    name: what the message calls the weights.
    """
    wanted = metadata and metadata.coconut_class
    given = [class_name(each) for each in (coconut_class.__mro__ if coconut_class else ())]
    if wanted and wanted not in given:
        raise UserError(
            f"{name}: was trained with coconut_class {wanted}, this run has"
            f" {given[0] if given and given[0] else 'Coconut itself'}; write coconut_class:"
            f" {wanted} or, from Python, pass the class"
        )


def config_with_metadata(
    config: Config, metadata: Metadata | None, name: str, resumes: bool = False
) -> Config:
    """The configuration with a checkpoint's recorded values in place of its defaults.

    Applies in evaluation, and where training of the same method continues (`resume` above 0, or
    `resumes`: this very run continues); otherwise the configuration is returned unchanged. Only
    keys that the method uses are compared, and of latent_weights the first m up to a factor.

    name: what messages call the weights.

    Raises: UserError showing every explicit value that differs, and for weights of another method.
    """
    if config.method is None:
        config = _with_method(config, metadata, name)
    check_method(config, metadata, name)
    continues = config.only_eval or config.resume > 0 or resumes
    if metadata is None or metadata.method != config.method or not continues:
        return config
    update, differences = {}, []
    for field, stored in _acting_fields(metadata).items():
        own = getattr(config, field)
        if own == stored or (field == "latent_weights" and _same_weights(config, stored)):
            continue
        if field in config.model_fields_set:
            differences.append(
                f"{name}: {field} was {stored} in training, the configuration says"
                f" {list(own) if isinstance(own, tuple) else own}; write {field}: {stored} or leave"
                " the key out"
            )
        else:
            update[field] = tuple(stored) if isinstance(stored, list) else stored
    if differences:
        raise UserError("\n".join(differences))
    return with_defaults(config, update)


def _with_method(config: Config, metadata: Metadata | None, name: str) -> Config:
    if metadata is None:
        raise UserError(
            f"{name}: has no {METADATA_FILE} that names the method of its training; set one of"
            f" {', '.join(METHODS)} to true"
        )
    return with_defaults(config, {metadata.method: True})


def with_defaults(config: Config, update: dict) -> Config:
    """`config` with `update` as its defaults: these keys do not count as written by the user."""
    updated = config.model_copy(update=update)
    updated.__pydantic_fields_set__.intersection_update(config.model_fields_set)
    return updated


def check_method(config: Config, metadata: Metadata | None, name: str) -> None:
    """Raise UserError where weights with this metadata may not be loaded into this run."""
    stored = metadata and metadata.method
    if stored not in (None, config.method) and (stored == "coconut" or config.only_eval):
        raise UserError(other_method(config, f"was trained as {stored}", name))


def other_method(config: Config, what: str, name: str) -> str:
    """The message for weights of another method than the run's; `what` completes "it ...\"."""
    return (
        f"{name}: {what}, but this run is {config.method}; name weights of that method, change the"
        " method, or give a new run another name"
    )


def require_metadata(config: Config, name: str) -> None:
    """Raise UserError unless what these weights do not record is written out.

    That is Coconut's window, and in evaluation what names the stage.
    """
    needed = (*WINDOW_FIELDS, "c_thought") if config.method == "coconut" else ()
    if config.only_eval:
        needed += STAGE_FIELDS
    missing = [field for field in needed if field not in config.model_fields_set]
    if missing:
        raise UserError(
            f"{name}: these weights have no {METADATA_FILE}; write {', '.join(missing)} out in the"
            " YAML as in their training"
        )


def describe_faults(error: ValidationError) -> str:
    """What pydantic found, each fault with the path to its field."""
    texts = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
    return shorten([text if len(text) < 300 else f"{text[:150]}...{text[-150:]}" for text in texts])


def shorten(names: list[str], limit: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def _acting_fields(metadata: Metadata) -> dict:
    """The recorded values, by configuration key, that change what the recorded method does."""
    if metadata.method in ("cot", "no_cot"):
        return {}
    schedule = metadata.schedule.model_dump()
    if metadata.method == "no_thoughts":
        return schedule
    names = (*THOUGHT_FIELDS, "c_thought")
    return {name: getattr(metadata, name) for name in names} | schedule


def _window_weights(config: Config) -> list[float] | str:
    """The configured latent_weights as coconut.json records them."""
    if config.latent_weights == "learned":
        return "learned"
    return initial_weights(config.latent_weights, config.latent_window_size)


def _same_weights(config: Config, stored: list[float] | str) -> bool:
    """Whether both make the same thoughts: the average divides by the sum of the weights."""
    own = config.latent_weights
    if "learned" in (own, stored):
        return own == stored
    if not isinstance(own, str) and len(own) < len(stored):
        return False
    own = initial_weights(own, len(stored))
    pairs = zip(own, stored, strict=True)
    return all(math.isclose(a / sum(own), b / sum(stored), abs_tol=1e-9) for a, b in pairs)
