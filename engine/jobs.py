"""The jobs that run.py and scripts start by one call each: train, evaluate, dry_run.

Locks the run directory, has setup.py check all that can be checked, builds the model, shares it
among the ranks and hands it to trainer.py or evaluation.py. Under torchrun every rank must call. A
job that ends early raises; `exit_status_of` turns that into one message and an exit status.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import nn
from transformers.utils import logging as transformers_logging

from coconut import Coconut
from dataset import SpecialIds, StagedRecords, TokenizedRecords
from engine import checkpoint, distributed, evaluation, memory, parallel, run_dir
from engine.config import Config
from engine.config_file import dump_config
from engine.console import closing_lines, describe_device, opening_lines, progress_bar
from engine.failures import report_failure
from engine.memory import Lengths
from engine.metadata import Metadata, Position
from engine.model import build_coconut, load_backbone, model_shape
from engine.provenance import provenance_lines, run_provenance
from engine.setup import (
    Data,
    Prepared,
    check_place,
    evaluation_folder,
    make_curriculum,
    newest_state,
    prepare,
    with_num_epochs,
)
from engine.tracking import Tracker
from engine.trainer import Trainer
from engine.weights import ModelSource
from utils import (
    UserError,
    atomic_write_text,
    configure_logging,
    log,
)

NOTHING_WRITTEN = "dry run: nothing trained or written"


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run, the same on every rank.

    folder: the run directory; None with debug: true, which saves nothing.
    figures: of the last evaluation, by their names under "eval/"; empty where nothing was left to
        train.
    best_accuracy, best_epoch: highest validation accuracy in 0..1 and its epoch (from 0), -1 and
        -1 before the first evaluation.
    """

    folder: Path | None
    figures: dict[str, float | int | None]
    best_accuracy: float
    best_epoch: int


def train(config: Config, coconut_class: type[Coconut] | None = None) -> TrainingResult:
    """Train from the beginning, or continue from the newest training state of the run directory.

    coconut_class: a subclass of Coconut; by default the one that config.coconut_class names.

    Raises: UserError for what the user can fix, RunFailed, Stopped after a signal.
    """
    assert not config.only_eval, "evaluate(config) is for only_eval: true"
    with _all_ranks(config):
        coconut_class = coconut_class or find_coconut_class(config)
        with _held_run_dir(config):
            state = newest_state(config)
            return _train_from(prepare(config, state, coconut_class), state, coconut_class)


def evaluate(
    config: Config, coconut_class: type[Coconut] | None = None
) -> dict[str, float | int | None]:
    """Evaluate load_model_path on val_path at the stage it was trained to: its figures.

    coconut_class: as `train` takes it.
    Returns the figures by their names under "eval/", the same on every rank.

    Raises: UserError for what the user can fix, RunFailed.
    """
    assert config.only_eval, "train(config) is for only_eval: false"
    with _all_ranks(config):
        coconut_class = coconut_class or find_coconut_class(config)
        check_place(config)
        return _evaluate(prepare(config, None, coconut_class), coconut_class)


def dry_run(config: Config) -> None:
    """Show the resolved configuration, the schedule and the sizes; train nothing, write nothing.

    Weights that another run of a chain has yet to write are taken to be of model_id's shape.

    Raises: UserError for what `train` or `evaluate` would refuse before the weights load.
    """
    with _all_ranks(config):
        coconut_class = find_coconut_class(config)
        check_place(config)
        state = newest_state(config)
        source, path = None, config.load_model_path
        if path is not None and state is None and not os.path.exists(path):
            log.warning(f"load_model_path: {path} does not exist yet")
            if config.only_eval:
                log.info(dump_config(config))
                log.info("stage and size      as the checkpoint records\n" + NOTHING_WRITTEN)
                return
            source = ModelSource("model_id", config.model_id, config.model_id, has_weights=False)
        prepared = prepare(config, state, coconut_class, source)
        log.info(dump_config(prepared.config))
        position = Position(**state.trainer["position"]) if state else None
        _log_opening(prepared, prepared.outline.num_parameters, position)
        if prepared.data.train:
            log.info(schedule_table(prepared.config, prepared.data.train))
            ids = SpecialIds.of(prepared.source.tokenizer)
            parts = prepared.config, prepared.source, prepared.data.train, ids, coconut_class
            log.info("\n".join(_memory_lines(*parts)))
        log.info(NOTHING_WRITTEN)


def dry_run_of_lengths(config: Config, lengths: str) -> None:
    """Show schedule and memory for records of these lengths; needs neither data nor a tokenizer.

    lengths: as memory.Lengths.parse reads them.

    Raises: UserError for lengths of another form, for a model_id without config.json, and where
    `config` only evaluates.
    """
    if config.only_eval:
        raise UserError("--lengths shows what training needs; name the file of a training run")
    lengths = Lengths.parse(lengths)
    with _all_ranks(config):
        coconut_class = find_coconut_class(config)
        source = ModelSource("model_id", config.model_id, config.model_id, has_weights=False)
        records = lengths.records(config.records_per_step(distributed.world_size()))
        if config.num_epochs is None:
            config = with_num_epochs(config, records)
        # Rows for the markers, whose number alone counts.
        size = source.architecture.get_text_config().vocab_size
        ids = SpecialIds(size, size + 1, size + 2, eos=0)
        log.info(schedule_table(config, records))
        log.info("\n".join(_memory_lines(config, source, records, ids, coconut_class)))
        log.info(NOTHING_WRITTEN)


def exit_status_of(job: Callable[[Config], object], config: Config) -> int:
    """Run `job(config)`; where it ends early, report why and return the exit status of that."""
    status = None
    try:
        with distributed.process_group():
            try:
                job(config)
            except BaseException as error:
                # Before this rank leaves the group, through which the others learn of it.
                status = report_failure(error, config)
                raise
    except BaseException as error:
        return report_failure(error, config) if status is None else status
    return 0


def find_coconut_class(config: Config) -> type[Coconut] | None:
    """The class that config.coconut_class names as "module:Class"; None where it names none.

    Every rank must call.

    Raises: UserError where `import_coconut_class` does.
    """
    if config.coconut_class is None:
        return None
    return distributed.run_on_all_ranks(lambda: import_coconut_class(config.coconut_class))


def import_coconut_class(name: str) -> type[Coconut]:
    """The subclass of Coconut that `name` ("module:Class") names.

    The module is found as Python finds modules, in the working directory first.

    Raises: UserError when there is no such module, or no subclass of Coconut of that name in it.
    """
    module_name, _, class_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # What the module itself fails to import is not the configuration's fault.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"coconut_class: {name}: there is no module {error.name} in {os.getcwd()}; start the"
            f" run in the folder of {error.name}.py, or correct the name"
        ) from None
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(
            f"coconut_class: {name}: {module.__file__} has no class {class_name}; correct the name"
        )
    if not (isinstance(found, type) and issubclass(found, Coconut)):
        raise UserError(
            f"coconut_class: {name}: {class_name} is not a subclass of Coconut; derive it from"
            " coconut.Coconut"
        )
    return found


@contextlib.contextmanager
def _all_ranks(config: Config) -> Iterator[None]:
    """The process group, once `config` is known to be the same on all ranks and to suit them."""
    with distributed.process_group():
        configure_logging(distributed.rank())
        # Progress bars over loading and saving a file would break up the lines of the log.
        transformers_logging.disable_progress_bar()
        distributed.require_same(config.model_dump())
        if not config.only_eval:
            config.accumulation_steps(distributed.world_size())
        yield


@contextlib.contextmanager
def _held_run_dir(config: Config) -> Iterator[None]:
    """Hold the run directory, cleaned up after a crash; rank 0 does so for all ranks."""
    with contextlib.ExitStack() as held:

        def take() -> None:
            if distributed.is_main() and not config.debug:
                held.enter_context(run_dir.hold(config.run_dir))

        distributed.run_on_all_ranks(take)
        yield


def _train_from(
    prepared: Prepared,
    state: checkpoint.TrainingState | None,
    coconut_class: type[Coconut] | None,
) -> TrainingResult:
    """Build the model and run the training, from `state` where there is one."""
    config, data, tokenizer = prepared.config, prepared.data, prepared.source.tokenizer
    model = _build_model(prepared, coconut_class)
    saves = not config.debug
    if saves and parallel.is_sharded(model):
        checkpoint.require_shared(config.run_dir)
    with run_dir.writing(config.run_dir, "metrics.jsonl"):
        tracker = Tracker(
            config.run_dir if saves else None,
            config.model_dump(),
            config.project,
            config.name,
            config.wandb if saves else "disabled",
            distributed.is_main(),
            state.trainer["wandb_id"] if state else None,
        )
    facts = _provenance(data)
    metadata = Metadata.of(config, tokenizer, coconut_class)
    with contextlib.closing(tracker):
        trainer = Trainer(
            config,
            model,
            tokenizer,
            data.train,
            data.val,
            make_curriculum(config),
            metadata.model_copy(update={"provenance": facts}),
            tracker,
            state,
        )
        with run_dir.writing(config.run_dir, "config.yaml or metrics.jsonl"):
            if saves and distributed.is_main():
                run_dir.warn_about_unknown_files(config.run_dir)
                _write_config(config, config.run_dir, facts)
            if state is None:
                tracker.truncate(-1)
            _log_provenance(tracker, facts, trainer.position.optimizer_step)
        position = trainer.position
        if position.epoch < config.num_epochs:
            _log_opening(prepared, _num_parameters(model), position if state else None)
        trainer.run()
        log.info("\n".join(closing_lines(config, trainer.curriculum, position)))
    return TrainingResult(
        config.run_dir if saves else None,
        trainer.figures,
        position.best_accuracy,
        position.best_epoch,
    )


def _evaluate(
    prepared: Prepared, coconut_class: type[Coconut] | None
) -> dict[str, float | int | None]:
    """Build the model, evaluate it, write and log the outcome."""
    config, (stage, epoch) = prepared.config, prepared.evaluated
    model = _build_model(prepared, coconut_class)
    folder = None if config.debug else evaluation_folder(config)
    if folder is not None:
        distributed.run_on_all_ranks(lambda: distributed.is_main() and run_dir.create(folder))
    with run_dir.writing(folder or config.run_dir, "metrics.jsonl"):
        tracker = Tracker(
            folder,
            config.model_dump(),
            config.project,
            f"{config.name}-eval",
            "disabled" if config.debug else config.wandb,
            distributed.is_main(),
        )
    _log_opening(prepared, _num_parameters(model))
    with contextlib.closing(tracker):
        outcome = evaluation.evaluate(
            parallel.unwrap(model),
            prepared.source.tokenizer,
            prepared.data.val,
            make_curriculum(config),
            stage,
            batch_size=config.batch_size_eval or config.batch_size_training,
            max_new_tokens=config.max_new_tokens,
            bf16=config.bf16,
            num_workers=config.num_workers,
            progress_bar=progress_bar,
        )
        figures = outcome.figures
        # Written only now and the largest first, so that an interruption mixes no two evaluations.
        with run_dir.writing(folder or config.run_dir, "the evaluation"):
            if outcome.predictions is not None and folder is not None:
                path = folder / f"predictions_{epoch}.jsonl"
                evaluation.write_predictions(path, outcome.predictions)
            tracker.truncate(0, epoch)
            facts = _provenance(prepared.data)
            _log_provenance(tracker, facts, step=0)
            named = {f"eval/{name}": value for name, value in figures.items()}
            tracker.log(named | {"eval/epoch": epoch}, step=0)
            if folder is not None and distributed.is_main():
                _write_config(config.model_copy(update={"resume": epoch}), folder, facts)
        log.info(f"{config.load_model_path} on {config.val_path}, stage {stage}")
        log.info(evaluation.describe(figures))
        if folder is not None:
            log.info(f"predictions and figures are in {folder}")
    return figures


def _build_model(prepared: Prepared, coconut_class: type[Coconut] | None) -> nn.Module:
    """Coconut with its weights, on this rank's device, wrapped for the ranks."""
    config, source = prepared.config, prepared.source
    distributed.use_threads(prepared.outline.num_parameters)

    def build() -> Coconut:
        if config.bf16 and not source.is_state and not distributed.computes_bf16_natively():
            log.info(
                "bf16: this hardware has no native bf16 and emulates it; bf16: false is faster"
            )
        distributed.seed_everything(config.seed, config.deterministic)
        return build_coconut(config, load_backbone(config, source), coconut_class)

    model = distributed.run_on_all_ranks(build)
    # From here on only dropout draws random numbers, and it must differ between ranks.
    distributed.seed_rank(config.seed)
    if config.only_eval:
        plan = parallel.Parallel("none", False, "an evaluation needs whole parameters")
    else:
        plan = parallel.choose_parallel(config.parallel, _peak_bytes(prepared, coconut_class))
    log.info(f"parallel: {plan.kind} ({plan.reason})")
    if config.compile:
        model.base_causallm.base_model.compile(dynamic=True)
    return parallel.parallelize(model, plan, model.blocks, config.bf16)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _provenance(data: Data) -> dict:
    """Where the figures of this run come from: rank 0's commit, versions and machine, its data."""
    files = {"train_path": data.train, "val_path": data.val}
    used = {key: (len(records), records.sha256) for key, records in files.items() if records}
    return distributed.broadcast_from_main(
        run_provenance(describe_device(), used) if distributed.is_main() else None
    )


def _log_provenance(tracker: Tracker, facts: dict, step: int) -> None:
    tracker.log_changed({f"run/{name}": value for name, value in facts.items()}, step)


def _write_config(config: Config, folder: Path, facts: dict) -> None:
    """Write the resolved configuration into `folder` below `facts`; log what changed in it."""
    path = folder / "config.yaml"
    text = "".join(f"# {line}\n" for line in provenance_lines(facts)) + dump_config(config)
    if path.exists():
        before = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in text.splitlines():
            if line not in before:
                log.info(f"{path}: changed since the last start: {line}")
    atomic_write_text(path, text)


def _log_opening(prepared: Prepared, num_parameters: int, position: Position | None = None) -> None:
    """Log what the run is about to do. position: of a training run that resumes."""
    config, data = prepared.config, prepared.data
    lines = opening_lines(
        config,
        make_curriculum(config),
        num_parameters=num_parameters,
        threads=distributed.choose_threads(prepared.outline.num_parameters),
        num_val=len(data.val),
        num_train=len(data.train) if data.train else None,
        stage=prepared.evaluated[0] if prepared.evaluated else None,
        position=position,
    )
    log.info("\n".join(lines))


def _peak_bytes(
    prepared: Prepared, coconut_class: type[Coconut] | None
) -> Callable[[str, bool], int]:
    """What choose_parallel asks for, computed once it does."""

    @cache
    def peak_function() -> Callable[[str, bool], int]:
        config, source, ranks = prepared.config, prepared.source, distributed.world_size()
        ids = SpecialIds.of(source.tokenizer)
        batches = memory.largest_micro_batches(
            config, prepared.data.train, make_curriculum(config), ids, ranks
        )
        shape = model_shape(config, source, ids, coconut_class)
        return memory.peak_function(config, shape, batches, ranks)

    return lambda kind, gathered: peak_function()(kind, gathered)


def _memory_lines(
    config: Config,
    source: ModelSource,
    records: TokenizedRecords,
    ids: SpecialIds,
    coconut_class: type[Coconut] | None,
) -> list[str]:
    """What a training step needs of a device; DDP and FSDP on two ranks where there is one."""
    ranks = distributed.world_size()
    curriculum = make_curriculum(config)
    batches = memory.largest_micro_batches(config, records, curriculum, ids, ranks)
    shape = model_shape(config, source, ids, coconut_class)
    return memory.memory_lines(config, shape, batches, max(ranks, 2))


def schedule_table(config: Config, records: TokenizedRecords) -> str:
    """Epochs of the same stage in one line: stage, latents and steps kept, over the records."""
    curriculum = make_curriculum(config)
    lines = [f"{'epochs':>9}  {'stage':>5}  {'latents':>16}  {'steps kept':>16}"]
    for stage, group in groupby(range(config.resume, config.num_epochs), curriculum.stage):
        epochs = list(group)
        staged = StagedRecords.of(records, curriculum, np.full(len(records), stage))
        kept = records.num_steps - staged.dropped
        cells = [
            f"{values.mean():.2f} ({values.min()}-{values.max()})"
            for values in (staged.num_latents, kept)
        ]
        span = f"{epochs[0]}-{epochs[-1]}"
        lines.append(f"{span:>9}  {stage:>5}  {cells[0]:>16}  {cells[1]:>16}")
    return "\n".join(lines)
