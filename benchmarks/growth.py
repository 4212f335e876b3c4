"""How the cost of our training step grows, compared with the floor: tables and a plot.

`python -m benchmarks.growth [--device cuda] [--bf16] [--out FILE.json]`. One thing changes at a
time: latents, records, question length, model size or window. A PNG next to the JSON plots each
with the floor: the minimum FLOPs divided by the rate of a matrix product that takes turns at every
point (the median over an axis).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
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
    report_path,
    shape_of,
    take_turns,
    write_report,
)
from benchmarks.contenders import train_step
from benchmarks.environment import MatrixProduct

LABELS = {
    "latents": "latents K",
    "records": "records per batch",
    "question": "question tokens",
    "size": "parameters in the blocks",
    "window": "window m",
}
POINTS = {
    "latents": tuple(range(13)),
    "records": (1, 2, 4, 8, 16, 32),
    "question": (16, 32, 64, 128, 256, 512),
    "window": (1, 2, 3, 5, 8),
}
# (layers, width)
SIZES = {
    "gpt2": ((3, 192), (6, 384), (9, 576), (12, 768), (24, 1024)),
    "tiny": ((1, 64), (2, 64), (4, 64)),
}
DEFAULT_WINDOW = 3
HEAD_WIDTH = 64
OURS, FLOOR = "#0072b2", "#5b616b"


def points(axis: str, base: Shape, model: str) -> Iterator[tuple[Shape, dict, int]]:
    """(shape, model fields that change, window) at each point of an axis."""
    if axis == "size":
        for layers, width in SIZES[model]:
            fields = {"n_layer": layers, "n_embd": width, "n_head": width // HEAD_WIDTH}
            yield base, fields, DEFAULT_WINDOW
    else:
        for value in POINTS[axis]:
            if axis == "window":
                yield base, {}, value
            else:
                yield replace(base, **{axis: value}), {}, DEFAULT_WINDOW


def measure_point(options: argparse.Namespace, shape: Shape, fields: dict, window: int) -> dict:
    """Measure one point: seconds and FLOPs of our step and of a matrix product."""
    device = torch.device(options.device)
    model = build_model(options.model, **fields).to(device).train()
    step = train_step("ours", model, options.bf16, window)
    batch = make_batch(shape, model.config.vocab_size, device)
    product = MatrixProduct(device, torch.bfloat16 if options.bf16 else torch.float32)
    work = {"product": product, "ours": lambda: step(batch, shape.num_labels)}
    take_turns(work, 3 if device.type == "cuda" else 1, device)  # warm up
    seconds = take_turns(work, options.repeats, device)
    return {
        "shape": str(shape),
        "window": window,
        "block_parameters": arithmetic.block_parameters(model),
        "median_s": median(seconds["ours"]),
        "seconds": seconds["ours"],
        "flops": arithmetic.step_flops(
            model, shape.records, shape.length, shape.answer, shape.num_unneeded(window)
        ),
        "product_seconds": seconds["product"],
        "product_flops": product.flops,
    }


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each point of each axis; every axis is printed once it is finished."""
    base = shape_of(options)
    rows = []
    for axis in options.axes:
        axis_rows = []
        for shape, fields, window in points(axis, base, options.model):
            row = measure_point(options, shape, fields, window)
            named = {"size": row["block_parameters"], "window": window}
            value = named[axis] if axis in named else getattr(shape, axis)
            axis_rows.append({"axis": axis, "value": value} | row)
        rate = axis_rows[0]["product_flops"] / median(
            [s for r in axis_rows for s in r["product_seconds"]]
        )
        for row in axis_rows:
            row["floor_s"] = row["flops"] / rate
            row["share_of_floor"] = row["floor_s"] / row["median_s"]
        print_axis(axis, axis_rows)
        rows += axis_rows
    return rows


def print_axis(axis: str, rows: list[dict]) -> None:
    """Print the points of one axis as a table."""
    cells = [
        [
            row["value"],
            f"{row['median_s']:.4g}",
            f"{row['floor_s']:.4g}",
            f"{100 * row['share_of_floor']:.0f} %",
        ]
        for row in rows
    ]
    print()
    print_table((LABELS[axis], "median s", "floor s", "floor / median"), cells)


def draw(rows: list[dict], path: Path) -> None:
    """Plot a panel for each axis: our seconds and the floor."""
    names = [axis for axis in LABELS if any(row["axis"] == axis for row in rows)]
    figure, panels = plt.subplots(
        1, len(names), figsize=(3.4 * len(names), 3.2), dpi=120, layout="constrained", squeeze=False
    )
    for axis, panel in zip(names, panels[0], strict=True):
        axis_rows = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in axis_rows]
        for field, label, color in (("median_s", "ours", OURS), ("floor_s", "floor", FLOOR)):
            seconds = [row[field] for row in axis_rows]
            panel.plot(values, seconds, marker="o", markersize=3, color=color, label=label)
        panel.set(xlabel=LABELS[axis], ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("seconds per step")
    panels[0][0].legend()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    for name, value in (("records", 8), ("question", 64), ("latents", 6), ("answer", 32)):
        parser.add_argument(
            f"--{name}", type=positive, default=value, help=f"where it is not the axis ({value})"
        )
    parser.add_argument("--axes", nargs="+", choices=tuple(LABELS), default=list(LABELS))
    options = parse(parser, arguments)
    for axis in options.axes:
        for shape, _, _ in points(axis, shape_of(options), options.model):
            check_fits(parser, shape)
    rows = measure(options)
    write_report("growth", options, rows)
    plot = report_path("growth", options).with_suffix(".png")
    draw(rows, plot)
    print(plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
