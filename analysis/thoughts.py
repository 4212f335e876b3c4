"""Which words a checkpoint's thoughts hold.

`python -m analysis.thoughts CHECKPOINT [--val FILE]` scores each thought of a Coconut checkpoint
with the model's own output layer, as the hidden states it is an average of were scored, and counts
how often the likeliest word occurs in the step that the thought stands for. Only words in which
answers differ stand for election: a thought also says what kind of word comes next, such as a sign,
and would mostly read as that. Whether thoughts are used: analysis/ablations.py.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coconut import Coconut
from dataset import Collator, SpecialIds, StagedRecords
from engine import distributed
from engine.config import Config
from engine.config_file import load_config
from engine.metadata import Metadata, token_ids
from engine.model import Backbone, load_backbone
from engine.setup import load_data, make_curriculum
from engine.weights import ModelSource
from utils import ConfigError, UserError


@dataclass(frozen=True)
class ThoughtReport:
    """What was found out about a checkpoint.

    stage: the stage it was trained to, at which everything was measured.
    words: a list for each record, with the likeliest word of each of its thoughts, out of those in
        which answers differ.
    agreement: for each latent position, the share of records that have it whose word there occurs
        in the step it stands for.
    """

    stage: int
    words: list[list[str]]
    agreement: list[float]


def examine(checkpoint: Path, val_path: str | None = None) -> ThoughtReport:
    """Measure the checkpoint of a training run; `val_path` stands in for the run's own.

    Raises: UserError for a folder that is no Coconut checkpoint with continuous thoughts;
    ConfigError where the run's config.yaml is missing or spoilt.
    """
    metadata = Metadata.read(checkpoint)
    if metadata is None or (metadata.method, metadata.thought) != ("coconut", "continuous"):
        raise UserError(
            f"{checkpoint}: is no Coconut checkpoint with thoughts; name a run's checkpoint_N"
        )
    overrides = {"only_eval": True, "from_scratch": False, "load_model_path": str(checkpoint)}
    overrides |= {"val_path": val_path} if val_path else {}
    config = load_config(Path(checkpoint).parent / "config.yaml", overrides)
    source = ModelSource.of(config)
    backbone, records = load_backbone(config, source), load_data(config, source).val
    curriculum = make_curriculum(config)
    batch_size = config.batch_size_eval or config.batch_size_training
    model = _make_model(config, backbone)
    stages = np.full(len(records), metadata.stage)
    staged = StagedRecords.of(records, curriculum, stages)
    ids = SpecialIds.of(backbone.tokenizer)
    candidates = differing_ids(records.table["answer_ids"])
    word_ids = read_word_ids(model, staged, ids, candidates, batch_size)
    words = [backbone.tokenizer.convert_ids_to_tokens(ids) for ids in word_ids]
    shares = agreement(word_ids, records.table["step_ids"], config.c_thought)
    return ThoughtReport(metadata.stage, words, shares)


def _make_model(config: Config, backbone: Backbone) -> Coconut:
    model = Coconut(
        backbone.model,
        **token_ids(backbone.tokenizer),
        latent_window_size=config.latent_window_size,
        latent_weights=config.latent_weights,
        window_scope=config.window_scope,
    )
    return model.to(distributed.device()).eval()


def differing_ids(answers: Iterable[list[int]]) -> list[int]:
    """The ids that occur in some answers but not in all; in all, where that leaves none."""
    sets = [set(ids) for ids in answers]
    return sorted(set.union(*sets) - set.intersection(*sets)) or sorted(set.union(*sets))


@torch.no_grad()
def read_word_ids(
    model: Coconut, staged: StagedRecords, ids: SpecialIds, candidates: list[int], batch_size: int
) -> list[list[int]]:
    """For each record, which of `candidates` is the likeliest word of each of its thoughts."""
    candidates = torch.tensor(candidates, device=distributed.device())
    collator = Collator(staged, ids)
    score = model.base_causallm.get_output_embeddings()
    word_ids = []
    for begin in range(0, len(staged.dropped), batch_size):
        indices = np.arange(begin, min(begin + batch_size, len(staged.dropped)))
        batch = {key: t.to(distributed.device()) for key, t in collator[indices].items()}
        embeds = model(batch["input_ids"], batch["attention_mask"]).inputs_embeds  # (B, T, D)
        is_thought = (batch["input_ids"] == ids.latent) & (batch["attention_mask"] != 0)
        word_ids += [
            candidates[score(row[here])[:, candidates].argmax(-1)].tolist()
            for row, here in zip(embeds, is_thought, strict=True)
        ]
    return word_ids


def agreement(
    word_ids: list[list[int]], step_ids: Iterable[list[list[int]]], c_thought: int
) -> list[float]:
    """For each latent position, the share of records with a step there whose word occurs in it.

    word_ids: for each record, one id a thought; step_ids: for each record, the ids of each step.
    Thought k (from 0) stands for step k // c_thought.
    """
    step_ids = list(step_ids)
    shares = []
    for position in range(max(map(len, word_ids), default=0)):
        step = position // c_thought
        hits = [
            words[position] in steps[step]
            for words, steps in zip(word_ids, step_ids, strict=True)
            if len(words) > position and len(steps) > step
        ]
        shares.append(sum(hits) / len(hits) if hits else 0.0)
    return shares


def describe(report: ThoughtReport) -> str:
    """The report as lines to read."""
    lines = [f"stage {report.stage}"]
    lines.append("share of questions whose thought, read as a word of answers, is in its step")
    for position, share in enumerate(report.agreement, start=1):
        lines.append(f"  thought {position:<21}{100 * share:5.1f} %")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint_N folder of a training run")
    parser.add_argument("--val", help="data file (default: the run's val_path)")
    options = parser.parse_args(argv)
    try:
        print(describe(examine(options.checkpoint, options.val)))
    except (UserError, ConfigError) as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
