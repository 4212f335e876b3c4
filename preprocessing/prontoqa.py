"""Convert a raw ProntoQA file into training, validation and test records.

Reads the official generator's layout, which prontoqa_generate.py writes too, and keeps only each
example's `test_example`. A step is two sentences of the chain of thought joined by a blank, the
last one alone; question and query are joined by a blank (record format: SPEC section 1). The
examples keep their order: 9,000 for training, 200 for validation, the rest for test, as in the
Coconut paper, or the same proportions of a smaller file. Imports nothing of the project.
"""

import argparse
import json
import os
import sys
from pathlib import Path

PUBLISHED_TOTAL = 10_000
PUBLISHED_TRAIN = 9_000
PUBLISHED_VALID = 200
SHOWN_PROBLEMS = 20


def convert_example(example: object) -> dict:
    """Return the record of one example of the raw file.

    Raises ValueError naming the field, what it holds and what was wanted.
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
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def split_sizes(total: int) -> tuple[int, int, int]:
    """Return the numbers of training, validation and test records out of `total`.

    Raises ValueError below three records, where a split would stay empty.
    """
    if total < 3:
        raise ValueError(f"{total} usable examples, wanted at least 3 for three splits")
    if total >= PUBLISHED_TOTAL:
        return PUBLISHED_TRAIN, PUBLISHED_VALID, total - PUBLISHED_TRAIN - PUBLISHED_VALID
    valid = max(1, total * PUBLISHED_VALID // PUBLISHED_TOTAL)
    train = min(total * PUBLISHED_TRAIN // PUBLISHED_TOTAL, total - valid - 1)
    return train, valid, total - train - valid


def read_examples(path: Path) -> dict:
    """Return the raw file's object. Raises ValueError when it is none, with the reason."""
    try:
        examples = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{error.strerror}; make it: python preprocessing/prontoqa_generate.py"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a UTF-8 JSON file ({error})") from error
    if not isinstance(examples, dict):
        raise ValueError(f"holds {shown(examples)}, wanted an object of examples")
    return examples


def write_all_atomically(texts: dict[Path, str]) -> None:
    """Write every file under a temporary name and rename them only when all are complete."""
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.part", "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    for path in texts:
        os.replace(f"{path}.part", path)


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
    args = parse_arguments(arguments)
    records, problems = [], []
    try:
        for name, example in read_examples(args.raw).items():
            try:
                records.append(convert_example(example))
            except ValueError as error:
                problems.append(f"{name}: {error}")
        report_problems(args.raw, problems)
        if problems and not args.skip_bad:
            raise ValueError(
                f"malformed examples: {len(problems)}; nothing written; mend them, or drop them "
                "with --skip-bad"
            )
        train, valid, test = split_sizes(len(records))
    except ValueError as error:
        print(f"{args.raw}: {error}", file=sys.stderr)
        return 2
    splits = {
        "train": records[:train],
        "valid": records[train : train + valid],
        "test": records[train + valid :],
    }
    texts = {args.out / f"prontoqa_{name}.json": as_json(part) for name, part in splits.items()}
    try:
        write_all_atomically(texts)
    except OSError as error:
        print(f"{args.out}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    if len(records) < PUBLISHED_TOTAL:
        print(
            f"{args.raw}: {len(records)} examples, fewer than {PUBLISHED_TOTAL}: split in the "
            "proportions 9000/200/800"
        )
    skipped = f"; malformed examples skipped: {len(problems)}" if problems else ""
    print(f"{args.out}/prontoqa_{{train,valid,test}}.json: {train}/{valid}/{test} records{skipped}")
    return 0


def report_problems(path: Path, problems: list[str]) -> None:
    for problem in problems[:SHOWN_PROBLEMS]:
        print(f"{path}: {problem}", file=sys.stderr)
    if len(problems) > SHOWN_PROBLEMS:
        hidden = len(problems) - SHOWN_PROBLEMS
        print(f"{path}: and {hidden} more malformed examples", file=sys.stderr)


def as_json(records: list[dict]) -> str:
    body = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    return f"[\n{body}\n]\n"


if __name__ == "__main__":
    sys.exit(main())
