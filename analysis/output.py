"""Files that analyses write, atomically: JSON with its origin, CSV tables, pictures.

A result begins with `heading`, by which a reader, or the report, sees whether it still belongs to
the current checkpoint and data.
"""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from analysis.subject import Subject
from engine.provenance import provenance
from utils import UserError, atomic_write_text, sha256_file

FORMAT = 2
HASHED_SUFFIXES = (".safetensors", ".json")
DOTS_PER_INCH = 130


def heading(subject: Subject, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What every result file begins with, as JSON values.

    options: the options that the analysis was run with.
    seconds: how long it took.
    """
    found = provenance()
    return {
        "format": FORMAT,
        "checkpoint": str(subject.folder),
        "data": str(subject.data),
        "data_sha256": subject.records.sha256,
        "checkpoint_sha256": checkpoint_sha256(subject.folder),
        "commit": found["commit"] + ("+changed" if found["changed"] else ""),
        "machine": found["machine"],
        "seconds": round(seconds, 1),
        "options": options,
        "num_records": len(subject.indices),
        "indices": subject.indices,
        "stage": subject.stage,
        "num_thoughts": int(subject.staged.num_latents.max()),
    }


def checkpoint_sha256(folder: Path) -> str:
    """One sum over the weights, configuration and tokenizer of a checkpoint, in hexadecimal."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in HASHED_SUFFIXES)
    sums = "".join(f"{sha256_file(path)}  {path.name}\n" for path in paths)
    return hashlib.sha256(sums.encode()).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises: UserError where it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); name another folder with --out"
        ) from None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result, one key a line, and one line for each item of a list of objects."""
    lines = [f"{json.dumps(key)}: {_compact(value)}" for key, value in content.items()]
    atomic_write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _compact(value: Any) -> str:
    def dump(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False, allow_nan=False)

    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(map(dump, value)) + "\n]"
    return dump(value)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write a table; the first row is its head, None an empty cell."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    atomic_write_text(path, out.getvalue())


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG; `path` is without suffix. Returns both paths.

    The same figure gives the same bytes.
    """
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        target = path.with_name(path.name + suffix)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            # Without a salt the ids in an SVG are random.
            with matplotlib.rc_context({"svg.hashsalt": "coconut"}):
                figure.savefig(unfinished, format=suffix[1:], dpi=DOTS_PER_INCH, metadata=metadata)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        written.append(target)
    return written
