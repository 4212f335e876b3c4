"""Batches made by worker processes: the same as without them, and no process left behind."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_word_tokenizer
from runs import ROOT, make_records

from dataset import MARKERS, Collator, Curriculum, SpecialIds, StagedRecords, tokenize_records
from engine import loader
from engine.loader import batch_loader
from utils import RunFailed


@pytest.fixture(scope="module", params=["latents", "prompts"])
def collator(request):
    """60 records of 0 to 3 steps at stage 1."""
    tokenizer = build_word_tokenizer()
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    records = tokenize_records(make_records(60), tokenizer, "made.json")
    curriculum = Curriculum("coconut", 1, 1, 3, False)
    staged = StagedRecords.of(records, curriculum, np.ones(60, dtype=int))
    return Collator(staged, SpecialIds.of(tokenizer), request.param)


def load(collator, num_workers):
    batches = [np.array([3, 1]), np.array([], dtype=int), np.arange(10, 17), np.array([0])]
    return list(batch_loader(collator, batches, num_workers, False)), batches


def test_workers_change_nothing(collator):
    alone, batches = load(collator, 0)
    helped, _ = load(collator, 2)
    for batch, one, two in zip(batches, alone, helped, strict=True):
        assert one["indices"].tolist() == batch.tolist()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def loading(collator):
    """(expected batches, the same from two workers, one of which was taken, those workers)."""
    batches = [np.roll(np.arange(60), i) for i in range(40)]
    before = set(multiprocessing.active_children())
    made = batch_loader(collator, batches, 2, False)
    first = next(made)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    yield [collator[batch] for batch in batches], itertools.chain([first], made), workers
    made.close()
    assert not workers & set(multiprocessing.active_children())


def assert_same_batches(got, expected):
    for one, two in zip(got, expected, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_signals_to_the_process_group(loading, number):
    expected, made, workers = loading
    for worker in workers:
        os.kill(worker.pid, number)
    assert_same_batches(made, expected)


def test_a_worker_that_dies_ends_loading_and_nothing_else(loading, monkeypatch):
    monkeypatch.setattr(loader, "WORKER_TIMEOUT_S", 0.5)
    _, made, workers = loading
    worker = workers.copy().pop()
    handler = signal.getsignal(signal.SIGCHLD)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert signal.getsignal(signal.SIGCHLD) is handler
    time.sleep(0.1)  # no signal handler raises here
    with pytest.raises(RunFailed, match=r"data workers failed \(.*\); start again"):
        list(made)


class Stalling:
    def __getitem__(self, indices):
        time.sleep(indices)
        return {"x": torch.zeros(1)}


def test_a_worker_that_stalls_ends_loading(monkeypatch):
    monkeypatch.setattr(loader, "WORKER_TIMEOUT_S", 0.5)
    with pytest.raises(RunFailed, match="timed out after 0.5 seconds"):
        list(batch_loader(Stalling(), [0, 30, 0], 2, False))


@pytest.mark.parametrize("started", [0, 1])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loading_ends_where_workers_cannot_start(collator, monkeypatch, started):
    calls, start = itertools.count(), multiprocessing.Process.start

    def start_or_refuse(process):
        if next(calls) >= started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(multiprocessing.Process, "start", start_or_refuse)
    with pytest.raises(RunFailed, match="Resource temporarily unavailable.*num_workers: 0"):
        load(collator, 2)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_making_a_batch_is_raised_as_it_is(collator, num_workers):
    with pytest.raises(IndexError):
        list(batch_loader(collator, [np.array([0]), np.array([60])], num_workers, False))


CRASH = """
import multiprocessing, os, signal, torch
from engine.loader import batch_loader
class Large:
    def __getitem__(self, indices):
        return {"x": torch.zeros(100_000)}
made = batch_loader(Large(), [0] * 9, 2, False)
next(made)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def run_code(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_loader_that_a_crash_keeps_alive_does_not_hold_up_the_end():
    done = run_code(CRASH + "1 / 0")
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_workers_end_with_a_process_that_is_killed():
    done = run_code(CRASH + "os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -signal.SIGKILL
    pids = done.stdout.split()
    assert len(pids) == 2
    deadline = time.monotonic() + 2
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_draws_nothing_from_the_main_generator(collator, num_workers):
    before = torch.get_rng_state()
    load(collator, num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_batches_load_as_none(collator):
    assert list(batch_loader(collator, [], 2, False)) == []
