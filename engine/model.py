"""The Hugging Face model and tokenizer under Coconut: special tokens, weights from any source.

Carries out SPEC sections 2 (tokens) and 9 (what may be loaded). Weights are random, or come from a
pretrained model, one of our checkpoints, another Hugging Face directory or a single file as the
published code saves it; whatever does not fit exactly is refused by name. What a checkpoint records
about itself is settings.py's, saving checkpoint.py's, devices and precision training.py's.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from coconut import Coconut
from dataset import MARKERS
from engine.config import Config
from engine.metadata import (
    SETTINGS_NAME,
    check_method,
    checkpoint_settings,
    other_method,
    read_checkpoint_settings,
    reconcile,
    require_settings,
    shorten,
    source_name,
    token_ids,
    weights_path,
)
from engine.weights import (
    check_folder,
    first_fault,
    read_config,
    read_tensors,
    read_tokenizer,
    reading,
    weight_bytes,
)
from utils import UserError

__all__ = [
    "Backbone",
    "ModelOutline",
    "build_coconut",
    "checkpoint_settings",
    "load_backbone",
    "load_tokenizer",
    "model_outline",
    "read_checkpoint_settings",
    "reconcile",
]

WRAPPER_PREFIX = "base_causallm."
WRAPPER_COPY = "embedding.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
TOKENIZER_FILES += ("tokenizer.model", "spiece.model")
CORE_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
MOST_LAYERS = 1000
# A model with one of these set does not score a hidden state h as lm_head(h).
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")
LOGIT_SETTINGS += ("lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True)
class ModelOutline:
    """What can be known of a model before its weights are read.

    num_parameters, vocab_size: with the rows of the markers where the method adds them.
    max_positions: longest sequence the model can read, None where it states none.
    """

    num_parameters: int
    vocab_size: int
    max_positions: int | None


@dataclass
class Backbone:
    """A base model ready for training or evaluation.

    model: the Hugging Face causal LM, float32, on the CPU.
    tokenizer: knows the markers, pads on the right with EOS.
    source: the coconut.json beside the loaded weights, None where there is none.
    has_markers: whether the loaded weights brought trained marker rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: dict | None
    has_markers: bool


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, else model_id's, with pad = EOS and the markers added.

    Raises: UserError when it cannot be had or read, or has no EOS.
    """
    return _prepare_tokenizer(read_tokenizer(*_tokenizer_source(config)))


def model_outline(config: Config, tokenizer: PreTrainedTokenizerBase) -> ModelOutline:
    """The size of the configured model, from its config.json alone.

    Raises: UserError when the source of the weights is missing, broken or no causal language model.
    """
    model_config = _read_model_config(config)
    text_config = model_config.get_text_config()
    if config.method == "coconut":
        text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    num_parameters = _shell(config, model_config).num_parameters()
    max_positions = getattr(text_config, "max_position_embeddings", None)
    return ModelOutline(num_parameters, text_config.vocab_size, max_positions)


def load_backbone(config: Config, notify: Callable[[str], None] = print) -> Backbone:
    """The model with the weights the configuration names; in coconut mode it knows the markers.

    `from_scratch` draws from torch's global generator. `notify` gets what the user should hear but
    need not mend.

    Raises: UserError for a source that is missing, broken, of another shape or another method, or
    lacks its window settings, and for activation checkpointing that the model does not support.
    """
    settings = read_checkpoint_settings(weights_path(config))
    check_method(config, settings)
    tokenizer = read_tokenizer(*_tokenizer_source(config))
    had_markers = tokenizer.get_vocab().keys() >= set(MARKERS)
    _prepare_tokenizer(tokenizer)
    if config.load_model_path and os.path.isfile(config.load_model_path):
        model, has_markers = _load_single_file(config, tokenizer)
    else:
        model = _load_model(config, tokenizer)
        has_markers = _folder_has_markers(config, settings, model, tokenizer, had_markers)
    if has_markers and config.method != "coconut":
        raise UserError(other_method(config, "holds Coconut weights (trained latent markers)"))
    if has_markers and settings is None:
        require_settings(config)
    if config.method == "coconut" and not has_markers:
        if config.only_eval:
            notify(f"{source_name(config)}: these weights never saw the latent markers")
        _add_marker_rows(model, tokenizer, config.new_token_init, notify)
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    if config.activation_checkpointing:
        _enable_checkpointing(model)
    return Backbone(model, tokenizer, settings, has_markers)


def build_coconut(config: Config, backbone: Backbone) -> Coconut:
    """Coconut over the backbone, with the tokenizer's ids and the configuration's window.

    Serves every method: sequences without latents make it an ordinary language model.

    Raises: UserError when the checkpoint's token ids are not the tokenizer's, or when the model
    does not compute its logits as lm_head(last hidden state).
    """
    model, ids = backbone.model, token_ids(backbone.tokenizer)
    for name, value in ids.items():
        stored = (backbone.source or ids)[name]
        if stored != value:
            raise UserError(
                f"{source_name(config)}: {SETTINGS_NAME} has {name} {stored}, the tokenizer"
                f" {value}; use the tokenizer that the checkpoint was trained with"
            )
    model_type = model.config.model_type
    for name in LOGIT_SETTINGS:
        value = getattr(model.config.get_text_config(), name, None)
        if value not in (None, 1):
            raise UserError(
                f"{source_name(config)}: {model_type} with {name} {value} does not score a hidden"
                " state by lm_head alone; choose a GPT-2 or Llama kind of model"
            )
    coconut = Coconut(
        model,
        **ids,
        latent_window_size=config.latent_window_size,
        latent_weights=config.latent_weights,
        window_scope=config.window_scope,
        thought=config.thought,
    )
    # Other kernels need another device or precision than the model has here.
    if config.attn_implementation in (None, "eager", "sdpa") and not _reads_plain_text(coconut):
        raise UserError(
            f"{source_name(config)}: {model_type} reads embeddings or scores hidden states in a way"
            " of its own; choose a GPT-2 or Llama kind of model"
        )
    return coconut


@torch.no_grad()
def _reads_plain_text(coconut: Coconut) -> bool:
    """Whether, without latents, Coconut scores padded tokens as the base model does bare ones."""
    model = coconut.base_causallm
    was_training = model.training
    model.eval()
    input_ids = torch.full((1, 4), coconut.eos_token_id, device=model.device)
    mask = torch.tensor([[0, 1, 1, 1]], device=model.device)
    try:
        got = coconut(input_ids, mask).logits[:, -1]
        want = model(input_ids=input_ids[:, 1:], use_cache=False).logits[:, -1]
        return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    except (TypeError, AttributeError, ValueError, RuntimeError):
        return False
    finally:
        model.train(was_training)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing: {model.config.model_type} does not support it; write false"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


# The tokenizer


def _tokenizer_source(config: Config) -> tuple[str, str]:
    """(configuration field, folder or hub name) that the tokenizer comes from."""
    path = config.load_model_path
    if path and any(os.path.isfile(os.path.join(path, name)) for name in TOKENIZER_FILES):
        return "load_model_path", path
    return "model_id", config.model_id


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.eos_token
    # As special tokens, so that skip_special_tokens keeps them out of decoded answers.
    tokenizer.add_special_tokens(
        {"extra_special_tokens": list(MARKERS)}, replace_extra_special_tokens=False
    )
    return tokenizer


# Weights


def _weights_source(config: Config) -> tuple[str, str]:
    """(configuration field, file, folder or hub name) that the weights come from."""
    field = "load_model_path" if config.load_model_path else "model_id"
    return field, getattr(config, field)


def _read_model_config(config: Config) -> PretrainedConfig:
    """The architecture of the weights' folder or hub name; of model_id for a single file."""
    path = config.load_model_path
    if path and not os.path.exists(path):
        raise UserError(f"load_model_path: {path} does not exist; name a checkpoint or None")
    is_file = path is not None and os.path.isfile(path)
    field, source = (
        ("load_model_path", path) if path and not is_file else ("model_id", config.model_id)
    )
    if os.path.isdir(source):
        check_folder(field, Path(source), needs_weights=not (config.from_scratch or is_file))
    return read_config(field, source)


def _model_class(config: Config, model_config: PretrainedConfig) -> type[PreTrainedModel]:
    if type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{source_name(config)}: {model_config.model_type} is no causal language model; choose"
            " a GPT-2 or Llama kind of model"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)]


def _shell(config: Config, model_config: PretrainedConfig) -> PreTrainedModel:
    """The model without storage, to know its sizes by.

    Raises: UserError where the described model cannot be, or cannot be that of the weights.
    """
    field, source = _weights_source(config)
    num_layers = model_config.get_text_config().num_hidden_layers
    if num_layers > MOST_LAYERS:
        raise UserError(
            f"{field}: {source}: config.json describes {num_layers} layers; restore config.json"
        )
    with reading(field, source), torch.device("meta"):
        shell = _model_class(config, model_config)(model_config)
    num_bytes = None if config.from_scratch else weight_bytes(source)
    # Even at four bits a parameter; what such a model takes might not fit any memory.
    if num_bytes is not None and shell.num_parameters() > 2 * num_bytes:
        raise UserError(
            first_fault(source)
            or f"{field}: {source}: {num_bytes:,} bytes of weights cannot hold the"
            f" {shell.num_parameters():,} parameters that config.json describes; name weights and"
            " config.json that belong together"
        )
    return shell


def _build_options(config: Config) -> dict:
    # Always float32: bf16 is computed by autocast over float32 master weights.
    options = {"dtype": torch.float32}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def _load_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a directory or hub name, or a random one."""
    model_config = _read_model_config(config)
    if config.load_model_path:
        _check_core_shape(config, model_config, tokenizer)
    model_class = _model_class(config, model_config)
    if config.from_scratch:
        with reading("model_id", config.model_id):
            return model_class._from_config(model_config, **_build_options(config))
    return _load_weights(config, model_class, model_config)


def _check_core_shape(
    config: Config, own: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise where a checkpoint's architecture is not model_id's, if that lies on this machine."""
    try:
        wanted = read_config("model_id", config.model_id, local_files_only=True)
    except UserError:
        if os.path.isfile(os.path.join(config.model_id, "config.json")):
            raise
        return
    own, wanted = own.get_text_config(), wanted.get_text_config()
    differences = [
        f"{name} {getattr(own, name, None)} and {getattr(wanted, name, None)}"
        for name in CORE_SHAPE
        if getattr(own, name, None) != getattr(wanted, name, None)
    ]
    has_grown = wanted.vocab_size < own.vocab_size == len(tokenizer)
    if own.vocab_size != wanted.vocab_size and not has_grown:
        differences.append(f"vocab_size {own.vocab_size} and {wanted.vocab_size}")
    if differences:
        raise UserError(
            f"load_model_path {config.load_model_path} and model_id {config.model_id} differ:"
            f" {', '.join(differences)}; name the model_id that the checkpoint came from"
        )


def _load_weights(
    config: Config,
    model_class: type[PreTrainedModel],
    model_config: PretrainedConfig,
    tensors: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The model with the weights of the folder or hub name, or with `tensors` read from a file.

    Raises: UserError naming tensors that are missing, surplus or of a wrong shape; those that the
    model class declares ignorable do not count.
    """
    field, source = _weights_source(config)
    _shell(config, model_config)
    with reading(field, source):
        model, report = model_class.from_pretrained(
            source if tensors is None else None,
            config=model_config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **_build_options(config),
        )
    faults = []
    for kind, key in (("missing", "missing_keys"), ("surplus", "unexpected_keys")):
        if names := sorted(report[key]):
            faults.append(f"{len(names)} {kind} ({shorten(names)})")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} {list(got)}, wanted {list(want)}" for name, got, want in mismatched]
        faults.append(f"{len(shapes)} of a wrong shape ({shorten(shapes)})")
    is_tied = model_config.get_text_config().tie_word_embeddings and model_class._tied_weights_keys
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # transformers unties a head that differs; the next save would then lose one of the two.
    if not faults and is_tied and head.weight is not embedding.weight:
        faults.append("1 surplus (lm_head.weight, unlike the input embedding it is tied to)")
    if faults:
        raise UserError(f"{field}: {source} does not fit its model; tensors: {', '.join(faults)}")
    # Tensors of a safetensors file are mapped from it at odd addresses, where CPU kernels may round
    # otherwise than in memory of their own; and the file may be replaced while the run goes on.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _load_single_file(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, bool]:
    """The model of a single-file state dict, and whether its embedding holds the markers."""
    model_config = _read_model_config(config)
    model_class = _model_class(config, model_config)
    shell = _shell(config, model_config)
    embedding_name = next(
        name
        for name, parameter in shell.named_parameters()
        if parameter is shell.get_input_embeddings().weight
    ).removeprefix(f"{shell.base_model_prefix}.")
    tensors, embedding, is_wrapped = _unwrap(config, embedding_name)
    text_config = model_config.get_text_config()
    old_rows = text_config.vocab_size
    rows = old_rows if embedding is None or embedding.dim() == 0 else len(embedding)
    has_grown = rows == len(tokenizer) and (is_wrapped or rows > old_rows)
    if has_grown:
        text_config.vocab_size = rows
    has_markers = has_grown or (is_wrapped and rows == old_rows > max(_marker_ids(tokenizer)))
    if has_markers and config.method != "coconut":
        raise UserError(other_method(config, "holds Coconut weights (trained latent markers)"))
    return _load_weights(config, model_class, model_config, tensors), has_markers


def _unwrap(config: Config, embedding_name: str) -> tuple[dict[str, Tensor], Tensor | None, bool]:
    """The file's tensors by the bare model's names, the input embedding, whether it was wrapped.

    embedding_name: how the name of the input embedding ends, in files with and without the prefix
        of the base model.
    Raises: UserError for tensors beside the wrapped model, but for its equal copy of the embedding.
    """
    saved = read_tensors(Path(config.load_model_path))
    is_wrapped = any(name.startswith(WRAPPER_PREFIX) for name in saved)
    embeddings = (
        tensor
        for name, tensor in saved.items()
        if name != WRAPPER_COPY and f".{name}".endswith(f".{embedding_name}")
    )
    embedding, duplicate = next(embeddings, None), saved.get(WRAPPER_COPY)
    if embedding is None:
        embedding = duplicate
    elif duplicate is not None and torch.equal(duplicate, embedding):
        del saved[WRAPPER_COPY]
    surplus = [name for name in saved if is_wrapped and not name.startswith(WRAPPER_PREFIX)]
    if surplus:
        raise UserError(
            f"{source_name(config)} does not fit its model; tensors: {len(surplus)} surplus"
            f" ({shorten(surplus)})"
        )
    tensors = {name.removeprefix(WRAPPER_PREFIX): tensor for name, tensor in saved.items()}
    return tensors, embedding, is_wrapped


# The markers


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(MARKERS))


def _folder_has_markers(
    config: Config,
    settings: dict | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    had_markers: bool,
) -> bool:
    """Whether the weights of a folder or hub name come with trained marker rows.

    had_markers: whether the tokenizer as it was read knew the markers.
    """
    if config.from_scratch:
        return False
    is_covered = model.get_input_embeddings().num_embeddings > max(_marker_ids(tokenizer))
    if settings is None:
        is_own = _tokenizer_source(config)[1] == (config.load_model_path or config.model_id)
        return is_covered and had_markers and is_own
    if settings["method"] == "coconut" and not is_covered:
        raise UserError(
            f"{source_name(config)}: the embedding has no rows for the latent markers; name an"
            " intact checkpoint"
        )
    return settings["method"] == "coconut"


def _single_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of `text` where the tokenizer has it as one token, else None."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    candidates = [tokenizer.convert_tokens_to_ids(text), *(encoded if len(encoded) == 1 else [])]
    unknown_id = tokenizer.unk_token_id if text != tokenizer.unk_token else None
    known = [i for i in candidates if i not in (None, unknown_id)]
    return known[0] if known else None


@torch.no_grad()
def _add_marker_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new_token_init: str,
    notify: Callable[[str], None],
) -> None:
    """Give the markers their first rows, input and output side; the embedding never shrinks."""
    marker_ids = _marker_ids(tokenizer)
    num_old = model.get_input_embeddings().num_embeddings
    if num_old < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Rows past the tokenizer's end pad the vocabulary and were never trained.
    old_ids = [i for i in range(min(num_old, len(tokenizer))) if i not in marker_ids]
    source = _single_token_id(tokenizer, new_token_init)
    if source not in old_ids:
        source = None
        notify(
            f"new_token_init: {new_token_init!r} is not one token of this tokenizer; the latent"
            " markers start as the mean of all embeddings"
        )
    head = model.get_output_embeddings()
    for table in (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
        if table is not None:
            table[marker_ids] = table[old_ids].mean(0) if source is None else table[source].clone()
