"""Generate questions about running sums: a clock (the quickstart's) or sums with a lag.

`--task clock`: a question such as `3 + 4 - 2 + 5 =` starts at the hour 3 of a clock with ten hours
(0 to 9), moves four hours forward, two back, five forward, and asks where the hand points. The
steps are the intermediate hours and the last one (7, 5, 0).

`--task lagged`: a question such as `3 1 4 0 2 1 =` lists terms a_1 to a_N, and the steps are the
sums s_t = s_{t-1} + s_{t-L} + a_t modulo M, with s_t = 0 for t <= 0; for L = 1 the first two would
be the same term, and the sum is s_{t-1} + a_t. So a step needs the one before it and the one L
steps back.

In both tasks the last step is also the answer, every step is a single token for a model made by
`assets/make_quickstart_model.py`, and a question cannot be answered without all of its numbers.

Somewhere in its steps a record repeats the sign `=`: before the first step or after any of them,
drawn at random (`7 5 = 0`). So a model that learns to write the steps learns to continue from any
of them after a sign that carries no information, as it must after the marker that ends thoughts.
The sign is part of the step next to it, so the number of steps stays N.

All questions of one length are numbered, and the drawn numbers are all different, so no held-out
question is ever trained on. Writes the record format of docs/specification.md, section 1. The same
arguments give the same bytes. Needs the standard library alone; models and training live elsewhere.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, json_list, report, whole_number, write_all_atomically

SIGNS = ("+", "-")


@dataclass(frozen=True)
class Clock:
    """Hours on a clock: the first hour, then a sign and a term for each step."""

    steps: int = 3
    modulus: int = 10

    def num_questions(self) -> int:
        return self.modulus * (len(SIGNS) * self.modulus) ** self.steps

    def question(self, number: int) -> tuple[list[str], list[int]]:
        """Return the words and the hours of a question, numbered from 0."""
        rest, hour = divmod(number, self.modulus)
        words, hours = [str(hour)], []
        for _ in range(self.steps):
            rest, choice = divmod(rest, len(SIGNS) * self.modulus)
            sign, term = SIGNS[choice // self.modulus], choice % self.modulus
            hour = (hour + term if sign == "+" else hour - term) % self.modulus
            words += [sign, str(term)]
            hours.append(hour)
        return words, hours


@dataclass(frozen=True)
class Lagged:
    """Sums in which the sum `lag` steps back is added too; a lag of 1 adds only the last one."""

    steps: int = 6
    modulus: int = 5
    lag: int = 2

    def num_questions(self) -> int:
        return self.modulus**self.steps

    def question(self, number: int) -> tuple[list[str], list[int]]:
        """Return the words and the sums of a question, numbered from 0."""
        words, sums = [], []
        for step in range(self.steps):
            number, term = divmod(number, self.modulus)
            total = term + (sums[-1] if sums else 0)
            if 1 < self.lag <= step:
                total += sums[step - self.lag]
            words.append(str(term))
            sums.append(total % self.modulus)
        return words, sums


def make_record(task: Clock | Lagged, number: int, place: int) -> dict:
    """Return the question with that number, from 0 to `task.num_questions() - 1`, as a record.

    place: how many steps come before the repeated sign, 0 to `task.steps`.
    """
    words, sums = task.question(number)
    steps = [str(value) for value in sums]
    answer = steps[-1]
    if place == 0:
        steps[0] = f"= {steps[0]}"
    else:
        steps[place - 1] += " ="
    return {"question": " ".join([*words, "="]), "answer": answer, "steps": steps}


def draw_numbers(rng: random.Random, available: int, wanted: int) -> list[int]:
    """Draw `wanted` different numbers below `available`, in random order."""
    if available <= sys.maxsize:
        return rng.sample(range(available), wanted)
    numbers: dict[int, None] = {}  # `sample` takes no range this long, and repetitions are rare
    while len(numbers) < wanted:
        numbers[rng.randrange(available)] = None
    return list(numbers)


def make_splits(task: Clock | Lagged, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """Return the records of each named split; no question occurs in two splits, or twice in one.

    Raises:
        InputError: fewer different questions exist than are asked for.
    """
    wanted, available = sum(sizes.values()), task.num_questions()
    if wanted > available:
        raise InputError(
            f"{wanted} questions are wanted, but with --steps {task.steps} and --modulus "
            f"{task.modulus} there are only {available}; ask for fewer or raise --steps"
        )
    rng = random.Random(seed)
    numbers = iter(draw_numbers(rng, available, wanted))
    return {
        split: [make_record(task, next(numbers), rng.randint(0, task.steps)) for _ in range(size)]
        for split, size in sizes.items()
    }


def output_path(out: Path | None, task: Clock | Lagged, split: str) -> Path:
    """Return where a split goes: under --out, or in data/ under a name with the task."""
    if out is not None:
        return out / f"{split}.json"
    return Path("data") / f"{'quickstart' if isinstance(task, Clock) else 'lagged'}_{split}.json"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=["clock", "lagged"], default="clock")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write DIR/train.json and DIR/valid.json (default: data/quickstart_train.json and "
        "data/quickstart_valid.json, or data/lagged_...)",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument(
        "--train", type=whole_number(1), help="training questions (default: 20000; lagged: 12000)"
    )
    parser.add_argument("--valid", type=whole_number(1), default=500, help="held-out ones (500)")
    parser.add_argument(
        "--steps", type=whole_number(1), metavar="N", help="steps a question (3; lagged: 6)"
    )
    parser.add_argument(
        "--modulus", type=whole_number(2), metavar="M", help="numbers below M (10; lagged: 5)"
    )
    parser.add_argument("--lag", type=whole_number(1), metavar="L", help="only for lagged (2)")
    return parser.parse_args(argv)


def chosen_task(arguments: argparse.Namespace) -> Clock | Lagged:
    """Return the task of a command line.

    Raises:
        InputError: a lag is given to a clock, or reaches back past all steps.
    """
    settings = {
        name: getattr(arguments, name)
        for name in ("steps", "modulus", "lag")
        if getattr(arguments, name) is not None
    }
    if arguments.task == "clock":
        if "lag" in settings:
            raise InputError("--lag: a clock has no lag; add --task lagged or leave --lag out")
        return Clock(**settings)
    task = Lagged(**settings)
    if task.lag > 1 and task.lag >= task.steps:
        raise InputError(
            f"--lag {task.lag}: with --steps {task.steps} no step has another that far back; "
            "give a smaller lag or more steps"
        )
    return task


def main(argv: list[str] | None = None) -> int:
    """Write both splits; return 2, after one message, on a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        task = chosen_task(arguments)
        train = arguments.train or (20_000 if arguments.task == "clock" else 12_000)
        splits = make_splits(task, {"valid": arguments.valid, "train": train}, arguments.seed)
        paths = {split: output_path(arguments.out, task, split) for split in splits}
        write_all_atomically({paths[split]: json_list(part) for split, part in splits.items()})
    except InputError as error:
        return report(f"arithmetic.py: {error}")
    for split, records in splits.items():
        print(f"{paths[split]}: {len(records):,} questions, the first: {records[0]['question']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
