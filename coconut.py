"""Coconut: a causal language model that reasons in latent thoughts, over a window of states.

Wherever the input holds the latent token, its embedding is replaced by a thought: the weighted
average of the last m hidden states (last layer, after the final norm) of the same row,

    e_t = sum_{j=1..m} w_j a_{t-j} h_{t-j} / sum_{j=1..m} w_j a_{t-j}

with w nearest first and a the attention mask; m = 1 is the original Coconut. A thought needs the
states before it, so a batch whose rows hold at most K latents is read in K + 1 passes that extend
one key-value cache, and gradients flow back through thoughts and cache. That is all: read
`Coconut.thought`, then `read`, then `forward`, `answer` and `generate`.

To change the idea, subclass and override `thought`. With passes.py and layers.py, which only make
the passes cheap, this file needs torch and transformers alone and can be lifted out. It knows
nothing of tokenizers, configuration, ranks or logging.
Source: Hao et al. 2024, arXiv 2412.06769, section 3; docs/specification.md, sections 5 to 7.

Shapes: B batch, T tokens, D width, V vocabulary, N labelled positions, K latents, m window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from layers import argmax_tokens, cross_entropy, deferred_weight_gradients, is_checkpointed, prepare
from passes import PassCache, PassTokens, add_starts, find_blocks, make_cache, read_pass

IGNORE_INDEX = -100
WINDOW_SCOPES = ("sequence", "pass")
THOUGHT_KINDS = ("continuous", "pause", "pause_multipass")
DEFAULT_WEIGHTS = (0.6, 0.3, 0.1)
# Learned weights of a window of another size start at the powers of this.
LEARNED_START_RATIO = 0.5
# Decoding drops the finished rows of a batch once at most this share of its rows is unfinished.
MAX_UNFINISHED_SHARE = 0.75
# Options of Hugging Face's `generate` that continue a given cache. Others make their own cache,
# read the prompt again without its thoughts, count padding, or return more than tokens.
GENERATE_OPTIONS = {
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "disable_compile", "do_sample",
    "early_stopping", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "logits_processor", "max_time", "min_new_tokens", "min_p",
    "no_repeat_ngram_size", "num_beams", "num_return_sequences", "pad_token_id",
    "prefix_allowed_tokens_fn", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
    "sequence_bias", "stop_strings", "stopping_criteria", "streamer", "suppress_tokens",
    "synced_gpus", "temperature", "tokenizer", "top_h", "top_k", "top_p", "typical_p",
    "watermarking_config",
}  # fmt: skip


# A ModelOutput, not a plain dataclass: FSDP2 finds the tensors to hook only in pytrees it knows.
@dataclass
class CoconutOutput(ModelOutput):
    """What `Coconut.forward` returns.

    loss: () mean cross-entropy over the N labelled positions, 0 where N = 0; None without labels.
    logits: (N, V) at the labelled positions in row order; without labels (B, 1, V), last column.
    inputs_embeds: (B, T, D) what the model read, thoughts in their places.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    inputs_embeds: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """What the host must know about a batch before its passes.

    pass_starts: columns after column 0 at which a pass begins, ascending.
    thought_columns: those of them that hold a thought in some row; none for pause embeddings.
    tokens: for each pass, where its tokens are and which of their states a label or thought needs.
    label_indices: (N,) long, columns before labels in the flattened (B, T); None without labels.
    """

    pass_starts: list[int]
    thought_columns: list[int]
    tokens: list[PassTokens]
    label_indices: Tensor | None


class Coconut(nn.Module):
    """A Hugging Face causal LM whose latent positions read thoughts.

    Adds no parameters but learned window weights; a subclass may add its own. For one thread at a
    time: a pass changes how the base model attends while it runs.

    base_causallm: model whose `base_model` ends with the final norm (GPT-2, Llama and similar).
    latent_token_id: the id whose positions become thoughts.
    start_latent_id, end_latent_id: the markers around them, kept for whoever builds prompts.
    eos_token_id: ends and pads generation.
    latent_window_size: m, at least 1.
    latent_weights: w, nearest state first; longer than m: the first m count. Or "uniform",
        "exponential:R" (w_j = R^(j-1)), or "learned": the softmax of the parameter `window_logits`
        (m,), which starts at the logarithm of 0.6, 0.3, 0.1 (exponential:0.5 where m is not 3).
    window_scope: "sequence", the equation above for every thought; "pass": a row's first thought
        only, later ones are h_{t-1} alone, as in the published contextual code.
    thought: "continuous", or "pause": latents keep their token embedding and one pass suffices;
        "pause_multipass": the same in as many passes as continuous thoughts take.
    thought_norm: None, e_t is the thought; "average", h_{t-1} at the norm of e_t, a ratio without
        gradient: the control for what averaging does to the norm; a number, e_t times that number.

    Raises: ValueError for a window, weights, scope, thought or thought_norm outside these.
    """

    def __init__(
        self,
        base_causallm: PreTrainedModel,
        latent_token_id: int,
        start_latent_id: int,
        end_latent_id: int,
        eos_token_id: int,
        latent_window_size: int = 3,
        latent_weights: Sequence[float] | str = DEFAULT_WEIGHTS,
        window_scope: str = "sequence",
        thought: str = "continuous",
        thought_norm: float | str | None = None,
    ):
        super().__init__()
        weights = initial_weights(latent_weights, latent_window_size)
        if window_scope not in WINDOW_SCOPES:
            raise ValueError(f"window_scope={window_scope!r} is none of {WINDOW_SCOPES}")
        if thought not in THOUGHT_KINDS:
            raise ValueError(f"thought={thought!r} is none of {THOUGHT_KINDS}")
        is_number = isinstance(thought_norm, int | float) and not isinstance(thought_norm, bool)
        if thought_norm not in (None, "average") and not (is_number and 0 < thought_norm < inf):
            raise ValueError(f"thought_norm={thought_norm!r} must be None, 'average' or above 0")
        prepare(base_causallm)
        self.base_causallm = base_causallm
        self.latent_token_id = latent_token_id
        self.start_latent_id = start_latent_id
        self.end_latent_id = end_latent_id
        self.eos_token_id = eos_token_id
        self.latent_window_size = latent_window_size
        self.window_scope = window_scope
        self.thought_kind = thought
        self.thought_norm = thought_norm
        # Made in float64 so that a float64 model gets 0.6 itself and not its float32 neighbour.
        exact = torch.tensor(weights, dtype=torch.float64)  # (m,)
        embedding = base_causallm.get_input_embeddings().weight
        # A buffer follows the model's dtype and device. Learned weights start from it.
        self.register_buffer("latent_weights", exact.to(embedding), persistent=False)
        self.window_logits = None
        if latent_weights == "learned":
            dtype = torch.promote_types(embedding.dtype, torch.float32)
            self.window_logits = nn.Parameter(exact.log().to(embedding.device, dtype))

    def thought(self, hidden_states: Tensor, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        """The thought that follows the given states: (B, D), in the dtype of `hidden_states`.

        hidden_states: (B, n, D), the last n <= m states before the thought, nearest last.
        attention_mask: (B, n), 0 on padding.
        is_first: (B,) bool, whether it is the row's first thought.
        For rows in which this column is not a latent the value is ignored.
        """
        weights = self.average_weights(attention_mask, is_first)  # (B, n)
        # Not a matrix product: autocast would round it to bf16, and h_{t-1} alone must stay exact.
        thought = (weights[:, :, None] * hidden_states).sum(1)
        if self.thought_norm == "average":
            thought = _scale_to_norm(hidden_states[:, -1], thought)
        elif self.thought_norm is not None:
            thought = thought * self.thought_norm
        return thought.to(hidden_states.dtype)

    def average_weights(self, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        """The weights of the states in `thought`'s average: (B, n), each row sums to 1.

        attention_mask, is_first: as `thought` takes them.
        """
        weights = self._weights()[: attention_mask.size(1)].flip(0) * attention_mask
        if self.window_scope == "pass":
            nearest = torch.zeros_like(weights)
            nearest[:, -1] = 1
            weights = torch.where(is_first[:, None], weights, nearest)
        # A row whose window is all padding has no latent here; 1 keeps its ignored value finite.
        total = weights.sum(1, keepdim=True)
        return weights / torch.where(total > 0, total, torch.ones_like(total))

    def _weights(self) -> Tensor:
        """(m,) w, nearest state first, not normalised."""
        return self.latent_weights if self.window_logits is None else self.window_logits.softmax(0)

    @property
    def window_weights(self) -> list[float]:
        """The m weights of a whole window as they are now, nearest state first; they sum to 1."""
        weights = self._weights().detach().double()
        return (weights / weights.sum()).tolist()

    @property
    def reads_in_passes(self) -> bool:
        """Whether a pass begins at each latent; else one pass reads all."""
        return self.thought_kind != "pause"

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of the base model in order, as its `_no_split_modules` names them."""
        return find_blocks(self.base_causallm)

    def extra_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters outside the base model: learned weights, a subclass's own."""
        named = self.named_parameters()
        return {name: p for name, p in named if not name.startswith("base_causallm.")}

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
        keep_cache: bool = False,
    ) -> tuple[Tensor, Tensor, Cache | None]:
        """Read all columns pass by pass, thoughts in place.

        input_ids, attention_mask, position_ids, layout: as `forward` takes them.
        keep_cache: make a cache even where one pass needs none.
        Returns the states after the final norm (B, T, D), undefined where a given `layout` leaves
        them out, the embeddings that were read (B, T, D), and the cache: a PassCache where
        passes.py serves the model, else a DynamicCache, or None.

        One pass of the base model over these embeddings gives the same states to rounding; ask it
        for the states of every layer or for attention weights.

        Raises: ValueError as `forward` does.
        """
        base = self.base_causallm
        if layout is None:
            layout = self.layout(input_ids, attention_mask, needs_all=True)
        if layout.pass_starts and self.training and is_checkpointed(base):
            raise ValueError(
                "gradient checkpointing drops the cache that latent thoughts need; switch it off"
            )
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        token_embeds = base.get_input_embeddings()(input_ids)  # (B, T, D)
        is_latent = self._is_latent(input_ids, attention_mask)
        is_padded = any(tokens.indices is not None for tokens in layout.tokens)
        cache = make_cache(base, is_needed=keep_cache or bool(layout.pass_starts))
        hidden_passes, embeds_passes = [], []  # (B, columns, D) each
        window = token_embeds.detach()[:, :0]  # (B, <= m, D), the states before the next column
        bounds = list(pairwise([0, *layout.pass_starts, input_ids.size(1)]))
        # One split, because the gradient of every slice would be as large as the whole.
        parts = token_embeds.split([stop - begin for begin, stop in bounds], 1)
        for (begin, stop), embeds, tokens in zip(bounds, parts, layout.tokens, strict=True):
            if begin in layout.thought_columns:
                recent = attention_mask[:, begin - window.size(1) : begin]
                is_first = ~is_latent[:, :begin].any(1)
                thought = self.thought(window, recent, is_first).to(embeds.dtype)  # (B, D)
                first = torch.where(is_latent[:, begin, None], thought, embeds[:, 0])
                embeds = torch.cat([first[:, None], embeds[:, 1:]], 1)
            mask = attention_mask[:, :stop] if is_padded else None
            positions = position_ids[:, begin:stop]
            hidden = read_pass(base, embeds, positions, cache, mask, tokens)
            latest = hidden[:, -self.latent_window_size :]
            window = torch.cat([window.to(hidden.dtype), latest], 1)[:, -self.latent_window_size :]
            hidden_passes.append(hidden)
            embeds_passes.append(embeds)
        return torch.cat(hidden_passes, 1), torch.cat(embeds_passes, 1), cache

    def _is_latent(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) bool; whatever id pads a row, padding is never a latent."""
        return (input_ids == self.latent_token_id) & (attention_mask != 0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        layout: Layout | None = None,
    ) -> CoconutOutput:
        """Read the batch in max(K) + 1 passes, thoughts in place, and score the labels.

        input_ids: (B, T) long; fewest passes when the first latents share a column
            (docs/specification.md, section 4).
        attention_mask: (B, T), 1 on tokens, 0 on padding.
        labels: (B, T) long, -100 ignored; labels[:, t] is what column t - 1 should predict.
        position_ids: (B, T) long; by default counted from 0 at a row's first token.
        layout: what `self.layout` returned for this batch. Without it the layout is computed here,
            which makes the host wait for the device.

        Raises: ValueError when a row starts with a latent, which has nothing before it, or when
            gradient checkpointing would drop the cache that thoughts are read from.
        """
        if layout is None:
            layout = self.layout(input_ids, attention_mask, labels)
        with deferred_weight_gradients(self.base_causallm):
            hidden_states, inputs_embeds, _ = self.read(
                input_ids, attention_mask, position_ids, layout
            )
            if labels is None:
                logits = self.base_causallm.get_output_embeddings()(hidden_states[:, -1:])
                return CoconutOutput(logits=logits, inputs_embeds=inputs_embeds)
            loss, logits = self._score(hidden_states, labels, layout)
        # Also without thoughts, because ranks wait for each other's gradient of every parameter.
        for parameter in self.extra_parameters().values():
            loss = loss + 0 * parameter.sum().to(loss)
        return CoconutOutput(loss=loss, logits=logits, inputs_embeds=inputs_embeds)

    def _score(
        self, hidden_states: Tensor, labels: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy () over the N labels, and their logits (N, V)."""
        indices = layout.label_indices.to(labels.device, non_blocking=True)
        predicting = hidden_states.flatten(0, 1)[indices]  # (N, D)
        logits = self.base_causallm.get_output_embeddings()(predicting)
        targets = labels.flatten()[indices + 1]
        return cross_entropy(logits, targets) / max(len(indices), 1), logits

    def layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        num_passes: int | None = None,
        needs_all: bool = False,
    ) -> Layout:
        """The layout of a batch for `forward`; nearly free while the batch is still on the CPU.

        input_ids, attention_mask, labels: as `forward` takes them.
        num_passes: read in exactly this many passes, for ranks that must keep in step; where
            thoughts need fewer, columns without thoughts get passes of their own, which changes no
            result.
        needs_all: compute every state. Otherwise those that neither a thought, a label nor, without
            labels, the last column needs are undefined in what `read` returns; a subclass that uses
            others overrides `layout` to ask for all.

        Raises: ValueError when a row starts with a latent, and when `num_passes` is fewer than the
            thoughts need or more than there are columns.
        """
        is_latent = self._is_latent(input_ids, attention_mask)
        is_padding = attention_mask == 0
        is_row_start = ~is_padding & (attention_mask.long().cumsum(1) == 1)
        predicts = torch.zeros_like(is_latent)
        if labels is not None:
            predicts[:, :-1] = labels[:, 1:] != IGNORE_INDEX
        # One transfer for all of them, in case the batch is already on a device.
        starts_row, holds_latent, holds_padding, is_needed = torch.stack(
            [x.any(0) for x in (is_latent & is_row_start, is_latent, is_padding, predicts)]
        ).tolist()
        end = input_ids.size(1)
        starts = []
        if self.reads_in_passes:
            starts = [column for column in range(1, end) if holds_latent[column]]
        thought_columns = starts if self.thought_kind == "continuous" else []
        if self.thought_kind == "continuous" and any(starts_row):
            raise ValueError("a row starts with a latent token: a thought needs a token before it")
        if num_passes is not None:
            starts = add_starts(starts, num_passes, end)
        for column in thought_columns:
            begin = max(column - self.latent_window_size, 0)
            is_needed[begin:column] = [True] * (column - begin)
        tokens = []
        for begin, stop in pairwise([0, *starts, end]):
            columns = range(begin, stop)
            first = next((column for column in columns if is_needed[column]), stop - 1)
            first_needed = 0 if needs_all else first - begin
            padding, is_padded = is_padding[:, begin:stop], any(holds_padding[begin:stop])
            tokens.append(PassTokens.find(padding, is_padded, first_needed))
        label_indices = None if labels is None else predicts.flatten().nonzero().squeeze(1)
        return Layout(starts, thought_columns, tokens, label_indices)

    @torch.no_grad()
    def answer(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, max_new_tokens: int = 128
    ) -> tuple[Tensor, Tensor]:
        """Score the right answers to prompts and decode the model's own; prompts are read once.

        input_ids: (B, T) long, left-padded prompts that all end in one column, each followed by its
            right answer, padded on the right.
        attention_mask: (B, T), 1 on tokens, 0 on padding.
        labels: (B, T) long, the right answers' tokens, -100 elsewhere.
        max_new_tokens: as in `generate`.
        Returns the loss () that `forward` gives, and (B, new) long, what `generate` adds.

        Raises: ValueError where the labels of some row begin in another column, and for what
            `generate` refuses.
        """
        is_labelled = labels != IGNORE_INDEX
        width = int(is_labelled.any(0).long().argmax())
        if width == 0 or not bool(is_labelled[:, width].all()):
            raise ValueError("answer needs labels that begin in the same column in all rows")
        prompts, prompt_mask = input_ids[:, :width], attention_mask[:, :width]
        self._check_prompts(prompts, prompt_mask, max_new_tokens)
        layout = self.layout(input_ids, attention_mask, labels)
        hidden_states, _, cache = self.read(input_ids, attention_mask, layout=layout)
        loss, _ = self._score(hidden_states, labels, layout)
        if not isinstance(cache, PassCache):
            # A cache that forgets, as with a sliding window, cannot be truncated to the prompts.
            return loss, self.generate(prompts, prompt_mask, max_new_tokens)[:, width:]
        cache.truncate(width)
        return loss, self._decode(hidden_states[:, width - 1], prompt_mask, cache, max_new_tokens)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 128, **options
    ) -> Tensor:
        """Continue prompts greedily, or as `options` say by the base model's own `generate`.

        input_ids: (B, T) long, left-padded so that all prompts end in column T - 1.
        attention_mask: (B, T), 1 on tokens, 0 on padding.
        max_new_tokens: at most this many tokens are added; a finished row is filled with EOS.
        options: those of Hugging Face's generation that GENERATE_OPTIONS names (do_sample,
            num_beams, streamer, ...). The model folder's generation_config is not consulted.
        Returns (B * num_return_sequences, T + new) long: prompt and new tokens.

        Raises: ValueError when a prompt starts or ends with a latent or is padded on the right, for
            fewer new tokens than 1, for gradient checkpointing in training mode, which drops the
            cache, and for options that do not continue the cache that holds the thoughts.
        """
        self._check_prompts(input_ids, attention_mask, max_new_tokens)
        if options:
            return self._generate_with(options, input_ids, attention_mask, max_new_tokens)
        layout = self.layout(input_ids, attention_mask)
        read = self.read(input_ids, attention_mask, layout=layout, keep_cache=True)
        hidden_states, _, cache = read
        new = self._decode(hidden_states[:, -1], attention_mask, cache, max_new_tokens)
        return torch.cat([input_ids, new], 1)

    def _check_prompts(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if self.training and is_checkpointed(self.base_causallm):
            raise ValueError(
                "gradient checkpointing drops the cache that answers need; call eval() first"
            )
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("prompts must be left-padded: all must end in the same column")
        ends_latent = self._is_latent(input_ids, attention_mask)[:, -1]
        if self.thought_kind == "continuous" and bool(ends_latent.any()):
            raise ValueError("a prompt ends with a latent token: close it with the end marker")

    def _decode(
        self, last_states: Tensor, attention_mask: Tensor, cache: Cache, max_new_tokens: int
    ) -> Tensor:
        """(B, new) long: greedy tokens up to EOS, then EOS; finished rows leave the batch.

        last_states: (B, D), those of the prompts' last column.
        attention_mask: (B, T) of the prompts, whose columns the cache holds.
        """
        base = self.base_causallm
        head, embed = base.get_output_embeddings(), base.get_input_embeddings()
        rows = torch.arange(len(last_states), device=last_states.device)  # those in the batch
        decoded = rows.new_full((len(rows), max_new_tokens), self.eos_token_id)
        is_unfinished = torch.ones_like(rows, dtype=torch.bool)
        positions = attention_mask.long().sum(1)
        is_padded = not bool(attention_mask.all())
        for column in range(max_new_tokens):
            tokens = torch.where(is_unfinished, argmax_tokens(head, last_states), self.eos_token_id)
            decoded[rows, column] = tokens
            is_unfinished = tokens != self.eos_token_id
            num_unfinished = int(is_unfinished.sum())
            if num_unfinished == 0 or column == max_new_tokens - 1:
                break
            # Dropping rows costs a copy of the others' keys.
            if num_unfinished <= MAX_UNFINISHED_SHARE * len(rows):
                kept = is_unfinished.nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                rows, tokens, is_unfinished = rows[kept], tokens[kept], is_unfinished[kept]
                attention_mask, positions = attention_mask[kept], positions[kept]
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            mask = attention_mask if is_padded else None
            states = read_pass(base, embed(tokens[:, None]), positions[:, None], cache, mask)
            last_states, positions = states[:, 0], positions + 1
        return decoded[:, : column + 1]

    def _generate_with(
        self, options: dict, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int
    ) -> Tensor:
        """`generate` by the base model's own, over a cache that holds the thoughts."""
        base = self.base_causallm
        defaults = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        defaults |= {"eos_token_id": self.eos_token_id, "pad_token_id": self.eos_token_id}
        # Under FSDP transformers would wait for the other ranks at every token, which may have
        # another number of batches; the parameters are whole here, so nothing needs it.
        defaults["synced_gpus"] = False
        options = defaults | _check_options(options)
        if input_ids.size(1) > 1:
            # The last prompt column stays out of the cache: generate must read at least one token
            # itself, and over a complete cache it would return wrong tokens without an error.
            prompts = input_ids[:, :-1], attention_mask[:, :-1]
            *_, cache = self.read(*prompts, layout=self.layout(*prompts), keep_cache=True)
            if isinstance(cache, PassCache):
                cache = cache.to_dynamic(base.config)
            copies = max(options["num_beams"], options["num_return_sequences"])
            if copies > 1:
                cache.batch_repeat_interleave(copies)
            options["past_key_values"] = cache
        folder_config = base.generation_config
        base.generation_config = GenerationConfig()
        try:
            output = base.generate(
                input_ids=_hide_padding(input_ids, attention_mask, options),
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                **options,
            )
        finally:
            base.generation_config = folder_config
        prompts = input_ids.repeat_interleave(len(output) // len(input_ids), 0)
        return torch.cat([prompts, output[:, input_ids.size(1) :]], 1)


def _check_options(options: dict) -> dict:
    """The options of `generate` that have an effect; those at their neutral value are dropped."""
    if options.get("generation_config") is not None:
        raise ValueError("give generation options one by one, not as generation_config")
    neutral = {"use_cache": True}
    given = {
        name: value
        for name, value in options.items()
        if value is not None and value is not neutral.get(name, False)
    }
    refused = sorted(given.keys() - GENERATE_OPTIONS)
    if refused:
        raise ValueError(
            f"generate refuses {', '.join(refused)}: options must continue the cache that holds the"
            " thoughts, count new tokens alone and return token ids (see coconut.GENERATE_OPTIONS)"
        )
    return given


def _hide_padding(input_ids: Tensor, attention_mask: Tensor, options: dict) -> Tensor:
    """`input_ids` for penalties on tokens that occurred: ids at padding must not count as such.

    A row's padding becomes its own first token, or for n-grams the end of text, which nothing
    follows.
    """
    first = attention_mask.long().argmax(1, keepdim=True)  # (B, 1)
    filler = input_ids.gather(1, first)
    if (options.get("no_repeat_ngram_size") or 0) > 1:
        filler = torch.full_like(filler, options["pad_token_id"])
    return torch.where(attention_mask != 0, input_ids, filler)


def initial_weights(latent_weights: Sequence[float] | str, latent_window_size: int) -> list[float]:
    """The m weights that `latent_weights` describes, nearest first; if learned, the initial ones.

    Raises: ValueError for a window below 1 and for weights that cannot average it.
    """
    m, weights = latent_window_size, latent_weights
    if m < 1:
        raise ValueError(f"latent_window_size={m} must be at least 1")
    if weights == "learned":
        is_default = m == len(DEFAULT_WEIGHTS)
        weights = DEFAULT_WEIGHTS if is_default else f"exponential:{LEARNED_START_RATIO}"
    if isinstance(weights, str):
        weights = _exponential_weights("exponential:1" if weights == "uniform" else weights, m)
    if len(weights) < m:
        raise ValueError(
            f"latent_weights has {len(weights)} entries, fewer than latent_window_size={m}"
        )
    weights = list(weights[:m])
    if min(weights) < 0 or not 0 < weights[0] < inf or sum(weights) == inf:
        raise ValueError(
            f"latent_weights={weights} must be finite, not negative, and the first above 0"
        )
    return weights


def _exponential_weights(text: str, m: int) -> list[float]:
    """R^(j-1) for j = 1..m, of "exponential:R"."""
    name, _, number = text.partition(":")
    try:
        ratio = float(number)
        if name != "exponential" or not 0 < ratio < inf:
            raise ValueError
        return [ratio**j for j in range(m)]
    except (ValueError, OverflowError):
        raise ValueError(
            f"latent_weights={text!r} is not a list of numbers, 'uniform', 'learned', or"
            " 'exponential:R' with R above 0, such as 'exponential:0.5'"
        ) from None


def _scale_to_norm(vectors: Tensor, like: Tensor) -> Tensor:
    """`vectors` (B, D) at the norms of `like`; the ratio of the norms has no gradient."""
    with torch.no_grad():
        dtype = torch.promote_types(like.dtype, torch.float32)
        own = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype)
        wanted = torch.linalg.vector_norm(like, dim=1, keepdim=True, dtype=dtype)
        # A state at padding is zero and not used, but its gradient must stay finite.
        ratio = torch.where(own > 0, wanted / own, torch.ones_like(own))
    return vectors * ratio
