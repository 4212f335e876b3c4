"""Graphs of records, where texts name nodes, and what values come to, against loops and by hand."""

import json
import random

import numpy as np
import pytest

from analysis.graph_values import (
    AHEAD,
    GROUPS,
    Graph,
    Place,
    describe_groups,
    describe_values,
    edge_spans,
    name_branch,
    next_place,
    read_graphs,
)
from preprocessing import prosqa
from utils import UserError

# 0 is the root, 5 the target; 1 - 6 cannot be reached, 3 is a detour, 7 is its leaf.
RECORD = {
    "question": "Every x is a c. r is a x. r is a b. Every b is a t. s is a d. Every c is a e.",
    "answer": "r is a t.",
    "steps": ["r is a b.", "Every b is a t."],
    "idx_to_symbol": ["r", "s", "b", "x", "c", "t", "d", "e"],
    "edges": [[0, 2], [0, 3], [3, 4], [2, 5], [1, 6], [4, 7]],
    "root": 0,
    "target": 5,
    "neg_target": 6,
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Kind of data -> records of our generator."""
    folder = tmp_path_factory.mktemp("prosqa")
    sizes = ["--train", "1", "--test", "1", "--valid", "15"]
    made = {}
    for kind, options in (("prosqa", []), ("prosqa_symbols", ["--symbols"])):
        assert prosqa.main(["--out", str(folder), "--seed", "3", *sizes, *options]) == 0
        made[kind] = json.loads((folder / f"{kind}_valid.json").read_text())
    return made


def test_groups_lie_within_each_other():
    graph = Graph.of(RECORD)
    assert graph.distances == [0, None, 1, 1, 2, 2, None, 3]
    assert graph.heights == [2, 1, 1, 2, 1, 0, 0, 0]
    assert graph.members(1) == {
        "unreachable": [1, 6], "reached": [0, 2, 3], "frontier": [2, 3], "optimal": [2],
    }  # fmt: skip
    assert graph.members(4) == {
        "unreachable": [1, 6], "reached": [0, 2, 3, 4, 5, 7], "frontier": [], "optimal": [],
    }  # fmt: skip
    assert graph.closest_group(1) == [
        "reached", "unreachable", "optimal", "frontier", AHEAD, AHEAD, "unreachable", AHEAD,
    ]  # fmt: skip


def test_edges_are_grouped_as_the_node_they_start_from():
    graph = Graph.of(RECORD)
    assert graph.edge_members(0)["optimal"] == [0]  # r - b, but not r - x
    assert graph.edge_members(1) == {
        "unreachable": [4], "reached": [0, 1, 2, 3], "frontier": [2, 3], "optimal": [3],
    }  # fmt: skip


def test_distances_and_heights_are_those_of_single_walks(generated):
    for record in generated["prosqa"][:5]:
        graph = Graph.of(record)
        ends = {start: [b for a, b in record["edges"] if a == start] for start in range(100)}

        def length(start, goals, ends=ends):
            """Edges of the shortest path from `start` to one of `goals`, None without one."""
            layer, seen, count = {start}, set(), 0
            while layer and not layer & goals:
                seen |= layer
                layer, count = {b for a in layer for b in ends[a]} - seen, count + 1
            return count if layer else None

        leaves = {node for node in range(len(graph.names)) if not ends[node]}
        for node in range(len(graph.names)):
            assert graph.distances[node] == length(record["root"], {node})
            assert graph.heights[node] == length(node, leaves)
            total = len(graph.optimal) - 1
            on_path = graph.distances[node] is not None and (
                length(node, {record["target"]}) == total - graph.distances[node]
            )
            assert any(node in nodes for nodes in graph.optimal) == on_path


def test_sentences_name_the_node_after_k_thoughts_and_symbols_the_next(generated):
    for kind, shift in (("prosqa", 0), ("prosqa_symbols", 1)):
        for record in generated[kind]:
            graph, hops = Graph.of(record), len(record["steps"])
            for k in range(hops + 2):
                place = next_place(graph, record["steps"], record["answer"], k)
                assert place.depth == min(k + shift, hops)
    graph = Graph.of(RECORD)
    places = [next_place(graph, RECORD["steps"], RECORD["answer"], k) for k in range(3)]
    assert places == [Place("", "", 0), Place("Every", "", 1), Place("### r is a", ".", 2)]


def test_every_edge_is_found_in_the_question(generated):
    for records in generated.values():
        for record in records:
            graph = Graph.of(record)
            for (start, end), spans in zip(
                graph.edges, edge_spans(graph, record["question"]), strict=True
            ):
                (span,) = spans
                words = record["question"][slice(*span)].split()
                assert (words[0], words[-1]) == (graph.names[start], graph.names[end])
    spans = edge_spans(Graph.of(RECORD), RECORD["question"])
    assert [RECORD["question"][begin:end] for (begin, end), *_ in spans] == [
        "r is a b", "r is a x", "x is a c", "b is a t", "s is a d", "c is a e",
    ]  # fmt: skip


def test_names_are_scored_from_where_the_tokens_part():
    # A tokenizer that joins "Every" and the blank to a token of their own before "r".
    known = {"Every": [1], "Every r": [9, 2], "Every s": [1, 3, 4]}
    graph = Graph.of(RECORD)

    def tokenize(texts):
        return [known.get(text, [1, 5]) for text in texts]

    branch = name_branch(tokenize, graph, Place("Every", "", 1), 7, [8])
    assert (branch.column, branch.forced_ids) == (7, [8])
    assert branch.continuations[:3] == [[9, 2], [1, 3, 4], [1, 5]]
    known["Every r"] = [1, 2]
    branch = name_branch(tokenize, graph, Place("Every", "", 1), 7, [8])
    assert (branch.forced_ids, branch.continuations[:2]) == ([8, 1], [[2], [3, 4]])


def test_summaries_are_means_over_records_of_means_over_nodes():
    generator = random.Random(0)
    graphs = [Graph.of(RECORD), Graph.of(RECORD | {"root": 1, "target": 6, "neg_target": 5})]
    depths = [[0, 1, 2], [0, 1]]
    values = [[np.array([generator.random() for _ in range(8)]) for _ in own] for own in depths]
    found = describe_values(graphs, depths, values)
    for k in range(3):
        for group in GROUPS:
            means = []
            for graph, own, by_k in zip(graphs, depths, values, strict=True):
                if k < len(own) and (nodes := graph.members(own[k])[group]):
                    means.append(sum(by_k[k][node] for node in nodes) / len(nodes))
            entry = found["groups"][group][k]
            assert (entry["k"], entry["n"]) == (k, len(means))
            assert entry["mean"] == pytest.approx(sum(means) / len(means))
        curves, shares = [], []
        for graph, own, by_k in zip(graphs, depths, values, strict=True):
            if k < len(own):
                frontier = graph.members(own[k])["frontier"]
                others = [node for node in range(8) if node not in frontier]
                pairs = [by_k[k][a] > by_k[k][b] for a in frontier for b in others]
                curves.append(sum(pairs) / len(pairs))
                ranked = sorted(by_k[k], reverse=True)
                shares.append([sum(ranked[:n]) / sum(ranked) for n in (1, 2, 3)])
        assert found["auc"][k]["mean"] == pytest.approx(np.mean(curves))
        assert found["top"][k] == pytest.approx(np.mean(shares, axis=0))
    # After one thought record 0 has b (optimal, height 1) and x (height 2), record 1 its target d.
    heights = {
        (entry["height"], entry["nodes"]): entry["mean"]
        for entry in found["height"]
        if entry["k"] == 1
    }
    assert heights == pytest.approx({
        (1, "optimal"): values[0][1][2], (2, "other"): values[0][1][3],
        (0, "optimal"): values[1][1][6],
    })  # fmt: skip


def test_edges_that_no_text_names_are_left_out_of_means():
    members = [[{group: [] for group in GROUPS} | {"reached": [0, 1]}]]
    found = describe_groups(members, [[np.array([0.5, np.nan])]])
    assert found["reached"][0]["mean"] == 0.5
    assert found["frontier"][0]["n"] == 0


def test_missing_and_broken_graphs_are_reported():
    plain = {"question": "1 + 1", "answer": "2", "steps": []}
    assert read_graphs([plain], "a.json", are_required=False) is None
    with pytest.raises(UserError, match="a.json: holds no graphs .* leave --graphs out"):
        read_graphs([plain], "a.json", are_required=True)
    with pytest.raises(UserError, match="a.json: record 1: idx_to_symbol: wanted a list of texts"):
        read_graphs([RECORD, plain], "a.json", are_required=False)
    graph = Graph.of(RECORD)
    with pytest.raises(UserError, match=r"step 1, 'It is so.', names no node that the root"):
        next_place(graph, ["It is so."], "r is a t.", 0)
    with pytest.raises(UserError, match=r"the answer, '### s is a d.', names no node"):
        next_place(graph, [], "s is a d.", 0)
