"""Kernels that our training step would launch on a GPU, and their cost beside its arithmetic.

`python -m benchmarks.launches [--bf16] [--model NAME] [--records 8 ...]`. Nothing is timed and no
GPU is needed: one step of the trainer (forward, backward, AdamW) runs on the CPU over tensors that
have shapes and no storage, and the operations that torch dispatches are counted, except those that
only make views or reserve memory. Each is taken for one launch, which occupies the host for
LAUNCH_S. A few are two or three kernels on a GPU, so this is the least that a step launches.

Where the CPU differs from a GPU, the count follows the GPU (layers.as_on_gpu): a dropout is one
operation, the logits come in a GPU's blocks, and attention is one operation, without dropout,
which the CPU's kernel lacks.

The rates are the peaks of NVIDIA's data sheets of the SXM modules, half of what these give for
sparse matrices: https://www.nvidia.com/en-us/data-center/h100/ and .../h200/. fp32 products use
TF32, as in training. Memory is that of the weights alone: each pass reads those of the blocks
forward and backward, and AdamW reads weight, gradient and moments and writes all but the gradient.
A step takes at least the longer of arithmetic and memory. Where launches take longer than both, a
GPU waits for the host even at its peak, and CUDA graphs are needed to come near it.
"""

from collections import Counter
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import arithmetic
from benchmarks.common import (
    LLAMA,
    Shape,
    architecture_of,
    build_model,
    check_fits,
    make_batch,
    new_parser,
    parse,
    print_table,
    write_report,
)
from benchmarks.contenders import coconut_around, make_trainer
from benchmarks.train_step import add_shape_options, chosen_shapes
from coconut import Layout
from engine.memory import ATTENTION_DROPOUTS, fake_layout
from engine.trainer import Trainer
from layers import as_on_gpu

LAUNCH_S = 5e-6
# FLOPs per second by precision, and bytes per second of memory.
PEAKS = {"bf16": 989.4e12, "fp32": 494.7e12}
BANDWIDTHS = {"H100": 3.35e12, "H200": 4.8e12}
BYTES = {"bf16": 2, "fp32": 4}
BYTES_OF_ADAMW = 7 * 4  # for each parameter, always in fp32
RESERVING = ("aten::empty", "aten::new_empty")


class LaunchCounter(TorchDispatchMode):
    """Within, counts the operations that would launch a kernel; `counts`: name -> how often.

    Tensors without storage have no numbers: whoever asks for one is told 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        result = func(*args, **(kwargs or {}))
        if launches(func, tree_leaves((args, kwargs)), tree_leaves(result)):
            self.counts[func._schema.name] += 1
        return result


def launches(func: OpOverload, given: list, returned: list) -> bool:
    """Whether an operation that was given and returned these values would launch a kernel."""
    schema = func._schema
    if schema.name.startswith(RESERVING):
        return False
    if schema.is_mutable:
        return True
    # A view's results share storage with what it was given; not every schema tells.
    storages = {x.untyped_storage()._cdata for x in given if isinstance(x, Tensor)}
    made = [x for x in returned if isinstance(x, Tensor)]
    return any(x.untyped_storage()._cdata not in storages for x in made)


def count_launches(
    trainer: Trainer, batch: dict[str, Tensor], layout: Layout, num_labels: int
) -> Counter[str]:
    """The operations of one step by name, once AdamW has its moments.

    layout: of the batch, which a step makes on the CPU whatever the device; not counted.
    """
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    # Torch handles all gradients by one operation only if it knows their type.
    know_type = mock.patch.object(_foreach_utils, "_foreach_supported_types", types)
    keep_layout = mock.patch.object(trainer.model, "layout", lambda *_: layout)
    with know_type, keep_layout, as_on_gpu():
        for _ in range(2):
            with LaunchCounter() as counter:
                trainer.train_step([batch], num_labels, [None])
    return counter.counts


def measure(name: str, shape: Shape, bf16: bool) -> list[dict]:
    """A row for each GPU with what a step of the named model costs there at least, in seconds."""
    architecture = architecture_of(name)
    off = {field: 0.0 for field in ATTENTION_DROPOUTS if hasattr(architecture, field)}
    with FakeTensorMode() as fake:
        model = build_model(name, **off)
        trainer = make_trainer(coconut_around(model), bf16)
    batch = make_batch(shape, architecture.vocab_size, torch.device("cpu"))
    layout = trainer.model.layout(batch["input_ids"], batch["attention_mask"], batch["labels"])
    batch = {key: fake.from_tensor(tensor) for key, tensor in batch.items()}
    with fake:
        counts = count_launches(trainer, batch, fake_layout(fake, layout), shape.num_labels)
    precision = "bf16" if bf16 else "fp32"
    num_passes = shape.latents + 1
    flops = arithmetic.step_flops(
        model, shape.records, shape.length, shape.answer, shape.num_unneeded()
    )
    weights = num_passes * arithmetic.block_parameters(model)
    weights += model.get_output_embeddings().weight.numel()
    num_bytes = 2 * BYTES[precision] * weights + BYTES_OF_ADAMW * model.num_parameters()
    launch_s, flops_s = LAUNCH_S * counts.total(), flops / PEAKS[precision]
    return [
        {
            "model": name,
            "shape": str(shape),
            "precision": precision,
            "gpu": gpu,
            "operations": counts.total(),
            "launch_s": launch_s,
            "flops": flops,
            "arithmetic_s": flops_s,
            "weight_bytes": num_bytes,
            "memory_s": num_bytes / bandwidth,
            "launches_over_longer": launch_s / max(flops_s, num_bytes / bandwidth),
            "counts": dict(counts.most_common()),
        }
        for gpu, bandwidth in BANDWIDTHS.items()
    ]


def print_rows(rows: list[dict]) -> None:
    """Print the rows as a table, in milliseconds."""
    cells = [
        [
            row["model"],
            row["shape"],
            row["precision"],
            row["gpu"],
            f"{row['operations']:,}",
            *(f"{1e3 * row[name]:.3g}" for name in ("launch_s", "arithmetic_s", "memory_s")),
            f"{'yes' if row['launches_over_longer'] > 1 else 'no'},"
            f" {row['launches_over_longer']:.2g} x",
        ]
        for row in rows
    ]
    head = ("model", "shape", "precision", "GPU", "operations", "launches ms", "arithmetic ms")
    print_table((*head, "weights ms", "launches longer than both"), cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__)
    add_shape_options(parser)
    parser.add_argument("--latents", type=int, choices=range(65), metavar="K", help="default 6")
    parser.set_defaults(model=None)
    options = parse(parser, arguments, is_timed=False)
    shapes = chosen_shapes(options)
    for shape in shapes:
        check_fits(parser, shape)
    names = [options.model] if options.model else ["gpt2", LLAMA]
    rows = [row for name in names for shape in shapes for row in measure(name, shape, options.bf16)]
    print(f"\ncounted on the CPU, {1e6 * LAUNCH_S:.0f} us a launch, GPUs at their peaks\n")
    print_rows(rows)
    write_report("launches", options, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
