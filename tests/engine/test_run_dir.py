"""Laws of the run directory: one run at a time, whole files and folders, nobody's files touched."""

import errno
import os
import shutil
from pathlib import Path

import pytest

import utils
from engine import run_dir
from engine.run_dir import (
    checkpoints,
    make_writable,
    prune_checkpoints,
    recover,
    run_lock,
    whole_directory,
)
from utils import UserError


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


def test_what_a_crash_left_goes_though_it_is_a_link_and_not_what_it_leads_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".checkpoint_1.part").symlink_to(elsewhere)
    recover(run_dir)
    assert list(run_dir.iterdir()) == []
    for name in (".checkpoint_1.part", ".checkpoint_1.old", "checkpoint_1"):
        (run_dir / name).symlink_to(elsewhere if name != "checkpoint_1" else "nowhere")
    with whole_directory(run_dir / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("new")
    assert contents(run_dir) == {"checkpoint_1/file": b"new"}
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint_1"]
    assert [path.name for path in elsewhere.iterdir()] == ["folder"]


def test_what_a_crash_left_and_cannot_go_is_named(tmp_path, monkeypatch):
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
    with whole_directory(tmp_path / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("content")
    part = ".checkpoint_1.part"
    assert events == [
        ("fsync_file", "file"), ("fsync_directory", part), ("rename", part),
        ("fsync_directory", tmp_path.name),
    ]  # fmt: skip


def test_text_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "predictions_0.jsonl"
    utils.atomic_write_text(path, "old")
    monkeypatch.setattr(os, "replace", failing(os.replace, 1))
    with pytest.raises(OSError, match="disk full"):
        utils.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_lock_refuses_a_second_holder_and_goes_with_the_first(tmp_path):
    run_dir = tmp_path / "exps" / "run"
    with run_lock(run_dir):
        words = "another training run is using this directory; wait for it, or change name"
        with pytest.raises(UserError, match=words), run_lock(run_dir):
            pass
        (run_dir / "config.yaml").write_text("kept")
    with run_lock(run_dir):
        pass
    assert (run_dir / "config.yaml").read_text() == "kept"


def test_a_lock_error_that_is_no_refusal_is_not_taken_for_one(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output error"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_is_told(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, "no such thing")

    monkeypatch.setattr("fcntl.flock", flock)
    notices, entered = [], False
    with run_lock(tmp_path, notices.append):
        entered = True
    words = "knows no locks (no such thing); a second run on this directory would not be noticed"
    assert entered and notices == [f"{tmp_path}: this file system {words}"]


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="mistake"), run_lock(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "exps").mkdir()
    with pytest.raises(UserError, match="mistake"), run_lock(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.rglob("*")) == [tmp_path / "exps"]


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    words = r"save_path: .* cannot be written \(Not a directory\); choose another save_path"
    with pytest.raises(UserError, match=words):
        make_writable(tmp_path / "file" / "run")
    # Root may write anywhere, so permission cannot be taken from this process.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"cannot be written \(no permission or mounted"):
        make_writable(tmp_path / "run")


@pytest.mark.parametrize("name", ["checkpoint_2", "resume"])
def test_a_file_under_a_name_that_a_run_writes_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: is not from a run of ours.*move it away"):
        run_dir.refuse_obstacles(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_without_a_state_are_not_overwritten(tmp_path):
    (tmp_path / "checkpoint_2").mkdir()
    (tmp_path / "checkpoint_2" / "coconut.json").touch()
    with pytest.raises(UserError, match="holds checkpoints of an earlier run but no training"):
        run_dir.refuse_obstacles(tmp_path)
    (tmp_path / "resume" / "7").mkdir(parents=True)
    run_dir.refuse_obstacles(tmp_path)


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
