"""The run directory: one run at a time, other files left alone, directories written atomically.

Leaves what a checkpoint or a training state holds to checkpoint.py. Imports no torch, so that a
directory that cannot be used is refused before anything heavy loads.
"""

import errno
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from utils import RunFailed, UserError, fsync_directory, fsync_file, log

LOCK, RESUME_FOLDER = ".lock", "resume"
# Where analysis/ writes about a run's checkpoints; a run leaves it alone.
ANALYSIS_FOLDER = "analysis"
# What a run opens or fills in place, and what each must be; all else it replaces.
KINDS = {
    LOCK: stat.S_ISREG,
    "config.yaml": stat.S_ISREG,
    "metrics.jsonl": stat.S_ISREG,
    RESUME_FOLDER: stat.S_ISDIR,
    "wandb": stat.S_ISDIR,
}
OUTPUT_PREFIXES = ("predictions_", "nonfinite_", "eval_")
# What `atomic_directory` and utils.atomic_write_text leave behind after a crash.
SET_ASIDE = re.compile(r"\.(?P<name>checkpoint_\d+|\d+)\.(?P<kind>old|part)")
UNFINISHED_FILE = re.compile(r"\..+\.\d+\.part")
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Lock `run_dir` for one training run, made where it is missing, and clean up after a crash.

    The lock is released when the process ends, however it ends. A run that ends before it wrote
    anything leaves no folder that was not there before.

    Raises: UserError when another process holds it, it cannot be written, or files in it are in the
        way.
    """
    missing = [path for path in (run_dir, *run_dir.parents) if not os.path.exists(path)]
    # Data workers inherit the lock and end a moment after a run that is killed. A soft lock would
    # outlive the run, and a restart on another machine would be refused.
    lock = FileLock(run_dir / LOCK, timeout=2, fallback_to_soft=False)
    try:
        create(run_dir)
        _acquire(lock, run_dir)
        try:
            recover(run_dir)
            refuse_obstacles(run_dir)
            recover(run_dir / RESUME_FOLDER)
            yield
        finally:
            if run_dir.is_dir() and os.listdir(run_dir) == [LOCK]:
                (run_dir / LOCK).unlink()
            lock.release()
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _acquire(lock: FileLock, run_dir: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{run_dir}: another training run is using this directory ({holder(run_dir)}); wait for"
            " it, or change name or save_path"
        ) from None
    # Older versions of filelock raise NotImplementedError where there is no flock.
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise _not_writable(run_dir, error) from None
        log.warning(
            f"{run_dir}: this file system has no locks ({error}); a second run on this directory"
            " would not be noticed"
        )
    text = f"process {os.getpid()} on {socket.gethostname()}"
    with suppress(OSError):
        (run_dir / LOCK).write_text(text, encoding="utf-8")


def holder(run_dir: Path) -> str:
    """A description of the process that holds `run_dir`, or held it last."""
    text = ""
    with suppress(OSError):
        text = (run_dir / LOCK).read_text(encoding="utf-8", errors="replace")
    return text or "an unknown process"


def check(folder: Path) -> None:
    """Check, without writing, that a run can write to `folder` and to nowhere else through it.

    Raises: UserError when `folder` cannot be written, is a link, or holds under a name that a run
        writes to anything that a run would not make.
    """
    if os.path.islink(folder):
        raise UserError(
            f"save_path: {folder} is a link to {os.readlink(folder)}, but a run writes inside"
            " save_path only; remove the link, or change save_path and name to the folder it names"
        )
    try:
        with suppress(FileNotFoundError):
            os.listdir(folder)
        existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
        if not os.access(existing, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission, or mounted read-only")
    except OSError as error:
        raise _not_writable(folder, error) from None
    for name, is_kind in KINDS.items():
        path = folder / name
        if os.path.lexists(path) and not is_kind(path.lstat().st_mode):
            kind = "folder" if is_kind is stat.S_ISDIR else "file"
            raise UserError(f"{path}: is not a plain {kind}, but a run writes to it; move it away")


def create(folder: Path) -> None:
    """Create `folder` and its parents where they are missing.

    Raises: UserError where `check` does, and when `folder` cannot be created.
    """
    check(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from None


def _not_writable(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"save_path: {folder} cannot be written ({reason}); choose another save_path")


def refuse_obstacles(run_dir: Path) -> None:
    """Check that a training run can write its checkpoints without replacing other files.

    Raises: UserError for a `checkpoint_N` that no run wrote, and for checkpoints of an earlier run
        that left no training state to resume from.
    """
    ours = [path for _, path in checkpoints(run_dir)]
    for path in sorted(run_dir.glob("checkpoint_*")):
        is_number = path.name.removeprefix("checkpoint_").isdecimal()
        if is_number and path.exists() and path not in ours:
            raise UserError(
                f"{path}: was not written by a run, but a run would write to it; move it away"
            )
    if ours and not states(run_dir):
        raise UserError(
            f"{run_dir}: holds checkpoints of an earlier run but no training state to resume from;"
            " choose another name (load_model_path may start from them), or move them away"
        )


def warn_about_unknown_files(run_dir: Path) -> None:
    """Log the names in `run_dir` that no run writes; a run leaves them alone."""
    known = {*KINDS, ANALYSIS_FOLDER, *(path.name for _, path in checkpoints(run_dir))}
    names = sorted(path.name for path in run_dir.iterdir())
    unknown = [n for n in names if n not in known and not n.startswith(OUTPUT_PREFIXES)]
    if unknown:
        log.warning(f"{run_dir}: unknown files, left alone: {', '.join(unknown)}")


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(finished epochs, folder) of the checkpoints of a run, oldest first."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        number = path.name.removeprefix("checkpoint_")
        if number.isdecimal() and (path / "coconut.json").is_file():
            found.append((int(number), path))
    return sorted(found)


def states(run_dir: Path) -> list[tuple[int, Path]]:
    """(optimizer step, folder) of the training states of a run, oldest first; none is verified."""
    folders = (run_dir / RESUME_FOLDER).glob("*")
    return sorted((int(path.name), path) for path in folders if path.name.isdecimal())


def prune_checkpoints(run_dir: Path, newest: int, keep: int) -> None:
    """Of the checkpoints up to `newest` finished epochs, remove all but the last `keep`.

    A checkpoint that the user has moved and replaced by a link is not removed.
    """
    past = [path for number, path in checkpoints(run_dir) if number <= newest]
    prune([path for path in past[:-keep] if not path.is_symlink()])


def prune(paths: list[Path]) -> None:
    """Remove what is no longer needed; a failure to do so is logged and does not end the run."""
    for path in paths:
        try:
            _remove(path)
        except OSError as error:
            reason = error.strerror or error
            log.warning(f"{path}: no longer needed, but cannot be removed ({reason})")


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `target` when the block ends without an error.

    A crash leaves the old `target` or the new one; `recover` completes what was interrupted.
    """
    unfinished = target.with_name(f".{target.name}.part")
    _remove(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        with suppress(OSError):
            _remove(unfinished)
        raise
    for path in unfinished.rglob("*"):
        if path.is_file():
            # Some libraries make their files readable by the owner only, whatever the umask says.
            with suppress(OSError):
                path.chmod(unfinished.stat().st_mode & 0o666)
        fsync_file(path)
    fsync_directory(unfinished)
    replaced = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    os.rename(unfinished, target)
    fsync_directory(target.parent)
    # What cannot be removed now is removed by `recover` at the next start.
    with suppress(OSError):
        _remove(replaced)


def recover(folder: Path) -> None:
    """Clean up `folder` after a crash: put a set-aside directory back, remove unfinished ones.

    Raises: UserError for one that can neither be put back nor removed.
    """
    for path in list(folder.glob(".*")):
        directory = SET_ASIDE.fullmatch(path.name) if path.is_dir() else None
        try:
            is_old = directory and directory["kind"] == "old"
            if is_old and not (folder / directory["name"]).exists():
                os.rename(path, folder / directory["name"])
            elif directory or UNFINISHED_FILE.fullmatch(path.name):
                _remove(path)
        except OSError as error:
            raise UserError(
                f"{path}: left by an earlier start and cannot be removed"
                f" ({error.strerror or error}); remove it"
            ) from None


@contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """Turn a disk error inside the block, where `what` is written, into one message.

    Raises: RunFailed, which names the state that the run can be resumed from.
    """
    try:
        yield
    except Exception as error:
        # Libraries written in Rust raise plain exceptions that hold the number of the error.
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        left = "nothing was saved before, so the same command starts over"
        if saved := states(run_dir):
            left = f"the same command resumes from {saved[-1][1]}"
        raise RunFailed(
            f"{run_dir}: {what} could not be written ({reason}); once it can be, {left}"
        ) from error
