"""One HTML page about a checkpoint: how it was trained, whether its thoughts are used, what is in
them.

    python -m analysis.report exps/quickstart/coconut --baselines exps/quickstart/no_cot

The page is report.html beside the ablations.json and probes.json that it shows (analysis/ablations,
analysis/probes); whichever of them is missing, or belongs to another state of checkpoint or data,
is made first. It is self-contained: style, script and data are in one file, nothing is fetched, and
its content security policy lets no other script run. All figures are those of the JSON files and
of metrics.jsonl; only the numbers of single questions are rounded, to NUM_DIGITS digits.

The page's own source is in report_page/; what of the data goes into it is report_data.py's.
"""

import argparse
import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.ablations import write_ablations
from analysis.output import FORMAT, checkpoint_sha256
from analysis.probes import write_probes
from analysis.report_data import describe_baseline, page_data
from analysis.subject import (
    find_checkpoint,
    open_subject,
    output_folder,
    read_metadata,
    read_run_config,
)
from utils import (
    UserError,
    atomic_write_text,
    configure_logging,
    log,
    run_command,
    sha256_file,
)

PAGE = Path(__file__).parent / "report_page"
# In this order, since the later ones use the earlier ones.
SCRIPTS = ("basics.js", "charts.js", "overview.js", "more.js", "graph.js", "viewer.js", "detail.js")
SCRIPTS += ("main.js",)
PLACE = re.compile(r"\{\{(\w+)\}\}")
RESULT_FILE = "report.html"
MAX_BYTES = 5_000_000


def write_report(
    path: str | Path,
    *,
    baselines: Sequence[str | Path] = (),
    data: str | Path | None = None,
    num_records: int | None = None,
    coconut_class: str | None = None,
) -> Path:
    """Write the page of a checkpoint, or of a run's last one, and return its path.

    baselines: folders of runs to show beside it.
    data: the file of the questions; by default the val_path of the checkpoint's run.
    num_records: ask only the first so many.
    coconut_class: "module:Class", needed where the checkpoint was trained with one.

    Raises: UserError as analysis.subject.open_subject does, for a baseline that is not a run, and
        where the page cannot be written; an earlier one then stays.
    """
    checkpoint = find_checkpoint(path)
    runs = [describe_baseline(Path(run)) for run in baselines]  # before anything takes long
    found = measure(checkpoint, data, num_records, coconut_class)
    content = page_data(checkpoint, found["ablations"], found["probes"], runs)
    target = output_folder(checkpoint, data) / RESULT_FILE
    try:
        atomic_write_text(target, fitting_page(content))
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); make room or give the right to"
        ) from None
    return target


def measure(
    checkpoint: Path,
    data: str | Path | None = None,
    num_records: int | None = None,
    coconut_class: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What ablations.json and probes.json say of a checkpoint; one that is not current is made.

    data, num_records, coconut_class: as `write_report` takes them.

    Raises: UserError as analysis.subject.open_subject does.
    """
    read_metadata(checkpoint)
    folder = output_folder(checkpoint, data)
    writers = {"ablations": write_ablations, "probes": write_probes}
    config = read_run_config(checkpoint)
    asked = data or (config and config.val_path)
    found = {}
    if asked and Path(asked).is_file():
        current = {
            "format": FORMAT,
            "checkpoint_sha256": checkpoint_sha256(checkpoint),
            "data_sha256": sha256_file(Path(asked)),
        }
        found = {
            name: content
            for name in writers
            if (content := read_result(folder / f"{name}.json", current, num_records))
        }
    subject = None
    for name, write in writers.items():
        if name not in found:
            subject = subject or open_subject(
                checkpoint, data=data, num_records=num_records, coconut_class=coconut_class
            )
            found[name] = write(subject, folder)
    return found


def read_result(
    path: Path, current: dict[str, Any], num_records: int | None
) -> dict[str, Any] | None:
    """The content of a result file; None where it is missing, broken, or not what is asked for.

    current: what it must begin with. num_records: of how many records it must be, if that matters.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_current = all(content[name] == value for name, value in current.items())
        if is_current and num_records in (None, content["num_records"]):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def fitting_page(content: dict) -> str:
    """The page, with as many of the first questions as MAX_BYTES allow."""
    text = page(content)
    while len(text.encode()) > MAX_BYTES and len(content["records"]) > 1:
        share = 0.95 * MAX_BYTES / len(text.encode())
        kept = max(1, int(share * len(content["records"])))
        log.info(
            f"only {kept} questions are shown, so that the page stays below {MAX_BYTES:,} bytes"
        )
        content = content | {"records": content["records"][:kept]}
        text = page(content)
    return text


def page(content: dict) -> str:
    """The whole page as HTML, with `content` in it."""
    script = "\n".join(read_part(name) for name in SCRIPTS)
    script = f'"use strict";\n{script}'
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(content["run"]["name"]),
        "script_hash": f"'sha256-{digest}'",
        "style": read_part("style.css"),
        "script": script,
        "data": embedded_json(content),
    }
    # In one pass, so that what looks like a place in the data is left as it is.
    return PLACE.sub(lambda place: parts[place[1]], read_part("page.html"))


def embedded_json(content: dict) -> str:
    """JSON for a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def read_part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and print its path; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a checkpoint, or a run: its last checkpoint")
    parser.add_argument(
        "--baselines",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs to show beside it",
    )
    parser.add_argument("--data", type=Path, help="data file (default: the run's val_path)")
    parser.add_argument("--records", type=int, metavar="N", help="ask only the first N records")
    parser.add_argument("--coconut-class", metavar="module:Class", help="that of the training")
    options = parser.parse_args(argv)
    configure_logging()

    def work() -> None:
        target = write_report(
            options.path,
            baselines=options.baselines,
            data=options.data,
            num_records=options.records,
            coconut_class=options.coconut_class,
        )
        print(target)

    return run_command(work, "the report that was there, if any, was left as it is")


if __name__ == "__main__":
    raise SystemExit(main())
