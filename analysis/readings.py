"""Reading a model's thoughts: every number that probes show, for each record and thought.

Batch by batch the model writes its answers, then two passes look at it. Coconut.read gives the
thoughts t_k and the states h; one more pass of the base model over the same embeddings, with plain
attention, gives the states of every layer and the attention weights. For thought k at column c:

    p_k = softmax(U t_k)                        top tokens, entropy, rank of the gold step
    softmax(U norm(h^l at c - 1)), l = 0..L     the same by layer; at m = 1, l = L is p_k
    cos(t_k, E_v), |t_k| / mean |E_v|           against the embeddings E of the vocabulary
    t_k . (dt_k/dh_j) h_j / |t_k|^2             share of state j, nearest first; sums to 1
    attention from column c                     mean over layers and heads

For Coconut's own thoughts the derivative is w_j, or what thought_norm makes of it; of a subclass
whose thought is not linear in the states the shares are its first order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from analysis.continuations import continuation_log_probabilities
from analysis.graph_values import Graph, Place, edge_spans, name_branch, next_place
from analysis.layers import check_states, final_norm, read_layers, window_shares
from analysis.lens import blocks, lens, token_log_probabilities, token_text
from analysis.step_tokens import differing_ids, step_of, telling_ids
from analysis.subject import Subject
from dataset import Collator, SpecialIds, StagedRecords, decode, micro_batches
from engine import metrics
from utils import UserError

NUM_TOP = 5
# Records whose details are kept, with the attention to each token of the question.
MAX_DETAILED = 200
# Records whose thoughts are kept, to be compared with each other.
MAX_KEPT = 1000
# Numbers of one batch's attention weights, 256 MB in float32.
MAX_ATTENTION = 2**26


@dataclass
class Readings:
    """What was read, by record (n) and thought (K); nan, or -1 for ids, where there is no thought.

    num_thoughts: (n,). thoughts: (n, K, D), of the first MAX_KEPT records alone.
    top_ids, top_p: (n, K, NUM_TOP), best first. entropy: (n, K) in nats.
    gold_rank: (n, K) rank from 1 of the most probable telling token of the thought's step.
    word_ids: (n, K) the most probable of the tokens in which answers differ.
    norm_ratio, max_cosine, cosine_last_state, cosine_previous: (n, K), the last nan for the first
        thought; nearest_ids: (n, K).
    window: (n, K, m) shares of the states, nearest first; nan for pause thoughts.
    layer_ids, layer_p, layer_entropy, layer_rank: (n, K, L + 1).
    question_attention: for each of the first MAX_DETAILED records (thoughts, question tokens).
    edge_attention: for each record (thoughts, edges), of all tokens that name an edge, else None.
    values: for each record (thoughts + 1, nodes), else None; places: where these names occur.
    log_p: (n,) natural logarithm of the probability of what the model wrote; is_correct: (n,).
    """

    num_thoughts: np.ndarray
    thoughts: np.ndarray
    top_ids: np.ndarray
    top_p: np.ndarray
    entropy: np.ndarray
    gold_rank: np.ndarray
    word_ids: np.ndarray
    norm_ratio: np.ndarray
    max_cosine: np.ndarray
    nearest_ids: np.ndarray
    cosine_last_state: np.ndarray
    cosine_previous: np.ndarray
    window: np.ndarray
    layer_ids: np.ndarray
    layer_p: np.ndarray
    layer_entropy: np.ndarray
    layer_rank: np.ndarray
    question_attention: list[np.ndarray]
    edge_attention: list[np.ndarray] | None
    values: list[np.ndarray] | None
    places: list[list[Place]] | None
    log_p: np.ndarray
    is_correct: np.ndarray

    @classmethod
    def empty(cls, subject: Subject, graphs: Sequence[Graph] | None) -> "Readings":
        """Nothing read yet."""
        n, base = len(subject.records), subject.model.base_causallm
        num_thoughts = subject.staged.num_latents
        K, L = int(num_thoughts.max()), base.config.get_text_config().num_hidden_layers
        width = base.get_input_embeddings().embedding_dim

        def numbers(*shape: int, rows: int = n) -> np.ndarray:
            return np.full((rows, *shape), np.nan, dtype=np.float32)

        def ids(*shape: int) -> np.ndarray:
            return np.full((n, *shape), -1)

        return cls(
            num_thoughts=num_thoughts, thoughts=numbers(K, width, rows=min(n, MAX_KEPT)),
            top_ids=ids(K, NUM_TOP), top_p=numbers(K, NUM_TOP), entropy=numbers(K),
            gold_rank=numbers(K), word_ids=ids(K), norm_ratio=numbers(K), max_cosine=numbers(K),
            nearest_ids=ids(K), cosine_last_state=numbers(K),
            cosine_previous=numbers(K),
            window=numbers(K, subject.model.latent_window_size),
            layer_ids=ids(K, L + 1), layer_p=numbers(K, L + 1), layer_entropy=numbers(K, L + 1),
            layer_rank=numbers(K, L + 1), question_attention=[np.empty(0)] * min(n, MAX_DETAILED),
            edge_attention=None if graphs is None else [np.empty(0)] * n,
            values=None if graphs is None else [np.empty(0)] * n,
            places=None if graphs is None else [[]] * n,
            log_p=numbers(), is_correct=np.zeros(n, dtype=bool),
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Prompts of some records as a model read them, and where their thoughts are.

    indices: (B,) of the records. input_ids, attention_mask: (B, T), ending with the end marker.
    states, embeds: (B, T, D) as Coconut.read returned them.
    rows, columns: (thoughts,) long, of all thoughts; slots: the same as (record, thought from 0).
    """

    indices: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    states: Tensor
    embeds: Tensor
    rows: Tensor
    columns: Tensor
    slots: tuple[np.ndarray, np.ndarray]

    @property
    def thoughts(self) -> Tensor:
        """(thoughts, D)."""
        return self.embeds[self.rows, self.columns]


@torch.no_grad()
def read_batch(subject: Subject, staged: StagedRecords, indices: np.ndarray) -> Batch:
    """Read the prompts of these records."""
    model = subject.model
    tensors = Collator(staged, SpecialIds.of(subject.tokenizer), aligned="prompts")[indices]
    width = int(staged.prompt_lengths[indices].max())
    device = model.base_causallm.device
    input_ids, mask = (
        tensors[key][:, :width].to(device) for key in ("input_ids", "attention_mask")
    )
    states, embeds, _ = model.read(input_ids, mask)
    rows, columns = ((input_ids == model.latent_token_id) & (mask != 0)).nonzero(as_tuple=True)
    record = rows.cpu().numpy()
    first = np.searchsorted(record, record)  # where the row's thoughts begin
    slots = (indices[record], np.arange(len(record)) - first)
    return Batch(indices, input_ids, mask, states, embeds, rows, columns, slots)


def batches_of(subject: Subject, staged: StagedRecords) -> list[np.ndarray]:
    """The records in batches whose attention weights fit MAX_ATTENTION."""
    config = subject.model.base_causallm.config.get_text_config()
    longest = int(staged.prompt_lengths.max()) + subject.max_new_tokens
    weights = config.num_hidden_layers * config.num_attention_heads * longest**2
    batch_size = min(subject.batch_size, max(1, MAX_ATTENTION // weights))
    shares = micro_batches(np.arange(len(staged.dropped)), staged, batch_size, 1)
    return [share for (share,) in shares]


def telling_steps(subject: Subject) -> list[list[list[int]]]:
    """For each record and step the ids that distinguish it from other records' steps."""

    def is_word(token_id: int) -> bool:
        return any(character.isalnum() for character in token_text(subject.tokenizer, token_id))

    return telling_ids(subject.records.table["step_ids"][:], is_word)


def most_probable(probabilities: Tensor, candidates: list[int]) -> Tensor:
    """(n,) long: which of `candidates` has the largest of (n, V) probabilities."""
    ids = torch.tensor(candidates, device=probabilities.device)
    return ids[probabilities[:, ids].argmax(-1)]


def read_thoughts(
    subject: Subject, graphs: Sequence[Graph] | None, progress_bar: Callable
) -> Readings:
    """Everything that `Readings` holds.

    progress_bar: made with the number of batches and a description; its `update` is called.

    Raises: UserError for a checkpoint whose stage has no thoughts, a model that `check_states`
        refuses, and a text that names no node; NoBranches for a model of which values of nodes
        cannot be read.
    """
    staged = subject.staged
    if staged.num_latents.max() == 0:
        raise UserError(
            f"{subject.folder}: its model reads no thoughts at stage {subject.stage}; name a later"
            " checkpoint"
        )
    reader = _Reader(subject, graphs)
    batches = batches_of(subject, staged)
    bar = progress_bar(len(batches), "reading thoughts")
    for indices in batches:
        reader.read(read_batch(subject, staged, indices))
        bar.update()
    bar.close()
    return reader.found


class _Reader:
    """Reads batches into `found`."""

    def __init__(self, subject: Subject, graphs: Sequence[Graph] | None) -> None:
        self.subject, self.model, self.graphs = subject, subject.model, graphs
        self.found = Readings.empty(subject, graphs)
        table = subject.records.table
        self.questions, self.steps, self.answers = (
            table[name][:] for name in ("question", "steps", "answer")
        )
        self.telling = telling_steps(subject)
        self.words = differing_ids(table["answer_ids"][:])
        self.norm = final_norm(self.model)
        self.num_words = len(subject.tokenizer)  # rows past it pad the vocabulary
        self.embeddings = self.model.base_causallm.get_input_embeddings().weight.detach()
        self.embedding_norms = self.embeddings[: self.num_words].norm(dim=-1)

    @torch.no_grad()
    def read(self, batch: Batch) -> None:
        """Everything of one batch."""
        new_ids, new_mask = self._write_answers(batch)
        table = self.model.base_causallm.get_input_embeddings()
        layers, attention = read_layers(
            self.model,
            torch.cat([batch.embeds, table(new_ids).to(batch.embeds.dtype)], 1),
            torch.cat([batch.attention_mask, new_mask], 1),
            batch.rows,
            batch.columns,
        )
        prompt = layers[-1][:, : batch.states.size(1)]
        check_states(self.model, batch.states, prompt, batch.attention_mask)
        self._measure_confidence(batch, layers[-1], new_ids, new_mask)
        self._measure_words(batch)
        self._measure_geometry(batch)
        self._measure_layers(batch, layers)
        self._keep_attention(batch, attention)
        if self.graphs is not None:
            self._measure_nodes(batch)

    def _write_answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, new) the tokens that the model writes, and a mask up to the end of each row's."""
        prompts, mask = batch.input_ids, batch.attention_mask
        written = self.model.generate(prompts, mask, self.subject.max_new_tokens)
        new_ids = written[:, prompts.size(1) :]
        is_end = new_ids == self.model.eos_token_id
        new_mask = (is_end.long().cumsum(1) - is_end.long() == 0).to(mask.dtype)
        texts = [
            ids[kept].tolist() for ids, kept in zip(new_ids, (new_mask != 0) & ~is_end, strict=True)
        ]
        for index, text in zip(batch.indices, decode(self.subject.tokenizer, texts), strict=True):
            self.found.is_correct[index] = metrics.is_correct(text, self.answers[index])
        return new_ids, new_mask

    def _measure_confidence(
        self, batch: Batch, states: Tensor, new_ids: Tensor, new_mask: Tensor
    ) -> None:
        first = batch.input_ids.size(1) - 1  # the column that predicts the first new token
        rows, places = new_mask.nonzero(as_tuple=True)
        predicting = states[rows, first + places]
        log_p = token_log_probabilities(self.model, predicting, new_ids[rows, places])
        sums = torch.zeros(len(new_ids), dtype=log_p.dtype, device=log_p.device)
        self.found.log_p[batch.indices] = sums.index_add(0, rows, log_p).cpu().numpy()

    def _in_blocks(self, batch: Batch, vectors: Tensor) -> Iterator[tuple[Tensor, slice, tuple]]:
        """`vectors` (thoughts, D) in blocks, each with its place among them and its slots."""
        begin = 0
        for block in blocks(self.model, vectors):
            part = slice(begin, begin + len(block))
            yield block, part, tuple(each[part] for each in batch.slots)
            begin += len(block)

    def _measure_words(self, batch: Batch) -> None:
        """p_k: top tokens, entropy, rank of the gold step, word of the answers."""
        found, golds = self.found, self._gold_ids(batch)
        for vectors, part, slots in self._in_blocks(batch, batch.thoughts):
            p = lens(self.model, vectors)
            top = p[:, : self.num_words].topk(min(NUM_TOP, self.num_words), -1)
            found.top_ids[slots] = top.indices.cpu().numpy()
            found.top_p[slots] = top.values.cpu().numpy()
            found.entropy[slots] = entropy(p).cpu().numpy()
            found.gold_rank[slots] = ranks(p, golds[part])
            found.word_ids[slots] = most_probable(p, self.words).cpu().numpy()

    def _gold_ids(self, batch: Batch) -> list[list[int]]:
        """For each thought the telling ids of its step; none where the record has no such step."""
        golds = []
        for record, number in zip(*batch.slots, strict=True):
            step = step_of(number + 1, self.subject.metadata.c_thought)
            steps = self.telling[record]
            golds.append(steps[step] if step < len(steps) else [])
        return golds

    def _measure_geometry(self, batch: Batch) -> None:
        found, slots, thoughts = self.found, batch.slots, batch.thoughts
        norms = thoughts.norm(dim=-1)
        is_kept = slots[0] < MAX_KEPT
        found.thoughts[slots[0][is_kept], slots[1][is_kept]] = thoughts.cpu().numpy()[is_kept]
        found.norm_ratio[slots] = (norms / self.embedding_norms.mean()).cpu().numpy()
        last = batch.states[batch.rows, batch.columns - 1]
        cosines = F.cosine_similarity(thoughts, last, dim=-1)
        found.cosine_last_state[slots] = cosines.cpu().numpy()
        # The thoughts of a row follow each other.
        cosines = F.cosine_similarity(thoughts, thoughts.roll(1, 0), dim=-1).cpu().numpy()
        found.cosine_previous[slots] = np.where(slots[1] > 0, cosines, np.nan)
        for vectors, _, part in self._in_blocks(batch, thoughts):
            products = vectors @ self.embeddings[: self.num_words].T
            lengths = vectors.norm(dim=-1, keepdim=True) * self.embedding_norms
            nearest = (products / lengths.clamp(min=1e-12)).max(-1)
            found.nearest_ids[part] = nearest.indices.cpu().numpy()
            found.max_cosine[part] = nearest.values.cpu().numpy()
        if self.model.thought_kind == "continuous":
            is_first = torch.from_numpy(slots[1] == 0).to(thoughts.device)
            found.window[slots] = window_shares(
                self.model, batch.states, batch.attention_mask, thoughts, batch.rows,
                batch.columns, is_first,
            ).cpu().numpy()  # fmt: skip

    def _measure_layers(self, batch: Batch, layers: Sequence[Tensor]) -> None:
        """What the column before each thought reads as, layer by layer."""
        found, golds = self.found, self._gold_ids(batch)
        for layer, states in enumerate(layers):
            before = states[batch.rows, batch.columns - 1]
            # The last layer's states are after the final norm already.
            before = before if layer == len(layers) - 1 else self.norm(before)
            for vectors, part, slots in self._in_blocks(batch, before):
                p = lens(self.model, vectors)
                best = p[:, : self.num_words].max(-1)
                found.layer_ids[(*slots, layer)] = best.indices.cpu().numpy()
                found.layer_p[(*slots, layer)] = best.values.cpu().numpy()
                found.layer_entropy[(*slots, layer)] = entropy(p).cpu().numpy()
                found.layer_rank[(*slots, layer)] = ranks(p, golds[part])

    def _keep_attention(self, batch: Batch, attention: Tensor) -> None:
        """attention: (thoughts, columns), from each thought to every column."""
        begins = batch.attention_mask.long().argmax(1).tolist()
        rows = batch.rows.cpu().numpy()
        attention = attention.float().cpu().numpy()
        for row, index in enumerate(batch.indices.tolist()):
            length = int(self.subject.records.question_lengths[index])
            columns = slice(begins[row], begins[row] + length)
            to_question = attention[rows == row, columns]
            if index < MAX_DETAILED:
                self.found.question_attention[index] = to_question
            if self.graphs is not None:
                self.found.edge_attention[index] = self._edge_attention(index, to_question)

    def _edge_attention(self, index: int, to_question: np.ndarray) -> np.ndarray:
        """(thoughts, edges): the attention to all tokens that name an edge; nan for none."""
        question, tokenizer = self.questions[index], self.subject.tokenizer
        spans = edge_spans(self.graphs[index], question)
        attention = np.full((len(to_question), len(spans)), np.nan, dtype=np.float32)
        if not tokenizer.is_fast:  # such tokenizers do not record offsets
            return attention
        encoded = tokenizer(question + "\n", add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(encoded["offset_mapping"]).T
        own = to_question[:, to_question.shape[1] - len(begins) :]  # without leading special tokens
        for edge, places in enumerate(spans):
            if places:
                is_named = sum((begins < end) & (ends > begin) for begin, end in places) > 0
                attention[:, edge] = own[:, is_named].sum(1)
        return attention

    def _measure_nodes(self, batch: Batch) -> None:
        """The value of every node after 0, 1, ... thoughts."""
        columns, rows = batch.columns.cpu().numpy(), batch.rows.cpu().numpy()
        width = batch.input_ids.size(1)
        branches = []
        for row, index in enumerate(batch.indices.tolist()):
            thoughts = columns[rows == row].tolist()
            before = (thoughts[0] if thoughts else width - 1) - 1  # the start marker's column
            places = [self._place(index, k) for k in range(len(thoughts) + 1)]
            self.found.places[index] = places
            branches.append([
                name_branch(self._tokenize, self.graphs[index], place, column,
                            [self.model.end_latent_id])
                for place, column in zip(places, [before, *thoughts], strict=True)
            ])  # fmt: skip
        log_p = continuation_log_probabilities(
            self.model, batch.embeds, batch.attention_mask, branches
        )
        for index, by_k in zip(batch.indices.tolist(), log_p, strict=True):
            self.found.values[index] = np.exp(by_k)

    def _place(self, index: int, k: int) -> Place:
        num_replaced = k // self.subject.metadata.c_thought
        try:
            return next_place(
                self.graphs[index], self.steps[index], self.answers[index], num_replaced
            )
        except UserError as error:
            raise UserError(f"{self.subject.data}: record {index}: {error}") from None

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.subject.tokenizer(texts, add_special_tokens=False).input_ids


def entropy(probabilities: Tensor) -> Tensor:
    """(n,) of (n, V) distributions, in nats."""
    return torch.special.entr(probabilities).sum(-1)


def ranks(probabilities: Tensor, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """(n,) rank from 1 of the most probable of each row's ids in (n, V); nan for a row without."""
    found = np.full(len(ids), np.nan)
    for row, own in enumerate(ids):
        if own:
            p = probabilities[row]
            found[row] = 1 + int((p > p[list(own)].max()).sum())
    return found
