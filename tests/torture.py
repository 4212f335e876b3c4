"""`make torture`: the faults that a run survives, each tried many times, in one table.

    .venv/bin/python tests/torture.py [--quick] [--only WORDS] [--seed N]

Every case disturbs tiny runs of run.py, in processes of their own, in one way. It passes when the
disturbed run ends as it should and, resumed by the same command, ends like an undisturbed one:
final weights and predictions bit for bit, metrics.jsonl line by line except for measured times.
"Steps lost" were logged and had to be repeated. docs/faults.md explains the cases. The exit status
is 1 when a case fails. pytest does not collect this script; test_torture.py runs a part of it.
"""

import argparse
import ctypes
import functools
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from runs import (  # noqa: E402
    Experiment,
    Ranks,
    assert_same_weights,
    at_call,
    kill_self,
    make_records,
)

from engine import checkpoint, distributed, failures, run_dir  # noqa: E402
from engine import parallel as sharing  # noqa: E402
from engine import trainer as training  # noqa: E402
from utils import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunFailed, log  # noqa: E402

KEYS = {
    "dropout": 0.1, "uniform_prob": 0.3, "warmup_steps": 3, "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2, "batch_size_training": 2, "max_grad_norm": 1.0,
}  # fmt: skip
# Of one process: 18 records, 4 a step.
STEPS_AN_EPOCH = 5
EVERY_STEP = "save_every_minutes=1e-9"
PATIENCE_S = 120
# From the C library's headers.
CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 0x4000, 1 << 18
MNT_DETACH = 2


class Bench:
    """What all cases share: a folder, how often to try, and undisturbed runs to compare with."""

    def __init__(self, folder, quick, seed):
        self.folder, self.quick = Path(folder), quick
        self.rng = random.Random(seed)
        self.numbers = itertools.count()
        self.finished, self.stopped = {}, {}
        self.mounts = own_mounts()
        # The first process waits until everything is imported; the others start at once.
        Ranks(1, self.folder, [["--help"]]).wait()

    def count(self, full, quick):
        return quick if self.quick else full

    def some(self, values, quick):
        """All values, or as many as `quick` of them in a quick run."""
        values = list(values)
        return self.rng.sample(values, min(quick, len(values))) if self.quick else values

    def experiment(self, **keys):
        """A fresh experiment to disturb."""
        folder = self.folder / f"trial_{next(self.numbers)}"
        if self.finished:
            shutil.copytree(next(iter(self.finished.values())).model, folder / "model")
        return Experiment(folder, **{**KEYS, **keys})

    def undisturbed(self, num_ranks=1, **keys):
        """The undisturbed run, finished; `seconds` is how long it took."""
        key = (num_ranks, *sorted(keys.items()))
        if key not in self.finished:
            experiment = self.experiment(**keys)
            began = time.monotonic()
            run_to_end(experiment, num_ranks)
            experiment.seconds = time.monotonic() - began
            self.finished[key] = experiment
        return self.finished[key]

    def halfway(self, step):
        """A fresh copy of a run that was killed when it logged optimizer step `step`.

        It saved every step, so it resumes from `step` - 1.
        """
        if step not in self.stopped:
            disturbed = self.experiment()
            log = step + (step - 1) // STEPS_AN_EPOCH  # each epoch before logged its evaluation too
            hook = functools.partial(at_call, log, "engine.tracking:Tracker.log", kill_self)
            assert_ends(start(disturbed, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
            assert saved_step(disturbed) == step - 1
            self.stopped[step] = disturbed
        copy = self.experiment()
        shutil.copytree(self.stopped[step].run_dir, copy.run_dir)
        return copy

    def each(self, trial, values):
        """The results of `trial` on every value, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(trial, values))


# What every case asks of a run


def start(experiment, num_ranks=1, *arguments, hook=None):
    return Ranks(num_ranks, experiment.folder, [[str(experiment.yaml), *arguments]], hook)


def assert_ends(ranks, *statuses, message=""):
    """Check that a run ends with one of `statuses` on every rank and without a traceback."""
    got, output = ranks.wait(), "".join(path.read_text() for path in ranks.outputs)
    assert set(got) <= set(statuses), f"exit status {got}, expected {statuses}: {output[-600:]}"
    assert "Traceback" not in output, output[-600:]
    assert message in output, f"no message {message!r}: {output[-600:]}"
    return output


def run_to_end(experiment, num_ranks=1, *arguments, message=""):
    return assert_ends(start(experiment, num_ranks, *arguments), 0, message=message)


def assert_same_end(disturbed, undisturbed):
    """Check that a disturbed run, resumed to its end, equals the undisturbed one."""
    assert_same_weights(disturbed.weights(), undisturbed.weights())
    assert disturbed.metrics() == undisturbed.metrics(), "metrics.jsonl differs"
    names = [{path.name for path in e.run_dir.iterdir()} for e in (disturbed, undisturbed)]
    left = {name for name in names[0] if name.startswith("nonfinite_")}
    assert names[0] - left == names[1], f"files differ: {names[0] ^ names[1]}"
    for epoch in range(3):
        assert disturbed.predictions(epoch) == undisturbed.predictions(epoch), "predictions differ"
    # A kill between the last save and the removal of the state before leaves a third one.
    assert len(disturbed.states()) in (2, 3), disturbed.states()


def logged_steps(experiment):
    """The last optimizer step in metrics.jsonl, whose last line may be torn."""
    path, last = experiment.run_dir / "metrics.jsonl", 0
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            last = json.loads(line)["step"]
        except ValueError:
            assert not line.endswith("}"), f"metrics.jsonl: {line}"
    return last


def saved_step(experiment):
    """The optimizer step that the same command would resume from; 0 is the beginning."""
    states = experiment.run_dir / "resume"
    # In a copy, since cleaning up after a kill is left to the start under test.
    with tempfile.TemporaryDirectory() as copy:
        if states.exists():
            shutil.copytree(states, Path(copy) / "resume")
        run_dir.recover(Path(copy) / "resume")
        state = checkpoint.newest_state(Path(copy))
        return 0 if state is None else int(state.folder.name)


def newest(experiment):
    """The folder of the newest training state."""
    return experiment.run_dir / "resume" / str(saved_step(experiment))


def lost_steps(experiment):
    return logged_steps(experiment) - saved_step(experiment)


def wait_until(condition, what):
    """Wait for a condition that another process fulfils."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.005)


# Kills


def random_kills(bench, bound, *overrides):
    """SIGKILL at moments drawn evenly over the time of a whole run, start-up included."""
    undisturbed, num_kills = bench.undisturbed(), bench.count(25, 1)

    def chain(seed, kills):
        rng, disturbed, lost, halves = random.Random(seed), bench.experiment(), 0, 0
        while kills:
            ranks = start(disturbed, 1, *overrides)
            time.sleep(rng.uniform(0, undisturbed.seconds))
            ranks.processes[0].kill()
            if ranks.wait() == [-signal.SIGKILL]:
                kills -= 1
                halves += bool(list(disturbed.run_dir.glob("**/.*.part")))
                lost = max(lost, lost_steps(disturbed))
            else:
                assert_ends(ranks, 0)
                assert_same_end(disturbed, undisturbed)
                disturbed = bench.experiment()
        run_to_end(disturbed)
        assert_same_end(disturbed, undisturbed)
        return lost, halves

    chains = {bench.rng.random(): kills for kills in (num_kills // 2, -(-num_kills // 2)) if kills}
    outcomes = bench.each(lambda chained: chain(*chained), chains.items())
    lost = max(lost for lost, _ in outcomes)
    assert lost <= bound, f"{lost} steps lost"
    return num_kills, lost, f"{sum(n for _, n in outcomes)} left something half-written"


OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def at_file_operation(run_dir, number, report):
    """Kill this process before its file operation `number` below `run_dir`.

    0 kills never; the number of operations is then written to `report` at the end.
    """
    counter, last = itertools.count(1), [0]

    def path_of(arguments):
        path, *rest = arguments
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        folder = rest[-1] if rest and isinstance(rest[-1], int) and rest[-1] >= 0 else None
        if not os.path.isabs(path) and folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return path

    def audit(event, arguments):
        if event not in OPERATIONS:
            return
        if event == "open":
            arguments = arguments[:1]
        if path_of(arguments).startswith(f"{run_dir}/"):
            last[0] = next(counter)
            if last[0] == number:
                kill_self()

    sys.addaudithook(audit)
    if report:
        at_call(1, "engine.tracking:Tracker.close", lambda: Path(report).write_text(str(last[0])))


def phase_kills(bench):
    """SIGKILL before every single file operation of a run's last two steps, with all they save."""
    undisturbed, nearly = bench.undisturbed(), 3 * STEPS_AN_EPOCH - 1
    counted = bench.halfway(nearly)
    report = counted.folder / "operations"
    hook = functools.partial(at_file_operation, counted.run_dir, 0, report)
    assert_ends(start(counted, 1, EVERY_STEP, hook=hook), 0)
    num_operations = int(report.read_text())

    def trial(number):
        disturbed = bench.halfway(nearly)
        hook = functools.partial(at_file_operation, disturbed.run_dir, number, None)
        assert_ends(start(disturbed, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
        lost = lost_steps(disturbed)
        run_to_end(disturbed)
        assert_same_end(disturbed, undisturbed)
        shutil.rmtree(disturbed.folder)
        return lost

    numbers = bench.some(range(1, num_operations + 1), 2)
    lost = max(bench.each(trial, numbers))
    assert lost <= 1, f"{lost} steps lost"
    return len(numbers), lost, f"{num_operations} operations"


def limit_files(num_bytes, kills):
    """No file may grow past `num_bytes`: the write fails, or kills the process on the spot."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)


def file_limits(bench, num_limits):
    """Sizes between nothing and the largest file of a run."""
    files = [path for path in bench.undisturbed().run_dir.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    return [largest * (i + 1) // (num_limits + 1) for i in range(num_limits)]


def limited_files(bench, kills, num_limits):
    """No file may grow past a size: the kernel kills the process there, or the write fails.

    Unlike the full disks this needs no right to mount.
    """
    undisturbed = bench.undisturbed()

    def trial(limit):
        disturbed = bench.halfway(8)
        ranks = start(disturbed, 1, EVERY_STEP, hook=functools.partial(limit_files, limit, kills))
        if kills:
            assert_ends(ranks, -signal.SIGXFSZ)
        else:
            output = assert_ends(ranks, EXIT_FAILED, message="could not be written (")
            assert f"the same command resumes from {newest(disturbed)}" in output, output
        lost = lost_steps(disturbed)
        run_to_end(disturbed)
        assert_same_end(disturbed, undisturbed)
        return lost

    limits = bench.some(file_limits(bench, num_limits), 1)
    lost = max(bench.each(trial, limits))
    assert lost <= 1, f"{lost} steps lost"
    return len(limits), lost, ""


def rank_kills(bench, parallel):
    """SIGKILL of one of two ranks; the other must end by itself, then both are restarted."""
    undisturbed = bench.undisturbed(2, parallel=parallel)
    disturbed, kills, lost = bench.experiment(parallel=parallel), bench.count(6, 1), 0
    done = 0
    while done < kills:
        ranks = start(disturbed, 2, EVERY_STEP)
        # Before they have met, ranks wait for each other; only torchrun would notice a dead one.
        wait_until(lambda ranks=ranks: "parallel: " in ranks.output(), "the ranks to meet")
        time.sleep(bench.rng.uniform(0, 0.6) * undisturbed.seconds)
        bench.rng.choice(ranks.processes).kill()
        # Rank 0 takes the store with it, by which rank 1 would learn of its death.
        got = ranks.wait()
        if -signal.SIGKILL not in got:
            disturbed = bench.experiment(parallel=parallel)
            continue
        assert set(got) <= {-signal.SIGKILL, EXIT_FAILED}, got
        output = "".join(ranks.output(rank) for rank in range(2))
        assert "Traceback" not in output, output[-600:]
        lost, done = max(lost, lost_steps(disturbed)), done + 1
    run_to_end(disturbed, 2)
    assert_same_end(disturbed, undisturbed)
    assert lost <= 1, f"{lost} steps lost"
    return kills, lost, ""


def ranks_of(agent):
    """Process ids of the ranks that a torchrun process has started."""
    found = []
    for task in Path(f"/proc/{agent}/task").glob("*/children"):
        for pid in task.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(part.endswith(b"run.py") for part in command):
                found.append(int(pid))
    return found


def torchrun_restarts(bench):
    """torchrun itself, which restarts its ranks when one is killed."""
    keys = {"num_train": 96, "num_workers": 2}
    undisturbed, disturbed = bench.undisturbed(2, **keys), bench.experiment(**keys)
    kills, reached = bench.count(3, 1), []
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max-restarts", str(kills),
        str(ROOT / "run.py"), str(disturbed.yaml), EVERY_STEP,
    ]  # fmt: skip
    output = disturbed.folder / "torchrun.txt"
    with open(output, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            for _ in range(kills):
                goal = logged_steps(disturbed) + bench.rng.randint(2, 8)
                wait_until(
                    lambda goal=goal: logged_steps(disturbed) >= goal, "steps under torchrun"
                )
                os.kill(bench.rng.choice(ranks_of(agent.pid)), signal.SIGKILL)
                reached.append(logged_steps(disturbed))
                wait_until(lambda: logged_steps(disturbed) != reached[-1], "a restart")
            status = agent.wait(PATIENCE_S)
        finally:
            agent.terminate()
            agent.wait()
    output = output.read_text()
    assert status == 0, output[-900:]
    begun = [int(step) for step in re.findall(r"continuing from \S+/(\d+);", output)]
    assert len(begun) == kills, f"{len(begun)} restarts resumed: {output[-900:]}"
    assert_same_end(disturbed, undisturbed)
    lost = max(last - step for last, step in zip(reached, begun, strict=True))
    assert lost <= 1, f"{lost} steps lost"
    return kills, max(lost, 0), ""


# Signals


def slow_steps(seconds):
    """Leave time for a signal between two steps."""
    step = training.Trainer.train_step

    def slowly(*arguments):
        time.sleep(seconds)
        return step(*arguments)

    training.Trainer.train_step = slowly


def stop_signal(bench, number):
    undisturbed, lost = bench.undisturbed(), 0
    tries = bench.count(3, 1)
    for disturbed in [bench.experiment() for _ in range(tries)]:
        ranks = start(disturbed, hook=functools.partial(slow_steps, 0.1))
        goal = bench.rng.randint(1, STEPS_AN_EPOCH + 1)
        wait_until(lambda v=disturbed, g=goal: logged_steps(v) >= g, f"step {goal}")
        os.kill(ranks.pid, number)
        output = assert_ends(
            ranks, EXIT_INTERRUPTED, message="the same command continues from here"
        )
        (stopped,) = re.findall(r"stopped after optimizer step (\d+), state saved", output)
        assert int(stopped) == saved_step(disturbed) >= goal
        lost = max(lost, lost_steps(disturbed))
        run_to_end(disturbed, message=f"resume/{stopped};")
        assert_same_end(disturbed, undisturbed)
    assert lost == 0, f"{lost} steps lost"
    return tries, lost, ""


def save_signal(bench):
    undisturbed, tries = bench.undisturbed(), bench.count(3, 1)
    for disturbed in [bench.experiment() for _ in range(tries)]:
        ranks = start(disturbed, hook=functools.partial(slow_steps, 0.3))
        wait_until(lambda v=disturbed: logged_steps(v) >= 1, "step 1")
        os.kill(ranks.pid, signal.SIGUSR1)
        resume = disturbed.run_dir / "resume"
        wait_until(lambda r=resume: list(r.glob("[1-4]")), "a state within the first epoch")
        assert_ends(ranks, 0)
        assert_same_end(disturbed, undisturbed)
    return tries, 0, ""


# Disks


def own_mounts():
    """Give this process its own view of the mounts; whether that is permitted."""
    library = ctypes.CDLL(None, use_errno=True)
    return library.unshare(CLONE_NEWNS) == 0 and mount("none", "/", None, MS_REC | MS_PRIVATE)


def mount(source, target, kind, flags=0, options=None):
    texts = (None if text is None else str(text).encode() for text in (source, target, kind))
    options = None if options is None else options.encode()
    library = ctypes.CDLL(None, use_errno=True)
    return library.mount(*texts, ctypes.c_ulong(flags), options) == 0


@contextmanager
def small_disk(disturbed, num_bytes):
    """Give an experiment its own disk to save on."""
    disk = disturbed.folder / "exps"
    disk.mkdir()
    assert mount("none", disk, "tmpfs", 0, f"size={num_bytes}"), "cannot mount"
    try:
        yield disk
    finally:
        ctypes.CDLL(None).umount2(str(disk).encode(), MNT_DETACH)


def full_disk(bench, num_ranks=1, **keys):
    """Disks of several sizes, all too small; then the disk grows, and the same command resumes."""
    if not bench.mounts:
        return None
    undisturbed = bench.undisturbed(num_ranks, **keys)
    used = sum(path.stat().st_size for path in undisturbed.run_dir.rglob("*") if path.is_file())

    def trial(size):
        disturbed = bench.experiment(**keys)
        with small_disk(disturbed, size) as disk:
            ranks = start(disturbed, num_ranks, EVERY_STEP)
            output = assert_ends(ranks, EXIT_FAILED, message="No space left on device")
            assert output.count("could not be written (") == 1, output
            step = saved_step(disturbed)
            left = f"resumes from {newest(disturbed)}" if step else "nothing was saved before"
            assert left in output, output
            lost = lost_steps(disturbed)
            assert mount("none", disk, None, MS_REMOUNT, f"size={4 * used}")
            run_to_end(disturbed, num_ranks)
            assert_same_end(disturbed, undisturbed)
        return lost

    count = bench.count(8 if num_ranks == 1 else 3, 1)
    lost = max(bench.each(trial, [used * (i + 1) // (count + 1) for i in range(count)]))
    assert lost <= 1, f"{lost} steps lost"
    return count, lost, ""


def read_only(bench):
    if not bench.mounts:
        return None
    disturbed, source = bench.experiment(), bench.halfway(8)
    with small_disk(disturbed, 1 << 28) as disk:
        shutil.copytree(source.run_dir, disturbed.run_dir)
        assert mount("none", disk, None, MS_REMOUNT | MS_RDONLY)
        message = "cannot be written (no permission, or mounted"
        assert_ends(start(disturbed), EXIT_USER_ERROR, message=message)
        assert mount("none", disk, None, MS_REMOUNT)
        lost = lost_steps(disturbed)
        run_to_end(disturbed)
        assert_same_end(disturbed, bench.undisturbed())
    return 1, lost, ""


DAMAGES = {
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "bit-flipped": lambda path, rng: flip_a_bit(path, rng),
    "missing": lambda path, rng: path.unlink(),
}


def flip_a_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1
    path.write_bytes(content)


def damaged_state(bench, damage):
    """Damages every file of the newest state in turn."""
    undisturbed = bench.undisturbed()
    source = undisturbed.states()[-1]
    names = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())

    def trial(name):
        disturbed = bench.experiment()
        shutil.copytree(undisturbed.run_dir, disturbed.run_dir)
        state = disturbed.run_dir / "resume" / source.name
        DAMAGES[damage](state / name, bench.rng)
        lost = lost_steps(disturbed)
        run_to_end(disturbed, message=f"{state}: damaged, trying the one before (")
        assert_same_end(disturbed, undisturbed)
        return lost

    names = bench.some(names, 1)
    lost = max(bench.each(trial, names))
    assert lost <= STEPS_AN_EPOCH, f"{lost} steps lost"
    return len(names), lost, ""


# Other faults


def touch_and_wait(here, go):
    Path(here).touch()
    wait_until(Path(go).exists, "the other process")


def two_processes(bench):
    disturbed = bench.experiment()
    here, go = disturbed.folder / "here", disturbed.folder / "go"
    wait = functools.partial(touch_and_wait, here, go)
    first = start(
        disturbed, hook=functools.partial(at_call, 5, "engine.trainer:Trainer.train_step", wait)
    )
    try:
        wait_until(here.exists, "the first process")
        second = Ranks(1, disturbed.folder / "exps", [[str(disturbed.yaml)]])
        assert_ends(second, EXIT_USER_ERROR, message="another training run is using this directory")
    finally:
        go.touch()
    assert_ends(first, 0)
    assert_same_end(disturbed, bench.undisturbed())
    return 1, 0, ""


def changed_data(bench):
    disturbed = bench.halfway(8)
    before = disturbed.train.read_text()
    disturbed.write("train.json", make_records(18, seed=9))
    message = "holds other records than when the run began (sha256"
    assert_ends(start(disturbed), EXIT_USER_ERROR, message=message)
    allowed = bench.halfway(8)
    shutil.copy(disturbed.train, allowed.train)
    message = "continuing, since allow_changed_data is true"
    run_to_end(allowed, 1, "allow_changed_data=true", message=message)
    disturbed.write("train.json", before)
    lost = lost_steps(disturbed)
    run_to_end(disturbed)
    assert_same_end(disturbed, bench.undisturbed())
    return 1, lost, ""


YEAR_S = 365 * 24 * 3600


def set_clock_back():
    """From now on this process reads the time of a year ago."""
    now = time.time
    time.time = lambda: now() - YEAR_S
    time.time_ns = lambda: int(time.time() * 1e9)


def clock_set_back(bench):
    """The clock jumps back in the middle of a run, which is then killed and its files backdated."""
    disturbed = bench.experiment()

    hook = functools.partial(in_turn, [
        functools.partial(at_call, 5, "engine.trainer:Trainer.train_step", set_clock_back),
        functools.partial(at_call, 9, "engine.trainer:Trainer.train_step", kill_self),
    ])  # fmt: skip
    assert_ends(start(disturbed, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
    for path in disturbed.states()[-1].rglob("*"):
        os.utime(path, (time.time() - YEAR_S,) * 2)
    os.utime(disturbed.states()[-1], (time.time() - YEAR_S,) * 2)
    lost = lost_steps(disturbed)
    assert_ends(start(disturbed, hook=set_clock_back), 0, message="resume/8;")
    assert_same_end(disturbed, bench.undisturbed())
    return 1, lost, ""


def in_turn(actions):
    for action in actions:
        action()


def put_nan_in_a_gradient(step):
    """One element of one gradient is NaN at step `step`; print whether weights changed."""
    norm, one_step, calls = (
        sharing.gradient_norm,
        training.Trainer.train_step,
        itertools.count(1),
    )

    def with_nan(model):
        if next(calls) == step:
            parameter = [p for p in model.parameters() if p.grad is not None][-1]
            parameter.grad.view(-1)[0] = float("nan")
        return norm(model)

    def watched(trainer, *arguments):
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        try:
            return one_step(trainer, *arguments)
        except RunFailed:
            pairs = zip(before, trainer.model.parameters(), strict=True)
            print("weights unchanged:", all(torch.equal(old, new) for old, new in pairs))
            raise

    sharing.gradient_norm, training.Trainer.train_step = with_nan, watched


def nan_gradient(bench):
    tries, lost = bench.count(3, 1), 0
    for _ in range(tries):
        disturbed, step = bench.experiment(), bench.rng.randint(2, 3 * STEPS_AN_EPOCH)
        hook = functools.partial(put_nan_in_a_gradient, step)
        message = f"is not finite at optimizer step {step - 1} "
        output = assert_ends(
            start(disturbed, 1, EVERY_STEP, hook=hook), EXIT_FAILED, message=message
        )
        assert "weights unchanged: True" in output, output
        batch = disturbed.run_dir / f"nonfinite_step{step - 1}_rank0.json"
        assert json.loads(batch.read_text())[0]["input_ids"], "the batch was not saved"
        lost = max(lost, lost_steps(disturbed))
        run_to_end(disturbed)
        assert_same_end(disturbed, bench.undisturbed())
    assert lost <= 0, f"{lost} steps lost"
    return tries, lost, ""


def lose_rank(which, step, action):
    """Disturb rank `which` before step `step`; the others wait seconds, not half an hour."""
    distributed.COLLECTIVE_TIMEOUT_S, failures.LOST_TIMEOUT_S = 15.0, 2.0
    target = "engine.trainer:Trainer.train_step"
    at_call(step, target, lambda: os.environ["RANK"] == str(which) and action())


def freeze_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def lost_rank(bench, which, action, words, speaks):
    """One of three ranks is lost: the others end, and one of them names it."""
    undisturbed, disturbed = bench.undisturbed(3), bench.experiment()
    hook = functools.partial(lose_rank, which, 4, action)
    ranks = start(disturbed, 3, EVERY_STEP, hook=hook)
    others = [process for rank, process in enumerate(ranks.processes) if rank != which]
    for process in others:
        process.join(PATIENCE_S)
    try:
        assert not any(process.is_alive() for process in others), "the others hang too"
        assert [process.exitcode for process in others] == [EXIT_FAILED] * 2
    finally:
        for process in ranks.processes:
            process.kill()
        ranks.wait()
    output = ranks.output(speaks)
    assert re.search(words, output), output[-900:]
    assert "Traceback" not in output, output[-900:]
    lost = lost_steps(disturbed)
    run_to_end(disturbed, 3)
    assert_same_end(disturbed, undisturbed)
    assert lost <= 1, f"{lost} steps lost"
    return 1, lost, ""


def hang_self():
    time.sleep(3600)


KNOWN = r"lost contact after optimizer step 3 \(epoch 1\).*: rank {0} \(process \d+ on \S+\) "
SILENT = KNOWN + "does not answer: it has died or hangs"
NO_STORE = r"rank 0 or torchrun, whichever held the ranks' store, has ended or does not answer"
LOSSES = {
    "rank 1 of 3 hangs": (lost_rank, 1, hang_self, SILENT.format(1), 0),
    "rank 0 of 3 hangs": (lost_rank, 0, hang_self, SILENT.format(0), 1),
    "rank 2 of 3 killed": (lost_rank, 2, kill_self, SILENT.format(2), 0),
    "rank 0 of 3 frozen, with the ranks' store": (lost_rank, 0, freeze_self, NO_STORE, 1),
}


def cases(bench):
    """(name, function and arguments) of every case; it returns (times, steps lost, remark) or None.

    A quick run has one case of each kind.
    """
    some, of_2 = bench.some, "SIGKILL of one of 2 ranks"
    yield from {
        "SIGKILL at a random moment, saving every step": (random_kills, 1, EVERY_STEP),
        "SIGKILL at a random moment, saving every epoch": (
            random_kills, STEPS_AN_EPOCH, "num_workers=2",
        ),
        "SIGKILL before each file operation of saving": (phase_kills,),
        "killed in the middle of writing a file": (limited_files, True, 8),
        **{f"{of_2} ({kind})": (rank_kills, kind) for kind in some(("ddp", "fsdp"), 1)},
        "torchrun --max-restarts, one of 2 ranks killed": (torchrun_restarts,),
        **{
            f"{number.name} at a random step": (stop_signal, number)
            for number in some((signal.SIGTERM, signal.SIGINT), 1)
        },
        "SIGUSR1": (save_signal,),
        "disk full (tmpfs of growing sizes)": (full_disk,),
        **{
            f"disk full, 2 ranks ({kind})": (functools.partial(full_disk, parallel=kind), 2)
            for kind in some(("ddp", "fsdp"), 1)
        },
        "write fails (limit of a file's size)": (limited_files, False, 5),
        "read-only run directory (remounted)": (read_only,),
        **{f"newest state: a file {name}": (damaged_state, name) for name in some(DAMAGES, 1)},
        "two processes on one run directory": (two_processes,),
        "data file changed between stop and resume": (changed_data,),
        "clock set back a year": (clock_set_back,),
        "NaN in a gradient": (nan_gradient,),
        **dict(some(LOSSES.items(), 2)),
    }.items()  # fmt: skip


def run_cases(bench, only):
    """Print the table of the cases whose name contains `only`; whether none failed."""
    passed, line = True, "| {:<46} | {:>5} | {:>10} | {} |"
    print(line.format("case", "times", "steps lost", "result"), "|---|---:|---:|---|", sep="\n")
    for name, (attempt, *arguments) in cases(bench):
        if only not in name:
            continue
        times, lost, result = "", "", "passed"
        try:
            outcome = attempt(bench, *arguments)
        except Exception as error:
            result, passed = "FAILED: " + " ".join(str(error).split()), False
        else:
            if outcome is None:
                result = "not tried: this needs the right to mount (root)"
            else:
                times, lost, remark = outcome
                result += f"; {remark}" if remark else ""
        print(line.format(name, times, lost, result), flush=True)
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, each tried fewer times")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="cases whose name contains this"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="torture-")
    began = time.monotonic()
    # Looking for the newest state logs damaged ones, which are expected here.
    log.addHandler(logging.NullHandler())
    bench = Bench(folder, options.quick, options.seed)
    bench.undisturbed()
    passed = run_cases(bench, options.only)
    print(f"seed {options.seed}, {(time.monotonic() - began) / 60:.1f} minutes")
    if passed:
        shutil.rmtree(folder)
    else:
        print(f"what the runs left is in {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
