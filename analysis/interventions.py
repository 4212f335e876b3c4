"""Reading other vectors in the place of thoughts: do(t_k := v), and the vectors v to choose from.

The model computes as usual, except that chosen thoughts are exchanged just before they are read. A
thought is named by its record and its position k = 0, 1, ... among the record's latent positions.
Its replacement comes from the model's own thoughts in an undisturbed reading, t_k below, so it does
not depend on what else is exchanged:

    zeros         0
    mean          the mean of t_k over the records that have a thought k
    noise_added   t_k + e, each dimension of e normal with the deviation of t_k over records
    noise         |t_k| e / |e|, e normal: a random direction at the norm of the thought
    other_record  t_k of another record, which asks another question
    permuted      t_j of the same record, j another of the exchanged positions
    placeholder   the embedding of the latent token, as pause tokens are read

Thoughts that are not exchanged are made as usual, from what the model has read by then.
`check_replacement` proves on the model at hand that a thought replaced by itself changes no bit.
Shapes: n records, K most thoughts of a record, D width, B rows of a batch, T columns.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from coconut import IGNORE_INDEX, Coconut
from utils import UserError, quote

REPLACEMENTS = (
    "zeros", "mean", "noise_added", "noise", "other_record", "permuted", "placeholder",
)  # fmt: skip
SEED = 0

# (own thoughts (B, D), their positions (B,), -1 in rows without a thought here) -> (B, D)
Replacement = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def replaced_thoughts(model: Coconut, replacement: Replacement) -> Iterator[None]:
    """Within this context `model` reads what `replacement` returns for each thought."""
    own_read, own_thought = model.read, model.thought
    coming: Iterator[Tensor] = iter(())

    def read(input_ids: Tensor, attention_mask: Tensor, *arguments, **options):
        nonlocal coming
        coming = iter(thought_positions(model, input_ids, attention_mask))
        return own_read(input_ids, attention_mask, *arguments, **options)

    def thought(hidden_states: Tensor, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        own, positions = own_thought(hidden_states, attention_mask, is_first), next(coming)
        replaced = replacement(own, positions).to(own.dtype)
        return torch.where((positions >= 0)[:, None], replaced, own)

    model.read, model.thought = read, thought
    try:
        yield
    finally:
        del model.read, model.thought


def thought_positions(model: Coconut, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """For each column that holds thoughts, in order: (B,) long, which thought of its row it is.

    Rows are padded on either side, so a column holds different positions of different rows; a row
    without a thought in the column has -1.
    """
    is_latent = (input_ids == model.latent_token_id) & (attention_mask != 0)
    positions = torch.where(is_latent, is_latent.long().cumsum(1) - 1, -1)
    return list(positions[:, is_latent.any(0)].T)


def prompts_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, T) of a batch with aligned prompts, without the answers."""
    width = int((batch["labels"] != IGNORE_INDEX).any(0).long().argmax())
    return batch["input_ids"][:, :width], batch["attention_mask"][:, :width]


@torch.no_grad()
def read_thoughts(model: Coconut, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, K, D) the thoughts that `model` reads in each row, zero past a row's last.

    input_ids, attention_mask: (B, T), as `Coconut.read` takes them.
    """
    is_latent = (input_ids == model.latent_token_id) & (attention_mask != 0)
    with seeded():
        _, embeds, _ = model.read(input_ids, attention_mask)
    counts = is_latent.sum(1, keepdim=True)
    exists = torch.arange(int(counts.max()), device=counts.device) < counts  # (B, K)
    thoughts = embeds.new_zeros(*exists.shape, embeds.size(-1))
    thoughts[exists] = embeds[is_latent]
    return thoughts


@torch.no_grad()
def check_replacement(
    model: Coconut, input_ids: Tensor, attention_mask: Tensor, thoughts: Tensor
) -> bool:
    """Whether replacing works: own thoughts in place change no bit, and zeros are read as zeros.

    Bits are those of every state after the final norm and of every embedding that is read.
    thoughts: (B, K, D), what `read_thoughts` returned for these rows.
    """
    is_latent = (input_ids == model.latent_token_id) & (attention_mask != 0)
    rows = torch.arange(len(thoughts), device=thoughts.device)

    def own(thought: Tensor, positions: Tensor) -> Tensor:
        # What the model computes for it now must not matter.
        return thoughts[rows, positions.clamp(min=0)]

    with seeded():
        states, embeds, _ = model.read(input_ids, attention_mask)
    with seeded(), replaced_thoughts(model, own):
        same_states, same_embeds, _ = model.read(input_ids, attention_mask)
    with seeded(), replaced_thoughts(model, zeros):
        _, zeroed_embeds, _ = model.read(input_ids, attention_mask)
    is_same = torch.equal(states, same_states) and torch.equal(embeds, same_embeds)
    return is_same and not zeroed_embeds[is_latent].any()


@contextmanager
def seeded() -> Iterator[None]:
    """Fix the random numbers that a subclass of Coconut draws, and leave all others unaffected."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(SEED)
        yield


def zeros(thought: Tensor, positions: Tensor) -> Tensor:
    """Zeros: the position stays, its content is removed."""
    return torch.zeros_like(thought)


@dataclass(frozen=True)
class Vectors:
    """What is read in the place of thoughts, for all records.

    values: (n, K, D) on the CPU; is_chosen: (n, K) bool, the thoughts that are exchanged.
    """

    values: Tensor
    is_chosen: Tensor

    def of(self, indices: np.ndarray, device: torch.device) -> Replacement:
        """The replacement for a batch whose rows are these records."""
        values, is_chosen = self.values[indices].to(device), self.is_chosen[indices].to(device)
        rows = torch.arange(len(indices), device=device)

        def replacement(thought: Tensor, positions: Tensor) -> Tensor:
            there = positions.clamp(min=0)
            chosen = is_chosen[rows, there][:, None]
            return torch.where(chosen, values[rows, there].to(thought.dtype), thought)

        return replacement


@dataclass(frozen=True)
class OwnThoughts:
    """The model's own thoughts on all records.

    values: (n, K, D) on the CPU, zero past a record's last thought; counts: (n,) thoughts each has.
    """

    values: Tensor
    counts: Tensor

    @property
    def exists(self) -> Tensor:
        """(n, K) bool: whether the record has a thought at the position."""
        return torch.arange(self.values.size(1)) < self.counts[:, None]

    def choose(self, positions: str) -> Tensor:
        """(n, K) bool: the thoughts that `positions` names.

        positions: "all", "only J" (the J-th, from 1), "first J", or "last J" of each record.
        """
        kind, _, number = positions.partition(" ")
        place = torch.arange(self.values.size(1))[None]
        chosen = {
            "all": lambda: place >= 0,
            "only": lambda: place == int(number) - 1,
            "first": lambda: place < int(number),
            "last": lambda: place >= self.counts[:, None] - int(number),
        }[kind]()
        return chosen & self.exists


def partners(questions: Sequence[str], counts: Sequence[int], seed: int = SEED) -> np.ndarray:
    """(n,) for each record another one, with another question and at least as many thoughts.

    Records follow each other in a random order, and each takes the next that fits. Where none has
    enough thoughts, it takes the one with the most.

    Raises: UserError where all records ask the same question.
    """
    order = np.random.default_rng(seed).permutation(len(questions)).tolist()
    chosen = np.zeros(len(questions), dtype=int)
    for rank, index in enumerate(order):
        found = None
        for other in chain(order[rank + 1 :], order[:rank]):
            if questions[other] == questions[index]:
                continue
            if found is None or counts[other] > counts[found]:
                found = other
            if counts[other] >= counts[index]:
                found = other
                break
        if found is None:
            raise UserError(
                "thoughts of another record need a second question, but there is only"
                f" {quote(questions[0])}; use more records"
            )
        chosen[index] = found
    return chosen


def make_vectors(
    name: str, own: OwnThoughts, positions: str, model: Coconut, donors: np.ndarray
) -> Vectors:
    """The vectors of one of REPLACEMENTS, for the thoughts that `positions` names.

    donors: (n,) whose thoughts "other_record" takes; one with fewer begins again with its first.
    Draws are the same in every call.
    """
    generator = torch.Generator().manual_seed(SEED)
    values, chosen, exists = own.values, own.choose(positions), own.exists
    weight = exists[..., None].to(values)  # (n, K, 1)
    mean = (values * weight).sum(0) / weight.sum(0).clamp(min=1)  # (K, D)
    if name == "zeros":
        made = torch.zeros_like(values)
    elif name == "mean":
        made = mean.expand_as(values)
    elif name == "noise_added":
        squares = ((values - mean) ** 2 * weight).sum(0)
        deviation = (squares / (weight.sum(0) - 1).clamp(min=1)).sqrt()  # (K, D)
        made = values + deviation * _normal(values, generator)
    elif name == "noise":
        noise = _normal(values, generator)
        made = noise * (values.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    elif name == "other_record":
        donor = torch.from_numpy(donors)
        place = torch.arange(values.size(1)) % own.counts[donor].clamp(min=1)[:, None]
        made = values[donor].gather(1, place[..., None].expand_as(values))
    elif name == "permuted":
        made = _permuted(values, chosen)
    else:
        assert name == "placeholder", name
        embedding = model.base_causallm.get_input_embeddings().weight[model.latent_token_id]
        made = embedding.detach().to(values).expand_as(values)
    return Vectors(made, chosen)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def _permuted(values: Tensor, chosen: Tensor) -> Tensor:
    """Each record's chosen thoughts in a circle: each reads the next one of a random order."""
    generator, made = np.random.default_rng(SEED), values.clone()
    for row, row_chosen in enumerate(chosen.numpy()):
        order = generator.permutation(np.flatnonzero(row_chosen))
        made[row, order] = values[row, np.roll(order, -1)]
    return made
