"""Laws of what is saved: whole or not at all, loadable by others, damage is noticed.

That a run resumes from its states is tested in test_resume.py.
"""

import errno
import json
import pkgutil
import random
import shutil
import traceback

import pytest
import torch
from batches import FAMILIES, lay_out, make_row, wrap
from runs import TENSORS, assert_same_weights
from safetensors.torch import load_file
from test_run_dir import contents, failing
from torch.distributed.checkpoint import CheckpointException
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut import Coconut
from engine import checkpoint, distributed
from engine.checkpoint import (
    TrainingState,
    load_state,
    newest_state,
    save_checkpoint,
    save_state,
    update_trainer,
)
from engine.run_dir import recover
from utils import RunFailed, UserError

METADATA = {"stage": 1, "epoch": 4}


# Checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_a_hugging_face_model_with_the_same_logits(
    tiny_model, word_tokenizer, tmp_path, family
):
    model = wrap(tiny_model(family, torch.float32))
    save_checkpoint(tmp_path / "checkpoint_1", model, word_tokenizer, METADATA)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint_1", output_loading_info=True
    )
    assert not any(report.values())
    row = torch.tensor([[3, 5, 7, 2]])
    expected = model.base_causallm.eval()(row).logits
    # Coconut has GPT-2's activation computed by one operation, which rounds otherwise.
    torch.testing.assert_close(loaded.eval()(row).logits, expected, rtol=1e-5, atol=1e-5)
    assert_same_weights(loaded.state_dict(), model.base_causallm.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint_1")
    assert tokenizer.get_vocab() == word_tokenizer.get_vocab()
    assert json.loads((tmp_path / "checkpoint_1" / "coconut.json").read_text()) == METADATA
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


class Gated(Coconut):
    """A subclass with a parameter of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = torch.nn.Parameter(torch.tensor([0.5, 2.0]))

    def thought(self, hidden_states, attention_mask, is_first):
        return super().thought(hidden_states, attention_mask, is_first) * self.gate.sum()


def test_parameters_outside_the_base_model_lie_beside_it(tiny_model, word_tokenizer, tmp_path):
    model = wrap(tiny_model("gpt2", torch.float32), weights="learned", kind=Gated)
    save_checkpoint(tmp_path / "checkpoint_1", model, word_tokenizer, METADATA)
    extra = load_file(tmp_path / "checkpoint_1" / "coconut.safetensors")
    assert_same_weights(extra, {"window_logits": model.window_logits, "gate": model.gate})
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint_1", output_loading_info=True
    )
    assert not any(report.values())


def test_every_file_of_a_checkpoint_has_the_same_mode(tiny_model, word_tokenizer, tmp_path):
    model = wrap(tiny_model("gpt2", torch.float32), weights="learned")
    save_checkpoint(tmp_path / "checkpoint_1", model, word_tokenizer, METADATA)
    modes = {path.stat().st_mode for path in (tmp_path / "checkpoint_1").iterdir()}
    plain = tmp_path / "plain"
    plain.touch()
    assert modes == {plain.stat().st_mode}


@pytest.mark.parametrize(
    "target, number, survivor",
    [
        ("transformers.PreTrainedModel.save_pretrained", 1, "old"),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", 1, "old"),
        ("pathlib.Path.write_text", 1, "old"),
        ("engine.run_dir.fsync_file", 2, "old"),
        ("os.rename", 1, "old"),
        ("os.rename", 2, "old"),
        ("engine.run_dir.fsync_directory", 2, "new"),
    ],
)
def test_a_crash_while_writing_leaves_the_old_checkpoint_or_the_new(
    tiny_model, word_tokenizer, tmp_path, monkeypatch, target, number, survivor
):
    """The clean-up that Python still does here is not relied on: runs are killed elsewhere."""
    path = tmp_path / "checkpoint_1"
    save_checkpoint(path, wrap(tiny_model("gpt2", seed=1)), word_tokenizer, METADATA)
    old = contents(path)
    new_model = wrap(tiny_model("gpt2", seed=2))
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(pkgutil.resolve_name(target), number))
        words = r"checkpoint_1 could not be written \(disk full\); once it can be, nothing"
        with pytest.raises(RunFailed, match=words):
            save_checkpoint(path, new_model, word_tokenizer, METADATA | {"epoch": 5})
    recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint_1"]
    if survivor == "old":
        assert contents(path) == old
    else:
        assert json.loads(contents(path)["coconut.json"])["epoch"] == 5
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        assert_same_weights(loaded.state_dict(), new_model.base_causallm.state_dict())


def test_a_replaced_checkpoint_that_cannot_be_removed_ends_no_run(
    tiny_model, word_tokenizer, tmp_path, monkeypatch
):
    model = wrap(tiny_model("gpt2"))
    save_checkpoint(tmp_path / "checkpoint_2", model, word_tokenizer, METADATA)
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    save_checkpoint(tmp_path / "checkpoint_2", model, word_tokenizer, METADATA | {"epoch": 5})
    assert json.loads((tmp_path / "checkpoint_2/coconut.json").read_text())["epoch"] == 5


# Training states


@pytest.fixture
def training(tiny_model, word_tokenizer, tmp_path):
    """(model, optimizer, save): `save(step)` does a step and writes its state."""
    model = wrap(tiny_model("gpt2", torch.float32, dropout=0.1), weights="learned", kind=Gated)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    row = make_row(random.Random(0), 4, 2, 3)

    def save(step):
        train_step(model, optimizer, row)
        save_state(tmp_path, step, model, optimizer, word_tokenizer, {"step": step})

    return model, optimizer, save


def train_step(model, optimizer, row=(4, 5, 37, 39, 38, 6, 7)):
    row = list(row)
    loss = model(**lay_out([row], [row])).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_two_states_are_kept_and_the_newest_is_found(training, tmp_path):
    *_, save = training
    assert newest_state(tmp_path) is None
    for step in (9, 10, 11):
        save(step)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == ["10", "11"]
    assert newest_state(tmp_path).trainer == {"step": 11}
    update_trainer(tmp_path, 11, {"step": "new"})
    assert newest_state(tmp_path).trainer == {"step": "new"}


def test_folders_of_a_tokenizer_belong_to_a_state(tiny_model, word_tokenizer, tmp_path, caplog):
    word_tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model = wrap(tiny_model("gpt2", torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in (1, 2):
        train_step(model, optimizer)
        save_state(tmp_path, step, model, optimizer, word_tokenizer, {"step": step})
    newest = newest_state(tmp_path).folder
    assert AutoTokenizer.from_pretrained(newest).chat_template == word_tokenizer.chat_template
    (newest / "additional_chat_templates/tools.jinja").write_text("changed")
    assert newest_state(tmp_path).trainer == {"step": 1}
    assert "additional_chat_templates/tools.jinja does not match its checksum" in caplog.text


def test_unknown_files_among_the_states_are_pruned(training, tmp_path, monkeypatch, caplog):
    *_, save = training
    elsewhere, states = tmp_path / "elsewhere", tmp_path / "resume"
    elsewhere.mkdir()
    states.mkdir()
    (states / "1").symlink_to(elsewhere)
    (states / "2").write_text("a file")
    (states / "99").symlink_to(elsewhere)
    for step in (9, 10):
        save(step)
    assert sorted(path.name for path in states.iterdir()) == ["10", "9"]
    assert elsewhere.is_dir()
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    save(11)
    assert newest_state(tmp_path).trainer == {"step": 11}
    assert f"{states / '9'}: no longer needed, but cannot be removed (disk full)" in caplog.text


def test_a_write_that_failed_on_another_rank_is_reported_with_its_cause(training, monkeypatch):
    def fail(*_, **__):
        full = OSError(errno.ENOSPC, "No space left on device")
        raise CheckpointException("write", {1: (full, traceback.extract_stack())})

    *_, save = training
    monkeypatch.setattr(checkpoint.dcp, "save", fail)
    words = r"the training state of optimizer step 7 could not be written \(No space left on device"
    with pytest.raises(RunFailed, match=words):
        save(7)


def test_a_state_that_went_missing_cannot_take_a_new_position(tmp_path):
    words = r"the position in .*/7 could not be written \(No such file or directory\); once it can"
    with pytest.raises(RunFailed, match=words):
        update_trainer(tmp_path, 7, {})


def test_a_state_brings_back_weights_moments_and_generators_bit_for_bit(
    training, tiny_model, tmp_path
):
    model, optimizer, save = training
    before = model.gate.clone()
    save(1)
    assert not torch.equal(model.gate, before)
    expected = [train_step(model, optimizer) for _ in range(3)]
    base = tiny_model("gpt2", torch.float32, dropout=0.1, seed=5)
    other = wrap(base, weights="learned", kind=Gated)
    other.gate.data.zero_()
    fresh = torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    torch.manual_seed(99)
    assert load_state(newest_state(tmp_path), other, fresh)
    assert [train_step(other, fresh) for _ in range(3)] == expected
    assert_same_weights(other.state_dict(), model.state_dict())


def test_each_rank_keeps_the_generator_of_its_own_gpu(monkeypatch):
    generators = {torch.device("cuda", n): torch.tensor([n], dtype=torch.uint8) for n in range(3)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generators[device])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: generators.update({device: state})
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    states = json.loads(json.dumps(checkpoint._generator_states()))
    monkeypatch.setenv("LOCAL_RANK", "1")
    checkpoint._restore_generators(states)
    assert [state.item() for state in generators.values()] == [0, 2, 2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint._restore_generators(states)
    states = checkpoint._generator_states()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    checkpoint._restore_generators(states)
    assert [state.item() for state in generators.values()] == [0, 2, 2]


def test_a_new_rank_finds_no_generators(training, tmp_path, monkeypatch):
    model, optimizer, save = training
    save(1)
    state, before = newest_state(tmp_path), torch.get_rng_state()
    monkeypatch.setattr("engine.distributed.rank", lambda: 1)
    assert not load_state(state, model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"content": {}}', '{"content": null, "sha256": "0"}', "\xff", "{}" * 9],
)
def test_a_state_whose_description_is_broken_is_passed_over(training, tmp_path, caplog, content):
    *_, save = training
    save(1)
    save(2)
    (tmp_path / "resume" / "2" / "state.json").write_text(content, encoding="latin-1")
    assert newest_state(tmp_path).trainer == {"step": 1}
    assert caplog.text.count("resume/2: damaged, trying the one before") == 1
    (tmp_path / "resume" / "1" / TENSORS).unlink()
    with pytest.raises(UserError, match="resume: no training state is intact; remove the folder"):
        newest_state(tmp_path)


def test_ranks_other_than_0_read_only_the_description_of_a_state(training, tmp_path, monkeypatch):
    *_, save = training
    save(1)
    found, read = newest_state(tmp_path), []
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "run_on_all_ranks", lambda work: work())
    monkeypatch.setattr(distributed, "broadcast_from_main", lambda value: value or found)
    sha256_file = checkpoint.sha256_file
    monkeypatch.setattr(
        checkpoint, "sha256_file", lambda path: read.append(path.name) or sha256_file(path)
    )
    assert newest_state(tmp_path) == found
    assert read == ["state.json"]


def test_tensors_that_cannot_be_read_are_named(training, tmp_path):
    model, optimizer, save = training
    save(1)
    folder = tmp_path / "resume" / "1"
    (folder / TENSORS).write_bytes(b"short")
    with pytest.raises(UserError, match=r"resume/1: cannot be restored \(.*header too small"):
        load_state(TrainingState(folder, {}), model, optimizer)


def test_nothing_in_a_state_or_checkpoint_is_a_pickle(training, tmp_path):
    *_, save = training
    save(1)
    suffixes = {path.suffix for path in (tmp_path / "resume" / "1").iterdir()}
    assert suffixes == {".json", ".safetensors"}
