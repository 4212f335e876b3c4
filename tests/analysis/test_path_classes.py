"""The classes of written paths, case by case on one graph."""

import pytest

from analysis.path_classes import CLASSES, path_class

#      Tom -> a -> b -> goal       Ann -> d -> other
#       |          ^      ^                ^
#       +--> c ----+      |                |
#            +-> e -> f --+       Tom -----+  (an edge Tom -> d)
NAMES = ["Tom", "Ann", "a", "b", "goal", "c", "e", "f", "d", "other"]
EDGES = "Tom a, a b, b goal, Tom c, c b, c e, e f, f goal, Ann d, d other, Tom d"


def make_record(symbols, answer):
    number = {name: index for index, name in enumerate(NAMES)}
    edges = [[number[end] for end in edge.split()] for edge in EDGES.split(", ")]
    ends = {"root": 0, "target": number["goal"], "neg_target": number["other"]}
    return {"idx_to_symbol": symbols, "edges": edges, "answer": answer} | ends


SENTENCES = make_record(NAMES, "Tom is a goal.")
DIGITS = make_record([str(number) for number in range(10)], "4")
SHORTEST = "Tom is a a. Every a is a b. Every b is a goal."


@pytest.mark.parametrize(
    ("text", "num_thoughts", "expected"),
    [
        (f"{SHORTEST}\n### Tom is a goal.", 0, "correct_path"),
        ("Tom is a c.\nEvery c is a b.\nEvery b is a goal.\n### Tom is a other.", 0,
         "correct_path"),
        (SHORTEST, 0, "correct_path"),
        ("Tom is a c. Every c is a e. Every e is a f. Every f is a goal.", 0, "longer_path"),
        ("Tom is a a. Every a is a goal. ### Tom is a goal.", 0, "hallucination"),
        ("Tom is a a. Every c is a b. Every b is a goal.", 0, "hallucination"),
        ("Every a is a b. Every b is a goal.", 0, "hallucination"),
        ("Ann is a d.", 0, "hallucination"),
        ("Tom is a a. Tom Tom Tom", 0, "hallucination"),
        ("Tom is a gaol.", 0, "hallucination"),
        ("Tom is a d. Every d is a other. ### Tom is a goal.", 0, "wrong_target"),
        ("Tom is a a. Every a is a b. ### Tom is a goal.", 0, "wrong_target"),
        ("### Tom is a goal.", 0, "correct_label"),
        ("### Tom is a other.", 3, "incorrect_label"),
        ("", 0, "incorrect_label"),
        # After thoughts a path may begin where they have led.
        ("Every a is a b. Every b is a goal. ### Tom is a goal.", 1, "correct_path"),
        ("Every b is a goal.", 2, "correct_path"),
        ("Every f is a goal.", 3, "longer_path"),
        ("Every d is a other.", 1, "wrong_target"),
        (SHORTEST, 2, "correct_path"),
        ("Ann is a d. Every d is a other.", 1, "hallucination"),
    ],
)  # fmt: skip
def test_sentences_are_classed(text, num_thoughts, expected):
    assert expected in CLASSES
    assert path_class(text, SENTENCES, num_thoughts) == expected


@pytest.mark.parametrize(
    ("text", "num_thoughts", "expected"),
    [
        ("2\n3\n4\n### 4", 0, "correct_path"),
        ("5 6 7 4 ### 4", 0, "longer_path"),
        ("3 4 ### 4", 0, "hallucination"),
        ("3 4 ### 4", 1, "correct_path"),
        ("4 ### 4", 2, "correct_path"),
        ("7 4 ### 4", 1, "longer_path"),
        ("8 9 ### 9", 0, "wrong_target"),
        ("8 x ### 9", 0, "hallucination"),
        ("1 8 9 ### 9", 1, "hallucination"),
        ("### 4", 3, "correct_label"),
        ("### 9", 3, "incorrect_label"),
    ],
)
def test_symbols_are_classed(text, num_thoughts, expected):
    assert path_class(text, DIGITS, num_thoughts) == expected
