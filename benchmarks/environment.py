"""The machine that a benchmark ran on: what it is, and how fast it multiplies matrices.

The matrix rate is what every lower limit of benchmarks/arithmetic.py is divided by, so it is
measured and takes its turns on the clock like any contender.
"""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
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


def processor_name() -> str:
    """The processor as /proc/cpuinfo names it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of this tree, "+dirty" behind it where files differ.

    A copy without .git takes the environment variable COMMIT, else "unknown".
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        return name + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
