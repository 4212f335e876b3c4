"""What every module may use: errors that a user sees, the logger, atomic files, checksums.

Imports no torch, so that a mistake in a command or a file is reported within a second.
"""

import contextlib
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

MAX_FAULTS = 10
MAX_QUOTED = 80
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class ReportedError(Exception):
    """Ends the program with its text as the only message, without a traceback.

    exit_status: of the process that it ends.
    """

    exit_status = EXIT_FAILED


class UserError(ReportedError):
    """A mistake that the user can fix; the text names what was found, what was wanted, the fix."""

    exit_status = EXIT_USER_ERROR


class ConfigError(UserError):
    """Every problem found in a configuration, one a line, each with its fix."""


class RunFailed(ReportedError):
    """The run cannot continue, through no mistake in its configuration; the text says why."""


class Stopped(ReportedError):
    """The user asked the run to stop, and it did so after saving what it had."""

    exit_status = EXIT_INTERRUPTED


# torchrun kills the other processes of a machine as soon as one has failed.
FIRST_PROCESS_TIMEOUT_S = 10.0


def quote(text: str) -> str:
    """`text` as a Python literal, truncated to MAX_QUOTED characters."""
    return repr(text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "...")


def raise_faults(path: str, faults: Sequence[str], fix: str = "") -> None:
    """Raise one UserError that shows the first MAX_FAULTS of `faults`, their count and `fix`.

    Nothing happens without faults. `path` names the file that has them.
    """
    end = f"; {fix}" if fix else ""
    lines = [f"{path}: {fault}" for fault in faults[:MAX_FAULTS]]
    if len(faults) > 1:
        raise UserError("\n".join([*lines, f"{path}: {len(faults)} faults in all{end}"]))
    if faults:
        raise UserError(lines[0] + end)


log = logging.getLogger("coconut")


class _ConsoleHandler(logging.Handler):
    """Writes lines above progress bars: errors to standard error, all else to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        # A message may quote an untrusted file, whose control characters a terminal would obey.
        text = "".join(
            c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in self.format(record)
        )
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        # A full disk or a closed pipe must not end a run.
        with contextlib.suppress(OSError):
            tqdm.write(text, file=stream)
            stream.flush()


def configure_logging(rank: int = 0) -> None:
    """Let the logger print on rank 0 and stay silent on all other ranks; may be called again."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
    log.setLevel(logging.INFO if rank == 0 else logging.CRITICAL + 1)


def run_command(work: Callable[[], object], interrupted: str) -> int:
    """Do the work of a command; where it ends early, log why. Returns the exit status.

    interrupted: what a Ctrl-C leaves behind.
    """
    try:
        work()
    except KeyboardInterrupt:
        log.error(f"interrupted; {interrupted}")
        return EXIT_INTERRUPTED
    except ReportedError as error:
        log.error(error)
        return error.exit_status
    return 0


def wait_for_first_process() -> None:
    """Before the ranks have met, give this machine's first process time to print the error."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(FIRST_PROCESS_TIMEOUT_S)


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
