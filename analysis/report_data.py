"""What of a run and its measurements goes into the report: plain JSON values, read from files.

Computes no figures of its own but the best of a list. Facts come from coconut.json, config.json and
config.yaml, accuracies from metrics.jsonl, all else from ablations.json and probes.json. The text
of the page is assembled here only where it depends on the configuration.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.learning_curve import stage_spans
from analysis.results import Epoch, epochs_of, read_metrics
from analysis.subject import read_metadata, read_run_config
from coconut import initial_weights
from engine.config import Config
from engine.config_file import load_config
from engine.metadata import Metadata
from engine.run_dir import checkpoints
from engine.weights import ModelSource, empty_model
from utils import UserError

# Significant digits of the numbers of single questions; the figures of all are not rounded.
NUM_DIGITS = 3
# Attention, one for each thought and token of the question, is most of a page: whole numbers.
ATTENTION_UNIT = 1e-4
METHODS = {
    "coconut": "Coconut", "cot": "CoT", "no_cot": "no CoT", "no_thoughts": "without thoughts",
}  # fmt: skip


def page_data(
    checkpoint: Path,
    ablations: dict[str, Any],
    probes: dict[str, Any],
    baselines: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """All that the page shows, as JSON values.

    ablations, probes: the content of the files of those names.
    baselines: of other runs, as `describe_baseline` describes them.

    Raises: UserError for a run whose files are broken.
    """
    metadata, config = read_metadata(checkpoint), read_run_config(checkpoint)
    curve = None
    if config is not None and (checkpoint.parent / "metrics.jsonl").is_file():
        curve = _curve(checkpoint.parent, metadata)
    if curve is not None:
        curve["is_other_data"] = _val_sha256(metadata) != ablations["data_sha256"]
    return {
        "run": _run(checkpoint, metadata, config, ablations),
        "curve": curve,
        "baselines": [
            baseline | {"is_other_data": baseline["data_sha256"] != ablations["data_sha256"]}
            for baseline in baselines
        ],
        "ablations": _without_records(ablations),
        "probes": _without_records(probes),
        "records": _records(ablations, probes),
    }


def _without_records(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("records", "indices")}


def _val_sha256(metadata: Metadata | None) -> str | None:
    """The checksum of the file that a run was evaluated on; None where it records none.

    metadata: of one of its checkpoints.
    """
    origin = metadata and metadata.provenance
    return origin and origin.get("data", {}).get("val_path", {}).get("sha256")


def _run(
    checkpoint: Path, metadata: Metadata, config: Config | None, ablations: dict[str, Any]
) -> dict[str, Any]:
    run = Path(os.path.abspath(checkpoint)).parent
    commit = (metadata.provenance or {}).get("commit")
    origin = [
        f"Checkpoint {checkpoint}" + (f", trained at commit {commit[:12]}" if commit else ""),
        f"measured at commit {ablations['commit'][:12]} on {ablations['machine']}",
    ]
    return {
        "name": f"{run.parent.name}/{run.name}, {checkpoint.name}",
        "short_name": run.name,
        "c_thought": metadata.c_thought,
        "sentences": [
            _model_sentence(checkpoint, metadata, ablations),
            _thought_sentence(metadata),
            _data_sentence(metadata, config, ablations),
        ],
        "origin": "; ".join(origin) + ".",
    }


def _model_sentence(checkpoint: Path, metadata: Metadata, ablations: dict[str, Any]) -> str:
    source = ModelSource("checkpoint", str(checkpoint))
    size = empty_model(source, source.architecture).num_parameters()
    count = f"{size / 1e6:,.0f} million" if size >= 1e7 else f"{size:,}"
    kind, num_thoughts = source.architecture.model_type, ablations["num_thoughts"]
    latents = "thought" if metadata.thought == "continuous" else "latent token"
    thoughts = f"{num_thoughts} {latents}{'s' * (num_thoughts != 1)}"
    return (
        f"A model of the {kind} kind with {count} parameters, trained with Coconut to stage"
        f" {metadata.stage}: {thoughts} before the answer."
    )


def _thought_sentence(metadata: Metadata) -> str:
    m = metadata.latent_window_size
    if metadata.thought != "continuous":
        return f"Its latent tokens are of the kind {metadata.thought}, without thoughts in them."
    if m == 1:
        text = "A thought is the last hidden state, as in the original Coconut"
    else:
        weights = metadata.learned_weights or metadata.latent_weights
        weights = weights if isinstance(weights, list) else initial_weights(weights, m)
        shares = ", ".join(f"{weight / sum(weights):.2g}" for weight in weights)
        learned = "learned weights" if metadata.latent_weights == "learned" else "weights"
        text = f"A thought is an average of the last {m} hidden states ({learned} {shares})"
    if metadata.coconut_class:
        text = f"Its thoughts are made by {metadata.coconut_class}"
    return text + "."


def _data_sentence(metadata: Metadata, config: Config | None, ablations: dict[str, Any]) -> str:
    asked = f"{ablations['num_records']:,} records of {Path(ablations['data']).name}"
    data = (metadata.provenance or {}).get("data", {})
    if "train_path" not in data:
        return f"Asked {asked}."
    name = Path(config.train_path).name if config is not None and config.train_path else "a file"
    return f"Trained on {data['train_path']['records']:,} records of {name}, asked {asked}."


def _curve(run: Path, metadata: Metadata) -> dict[str, Any] | None:
    """Accuracy by epoch; `epoch` counts finished ones, as the names of checkpoints do."""
    epochs = list({epoch.epoch: epoch for epoch in epochs_of(read_metrics(run))}.values())
    if not epochs:
        return None
    lines = [{"eval/stage": e.stage, "eval/epoch": e.epoch} for e in epochs]
    here = [epoch for epoch in epochs if epoch.epoch == metadata.epoch]
    return {
        "evaluations": [_evaluation(epoch) for epoch in epochs],
        "last": _evaluation(here[0] if here else epochs[-1]),
        "best": _evaluation(max(epochs, key=lambda epoch: epoch.acc)),
        "spans": [
            {"from": first, "to": end, "label": f"stage {stage}", "short": str(stage)}
            for stage, first, end in stage_spans(lines)
        ],
    }


def _evaluation(epoch: Epoch) -> dict[str, Any]:
    return {
        "epoch": epoch.epoch + 1, "stage": epoch.stage,
        "acc": epoch.acc, "low": epoch.acc_low, "high": epoch.acc_high,
    }  # fmt: skip


def describe_baseline(run: Path) -> dict[str, Any]:
    """What the page shows of another run: its last accuracy and its best.

    Raises: UserError where it is not a run with an evaluation.
    """
    epochs = epochs_of(read_metrics(run))
    if not epochs:
        raise UserError(f"{run}: no evaluation yet; let the run finish an epoch")
    config, kept = load_config(run / "config.yaml"), checkpoints(run)
    return {
        "name": run.name,
        "folder": str(run),
        "method": METHODS[config.method],
        **_evaluation(epochs[-1]),
        "best": max(epoch.acc for epoch in epochs),
        "data_sha256": _val_sha256(Metadata.read(kept[-1][1]) if kept else None),
    }


def _records(ablations: dict[str, Any], probes: dict[str, Any]) -> list[dict[str, Any]]:
    """For each question the details from both analyses; those that only one of them details are
    left out."""
    asked = {record["index"]: record for record in ablations["records"]}
    probed = {record["index"]: record for record in probes["records"]}
    return [_rounded(probed[index] | asked[index]) for index in probed if index in asked]


def _rounded(value: Any) -> Any:
    """The same with shorter numbers; see NUM_DIGITS and ATTENTION_UNIT."""
    if isinstance(value, float):
        return float(f"{value:.{NUM_DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict) and "attention" in value:
        shares = value["attention"]
        short = {"attention_per_10000": [round(share / ATTENTION_UNIT) for share in shares]}
        return _rounded({k: v for k, v in value.items() if k != "attention"}) | short
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value
