"""metrics.py: what counts as right, against hand-made texts and hand-computed figures."""

import pytest

from engine.metrics import (
    cot_matches,
    cot_text,
    extract_answer,
    is_correct,
    mcnemar,
    normalize_answer,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<<1+2=3>>\n### 3", "3"),
        ("### 1,234,567", "1234567"),
        ("###   True \n", "True"),
        ("# 1 # 2 ### 3", "3"),
        ("### a b", "a b"),
        ("### -3.50", "-3.50"),
        ("###", ""),
        ("no mark, 3", None),
        ("", None),
    ],
)
def test_the_answer_follows_the_last_mark_without_commas_and_outer_blanks(text, answer):
    assert extract_answer(text, gold="3") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("### C#", "C#"),
        ("A to C\n### C# \n", "C#"),
        ("### F#\n### C#", "C#"),
        ("### C#, F#", "C# F#"),
        ("step\n ### C#", "C#"),  # as Llama's tokenizer writes a line's first word
        ("### C#\nand more", "C#\nand more"),
        ("step ### C#", None),
        ("###C#", None),
        ("#", None),
        ("C#", None),
        ("", None),
    ],
)
def test_for_a_gold_with_a_mark_the_answer_follows_the_last_answer_line(text, answer):
    assert extract_answer(text, gold="C#") == answer


def test_gold_is_treated_as_the_generated_answer_is():
    assert normalize_answer(" 1,000 ") == "1000"
    assert normalize_answer("Alex is a lempus.") == "Alex is a lempus."
    assert normalize_answer("C#") == "C#"
    for gold in ("1,000", "Alex is a lempus.", " x ", "#5", "C#", "#"):
        assert extract_answer(f"steps\n### {gold}", gold) == normalize_answer(gold)


@pytest.mark.parametrize(
    ("generated", "gold", "right"),
    [
        ("### 1,000", "1000", True),
        ("### 1000", "1,000", True),
        ("### 18", "18", True),
        ("### 18.0", "18", False),
        ("### true", "True", False),
        ("### 180", "18", False),
        ("18", "18", False),
        ("", "", False),
        ("###", ",", False),
        ("### 18 # 19", "18", False),
        ("### C#", "C#", True),
        ("### F#", "C#", False),
        ("#", "C#", False),
        ("### #", "C#", False),
    ],
)
def test_only_the_exact_answer_after_a_mark_is_right(generated, gold, right):
    assert is_correct(generated, gold) is right


def test_reasoning_is_what_precedes_the_first_mark_with_white_space_folded():
    assert cot_text(" a  b\n\tc \n### 3 # 4") == "a b c"
    assert cot_text("a b") == "a b"
    assert cot_text("### 3") == ""


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("<<1+1=2>>\n<<2+2=4>>\n### 4", True),
        ("<<1+1=2>> <<2+2=4>>### 5", True),
        ("<<1+1=2>>\n### 4", False),
        ("<<2+2=4>>\n<<1+1=2>>\n### 4", False),
        ("### 4", False),
    ],
)
def test_reasoning_matches_the_steps_in_order_whatever_the_answer(generated, right):
    assert cot_matches(generated, ["<<1+1=2>>", "<<2+2=4>>"]) is right


def test_wilson_interval_has_hand_computed_ends():
    z_squared = 1.959963984540054**2
    assert wilson_interval(0, 10) == pytest.approx((0, z_squared / (10 + z_squared)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z_squared), 1))
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(450, 1319) == pytest.approx((0.316076, 0.367182), abs=1e-6)


def test_wilson_interval_widens_with_confidence_and_without_records():
    assert wilson_interval(5, 10, confidence=0.99)[0] < wilson_interval(5, 10)[0]
    assert wilson_interval(0, 0) == (0, 1)


@pytest.mark.parametrize(("successes", "total"), [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(successes, total):
    with pytest.raises(ValueError, match=f"successes={successes} is not between 0 and total=3"):
        wilson_interval(successes, total)


def test_mcnemar_is_the_exact_binomial_test_of_the_discordant_pairs():
    # One record is right in a alone, five in b alone: 2 * (C(6,0) + C(6,1)) / 2**6.
    a = [True, False, False, False, False, False, True, False]
    b = [False, True, True, True, True, True, True, False]
    assert mcnemar(a, b) == pytest.approx(2 * 7 / 64)
    assert mcnemar(b, a) == pytest.approx(2 * 7 / 64)
    assert mcnemar([False] * 5, [True] * 5) == pytest.approx(2 / 32)


def test_mcnemar_without_discordant_pairs_is_one():
    assert mcnemar([True, False], [True, False]) == 1
    assert mcnemar([], []) == 1


def test_mcnemar_refuses_unpaired_records():
    with pytest.raises(ValueError, match="2 records cannot be paired with 1"):
        mcnemar([True, False], [True])
