"""Studies: what runs, in which order, what counts as finished, and that a kill changes nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from study_results import make_run

from analysis import compare
from analysis.results import read_result, read_results, write_result
from analysis.study import Study
from engine.config_file import load_config
from scripts import reproduce
from utils import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted((ROOT / "args/studies").glob("*.yaml"))
BASE = {
    "project": "coconut", "name": "base", "save_path": "exps", "coconut": True, "c_thought": 1,
    "epochs_per_stage": 1, "max_latent_stage": 2, "model_id": "unset", "train_path": "unset",
    "val_path": "unset", "resume": 1, "num_epochs": 3, "batch_size_training": 32, "num_workers": 0,
    "max_new_tokens": 8, "lr": 1e-3, "wandb": "disabled", "new_token_init": "=",
}  # fmt: skip
STUDY = {
    "question": "Which window?",
    "base": "base.yaml",
    "prepare": [
        "preprocessing/arithmetic.py --task lagged --lag {lag} --modulus 5 --steps 3"
        " --train 64 --valid 16 --seed {seed} --out {folder}",
        "assets/make_quickstart_model.py --data {folder}/train.json --width 16 --depth 1"
        " --heads 2 --weights {seed} --out {folder}/model",
    ],
    "set": {
        "model_id": "{folder}/model",
        "train_path": "{folder}/train.json",
        "val_path": "{folder}/valid.json",
        "load_model_path": "{cot}",
    },
    "conditions": {"lag1": {"lag": 1}},
    "prerequisites": {
        "cot": {
            "coconut": False, "cot": True, "resume": 0, "num_epochs": 1, "load_model_path": None,
        }
    },
    "arms": {"m1": {"latent_window_size": 1}, "m3": {}},
    "baseline": "m1",
    "plan": [{"conditions": ["lag1"], "arms": ["m1", "m3"], "seeds": 2}],
    "sizes": {
        "lag1": {"parameters": 1e4, "records": 64, "question": 4, "steps": [1, 1], "answer": 3}
    },
}  # fmt: skip
ORIGIN = {
    "commit": "a" * 40, "changed": False, "machine": "EPYC, 2 cores", "versions": {"torch": "2"},
}  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(**changes)` writes the study and its base into a folder that becomes the current."""
    monkeypatch.chdir(tmp_path)

    def write(base=None, **changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE | (base or {})))
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes))
        return path

    return write


@pytest.fixture
def runner(write, tmp_path):
    return reproduce.Runner(Study(write()), tmp_path / "results/tiny", ORIGIN)


def labels(runs):
    return [(run.seed, run.arm) for run in runs]


def run_study(path, *arguments):
    """The study in a process of its own, whose source may differ from its commit."""
    code = "import sys; from scripts import reproduce; reproduce.check_source = lambda origin: None"
    code += f"; sys.exit(reproduce.main({[str(path), *map(str, arguments)]!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=path.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(results, run, **changes):
    """Write a hand-made result of `run`, as a finished run would leave it."""
    config = load_config(run.base, dict(run.overrides)).model_dump(mode="json")
    origin = {key: ORIGIN[key] for key in ("commit", "machine")}
    values = {"condition": run.condition, "config": config, "data": {}} | origin | changes
    write_result(results, make_run(run.arm, run.seed, **values))


def outcome(results):
    """Results without measured times."""
    found = []
    for run in read_results(results):
        epochs = [epoch.model_copy(update={"seconds": None}) for epoch in run.epochs]
        found.append(run.model_copy(update={"seconds": 0.0, "finished": "", "epochs": epochs}))
    return found


def test_runs_go_seed_by_seed_after_what_they_start_from(write):
    runs = Study(write()).runs()
    assert labels(runs) == [(s, arm) for s in (0, 1) for arm in ("cot", "m1", "m3")]
    assert runs[1].needs == ("cot",) and runs[0].needs == ()
    config = Study(write()).config(runs[1])
    assert config.load_model_path == "exps/studies/tiny/lag1/seed0/cot/checkpoint_1"


def test_arms_and_seeds_can_be_chosen(write):
    runs = Study(write()).runs(arms=["m3"], seeds=[1])
    assert labels(runs) == [(1, "cot"), (1, "m3")]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"arms": {"m1": {"latent_windw_size": 1}, "m3": {}}}, "did you mean latent_window_size"),
        ({"plan": [{"arms": ["m1"], "seeds": [0, 1, 0]}]}, "seeds: 0 is given twice"),
        ({"plan": [{"arms": ["m7"], "seeds": 1}]}, "arms: 'm7' is not defined; known: m1, m3"),
        ({"plan": [{"arms": ["m1"], "seeds": 1, "set": {"lr": 1.0}}]}, "set and suffix"),
        ({"baseline": "m7"}, "baseline: 'm7' is not one of the arms"),
        ({"arms": {"m1": {"model_id": "{fold}"}}, "plan": []}, "no run has these arms"),
        ({"set": {"model_id": "{fold}"}}, "{fold}, which is not one of {lag}"),
        ({"question": None}, "question: Input should be a valid string"),
        ({"arms": {"m1": {}, "cot": {}}}, "'cot' is an arm and a prerequisite"),
    ],
)
def test_a_wrong_study_is_one_message_and_writes_nothing(write, capsys, tmp_path, changes, words):
    path = write(**changes)
    assert reproduce.main([str(path)]) == 2
    assert words in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert {p.name for p in tmp_path.iterdir()} == {"base.yaml", "tiny.yaml"}


def test_an_unknown_arm_on_the_command_line_is_named(write, capsys):
    assert reproduce.main([str(write()), "--arms", "m7"]) == 2
    assert "--arms: 'm7' is not an arm" in capsys.readouterr().err


def test_an_unknown_seed_on_the_command_line_is_named(write, capsys):
    assert reproduce.main([str(write()), "--seeds", "0", "99"]) == 2
    assert "--seeds: 99 is not a seed" in capsys.readouterr().err


def test_a_changed_source_is_refused(write, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "provenance", lambda: ORIGIN | {"changed": True})
    assert reproduce.main([str(write())]) == 2
    assert "git worktree add" in capsys.readouterr().err


def test_data_that_nothing_makes_are_one_message(write, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "provenance", lambda: ORIGIN)
    assert reproduce.main([str(write(prepare=[]))]) == 2
    assert "train.json does not exist, and no command under `prepare`" in capsys.readouterr().err


def test_finished_runs_are_skipped_and_those_of_other_settings_are_not(runner):
    runs = runner.study.runs()
    for run in runs[:3]:
        finish(runner.results, run)
    assert labels(runner.missing(runs)) == labels(runs[3:])
    finish(runner.results, runs[2], config=read_config(runs[2], lr=0.5))
    assert labels(runner.missing(runs)) == [(0, "cot"), (0, "m3"), *labels(runs[3:])]


def read_config(run, **changes):
    return load_config(run.base, dict(run.overrides)).model_dump(mode="json") | changes


def test_data_that_changed_are_noticed(runner):
    run = runner.study.runs()[1]
    run.folder.mkdir(parents=True)
    (run.folder / "train.json").write_text("[]")
    finish(runner.results, run, data={"train_path": {"sha256": "0", "bytes": 2}})
    assert (0, "m1") in labels(runner.missing(runner.study.runs()))


@pytest.mark.parametrize("changes", [{"commit": "b" * 40}, {"machine": "Xeon"}])
def test_an_unfinished_seed_of_another_commit_or_machine_restarts_whole(runner, changes):
    runs = runner.study.runs()
    for run in runs[:3]:
        finish(runner.results, run, **changes)
    finish(runner.results, runs[4], **changes)
    assert labels(runner.missing(runs)) == labels(runs[3:])
    left = {path.name for path in runner.results.iterdir()}
    assert left == {f"lag1.{arm}.seed0.json" for arm in ("cot", "m1", "m3")}


def test_a_dry_run_shows_steps_and_operations_without_data(write, capsys):
    assert reproduce.main([str(write()), "--dry-run", "--flops-per-second", "1e9"]) == 0
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.split()[:2] == ["lag1", "m1"]]
    # 2 epochs of 64 records in batches of 32; stages 1 and 2 of 4 + 1 + 1 + 3 and 4 + 2 + 3 tokens
    operations = 6 * 1e4 * 64 * (9 + 9)
    assert row.split()[2:5] == ["2", "4", f"{operations:.2e}"]
    assert row.split()[5] == f"{2 * operations / 1e9 / 3600:.2f}"
    assert "no finished run on this machine yet" in said


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_resolve(path):
    if "\nquestion:" not in path.read_text(encoding="utf-8"):
        load_config(path)
        return
    study = Study(path)
    runs = study.runs()
    study.check(runs)
    assert study.file.baseline in {run.arm for run in runs}
    for run in runs:
        study.size_of(run)


@pytest.mark.timeout(280)
def test_a_killed_study_ends_with_the_results_of_an_undisturbed_one(write, tmp_path):
    path = write()
    undisturbed = run_study(path, "--arms", "m1", "--seeds", 0, "--results", "undisturbed")
    assert undisturbed.wait() == 0, undisturbed.stdout.read()
    (tmp_path / "exps").rename(tmp_path / "exps_before")
    killed = run_study(path, "--arms", "m1", "--seeds", 0, "--results", "killed")
    state = tmp_path / "exps/studies/tiny/lag1/seed0/m1/resume"
    deadline = time.monotonic() + 120
    while not (state.is_dir() and any(state.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = run_study(path, "--arms", "m1", "--seeds", 0, "--results", "killed")
    assert again.wait() == 0, again.stdout.read()
    assert "1 of 2 runs to do" in again.stdout.read()
    assert outcome(tmp_path / "killed/tiny") == outcome(tmp_path / "undisturbed/tiny")
    result = read_result(tmp_path / "killed/tiny/lag1.m1.seed0.json")
    assert result.outcomes.keys() >= {"last_stage_accuracy", "accuracy_zeroed_thoughts"}
    assert not (state).exists()
    assert compare.main([str(tmp_path / "killed/tiny")]) == 0


def test_interrupted_the_study_stops_its_runs_and_says_how_to_continue(write, tmp_path):
    path = write(base={"num_epochs": 4000, "epochs_per_stage": 1000, "resume": 1000})
    study = run_study(path, "--seeds", 0)
    log = tmp_path / "exps/studies/tiny/lag1/seed0/m1.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "epoch" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    study.send_signal(signal.SIGINT)
    assert study.wait() == EXIT_INTERRUPTED
    assert "interrupted; the same command continues" in study.stdout.read()
    assert [path.name for path in (tmp_path / "results/tiny").iterdir()] == ["lag1.cot.seed0.json"]
