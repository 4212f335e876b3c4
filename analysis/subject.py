"""What the analyses look at: one Coconut checkpoint, the data it answers, and where output goes.

`ablations`, `probes`, `report` and `scripts/ask.py` open checkpoints with these functions, so they
refuse the same things with the same messages. All that can be is checked before the weights load.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from coconut import Coconut
from dataset import (
    Curriculum,
    StagedRecords,
    TokenizedRecords,
    parse_records,
    read_records,
    tokenize_records,
)
from engine import distributed, run_dir
from engine.config import Config
from engine.config_file import load_config
from engine.jobs import import_coconut_class
from engine.metadata import METADATA_FILE, Metadata, require_class
from engine.model import load_coconut, max_positions
from engine.setup import check_lengths, check_vocabulary
from utils import UserError

CONFIG_FILE = "config.yaml"
# For a checkpoint without the configuration of its run.
DEFAULT_BATCH_SIZE = 64


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the records that it is asked, ready to run.

    folder: the checkpoint's.
    model: in evaluation mode, float32, on this process's device.
    stage: the curriculum's stage that it was trained to, at which it is asked.
    data: the file of the records.
    records: tokenised; raw: the same records as the file has them, with fields of graphs.
    indices: the position of each record in the file, from 0.
    batch_size, max_new_tokens: those of the run's evaluation.
    """

    folder: Path
    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    metadata: Metadata
    curriculum: Curriculum
    stage: int
    data: Path
    records: TokenizedRecords
    raw: list[dict]
    indices: list[int]
    batch_size: int
    max_new_tokens: int

    @property
    def staged(self) -> StagedRecords:
        """The records at the checkpoint's stage."""
        return StagedRecords.of(self.records, self.curriculum, np.full(len(self.raw), self.stage))

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model can read; None without a limit."""
        return max_positions(self.model.base_causallm.config.get_text_config())


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` names: itself, or the last checkpoint of a run.

    Raises: UserError where there is none.
    """
    path = Path(path)
    if (path / METADATA_FILE).is_file():
        return path
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path}: {what}; name the folder of a run or one of its checkpoints")
    if found := run_dir.checkpoints(path):
        return found[-1][1]
    if (path / CONFIG_FILE).is_file():
        raise UserError(f"{path}: this run has no checkpoint yet; wait for its first epoch to end")
    raise UserError(
        f"{path}: holds neither {METADATA_FILE} nor checkpoints; name the folder of a run or one of"
        " its checkpoints"
    )


def read_metadata(checkpoint: Path) -> Metadata:
    """The coconut.json of a Coconut checkpoint.

    Raises: UserError where it is missing or broken, or of a method without latent positions.
    """
    metadata = Metadata.read(checkpoint)
    if metadata is None:
        raise UserError(f"{checkpoint}: has no {METADATA_FILE}; name a checkpoint of a run")
    if metadata.method != "coconut":
        raise UserError(
            f"{checkpoint}: was trained as {metadata.method}, which has no thoughts; name a"
            " checkpoint of a Coconut run"
        )
    return metadata


def read_run_config(checkpoint: Path) -> Config | None:
    """The configuration of the run that holds the checkpoint; None where no run does.

    Raises: ConfigError where it is broken.
    """
    path = checkpoint.parent / CONFIG_FILE
    return load_config(path) if path.is_file() else None


def open_model(
    path: str | Path, coconut_class: str | None = None
) -> tuple[Path, Coconut, PreTrainedTokenizerBase, Metadata]:
    """The checkpoint folder that `path` names, its model, its tokenizer and its coconut.json.

    path: of a checkpoint, or of a run, which means its last checkpoint.
    coconut_class: "module:Class", needed where the checkpoint was trained with one.
    Returns the model in evaluation mode, float32, on this process's device.

    Raises: UserError for what is not an intact Coconut checkpoint, or of another class.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    found = _find_class(checkpoint, metadata, coconut_class)
    model, tokenizer, metadata = load_coconut(checkpoint, found)
    distributed.use_threads(model.base_causallm.num_parameters())
    return checkpoint, model.to(distributed.device()), tokenizer, metadata


def _find_class(
    checkpoint: Path, metadata: Metadata, coconut_class: str | None
) -> type[Coconut] | None:
    if coconut_class is None and metadata.coconut_class is not None:
        raise UserError(
            f"{checkpoint}: was trained with coconut_class {metadata.coconut_class}; add"
            f" --coconut-class {metadata.coconut_class}"
        )
    found = None if coconut_class is None else import_coconut_class(coconut_class)
    require_class(metadata, found, str(checkpoint))
    return found


def open_subject(
    path: str | Path,
    *,
    data: str | Path | None = None,
    num_records: int | None = None,
    coconut_class: str | None = None,
) -> Subject:
    """Open a checkpoint together with the records that it is asked.

    path, coconut_class: as `open_model` takes them.
    data: a data file; by default the val_path of the checkpoint's run.
    num_records: only the first so many records.

    Raises: UserError where `open_model` does, for data that cannot be read or do not fit the model,
        and for a number of records below 1.
    """
    checkpoint = find_checkpoint(path)
    read_metadata(checkpoint)
    config = read_run_config(checkpoint)
    data = _choose_data(checkpoint, config, data)
    if num_records is not None and num_records < 1:
        raise UserError(f"--records {num_records}: must be at least 1")
    texts = read_records(str(data), num_records)
    raw = parse_records(str(data), data.read_bytes())[: len(texts)]
    checkpoint, model, tokenizer, metadata = open_model(checkpoint, coconut_class)
    records = tokenize_records(texts, tokenizer, str(data))
    check_vocabulary(records, model.base_causallm.get_input_embeddings().num_embeddings)
    batch_size, max_new_tokens = _sizes(config)
    subject = Subject(
        folder=checkpoint,
        model=model,
        tokenizer=tokenizer,
        metadata=metadata,
        curriculum=make_curriculum(metadata),
        stage=metadata.stage,
        data=data,
        records=records,
        raw=raw,
        indices=list(range(len(raw))),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    check_lengths(subject.staged, subject.max_positions)
    if config is None:
        return _with_fitting_answers(subject)
    check_lengths(subject.staged, subject.max_positions, max_new_tokens)
    return subject


def make_curriculum(metadata: Metadata) -> Curriculum:
    """The curriculum that a checkpoint was trained with."""
    schedule = metadata.schedule
    return Curriculum(
        method=metadata.method,
        c_thought=metadata.c_thought,
        epochs_per_stage=schedule.epochs_per_stage,
        max_latent_stage=schedule.max_latent_stage,
        pad_latent_to_max=schedule.pad_latent_to_max,
        enabled=schedule.curriculum,
    )


def _sizes(config: Config | None) -> tuple[int, int]:
    """batch_size and max_new_tokens of the run's evaluation, or the defaults."""
    if config is None:
        return DEFAULT_BATCH_SIZE, Config.model_fields["max_new_tokens"].default
    return config.batch_size_eval or config.batch_size_training, config.max_new_tokens


def _with_fitting_answers(subject: Subject) -> Subject:
    """The same with answers limited to the model's positions."""
    if subject.max_positions is None:
        return subject
    free = subject.max_positions - int(subject.staged.prompt_lengths.max())
    return replace(subject, max_new_tokens=min(subject.max_new_tokens, max(free, 1)))


def _choose_data(checkpoint: Path, config: Config | None, data: str | Path | None) -> Path:
    if data is not None:
        return Path(data)
    if config is None:
        raise UserError(
            f"{checkpoint}: is not in the folder of a run, whose {CONFIG_FILE} would name its data;"
            " add --data FILE"
        )
    if not os.path.exists(config.val_path):
        raise UserError(
            f"{checkpoint}: the val_path of its run, {config.val_path}, does not exist here; make"
            " it, start from the folder where it is, or add --data FILE"
        )
    return Path(config.val_path)


def output_folder(checkpoint: Path, data: str | Path | None = None) -> Path:
    """Where analyses of a checkpoint are written: RUN/analysis/checkpoint_N.

    data: the file of the records; one other than the run's adds its stem to the folder's name.

    Raises: ConfigError where the configuration of the run is broken.
    """
    checkpoint = Path(os.path.abspath(checkpoint))
    name = checkpoint.name
    config = read_run_config(checkpoint)
    if data is not None and (config is None or not _is_same_path(config.val_path, data)):
        name += f"-{Path(data).stem}"
    return checkpoint.parent / run_dir.ANALYSIS_FOLDER / name


def _is_same_path(first: str | Path, second: str | Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)
