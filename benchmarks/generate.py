"""Seconds per record of greedy generation: published one by one, the others in a batch.

`python -m benchmarks.generate [--device cuda] [--bf16] [--records 128]`. Every record has a
question and latents, and gets exactly --new more tokens. The published algorithm takes one record
at a time, so a few (--published-records) suffice to measure its cost per record. The floor is the
minimum FLOPs of a record divided by the rate of a matrix product that takes turns with the others.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import arithmetic
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
    take_turns,
    write_report,
)
from benchmarks.contenders import add_options, generation
from benchmarks.environment import MatrixProduct


def prompt_shape(options: argparse.Namespace) -> Shape:
    """The shape of what is read before the first new token."""
    # A prompt must not end with a latent, so the question's last token ends it.
    return Shape(options.records, options.question - 1, options.latents, 1)


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each contender: seconds per record in all turns, and how its tokens compare."""
    device = torch.device(options.device)
    model = build_model(options.model).to(device).eval()
    shape = prompt_shape(options)
    prompts = make_batch(shape, model.config.vocab_size, device)["input_ids"]
    writers = {name: generation(name, model, options.bf16) for name in options.contenders}
    parts = {name: prompts for name in writers}
    if "published" in parts:
        parts["published"] = prompts[: options.published_records]
    written: dict[str, Tensor] = {}

    def write(name: str, new: int) -> None:
        written[name] = writers[name](parts[name], new)

    for name in writers:
        # A GPU must be warmed up with the same shapes; on a CPU that would take minutes.
        write(name, options.new if device.type == "cuda" else 1)
    product = MatrixProduct(device, torch.bfloat16 if options.bf16 else torch.float32)
    product()
    turns = {name: lambda name=name: write(name, options.new) for name in writers}
    seconds = take_turns({"product": product, **turns}, options.repeats, device)
    rate = product.flops / median(seconds.pop("product"))
    assert all(tokens.size(1) == shape.length + options.new for tokens in written.values())
    new = {name: tokens[:, shape.length :] for name, tokens in written.items()}
    each = {name: [s / len(parts[name]) for s in values] for name, values in seconds.items()}
    flops = arithmetic.generation_flops(model, 1, shape.length, options.new, shape.num_unneeded())
    floor_s = flops / rate
    return [
        {
            "contender": name,
            "precision": "bf16" if options.bf16 and name != "published" else "fp32",
            "batch_size": 1 if name == "published" else len(parts[name]),
            "median_s_per_record": median(values),
            "seconds_per_record": values,
            "floor_s_per_record": floor_s,
            "share_of_same_tokens": share_of_same(new[name], next(iter(new.values()))),
            "matrix_flops_per_s": rate,
        }
        for name, values in each.items()
    ]


def share_of_same(tokens: Tensor, others: Tensor) -> float:
    """The share of equal tokens in the rows that both have."""
    common = min(len(tokens), len(others))
    return (tokens[:common] == others[:common]).double().mean().item()


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table, with the floor last."""
    floor_s = rows[0]["floor_s_per_record"]
    published = {row["contender"]: row["median_s_per_record"] for row in rows}.get("published")
    cells = [
        [
            row["contender"],
            row["precision"],
            row["batch_size"],
            f"{row['median_s_per_record']:.4g}",
            f"{published / row['median_s_per_record']:.1f}" if published else "-",
            f"{100 * floor_s / row['median_s_per_record']:.0f} %",
            f"{100 * row['share_of_same_tokens']:.0f} %",
        ]
        for row in rows
    ]
    times = f"{published / floor_s:.1f}" if published else "-"
    cells.append(["floor", "", "", f"{floor_s:.4g}", times, "", ""])
    head = ("contender", "precision", "batch", "s per record", "x published", "floor / median")
    print_table((*head, "same tokens"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--records", type=positive, default=128, help="generated together")
    parser.add_argument("--question", type=positive, default=64, help="tokens, markers included")
    parser.add_argument("--new", type=positive, default=32, help="tokens to generate")
    parser.add_argument("--published-records", type=positive, default=2)
    add_options(parser)
    parser.set_defaults(latents=6)
    options = parse(parser, arguments)
    check_fits(parser, prompt_shape(options), options.new)
    check_prompt(parser, options.question)
    rows = measure(options)
    print(f"\nmatrix products {rows[0]['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s\n")
    print_rows(rows)
    write_report("generate", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
