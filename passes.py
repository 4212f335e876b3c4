"""What makes many short passes over one batch cheap, for Hugging Face models of any kind.

Coconut reads a batch in K + 1 passes (coconut.py), and most of them hold one column. Four things
here keep their cost near that of the arithmetic, as does layers.py; they change results by rounding
at most:

- `PassCache` lets the layers see the tokens of a pass without padding: (1, n, D) in place of
  (B, C, D). Attention puts them back into rows. The keys of the first pass stay one tensor that
  all later passes read. A GPU's kernels join it with later ones, but no pass keeps its copy.
- The last block computes no more than keys and values for tokens whose states nobody needs.
- On a CPU, attention with dropout or in bf16 is computed in blocks, and again in the backward pass.
- Without gradients `PassCache` writes new keys into buffers with spare columns, one for every token
  of an answer, and drops finished rows.

Like coconut.py, which defines what a thought is, this needs torch and transformers alone, with
layers.py.

Shapes: B rows, n tokens of a pass, C columns of a pass, L columns so far, its own included;
H query heads, G key heads (H a multiple of it), E width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from layers import (
    ShareGradient,
    defers_gradients,
    draw_kept,
    is_checkpointed,
    is_compiled,
    refuse_second_order,
    shared_product,
    takes_cpu_path,
)
from layers import dropout as drop

ATTENTION = "coconut_passes"
# Queries of a first pass per block on the CPU, where no kernel is taken: each block skips the keys
# after it, so smaller blocks compute less that is masked, and larger ones need fewer calls.
BLOCK_COLUMNS = 96
# Attention weights of a first pass that the CPU computes at once, so that they stay in its caches.
BLOCK_WEIGHTS = 2**19
# The last block leaves out unneeded states if more than this share of a pass's columns come before
# the first needed one: it computes keys twice for the needed columns, which must cost less than it
# saves.
MIN_UNNEEDED_SHARE = 0.5
# By how many columns buffers of keys and values grow: products read spare columns too.
BUFFER_GROWTH = 16


@dataclass(frozen=True)
class PassTokens:
    """Where the n tokens of a pass are, and which of them need more than their keys and values.

    indices: (n,) long, where the flattened (B, C) holds tokens; None where it holds no padding.
    first_needed: the first column whose state is needed; 0 where leaving out those before it would
        save too little.
    needed: (n',) long, which of the n tokens are in the columns from `first_needed` on; None for 0.
    needed_indices: (n',) long, where they are in the flattened (B, C - first_needed); None where
        there is no padding.
    """

    indices: Tensor | None = None
    first_needed: int = 0
    needed: Tensor | None = None
    needed_indices: Tensor | None = None

    @classmethod
    def find(cls, is_padding: Tensor, has_padding: bool, first_needed: int) -> Self:
        """The tokens of a pass whose padding is `is_padding`, (B, C) bool."""
        B, C = is_padding.shape
        indices = None
        if has_padding:
            indices = (~is_padding).flatten().nonzero().squeeze(1)
            # A pass of padding alone keeps ranks in step, and a model must read some token.
            indices = indices if len(indices) else indices.new_zeros(1)
        if first_needed <= MIN_UNNEEDED_SHARE * C:
            return cls(indices)
        places = torch.arange(B * C, device=is_padding.device) if indices is None else indices
        needed = (places % C >= first_needed).nonzero().squeeze(1)
        if len(needed) == 0:
            return cls(indices)
        places = places[needed]
        narrow = places // C * (C - first_needed) + places % C - first_needed
        return cls(indices, first_needed, needed, narrow if has_padding else None)

    def to(self, device: torch.device) -> Self:
        """A copy on `device`; the host does not wait for the transfer."""
        return self.map(lambda indices: indices.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy with `change` applied to every tensor."""
        changed = {
            name: None if (x := getattr(self, name)) is None else change(x)
            for name in ("indices", "needed", "needed_indices")
        }
        return replace(self, **changed)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether `PassCache` serves this model: attention to all columns before, by an interface.

    Not where the user chose another kernel than sdpa.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None
    return (
        model._supports_attention_backend
        and not is_compiled(model)
        and not is_checkpointed(model)
        and config._attn_implementation == "sdpa"
        and layer_types == {"full_attention"}
        and not has_window
    )


def make_cache(model: PreTrainedModel, is_needed: bool = True) -> Cache | None:
    """An empty cache for `read_pass`; None where one pass reads all and no cache `is_needed`.

    Use it in the grad mode in which it was made.
    """
    if can_pack(model):
        return PassCache(shares_gradients=defers_gradients(model))
    return DynamicCache(config=model.config) if is_needed else None


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the model in order, as its `_no_split_modules` names them."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def read_pass(
    model: PreTrainedModel,
    embeds: Tensor,
    position_ids: Tensor,
    cache: Cache | None,
    attention_mask: Tensor | None = None,
    tokens: PassTokens | None = None,
) -> Tensor:
    """Read the next C columns: their states after the final norm, (B, C, D); `cache` grows by them.

    embeds: (B, C, D). position_ids: (B, C) long.
    cache: from `make_cache`.
    attention_mask: (B, L), 0 on padding, up to the last of these columns; None without padding.
    tokens: of this pass; None if there is no padding and every state is needed. States that are not
        needed are undefined, and the last block's modules read their tokens no further than keys.
    """
    if not isinstance(cache, PassCache):
        return model.base_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
    cache.begin_pass(embeds.shape[:2], attention_mask, (tokens or PassTokens()).to(embeds.device))
    with _attention_over_pass_cache(model), _last_block_reads_what_is_needed(model, cache):
        hidden_states = model.base_model(
            inputs_embeds=cache.pack(embeds),
            position_ids=cache.pack(position_ids),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return cache.unpack(hidden_states)


def add_starts(starts: list[int], num_passes: int, end: int) -> list[int]:
    """`starts` and the last free columns before `end`, so that `num_passes` passes result.

    Raises: ValueError when `starts` make more passes than that, or `end` columns fewer.
    """
    free = [column for column in range(1, end) if column not in starts]
    missing = num_passes - 1 - len(starts)
    if not 0 <= missing <= len(free):
        raise ValueError(
            f"num_passes={num_passes}: thoughts need at least {len(starts) + 1} passes, and {end}"
            f" columns allow at most {end}"
        )
    return sorted(starts + free[len(free) - missing :])


# --- Passes without padding -------------------------------------------------------------------


class Part(NamedTuple):
    """Keys and values of some columns, each (B, G, columns, E).

    key_uses, value_uses: on a CPU, where the passes that read this part share one product for its
        gradient, what their backward passes leave for it (layers.ShareGradient); else None.
    """

    keys: Tensor
    values: Tensor
    key_uses: list[tuple[Tensor, Tensor]] | None = None
    value_uses: list[tuple[Tensor, Tensor]] | None = None


class PassCache(Cache):
    """Keys and values of the passes so far, in rows, for attention over them.

    `read_pass` gives it to a model as `past_key_values`, with inputs (1, n, D).
    """

    def __init__(self, shares_gradients: bool = False):
        """shares_gradients: on a CPU, one product for the gradient of the first pass's keys."""
        super().__init__(layers=[])
        self.has_gradients = torch.is_grad_enabled()
        self.shares_gradients = shares_gradients
        self.num_rows, self.num_columns, self.num_seen = 0, 0, 0  # B, C, L
        self.tokens = PassTokens()
        self.token_indices: Tensor | None = None
        self.visible: Tensor | None = None
        # While a block reads a pass twice: stop once the keys are stored; do not store them again.
        self.stops_at_keys, self.has_keys = False, False
        # By layer. With gradients at most two parts, of the first pass and of all later ones
        # together; without, one that is a slice of a buffer.
        self.parts: dict[int, list[Part]] = {}
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin_pass(
        self, shape: tuple[int, int], attention_mask: Tensor | None, tokens: PassTokens
    ) -> None:
        """Begin a pass of `shape` (B, C); the mask (B, L) and tokens as in `read_pass`."""
        self.num_rows, self.num_columns = shape
        self.num_seen += self.num_columns
        self.tokens, self.token_indices = tokens, tokens.indices
        # (B, 1, C, L) bool, what each column may see; None where that is all before it.
        self.visible = None
        if attention_mask is not None:
            columns = torch.arange(self.num_seen, device=attention_mask.device)
            rows = columns[-self.num_columns :, None]
            is_token = attention_mask[:, None, None] != 0
            # Padding sees itself, because a softmax needs at least one column.
            self.visible = ((columns <= rows) & is_token) | (columns == rows)

    def pack(self, rows: Tensor) -> Tensor:
        """(B, C, ...) -> (1, n, ...): the tokens of the pass."""
        flat = rows.flatten(0, 1)
        return (flat if self.token_indices is None else flat[self.token_indices])[None]

    def unpack(self, tokens: Tensor) -> Tensor:
        """(1, n, ...) -> (B, C, ...), zeros at padding."""
        flat = tokens[0]
        if self.token_indices is not None:
            empty = flat.new_zeros(self.num_rows * self.num_columns, *flat.shape[1:])
            flat = empty.index_copy(0, self.token_indices, flat)
        return flat.unflatten(0, (self.num_rows, self.num_columns))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple:
        """Keep a layer's keys and values (1, G, n, E); returns itself, for `_attend` alone."""
        if self.has_keys:
            return self, None
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            # Once, not for the product of every pass.
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        # (1, G, n, E) -> (B, G, C, E)
        new = [self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (key_states, value_states)]
        if not self.has_gradients:
            self._append(layer_idx, new)
            return self, None
        # Contiguous, or every pass would copy the first one's keys for its products.
        new = Part(*(states.contiguous() for states in new))
        parts = self.parts.setdefault(layer_idx, [])
        if not parts and self.shares_gradients and takes_cpu_path(new.keys):
            uses = [], []
            new = Part(*map(ShareGradient.apply, new[:2], uses), *uses)
        if len(parts) < 2:
            parts.append(new)
        else:
            parts[1] = Part(
                *(torch.cat(pair, 2) for pair in zip(parts[1][:2], new[:2], strict=True))
            )
        return self, None

    def _append(self, layer_idx: int, new: list[Tensor]) -> None:
        """Append keys and values (B, G, C, E) to those of the layer so far."""
        begin, stop = self.num_seen - self.num_columns, self.num_seen
        buffers = self.buffers.get(layer_idx)
        if buffers is None or stop > buffers[0].size(2):
            # Zeros, because attention multiplies spare columns by 0, which must not make NaN.
            spare = (0, 0, 0, stop + BUFFER_GROWTH - begin)
            buffers = tuple(F.pad(x[:, :, :begin], spare) for x in buffers or new)
            self.buffers[layer_idx] = buffers
        for buffer, states in zip(buffers, new, strict=True):
            buffer[:, :, begin:stop] = states
        self.parts[layer_idx] = [Part(*(buffer[:, :, :stop] for buffer in buffers))]

    def with_spare_columns(self, layer_idx: int) -> tuple[list[Part], Tensor]:
        """A layer's whole buffers, and what the pass may see of them: (B or 1, 1, C, columns).

        On a CPU a product reads whole buffers faster than a slice, which torch copies in bf16.
        """
        buffers, visible = self.buffers[layer_idx], self.visible
        if visible is None:
            visible = _causal_mask(self.num_columns, self.num_seen, buffers[0].device)[None, None]
        return [Part(*buffers)], F.pad(visible, (0, buffers[0].size(2) - self.num_seen))

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Limit the pass to its columns from `first_needed` on; their keys are stored already."""
        whole = self.num_columns, self.token_indices, self.visible
        column = self.tokens.first_needed
        self.num_columns -= column
        self.token_indices, self.has_keys = self.tokens.needed_indices, True
        if self.visible is not None:
            self.visible = self.visible[:, :, column:]
        try:
            yield
        finally:
            self.num_columns, self.token_indices, self.visible = whole
            self.has_keys = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before those of the pass that has begun."""
        return self.num_seen - self.num_columns

    def truncate(self, num_columns: int) -> None:
        """Keep only the first `num_columns` columns; must be without gradients."""
        assert not self.has_gradients
        self.num_seen = num_columns
        for keys, values in self.buffers.values():
            keys[:, :, num_columns:] = values[:, :, num_columns:] = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices` (B',) long; must be without gradients."""
        assert not self.has_gradients
        # Layer by layer, so that only one is in memory twice.
        self.parts.clear()
        for layer_idx, buffers in self.buffers.items():
            self.buffers[layer_idx] = tuple(buffer[indices] for buffer in buffers)

    def to_dynamic(self, config: PretrainedConfig) -> DynamicCache:
        """The same keys and values as a cache that Hugging Face's `generate` continues."""
        cache = DynamicCache(config=config)
        for layer_idx, parts in sorted(self.parts.items()):
            keys, values, *_ = zip(*parts, strict=True)
            cache.update(torch.cat(keys, 2), torch.cat(values, 2), layer_idx)
        return cache


class _KeysAreKept(Exception):
    """Ends a block's forward at its attention: the keys and values were all it was called for."""


@contextmanager
def _last_block_reads_what_is_needed(model: PreTrainedModel, cache: PassCache) -> Iterator[None]:
    """Within, the last block leaves out the tokens of the pass whose states nobody needs.

    The thoughts and labels after a question need the states of its last columns alone. Of the
    others the last block computes keys and values and no more; their states become zeros.
    """
    needed = cache.tokens.needed
    block = None if needed is None else next(reversed(find_blocks(model)), None)
    if block is None:
        yield
        return
    whole, own = block.forward, block.__dict__.get("forward")

    def forward(*args, **kwargs):
        cache.stops_at_keys = True
        try:
            return whole(*args, **kwargs)  # only a block that attends otherwise gets this far
        except _KeysAreKept:
            pass
        finally:
            cache.stops_at_keys = False
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]  # (1, n)

        def select(x):
            is_by_token = isinstance(x, Tensor) and x.shape[:2] == shape
            return x[:, needed] if is_by_token else x

        def widen(x):
            if not isinstance(x, Tensor):
                return x
            return x.new_zeros(*shape, *x.shape[2:]).index_copy(1, needed, x)

        with cache.narrowed():
            output = whole(*tree_map(select, args), **tree_map(select, kwargs))
        return tree_map(widen, output)

    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@contextmanager
def _attention_over_pass_cache(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's attention is `_attend`, and the model makes no masks of its own."""
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _attend(
    module: nn.Module, query: Tensor, key: PassCache, value: None, attention_mask: None,
    dropout: float = 0.0, scaling: float | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """An attention layer's part, by transformers' interface: (1, H, n, E) -> (1, n, H, E)."""
    cache, parts = key, key.parts[module.layer_idx]
    if cache.stops_at_keys:
        raise _KeysAreKept
    dtype = parts[0].keys.dtype
    query = cache.unpack(query.transpose(1, 2)).transpose(1, 2).to(dtype)  # (B, H, C, E)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    is_first = query.size(2) == cache.num_seen
    has_fast_kernel = is_first and dropout == 0 and dtype != torch.bfloat16
    if has_fast_kernel or not takes_cpu_path(query):
        attended = _attend_by_kernel(query, parts, cache.visible, dropout, scaling)
    elif not is_first:
        # No CPU kernel is faster where queries are few, and kernels need grouped keys repeated.
        visible = cache.visible
        if not cache.has_gradients:
            parts, visible = cache.with_spare_columns(module.layer_idx)
        attended = attend_over_parts(query, parts, visible, dropout, scaling)
    else:
        attended = _AttendInBlocks.apply(query, *parts[0][:2], cache.visible, dropout, scaling)
    return cache.pack(attended.transpose(1, 2)), None


AttentionInterface.register(ATTENTION, _attend)


def _attend_by_kernel(
    query: Tensor, parts: Sequence[Part], visible: Tensor | None, dropout: float, scaling: float
) -> Tensor:
    """`attend_over_parts` by torch's kernels, which need all keys in one tensor, H heads of them.

    Autograd would keep that copy for every pass; with torch's fused kernels this keeps the parts,
    and copies them again for the backward pass.
    """
    group_size = query.size(1) // parts[0].keys.size(1)

    def joined(states: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(states, 2) if len(states) > 1 else states[0]
        return whole.repeat_interleave(group_size, 1) if group_size > 1 else whole

    both = [part.keys for part in parts], [part.values for part in parts]
    keys, values = map(joined, both)
    # By address, because what the hooks refer to stays alive.
    copied = {x.untyped_storage()._cdata: y for x, y in zip((keys, values), both, strict=True)}
    C, L, shape = query.size(2), keys.size(2), keys.shape

    def pack(x: Tensor) -> Tensor | list[Tensor]:
        is_whole = x.shape == shape and x.is_contiguous()
        # Detached, because an output that keeps itself is never freed without a backward pass.
        x = x.detach()
        return copied.get(x.untyped_storage()._cdata, x) if is_whole else x

    def unpack(packed: Tensor | list[Tensor]) -> Tensor:
        return joined(packed) if isinstance(packed, list) else packed

    if visible is None and 1 < C < L:
        visible = _causal_mask(C, L, query.device)
    has_copies = keys.requires_grad and (len(parts) > 1 or group_size > 1)
    with saved_tensors_hooks(pack, unpack) if has_copies else nullcontext():
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, dropout_p=dropout, scale=scaling,
            is_causal=visible is None and C == L,
        )  # fmt: skip


class _AttendInBlocks(torch.autograd.Function):
    """Attention of a first pass on the CPU: (B, H, C, E).

    No CPU kernel has dropout, torch's takes twice as long in bf16, and autograd would keep
    two matrices of C x C in fp32 per head. This keeps what was dropped, a byte for each weight, and
    computes the weights again, block by block, so that what is made on the way stays in a core's
    cache. A block skips the keys after it.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, query, keys, values, visible, dropout, scaling):
        ctx.scaling, masks, attended = scaling, [], torch.empty_like(query)
        for rows, columns, may_see in _blocks(query, visible):
            part = Part(keys[rows, :, : columns.stop], values[rows, :, : columns.stop])
            weights = _attention_weights(query[rows, :, columns], [part], may_see, scaling)
            mask = None
            if dropout > 0:
                mask, ctx.dropout_scale = draw_kept(weights, dropout)
                weights.mul_(mask).mul_(ctx.dropout_scale)
            masks.append(mask)
            attended[rows, :, columns] = _average(weights, [part])
        ctx.save_for_backward(query, keys, values, visible, *masks)
        return attended

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        refuse_second_order("attention in blocks on the CPU cannot be differentiated again")
        query, keys, values, visible, *masks = ctx.saved_tensors
        query_grad = torch.empty_like(query)
        # Summed in fp32, or the blocks' sums would be rounded to bf16 one by one.
        dtype = torch.promote_types(keys.dtype, torch.float32)
        keys_grad, values_grad = (torch.zeros_like(x, dtype=dtype) for x in (keys, values))
        G = keys.size(1)

        def grouped(x):
            """(B, H, ...) -> (B, G, H / G, ...) as matrices: (B, G, rows, ...)."""
            return x.reshape(x.size(0), G, -1, x.size(-1))

        for (rows, columns, may_see), mask in zip(_blocks(query, visible), masks, strict=True):
            before = rows, slice(None), slice(columns.stop)
            queries, part = query[rows, :, columns], Part(keys[before], values[before])
            weights = _attention_weights(queries, [part], may_see, ctx.scaling)
            upstream = grouped(gradient[rows, :, columns])
            weights_grad = (upstream @ part.values.transpose(2, 3)).view(weights.shape)
            weights_grad, dropped = weights_grad.to(weights.dtype), weights
            if mask is not None:
                weights_grad = (weights_grad * mask).mul_(ctx.dropout_scale)
                dropped = (weights * mask).mul_(ctx.dropout_scale)
            values_grad[before] += grouped(dropped).to(values.dtype).transpose(2, 3) @ upstream
            scores_grad = torch._softmax_backward_data(weights_grad, weights, -1, weights.dtype)
            scores_grad = grouped(scores_grad.mul_(ctx.scaling)).to(keys.dtype)
            query_grad[rows, :, columns] = (scores_grad @ part.keys).view(queries.shape)
            keys_grad[before] += scores_grad.transpose(2, 3) @ grouped(queries)
        return query_grad, keys_grad.to(keys), values_grad.to(values), None, None, None


def _blocks(query: Tensor, visible: Tensor | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows and columns of a first pass's queries (B, H, C, E), and what they see of keys so far."""
    B, H, C, _ = query.shape
    for begin in range(0, C, BLOCK_COLUMNS):
        columns = slice(begin, min(begin + BLOCK_COLUMNS, C))
        num_rows = max(BLOCK_WEIGHTS // (H * (columns.stop - begin) * columns.stop), 1)
        for row in range(0, B, num_rows):
            rows = slice(row, row + num_rows)
            may_see = None if visible is None else visible[rows, :, columns, : columns.stop]
            yield rows, columns, may_see


def attend_over_parts(
    query: Tensor, parts: Sequence[Part], visible: Tensor | None, dropout: float, scaling: float
) -> Tensor:
    """Attention over keys in parts: (B, H, C, E).

    query: (B, H, C, E), the last C of L columns; parts: L columns together.
    visible: (B or 1, 1, C, L) bool; None for the columns before and itself.
    dropout: of the attention weights. scaling: of the scores.
    """
    weights = _attention_weights(query, parts, visible, scaling)
    return _average(drop(weights, dropout) if dropout > 0 else weights, parts)


def _attention_weights(
    query: Tensor, parts: Sequence[Part], visible: Tensor | None, scaling: float
) -> Tensor:
    """(B, H, C, L) in at least fp32: softmax of the scores of all keys; as `attend_over_parts`."""
    B, H, C, E = query.shape
    # The H / G query heads that share a key head act as additional queries of it.
    keys = parts[0].keys
    grouped = (query * scaling).reshape(B, keys.size(1), -1, E)
    scores = [shared_product(grouped, part.keys, part.key_uses, True) for part in parts]
    scores = (torch.cat(scores, -1) if len(scores) > 1 else scores[0]).view(B, H, C, -1)
    if visible is not None:
        scores = scores.masked_fill_(~visible, float("-inf"))
    elif C > 1:
        scores[..., -C:].masked_fill_(~_causal_mask(C, C, query.device), float("-inf"))
    return F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _average(weights: Tensor, parts: Sequence[Part]) -> Tensor:
    """(B, H, C, E): the values of the parts, averaged with weights (B, H, C, L)."""
    B, H, C, L = weights.shape
    values = parts[0].values
    grouped = weights.to(values.dtype).view(B, values.size(1), -1, L)
    grouped = grouped.split([part.values.size(2) for part in parts], -1)
    averages = [
        shared_product(w, part.values, part.value_uses, False)
        for w, part in zip(grouped, parts, strict=True)
    ]
    return sum(averages).view(B, H, C, -1)


def _causal_mask(C: int, L: int, device: torch.device) -> Tensor:
    """(C, L) bool: each of the last C columns sees itself and those before it."""
    return torch.ones(C, L, dtype=torch.bool, device=device).tril(L - C)
