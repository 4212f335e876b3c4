"""Where a model comes from, and reading it strictly: folders, hub names, single files of tensors.

Files are data and nothing else (docs/specification.md, section 9). Pickles are read with
`weights_only=True`, and code that comes with a model folder is never run: no key allows it, because
thoughts need an architecture whose cache and embeddings are known. Whatever a loader raises becomes
one UserError, and tensors that do not fit are named. Which weights may be loaded into which run is
left to metadata.py and model.py.
"""

import copy
import json
import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dataset import MARKERS
from engine.config import Config
from engine.metadata import Metadata, shorten
from utils import UserError

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
TOKENIZER_FILES += ("tokenizer.model", "spiece.model")
STATE_FILE = "state.json"  # of a training state, as checkpoint.py writes it
COCONUT_PREFIX = "base_causallm."
# Parts of names that torch.compile, FSDP and activation checkpointing add; DDP adds "module.".
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The published code's wrapper saves the input embedding a second time under this name.
COCONUT_COPY = "embedding.weight"
MAX_REASON_LENGTH = 300
MAX_LAYERS = 1000
HUB_TIMEOUT_S = 4.0


@dataclass(frozen=True)
class ModelSource:
    """Where a run's model comes from. Each file is read once, when it is first needed.

    key: the configuration key that names the weights.
    location: a model folder, a single file of tensors, or a hub name.
    model_id: gives a single file its architecture, and a tokenizer to whatever has none.
    has_weights: whether weights are read there; else they are random, or a training state's.
    """

    key: str
    location: str
    model_id: str | None = None
    has_weights: bool = True

    @classmethod
    def of(cls, config: Config) -> "ModelSource":
        """The source that the configuration names."""
        if config.load_model_path:
            return cls("load_model_path", config.load_model_path, config.model_id)
        return cls("model_id", config.model_id, config.model_id, not config.from_scratch)

    @classmethod
    def of_state(cls, folder: Path) -> "ModelSource":
        """A training state, which has its own architecture and tokenizer."""
        return cls("resume", str(folder), has_weights=False)

    @property
    def name(self) -> str:
        """The key and value that name the weights, as messages begin."""
        return f"{self.key} {self.location}"

    @property
    def is_state(self) -> bool:
        """Whether it is a training state."""
        return self.key == "resume"

    @property
    def is_file(self) -> bool:
        """Whether the weights are a single file."""
        return self.has_weights and os.path.isfile(self.location)

    @cached_property
    def metadata(self) -> Metadata | None:
        """The coconut.json beside the weights, None where there is none.

        Raises: UserError when it is broken.
        """
        return Metadata.read(self.location) if self.has_weights else None

    @property
    def architecture(self) -> PretrainedConfig:
        """A copy of what config.json describes; of model_id's for a single file.

        Raises: UserError when it is missing, broken, or not a causal language model.
        """
        return copy.deepcopy(self._architecture)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The class of transformers that `architecture` belongs to."""
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(self._architecture)]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That beside the weights, else model_id's, with pad = EOS and the markers added.

        Raises: UserError when it is missing or unreadable, or has no EOS.
        """
        return self._tokenizer[0]

    @property
    def tokenizer_had_markers(self) -> bool:
        """Whether the weights came with a tokenizer that knew the markers."""
        return self._tokenizer[1]

    @cached_property
    def _architecture(self) -> PretrainedConfig:
        if self.key == "load_model_path" and not os.path.exists(self.location):
            raise UserError(
                f"load_model_path: {self.location} does not exist; name a checkpoint or None"
            )
        key, name = ("model_id", self._model_id) if self.is_file else (self.key, self.location)
        if os.path.isdir(name):
            check_folder(key, Path(name), needs_weights=self.has_weights and not self.is_file)
        architecture = read_config(key, name)
        if type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{key}: {name}: {architecture.model_type} is not a causal language model; choose a"
                " GPT-2 or Llama kind of model"
            )
        return architecture

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerBase, bool]:
        paths = (os.path.join(self.location, name) for name in TOKENIZER_FILES)
        is_own = self.location == self.model_id or any(map(os.path.isfile, paths))
        key, name = (self.key, self.location) if is_own else ("model_id", self._model_id)
        # Given the architecture of its folder, transformers does not read it again.
        has_architecture = name == (self._model_id if self.is_file else self.location)
        tokenizer = read_tokenizer(key, name, self._architecture if has_architecture else None)
        had_markers = is_own and tokenizer.get_vocab().keys() >= set(MARKERS)
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.eos_token
        # As special tokens, so that skip_special_tokens keeps them out of decoded answers.
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(MARKERS)}, replace_extra_special_tokens=False
        )
        return tokenizer, had_markers

    @property
    def _model_id(self) -> str:
        if self.model_id is None:
            lacks = "config.json and tokenizer" if self.is_file else "tokenizer"
            raise UserError(
                f"{self.name}: has no {lacks} of its own; write model_id: the folder or name of the"
                " model that has them"
            )
        return self.model_id


def empty_model(source: ModelSource, architecture: PretrainedConfig) -> PreTrainedModel:
    """The model without storage, for its sizes.

    Raises: UserError where the described model cannot be built, or cannot be that of the weights.
    """
    num_layers = architecture.get_text_config().num_hidden_layers
    if num_layers > MAX_LAYERS:
        raise UserError(
            f"{source.key}: {source.location}: config.json describes {num_layers} layers; restore"
            " config.json"
        )
    with reading(source.key, source.location), torch.device("meta"):
        model = source.model_class(copy.deepcopy(architecture))
    num_bytes = weight_bytes(source.location) if source.has_weights else None
    # Even at four bits a parameter. Such a model might need more memory than there is.
    if num_bytes is not None and model.num_parameters() > 2 * num_bytes:
        raise UserError(
            first_fault(source.location)
            or f"{source.key}: {source.location}: {num_bytes:,} bytes of weights cannot hold the"
            f" {model.num_parameters():,} parameters that config.json describes; name weights and"
            " config.json that belong together"
        )
    return model


def load_folder(source: ModelSource, options: dict) -> PreTrainedModel:
    """The model of a folder or hub name, or a random one where the source has no weights.

    options: of transformers' loaders, such as dtype.

    Raises: UserError naming tensors that are missing, surplus or of a wrong shape.
    """
    architecture = source.architecture
    if not source.has_weights:
        with reading(source.key, source.location):
            return source.model_class._from_config(architecture, **options)
    return _load_weights(source, architecture, options)


def load_single_file(source: ModelSource, options: dict) -> tuple[PreTrainedModel, bool]:
    """The model of a single-file state dict, and whether its embedding holds the markers.

    Raises: UserError as `load_folder` does.
    """
    architecture = source.architecture
    shell = empty_model(source, architecture)
    embedding_name = next(
        name
        for name, parameter in shell.named_parameters()
        if parameter is shell.get_input_embeddings().weight
    ).removeprefix(f"{shell.base_model_prefix}.")
    tensors, embedding, is_wrapped = _unwrap(source, embedding_name)
    text_config = architecture.get_text_config()
    old_rows = text_config.vocab_size
    rows = old_rows if embedding is None or embedding.dim() == 0 else len(embedding)
    has_grown = rows == len(source.tokenizer) and (is_wrapped or rows > old_rows)
    if has_grown:
        text_config.vocab_size = rows
    last_marker = max(source.tokenizer.convert_tokens_to_ids(list(MARKERS)))
    has_markers = has_grown or (is_wrapped and rows == old_rows > last_marker)
    return _load_weights(source, architecture, options, tensors), has_markers


def _unwrap(
    source: ModelSource, embedding_name: str
) -> tuple[dict[str, Tensor], Tensor | None, bool]:
    """The file's tensors by the base model's names, the input embedding, whether it was wrapped.

    embedding_name: how the name of the input embedding ends, in files with and without the prefix
        of the base model.
    Raises: UserError for tensors beside the wrapped model, but for its equal copy of the embedding.
    """
    saved = _without_wrappers(read_tensors(Path(source.location)))
    is_wrapped = any(name.startswith(COCONUT_PREFIX) for name in saved)
    embeddings = (
        tensor
        for name, tensor in saved.items()
        if name != COCONUT_COPY and f".{name}".endswith(f".{embedding_name}")
    )
    embedding, duplicate = next(embeddings, None), saved.get(COCONUT_COPY)
    if embedding is None:
        embedding = duplicate
    elif duplicate is not None and torch.equal(duplicate, embedding):
        del saved[COCONUT_COPY]
    surplus = [name for name in saved if is_wrapped and not name.startswith(COCONUT_PREFIX)]
    if surplus:
        raise _does_not_fit(source, [f"{len(surplus)} surplus ({shorten(surplus)})"])
    tensors = {name.removeprefix(COCONUT_PREFIX): tensor for name, tensor in saved.items()}
    return _without_wrappers(tensors), embedding, is_wrapped


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names they had before DDP, FSDP or torch.compile wrapped the model."""
    names = {name: ".".join(p for p in name.split(".") if p not in WRAPPERS) for name in tensors}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
    # Where two would become one, the names stay and are found surplus.
    return tensors if len({*names.values()}) < len(names) else {names[n]: tensors[n] for n in names}


def _load_weights(
    source: ModelSource,
    architecture: PretrainedConfig,
    options: dict,
    tensors: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """The model with the weights of the folder or hub name, or with `tensors` read from a file.

    Raises: UserError naming tensors that are missing, surplus or of a wrong shape; those that the
    model class declares ignorable do not count.
    """
    empty_model(source, architecture)
    with reading(source.key, source.location):
        model, report = source.model_class.from_pretrained(
            source.location if tensors is None else None,
            config=architecture,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **_hub_options(source.location),
            **options,
        )
    faults = []
    missing, surplus = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    for kind, names in (("missing", missing), ("surplus", surplus)):
        if names:
            faults.append(f"{len(names)} {kind} ({shorten(names)})")
    if prefix := _extra_prefix(surplus, missing):
        faults.append(
            f"the surplus names are the missing ones with the prefix {prefix}: save the state dict"
            " of the model inside the wrapper"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{name} {list(got)}, wanted {list(want)}" for name, got, want in mismatched]
        faults.append(f"{len(shapes)} of a wrong shape ({shorten(shapes)})")
    is_tied = architecture.get_text_config().tie_word_embeddings and model._tied_weights_keys
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # transformers unties a head that differs; the next save would then lose one of the two.
    if not faults and is_tied and head.weight is not embedding.weight:
        faults.append("1 surplus (lm_head.weight, unlike the input embedding it is tied to)")
    if faults:
        raise _does_not_fit(source, faults)
    # Tensors of a safetensors file are mapped from it at unaligned addresses, where CPU kernels may
    # round differently, and the file may be replaced during the run.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _extra_prefix(surplus: list[str], missing: list[str]) -> str | None:
    """The prefix by which all surplus names differ from missing ones; None where there is none."""
    first = surplus[0] if surplus else ""
    prefixes = [first.removesuffix(name) for name in missing if first.endswith(name)]
    for prefix in sorted(prefixes, key=len):
        if all(name.removeprefix(prefix) in missing for name in surplus):
            return prefix
    return None


def _does_not_fit(source: ModelSource, faults: list[str]) -> UserError:
    return UserError(f"{source.name} does not fit its model; tensors: {', '.join(faults)}")


@contextmanager
def reading(key: str, location: str, part: str = "the model") -> Iterator[None]:
    """Turn whatever a Hugging Face loader raises about `location` into one UserError; silence it.

    key, part: the configuration key that names the location, and what of it is read.
    The loaders raise many classes (tokenizers even a bare Exception), so all are caught.
    """
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    # A download may take minutes, so only local files are loaded without a progress bar.
    if os.path.exists(location):
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_unreadable(key, location, part, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _hub_options(location: str) -> dict:
    """Options that keep loaders from retrying an unreachable hub, which takes 24 s a file."""
    if os.path.exists(location) or constants.HF_HUB_OFFLINE or _hub_answers():
        return {}
    return {"local_files_only": True}


@cache
def _hub_answers() -> bool:
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
            answered.set()

    # The time-out of a request does not cover resolving the host name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return answered.is_set()


def read_config(key: str, location: str) -> PretrainedConfig:
    """The architecture that a folder or hub name describes.

    Raises: UserError when it is missing or unreadable, or comes with code of its own.
    """
    # False, not unset: unset, transformers asks on a terminal whether to run a folder's code.
    with reading(key, location, "config.json"):
        architecture = AutoConfig.from_pretrained(
            location, trust_remote_code=False, **_hub_options(location)
        )
        if getattr(architecture, "auto_map", None):
            raise UserError(_code_is_refused(key, location))
    return architecture


def read_tokenizer(
    key: str, location: str, architecture: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    architecture: of the same location, where it was read before.

    Raises: UserError when it is missing or unreadable, comes with code of its own, or has no EOS.
    """
    with reading(key, location, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            location, config=architecture, trust_remote_code=False, **_hub_options(location)
        )
        if tokenizer.init_kwargs.get("auto_map"):
            raise UserError(_code_is_refused(key, location))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: the tokenizer of {location} has no EOS token to end an answer with; set"
            " eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_folder(key: str, folder: Path, needs_weights: bool) -> None:
    """Raise UserError where a folder is not a model folder in Hugging Face's layout."""
    if needs_weights and (folder / STATE_FILE).is_file():
        raise UserError(
            f"{key}: {folder} is a training state, from which its own run resumes by itself; name"
            f" a checkpoint_N in {folder.parent.parent} instead"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: folder {folder} has no config.json; name a model folder")
    if needs_weights and not any((folder / name).is_file() for name in WEIGHT_FILES):
        hint = "set from_scratch: true to start from random ones, or " * (key == "model_id")
        raise UserError(
            f"{key}: folder {folder} has no weights; {hint}name a folder with model.safetensors"
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a single file, on the CPU; nothing in it is ever executed.

    Raises: UserError when it is broken, or holds anything but named tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: corrupt, or holds more than tensors, and code in such a file is never run;"
            " save model.state_dict() alone with torch.save"
        ) from error
    # A damaged file makes the readers raise almost any class.
    except Exception as error:
        raise UserError(f"{file}: truncated or corrupt, weights cannot be read from it") from error
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{file}: is not a state dict; save model.state_dict() with torch.save")
    others = [
        str(name)
        for name, value in tensors.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
    ]
    if others:
        raise UserError(
            f"{file}: has entries that are not plain tensors ({shorten(others)}); save"
            " model.state_dict() alone with torch.save"
        )
    return tensors


def weight_bytes(location: str) -> int | None:
    """Size of the files that weights are read from, None where they are not local."""
    if os.path.isfile(location):
        return os.path.getsize(location)
    if not os.path.isdir(location):
        return None
    entries = os.scandir(location)
    return sum(e.stat().st_size for e in entries if e.name.endswith((".safetensors", ".bin")))


def first_fault(location: str) -> str | None:
    """What is wrong with the first file that does not parse, None if all do."""
    path, is_file = Path(location), os.path.isfile(location)
    files = sorted(path.iterdir()) if os.path.isdir(path) else [path] * is_file
    for file in files:
        try:
            if file.suffix in (".safetensors", ".bin") or is_file:
                read_tensors(file)
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except UserError as error:
            return str(error)
        except (ValueError, OSError, RecursionError):
            return f"{file}: truncated or corrupt; restore it"
    return None


def _code_is_refused(key: str, location: str) -> str:
    return (
        f"{key}: {location} comes with code of its own (auto_map in config.json or"
        " tokenizer_config.json), which is never run and cannot be allowed: thoughts need an"
        " architecture whose cache and embeddings are known; choose a GPT-2 or Llama kind of model"
        " that transformers itself knows"
    )


def _why_unreadable(key: str, location: str, part: str, error: Exception) -> str:
    # transformers advises to pass trust_remote_code, which no key can do.
    if "trust_remote_code" in str(error):
        return _code_is_refused(key, location)
    reason = " ".join(str(error).split())[:MAX_REASON_LENGTH] or type(error).__name__
    if not os.path.exists(location) and isinstance(error, OSError):
        why = reason
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and it was not downloaded before"
        elif not _hub_answers():
            why = f"{constants.ENDPOINT} does not answer, and it was not downloaded before"
        return (
            f"{key}: {location!r} is not a local folder and cannot be fetched from the Hugging Face"
            f" hub ({why}); check the name and the connection, or write a local folder"
        )
    if fault := first_fault(location):
        return fault
    # Python's own errors about a wrong value hardly say what is wrong without their class.
    if isinstance(error, AttributeError | LookupError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return f"{key}: {part} of {location} cannot be loaded: {reason}"
