"""Accuracy where a rule that never looks at the root is right, ties, or is wrong.

ProsQA can be answered to about 90 % without searching from the root (docs/shortcuts.md), so an
accuracy alone does not show that a model searches: where the rule ties, it has to. The rules are
preprocessing/graphs.py's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.statistics import summarize
from analysis.tables import markdown_table
from dataset import parse_records
from engine.metrics import wilson_interval
from preprocessing.graphs import RULES, VERDICTS, graph_problem, rule_verdicts
from utils import UserError


def read_verdicts(data: Path) -> dict[str, np.ndarray]:
    """Rule -> (n,) verdicts ("right", "tied" or "wrong") on the records of a file.

    Raises: UserError for a file that cannot be read or whose records hold no graph.
    """
    try:
        content = data.read_bytes()
    except OSError as error:
        raise UserError(f"{data}: cannot be read ({error.strerror})") from None
    return verdicts_of(parse_records(str(data), content), data)


def verdicts_of(records: Sequence[dict], data: Path) -> dict[str, np.ndarray]:
    """Rule -> (n,) verdicts ("right", "tied" or "wrong") on records.

    data: the file they came from, for messages.

    Raises: UserError where a record holds no graph.
    """
    for index, record in enumerate(records):
        if problem := graph_problem(record):
            raise UserError(f"{data}: record {index}: {problem}; name a file of ProsQA records")
    verdicts = [rule_verdicts(record) for record in records]
    return {rule: np.array([verdict[rule] for verdict in verdicts]) for rule in RULES}


def shortcut_table(data: Path, right: Sequence[Sequence[bool]]) -> list[str]:
    """Accuracy by verdict of each rule, as a table.

    right: for each model (a seed each) whether it answered the records of `data`. One model gets
    Wilson's interval over records, several the interval of their mean over seeds.

    Raises: UserError where the numbers of records differ.
    """
    verdicts = read_verdicts(data)
    right = np.asarray(right, dtype=bool)  # (models, n)
    num_records = len(next(iter(verdicts.values())))
    if right.shape[1] != num_records:
        raise UserError(
            f"{data}: holds {num_records} records, but the predictions are of {right.shape[1]};"
            " name the file that was evaluated"
        )
    rows = [("rule", "its verdict", "records", "accuracy", "95 % interval")]
    for rule, values in verdicts.items():
        for verdict in VERDICTS:
            chosen = right[:, values == verdict]
            if chosen.shape[1] == 0:
                rows.append((rule, verdict, "0", "", ""))
                continue
            if len(right) == 1:
                low, high = wilson_interval(int(chosen.sum()), chosen.shape[1])
            else:
                summary = summarize(chosen.mean(1).tolist())
                low, high = max(summary.low, 0.0), min(summary.high, 1.0)
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append(
                (rule, verdict, str(chosen.shape[1]), f"{100 * chosen.mean():.1f} %", interval)
            )
    return markdown_table(rows)
