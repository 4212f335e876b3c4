"""The values that a model gives the nodes of a record's graph after k thoughts.

The value of a node after k thoughts is the probability of its name where the text that follows
these thoughts names a node: the product over the name's tokens after the end marker and the words
before the name. That text is the next step ("Every" and a name; for symbols the name at once), and
where no step is left the answer ("### Tom is a" and a name). The node that the gold text names
there is d edges from the root: d = k in sentences, whose steps begin with their subject, and
d = k + 1 in symbols. With c_thought above 1, k counts steps that the thoughts have replaced.

Nodes are grouped by their distance from the root: unreachable; reached, at most d; frontier, d;
optimal, the frontier's nodes on a shortest path to the target. Each of the last three contains
the next. Edges are grouped like the node they start from, at d = k; an optimal edge also ends on a
shortest path.
Source: Hao et al. 2024, arXiv 2412.06769, section 5; Zhu et al. 2025, arXiv 2505.12514, groups.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.continuations import Branch
from analysis.statistics import area_under_curve, mean_interval
from preprocessing.graphs import (
    child_lists,
    distances,
    graph_problem,
    has_graph,
    optimal_nodes,
    parent_lists,
)
from utils import UserError

GROUPS = ("unreachable", "reached", "frontier", "optimal")
AHEAD = "ahead"  # reachable, but farther than d: in none of the groups
NUM_TOP = 3
SENTENCE_END = re.compile(r"[.|?]")


@dataclass(frozen=True)
class Graph:
    """The graph of a record, nodes by number.

    distances: edges from the root, None where it does not lead; heights: edges to the nearest node
    without children, None where a cycle has none.
    optimal: for each distance, 0 included, the nodes on a shortest path from root to target.
    """

    names: list[str]
    edges: list[tuple[int, int]]
    root: int
    target: int
    distractor: int
    distances: list[int | None]
    heights: list[int | None]
    optimal: list[list[int]]

    @classmethod
    def of(cls, record: dict) -> "Graph":
        """The graph of a record in which `graph_problem` finds nothing wrong."""
        children, parents = child_lists(record), parent_lists(record)
        root, target = record["root"], record["target"]
        nodes = range(len(children))
        down = distances(children, root)
        # All leaves at once: a node before them all, of which they are the children.
        leaves = [node for node in nodes if not children[node]]
        up = distances([*parents, leaves], len(children))
        return cls(
            names=record["idx_to_symbol"],
            edges=[tuple(edge) for edge in record["edges"]],
            root=root,
            target=target,
            distractor=record["neg_target"],
            distances=[down.get(node) for node in nodes],
            heights=[up[node] - 1 if node in up else None for node in nodes],
            optimal=[[root], *optimal_nodes(children, parents, root, target)],
        )

    def members(self, depth: int) -> dict[str, list[int]]:
        """The nodes of each of GROUPS where the frontier is `depth` edges from the root."""
        nodes = range(len(self.names))
        near = [node for node in nodes if self.distances[node] is not None]
        return {
            "unreachable": [node for node in nodes if self.distances[node] is None],
            "reached": [node for node in near if self.distances[node] <= depth],
            "frontier": [node for node in near if self.distances[node] == depth],
            "optimal": self.optimal[depth] if depth < len(self.optimal) else [],
        }

    def edge_members(self, depth: int) -> dict[str, list[int]]:
        """The same for edges, by their index in `edges`."""
        nodes = self.members(depth)
        found = {
            group: [i for i, (start, _) in enumerate(self.edges) if start in nodes[group]]
            for group in GROUPS
        }
        ends = self.members(depth + 1)["optimal"]
        found["optimal"] = [i for i in found["optimal"] if self.edges[i][1] in ends]
        return found

    def closest_group(self, depth: int) -> list[str]:
        """For each node the innermost of GROUPS that it is in, or AHEAD."""
        labels = [AHEAD] * len(self.names)
        for group, nodes in self.members(depth).items():
            for node in nodes:
                labels[node] = group
        return labels


def read_graphs(records: Sequence[dict], path: str, are_required: bool) -> list[Graph] | None:
    """The graph of each record; None where no record has any.

    Raises: UserError for a graph that is broken or missing while others are there, and for none at
        all where they are required.
    """
    if not any(map(has_graph, records)):
        if are_required:
            raise UserError(
                f"{path}: holds no graphs (idx_to_symbol, edges, root, target, neg_target); leave"
                " --graphs out or name a file of ProsQA records"
            )
        return None
    for index, record in enumerate(records):
        if problem := graph_problem(record):
            raise UserError(f"{path}: record {index}: {problem}; make the file again")
    return [Graph.of(record) for record in records]


@dataclass(frozen=True)
class Place:
    """Where the text that follows some thoughts names a node.

    before: the words before the name; after: what follows it up to a blank.
    depth: edges from the root to the node that the gold text names.
    """

    before: str
    after: str
    depth: int


def next_place(graph: Graph, steps: Sequence[str], answer: str, num_replaced: int) -> Place:
    """Where a node is named after thoughts that replaced so many steps.

    Raises: UserError where the text names no node that the root leads to.
    """
    is_step = num_replaced < len(steps)
    text = steps[num_replaced] if is_step else f"### {answer}"
    mentions = find_names(graph, text)
    # A step begins with the node that it continues from; an answer ends with the target.
    begin, end, node = mentions[0 if is_step else -1] if mentions else (0, 0, None)
    if node is None or graph.distances[node] is None:
        where = f"step {num_replaced + 1}" if is_step else "the answer"
        raise UserError(f"{where}, {text!r}, names no node that the root of its graph leads to")
    after = re.match(r"\S*", text[end:]).group()
    return Place(text[:begin].rstrip(), after, graph.distances[node])


def find_names(graph: Graph, text: str) -> list[tuple[int, int, int]]:
    """(begin, end, node) of each name of a node that occurs in `text` as a word, in order."""
    node_of = {name: node for node, name in enumerate(graph.names)}
    names = "|".join(re.escape(name) for name in sorted(node_of, key=len, reverse=True))
    found = re.finditer(rf"(?<!\w)(?:{names})(?!\w)", text)
    return [(match.start(), match.end(), node_of[match.group()]) for match in found]


def name_branch(
    tokenize: Callable[[list[str]], list[list[int]]],
    graph: Graph,
    place: Place,
    column: int,
    marker_ids: list[int],
) -> Branch:
    """The branch whose continuations are the names of all nodes at `place`.

    tokenize: texts -> ids, without special tokens.
    column: the last one of the thoughts; marker_ids: what closes them.
    """
    before = f"{place.before} " if place.before else ""
    words, *whole = tokenize([place.before, *(f"{before}{n}{place.after}" for n in graph.names)])
    shared = len(words)
    for ids in whole:
        # Some tokenizers split the last word before a name differently than on its own.
        shared = min(shared, _num_equal(words, ids))
    return Branch(column, marker_ids + words[:shared], [ids[shared:] for ids in whole])


def _num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def edge_spans(graph: Graph, question: str) -> list[list[tuple[int, int]]]:
    """For each edge, the characters (begin, end) of the question that name its two nodes.

    An edge is a sentence, or a part up to a bar, that names these two nodes alone.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in graph.edges]
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, edge in enumerate(graph.edges):
        numbers.setdefault(edge, []).append(number)
    ends = [match.start() for match in SENTENCE_END.finditer(question)]
    for begin, end in zip([0, *ends], [*ends, len(question)], strict=True):
        mentions = find_names(graph, question[begin:end])
        if len(mentions) == 2:
            (first, _, start), (_, last, stop) = mentions
            for number in numbers.get((start, stop), []):
                spans[number].append((begin + first, begin + last))
    return spans


def describe_groups(
    members: Iterable[Iterable[dict[str, list[int]]]], values: Sequence[Sequence[np.ndarray]]
) -> dict[str, list[dict]]:
    """Group -> for each k the mean over records of the mean value of its nodes, or edges.

    members: for each record and k what `Graph.members` returns; values: for each record and k one
    number a node, nan where there is none.
    """
    means: dict[str, list[list[float]]] = {group: [] for group in GROUPS}
    for by_k, values_by_k in zip(members, values, strict=True):
        for k, (nodes, own) in enumerate(zip(by_k, values_by_k, strict=True)):
            for group in GROUPS:
                if k == len(means[group]):
                    means[group].append([])
                known = own[nodes[group]]
                known = known[~np.isnan(known)]
                means[group][k] += [float(known.mean())] if len(known) else []
    return {group: [mean_interval(each) for each in by_k] for group, by_k in means.items()}


def describe_values(
    graphs: Sequence[Graph], depths: Sequence[Sequence[int]], values: Sequence[Sequence[np.ndarray]]
) -> dict[str, Any]:
    """What values show over records, for each number of thoughts k = 0, 1, ...

    depths: for each record and k, d; values: for each record and k, (nodes,) values.
    groups: by `describe_groups`. auc: how often a node of the frontier is worth more than one that
    is not, a mean over records. top: the share of all nodes' summed value that the one, two and
    three most valued nodes have. height: the values of frontier nodes by height, optimal ones and
    others apart.
    """
    num_k = max(map(len, values))
    members = [[graph.members(d) for d in own] for graph, own in zip(graphs, depths, strict=True)]
    groups = describe_groups(members, values)
    curves, tops, heights = [[] for _ in range(num_k)], [[] for _ in range(num_k)], {}
    for graph, by_k, own in zip(graphs, members, values, strict=True):
        for k, (nodes, value) in enumerate(zip(by_k, own, strict=True)):
            is_frontier = np.isin(np.arange(len(value)), nodes["frontier"])
            curve = area_under_curve(value, is_frontier)
            curves[k] += [] if curve is None else [curve]
            largest = np.sort(value)[::-1][:NUM_TOP].cumsum() / value.sum()
            tops[k].append(np.pad(largest, (0, NUM_TOP - len(largest)), mode="edge"))
            for node in nodes["frontier"]:
                kind = "optimal" if node in nodes["optimal"] else "other"
                heights.setdefault((k, graph.heights[node], kind), []).append(float(value[node]))
    known = sorted(key for key in heights if key[1] is not None)
    return {
        "groups": {g: [{"k": k} | each for k, each in enumerate(groups[g])] for g in GROUPS},
        "auc": [{"k": k} | mean_interval(each) for k, each in enumerate(curves)],
        "top": [np.mean(each, axis=0).tolist() for each in tops],
        "height": [
            {"k": k, "height": height, "nodes": kind} | mean_interval(heights[k, height, kind])
            for k, height, kind in known
        ],
    }
