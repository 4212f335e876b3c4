"""Laws of long runs: nothing grows, nothing is left behind, and logging never ends a run.

The faults of a data worker are tested one by one in test_loader.py, those of a disk in
test_tracking.py; here whole runs meet them.
"""

import ctypes
import functools
import gc
import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import ROOT, Experiment, assert_same_weights, at_call, kill_self

import dataset
from engine import loader
from engine.tracking import Tracker
from utils import EXIT_FAILED, EXIT_INTERRUPTED

# What a run leaves behind


def open_files():
    """The open files of this process, by name, with their number."""
    held = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            held[os.readlink(f"/proc/self/fd/{descriptor}")] += 1
        except FileNotFoundError:  # the listing itself
            continue
    return held


def child_processes():
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in tasks for pid in path.read_text().split()}


def do_nothing(tracker, metrics, step):
    pass


def stop(tracker, metrics, step):
    signal.raise_signal(signal.SIGTERM)


def raise_an_error(tracker, metrics, step):
    raise ArithmeticError("a bug")


@pytest.mark.parametrize(
    "log, overrides, status",
    [
        (do_nothing, [], 0),
        (do_nothing, ["lr=1e30"], EXIT_FAILED),
        (stop, [], EXIT_INTERRUPTED),
        (raise_an_error, [], EXIT_FAILED),
    ],
    ids=["finished", "failed", "stopped", "broken"],
)
def test_open_files_and_data_workers_are_gone_after_a_run(
    tmp_path, monkeypatch, log, overrides, status
):
    experiment = Experiment(tmp_path, num_workers=2, num_epochs=1)
    # The first run opens what Python keeps open.
    assert experiment.main("name=first") == 0
    files, children = open_files(), child_processes()
    started = []
    load = loader._from_workers
    monkeypatch.setattr(loader, "_from_workers", lambda made: started.append(1) or load(made))
    monkeypatch.setattr(Tracker, "log", log)
    assert experiment.main("name=second", *overrides) == status
    assert started
    gc.collect()  # exceptions leave cycles that hold the batches
    assert child_processes() <= children
    assert open_files() == files


# Memory

WARM_UP, STEPS, LEAKING, STEPS_AN_EPOCH = 300, 2000, 400, 300
# Growth of the resident set over STEPS, evaluations and saves included: 1 KiB a step. Measured on
# the machine of docs/results.md: 0.1 to 0.5 MiB in all, slowing down.
LIMIT_BYTES = 2 * 2**20
LEAK_BYTES = 2 * LIMIT_BYTES // LEAKING


def watch_memory(path):
    """Record resident set and open files at every step; leak memory after WARM_UP + STEPS."""
    log, leak, page = Tracker.log, [], os.sysconf("SC_PAGE_SIZE")
    libc = ctypes.CDLL(None)

    def log_and_record(tracker, metrics, step):
        log(tracker, metrics, step)
        if "train/loss" not in metrics:
            return
        if step > WARM_UP + STEPS:
            # A mapping of its own, because the heap may have free space already.
            leak.append(mmap.mmap(-1, LEAK_BYTES))
            leak[-1].write(bytes(LEAK_BYTES))
        # Otherwise a leak would first fill what loading the model freed, and stay hidden.
        libc.malloc_trim(0)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        num_files = len(os.listdir("/proc/self/fd"))
        with open(path, "a") as file:
            file.write(f"{resident} {num_files}\n")

    Tracker.log = log_and_record


def test_memory_does_not_grow_over_2000_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("runs.PROCESS_TIMEOUT_S", 280)
    steps = WARM_UP + STEPS + LEAKING
    experiment = Experiment(
        tmp_path, num_train=STEPS_AN_EPOCH, num_val=2, num_epochs=steps // STEPS_AN_EPOCH,
        batch_size_training=1, curriculum=False, max_latent_stage=1, num_workers=1,
    )  # fmt: skip
    process = experiment.start(hook=functools.partial(watch_memory, tmp_path / "memory.txt"))
    assert process.wait() == [0], process.output()
    lines = (tmp_path / "memory.txt").read_text().splitlines()
    resident, files = zip(*(map(int, line.split()) for line in lines), strict=True)

    def growth(begin, end, window=100):
        before = statistics.median(resident[begin : begin + window])
        return statistics.median(resident[end - window : end]) - before

    assert growth(WARM_UP, WARM_UP + STEPS) < LIMIT_BYTES
    assert set(files[WARM_UP:]) == {files[WARM_UP]}
    # The measurement sees a leak of twice the limit, three quarters of it between the medians.
    assert growth(WARM_UP + STEPS, steps) > LIMIT_BYTES


# Data workers that fail


def worker_fails(number, action):
    """From now on a data worker does `action` before its batch number `number` (from 1)."""
    made, main, calls = dataset.Collator.__getitem__, os.getpid(), Counter()

    def make(collator, indices):
        if os.getpid() != main:
            calls["here"] += 1
            if calls["here"] == number:
                action()
        return made(collator, indices)

    dataset.Collator.__getitem__ = make


def stall():
    time.sleep(10)


@pytest.mark.parametrize("failure", [kill_self, stall])
def test_a_run_whose_data_worker_fails_resumes_to_the_same_weights(
    tmp_path, monkeypatch, capsys, failure
):
    keys = {"num_train": 72, "num_epochs": 2}
    undisturbed = Experiment(tmp_path, name="undisturbed", dropout=0.1, **keys)
    assert undisturbed.main() == 0
    with monkeypatch.context() as patch:
        patch.setattr(dataset.Collator, "__getitem__", dataset.Collator.__getitem__)
        patch.setattr(loader, "WORKER_TIMEOUT_S", 1.0)
        worker_fails(6, failure)
        disturbed = Experiment(tmp_path, num_workers=2, save_every_minutes=1e-9, **keys)
        assert disturbed.main() == EXIT_FAILED
    assert "data workers failed (" in capsys.readouterr().err
    assert disturbed.states()
    assert disturbed.change(save_every_minutes=None).main() == 0
    assert_same_weights(disturbed.weights(), undisturbed.weights())
    assert disturbed.metrics() == undisturbed.metrics()


def kill_run_with_stalled_worker():
    worker_fails(2, stall)
    at_call(1, "engine.tracking:Tracker.log", kill_self)


def test_a_killed_run_frees_its_directory_though_a_data_worker_stalls(tmp_path):
    experiment = Experiment(tmp_path, num_workers=2, num_epochs=1)
    process = experiment.start(hook=kill_run_with_stalled_worker)
    assert process.wait() == [-signal.SIGKILL]
    assert experiment.main() == 0


# Logs on a full disk


def test_a_full_disk_under_metrics_jsonl_leaves_no_gap(tmp_path, monkeypatch, capsys):
    straight = Experiment(tmp_path, name="straight", num_epochs=2)
    assert straight.main() == 0
    filled = Experiment(tmp_path, name="filled", num_epochs=2)
    path = filled.run_dir / "metrics.jsonl"
    kept = filled.run_dir / "kept"
    log = Tracker.log

    def log_on_a_disk_that_is_full_for_a_while(tracker, metrics, step):
        if step == 3 and not kept.exists():
            path.rename(kept)
            path.symlink_to("/dev/full")
        if step == 8:
            path.unlink()
            kept.rename(path)
        log(tracker, metrics, step)

    monkeypatch.setattr(Tracker, "log", log_on_a_disk_that_is_full_for_a_while)
    capsys.readouterr()
    assert filled.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("cannot be written (No space left on device); training continues") == 1
    # Steps 3 to 8 and the evaluation after step 5.
    assert shown.count("written again, 7 line(s) at once") == 1
    assert filled.metrics() == straight.metrics()


def test_a_full_disk_under_the_console_ends_no_run(tmp_path):
    straight = Experiment(tmp_path, name="straight", num_epochs=1)
    assert straight.main() == 0
    full = Experiment(tmp_path, name="full", num_epochs=1)
    # Held back, output is flushed when Python ends, which could still spoil the status.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    # As many threads as this process has: sums are the same to the last bit for the same number.
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    with open("/dev/full", "w") as console:
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", full.yaml],
            stdout=console, stderr=console, env=environment, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0
    assert_same_weights(full.weights(), straight.weights())
