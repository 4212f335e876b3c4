"""The command: what it writes, prints and refuses, and that its means are those of its records."""

import csv
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import build_word_tokenizer
from runs import Experiment
from test_readings import SENTENCES, NoBar, add_markers, make_subject

from analysis import probe_output, probes
from analysis.continuations import NoBranches
from coconut import Coconut
from dataset import MARKERS


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """A finished run of three epochs, in stages 0 to 2, and a file of records with graphs."""
    finished = Experiment(tmp_path_factory.mktemp("run"), batch_size_eval=3, max_new_tokens=8)
    assert finished.main() == 0
    finished.write("graphs.json", SENTENCES * 4)
    return finished


@pytest.fixture(scope="module")
def written(experiment):
    """A folder for the first five of the run's own records, after the command."""
    folder = experiment.folder / "out"
    assert probes.main([str(experiment.run_dir), "--records", "5", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def with_graphs(experiment):
    """The folder of the records with graphs, after the command."""
    data = experiment.folder / "graphs.json"
    assert probes.main([str(experiment.run_dir), "--data", str(data), "--graphs"]) == 0
    return experiment.run_dir / "analysis" / "checkpoint_3-graphs"


def read_json(folder):
    return json.loads((folder / "probes.json").read_text())


def test_figures_are_means_of_the_records(written, with_graphs):
    for folder in (written, with_graphs):
        found = read_json(folder)
        for entry in found["thoughts"]:
            k = entry["k"]
            own = [r["thoughts"][k - 1] for r in found["records"] if len(r["thoughts"]) >= k]
            assert len(own) == entry["n"]
            for name in ("entropy", "norm_ratio"):
                low, mean, high = (entry[name][key] for key in ("low", "mean", "high"))
                assert mean == pytest.approx(np.mean([t[name] for t in own]), rel=1e-3)
                assert (low is None) if entry["n"] == 1 else (low <= mean <= high)
            ranks = [t["gold_step_rank"] for t in own if t["gold_step_rank"] is not None]
            assert entry["gold_step_rank_median"] == np.median(ranks)
            assert entry["gold_step_top1"]["mean"] == pytest.approx(np.mean(np.array(ranks) == 1))
            windows = np.mean([thought["window"] for thought in own], axis=0)
            assert entry["window"] == pytest.approx(windows.tolist(), abs=1e-3)
            assert sum(entry["window"]) == pytest.approx(1, abs=1e-5)
        assert found["thoughts"][0]["cosine_previous"]["n"] == 0
        correct = [record["correct"] for record in found["records"]]
        assert found["confidence"]["right"]["n"] == sum(correct)
        assert found["confidence"]["wrong"]["n"] == len(correct) - sum(correct)


def test_words_in_their_step_are_counted(with_graphs):
    found = read_json(with_graphs)
    for entry in found["thoughts"]:
        hits = [
            record["thoughts"][entry["k"] - 1]["word"]
            in record["steps"][entry["step"] - 1].replace("+", " ").replace(".", " ").split()
            for record in found["records"]
            if len(record["steps"]) >= entry["step"]
        ]
        assert entry["gold_step_word"]["n"] == len(hits)
        assert entry["gold_step_word"]["mean"] == pytest.approx(np.mean(hits))


def test_words_are_looked_for_in_another_records_step_as_a_control(with_graphs):
    found = read_json(with_graphs)
    for entry in found["thoughts"]:
        with_step = [r for r in found["records"] if len(r["steps"]) >= entry["step"]]
        hits = []
        for number, record in enumerate(with_step):
            other = with_step[(number + 1) % len(with_step)]
            words = other["steps"][entry["step"] - 1].replace("+", " ").replace(".", " ").split()
            hits.append(record["thoughts"][entry["k"] - 1]["word"] in words)
        assert entry["other_step_word"]["mean"] == pytest.approx(np.mean(hits))


def test_cosines_with_other_records_are_means_over_pairs():
    thoughts = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    directions = thoughts / np.linalg.norm(thoughts, axis=1, keepdims=True)
    for i, mean in enumerate(probes._cosines_to_others(thoughts)):
        others = [directions[i] @ directions[j] for j in range(5) if j != i]
        assert mean == pytest.approx(np.mean(others), abs=1e-6)
    assert len(probes._cosines_to_others(thoughts[:1])) == 0


def test_details_fit_the_record(with_graphs):
    found = read_json(with_graphs)
    assert found["num_thoughts"] == 2
    for record, source in zip(found["records"], SENTENCES * 4, strict=True):
        names, num_thoughts = source["idx_to_symbol"], len(record["thoughts"])
        # The tiny tokenizer has a word or a sign as a token.
        text = source["question"].replace(".", " .").replace("+", " + ").replace("?", " ?")
        assert record["question_tokens"] == text.split()
        for thought in record["thoughts"]:
            assert len(thought["attention"]) == len(record["question_tokens"])
            assert 0 < sum(thought["attention"]) < 1
            assert len(thought["by_layer"]) == 3
        graph = record["graph"]
        assert graph["nodes"] == names
        assert np.shape(graph["values"]) == (num_thoughts + 1, len(names))
        assert np.shape(graph["edge_attention"]) == (num_thoughts, len(source["edges"]))
        assert graph["groups"][0][names.index(source["answer"].split()[0])] == "optimal"
        assert graph["groups"][-1][source["target"]] == "optimal"


def test_tables_and_pictures_lie_beside_the_figures(written, with_graphs):
    pictures = ("thoughts", "layers", "confidence", "graph")
    for name in pictures:
        assert (with_graphs / f"probes_{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (with_graphs / f"probes_{name}.svg").read_bytes()
    assert not list(written.glob("probes_graph*"))
    found = read_json(with_graphs)
    with open(with_graphs / "probes_graph_groups.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = [e | {"group": g} for g, by_k in found["graph"]["groups"].items() for e in by_k]
    assert [float(row["mean"]) for row in rows] == [entry["mean"] for entry in expected]
    assert [row["group"] for row in rows] == [entry["group"] for entry in expected]
    for table in probe_output.tables(found).values():
        assert len({tuple(row) for row in table}) == 1  # all rows have the columns of the first


def test_the_page_shows_every_thought_and_group(with_graphs):
    lines = probe_output.page(read_json(with_graphs))
    text = "\n".join(lines)
    for heading in (
        "Thoughts read as words",
        "Where thoughts are among embeddings and states",
        "Confidence",
        "Values of nodes",
    ):
        assert heading in text
    begin = next(i for i, line in enumerate(lines) if line.startswith("| thought | as a word"))
    assert [line.split("|")[1].strip() for line in lines[begin + 2 : begin + 4]] == ["1", "2"]
    assert "| k | unreachable | reached | frontier | optimal | frontier AUC" in text


def test_only_the_first_records_are_read(written):
    found = read_json(written)
    assert (found["num_records"], found["indices"]) == (5, [0, 1, 2, 3, 4])
    assert [record["index"] for record in found["records"]] == found["indices"]


def test_the_command_refuses_what_it_cannot_show(experiment, capsys):
    early = experiment.run_dir / "checkpoint_1"
    for arguments, words in (
        ([str(experiment.run_dir), "--graphs"], "holds no graphs"),
        ([str(early)], "reads no thoughts at stage 0; name a later checkpoint"),
        ([str(experiment.folder)], "this run has no checkpoint yet"),
    ):
        assert probes.main(arguments) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


def test_pause_thoughts_have_no_window(tiny_model):
    tokenizer = add_markers(build_word_tokenizer())
    start, end, latent = tokenizer.convert_tokens_to_ids(list(MARKERS))
    model = Coconut(tiny_model("gpt2").eval(), latent, start, end, 0, thought="pause")
    subject = make_subject(model, tokenizer, SENTENCES)
    readings = probes.read_thoughts(subject, None, NoBar)
    assert [entry["window"] for entry in probes._thoughts(subject, readings)] == [None, None]
    assert np.isnan(readings.window).all()
    figure = probe_output._draw_thoughts({"thoughts": probes._thoughts(subject, readings)})
    plt.close(figure)


def test_models_without_branches_leave_graphs_out(tiny_model, monkeypatch, caplog):
    tokenizer = add_markers(build_word_tokenizer())
    start, end, latent = tokenizer.convert_tokens_to_ids(list(MARKERS))
    model = Coconut(tiny_model("gpt2").eval(), latent, start, end, 0)
    subject = make_subject(model, tokenizer, SENTENCES)

    def refuse(*_):
        raise NoBranches("bloom: cannot")

    monkeypatch.setattr("analysis.readings.continuation_log_probabilities", refuse)
    monkeypatch.setattr(probes, "heading", lambda *_: {})
    assert probes.probe(subject)["graph"] is None
    assert "bloom: cannot; graphs are left out" in caplog.text
    with pytest.raises(NoBranches):
        probes.probe(subject, requires_graphs=True)
