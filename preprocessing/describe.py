"""Describe data files: a table of figures for each file and, on request, a PNG of distributions.

Reads any file of records (question, answer, steps) and, for ProsQA, the graphs in it: sizes, hops,
shortest paths, persons, degrees, whether target and distractor are reachable as they should be, and
how often rules that ignore the root give the right answer (graphs.py). Several files are shown side
by side. Lengths are white-space words unless a tokenizer is named. Nothing is changed or repaired;
training reads data with dataset.py, which is stricter.

Implements docs/specification.md, sections 1 (the record) and 2 (the parts that are tokenised).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, read_records, report
from preprocessing.graphs import (
    FITTED_RULES,
    GRAPH_FIELDS,
    RULES,
    VERDICTS,
    all_verdicts,
    child_lists,
    distances,
    graph_problem,
    has_graph,
    num_shortest_paths,
    rule_score,
)

# Heads are nodes 0 and 1 in the published format; in-degrees are counted for the other nodes.
NUM_HEADS = 2
COLOURS = ("#0072B2", "#E69F00")  # Okabe and Ito: distinct to colour-blind readers, and in grey

Samples = dict[str, list[int]]


def read_file(path: Path) -> list[dict]:
    """Return the records of a data file, all of them with a graph or none.

    Raises:
        InputError: as read_records; or a graph's node numbers are outside the graph, its target and
            distractor cannot be reached as they should, or only some records have a graph.
    """
    records = read_records(path)
    if len({has_graph(record) for record in records}) > 1:
        raise InputError(
            f"{path}: some records hold a graph ({', '.join(GRAPH_FIELDS)}) and some do not; "
            "describe them in two files"
        )
    for index, record in enumerate(records):
        problem = graph_problem(record) if has_graph(record) else None
        if problem:
            raise InputError(f"{path}: record {index}: {problem}")
    return records


def text_samples(
    records: list[dict], count_tokens: Callable[[list[str]], list[int]], unit: str
) -> Samples:
    """Return numbers of steps and lengths, one for each record.

    A record's length is that of question, steps and `### ` answer, each counted on its own as
    training tokenises them, without the end-of-text mark.
    """
    steps = [[step for step in record["steps"] if step.strip()] for record in records]
    questions = count_tokens([record["question"] + "\n" for record in records])
    answers = count_tokens(["### " + record["answer"] for record in records])
    step_lengths = iter(count_tokens([step + "\n" for part in steps for step in part]))
    records_length = [
        question + answer + sum(next(step_lengths) for _ in part)
        for question, answer, part in zip(questions, answers, steps, strict=True)
    ]
    return {
        "steps": [len(part) for part in steps],
        f"{unit} in the question": questions,
        f"{unit} in the whole record": records_length,
    }


def first_named(record: dict) -> str:
    """Return the candidate that the question names first, in sentences or in symbols."""
    before, marker, after = record["question"].rpartition("[Q] ")
    if marker:
        return after.partition(" ")[0]
    return after.rsplit(" or ", 1)[0].rsplit(" ", 1)[-1]


def graph_samples(records: list[dict]) -> Samples:
    """Return the figures of ProsQA graphs, one for each record.

    With two exceptions: `in-degree` has one for each node but the two heads, and names that end in
    `?` hold 1 for yes and 0 for no.
    """
    samples: Samples = {}
    for record in records:
        children = child_lists(record)
        num_nodes, root, other = len(children), record["root"], 1 - record["root"]
        target, distractor = record["target"], record["neg_target"]
        from_root, from_other = distances(children, root), distances(children, other)
        in_degree = Counter(child for _, child in record["edges"])
        own = [d for n, d in from_other.items() if not children[n] and n not in from_root]
        deepest = max(own, default=-1)
        isolated = sum(not in_degree[n] and not children[n] for n in range(num_nodes))
        steps = sum(bool(step.strip()) for step in record["steps"])
        values = {
            "nodes": num_nodes,
            "edges": len(record["edges"]),
            "hops": from_root[target],
            "shortest paths": num_shortest_paths(children, root, target),
            "persons": sum(not in_degree[node] for node in range(num_nodes)),
            "root out-degree": len(children[root]),
            "distractor hops": from_other[distractor],
            "in-degree": [in_degree[node] for node in range(NUM_HEADS, num_nodes)],
            "isolated nodes": isolated,
            "duplicate edges": len(record["edges"]) - len(set(map(tuple, record["edges"]))),
            "as many steps as hops?": steps == from_root[target],
            "target from the root only?": target not in from_other,
            "distractor from the other head only?": distractor not in from_root,
            "root is node 0?": root == 0,
            "target named first?": first_named(record) == record["idx_to_symbol"][target],
            "distractor is a deepest own leaf?": from_other[distractor] == deepest,
        }
        for name, value in values.items():
            sample = samples.setdefault(name, [])
            sample += value if isinstance(value, list) else [int(value)]
    return samples


def rule_rows(records: list[dict], fit_records: list[dict] | None) -> dict[str, str]:
    """Return the table's text for each rule that ignores the root: score, interval and verdicts."""
    labels = {name: f"rule {name}" for name in RULES}
    labels |= {name: f"fitted rule {name}" for name in FITTED_RULES}
    rows = {}
    for name, counts in all_verdicts(records, fit_records).items():
        share, low, high = (100 * value for value in rule_score(counts))
        verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        rows[labels[name]] = f"{share:.1f}% ({low:.1f} to {high:.1f}): {verdicts}"
    return rows


def shares(sample: Sequence, most: int = 8) -> list[tuple]:
    """Return (value, share) pairs of the most common values, in order of the value."""
    common = Counter(sample).most_common(most)
    return sorted((value, count / len(sample)) for value, count in common)


def sample_rows(samples: Samples) -> dict[str, str]:
    """Return the table's text for each sample: a share, or mean, deviation, extremes and shares."""
    rows = {}
    for name, sample in samples.items():
        if name.endswith("?"):
            rows[name] = f"{fmean(sample):.1%}"
            continue
        if not sample:
            rows[name] = "none"
            continue
        rows[name] = f"{fmean(sample):.2f} sd {pstdev(sample):.2f} ({min(sample)} to {max(sample)})"
        if 1 < len(set(sample)) <= 16:
            rows[f"{name}, shares"] = ", ".join(f"{v}: {s:.3f}" for v, s in shares(sample))
    return rows


def record_rows(records: list[dict]) -> dict[str, str]:
    """Return the table's text for counts of records, repetitions, blank fields and answers."""
    num_records = len(records)
    answers = Counter(record["answer"] for record in records)
    common = "; ".join(
        f"{answer!a} {count / num_records:.1%}" for answer, count in answers.most_common(3)
    )
    no_steps = sum(not any(step.strip() for step in record["steps"]) for record in records)
    return {
        "records": f"{num_records:,}",
        "repeated questions": str(num_records - len({r["question"] for r in records})),
        "blank questions": str(sum(not record["question"].strip() for record in records)),
        "blank answers": str(sum(not record["answer"].strip() for record in records)),
        "blank steps": str(sum(not s.strip() for record in records for s in record["steps"])),
        "records without steps": str(no_steps),
        "different answers": f"{len(answers):,}",
        "most common answers": common,
    }


def table(columns: dict[str, dict[str, str]]) -> str:
    """Return a Markdown table with one column for each file, padded so that it reads as text."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    header = ["figure", *columns]
    lines = [[name, *(column.get(name, "") for column in columns.values())] for name in names]
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *lines]
    )


def word_counts(texts: list[str]) -> list[int]:
    """Return the number of white-space words of each text."""
    return [len(text.split()) for text in texts]


def load_token_counter(name: str) -> Callable[[list[str]], list[int]]:
    """Return a function that counts tokens under a Hugging Face tokenizer.

    Raises:
        InputError: transformers is not installed or finds no tokenizer of that name.
    """
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        # Hugging Face raises a dozen unrelated types here, and each means the same to the user.
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--tokenizer {name}: cannot be loaded ({reason}); give a folder saved by "
            "save_pretrained or a name on the Hub, or leave it out to count words"
        ) from error

    def count(texts: list[str]) -> list[int]:
        if not texts:
            return []
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    return count


def draw_panel(axis, name: str, samples: list[list[int]]) -> None:
    """Draw one sample of each file: bars for a few values, steps over bins for many."""
    values = sorted({value for sample in samples for value in sample})
    low, high = values[0], values[-1]
    if high - low <= 16:
        width = 0.8 / len(samples)
        positions = range(low, high + 1)
        for index, sample in enumerate(samples):
            counts = Counter(sample)
            offset = (index - (len(samples) - 1) / 2) * width
            axis.bar(
                [p + offset for p in positions],
                [counts[p] / max(len(sample), 1) for p in positions],
                width,
                color=COLOURS[index],
            )
        axis.set_xticks(range(low, high + 1, 1 if high - low <= 9 else 2))
    else:
        # Bins of a whole number of values: otherwise some hold more integers than others.
        size = -(-(high - low + 1) // 24)
        edges = [low - 0.5 + size * i for i in range((high - low) // size + 2)]
        for index, sample in enumerate(samples):
            weights = [1 / len(sample)] * len(sample)
            axis.hist(sample, edges, weights=weights, color=COLOURS[index], alpha=0.3)
            axis.hist(sample, edges, weights=weights, color=COLOURS[index], histtype="step", lw=1.6)
    axis.set_title(name, fontsize=11)
    axis.set_ylabel("nodes" if name == "in-degree" else "records", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="0.9")


def draw_answers(axis, answers: list[list[str]]) -> None:
    """Draw the shares of the eight answers that are most common over all files."""
    top = [answer for answer, _ in Counter(a for part in answers for a in part).most_common(8)]
    height = 0.8 / len(answers)
    for index, part in enumerate(answers):
        counts = Counter(part)
        offset = (index - (len(answers) - 1) / 2) * height
        axis.barh(
            [row + offset for row in range(len(top))],
            [counts[answer] / len(part) for answer in top],
            height,
            color=COLOURS[index],
        )
    labels = [answer if len(answer) <= 18 else answer[:17] + "…" for answer in top]
    axis.set_yticks(range(len(top)), labels, parse_math=False)
    axis.invert_yaxis()
    axis.set_title("most common answers", fontsize=11)
    axis.set_xlabel("records", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def draw(path: Path, columns: dict[str, tuple[list[dict], Samples]]) -> None:
    """Write a PNG with a panel for each sample that both files have.

    Raises:
        InputError: the picture cannot be written there.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    all_samples = [samples for _, samples in columns.values()]
    names = [
        name
        for name in all_samples[0]
        if not name.endswith("?")
        and name not in ("isolated nodes", "duplicate edges")
        and all(samples.get(name) for samples in all_samples)
    ]
    graphs = "hops" in names
    if graphs:
        # The steps are the hops, the record is as long as its question, and no answer is common.
        names = [name for name in names if name != "steps" and "whole record" not in name]
    num_panels = len(names) + (not graphs)
    num_columns = 3 if num_panels > 4 else 2
    num_rows = -(-num_panels // num_columns)
    figure = Figure(figsize=(4 * num_columns, 2.9 * num_rows + 0.6), layout="constrained")
    axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        draw_panel(axis, name, [samples[name] for samples in all_samples])
        axis.locator_params(axis="y", nbins=5)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if not graphs:
        answers = [[record["answer"] for record in records] for records, _ in columns.values()]
        draw_answers(axes[len(names)], answers)
        axes[len(names)].xaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in axes[num_panels:]:
        axis.set_visible(False)
    handles = [
        Patch(color=colour, label=f"{name} ({len(records):,} records)")
        for colour, (name, (records, _)) in zip(COLOURS, columns.items(), strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    try:
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
    except OSError as error:
        raise InputError(f"--png {path}: cannot be written ({error.strerror})") from error


def column_names(paths: Sequence[Path]) -> list[str]:
    """Return file names, with as many folders before them as it takes to distinguish them."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"{paths[0]}: the same file twice; give different files")


def describe(options: argparse.Namespace) -> str:
    """Read the files, draw the picture if one is asked for, and return the table.

    Raises:
        InputError: as read_file, load_token_counter, draw and column_names; a picture of more than
            two files is asked for; or rules are to be fitted on a file without graphs.
    """
    if options.png and len(options.files) > len(COLOURS):
        raise InputError("--png: compares two files at most; leave it out, or name fewer files")
    names = column_names(options.files)
    file_records = [read_file(path) for path in options.files]
    fit_records = read_file(options.fit) if options.fit else None
    if fit_records and not has_graph(fit_records[0]):
        raise InputError(f"--fit {options.fit}: holds no graphs; give a ProsQA file")
    count_tokens = load_token_counter(options.tokenizer) if options.tokenizer else word_counts
    columns, rows = {}, {}
    for name, records in zip(names, file_records, strict=True):
        samples = text_samples(records, count_tokens, "tokens" if options.tokenizer else "words")
        graphs = has_graph(records[0])
        if graphs:
            samples |= graph_samples(records)
        columns[name] = (records, samples)
        rows[name] = record_rows(records) | sample_rows(samples)
        if graphs:
            rows[name] |= rule_rows(records, fit_records)
    if len(file_records) == 2:
        shared = {r["question"] for r in file_records[0]} & {r["question"] for r in file_records[1]}
        for column in rows.values():
            column["questions in both files"] = str(len(shared))
    if options.png:
        draw(options.png, columns)
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 2, after one message, on a user's mistake."""
    parser = argparse.ArgumentParser(description="Describe data files side by side.")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", metavar="FOLDER_OR_NAME", help="count its tokens, not words")
    parser.add_argument(
        "--fit", type=Path, metavar="FILE", help="fit rules on its graphs (default: five folds)"
    )
    parser.add_argument("--png", type=Path, metavar="OUT.png", help="draw one or two files")
    try:
        print(describe(parser.parse_args(arguments)))
    except InputError as error:
        return report(f"describe.py: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
