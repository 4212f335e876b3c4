"""Peak memory of one training step, each contender in its own process.

`python -m benchmarks.memory [--device cuda] [--bf16] [--records 16 ...]`. On a GPU the peak is
torch's maximum allocation; on a CPU it is the process's largest resident set minus that before the
model was built. It includes weights, gradients and AdamW's moments, which must fit too; they exist
before the measured step, and are also shown separately. With --repeats it is the highest
over that many steps.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.common import (
    architecture_of,
    build_model,
    check_fits,
    make_batch,
    new_parser,
    parse,
    positive,
    print_table,
    shape_of,
    write_report,
)
from benchmarks.contenders import add_options, coconut_around, train_step
from benchmarks.train_step import WARM_UP
from engine.memory import ModelShape, step_peaks
from engine.provenance import ROOT

BYTES_PER_PARAMETER = 16  # weight, gradient and two moments in fp32
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
SHORT = ("--records", "8", "--question", "64", "--answer", "32")
LONG = ("--records", "16", "--question", "362", "--answer", "12")
CASES = [
    (*case, *precision, "--contenders", "ours")
    for case in (SHORT, LONG, (*SHORT, "--model", "smollm2-135m"))
    for precision in ((), ("--bf16",))
]


def resident_bytes(field: str) -> int:
    """Bytes resident in this process, from /proc/self/status: VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kibibytes = next(line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kibibytes)


def measure_here(options: argparse.Namespace) -> dict:
    """The row of the single contender in `options`, measured in this process."""
    device, (name,) = torch.device(options.device), options.contenders
    base_bytes = resident_bytes("VmRSS")
    model = build_model(options.model).to(device).train()
    vocab_size, num_parameters = model.config.vocab_size, sum(p.numel() for p in model.parameters())
    step = train_step(name, model, options.bf16)
    # Ours trains a copy.
    del model
    step(make_batch(WARM_UP, vocab_size, device), WARM_UP.num_labels)
    shape = shape_of(options)
    batch = make_batch(shape, vocab_size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(options.repeats):
        step(batch, shape.num_labels)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resident_bytes("VmHWM") - base_bytes
    state = BYTES_PER_PARAMETER * num_parameters
    return {
        "model": options.model,
        "shape": str(shape),
        "contender": name,
        "precision": "bf16" if options.bf16 and name != "published" else "fp32",
        "peak_bytes": peak,
        "state_bytes": state,
        "step_bytes": peak - state,
        "estimated_bytes": estimate(options, batch) if name == "ours" else None,
    }


def estimate(options: argparse.Namespace, batch: dict[str, Tensor]) -> int:
    """What engine/memory.py takes the peak of ours to be."""
    architecture = architecture_of(options.model)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(architecture)]
    shape = ModelShape(model_class, architecture, coconut_around)
    batch = {key: tensor.cpu() for key, tensor in batch.items()}
    peaks = step_peaks(shape, batch, options.bf16, on_gpu=options.device == "cuda")
    return max(memory.peak for memory in peaks)


def measure_apart(options: argparse.Namespace) -> list[dict]:
    """A row for each contender, each measured in its own process, one after another.

    Raises: SystemExit with a message when one of them fails.
    """
    rows = []
    for name in options.contenders:
        command = [sys.executable, "-m", "benchmarks.memory", "--in-this-process"]
        command += ["--device", options.device, "--model", options.model, "--contenders", name]
        for field in ("records", "question", "latents", "answer", "repeats"):
            command += [f"--{field}", str(getattr(options, field))]
        command += ["--bf16"] if options.bf16 else []
        environment = os.environ | FREE_AT_ONCE
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise SystemExit(
                f"{name}: its process ended with status {done.returncode} (-9: killed, as when"
                " memory runs out); reduce --records"
            )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    published = next((row for row in rows if row["contender"] == "published"), None)
    for row in rows:
        for field in ("peak_bytes", "step_bytes"):
            row[f"published_over_{field}"] = published[field] / row[field] if published else None
    return rows


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table, in GiB."""

    def gib(number: int | None) -> str:
        return "-" if number is None else f"{number / 2**30:.2f}"

    def ratio(number: float | None) -> str:
        return "-" if number is None else f"{number:.2f}"

    cells = [
        [
            row["model"],
            row["shape"],
            row["contender"],
            row["precision"],
            gib(row["peak_bytes"]),
            gib(row["estimated_bytes"]),
            ratio(row["estimated_bytes"] and row["estimated_bytes"] / row["peak_bytes"]),
            gib(row["state_bytes"]),
            gib(row["step_bytes"]),
            ratio(row["published_over_peak_bytes"]),
            ratio(row["published_over_step_bytes"]),
        ]
        for row in rows
    ]
    head = ("model", "shape", "contender", "precision", "peak GiB", "estimated", "of the peak")
    head += ("weights and AdamW", "step only", "published / peak", "published / step only")
    print_table(head, cells)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_options(parser)
    for name, value in (("records", 16), ("question", 362), ("answer", 12)):
        parser.add_argument(f"--{name}", type=positive, default=value, help=f"default {value}")
    parser.add_argument("--cases", action="store_true", help="ours in six cases")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(latents=6, repeats=1)
    options = parse(parser, arguments)
    check_fits(parser, shape_of(options))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.in_this_process:
        print(json.dumps(measure_here(options)))
        return 0
    if options.cases:
        device = ("--device", options.device)
        rows = [row for case in CASES for row in measure_apart(parse_options((*case, *device)))]
    else:
        rows = measure_apart(options)
    print()
    print_rows(rows)
    write_report("memory", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
