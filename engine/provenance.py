"""Where a figure comes from: commit, versions and machine, without which it cannot be traced.

Imports no torch and uses no device.
"""

import os
import platform
import subprocess
import tomllib
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


def run_provenance(device: str, files: dict[str, tuple[int, str]]) -> dict:
    """`provenance` with the facts of one run.

    device: a description of what it computes on.
    files: by configuration key, the number of records used of a file and its SHA-256.
    """
    data = {key: {"records": n, "sha256": sha256} for key, (n, sha256) in files.items()}
    return provenance() | {"device": device, "data": data}


def provenance_lines(found: dict) -> list[str]:
    """The facts of `run_provenance`, one a line."""
    changed = " with changed files" if found["changed"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"commit: {found['commit']}{changed}",
        f"versions: {versions}",
        f"machine: {found['machine']}",
        f"device: {found['device']}",
        *(
            f"{key}: {file['records']} records, sha256 {file['sha256']}"
            for key, file in found["data"].items()
        ),
    ]


def source_commit() -> tuple[str, bool]:
    """The commit of this source tree and whether tracked files differ from it.

    A copy without .git takes the environment variable COMMIT, else "unknown".
    """
    try:
        # A copy inside another repository would otherwise report that repository's commit.
        _git("ls-files", "--error-unmatch", "run.py")
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
    found = {"coconut": _project_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _project_version() -> str:
    """The version in pyproject.toml, which need not be installed."""
    try:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        return project["project"]["version"]
    except (OSError, LookupError):
        return "unknown"


def machine_name() -> str:
    """Processor, cores that this process may use, and best instruction set, as text."""
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
