"""arithmetic.py: sums recomputed another way, splits without overlap, the same bytes for a seed."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing import arithmetic
from preprocessing.arithmetic import Clock, Lagged

ROOT = Path(__file__).resolve().parent.parent


def running_totals(question, modulus):
    """The steps of a clock's question: sums of ever more terms."""
    words = question.removesuffix(" =").split()
    terms = [int(words[0])]
    terms += [int(sign + term) for sign, term in zip(words[1::2], words[2::2], strict=True)]
    return [sum(terms[: count + 1]) % modulus for count in range(1, len(terms))]


def lagged_sums(question, modulus, lag):
    """The steps of a lagged question, by the recursion as it is written, counting from 1."""
    terms = [int(word) for word in question.removesuffix(" =").split()]

    def total(t):
        if t <= 0:
            return 0
        earlier = total(t - 1) + (total(t - lag) if lag > 1 else 0)
        return earlier + terms[t - 1]

    return [total(t) % modulus for t in range(1, len(terms) + 1)]


def numbers_in(steps):
    return [int(step.strip("= ")) for step in steps]


@pytest.mark.parametrize("task", [Clock(), Clock(1, 2), Clock(5, 12), Clock(20, 10)])
def test_steps_of_a_clock_are_the_running_totals(task):
    splits = arithmetic.make_splits(task, {"valid": 3, "train": 4}, seed=1)
    for record in splits["valid"] + splits["train"]:
        hours = numbers_in(record["steps"])
        assert hours == running_totals(record["question"], task.modulus)
        assert len(hours) == task.steps
        assert record["answer"] == str(hours[-1])


@pytest.mark.parametrize("task", [*(Lagged(lag=lag) for lag in range(1, 6)), Lagged(9, 7, 4)])
def test_steps_of_a_lagged_question_follow_its_recursion(task):
    splits = arithmetic.make_splits(task, {"valid": 50, "train": 50}, seed=1)
    for record in splits["valid"] + splits["train"]:
        sums = numbers_in(record["steps"])
        assert sums == lagged_sums(record["question"], task.modulus, task.lag)
        assert len(sums) == task.steps
        assert record["answer"] == str(sums[-1])


def test_the_lag_matters_from_the_step_after_it():
    questions = [task.question(12345)[1] for task in (Lagged(lag=1), Lagged(lag=4))]
    assert questions[0][:4] == questions[1][:4]
    assert questions[0][4:] != questions[1][4:]


@pytest.mark.parametrize("task", [Clock(), Lagged()])
def test_the_sign_is_repeated_once_at_any_place_among_the_steps(task):
    places = range(task.steps + 1)
    texts = [" ".join(arithmetic.make_record(task, 5, place)["steps"]) for place in places]
    values = texts[0].removeprefix("= ").split()
    assert texts == [" ".join([*values[:place], "=", *values[place:]]) for place in places]
    drawn = arithmetic.make_splits(task, {"any": 100 * len(places)}, seed=0)["any"]
    found = [" ".join(record["steps"]).split().index("=") for record in drawn]
    assert all(70 < found.count(place) < 130 for place in places)


@pytest.mark.parametrize(
    ("task", "wanted"), [(Clock(2, 3), 3 * 6 * 6), (Lagged(3, 4, 2), 4**3), (Lagged(4, 2, 1), 2**4)]
)
def test_every_number_is_another_question(task, wanted):
    numbers = range(task.num_questions())
    questions = {arithmetic.make_record(task, number, 0)["question"] for number in numbers}
    assert len(questions) == len(numbers) == wanted


@pytest.mark.parametrize("arguments", [[], ["--task", "lagged"], ["--steps", "15"]])
def test_no_held_out_question_is_trained_on_and_none_is_repeated(tmp_path, arguments):
    arguments = ["--out", str(tmp_path), "--train", "3000", "--valid", "200", *arguments]
    assert arithmetic.main(arguments) == 0
    splits = [json.loads((tmp_path / f"{s}.json").read_text()) for s in ("train", "valid")]
    questions = [[record["question"] for record in split] for split in splits]
    assert [len(set(split)) for split in questions] == [3000, 200]
    assert not set(questions[0]) & set(questions[1])


def test_same_seed_same_bytes_and_another_seed_other_questions(tmp_path):
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arithmetic.main(["--out", str(tmp_path / folder), "--seed", seed, "--train", "50"])
    a, b, c = ((tmp_path / folder / "train.json").read_bytes() for folder in "abc")
    assert a == b != c


def test_the_quickstarts_files_keep_their_names_and_bytes(tmp_path):
    """Run as the script from another folder, since `make quickstart` depends on both."""
    script = ROOT / "preprocessing/arithmetic.py"
    subprocess.run([sys.executable, str(script)], cwd=tmp_path, check=True, capture_output=True)
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in (tmp_path / "data").iterdir()
    }
    assert digests == {
        "quickstart_train.json": "9964952a6621179c",
        "quickstart_valid.json": "155a9d986da78e69",
    }


def test_lagged_questions_have_sizes_and_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arithmetic.main(["--task", "lagged"]) == 0
    sizes = {path.name: len(json.loads(path.read_text())) for path in Path("data").iterdir()}
    assert sizes == {"lagged_train.json": 12_000, "lagged_valid.json": 500}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1", "--modulus", "4"], r"20500 questions are wanted.*only 32; ask for fewer"),
        (["--task", "lagged", "--train", "20000"], "20500 questions .* there are only 15625"),
        (["--lag", "2"], "--lag: a clock has no lag; add --task lagged"),
        (["--task", "lagged", "--lag", "6"], "--lag 6: with --steps 6 no step .*; give a smaller"),
    ],
)
def test_impossible_questions_get_one_message_and_nothing_is_written(
    tmp_path, capsys, arguments, message
):
    assert arithmetic.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_a_file_gets_one_message(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert arithmetic.main(["--out", str(tmp_path / "taken")]) == 2
    error = capsys.readouterr().err
    assert "taken: cannot be written" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--train", "0"], ["--modulus", "1"], ["--seed", "-1"], ["--lag", "0"]]
)
def test_bad_numbers_are_named(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        arithmetic.main(arguments)
    assert stopped.value.code == 2
    assert re.search(rf"{arguments[0]}: '{arguments[1]}' is not a whole", capsys.readouterr().err)
