"""Training, evaluation and dry runs called from Python, and subclasses of Coconut in them."""

import os
import re
import subprocess
import sys

import pytest
from runs import ROOT, Experiment, assert_same_weights

from coconut import Coconut
from engine import jobs
from engine.config_file import load_config
from utils import UserError

README = (ROOT / "README.md").read_text(encoding="utf-8")


class LastStateOnly(Coconut):
    """The original Coconut, whatever the window."""

    def thought(self, hidden_states, attention_mask, is_first):
        return hidden_states[:, -1]


def load(experiment, *overrides):
    return load_config(experiment.yaml, overrides)


def test_jobs_are_called_from_python_and_return_what_came_of_them(tmp_path, caplog):
    experiment = Experiment(tmp_path, num_epochs=2)
    jobs.dry_run(load(experiment))
    assert "dry run: nothing trained or written" in caplog.messages
    assert not experiment.run_dir.exists()

    trained = jobs.train(load(experiment))
    last = experiment.metrics()[-1]
    assert trained.folder == experiment.run_dir
    figures = {f"eval/{name}": value for name, value in trained.figures.items()}
    figures.pop("eval/seconds_per_record")
    assert figures == {name: last[name] for name in figures}
    assert trained.best_accuracy == last["eval/best_acc"] >= last["eval/acc"]
    again = jobs.train(load(experiment))
    assert (again.figures, again.best_accuracy) == ({}, trained.best_accuracy)

    checkpoint = f"load_model_path={experiment.run_dir / 'checkpoint_2'}"
    measured = jobs.evaluate(load(experiment, "only_eval=true", checkpoint))
    assert measured["loss"] == trained.figures["loss"]
    assert measured["num_records"] == 7


def test_mistakes_are_exceptions_for_who_calls_from_python(tmp_path):
    experiment = Experiment(tmp_path)
    experiment.train.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        jobs.train(load(experiment))


def test_a_subclass_trains_in_place_of_coconut(tmp_path):
    plain = Experiment(tmp_path, name="plain", latent_window_size=1)
    other = Experiment(tmp_path, name="other")
    jobs.train(load_config(other.yaml, ["name=plain", "latent_window_size=1"]))
    jobs.train(load(other), coconut_class=LastStateOnly)
    assert_same_weights(other.weights(), plain.weights())


def test_readme_s_example_of_a_subclass_trains(tmp_path):
    (script,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    yaml = "cpu_args/quickstart_coconut.yaml"
    assert yaml in script and (ROOT / yaml).is_file()
    experiment = Experiment(tmp_path, num_epochs=2, num_train=4)
    path = tmp_path / "example.py"
    path.write_text(script.replace(yaml, str(experiment.yaml)))
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=150,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch 1 stage 1: train loss" in done.stdout
    assert len(script.strip().splitlines()) <= 12
