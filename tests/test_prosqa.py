"""ProsQA generator: its distribution against the published figures, and the laws of a record.

The checker here reads the question's text and works on matrix powers, so it shares nothing with
the generator but the format.
"""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import networkx
import numpy as np
import pytest

from preprocessing import prosqa
from preprocessing.describe import graph_samples

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED_FILE = ROOT.parent / "shared/data/prosqa_valid.json"
SMALL = ["--train", "40", "--valid", "10", "--test", "15"]


def generate(folder, *arguments):
    """Run the command line in this process and return its records by file name."""
    assert prosqa.main(["--out", str(folder), *map(str, arguments)]) == 0
    return {path.name: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}


def form(record):
    return prosqa.canonical_form(len(record["idx_to_symbol"]), record["edges"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("small"), *SMALL)


@pytest.fixture(scope="module")
def ood():
    counts = {"7hops": 4, "8hops": 2, "dense": 40, "roots": 40}
    seen = set()
    return {
        name: prosqa.generate(recipe, counts[name], f"prosqa 0 ood_{name}", seen)
        for name, recipe in prosqa.OOD_RECIPES.items()
    }


@pytest.fixture(scope="module")
def many_samples():
    return graph_samples(prosqa.generate(prosqa.PUBLISHED, 3000, "prosqa 0 train", set()))


def check_record(record):
    """Assert every law of a ProsQA record, from its text and its numbers; return its hops."""
    symbols, question = record["idx_to_symbol"], record["question"]
    assert list(record) == [
        "question", "answer", "steps", "idx_to_symbol", "edges", "root", "target", "neg_target",
    ]  # fmt: skip
    assert len(set(symbols)) == len(symbols)
    facts = re.findall(r"(?:Every (\w+pus)|([A-Z][a-z]+)) is a (\w+pus)\. ", question)
    pairs = Counter((concept or person, kind) for concept, person, kind in facts)
    assert pairs == Counter((symbols[a], symbols[b]) for a, b in record["edges"])
    assert max(pairs.values()) == 1

    person, first, second = re.fullmatch(
        r".*\. Is ([A-Z][a-z]+) a (\w+) or (\w+)\?", question
    ).groups()
    target, distractor = symbols[record["target"]], symbols[record["neg_target"]]
    assert person == symbols[record["root"]]
    assert {first, second} == {target, distractor}
    assert record["answer"] == f"{person} is a {target}."

    index = {symbol: i for i, symbol in enumerate(symbols)}
    adjacency = np.zeros((len(symbols), len(symbols)), dtype=np.int64)
    for parent, kind in pairs:
        adjacency[index[parent], index[kind]] = 1
    assert not np.tril(adjacency).any()
    linked = adjacency.any(0) | adjacency.any(1)
    assert linked.all()
    assert [s in prosqa.PERSONS for s in symbols] == [not has for has in adjacency.any(0)]

    powers = [np.eye(len(symbols), dtype=np.int64)]
    while powers[-1].any():
        powers.append(powers[-1] @ adjacency)
    reach = sum(powers) > 0
    root, other = record["root"], 1 - record["root"]
    assert {root, other} == {0, 1}
    assert reach[root, record["target"]] and not reach[other, record["target"]]
    assert reach[other, record["neg_target"]] and not reach[root, record["neg_target"]]

    hops = next(k for k, power in enumerate(powers) if power[root, record["target"]])
    chain = [re.fullmatch(r"(?:Every )?(\w+) is a (\w+)\.", s).groups() for s in record["steps"]]
    assert len(chain) == hops
    assert chain[0][0] == person and chain[-1][1] == target
    assert all(a[1] == b[0] for a, b in zip(chain, chain[1:], strict=False))
    assert all(f"{step} " in question for step in record["steps"])
    return hops


def test_every_record_obeys_the_laws(small, ood):
    for records in small.values():
        assert {check_record(record) for record in records} <= {3, 4, 5, 6}
    assert {check_record(record) for record in ood["7hops"]} == {7}
    assert {check_record(record) for record in ood["8hops"]} == {8}
    for record in ood["dense"] + ood["roots"]:
        check_record(record)


@pytest.mark.skipif(not PUBLISHED_FILE.exists(), reason="needs the published file")
def test_the_checker_accepts_the_published_file():
    for record in json.loads(PUBLISHED_FILE.read_text("utf-8")):
        check_record(record)


@pytest.mark.parametrize(
    ("name", "published", "allowed"),
    [
        ("nodes", 22.8, 0.02 * 22.8),
        ("edges", 36.0, 0.02 * 36.0),
        ("shortest paths", 1.59, 0.05),
        ("persons", 2.56, 0.15),
        ("root out-degree", 2.94, 0.1),
        ("target named first?", 0.5, 0.02),
    ],
)
def test_means_meet_the_published_figures(many_samples, name, published, allowed):
    assert fmean(many_samples[name]) == pytest.approx(published, abs=allowed)


@pytest.mark.parametrize(
    ("name", "published", "allowed"),
    [
        ("hops", {3: 0.41, 4: 0.44, 5: 0.13, 6: 0.02}, 0.03),
        ("in-degree", {0: 0.03, 1: 0.48, 2: 0.30, 3: 0.13, 4: 0.04}, 0.02),
    ],
)
def test_shares_meet_the_published_figures(many_samples, name, published, allowed):
    counts = Counter(many_samples[name])
    shares = {value: counts[value] / counts.total() for value in published}
    assert shares == pytest.approx(published, abs=allowed)


def test_harder_sets_are_harder_in_one_respect(ood, many_samples):
    dense, roots = graph_samples(ood["dense"]), graph_samples(ood["roots"])
    edges, nodes = fmean(many_samples["edges"]), fmean(many_samples["nodes"])
    assert fmean(dense["edges"]) == pytest.approx(1.5 * edges, rel=0.07)
    assert fmean(dense["nodes"]) == pytest.approx(nodes, rel=0.07)
    persons = fmean(many_samples["persons"])
    assert fmean(roots["persons"]) == pytest.approx(persons + 4, rel=0.07)
    assert set(dense["hops"]) | set(roots["hops"]) <= {3, 4, 5, 6}


def test_bytes_depend_on_the_seed_alone(tmp_path):
    """Hash randomisation is set differently; the pinned digest holds across machines."""
    digests = []
    for hash_seed in ("1", "2"):
        out = tmp_path / hash_seed
        command = [sys.executable, "preprocessing/prosqa.py", "--out", str(out), *SMALL]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        digests.append([line.split(" sha256 ")[1] for line in done.stdout.splitlines()])
        for line in done.stdout.splitlines():
            path, count, _, _, digest = line.split()
            data = Path(path).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest
            assert len(json.loads(data)) == int(count)
            assert data == json.dumps(json.loads(data)).encode()
    assert digests[0] == digests[1]
    assert digests[0][1] == "b4624a05adf1379ef7f4a33aa2768e9d4ff50af4ecf83fa35fea7f4c82450133"


def test_another_seed_gives_other_graphs(small, tmp_path):
    other = generate(tmp_path, *SMALL, "--seed", 1)
    assert not {form(r) for r in other["prosqa_test.json"]} & {
        form(r) for r in small["prosqa_test.json"]
    }


def test_evaluation_sets_do_not_change_with_the_training_set(small, tmp_path):
    other = generate(tmp_path, "--train", 5, "--valid", 10, "--test", 15)
    for name in ("prosqa_valid.json", "prosqa_test.json"):
        assert other[name] == small[name]


def test_no_graph_occurs_twice(small):
    forms = [form(record) for records in small.values() for record in records]
    assert len(set(forms)) == len(forms) == 65


def test_excluded_graphs_do_not_occur_under_other_names(small, tmp_path):
    """Excluding what this very seed would give, renamed and renumbered, changes the file."""
    rng = random.Random(0)
    renamed = []
    for record in small["prosqa_valid.json"]:
        nodes = rng.sample(range(len(record["idx_to_symbol"])), len(record["idx_to_symbol"]))
        edges = [[nodes[a], nodes[b]] for a, b in record["edges"]]
        renamed.append({"idx_to_symbol": ["x"] * len(nodes), "edges": edges})
    excluded = tmp_path / "excluded.json"
    excluded.write_text(json.dumps(renamed))
    other = generate(tmp_path / "out", *SMALL, "--exclude", excluded)
    forms = {form(record) for record in renamed}
    assert forms == {form(record) for record in small["prosqa_valid.json"]}
    assert not forms & {form(record) for records in other.values() for record in records}
    assert len(other["prosqa_valid.json"]) == 10
    assert other["prosqa_test.json"] == small["prosqa_test.json"]


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5])
def test_canonical_form_is_that_of_every_renumbering_and_of_no_other_graph(num_nodes):
    pairs = [(a, b) for b in range(num_nodes) for a in range(b)]
    rng, first_of = random.Random(0), {}
    for chosen in itertools.product([False, True], repeat=len(pairs)):
        edges = list(itertools.compress(pairs, chosen))
        nodes = rng.sample(range(num_nodes), num_nodes)
        renumbered = rng.sample([(nodes[a], nodes[b]) for a, b in edges], len(edges))
        form = prosqa.canonical_form(num_nodes, edges)
        assert form == prosqa.canonical_form(num_nodes, renumbered)
        graph = networkx.DiGraph(edges)
        graph.add_nodes_from(range(num_nodes))
        assert networkx.is_isomorphic(graph, first_of.setdefault(form, graph)), edges


def test_canonical_form_distinguishes_a_moved_edge(small):
    """An edge moved to another child gives another graph, so nothing is dropped for no reason."""
    for record in small["prosqa_train.json"]:
        num_nodes = len(record["idx_to_symbol"])
        moved = [tuple(edge) for edge in record["edges"]]
        moved[-1] = (moved[-1][0] - 1, moved[-1][1]) if moved[-1][0] else (1, moved[-1][1])
        same = networkx.is_isomorphic(networkx.DiGraph(record["edges"]), networkx.DiGraph(moved))
        assert (prosqa.canonical_form(num_nodes, moved) == form(record)) == same


def test_harder_sets_are_written_with_the_others(tmp_path, monkeypatch, small):
    monkeypatch.setattr(prosqa, "OOD_COUNT", 3)
    for name in ("7hops", "8hops"):  # eight hops take a quarter of a second each
        monkeypatch.setitem(prosqa.OOD_RECIPES, name, prosqa.Recipe(hops={5: 1.0}))
    written = generate(tmp_path, *SMALL, "--ood")
    assert {name: len(records) for name, records in written.items()} == {
        "prosqa_train.json": 40, "prosqa_valid.json": 10, "prosqa_test.json": 15,
        "prosqa_ood_7hops.json": 3, "prosqa_ood_8hops.json": 3,
        "prosqa_ood_dense.json": 3, "prosqa_ood_roots.json": 3,
    }  # fmt: skip
    assert {name: written[name] for name in small} == small


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, capsys):
    (tmp_path / "prosqa_test.json").write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert prosqa.main(["--out", str(tmp_path), *SMALL]) == 2
    assert "cannot be written (No space left on device); give another folder" in (
        capsys.readouterr().err
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "arguments",
    [["--train", "0"], ["--valid", "-3"], ["--test", "x"], ["--train", "1.5"]],
)
def test_bad_counts_end_with_status_2(arguments, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        prosqa.main(["--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert f"{arguments[1]!r} is not a whole number from 1" in capsys.readouterr().err


def test_an_out_that_is_a_file_ends_with_status_2(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert prosqa.main(["--out", str(tmp_path / "taken"), *SMALL]) == 2
    assert re.search(r"taken: cannot be written \(File exists\)", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"bad.json: cannot be read \(No such file"),
        ("[", r"bad.json: is not UTF-8 JSON"),
        ("[" * 100_000, r"bad.json: is not UTF-8 JSON"),
        ("{}", r"bad.json: holds a dict, wanted a list"),
        ("[3]", r"record 0: wanted idx_to_symbol"),
        ('[{"idx_to_symbol": ["a", "b"], "edges": [[0, 1]]}, {}]', r"record 1: wanted"),
        ('[{"idx_to_symbol": ["a", "b"], "edges": [[0, 2]]}]', r"record 0: wanted"),
        ('[{"idx_to_symbol": ["a", "b"], "edges": [[0, true]]}]', r"record 0: wanted"),
        ('[{"idx_to_symbol": ["a", "b"], "edges": [[0]]}]', r"record 0: wanted"),
    ],
)
def test_a_bad_exclude_file_gets_one_message(tmp_path, capsys, text, message):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert prosqa.main(["--out", str(tmp_path / "out"), *SMALL, "--exclude", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
