"""`make torture`: what a run survives, tried again and again and counted in one table.

    .venv/bin/python tests/torture.py [--quick] [--only WORDS] [--seed N]

Every row disturbs tiny runs of run.py, in processes of their own, in one way. It is good when the
disturbed run ends as it should and, continued by the same command, comes to the end of an
undisturbed one: final weights and predictions bit for bit, metrics.jsonl line by line but for what
clocks measured. "Lost" are optimizer steps that were logged and had to be done again.
docs/faults.md explains the rows. The exit status is 1 when a row is bad. pytest does not collect
this script; test_torture.py runs a part of it with --quick --only.
"""

import argparse
import ctypes
import functools
import itertools
import json
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
from engine import trainer as training  # noqa: E402
from utils import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunFailed  # noqa: E402

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
    """Where trials take place: their folder, how many there are, and undisturbed runs."""

    def __init__(self, folder, quick, seed):
        self.folder, self.quick = Path(folder), quick
        self.rng = random.Random(seed)
        self.numbers = itertools.count()
        self.undisturbed, self.stopped = {}, {}
        self.mounts = own_mounts()
        # The first process waits for all that the others have imported already.
        Ranks(1, self.folder, [["--help"]]).wait()

    def count(self, full, quick):
        return quick if self.quick else full

    def some(self, values, quick):
        """All values, or as many as `quick` of them in a quick run."""
        values = list(values)
        return self.rng.sample(values, min(quick, len(values))) if self.quick else values

    def victim(self, **keys):
        """A fresh experiment to be disturbed."""
        folder = self.folder / f"trial_{next(self.numbers)}"
        if self.undisturbed:
            shutil.copytree(next(iter(self.undisturbed.values())).model, folder / "model")
        return Experiment(folder, **{**KEYS, **keys})

    def straight(self, num_ranks=1, **keys):
        """The finished run that nothing disturbed; `seconds` is how long it took."""
        key = (num_ranks, *sorted(keys.items()))
        if key not in self.undisturbed:
            experiment = self.victim(**keys)
            began = time.monotonic()
            end(experiment, num_ranks)
            experiment.seconds = time.monotonic() - began
            self.undisturbed[key] = experiment
        return self.undisturbed[key]

    def halfway(self, step):
        """A fresh copy of a run that was killed when it logged optimizer step `step`.

        It saved every step, so `step` - 1 is what it goes on from.
        """
        if step not in self.stopped:
            victim = self.victim()
            log = step + (step - 1) // STEPS_AN_EPOCH  # each epoch before logged its evaluation too
            hook = functools.partial(at_call, log, "engine.tracking:Tracker.log", kill_self)
            ends(start(victim, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
            assert saved_step(victim) == step - 1
            self.stopped[step] = victim
        copy = self.victim()
        shutil.copytree(self.stopped[step].run_dir, copy.run_dir)
        return copy

    def each(self, trial, values):
        """The results of `trial` on every value, two at a time."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(trial, values))


# What every row asks of a run


def start(experiment, num_ranks=1, *arguments, hook=None):
    return Ranks(num_ranks, experiment.folder, [[str(experiment.yaml), *arguments]], hook)


def ends(ranks, *statuses, says=""):
    """Make sure that a run ends with one of `statuses` on every rank, and with no traceback."""
    got, shown = ranks.wait(), "".join(path.read_text() for path in ranks.outputs)
    assert set(got) <= set(statuses), f"exit status {got}, expected {statuses}: {shown[-600:]}"
    assert "Traceback" not in shown, shown[-600:]
    assert says in shown, f"{says!r} was not said: {shown[-600:]}"
    return shown


def end(experiment, num_ranks=1, *arguments, says=""):
    return ends(start(experiment, num_ranks, *arguments), 0, says=says)


def same(victim, straight):
    """Make sure that a disturbed run that was continued to its end is the undisturbed one."""
    assert_same_weights(victim.weights(), straight.weights())
    assert victim.metrics() == straight.metrics(), "metrics.jsonl differs"
    names = [{path.name for path in e.run_dir.iterdir()} for e in (victim, straight)]
    left = {name for name in names[0] if name.startswith("nonfinite_")}
    assert names[0] - left == names[1], f"files differ: {names[0] ^ names[1]}"
    for epoch in range(3):
        assert victim.predictions(epoch) == straight.predictions(epoch), "predictions differ"
    # A kill between the last save and the removal of the state before leaves a third one.
    assert len(victim.states()) in (2, 3), victim.states()


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
    """The optimizer step that the same command would go on from; 0 is the beginning."""
    states = experiment.run_dir / "resume"
    # In a copy, since tidying up after a kill is what the next start is tried for.
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
    """Poll a condition that another process is to fulfil."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


# Kills


def random_kills(bench, bound, *overrides):
    """SIGKILL at moments drawn evenly over the time of a whole run, start-up included."""
    straight, num_kills = bench.straight(), bench.count(25, 1)

    def chain(seed, kills):
        rng, victim, lost, halves = random.Random(seed), bench.victim(), 0, 0
        while kills:
            ranks = start(victim, 1, *overrides)
            time.sleep(rng.uniform(0, straight.seconds))
            ranks.processes[0].kill()
            if ranks.wait() == [-signal.SIGKILL]:
                kills -= 1
                halves += bool(list(victim.run_dir.glob("**/.*.part")))
                lost = max(lost, lost_steps(victim))
            else:
                ends(ranks, 0)
                same(victim, straight)
                victim = bench.victim()
        end(victim)
        same(victim, straight)
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
    straight, nearly = bench.straight(), 3 * STEPS_AN_EPOCH - 1
    counted = bench.halfway(nearly)
    report = counted.folder / "operations"
    hook = functools.partial(at_file_operation, counted.run_dir, 0, report)
    ends(start(counted, 1, EVERY_STEP, hook=hook), 0)
    num_operations = int(report.read_text())

    def trial(number):
        victim = bench.halfway(nearly)
        hook = functools.partial(at_file_operation, victim.run_dir, number, None)
        ends(start(victim, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
        lost = lost_steps(victim)
        end(victim)
        same(victim, straight)
        shutil.rmtree(victim.folder)
        return lost

    numbers = bench.some(range(1, num_operations + 1), 2)
    lost = max(bench.each(trial, numbers))
    assert lost <= 1, f"{lost} steps lost"
    return len(numbers), lost, f"{num_operations} operations"


def limit_files(num_bytes, kills):
    """No file may grow past `num_bytes`: the write fails, or ends the process where it stands."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)


def file_limits(bench, num_limits):
    """Sizes between nothing and the largest file of a run."""
    files = [path for path in bench.straight().run_dir.rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    return [largest * (i + 1) // (num_limits + 1) for i in range(num_limits)]


def limited_files(bench, kills, num_limits):
    """No file grows past a size: the kernel ends the process there, or the write fails.

    Needs no right to mount, unlike the full disks.
    """
    straight = bench.straight()

    def trial(limit):
        victim = bench.halfway(8)
        ranks = start(victim, 1, EVERY_STEP, hook=functools.partial(limit_files, limit, kills))
        if kills:
            ends(ranks, -signal.SIGXFSZ)
        else:
            shown = ends(ranks, EXIT_FAILED, says="could not be written (")
            assert f"the same command resumes from {newest(victim)}" in shown, shown
        lost = lost_steps(victim)
        end(victim)
        same(victim, straight)
        return lost

    limits = bench.some(file_limits(bench, num_limits), 1)
    lost = max(bench.each(trial, limits))
    assert lost <= 1, f"{lost} steps lost"
    return len(limits), lost, ""


def rank_kills(bench, parallel):
    """SIGKILL of one of two ranks; the other must end by itself, then both are started again."""
    straight = bench.straight(2, parallel=parallel)
    victim, kills, lost = bench.victim(parallel=parallel), bench.count(6, 1), 0
    done = 0
    while done < kills:
        ranks = start(victim, 2, EVERY_STEP)
        # Ranks that have not met yet wait for each other; torchrun is who sees that one is gone.
        wait_until(lambda ranks=ranks: "parallel: " in ranks.output(), "ranks that meet")
        time.sleep(bench.rng.uniform(0, 0.6) * straight.seconds)
        bench.rng.choice(ranks.processes).kill()
        # Rank 1 loses sight of the store together with rank 0, and of a group not yet there.
        got = ranks.wait()
        if -signal.SIGKILL not in got:
            victim = bench.victim(parallel=parallel)
            continue
        assert set(got) <= {-signal.SIGKILL, EXIT_FAILED}, got
        shown = "".join(ranks.output(rank) for rank in range(2))
        assert "Traceback" not in shown, shown[-600:]
        lost, done = max(lost, lost_steps(victim)), done + 1
    end(victim, 2)
    same(victim, straight)
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
    """The real command line, which starts its ranks again by itself when one is killed."""
    keys = {"num_train": 96, "num_workers": 2}
    straight, victim = bench.straight(2, **keys), bench.victim(**keys)
    kills, reached = bench.count(3, 1), []
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--max-restarts", str(kills),
        str(ROOT / "run.py"), str(victim.yaml), EVERY_STEP,
    ]  # fmt: skip
    output = victim.folder / "torchrun.txt"
    with open(output, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        agent = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            for _ in range(kills):
                goal = logged_steps(victim) + bench.rng.randint(2, 8)
                wait_until(lambda goal=goal: logged_steps(victim) >= goal, "steps under torchrun")
                os.kill(bench.rng.choice(ranks_of(agent.pid)), signal.SIGKILL)
                reached.append(logged_steps(victim))
                wait_until(lambda: logged_steps(victim) != reached[-1], "a restart")
            status = agent.wait(PATIENCE_S)
        finally:
            agent.terminate()
            agent.wait()
    shown = output.read_text()
    assert status == 0, shown[-900:]
    begun = [int(step) for step in re.findall(r"continuing from \S+/(\d+);", shown)]
    assert len(begun) == kills, f"{len(begun)} restarts went on: {shown[-900:]}"
    same(victim, straight)
    lost = max(last - step for last, step in zip(reached, begun, strict=True))
    assert lost <= 1, f"{lost} steps lost"
    return kills, max(lost, 0), ""


# Signals


def slow_steps(seconds):
    """Give the world time to act between two steps."""
    step = training.Trainer.train_step

    def slowly(*arguments):
        time.sleep(seconds)
        return step(*arguments)

    training.Trainer.train_step = slowly


def stop_signal(bench, number):
    straight, lost = bench.straight(), 0
    tries = bench.count(3, 1)
    for victim in [bench.victim() for _ in range(tries)]:
        ranks = start(victim, hook=functools.partial(slow_steps, 0.1))
        goal = bench.rng.randint(1, STEPS_AN_EPOCH + 1)
        wait_until(lambda v=victim, g=goal: logged_steps(v) >= g, f"step {goal}")
        os.kill(ranks.pid, number)
        shown = ends(ranks, EXIT_INTERRUPTED, says="the same command continues from here")
        (stopped,) = re.findall(r"stopped after optimizer step (\d+), state saved", shown)
        assert int(stopped) == saved_step(victim) >= goal
        lost = max(lost, lost_steps(victim))
        end(victim, says=f"resume/{stopped};")
        same(victim, straight)
    assert lost == 0, f"{lost} steps lost"
    return tries, lost, ""


def save_signal(bench):
    straight, tries = bench.straight(), bench.count(3, 1)
    for victim in [bench.victim() for _ in range(tries)]:
        ranks = start(victim, hook=functools.partial(slow_steps, 0.3))
        wait_until(lambda v=victim: logged_steps(v) >= 1, "step 1")
        os.kill(ranks.pid, signal.SIGUSR1)
        resume = victim.run_dir / "resume"
        wait_until(lambda r=resume: list(r.glob("[1-4]")), "a state within the first epoch")
        ends(ranks, 0)
        same(victim, straight)
    return tries, 0, ""


# Disks


def own_mounts():
    """A view of the mounts of our own, which goes with this process: whether we may have that."""
    library = ctypes.CDLL(None, use_errno=True)
    return library.unshare(CLONE_NEWNS) == 0 and mount("none", "/", None, MS_REC | MS_PRIVATE)


def mount(source, target, kind, flags=0, options=None):
    texts = (None if text is None else str(text).encode() for text in (source, target, kind))
    options = None if options is None else options.encode()
    library = ctypes.CDLL(None, use_errno=True)
    return library.mount(*texts, ctypes.c_ulong(flags), options) == 0


@contextmanager
def small_disk(victim, num_bytes):
    """Give an experiment a disk of its own to save on."""
    disk = victim.folder / "exps"
    disk.mkdir()
    assert mount("none", disk, "tmpfs", 0, f"size={num_bytes}"), "cannot mount"
    try:
        yield disk
    finally:
        ctypes.CDLL(None).umount2(str(disk).encode(), MNT_DETACH)


def full_disk(bench, num_ranks=1, **keys):
    """A disk too small for the run, in steps; then it grows, and the same command goes on."""
    if not bench.mounts:
        return None
    straight = bench.straight(num_ranks, **keys)
    used = sum(path.stat().st_size for path in straight.run_dir.rglob("*") if path.is_file())

    def trial(size):
        victim = bench.victim(**keys)
        with small_disk(victim, size) as disk:
            ranks = start(victim, num_ranks, EVERY_STEP)
            shown = ends(ranks, EXIT_FAILED, says="No space left on device")
            assert shown.count("could not be written (") == 1, shown
            step = saved_step(victim)
            left = f"resumes from {newest(victim)}" if step else "nothing was saved before"
            assert left in shown, shown
            lost = lost_steps(victim)
            assert mount("none", disk, None, MS_REMOUNT, f"size={4 * used}")
            end(victim, num_ranks)
            same(victim, straight)
        return lost

    count = bench.count(8 if num_ranks == 1 else 3, 1)
    lost = max(bench.each(trial, [used * (i + 1) // (count + 1) for i in range(count)]))
    assert lost <= 1, f"{lost} steps lost"
    return count, lost, ""


def read_only(bench):
    if not bench.mounts:
        return None
    victim, source = bench.victim(), bench.halfway(8)
    with small_disk(victim, 1 << 28) as disk:
        shutil.copytree(source.run_dir, victim.run_dir)
        assert mount("none", disk, None, MS_REMOUNT | MS_RDONLY)
        says = "cannot be written (no permission, or mounted"
        ends(start(victim), EXIT_USER_ERROR, says=says)
        assert mount("none", disk, None, MS_REMOUNT)
        lost = lost_steps(victim)
        end(victim)
        same(victim, bench.straight())
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
    """Every file of the newest state in turn."""
    straight = bench.straight()
    newest = straight.states()[-1]
    names = sorted(p.relative_to(newest) for p in newest.rglob("*") if p.is_file())

    def trial(name):
        victim = bench.victim()
        shutil.copytree(straight.run_dir, victim.run_dir)
        state = victim.run_dir / "resume" / newest.name
        DAMAGES[damage](state / name, bench.rng)
        lost = lost_steps(victim)
        end(victim, says=f"{state}: damaged, trying the one before (")
        same(victim, straight)
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
    victim = bench.victim()
    here, go = victim.folder / "here", victim.folder / "go"
    wait = functools.partial(touch_and_wait, here, go)
    first = start(
        victim, hook=functools.partial(at_call, 5, "engine.trainer:Trainer.train_step", wait)
    )
    try:
        wait_until(here.exists, "the first process")
        second = Ranks(1, victim.folder / "exps", [[str(victim.yaml)]])
        ends(second, EXIT_USER_ERROR, says="another training run is using this directory")
    finally:
        go.touch()
    ends(first, 0)
    same(victim, bench.straight())
    return 1, 0, ""


def changed_data(bench):
    victim = bench.halfway(8)
    before = victim.train.read_text()
    victim.write("train.json", make_records(18, seed=9))
    says = "holds other records than when the run began (sha256"
    ends(start(victim), EXIT_USER_ERROR, says=says)
    allowed = bench.halfway(8)
    shutil.copy(victim.train, allowed.train)
    says = "going on, since allow_changed_data is true"
    end(allowed, 1, "allow_changed_data=true", says=says)
    victim.write("train.json", before)
    lost = lost_steps(victim)
    end(victim)
    same(victim, bench.straight())
    return 1, lost, ""


YEAR_S = 365 * 24 * 3600


def set_clock_back():
    """From now on this process reads a time a year ago."""
    now = time.time
    time.time = lambda: now() - YEAR_S
    time.time_ns = lambda: int(time.time() * 1e9)


def clock_set_back(bench):
    """In the middle of a run, which is then killed; its files are then dated a year ago as well."""
    victim = bench.victim()

    hook = functools.partial(in_turn, [
        functools.partial(at_call, 5, "engine.trainer:Trainer.train_step", set_clock_back),
        functools.partial(at_call, 9, "engine.trainer:Trainer.train_step", kill_self),
    ])  # fmt: skip
    ends(start(victim, 1, EVERY_STEP, hook=hook), -signal.SIGKILL)
    for path in victim.states()[-1].rglob("*"):
        os.utime(path, (time.time() - YEAR_S,) * 2)
    os.utime(victim.states()[-1], (time.time() - YEAR_S,) * 2)
    lost = lost_steps(victim)
    ends(start(victim, hook=set_clock_back), 0, says="resume/8;")
    same(victim, bench.straight())
    return 1, lost, ""


def in_turn(actions):
    for action in actions:
        action()


def spoil_a_gradient(step):
    """One element of one gradient is NaN at step `step`; tell whether weights change after it."""
    norm, one_step, calls = (
        distributed.gradient_norm,
        training.Trainer.train_step,
        itertools.count(1),
    )

    def spoilt(model):
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

    distributed.gradient_norm, training.Trainer.train_step = spoilt, watched


def spoilt_gradient(bench):
    tries, lost = bench.count(3, 1), 0
    for _ in range(tries):
        victim, step = bench.victim(), bench.rng.randint(2, 3 * STEPS_AN_EPOCH)
        hook = functools.partial(spoil_a_gradient, step)
        says = f"is not finite at optimizer step {step - 1} "
        shown = ends(start(victim, 1, EVERY_STEP, hook=hook), EXIT_FAILED, says=says)
        assert "weights unchanged: True" in shown, shown
        batch = victim.run_dir / f"nonfinite_step{step - 1}_rank0.json"
        assert json.loads(batch.read_text())[0]["input_ids"], "the batch was not saved"
        lost = max(lost, lost_steps(victim))
        end(victim)
        same(victim, bench.straight())
    assert lost <= 0, f"{lost} steps lost"
    return tries, lost, ""


def lose_rank(which, step, action):
    """Rank `which` comes to harm before step `step`; the others wait seconds, not half an hour."""
    distributed.COLLECTIVE_TIMEOUT_S, failures.LOST_TIMEOUT_S = 15.0, 2.0
    here = os.environ["RANK"] == str(which)
    at_call(step, "engine.trainer:Trainer.train_step", lambda: here and action())


def freeze_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def lost_rank(bench, which, action, words, speaks):
    """One of three ranks is lost: the others end, and the lowest that is left names it."""
    straight, victim = bench.straight(3), bench.victim()
    hook = functools.partial(lose_rank, which, 4, action)
    ranks = start(victim, 3, EVERY_STEP, hook=hook)
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
    shown = ranks.output(speaks)
    assert re.search(words, shown), shown[-900:]
    assert "Traceback" not in shown, shown[-900:]
    lost = lost_steps(victim)
    end(victim, 3)
    same(victim, straight)
    assert lost <= 1, f"{lost} steps lost"
    return 1, lost, ""


def hang_self():
    time.sleep(3600)


KNOWN = r"lost contact after optimizer step 3 \(epoch 1\): rank {0} \(process \d+ on \S+\) "
SILENT = KNOWN + "does not answer: it has died or hangs"
NO_STORE = r"rank 0 or torchrun, whichever held the ranks' store, is gone or does not answer"
LOSSES = {
    "rank 1 of 3 hangs": (lost_rank, 1, hang_self, SILENT.format(1), 0),
    "rank 0 of 3 hangs": (lost_rank, 0, hang_self, SILENT.format(0), 1),
    "rank 2 of 3 killed": (lost_rank, 2, kill_self, SILENT.format(2), 0),
    "rank 0 of 3 frozen, with the ranks' store": (lost_rank, 0, freeze_self, NO_STORE, 1),
}


def rows(bench):
    """(what is tried, how) of every row; each returns (how often, steps lost, remark) or None.

    A quick run has one row of each kind.
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
        "NaN in a gradient": (spoilt_gradient,),
        **dict(some(LOSSES.items(), 2)),
    }.items()  # fmt: skip


def show(bench, only):
    """Print the table row by row, of rows that hold the words `only`; whether no row is bad."""
    good, line = True, "| {:<46} | {:>5} | {:>10} | {} |"
    print(line.format("tried", "times", "steps lost", "verdict"), "|---|---:|---:|---|", sep="\n")
    for tried, (attempt, *how) in rows(bench):
        if only not in tried:
            continue
        times, lost, verdict = "", "", "good"
        try:
            outcome = attempt(bench, *how)
        except Exception as error:
            verdict, good = "BAD: " + " ".join(str(error).split()), False
        else:
            if outcome is None:
                verdict = "NOT TRIED: this needs the right to mount (root)"
            else:
                times, lost, remark = outcome
                verdict += f"; {remark}" if remark else ""
        print(line.format(tried, times, lost, verdict), flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every row, but a few times only")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose name holds this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places drawn")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="torture-")
    began = time.monotonic()
    bench = Bench(folder, options.quick, options.seed)
    bench.straight()
    good = show(bench, options.only)
    print(f"seed {options.seed}, {(time.monotonic() - began) / 60:.1f} minutes")
    if good:
        shutil.rmtree(folder)
    else:
        print(f"what the runs left is in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
