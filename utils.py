"""Small helpers that every room may use: seeding, files that appear whole or not at all, sums.

Also the two facts that several modules share: the marker strings of SPEC section 2 and the error
that run.py turns into one message and exit status 2. Anything that fits a room of its own (ranks,
logging, checkpoints) does not belong here.
"""

import contextlib
import hashlib
import os
import random
from pathlib import Path

import numpy as np
import torch

START_LATENT = "<|start-latent|>"
END_LATENT = "<|end-latent|>"
LATENT = "<|latent|>"
MARKERS = (START_LATENT, END_LATENT, LATENT)


class UserError(Exception):
    """A mistake the user can mend; its text names what was got, what was wanted and the fix."""


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices); `deterministic` also forbids random kernels.

    Without `deterministic`, fp32 matrix products on GPUs may take TF32, ten bits of a mantissa in
    place of 23.

    Raises: nothing here; with `deterministic`, torch later raises RuntimeError where an operation
    has no deterministic kernel.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
    if deterministic:
        # cuBLAS reads this when its first handle is made, so it must precede any CUDA product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def print_line(text: object) -> None:
    """Print `text` on standard output at once, if it takes any.

    A log on a full disk or a reader that has gone ends no run; there is nowhere to tell of it.
    """
    with contextlib.suppress(OSError):
        print(text, flush=True)


def fsync_directory(path: Path) -> None:
    """Make the names inside directory `path` durable: a rename survives a power cut after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of file `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that a crash leaves either the old file or the new one.

    Raises: OSError or UnicodeEncodeError when it cannot be written; the old file then stays, and
    nothing else.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync_directory(path.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
