"""Tokens that distinguish the steps and answers of one record from those of the others.

A step holds signs, and words that most records have there, such as "is". A thought that reads as
one of them says what kind of token comes next, not which, so only hits on other tokens count.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np


def telling_ids(
    step_ids: Sequence[Sequence[Sequence[int]]], is_word: Callable[[int], bool]
) -> list[list[list[int]]]:
    """The ids of each step of each record without signs and what most records have in that step.

    is_word: whether a token holds a letter or a digit. A step of which nothing would be left keeps
    all its ids.
    """
    counts: list[Counter] = []  # for each step, the records that have an id there
    num_records: Counter = Counter()
    for steps in step_ids:
        for number, ids in enumerate(steps):
            if number == len(counts):
                counts.append(Counter())
            counts[number].update(set(ids))
            num_records[number] += 1
    words = {i for own in counts for i in own if is_word(i)}
    return [
        [
            [i for i in ids if i in words and 2 * counts[number][i] <= num_records[number]]
            or list(ids)
            for number, ids in enumerate(steps)
        ]
        for steps in step_ids
    ]


def step_labels(telling: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """(n, S): the last telling id of each step, its class for probes; -1 without such a step.

    telling: what `telling_ids` returns.
    """
    labels = np.full((len(telling), max(map(len, telling), default=0)), -1)
    for row, steps in zip(labels, telling, strict=True):
        row[: len(steps)] = [ids[-1] if ids else -1 for ids in steps]
    return labels


def differing_ids(answers: Iterable[Sequence[int]]) -> list[int]:
    """The ids that occur in some answers but not in all; in all, where that leaves none."""
    sets = [set(ids) for ids in answers]
    return sorted(set.union(*sets) - set.intersection(*sets)) or sorted(set.union(*sets))


def step_of(k: int, c_thought: int) -> int:
    """The step, from 0, that thought k (from 1) replaces."""
    return (k - 1) // c_thought
