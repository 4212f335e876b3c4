"""Which answers count as correct, and how certain a figure is: text and integers in, numbers out.

Implements docs/specification.md, section 8. Generating the text is left to evaluation.py; nothing
here knows about models, files or ranks.
"""

import re
from collections.abc import Sequence

from scipy.stats import binomtest

# Some tokenizers put a space before a line's first word.
ANSWER_LINE = re.compile(r"^[ \t]*### ", re.MULTILINE)


def extract_answer(text: str, gold: str) -> str | None:
    """The answer in generated text, without commas and surrounding white space; None without one.

    The answer follows the last `#`. Where `gold` itself holds a `#`, the answer follows the `### `
    of the last line that begins with it.

    text: without the question, which may hold a `#` too.
    """
    if "#" in gold:
        fronts = list(ANSWER_LINE.finditer(text))
        return normalize_answer(text[fronts[-1].end() :]) if fronts else None
    _, mark, answer = text.rpartition("#")
    return normalize_answer(answer) if mark else None


def normalize_answer(answer: str) -> str:
    """An answer as it is compared: without commas and surrounding white space."""
    return answer.replace(",", "").strip()


def is_correct(generated: str, gold: str) -> bool:
    """Whether the generated text's answer is exactly the gold one, which must not be empty."""
    answer = extract_answer(generated, gold)
    return bool(answer) and answer == normalize_answer(gold)


def cot_text(generated: str) -> str:
    """The reasoning in generated text: the part before the first `#`, every run of white space
    folded into one space.
    """
    return " ".join(generated.partition("#")[0].split())


def cot_matches(generated: str, steps: Sequence[str]) -> bool:
    """Whether the generated reasoning is exactly `steps`, those that the stage leaves as text.

    `steps` holds at least one; where a stage leaves none there is nothing to report.
    """
    return cot_text(generated) == cot_text("\n".join(steps))


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (low, high) in [0, 1]; (0, 1) when `total` is 0.

    Raises ValueError unless 0 <= successes <= total.
    Source: E. B. Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes={successes} is not between 0 and total={total}")
    if total == 0:
        return 0.0, 1.0
    interval = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> float:
    """Two-sided p-value of the exact McNemar test that two systems are right equally often.

    Element i of both belongs to record i. Only records where one system alone is right count;
    without any the p-value is 1.

    Raises ValueError when the lengths differ.
    Source: Q. McNemar, Psychometrika 12, 1947; exact form: a binomial test at one half.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(f"{len(correct_a)} records cannot be paired with {len(correct_b)}")
    pairs = [(bool(a), bool(b)) for a, b in zip(correct_a, correct_b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b).pvalue)
