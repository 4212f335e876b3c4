"""Laws of many nodes: two torchrun agents on this machine do what one process does.

Each agent represents a node: its one process has local rank 0, so only the global ranks differ.
node.py is what they run.
"""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from node import notes, watch
from runs import (
    ROOT,
    Experiment,
    Ranks,
    assert_same_weights,
    free_port,
    make_records,
    use_float64,
)
from test_house import MODULES, parse
from torch.distributed.run import get_args_parser

import run
from engine import model as backbone
from engine.config_file import load_config
from utils import EXIT_USER_ERROR

AGENTS_TIMEOUT_S = 200
EXACT = {"rtol": 1e-5, "atol": 1e-7}


def run_agents(experiment, hook, *options):
    """Exit status and output of two agents that train `experiment` as two nodes."""
    port = free_port()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", *options,
        str(ROOT / "tests/node.py"), str(experiment.folder), str(experiment.keys["save_path"]),
        hook, str(experiment.yaml),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    outputs = [experiment.folder / f"agent_{number}.txt" for number in range(2)]
    agents = []
    try:
        for output in outputs:
            with open(output, "w") as file:
                agents.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd="/")
                )
        statuses = [agent.wait(AGENTS_TIMEOUT_S) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return statuses, "".join(output.read_text() for output in outputs)


KEYS = {"resume": 1, "max_grad_norm": 1.0, "uniform_prob": 0.3, "effective_batch_size": 8}


def make_experiment(folder):
    """Five steps in each of two epochs; long questions, so that data outweigh all that is sent."""
    experiment = Experiment(folder, **KEYS)
    records = [r | {"question": " ".join([r["question"]] * 7)} for r in make_records(34)]
    experiment.write("train.json", records)
    return experiment


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process, in float64."""
    experiment = make_experiment(tmp_path_factory.mktemp("one"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "_build_options", backbone._build_options)
        use_float64()
        assert experiment.main() == 0
    assert len(experiment.losses()) == 10
    return experiment


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run on two nodes, watched."""
    experiment = make_experiment(tmp_path_factory.mktemp("two"))
    statuses, output = run_agents(experiment, "undisturbed")
    assert statuses == [0, 0], output
    assert output.count("epoch 1 stage 1:") == 1, "only rank 0 speaks"
    return experiment


def test_two_nodes_follow_the_trajectory_of_one_process(one, two):
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-6)
    assert_same_weights(two.weights(), one.weights(), **EXACT)
    for epoch in (1, 2):
        assert two.predictions(epoch) == one.predictions(epoch)


def test_only_rank_0_writes_shared_files(two):
    by_main = {path.removeprefix(f"{two.run_dir}/") for path in notes(two.folder, 0, "written")}
    left = {str(path.relative_to(two.run_dir)) for path in two.run_dir.rglob("*")}
    # The notes cover every file that exists now except renamed ones, weights included.
    assert {path for path in left if "/" not in path} <= by_main
    assert any(path.endswith("model.safetensors") for path in by_main)
    assert notes(two.folder, 1, "written") == []


def test_each_rank_makes_its_own_batches_alone(two):
    made = [notes(two.folder, rank, "made") for rank in (0, 1)]
    # Two epochs, and in each a reading of the validation records.
    expected = Counter(list(range(34)) * 2) + Counter(list(range(7)) * 2)
    # Rank 0 also reads the examples that it logs.
    (table,) = [line["data_table"] for line in two.metrics() if "data_table" in line]
    expected += Counter(index for index, _ in table["data"])
    assert Counter(i for rank in made for batch in rank for i in batch) == expected
    training = [[batch for batch in rank if len(batch)] for rank in made]
    sizes = [sum(map(len, rank)) for rank in training]
    assert abs(sizes[0] - sizes[1]) <= len(training[0])
    assert max(len(batch) for rank in made for batch in rank) == 4


def test_no_data_set_is_sent_to_other_ranks(two):
    sent = notes(two.folder, 0, "sent")
    assert sent, "the watch sees what is sent"
    # The largest is the configuration; ids of four bytes would take about as much as the texts.
    assert max(sent) < two.train.stat().st_size / 2


def test_an_evaluation_alone_is_written_by_rank_0_too(two):
    folder = two.folder / "evaluation"
    folder.mkdir()
    overrides = [f"load_model_path={two.run_dir / 'checkpoint_3'}", f"save_path={folder / 'exps'}"]
    command = [str(two.yaml), "only_eval=true", "resume=0", *overrides]
    ranks = Ranks(2, folder, [command], functools.partial(watch, folder, folder / "exps"))
    assert ranks.wait() == [0, 0], ranks.output() + ranks.output(1)
    assert any("predictions_2.jsonl" in path for path in notes(folder, 0, "written"))
    assert notes(folder, 1, "written") == []


def test_killed_and_stopped_runs_resume_on_other_numbers_of_nodes(one, tmp_path, monkeypatch):
    experiment = make_experiment(tmp_path)
    statuses, output = run_agents(experiment, "killed_then_stopped", "--max-restarts", "1")
    assert 0 not in statuses
    assert "resume/5; resume and load_model_path are overridden by it" in output
    # The agents pass the signal on while the ranks compute: it may come before step 8 has ended.
    stopped = re.search("stopped after optimizer step ([89]), state saved", output)
    assert stopped, output
    assert [path.name for path in experiment.states()] == ["5", stopped[1]]
    monkeypatch.setattr(backbone, "_build_options", backbone._build_options)
    use_float64()
    assert experiment.main() == 0
    np.testing.assert_allclose(experiment.losses(), one.losses(), rtol=1e-6)
    assert_same_weights(experiment.weights(), one.weights(), **EXACT)


# What one node alone sees


def live_apart(folders):
    """At each run rank 0 works in the first of a pair of folders, rank 1 in the second."""
    load_config, pairs = run.load_config, iter(folders)

    def load_config_there(*arguments):
        os.chdir(next(pairs)[int(os.environ["RANK"])])
        return load_config(*arguments)

    run.load_config = load_config_there


RECORDED = {
    "format_version": 1, "method": "coconut", "latent_token_id": 39, "start_latent_id": 37,
    "end_latent_id": 38, "eos_token_id": 0, "latent_window_size": 1, "latent_weights": [1.0],
    "window_scope": "sequence", "thought": "continuous", "c_thought": 1, "stage": 0, "epoch": 0,
    "schedule": {
        "epochs_per_stage": 1, "max_latent_stage": 0, "pad_latent_to_max": True, "curriculum": True,
    },
}  # fmt: skip


def test_nodes_that_see_different_files_are_refused_on_every_rank(tmp_path):
    shared, other = tmp_path / "shared", tmp_path / "other"
    experiment = Experiment(shared, num_epochs=1, max_latent_stage=0)
    relative = {"model_id": "model", "train_path": "train.json", "val_path": "val.json"}
    experiment.change(save_path="exps", **relative)
    shutil.copytree(shared, tmp_path / "copy")
    shutil.copytree(shared, other)
    (other / "train.json").write_text(json.dumps(make_records(18, seed=9)))
    (other / "config.yaml").write_text(experiment.yaml.read_text().replace("0.01", "0.02"))
    shutil.copytree(other, tmp_path / "lacking")
    (tmp_path / "lacking" / "val.json").unlink()
    shutil.copytree(shared, tmp_path / "recorded")
    (tmp_path / "recorded" / "model" / "coconut.json").write_text(json.dumps(RECORDED))
    runs = [
        (["config.yaml"], other, "rank 1: lr is 0.02 here, 0.01 on rank 0; every machine needs"),
        ([str(experiment.yaml)], other, "rank 1: the sha256 of train.json is "),
        ([str(experiment.yaml)], tmp_path / "lacking", "rank 1: val.json: cannot be read (No such"),
        (["config.yaml"], tmp_path / "recorded", "rank 1: coconut.json of model is format_v"),
        # The same files, but a run directory that the first node alone can see.
        (
            [str(experiment.yaml), "parallel=fsdp"],
            tmp_path / "copy",
            f"rank 1: save_path: exps/run on {socket.gethostname()} is not the folder that rank 0",
        ),
        ([str(experiment.yaml)], shared, "epoch 0 stage 0"),
        (
            [str(experiment.yaml), "num_epochs=2"],
            tmp_path / "copy",
            "rank 1: the list of states in exps/run is [] here, [3] on rank 0; every machine needs",
        ),
    ]
    places = [(shared, folder) for _, folder, _ in runs]
    ranks = Ranks(
        2, tmp_path, [command for command, *_ in runs], functools.partial(live_apart, places)
    )
    assert ranks.wait() == [EXIT_USER_ERROR] * 2, ranks.output() + ranks.output(1)
    said = [ranks.output().find(words) for *_, words in runs]
    assert -1 not in said and said == sorted(said), ranks.output()
    assert ranks.output(1) == ""
    assert not (tmp_path / "copy" / "exps").exists()


def test_devices_are_named_in_distributed_alone():
    """Where no other module chooses a device, the global rank cannot: local_rank() does."""
    calls = [
        (module, ast.unparse(node))
        for module in MODULES
        for node in ast.walk(parse(Path(module.replace(".", "/") + ".py")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("device", "set_device", "cuda")
    ]
    # Models without weights are built on "meta", which is no device of a machine.
    harmless = ("distributed.device()", "torch.device('meta')")
    choosers = {module for module, call in calls if call not in harmless}
    assert choosers == {"engine.distributed"}


# Slurm


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(body)`: a folder of commands in which srun notes its arguments and runs `body`."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def command(name, body):
        path = commands / name
        path.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {tmp_path}/log\n')
        with open(path, "a") as file:
            file.write(f"echo >> {tmp_path}/log\n{body}\n")
        path.chmod(0o755)

    def build(body):
        command("srun", body)
        command("scontrol", "[[ $1 != show ]] || printf '%s\\n' node7 node8")
        command("scancel", f"touch {tmp_path}/cancelled")
        return {
            "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_CPUS_PER_TASK": "16",
        }  # fmt: skip

    return build


SCRIPT = ROOT / "args/slurm.sbatch"


def submit(tmp_path, environment):
    arguments = ["args/gsm_coconut.yaml", "name=a b"]
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=environment, cwd=tmp_path)


def logged(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]


def test_the_slurm_script_starts_an_agent_on_each_node(tmp_path, cluster):
    assert submit(tmp_path, cluster("exit 3")).wait(60) == 3
    _, (srun, *words) = logged(tmp_path)
    assert srun == "srun"
    position = words.index("torchrun")
    assert all(word.startswith("--") for word in words[:position])
    # torchrun's own parser refuses what it does not know.
    known = get_args_parser().parse_args(words[position + 1 :])
    assert (known.nnodes, known.nproc_per_node, known.rdzv_backend) == ("2", "gpu", "c10d")
    assert re.fullmatch(r"node7:\d{5}", known.rdzv_endpoint)
    assert (known.training_script, known.training_script_args) == (
        "run.py",
        ["args/gsm_coconut.yaml", "name=a b"],
    )
    # The state must be saved before torchrun loses patience, and that before the time limit.
    (signal_option,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)", SCRIPT.read_text(), re.M)
    assert 60 < known.shutdown_timeout < int(signal_option)


def test_the_slurm_script_stops_the_agents_in_time_and_queues_itself_again(tmp_path, cluster):
    # The step ends when asked to, as a run that saves its state does.
    job = submit(
        tmp_path, cluster(f"until [[ -e {tmp_path}/cancelled ]]; do sleep 0.1; done\nexit 1")
    )
    while "srun" not in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else True:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 1
    *_, cancel, requeue = logged(tmp_path)
    assert cancel == ["scancel", "--signal=TERM", "4711.0"]
    assert requeue == ["scontrol", "requeue", "4711"]


def test_the_slurm_script_does_not_queue_a_finished_run_again(tmp_path, cluster):
    assert submit(tmp_path, cluster("exit 0")).wait(60) == 0
    assert ["scontrol", "requeue", "4711"] not in logged(tmp_path)


# docs/scale.md


COMMANDS = [
    line.split("torchrun ")[1]
    for block in re.findall(
        r"^```bash\n(.*?)^```",
        (ROOT / "docs/scale.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    for line in block.replace("\\\n", "").splitlines()
    if "torchrun " in line
]


def test_scale_shows_one_node_two_nodes_and_restarts():
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_scale_parse_load_and_divide_their_batch(command):
    words = shlex.split(command, comments=True)
    known = get_args_parser().parse_args(words)
    assert known.training_script == "run.py"
    file, *overrides = known.training_script_args
    config = load_config(ROOT / file, overrides)
    assert config.accumulation_steps(int(known.nnodes) * int(known.nproc_per_node)) >= 1


def test_submission_as_scale_shows_it_fits_the_script():
    text, scale = SCRIPT.read_text(encoding="utf-8"), (ROOT / "docs/scale.md").read_text("utf-8")
    (line,) = re.findall(r"^sbatch args/slurm.sbatch (.*)$", scale, re.MULTILINE)
    assert f"sbatch args/slurm.sbatch {line}" in text
    asked = dict(re.findall(r"^#SBATCH --(\S+)=(\d+)", text, re.MULTILINE))
    file, *overrides = shlex.split(line)
    processes = int(asked["nodes"]) * int(asked["gpus-per-node"])
    assert load_config(ROOT / file, overrides).accumulation_steps(processes) == 1
