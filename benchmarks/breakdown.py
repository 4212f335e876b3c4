"""Where the time of our training step goes: torch's profiler, its operations put into a few kinds.

`python -m benchmarks.breakdown [--device cuda] [--bf16] [--records 8 ...]`. Time is that of the
operations themselves (on a GPU of their kernels); what lies between them, Python and launches, is
the difference to the step's time on the clock, shown as "between operations".
"""

import argparse
from collections.abc import Iterable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    build_model,
    check_fits,
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
from benchmarks.contenders import train_step
from benchmarks.train_step import WARM_UP

PRODUCTS = ("mm", "addmm", "linear")
# Parts of operations' names -> kind, tried in this order; products are told apart by their shape.
KINDS = {
    "adam": "optimizer",
    "scaled_dot_product": "attention",
    "flash": "attention",
    "efficient_attention": "attention",
    "bmm": "attention",
    "_softmax_backward": "attention",
    "aten::_softmax": "attention",
    "log_softmax": "logits and cross-entropy",
    "nll_loss": "logits and cross-entropy",
    "dropout": "dropout",
    "bernoulli": "dropout",
    "layer_norm": "norms and activations",
    "tanh": "norms and activations",
    "gelu": "norms and activations",
    "pow": "norms and activations",
    "aten::cat": "copies (cache, thoughts)",
    "aten::copy_": "copies (cache, thoughts)",
    "index": "copies (cache, thoughts)",
    "linalg_vector_norm": "gradient norm",
    "foreach_norm": "gradient norm",
}
REST = "other element-wise"
MATRICES, LOGITS = "matrices of the blocks", "logits and cross-entropy"


def kind_of(name: str, shapes: Iterable, vocab_size: int) -> str:
    """The kind of an operation, from its name and the shapes of what it takes."""
    if name.removeprefix("aten::") in PRODUCTS:
        return LOGITS if any(vocab_size in shape for shape in shapes if shape) else MATRICES
    lowered = name.lower()
    return next((kind for part, kind in KINDS.items() if part in lowered), REST)


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each kind: seconds in a step, and their share of the step's time on the clock."""
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
    clock = []
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(options.repeats):
            work = {"ours": lambda: step(batch, shape.num_labels)}
            clock += take_turns(work, 1, device)["ours"]
    totals: dict[str, list[float]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        # On a GPU a kernel's time is told once with the operation and once by itself.
        if event.key.startswith("aten::"):
            on_gpu = device.type == "cuda"
            self_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            total = totals.setdefault(kind_of(event.key, event.input_shapes, vocab_size), [0, 0])
            total[0] += self_us / 1e6 / options.repeats
            total[1] += event.count / options.repeats
    step_s = median(clock)
    totals["between operations"] = [step_s - sum(seconds for seconds, _ in totals.values()), 0]
    return [
        {"shape": str(shape), "kind": kind, "s": s, "calls": calls, "share": s / step_s}
        for kind, (s, calls) in sorted(totals.items(), key=lambda item: -item[1][0])
    ]


def print_rows(rows: list[dict]) -> None:
    """The rows as a table."""
    cells = [
        [row["kind"], f"{row['s']:.4g}", f"{100 * row['share']:.1f} %", f"{row['calls']:.0f}"]
        for row in rows
    ]
    cells.append(["the whole step", f"{sum(row['s'] for row in rows):.4g}", "", ""])
    print_table(("where", "s a step", "share", "operations"), cells)


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
