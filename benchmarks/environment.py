"""The machine that a benchmark ran on: what it is, and how fast it multiplies matrices.

The matrix rate is what every lower limit of benchmarks/arithmetic.py is divided by, so it is
measured and takes its turns on the clock like any contender.
"""

import os
import platform
from datetime import UTC, datetime

import torch
import transformers

from engine.provenance import processor_name, provenance

# Wide enough that a product runs at the machine's full rate, short enough to take turns.
MATRIX_SIZES = {"cpu": 2048, "cuda": 8192}


class MatrixProduct:
    """One product of square matrices on `device`, in `dtype`; called, it multiplies once."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        size = MATRIX_SIZES[device.type]
        self.left, self.right = torch.randn(2, size, size, device=device, dtype=dtype)
        self.product = torch.empty_like(self.left)
        self.flops = 2 * size**3

    def __call__(self) -> None:
        torch.mm(self.left, self.right, out=self.product)


def describe(device: torch.device) -> dict:
    """Machine, versions and commit, as JSON values."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        # Other jobs disturb; what there were before ours began tells how much to trust it.
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of this tree in short, "+dirty" behind it where files differ."""
    source = provenance()
    return source["commit"][:9] + "+dirty" * source["changed"]
