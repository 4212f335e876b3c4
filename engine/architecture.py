"""Whether Coconut reads a kind of model correctly: a small random copy against recomputation.

Thoughts need more of a model than text does: input embeddings that act like their token ids, left
padding that changes nothing, a cache that continues a sequence column by column and can drop rows,
and logits that are lm_head(last hidden state). Few configurations say whether a model has these, so
it is tried: the model's own classes with its kinds of layers, shrunk, random, in float64, are read
by Coconut and by full recomputation without cache, padding or batches. The weights of the run are
not involved, so neither their size nor their rounding matters.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from coconut import Coconut
from utils import UserError

# Kinds of layers whose cache is a state that every token rewrites.
RECURRENT_KINDS = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
# A model with one of these set does not score a hidden state h as lm_head(h).
LOGIT_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")
LOGIT_FIELDS += ("lm_head_multiplier", "output_multiplier")
# The names that transformers' configurations have for the longest sequence.
POSITION_FIELDS = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
# Past it, rotary positions of the type longrope scale every position by another factor.
ROTARY_LIMIT = "original_max_position_embeddings"
# Sizes of the copy. Its attention window is shorter than the rows, so that it has an effect.
VOCAB_SIZE = 48
NUM_HEADS, HEAD_DIM = 4, 16
MAX_INTERMEDIATE_SIZE = 32
MIN_LAYERS, MAX_LAYERS = 2, 8
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
WINDOW_SIZE = 6
MIN_POSITIONS = 64
MAX_PARAMETERS = 50_000_000
# Token ids of the rows; ids of the model's special tokens move to the end of the vocabulary.
WORDS = range(5, 40)
START, END, LATENT, UNUSED = 43, 44, 45, VOCAB_SIZE - 1
WEIGHTS = (0.7, 0.3)
NUM_NEW_TOKENS = 6
MAX_REASON_LENGTH = 200
# Relative to the largest value. Many models compute norms or softmax in float32 regardless.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}


@dataclass(frozen=True)
class Finding:
    """The result of a trial.

    fault: why Coconut cannot read such a model, completing "gpt2 ..."; None where it can.
    unreached: modules and parameters by name that no text reaches, such as a vision tower.
    """

    fault: str | None
    unreached: tuple[str, ...] = ()


_Result = TypeVar("_Result")

# By model class, kernel, precision and configuration.
_found: dict[tuple, Finding] = {}


class _Unfit(Exception):
    """The model does not do what Coconut needs; the text completes "gpt2 ..."."""


def require_readable(
    name: str,
    model_class: type[PreTrainedModel],
    architecture: PretrainedConfig,
    attn_implementation: str | None = None,
) -> tuple[str, ...]:
    """The modules and parameters that no text reaches, by name, of a model that Coconut can read.

    name: what the message calls the weights.
    attn_implementation: as configured; in place of kernels that need a GPU the default is tried.

    Raises: UserError with the reason why Coconut cannot read such a model.
    """
    attention = attn_implementation if attn_implementation == "eager" else None
    finding = examine(model_class, architecture, attention)
    if finding.fault is None:
        return finding.unreached
    fix = (
        "choose a model of attention layers such as GPT-2, Llama, Qwen 3 or Gemma 3"
        " (docs/models.md lists more)"
    )
    if attention is None and examine(model_class, architecture, "eager").fault is None:
        fix = "write attn_implementation: eager, with which it works"
    raise UserError(f"{name}: {architecture.model_type} {finding.fault}; {fix}")


def examine(
    model_class: type[PreTrainedModel], architecture: PretrainedConfig, attention: str | None = None
) -> Finding:
    """Try small random copies of a model until one is read correctly; each once per process.

    attention: the kernel by its name in transformers; None: the model's default.
    """
    text_config = architecture.get_text_config()
    kinds = RECURRENT_KINDS & set(getattr(text_config, "layer_types", None) or ())
    if kinds or model_class._is_stateful:
        where = f" in its {' and '.join(sorted(kinds))} layers" if kinds else ""
        return Finding(
            f"keeps a recurrent state{where}, which is not an attention cache: padding and finished"
            " rows would change it"
        )
    for field in LOGIT_FIELDS:
        value = getattr(text_config, field, None)
        if value not in (None, 1):
            return Finding(
                f"with {field} {value} does not score a hidden state by its output layer alone"
            )
    # Some rotary embeddings need the model's own head size, some kernels need float32.
    for head_dim, dtype in itertools.product((HEAD_DIM, None), (torch.float64, torch.float32)):
        config = shrink(architecture, head_dim)
        key = model_class, attention, dtype, config.to_json_string(use_diff=False)
        if key not in _found:
            _found[key] = _try(model_class, config, attention, dtype)
        if _found[key].fault is None:
            break
    return _found[key]


def rotary_parameters(config: PretrainedConfig) -> list[dict]:
    """The parameters of rotary positions: one dictionary, or one for each kind of layer."""
    rotary = getattr(config, "rope_parameters", None) or {}
    return [rotary, *(part for part in rotary.values() if isinstance(part, dict))]


# The copy


def shrink(architecture: PretrainedConfig, head_dim: int | None = HEAD_DIM) -> PretrainedConfig:
    """A small configuration with all the kinds of layers of `architecture`.

    head_dim: width of an attention head; None: the model's own.
    """
    config = copy.deepcopy(architecture)
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            _shrink_part(part, head_dim)
    return config


def _shrink_part(config: PretrainedConfig, head_dim: int | None) -> None:
    width, num_heads = _get(config, "hidden_size"), _get(config, "num_attention_heads")
    if isinstance(num_heads, int) and isinstance(width, int):
        _shrink_heads(config, width, num_heads, head_dim)
    for name, value in list(vars(config).items()):
        is_size = isinstance(value, int) and not isinstance(value, bool)
        if is_size and any(part in name for part in ("intermediate_size", "ffn", "n_inner")):
            setattr(config, name, min(value, MAX_INTERMEDIATE_SIZE))
        if is_size and name.startswith("vocab_size"):
            setattr(config, name, VOCAB_SIZE)
    for name in WINDOW_FIELDS:
        if _get(config, name) is not None:
            _set(config, name, WINDOW_SIZE)
    for name in (*POSITION_FIELDS, ROTARY_LIMIT):
        if _get(config, name) is not None:
            _set(config, name, max(_get(config, name), MIN_POSITIONS))
    for parameters in rotary_parameters(config):
        if parameters.get(ROTARY_LIMIT) is not None:
            parameters[ROTARY_LIMIT] = max(parameters[ROTARY_LIMIT], MIN_POSITIONS)
    _keep_first_layers(config)
    _move_special_tokens(config)


def _shrink_heads(
    config: PretrainedConfig, width: int, num_heads: int, head_dim: int | None
) -> None:
    """Keep a few heads, with as many key heads to a head as there are."""
    num_kept = min(num_heads, NUM_HEADS)
    num_key_heads, own_dim = _get(config, "num_key_value_heads"), _get(config, "head_dim")
    new_width = num_kept * (head_dim or own_dim or width // num_heads)
    for name, value in list(vars(config).items()):
        # Embeddings and projections often have the width of the model.
        if isinstance(value, int) and value == width and name not in WINDOW_FIELDS:
            setattr(config, name, new_width)
    _set(config, "hidden_size", new_width)
    _set(config, "num_attention_heads", num_kept)
    if isinstance(num_key_heads, int):
        groups = num_heads // max(num_key_heads, 1)
        _set(config, "num_key_value_heads", max(num_kept // groups, 1))
    # In latent attention head_dim is the width of the rotary part only.
    if head_dim and own_dim and _get(config, "qk_rope_head_dim") is None:
        _set(config, "head_dim", head_dim)
    if head_dim and (_get(config, "rotary_dim") or 0) > head_dim:
        _set(config, "rotary_dim", head_dim // 2)


def _keep_first_layers(config: PretrainedConfig) -> None:
    """Keep the first layers, as many as it takes to have each kind."""
    num_layers = _get(config, "num_hidden_layers")
    if not isinstance(num_layers, int):
        return
    by_layer = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == num_layers
    }
    num_kept = MIN_LAYERS
    for values in by_layer.values():
        num_kept = max(num_kept, *(values.index(value) + 1 for value in values))
    num_kept = max(num_kept, (_get(config, "first_k_dense_replace") or 0) + 1)
    num_kept = min(num_kept, MAX_LAYERS, num_layers)
    for name, values in by_layer.items():
        setattr(config, name, values[:num_kept])
    _set(config, "num_hidden_layers", num_kept)


def _move_special_tokens(config: PretrainedConfig) -> None:
    """Move the ids of special tokens out of the words that the rows are made of."""
    for name, value in list(vars(config).items()):
        if name.endswith(("_token_id", "_token_index")) and value is not None:
            setattr(config, name, UNUSED)


def _get(config: PretrainedConfig, name: str) -> object:
    # Not getattr, which raises for values that differ between layers.
    return vars(config).get(config.attribute_map.get(name, name))


def _set(config: PretrainedConfig, name: str, value: object) -> None:
    setattr(config, config.attribute_map.get(name, name), value)


def _build(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    attention: str | None,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The random copy in evaluation mode."""
    with torch.device("meta"):
        num_parameters = model_class(copy.deepcopy(config)).num_parameters()
    if num_parameters > MAX_PARAMETERS:
        raise _Unfit(
            f"could not be tried: a small copy of it still has {num_parameters:,} parameters"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"attn_implementation": attention} if attention else {}
        model = model_class._from_config(copy.deepcopy(config), dtype=torch.float32, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms of ones and biases of zeros would hide differences.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


# The trial


def _try(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    attention: str | None,
    dtype: torch.dtype,
) -> Finding:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        build = partial(_build, model_class, config, attention, dtype)
        model = _attempt("building a small copy", build)
        for what, trial in _TRIALS.items():
            unreached = _attempt(what, partial(trial, model))
    except _Unfit as unfit:
        return Finding(str(unfit))
    finally:
        transformers_logging.set_verbosity(verbosity)
    return Finding(None, unreached)


def _attempt(what: str, work: Callable[[], _Result]) -> _Result:
    try:
        return work()
    except _Unfit:
        raise
    # A model's code may raise anything where Coconut uses it in an unforeseen way.
    except Exception as error:
        reason = " ".join(str(error).split())[:MAX_REASON_LENGTH]
        raise _Unfit(f"fails in {what} ({type(error).__name__}: {reason})") from error


def _rows() -> list[list[int]]:
    """Rows of words with two, one and no latents, and of different lengths."""
    draw = torch.Generator().manual_seed(0)
    words = (torch.randint(WORDS.start, WORDS.stop, (60,), generator=draw)).tolist()
    return [
        [*words[0:9], START, LATENT, LATENT, END, *words[9:14]],
        [*words[14:17], START, LATENT, END, *words[17:20]],
        [*words[20:32], START, END, *words[32:36]],
    ]


def _wrap(model: PreTrainedModel, eos_token_id: int = UNUSED) -> Coconut:
    return Coconut(model, LATENT, START, END, eos_token_id, len(WEIGHTS), WEIGHTS)


def _lay_out(rows: list[list[int]], columns: list[int]) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask of the rows, padded so that the given columns of each coincide."""
    first = max(columns)
    width = max(first - column + len(row) for row, column in zip(rows, columns, strict=True))
    input_ids = torch.full((len(rows), width), UNUSED)
    mask = torch.zeros_like(input_ids)
    for b, (row, column) in enumerate(zip(rows, columns, strict=True)):
        span = slice(first - column, first - column + len(row))
        input_ids[b, span], mask[b, span] = torch.tensor(row), 1
    return input_ids, mask


def _compare(got: Tensor, want: Tensor, fault: str) -> None:
    if got.shape != want.shape or not torch.allclose(
        got, want, rtol=0, atol=TOLERANCE[got.dtype] * max(1.0, float(want.detach().abs().max()))
    ):
        raise _Unfit(fault)


@torch.no_grad()
def _read_embeddings(model: PreTrainedModel) -> None:
    """Embeddings act like their ids, lm_head alone scores states, later tokens have no effect."""
    parameters = inspect.signature(model.base_model.forward).parameters
    for needed, fault in (
        ("inputs_embeds", "takes no input embeddings"),
        ("past_key_values", "keeps no key-value cache to continue a sequence from"),
    ):
        if needed not in parameters:
            raise _Unfit(fault)
    row = torch.tensor([list(WORDS[:12])])
    embeds = model.get_input_embeddings()(row)
    given = embeds.clone()
    whole = model(input_ids=row, use_cache=False).logits
    states = model.base_model(inputs_embeds=given, use_cache=False).last_hidden_state
    if not torch.equal(given, embeds):
        raise _Unfit("overwrites the input embeddings that it is given")
    head = model.get_output_embeddings()
    if head is None:
        raise _Unfit("has no output layer of its own to score states with")
    by_embeds = model(inputs_embeds=embeds.clone(), use_cache=False).logits
    _compare(by_embeds, whole, "reads token ids differently from their embeddings")
    _compare(head(states), whole, "does not score a hidden state by its output layer alone")
    early = model.base_model(inputs_embeds=embeds[:, :6], use_cache=False).last_hidden_state
    _compare(states[:, :6], early, "lets a token see the ones after it")


@torch.no_grad()
def _read_padding(model: PreTrainedModel) -> None:
    """Left padding changes nothing."""
    rows = [[token for token in row if token in WORDS] for row in _rows()]
    got = _wrap(model)(*_lay_out(rows, [len(row) for row in rows])).logits[:, 0]
    want = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in rows]
    _compare(got, torch.stack(want), "reads a row differently when it is padded on the left")


def _read_thoughts(model: PreTrainedModel) -> tuple[str, ...]:
    """Loss and gradients through thoughts in a padded batch equal those of full recomputation."""
    rows = _rows()
    columns = [row.index(LATENT) if LATENT in row else len(row) - 1 for row in rows]
    input_ids, mask = _lay_out(rows, columns)
    is_answer = (mask == 1) & ((input_ids == END).cumsum(1) == 1) & (input_ids != END)
    labels = input_ids.where(is_answer, torch.tensor(-100))
    output = _wrap(model)(input_ids, mask, labels)
    logits, targets = [], []
    for row in rows:
        after_end = row.index(END)
        embeds = _embed(model, row)
        logits.append(model(inputs_embeds=embeds, use_cache=False).logits[0, after_end:-1])
        targets += row[after_end + 1 :]
    want = F.cross_entropy(torch.cat(logits), torch.tensor(targets))
    _compare(
        output.loss, want, "computes other thoughts in passes over its cache than without a cache"
    )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    got_grads = torch.autograd.grad(output.loss, parameters, allow_unused=True)
    want_grads = torch.autograd.grad(want, parameters, allow_unused=True)
    scale = max(float(grad.detach().abs().max()) for grad in want_grads if grad is not None)
    for name, got, wanted in zip(names, got_grads, want_grads, strict=True):
        if (got is None) != (wanted is None):
            raise _Unfit(f"gives {name} no gradient through thoughts")
        if got is not None:
            _compare(
                got / scale,
                wanted / scale,
                f"gives {name} another gradient in passes than without a cache",
            )
    return tuple(
        _unreached(model, {n for n, g in zip(names, want_grads, strict=True) if g is None})
    )


def _unreached(model: PreTrainedModel, names: set[str]) -> Iterator[str]:
    """The outermost modules whose parameters are all among `names`, then the names not in them.

    One of many layers or experts is left out: other tokens may reach it.
    """
    covered: set[str] = set()
    for prefix, module in [*model.named_modules(), *((name, None) for name in sorted(names))]:
        own = (
            {prefix} if module is None else {f"{prefix}.{n}" for n, _ in module.named_parameters()}
        )
        is_one_of_many = any(part.isdigit() for part in prefix.split("."))
        if own and own <= names - covered and not is_one_of_many:
            covered |= own
            yield prefix


def _embed(model: PreTrainedModel, row: list[int]) -> Tensor:
    """(1, T, D): the row's embeddings, each thought computed from the whole row before it."""
    embeds = model.get_input_embeddings()(torch.tensor([row]))
    for column, token in enumerate(row):
        if token == LATENT:
            before = embeds[:, :column].clone()
            states = model.base_model(inputs_embeds=before, use_cache=False).last_hidden_state
            thought = WEIGHTS[0] * states[:, -1] + WEIGHTS[1] * states[:, -2]
            embeds = torch.cat([before, thought[:, None], embeds[:, column + 1 :]], 1)
    return embeds


@torch.no_grad()
def _write_answers(model: PreTrainedModel) -> None:
    """Greedy answers after thoughts equal those of recomputation, also when some end early."""
    prompts = [row[: row.index(END) + 1] for row in _rows()]
    answers = []
    for prompt in prompts:
        embeds, answer = _embed(model, prompt), []
        for _ in range(NUM_NEW_TOKENS):
            logits = model(inputs_embeds=embeds.clone(), use_cache=False).logits[:, -1]
            answer.append(int(logits.argmax()))
            embeds = torch.cat(
                [embeds, model.get_input_embeddings()(logits.argmax(-1))[:, None]], 1
            )
        answers.append(answer)
    batch = _lay_out(prompts, [len(prompt) for prompt in prompts])
    for eos_token_id in {UNUSED, *(answer[1] for answer in answers)}:
        want = torch.full((len(answers), NUM_NEW_TOKENS), eos_token_id)
        for b, answer in enumerate(answers):
            cut = (answer + [eos_token_id]).index(eos_token_id)
            want[b, :cut] = torch.tensor(answer[:cut])
        got = _wrap(model, eos_token_id).generate(*batch, max_new_tokens=NUM_NEW_TOKENS)
        got = F.pad(got[:, batch[0].size(1) :], (0, NUM_NEW_TOKENS), value=eos_token_id)
        if not torch.equal(got[:, :NUM_NEW_TOKENS], want):
            raise _Unfit("writes other answers with its cache than without one")


_TRIALS: dict[str, Callable[[PreTrainedModel], tuple[str, ...] | None]] = {
    "reading input embeddings": _read_embeddings,
    "reading a padded batch": _read_padding,
    "writing answers after thoughts": _write_answers,
    "reading thoughts in passes": _read_thoughts,
}
