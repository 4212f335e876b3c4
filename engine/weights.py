"""Reading what others wrote: model folders, hub names, tokenizers and files of tensors.

Such sources are data and nothing else (SPEC section 9). Pickles are read with `weights_only=True`,
and code that a model folder brings along is never run: thoughts need an architecture whose cache
and embeddings are known, so there is no setting that would allow it. Whatever a loader raises
becomes one UserError. What may be loaded into what is left to backbone.py and settings.py.
"""

import json
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from engine.metadata import shorten
from utils import UserError

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_FILES += ("pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_OF_A_REASON = 300
STATE_FILE = "state.json"  # of a training state, as checkpoint.py writes it


@contextmanager
def reading(field: str, source: str, part: str = "the model") -> Iterator[None]:
    """Turn whatever a Hugging Face loader raises about `source` into one UserError, and hush it.

    field, part: the configuration key that named the source, and what of it is read.
    The loaders raise many classes (tokenizers even a bare Exception), hence the wide net.
    """
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    # A download may take minutes, so only what lies here already is loaded without a bar.
    if os.path.exists(source):
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_unreadable(field, source, part, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def read_config(field: str, source: str, **options) -> PretrainedConfig:
    """The architecture that a folder or hub name describes.

    Raises: UserError when it cannot be had or read, or brings code of its own.
    """
    # False, not unset: unset, transformers asks on a terminal whether to run a folder's code.
    with reading(field, source, "config.json"):
        model_config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        if getattr(model_config, "auto_map", None):
            raise UserError(_code_is_refused(field, source))
    return model_config


def read_tokenizer(field: str, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises: UserError when it cannot be had or read, brings code of its own, or has no EOS.
    """
    with reading(field, source, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if tokenizer.init_kwargs.get("auto_map"):
            raise UserError(_code_is_refused(field, source))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{field}: the tokenizer of {source} has no EOS token to end an answer with; set"
            " eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_folder(field: str, folder: Path, needs_weights: bool) -> None:
    """Raise UserError where a folder is no model folder of Hugging Face's layout."""
    if needs_weights and (folder / STATE_FILE).is_file():
        raise UserError(
            f"{field}: {folder} is a training state, from which its own run goes on by itself; name"
            f" a checkpoint_N in {folder.parent.parent} instead"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{field}: folder {folder} has no config.json; name a model folder")
    if needs_weights and not any((folder / name).is_file() for name in WEIGHT_FILES):
        hint = "set from_scratch: true to start from random ones, or " * (field == "model_id")
        raise UserError(
            f"{field}: folder {folder} holds no weights; {hint}name a folder with model.safetensors"
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
    # A mangled file makes the readers raise nearly every class there is.
    except Exception as error:
        raise UserError(f"{file}: truncated or corrupt, no weights can be read from it") from error
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{file}: holds no state dict; save model.state_dict() with torch.save")
    strange = [
        str(name)
        for name, value in tensors.items()
        if not isinstance(name, str)
        or not isinstance(value, Tensor)
        or value.layout != torch.strided
    ]
    if strange:
        raise UserError(
            f"{file}: entries that are no plain tensors ({shorten(strange)}); save"
            " model.state_dict() alone with torch.save"
        )
    return tensors


def weight_bytes(source: str) -> int | None:
    """Size of the files that weights are read from, None where they do not lie here yet."""
    if os.path.isfile(source):
        return os.path.getsize(source)
    if not os.path.isdir(source):
        return None
    entries = os.scandir(source)
    return sum(e.stat().st_size for e in entries if e.name.endswith((".safetensors", ".bin")))


def first_fault(source: str) -> str | None:
    """What is wrong with the first file of a source that does not parse, None if all do."""
    is_file = os.path.isfile(source)
    files = sorted(Path(source).iterdir()) if os.path.isdir(source) else [Path(source)] * is_file
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


def _code_is_refused(field: str, source: str) -> str:
    return (
        f"{field}: {source} brings code of its own (auto_map in config.json or"
        " tokenizer_config.json), which is never run and cannot be allowed: thoughts need an"
        " architecture whose cache and embeddings are known; choose a GPT-2 or Llama kind of model"
        " that transformers itself knows"
    )


def _why_unreadable(field: str, source: str, part: str, error: Exception) -> str:
    # transformers advises to pass it, which nobody can here.
    if "trust_remote_code" in str(error):
        return _code_is_refused(field, source)
    reason = " ".join(str(error).split())[:MOST_OF_A_REASON] or type(error).__name__
    if not os.path.exists(source) and isinstance(error, OSError):
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return (
            f"{field}: {source!r} is no local folder and could not be had from the Hugging Face"
            f" hub{offline}: {reason}; check the name and the connection, or write a local folder"
        )
    if fault := first_fault(source):
        return fault
    # What Python itself raises about a wrong value hardly says what it is about.
    if isinstance(error, AttributeError | LookupError | TypeError):
        reason = f"{type(error).__name__}: {reason}"
    return f"{field}: {part} of {source} cannot be loaded: {reason}"
