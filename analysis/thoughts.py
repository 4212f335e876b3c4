"""What a checkpoint's thoughts contribute, and which words they hold.

`python -m analysis.thoughts CHECKPOINT [--val FILE]` evaluates a Coconut checkpoint of a training
run three times, at the stage it was trained to: with its own thoughts, with every thought replaced
by zeros, and with every thought taken from another question of the batch. Then it scores each
thought with the model's own output layer, as the hidden states it is an average of were scored, and
counts how often the likeliest word is the first word of the step that the thought stands for.

Evaluation itself is evaluation.py's. Carries out no section of the SPEC: it asks whether the
thoughts of section 6 are used.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distributed
from backbone import load_backbone
from coconut import Coconut
from config import Config, ConfigError, load_config
from curriculum import Curriculum
from dataset import Collator, SpecialIds, StagedRecords, read_records, tokenize_records
from evaluation import evaluate
from settings import read_checkpoint_settings, token_ids
from utils import UserError


class ZeroThoughts(Coconut):
    """Coconut whose thoughts are all zeros: their positions stay, their content goes."""

    def thought(self, hidden_states: Tensor, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states[:, -1])


class OtherThoughts(Coconut):
    """Coconut in which each row reads the thoughts of the row before it in the batch."""

    def thought(self, hidden_states: Tensor, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        return super().thought(hidden_states, attention_mask, is_first).roll(1, 0)


CONDITIONS = {"own": Coconut, "zero": ZeroThoughts, "other": OtherThoughts}


@dataclass(frozen=True)
class ThoughtReport:
    """What was found out about a checkpoint.

    stage: the stage it was trained to, at which everything was measured.
    figures: condition -> the figures of its evaluation (`acc`, `acc_low`, `acc_high`, ...).
    words: a list for each record, with the likeliest word of each of its thoughts.
    agreement: for each latent position, the share of records that have it whose word there is the
        first word of the step it stands for.
    """

    stage: int
    figures: dict[str, dict]
    words: list[list[str]]
    agreement: list[float]


def examine(checkpoint: Path, val_path: str | None = None) -> ThoughtReport:
    """Measure the checkpoint of a training run; `val_path` stands in for the run's own.

    Raises: UserError for a folder that is no Coconut checkpoint with continuous thoughts;
    ConfigError where the run's config.yaml is missing or spoilt.
    """
    settings = read_checkpoint_settings(checkpoint)
    if settings is None or (settings["method"], settings["thought"]) != ("coconut", "continuous"):
        raise UserError(
            f"{checkpoint}: is no Coconut checkpoint with thoughts; name a run's checkpoint_N"
        )
    overrides = ["only_eval=true", "from_scratch=false", f"load_model_path={checkpoint}"]
    overrides += [f"val_path={val_path}"] if val_path else []
    config = load_config(Path(checkpoint).parent / "config.yaml", overrides)
    backbone = load_backbone(config)
    records = tokenize_records(read_records(config.val_path), backbone.tokenizer, config.val_path)
    schedule = settings["schedule"]
    curriculum = Curriculum(
        "coconut",
        settings["c_thought"],
        schedule["epochs_per_stage"],
        schedule["max_latent_stage"],
        schedule["pad_latent_to_max"],
        schedule["curriculum"],
    )
    window = {name: settings[name] for name in ("latent_window_size", "latent_weights")}
    figures = {}
    for condition, kind in CONDITIONS.items():
        model = kind(
            backbone.model,
            **token_ids(backbone.tokenizer),
            **window,
            window_scope=settings["window_scope"],
        )
        figures[condition] = evaluate(
            model.to(distributed.device()),
            backbone.tokenizer,
            records,
            curriculum,
            settings["stage"],
            batch_size=_batch_size(config),
            max_new_tokens=config.max_new_tokens,
            bf16=config.bf16,
        ).figures
