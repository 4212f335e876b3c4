"""What is in the thoughts: words, geometry, windows, attention, nodes of graphs, linear probes.

    python -m analysis.probes CHECKPOINT_OR_RUN [--data FILE] [--records N] [--graphs]
        [--coconut-class module:Class] [--out FOLDER]

readings.py reads every thought of every record, graph_values.py the nodes of graphs where the
records have them, linear_probes.py and confidence.py measure what they say. This module puts the
figures together, with intervals over records.

Writes probes.json, CSV tables and pictures into RUN/analysis/checkpoint_N. What each figure means:
docs/analysis.md. Tables and pictures are left to probe_output.py.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import probe_output
from analysis.confidence import describe_confidence
from analysis.continuations import NoBranches
from analysis.graph_values import Graph, describe_groups, describe_values, read_graphs
from analysis.lens import token_text
from analysis.linear_probes import probe_steps
from analysis.output import heading, make_folder, write_json
from analysis.readings import MAX_DETAILED, MAX_KEPT, Readings, read_thoughts, telling_steps
from analysis.statistics import mean_interval
from analysis.step_tokens import step_labels, step_of
from analysis.subject import Subject, open_subject, output_folder
from engine.console import progress_bar
from engine.metrics import wilson_interval
from utils import configure_logging, log, run_command

RESULT_FILE = "probes.json"
# Significant digits of details. There is an attention weight for every token of every question.
DIGITS, ATTENTION_DIGITS = 4, 2


def probe(subject: Subject, requires_graphs: bool = False) -> dict[str, Any]:
    """Everything that this module measures, as JSON values (the content of probes.json).

    requires_graphs: whether records without graphs are an error.

    Raises: UserError where `read_graphs` and `read_thoughts` do.
    """
    began = time.monotonic()
    graphs = read_graphs(subject.raw, str(subject.data), requires_graphs)
    try:
        found = read_thoughts(subject, graphs, progress_bar)
    except NoBranches as error:
        if requires_graphs:
            raise
        log.warning(f"{error}; graphs are left out")
        graphs, found = None, read_thoughts(subject, None, progress_bar)
    c_thought = subject.metadata.c_thought
    num_thoughts = found.entropy.shape[1]
    labels = step_labels(telling_steps(subject))
    own_steps = [step_of(k + 1, c_thought) for k in range(num_thoughts)]
    content = {
        "thoughts": _thoughts(subject, found),
        "layers": {
            "gold_step_top1": _by_layer(found.layer_rank == 1, ~np.isnan(found.layer_rank)),
            "entropy": _by_layer(found.layer_entropy, ~np.isnan(found.layer_entropy)),
        },
        "linear": probe_steps(found.thoughts, labels[:MAX_KEPT], own_steps),
        "confidence": describe_confidence(found.log_p.astype(np.float64), found.is_correct),
        "graph": None if graphs is None else _graph(graphs, found, c_thought),
        "records": _records(subject, found, graphs),
    }
    return heading(subject, {"graphs": requires_graphs}, time.monotonic() - began) | content


def _thoughts(subject: Subject, found: Readings) -> list[dict[str, Any]]:
    """The means over records of what was read of each thought."""
    step_ids, c_thought = subject.records.table["step_ids"][:], subject.metadata.c_thought
    entries = []
    for k in range(found.entropy.shape[1]):
        rows = np.flatnonzero(found.num_thoughts > k)
        entry: dict[str, Any] = {"k": k + 1, "step": step_of(k + 1, c_thought) + 1, "n": len(rows)}
        for name in ("entropy", "norm_ratio", "max_cosine", "cosine_last_state"):
            entry[name] = mean_interval(getattr(found, name)[rows, k].astype(np.float64))
        previous = found.cosine_previous[rows, k].astype(np.float64)
        entry["cosine_previous"] = mean_interval(previous[~np.isnan(previous)])
        kept = found.thoughts[rows[rows < MAX_KEPT], k]
        entry["cosine_other_records"] = mean_interval(_cosines_to_others(kept))
        with_step = [row for row in rows if len(step_ids[row]) >= entry["step"]]
        own = [set(step_ids[row][entry["step"] - 1]) for row in with_step]
        words = found.word_ids[with_step, k].tolist()
        entry["gold_step_top1"] = _share(found.gold_rank[with_step, k] == 1)
        entry["gold_step_word"] = _share([w in ids for w, ids in zip(words, own, strict=True)])
        # The control: where steps are long, or alike, a word may be in a step by chance.
        others = own[1:] + own[:1]
        entry["other_step_word"] = _share([w in ids for w, ids in zip(words, others, strict=True)])
        entry["gold_step_rank_median"] = (
            float(np.median(found.gold_rank[with_step, k])) if with_step else None
        )
        window = found.window[rows, k]
        entry["window"] = None if np.isnan(window).any() else window.mean(0).tolist()
        entries.append(entry)
    return entries


def _share(hits: Sequence[bool]) -> dict[str, float | int | None]:
    """The share of hits with Wilson's interval, in the form of `mean_interval`."""
    if len(hits) == 0:
        return mean_interval([])
    low, high = wilson_interval(int(np.sum(hits)), len(hits))
    return {"mean": float(np.mean(hits)), "low": low, "high": high, "n": len(hits)}


def _cosines_to_others(thoughts: np.ndarray) -> np.ndarray:
    """For each of (n, D) its mean cosine with all others; none where it is alone."""
    if len(thoughts) < 2:
        return np.empty(0)
    norms = np.linalg.norm(thoughts, axis=1, keepdims=True)
    directions = thoughts.astype(np.float64) / np.maximum(norms, 1e-12)
    with_own = directions @ directions.sum(0)
    return (with_own - (directions**2).sum(1)) / (len(thoughts) - 1)


def _by_layer(values: np.ndarray, is_known: np.ndarray) -> list[list[float | None]]:
    """For each thought and layer the mean of (n, K, L + 1) over records, None where no record has
    it."""
    counts = is_known.sum(0)
    sums = np.where(is_known, values, 0).sum(0, dtype=np.float64)
    return [
        [float(s / n) if n else None for s, n in zip(*row, strict=True)]
        for row in zip(sums, counts, strict=True)
    ]


def _graph(graphs: Sequence[Graph], found: Readings, c_thought: int) -> dict[str, Any]:
    """What values of nodes and attention to edges come to over records."""
    depths = [[place.depth for place in places] for places in found.places]
    content = describe_values(graphs, depths, found.values)
    members = [
        [graph.edge_members(step_of(k + 1, c_thought) + 1) for k in range(len(attention))]
        for graph, attention in zip(graphs, found.edge_attention, strict=True)
    ]
    groups = describe_groups(members, found.edge_attention)
    content["attention"] = {
        group: [{"k": k} | each for k, each in enumerate(by_k, start=1)]
        for group, by_k in groups.items()
    }
    return content


def _records(
    subject: Subject, found: Readings, graphs: Sequence[Graph] | None
) -> list[dict[str, Any]]:
    """The details of the first MAX_DETAILED records."""
    texts = _Texts(subject)
    records = []
    for row in range(min(len(subject.raw), MAX_DETAILED)):
        source = subject.records.table[row]
        records.append({
            "index": subject.indices[row],
            "question": source["question"],
            "question_tokens": [texts[i] for i in source["question_ids"]],
            "steps": source["steps"],
            "gold": source["answer"],
            "log_p": _rounded(found.log_p[row]),
            "correct": int(found.is_correct[row]),
            "thoughts": [
                _thought(texts, found, row, k) for k in range(found.num_thoughts[row])
            ],
            "graph": None if graphs is None else _record_graph(graphs[row], found, row),
        })  # fmt: skip
    return records


class _Texts:
    """token id -> its text; each is decoded once."""

    def __init__(self, subject: Subject) -> None:
        self.tokenizer, self.known = subject.tokenizer, {}

    def __getitem__(self, token_id: int) -> str:
        token_id = int(token_id)
        if token_id not in self.known:
            self.known[token_id] = token_text(self.tokenizer, token_id)
        return self.known[token_id]


def _thought(texts: _Texts, found: Readings, row: int, k: int) -> dict[str, Any]:
    def pairs(ids: np.ndarray, numbers: np.ndarray) -> list[list]:
        return [[texts[i], _rounded(x)] for i, x in zip(ids, numbers, strict=True)]

    rank = found.gold_rank[row, k]
    window = found.window[row, k]
    return {
        "k": k + 1,
        "top": pairs(found.top_ids[row, k], found.top_p[row, k]),
        "word": texts[found.word_ids[row, k]],
        "by_layer": pairs(found.layer_ids[row, k], found.layer_p[row, k]),
        "entropy": _rounded(found.entropy[row, k]),
        "gold_step_rank": None if np.isnan(rank) else int(rank),
        "nearest": [texts[found.nearest_ids[row, k]], _rounded(found.max_cosine[row, k])],
        "norm_ratio": _rounded(found.norm_ratio[row, k]),
        "window": None if np.isnan(window).any() else [_rounded(x) for x in window],
        "attention": [_rounded(x, ATTENTION_DIGITS) for x in found.question_attention[row][k]],
    }


def _record_graph(graph: Graph, found: Readings, row: int) -> dict[str, Any]:
    return {
        "nodes": graph.names,
        "edges": graph.edges,
        "root": graph.root,
        "target": graph.target,
        "distractor": graph.distractor,
        "values": [[_rounded(x) for x in by_node] for by_node in found.values[row]],
        "edge_attention": [[_rounded(x) for x in by_edge] for by_edge in found.edge_attention[row]],
        "groups": [graph.closest_group(place.depth) for place in found.places[row]],
    }


def _rounded(number: float, digits: int = DIGITS) -> float | None:
    """A number with so many significant digits; None for nan."""
    return None if np.isnan(number) else float(f"{number:.{digits}g}")


def write_probes(
    subject: Subject, folder: Path | None = None, requires_graphs: bool = False
) -> dict[str, Any]:
    """Measure, and write probes.json, tables and pictures; returns the content of the file.

    folder: by default RUN/analysis/checkpoint_N.

    Raises: UserError where `probe` does, and for a folder that cannot be written.
    """
    folder = folder or output_folder(subject.folder, subject.data)
    make_folder(folder)
    found = probe(subject, requires_graphs)
    probe_output.write_tables(found, folder)
    probe_output.draw(found, folder)
    # Last, so that a file that is there has its tables and pictures beside it.
    write_json(folder / RESULT_FILE, found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, help="a checkpoint, or a run: its last checkpoint")
    parser.add_argument("--data", type=Path, help="data file (default: the run's val_path)")
    parser.add_argument("--records", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--graphs", action="store_true", help="refuse records without graphs")
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
        found = write_probes(subject, folder, options.graphs)
        log.info("\n".join(probe_output.page(found)))
        log.info(f"\nwritten: {folder / RESULT_FILE}, with tables (CSV) and pictures beside it")

    return run_command(work, "nothing was written")


if __name__ == "__main__":
    raise SystemExit(main())
