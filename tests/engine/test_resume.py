"""Laws of resuming: a run that was stopped, killed or failed ends as one that never was.

Bit for bit, in float32 with dropout on. Ranks are in test_distributed.py.
"""

import functools
import re
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from runs import (
    TENSORS,
    Experiment,
    assert_same_weights,
    at_call,
    kill_self,
    make_records,
    signal_group,
)
from safetensors import SafetensorError
from torch.distributed import DistError

from engine import checkpoint, jobs, run_dir
from engine.config_file import load_config
from engine.evaluation import Decoder
from engine.tracking import Tracker
from engine.trainer import Trainer
from utils import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR

KEYS = {
    "dropout": 0.1, "uniform_prob": 0.3, "warmup_steps": 3, "lr_scheduler": "cosine",
    "gradient_accumulation_steps": 2, "batch_size_training": 2, "max_grad_norm": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 3 epochs and 15 steps with dropout that nothing disturbed."""
    experiment = Experiment(tmp_path_factory.mktemp("straight"), **KEYS)
    assert experiment.main() == 0
    assert len(experiment.losses()) == 15
    return experiment


@pytest.fixture
def disturbed(straight, tmp_path):
    """The same experiment, to be disturbed; starts from the same model folder."""
    shutil.copytree(straight.model, tmp_path / "model")
    return Experiment(tmp_path, **KEYS)


def assert_same_run(got, expected):
    assert_same_weights(got.weights(), expected.weights())
    assert got.metrics() == expected.metrics()
    for epoch in range(3):
        assert got.predictions(epoch) == expected.predictions(epoch)
    names = sorted(path.name for path in expected.run_dir.iterdir())
    assert sorted(path.name for path in got.run_dir.iterdir()) == names
    assert len(got.states()) == 2


def test_a_run_stopped_by_signals_resumes_as_if_never_stopped(
    straight, disturbed, monkeypatch, capsys
):
    log, plan = Tracker.log, {2: signal.SIGTERM, 4: signal.SIGUSR1, 7: signal.SIGINT}
    plan[10] = signal.SIGTERM  # the last step of its epoch

    def log_and_signal(tracker, metrics, step):
        log(tracker, metrics, step)
        if "train/loss" in metrics and step in plan:
            signal.raise_signal(plan.pop(step))

    monkeypatch.setattr(Tracker, "log", log_and_signal)
    stops = []
    while plan:
        assert disturbed.main() == EXIT_INTERRUPTED
        stops += re.findall(r"stopped after optimizer step (\d+)", capsys.readouterr().err)
        assert len(disturbed.states()) <= 2
    assert stops == ["2", "7", "10"]
    assert disturbed.main() == 0
    shown = capsys.readouterr().out
    assert "resume/10; resume and load_model_path are overridden by it" in shown
    assert_same_run(disturbed, straight)


def test_a_run_stopped_in_an_evaluation_repeats_it_and_resumes(
    straight, disturbed, monkeypatch, capsys
):
    monkeypatch.setattr(Decoder, "predict", Decoder.predict)
    at_call(1, "engine.evaluation:Decoder.predict", lambda: signal.raise_signal(signal.SIGTERM))
    assert disturbed.main() == EXIT_INTERRUPTED
    assert "stopped after optimizer step 5, state saved" in capsys.readouterr().err
    assert not (disturbed.run_dir / "predictions_0.jsonl").exists()
    assert disturbed.main() == 0
    assert_same_run(disturbed, straight)


def test_a_stop_after_the_last_epoch_is_an_ordinary_end(disturbed, monkeypatch, capsys):
    store = Trainer._store

    def store_and_signal(trainer, epoch, *rest):
        store(trainer, epoch, *rest)
        if epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_store", store_and_signal)
    assert disturbed.main() == 0
    assert "stopped after" not in capsys.readouterr().err


def without_step_evaluations(entries):
    """Lines of metrics.jsonl as a run without eval_every_steps writes them."""
    plain = [{k: v for k, v in e.items() if not k.startswith("eval_step/")} for e in entries]
    return [entry for entry in plain if entry.keys() != {"step"}]


def test_evaluations_within_epochs_change_nothing_else_and_resume(
    straight, disturbed, tmp_path, monkeypatch
):
    evaluated = Experiment(tmp_path / "evaluated", eval_every_steps=2, **KEYS)
    assert evaluated.main() == 0
    steps = [entry["step"] for entry in evaluated.metrics() if "eval_step/acc" in entry]
    assert steps == [2, 4, 6, 8, 10, 12, 14]
    assert without_step_evaluations(evaluated.metrics()) == straight.metrics()
    assert_same_weights(evaluated.weights(), straight.weights())
    # Step 10 ends epoch 1, whose evaluation is the same.
    (both,) = [e for e in evaluated.metrics() if e["step"] == 10 and "eval/acc" in e]
    for name in ("acc", "acc_low", "acc_high", "loss", "stage", "epoch"):
        assert both[f"eval_step/{name}"] == both[f"eval/{name}"]

    log, plan = Tracker.log, [4, 7, 10]

    def log_and_signal(tracker, metrics, step):
        log(tracker, metrics, step)
        if plan and step == plan[0]:
            signal.raise_signal(signal.SIGTERM)
            plan.pop(0)

    disturbed.change(eval_every_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log_and_signal)
        while plan:
            assert disturbed.main() == EXIT_INTERRUPTED
    assert disturbed.main() == 0
    assert_same_run(disturbed, evaluated)


def test_learned_window_weights_resume_as_if_never_stopped(tmp_path, monkeypatch):
    keys = KEYS | {"latent_weights": "learned", "lr_scheduler": "constant"}
    whole, parts = (Experiment(tmp_path / name, **keys) for name in ("whole", "parts"))
    assert whole.main() == 0
    assert parts.main("num_epochs=2") == 0
    assert parts.main() == 0
    assert parts.metrics() == whole.metrics()
    weights = [e["train/window_weights"] for e in whole.metrics() if "eval/acc" in e]
    assert len(set(map(tuple, weights))) == 3


def test_a_run_killed_in_every_phase_resumes_as_if_never_stopped(straight, disturbed):
    kills = [
        ("engine.checkpoint:sha256_file", 2, []),  # inside the first state, its tensors written
        ("engine.checkpoint:dcp.save", 1, []),  # inside a state, its tensors not written
        ("engine.run_dir:os.rename", 3, []),  # a whole state without its name
        ("engine.tracking:Tracker.log", 9, []),  # mid-epoch, the step logged but not yet saved
        ("engine.trainer:evaluate", 1, []),  # between the end of the epoch's steps and evaluation
        ("engine.checkpoint:atomic_directory", 1, []),  # before the epoch's checkpoint
        ("engine.checkpoint:update_trainer", 1, []),  # everything done but not logged
        ("engine.tracking:Tracker.log", 3, ["save_every_minutes=None"]),  # to the epoch's start
    ]
    disturbed.change(save_every_minutes=1e-9)
    for target, number, overrides in kills:
        hook = functools.partial(at_call, number, target, kill_self)
        process = disturbed.start(*overrides, hook=hook)
        assert process.wait() == [-signal.SIGKILL], (target, process.output())
    assert disturbed.main() == 0
    assert_same_run(disturbed.change(save_every_minutes=None), straight)


def fail(error):
    raise error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_spares_the_data_workers(straight, disturbed, number):
    hook = functools.partial(
        at_call, 2, "engine.tracking:Tracker.log", functools.partial(signal_group, number)
    )
    process = disturbed.change(num_workers=2).start(hook=hook)
    assert process.wait() == [EXIT_INTERRUPTED]
    assert process.output().count("stopping after this step") == 1
    assert "Traceback" not in process.output()
    assert disturbed.change(num_workers=0).main() == 0
    assert_same_run(disturbed, straight)


def test_a_second_signal_ends_the_run_at_once(disturbed, monkeypatch, capsys):
    monkeypatch.setattr("engine.signals.SAME_SIGNAL_S", -1.0)
    log = Tracker.log

    def log_and_signal(tracker, metrics, step):
        log(tracker, metrics, step)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Tracker, "log", log_and_signal)
    before = signal.getsignal(signal.SIGINT)
    assert disturbed.main() == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n", "no state was saved to continue from"
    assert disturbed.losses() and not (disturbed.run_dir / "resume").exists()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of the finished run to damage."""
    shutil.copytree(straight.folder, tmp_path, dirs_exist_ok=True)
    return Experiment(tmp_path, **KEYS)


def test_a_finished_run_has_nothing_left_to_train_until_it_gets_more_epochs(finished, capsys):
    before = finished.metrics()
    assert finished.main() == 0
    assert "all 3 epochs are done: nothing to train" in capsys.readouterr().out
    assert finished.metrics() == before
    assert finished.change(num_epochs=4).main() == 0
    assert "config.yaml: changed since the last start: num_epochs: 4" in capsys.readouterr().out
    assert finished.metrics()[: len(before)] == before
    assert len(finished.losses()) == 20


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "seed=0, now it is 1"),
        ({"batch_size_training": 4}, "effective_batch_size=4, now it is 8"),
        ({"uniform_prob": 0.0}, "uniform_prob=0.3, now it is 0.0"),
        ({"c_thought": 2}, "c_thought was 1 in training, the configuration says 2"),
        ({"coconut": False, "no_thoughts": True}, "was trained as coconut, but this run is"),
    ],
)
def test_resuming_as_another_run_is_refused(finished, capsys, change, words):
    assert finished.change(**change, num_epochs=4).main() == EXIT_USER_ERROR
    assert words in capsys.readouterr().err
    assert len(finished.losses()) == 15


def test_resuming_cot_as_coconut_or_with_other_records_is_refused(tmp_path, capsys):
    experiment = Experiment(tmp_path, cot=True, num_epochs=1)
    assert experiment.main() == 0
    experiment.change(cot=False, coconut=True, num_epochs=2)
    assert experiment.main() == EXIT_USER_ERROR
    assert "this run began with method=cot, now it is coconut; restore" in capsys.readouterr().err
    experiment.change(cot=True, coconut=False)
    for number, name in enumerate(["train.json", "val.json"], 2):
        path = experiment.change(num_epochs=number).write(name, make_records(17 - number))
        changed = f"{path}: holds other records than when the run began"
        assert experiment.main() == EXIT_USER_ERROR
        assert f"{changed} (sha256" in capsys.readouterr().err
        assert experiment.main("allow_changed_data=true") == 0
        assert f"{changed}; continuing, since allow_changed_data is true" in capsys.readouterr().out
        assert experiment.main() == 0, "from now on these are the run's records"


def test_the_loss_of_an_epoch_is_the_mean_of_its_steps_though_the_file_shrank(
    disturbed, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", Tracker.log)
        at_call(3, "engine.tracking:Tracker.log", lambda: signal.raise_signal(signal.SIGTERM))
        assert disturbed.main() == EXIT_INTERRUPTED
    assert len(disturbed.losses()) == 3
    disturbed.write("train.json", make_records(8))
    assert disturbed.main("allow_changed_data=true") == 0
    mean = sum(disturbed.losses()[:3]) / 3
    assert f"epoch 0 stage 0: train loss {mean:.4f}," in capsys.readouterr().out


@pytest.mark.parametrize("change", ["rewritten", "moved away"])
def test_data_files_changed_while_a_run_trains_are_not_its_records(
    straight, disturbed, monkeypatch, capsys, change
):
    files = {path: path.read_bytes() for path in (disturbed.train, disturbed.val)}

    def change_and_stop():
        for path in files:
            path.unlink()
            if change == "rewritten":
                disturbed.write(path.name, make_records(18))
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", Tracker.log)
        at_call(2, "engine.tracking:Tracker.log", change_and_stop)
        assert disturbed.main() == EXIT_INTERRUPTED
    assert "state saved" in capsys.readouterr().err
    if change == "rewritten":
        assert disturbed.main() == EXIT_USER_ERROR
        assert "holds other records than when the run began" in capsys.readouterr().err
    for path, content in files.items():
        path.write_bytes(content)
    assert disturbed.main() == 0
    assert_same_run(disturbed, straight)


def test_what_a_run_began_with_stays_with_it(finished, straight, capsys):
    others = {"resume": 2, "load_model_path": "nowhere", "model_id": "gpt2", "new_token_init": "="}
    assert finished.change(**others).main() == 0
    shown = capsys.readouterr().out
    assert "resume and load_model_path are overridden by it" in shown
    assert f"model_id: gpt2 has no effect, since this run began with {straight.model}" in shown
    assert "new_token_init: = has no effect" in shown
    assert finished.metrics() == straight.metrics()
    written, before = (load_config(r.run_dir / "config.yaml") for r in (finished, straight))
    for name in (*others, "from_scratch"):
        assert getattr(written, name) == getattr(before, name), name


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_figure(path):
    path.write_text(path.read_text().replace('"optimizer_step": 15', '"optimizer_step": 14'))


def remove(path):
    path.unlink()


DAMAGES = [
    (truncate, TENSORS, f"{TENSORS} does not match its checksum"),
    (flip_a_bit, TENSORS, f"{TENSORS} does not match its checksum"),
    (remove, "generators.json", "generators.json is missing"),
    (remove, "state.json", "No such file or directory"),
    (truncate, "state.json", "Expecting"),
    (change_a_figure, "state.json", "state.json does not match its checksum"),
]


@pytest.mark.parametrize("damage, name, reason", DAMAGES)
def test_after_a_damaged_state_the_one_before_is_used(
    finished, straight, capsys, damage, name, reason
):
    before, newest = finished.states()
    damage(newest / name)
    assert finished.main() == 0
    shown = capsys.readouterr().out
    assert f"{newest}: damaged, trying the one before ({reason}" in re.sub(
        r"\[Errno 2\] ", "", shown
    )
    assert f"continuing from {before};" in shown
    assert_same_run(finished, straight)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        DistError("the store is gone"),
    ],
    ids=["memory", "gloo", "store"],
)
def test_a_failure_while_restoring_that_is_not_the_states_is_reported_as_itself(
    finished, monkeypatch, capsys, error
):
    reported = []
    monkeypatch.setattr(checkpoint, "load_state", lambda *_: fail(error))

    def report(error, _config):
        reported.append(error)
        return EXIT_FAILED

    monkeypatch.setattr(jobs, "report_failure", report)
    assert finished.change(num_epochs=4).main() == EXIT_FAILED
    assert reported == [error]


def test_without_an_intact_state_the_run_is_refused(finished, capsys):
    for state in finished.states():
        flip_a_bit(state / "state.json")
    assert finished.main() == EXIT_USER_ERROR
    assert "resume: no training state is intact; remove the folder" in capsys.readouterr().err
    assert len(finished.losses()) == 15


def test_a_damaged_state_does_not_count_among_the_two_kept(finished):
    before, newest = finished.states()
    truncate(newest / TENSORS)
    later = newest.rename(newest.with_name("1000"))
    assert finished.change(save_every_minutes=1e-9).main() == 0
    assert not later.exists()
    assert len(finished.states()) == 2
    assert checkpoint.newest_state(finished.run_dir).folder == finished.states()[-1]


def test_a_second_run_on_the_directory_is_refused(finished, capsys):
    before = finished.metrics()
    with run_dir.hold(finished.run_dir):
        assert finished.main() == EXIT_USER_ERROR
    assert "another training run is using this directory (process " in capsys.readouterr().err
    assert finished.metrics() == before


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (1, FULL, "nothing was saved before, so the same command starts over"),
        (2, SafetensorError("No space left on device"), "the same command resumes from"),
        (3, FULL, "the same command resumes from"),
    ],
)
def test_a_full_disk_ends_the_run_with_a_message_of_what_is_left(
    straight, disturbed, monkeypatch, capsys, call, error, words
):
    atomic_directory, calls = run_dir.atomic_directory, []

    @contextmanager
    def filling(target):
        with atomic_directory(target) as folder:
            yield folder
            calls.append(target)
            if len(calls) == call:
                raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "atomic_directory", filling)
        assert disturbed.main() == EXIT_FAILED
    said = capsys.readouterr().err
    assert " could not be written (No space left on device); " in said and words in said
    assert len(said.splitlines()) == 1
    assert disturbed.main() == 0
    assert_same_run(disturbed, straight)


def test_a_signal_saves_a_state_and_training_continues(straight, disturbed, monkeypatch):
    log, states = Tracker.log, []

    def log_and_signal(tracker, metrics, step):
        log(tracker, metrics, step)
        if step == 2:
            signal.raise_signal(signal.SIGUSR1)
        if step == 4:
            states.extend(path.name for path in disturbed.states())

    monkeypatch.setattr(Tracker, "log", log_and_signal)
    assert disturbed.main() == 0
    assert states == ["2"]
    assert_same_run(disturbed, straight)


@pytest.mark.parametrize(
    "where, error, words",
    [
        ("engine.checkpoint:dcp.save", OSError(28, "full"), "could not be written (full)"),
        ("engine.checkpoint:save_state", ValueError("bug"), "ValueError: bug"),
        ("engine.evaluation:Decoder.predict", ValueError("bug"), "ValueError: bug"),
    ],
)
def test_a_run_that_fails_ends_its_data_workers(disturbed, where, error, words):
    hook = functools.partial(at_call, 1, where, functools.partial(fail, error))
    process = disturbed.change(num_workers=2, save_every_minutes=1e-9).start(hook=hook)
    assert process.wait() == [EXIT_FAILED], process.output()
    assert words in process.output()


def test_data_workers_that_outlive_a_killed_run_do_not_hold_its_directory(straight, disturbed):
    hook = functools.partial(at_call, 2, "engine.tracking:Tracker.log", kill_self)
    disturbed.change(num_workers=2)
    assert disturbed.start(hook=hook).wait() == [-signal.SIGKILL]
    assert disturbed.main() == 0
    assert_same_run(disturbed, straight)
