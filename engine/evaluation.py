"""Evaluation (docs/specification.md, section 8): token loss and greedy answers, batch by batch.

A batch's prompts are read once for both (Coconut.answer). Every rank takes its share of the
records, sorted by length; rank 0 puts the predictions back into file order and computes the
figures. Which answers are correct is left to metrics.py, the choice of the stage to the caller.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from coconut import Coconut
from dataset import (
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    TokenizedRecords,
    decode,
    micro_batches,
)
from engine import distributed, metrics, parallel
from engine.loader import batch_loader
from utils import atomic_write_text


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    figures: name under "eval/" -> number, None where nothing could be measured. The same on every
        rank. seconds_per_record is that of loss and answers together.
    predictions: one dict a record in file order; None on ranks other than 0.
    """

    figures: dict[str, float | int | None]
    predictions: list[dict] | None


def autocast(bf16: bool, device: torch.device):
    """The context in which models compute: in bf16 over fp32 weights, or in their own precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def evaluate(
    model: Coconut,
    tokenizer,
    records: TokenizedRecords,
    curriculum: Curriculum,
    stage: int,
    *,
    batch_size: int,
    max_new_tokens: int,
    bf16: bool = False,
    num_workers: int = 0,
    progress_bar: Callable | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Loss and greedy accuracy of `model` on `records` at `stage`. Every rank must call.

    Leaves the model's mode and torch's random generators as they were.

    batch_size: records at once on each process.
    progress_bar: made with the number of batches and a description; its `update` is called.
    before_batch: called before each batch; what it raises ends the evaluation.
    """
    staged = StagedRecords.of(records, curriculum, np.full(len(records), stage))
    shares = micro_batches(np.arange(len(records)), staged, batch_size, distributed.world_size())
    batches = [share[distributed.rank()] for share in shares]
    batches = [batch for batch in batches if len(batch)]
    ids = SpecialIds.of(tokenizer)
    was_training = model.training
    model.eval()
    bar = progress_bar(len(batches), f"evaluating stage {stage}") if progress_bar else None
    device = distributed.device()
    collator = Collator(staged, ids, aligned="prompts")
    decoder = Decoder(model, tokenizer, staged, max_new_tokens)
    num_labels = staged.num_labels
    summed_loss, num_tokens, mine = 0.0, 0, []
    with (
        # A subclass of Coconut, or a loader of batches, may draw random numbers.
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        parallel.gathered_parameters(model),
        autocast(bf16, device),
    ):
        began = time.perf_counter()
        loader = batch_loader(collator, batches, num_workers, device.type == "cuda")
        for indices, batch in zip(batches, loader, strict=True):
            before_batch()
            batch = {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
            loss, rows = decoder.predict(batch)
            summed_loss += loss * num_labels[indices].sum()
            num_tokens += num_labels[indices].sum()
            mine += rows
            if bar is not None:
                bar.update()
        seconds = time.perf_counter() - began
    if bar is not None:
        bar.close()
    model.train(was_training)
    summed_loss, num_tokens = distributed.sum_over_ranks([summed_loss, num_tokens])
    figures, predictions = _collect(mine, seconds)
    return Evaluation(figures | {"loss": summed_loss / num_tokens, "stage": stage}, predictions)


def _collect(mine: list[dict], seconds: float) -> tuple[dict, list[dict] | None]:
    """Figures on every rank, and the predictions of all ranks in file order on rank 0."""
    shares = distributed.gather_to_main((mine, seconds))
    if shares is None:
        return distributed.broadcast_from_main(None), None
    predictions = sorted((row for rows, _ in shares for row in rows), key=lambda r: r["index"])
    figures = summarize(predictions)
    # The evaluation is as slow as its slowest rank.
    figures["seconds_per_record"] = max(times for _, times in shares) / len(predictions)
    return distributed.broadcast_from_main(figures), predictions


@dataclass(frozen=True)
class Decoder:
    """Answers batches of prompts and describes each answer."""

    model: Coconut
    tokenizer: object
    staged: StagedRecords
    max_new_tokens: int

    def predict(self, batch: dict[str, torch.Tensor]) -> tuple[float, list[dict]]:
        """Mean token loss, and one prediction record a row, of a batch with aligned prompts."""
        loss, new_tokens = self.model.answer(
            batch["input_ids"], batch["attention_mask"], batch["labels"], self.max_new_tokens
        )
        pairs = zip(batch["indices"].tolist(), new_tokens.tolist(), strict=True)
        return loss.item(), [self._record(index, tokens) for index, tokens in pairs]

    def _record(self, index: int, new_tokens: list[int]) -> dict:
        eos = self.tokenizer.eos_token_id
        ended = eos in new_tokens
        tokens = new_tokens[: new_tokens.index(eos)] if ended else new_tokens
        # Markers are special tokens, so one that the model writes cannot leak into the text.
        (text,) = decode(self.tokenizer, [tokens])
        source = self.staged.tokenized.table[index]
        steps_left = source["steps"][int(self.staged.dropped[index]) :]
        num_latents = int(self.staged.num_latents[index])
        return {
            "index": index,
            "question": source["question"],
            "gold": source["answer"],
            "prediction": metrics.extract_answer(text, source["answer"]),
            "text": text,
            "correct": metrics.is_correct(text, source["answer"]),
            "cot_match": metrics.cot_matches(text, steps_left) if steps_left else None,
            "num_tokens": len(tokens),
            "num_thoughts": num_latents * (self.model.thought_kind == "continuous"),
            "ended": ended,
            # On its own the record takes a pass up to each latent, one up to the prompt's last
            # token, and one for each token written except the last, EOS included.
            "forward_passes": num_latents * self.model.reads_in_passes + len(tokens) + ended,
        }


def summarize(predictions: list[dict]) -> dict[str, float | int | None]:
    """The figures of docs/specification.md, section 8, from prediction records."""
    n = len(predictions)
    num_correct = sum(row["correct"] for row in predictions)
    low, high = metrics.wilson_interval(num_correct, n)
    matches = [row["cot_match"] for row in predictions if row["cot_match"] is not None]
    mean_tokens = math.fsum(row["num_tokens"] for row in predictions) / n
    mean_thoughts = math.fsum(row["num_thoughts"] for row in predictions) / n
    return {
        "acc": num_correct / n,
        "acc_low": low,
        "acc_high": high,
        "num_correct": num_correct,
        "num_records": n,
        "cot_em": sum(matches) / len(matches) if matches else None,
        "mean_tokens": mean_tokens,
        "mean_thoughts": mean_thoughts,
        "mean_tokens_and_thoughts": mean_tokens + mean_thoughts,
        "num_hit_max_new_tokens": sum(not row["ended"] for row in predictions),
        "num_without_answer": sum(row["prediction"] is None for row in predictions),
    }


def describe(figures: dict) -> str:
    """The figures of an evaluation as text."""
    cot_em = figures["cot_em"]
    lines = [
        f"  accuracy            {100 * figures['acc']:.2f} % ({figures['num_correct']} of"
        f" {figures['num_records']}), 95 % interval {100 * figures['acc_low']:.2f} to"
        f" {100 * figures['acc_high']:.2f}",
        f"  token loss          {figures['loss']:.4f}",
        "  CoT match           " + ("no steps left" if cot_em is None else f"{100 * cot_em:.2f} %"),
        f"  tokens + thoughts   {figures['mean_tokens']:.2f} + {figures['mean_thoughts']:.2f} ="
        f" {figures['mean_tokens_and_thoughts']:.2f}",
        f"  seconds per record  {figures['seconds_per_record']:.4f}",
        f"  hit max_new_tokens  {figures['num_hit_max_new_tokens']}, without '#'"
        f" {figures['num_without_answer']}",
    ]
    return "\n".join(lines)


def write_predictions(path: Path, predictions: list[dict]) -> None:
    """Write one JSON object a line, all or nothing."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]
    atomic_write_text(path, "".join(lines))
