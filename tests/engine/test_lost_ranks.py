"""Laws of ranks that are lost: the others end and say which, and the run goes on bit for bit.

torture.py tries more of it, torchrun's own restarts among it.
"""

import functools
import os
import re
import signal
import socket
import time

import pytest
import torch
from runs import (
    PROCESS_TIMEOUT_S,
    Experiment,
    Ranks,
    assert_same_weights,
    at_call,
    kill_self,
)

import run
from engine import distributed


def short_of_patience(action=None):
    """Wait seconds, not half an hour; rank 1 runs `action` before its third step."""
    distributed.COLLECTIVE_TIMEOUT_S, distributed.REPORT_TIMEOUT_S = 5.0, 1.0
    at_call(3, "engine.trainer:Trainer.train_step", lambda: os.environ["RANK"] == "1" and action())


def hang():
    time.sleep(PROCESS_TIMEOUT_S)


def fail():
    raise ValueError("of my own\nmaking")


LOST = r"lost contact after optimizer step 2 \(epoch 0\): rank 1 {0}; the same command continues"


@pytest.mark.parametrize(
    "action, words",
    [
        (hang, r"\(process \d+ on \S+\) does not answer: it hangs, or its machine is cut off"),
        (kill_self, r"\(process \d+ on \S+\) has died"),
        (fail, r"ended: of my own"),
    ],
)
def test_a_rank_that_is_lost_is_named_by_those_that_wait_for_it(tmp_path, action, words):
    experiment = Experiment(tmp_path)
    hook = functools.partial(short_of_patience, action)
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], hook)
    waiting, lost = ranks.processes
    waiting.join(PROCESS_TIMEOUT_S)
    lost.kill()
    assert ranks.wait()[0] == run.EXIT_FAILED
    assert re.search(LOST.format(words), ranks.output()), ranks.output()
    assert "Traceback" not in ranks.output()
    assert ("ValueError: of my own" in ranks.output(1)) is (action is fail)


def run_out_of_memory_on_rank_1():
    def run_out():
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    distributed.REPORT_TIMEOUT_S = 1.0
    at_call(1, "engine.evaluation:Decoder.predict", run_out)


def test_a_rank_other_than_the_first_tells_itself_that_its_memory_ran_out(tmp_path):
    experiment = Experiment(tmp_path, num_epochs=1)
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], run_out_of_memory_on_rank_1)
    assert ranks.wait() == [run.EXIT_FAILED] * 2
    words = "rank 1: out of memory after optimizer step 3 (epoch 0) (CUDA out of memory. Tried to"
    (line,) = [line for line in ranks.output(1).splitlines() if "out of memory" in line]
    assert line.startswith(words) and "a smaller batch_size_eval or max_new_tokens" in line
    assert "Traceback" not in ranks.output(1)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_three_ranks_that_are_killed_go_on_bit_for_bit(tmp_path, kind):
    """A sum over three ranks, unlike one over two, depends on its order."""
    keys = {"dropout": 0.1, "parallel": kind, "batch_size_training": 2, "num_epochs": 2}
    straight = Experiment(tmp_path, name="straight", **keys)
    killed = Experiment(tmp_path, name="killed", **keys)
    yaml = str(killed.yaml)
    ranks = Ranks(3, tmp_path, [[yaml, "name=straight"]])
    assert ranks.wait() == [0, 0, 0], ranks.output()
    hook = functools.partial(at_call, 3, "engine.trainer:Trainer.train_step", kill_self)
    ranks = Ranks(3, tmp_path, [[yaml, "save_every_minutes=1e-9"]], hook)
    assert ranks.wait() == [-signal.SIGKILL] * 3, ranks.output()
    assert len(killed.losses()) == 2 < len(straight.losses()) / 2
    ranks = Ranks(3, tmp_path, [[yaml]])
    assert ranks.wait() == [0, 0, 0], ranks.output()
    assert_same_weights(killed.weights(), straight.weights())
    assert killed.metrics() == straight.metrics()


def test_ranks_that_do_not_find_each_other_are_told_so():
    error = torch.distributed.DistStoreError("1/2 clients joined\nstack")
    assert distributed.is_lost_contact(error)
    words = "the ranks did not find each other (1/2 clients joined)"
    assert distributed.lost_ranks(error) == words
    assert not distributed.is_lost_contact(RuntimeError("shapes differ"))


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(distributed, "REPORT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(distributed, "STORE_TIMEOUT_S", 0.4)
    monkeypatch.setattr(distributed, "_store", lambda: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert distributed._ask_store(lambda store: time.sleep(3)) is None
        assert distributed._ask_store(lambda store: "answer") == "answer"
    assert distributed._ask_store(lambda store: "answer") is None, "nobody listens there"
