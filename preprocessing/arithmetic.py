"""Makes the questions of the quickstart: chains of sums on a clock.

A question such as `3 + 4 - 2 + 5 =` starts at the hour 3 of a clock with ten hours (0 to 9), goes
four hours on, two back, five on, and asks where the hand points. The steps are the hours on the
way (7, 5, 0); the last of them is the answer as well. Every hour is a single token for the tiny
model of `assets/quickstart-model`, and a question cannot be answered without all of its numbers.

Somewhere in its steps a record repeats the sign `=`: before the first hour or after any of them,
drawn at random (`7 5 = 0`). So a model that learns to write the steps learns to go on from any of
them after a sign that says nothing new, which is what the marker after the thoughts asks of it.

All questions of one length are numbered, and the drawn numbers are all different, so no held-out
question is ever trained on. Writes the record format of SPEC section 1. Same arguments, same
bytes. The model and its training are no business of this script, which needs Python alone.
"""

import argparse
import json
import os
import random
from pathlib import Path

SIGNS = ("+", "-")


def number_of_questions(operations: int, modulus: int) -> int:
    """How many different questions with that many operations there are."""
    return modulus * (len(SIGNS) * modulus) ** operations


def make_record(number: int, operations: int, modulus: int, place: int) -> dict:
    """The question with that number, from 0 to `number_of_questions(...) - 1`, as a record.

    place: how many steps stand before the repeated sign, 0 to `operations`.
    """
    rest, hour = divmod(number, modulus)
    question, steps = [str(hour)], []
    for _ in range(operations):
        rest, choice = divmod(rest, len(SIGNS) * modulus)
        sign, term = SIGNS[choice // modulus], choice % modulus
        hour = (hour + term if sign == "+" else hour - term) % modulus
        question += [sign, str(term)]
        steps.append(str(hour))
    answer = steps[-1]
    if place == 0:
        steps[0] = f"= {steps[0]}"
    else:
        steps[place - 1] += " ="
    return {"question": " ".join([*question, "="]), "answer": answer, "steps": steps}


def make_splits(
    sizes: dict[str, int], operations: int, modulus: int, seed: int
) -> dict[str, list[dict]]:
    """Records for each named split; no question stands in two splits, or twice in one.

    Raises ValueError where fewer different questions exist than are asked for.
    """
    wanted, available = sum(sizes.values()), number_of_questions(operations, modulus)
    if wanted > available:
        raise ValueError(
            f"{wanted} questions are wanted, but with {operations} operations and modulus "
            f"{modulus} there are only {available}; ask for fewer or raise --operations"
        )
    generator = random.Random(seed)
    numbers = iter(generator.sample(range(available), wanted))
    return {
        split: [
            make_record(next(numbers), operations, modulus, generator.randint(0, operations))
            for _ in range(size)
        ]
        for split, size in sizes.items()
    }


def write_records(path: Path, records: list[dict]) -> None:
    """Writes one record a line as a JSON list; a crash leaves the old file or the new one."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(unfinished, path)


def whole_number(minimum: int):
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} on")
        return int(text)

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default: data)")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    parser.add_argument("--train", type=whole_number(1), default=20_000, help="questions to train")
    parser.add_argument("--valid", type=whole_number(1), default=500, help="questions held out")
    parser.add_argument("--operations", type=whole_number(1), default=3, help="steps a question")
    parser.add_argument("--modulus", type=whole_number(2), default=10, help="hours of the clock")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, arguments = parse_arguments(argv)
    sizes = {"valid": arguments.valid, "train": arguments.train}
    try:
        splits = make_splits(sizes, arguments.operations, arguments.modulus, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    for split, records in splits.items():
        path = arguments.out / f"quickstart_{split}.json"
        write_records(path, records)
        print(f"{path}: {len(records):,} questions, the first: {records[0]['question']}")


if __name__ == "__main__":
    main()
