"""What makes many short passes over one batch cheap, under Hugging Face models of any kind.

Coconut reads a batch in K + 1 passes (coconut.py), and most of them hold one column. Three things
keep their cost near that of the arithmetic; none changes a result but in the last bits:

- `PassCache` lets linear layers see the tokens of a pass alone, without padding: (1, n, D) in
  place of (B, columns, D). Attention puts them back into rows. Keys of the first pass stay one
  tensor that all later passes read: joining them anew in each pass would keep K + 1 copies.
- `joined_weight_gradients` computes one product a weight matrix for all passes, when the backward
  pass is through with them, in place of one a pass that reads and writes the whole gradient. Where
  the head is the table of embeddings, the gradients of its rows are added to the head's.
- Without gradients `PassCache` writes new keys into room kept for them, one column for every token
  of an answer, and rows whose answers are complete leave it. `likeliest` takes the next tokens from
  the vocabulary block by block.

Like coconut.py this needs torch and transformers alone. What a thought is stands there.

Shapes: B rows, n tokens of a pass, C columns of a pass, L columns so far, its own included;
H query heads, G key heads (H a multiple of it), E width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

ATTENTION = "coconut_passes"
# Queries of a first pass that the CPU takes at once where no kernel serves: keys after them are
# left out, so smaller blocks compute less that is masked, and larger ones call less often.
QUERY_BLOCK = 96
# Columns that the room for keys grows by.
ROOM = 64
# Rows of the head's table that the CPU multiplies at once, so that they stay in its caches.
VOCABULARY_BLOCK = 1024


def prepare(model: PreTrainedModel) -> None:
    """Let a model's layers take part in `joined_weight_gradients`; fuse GPT-2's activation.

    Transformers computes `gelu_new` by eight operations where torch has one.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_head = getattr(head, "weight", None) is table.weight
    if is_head and type(table) is nn.Embedding and _is_plain(table):
        table.__class__ = _JoinedEmbedding
    for module in model.modules():
        if type(module) in _JOINED:
            module.__class__ = _JOINED[type(module)]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def can_pack(model: PreTrainedModel) -> bool:
    """Whether `PassCache` serves this model: attention over all that came before, by an interface.

    The user's choice of a kernel other than sdpa counts as well.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    has_window = getattr(config, "sliding_window", None) is not None
    return (
        model._supports_attention_backend
        and not is_compiled(model)
        and config._attn_implementation == "sdpa"
        and layer_types == {"full_attention"}
        and not has_window
    )


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether torch.compile has the model's passes, whose tracing loses what is done here."""
    return model.base_model._compiled_call_impl is not None


# Tokens without padding


def token_places(is_padding: Tensor) -> Tensor:
    """(n,) long, the places of tokens in the flattened (B, columns) of a pass; at least one."""
    places = (~is_padding).flatten().nonzero().squeeze(1)
    # A pass of padding alone keeps step with other ranks, and a model wants something to read.
    return places if len(places) else places.new_zeros(1)


def add_starts(starts: list[int], num_passes: int, end: int) -> list[int]:
    """`starts` and the last free columns before `end`, so that `num_passes` passes result."""
    free = [column for column in range(1, end) if column not in starts]
    missing = num_passes - 1 - len(starts)
    if not 0 <= missing <= len(free):
        raise ValueError(
            f"num_passes={num_passes}: thoughts need {len(starts) + 1} passes, and {end} columns"
            " allow no more than as many"
        )
    return sorted(starts + free[len(free) - missing :])


class PassCache(Cache):
    """Keys and values of the passes so far, in rows, and the attention over them.

    Given to a model as `past_key_values` within `attention_by_passes`, with inputs (1, n, D). Made
    with gradients enabled or without, it has to be used so.
    attention_mask: (B, T), 0 on padding, of all columns that will come; None where none is padding.
    num_rows: B.
    """

    def __init__(self, attention_mask: Tensor | None, num_rows: int):
        super().__init__(layers=[])
        self.attention_mask = attention_mask
        self.num_rows = num_rows
        self.has_gradients = torch.is_grad_enabled()
        self.num_columns, self.num_seen = 0, 0
        self.places: Tensor | None = None
        self.visible: Tensor | None = None
        # By layer: (keys, values), each (B, G, columns, E). With gradients at most two of them, of
        # the first pass and of all later ones together; without, one that begins a room.
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.rooms: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, num_columns: int, places: Tensor | None) -> None:
        """A pass over the next C columns begins.

        places: (n,) long, its tokens in the flattened (B, C); None where no column is padding.
        """
        self.num_columns, self.places = num_columns, places
        self.num_seen += num_columns
        # (B or 1, 1, C, L) bool, what each column may see; None where that is all before it.
        self.visible = None
        if self.attention_mask is not None:
            columns = torch.arange(self.num_seen, device=self.attention_mask.device)
            rows = columns[-num_columns:, None]
            is_token = self.attention_mask[:, None, None, : self.num_seen] != 0
            # Padding sees itself: a row of a softmax needs something to see.
            self.visible = ((columns <= rows) & is_token) | (columns == rows)

    def pack(self, rows: Tensor) -> Tensor:
        """(B, C, ...) -> (1, n, ...): the tokens of the pass."""
        flat = rows.flatten(0, 1)
        return (flat if self.places is None else flat[self.places])[None]

    def unpack(self, tokens: Tensor) -> Tensor:
        """(1, n, ...) -> (B, C, ...), zeros at padding."""
        flat = tokens[0]
        if self.places is not None:
            empty = flat.new_zeros(self.num_rows * self.num_columns, *flat.shape[1:])
            flat = empty.index_copy(0, self.places, flat)
        return flat.unflatten(0, (self.num_rows, self.num_columns))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_, **__) -> tuple:
        """Keep a layer's keys and values (1, G, n, E); what it hands on is for `_attend` alone."""
        new = [self.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (key_states, value_states)]
        if not self.has_gradients:
            self._append(layer_idx, new)
            return self, None
        # In order of memory, or every pass would copy the first one's keys for its products.
        new = tuple(side.contiguous() for side in new)
        parts = self.parts.setdefault(layer_idx, [])
        if len(parts) < 2:
            parts.append(new)
        else:
            parts[1] = tuple(torch.cat(pair, 2) for pair in zip(parts[1], new, strict=True))
        return self, None

    def _append(self, layer_idx: int, new: list[Tensor]) -> None:
        """Write keys and values (B, G, C, E) behind those of the layer so far."""
        begin, stop = self.num_seen - self.num_columns, self.num_seen
        room = self.rooms.get(layer_idx)
        if room is None or stop > room[0].size(2):
            shapes = [(*side.shape[:2], stop + ROOM, side.size(3)) for side in new]
            room = tuple(side.new_empty(shape) for side, shape in zip(new, shapes, strict=True))
            for larger, former in zip(room, self.rooms.get(layer_idx, ()), strict=False):
                larger[:, :, :begin] = former[:, :, :begin]
            self.rooms[layer_idx] = room
        for side, states in zip(room, new, strict=True):
            side[:, :, begin:stop] = states
        self.parts[layer_idx] = [tuple(side[:, :, :stop] for side in room)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before those of the pass that has begun."""
        return self.num_seen - self.num_columns

    def go_on_after(self, num_columns: int, num_more: int) -> None:
        """Forget all but the first `num_columns`; `num_more` may follow, of tokens in every row."""
        self.num_seen = num_columns
        if self.attention_mask is not None:
            kept = self.attention_mask[:, :num_columns]
            self.attention_mask = F.pad(kept, (0, num_more), value=1)

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all rows but `rows`, (B',) long."""
        self.num_rows = len(rows)
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]
        # Layer by layer, so that no more than one lies here twice.
        self.parts.clear()
        for layer_idx, room in self.rooms.items():
            self.rooms[layer_idx] = tuple(side[rows] for side in room)

    def as_dynamic(self, config: PretrainedConfig) -> Cache:
        """The same keys as the cache that Hugging Face's `generate` goes on with."""
        cache = DynamicCache(config=config)
        for layer_idx, parts in sorted(self.parts.items()):
            cache.update(*(torch.cat(side, 2) for side in zip(*parts, strict=True)), layer_idx)
        return cache


def read_packed(
    model: PreTrainedModel,
    embeds: Tensor,
    position_ids: Tensor,
    cache: PassCache,
    places: Tensor | None,
) -> Tensor:
    """States (B, C, D) of the next C columns, whose padding the layers never see."""
    if places is not None:
        places = places.to(embeds.device, non_blocking=True)
    cache.begin(embeds.size(1), places)
    with attention_by_passes(model):
        hidden_states = model.base_model(
            inputs_embeds=cache.pack(embeds),
            position_ids=cache.pack(position_ids),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return cache.unpack(hidden_states)


def read_padded(
    model: PreTrainedModel,
    embeds: Tensor,
    position_ids: Tensor,
    cache: Cache | None,
    mask: Tensor | None,
) -> Tensor:
    """The same by the model's own attention, for kernels and models that know no other way.

    mask: (B, L), attention_mask up to the last of these columns; None without padding.
    """
    return model.base_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def likeliest(head: nn.Module, hidden_states: Tensor) -> Tensor:
    """(B,) long: the token to which `head` gives the largest logit after each of (B, D) states."""
    is_table = isinstance(head, nn.Linear) and head.bias is None
    # Autocast would lower every block anew for every token.
    if not is_table or hidden_states.is_cuda or torch.is_autocast_enabled("cpu"):
        return head(hidden_states).argmax(-1)
    logits_of = (F.linear(hidden_states, block) for block in head.weight.split(VOCABULARY_BLOCK))
    values, tokens = map(torch.stack, zip(*(logits.max(-1) for logits in logits_of), strict=True))
    winner = values.argmax(0, keepdim=True)
    return (tokens.gather(0, winner) + winner * VOCABULARY_BLOCK)[0]


@contextmanager
def attention_by_passes(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model's attention is that over a `PassCache`, and makes no masks of its own."""
    config = model.config.get_text_config()
    chosen = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _attend(
    module: nn.Module,
    query: Tensor,
    key: PassCache,
    value: None,
    attention_mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """The attention layer's part: queries (1, H, n, E) -> (1, n, H, E), in transformers' terms."""
    cache, parts = key, key.parts[module.layer_idx]
    query = cache.unpack(query.transpose(1, 2)).transpose(1, 2)  # (B, H, C, E)
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    is_first = query.size(2) == cache.num_seen
    if len(parts) > 1 or not (is_first or query.is_cuda):
        # For few queries no kernel of the CPU is faster, and it wants grouped keys repeated.
        rows = weigh(query, parts, cache.visible, dropout, scaling)
    elif query.is_cuda or dropout == 0:
        rows = _fused(query, *parts[0], cache.visible, dropout, scaling)
    else:
        # No CPU kernel knows dropout: torch would keep three matrices of C x C a head.
        (keys, values), blocks = parts[0], []
        for begin in range(0, query.size(2), QUERY_BLOCK):
            stop = min(begin + QUERY_BLOCK, query.size(2))
            visible = None
            if cache.visible is not None:
                visible = cache.visible[:, :, begin:stop, :stop]
            seen = [(keys[:, :, :stop], values[:, :, :stop])]
            blocks.append(weigh(query[:, :, begin:stop], seen, visible, dropout, scaling))
        rows = torch.cat(blocks, 2)
    return cache.pack(rows.transpose(1, 2)), None


AttentionInterface.register(ATTENTION, _attend)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, dropout: float,
    scaling: float,
) -> Tensor:  # fmt: skip
    """Attention by torch's kernels, over keys of one part: (B, H, C, E)."""
    C, L = query.size(2), keys.size(2)
    if visible is None and 1 < C < L:
        visible = _before(C, L, query.device)
    groups = query.size(1) // keys.size(1)
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, dropout_p=dropout, scale=scaling,
        is_causal=visible is None and C == L,
    )  # fmt: skip


def weigh(
    query: Tensor,
    parts: list[tuple[Tensor, Tensor]],
    visible: Tensor | None,
    dropout: float,
    scaling: float,
) -> Tensor:
    """Attention over keys in parts: (B, H, C, E).

    query: (B, H, C, E), the last C of L columns; parts: keys and values (B, G, columns, E), L
        columns together.
    visible: (B or 1, 1, C, L) bool; None for the columns before and itself.
    dropout: of the attention weights. scaling: of the scores.
    """
    B, H, C, E = query.shape
    G = parts[0][0].size(1)
    # The H / G query heads that share a key head are like so many more queries of it.
    grouped = (query * scaling).reshape(B, G, -1, E)
    scores = [grouped @ keys.transpose(2, 3) for keys, _ in parts]
    lengths = [part.size(-1) for part in scores]
    scores = (torch.cat(scores, -1) if len(scores) > 1 else scores[0]).view(B, H, C, -1)
    if visible is None and C > 1:
        visible = _before(C, scores.size(-1), query.device)
    if visible is not None:
        scores = scores.masked_fill_(~visible, float("-inf"))
    weights = F.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if dropout > 0:
        # Keeps a mask of one byte a weight; F.dropout on the CPU keeps one of four.
        weights, _ = torch.native_dropout(weights, dropout, True)
    weights = weights.to(parts[0][1].dtype).view(B, G, -1, sum(lengths)).split(lengths, -1)
    rows = sum(part @ values for part, (_, values) in zip(weights, parts, strict=True))
    return rows.view(B, H, C, E)


def _before(C: int, L: int, device: torch.device) -> Tensor:
    """(C, L) bool: each of the last C columns sees itself and those before it."""
    return torch.ones(C, L, dtype=torch.bool, device=device).tril(L - C)


# One product a weight for all passes


class _Joined:
    """A layer whose weight gradients of several passes can be computed together.

    joining: while passes are being joined, what `_Together` made of weights and biases so far, for
        all layers of the model; else None.
    """

    joining: dict[tuple, tuple[Tensor, Tensor | None, "_Gathered"]] | None = None
    weight_is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.joining is None or not self.weight.requires_grad:
            return super().forward(x)
        bias = getattr(self, "bias", None)
        # Layers that share a weight share its gradient.
        key = self.weight, bias
        if key not in self.joining:
            has_bias = bias is not None and bias.requires_grad
            gathered = _Gathered(self.weight_is_transposed, has_bias)
            self.joining[key] = *_Together.apply(self.weight, bias, gathered), gathered
        return self.use(x, *self.joining[key])

    def use(self, x: Tensor, weight: Tensor, bias: Tensor | None, gathered: "_Gathered") -> Tensor:
        """The layer's output, its weights' gradient left to `gathered`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Use.apply(x, weight, bias, gathered)


class _JoinedLinear(_Joined, nn.Linear):
    """torch's linear layer: weight (out, in)."""


class _JoinedConv1D(_Joined, Conv1D):
    """GPT-2's linear layer: weight (in, out)."""

    weight_is_transposed = False


class _JoinedEmbedding(_Joined, nn.Embedding):
    """A table of embeddings that is the head's weight too: (V, D)."""

    def use(self, x: Tensor, weight: Tensor, bias: None, gathered: "_Gathered") -> Tensor:
        """The rows `x` of the table itself: `weight` may be a copy of less precision."""
        return _UseRows.apply(weight, x, self.weight.detach(), gathered)


_JOINED = {nn.Linear: _JoinedLinear, Conv1D: _JoinedConv1D}


def _is_plain(table: nn.Embedding) -> bool:
    """Whether a row's gradient is the sum of those of its uses."""
    is_special = table.scale_grad_by_freq or table.sparse
    return table.padding_idx is None and table.max_norm is None and not is_special


@contextmanager
def joined_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Passes of `model` within share one product a weight matrix in their backward pass.

    For models that `prepare` saw.

    Raises: RuntimeError in a backward pass with create_graph=True.
    """
    layers = [module for module in model.modules() if isinstance(module, _Joined)]
    joining: dict = {}
    for layer in layers:
        layer.joining = joining
    try:
        yield
    finally:
        for layer in layers:
            layer.joining = None


@dataclass
class _Gathered:
    """What the backward passes through one weight leave for its gradient.

    weight_is_transposed: whether the weight is (out, in).
    has_bias: whether a bias wants its gradient as well.
    weight_grad, bias_grad: of the uses that were multiplied already, None where none was.
    short: (input, gradient of the output) of the others as matrices, (n, in) and (n, out).
    rows: (ids, gradient of these rows) of each use as a table, (n,) and (n, D).
    """

    weight_is_transposed: bool
    has_bias: bool
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None
    short: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def take(self, x: Tensor, gradient: Tensor) -> None:
        """One use. A long one is multiplied at once: keeping it would cost more than it saves."""
        if x.numel() + gradient.numel() > x.size(1) * gradient.size(1):
            self.multiply(x, gradient)
        else:
            self.short.append((x, gradient))

    def multiply(self, x: Tensor, gradient: Tensor) -> None:
        """Add what a use, or several together, give."""
        is_transposed = self.weight_is_transposed
        left, right = (gradient.t(), x) if is_transposed else (x.t(), gradient)
        if self.weight_grad is None:
            self.weight_grad = left @ right
        else:
            self.weight_grad.addmm_(left, right)
        if self.has_bias:
            bias_grad = gradient.sum(0)
            self.bias_grad = bias_grad if self.bias_grad is None else self.bias_grad + bias_grad

    def sum_up(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of weight, in its own dtype, and bias; nothing is left here."""
        if self.short:
            self.multiply(*map(torch.cat, zip(*self.short, strict=True)))
        weight_grad, bias_grad, rows = self.weight_grad, self.bias_grad, self.rows
        self.weight_grad, self.bias_grad, self.short, self.rows = None, None, [], []
        weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad.to(weight)
        for ids, gradient in rows:
            weight_grad.index_add_(0, ids, gradient.to(weight.dtype))
        return weight_grad, bias_grad


class _Together(torch.autograd.Function):
    """A layer's weights on their way into its uses; on the way back, their gradient from all.

    Autograd comes here when every use that counts is through, whatever their order.
    """

    @staticmethod
    def forward(ctx, weight, bias, gathered):
        ctx.gathered = gathered
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.bias_dtype = weight.detach(), None if bias is None else bias.dtype
        if not torch.is_autocast_enabled(weight.device.type):
            return weight.view_as(weight), None if bias is None else bias.view_as(bias)
        dtype = torch.get_autocast_dtype(weight.device.type)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @staticmethod
    def backward(ctx, *_):
        _refuse_second_order()
        weight_grad, bias_grad = ctx.gathered.sum_up(ctx.weight)
        return weight_grad, None if bias_grad is None else bias_grad.to(ctx.bias_dtype), None


class _Use(torch.autograd.Function):
    """One pass through a linear layer; its backward pass leaves the weights' gradient for later."""

    @staticmethod
    def forward(ctx, x, weight, bias, gathered):
        ctx.save_for_backward(x, weight)
        ctx.gathered = gathered
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight if gathered.weight_is_transposed else weight.t(), bias)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_order()
        x, weight = ctx.saved_tensors
        if _will_come_to(ctx.next_functions[1]):
            ctx.gathered.take(x.flatten(0, -2), gradient.flatten(0, -2))
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = gradient @ (weight if ctx.gathered.weight_is_transposed else weight.t())
        return x_grad, None, None, None


class _UseRows(torch.autograd.Function):
    """Rows of a table; the backward pass leaves the table's gradient for later.

    weight: what `_Together` made of the table; autograd finds the way back by it.
    """

    @staticmethod
    def forward(ctx, weight, ids, table, gathered):
        ctx.save_for_backward(ids)
        ctx.gathered = gathered
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_order()
        (ids,) = ctx.saved_tensors
        if _will_come_to(ctx.next_functions[0]):
            ctx.gathered.rows.append((ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None, None


def _will_come_to(edge: tuple) -> bool:
    """Whether this backward pass goes on to the `_Together` at the end of `edge`.

    It does not where only gradients of other parameters were asked for. What were left for it then
    would be counted by the next backward pass.
    """
    return torch._C._will_engine_execute_node(edge[0])


def _refuse_second_order() -> None:
    # Grad mode is on in a backward pass for create_graph=True alone.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph: joined weight gradients cannot be differentiated again; read the batch"
            " outside of joined_weight_gradients"
        )
