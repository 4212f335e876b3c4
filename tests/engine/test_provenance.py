"""Where figures come from: the commit of this tree and the machine, found without torch."""

import json
import subprocess
import sys

import pytest

from engine import provenance as module


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


def test_it_loads_without_torch():
    code = "import sys, engine.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=module.ROOT).returncode == 0
