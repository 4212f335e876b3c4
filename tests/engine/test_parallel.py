"""Laws of a model that ranks share: when it is sharded, what is exchanged, that figures stay."""

import contextlib
import dataclasses
import functools
import inspect
import json
import re
from collections import Counter

import pytest
import torch
from runs import Experiment, Ranks, whole_state

from engine import checkpoint, distributed, parallel


@pytest.mark.parametrize("name", ["forward_sync_buffers", "broadcast_buffers"])
def test_ddp_exchanges_no_buffers_by_the_name_that_torch_gives_the_option(monkeypatch, name):
    """broadcast_buffers up to torch 2.12."""
    given = {}

    class Wrapped:
        def __init__(self, model, device_ids, gradient_as_bucket_view, **options):
            given.update(options)

    parameter = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    Wrapped.__signature__ = inspect.Signature([parameter])
    monkeypatch.setattr(parallel, "DistributedDataParallel", Wrapped)
    parallel.parallelize(torch.nn.Linear(1, 1), parallel.Parallel("ddp", False, ""))
    assert given == {name: False}


def test_an_evaluation_is_not_sharded(tmp_path, monkeypatch, capsys):
    """It needs whole parameters on every device, and neither gradients nor AdamW's moments."""
    experiment = Experiment(tmp_path, num_epochs=1)
    assert experiment.main() == 0
    monkeypatch.setattr(parallel, "choose_parallel", None)
    path = experiment.run_dir / "checkpoint_1"
    assert experiment.main("only_eval=true", f"load_model_path={path}", "parallel=fsdp") == 0
    assert "parallel: none (an evaluation needs whole parameters)" in capsys.readouterr().out


def test_sharding_is_chosen_where_a_step_does_not_fit_one_device(monkeypatch):
    def choose(kind, **needed_gib):
        def peak_bytes(kind, gathered):
            return needed_gib["whole" if kind == "fsdp" and gathered else kind] * 2**30

        return dataclasses.astuple(parallel.choose_parallel(kind, peak_bytes))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("fsdp") == ("none", False, "one process")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert choose("fsdp") == ("fsdp", True, "as configured")
    assert choose("auto") == ("ddp", True, "processes on CPUs share their memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = type("Device", (), {"total_memory": 100 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    fits, shards = (f"a step needs {n}.0 GiB, limit 90.0 GiB per device" for n in (89, 91))
    assert choose("auto", ddp=89) == ("ddp", False, fits)
    every = "parameters gathered for every pass of a block"
    held = "parameters held whole through a step"
    assert choose("auto", ddp=91, whole=91) == ("fsdp", False, f"{shards}; {every}")
    assert choose("auto", ddp=91, whole=89) == ("fsdp", True, f"{shards}; {held}")
    assert choose("ddp") == ("ddp", False, "as configured")
    assert choose("fsdp", whole=1) == ("fsdp", True, f"as configured; {held}")


def count_collectives():
    """Let rank 0 print the collectives of each micro-step; the third run gathers every pass."""
    choose, gathered = parallel.choose_parallel, iter([False, True, False])
    parallel.choose_parallel = lambda *given: dataclasses.replace(
        choose(*given), gathered=next(gathered)
    )
    sync = parallel.gradient_sync

    @contextlib.contextmanager
    def counted(model, enabled):
        with torch.profiler.profile() as profile, sync(model, enabled):
            yield
        names = [event.name for event in profile.events()]
        if distributed.is_main():
            print("counted", json.dumps(Counter(name for name in names if "c10d::" in name)))

    parallel.gradient_sync = counted


def test_gradients_are_exchanged_in_the_last_micro_step_and_gathers_are_saved(tmp_path):
    """Two blocks and the root; the second of two steps, of three micro-steps of three passes."""
    keys = {
        "batch_size_training": 1, "gradient_accumulation_steps": 3, "num_train": 12,
        "resume": 2, "pad_latent_to_max": True,
    }  # fmt: skip
    experiment = Experiment(tmp_path, **keys)
    runs = [("ddp", "ddp"), ("fsdp", "fsdp"), ("fsdp", "fsdp-resharded")]
    commands = [[str(experiment.yaml), f"parallel={p}", f"name={name}"] for p, name in runs]
    ranks = Ranks(2, tmp_path, commands, count_collectives)
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    counts = [json.loads(text) for text in re.findall("counted (.+)", ranks.output())]
    # In its first step DDP also settles its buckets.
    ddp, gathered, resharded = counts[3:6], counts[9:12], counts[15:]
    assert ddp[:2] == [{}, {}] and ddp[2].keys() == {"c10d::allreduce_"}
    for steps in (gathered, resharded):
        reduces = [step.pop("c10d::_reduce_scatter_base_", 0) > 0 for step in steps]
        assert reduces == [False, False, True]
    # Forward and backward of each block in each pass, and the root once; or each once in all.
    every = {"c10d::_allgather_base_": 2 * 2 * 3 + 1}
    assert resharded == [every] * 3
    assert gathered == [{"c10d::_allgather_base_": 2 + 1}, {}, {}]


def have_gpus_of_unlike_sizes():
    """Let choose_parallel believe in a large GPU on rank 0 and a tiny one on rank 1."""
    choose = parallel.choose_parallel

    def choose_there(*given):
        size = 2**40 if distributed.is_main() else 10
        device = type("Device", (), {"total_memory": size})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: device)
            return choose(*given)

    parallel.choose_parallel = choose_there


def test_the_smallest_device_decides_for_all_ranks(tmp_path):
    experiment = Experiment(tmp_path, num_epochs=1)
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], have_gpus_of_unlike_sizes)
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    assert re.search(r"fsdp \(.*limit 0\.0 .*parameters gathered for every pass", ranks.output())


def test_the_gradient_norm_is_that_of_all_gradients_together():
    model = torch.nn.Linear(1, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    assert parallel.gradient_norm(model).item() == pytest.approx(5.0)


def print_what_is_gathered(gathered):
    """Let every rank print how many whole tensors a checkpoint makes it hold."""
    choose = parallel.choose_parallel
    parallel.choose_parallel = lambda *given: dataclasses.replace(choose(*given), gathered=gathered)
    gather = checkpoint.get_model_state_dict

    def printing(model, options=None):
        state = gather(model, options=options)
        if options is not None:
            print(f"rank {distributed.rank()} holds {len(state)} whole tensors")
        return state

    checkpoint.get_model_state_dict = printing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("gathered", [True, False])
def test_bf16_shards_follow_ddp_and_rank_0_alone_gathers_the_checkpoint(tmp_path, family, gathered):
    keys = {"bf16": True, "num_epochs": 2, "resume": 1, "batch_size_training": 4}
    ddp = Experiment(tmp_path / "ddp", family, parallel="ddp", **keys)
    two = Experiment(tmp_path / "fsdp", family, parallel="fsdp", **keys)
    hook = functools.partial(print_what_is_gathered, gathered)
    ranks = Ranks(2, tmp_path, [[str(ddp.yaml)], [str(two.yaml)]], hook=hook)
    assert ranks.wait() == [0, 0], ranks.output()
    # Ranks that shard may take more passes; the last block then leaves out other tokens, and the
    # kernel that attends to the rest rounds to bf16 otherwise.
    assert two.losses() == pytest.approx(ddp.losses(), rel=2e-2)
    assert {t.dtype for t in (*whole_state(two).values(), *two.weights().values())} == {
        torch.float32
    }
    assert "rank 1 holds 0 whole tensors" in ranks.output(1)
    # GPT-2's head is the second name of its embeddings.
    num_tensors = len(two.weights()) + (family == "gpt2")
    assert f"rank 0 holds {num_tensors} whole tensors" in ranks.output()
