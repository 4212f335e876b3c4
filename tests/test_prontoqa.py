"""ProntoQA: the generator's theories and proofs, its distribution, and the conversion."""

import copy
import hashlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
OFFICIAL = ROOT.parent / "shared/data/prontoqa/5hop_0shot_random.json"


def load_script(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checker = load_script("tests/prontoqa_checker.py")
generator = load_script("preprocessing/prontoqa_generate.py")
converter = load_script("preprocessing/prontoqa.py")


@pytest.fixture(scope="module")
def trials() -> list[dict]:
    return [example["test_example"] for example in generator.generate(600, seed=5).values()]


@pytest.fixture(scope="module")
def official() -> list[dict]:
    if not OFFICIAL.exists():
        pytest.skip(f"{OFFICIAL} is missing")
    return checker.read_trials(OFFICIAL)


# The checker


def example_trial() -> dict:
    return {
        "question": "Each wumpus is an impus. Impuses are not hot. Every dumpus is hot. "
        "Max is a wumpus.",
        "query": "True or false: Max is hot.",
        "chain_of_thought": [
            "Max is a wumpus.",
            "Each wumpus is an impus.",
            "Max is an impus.",
            "Impuses are not hot.",
            "Max is not hot.",
        ],
        "answer": "False",
    }


def test_checker_accepts_a_sound_trial():
    checker.check_trial(example_trial())


@pytest.mark.parametrize(
    ("field", "old", "new", "message"),
    [
        ("answer", "False", "True", "answer True"),
        ("query", "Max is hot", "Max is cold", "target"),
        ("query", "True or false", "Prove", "query"),
        ("question", "Every dumpus", "Every wumpus", "contradiction"),
        ("question", "Each wumpus is an impus. ", "", "no inference"),
        ("question", "a wumpus.", "a wumpus. Rex is a dumpus.", "more than one entity"),
        ("question", "an impus", "a impus", "article"),
        ("question", "Impuses are", "Impuses is", "number"),
        ("question", "not hot", "never hot", "cannot parse"),
    ],
)
def test_checker_refuses_a_broken_trial(field, old, new, message):
    trial = example_trial()
    trial[field] = trial[field].replace(old, new)
    with pytest.raises(AssertionError, match=message):
        checker.check_trial(trial)


def test_checker_refuses_a_proof_step_that_does_not_follow():
    trial = example_trial()
    trial["chain_of_thought"][3] = "Every dumpus is hot."
    with pytest.raises(AssertionError, match="does not follow"):
        checker.check_trial(trial)


# The generator


def test_every_theory_is_consistent_and_every_proof_valid(trials):
    for trial in trials:
        checker.check_trial(trial)


def test_official_trials_pass_the_same_checker(official):
    for trial in official:
        checker.check_trial(trial)


def test_every_theory_has_the_counts_of_the_paper(trials):
    assert {tuple(checker.structure_of(trial)) for trial in trials} == {
        tuple(
            sorted(
                [(f"chain {i}", "distractor") for i in range(5)]
                + [(f"chain {i}", f"chain {i + 1}") for i in range(4)]
                + [("chain 4", "chain top"), ("separate child", "separate parent")]
                + [(f"chain {i}", "property") for i in range(5)]
                + [("distractor", "property")] * 5
                + [("separate child", "property"), ("unrelated", "property")]
            )
        )
    }
    assert all(len(trial["chain_of_thought"]) == 11 for trial in trials)


def test_the_unrelated_concept_has_the_opposite_of_the_queried_property(trials):
    for trial in trials:
        roles = checker.roles_of(trial)
        rules = [checker.parse(s) for s in checker.sentences_of(trial["question"])]
        claims = {roles[r.subject]: r.claim for r in rules if r.form != "fact" and not r.is_concept}
        queried, negated = claims["chain 4"]
        assert claims["unrelated"] == (queried, not negated)


def test_statistics_match_the_fitted_ones(trials):
    samples = checker.statistics(trials)
    expected = {
        "property rules: plural": 1 / 2,
        "subclass rules: plural": 1 / 2,
        "subclass rules: Each": 1 / 4,
        "property rules: Every": 1 / 4,
        "negated: all rules": 0.179,
        "negated: chain": 0.277,
        "negated: queried property": 0.472,
        "negated: distractor": 1 / 3,
        "negated: separate": 1 / 3,
        "chain's fact first": 1 / 2,
        "query negated": 1 / 2,
        "answer True": 1 / 2,
        "proof rule comes before the next": 1 / 2,
        "mean position: chain": 11,
        "mean position: unrelated": 11,
        "words, question and query": 104.6,
    }
    for name, value in expected.items():
        mean, error = checker.mean_and_error(samples[name])
        assert abs(mean - value) < 4 * error + 0.001, name


def test_the_distribution_matches_the_official_one(official):
    ours = [example["test_example"] for example in generator.generate(2000, seed=1).values()]
    for name, theirs, mean, score in checker.compare(official, ours):
        assert abs(score) < 4, (name, theirs, mean)
    words = checker.word_counts(ours)
    for kind, counts in checker.word_counts(official).items():
        assert counts.keys() == words[kind].keys()
        assert checker.chi_square_per_degree(counts, words[kind]) < 2.5, kind
    assert {tuple(checker.structure_of(t)) for t in official} == {
        tuple(checker.structure_of(t)) for t in ours
    }


def test_no_property_family_is_used_twice(trials):
    family_of = {p: i for i, family in enumerate(generator.PROPERTY_FAMILIES) for p in family}
    for trial in trials:
        rules = [checker.parse(s) for s in checker.sentences_of(trial["question"])]
        roles = checker.roles_of(trial)
        used = [
            family_of[r.predicate]
            for r in rules
            if not r.is_concept and roles[r.subject] != "unrelated"
        ]
        assert len(used) == len(set(used)) == 11


def test_no_question_is_generated_twice(trials):
    assert len({trial["question"] for trial in trials}) == len(trials)


def test_the_bytes_depend_on_the_seed_alone(tmp_path):
    digests = []
    for run, seed in enumerate(["7", "7", "8"]):
        out = tmp_path / f"{run}.json"
        assert generator.main(["--trials", "20", "--seed", seed, "--out", str(out)]) == 0
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    # Pinned to detect a Python version with a different random stream.
    assert digests[0] == "b96803297c11fde7a082fbb60a1251579c6bf53d91ad442c13270ec798ed0811"


def test_the_raw_file_has_the_official_layout(tmp_path, official):
    out = tmp_path / "raw.json"
    generator.main(["--trials", "3", "--out", str(out)])
    text = out.read_text()
    raw = json.loads(text)
    assert list(raw) == ["example1", "example2", "example3"]
    assert text == json.dumps(raw, indent=1)
    theirs = OFFICIAL.read_text()
    assert theirs == json.dumps(json.loads(theirs), indent=1)
    assert list(raw["example1"]["test_example"]) == list(official[0])


def test_fewer_than_one_trial_is_refused(tmp_path, capsys):
    out = tmp_path / "raw.json"
    with pytest.raises(SystemExit) as ended:
        generator.main(["--trials", "0", "--out", str(out)])
    assert ended.value.code == 2
    assert "--trials: '0' is not a whole number from 1" in capsys.readouterr().err
    assert not out.exists()


# The conversion


def convert(tmp_path: Path, raw: object, *options: str) -> int:
    path = tmp_path / "raw.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return converter.main([str(path), "--out", str(tmp_path / "out"), *options])


def read_split(tmp_path: Path, name: str) -> list[dict]:
    return json.loads((tmp_path / f"out/prontoqa_{name}.json").read_text())


def test_a_step_is_two_sentences_and_the_last_step_one():
    assert converter.convert_example({"test_example": example_trial()}) == {
        "question": "Each wumpus is an impus. Impuses are not hot. Every dumpus is hot. "
        "Max is a wumpus. True or false: Max is hot.",
        "steps": [
            "Max is a wumpus. Each wumpus is an impus.",
            "Max is an impus. Impuses are not hot.",
            "Max is not hot.",
        ],
        "answer": "False",
    }


def test_generated_and_official_files_convert_to_the_same_format(tmp_path, official):
    ours = generator.generate(len(official), seed=0)
    for name, raw in {"ours": ours, "official": json.loads(OFFICIAL.read_text())}.items():
        (tmp_path / name).mkdir()
        assert convert(tmp_path / name, raw) == 0
        records = [r for s in ("train", "valid", "test") for r in read_split(tmp_path / name, s)]
        assert len(records) == len(official)
        assert {(tuple(r), len(r["steps"])) for r in records} == {
            (("question", "steps", "answer"), 6)
        }
        assert records[0]["question"].startswith(raw["example1"]["test_example"]["question"])


def test_in_context_examples_are_ignored():
    example = {"in_context_example0": "anything", "test_example": example_trial()}
    plain = {"test_example": example_trial()}
    assert converter.convert_example(example) == converter.convert_example(plain)


@pytest.mark.parametrize(
    ("total", "sizes"),
    [
        (10_000, (9000, 200, 800)),
        (12_345, (9000, 200, 3145)),
        (400, (360, 8, 32)),
        (9_999, (8999, 199, 801)),
        (10, (8, 1, 1)),
        (3, (1, 1, 1)),
    ],
)
def test_splits_have_the_sizes_or_the_proportions_of_the_paper(total, sizes):
    assert converter.split_sizes(total) == sizes


def test_a_smaller_file_reports_its_split_and_keeps_its_order(tmp_path, capsys):
    raw = generator.generate(50, seed=0)
    assert convert(tmp_path, raw) == 0
    assert "fewer than 10000: split in the proportions 9000/200/800" in capsys.readouterr().out
    parts = [read_split(tmp_path, name) for name in ("train", "valid", "test")]
    assert [len(part) for part in parts] == [45, 1, 4]
    queries = [record["question"].split("True or false")[1] for part in parts for record in part]
    assert queries == [e["test_example"]["query"].split("True or false")[1] for e in raw.values()]


INVALID_FIELDS = [
    ("question", None, "question is null, wanted text"),
    ("question", " ", 'question is " ", wanted text'),
    ("query", 3, "query is 3, wanted text"),
    ("chain_of_thought", "Max is hot.", "chain_of_thought is .*wanted an odd number of sentences"),
    ("chain_of_thought", ["a", "b"], "chain_of_thought is .*wanted an odd number of sentences"),
    ("chain_of_thought", ["a", 1, "c"], "chain_of_thought is .*wanted an odd number of sentences"),
    ("chain_of_thought", [], "chain_of_thought is .*wanted an odd number of sentences"),
    ("answer", True, 'answer is true, wanted "True" or "False"'),
    ("answer", "Yes", 'answer is "Yes", wanted "True" or "False"'),
    ("answer", ["True"] * 30, r'answer is \["True", .*\.\.\., wanted "True" or "False"'),
]


@pytest.mark.parametrize(("field", "value", "message"), INVALID_FIELDS)
def test_the_error_for_a_malformed_example_says_what_is_expected(field, value, message):
    with pytest.raises(ValueError, match=message):
        converter.convert_example({"test_example": {**example_trial(), field: value}})


@pytest.mark.parametrize("example", [None, [], {}, {"test_example": 1}])
def test_an_example_without_test_example_is_refused(example):
    with pytest.raises(ValueError, match='no "test_example" object'):
        converter.convert_example(example)


def broken_file() -> dict:
    raw = copy.deepcopy(generator.generate(30, seed=0))
    del raw["example4"]["test_example"]["query"]
    raw["example9"]["test_example"]["answer"] = "?"
    return raw


def test_with_malformed_examples_nothing_is_written(tmp_path, capsys):
    assert convert(tmp_path, broken_file()) == 2
    errors = capsys.readouterr().err
    assert "example4: test_example.query is null" in errors
    assert 'example9: test_example.answer is "?"' in errors
    assert "malformed examples: 2; nothing written" in errors
    assert not (tmp_path / "out").exists()


def test_skip_bad_drops_and_counts_malformed_examples(tmp_path, capsys):
    assert convert(tmp_path, broken_file(), "--skip-bad") == 0
    assert "malformed examples skipped: 2" in capsys.readouterr().out
    assert sum(len(read_split(tmp_path, s)) for s in ("train", "valid", "test")) == 28


def test_only_the_first_malformed_examples_are_listed(tmp_path, capsys):
    assert convert(tmp_path, generator.generate(1, 0) | dict.fromkeys(map(str, range(50)))) == 2
    errors = capsys.readouterr().err
    assert errors.count('no "test_example"') == 20
    assert "and 30 more malformed examples" in errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; make the raw file: python preprocessing/prontoqa_generate.py"),
        ("{", r"is not UTF-8 JSON \(.* at line 1, column 2\); make the raw file"),
        ('{"a": {},\n}', r"is not UTF-8 JSON \(line 1 has a comma with nothing after it; delete"),
        ("[1, 2]", r"holds \[1, 2\], wanted an object of examples"),
        ('[{"question": "Q"}]', "holds a list of records, converted already, wanted an object"),
        ('{"a": {}, "b": {}}', 'none of its 2 examples is usable; a: no "test_example" object'),
        ("{}", "0 usable examples, wanted at least 3"),
        ("[" * 100_000, "is not UTF-8 JSON"),
    ],
)
def test_an_unusable_file_gives_one_message(tmp_path, capsys, text, message):
    assert convert(tmp_path, text) == 2
    error = capsys.readouterr().err
    assert error.startswith(str(tmp_path / "raw.json")) and error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_ignored(tmp_path):
    assert convert(tmp_path, "\ufeff" + json.dumps(generator.generate(3, seed=0))) == 0
    assert len(read_split(tmp_path, "train")) == 1


def test_the_error_for_a_missing_file_names_the_command_that_makes_it(tmp_path, capsys):
    assert converter.main([str(tmp_path / "none.json")]) == 2
    error = capsys.readouterr().err
    assert "No such file" in error and "prontoqa_generate.py" in error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(("question", "query", "chain_of_thought", "answer"), json_values),
    )
)
def test_any_example_converts_or_raises_a_value_error(trial):
    try:
        record = converter.convert_example({"test_example": trial})
    except ValueError:
        return
    assert record["answer"] in ("True", "False") and all(record["steps"])
