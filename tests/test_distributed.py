"""Laws of several ranks: together they do what one process does, however records divide.

Two gloo ranks on this machine. Their runs are made once, in float64 and without dropout, and the
tests compare them with one process; run.py under torchrun itself comes last.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, Experiment, Ranks, assert_same_weights, use_float64

import backbone
import distributed

FAMILIES = ("gpt2", "llama")
KINDS = ("ddp", "fsdp")
# Batch per process and accumulation. Of 17 records the last effective batch holds 1, so that rank
# 1 has none; or 5 of 6, so that it has none in the last micro-step.
SPLITS = ((4, 1), (1, 3))


def name_of(family, batch_size, accumulation):
    return f"{family}-{batch_size}x{accumulation}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs[family, split, kind]`: finished experiments; kind "one" is a single process."""
    folder = tmp_path_factory.mktemp("ranks")
    experiments, commands = {}, []
    for family in FAMILIES:
        for split in SPLITS:
            for kind in ("one", *KINDS):
                keys = {
                    "name": f"{name_of(family, *split)}-{kind}", "batch_size_training": split[0],
                    "gradient_accumulation_steps": split[1] * (2 if kind == "one" else 1),
                    "resume": 1, "max_grad_norm": 1.0, "uniform_prob": 0.3, "num_train": 17,
                    "parallel": "auto" if kind == "one" else kind,
                }  # fmt: skip
                experiment = Experiment(folder / f"{family}-{kind}-{split[0]}", family, **keys)
                experiments[family, split, kind] = experiment
                if kind != "one":
                    commands.append([str(experiment.yaml)])
    ranks = Ranks(2, folder, commands, hook=use_float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "_build_options", backbone._build_options)
        use_float64()
        for (_, _, kind), experiment in experiments.items():
            assert kind != "one" or experiment.main() == 0
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    assert ranks.output(1) == "", "only rank 0 speaks"
    assert "Warning" not in ranks.output()
    return experiments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_follow_the_trajectory_of_one_process(runs, family, split, kind):
    one, two = runs[family, split, "one"], runs[family, split, kind]
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-6)
    assert len(one.losses()) == 6
    assert_same_weights(two.weights(), one.weights(), rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(two.metrics(), one.metrics(), strict=True):
        # approx knows no nested values; the first records' texts are the same to the letter.
        assert ours.pop("data_table", None) == theirs.get("data_table")
        numbers = {key: value for key, value in theirs.items() if key != "data_table"}
        assert ours == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_record_is_evaluated_once_and_answered_as_by_one_process(runs, family, kind):
    for split in SPLITS:
        one, two = runs[family, split, "one"], runs[family, split, kind]
        for epoch in (1, 2):
            assert two.predictions(epoch) == one.predictions(epoch)
            assert [row["index"] for row in two.predictions(epoch)] == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_stop_and_go_on_end_where_they_would_have_ended(tmp_path, kind):
    keys = {"dropout": 0.1, "parallel": kind, "batch_size_training": 2, "num_epochs": 2}
    straight = Experiment(tmp_path, name="straight", **keys)
    stopped = Experiment(tmp_path, name="stopped", **keys)
    # A rank of its own generator draws other dropout, so the two must get back their own.
    yaml = str(stopped.yaml)
    commands = [[yaml, "name=straight"], [yaml, "num_epochs=1"], [yaml]]
    ranks = Ranks(2, tmp_path, commands)
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    assert "continuing from" in ranks.output()
    assert_same_weights(stopped.weights(), straight.weights())
    assert stopped.metrics() == straight.metrics()


@pytest.mark.parametrize("kind", KINDS)
def test_run_under_torchrun_follows_the_trajectory_of_one_process(tmp_path, kind):
    one = Experiment(tmp_path, "llama", name="one", batch_size_training=8, num_epochs=2)
    assert one.main() == 0
    two = Experiment(tmp_path, "llama", name=kind, batch_size_training=4, num_epochs=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
        str(ROOT / "run.py"), str(two.yaml), f"parallel={kind}",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 0 stage 0:") == 1
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-4)
    assert len(one.losses()) == 6
    assert two.metrics()[-1]["eval/loss"] == pytest.approx(one.metrics()[-1]["eval/loss"], rel=1e-3)


# One process


def test_without_a_group_there_is_one_rank():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert distributed.gather_to_main("x") == ["x"]
    assert distributed.broadcast_from_main("x") == "x"
    distributed.barrier()
    distributed.shut_down()


def test_the_local_rank_picks_the_device(monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device() == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.device() == torch.device("cuda", 1)


def test_sharding_is_chosen_where_one_device_has_too_little_room(monkeypatch):
    choose = distributed.choose_parallel
    assert choose("fsdp", 10) == ("none", "one process")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert choose("fsdp", 10) == ("fsdp", "as configured")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", 10)[0] == "ddp"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = type("Device", (), {"total_memory": 100 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    # 16 bytes a parameter: 32 GiB of state in 100 GiB, then 80 GiB.
    assert choose("auto", 2 * 2**30) == ("ddp", "training state 32.0 GiB, device 100.0 GiB")
    assert choose("auto", 5 * 2**30) == ("fsdp", "training state 80.0 GiB, device 100.0 GiB")


def test_the_gradient_norm_is_that_of_all_gradients_together():
    model = torch.nn.Linear(1, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    assert distributed.gradient_norm(model).item() == pytest.approx(5.0)
