"""What the scripts of this folder share: reading text, writing files, reporting a user's mistake.

Text is UTF-8. A byte-order mark at its beginning is dropped, so that it never enters a record, and
lines may end in CRLF. Files are written completely or not at all. Needs only the standard library,
so that a data file can be made on a machine without torch.
"""

import argparse
import codecs
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# The first bytes of files that people pass by mistake, and what such a file is.
SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}


class InputError(ValueError):
    """A user's file or option that cannot be used; the message says what to do."""


def report(message: str) -> int:
    """Print the message on stderr; return the exit status of a user's mistake."""
    print(message, file=sys.stderr)
    return 2


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum}")
        return int(text)

    return parse


def kind_of(data: bytes) -> str | None:
    """Return what the bytes are where they cannot be a data file, else None."""
    if not data:
        return "empty"
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            return kind
    if data.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    return None


def read_bytes(path: Path, advice: str) -> bytes:
    """Return a file's bytes without a byte-order mark.

    advice: how to get the right file, the end of every message.

    Raises:
        InputError: the file cannot be read, is empty, or is of a kind that holds no text in UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    kind = kind_of(data)
    if kind:
        raise InputError(f"{path}: is {kind}; {advice}")
    return data


def read_json(path: Path, advice: str) -> object:
    """Return the value of a JSON file, or the list of the values of a JSON Lines file.

    Raises:
        InputError: as read_bytes; or the file is not UTF-8, or not JSON, with the place.
    """
    data = read_bytes(path, advice)
    try:
        text = data.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is {data[error.start]:#04x}"
    except json.JSONDecodeError as error:
        values = json_lines(text)
        if values is not None:
            return values
        reason = json_problem(text, error)
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise InputError(f"{path}: is not UTF-8 JSON ({reason}); {advice}")


def is_text(value: object) -> bool:
    """Return whether the value is text that UTF-8 can hold (JSON can spell half a character)."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value


def record_problem(record: object) -> str | None:
    """Return what is wrong with one record, or None."""
    if not isinstance(record, dict):
        return f"got {type(record).__name__}, wanted an object with question, answer and steps"
    for name in ("question", "answer"):
        if not is_text(record.get(name)):
            return f"{name}: got {record.get(name)!a:.40}, wanted a text"
    steps = record.get("steps")
    if not isinstance(steps, list) or not all(map(is_text, steps)):
        return "steps: wanted a list of texts"
    return None


def read_records(path: Path) -> list[dict]:
    """Return the records of a data file: a JSON list or JSON Lines.

    Raises:
        InputError: as read_json; or there is no record, or a field is missing or malformed.
    """
    records = read_json(path, "give a data file: a list of records with question, answer and steps")
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: wanted a list of at least one record")
    for index, record in enumerate(records):
        problem = record_problem(record)
        if problem:
            raise InputError(f"{path}: record {index}: {problem}")
    return records


def json_lines(text: str) -> list | None:
    """Return the objects of JSON Lines, one a line; None where a line is anything else."""
    try:
        values = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError):
        return None
    return values if values and all(isinstance(value, dict) for value in values) else None


def json_problem(text: str, error: json.JSONDecodeError) -> str:
    """Return the place and the reason of a JSON error, with advice for a comma too many."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if before.endswith(",") and after[:1] in ("]", "}"):
        place = len(before) - 1
    elif after[:1] == "," and after[1:].lstrip()[:1] in ("]", "}"):
        place = text.index(",", error.pos)
    else:
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    line = text.count("\n", 0, place) + 1
    return f"line {line} has a comma with nothing after it; delete it"


def json_list(records: Iterable[dict]) -> str:
    """Return the records as a JSON list, one record a line."""
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    return f"[\n{lines}\n]\n"


def write_atomically(path: Path, text: str) -> str:
    """Write one file as UTF-8, complete or not at all; return its sha256."""
    return write_all_atomically({path: text})[path]


def write_all_atomically(texts: dict[Path, str]) -> dict[Path, str]:
    """Write every text under a temporary name, rename them when all are complete, return sha256s.

    Raises:
        InputError: a file cannot be written; those that were there before are unchanged.
    """
    sums, partials = {}, {}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            data = text.encode("utf-8")
            partials[path] = path.with_name(f"{path.name}.{os.getpid()}.partial")
            with open(partials[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sums[path] = hashlib.sha256(data).hexdigest()
        for path, partial in partials.items():
            os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: cannot be written ({error.strerror}); give another folder"
        ) from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    return sums
