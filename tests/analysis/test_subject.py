"""What analyses open, and what they refuse: one message each, before the weights load."""

import json
import shutil

import pytest
from runs import Experiment

from analysis.subject import find_checkpoint, open_model, open_subject, output_folder
from coconut import Coconut
from engine import run_dir
from utils import UserError


class Halved(Coconut):
    """A subclass that a checkpoint may name."""

    def thought(self, hidden_states, attention_mask, is_first):
        return super().thought(hidden_states, attention_mask, is_first) / 2


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A finished run of three epochs."""
    finished = Experiment(tmp_path_factory.mktemp("run"), batch_size_eval=3)
    assert finished.main() == 0
    return finished


@pytest.fixture
def copied(experiment, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(experiment.run_dir, tmp_path / "run")


def change_metadata(run, **values):
    path = run / "checkpoint_3" / "coconut.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_means_its_last_checkpoint(experiment):
    checkpoint = experiment.run_dir / "checkpoint_3"
    assert find_checkpoint(experiment.run_dir) == find_checkpoint(str(checkpoint)) == checkpoint


def test_a_subject_holds_what_the_run_evaluated(experiment):
    subject = open_subject(experiment.run_dir)
    assert not subject.model.training
    assert subject.stage == 2
    assert (subject.batch_size, subject.max_new_tokens) == (3, 5)
    assert str(subject.data) == str(experiment.val)
    assert subject.indices == list(range(7))
    assert [row["question"] for row in subject.raw] == subject.records.table["question"][:]
    assert subject.staged.num_latents.tolist() == [min(2, len(row["steps"])) for row in subject.raw]


def test_the_first_records_of_another_file_keep_their_fields(experiment, tmp_path):
    lines = [json.dumps(row | {"root": 1}) for row in json.loads(experiment.train.read_text())]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines))
    subject = open_subject(experiment.run_dir, data=other, num_records=4)
    assert subject.indices == [0, 1, 2, 3]
    assert [row["root"] for row in subject.raw] == [1] * 4
    assert len(subject.records) == 4


def test_output_lies_in_the_run_and_tells_data_apart(experiment, tmp_path):
    checkpoint = experiment.run_dir / "checkpoint_2"
    folder = experiment.run_dir / "analysis"
    assert output_folder(checkpoint) == folder / "checkpoint_2"
    assert output_folder(checkpoint, experiment.val) == folder / "checkpoint_2"
    assert output_folder(checkpoint, tmp_path / "test.json") == folder / "checkpoint_2-test"


def test_a_checkpoint_alone_needs_its_data_named(copied, experiment):
    (copied / "config.yaml").unlink()
    with pytest.raises(UserError, match="add --data FILE"):
        open_subject(copied)
    subject = open_subject(copied, data=experiment.val)
    assert subject.max_new_tokens == 64 - subject.staged.prompt_lengths.max()


def test_what_is_not_a_coconut_checkpoint_is_refused(copied, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in (
        (tmp_path / "missing", "does not exist; name the folder of a run"),
        (copied / "metrics.jsonl", "is not a folder"),
        (empty, "holds neither coconut.json nor checkpoints"),
    ):
        with pytest.raises(UserError, match=words):
            open_model(path)
    change_metadata(copied, method="cot")
    with pytest.raises(UserError, match="was trained as cot, which has no thoughts"):
        open_model(copied)
    for folder in copied.glob("checkpoint_*"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        open_model(copied)


def test_a_checkpoint_of_a_subclass_needs_its_name(copied):
    change_metadata(copied, coconut_class="test_subject:Halved")
    with pytest.raises(UserError, match="add --coconut-class test_subject:Halved"):
        open_model(copied)
    with pytest.raises(UserError, match="this run has Coconut itself|is not a subclass"):
        open_model(copied, "test_subject:Experiment")
    with pytest.raises(UserError, match="has no class Hlaved"):
        open_model(copied, "test_subject:Hlaved")
    _, model, _, _ = open_model(copied, "test_subject:Halved")
    assert type(model).__name__ == "Halved"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("[]", "an empty list"),
        ("{", "is not JSON"),
        ('[{"question": "1", "steps": []}]', "record 0: answer is missing"),
        (
            json.dumps([{"question": "1 " * 70, "answer": "1", "steps": []}]),
            "does not fit the model's 64 positions",
        ),
    ],
)
def test_data_that_cannot_be_asked_are_refused(experiment, tmp_path, content, words):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        open_subject(experiment.run_dir, data=path)


def test_a_number_of_records_below_one_is_refused(experiment):
    with pytest.raises(UserError, match="--records 0: must be at least 1"):
        open_subject(experiment.run_dir, num_records=0)


def test_validation_data_that_are_gone_are_named(copied, experiment):
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(experiment.val), "/nowhere/val.json"))
    with pytest.raises(UserError, match="the val_path of its run, /nowhere/val.json"):
        open_subject(copied)


def test_a_run_leaves_the_analyses_of_its_checkpoints_alone(copied, caplog):
    note = copied / "analysis" / "checkpoint_3" / "ablations.json"
    note.parent.mkdir(parents=True)
    note.write_text("{}")
    with run_dir.hold(copied):
        run_dir.warn_about_unknown_files(copied)
        run_dir.prune_checkpoints(copied, newest=3, keep=1)
    assert not caplog.messages
    assert note.read_text() == "{}"
    assert not (copied / "checkpoint_2").exists()
