"""Layers of a Hugging Face model that cost less time and memory in training.

- `deferred_weight_gradients` computes one product per weight matrix for all passes, once the
  backward pass is done with them, in place of one per pass that reads and writes the whole
  gradient. Where the head is the embedding table, its rows' gradients are added to the head's.
  On a CPU the gradients of the first pass's keys and values, which all later passes read, are
  computed the same way.
- `cross_entropy` keeps the logits alone for its backward pass.
- On a CPU, dropout keeps one byte per entry, and draws its random bits in words.
- `linear` multiplies fp32 matrices up to twice as fast as torch on AMD processors with AVX512.

`prepare` changes a model's layers; parameters, names and checkpoints stay as they were, and results
change by rounding at most. Like coconut.py and passes.py this needs torch and transformers alone.

Shapes: n tokens of a pass, D width, N labels, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

# The most tokens of a use of a weight that is concatenated with others before their product.
MAX_CONCATENATED = 128
# How many logits `cross_entropy` handles at once: on a CPU as many as fit a core's cache, on a GPU
# few enough for small temporaries (32 MiB) and enough for few launches.
LOGITS_BLOCK = {"cpu": 2**18, "gpu": 2**23}
DEFERRED_ONCE = (
    "deferred weight gradients cannot be differentiated again; read the batch with Coconut.read,"
    " outside of deferred_weight_gradients"
)
# Multiply-adds from which oneDNN's call costs less than it saves.
MIN_ONEDNN_SIZE = 2**20
# Rows of the head's table that the CPU multiplies at once, so that they stay in its caches.
VOCABULARY_BLOCK = 1024
# The probability of an entry to be dropped is a multiple of 1 / DROPOUT_STEPS.
DROPOUT_STEPS = 2**16


def prepare(model: PreTrainedModel) -> None:
    """Swap in this module's layers; replace GPT-2's activation by a fused one.

    Transformers computes `gelu_new` by eight operations where torch has one.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(head, "weight", None) is table.weight
    if is_tied and type(table) is nn.Embedding and _has_plain_gradient(table):
        table.__class__ = _DeferredEmbedding
    for module in model.modules():
        if type(module) in _DEFERRED:
            module.__class__ = _DEFERRED[type(module)]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif type(child) is nn.Dropout and not child.inplace:
                child.__class__ = _Dropout


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether the model runs under torch.compile, whose tracing loses what is done here."""
    return model.base_model._compiled_call_impl is not None


def is_checkpointed(model: PreTrainedModel) -> bool:
    """Whether activation checkpointing is on, which in training mode drops the cache."""
    return getattr(model.base_model, "gradient_checkpointing", False)


# --- Choice of operations by device -----------------------------------------------------------

_as_on_gpu = ContextVar("as_on_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, CPU tensors take the code path of a GPU.

    Used to count memory and launches without a GPU.
    """
    token = _as_on_gpu.set(True)
    try:
        yield
    finally:
        _as_on_gpu.reset(token)


def takes_cpu_path(x: Tensor) -> bool:
    """Whether `x` is computed by the operations chosen for a CPU."""
    return x.is_cpu and not _as_on_gpu.get()


# --- Products ---------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for a product that autograd does not see: (..., out) of (..., in) and (out, in).

    Torch multiplies fp32 matrices by MKL, which leaves AVX512 unused on AMD processors; oneDNN,
    which torch brings as well, uses it.
    """
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    # It would read a bias of any other layout as if it were contiguous.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` multiplies these by oneDNN."""
    is_fp32 = x.dtype == weight.dtype == torch.float32 and takes_cpu_path(x)
    return is_fp32 and x.numel() * weight.size(0) >= MIN_ONEDNN_SIZE and prefers_onednn()


@cache
def prefers_onednn() -> bool:
    """Whether this processor multiplies fp32 matrices faster by oneDNN than by MKL."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    has_both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    is_amd = capabilities.get("cpu_name", "").startswith("AMD")
    return has_both and is_amd and capabilities.get("avx512_f", False)


def argmax_tokens(head: nn.Module, hidden_states: Tensor) -> Tensor:
    """(B,) long: the token to which `head` gives the largest logit after each of (B, D) states."""
    is_table = isinstance(head, nn.Linear) and head.bias is None
    # Autocast would cast every block again for every token.
    if not is_table or not takes_cpu_path(hidden_states) or torch.is_autocast_enabled("cpu"):
        # Torch's argmax takes five times as long in bf16.
        return head(hidden_states).max(-1).indices
    logits_of = (linear(hidden_states, block) for block in head.weight.split(VOCABULARY_BLOCK))
    values, tokens = map(torch.stack, zip(*(logits.max(-1) for logits in logits_of), strict=True))
    best = values.argmax(0, keepdim=True)  # (1, B), a block each
    return (tokens.gather(0, best) + best * VOCABULARY_BLOCK)[0]


# --- Cross-entropy ----------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over N labels of their cross-entropy, () in at least fp32.

    logits: (N, V). targets: (N,) long.

    Computed in blocks of rows. Torch keeps, beside the logits, their logarithmic softmax, and in
    bf16 a copy in fp32; this keeps the logits alone and makes their gradient from them.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    """`cross_entropy`; its backward pass makes the softmax again from the logits."""

    @staticmethod
    def forward(ctx, logits, targets):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        chosen = logits.gather(1, targets[:, None])[:, 0].to(dtype)
        normalizers = torch.empty_like(chosen)  # (N,): the logarithms of the sums of exp(logits)
        for rows in _row_blocks(logits):
            exact = logits[rows].to(dtype, copy=True)
            highest = exact.amax(1, keepdim=True)
            sums = exact.sub_(highest).exp_().sum(1)
            torch.add(sums.log_(), highest[:, 0], out=normalizers[rows])
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - chosen).sum()

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_order("layers.cross_entropy cannot be differentiated again")
        logits, targets, normalizers = ctx.saved_tensors
        logits_grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            exact = torch.sub(logits[rows], normalizers[rows, None]).exp_()
            labels = targets[rows, None]
            exact.scatter_add_(1, labels, exact.new_full(labels.shape, -1))
            logits_grad[rows] = exact.mul_(gradient)
        return logits_grad, None


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """The rows of (N, V), about LOGITS_BLOCK entries at a time."""
    num_rows = max(LOGITS_BLOCK["cpu" if takes_cpu_path(logits) else "gpu"] // logits.size(1), 1)
    for begin in range(0, len(logits), num_rows):
        yield slice(begin, begin + num_rows)


# --- Dropout ----------------------------------------------------------------------------------


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with entries zeroed with probability `p`, below 1, the others divided by 1 - p.

    On a CPU p is rounded to a multiple of 1 / DROPOUT_STEPS.
    """
    if not takes_cpu_path(x):
        return torch.native_dropout(x, p, True)[0]
    mask, scale = draw_kept(x, p)
    return (x * mask).mul_(scale)


def draw_kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A random mask in the shape of `x`, 1 where dropout keeps an entry, and the factor for those.

    Torch draws a number of 32 or 64 bits for each entry, one by one. Sixteen bits are enough: four
    entries share a word, which takes a fifth of the time.
    """
    num_dropped = min(round(p * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    num_words = -(-x.numel() // 4)
    words = torch.empty(num_words, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    mask = bits >= num_dropped - DROPOUT_STEPS // 2
    # As numbers, because torch multiplies by bool a quarter as fast.
    return mask.view(torch.uint8), DROPOUT_STEPS / (DROPOUT_STEPS - num_dropped)


class _Dropout(nn.Dropout):
    """torch's dropout layer, by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not 0 < self.p < 1 or torch.compiler.is_compiling():
            return super().forward(x)
        return dropout(x, self.p)


# --- One product for the gradients of all passes ----------------------------------------------


@contextmanager
def deferred_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Passes of `model` within share one product per weight matrix in their backward pass.

    On a CPU so do those that read the keys and values of the first pass.

    For models that `prepare` changed; without effect where gradients are off, under torch.compile,
    and under activation checkpointing, which would recompute the layers outside this context.

    Raises: RuntimeError in a backward pass with create_graph=True.
    """
    if not torch.is_grad_enabled() or is_compiled(model) or is_checkpointed(model):
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, _DeferredLayer)]
    deferred: dict = {}
    for layer in layers:
        layer.deferred = deferred
    try:
        yield
    finally:
        for layer in layers:
            layer.deferred = None


def defers_gradients(model: nn.Module) -> bool:
    """Whether `deferred_weight_gradients` has begun for the model."""
    return any(getattr(module, "deferred", None) is not None for module in model.modules())


@dataclass
class _Pending:
    """What the backward passes through one weight leave for its gradient.

    is_transposed: whether the weight is (out, in).
    has_bias: whether a bias needs its gradient as well.
    weight_grad, bias_grad: of the uses that were multiplied already, None where none was.
    short_uses: (input, gradient of the output) of the others as matrices, (n, in) and (n, out).
    row_uses: (ids, gradient of these rows) of each use as a table, (n,) and (n, D).
    """

    is_transposed: bool
    has_bias: bool
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None
    short_uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    row_uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_use(self, x: Tensor, gradient: Tensor) -> None:
        """Record one use. A long one is multiplied at once, since keeping it would cost more."""
        if x.numel() + gradient.numel() > x.size(1) * gradient.size(1):
            self.multiply(x, gradient)
        else:
            self.short_uses.append((x, gradient))

    def multiply(self, x: Tensor, gradient: Tensor) -> None:
        """Add the product of one use, or of several concatenated."""
        left, right = (gradient.t(), x) if self.is_transposed else (x.t(), gradient)
        if self.weight_grad is None:
            self.weight_grad = linear(left, right.t())
        elif uses_onednn(left, right.t()):
            self.weight_grad += linear(left, right.t())
        else:
            self.weight_grad.addmm_(left, right)
        if self.has_bias:
            bias_grad = gradient.sum(0)
            self.bias_grad = bias_grad if self.bias_grad is None else self.bias_grad + bias_grad

    def pop(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of weight, in its own dtype, and bias; nothing stays here."""
        rest = []
        for x, gradient in self.short_uses:
            if len(x) > MAX_CONCATENATED:
                self.multiply(x, gradient)
            else:
                rest.append((x, gradient))
        if rest:
            self.multiply(*map(torch.cat, zip(*rest, strict=True)))
        weight_grad, bias_grad, row_uses = self.weight_grad, self.bias_grad, self.row_uses
        self.weight_grad, self.bias_grad, self.short_uses, self.row_uses = None, None, [], []
        weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad.to(weight)
        for ids, gradient in row_uses:
            weight_grad.index_add_(0, ids, gradient.to(weight.dtype))
        return weight_grad, bias_grad


class _DeferredLayer:
    """A layer whose weight gradients of several passes can be computed together.

    deferred: within `deferred_weight_gradients`, by weight and bias what `_DeferGradient` returned
        for them and their `_Pending`, for all layers of the model; else None.
    """

    deferred: dict[tuple, tuple[Tensor, Tensor | None, _Pending]] | None = None
    is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        if self.deferred is None or not self.weight.requires_grad:
            return super().forward(x) if torch.is_grad_enabled() else self.infer(x)
        bias = getattr(self, "bias", None)
        # Layers that share a weight share its gradient.
        key = self.weight, bias
        if key not in self.deferred:
            has_bias = bias is not None and bias.requires_grad
            pending = _Pending(self.is_transposed, has_bias)
            self.deferred[key] = *_DeferGradient.apply(self.weight, bias, pending), pending
        return self.use(x, *self.deferred[key])

    def infer(self, x: Tensor) -> Tensor:
        """The layer's output where autograd is off."""
        if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return super().forward(x)
        weight = self.weight if self.is_transposed else self.weight.t()
        return linear(x, weight, self.bias)

    def use(self, x: Tensor, weight: Tensor, bias: Tensor | None, pending: _Pending) -> Tensor:
        """The layer's output; its weights' gradient is left to `pending`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _LinearUse.apply(x, weight, bias, pending)


class _DeferredLinear(_DeferredLayer, nn.Linear):
    """torch's linear layer: weight (out, in)."""


class _DeferredConv1D(_DeferredLayer, Conv1D):
    """GPT-2's linear layer: weight (in, out)."""

    is_transposed = False


class _DeferredEmbedding(_DeferredLayer, nn.Embedding):
    """A table of embeddings that is the head's weight too: (V, D)."""

    def infer(self, x: Tensor) -> Tensor:
        return nn.Embedding.forward(self, x)

    def use(self, x: Tensor, weight: Tensor, bias: None, pending: _Pending) -> Tensor:
        """The rows `x` of the table itself: `weight` may be a copy of less precision."""
        return _EmbeddingUse.apply(weight, x, self.weight.detach(), pending)


_DEFERRED = {nn.Linear: _DeferredLinear, Conv1D: _DeferredConv1D}


def _has_plain_gradient(table: nn.Embedding) -> bool:
    """Whether a row's gradient is the sum of those of its uses."""
    is_special = table.scale_grad_by_freq or table.sparse
    return table.padding_idx is None and table.max_norm is None and not is_special


class _DeferGradient(torch.autograd.Function):
    """Passes a layer's weights to its uses; backward returns their gradient over all uses.

    Autograd calls `backward` after all uses that contribute, whatever their order.
    """

    @staticmethod
    def forward(ctx, weight, bias, pending):
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.bias_dtype = weight.detach(), None if bias is None else bias.dtype
        if not torch.is_autocast_enabled(weight.device.type):
            return weight.view_as(weight), None if bias is None else bias.view_as(bias)
        dtype = torch.get_autocast_dtype(weight.device.type)
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    @staticmethod
    def backward(ctx, *_):
        refuse_second_order(DEFERRED_ONCE)
        weight_grad, bias_grad = ctx.pending.pop(ctx.weight)
        return weight_grad, None if bias_grad is None else bias_grad.to(ctx.bias_dtype), None


class _LinearUse(torch.autograd.Function):
    """One pass through a linear layer; its backward pass leaves the weights' gradient for later."""

    @staticmethod
    def forward(ctx, x, weight, bias, pending):
        ctx.save_for_backward(x, weight)
        ctx.pending = pending
        matrix = weight if pending.is_transposed else weight.t()
        # Entering autocast costs more than a small product.
        if not torch.is_autocast_enabled(x.device.type):
            return linear(x, matrix, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, matrix, bias)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_order(DEFERRED_ONCE)
        x, weight = ctx.saved_tensors
        if _will_run(ctx.next_functions[1]):
            ctx.pending.add_use(x.flatten(0, -2), gradient.flatten(0, -2))
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = linear(gradient, weight.t() if ctx.pending.is_transposed else weight)
        return x_grad, None, None, None


class _EmbeddingUse(torch.autograd.Function):
    """Rows of a table; the backward pass leaves the table's gradient for later.

    weight: what `_DeferGradient` returned for the table; it links this use to the table's gradient.
    """

    @staticmethod
    def forward(ctx, weight, ids, table, pending):
        ctx.save_for_backward(ids)
        ctx.pending = pending
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_order(DEFERRED_ONCE)
        (ids,) = ctx.saved_tensors
        if _will_run(ctx.next_functions[0]):
            ctx.pending.row_uses.append((ids.flatten(), gradient.flatten(0, -2)))
        return None, None, None, None


class ShareGradient(torch.autograd.Function):
    """Passes keys or values (B, G, k, E) to their uses; backward adds the gradient of all uses.

    uses: a list, empty, for what `_SharedProduct` leaves here. Autograd calls `backward` after all
        uses that contribute, whatever their order.
    """

    @staticmethod
    def forward(ctx, part, uses):
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return part.view_as(part)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_order(DEFERRED_ONCE)
        if not ctx.uses:
            return gradient, None
        weights, rows = (torch.cat(x, 2) for x in zip(*ctx.uses, strict=True))
        ctx.uses.clear()
        part_grad = weights.transpose(2, 3) @ rows
        return part_grad if gradient is None else part_grad.add_(gradient), None


def shared_product(rows: Tensor, part: Tensor, uses: list | None, is_transposed: bool) -> Tensor:
    """rows (B, G, n, E) @ keys transposed, or rows (B, G, n, k) @ values.

    uses: the list that `ShareGradient` was given for this part; None where it was not used.
    """
    if uses is not None:
        return _SharedProduct.apply(rows, part, uses, is_transposed)
    return rows @ (part.transpose(2, 3) if is_transposed else part)


class _SharedProduct(torch.autograd.Function):
    """One use of a `part`, as `shared_product` describes it.

    Its backward pass leaves the part's gradient for later: the weights (B, G, n, k) and rows
    (B, G, n, E) whose product it is.
    """

    @staticmethod
    def forward(ctx, rows, part, uses, is_transposed):
        ctx.save_for_backward(rows, part)
        ctx.uses, ctx.is_transposed = uses, is_transposed
        return rows @ (part.transpose(2, 3) if is_transposed else part)

    @staticmethod
    def backward(ctx, gradient):
        refuse_second_order(DEFERRED_ONCE)
        rows, part = ctx.saved_tensors
        if ctx.needs_input_grad[1] and _will_run(ctx.next_functions[1]):
            ctx.uses.append((gradient, rows) if ctx.is_transposed else (rows, gradient))
        return gradient @ (part if ctx.is_transposed else part.transpose(2, 3)), None, None, None


def _will_run(edge: tuple) -> bool:
    """Whether this backward pass reaches the node at the end of `edge`, which collects uses.

    It does not where only gradients of other parameters were requested; a use recorded then would
    be counted by the next backward pass.
    """
    return torch._C._will_engine_execute_node(edge[0])


def refuse_second_order(why: str) -> None:
    """Raise RuntimeError in a backward pass with create_graph=True, whose result would be wrong."""
    # Grad mode is on in a backward pass for create_graph=True alone.
    if torch.is_grad_enabled():
        raise RuntimeError(f"create_graph: {why}")
