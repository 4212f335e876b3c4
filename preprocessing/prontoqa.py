"""Convert a raw ProntoQA file into training, validation and test records.

Reads the official generator's format, which prontoqa_generate.py writes too, and keeps only each
example's `test_example`. A step is two sentences of the chain of thought joined by a space, the
last one alone; question and query are joined by a space (docs/specification.md, section 1, has the
record format). The examples keep their order: 9,000 for training, 200 for validation, the rest for
test, as in the Coconut paper, or the same proportions of a smaller file. Needs the standard library
alone.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, json_list, read_json, report, write_all_atomically

PUBLISHED_TOTAL = 10_000
PUBLISHED_TRAIN = 9_000
PUBLISHED_VALID = 200
MAX_SHOWN_PROBLEMS = 20


def convert_example(example: object) -> dict:
    """Return the record of one example of the raw file.

    Raises:
        ValueError: a field is missing or malformed; the message says what was wanted.
    """
    trial = example.get("test_example") if isinstance(example, dict) else None
    if not isinstance(trial, dict):
        raise ValueError('no "test_example" object')
    for field in ("question", "query"):
        text = trial.get(field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"test_example.{field} is {shown(text)}, wanted text")
    chain = trial.get("chain_of_thought")
    is_text = isinstance(chain, list) and all(isinstance(s, str) and s.strip() for s in chain)
    if not is_text or len(chain) % 2 == 0:
        raise ValueError(
            f"test_example.chain_of_thought is {shown(chain)}, wanted an odd number of sentences: "
            "a fact, then a rule and a fact for each hop"
        )
    if trial.get("answer") not in ("True", "False"):
        answer = shown(trial.get("answer"))
        raise ValueError(f'test_example.answer is {answer}, wanted "True" or "False"')
    return {
        "question": f"{trial['question']} {trial['query']}",
        "steps": [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)],
        "answer": trial["answer"],
    }


def shown(value: object) -> str:
    """Return the value as JSON, truncated for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def split_sizes(total: int) -> tuple[int, int, int]:
    """Return the numbers of training, validation and test records out of `total`.

    Raises:
        InputError: there are fewer than three records, so a split would be empty.
    """
    if total < 3:
        raise InputError(f"{total} usable examples, wanted at least 3 for three splits")
    if total >= PUBLISHED_TOTAL:
        return PUBLISHED_TRAIN, PUBLISHED_VALID, total - PUBLISHED_TRAIN - PUBLISHED_VALID
    valid = max(1, total * PUBLISHED_VALID // PUBLISHED_TOTAL)
    train = min(total * PUBLISHED_TRAIN // PUBLISHED_TOTAL, total - valid - 1)
    return train, valid, total - train - valid


def read_examples(path: Path) -> dict:
    """Return the examples of a raw file by name.

    Raises:
        InputError: the file cannot be read, or is not a raw file; the message says why.
    """
    advice = "make the raw file: python preprocessing/prontoqa_generate.py"
    examples = read_json(path, advice)
    if isinstance(examples, dict):
        return examples
    is_converted = isinstance(examples, list) and all(isinstance(e, dict) for e in examples)
    holds = "a list of records, converted already" if is_converted else shown(examples)
    raise InputError(f"{path}: holds {holds}, wanted an object of examples; {advice}")


def convert(path: Path, skip_bad: bool) -> tuple[list[dict], int]:
    """Return the records of a raw file and the number of malformed examples, which are reported.

    Raises:
        InputError: as read_examples; or an example is malformed and skip_bad is false.
    """
    records, problems = [], []
    for name, example in read_examples(path).items():
        try:
            records.append(convert_example(example))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems and not records:
        raise InputError(
            f"{path}: none of its {len(problems)} examples is usable; {problems[0]}; nothing "
            "written"
        )
    report_problems(path, problems)
    if problems and not skip_bad:
        raise InputError(
            f"{path}: malformed examples: {len(problems)}; nothing written; fix them, or drop them "
            "with --skip-bad"
        )
    return records, len(problems)


def report_problems(path: Path, problems: list[str]) -> None:
    """Print the first problems, and how many there are beyond them."""
    for problem in problems[:MAX_SHOWN_PROBLEMS]:
        report(f"{path}: {problem}")
    if len(problems) > MAX_SHOWN_PROBLEMS:
        report(f"{path}: and {len(problems) - MAX_SHOWN_PROBLEMS} more malformed examples")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a raw ProntoQA file into data/prontoqa_{train,valid,test}.json.",
        epilog="Exit status 0, or 2 with nothing written.",
    )
    parser.add_argument(
        "raw",
        type=Path,
        nargs="?",
        default=Path("data/5hop_0shot_random.json"),
        help="raw file (default data/5hop_0shot_random.json)",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default data)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="drop malformed examples instead of stopping"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write all three files; return 2, with nothing written, on a user's mistake."""
    args = parse_arguments(arguments)
    try:
        records, num_skipped = convert(args.raw, args.skip_bad)
        try:
            train, valid, test = split_sizes(len(records))
        except InputError as error:
            raise InputError(f"{args.raw}: {error}") from error
        splits = {
            "train": records[:train],
            "valid": records[train : train + valid],
            "test": records[train + valid :],
        }
        write_all_atomically(
            {args.out / f"prontoqa_{name}.json": json_list(part) for name, part in splits.items()}
        )
    except InputError as error:
        return report(str(error))
    if len(records) < PUBLISHED_TOTAL:
        print(
            f"{args.raw}: {len(records)} examples, fewer than {PUBLISHED_TOTAL}: split in the "
            "proportions 9000/200/800"
        )
    skipped = f"; malformed examples skipped: {num_skipped}" if num_skipped else ""
    print(f"{args.out}/prontoqa_{{train,valid,test}}.json: {train}/{valid}/{test} records{skipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
