"""The cost of padding in an epoch of GSM8K-like records, and training tokens per second.

`python -m benchmarks.epoch [--device cuda] [--bf16] [--records 20000] [--data FILE]`. Records take
the same path as in training: effective batches in the order of (seed, epoch), micro-batches,
Collator. Padding is reported over a whole epoch, as a share of the tokens that the model's layers
read and of the rows x columns that only attention covers. Speed counts real tokens only, over
--repeats optimizer steps of every split, taking turns. Without --data, `gsm_like_records` draws the
records.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.common import (
    NUM_WORDS,
    build_model,
    build_tokenizer,
    median,
    new_parser,
    parse,
    positive,
    print_table,
    take_turns,
    write_report,
)
from benchmarks.contenders import coconut_around, make_trainer
from coconut import Coconut
from dataset import (
    MARKERS,
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    TokenizedRecords,
    effective_batches,
    micro_batches,
    read_records,
    tokenize_records,
)
from engine.trainer import Trainer

# (records per micro-batch, accumulation steps): the paper's effective batch and a small one.
SPLITS = ((32, 4), (8, 4), (128, 1))
# The paper's schedule for GSM8K: stages 0 to 3, and stage 4 without written steps.
STAGES = (0, 2, 4)
GSM = {"c_thought": 2, "epochs_per_stage": 3, "max_latent_stage": 3, "pad_latent_to_max": True}

# Lengths in GPT-2 tokens of the 500 records of GSM8K-aug's validation file, line breaks and EOS
# included: the logarithm of a question's length, and the share of each other length.
QUESTION_LOG_MEAN, QUESTION_LOG_STD, QUESTION_RANGE = 3.970, 0.342, (20, 200)
NUM_STEPS = {0: 0.012, 1: 0.052, 2: 0.31, 3: 0.28, 4: 0.182, 5: 0.106, 6: 0.036, 7: 0.016, 8: 0.006}
STEP_LENGTHS = {6: 0.015, 8: 0.739, 9: 0.046, 10: 0.144, 11: 0.013, 12: 0.032, 14: 0.006, 17: 0.005}
ANSWER_LENGTHS = {3: 0.922, 4: 0.07, 5: 0.008}


def gsm_like_records(n: int, seed: int = 0) -> list[dict]:
    """`n` records of random words, with GSM8K-aug's lengths under `build_tokenizer`."""
    draw = random.Random(seed)

    def choice(shares: dict[int, float]) -> int:
        return draw.choices(list(shares), list(shares.values()))[0]

    def words(number: int) -> str:
        return " ".join(f"w{draw.randrange(NUM_WORDS)}" for _ in range(number))

    records = []
    shortest, longest = QUESTION_RANGE
    for _ in range(n):
        length = round(draw.lognormvariate(QUESTION_LOG_MEAN, QUESTION_LOG_STD))
        records.append(
            {
                "question": words(min(max(length, shortest), longest)),
                "steps": [words(choice(STEP_LENGTHS)) for _ in range(choice(NUM_STEPS))],
                # ### and EOS make up the other two tokens.
                "answer": words(choice(ANSWER_LENGTHS) - 2),
            }
        )
    return records


def load_records(
    options: argparse.Namespace, vocab_size: int
) -> tuple[TokenizedRecords, PreTrainedTokenizerBase]:
    """The tokenised records, from --data or drawn, and the tokenizer."""
    if options.data is None:
        tokenizer = build_tokenizer(vocab_size)
        return tokenize_records(gsm_like_records(options.records), tokenizer, "drawn"), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, trust_remote_code=False)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    records = read_records(str(options.data), options.records)
    return tokenize_records(records, tokenizer, str(options.data)), tokenizer


def plan_epoch(staged: StagedRecords, split: tuple[int, int], epoch: int) -> Iterator[list]:
    """The micro-batches (record indices) of each optimizer step of an epoch, on one process."""
    batch_size, accumulation = split
    for indices in effective_batches(len(staged.dropped), batch_size * accumulation, 0, epoch):
        yield [shares[0] for shares in micro_batches(indices, staged, batch_size, 1)]


def measure_padding(
    coconut: Coconut, collator: Collator, split: tuple[int, int], epoch: int
) -> dict:
    """Real and computed tokens of the epoch, and the rate at which batches and layouts are made."""
    read = attended = real = 0
    began = time.perf_counter()
    for parts in plan_epoch(collator.staged, split, epoch):
        for indices in parts:
            batch = collator[indices]
            mask = batch["attention_mask"]
            layout = coconut.layout(batch["input_ids"], mask, batch["labels"])
            bounds = pairwise([0, *layout.pass_starts, mask.size(1)])
            read += sum(
                len(mask) * (stop - begin) if tokens.indices is None else len(tokens.indices)
                for (begin, stop), tokens in zip(bounds, layout.tokens, strict=True)
            )
            attended += mask.numel()
            real += int(mask.sum())
    seconds = time.perf_counter() - began
    return {
        "real_tokens": real,
        "tokens_read_by_layers": read,
        "padding_in_layers": 1 - real / read,
        "padding_in_attention": 1 - real / attended,
        "collated_tokens_per_s": real / seconds,
    }


def measure_speed(trainer: Trainer, collator: Collator, epoch: int, repeats: int) -> list[float]:
    """Real tokens trained per second for each of SPLITS: the median over optimizer steps."""
    device = trainer.device
    staged = collator.staged
    lengths = staged.prompt_lengths + staged.num_labels
    plans = {split: plan_epoch(staged, split, epoch) for split in SPLITS}
    rates: dict[tuple[int, int], list[float]] = {split: [] for split in SPLITS}
    warm_ups = 2 if device.type == "cuda" else 0
    for number in range(warm_ups + repeats):
        work, tokens = {}, {}
        for split, plan in plans.items():
            parts = next(plan)
            indices = np.concatenate(parts)
            batches = [collator[part] for part in parts]
            num_labels = int(staged.num_labels[indices].sum())
            tokens[split] = int(lengths[indices].sum())
            work[split] = lambda batches=batches, n=num_labels: trainer.train_step(
                batches, n, [None] * len(batches)
            )
        for split, (seconds,) in take_turns(work, 1, device).items():
            if number >= warm_ups:
                rates[split].append(tokens[split] / seconds)
    return [median(rates[split]) for split in SPLITS]


def measure(options: argparse.Namespace) -> list[dict]:
    """Return a row for each stage and split."""
    vocab_size = build_model(options.model, n_layer=1).config.vocab_size
    records, tokenizer = load_records(options, vocab_size)
    curriculum = Curriculum(method="coconut", **GSM)
    rows = []
    for stage in STAGES:
        staged = StagedRecords.of(records, curriculum, np.full(len(records), stage))
        collator = Collator(staged, SpecialIds.of(tokenizer))
        epoch = stage * curriculum.epochs_per_stage
        model = build_model(options.model).to(options.device)
        trainer = make_trainer(coconut_around(model), options.bf16)
        speeds = measure_speed(trainer, collator, epoch, options.repeats)
        for (batch_size, accumulation), speed in zip(SPLITS, speeds, strict=True):
            row = {"stage": stage, "batch_size": batch_size, "accumulation": accumulation}
            row |= measure_padding(trainer.model, collator, (batch_size, accumulation), epoch)
            rows.append(row | {"trained_tokens_per_s": speed})
    return rows


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table."""
    head = ("stage", "batch", "tokens", "read", "padding", "in attention", "made/s", "trained/s")
    cells = [
        [
            row["stage"],
            f"{row['batch_size']} x {row['accumulation']}",
            row["real_tokens"],
            row["tokens_read_by_layers"],
            f"{100 * row['padding_in_layers']:.2f} %",
            f"{100 * row['padding_in_attention']:.2f} %",
            f"{row['collated_tokens_per_s']:.0f}",
            f"{row['trained_tokens_per_s']:.0f}",
        ]
        for row in rows
    ]
    print_table(head, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--records", type=positive, default=20000, help="drawn, or read at most")
    parser.add_argument("--data", type=Path, help="JSON of records to use instead of drawn ones")
    parser.add_argument(
        "--tokenizer", default="openai-community/gpt2", help="for --data: name or folder"
    )
    options = parse(parser, arguments)
    rows = measure(options)
    print()
    print_rows(rows)
    write_report("epoch", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
