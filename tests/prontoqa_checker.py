"""An independent checker of raw ProntoQA files: proofs and statistics.

It shares no code with preprocessing/: it parses the English sentences, applies the rules by forward
chaining, and accepts a trial only if theory, proof, query and answer agree. As a script it compares
the statistics of two files (the table in docs/data.md):

    python tests/prontoqa_checker.py OFFICIAL.json OURS.json
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

SENTENCE = re.compile(
    r"(?:(?P<form>Each|Every) (?P<subject>[a-z]+)|(?P<plural>[A-Z][a-z]+pus)es"
    r"|(?P<name>[A-Z][a-z]+))"
    r" (?P<verb>is|are) (?P<denial>not )?(?P<article>an? )?(?P<predicate>[a-z]+)\."
)


class Statement(NamedTuple):
    form: str  # "Each", "Every", "plural" or "fact"
    subject: str
    predicate: str
    negated: bool

    @property
    def claim(self) -> tuple[str, bool]:
        return self.predicate, self.negated

    @property
    def is_concept(self) -> bool:
        return self.predicate.endswith("pus")


def parse(sentence: str) -> Statement:
    match = SENTENCE.fullmatch(sentence)
    assert match, f"cannot parse: {sentence!r}"
    form = match["form"] or ("plural" if match["plural"] else "fact")
    assert (match["verb"] == "are") == (form == "plural"), f"number: {sentence!r}"
    predicate = match["predicate"]
    if form == "plural" and predicate.endswith("puses"):
        predicate = predicate.removesuffix("es")
    else:
        wanted = None
        if predicate.endswith("pus"):
            wanted = "an " if predicate[0] in "aeiou" else "a "
        assert match["article"] == wanted, f"article: {sentence!r}"
    subject = match["subject"] or match["name"] or match["plural"].lower()
    return Statement(form, subject, predicate, bool(match["denial"]))


def sentences_of(question: str) -> list[str]:
    return [f"{part}." for part in question.removesuffix(".").split(". ")]


def consequences(start: set[tuple], rules: list[Statement]) -> set[tuple]:
    """Every (predicate, negated) that follows from `start`, including `start`."""
    known, previous = set(start), None
    while previous != len(known):
        previous = len(known)
        known |= {rule.claim for rule in rules if (rule.subject, False) in known}
    return known


def check_trial(trial: dict) -> None:
    """Raise AssertionError unless the trial's theory, proof and answer are sound."""
    given = sentences_of(trial["question"])
    statements = [parse(sentence) for sentence in given]
    facts = [s for s in statements if s.form == "fact"]
    rules = [s for s in statements if s.form != "fact"]
    assert len({fact.subject for fact in facts}) == 1, "more than one entity"
    starts = [{(rule.subject, False)} for rule in rules]
    for start in [{fact.claim for fact in facts}, *starts]:
        known = consequences(start, rules)
        clash = [p for p, negated in known if (p, not negated) in known]
        assert not clash, f"contradiction about {clash} from {start}"

    proved: list[Statement] = []
    for sentence in trial["chain_of_thought"]:
        step = parse(sentence)
        if sentence not in given:
            assert len(proved) >= 2, f"no inference: {sentence}"
            premise, rule = proved[-2:]
            assert step.form == "fact" == premise.form != rule.form, f"no inference: {sentence}"
            follows = (rule.subject, False) == premise.claim and rule.claim == step.claim
            assert follows and premise.subject == step.subject, f"does not follow: {sentence}"
        proved.append(step)

    prefix, _, query = trial["query"].partition(": ")
    assert prefix == "True or false", f"query: {trial['query']}"
    asked = parse(query)
    truth = asked.claim in consequences({fact.claim for fact in facts}, rules)
    assert (asked.subject, asked.predicate) == (proved[-1].subject, proved[-1].predicate), "target"
    assert truth == (asked.negated == proved[-1].negated), "the proof ends with another claim"
    assert trial["answer"] == str(truth), f"answer {trial['answer']}"


def roles_of(trial: dict) -> dict[str, str]:
    """The role of each concept: chain 0.., distractor, separate child, unrelated, ..."""
    statements = [parse(sentence) for sentence in sentences_of(trial["question"])]
    proof = [parse(sentence) for sentence in trial["chain_of_thought"]]
    chain = [step.predicate for step in proof if step.form == "fact" and step.is_concept]
    with_property = {s.subject for s in statements if s.form != "fact" and not s.is_concept}
    roles = {concept: f"chain {i}" for i, concept in enumerate(chain)}
    for s in statements:
        if s.form == "fact":
            roles.setdefault(s.predicate, "separate child")
        elif s.is_concept and s.subject in chain and s.predicate not in chain:
            roles[s.predicate] = "distractor" if s.predicate in with_property else "chain top"
    for s in statements:
        if s.form != "fact" and s.is_concept:
            roles.setdefault(s.predicate, "separate parent")
    for s in statements:
        roles.setdefault(s.subject if s.form != "fact" else s.predicate, "unrelated")
    return roles


def structure_of(trial: dict) -> list[tuple[str, str]]:
    """The structure of the theory without its words: sorted (role, what its rule assigns)."""
    roles = roles_of(trial)
    rules = [parse(s) for s in sentences_of(trial["question"])]
    return sorted(
        (roles[r.subject], roles[r.predicate] if r.is_concept else "property")
        for r in rules
        if r.form != "fact"
    )


def statistics(trials: list[dict]) -> dict[str, list[float]]:
    """Samples by name; the table compares their means."""
    samples: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        roles = roles_of(trial)
        statements = [parse(sentence) for sentence in sentences_of(trial["question"])]
        rules = [s for s in statements if s.form != "fact"]
        facts = [s for s in statements if s.form == "fact"]
        properties = [r for r in rules if not r.is_concept]
        samples["statements"].append(len(statements))
        samples["subclass rules"].append(len(rules) - len(properties))
        samples["property rules"].append(len(properties))
        samples["entity facts, all at the end"].append(sum(s in facts for s in statements[-2:]))
        samples["hops (concepts in the proof)"].append(
            sum(role.startswith("chain") and role != "chain top" for role in roles.values())
        )
        samples["sentences in the proof"].append(len(trial["chain_of_thought"]))
        samples["words, question and query"].append(
            len(f"{trial['question']} {trial['query']}".split())
        )
        for form in ("plural", "Each", "Every"):
            samples[f"subclass rules: {form}"] += [r.form == form for r in rules if r.is_concept]
            samples[f"property rules: {form}"] += [r.form == form for r in properties]
        samples["negated: all rules"] += [r.negated for r in rules]
        for rule in properties:
            role = roles[rule.subject]
            group = {"chain 4": "queried property"}.get(role, role.split(" ")[0])
            samples[f"negated: {group}"].append(rule.negated)
        samples["chain's fact first"].append(roles[facts[0].predicate] == "chain 0")
        samples["query negated"].append(" not " in trial["query"])
        samples["answer True"].append(trial["answer"] == "True")
        for index, rule in enumerate(rules):
            group = roles[rule.subject].split(" ")[0] + (" subclass" if rule.is_concept else "")
            samples[f"mean position: {group}"].append(index)
        proof_rules = [parse(s) for s in trial["chain_of_thought"][1::2]]
        indices = [statements.index(rule) for rule in proof_rules]
        samples["proof rule comes before the next"] += [
            a < b for a, b in zip(indices, indices[1:], strict=False)
        ]
    return samples


def word_counts(trials: list[dict]) -> dict[str, Counter]:
    """How often each entity name, concept and property occurs in the theories."""
    counts = {"entity names": Counter(), "concepts": Counter(), "properties": Counter()}
    for trial in trials:
        statements = [parse(sentence) for sentence in sentences_of(trial["question"])]
        counts["entity names"][statements[-1].subject] += 1
        counts["concepts"].update(roles_of(trial).keys())
        counts["properties"].update(s.predicate for s in statements if not s.is_concept)
    return counts


def chi_square_per_degree(first: Counter, second: Counter) -> float:
    """Chi-square of homogeneity per degree of freedom: about 1 for samples of one distribution."""
    total, value = first.total() + second.total(), 0.0
    for word in first | second:
        for counts in (first, second):
            expected = (first[word] + second[word]) * counts.total() / total
            value += (counts[word] - expected) ** 2 / expected
    return value / (len(first | second) - 1)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return mean, math.sqrt(variance / len(values))


def compare(first: list[dict], second: list[dict]) -> list[tuple[str, float, float, float]]:
    """Rows of (name, mean of first, mean of second, difference in standard errors)."""
    ours, rows = statistics(second), []
    for name, values in statistics(first).items():
        (mean_a, error_a), (mean_b, error_b) = mean_and_error(values), mean_and_error(ours[name])
        error = math.hypot(error_a, error_b)
        equal = mean_a == mean_b
        rows.append((name, mean_a, mean_b, 0.0 if equal else (mean_b - mean_a) / (error or 1e-9)))
    return rows


def read_trials(path: str | Path) -> list[dict]:
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    return [example["test_example"] for example in raw.values()]


def main(first_path: str, second_path: str) -> None:
    first, second = read_trials(first_path), read_trials(second_path)
    print(f"| statistic (mean) | {first_path} | {second_path} | difference / standard error |")
    print("| --- | --- | --- | --- |")
    for name, mean_a, mean_b, score in compare(first, second):
        print(f"| {name} | {mean_a:.3f} | {mean_b:.3f} | {score:+.1f} |")
    words_a, words_b = word_counts(first), word_counts(second)
    for kind, counts in words_a.items():
        other = words_b[kind]
        ratio = chi_square_per_degree(counts, other)
        print(f"| different {kind} | {len(counts)} | {len(other)} | chi²/df {ratio:.2f} |")
    shapes = [{tuple(structure_of(trial)) for trial in trials} for trials in (first, second)]
    same = "the same" if shapes[0] == shapes[1] else "not the same"
    print(f"| different shapes of theories | {len(shapes[0])} | {len(shapes[1])} | {same} |")
    for trial in [*first, *second]:
        check_trial(trial)
    print(f"| sound theory, proof and answer | {len(first)} | {len(second)} | all |")


if __name__ == "__main__":
    main(*sys.argv[1:])
