"""Generate ProntoQA questions: five hops, fictional ontology, rules in random order.

Writes a raw file in the format and with the distribution of the official generator (Saparov and
He, arXiv 2210.01240); the structure was fitted to 400 of its trials, compared in docs/data.md.
prontoqa.py converts the file into records (docs/specification.md, section 1). Needs the standard
library alone; the same seed gives the same bytes.

A theory: a chain of 6 concepts; a distractor parent for each of the lower 5; a separate pair of
concepts, whose child the entity also belongs to; and one unrelated concept. Chain (except its
top), distractors and separate child have one property each, all of different families, so that
nothing can contradict; the unrelated concept has the opposite of the queried property.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, report, whole_number, write_atomically

ENTITIES = ["Fae", "Rex", "Sally", "Max", "Alex", "Sam", "Polly", "Stella", "Wren"]
CONCEPTS = [
    *("wumpus", "yumpus", "zumpus", "dumpus", "rompus", "numpus", "tumpus", "vumpus", "impus"),
    *("jompus", "gorpus", "shumpus", "lempus", "sterpus", "grimpus", "lorpus", "brimpus"),
]
PROPERTY_FAMILIES = [
    family.split()
    for family in (
        "blue red brown orange",
        "small large",
        "metallic wooden luminous liquid",
        "transparent opaque",
        "nervous happy feisty shy",
        "bright dull",
        "sweet sour spicy bitter",
        "floral fruity earthy",
        "hot cold temperate",
        "kind mean angry amenable aggressive",
        "melodic muffled discordant loud",
        "slow moderate fast",
        "windy sunny overcast rainy snowy",
    )
]
NUM_HOPS = 5
NEGATED_SHARE = 1 / 3
# The official proof walks up the chain and at each concept stops at the property with these odds
# against 1 for continuing; trials that stop at another height are rejected. The probabilities below
# are what this rejection leaves: fewer negations on the way, more in the queried property.
STOP_ODDS = {False: 0.3, True: 0.7}


def negated_share_given(stopped: bool) -> float:
    """Return P(property negated | the walk stopped at it, or went past it)."""
    weight = {}
    for negated, prior in ((False, 1 - NEGATED_SHARE), (True, NEGATED_SHARE)):
        stop = STOP_ODDS[negated] / (1 + STOP_ODDS[negated])
        weight[negated] = prior * (stop if stopped else 1 - stop)
    return weight[True] / (weight[True] + weight[False])


def with_article(concept: str) -> str:
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"


def is_sentence(subject: str, predicate: str, negated: bool = False) -> str:
    """Return that `subject` (an entity, or a quantified concept) is a concept or has a property."""
    text = with_article(predicate) if predicate in CONCEPTS else predicate
    return f"{subject} is {'not ' if negated else ''}{text}."


def rule_sentence(rng: random.Random, subject: str, predicate: str, negated: bool) -> str:
    """Word a rule: half are plural, a quarter each say `Each` and `Every`."""
    if rng.random() < 0.5:
        plural = f"{predicate}es" if predicate in CONCEPTS else predicate
        return f"{subject.capitalize()}es are {'not ' if negated else ''}{plural}."
    return is_sentence(f"{rng.choice(['Each', 'Every'])} {subject}", predicate, negated)


def generate_trial(rng: random.Random) -> dict:
    """Return one example: `question`, `query`, `chain_of_thought` (11 sentences) and `answer`."""
    concepts = rng.sample(CONCEPTS, 2 * NUM_HOPS + 4)
    chain, concepts = concepts[: NUM_HOPS + 1], concepts[NUM_HOPS + 1 :]
    distractors, (child, parent, unrelated) = concepts[:NUM_HOPS], concepts[NUM_HOPS:]
    entity = rng.choice(ENTITIES)

    owners = [*chain[:-1], *distractors, child]
    families = rng.sample(PROPERTY_FAMILIES, len(owners))
    shares = [negated_share_given(stopped=False)] * (NUM_HOPS - 1)
    shares += [negated_share_given(stopped=True)] + [NEGATED_SHARE] * (NUM_HOPS + 1)
    traits = {
        owner: (rng.choice(family), rng.random() < share)
        for owner, family, share in zip(owners, families, shares, strict=True)
    }
    queried, queried_negated = traits[chain[NUM_HOPS - 1]]
    traits[unrelated] = (queried, not queried_negated)

    rules = [(owner, *trait) for owner, trait in traits.items()]
    rules += [(lower, upper, False) for lower, upper in zip(chain, chain[1:], strict=False)]
    rules += [(low, high, False) for low, high in zip(chain, distractors, strict=False)]
    rules.append((child, parent, False))
    rng.shuffle(rules)
    sentences = {rule[:2]: rule_sentence(rng, *rule) for rule in rules}

    facts = [is_sentence(entity, chain[0]), is_sentence(entity, child)]
    rng.shuffle(facts)
    proof = [is_sentence(entity, chain[0])]
    for lower, upper in zip(chain[: NUM_HOPS - 1], chain[1:], strict=False):
        proof += [sentences[lower, upper], is_sentence(entity, upper)]
    proof.append(sentences[chain[NUM_HOPS - 1], queried])
    proof.append(is_sentence(entity, queried, queried_negated))

    answer = rng.random() < 0.5
    claim = is_sentence(entity, queried, queried_negated if answer else not queried_negated)
    return {
        "question": " ".join([*sentences.values(), *facts]),
        "query": f"True or false: {claim}",
        "chain_of_thought": proof,
        "answer": str(answer),
    }


def generate(trials: int, seed: int) -> dict:
    """Return the raw file's content: `{"example1": {"test_example": trial}, ...}`."""
    rng = random.Random(seed)
    return {f"example{i}": {"test_example": generate_trial(rng)} for i in range(1, trials + 1)}


def main(arguments: list[str] | None = None) -> int:
    """Write the file; return 2, after one message, on a user's mistake."""
    parser = argparse.ArgumentParser(description="Generate a raw ProntoQA file, 5 hops.")
    parser.add_argument(
        "--trials", type=whole_number(1), default=10_000, help="number of questions (10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("data/5hop_0shot_random.json"), help="file to write"
    )
    args = parser.parse_args(arguments)
    try:
        write_atomically(args.out, json.dumps(generate(args.trials, args.seed), indent=1))
    except InputError as error:
        return report(str(error))
    print(f"{args.out}: {args.trials} questions, seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
