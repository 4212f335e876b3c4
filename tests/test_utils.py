"""Files that appear whole or not at all, how commands end, seeding, and sums."""

import errno
import io
import logging
import os
import random
import stat
import sys

import numpy as np
import pytest
import torch

from engine.distributed import seed_everything
from utils import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    RunFailed,
    UserError,
    atomic_write_text,
    configure_logging,
    fsync_file,
    log,
    run_command,
    sha256_file,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_write_makes_the_file_in_utf8_and_nothing_beside_it(tmp_path):
    atomic_write_text(tmp_path / "new.txt", "größer\n→")
    assert contents(tmp_path) == {"new.txt": "größer\n→".encode()}


def test_write_replaces_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("an older and longer text")
    atomic_write_text(str(tmp_path / "a.txt"), "new")
    assert contents(tmp_path) == {"a.txt": b"new"}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    (tmp_path / "a.txt").write_text("old")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        atomic_write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_text_that_is_not_unicode_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(tmp_path / "a.txt", "half a pair: \ud800")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_write_into_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "missing" / "a.txt", "new")
    assert contents(tmp_path) == {}


def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        status = os.fstat(descriptor)
        is_directory = stat.S_ISDIR(status.st_mode)
        events.append("directory" if is_directory else f"file of {status.st_size} bytes")
        fsync(descriptor)

    def spy_replace(*paths):
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write_text(tmp_path / "a.txt", "three")
    assert events == ["file of 5 bytes", "rename", "directory"]
    events.clear()
    fsync_file(tmp_path / "a.txt")
    assert events == ["file of 5 bytes"]


def draws():
    return random.random(), np.random.random(), torch.rand(3).tolist()


def test_seeding_repeats_the_draws_of_python_numpy_and_torch():
    seed_everything(7)
    first = draws()
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
def test_gpus_take_tf32_unless_deterministic(monkeypatch, deterministic):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        seed_everything(0, deterministic)
        assert chosen == ["highest" if deterministic else "high"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_forbids_random_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    try:
        seed_everything(0)
        assert not torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = True
        seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = benchmark


def test_sha256_is_that_of_the_standard(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_sha256_reads_the_whole_file(tmp_path):
    path = tmp_path / "million"
    path.write_bytes(b"a" * 1_000_000)  # FIPS 180-2, appendix B.3
    assert sha256_file(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


# Lines


def test_a_line_that_cannot_be_printed_does_not_end_a_run(monkeypatch, capsys):
    configure_logging(0)
    monkeypatch.setattr(log, "level", logging.INFO)
    log.info("one")
    assert capsys.readouterr().out == "one\n"
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        log.info("two")


@pytest.mark.parametrize(
    ("ending", "status", "logged"),
    [
        (None, 0, []),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, ["interrupted; nothing was written"]),
        (UserError("write --data FILE"), EXIT_USER_ERROR, ["write --data FILE"]),
        (RunFailed("the disk is full"), EXIT_FAILED, ["the disk is full"]),
    ],
)
def test_a_command_ends_with_one_message_and_the_status_of_its_ending(
    ending, status, logged, caplog
):
    def work():
        if ending is not None:
            raise ending

    assert run_command(work, "nothing was written") == status
    assert caplog.messages == logged


def test_a_fault_of_ours_ends_a_command_with_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0, "nothing was written")
