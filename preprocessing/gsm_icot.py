"""Convert one GSM8K text file into the project's JSON records.

A line reads `question||steps #### answer`; the steps are `<<equation>>` groups (GSM8K-aug) or,
with --sentences, plain prose that is cut into sentences. docs/specification.md, section 1, has the
record format. gsm_icot.bash fetches the files; dataset.py reads the records for training. Needs the
standard library alone.
"""

import argparse
import codecs
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, json_list, read_bytes, report, write_atomically

MAX_SHOWN_PROBLEMS = 20
LINE_FORMAT = "question||steps #### answer"
EQUATION = re.compile(r"<<(.+?)>>")
SENTENCE_END = re.compile(r"[.!?](?=\s)")
ABBREVIATIONS = {
    *("mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr."),
    *("e.g.", "i.e.", "etc.", "vs.", "approx.", "a.m.", "p.m.", "sq.", "ft.", "sq.ft."),
}


def split_equations(text: str) -> list[str]:
    """Return the `<<...>>` groups of `text` in order; none at all gives no steps.

    Raises:
        ValueError: there is text outside the groups, or a group is empty or holds a stray bracket.
    """
    outside = EQUATION.sub("", text).strip()
    if outside:
        raise ValueError(
            f"steps hold {outside[:40]!r} outside <<...>>, wanted equations only; "
            "for steps in sentences add --sentences"
        )
    equations = EQUATION.findall(text)
    if any(not equation.strip() or re.search("<<|>>", equation) for equation in equations):
        raise ValueError("steps hold an empty or unbalanced <<...>>, wanted <<equation>>")
    return [f"<<{equation}>>" for equation in equations]


def split_sentences(text: str) -> list[str]:
    """Cut prose after each `.`, `!` or `?` that white space follows.

    The period of an abbreviation or of a list number (`1. First`) ends no sentence, and that of a
    decimal is followed by a digit. What remains after the last cut is a sentence too.
    """
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(text):
        words = text[start : match.end()].split()
        is_list_number = len(words) == 1 and words[0][:-1].isdigit()
        if is_list_number or words[-1].lower().lstrip("(\"'") in ABBREVIATIONS:
            continue
        sentences.append(text[start : match.end()])
        start = match.end()
    sentences.append(text[start:])
    return [sentence.strip() for sentence in sentences if sentence.strip()]


def parse_line(line: str, sentences: bool = False) -> dict:
    """Return the record of one line: `{"question", "steps", "answer"}`.

    The question is kept unchanged; the answer loses outer white space, so a carriage return at
    the end of a line is harmless.

    Raises:
        ValueError: the line has another format; the message says what was wanted.
    """
    if line.count("||") != 1:
        raise ValueError(f"{line.count('||')} times '||', wanted once: {LINE_FORMAT}")
    question, solution = line.split("||")
    if solution.count("####") != 1:
        raise ValueError(f"{solution.count('####')} times '####' after '||', wanted once")
    steps, answer = solution.split("####")
    if not question.strip():
        raise ValueError("the question before '||' is empty")
    if not answer.strip():
        raise ValueError("the answer after '####' is empty")
    split = split_sentences if sentences else split_equations
    return {"question": question, "steps": split(steps), "answer": answer.strip()}


def convert(raw: bytes, sentences: bool = False) -> tuple[list[dict], list[str]]:
    """Return the records of a file's bytes, and one message for each malformed line.

    Only the newline character ends a line: a question may hold U+2028 and the like. A byte-order
    mark at the beginning is dropped.
    """
    lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    records, problems = [], []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_line(line.decode("utf-8"), sentences))
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: not UTF-8 at byte {error.start}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    return records, problems


def wrong_kind(raw: bytes, problems: list[str]) -> str:
    """Return what a file is in which no line could be read."""
    if raw.lstrip()[:1] in (b"[", b"{"):
        return f"is JSON, perhaps converted already; wanted lines {LINE_FORMAT}"
    return f"none of its {len(problems)} lines reads {LINE_FORMAT}; {problems[0]}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert data/gsm_SPLIT.txt into data/gsm_SPLIT.json.",
        epilog="Exit status 0, or 2 with nothing written.",
    )
    parser.add_argument("split", help="train, valid or test: the SPLIT in the file names")
    parser.add_argument("--input", type=Path, help="text file (default data/gsm_SPLIT.txt)")
    parser.add_argument("--output", type=Path, help="JSON file (default data/gsm_SPLIT.json)")
    parser.add_argument("--sentences", action="store_true", help="steps are sentences, not <<...>>")
    parser.add_argument(
        "--skip-bad", action="store_true", help="drop malformed lines instead of stopping"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Convert one file; return 2, with nothing written, on a user's mistake."""
    args = parse_arguments(arguments)
    source = args.input or Path(f"data/gsm_{args.split}.txt")
    target = args.output or Path(f"data/gsm_{args.split}.json")
    try:
        raw = read_bytes(source, "fetch the data: bash preprocessing/gsm_icot.bash")
        records, problems = convert(raw, args.sentences)
        if not records:
            raise InputError(f"{source}: {wrong_kind(raw, problems)}; nothing written")
        for problem in problems[:MAX_SHOWN_PROBLEMS]:
            report(f"{source}: {problem}")
        if len(problems) > MAX_SHOWN_PROBLEMS:
            report(f"{source}: and {len(problems) - MAX_SHOWN_PROBLEMS} more malformed lines")
        if problems and not args.skip_bad:
            raise InputError(
                f"{source}: malformed lines: {len(problems)}; nothing written; fix them, or drop "
                "them with --skip-bad"
            )
        write_atomically(target, json_list(records))
    except InputError as error:
        return report(str(error))
    skipped = f"; malformed lines skipped: {len(problems)}" if problems else ""
    bare = sum(not record["steps"] for record in records)
    print(f"{target}: {len(records)} records, {bare} of them without steps{skipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
