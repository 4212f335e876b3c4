"""The run directory: its lock, what may lie in it, and directories that appear whole or not at all.

Leaves what a checkpoint or a training state holds to checkpoint.py. Imports no torch, so that a
directory that cannot be used is refused before anything heavy loads.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import UserError, fsync_directory, fsync_file

RESUME_FOLDER = "resume"
# What a run opens or fills where it stands; all else it replaces.
OPENED_FILES, FILLED_FOLDERS = (".lock", "config.yaml", "metrics.jsonl"), (RESUME_FOLDER, "wandb")
# What `whole_directory` and utils.atomic_write_text leave behind in a crash.
SET_ASIDE = re.compile(r"\.(?P<name>checkpoint_\d+|\d+)\.(?P<kind>old|part)")
UNFINISHED_FILE = re.compile(r"\..+\.\d+\.part")


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory to fill, which becomes `target` when the block ends well.

    A crash leaves the old `target` or the new one; `recover` finishes what one interrupted.
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
        fsync_file(path)
    fsync_directory(unfinished)
    replaced = target.with_name(f".{target.name}.old")
    if os.path.lexists(target):
        _remove(replaced)
        os.rename(target, replaced)
    os.rename(unfinished, target)
    fsync_directory(target.parent)
    # What stays is in nobody's way until the next start tidies up.
    with suppress(OSError):
        _remove(replaced)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it; of a link the link alone. Nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(paths: list[Path], notify: Callable[[str], None]) -> None:
    """Remove what is surplus; what cannot be removed is told of and ends no run."""
    for path in paths:
        try:
            _remove(path)
        except OSError as error:
            notify(f"{path}: no longer needed, but cannot be removed ({error.strerror or error})")


def recover(folder: Path) -> None:
    """Tidy `folder` after a crash: put a set-aside directory back, drop unfinished ones.

    Raises: UserError for one that can neither be put back nor removed.
    """
    for path in list(folder.glob(".*")):
        directory = SET_ASIDE.fullmatch(path.name)
        directory = directory if path.is_dir() else None
        try:
            if (
                directory
                and directory["kind"] == "old"
                and not (folder / directory["name"]).exists()
            ):
                os.rename(path, folder / directory["name"])
            elif directory or UNFINISHED_FILE.fullmatch(path.name):
                _remove(path)
        except OSError as error:
            raise UserError(
                f"{path}: left by an earlier start and cannot be tidied away"
                f" ({error.strerror or error}); remove it"
            ) from None


@contextmanager
def run_lock(run_dir: Path, notify: Callable[[str], None] = print) -> Iterator[None]:
    """Hold `run_dir` for one training run; the lock goes with the process, however it ends.

    A run that ends before it wrote anything leaves no folder that was not there before.

    notify: is told where the file system knows no locks.

    Raises: UserError when another process holds it or the folder cannot be written.
    """
    missing = _missing(run_dir)
    make_writable(run_dir)
    try:
        with _held_lock(run_dir, notify):
            yield
    finally:
        _remove_empty(missing)


@contextmanager
def _held_lock(run_dir: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """The lock alone, in a file that goes again when nothing else was written."""
    with open(run_dir / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"{run_dir}: another training run is using this directory; wait for it, or"
                    " change name or save_path"
                ) from None
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            notify(
                f"{run_dir}: this file system knows no locks ({error.strerror}); a second run on"
                " this directory would not be noticed"
            )
        try:
            yield
        finally:
            if run_dir.is_dir() and os.listdir(run_dir) == [".lock"]:
                (run_dir / ".lock").unlink()


def check_writable(folder: Path) -> None:
    """Look whether `make_writable` would succeed, as far as can be known without writing.

    Raises: UserError when `folder` cannot be written, is a link, or holds a link or a pipe under a
        name that a run writes to.
    """
    for path in (folder, *(folder / name for name in OPENED_FILES + FILLED_FOLDERS)):
        refuse_link(path)
    for path in (folder / name for name in OPENED_FILES):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: is no regular file, but a run writes to it; move it away")
    innermost = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)
        reason = None if os.access(innermost, os.W_OK) else "no permission or mounted read-only"
        reason = reason if os.path.isdir(innermost) else "Not a directory"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise _not_writable(folder, reason)


def make_writable(folder: Path) -> None:
    """Create `folder` where it is missing.

    Raises: UserError where `check_writable` does, and when `folder` cannot be made.
    """
    check_writable(folder)
    missing = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise _not_writable(folder, error.strerror) from None


def _not_writable(folder: Path, reason: str) -> UserError:
    return UserError(f"save_path: {folder} cannot be written ({reason}); choose another save_path")


def refuse_link(path: Path) -> None:
    """Raise UserError where a run would write through a link, and so outside save_path."""
    if os.path.islink(path):
        raise UserError(
            f"save_path: {path} is a link to {os.readlink(path)}, but a run writes inside save_path"
            " alone; remove the link, or let save_path and name say where the run is to lie"
        )


def _missing(folder: Path) -> list[Path]:
    """The folders on the way to `folder` and itself that do not exist yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(finished epochs, directory) of the checkpoints of a run, oldest first."""
    found = []
    for path in run_dir.glob("checkpoint_*"):
        number = path.name.removeprefix("checkpoint_")
        if number.isdecimal() and (path / "coconut.json").is_file():
            found.append((int(number), path))
    return sorted(found)


def prune_checkpoints(
    run_dir: Path, newest: int, keep: int, notify: Callable[[str], None] = print
) -> None:
    """Of the checkpoints up to `newest` finished epochs, remove all but the last `keep`.

    One that the user moved and left a link to is not removed.

    notify: is told of every one that cannot be removed.
    """
    up_to_now = [path for number, path in checkpoints(run_dir) if number <= newest]
    prune([path for path in up_to_now[:-keep] if not path.is_symlink()], notify)


def refuse_obstacles(run_dir: Path) -> None:
    """Make sure that a new run can write its names in `run_dir` without touching another's files.

    Raises: UserError for a `checkpoint_N` or `resume` that is none of ours, and for checkpoints of
        an earlier run that left no training state to go on from.
    """
    for path in sorted(run_dir.glob("checkpoint_*")) + [run_dir / RESUME_FOLDER]:
        number = path.name.removeprefix("checkpoint_")
        is_ours = path.is_dir() and (
            path.name == RESUME_FOLDER or (path / "coconut.json").is_file()
        )
        if path.exists() and (number.isdecimal() or path.name == RESUME_FOLDER) and not is_ours:
            raise UserError(
                f"{path}: is not from a run of ours, but a run writes under this name; move it away"
            )
    if checkpoints(run_dir) and not state_folders(run_dir):
        raise UserError(
            f"{run_dir}: holds checkpoints of an earlier run but no training state to go on from;"
            " choose another name (load_model_path may start from them), or move them away"
        )


def foreign_files(run_dir: Path) -> list[str]:
    """Names in `run_dir` that no run of ours writes."""
    ours = {"config.yaml", "metrics.jsonl", "wandb", RESUME_FOLDER, ".lock"}
    ours |= {path.name for _, path in checkpoints(run_dir)}
    prefixes = ("predictions_", "nonfinite_", "eval_")
    names = sorted(path.name for path in run_dir.iterdir())
    return [name for name in names if name not in ours and not name.startswith(prefixes)]


def state_folders(run_dir: Path) -> list[tuple[int, Path]]:
    folders = (run_dir / RESUME_FOLDER).glob("*")
    return sorted((int(path.name), path) for path in folders if path.name.isdecimal())
