"""Laws of the run directory: one run at a time, all whole or absent, no other files touched."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

import utils
from engine import run_dir
from engine.run_dir import atomic_directory, checkpoints, create, hold, prune_checkpoints, recover
from utils import RunFailed, UserError


def contents(folder):
    """Every file below a folder, by its relative path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def failing(function, number):
    """`function`, which fails at call `number` (from 1) and from then on."""
    calls = []

    def wrapper(*arguments, **options):
        calls.append(1)
        if len(calls) >= number:
            raise OSError("disk full")
        return function(*arguments, **options)

    return wrapper


def test_recovery_after_each_interrupted_phase(tmp_path):
    def folder(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)

    folder(".checkpoint_1.part", "half")  # killed while writing, nothing there before
    folder("checkpoint_2", "old")  # killed while writing over an old one
    folder(".checkpoint_2.part", "half")
    folder(".checkpoint_3.old", "old")  # killed between the two renames
    folder(".checkpoint_3.part", "new")
    folder("checkpoint_4", "new")  # killed before the old one was removed
    folder(".checkpoint_4.old", "old")
    folder(".15.part", "half")
    (tmp_path / ".metrics.jsonl.4711.part").write_text("half")
    folder(".mine.old", "mine")
    (tmp_path / ".mine.part").write_text("mine")
    recover(tmp_path)
    assert contents(tmp_path) == {
        "checkpoint_2/file": b"old", "checkpoint_3/file": b"old", "checkpoint_4/file": b"new",
        ".mine.old/file": b"mine", ".mine.part": b"mine",
    }  # fmt: skip
    recover(tmp_path / "missing")


def test_a_link_left_by_a_crash_is_removed_and_its_target_is_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".checkpoint_1.part").symlink_to(elsewhere)
    recover(run_dir)
    assert list(run_dir.iterdir()) == []
    for name in (".checkpoint_1.part", ".checkpoint_1.old", "checkpoint_1"):
        (run_dir / name).symlink_to(elsewhere if name != "checkpoint_1" else "nowhere")
    with atomic_directory(run_dir / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("new")
    assert contents(run_dir) == {"checkpoint_1/file": b"new"}
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint_1"]
    assert [path.name for path in elsewhere.iterdir()] == ["folder"]


def test_what_a_crash_left_is_named_where_it_cannot_be_removed(tmp_path, monkeypatch):
    (tmp_path / ".5.part").mkdir()
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    with pytest.raises(UserError, match=r"/\.5\.part: left by an .* \(disk full\); remove it"):
        recover(tmp_path)


def test_a_directory_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    for owner, name in (
        (run_dir, "fsync_file"), (run_dir, "fsync_directory"), (os, "rename"),
    ):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda path, *rest, name=name, original=original: (
                events.append((name, Path(path).name)) or original(path, *rest)
            ),
        )
    with atomic_directory(tmp_path / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("content")
    part = ".checkpoint_1.part"
    assert events == [
        ("fsync_file", "file"), ("fsync_directory", part), ("rename", part),
        ("fsync_directory", tmp_path.name),
    ]  # fmt: skip


def test_a_second_run_is_refused_with_the_process_that_holds_the_directory(tmp_path):
    folder = tmp_path / "exps" / "run"
    with hold(folder):
        words = (
            rf"another training run is using this directory \(process {os.getpid()} on .*\); wait"
        )
        with pytest.raises(UserError, match=words), hold(folder):
            pass
        (folder / "config.yaml").write_text("kept")
    with hold(folder):
        pass
    assert (folder / "config.yaml").read_text() == "kept"


def failing_lock(number):
    def acquire(lock):
        raise OSError(number, "no such thing")

    return acquire


def test_a_disk_error_is_not_taken_for_a_missing_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", failing_lock(errno.EIO))
    with pytest.raises(UserError, match=r"cannot be written \(no such thing\)"), hold(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_starts_with_a_warning(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr("fcntl.flock", lambda *_: failing_lock(number)(None))
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert "has no locks" in caplog.text
    assert "a second run on this directory would not be noticed" in caplog.text


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="mistake"), hold(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "exps").mkdir()
    with pytest.raises(UserError, match="mistake"), hold(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.rglob("*")) == [tmp_path / "exps"]


def test_a_folder_that_cannot_be_written_is_the_users_to_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    words = r"save_path: .* cannot be written \(Not a directory\); choose another save_path"
    with pytest.raises(UserError, match=words):
        create(tmp_path / "file" / "run")
    # Root may write anywhere, so permission cannot be taken from this process.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"cannot be written \(no permission, or mounted"):
        create(tmp_path / "run")


def test_text_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "predictions_0.jsonl"
    utils.atomic_write_text(path, "old")
    monkeypatch.setattr(os, "replace", failing(os.replace, 1))
    with pytest.raises(OSError, match="disk full"):
        utils.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["checkpoint_2", "resume"])
def test_a_file_under_a_name_that_a_run_writes_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: .*; move it away"), hold(tmp_path):
        pass
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_without_a_state_are_not_overwritten(tmp_path):
    (tmp_path / "checkpoint_2").mkdir()
    (tmp_path / "checkpoint_2" / "coconut.json").touch()
    words = "holds checkpoints of an earlier run but no training"
    with pytest.raises(UserError, match=words), hold(tmp_path):
        pass
    (tmp_path / "resume" / "7").mkdir(parents=True)
    with hold(tmp_path):
        pass


def test_unknown_files_are_named_and_left_alone(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("predictions_0.jsonl", "config.yaml", "checkpoint_best"):
        (tmp_path / name).touch()
    run_dir.warn_about_unknown_files(tmp_path)
    assert caplog.messages == [f"{tmp_path}: unknown files, left alone: checkpoint_best, notes.txt"]


def test_checkpoints_are_found_in_the_order_of_their_epochs_and_pruned(tmp_path):
    for name in ("checkpoint_10", "checkpoint_9", "checkpoint_best", "checkpoint_50"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "coconut.json").touch()
    (tmp_path / "checkpoint_8").write_text("a file")
    assert [number for number, _ in checkpoints(tmp_path)] == [9, 10, 50]
    prune_checkpoints(tmp_path, newest=10, keep=1)
    names = ["checkpoint_10", "checkpoint_50", "checkpoint_8", "checkpoint_best"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_checkpoint_that_was_moved_and_linked_is_never_pruned(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "disk"
    for folder in (elsewhere, run_dir / "checkpoint_2", run_dir / "checkpoint_3"):
        folder.mkdir(parents=True)
        (folder / "coconut.json").touch()
    (run_dir / "checkpoint_1").symlink_to(elsewhere)
    prune_checkpoints(run_dir, newest=3, keep=1)
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint_1", "checkpoint_3"]
    assert (elsewhere / "coconut.json").exists()


def test_what_cannot_be_removed_is_logged_and_ends_nothing(tmp_path, monkeypatch, caplog):
    for number in (1, 2):
        (tmp_path / f"checkpoint_{number}").mkdir()
        (tmp_path / f"checkpoint_{number}" / "coconut.json").touch()
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    prune_checkpoints(tmp_path, 2, keep=1)
    old = tmp_path / "checkpoint_1"
    assert caplog.messages == [f"{old}: no longer needed, but cannot be removed (disk full)"]


def test_a_failed_write_names_the_state_to_resume_from(tmp_path):
    words = r"run: x could not be written \(full\); once it can be, "
    for left in ("nothing was saved before, so the same command starts over", ".*resume/10"):
        with pytest.raises(RunFailed, match=words + left), run_dir.writing(tmp_path / "run", "x"):
            raise OSError(errno.ENOSPC, "full")
        for step in ("9", "10"):
            (tmp_path / "run" / "resume" / step).mkdir(parents=True, exist_ok=True)


def test_other_errors_than_those_of_a_disk_stay_what_they_are(tmp_path):
    words = r"x could not be written \(No space left on device \(os error 28\)\)"
    with pytest.raises(RunFailed, match=words), run_dir.writing(tmp_path, "x"):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library does
    with pytest.raises(ZeroDivisionError), run_dir.writing(tmp_path, "x"):
        raise ZeroDivisionError("a bug")


def test_every_file_of_a_directory_is_as_readable_as_the_umask_says(tmp_path):
    with atomic_directory(tmp_path / "checkpoint_1") as folder:
        (folder / "public").touch()
        (folder / "private").touch(mode=0o600)
    modes = {path.stat().st_mode for path in (tmp_path / "checkpoint_1").iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o044
