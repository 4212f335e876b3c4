"""What a model wrote about a ProsQA graph: a path of which kind, or a bare answer.

    correct_path     a shortest path from the root to the target
    longer_path      a path from the root to the target, with more edges than a shortest one
    hallucination    an edge that the graph lacks, a step that does not begin where the one before
                     ended or cannot be read, or a path that does not begin at the root
    wrong_target     a path from the root that ends elsewhere than at the target
    correct_label    no step is written, and the answer is right
    incorrect_label  no step is written, and the answer is wrong or missing

The steps are what precedes the first `#`; a path is judged whatever answer follows it. After at
least one thought the first steps may have been thought rather than written: the path may then begin
at any node v that the root reaches, and is taken to have come there by d(root, v) edges, the
fewest that lead there. So it is correct where d(root, v) + edges written = d(root, target).

Steps are sentences (`Tom is a terpus. Every terpus is a brimpus.`) or, in symbolic records, the
nodes after the root.
Source: Coconut, arXiv 2412.06769, section 5, which names the six classes; that paths may begin
within the graph after thoughts is how its figures are read here.
"""

import re
from itertools import pairwise

from engine.metrics import cot_text, is_correct
from preprocessing.graphs import child_lists, distances

CORRECT_PATH, LONGER_PATH, HALLUCINATION, WRONG_TARGET, CORRECT_LABEL, INCORRECT_LABEL = CLASSES = (
    "correct_path", "longer_path", "hallucination", "wrong_target", "correct_label",
    "incorrect_label",
)  # fmt: skip
SENTENCE = re.compile(r"(?:Every )?(\S+) is an? (\S+)")


def path_class(text: str, record: dict, num_thoughts: int) -> str:
    """The class of generated text, one of CLASSES.

    text: without the question.
    record: a record with the fields of a graph, checked by `graph_problem`.
    num_thoughts: latent positions that were read before the text.
    """
    written = cot_text(text)
    if not written:
        return CORRECT_LABEL if is_correct(text, record["answer"]) else INCORRECT_LABEL
    children, root, target = child_lists(record), record["root"], record["target"]
    from_root = distances(children, root)
    nodes = _read_nodes(written, record, starts_at_root=num_thoughts == 0)
    if nodes is None or nodes[0] not in from_root or (num_thoughts == 0 and nodes[0] != root):
        return HALLUCINATION
    if any(child not in children[parent] for parent, child in pairwise(nodes)):
        return HALLUCINATION
    if nodes[-1] != target:
        return WRONG_TARGET
    num_edges = from_root[nodes[0]] + len(nodes) - 1
    return CORRECT_PATH if num_edges == from_root[target] else LONGER_PATH


def _read_nodes(written: str, record: dict, starts_at_root: bool) -> list[int] | None:
    """The nodes that the written steps visit in turn; None where they cannot be read as a chain."""
    number_of = {symbol: number for number, symbol in enumerate(record["idx_to_symbol"])}
    if record["answer"] in number_of:  # a symbolic record: a step is the node it leads to
        names = written.split()
        if any(name not in number_of for name in names):
            return None
        return [record["root"]] * starts_at_root + [number_of[name] for name in names]
    nodes: list[int] = []
    for sentence in filter(None, map(str.strip, written.split("."))):
        found = SENTENCE.fullmatch(sentence)
        if found is None or any(name not in number_of for name in found.groups()):
            return None
        parent, child = (number_of[name] for name in found.groups())
        if nodes and nodes[-1] != parent:
            return None
        nodes += [child] if nodes else [parent, child]
    return nodes or None
