"""The machine a benchmark ran on: its description, and how fast it multiplies matrices.

The FLOPs of benchmarks/arithmetic.py are divided by the matrix rate to give the floor, so the rate
is measured like any contender, taking turns with them.
"""

import os
import platform
from datetime import UTC, datetime

import torch
import transformers

from engine.provenance import processor_name, provenance
from layers import linear

# Large enough to reach the machine's full rate, small enough to take turns.
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}


class MatrixProduct:
    """A product of square matrices on `device`, in `dtype`; each call multiplies once."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        size = MATRIX_SIZES[device.type]
        self.left, self.right = torch.randn(2, size, size, device=device, dtype=dtype)
        self.flops = 2 * size**3

    def __call__(self) -> None:
        linear(self.left, self.right)


def describe(device: torch.device) -> dict:
    """The machine, versions and commit, as JSON values."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        # Other jobs add noise: the load before the benchmark says how far to trust it.
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The abbreviated commit of this tree, followed by "+dirty" if files differ."""
    source = provenance()
    return source["commit"][:9] + "+dirty" * source["changed"]
