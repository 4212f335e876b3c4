"""describe.py: figures counted by hand, the table, the picture, and its errors."""

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import describe, graphs, prosqa

ROOT = Path(__file__).resolve().parent.parent

# Tom -> a -> c -> t and Tom -> b -> c, Tom -> c; Eva -> d, Eva -> c is left out; Sam -> c.
GRAPH = {
    "question": "... Is Tom a d or t?",
    "answer": "Tom is a t.",
    "steps": ["Tom is a c.", "Every c is a t."],
    "idx_to_symbol": ["Eva", "Tom", "Sam", "a", "b", "c", "t", "d", "e"],
    "edges": [[1, 3], [1, 4], [3, 5], [4, 5], [2, 5], [5, 6], [0, 7], [7, 8]],
    "root": 1,
    "target": 6,
    "neg_target": 7,
}
TEXTS = [
    {"question": "1 + 1 ?", "answer": "2", "steps": ["1 + 1 = 2"]},
    {"question": "1 + 1 ?", "answer": "2", "steps": ["", "  "]},
    {"question": " ", "answer": "", "steps": []},
    {"question": "a", "answer": "3", "steps": ["x y", "z"]},
]


def write(path, records):
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def rows(text):
    """The table as {figure: [cell of each file]}."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines}


def described(capsys, *arguments):
    assert describe.main([str(argument) for argument in arguments]) == 0
    return rows(capsys.readouterr().out)


def test_graph_figures_are_those_counted_by_hand():
    samples = describe.graph_samples([GRAPH])
    assert samples == {
        "nodes": [9],
        "edges": [8],
        "hops": [3],
        "shortest paths": [2],
        "persons": [3],
        "root out-degree": [2],
        "distractor hops": [1],
        "in-degree": [0, 1, 1, 3, 1, 1, 1],
        "isolated nodes": [0],
        "duplicate edges": [0],
        "as many steps as hops?": [0],
        "target from the root only?": [1],
        "distractor from the other head only?": [1],
        "root is node 0?": [0],
        "target named first?": [0],
        "distractor is a deepest own leaf?": [0],
    }


def test_graph_figures_see_what_is_wrong():
    edges = [*GRAPH["edges"], [0, 7], [0, 3], [1, 7]]
    bad = {**GRAPH, "edges": edges, "idx_to_symbol": [*GRAPH["idx_to_symbol"], "lone"]}
    samples = describe.graph_samples([bad])
    assert samples["duplicate edges"] == samples["isolated nodes"] == [1]
    assert samples["target from the root only?"] == [0]
    assert samples["distractor from the other head only?"] == [0]


def test_graph_figures_agree_with_a_generated_file():
    """Steps, names and forms of generated records are known to be right; so must the figures be."""
    samples = describe.graph_samples(prosqa.generate(prosqa.PUBLISHED, 50, "any", set()))
    for name in samples:
        if name.endswith("only?") or name.startswith("steps"):
            assert samples[name] == [1] * 50
    assert sum(samples["in-degree"]) == sum(samples["edges"])


def test_table_counts_repetitions_blanks_and_answers(tmp_path, capsys):
    table = described(capsys, write(tmp_path / "a.json", TEXTS))
    assert table["figure"] == ["a.json"]
    assert table["records"] == ["4"]
    assert table["repeated questions"] == table["blank questions"] == ["1"]
    assert table["blank answers"] == ["1"]
    assert table["blank steps"] == ["2"]
    assert table["records without steps"] == ["2"]
    assert table["different answers"] == ["3"]
    assert table["most common answers"] == ["'2' 50.0%; '' 25.0%; '3' 25.0%"]
    assert table["steps"] == ["0.75 sd 0.83 (0 to 2)"]
    assert table["steps, shares"] == ["0: 0.500, 1: 0.250, 2: 0.250"]
    assert table["words in the question"] == ["2.25 sd 1.79 (0 to 4)"]
    assert table["words in the whole record"] == ["6.00 sd 3.54 (1 to 11)"]


def test_two_files_are_shown_side_by_side(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    first = write(tmp_path / "a.json", TEXTS)
    second = write(tmp_path / "other/a.json", [GRAPH, {**GRAPH, "question": "a"}])
    table = described(capsys, first, second)
    assert table["figure"] == [f"{tmp_path.name}/a.json", "other/a.json"]
    assert table["records"] == ["4", "2"]
    assert table["questions in both files"] == ["1", "1"]
    assert table["nodes"] == ["", "9.00 sd 0.00 (9 to 9)"]
    assert table["target named first?"] == ["", "0.0%"]


def test_rules_that_ignore_the_root_are_scored(tmp_path, capsys):
    """One more person within two edges above the target makes the first rule wrong."""
    more = {**GRAPH, "edges": [*GRAPH["edges"], [9, 6]]}
    more["idx_to_symbol"] = [*GRAPH["idx_to_symbol"], "Rex"]
    table = described(capsys, write(tmp_path / "a.json", [GRAPH, more, more]))
    assert table["rule fewer_persons_upstream"] == ["16.7% (1.8 to 69.0): 0 right, 1 tied, 2 wrong"]
    assert table["rule farther_from_parentless"] == [
        "66.7% (20.8 to 93.9): 1 right, 2 tied, 0 wrong"
    ]
    names = [name for name in table if name.startswith("fitted rule ")]
    assert names == [f"fitted rule {name}" for name in graphs.FITTED_RULES]


def test_fitted_rules_take_their_weights_from_the_named_file(tmp_path, capsys):
    first = write(tmp_path / "a.json", [GRAPH] * 20)
    other = {**GRAPH, "root": 0, "target": 7, "neg_target": 6}
    second = write(tmp_path / "b.json", [other] * 20)
    texts = write(tmp_path / "c.json", TEXTS)
    for arguments, verdicts in (
        ([first], "20 right, 0 tied, 0 wrong"),
        ([first, "--fit", second], "0 right, 0 tied, 20 wrong"),
    ):
        cell = described(capsys, *arguments)["fitted rule ancestors"]
        assert cell[0].endswith(f": {verdicts}")
    assert describe.main([first, "--fit", texts]) == 2
    assert "holds no graphs; give a ProsQA file" in capsys.readouterr().err


def test_symbolic_questions_name_their_candidates_after_the_sign(tmp_path, capsys):
    recipe = prosqa.Recipe(nodes=8, hops={2: 1.0}, exact=True, balanced=True, symbols=True)
    table = described(capsys, write(tmp_path / "a.json", prosqa.generate(recipe, 40, "any", set())))
    assert table["target named first?"] == ["50.0%"]
    assert table["as many steps as hops?"] == ["100.0%"]


def test_tokens_are_those_of_the_named_tokenizer(tmp_path, capsys, word_tokenizer):
    """Its own leading special tokens stay out, and "2" is one token like any other."""
    folder = tmp_path / "tokenizer"
    word_tokenizer.save_pretrained(folder)
    path = write(tmp_path / "a.json", TEXTS[:1])
    table = described(capsys, path, "--tokenizer", folder)
    assert table["tokens in the question"] == ["4.00 sd 0.00 (4 to 4)"]
    assert table["tokens in the whole record"] == ["11.00 sd 0.00 (11 to 11)"]
    no_steps = write(tmp_path / "b.json", [{"question": "1", "answer": "2", "steps": []}])
    table = described(capsys, no_steps, "--tokenizer", folder)
    assert table["tokens in the whole record"] == ["3.00 sd 0.00 (3 to 3)"]


def test_transformers_and_matplotlib_load_only_when_asked_for(tmp_path):
    path = write(tmp_path / "a.json", TEXTS)
    code = (
        "import sys; from preprocessing import describe; "
        f"describe.main([{path!r}]); "
        "print({'transformers', 'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


@pytest.mark.parametrize("kind", ["graphs", "texts", "mixed", "alone"])
def test_png_draws_every_panel_of_both_files(tmp_path, capsys, monkeypatch, kind):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )
    graphs = [prosqa.generate(prosqa.PUBLISHED, 20, str(i), set()) for i in (1, 2)]
    texts = [TEXTS, [{"question": "$x^ $", "answer": "$\\frac{$ " * 5, "steps": []}]]
    records = {
        "graphs": graphs, "texts": texts, "mixed": [graphs[0], texts[0]], "alone": graphs[:1]
    }[kind]  # fmt: skip
    paths = [write(tmp_path / f"{i}.json", part) for i, part in enumerate(records)]
    described(capsys, *paths, "--png", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.get_visible()]
    if kind in ("graphs", "alone"):
        assert titles == [
            "words in the question", "nodes", "edges", "hops", "shortest paths", "persons",
            "root out-degree", "distractor hops", "in-degree",
        ]  # fmt: skip
    else:
        assert titles == [
            "steps", "words in the question", "words in the whole record", "most common answers"
        ]  # fmt: skip
    counts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert counts == [f"{i}.json ({len(part)} records)" for i, part in enumerate(records)]
    for axis in drawn[0].axes[: len(titles) - (kind in ("texts", "mixed"))]:
        bars = Counter()
        for container in axis.containers:
            for bar in getattr(container, "patches", []):
                bars[bar.get_facecolor()] += bar.get_height()
        if len(axis.containers) == len(paths):  # bars, not outlined histograms
            assert list(bars.values()) == pytest.approx([1.0] * len(paths))


def bad(**changes):
    return json.dumps([GRAPH, {**GRAPH, **changes}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read \(No such file or directory\); give a data file"),
        ("", r"is empty; give a data file: a list of records with question, answer and steps"),
        ("[{},]", r"is not UTF-8 JSON \(line 1 has a comma with nothing after it; delete it\)"),
        ("{", r"is not UTF-8 JSON"),
        ("[" * 100_000, r"is not UTF-8 JSON"),
        ("{}", r"wanted a list of at least one record"),
        ("[]", r"wanted a list of at least one record"),
        ("[3]", r"record 0: got int, wanted an object with question, answer and steps"),
        ('[{"answer": "", "steps": []}]', r"record 0: question: got None, wanted a text"),
        (bad(answer=3), r"record 1: answer: got 3, wanted a text"),
        (bad(answer="\ud800"), r"record 1: answer: got '\\ud800', wanted a text"),
        (bad(steps="x"), r"record 1: steps: wanted a list of texts"),
        (bad(steps=[1]), r"record 1: steps: wanted a list of texts"),
        (bad(idx_to_symbol=[1]), r"record 1: idx_to_symbol: wanted a list of texts"),
        (bad(edges=[[0, 9]]), r"record 1: edges: wanted pairs of node numbers from 0 to 8"),
        (bad(edges=[0]), r"record 1: edges: wanted pairs"),
        (bad(root=2), r"record 1: root: got 2, wanted 0 or 1, the two heads of a graph"),
        (bad(target=None), r"record 1: target: got None, wanted a node number"),
        (bad(neg_target=True), r"record 1: neg_target: got True, wanted a node number"),
        (bad(target=8), r"record 1: target: node 8 cannot be reached from node 1"),
        (bad(neg_target=6), r"record 1: neg_target: node 6 cannot be reached from node 0"),
        (
            json.dumps([GRAPH, TEXTS[0]]),
            r"some records hold a graph \(idx_to_symbol, .*\) and some do not",
        ),
    ],
)
def test_a_bad_file_gets_one_message(tmp_path, capsys, text, message):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert describe.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(f"bad.json: {message}", error) and error.count("\n") == 1


def test_bad_options_get_one_message(tmp_path, capsys):
    a, b, c = (write(tmp_path / f"{name}.json", TEXTS) for name in "abc")
    for arguments, message in (
        ([a, a], r"a.json: the same file twice; give different files"),
        ([a, b, c, "--png", "x.png"], r"--png: compares two files at most"),
        ([a, "--png", str(tmp_path / "none/x.png")], r"x.png: cannot be written \(No such file"),
        ([a, "--tokenizer", str(tmp_path / "none")], r"--tokenizer .*none: cannot be loaded"),
    ):
        assert describe.main(arguments) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.strip().count("\n") == 0
    assert describe.main([a, b, c]) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(sorted(GRAPH)), inner, max_size=8)
    ),
    max_leaves=25,
)
NEARLY_GRAPHS = st.builds(
    lambda changes: [GRAPH, {**GRAPH, **changes}],
    st.dictionaries(st.sampled_from(sorted(GRAPH)), JSON, max_size=3),
)


@settings(deadline=None, max_examples=150)
@given(JSON | NEARLY_GRAPHS)
def test_fuzzed_json_never_gives_a_traceback(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("fuzz") / "a.json"
    path.write_text(json.dumps(value))
    assert describe.main([str(path)]) in (0, 2)
    with contextlib.suppress(ValueError):
        prosqa.read_forms(path)
