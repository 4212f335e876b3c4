"""The graph in a ProsQA record, and rules that answer its question without looking at the root.

A record holds `idx_to_symbol` (the name or token of each node), `edges` (pairs parent, child),
`root`, `target` and `neg_target` (the distractor), all as node numbers. Nodes 0 and 1 are the two
heads, of which the root is one. A person is a node without parents, whatever its name.

A rule reads only the ancestors of the two candidates, so what it gets right needs no search from
the root. Its verdict on a record is RIGHT, TIED or WRONG; a score counts ties as half. Some rules
compare one number; the others weigh several by logistic regression on the differences between the
two candidates, without an intercept, since only the root distinguishes the candidates:
P(first is the target) = 1 / (1 + exp(-w . (features of the first - features of the second))).

describe.py prints the scores of a file, analysis splits accuracy by verdict, and prosqa.py draws
graphs. Needs the standard library alone.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

GRAPH_FIELDS = ("idx_to_symbol", "edges", "root", "target", "neg_target")

RIGHT, TIED, WRONG = VERDICTS = ("right", "tied", "wrong")

# Rules that compare one number of `candidate_features`: (its name, sign), where +1 says that the
# candidate with the larger number is the target, and -1 the one with the smaller.
RULES = {
    "fewer_persons_upstream": ("persons_within_2", -1),
    "farther_from_parentless": ("parentless_distance", 1),
}
# Rules whose weights are fitted: the features that they weigh.
ANCESTORS = ("ancestors_at_1", "ancestors_at_2", "ancestors_at_3")
FITTED_RULES = {
    "ancestors_and_persons": (*ANCESTORS, "persons_within_2"),
    "ancestors": ANCESTORS,
    "in_degree": ("in_degree",),
    "all_features": (*ANCESTORS, "persons_within_2", "parentless_distance"),
}

RIDGE = 1.0  # keeps weights finite where one feature decides every record
NUM_FOLDS = 5


def has_graph(record: dict) -> bool:
    """Return whether the record has any of the graph fields."""
    return any(name in record for name in GRAPH_FIELDS)


def graph_problem(record: dict) -> str | None:
    """Return what is wrong with the graph of one record, or None."""
    symbols, edges = record.get("idx_to_symbol"), record.get("edges")
    if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
        return "idx_to_symbol: wanted a list of texts"

    def is_node(number: object) -> bool:
        return type(number) is int and 0 <= number < len(symbols)

    if not isinstance(edges, list) or not all(
        isinstance(edge, list) and len(edge) == 2 and all(map(is_node, edge)) for edge in edges
    ):
        return f"edges: wanted pairs of node numbers from 0 to {len(symbols) - 1}"
    for name in ("target", "neg_target"):
        if not is_node(record.get(name)):
            return f"{name}: got {record.get(name)!a:.40}, wanted a node number"
    if type(record.get("root")) is not int or record["root"] not in (0, 1) or len(symbols) < 2:
        return f"root: got {record.get('root')!a:.40}, wanted 0 or 1, the two heads of a graph"
    children = child_lists(record)
    root = record["root"]
    for name, head in (("target", root), ("neg_target", 1 - root)):
        if record[name] not in distances(children, head):
            return f"{name}: node {record[name]} cannot be reached from node {head}"
    return None


def child_lists(record: dict) -> list[list[int]]:
    """Return the children of each node; a duplicate edge gives a child twice."""
    children: list[list[int]] = [[] for _ in record["idx_to_symbol"]]
    for parent, child in record["edges"]:
        children[parent].append(child)
    return children


def parent_lists(record: dict) -> list[list[int]]:
    """Return the parents of each node, without duplicates."""
    parents: list[list[int]] = [[] for _ in record["idx_to_symbol"]]
    for parent, child in record["edges"]:
        if parent not in parents[child]:
            parents[child].append(parent)
    return parents


def distances(neighbours: Sequence[Sequence[int]], start: int) -> dict[int, int]:
    """Return the number of edges from `start` to each node it reaches, nearest first."""
    found = {start: 0}
    queue = [start]
    for node in queue:
        for neighbour in neighbours[node]:
            if neighbour not in found:
                found[neighbour] = found[node] + 1
                queue.append(neighbour)
    return found


def num_shortest_paths(children: Sequence[Sequence[int]], start: int, end: int) -> int:
    """Return how many shortest paths lead from `start` to `end`."""
    distance = distances(children, start)
    counts = Counter({start: 1})
    for node in distance:
        for child in set(children[node]):
            if distance[child] == distance[node] + 1:
                counts[child] += counts[node]
    return counts[end]


def optimal_nodes(
    children: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], root: int, target: int
) -> list[list[int]]:
    """Return, for each distance from 1 on, the nodes on any shortest path from root to target.

    The last list holds the target alone.
    """
    down, up = distances(children, root), distances(parents, target)
    hops = down[target]
    by_distance: list[list[int]] = [[] for _ in range(hops)]
    for node, distance in down.items():
        if distance and distance + up.get(node, hops) == hops:
            by_distance[distance - 1].append(node)
    return [sorted(nodes) for nodes in by_distance]


def candidate_features(parents: Sequence[Sequence[int]], node: int) -> dict[str, int]:
    """Return what the rules read of a candidate.

    `ancestors_at_k`: nodes exactly k edges upstream; `persons_within_2`: nodes without parents one
    or two edges upstream; `parentless_distance`: edges to the nearest node without parents (0 for
    such a node itself; where a cycle leaves none, as many as there are nodes).
    """
    upstream = distances(parents, node)
    at = Counter(upstream.values())
    persons = [distance for ancestor, distance in upstream.items() if not parents[ancestor]]
    return {
        "in_degree": len(parents[node]),
        **{name: at[k] for k, name in enumerate(ANCESTORS, start=1)},
        "persons_within_2": sum(1 <= distance <= 2 for distance in persons),
        "parentless_distance": min(persons, default=len(parents)),
    }


def feature_differences(record: dict) -> dict[str, int]:
    """Return each feature of the target less that of the distractor."""
    parents = parent_lists(record)
    target, distractor = (
        candidate_features(parents, record[name]) for name in ("target", "neg_target")
    )
    return {name: target[name] - distractor[name] for name in target}


def verdict(score: float) -> str:
    """Return the verdict of a rule; score: the target's less the distractor's."""
    return TIED if abs(score) < 1e-9 else RIGHT if score > 0 else WRONG


def rule_verdicts(record: dict) -> dict[str, str]:
    """Return the verdict of each of RULES on the record: "right", "tied" or "wrong"."""
    difference = feature_differences(record)
    return {name: verdict(sign * difference[feature]) for name, (feature, sign) in RULES.items()}


def solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Return x with matrix x = vector, for a positive definite matrix (no pivots needed)."""
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i, row in enumerate(rows):
        for lower in rows[i + 1 :]:
            factor = lower[i] / row[i]
            for j in range(i, len(row)):
                lower[j] -= factor * row[j]
    solution: list[float] = []
    for i in reversed(range(len(rows))):
        known = sum(a * x for a, x in zip(rows[i][i + 1 : -1], solution, strict=True))
        solution.insert(0, (rows[i][-1] - known) / rows[i][i])
    return solution


def fit_weights(differences: Iterable[Sequence[int]]) -> list[float]:
    """Return the weights w that maximise sum(log sigmoid(w . d)) - RIDGE / 2 * |w|^2.

    differences: for each record, features of the target less those of the distractor. Newton's
    steps, halved until the sum rises; the same data give the same weights.
    """
    counts = sorted(Counter(map(tuple, differences)).items())
    size = len(counts[0][0]) if counts else 0

    def objective(weights: Sequence[float]) -> float:
        total = -RIDGE / 2 * sum(w * w for w in weights)
        for values, count in counts:
            score = sum(w * v for w, v in zip(weights, values, strict=True))
            total -= count * (math.log1p(math.exp(-abs(score))) + max(-score, 0.0))
        return total

    weights = [0.0] * size
    for _ in range(50):
        slope = [-RIDGE * w for w in weights]
        curvature = [[RIDGE * (i == j) for j in range(size)] for i in range(size)]
        for values, count in counts:
            score = sum(w * v for w, v in zip(weights, values, strict=True))
            right = (1 + math.tanh(score / 2)) / 2
            for i, value in enumerate(values):
                slope[i] += count * (1 - right) * value
                for j, other in enumerate(values):
                    curvature[i][j] += count * right * (1 - right) * value * other
        step = solve(curvature, slope)
        before = objective(weights)
        while max(map(abs, step), default=0.0) > 1e-10:
            moved = [w + s for w, s in zip(weights, step, strict=True)]
            if objective(moved) >= before:
                break
            step = [s / 2 for s in step]
        else:
            return weights
        weights = moved
    return weights


def fitted_verdicts(
    records: Sequence[dict], fit_records: Sequence[dict] | None = None
) -> dict[str, list[str]]:
    """Return the verdict of each of FITTED_RULES on each record.

    fit_records: what the weights are fitted on. By default the records are split into NUM_FOLDS
    folds, each judged by weights fitted on the others, so that no record helps to judge itself.
    """
    judged = [feature_differences(record) for record in records]
    known = None if fit_records is None else [feature_differences(r) for r in fit_records]
    verdicts = {}
    for name, features in FITTED_RULES.items():
        points = [tuple(difference[feature] for feature in features) for difference in judged]
        if known is not None:
            weights = [fit_weights([[d[feature] for feature in features] for d in known])]
        else:
            folds = range(min(NUM_FOLDS, len(points)))
            weights = [
                fit_weights(p for i, p in enumerate(points) if i % len(folds) != fold)
                for fold in folds
            ]
        verdicts[name] = [
            verdict(sum(w * v for w, v in zip(weights[i % len(weights)], point, strict=False)))
            for i, point in enumerate(points)
        ]
    return verdicts


def all_verdicts(
    records: Sequence[dict], fit_records: Sequence[dict] | None = None
) -> dict[str, Counter]:
    """Return how often each rule, fitted or not, is right, tied and wrong on the records."""
    single = [rule_verdicts(record) for record in records]
    counts = {name: Counter(verdicts[name] for verdicts in single) for name in RULES}
    fitted = fitted_verdicts(records, fit_records)
    return counts | {name: Counter(verdicts) for name, verdicts in fitted.items()}


def rule_score(counts: Counter) -> tuple[float, float, float]:
    """Return the share that a rule gets right, ties counted half, and its 95 % Wilson interval.

    The interval treats the score as a share of independent yes-or-no outcomes, which makes it a
    little too wide where many records tie.
    """
    num_records, z = counts.total(), 1.959964
    share = (counts[RIGHT] + counts[TIED] / 2) / num_records
    middle = share + z * z / (2 * num_records)
    half = z * math.sqrt(share * (1 - share) / num_records + (z / (2 * num_records)) ** 2)
    scale = 1 + z * z / num_records
    return share, (middle - half) / scale, (middle + half) / scale
