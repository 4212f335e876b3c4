"""graphs.py: distances, features, paths and fits against slow searches, verdicts by hand."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from preprocessing import graphs

PUBLISHED_FILE = Path(__file__).resolve().parents[2] / "shared/data/prosqa_valid.json"

# Tom(1) -> a(3), b(4) -> c(5) -> t(6) and Sam(2) -> c(5); Eva(0) -> d(7) -> e(8).
RECORD = {
    "idx_to_symbol": ["Eva", "Tom", "Sam", "a", "b", "c", "t", "d", "e"],
    "edges": [[1, 3], [1, 4], [3, 5], [4, 5], [2, 5], [5, 6], [0, 7], [7, 8]],
    "root": 1,
    "target": 6,
    "neg_target": 7,
}


def random_record(rng):
    """A graph whose edges lead from lower to higher numbers, with any two candidates."""
    num_nodes = rng.randint(2, 9)
    edges = [[a, b] for b in range(num_nodes) for a in range(b) if rng.random() < 0.3]
    target, distractor = rng.choices(range(num_nodes), k=2)
    symbols = [str(number) for number in range(num_nodes)]
    return {"idx_to_symbol": symbols, "edges": edges, "target": target, "neg_target": distractor}


def walks_up(edges, node):
    """Every walk from a node upstream, as a list of nodes."""
    yield [node]
    for parent, child in edges:
        if child == node:
            for rest in walks_up(edges, parent):
                yield [node, *rest]


def features_by_walks(record, node):
    walks = list(walks_up(record["edges"], node))
    ancestors = {walk[-1] for walk in walks}
    distance = {a: min(len(walk) - 1 for walk in walks if walk[-1] == a) for a in ancestors}
    parentless = ancestors - {child for _, child in record["edges"]}
    return {
        "in_degree": sum(child == node for _, child in record["edges"]),
        "ancestors_at_1": sum(d == 1 for d in distance.values()),
        "ancestors_at_2": sum(d == 2 for d in distance.values()),
        "ancestors_at_3": sum(d == 3 for d in distance.values()),
        "persons_within_2": sum(distance[a] in (1, 2) for a in parentless),
        "parentless_distance": min(distance[a] for a in parentless),
    }


def candidates_by_walks(record):
    return [features_by_walks(record, record[name]) for name in ("target", "neg_target")]


def test_features_are_those_counted_by_hand():
    parents = graphs.parent_lists(RECORD)
    assert graphs.candidate_features(parents, 6) == {
        "in_degree": 1, "ancestors_at_1": 1, "ancestors_at_2": 3, "ancestors_at_3": 1,
        "persons_within_2": 1, "parentless_distance": 2,
    }  # fmt: skip
    assert graphs.candidate_features(parents, 7) == {
        "in_degree": 1, "ancestors_at_1": 1, "ancestors_at_2": 0, "ancestors_at_3": 0,
        "persons_within_2": 1, "parentless_distance": 1,
    }  # fmt: skip


def test_features_and_differences_are_those_of_all_walks_upstream():
    rng = random.Random(0)
    for _ in range(300):
        record = random_record(rng)
        target, distractor = candidates_by_walks(record)
        assert graphs.candidate_features(graphs.parent_lists(record), record["target"]) == target
        wanted = {name: target[name] - distractor[name] for name in target}
        assert graphs.feature_differences(record) == wanted


def test_a_cycle_or_a_duplicate_edge_changes_no_rule():
    doubled = RECORD | {"edges": RECORD["edges"] * 2}
    assert graphs.feature_differences(doubled) == graphs.feature_differences(RECORD)
    cycle = {"idx_to_symbol": ["a", "b"], "edges": [[0, 1], [1, 0]]}
    parents = graphs.parent_lists(cycle)
    assert graphs.candidate_features(parents, 0)["parentless_distance"] == 2


def test_verdicts_follow_the_two_rules_and_turn_round_with_the_candidates():
    assert graphs.rule_verdicts(RECORD) == {
        "fewer_persons_upstream": "tied", "farther_from_parentless": "right"
    }  # fmt: skip
    exchange = {"right": "wrong", "wrong": "right", "tied": "tied"}
    rng, found = random.Random(1), set()
    for _ in range(200):
        record = random_record(rng)
        target, distractor = candidates_by_walks(record)
        verdicts = graphs.rule_verdicts(record)
        persons = distractor["persons_within_2"] - target["persons_within_2"]
        farther = target["parentless_distance"] - distractor["parentless_distance"]
        wanted = {"fewer_persons_upstream": persons, "farther_from_parentless": farther}
        for name, margin in wanted.items():
            assert verdicts[name] == ("right" if margin > 0 else "wrong" if margin else "tied")
        other = {**record, "target": record["neg_target"], "neg_target": record["target"]}
        assert graphs.rule_verdicts(other) == {n: exchange[v] for n, v in verdicts.items()}
        found |= set(verdicts.values())
    assert found == set(graphs.VERDICTS)


def test_optimal_nodes_are_those_of_all_shortest_paths():
    rng, num_checked = random.Random(2), 0
    for _ in range(300):
        record = random_record(rng)
        root, target = 0, record["target"]
        paths = [walk[::-1] for walk in walks_up(record["edges"], target) if walk[-1] == root]
        if not paths or target == root:
            continue
        shortest = [path for path in paths if len(path) == min(map(len, paths))]
        children, parents = graphs.child_lists(record), graphs.parent_lists(record)
        wanted = [sorted(set(nodes)) for nodes in list(zip(*shortest, strict=True))[1:]]
        assert graphs.optimal_nodes(children, parents, root, target) == wanted
        assert graphs.num_shortest_paths(children, root, target) == len(shortest)
        num_checked += 1
    assert num_checked > 50


def log_likelihood(weights, differences):
    scores = [sum(w * d for w, d in zip(weights, point, strict=True)) for point in differences]
    penalty = graphs.RIDGE / 2 * sum(w * w for w in weights)
    return sum(math.log(1 / (1 + math.exp(-score))) for score in scores) - penalty


@pytest.mark.parametrize("num_features", [1, 2, 4])
def test_fitted_weights_beat_all_nearby_weights(num_features):
    rng = random.Random(num_features)
    differences = [
        [rng.randint(-3, 3) + (rng.random() < 0.4) for _ in range(num_features)] for _ in range(80)
    ]
    weights = graphs.fit_weights(differences)
    best = log_likelihood(weights, differences)
    for _ in range(100):
        for size in (1e-4, 0.1, 3):
            other = [w + rng.gauss(0, size) for w in weights]
            assert log_likelihood(other, differences) < best


def test_a_feature_that_decides_everything_has_a_finite_weight():
    (weight,) = graphs.fit_weights([(5,)] * 10_000)
    assert 0 < weight < 10
    assert graphs.fit_weights([(0, 0)] * 10) == [0.0, 0.0]
    assert graphs.fit_weights([]) == []


def test_no_record_helps_to_judge_itself_and_other_records_judge_all():
    rng = random.Random(3)
    records, others = ([random_record(rng) for _ in range(n)] for n in (23, 50))
    names = graphs.FITTED_RULES["ancestors"]

    def points(chosen):
        return [[graphs.feature_differences(record)[n] for n in names] for record in chosen]

    def judge(record, weights):
        (point,) = points([record])
        score = sum(w * d for w, d in zip(weights, point, strict=True))
        return "tied" if abs(score) < 1e-9 else "right" if score > 0 else "wrong"

    by_fold = [
        judge(r, graphs.fit_weights(points(o for j, o in enumerate(records) if (i - j) % 5)))
        for i, r in enumerate(records)
    ]
    assert graphs.fitted_verdicts(records)["ancestors"] == by_fold
    weights = graphs.fit_weights(points(others))
    by_others = [judge(record, weights) for record in records]
    assert graphs.fitted_verdicts(records, others)["ancestors"] == by_others
    assert set(graphs.fitted_verdicts([RECORD])["ancestors"]) == {"tied"}


@pytest.mark.parametrize("counts", [(557, 235, 8), (3, 0, 0), (0, 7, 0), (1, 1, 6)])
def test_scores_count_ties_as_half_and_intervals_are_wilsons(counts):
    """The ends of the interval are the shares from which the score is 1.96 deviations away."""
    share, low, high = graphs.rule_score(Counter(dict(zip(graphs.VERDICTS, counts, strict=True))))
    num_records = sum(counts)
    assert share == (counts[0] + counts[1] / 2) / num_records
    for end in (low, high):
        deviation = math.sqrt(end * (1 - end) / num_records)
        assert abs(share - end) == pytest.approx(1.959964 * deviation, abs=1e-9)


@pytest.mark.skipif(not PUBLISHED_FILE.exists(), reason="needs the published file")
def test_rules_reach_on_the_published_file_what_the_docs_say():
    """Both rules recomputed from walks, so that the docs' table does not rest on this module."""
    records = json.loads(PUBLISHED_FILE.read_text("utf-8"))
    counts = graphs.all_verdicts(records)
    wanted = {"fewer_persons_upstream": Counter(), "farther_from_parentless": Counter()}
    for record in records:
        target, distractor = candidates_by_walks(record)
        persons = distractor["persons_within_2"] - target["persons_within_2"]
        farther = target["parentless_distance"] - distractor["parentless_distance"]
        for name, margin in zip(wanted, (persons, farther), strict=True):
            wanted[name]["right" if margin > 0 else "wrong" if margin else "tied"] += 1
    assert {name: counts[name] for name in wanted} == wanted
    assert [wanted["fewer_persons_upstream"][v] for v in graphs.VERDICTS] == [215, 82, 3]
    assert [wanted["farther_from_parentless"][v] for v in graphs.VERDICTS] == [262, 31, 7]
