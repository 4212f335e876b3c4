"""What made a figure: commit, versions and machine. A result without them cannot be traced.

Imports no torch.distributed and asks no device to do anything.
"""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "numpy")
# Instruction sets that change how a CPU rounds or how fast it multiplies, the best first.
INSTRUCTION_SETS = {"avx512_bf16": "AVX512 with bf16", "avx512f": "AVX512", "avx2": "AVX2"}
# Folders whose files are made by runs and change no result.
OUTPUTS = ("results", "exps", "data", "wandb")


@cache
def provenance() -> dict:
    """Commit, whether the source differs from it, versions and machine, as JSON values.

    Collected once: a process runs the source that it began with.
    """
    name, changed = source_commit()
    return {
        "commit": name,
        "changed": changed,
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": machine_name(),
    }


def source_commit() -> tuple[str, bool]:
    """The commit of this source tree and whether tracked files differ from it.

    A copy without .git takes the environment variable COMMIT, else "unknown".
    """
    try:
        name = _git("rev-parse", "HEAD")
        excluded = [f":(exclude){folder}" for folder in OUTPUTS]
        status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
        return name, bool(status)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown"), False


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def machine_name() -> str:
    """Processor, cores that this process may use, and instruction sets, in words."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    parts = [processor_name(), f"{cores} core{'s' * (cores > 1)}"]
    flags = _cpuinfo("flags").split()
    parts += [name for flag, name in INSTRUCTION_SETS.items() if flag in flags][:1]
    return ", ".join(parts)


def processor_name() -> str:
    """The processor as /proc/cpuinfo names it, elsewhere as Python does."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    values = (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key))
    return next(values, "")
