"""Where the time of our training step goes: torch's profiler, its operations grouped by kind.

`python -m benchmarks.breakdown [--device cuda] [--bf16] [--records 8 ...]`. Time is that of the
operations themselves (on a GPU, of their kernels). The difference from the step's wall-clock time,
spent in Python and kernel launches, is shown as "between operations".
"""

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    Shape,
    build_model,
    check_fits,
    make_batch,
    new_parser,
    parse,
    positive,
    print_table,
    shape_of,
    synchronize,
    write_report,
)
from benchmarks.contenders import train_step
from benchmarks.train_step import WARM_UP

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
MATRICES, NARROW = "matrices, many columns", "matrices, one column per record"
LOGITS, SUMS = "logits and cross-entropy", "sums of the passes' weight gradients"
EMBEDDING, ACTIVATION = "gradient of the tied embedding", "activation of the MLP"
REST = "other element-wise, views"
# Part of an operation's name -> kind; tried in this order if the shapes do not decide.
KINDS = {
    "adam": "optimizer",
    "scaled_dot_product": "attention",
    "flash": "attention",
    "efficient_attention": "attention",
    "bmm": "attention",
    "_softmax_backward": "attention",
    "aten::_softmax": "attention",
    "dropout": "dropout",
    "random_": "dropout",
    "gelu": ACTIVATION,  # before "aten::ge", which is part of its name
    "aten::ge": "dropout",
    "layer_norm": "norms",
    "aten::cat": "copies (cache, thoughts)",
    "aten::copy_": "copies (cache, thoughts)",
    "index": "copies (cache, thoughts)",
    "linalg_vector_norm": "gradient norm",
    "foreach_norm": "gradient norm",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the vocabulary, the MLP's inner layer and the batch, which identify operations."""

    vocab: int
    inner: int
    records: int


def kind_of(name: str, shapes: Iterable[list[int]], sizes: Sizes) -> str:
    """The kind of an operation, from its name and the shapes of its inputs."""
    shapes = [shape for shape in shapes if shape]
    if name in PRODUCTS:
        if any(sizes.vocab in shape for shape in shapes):
            return LOGITS
        # A product over as many rows as there are records reads a single column.
        return NARROW if any(sizes.records in shape for shape in shapes) else MATRICES
    if shapes and "adam" not in name:
        first = shapes[0]
        if len(first) == 2 and first[0] == sizes.vocab:
            return EMBEDDING
        if len(first) == 2 and first[1] == sizes.vocab:
            return LOGITS
        if len(first) == 3 and first[2] == sizes.inner:
            return ACTIVATION
        if len(first) == 2 and name == "aten::add_" and shapes.count(first) == 2:
            return SUMS
    return next((kind for part, kind in KINDS.items() if part in name), REST)


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each kind: mean seconds per step, and their share of the wall-clock time."""
    device = torch.device(options.device)
    model = build_model(options.model).to(device).train()
    vocab_size = model.config.vocab_size
    step = train_step("ours", model, options.bf16)
    shape = shape_of(options)
    batch = make_batch(shape, vocab_size, device)
    warm_up = shape if device.type == "cuda" else WARM_UP
    for _ in range(2):
        step(make_batch(warm_up, vocab_size, device), warm_up.num_labels)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step_s = []
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(options.repeats):
            synchronize(device)
            began = time.perf_counter()
            step(batch, shape.num_labels)
            synchronize(device)
            step_s.append(time.perf_counter() - began)
    inner = model.config.n_inner or 4 * model.config.hidden_size
    return rows_of(profiler, step_s, shape, Sizes(vocab_size, inner, shape.records), device)


def rows_of(
    profiler: profile, step_s: list[float], shape: Shape, sizes: Sizes, device: torch.device
) -> list[dict]:
    """A row for each kind, the longest first."""
    totals: dict[str, list[float]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        # On a GPU a kernel's time is reported twice: with the operation and on its own.
        if event.key.startswith(("aten::", "mkldnn::")):
            on_gpu = device.type == "cuda"
            self_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kind = kind_of(event.key, event.input_shapes, sizes)
            total = totals.setdefault(kind, [0, 0])
            total[0] += self_us / 1e6 / len(step_s)
            total[1] += event.count / len(step_s)
    mean_s = sum(step_s) / len(step_s)
    totals["between operations"] = [mean_s - sum(seconds for seconds, _ in totals.values()), 0]
    return [
        {"shape": str(shape), "kind": kind, "s": s, "calls": calls, "share": s / mean_s}
        for kind, (s, calls) in sorted(totals.items(), key=lambda item: -item[1][0])
    ]


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table."""
    cells = [
        [row["kind"], f"{row['s']:.4g}", f"{100 * row['share']:.1f} %", f"{row['calls']:.0f}"]
        for row in rows
    ]
    cells.append(["whole step", f"{sum(row['s'] for row in rows):.4g}", "", ""])
    print_table(("where", "s per step", "share", "operations"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    for name, value in (("records", 8), ("question", 64), ("latents", 6), ("answer", 32)):
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    options = parse(parser, arguments)
    check_fits(parser, shape_of(options))
    rows = measure(options)
    print(f"\n{rows[0]['shape']}\n")
    print_rows(rows)
    write_report("breakdown", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
