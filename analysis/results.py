"""The small files under results/ that outlive checkpoints: one JSON file for each finished run.

A file holds what a run was (resolved configuration, commit, machine, sums of its data) and what it
showed: figures by epoch, right or wrong for each validation record after the last epoch, and the
outcomes of its study. Tables and figures are rebuilt from these files alone. scripts/reproduce.py
writes them and analysis/compare.py reads them.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from utils import UserError, atomic_write_text


class Epoch(BaseModel):
    """What one epoch logged.

    epoch: from 0; step: optimizer steps done at its end; train_loss: mean over its steps.
    acc, acc_low, acc_high: of the evaluation after it, 0 to 1; seconds: training and evaluation.
    window_weights: of a learned window, nearest state first.
    """

    model_config = ConfigDict(extra="forbid")

    epoch: int
    stage: int
    step: int
    train_loss: float | None
    loss: float
    acc: float
    acc_low: float
    acc_high: float
    mean_tokens: float
    mean_thoughts: float
    seconds: float | None = None
    window_weights: list[float] | None = None


class StepEvaluation(BaseModel):
    """An evaluation within an epoch (`eval_every_steps`)."""

    model_config = ConfigDict(extra="forbid")

    step: int
    epoch: int
    stage: int
    acc: float
    loss: float


class RunResult(BaseModel):
    """One finished run.

    condition: the variant of the data, such as "lag2"; arm: the variant of the method.
    block: position in the study's plan, from 0; runs of one block, condition and seed belong
        together.
    changed: whether the source tree differed from `commit`.
    data: path in the configuration -> sha256 and number of records.
    correct: for each validation record, whether the last epoch answered it, as base64 of bits.
    outcomes: name -> figure, fixed in the study file before the first run.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    study: str
    condition: str
    block: int
    is_prerequisite: bool
    arm: str
    seed: int
    commit: str
    changed: bool
    machine: str
    versions: dict[str, str]
    finished: str
    seconds: float
    config: dict[str, Any]
    data: dict[str, dict[str, Any]]
    epochs: list[Epoch]
    steps: list[StepEvaluation]
    num_records: int
    correct: str
    outcomes: dict[str, Any]

    @property
    def last(self) -> Epoch:
        """The last epoch trained, whose stage is what "last stage" means everywhere."""
        return self.epochs[-1]

    @property
    def best(self) -> Epoch:
        """The first epoch with the highest validation accuracy, of whatever stage."""
        return max(self.epochs, key=lambda epoch: epoch.acc)

    def right(self) -> np.ndarray:
        """(num_records,) bool: whether the last epoch answered each record."""
        bits = np.frombuffer(base64.b64decode(self.correct), dtype=np.uint8)
        return np.unpackbits(bits)[: self.num_records].astype(bool)


def encode_bits(right: Sequence[bool]) -> str:
    """Booleans as base64 of bits, the form of `RunResult.correct`."""
    return base64.b64encode(np.packbits(np.asarray(right, dtype=bool)).tobytes()).decode("ascii")


def result_path(folder: Path, condition: str, arm: str, seed: int) -> Path:
    """The path of a run's result in the folder of its study."""
    return folder / f"{condition}.{arm}.seed{seed}.json"


def write_result(folder: Path, result: RunResult) -> Path:
    """Write one result, whole or not at all; returns its path."""
    path = result_path(folder, result.condition, result.arm, result.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = result.model_dump(exclude_none=True)
    lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in content.items()]
    atomic_write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _compact(value: Any) -> str:
    """JSON on one line; a list of objects takes a line for each, so that changes can be read."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def read_result(path: Path) -> RunResult:
    """Read one result file.

    Raises: UserError when it is not one.
    """
    try:
        return RunResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: is not the result of a run ({where}: {first['msg']}); restore it with git, or"
            " remove it and run the study again"
        ) from None


def read_results(folder: Path) -> list[RunResult]:
    """All results of a study, by block, condition, seed and file name.

    Raises: UserError where there is none or one cannot be read.
    """
    paths = sorted(folder.glob("*.seed*.json"))
    if not paths:
        raise UserError(
            f"{folder}: holds no results; run the study first (python scripts/reproduce.py"
            " args/studies/NAME.yaml)"
        )
    results = [read_result(path) for path in paths]
    return sorted(results, key=lambda run: (run.block, run.condition, run.seed))


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl.

    Raises: UserError where they cannot be read.
    """
    path = run_dir / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the folder of a training run") from None
    except ValueError as error:
        raise UserError(f"{path}: broken ({error}); resume the run, which fixes it") from None


def epochs_of(lines: Iterable[dict]) -> list[Epoch]:
    """The epochs of a run from the lines of its metrics.jsonl."""
    epochs, losses, weights = [], [], None
    for line in lines:
        if line.get("train/loss") is not None:
            losses.append(line["train/loss"])
        weights = line.get("train/window_weights", weights)
        if "eval/epoch" not in line:
            continue
        seconds = [line.get(f"{part}/seconds") for part in ("train", "eval")]
        epochs.append(
            Epoch(
                epoch=line["eval/epoch"],
                step=line["step"],
                train_loss=sum(losses) / len(losses) if losses else None,
                seconds=None if None in seconds else sum(seconds),
                window_weights=weights,
                **{
                    name: line[f"eval/{name}"]
                    for name in ("stage", "loss", "acc", "acc_low", "acc_high")
                },
                mean_tokens=line["eval/mean_tokens"],
                mean_thoughts=line["eval/mean_thoughts"],
            )
        )
        losses = []
    return epochs


def step_evaluations_of(lines: Iterable[dict]) -> list[StepEvaluation]:
    """The evaluations within epochs from the lines of a run's metrics.jsonl."""
    names = ("epoch", "stage", "acc", "loss")
    return [
        StepEvaluation(step=line["step"], **{name: line[f"eval_step/{name}"] for name in names})
        for line in lines
        if "eval_step/acc" in line
    ]


def read_predictions(path: Path) -> list[dict]:
    """The prediction records of one evaluation, in file order.

    Raises: UserError where the file is not one of predictions.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows and all(isinstance(row["correct"], bool) for row in rows):
            return rows
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: is not a predictions_N.jsonl of an evaluation")


def epochs_to(threshold: float, epochs: Sequence[Epoch]) -> dict[int, int | None]:
    """For each stage the number of its epochs until accuracy reached `threshold`; None if never."""
    reached: dict[int, int | None] = {}
    counts: dict[int, int] = {}
    for epoch in epochs:
        counts[epoch.stage] = counts.get(epoch.stage, 0) + 1
        reached.setdefault(epoch.stage, None)
        if reached[epoch.stage] is None and epoch.acc >= threshold:
            reached[epoch.stage] = counts[epoch.stage]
    return reached
