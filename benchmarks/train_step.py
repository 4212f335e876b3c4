"""Seconds per training step of the published algorithm, a prototype and ours, taking turns.

`python -m benchmarks.train_step [--device cuda] [--bf16] [--records 8 --question 64 ...]`. A step
is forward, backward and AdamW over one batch without padding; dropout is on, as in training.
Without shape options the two shapes with a goal are measured: a short one and ProsQA's. The floor
is the minimum FLOPs (benchmarks/arithmetic.py) divided by the rate of a matrix product that also
takes turns. With --bf16 the published algorithm still computes in fp32, all it supports.

`--as-on-gpu --model narrow` estimates on a CPU the host's time for a GPU's step.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from benchmarks import arithmetic
from benchmarks.common import (
    Shape,
    build_model,
    check_fits,
    make_batch,
    median,
    new_parser,
    parse,
    positive,
    print_table,
    take_turns,
    write_report,
)
from benchmarks.contenders import add_options, train_step
from benchmarks.environment import MatrixProduct
from layers import as_on_gpu

SHAPES = (Shape(8, 64, 6, 32), Shape(16, 362, 6, 12))
WARM_UP = Shape(1, 8, 2, 4)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """Add --records, --question and --answer; if none is given, nor --latents, SHAPES apply."""
    group = parser.add_argument_group("shape, in place of the two with a goal")
    for name, value in zip(("records", "question", "answer"), (8, 64, 32), strict=True):
        group.add_argument(f"--{name}", type=positive, help=f"default {value}")


def chosen_shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    """The shapes to measure."""
    names = ("records", "question", "latents", "answer")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not given:
        return SHAPES
    return (Shape(**{name: given.get(name, getattr(SHAPES[0], name)) for name in names}),)


def measure(options: argparse.Namespace, shape: Shape) -> list[dict]:
    """A row for each contender, with its seconds in all turns and the floor."""
    device = torch.device(options.device)
    model = build_model(options.model).to(device).train()
    vocab_size = model.config.vocab_size
    steps = {name: train_step(name, model, options.bf16) for name in options.contenders}
    batch = make_batch(shape, vocab_size, device)
    # A GPU must be warmed up with the same shape; on a CPU that would take minutes.
    warm_up = shape if device.type == "cuda" else WARM_UP
    warm_up_batch = make_batch(warm_up, vocab_size, device)
    for step in steps.values():
        step(warm_up_batch, warm_up.num_labels)
    product = MatrixProduct(device, torch.bfloat16 if options.bf16 else torch.float32)
    product()
    turns = {name: lambda step=step: step(batch, shape.num_labels) for name, step in steps.items()}
    seconds = take_turns({"product": product, **turns}, options.repeats, device)
    rate = product.flops / median(seconds.pop("product"))
    flops = arithmetic.step_flops(
        model, shape.records, shape.length, shape.answer, shape.num_unneeded()
    )
    return rows_of(seconds, flops / rate, rate, shape, options.bf16)


def rows_of(
    seconds: dict[str, list[float]], floor_s: float, rate: float, shape: Shape, bf16: bool
) -> list[dict]:
    """The rows of a table from the turns: median, speedup over published, and floor.

    rate: FLOPs per second of the matrix product, in the precision of ours.
    """
    medians = {name: median(values) for name, values in seconds.items()}
    published = medians.get("published")
    return [
        {
            "shape": str(shape),
            "contender": name,
            "precision": "bf16" if bf16 and name != "published" else "fp32",
            "median_s": middle,
            "seconds": seconds[name],
            "times_published": published / middle if published else None,
            "floor_s": floor_s,
            "share_of_floor": floor_s / middle,
            "matrix_flops_per_s": rate,
        }
        for name, middle in medians.items()
    ]


def print_rows(rows: list[dict]) -> None:
    """Print the rows of one shape as a table."""
    first = rows[0]
    print(f"\n{first['shape']}: matrix products {first['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s\n")
    published_s = next((row["median_s"] for row in rows if row["contender"] == "published"), None)
    times = f"{published_s / first['floor_s']:.2f}" if published_s else "-"
    cells = [
        [
            row["contender"],
            row["precision"],
            f"{row['median_s']:.4g}",
            f"{min(row['seconds']):.4g} to {max(row['seconds']):.4g}",
            f"{row['times_published']:.2f}" if row["times_published"] else "-",
            f"{100 * row['share_of_floor']:.0f} %",
        ]
        for row in rows
    ]
    cells.append(["floor", "", f"{first['floor_s']:.4g}", "", times, ""])
    head = ("contender", "precision", "median s", "range s", "x published", "floor / median")
    print_table(head, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_shape_options(parser)
    add_options(parser)
    parser.add_argument("--as-on-gpu", action="store_true", help="ours takes a GPU's code path")
    options = parse(parser, arguments)
    for shape in chosen_shapes(options):
        check_fits(parser, shape)
    rows = []
    for shape in chosen_shapes(options):
        with as_on_gpu() if options.as_on_gpu else nullcontext():
            rows += (measured := measure(options, shape))
        print_rows(measured)
    write_report("train_step", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
