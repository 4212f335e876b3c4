"""Reading sources of weights: the message for a broken one, and which file is at fault.

That nothing in a source is run is test_security.py's; mangled files are test_fuzz.py's.
"""

import json
import os
import shutil
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine import weights
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


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Tensors


@pytest.mark.parametrize("suffix", ["", ".pt", ".bin", ".safetensors"])
def test_tensors_come_back_as_they_were_saved(tiny_folder, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    expected = load_file(tiny_folder() / "model.safetensors")
    if suffix == ".safetensors":
        shutil.copy(tmp_path / "tiny_gpt2" / "model.safetensors", file)
    else:
        torch.save(expected, file)
    tensors = read_tensors(file)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {}, "text", None])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights")
    with pytest.raises(UserError, match="weights: is not a state dict; save model.state_dict"):
        read_tensors(tmp_path / "weights")


@pytest.mark.parametrize(
    "name, value",
    [
        ("epoch", 3),
        ("model", {"weight": torch.ones(1)}),
        (7, torch.ones(1)),
        ("sparse", torch.ones(2, 2).to_sparse()),
    ],
)
def test_entries_that_are_not_plain_tensors_are_named(tmp_path, name, value):
    torch.save({"good": torch.ones(1), name: value}, tmp_path / "weights")
    with pytest.raises(
        UserError, match=rf"has entries that are not plain tensors \({name}\); save"
    ):
        read_tensors(tmp_path / "weights")


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_a_truncated_file_is_named_and_torch_keeps_its_warnings(tiny_folder, tmp_path, suffix):
    folder, path = tiny_folder(), tmp_path / f"weights{suffix}"
    if suffix:
        shutil.copy(folder / "model.safetensors", path)
    else:
        torch.save(load_file(folder / "model.safetensors"), path)
    for length in (path.stat().st_size - 100, 50, 0):
        os.truncate(path, length)
        words = f"weights{suffix}: (truncated or )?corrupt"
        with warnings.catch_warnings(action="error"), pytest.raises(UserError, match=words):
            read_tensors(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing: truncated or corrupt, weights cannot be read"):
        read_tensors(tmp_path / "nothing")


# Folders


def test_the_first_file_that_does_not_parse_is_the_fault(tiny_folder):
    folder = tiny_folder()
    assert first_fault(str(folder)) is None
    (folder / "model.safetensors").write_bytes(b"")
    assert first_fault(str(folder)) == (
        f"{folder / 'model.safetensors'}: truncated or corrupt, weights cannot be read from it"
    )
    (folder / "config.json").write_text("[" * 100_000)
    assert first_fault(str(folder)) == f"{folder / 'config.json'}: truncated or corrupt; restore it"
    assert first_fault("some/name.json") is None


def test_the_size_of_weights_counts_their_files_alone(tiny_folder, tmp_path):
    folder = tiny_folder()
    size = (folder / "model.safetensors").stat().st_size
    assert weight_bytes(str(folder)) == weight_bytes(str(folder / "model.safetensors")) == size
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"123")
    assert weight_bytes(str(folder)) == size + 3
    assert weight_bytes("openai-community/gpt2") is None


def test_a_folder_is_a_model_folder_or_says_what_it_lacks(tiny_folder):
    folder = tiny_folder()
    check_folder("model_id", folder, needs_weights=True)
    (folder / "model.safetensors").unlink()
    check_folder("model_id", folder, needs_weights=False)
    with pytest.raises(UserError, match="model_id: .* no weights; set from_scratch: true"):
        check_folder("model_id", folder, needs_weights=True)
    (folder / "state.json").write_text("{}")
    check_folder("model_id", folder, needs_weights=False)
    with pytest.raises(UserError, match="is a training state, from which its own run resumes"):
        check_folder("load_model_path", folder, needs_weights=True)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model_id: folder .* has no config\.json"):
        check_folder("model_id", folder, needs_weights=False)


# The hub


@pytest.fixture
def hub(monkeypatch):
    """`hub(head)`: a hub that answers requests as `head` does, asked again."""

    def replace(head):
        monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(weights, "get_session", lambda: SimpleNamespace(head=head))
        weights._hub_answers.cache_clear()

    yield replace
    weights._hub_answers.cache_clear()


def test_a_hub_that_is_out_of_reach_is_asked_once_and_only_for_names(hub, tmp_path):
    asked = []

    def head(url, timeout):
        asked.append(url)
        raise OSError("Name or service not known")

    hub(head)
    assert weights._hub_options(str(tmp_path)) == {} and not asked
    for _ in range(2):
        assert weights._hub_options("no/such-model") == {"local_files_only": True}
    assert asked == [weights.constants.ENDPOINT]
    began = time.monotonic()
    words = "'no/such-model' is not a local folder .* does not answer, and it was not downloaded"
    with pytest.raises(UserError, match=words):
        read_config("model_id", "no/such-model")
    assert time.monotonic() - began < 5


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(weights, "HUB_TIMEOUT_S", 0.1)
    hub(lambda url, timeout: threading.Event().wait(20))
    began = time.monotonic()
    assert weights._hub_options("no/such-model") == {"local_files_only": True}
    assert time.monotonic() - began < 5


def test_a_hub_that_answers_is_asked_for_the_files(hub):
    hub(lambda url, timeout: None)
    assert weights._hub_options("no/such-model") == {}


# What loaders raise


def test_a_wrong_field_of_an_architecture_is_named_with_its_file(tiny_folder):
    folder = tiny_folder()
    change_json(folder / "config.json", n_head="four")
    with pytest.raises(UserError, match=r"model_id: config\.json of .* 'n_head'.*four"):
        read_config("model_id", str(folder))


def test_a_wrong_field_of_a_tokenizer_is_named(tiny_folder):
    folder = tiny_folder()
    change_json(folder / "tokenizer_config.json", eos_token=[1])
    with pytest.raises(UserError, match="model_id: the tokenizer of .*TypeError: .* eos_token"):
        read_tokenizer("model_id", str(folder))


def test_a_reason_is_one_line_of_bounded_length(tmp_path):
    with pytest.raises(UserError) as refusal, reading("model_id", str(tmp_path)):
        raise ValueError("one\n  two " + "x" * 5000)
    text = str(refusal.value)
    assert text.startswith(f"model_id: the model of {tmp_path} cannot be loaded: one two xxx")
    assert len(text) < 600 and "\n" not in text


def test_a_user_error_passes_unchanged():
    with pytest.raises(UserError, match="^mine$"), reading("model_id", "nothing"):
        raise UserError("mine")
