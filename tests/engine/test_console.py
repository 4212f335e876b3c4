"""What a run says: how far it has come, at a terminal and without one, and its two blocks."""

import logging
import re
import sys
import time

import pytest
from runs import Experiment

from engine import console, distributed
from engine.config_file import load_config
from engine.console import (
    closing_lines,
    describe_device,
    describe_thought,
    duration,
    opening_lines,
    progress_bar,
)
from engine.distributed import Threads
from engine.metadata import Position
from engine.setup import make_curriculum
from utils import configure_logging, log


@pytest.fixture(autouse=True)
def as_rank_0():
    """This process prints, as rank 0 does."""
    configure_logging(0)
    yield
    log.setLevel(logging.NOTSET)


def test_at_a_terminal_a_bar_starts_where_the_run_does(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(10, "epoch 1", initial=4)
    assert (bar.n, bar.disable) == (4, False)
    bar.close()
    configure_logging(1)
    assert progress_bar(10, "epoch 2").disable, "rank 0 alone draws"
    out, err = capsys.readouterr()
    assert out == "" and "epoch 1" in err and "epoch 2" not in err


def test_without_a_terminal_a_line_comes_every_so_often_with_the_time_left(monkeypatch, capsys):
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    bar = progress_bar(1004, "epoch 1 stage 0", initial=4)
    for _ in range(70):
        now_s += 1.0
        bar.set_postfix_str(f"loss {now_s:.0f}")
        bar.update()
    bar.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "epoch 1 stage 0: 34 of 1,004, loss 1030, 16 min left",
        "epoch 1 stage 0: 64 of 1,004, loss 1060, 16 min left",
    ]
    assert err == ""


@pytest.mark.parametrize(
    "keys, words",
    [
        ({}, "average of the last 3 states (0.6, 0.3, 0.1); latent_window_size: 1 is the original"),
        ({"latent_weights": "learned"}, "the last 3 states (learned, from 0.6, 0.3, 0.1);"),
        ({"latent_weights": "uniform"}, "the last 3 states (0.333, 0.333, 0.333);"),
        ({"thought_norm": "average"}, "the last hidden state at the norm of the average of the"),
        ({"thought_norm": 0.5}, "0.5 times the average of the last 3 states"),
        ({"coconut_class": "mine:Mine"}, "made by mine:Mine; in Coconut itself the average of"),
        ({"latent_window_size": 2}, "average of the last 2 states (0.667, 0.333);"),
        ({"latent_window_size": 1}, "the last hidden state alone, as in the original Coconut"),
        ({"window_scope": "pass"}, "for a row's first thought, the last state for the others;"),
        ({"thought": "pause"}, "pause: the latent token's learned embedding, read in one pass"),
        ({"thought": "pause_multipass"}, "embedding, read in as many passes as Coconut's"),
    ],
)
def test_a_run_says_what_a_thought_is(tmp_path, keys, words):
    config = load_config(str(Experiment(tmp_path, **keys).yaml))
    assert words in describe_thought(config)
    assert describe_thought(load_config(str(Experiment(tmp_path, cot=True).yaml))) is None


@pytest.mark.parametrize(
    ("threads", "words"),
    [
        (Threads(1, "the model is small"), "on the CPU, 1 thread (4 cores; the model is small)"),
        (Threads(4, "one for each core"), "on the CPU, 4 threads (4 cores; one for each core)"),
        (Threads(16, None), "on the CPU, 16 threads"),
    ],
)
def test_the_opening_block_says_how_many_threads_compute_and_why(
    tmp_path, monkeypatch, threads, words
):
    monkeypatch.setattr(distributed, "num_cores", lambda: 4)
    config = load_config(str(Experiment(tmp_path).yaml))
    lines = opening_lines(
        config, make_curriculum(config), num_parameters=1, threads=threads, num_val=1
    )
    assert next(line for line in lines if line.startswith("device")).endswith(words)


def test_a_run_names_the_allocator_that_it_preloads(monkeypatch):
    assert describe_device(1) == "1 process on the CPU, 1 thread"
    monkeypatch.setattr(distributed, "preloads_allocator", lambda: True)
    assert describe_device(1) == "1 process on the CPU with tcmalloc, 1 thread"


def test_the_opening_block_names_everything_that_decides_the_run(tmp_path, monkeypatch):
    experiment = Experiment(tmp_path, resume=1, load_model_path="cot/checkpoint_3")
    config = load_config(str(experiment.yaml))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "num_cores", lambda: 2)
    lines = opening_lines(
        config, make_curriculum(config), num_parameters=1_234_567, num_train=18, num_val=7,
        threads=Threads(1, "shared by the processes"),
        position=Position(epoch=1, optimizer_step=2),
    )  # fmt: skip
    assert [line for line in lines if not line.startswith("thought")] == [
        f"run                 {experiment.run_dir}",
        "device              2 processes on the CPU, 1 thread each (2 cores; shared by the"
        " processes)",
        f"model               {experiment.model}, 1,234,567 parameters; weights: cot/checkpoint_3",
        "method              coconut",
        "records             18 training, 7 validation",
        "schedule            epochs 1 to 2, stages 1 to 2 of 0 to 3, epochs_per_stage 1",
        "effective batch     8 = 4 records x 1 accumulation x 2 processes",
        "optimizer steps     3 per epoch, 6 in total",
        "resumes             in epoch 1, after step 2",
    ]


def test_the_closing_block_names_the_best_epochs_and_their_checkpoints(tmp_path):
    experiment = Experiment(tmp_path, num_epochs=4)
    (experiment.run_dir / "checkpoint_2").mkdir(parents=True)
    config = load_config(str(experiment.yaml))
    position = Position(epoch=0)
    for epoch, accuracy in enumerate([0.5, 0.75, 0.25, 0.125]):
        position.finish_step(1.0, 30.0)
        assert position.finish_evaluation(epoch, accuracy, 2.0) is (epoch < 2)
        position.start_epoch()
    assert closing_lines(config, make_curriculum(config), position) == [
        "finished            4 epochs, 4 optimizer steps; training 2 min, evaluation 8 s",
        "best of any stage   epoch 1 (stage 1), accuracy 75.0 %, checkpoint_2",
        "best of last stage  epoch 3 (stage 3), accuracy 12.5 %, its checkpoint was not kept",
        f"files               {experiment.run_dir}: config.yaml, metrics.jsonl, predictions,"
        " checkpoints",
    ]


def test_the_best_of_a_stage_is_the_first_of_its_best_epochs():
    position = Position(epoch=0)
    for stage, accuracy in [(0, 0.9), (1, 0.2), (1, 0.4), (1, 0.4)]:
        position.finish_evaluation(stage, accuracy, 0.0)
        position.start_epoch()
    assert (position.best_epoch, position.stage_best_epoch) == (0, 2)


def test_durations_have_readable_units():
    assert [duration(s) for s in (0.4, 99, 100, 5999, 6000)] == [
        "0 s", "99 s", "2 min", "100 min", "1.7 h",
    ]  # fmt: skip


def test_a_run_opens_reports_and_closes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    experiment = Experiment(tmp_path, num_epochs=1)
    assert experiment.main() == 0
    shown = capsys.readouterr().out
    order = (
        r"^run  .*^thought  .*^optimizer steps  .*^epoch 0 stage 0: 1 of 5, loss .* tok/s, .* left$"
        r".*^evaluating stage 0: 1 of 2, .*^epoch 0 stage 0: train loss .*^finished  .*^files  "
    )
    assert re.search(order, shown, re.DOTALL | re.MULTILINE), shown
