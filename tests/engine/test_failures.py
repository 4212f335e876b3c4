"""Laws of jobs that end early: each fault is printed once, by the right rank, and none is lost.

torture.py tries more of it, torchrun's own restarts among it.
"""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from runs import (
    PROCESS_TIMEOUT_S,
    ROOT,
    Experiment,
    Ranks,
    assert_same_weights,
    at_call,
    kill_self,
)

from engine import distributed, failures
from engine.config_file import load_config
from utils import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError

# Lost ranks


def on_rank_1(target, call, action):
    """Rank 1 runs `action` at a call of `target`; ranks wait seconds for each other."""
    distributed.COLLECTIVE_TIMEOUT_S = 5.0
    failures.LOST_TIMEOUT_S = failures.LOWER_RANK_TIMEOUT_S = 1.0
    at_call(call, target, lambda: os.environ["RANK"] == "1" and action())


TRAIN_STEP = "engine.trainer:Trainer.train_step"


def hang():
    time.sleep(PROCESS_TIMEOUT_S)


LOST = r"lost contact after optimizer step 2 \(epoch 0\): rank 1 \(process \d+ on \S+\) does not"
LOST += " answer: it has died or hangs, or its machine is cut off"


@pytest.mark.parametrize("action", [hang, kill_self])
def test_a_rank_that_is_lost_is_named_by_one_that_waits_for_it(tmp_path, action):
    experiment = Experiment(tmp_path)
    hook = functools.partial(on_rank_1, TRAIN_STEP, 3, action)
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], hook)
    waiting, lost = ranks.processes
    waiting.join(PROCESS_TIMEOUT_S)
    lost.kill()
    assert ranks.wait()[0] == EXIT_FAILED
    assert re.search(LOST, ranks.output()), ranks.output()
    assert "Traceback" not in ranks.output()


def test_ranks_that_do_not_find_each_other_say_so(tmp_path, capsys):
    error = torch.distributed.DistStoreError("1/2 clients joined\nstack")
    config = load_config(Experiment(tmp_path).yaml)
    assert failures.report_failure(error, config) == EXIT_FAILED
    words = "the ranks did not find each other (1/2 clients joined)\n"
    assert capsys.readouterr().err == words
    assert not distributed.is_lost_contact(RuntimeError("shapes differ"))


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    answers = []
    monkeypatch.setattr(distributed, "ranks_store", lambda: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        began = time.monotonic()
        failures.ask_store(lambda store: time.sleep(30), timeout_s=0.2)
        assert time.monotonic() - began < 10
        failures.ask_store(lambda store: answers.append("here"), timeout_s=10)
    failures.ask_store(lambda store: answers.append("nobody listens"), timeout_s=10)
    assert answers == ["here"]


# Faults of one rank and of all


def run_out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def err():
    raise UserError("a mistake on this machine alone")


def fail():
    raise ValueError("of our own\nmaking")


IN_TRAINING = "rank 1: out of memory at optimizer step 2; write tokens_per_micro_batch"
IN_EVALUATION = "rank 1: out of memory after optimizer step 3 (epoch 0) (CUDA out of memory. Tried"


@pytest.mark.parametrize(
    "target, call, action, status, words",
    [
        ("engine.trainer:Trainer._loss_share", 3, run_out_of_memory, EXIT_FAILED, IN_TRAINING),
        ("engine.evaluation:Decoder.predict", 1, run_out_of_memory, EXIT_FAILED, IN_EVALUATION),
        (TRAIN_STEP, 3, err, EXIT_USER_ERROR, "rank 1: a mistake on this machine alone"),
        (TRAIN_STEP, 3, fail, EXIT_FAILED, "ValueError: of our own"),
    ],
)
def test_a_fault_of_one_rank_is_printed_by_it_alone(tmp_path, target, call, action, status, words):
    experiment = Experiment(tmp_path, num_epochs=1)
    hook = functools.partial(on_rank_1, target, call, action)
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], hook)
    assert ranks.wait() == [EXIT_FAILED, status]
    assert words in ranks.output(1)
    assert ("Traceback" in ranks.output(1)) is (action is fail)
    assert not re.search("lost contact|out of memory|mistake|Traceback", ranks.output())


def fail_on_every_rank(action):
    at_call(2, TRAIN_STEP, action)


@pytest.mark.parametrize("action", [err, fail, run_out_of_memory])
def test_a_fault_of_all_ranks_is_printed_once_by_rank_0(tmp_path, action):
    hook = functools.partial(fail_on_every_rank, action)
    ranks = Ranks(3, tmp_path, [[str(Experiment(tmp_path).yaml)]], hook)
    assert len(set(ranks.wait())) == 1
    assert re.search("out of memory|mistake|Traceback", ranks.output())
    assert "rank 0" not in ranks.output() and "saved state" not in ranks.output()
    assert ranks.output(1) == ranks.output(2) == ""


def test_an_interruption_says_that_the_run_can_continue_only_where_it_can(
    tmp_path, monkeypatch, capsys
):
    experiment = Experiment(tmp_path, num_epochs=2)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.jobs.build_coconut", interrupt)
    assert experiment.main() == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.undo()
    assert experiment.main("num_epochs=1") == 0
    monkeypatch.setattr("engine.jobs.build_coconut", interrupt)
    capsys.readouterr()
    assert experiment.main() == EXIT_INTERRUPTED
    words = "interrupted; the same command continues from the last saved state\n"
    assert capsys.readouterr().err == words


# Under torchrun


def under_torchrun(*arguments):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)


@pytest.mark.parametrize(
    "overrides, words",
    [(["lr=fast"], "lr='fast' is not a number"), (["train_path=no.json"], "no.json: cannot be")],
)
def test_a_mistake_is_printed_once_under_torchrun(tmp_path, overrides, words):
    """Once by a rank; torchrun repeats it in its summary of what failed once the ranks had met."""
    experiment = Experiment(tmp_path)
    done = under_torchrun(str(ROOT / "run.py"), str(experiment.yaml), *overrides)
    assert done.returncode == 1
    ours, torchruns = done.stderr.split("Traceback", 1)
    assert ours.count(words) == 1 and "exitcode  : 2" in torchruns, done.stderr
    assert (words in torchruns) is (overrides != ["lr=fast"])


# Continuing


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_three_ranks_that_are_killed_continue_bit_for_bit(tmp_path, kind):
    """A sum over three ranks, unlike one over two, depends on its order."""
    keys = {"dropout": 0.1, "parallel": kind, "batch_size_training": 2, "num_epochs": 2}
    straight = Experiment(tmp_path, name="straight", **keys)
    killed = Experiment(tmp_path, name="killed", **keys)
    yaml = str(killed.yaml)
    ranks = Ranks(3, tmp_path, [[yaml, "name=straight"]])
    assert ranks.wait() == [0, 0, 0], ranks.output()
    hook = functools.partial(at_call, 3, TRAIN_STEP, kill_self)
    ranks = Ranks(3, tmp_path, [[yaml, "save_every_minutes=1e-9"]], hook)
    assert ranks.wait() == [-signal.SIGKILL] * 3, ranks.output()
    assert len(killed.losses()) == 2 < len(straight.losses()) / 2
    ranks = Ranks(3, tmp_path, [[yaml]])
    assert ranks.wait() == [0, 0, 0], ranks.output()
    assert_same_weights(killed.weights(), straight.weights())
    assert killed.metrics() == straight.metrics()
