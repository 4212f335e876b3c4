"""Asking a checkpoint all records at once, with more, fewer, or replaced thoughts.

`Plan` says what is asked, `Asker` asks it. What the answers show is left to ablations.py.
Shapes: n records, K most thoughts of a record, D width.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from analysis.interventions import (
    REPLACEMENTS,
    OwnThoughts,
    Vectors,
    check_replacement,
    prompts_of,
    read_thoughts,
    replaced_thoughts,
    seeded,
)
from analysis.subject import Subject
from dataset import Collator, SpecialIds, StagedRecords, micro_batches
from engine import distributed
from engine.evaluation import Decoder
from utils import RunFailed, UserError, log

POSITIONS = ("each", "first", "last")
# A larger number is a mistake that would take hours or all memory before it shows.
MAX_THOUGHTS = 1000
COUNT = re.compile(r"(\d+)|(\d*)K")


class Asker:
    """Asks a checkpoint all records at once, batch by batch, always in the same batches.

    bar: a progress bar, moved with every batch.
    """

    def __init__(self, subject: Subject, bar: Any | None = None) -> None:
        self.subject, self.bar = subject, bar

    def _advance(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(what)
            self.bar.update()

    @cached_property
    def shares(self) -> list[np.ndarray]:
        """The records of each batch, those of similar lengths together.

        They are sorted at the checkpoint's own stage, so that rounding, which depends on the other
        rows of a batch, is the same whatever is asked.
        """
        subject = self.subject
        every = np.arange(len(subject.raw))
        return [parts[0] for parts in micro_batches(every, subject.staged, subject.batch_size, 1)]

    def batches(self, staged: StagedRecords) -> Iterator[tuple[np.ndarray, dict]]:
        """The records of each batch, and the batch on the model's device."""
        collator = Collator(staged, SpecialIds.of(self.subject.tokenizer), aligned="prompts")
        for indices in self.shares:
            batch = collator[indices]
            yield indices, {k: tensor.to(distributed.device()) for k, tensor in batch.items()}

    def answers(
        self, what: str, staged: StagedRecords, vectors: Vectors | None = None
    ) -> list[dict]:
        """The answers to all records, in their order, as evaluation describes them.

        what: what is being asked, for the progress bar.
        vectors: read in place of thoughts.
        """
        subject = self.subject
        decoder = Decoder(subject.model, subject.tokenizer, staged, subject.max_new_tokens)
        rows = []
        for indices, batch in self.batches(staged):
            exchanged = nullcontext()
            if vectors is not None:
                replacement = vectors.of(indices, distributed.device())
                exchanged = replaced_thoughts(subject.model, replacement)
            with seeded(), exchanged:
                rows += decoder.predict(batch)[1]
            self._advance(what)
        return sorted(rows, key=lambda row: row["index"])

    def own_thoughts(self) -> OwnThoughts:
        """The model's own thoughts on all records.

        Raises: RunFailed where replacing a thought by itself changes anything.
        """
        staged, model = self.subject.staged, self.subject.model
        counts = torch.from_numpy(staged.num_latents)
        width = model.base_causallm.get_input_embeddings().embedding_dim
        values = torch.zeros(
            len(counts), int(counts.max()), width, dtype=model.latent_weights.dtype
        )
        for indices, batch in self.batches(staged):
            prompts = prompts_of(batch)
            thoughts = read_thoughts(model, *prompts)
            if not check_replacement(model, *prompts, thoughts):
                raise RunFailed(
                    f"{self.subject.folder}: replacing thoughts by themselves changes what the"
                    " model computes, so no figure could be trusted; a subclass of Coconut must"
                    " read what its `thought` returns"
                )
            values[indices, : thoughts.size(1)] = thoughts.cpu()
            self._advance("own thoughts")
        return OwnThoughts(values, counts)


@dataclass(frozen=True)
class Plan:
    """What is asked of a subject.

    thoughts: the numbers k of latent positions to force, ascending.
    replaced: (name, positions) of each replacement; empty for pause tokens.
    """

    thoughts: list[int]
    replaced: list[tuple[str, str]]

    @classmethod
    def of(
        cls, subject: Subject, thoughts: Sequence[str] | None, positions: Sequence[str]
    ) -> "Plan":
        """The plan that the options of the command line ask for.

        thoughts: numbers, K and 2K among them, and ranges A..B; None for 0..2K as far as the
            model's positions allow.
        positions: some of POSITIONS, which are asked beyond all thoughts at once.

        Raises: UserError for a stage or a kind of thought that leaves nothing to ask, numbers that
            cannot be read, and more thoughts than fit the model's positions.
        """
        own = int(subject.staged.num_latents.max())
        if own == 0:
            raise UserError(
                f"{subject.folder}: was trained to stage {subject.stage}, at which these records"
                " have no thoughts; name a later checkpoint"
            )
        names = REPLACEMENTS
        if subject.metadata.thought != "continuous":
            names = ()
            what = (
                f"{subject.folder}: thought: {subject.metadata.thought} reads the latent token's"
                " embedding, so there are no thoughts to replace"
            )
            if positions:
                raise UserError(f"{what}; leave --positions out")
            log.info(f"{what}: only the k sweep and the shortcuts are measured")
        chosen = ["all"]
        if own > 1:
            places = {"each": ("only", own), "first": ("first", own - 1), "last": ("last", own - 1)}
            for kind, most in (places[kind] for kind in POSITIONS if kind in positions):
                chosen += [f"{kind} {number}" for number in range(1, most + 1)]
        replaced = [
            (name, where)
            for where in chosen
            for name in names
            if name != "permuted" or _num_exchanged(where, own) > 1
        ]
        return cls(_counts(subject, thoughts, own), replaced)


def _num_exchanged(positions: str, own: int) -> int:
    """How many of `own` thoughts `positions` names."""
    kind, _, number = positions.partition(" ")
    return {"all": own, "only": 1}.get(kind) or int(number)


def _counts(subject: Subject, thoughts: Sequence[str] | None, own: int) -> list[int]:
    """The numbers of thoughts to force."""
    most = None
    if subject.max_positions is not None:
        longest = int((subject.staged.prompt_lengths - subject.staged.num_latents).max())
        most = subject.max_positions - subject.max_new_tokens - longest
    if thoughts is None:
        counts = range(2 * own + 1)
        return [k for k in counts if most is None or k <= most]
    counts = set()
    for text in thoughts:
        first, _, last = text.partition("..")
        begin, end = _count(text, first, own), _count(text, last or first, own)
        if begin > end:
            raise UserError(f"--thoughts {text}: {begin} is above {end}; write the smaller first")
        counts |= {*range(begin, min(end, MAX_THOUGHTS) + 1), end}
    if max(counts) > MAX_THOUGHTS or (most is not None and max(counts) > most):
        limit = MAX_THOUGHTS if most is None else min(most, MAX_THOUGHTS)
        raise UserError(
            f"--thoughts {max(counts)}: the model reads at most {limit} thoughts between its"
            f" longest question and {subject.max_new_tokens} new tokens; ask for fewer"
        )
    return sorted(counts)


def _count(text: str, number: str, own: int) -> int:
    found = COUNT.fullmatch(number)
    if found is None:
        raise UserError(
            f"--thoughts {text}: is neither a number nor a range; write numbers, K ({own} here) or"
            " 2K, or ranges such as 0..2K"
        )
    return int(found[1]) if found[1] else int(found[2] or 1) * own
