"""Are the thoughts used? Accuracy with more or fewer of them, and with others in their place.

    python -m analysis.ablations CHECKPOINT_OR_RUN [--data FILE] [--thoughts 0..2K]
        [--positions each first last] [--records N] [--coconut-class module:Class] [--out FOLDER]

The k sweep forces k = 0..2K latent positions on every question, where K is what the checkpoint's
stage gives it, and takes the answers that follow; where those are texts about a graph, their class
too (path_classes.py). A question stops early at the first k for which the answers after k, ..., K
are all equal. Thoughts are replaced as interventions.py says, and every answer is compared with the
one that the model gives with its own thoughts, record by record. Thoughts of another record are
also a transplant: does the answer follow them?

Writes ablations.json, CSV tables and pictures into RUN/analysis/checkpoint_N. What each figure
means: docs/analysis.md. Tables and pictures are left to ablation_output.py.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import ablation_output
from analysis.asking import POSITIONS, Asker, Plan
from analysis.interventions import SEED, make_vectors, partners, replaced_thoughts, zeros
from analysis.output import heading, make_folder, write_json
from analysis.path_classes import CLASSES, path_class
from analysis.shortcuts import verdicts_of
from analysis.statistics import compare_answers
from analysis.subject import Subject, make_curriculum, open_subject, output_folder
from dataset import StagedRecords, read_records, tokenize_records
from engine.console import progress_bar
from engine.evaluation import evaluate
from engine.metrics import wilson_interval
from engine.model import load_coconut
from preprocessing.graphs import VERDICTS, has_graph
from utils import configure_logging, log, run_command

RESULT_FILE = "ablations.json"


def ablate(
    subject: Subject,
    thoughts: Sequence[str] | None = None,
    positions: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that this module measures, as JSON values (the content of ablations.json).

    thoughts, positions: as `Plan.of` takes them.

    Raises: UserError where `Plan.of` does, for records of which only some have graphs, and for
        records that all ask the same question; RunFailed where replacing thoughts does not work.
    """
    began = time.monotonic()
    plan = Plan.of(subject, thoughts, positions)
    options = {"thoughts": plan.thoughts, "positions": list(positions), "seed": SEED}
    options |= {"max_new_tokens": subject.max_new_tokens, "batch_size": subject.batch_size}
    # First, since a run that is still training may remove its older checkpoints.
    head = heading(subject, options, seconds=0.0)
    verdicts = _verdicts(subject)
    asker = Asker(subject)
    num_times = 1 + len(plan.thoughts) + len(plan.replaced) + bool(plan.replaced)
    asker.bar = progress_bar(num_times * len(asker.shares), "ablations")
    own = asker.answers("own thoughts", subject.staged)
    right = [row["correct"] for row in own]
    sweep = {
        k: asker.answers(f"{k} thoughts", _with_latents(subject.staged, k)) for k in plan.thoughts
    }
    found, transplant = _replace(asker, plan, own)
    asker.bar.close()
    counts = subject.staged.num_latents.tolist()
    stops = early_stops(sweep, counts)
    return head | {
        "seconds": round(time.monotonic() - began, 1),
        "own": accuracy(right) | {"correct": [int(value) for value in right]},
        "sweep": [_sweep_entry(subject, k, rows, right, verdicts) for k, rows in sweep.items()],
        "early_stop": stops,
        "replacements": found,
        "transplant": transplant,
        "shortcuts": verdicts and _by_verdict(verdicts, right),
        "gate": {"self_replacement_is_exact": True} if plan.replaced else None,
        "records": _records(subject, own, sweep, stops, verdicts, transplant),
    }


def _verdicts(subject: Subject) -> dict[str, np.ndarray] | None:
    """The verdicts of the shortcut rules on each record; None for records without graphs."""
    if not any(map(has_graph, subject.raw)):
        return None
    return verdicts_of(subject.raw, subject.data)


def _with_latents(staged: StagedRecords, count: int) -> StagedRecords:
    """The same with `count` latent positions in every record."""
    return replace(staged, num_latents=np.full_like(staged.num_latents, count))


def _replace(asker: Asker, plan: Plan, own: list[dict]) -> tuple[list[dict], dict[str, Any] | None]:
    """Accuracy under each replacement of the plan, and what a transplant did to the answers."""
    if not plan.replaced:
        return [], None
    subject, right = asker.subject, [row["correct"] for row in own]
    counts = subject.staged.num_latents
    donors = partners(subject.records.table["question"][:], counts.tolist())
    thoughts, found, transplant = asker.own_thoughts(), [], None
    for name, where in plan.replaced:
        vectors = make_vectors(name, thoughts, where, subject.model, donors)
        rows = asker.answers(f"{name}, {where}", subject.staged, vectors)
        now_right = [row["correct"] for row in rows]
        entry = {"name": name, "positions": where} | accuracy(now_right)
        found.append(entry | _change(right, now_right))
        if (name, where) == ("other_record", "all"):
            transplant = compare_transplant(own, rows, donors, counts > 0)
    return found, transplant


def accuracy(right: Sequence[bool]) -> dict[str, float]:
    """The share that is right, with Wilson's 95 % interval: acc, low, high."""
    low, high = wilson_interval(sum(right), len(right))
    return {"acc": sum(right) / len(right), "low": low, "high": high}


def _share(values: Sequence[bool]) -> dict[str, float]:
    low, high = wilson_interval(sum(values), len(values))
    return {"share": sum(values) / len(values), "low": low, "high": high}


def _change(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    change = asdict(compare_answers(before, after))
    renamed = {"low": "difference_low", "high": "difference_high"}
    return {renamed.get(name, name): value for name, value in change.items()}


def _sweep_entry(
    subject: Subject,
    k: int,
    rows: list[dict],
    right: Sequence[bool],
    verdicts: dict[str, np.ndarray] | None,
) -> dict[str, Any]:
    now_right = [row["correct"] for row in rows]
    classes = None
    if verdicts is not None:
        of_rows = _classes(subject, rows, [k] * len(rows))
        classes = {name: _share([found == name for found in of_rows]) for name in CLASSES}
    mean_tokens = sum(row["num_tokens"] for row in rows) / len(rows)
    entry = {"k": k} | accuracy(now_right) | {"mean_tokens": mean_tokens, "classes": classes}
    return entry | _change(right, now_right)


def _classes(subject: Subject, rows: list[dict], counts: Sequence[int]) -> list[str]:
    """The class of each answer (path_classes.py)."""
    triples = zip(rows, subject.raw, counts, strict=True)
    return [path_class(row["text"], record, count) for row, record, count in triples]


def answer_of(row: dict) -> str:
    """What an answer says: the text itself where it holds no answer."""
    return row["text"] if row["prediction"] is None else row["prediction"]


def early_stops(sweep: dict[int, list[dict]], counts: Sequence[int]) -> list[int | None]:
    """For each record the first k whose answer is that of all later k up to its own number.

    None where the sweep leaves out some k up to the record's number.
    """
    stops: list[int | None] = []
    for index, count in enumerate(counts):
        if any(k not in sweep for k in range(count + 1)):
            stops.append(None)
            continue
        answers = [answer_of(sweep[k][index]) for k in range(count + 1)]
        stop = count
        while stop > 0 and answers[stop - 1] == answers[count]:
            stop -= 1
        stops.append(stop)
    return stops


def compare_transplant(
    own: list[dict], rows: list[dict], donors: np.ndarray, has_thoughts: np.ndarray
) -> dict[str, Any]:
    """Whose answer a record gives when it reads the thoughts of its donor.

    An answer is compared with those that the model gives to the record and to the donor with their
    own thoughts. Pairs with unequal answers show what the thoughts carry; with equal ones, how
    often the exchange destroys an answer that both agree on.
    """
    keeps, follows, differs = [], [], []
    for index in np.flatnonzero(has_thoughts).tolist():
        answer, kept = answer_of(rows[index]), answer_of(own[index])
        given = answer_of(own[int(donors[index])])
        keeps.append(answer == kept)
        follows.append(answer == given)
        differs.append(kept != given)
    keeps, follows, differs = map(np.array, (keeps, follows, differs))

    def shares(chosen: np.ndarray) -> dict[str, Any] | None:
        if not chosen.any():
            return None
        kept, followed = keeps[chosen], follows[chosen]
        found = {"follows_donor": followed, "keeps_own": kept, "neither": ~(kept | followed)}
        return {"n": int(chosen.sum())} | {k: _share(v.tolist()) for k, v in found.items()}

    return {
        "num_pairs": len(keeps),
        "unequal": shares(differs),
        "equal": shares(~differs),
        "donors": donors.tolist(),
    }


def _by_verdict(
    verdicts: dict[str, np.ndarray], right: Sequence[bool]
) -> dict[str, dict[str, dict]]:
    """Accuracy with own thoughts where each rule is right, tied and wrong."""
    found: dict[str, dict[str, dict]] = {}
    for rule, values in verdicts.items():
        found[rule] = {}
        for verdict in VERDICTS:
            chosen = [value for value, v in zip(right, values, strict=True) if v == verdict]
            empty = {"acc": None, "low": None, "high": None}
            found[rule][verdict] = {"n": len(chosen)} | (accuracy(chosen) if chosen else empty)
    return found


def _records(
    subject: Subject,
    own: list[dict],
    sweep: dict[int, list[dict]],
    stops: Sequence[int | None],
    verdicts: dict[str, np.ndarray] | None,
    transplant: dict[str, Any] | None,
) -> list[dict]:
    """What was asked of each record, and what it answered."""
    counts = subject.staged.num_latents.tolist()
    own_classes = verdicts and _classes(subject, own, counts)
    sweep_classes = {
        k: verdicts and _classes(subject, rows, [k] * len(rows)) for k, rows in sweep.items()
    }
    records = []
    for i, row in enumerate(own):
        answers = [
            {name: rows[i][name] for name in ("text", "prediction", "correct")}
            | {"k": k, "class": sweep_classes[k] and sweep_classes[k][i]}
            for k, rows in sweep.items()
        ]
        record = {name: row[name] for name in ("gold", "text", "prediction", "correct")}
        record |= {"num_thoughts": counts[i], "early_stop": stops[i]}
        record["class"] = own_classes and own_classes[i]
        record["shortcuts"] = verdicts and {rule: str(v[i]) for rule, v in verdicts.items()}
        if transplant is not None:
            record["donor"] = subject.indices[transplant["donors"][i]]
        records.append({"index": subject.indices[i]} | record | {"answers": answers})
    return records


def write_ablations(
    subject: Subject,
    folder: Path | None = None,
    thoughts: Sequence[str] | None = None,
    positions: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure, and write ablations.json, tables and pictures; returns the content of the file.

    folder: by default RUN/analysis/checkpoint_N.

    Raises: UserError and RunFailed where `ablate` does; UserError for a folder that cannot be
        written.
    """
    folder = folder or output_folder(subject.folder, subject.data)
    make_folder(folder)
    found = ablate(subject, thoughts, positions)
    ablation_output.write_tables(found, folder)
    ablation_output.draw(found, folder)
    # Last, so that a file that is there has its tables and pictures beside it.
    write_json(folder / RESULT_FILE, found)
    return found


def accuracy_with_zeroed_thoughts(
    checkpoint: Path, val_path: str, max_new_tokens: int, batch_size: int
) -> float:
    """Accuracy (0 to 1) on `val_path` at the checkpoint's stage, all thoughts replaced by zeros."""
    model, tokenizer, metadata = load_coconut(checkpoint)
    records = tokenize_records(read_records(val_path), tokenizer, val_path)
    with replaced_thoughts(model, zeros):
        outcome = evaluate(
            model,
            tokenizer,
            records,
            make_curriculum(metadata),
            metadata.stage,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return outcome.figures["acc"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a checkpoint, or a run: its last checkpoint")
    parser.add_argument("--data", type=Path, help="data file (default: the run's val_path)")
    parser.add_argument("--records", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--thoughts", nargs="+", metavar="K",
        help="latent positions to force: numbers, K for the checkpoint's own, ranges (0..2K)",
    )  # fmt: skip
    parser.add_argument(
        "--positions", nargs="+", choices=POSITIONS, default=[],
        help="beside all thoughts at once also replace each alone, the first 1, 2, ..., the last"
        " 1, 2, ...",
    )  # fmt: skip
    parser.add_argument("--coconut-class", metavar="module:Class", help="that of the training")
    parser.add_argument("--out", type=Path, help="folder (default: RUN/analysis/checkpoint_N)")
    options = parser.parse_args(argv)
    configure_logging()

    def work() -> None:
        subject = open_subject(
            options.path,
            data=options.data,
            num_records=options.records,
            coconut_class=options.coconut_class,
        )
        folder = options.out or output_folder(subject.folder, subject.data)
        found = write_ablations(subject, folder, options.thoughts, options.positions)
        log.info("\n".join(ablation_output.page(found)))
        log.info(f"\nwritten: {folder / RESULT_FILE}, with tables (CSV) and pictures beside it")

    return run_command(work, "nothing was written")


if __name__ == "__main__":
    raise SystemExit(main())
