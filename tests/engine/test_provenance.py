"""Where figures come from: the commit of this tree and the machine, found without torch."""

import json
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
from runs import Experiment

from engine import jobs
from engine import provenance as module
from engine.config_file import load_config
from utils import sha256_file


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with one commit and one file, taken for this project's root."""
    commands = [["init", "-q"], ["add", "."], ["commit", "-qm", "first"]]
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "run.py").write_text("pass")
    for command in commands:
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_the_commit_and_whether_the_source_differs_from_it(tree):
    name, changed = module.source_commit()
    assert (len(name), changed) == (40, False)
    (tree / "run.py").write_text("1")
    assert module.source_commit() == (name, True)


def test_what_runs_write_is_no_change_of_the_source(tree):
    (tree / "results").mkdir()
    (tree / "results/a.json").write_text("{}")
    (tree / "notes.txt").write_text("")
    assert module.source_commit()[1] is False


def test_a_copy_without_git_is_unknown_or_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("COMMIT", raising=False)
    assert module.source_commit() == ("unknown", False)
    monkeypatch.setenv("COMMIT", "abc")
    assert module.source_commit() == ("abc", False)


def test_provenance_is_json_and_names_versions_and_machine():
    found = json.loads(json.dumps(module.provenance()))
    assert found.keys() == {"commit", "changed", "versions", "machine"}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "core" in found["machine"]


def test_a_copy_in_a_folder_of_another_repository_does_not_take_its_commit(tree, monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    (tree / "copy").mkdir()
    (tree / "copy/run.py").write_text("pass")
    monkeypatch.setattr(module, "ROOT", tree / "copy")
    assert module.source_commit() == ("unknown", False)


def first_lines(experiment):
    lines = (experiment.run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "run/commit" in entry]


def test_a_run_records_where_it_comes_from_and_again_when_that_changes(
    tmp_path, monkeypatch, capsys
):
    experiment = Experiment(tmp_path, num_epochs=1, num_train=4)
    assert experiment.main() == 0
    (first,) = first_lines(experiment)
    text = (experiment.run_dir / "metrics.jsonl").read_text()
    assert json.loads(text.splitlines()[0]) == first
    assert first["step"] == 0
    assert {name: first[f"run/{name}"] for name in module.provenance()} == module.provenance()
    assert first["run/device"] == "1 process on the CPU, 1 thread"
    assert first["run/data"] == {
        "train_path": {"records": 4, "sha256": sha256_file(experiment.train)},
        "val_path": {"records": 7, "sha256": sha256_file(experiment.val)},
    }
    recorded = experiment.metadata()["provenance"]
    assert {"step": 0} | {f"run/{name}": value for name, value in recorded.items()} == first
    config_file = experiment.run_dir / "config.yaml"
    assert config_file.read_text().startswith(f"# commit: {first['run/commit']}")
    assert load_config(str(config_file)).train_path == str(experiment.train)
    (evaluation,) = [json.loads(line) for line in text.splitlines() if "eval/acc" in line]
    assert datetime.fromisoformat(evaluation["time"]).utcoffset() == timedelta(0)
    assert evaluation["train/seconds"] > 0 and evaluation["eval/seconds"] > 0

    assert experiment.main("num_epochs=2") == 0
    assert first_lines(experiment) == [first]
    capsys.readouterr()
    monkeypatch.setattr(jobs, "run_provenance", lambda *_: recorded | {"commit": "abc"})
    for _ in range(2):
        assert experiment.main("num_epochs=3") == 0
    assert first_lines(experiment) == [first, first | {"step": 2, "run/commit": "abc"}]
    assert "config.yaml: changed since the last start: # commit: abc" in capsys.readouterr().out


def test_it_loads_without_torch():
    code = "import sys, engine.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=module.ROOT).returncode == 0
