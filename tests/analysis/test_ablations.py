"""The ablations of a small run: whose figures they are, what is written, what is refused."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from runs import Experiment

from analysis import ablations
from analysis.interventions import REPLACEMENTS
from analysis.subject import open_subject
from dataset import END_LATENT, LATENT, START_LATENT, decode
from engine.metrics import wilson_interval

GRAPH = {
    "idx_to_symbol": ["0", "1", "2", "3", "4", "5"],
    "edges": [[0, 2], [2, 4], [1, 3], [3, 5], [0, 5]],
    "root": 0, "target": 4, "neg_target": 3, "answer": "4", "steps": ["2", "4"],
}  # fmt: skip
PICTURES = {"k_sweep", "thoughts_used", "thoughts_by_position"}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A finished run of three epochs with ragged records, evaluated three at a time."""
    finished = Experiment(tmp_path_factory.mktemp("run"), batch_size_eval=3, num_val=9)
    assert finished.main() == 0
    return finished


@pytest.fixture(scope="module")
def subject(experiment):
    return open_subject(experiment.run_dir)


@pytest.fixture(scope="module")
def found(subject):
    return ablations.ablate(subject, positions=["each", "first", "last"])


@pytest.fixture
def copied(experiment, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(experiment.run_dir, tmp_path / "run")


def change_metadata(run, **values):
    path = run / "checkpoint_3" / "coconut.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_own_answers_are_those_of_the_runs_evaluation(experiment, found):
    rows = experiment.predictions(2)
    assert [row["text"] for row in found["records"]] == [row["text"] for row in rows]
    assert found["own"]["correct"] == [int(row["correct"]) for row in rows]
    assert [row["num_thoughts"] for row in found["records"]] == [r["num_thoughts"] for r in rows]


def test_forced_thoughts_give_what_the_model_writes_after_so_many(subject, found):
    model, tokenizer = subject.model, subject.tokenizer
    for i, record in enumerate(found["records"]):
        for entry in record["answers"]:
            question = subject.records.table["question_ids"][i]
            markers = [START_LATENT, *[LATENT] * entry["k"], END_LATENT]
            prompt = question + tokenizer.convert_tokens_to_ids(markers)
            ids = torch.tensor([prompt])
            written = model.generate(ids, torch.ones_like(ids), subject.max_new_tokens)[0]
            tokens = written[len(prompt) :].tolist()
            if tokenizer.eos_token_id in tokens:
                tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
            assert decode(tokenizer, [tokens]) == [entry["text"]]


def test_batches_of_one_record_give_the_same_figures(subject, found):
    alone = ablations.ablate(replace(subject, batch_size=1), thoughts=["K"])
    for name in ("own", "transplant"):
        assert alone[name] == found[name]
    assert alone["sweep"] == [entry for entry in found["sweep"] if entry["k"] == 2]
    at_once = [entry for entry in found["replacements"] if entry["positions"] == "all"]
    assert alone["replacements"] == at_once


def test_every_replacement_is_asked_at_all_positions_and_where_it_makes_sense(found):
    asked = {(entry["name"], entry["positions"]) for entry in found["replacements"]}
    places = {"all", "only 1", "only 2", "first 1", "last 1"}
    expected = {(name, where) for name in REPLACEMENTS for where in places}
    # With two thoughts, fewer than both cannot change places.
    assert asked == {e for e in expected if e[0] != "permuted" or e[1] == "all"}


def test_zeroed_thoughts_have_one_accuracy(experiment, found):
    expected = ablations.accuracy_with_zeroed_thoughts(
        experiment.run_dir / "checkpoint_3", str(experiment.val), 5, 3
    )
    zeroed = [e for e in found["replacements"] if (e["name"], e["positions"]) == ("zeros", "all")]
    assert [entry["acc"] for entry in zeroed] == [expected]


def test_shares_come_with_wilsons_interval_and_add_up(found):
    n = found["num_records"]
    for entry in [found["own"], *found["sweep"], *found["replacements"]]:
        low, high = wilson_interval(round(entry["acc"] * n), n)
        assert (entry["low"], entry["high"]) == pytest.approx((low, high))
    for entry in [*found["sweep"], *found["replacements"]]:
        assert entry["difference"] == pytest.approx(entry["acc"] - found["own"]["acc"])
        assert entry["num_gained"] - entry["num_lost"] == round(entry["difference"] * n)


def row_of(prediction, text=""):
    return {"prediction": prediction, "text": text}


def test_a_question_stops_at_the_first_answer_that_stays():
    answers = {0: "7773", 1: "7753", 2: "7755", 3: "7155"}  # by k, of four records
    sweep = {k: [row_of(answer) for answer in line] for k, line in answers.items()}
    assert ablations.early_stops(sweep, [3, 3, 3, 1]) == [0, 3, 1, 0]
    assert ablations.early_stops(sweep, [2, 2, 2, 2]) == [0, 0, 1, 2]
    del sweep[1]
    assert ablations.early_stops(sweep, [2, 0, 0, 0]) == [None, 0, 0, 0]
    unanswered = {0: [row_of(None, "a")], 1: [row_of(None, "b")]}
    assert ablations.early_stops(unanswered, [1]) == [1]


def test_a_transplant_counts_whose_answer_comes_out():
    own = [row_of(answer) for answer in "11234"]
    now = [row_of(answer) for answer in "12239"]
    donors, thinks = np.array([1, 2, 3, 4, 0]), np.array([True, True, True, True, True])
    counted = ablations.compare_transplant(own, now, donors, thinks)
    assert counted["num_pairs"] == 5
    assert counted["equal"]["n"] == 1 and counted["equal"]["keeps_own"]["share"] == 1
    unequal = {
        name: counted["unequal"][name]["share"] for name in counted["unequal"] if name != "n"
    }
    assert unequal == {"follows_donor": 0.25, "keeps_own": 0.5, "neither": 0.25}
    without = ablations.compare_transplant(own, now, donors, np.array([False] + [True] * 4))
    assert (without["num_pairs"], without["equal"]) == (4, None)


def test_tables_and_pictures_show_the_file(experiment, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(experiment.run_dir), "--records", "6", "--positions", "each"]
    assert ablations.main([*arguments, "--thoughts", "0..K", "4", "--out", str(out)]) == 0
    found = json.loads((out / "ablations.json").read_text())
    assert found["indices"] == list(range(6))
    assert [entry["k"] for entry in found["sweep"]] == [0, 1, 2, 4]
    for name in ("sweep", "replacements"):
        with open(out / f"ablations_{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["acc"]) for row in rows] == [entry["acc"] for entry in found[name]]
        assert [float(row["p"]) for row in rows] == [entry["p"] for entry in found[name]]
    for name in PICTURES:
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.svg").read_text().count("<svg") == 1
    printed = capsys.readouterr().out
    for words in ("## Answers after k thoughts", "another question's thoughts", "keeps_own"):
        assert words in printed


def test_results_lie_in_the_folder_of_the_run(copied, experiment):
    assert ablations.main([str(copied), "--thoughts", "0", "--records", "2"]) == 0
    assert (copied / "analysis" / "checkpoint_3" / "ablations.json").is_file()


def test_a_training_run_may_remove_the_checkpoint_meanwhile(copied, monkeypatch):
    subject, ask = open_subject(copied, num_records=2), ablations.Asker.answers

    def remove_and_ask(*arguments):
        shutil.rmtree(subject.folder, ignore_errors=True)
        return ask(*arguments)

    monkeypatch.setattr(ablations.Asker, "answers", remove_and_ask)
    ablations.write_ablations(subject, thoughts=["0"])
    written = json.loads((copied / "analysis" / "checkpoint_3" / "ablations.json").read_text())
    assert len(written["checkpoint_sha256"]) == 64
    assert not subject.folder.exists()


def test_records_with_graphs_are_split_by_class_and_by_shortcut(experiment, tmp_path):
    data = tmp_path / "graphs.json"
    questions = [f"0 2 : 2 4 : 1 3 : 3 5 : 0 5 ? 4 3 : 0 {extra}" for extra in "123"]
    data.write_text(json.dumps([{"question": question} | GRAPH for question in questions]))
    found = ablations.ablate(open_subject(experiment.run_dir, data=data), thoughts=["K"])
    (entry,) = found["sweep"]
    assert sum(share["share"] for share in entry["classes"].values()) == pytest.approx(1)
    for record in found["records"]:
        assert entry["classes"][record["answers"][0]["class"]]["share"] > 0
        assert record["class"] == record["answers"][0]["class"]
        assert set(record["shortcuts"].values()) <= {"right", "tied", "wrong"}
    for verdicts in found["shortcuts"].values():
        assert sum(split["n"] for split in verdicts.values()) == 3
    ablations.ablation_output.draw(found, tmp_path)


def refused(capsys, *arguments):
    assert ablations.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("thoughts", "words"),
    [
        ("-1", "is neither a number nor a range"),
        ("two", "write numbers, K (2 here) or 2K"),
        ("3..1", "3 is above 1"),
        ("0..60", "the model reads at most 5"),
        ("0..99999999999", "the model reads at most 5"),
    ],
)
def test_numbers_of_thoughts_that_cannot_be_forced_are_refused(experiment, capsys, thoughts, words):
    assert words in refused(capsys, experiment.run_dir, f"--thoughts={thoughts}")


def test_by_default_no_more_thoughts_are_forced_than_fit(experiment):
    question = "1 " * (64 - 5 - 2 - 4)
    records = [{"question": f"{question}{end}", "answer": "1", "steps": ["1"] * 3} for end in "1 "]
    path = experiment.write("long.json", records)
    found = ablations.ablate(open_subject(experiment.run_dir, data=path))
    assert [entry["k"] for entry in found["sweep"]] == [0, 1, 2, 3]


def test_pause_tokens_are_swept_but_not_replaced(copied, capsys):
    change_metadata(copied, thought="pause")
    message = "so there are no thoughts to replace"
    assert message in refused(capsys, copied, "--positions", "each")
    assert ablations.main([str(copied), "--records", "3"]) == 0
    assert message in capsys.readouterr().out
    found = json.loads((copied / "analysis" / "checkpoint_3" / "ablations.json").read_text())
    assert len(found["sweep"]) == 5
    assert found["replacements"] == [] and found["transplant"] is None


def test_what_leaves_nothing_to_ask_is_refused(copied, experiment, capsys, tmp_path):
    one = experiment.write("one.json", [{"question": "1", "answer": "1", "steps": ["2"]}])
    words = "thoughts of another record need a second question"
    assert words in refused(capsys, copied, "--data", one)
    blocked = tmp_path / "file"
    blocked.touch()
    assert "cannot be written" in refused(capsys, copied, "--out", blocked / "folder")
    change_metadata(copied, stage=0)
    assert "at which these records have no thoughts" in refused(capsys, copied)
