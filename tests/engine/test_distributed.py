"""Laws of several ranks: together they do what one process does, however records divide.

Two and four gloo ranks on this machine. Their runs are made once, in float64 and without dropout,
and the tests compare them with one process; run.py under torchrun itself comes last.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, Experiment, Ranks, assert_same_weights, at_call, use_float64, whole_state
from safetensors.torch import load_file

from engine import distributed, parallel
from engine import model as backbone
from engine.config_file import load_config
from engine.weights import ModelSource
from utils import EXIT_INTERRUPTED

KINDS = ("ddp", "fsdp", "fsdp-resharded")
# Family, batch per process, accumulation and whether all records get equally many latents. Of 17
# records the last effective batch of two ranks holds 1, so that rank 1 has none; or 5 of 6, so that
# it has none in the last micro-step. With equally many latents the window's weights are learned.
CASES = (
    ("gpt2", 4, 1, False),
    ("gpt2", 1, 3, True),
    ("llama", 4, 1, True),
    ("llama", 1, 3, False),
)


def gather_for_every_pass():
    """Let run.py gather the parameters of an FSDP block again for every pass, in float64."""
    use_float64()
    choose = parallel.choose_parallel
    parallel.choose_parallel = lambda *given: dataclasses.replace(choose(*given), gathered=False)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(world, marks=pytest.mark.xdist_group(f"{world}ranks")) for world in (2, 4)
    ],
)
def runs(request, tmp_path_factory):
    """`runs[case, kind]`: finished experiments; kind "one" is a single process. `runs["world"]`."""
    world = request.param
    folder = tmp_path_factory.mktemp(f"{world}ranks")
    experiments = {}
    for number, case in enumerate(CASES):
        family, batch_size, accumulation, is_fixed = case
        for kind in ("one", *KINDS):
            keys = {
                "name": kind, "batch_size_training": batch_size,
                "gradient_accumulation_steps": accumulation * (world if kind == "one" else 1),
                "resume": 1, "max_grad_norm": 1.0, "uniform_prob": 0.0 if is_fixed else 0.3,
                "pad_latent_to_max": is_fixed, "num_train": 17 if world == 2 else 33,
                "parallel": {"one": "auto", "fsdp-resharded": "fsdp"}.get(kind, kind),
                "latent_weights": "learned" if is_fixed else None, "eval_every_steps": 2,
            }  # fmt: skip
            experiments[case, kind] = Experiment(folder / f"{number}-{kind}", family, **keys)
    for hook, kinds in ((use_float64, KINDS[:2]), (gather_for_every_pass, KINDS[2:])):
        commands = [[str(experiments[case, kind].yaml)] for case in CASES for kind in kinds]
        ranks = Ranks(world, folder, commands, hook=hook)
        assert ranks.wait() == [0] * world, "".join(map(ranks.output, range(world)))
        assert ranks.output(1) == "", "only rank 0 speaks"
        assert "Warning" not in ranks.output()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "_build_options", backbone._build_options)
        use_float64()
        assert [experiments[case, "one"].main() for case in CASES] == [0] * len(CASES)
    return experiments | {"world": world}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_follow_the_trajectory_of_one_process(runs, case, kind):
    one, many = runs[case, "one"], runs[case, kind]
    np.testing.assert_allclose(many.losses(), one.losses(), rtol=1e-6)
    assert len(one.losses()) >= 5
    assert_same_weights(many.weights(), one.weights(), rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(many.metrics(), one.metrics(), strict=True):
        # approx knows no nested values; the first records' texts are the same to the letter.
        assert ours.pop("data_table", None) == theirs.pop("data_table", None)
        weights = theirs.pop("train/window_weights", [])
        assert ours.pop("train/window_weights", []) == pytest.approx(weights, rel=1e-5)
        assert bool(weights) == (case[-1] and "eval/acc" in theirs)
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_and_states_are_those_of_one_process(runs, case, kind):
    one, many = whole_state(runs[case, "one"]), whole_state(runs[case, kind])
    # The first moments are a running mean of the gradients themselves.
    assert any(name.endswith("|exp_avg") for name in one)
    assert_same_weights(many, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_record_is_evaluated_once_and_answered_as_by_one_process(runs, case, kind):
    one, many = runs[case, "one"], runs[case, kind]
    for epoch in (1, 2):
        assert many.predictions(epoch) == one.predictions(epoch)
        assert [row["index"] for row in many.predictions(epoch)] == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_write_the_shards_that_they_alone_hold(runs, kind):
    shards = runs[CASES[0], kind].states()[-1].glob("shard-*")
    writers = 1 if kind == "ddp" else runs["world"]
    assert {int(path.name.split("-")[1]) for path in shards} == set(range(1, writers + 1))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_ranks_that_stop_and_resume_end_where_they_would_have_ended(tmp_path, kind):
    keys = {"dropout": 0.1, "parallel": kind, "batch_size_training": 2, "num_epochs": 2}
    keys["latent_weights"] = "learned"
    straight = Experiment(tmp_path, name="straight", **keys)
    stopped = Experiment(tmp_path, name="stopped", **keys)
    # A rank of its own generator draws other dropout, so the two must get back their own.
    yaml = str(stopped.yaml)
    commands = [[yaml, "name=straight"], [yaml, "num_epochs=1"], [yaml]]
    ranks = Ranks(2, tmp_path, commands)
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    assert "continuing from" in ranks.output()
    assert_same_weights(stopped.weights(), straight.weights())
    files = [e.run_dir / "checkpoint_2" / "coconut.safetensors" for e in (stopped, straight)]
    assert_same_weights(*map(load_file, files))
    assert stopped.metrics() == straight.metrics()


def test_a_state_in_shards_resumes_on_any_number_of_ranks(tmp_path):
    keys = {"parallel": "fsdp", "effective_batch_size": 8, "batch_size_training": 2}
    straight = Experiment(tmp_path / "straight", "llama", **keys)
    stopped = Experiment(tmp_path / "stopped", "llama", **keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "_build_options", backbone._build_options)
        use_float64()
        assert straight.main() == 0
        for epochs, world in enumerate((2, 4), start=1):
            command = [str(stopped.yaml), f"num_epochs={epochs}"]
            ranks = Ranks(world, tmp_path, [command], hook=use_float64)
            assert ranks.wait() == [0] * world, ranks.output()
            assert len(list(stopped.states()[-1].glob("shard-*"))) == world
        assert stopped.main() == 0
    assert_same_weights(stopped.weights(), straight.weights(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stopped.losses(), straight.losses(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS[:2])
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_of_several_processes_ends_without_finalizing_python(world_size):
    """What a thread of gloo still has to free aborts a process that is being finalized."""
    script = (
        "import atexit, run\n"
        "class Kept:\n"
        "    def __del__(self): print('finalized', flush=True)\n"
        "kept = Kept()\n"
        "atexit.register(print, 'at exit')\n"
        "print('written')\n"
        "run.exit_process(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"WORLD_SIZE": str(world_size)},
    )
    finalized = ["finalized"] if world_size == 1 else []
    assert done.stdout.split("\n")[:-1] == ["written", "at exit", *finalized]
    assert (done.returncode, done.stderr) == (3, "")


# One process


def test_without_a_group_there_is_one_rank():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert distributed.gather_to_main("x") == ["x"]
    assert distributed.broadcast_from_main("x") == "x"
    distributed.barrier()
    with distributed.process_group():
        assert not distributed.has_group()


def test_the_local_rank_picks_the_device(monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device() == torch.device("cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.device() == torch.device("cuda", 1)


def test_ranks_draw_different_numbers_and_rank_0_those_of_one_process(monkeypatch):
    draws = {}
    for seed in (0, 1):
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            distributed.seed_rank(seed)
            draws[seed, rank] = torch.rand(4).tolist()
    assert len({tuple(numbers) for numbers in draws.values()}) == 6
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert draws[seed, 0] == torch.rand(4).tolist()


SMALL, LARGE = distributed.PARAMETERS_PER_THREAD, 100 * distributed.PARAMETERS_PER_THREAD


@pytest.fixture
def eight_cores(monkeypatch):
    """A machine with eight cores and a user who has chosen no number of threads."""
    monkeypatch.setattr(distributed, "num_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def test_threads_grow_with_the_model_up_to_this_process_s_share_of_the_cores(eight_cores):
    sizes = (1, SMALL, 2 * SMALL, 5 * SMALL + 1, 8 * SMALL, LARGE)
    assert [distributed.choose_threads(size).number for size in sizes] == [1, 1, 2, 5, 8, 8]
    for here, share in (("2", 4), ("3", 2), ("8", 1), ("16", 1)):
        eight_cores.setenv("LOCAL_WORLD_SIZE", here)
        assert distributed.choose_threads(LARGE).number == share
        assert distributed.choose_threads(SMALL).number == 1


def test_the_reason_for_the_threads_is_what_limits_them(eight_cores):
    assert distributed.choose_threads(5 * SMALL).reason == "the model is small"
    assert distributed.choose_threads(LARGE).reason == "one for each core"
    eight_cores.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.choose_threads(LARGE).reason == "shared by the processes"
    assert distributed.choose_threads(SMALL).reason == "the model is small"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_threads_that_the_user_has_chosen_stay(eight_cores, size):
    for value in (3, 8, 12):
        eight_cores.setenv("OMP_NUM_THREADS", str(value))
        torch.set_num_threads(value)
        distributed.use_threads(size)
        assert torch.get_num_threads() == value
        advice = "; it would be 8 if unset" if (value, size) == (3, LARGE) else ""
        assert distributed.choose_threads(size).reason == f"set by OMP_NUM_THREADS{advice}"


def test_runs_of_scripts_get_one_thread_and_the_allocator_where_linux_has_it(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("OF_THE_USER", "kept")
    monkeypatch.setattr(distributed, "find_library", lambda name: f"lib{name}.so.4")
    monkeypatch.setattr(sys, "platform", "linux")
    environment = distributed.environment_of_script_runs()
    assert environment["LD_PRELOAD"] == "libtcmalloc_minimal.so.4"
    assert (environment["OMP_NUM_THREADS"], environment["OF_THE_USER"]) == ("1", "kept")

    for of_the_user in ("another.so", ""):
        monkeypatch.setenv("LD_PRELOAD", of_the_user)
        assert distributed.environment_of_script_runs()["LD_PRELOAD"] == of_the_user

    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(distributed, "find_library", lambda name: None)
    assert "LD_PRELOAD" not in distributed.environment_of_script_runs()

    monkeypatch.setattr(distributed, "find_library", lambda name: f"lib{name}.dylib")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "LD_PRELOAD" not in distributed.environment_of_script_runs()


def test_an_allocator_counts_as_preloaded_only_where_it_was_found():
    code = "from engine import distributed; print(distributed.preloads_allocator())"

    def answer(environment):
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()

    preloaded = distributed.environment_of_script_runs()
    assert answer(preloaded) == str("LD_PRELOAD" in preloaded)
    assert answer(preloaded | {"LD_PRELOAD": ""}) == "False"
    assert answer(preloaded | {"LD_PRELOAD": "libtcmalloc_minimal.so.missing"}) == "False"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc to read an environment from")
@pytest.mark.parametrize("of_the_user", [True, False])
def test_one_thread_set_by_torchrun_does_not_count_as_chosen(eight_cores, of_the_user):
    """Of torchrun's own process the system shows the environment that it was started with."""
    environment = {"PATH": os.environ["PATH"], "NOT_OMP_NUM_THREADS": "1"}
    environment |= {"OMP_NUM_THREADS": "1"} if of_the_user else {}
    command = ["sh", "-c", "echo started; read line"]
    torchrun = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        # Until it runs, there is no environment to read.
        assert torchrun.stdout.readline() == b"started\n"
        eight_cores.setattr(os, "getppid", lambda: torchrun.pid)
        eight_cores.setenv("OMP_NUM_THREADS", "1")
        eight_cores.setenv("LOCAL_WORLD_SIZE", "2")
        torch.set_num_threads(1)
        assert distributed.choose_threads(LARGE).number == (1 if of_the_user else 4)
    finally:
        torchrun.communicate(timeout=60)


def test_on_a_gpu_threads_stay_as_they_are(eight_cores):
    eight_cores.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_num_threads()
    distributed.use_threads(LARGE)
    assert torch.get_num_threads() == before
    assert distributed.choose_threads(LARGE) == distributed.Threads(before, None)


def test_cores_are_counted_once_however_many_processors_each_has(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(distributed, "_core", lambda processor: f"{processor % 4}")
    assert distributed.num_cores() == 4
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert distributed.num_cores() == 3, "as many as the system names"


def test_a_resumed_run_and_its_evaluation_compute_with_the_threads_of_the_first_start(
    tmp_path, eight_cores, capsys
):
    """The size is on the edge between two numbers, so that one parameter less would tell."""
    experiment = Experiment(tmp_path, num_epochs=1)
    config = load_config(str(experiment.yaml))
    size = backbone.model_outline(config, ModelSource.of(config)).num_parameters
    assert size % 2 == 0
    eight_cores.setattr(distributed, "PARAMETERS_PER_THREAD", size // 2)
    checkpoint = experiment.run_dir / "checkpoint_1"
    for arguments in ([], ["num_epochs=2"], ["only_eval=True", f"load_model_path={checkpoint}"]):
        torch.set_num_threads(1)
        assert experiment.main(*arguments) == 0
        assert torch.get_num_threads() == 2
        assert "2 threads (8 cores; the model is small)" in capsys.readouterr().out


def signal_rank_0_in_its_first_evaluation():
    def action():
        if distributed.is_main():
            signal.raise_signal(signal.SIGTERM)

    at_call(1, "engine.evaluation:Decoder.predict", action)


def test_ranks_stopped_in_an_evaluation_finish_it_together(tmp_path):
    experiment = Experiment(tmp_path)
    hook = signal_rank_0_in_its_first_evaluation
    ranks = Ranks(2, tmp_path, [[str(experiment.yaml)]], hook)
    assert ranks.wait() == [EXIT_INTERRUPTED] * 2, ranks.output() + ranks.output(1)
    assert "stopped after optimizer step 3, state saved" in ranks.output()
    assert len(experiment.predictions(0)) == 7
    assert [entry["eval/epoch"] for entry in experiment.metrics() if "eval/acc" in entry] == [0]
