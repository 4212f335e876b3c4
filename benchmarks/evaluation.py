"""Seconds per record of an evaluation: loss and answers computed separately or together.

`python -m benchmarks.evaluation [--device cuda] [--bf16] [--records 32 --question 362 ...]`. Apart,
Coconut.forward scores the gold answers over the whole sequences and Coconut.generate reads the
prompts again to answer; together, the prompts are read once (Coconut.answer, as in
engine/evaluation.py). Random weights do not end their answers, so every record gets --new tokens.
"""

import argparse
from collections.abc import Sequence

import torch

from benchmarks.common import (
    Shape,
    build_model,
    check_fits,
    check_prompt,
    make_batch,
    median,
    new_parser,
    parse,
    positive,
    print_table,
    shape_of,
    take_turns,
    write_report,
)
from benchmarks.contenders import wrap
from engine.evaluation import autocast


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each way: seconds per record in all turns, and the share of equal tokens."""
    device, shape = torch.device(options.device), shape_of(options)
    model = wrap(build_model(options.model).to(device)).eval()
    vocab_size = model.base_causallm.config.vocab_size
    written = {}

    @torch.no_grad()
    def evaluate(way: str, shape: Shape, new: int) -> None:
        # A prompt must not end with a latent, so the question's last token follows the latents.
        shape = Shape(shape.records, shape.question - 1, shape.latents, shape.answer + 1)
        batch = make_batch(shape, vocab_size, device)
        width = shape.length - shape.answer + 1
        batch["labels"][:, :width] = -100
        texts = batch["input_ids"], batch["attention_mask"]
        with autocast(options.bf16, device):
            if way == "together":
                written[way] = model.answer(*texts, batch["labels"], new)[1]
            else:
                model(*texts, batch["labels"])
                whole = model.generate(*(part[:, :width] for part in texts), new)
                written[way] = whole[:, width:]

    ways = ("apart", "together")
    for way in ways:
        # A GPU must be warmed up with the same shapes; on a CPU that would take minutes.
        evaluate(way, shape if device.type == "cuda" else Shape(1, 8, 2, 4), 4)
    turns = {way: lambda way=way: evaluate(way, shape, options.new) for way in ways}
    seconds = take_turns(turns, options.repeats, device)
    assert all(tokens.size(1) == options.new for tokens in written.values())
    same = (written["apart"] == written["together"]).double().mean().item()
    return [
        {
            "way": way,
            "shape": f"{shape} + {options.new}",
            "median_s_per_record": median(seconds[way]) / shape.records,
            "seconds": seconds[way],
            "share_of_same_tokens": same,
        }
        for way in ways
    ]


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table."""
    apart = rows[0]["median_s_per_record"]
    cells = [
        [
            row["way"],
            f"{row['median_s_per_record']:.4g}",
            f"{apart / row['median_s_per_record']:.2f}",
            f"{100 * row['share_of_same_tokens']:.0f} %",
        ]
        for row in rows
    ]
    print(f"\n{rows[0]['shape']}\n")
    print_table(("loss and answers", "s per record", "x apart", "same tokens"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    for name, value in (("records", 32), ("question", 362), ("latents", 6), ("answer", 12)):
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    parser.add_argument("--new", type=positive, default=12, help="tokens generated per record")
    options = parse(parser, arguments)
    check_fits(parser, shape_of(options), options.new)
    check_prompt(parser, options.question)
    rows = measure(options)
    print_rows(rows)
    write_report("evaluation", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
