"""Building the model of a run: a Hugging Face model with weights and markers, wrapped in Coconut.

Implements docs/specification.md, section 2 (tokens) and the loading part of section 9. Reading
files of weights is left to weights.py, coconut.json to metadata.py, devices and precision to
distributed.py.
"""

from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from coconut import Coconut
from dataset import MARKERS, SpecialIds
from engine.architecture import (
    POSITION_FIELDS,
    ROTARY_LIMIT,
    require_readable,
    rotary_parameters,
)
from engine.config import Config
from engine.memory import ModelShape
from engine.metadata import (
    EXTRA_WEIGHTS,
    METADATA_FILE,
    THOUGHT_FIELDS,
    Metadata,
    check_method,
    other_method,
    require_class,
    require_metadata,
    shorten,
    token_ids,
)
from engine.weights import ModelSource, empty_model, load_folder, load_single_file, read_tensors
from utils import UserError, log


@dataclass(frozen=True)
class ModelOutline:
    """What is known about a model before its weights are read.

    num_parameters, vocab_size: with the rows of the markers where the method adds them.
    max_positions: longest sequence that the model can read, None without a limit.
    """

    num_parameters: int
    vocab_size: int
    max_positions: int | None


@dataclass
class Backbone:
    """A base model ready for training or evaluation.

    model: the Hugging Face causal LM, float32, on the CPU.
    tokenizer: knows the markers, pads on the right with EOS.
    source: where the model came from.
    has_markers: whether the loaded weights hold trained marker rows.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    has_markers: bool


def model_outline(config: Config, source: ModelSource) -> ModelOutline:
    """The size of the configured model, from its config.json alone.

    Raises: UserError when the source is missing or broken, or a model that Coconut cannot read.
    """
    _unreached(source, config.attn_implementation)
    architecture = source.architecture
    text_config = architecture.get_text_config()
    if config.method == "coconut":
        text_config.vocab_size = max(text_config.vocab_size, len(source.tokenizer))
    num_parameters = empty_model(source, architecture).num_parameters()
    return ModelOutline(num_parameters, text_config.vocab_size, max_positions(text_config))


def model_shape(
    config: Config,
    source: ModelSource,
    ids: SpecialIds,
    coconut_class: type[Coconut] | None = None,
) -> ModelShape:
    """What the configured model is built of, from its config.json alone.

    Raises: UserError when that is missing or broken.
    """
    architecture = source.architecture
    text_config = architecture.get_text_config()
    if config.method == "coconut":
        text_config.vocab_size = max(text_config.vocab_size, 1 + max(astuple(ids)))
    if config.attn_implementation is not None:
        architecture._attn_implementation = config.attn_implementation
    wrap = partial(
        coconut_class or Coconut,
        latent_token_id=ids.latent,
        start_latent_id=ids.start_latent,
        end_latent_id=ids.end_latent,
        eos_token_id=ids.eos,
        **{field: getattr(config, field) for field in THOUGHT_FIELDS},
    )
    return ModelShape(source.model_class, architecture, wrap)


def max_positions(text_config: PretrainedConfig) -> int | None:
    """The longest sequence that a model of this configuration can read; None without a limit."""
    limits = [getattr(text_config, field, None) for field in POSITION_FIELDS]
    for parameters in rotary_parameters(text_config):
        # Past it the longest row of a batch changes how every row is read.
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get(ROTARY_LIMIT))
    return min((limit for limit in limits if limit is not None), default=None)


def load_coconut(
    folder: str | Path, coconut_class: type[Coconut] | None = None
) -> tuple[Coconut, PreTrainedTokenizerBase, Metadata]:
    """A checkpoint of ours, its tokenizer and its coconut.json, without the run's config.yaml.

    coconut_class: the subclass of Coconut that the checkpoint was trained with. Nothing is imported
        because a checkpoint names it.
    Returns the model in evaluation mode, float32, on the CPU.

    Raises: UserError when the folder is not an intact checkpoint, or coconut_class not its class.
    """
    source = ModelSource("checkpoint", str(folder))
    metadata = source.metadata
    if metadata is None:
        raise UserError(f"{folder}: has no {METADATA_FILE}; name a checkpoint_N folder of a run")
    require_class(metadata, coconut_class, source.name)
    _unreached(source)
    model = load_folder(source, _build_options(None))
    has_markers = _folder_has_markers(source, model)
    backbone = Backbone(model, source.tokenizer, source, has_markers)
    _set_generation_config(backbone)
    coconut = _wrap(metadata, backbone, coconut_class)
    _load_extra_tensors(coconut, source, is_required=True)
    return coconut.eval(), source.tokenizer, metadata


def load_backbone(config: Config, source: ModelSource) -> Backbone:
    """The model with the weights of `source`; in coconut mode it knows the markers.

    Random weights are drawn from torch's global generator.

    Raises: UserError for a source that is missing, broken, of another shape or another method, or
    that records no window, and for activation checkpointing that the model does not support.
    """
    check_method(config, source.metadata, source.name)
    unreached = _unreached(source, config.attn_implementation)
    options = _build_options(config.attn_implementation)
    if source.is_file:
        model, has_markers = load_single_file(source, options)
    else:
        model = load_folder(source, options)
        has_markers = _folder_has_markers(source, model)
    if has_markers and config.method != "coconut":
        what = "holds Coconut weights (trained latent markers)"
        raise UserError(other_method(config, what, source.name))
    if has_markers and source.metadata is None:
        require_metadata(config, source.name)
    if config.method == "coconut" and source.is_state:
        _require_marker_rows(source, model)
    elif config.method == "coconut" and not has_markers:
        if config.only_eval:
            log.info(f"{source.name}: these weights never saw the latent markers")
        _add_marker_rows(model, source.tokenizer, config.new_token_init)
    backbone = Backbone(model, source.tokenizer, source, has_markers)
    _set_generation_config(backbone)
    if config.activation_checkpointing:
        _enable_checkpointing(model)
    if not config.only_eval:
        _freeze(model, unreached)
    return backbone


def build_coconut(
    config: Config, backbone: Backbone, coconut_class: type[Coconut] | None = None
) -> Coconut:
    """Coconut over the backbone, with the tokenizer's ids and the configuration's window.

    It serves every method: on sequences without latents it is an ordinary language model.

    Raises: UserError when the checkpoint's token ids, class or extra tensors are not this run's.
    """
    require_class(backbone.source.metadata, coconut_class, backbone.source.name)
    coconut = _wrap(config, backbone, coconut_class)
    _load_extra_tensors(coconut, backbone.source, is_required=config.only_eval)
    return coconut


def _wrap(
    window_of: Config | Metadata, backbone: Backbone, coconut_class: type[Coconut] | None
) -> Coconut:
    """Coconut over the backbone, with the window of a configuration or a checkpoint."""
    name, model = backbone.source.name, backbone.model
    ids = token_ids(backbone.tokenizer)
    for field, value in ids.items():
        stored = getattr(backbone.source.metadata, field, value)
        if stored != value:
            raise UserError(
                f"{name}: {METADATA_FILE} has {field} {stored}, the tokenizer {value}; use the"
                " tokenizer that the checkpoint was trained with"
            )
    window = {field: getattr(window_of, field) for field in THOUGHT_FIELDS}
    return (coconut_class or Coconut)(model, **ids, **window)


def _load_extra_tensors(coconut: Coconut, source: ModelSource, is_required: bool) -> None:
    """Copy the checkpoint's parameters outside the base model into `coconut`.

    is_required: whether a checkpoint of plain Coconut is refused where `coconut` has such
        parameters; otherwise they keep their initial values.

    Raises: UserError naming tensors that are missing, surplus or of a wrong shape.
    """
    if not source.has_weights or source.metadata is None:
        return
    file = Path(source.location, EXTRA_WEIGHTS)
    wanted = coconut.extra_parameters()
    metadata = source.metadata
    was_plain = metadata.coconut_class is None and metadata.latent_weights != "learned"
    if not file.is_file() and (not wanted or (was_plain and not is_required)):
        return
    stored = read_tensors(file) if file.is_file() else {}
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [f"{name} is surplus" for name in stored if name not in wanted]
    faults += [
        f"{name} has shape {list(stored[name].shape)}, wanted {list(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in stored and stored[name].shape != parameter.shape
    ]
    if faults:
        raise UserError(
            f"{source.name}: {EXTRA_WEIGHTS} does not fit the model: {shorten(faults)}; use"
            " the coconut_class and latent_weights of its training"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def _unreached(source: ModelSource, attn_implementation: str | None = None) -> tuple[str, ...]:
    return require_readable(
        source.name, source.model_class, source.architecture, attn_implementation
    )


def _freeze(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Freeze modules and parameters by name: DDP would wait forever for their gradients."""
    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in names)
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    if frozen:
        count = sum(parameter.numel() for parameter in frozen)
        log.info(f"{', '.join(names)}: {count:,} parameters that no text reaches are frozen")


def _build_options(attn_implementation: str | None) -> dict:
    # Always float32: under bf16, autocast computes over float32 master weights.
    options = {"dtype": torch.float32}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return options


def _set_generation_config(backbone: Backbone) -> None:
    end = backbone.tokenizer.eos_token_id
    backbone.model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)


def _enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing: {model.config.model_type} does not support it; write false"
        )
    # transformers 5.17 has only the older name, about which later versions warn.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


# The markers


def _marker_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(MARKERS))


def _folder_has_markers(source: ModelSource, model: PreTrainedModel) -> bool:
    """Whether the weights of a folder or hub name come with trained marker rows."""
    if not source.has_weights:
        return False
    if source.metadata is None:
        return source.tokenizer_had_markers and _has_marker_rows(source, model)
    if source.metadata.method == "coconut":
        _require_marker_rows(source, model)
    return source.metadata.method == "coconut"


def _has_marker_rows(source: ModelSource, model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().num_embeddings > max(_marker_ids(source.tokenizer))


def _require_marker_rows(source: ModelSource, model: PreTrainedModel) -> None:
    if not _has_marker_rows(source, model):
        raise UserError(
            f"{source.name}: the embedding has no rows for the latent markers; name an intact"
            " checkpoint"
        )


def _single_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of `text` where the tokenizer has it as one token, else None."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    candidates = [tokenizer.convert_tokens_to_ids(text), *(encoded if len(encoded) == 1 else [])]
    unknown_id = tokenizer.unk_token_id if text != tokenizer.unk_token else None
    known = [i for i in candidates if i not in (None, unknown_id)]
    return known[0] if known else None


@torch.no_grad()
def _add_marker_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_token_init: str
) -> None:
    """Give the markers their first rows, input and output side; the embedding never shrinks."""
    marker_ids = _marker_ids(tokenizer)
    num_old = model.get_input_embeddings().num_embeddings
    if num_old < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # Rows past the tokenizer's end pad the vocabulary and were never trained.
    old_ids = [i for i in range(min(num_old, len(tokenizer))) if i not in marker_ids]
    copied_id = _single_token_id(tokenizer, new_token_init)
    if copied_id not in old_ids:
        copied_id = None
        log.info(
            f"new_token_init: {new_token_init!r} is not one token of this tokenizer; the latent"
            " markers start as the mean of all embeddings"
        )
    head = model.get_output_embeddings()
    for table in (model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)):
        if table is not None:
            rows = table[old_ids].mean(0) if copied_id is None else table[copied_id].clone()
            table[marker_ids] = rows
