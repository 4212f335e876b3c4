"""Generate ProsQA: find, in a shuffled list of facts, which of two concepts a person is.

Writes prosqa_train.json, prosqa_valid.json and prosqa_test.json in the published format, and with
`--ood` four harder sets beside them. Each record is a directed acyclic graph with two persons at
its head, a target that only the asked person reaches and a distractor that only the other one
reaches; its steps are a shortest path. The same seed gives the same bytes on every machine, and no
graph stands twice in all the files of one run, names aside. Statistics and pictures of the result
are left to describe.py; how the recipe was fitted is told in docs/data.md.

Carries out SPEC section 1 for ProsQA. Source: construction in the appendix of arXiv 2412.06769,
refitted to the published validation file.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PERSONS = [
    "Alex", "Bob", "Carol", "Davis", "Eva", "Fae", "Gabriel", "Jack", "Max", "Oliver", "Polly",
    "Rex", "Sally", "Sam", "Stella", "Tom", "Wren",
]  # fmt: skip
CONCEPTS = [
    "bompus", "boompus", "brimpus", "chorpus", "dumpus", "felpus", "fompus", "gerpus", "gorpus",
    "grimpus", "gwompus", "hilpus", "impus", "jelpus", "jompus", "kerpus", "lempus", "lorpus",
    "numpus", "quimpus", "rempus", "rompus", "rorpus", "scrompus", "shumpus", "sterpus", "storpus",
    "terpus", "timpus", "tumpus", "vumpus", "worpus", "wumpus", "yerpus", "yimpus", "yumpus",
    "zhorpus", "zumpus",
]  # fmt: skip

# Bits of a node's label: whether it descends from node 0, and from node 1.
FROM_FIRST, FROM_SECOND = 1, 2

# How often a new node looks for parents among one head's own descendants alone. The paper states
# 0.35 for each. Testing the second bound, 0.70, on a fresh draw gives 0.65 * 0.70 = 0.455 instead,
# and with it the published larger second half and the few nodes that descend from both heads.
ONLY_FIRST, ONLY_SECOND = 0.35, 0.455
DEPTH_WEIGHT = 1.5
# A little fewer graphs with three shortest paths or more than the recipe would give (12 % of the
# published validation file, 15 % of the recipe): the only correction without a mechanism behind it.
KEEP_THREE_PATHS = 0.8
PUBLISHED_HOPS = {3: 0.41, 4: 0.44, 5: 0.13, 6: 0.02}
OOD_COUNT = 500


@dataclass(frozen=True)
class Recipe:
    """Settings of one kind of graph; the defaults are those of the published files."""

    nodes: int = 28  # before nodes without an edge are dropped
    parents: float = 1.5  # mean of the Poisson number of parents
    extra_roots: int = 0  # persons added beyond those that arise by themselves
    hops: dict[int, float] = field(default_factory=lambda: PUBLISHED_HOPS)


PUBLISHED = Recipe()
# Eight hops are too rare in the published recipe (1 graph in 3,000), so both hop sets have more
# nodes and fewer parents; dense has fewer nodes to start with, because fewer stay without an edge.
# At most 40 nodes: two persons and the 38 concepts.
OOD_RECIPES = {
    "7hops": Recipe(nodes=36, parents=1.2, hops={7: 1.0}),
    "8hops": Recipe(nodes=36, parents=1.2, hops={8: 1.0}),
    "dense": Recipe(nodes=25, parents=2.85),
    "roots": Recipe(extra_roots=4),
}


class Graph(NamedTuple):
    """A drawn graph before naming; every edge leads from a lower to a higher node number."""

    parents: list[list[int]]  # of each node, in the order drawn
    labels: list[int]  # bits FROM_FIRST and FROM_SECOND


class Problem(NamedTuple):
    """A question about a graph; node numbers are those of the graph."""

    root: int
    target: int
    distractor: int
    path: list[int]  # root to target, one of the shortest, drawn uniformly


def weighted_index(rng: random.Random, weights: Sequence[float]) -> int:
    """Draw an index with probability proportional to its weight."""
    left = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return len(weights) - 1


def pick(rng: random.Random, items: Sequence):
    """Draw one item uniformly. Only `rng.random` is the same in every Python version."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: random.Random, items: Sequence) -> list:
    """Return the items in a random order, by `rng.random` alone."""
    return sorted(items, key=lambda _: rng.random())


def poisson(rng: random.Random, mean: float) -> int:
    """Draw from a Poisson distribution by Knuth's product of uniform numbers."""
    count, product, limit = 0, rng.random(), math.exp(-mean)
    while product > limit:
        count += 1
        product *= rng.random()
    return count


def draw_graph(rng: random.Random, recipe: Recipe) -> Graph:
    """Draw a graph whose nodes 0 and 1 are its two heads; some nodes may have no edge.

    A new node takes a Poisson number of parents among the first head's own descendants, the
    second's, or all nodes, without replacement. Depth, the shortest way up to a node without
    parents, makes a parent likelier only while it descends from exactly one head.
    """
    parents: list[list[int]] = [[], []]
    labels = [FROM_FIRST, FROM_SECOND]
    depth = [0, 0]
    weights = [1.0, 1.0]
    own: dict[int, list[int]] = {FROM_FIRST: [0], FROM_SECOND: [1]}
    for node in range(2, recipe.nodes + recipe.extra_roots):
        chosen: list[int] = []
        if node >= 2 + recipe.extra_roots:
            side = weighted_index(rng, (ONLY_FIRST, ONLY_SECOND, 1 - ONLY_FIRST - ONLY_SECOND))
            pool = (own[FROM_FIRST], own[FROM_SECOND], range(node))[side]
            candidates = list(pool)
            for _ in range(min(poisson(rng, recipe.parents), len(candidates))):
                index = weighted_index(rng, [weights[c] for c in candidates])
                chosen.append(candidates.pop(index))
        label = 0
        for parent in chosen:
            label |= labels[parent]
        parents.append(chosen)
        labels.append(label)
        depth.append(1 + min((depth[p] for p in chosen), default=-1))
        weights.append(DEPTH_WEIGHT * depth[node] + 1 if label in own else 1.0)
        if label in own:
            own[label].append(node)
    attach_extra_roots(rng, parents, recipe.extra_roots)
    return Graph(parents, labels)


def attach_extra_roots(rng: random.Random, parents: list[list[int]], extra_roots: int) -> None:
    """Give each of the nodes 2, 3, ... that are extra roots one child or more, in place.

    Only nodes that have parents already become children, so labels and depths stay as they are.
    """
    concepts = [node for node, above in enumerate(parents) if above]
    for root in range(2, 2 + extra_roots):
        for child in shuffled(rng, concepts)[: 1 + poisson(rng, 1.0)]:
            if root not in parents[child]:
                parents[child].append(root)


def distances(children: list[list[int]], start: int) -> dict[int, int]:
    """Return the number of edges from `start` to each node it reaches, nearest first."""
    found = {start: 0}
    queue = [start]
    for node in queue:
        for child in children[node]:
            if child not in found:
                found[child] = found[node] + 1
                queue.append(child)
    return found


def pose_problem(rng: random.Random, graph: Graph, hops: int) -> Problem | None:
    """Choose root, target, distractor and path; None where the graph has no such question.

    The root is the head with the deeper leaf of its own (a draw decides ties), the target one of
    its deepest own leaves, the distractor any own leaf of the other head.
    """
    children: list[list[int]] = [[] for _ in graph.parents]
    for node, above in enumerate(graph.parents):
        for parent in above:
            children[parent].append(node)
    reached = [distances(children, head) for head in (0, 1)]
    leaves = [
        {n: d for n, d in reached[head].items() if not children[n] and graph.labels[n] == label}
        for head, label in ((0, FROM_FIRST), (1, FROM_SECOND))
    ]
    deepest = [max(own.values(), default=0) for own in leaves]
    if max(deepest) != hops or min(deepest) == 0:
        return None
    tied = deepest[0] == deepest[1]
    root = pick(rng, (0, 1)) if tied else deepest.index(hops)
    target = pick(rng, [n for n, d in leaves[root].items() if d == hops])
    distractor = pick(rng, list(leaves[1 - root]))

    counts = dict.fromkeys(reached[root], 0)  # shortest paths from the root to each node
    counts[root] = 1
    before: dict[int, list[int]] = {root: []}
    for node, distance in reached[root].items():
        if node != root:
            before[node] = [p for p in graph.parents[node] if reached[root].get(p) == distance - 1]
            counts[node] = sum(counts[p] for p in before[node])
    if counts[target] >= 3 and rng.random() >= KEEP_THREE_PATHS:
        return None
    path = [target]
    while before[path[0]]:
        above = before[path[0]]
        path.insert(0, above[weighted_index(rng, [counts[p] for p in above])])
    return Problem(root, target, distractor, path)


def canonical_form(num_nodes: int, edges: Sequence[Sequence[int]]) -> bytes:
    """Return a digest that is equal for graphs which differ only in how nodes are numbered.

    Nodes are coloured by colour refinement over incoming and outgoing edges. Where that tells all
    nodes apart the digest is exact; where it does not, two different graphs may share a digest,
    which costs a graph and never lets a repetition through. Root and target are not marked, so a
    second question about the same graph counts as a repetition too.
    """
    above: list[list[int]] = [[] for _ in range(num_nodes)]
    below: list[list[int]] = [[] for _ in range(num_nodes)]
    for parent, child in edges:
        above[child].append(parent)
        below[parent].append(child)
    colours, num_colours = [0] * num_nodes, 0
    while True:
        seen = [
            (
                colours[node],
                tuple(sorted([colours[p] for p in above[node]])),
                tuple(sorted([colours[c] for c in below[node]])),
            )
            for node in range(num_nodes)
        ]
        rank = {signature: index for index, signature in enumerate(sorted(set(seen)))}
        colours = [rank[signature] for signature in seen]
        if len(rank) == num_colours:
            break
        num_colours = len(rank)
    return hashlib.sha256(repr(sorted(seen)).encode()).digest()


def write_record(rng: random.Random, graph: Graph, problem: Problem, target_first: bool) -> dict:
    """Name the nodes, drop those without an edge, and return the record in the published format."""
    linked = {p for above in graph.parents for p in above}
    kept = [n for n, above in enumerate(graph.parents) if above or n in linked]
    number = {node: index for index, node in enumerate(kept)}
    persons, concepts = iter(shuffled(rng, PERSONS)), iter(shuffled(rng, CONCEPTS))
    symbols = [next(concepts if graph.parents[node] else persons) for node in kept]
    edges = [[number[p], number[node]] for node in kept for p in graph.parents[node]]

    def fact(parent: int, child: int) -> str:
        every = "Every " if symbols[parent] in CONCEPTS else ""
        return f"{every}{symbols[parent]} is a {symbols[child]}."

    root, target, distractor = (number[node] for node in problem[:3])
    choices = (target, distractor) if target_first else (distractor, target)
    first, second = (symbols[node] for node in choices)
    facts = " ".join(shuffled(rng, [fact(*edge) for edge in edges]))
    path = [number[node] for node in problem.path]
    return {
        "question": f"{facts} Is {symbols[root]} a {first} or {second}?",
        "answer": f"{symbols[root]} is a {symbols[target]}.",
        "steps": [fact(*edge) for edge in zip(path, path[1:], strict=False)],
        "idx_to_symbol": symbols,
        "edges": edges,
        "root": root,
        "target": target,
        "neg_target": distractor,
    }


def generate(recipe: Recipe, count: int, stream: str, seen: set[bytes]) -> list[dict]:
    """Return `count` records of new graphs and add their canonical forms to `seen`.

    `stream` seeds the draws. The number of hops is drawn first and graphs are drawn until one
    has it, so that the shares of `recipe.hops` hold whatever the other settings are. Exactly half
    of the records name the target first, so a guess by position is right half the time.
    """
    rng = random.Random(stream)
    target_first = shuffled(rng, [index % 2 == 0 for index in range(count)])
    lengths, shares = list(recipe.hops), list(recipe.hops.values())
    records = []
    while len(records) < count:
        hops = lengths[weighted_index(rng, shares)]
        problem = None
        while problem is None:
            graph = draw_graph(rng, recipe)
            problem = pose_problem(rng, graph, hops)
        record = write_record(rng, graph, problem, target_first[len(records)])
        form = canonical_form(len(record["idx_to_symbol"]), record["edges"])
        if form not in seen:
            seen.add(form)
            records.append(record)
    return records


def read_forms(path: Path) -> set[bytes]:
    """Return the canonical forms of the graphs in a ProsQA file.

    Raises:
        ValueError: the file cannot be read, is no JSON list, or a record holds no proper graph.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not UTF-8 JSON ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: holds a {type(records).__name__}, wanted a list of records")
    forms = set()
    for index, record in enumerate(records):
        try:
            num_nodes = len(record["idx_to_symbol"])
            edges = [(parent, child) for parent, child in record["edges"]]
            if not all(type(n) is int and 0 <= n < num_nodes for edge in edges for n in edge):
                raise ValueError
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path}: record {index}: wanted idx_to_symbol (a list) and edges (pairs of node "
                "numbers within it); give a ProsQA file"
            ) from error
        forms.add(canonical_form(num_nodes, edges))
    return forms


def write_atomically(path: Path, text: str) -> str:
    """Write the text as UTF-8 under a temporary name, rename it, and return its sha256."""
    data = text.encode("utf-8")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; argparse itself ends with status 2 on a bad one."""

    def count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
        return int(text)

    parser = argparse.ArgumentParser(description="Generate the ProsQA data set.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=count, default=17886, help="training records")
    parser.add_argument("--valid", type=count, default=300, help="validation records")
    parser.add_argument("--test", type=count, default=500, help="test records")
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="ProsQA file whose graphs must not occur"
    )
    parser.add_argument(
        "--ood", action="store_true", help="also write four harder sets of 500 records each"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files and print name, count and sha256 of each; 2 on a user's mistake."""
    options = parse_arguments(arguments)
    # Evaluation sets come first: they do not change with the size of the training set.
    sets = [
        ("test", PUBLISHED, options.test),
        ("valid", PUBLISHED, options.valid),
        ("train", PUBLISHED, options.train),
    ]
    if options.ood:
        sets += [(f"ood_{name}", recipe, OOD_COUNT) for name, recipe in OOD_RECIPES.items()]
    try:
        seen = read_forms(options.exclude) if options.exclude else set()
        options.out.mkdir(parents=True, exist_ok=True)
        for name, recipe, count in sets:
            records = generate(recipe, count, f"prosqa {options.seed} {name}", seen)
            path = options.out / f"prosqa_{name}.json"
            digest = write_atomically(path, json.dumps(records))
            print(f"{path}  {count} records  sha256 {digest}", flush=True)
    except ValueError as error:
        print(f"prosqa.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"prosqa.py: {error.filename or options.out}: cannot be written ({error.strerror}); "
            "give another --out",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
