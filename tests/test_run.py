"""run.py as its user meets it: one message and status 2 for a mistake, every method, the chain.

Runs happen in this process. What training computes is tested elsewhere.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import EOS, build_tiny_model
from runs import ROOT, Experiment, assert_refused, assert_same_weights, make_records, tree
from safetensors.torch import load_file, save_file

import run
from dataset import MARKERS
from engine.config_file import load_config
from engine.evaluation import Decoder
from utils import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, FIRST_PROCESS_TIMEOUT_S

# Mistakes in the configuration


def test_every_mistake_of_a_file_is_reported_at_once(tmp_path, capsys):
    experiment = Experiment(tmp_path)
    with open(experiment.yaml, "a") as file:
        file.write("\nbatchsize_training: 2\nlr: fast\nlr: 1e-4\ncot: true\nseed: -1\n")
    before = tree(tmp_path)
    assert experiment.main("epochs=3") == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    expected = [
        f"{experiment.yaml}: ", "duplicate key: lr on lines", "did you mean batch_size_training?",
        "unknown key 'epochs'", "seed=-1 should be greater", "coconut and cot are true",
    ]  # fmt: skip
    for words in expected:
        assert any(words in line for line in lines), (words, lines)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "override, words",
    [
        ("lr=fast", "lr='fast' is not a number"),
        ("only_eval=true", "only_eval=True needs weights"),
        ("effective_batch_size=6", "effective_batch_size=6 is not a multiple of"),
        ("name=../escape", "is not a plain folder name"),
    ],
)
def test_a_bad_override_is_refused(tmp_path, capsys, override, words):
    assert_refused(capsys, Experiment(tmp_path), override, words=["command line: ", words])


def test_a_batch_that_the_ranks_cannot_divide_is_refused_before_loading(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("engine.distributed.world_size", lambda: 3)
    experiment = Experiment(tmp_path, effective_batch_size=8)
    words = ["effective_batch_size=8 is not a multiple of batch_size_training=4 x 3 processes"]
    assert_refused(capsys, experiment, words=words)


def test_wrong_arguments_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["--no-such-option"])
    assert ended.value.code == EXIT_USER_ERROR
    assert run.main(["no_such.yaml"]) == EXIT_USER_ERROR
    assert "no_such.yaml: No such file or directory; name a YAML file" in capsys.readouterr().err


# Mistakes in the data


RECORD = make_records(1)[0]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "cannot be read (No such file or directory)"),
        ('[{"question": ', "is not JSON"),
        ([], "holds an empty list; expected a list of at least one record"),
        ({"data": [RECORD]}, "holds an object"),
        ([RECORD, RECORD | {"steps": "1 + 1"}], "record 1: steps is text; expected a list"),
        ([RECORD | {"answer": 3}], "record 0: answer is a number; expected text"),
        ([RECORD | {"question": f"1 {MARKERS[2]}"}], f"question holds the marker {MARKERS[2]}"),
    ],
)
@pytest.mark.parametrize("key", ["train", "val"])
def test_a_bad_data_file_is_refused(tmp_path, capsys, key, content, words):
    experiment = Experiment(tmp_path)
    path = tmp_path / f"{key}.json"
    path.unlink() if content is None else experiment.write(path.name, content)
    assert_refused(capsys, experiment, words=[f"{path}: ", words])


def test_questions_longer_than_the_positions_are_named_and_counted(tmp_path, capsys):
    experiment = Experiment(tmp_path)
    long = {"question": "1 " * 80, "answer": "1", "steps": []}
    experiment.write("train.json", [RECORD, long, RECORD, long])
    words = ["record 1: its sequence of", "question 80", "64 positions (records too long: 2)"]
    assert_refused(capsys, experiment, words=[f"{experiment.train}: ", *words])
    experiment.write("train.json", make_records(4))
    assert_refused(
        capsys, experiment, "max_new_tokens=62",
        words=[f"{experiment.val}: record", "=62 does not fit", "lower max_new_tokens"],
    )  # fmt: skip


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path, capsys):
    experiment = Experiment(tmp_path, cot=True)
    build_tiny_model("gpt2", torch.float32, vocab_size=12).save_pretrained(experiment.model)
    words = [f"{experiment.train}: record ", "embeddings for 0 to 11"]
    assert_refused(capsys, experiment, words=words)
    assert_refused(capsys, experiment, "--dry-run", words=words)


def test_an_eos_in_a_text_is_refused(tmp_path, capsys):
    experiment = Experiment(tmp_path)
    experiment.write("val.json", [RECORD, RECORD | {"answer": f"1 {EOS}"}])
    words = [f"{experiment.val}: record 1: answer holds the tokenizer's EOS '{EOS}'"]
    assert_refused(capsys, experiment, words=words)


def test_thoughts_count_towards_the_positions_at_their_stage(tmp_path, capsys):
    experiment = Experiment(tmp_path, c_thought=15, max_latent_stage=4, pad_latent_to_max=True)
    assert experiment.main("num_epochs=3") == 0
    assert_refused(capsys, experiment, "num_epochs=5", words=["model's 64 positions"])
    # No record can draw a stage beyond its steps, three at most.
    assert experiment.main("num_epochs=3", "uniform_prob=0.1", "name=mixed") == 0
    four_steps = RECORD | {"steps": ["1"] * 4}
    experiment.write("train.json", [RECORD, four_steps])
    assert_refused(
        capsys, experiment, "num_epochs=3", "uniform_prob=0.1", "name=longer",
        words=["record 1: its sequence of", "does not fit", "64 positions"],
    )  # fmt: skip


# Mistakes in what is loaded


def test_a_model_folder_without_weights_needs_from_scratch(tmp_path, capsys):
    experiment = Experiment(tmp_path, num_epochs=1, num_train=4)
    (experiment.model / "model.safetensors").unlink()
    assert_refused(capsys, experiment, words=["has no weights; set from_scratch: true"])
    assert experiment.main("from_scratch=true") == 0


def test_a_save_path_that_cannot_be_written_is_refused(tmp_path, capsys, cot):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    experiment = Experiment(tmp_path / "e", save_path=blocked)
    assert_refused(capsys, experiment, words=["save_path: ", "cannot be written"])
    checkpoint = f"load_model_path={cot.run_dir / 'checkpoint_1'}"
    experiment.change(coconut=False, cot=True, model_id=cot.model)
    assert_refused(
        capsys, experiment, "only_eval=true", checkpoint,
        words=["save_path: ", "run cannot be written"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def cot(tmp_path_factory):
    """A CoT run of one epoch."""
    experiment = Experiment(tmp_path_factory.mktemp("cot"), cot=True, num_epochs=1)
    assert experiment.main() == 0
    return experiment


@pytest.fixture(scope="module")
def coconut(tmp_path_factory, cot):
    """A Coconut run from the CoT checkpoint, as GSM8K's: stage 0 is skipped."""
    experiment = Experiment(
        tmp_path_factory.mktemp("coconut"), model_id=cot.model, resume=1, latent_window_size=2,
        load_model_path=cot.run_dir / "checkpoint_1",
    )  # fmt: skip
    assert experiment.main() == 0
    return experiment


def evaluation_of(coconut, folder, **keys):
    """An only_eval experiment of the Coconut run's last checkpoint, writing beside nothing."""
    keys = {
        "model_id": coconut.model, "only_eval": True, "train_path": None, "num_epochs": None,
        "load_model_path": coconut.run_dir / "checkpoint_3", "c_thought": None,
        "epochs_per_stage": None, "max_latent_stage": None, "pad_latent_to_max": None,
        "val_path": coconut.val,
    } | keys  # fmt: skip
    return Experiment(folder, **keys)


def test_a_checkpoint_that_cannot_be_used_is_refused(coconut, tmp_path, capsys):
    copy = tmp_path / "checkpoint_3"
    shutil.copytree(coconut.run_dir / "checkpoint_3", copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    evaluation = evaluation_of(coconut, tmp_path / "e", load_model_path=copy)
    assert_refused(capsys, evaluation, words=["model.safetensors: truncated or corrupt"])

    tensors = load_file(coconut.run_dir / "checkpoint_3" / "model.safetensors")
    tensors["transformer.ln_f.bias"] = torch.zeros(5)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    words = ["1 of a wrong shape (transformer.ln_f.bias [5], wanted [32])"]
    assert_refused(capsys, evaluation, words=words)

    (copy / "model.safetensors").write_bytes(weights)
    assert_refused(
        capsys, evaluation, "cot=true", "coconut=false",
        words=["was trained as coconut, but this run is cot; name weights of that method"],
    )  # fmt: skip
    assert_refused(
        capsys, evaluation, "latent_window_size=1", "latent_weights=[1.0]",
        words=["latent_window_size was 2 in training, the configuration says 1"],
    )  # fmt: skip
    assert_refused(
        capsys, evaluation, f"load_model_path={tmp_path / 'checkpoint_9'}",
        words=["checkpoint_9 does not exist; name a checkpoint"],
    )  # fmt: skip


# What the commands show


def test_dry_run_shows_schedule_and_sizes_and_writes_nothing(tmp_path, capsys, coconut):
    experiment = Experiment(tmp_path, gradient_accumulation_steps=2, num_epochs=9, resume=1)
    experiment.change(epochs_per_stage=2)
    before = tree(tmp_path)
    assert experiment.main("--dry-run", "lr=5e-5") == 0
    shown = capsys.readouterr().out
    assert tree(tmp_path) == before
    rows = [line.split() for line in shown.splitlines() if line.strip()[:3] in RANGES]
    assert [row[:2] for row in rows] == [["1-1", "0"], ["2-3", "1"], ["4-5", "2"], ["6-8", "3"]]
    records = json.loads(experiment.train.read_text())
    steps = [len(record["steps"]) for record in records]
    for stage, row in enumerate(rows):
        latents = [min(stage, 2, n) for n in steps]
        kept = [0 if stage == 3 else max(n - stage, 0) for n in steps]
        for cell, values in ((row[2:4], latents), (row[4:6], kept)):
            mean = f"{sum(values) / len(values):.2f}"
            assert cell == [mean, f"({min(values)}-{max(values)})"]
    assert "lr: 5.0e-05" in shown
    assert "records             18 training, 7 validation" in shown
    assert "effective batch     8 = 4 records x 2 accumulation x 1 process" in shown
    assert "optimizer steps     3 per epoch, 24 in total" in shown
    grown = build_tiny_model("gpt2", vocab_size=40)
    assert f", {grown.num_parameters():,} parameters; weights: its own" in shown
    evaluation = evaluation_of(coconut, tmp_path / "e")
    assert evaluation.main("--dry-run") == 0
    shown = capsys.readouterr().out
    assert "dry run: nothing trained or written" in shown and "optimizer steps" not in shown
    assert "stage               2" in shown
    assert_refused(capsys, evaluation, "--dry-run", "max_new_tokens=64", words=["does not fit"])
    assert not (tmp_path / "e" / "exps").exists()


def test_dry_run_shows_where_a_run_would_resume(coconut, capsys):
    before = tree(coconut.folder)
    assert coconut.main("--dry-run", "num_epochs=5") == 0
    shown = capsys.readouterr().out
    assert "continuing from " in shown and "dry run: nothing trained or written" in shown
    assert "resumes             in epoch 3, after step 10" in shown
    words = ["this run began with seed=0, now it is 7"]
    assert_refused(capsys, coconut, "--dry-run", "seed=7", words=words)
    assert tree(coconut.folder) == before


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_obstacles_to_a_run_are_refused_dry_or_not(tmp_path, capsys, coconut, dry):
    (tmp_path / "file").touch()
    words = ["file cannot be written (Not a directory)"]
    keys = {"save_path": tmp_path, "name": "file"}
    assert_refused(capsys, Experiment(tmp_path, **keys), *dry, words=words)
    words = ["save_path: ", "cannot be written (File name too long)"]
    (tmp_path / "exps").mkdir()
    assert_refused(capsys, Experiment(tmp_path), *dry, "name=" + "n" * 300, words=words)
    shutil.copytree(coconut.folder / "exps", tmp_path / "exps", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "exps" / "run" / "resume")
    words = ["holds checkpoints of an earlier run but no training state"]
    assert_refused(capsys, Experiment(tmp_path), *dry, words=words)


RANGES = ("1-1", "2-3", "4-5", "6-8")


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for words in ("--dry-run", "key=value", "latent_window_size (default 3)", "epochs_per_stage"):
        assert words in shown


def test_run_py_is_a_command_that_ends_with_the_status(tmp_path):
    experiment = Experiment(tmp_path, num_epochs=1, num_train=4)
    # wandb cannot be imported, as on a machine without it.
    (tmp_path / "wandb.py").write_text("raise ImportError('not installed')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def command(*arguments):
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *arguments],
            capture_output=True, text=True, timeout=150, env=environment, cwd=tmp_path,
        )  # fmt: skip

    done = command(str(experiment.yaml), "save_path=out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nepoch 0 stage 0: train loss " in done.stdout
    assert (tmp_path / "out" / "run" / "checkpoint_1" / "coconut.json").exists()
    refused = command(str(experiment.yaml), "lr=fast")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1


def test_an_interrupt_while_loading_ends_cleanly(tmp_path, monkeypatch, capsys):
    experiment = Experiment(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "load_config", interrupt)
        assert experiment.main() == EXIT_INTERRUPTED
    monkeypatch.setattr("engine.setup.load_data", interrupt)
    assert experiment.main() == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    assert not experiment.run_dir.exists()


def test_one_process_of_each_machine_reports_mistakes_in_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert Experiment(tmp_path).main("lr=fast") == EXIT_USER_ERROR
    assert "lr" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert Experiment(tmp_path).main("lr=fast") == EXIT_USER_ERROR
    for arguments, status in ((["--no-such-option"], EXIT_USER_ERROR), ([], 2), (["-h"], 0)):
        with pytest.raises(SystemExit) as ended:
            run.main(arguments)
        assert ended.value.code == status
    assert capsys.readouterr() == ("", "")
    assert waits == [FIRST_PROCESS_TIMEOUT_S] * 3, "until the first has printed, but not for --help"


# The chain: CoT, Coconut from it, its evaluation


def test_coconut_starts_from_the_cot_checkpoint_at_the_first_epoch_asked_for(coconut):
    stages = {
        entry["train/epoch"]: entry["train/stage"]
        for entry in coconut.metrics()
        if "train/epoch" in entry
    }
    assert stages == {1: 1, 2: 2}
    names = {"checkpoint_2", "checkpoint_3", "predictions_1.jsonl", "predictions_2.jsonl"}
    names |= {"config.yaml", "metrics.jsonl", "resume", ".lock"}
    assert {path.name for path in coconut.run_dir.iterdir()} == names


def test_only_eval_repeats_the_evaluation_of_the_run_and_leaves_it_alone(coconut, capsys, tmp_path):
    shutil.copytree(coconut.run_dir, tmp_path / "exps" / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "exps").rglob("*") if path.is_file()}
    evaluation = evaluation_of(coconut, tmp_path)
    for _ in range(2):
        assert evaluation.main() == 0
    shown = capsys.readouterr().out
    assert "checkpoint_3 on " in shown and "stage 2" in shown and "implies" not in shown
    folder = evaluation.evaluation_folder
    names = {"config.yaml", "metrics.jsonl", "predictions_2.jsonl"}
    assert {path.name for path in folder.iterdir()} == names
    assert load_config(folder / "config.yaml").load_model_path.endswith("checkpoint_3")
    assert (folder / "predictions_2.jsonl").read_text() == (
        coconut.run_dir / "predictions_2.jsonl"
    ).read_text()
    (figures,) = evaluation.metrics(evaluation.evaluation_folder / "metrics.jsonl")
    trained = coconut.metrics()[-1]
    for name in ("acc", "loss", "cot_em", "mean_tokens", "mean_thoughts", "stage", "epoch"):
        assert figures[f"eval/{name}"] == trained[f"eval/{name}"], name
    for path, content in before.items():
        assert path.read_bytes() == content


def test_only_eval_logs_when_resume_implies_another_stage(coconut, tmp_path, capsys):
    evaluation = evaluation_of(coconut, tmp_path, resume=1)
    assert evaluation.main() == 0
    shown = capsys.readouterr().out
    assert "resume: 1 implies stage 1, but" in shown and "trained to stage 2, which is" in shown
    assert evaluation.main("resume=2") == 0
    assert "implies" not in capsys.readouterr().out


def test_evaluations_of_other_files_of_the_same_names_stay_apart(coconut, tmp_path):
    evaluation = evaluation_of(coconut, tmp_path)
    assert evaluation.main() == 0
    first = evaluation.evaluation_folder
    assert first.name.startswith("eval_val_run_checkpoint_3_")
    before = {path: path.read_bytes() for path in first.iterdir()}
    weights = tmp_path / "other" / "run" / "checkpoint_3"
    shutil.copytree(coconut.run_dir / "checkpoint_3", weights)
    data = shutil.copy(coconut.val, tmp_path / "other" / "val.json")
    for keys in ({"load_model_path": weights}, {"val_path": data}):
        assert evaluation.change(**keys).main() == 0
        assert (evaluation.evaluation_folder / "predictions_2.jsonl").is_file()
    assert len(list(evaluation.run_dir.iterdir())) == 3
    assert before == {path: path.read_bytes() for path in first.iterdir()}


def test_an_interrupted_evaluation_leaves_the_one_before(coconut, tmp_path, monkeypatch):
    evaluation = evaluation_of(coconut, tmp_path)
    assert evaluation.main() == 0
    folder = evaluation.evaluation_folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Decoder, "predict", interrupt)
    assert evaluation.main() == EXIT_INTERRUPTED
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_configuration_that_an_evaluation_wrote_repeats_it(coconut, tmp_path, capsys):
    evaluation = evaluation_of(coconut, tmp_path)
    assert evaluation.main() == 0
    folder = evaluation.evaluation_folder
    figures = evaluation.metrics(evaluation.evaluation_folder / "metrics.jsonl")
    capsys.readouterr()
    assert run.main([str(folder / "config.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "implies" not in shown and "changed" not in shown
    assert evaluation.metrics(evaluation.evaluation_folder / "metrics.jsonl") == figures


@pytest.mark.parametrize("torn, what", [("", "the evaluation"), ("{", "metrics.jsonl")])
def test_a_full_disk_ends_an_evaluation_with_one_message(
    coconut, tmp_path, monkeypatch, capsys, torn, what
):
    evaluation = evaluation_of(coconut, tmp_path)
    folder = evaluation.evaluation_folder
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(torn)

    def fail(path, text):
        raise OSError(28, "No space left on device")

    for module in ("utils", "engine.tracking", "engine.evaluation"):
        monkeypatch.setattr(f"{module}.atomic_write_text", fail)
    assert evaluation.main() == EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert f": {what} could not be written (No space left on device)" in line


def test_running_out_of_memory_in_an_evaluation_is_reported_with_the_fix(
    coconut, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Decoder, "predict", fail)
    assert evaluation_of(coconut, tmp_path).main() == EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("out of memory (CUDA out of memory); training needs less with")
    assert line.endswith("evaluation with a smaller batch_size_eval or max_new_tokens")


def test_weights_of_a_staged_method_without_metadata_need_their_schedule(tmp_path, capsys):
    experiment = Experiment(tmp_path, no_thoughts=True, num_train=4, num_epochs=1)
    assert experiment.main() == 0
    source = experiment.run_dir / "checkpoint_1"
    (source / "coconut.json").unlink()
    evaluation = evaluation_of(experiment, tmp_path / "e", load_model_path=source)
    evaluation.change(coconut=None, no_thoughts=True, resume=1, val_path=experiment.val)
    words = "these weights have no coconut.json; write epochs_per_stage, max_latent_stage out"
    assert_refused(capsys, evaluation, words=[words])
    assert_refused(capsys, evaluation, "--dry-run", words=[words])
    assert evaluation.main("epochs_per_stage=1", "max_latent_stage=2") == 0


def test_a_checkpoint_named_by_model_id_brings_its_settings(coconut, tmp_path, capsys):
    source = coconut.run_dir / "checkpoint_3"
    experiment = Experiment(tmp_path, model_id=source, resume=2)
    assert experiment.main() == 0
    assert "names no weights" not in capsys.readouterr().out
    assert experiment.metadata()["latent_window_size"] == 2
    assert_refused(
        capsys, experiment, "name=other", "latent_window_size=3",
        words=[f"model_id {source}: latent_window_size was 2 in training"],
    )  # fmt: skip


def test_debug_evaluation_saves_nothing(coconut, tmp_path):
    assert evaluation_of(coconut, tmp_path).main("debug=true") == 0
    assert not (tmp_path / "exps").exists()


def test_a_published_state_dict_evaluates_like_the_checkpoint(coconut, tmp_path):
    tensors = load_file(coconut.run_dir / "checkpoint_3" / "model.safetensors")
    published = {f"base_causallm.{name}": tensor for name, tensor in tensors.items()}
    embedding = tensors["transformer.wte.weight"]
    published |= {"base_causallm.lm_head.weight": embedding, "embedding.weight": embedding}
    torch.save(published, tmp_path / "checkpoint_3")
    evaluation = evaluation_of(
        coconut, tmp_path / "e", load_model_path=tmp_path / "checkpoint_3", resume=2, c_thought=1,
        epochs_per_stage=1, max_latent_stage=2, pad_latent_to_max=False, latent_window_size=2,
        latent_weights=[0.6, 0.3], window_scope="sequence",
    )  # fmt: skip
    assert evaluation.main() == 0
    (figures,) = evaluation.metrics(evaluation.evaluation_folder / "metrics.jsonl")
    assert figures["eval/loss"] == coconut.metrics()[-1]["eval/loss"]


def test_resume_without_weights_is_logged(tmp_path, capsys):
    assert Experiment(tmp_path, resume=2).main() == 0
    assert "resume: 2 skips epochs, but load_model_path names no" in capsys.readouterr().out


# Every method


@pytest.mark.parametrize(
    "keys, stages, latents",
    [
        ({"no_cot": True}, [0, 0, 0], 0),
        ({"no_thoughts": True}, [0, 1, 2], 0),
        ({"thought": "pause"}, [0, 1, 2], 0),
        ({"curriculum": False}, [3, 3, 3], 2),
        ({"uniform_prob": 1.0}, [0, 1, 2], 2),
        ({"window_scope": "pass", "reset_optimizer": "epoch"}, [0, 1, 2], 2),
    ],
)
def test_every_method_trains_and_evaluates(tmp_path, keys, stages, latents):
    experiment = Experiment(tmp_path, num_train=8, **keys)
    assert experiment.main() == 0
    evaluations = [entry for entry in experiment.metrics() if "eval/acc" in entry]
    assert [entry["eval/stage"] for entry in evaluations] == stages
    assert max(row["num_thoughts"] for row in experiment.predictions(2)) == latents
    losses = experiment.losses()
    assert losses[-1] < losses[0]


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    keys = {"num_epochs": 1, "num_train": 8, "dropout": 0.1}
    first = Experiment(tmp_path, name="first", **keys)
    assert first.main() == 0
    second = Experiment(tmp_path, name="second", **keys)
    assert second.main("deterministic=true") == 0
    torch.use_deterministic_algorithms(False)
    assert_same_weights(second.weights(), first.weights())
    other = Experiment(tmp_path, name="other", seed=1, **keys)
    assert other.main() == 0
    assert other.losses() != first.losses()
