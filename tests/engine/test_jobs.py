"""Training, evaluation and dry runs called from Python, and subclasses of Coconut in them."""

import os
import re
import subprocess
import sys

import pytest
from runs import ROOT, Experiment, assert_refused

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


def test_jobs_are_called_from_python_and_return_their_outcomes(tmp_path, caplog):
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


def test_mistakes_are_exceptions_for_callers_from_python(tmp_path):
    experiment = Experiment(tmp_path)
    experiment.train.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        jobs.train(load(experiment))


def test_a_subclass_trains_in_place_of_coconut(tmp_path):
    plain = Experiment(tmp_path, name="plain", latent_window_size=1)
    other = Experiment(tmp_path, name="other")
    jobs.train(load_config(other.yaml, ["name=plain", "latent_window_size=1"]))
    jobs.train(load(other), coconut_class=LastStateOnly)
    assert other.losses() == pytest.approx(plain.losses(), rel=1e-5)


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


# A class named in the configuration

MODULE = """
from coconut import Coconut

class LastStateOnly(Coconut):
    def thought(self, hidden_states, attention_mask, is_first):
        return hidden_states[:, -1]

class Unrelated:
    pass
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """A module of the user's in the working directory; its name."""
    name = f"my_module_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_a_class_that_the_configuration_names_trains_and_evaluates(tmp_path, my_module, capsys):
    experiment = Experiment(tmp_path, num_epochs=2, coconut_class=f"{my_module}:LastStateOnly")
    plain = Experiment(tmp_path / "plain", num_epochs=2, latent_window_size=1)
    assert experiment.main() == plain.main() == 0
    assert experiment.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert experiment.metadata()["coconut_class"] == f"{my_module}:LastStateOnly"
    checkpoint = f"load_model_path={experiment.run_dir / 'checkpoint_2'}"
    assert experiment.main("only_eval=true", checkpoint) == 0
    capsys.readouterr()
    assert experiment.change(coconut_class=None).main("only_eval=true", checkpoint) == 2
    words = f"was trained with coconut_class {my_module}:LastStateOnly, this run has Coconut itself"
    assert words in capsys.readouterr().err


def test_a_class_that_cannot_be_imported_is_refused_before_anything_is_read(
    tmp_path, my_module, capsys
):
    experiment = Experiment(tmp_path, train_path="missing.json")
    for name, words in [
        ("no_such_module:Mine", "there is no module no_such_module in"),
        (f"{my_module}:Mine", f"{my_module}.py has no class Mine"),
        (f"{my_module}:Unrelated", "Unrelated is not a subclass of Coconut"),
    ]:
        words = [f"coconut_class: {name}: ", words]
        assert_refused(capsys, experiment, f"coconut_class={name}", words=words)
    (tmp_path / f"{my_module}_2.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        jobs.find_coconut_class(load(experiment, f"coconut_class={my_module}_2:Mine"))


# Chains of runs


@pytest.fixture(scope="module")
def cot(tmp_path_factory):
    """A CoT run of two epochs."""
    experiment = Experiment(tmp_path_factory.mktemp("cot"), cot=True, num_epochs=2)
    assert experiment.main() == 0
    return experiment


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["resume=2", "epochs_per_stage=2"], None),
        (["resume=2"], "resume: 2 begins with stage 2, but load_model_path {0} was trained as cot"),
        (["resume=2", "curriculum=false"], None),
        (["cot=true", "coconut=false", "resume=2"], None),
        (["cot=true", "coconut=false", "resume=1"], "(stage 0); resume: 2 would"),
        (["cot=true", "coconut=false"], "resume: 0 does not follow: load_model_path {0} was"),
    ],
)
def test_a_resume_that_does_not_follow_from_the_weights_is_questioned(
    tmp_path, cot, caplog, overrides, words
):
    path = cot.run_dir / "checkpoint_2"
    experiment = Experiment(tmp_path, model_id=cot.model, load_model_path=path)
    assert experiment.main("--dry-run", *overrides) == 0
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (words is not None)
    assert words is None or words.format(path) in warnings[0]


def test_dry_runs_of_a_chain_need_no_run_before_to_be_trained(tmp_path, capsys):
    path = tmp_path / "exps" / "cot" / "checkpoint_2"
    second = Experiment(tmp_path, load_model_path=path, resume=1)
    assert second.main("--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"load_model_path: {path} does not exist yet\n" in shown
    assert f"\nload_model_path: {path}\n" in shown and "names no weights" not in shown
    assert "optimizer steps     5 per epoch, 10 in total" in shown
    assert f" parameters; weights: {path}\n" in shown
    assert second.main("--dry-run", "only_eval=true") == 0
    shown = capsys.readouterr().out
    assert "stage and size      as the checkpoint records" in shown
    words = [f"load_model_path: {path} does not exist"]
    assert_refused(capsys, second, words=words)
    assert_refused(capsys, second, "only_eval=true", words=words)


def test_num_epochs_null_ends_with_the_first_stage_without_text(tmp_path, capsys):
    """Records have up to three steps, and stage 3 is the last with max_latent_stage 2."""
    experiment = Experiment(tmp_path, epochs_per_stage=2)
    for overrides, last in (([], 7), (["max_latent_stage=0"], 3), (["max_latent_stage=9"], 7)):
        assert experiment.main("--dry-run", "num_epochs=null", *overrides) == 0
        shown = capsys.readouterr().out
        assert f"num_epochs: {last + 1}\n" in shown and f"-{last} " in shown
    words = ["resume: 8 leaves none of the 8 epochs"]
    assert_refused(capsys, experiment, "resume=8", "num_epochs=null", words=words)
