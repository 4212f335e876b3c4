"""Everything that is read and checked before the weights load: metadata, data, folders, sizes.

A mistake that can be found without the weights ends here, as a UserError on all ranks. Building the
model and running the job is left to jobs.py.
"""

import hashlib
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from dataset import (
    Curriculum,
    StagedRecords,
    TokenizedRecords,
    decode,
    read_records,
    tokenize_records,
)
from engine import checkpoint, distributed, metrics, run_dir
from engine.config import Config
from engine.metadata import (
    METADATA_FILE,
    Metadata,
    check_stored_trainer,
    config_with_metadata,
    require_class,
    require_metadata,
    trajectory,
    with_defaults,
)
from engine.model import ModelOutline, model_outline
from engine.weights import ModelSource
from utils import UserError, log, quote, raise_faults

DEBUG_TRAIN_RECORDS = 5000
DEBUG_VAL_RECORDS = 32
MAX_NAME_PART = 60


@dataclass
class Data:
    """Tokenizer and tokenised records; `train` is None in evaluation."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenizedRecords | None
    val: TokenizedRecords


@dataclass
class Prepared:
    """What is known about a run before its model is built, all of it checked.

    config: with what a checkpoint or a training state records in place of defaults.
    source: where the model comes from; its config.json, coconut.json and tokenizer were read.
    evaluated: (stage, epoch) of the weights of only_eval, else None.
    """

    config: Config
    source: ModelSource
    data: Data
    outline: ModelOutline
    evaluated: tuple[int, int] | None


def prepare(
    config: Config,
    state: checkpoint.TrainingState | None,
    coconut_class: type[Coconut] | None = None,
    source: ModelSource | None = None,
) -> Prepared:
    """Read and check everything but the weights; every rank must call.

    state: what the run continues from, None where it begins.
    coconut_class: a subclass of Coconut to train or evaluate.
    source: where the model of a new run comes from; by default what the configuration names.

    Raises: UserError for every mistake that can be found before a model loads.
    """
    evaluated = None
    if state is None:
        source = source or ModelSource.of(config)
        metadata = distributed.run_on_all_ranks(lambda: source.metadata)
        distributed.require_same({f"{METADATA_FILE} of {source.location}": metadata})
        require_class(metadata, coconut_class, source.name)
        config = config_with_metadata(config, metadata, source.name)
        if config.only_eval:
            evaluated = evaluated_stage(config, metadata, source.name)
        elif config.resume and not config.load_model_path and not metadata:
            log.info(f"resume: {config.resume} skips epochs, but load_model_path names no weights")
        elif metadata is not None:
            question_resume(config, metadata, source.name)
    else:
        check_stored_trainer(state.folder, state.trainer)
        source = ModelSource.of_state(state.folder)
        metadata = Metadata(**state.trainer["metadata"])
        name = f"{config.run_dir}, which continues"
        require_class(metadata, coconut_class, name)
        config = config_with_metadata(config, metadata, name, resumes=True)
        log.info(f"continuing from {state.folder}; resume and load_model_path are overridden by it")
        config = restore_origin(config, state)
    data = load_data(config, source)
    if config.num_epochs is None and data.train is not None:
        config = with_num_epochs(config, data.train)
    if state is not None:
        sums = data.train.sha256, data.val.sha256
        check_trajectory(state, trajectory(config, distributed.world_size(), *sums), config)
    outline = distributed.run_on_all_ranks(lambda: model_outline(config, source))
    stages = {evaluated[0]} if evaluated else acting_stages(config)
    check_fit(config, data, stages, outline)
    return Prepared(config, source, data, outline, evaluated)


def question_resume(config: Config, metadata: Metadata, name: str) -> None:
    """Log a warning where the first epoch does not follow from what the weights were trained to.

    name: what the message calls the weights.
    """
    trained = f"{name} was trained as {metadata.method} up to epoch {metadata.epoch}"
    stage = make_curriculum(config).stage(config.resume)
    if metadata.method == config.method and config.resume != metadata.epoch + 1:
        log.warning(
            f"resume: {config.resume} does not follow: {trained} (stage {metadata.stage});"
            f" resume: {metadata.epoch + 1} would"
        )
    # Weights of another method know stage 0 alone: all steps as text, or none.
    elif metadata.method != config.method and config.curriculum and stage > 1:
        log.warning(
            f"resume: {config.resume} begins with stage {stage}, but {trained}, so the stages in"
            f" between are never trained; resume: {config.epochs_per_stage} begins with stage 1"
        )


def with_num_epochs(config: Config, train: TokenizedRecords) -> Config:
    """`config` with the epochs that `num_epochs: null` stands for written out.

    Raises: UserError when resume leaves none of them.
    """
    first_without_text = make_curriculum(config).first_stage_without_text(train.num_steps)
    num_epochs = config.epochs_per_stage * (first_without_text + 1)
    if config.resume >= num_epochs:
        raise UserError(
            f"resume: {config.resume} leaves none of the {num_epochs} epochs that num_epochs: null"
            f" stands for with the records of {config.train_path}; write num_epochs out, or a"
            " smaller resume"
        )
    return with_defaults(config, {"num_epochs": num_epochs})


def restore_origin(config: Config, state: checkpoint.TrainingState) -> Config:
    """`config` with the first epoch and the source of weights that the run of `state` began with.

    Logs each value written out that therefore has no effect, except resume and load_model_path,
    which `prepare` always names.
    """
    origin = state.trainer["origin"] | {"resume": state.trainer["first_epoch"]}
    for name, before in origin.items():
        value = getattr(config, name)
        is_logged = name in ("resume", "load_model_path")
        if name in config.model_fields_set and value != before and not is_logged:
            log.info(f"{name}: {value} has no effect, since this run began with {before}")
    return config.model_copy(update=origin)


def check_trajectory(state: checkpoint.TrainingState, now: dict, config: Config) -> None:
    """Compare what `trajectory` returns `now` with what it returned when the run began.

    Raises: UserError when a setting that fixes the order of records has changed, or the records
        themselves and allow_changed_data is false.
    """
    files = {"train_path_sha256": config.train_path, "val_path_sha256": config.val_path}
    for name, value in now.items():
        before = state.trainer["trajectory"].get(name)
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
                " allow_changed_data: true to continue with these, or choose another name to start"
                " a new run"
            )
        log.info(f"{changed}; continuing, since allow_changed_data is true")


def newest_state(config: Config) -> checkpoint.TrainingState | None:
    """The training state that a run continues from, the same on all ranks; None where it begins."""
    if config.debug or config.only_eval:
        return None
    return checkpoint.newest_state(config.run_dir)


def load_data(config: Config, source: ModelSource) -> Data:
    """Read, check and tokenise the records of a run, the same on every rank.

    Texts come first, because reading them is faster than loading a tokenizer.
    """
    train_limit, val_limit = config.max_train_records, None
    if config.debug:
        train_limit = min(train_limit or DEBUG_TRAIN_RECORDS, DEBUG_TRAIN_RECORDS)
        val_limit = DEBUG_VAL_RECORDS

    def load() -> Data:
        train_texts = None
        if not config.only_eval:
            train_texts = read_records(config.train_path, train_limit)
        val_texts = read_records(config.val_path, val_limit)
        tokenizer = source.tokenizer
        train = tokenize_records(train_texts, tokenizer, config.train_path) if train_texts else None
        val = tokenize_records(val_texts, tokenizer, config.val_path)
        for records in filter(None, (train, val)):
            check_answers(records, tokenizer)
        return Data(tokenizer, train, val)

    data = distributed.run_on_all_ranks(load)
    files = [records for records in (data.train, data.val) if records]
    sums = {f"the sha256 of {records.path}": records.sha256[:12] for records in files}
    distributed.require_same(sums)
    return data


def make_curriculum(config: Config) -> Curriculum:
    """The curriculum that the configuration describes."""
    return Curriculum(
        method=config.method,
        c_thought=config.c_thought,
        epochs_per_stage=config.epochs_per_stage,
        max_latent_stage=config.max_latent_stage,
        pad_latent_to_max=config.pad_latent_to_max,
        enabled=config.curriculum,
    )


def check_fit(config: Config, data: Data, stages: set[int], outline: ModelOutline) -> None:
    """Refuse records with token ids that the model lacks, or too long for its positions.

    stages: those that every record passes through; under uniform_prob also those it may draw.
    """
    for records in filter(None, (data.train, data.val)):
        check_vocabulary(records, outline.vocab_size)
    max_positions = outline.max_positions
    curriculum = make_curriculum(config)
    for stage in sorted(stages):
        for records in filter(None, (data.train, data.val)):
            staged = StagedRecords.of(records, curriculum, np.full(len(records), stage))
            check_lengths(staged, max_positions)
            if records is data.val:
                check_lengths(staged, max_positions, config.max_new_tokens)
    if data.train and config.uniform_prob > 0:
        # A record draws a stage from 0 to its number of steps.
        num_steps = data.train.num_steps
        for stage in range(min(int(num_steps.max()), curriculum.last_stage) + 1):
            drawn = StagedRecords.of(data.train, curriculum, np.minimum(stage, num_steps))
            check_lengths(drawn, max_positions)


def acting_stages(config: Config) -> set[int]:
    """The stages of a training run's epochs."""
    curriculum = make_curriculum(config)
    first, last = (curriculum.stage(epoch) for epoch in (config.resume, config.num_epochs - 1))
    return set(range(first, last + 1))


def evaluated_stage(config: Config, metadata: Metadata | None, name: str) -> tuple[int, int]:
    """(stage, epoch) of the weights: as their checkpoint records them, else by `resume`.

    name: what messages call the weights.
    """
    stage = make_curriculum(config).stage(config.resume)
    if metadata is None:
        if config.method == "no_thoughts":
            require_metadata(config, name)
        return stage, config.resume
    if "resume" in config.model_fields_set and stage != metadata.stage:
        log.info(
            f"resume: {config.resume} implies stage {stage}, but {config.load_model_path} was"
            f" trained to stage {metadata.stage}, which is used"
        )
    return metadata.stage, metadata.epoch


def evaluation_folder(config: Config) -> Path:
    """Where only_eval writes: one folder for each pair of a data file and weights.

    Its name is eval_DATA_RUN_CHECKPOINT_HASH, with a hash of both absolute paths, since data files
    and checkpoints in different folders often share their names.
    """
    data, weights = (Path(os.path.realpath(p)) for p in (config.val_path, config.load_model_path))
    where = hashlib.sha256(f"{data}\0{weights}".encode(errors="surrogateescape")).hexdigest()[:8]
    names = [name[:MAX_NAME_PART] for name in (data.stem, weights.parent.name, weights.name)]
    return config.run_dir / "_".join(["eval", *filter(None, names), where])


def check_place(config: Config) -> None:
    """Refuse anything in the way of a run's files, writing nothing; every rank must call."""

    def check() -> None:
        if config.debug or not distributed.is_main():
            return
        if config.only_eval:
            run_dir.check(config.run_dir)
            run_dir.check(evaluation_folder(config))
        else:
            run_dir.check(config.run_dir)
            run_dir.refuse_obstacles(config.run_dir)

    distributed.run_on_all_ranks(check)


def check_vocabulary(tokenized: TokenizedRecords, vocab_size: int) -> None:
    """Refuse records with token ids that the model has no embedding for.

    Raises: UserError naming the first such record and id.
    """
    highest = tokenized.table.data.column("highest_id").to_numpy()
    for index in np.flatnonzero(highest >= vocab_size):
        raise UserError(
            f"{tokenized.path}: record {index}: the tokenizer gives the token id {highest[index]},"
            f" the model has embeddings for 0 to {vocab_size - 1}; use the tokenizer that belongs"
            " to the model"
        )


def check_lengths(
    staged: StagedRecords, max_positions: int | None, max_new_tokens: int | None = None
) -> None:
    """Refuse records that do not fit the model's positions; nothing is ever cut silently.

    max_new_tokens: when given, the prompt and that many generated tokens must fit instead.

    Raises: UserError naming the first such record, its length and how many there are.
    """
    if max_positions is None:
        return
    generating = max_new_tokens is not None
    lengths = staged.prompt_lengths + (max_new_tokens if generating else staged.num_labels)
    too_long = np.flatnonzero(lengths > max_positions)
    if not len(too_long):
        return
    index = too_long[0]
    what = (
        f"its prompt of {staged.prompt_lengths[index]} tokens plus max_new_tokens={max_new_tokens}"
        if generating
        else f"its sequence of {lengths[index]} tokens (question"
        f" {staged.tokenized.question_lengths[index]})"
    )
    fix = "lower max_new_tokens or remove the record" if generating else "remove or shorten it"
    raise UserError(
        f"{staged.tokenized.path}: record {index}: {what} does not fit the model's"
        f" {max_positions} positions (records too long: {len(too_long)}); {fix}"
    )


def check_answers(tokenized: TokenizedRecords, tokenizer) -> None:
    """Refuse gold answers that no generated text could equal.

    Those are answers that become empty when answers are compared, and answers that do not survive
    the tokenizer.

    Raises: UserError naming records, gold answers and what comes back.
    """
    # Equal answers have equal tokens; steps matter where the answer must begin a line.
    answers = tokenized.table.data.column("answer").to_pylist()
    keys = [index if "#" in gold else gold for index, gold in enumerate(answers)]
    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    columns = ["answer", "step_ids", "answer_ids"]
    rows = tokenized.table.select_columns(columns)[list(first.values())]
    written = [
        [*chain(*(steps if "#" in gold else ())), *answer_ids[:-1]]
        for gold, steps, answer_ids in zip(
            rows["answer"], rows["step_ids"], rows["answer_ids"], strict=True
        )
    ]
    try:
        texts = decode(tokenizer, written)
    # The tokenizer of a broken file raises even a bare Exception.
    except Exception as error:
        raise UserError(
            f"{tokenized.path}: the tokenizer fails to decode its answers ({error!r}); restore the"
            " tokenizer's files"
        ) from error
    faults = {}
    for key, gold, text in zip(first, rows["answer"], texts, strict=True):
        if not metrics.normalize_answer(gold):
            faults[key] = (
                f"the answer {quote(gold)} is empty without commas and surrounding white space,"
                " which do not count when answers are compared"
            )
        elif not metrics.is_correct(text, gold):
            back = metrics.extract_answer(text, gold)
            faults[key] = (
                f"the answer {quote(gold)} comes back from the tokenizer as {quote(back or text)}"
            )
    raise_faults(
        tokenized.path,
        [f"record {index}: {faults[key]}" for index, key in enumerate(keys) if key in faults],
        "no generated answer could be right; write answers as the tokenizer gives them back, or"
        " use another tokenizer",
    )
