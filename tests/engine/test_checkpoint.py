"""Laws of what lies on disk: whole or not at all, loadable by others, damage is noticed.

That a run goes on from its states is test_training.py's.
"""

import errno
import json
import os
import pkgutil
import random
import shutil
from pathlib import Path

import pytest
import torch
from batches import FAMILIES, lay_out, make_row, wrap
from runs import TENSORS, assert_same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import utils
from engine import checkpoint
from engine.checkpoint import (
    TrainingState,
    checkpoints,
    load_state,
    make_writable,
    newest_state,
    prune_checkpoints,
    recover,
    run_lock,
    save_checkpoint,
    save_state,
    update_progress,
    whole_directory,
)
from utils import RunFailed, UserError

SETTINGS = {"stage": 1, "epoch": 4}


def contents(folder):
    """Every file below a folder, by its relative path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_a_hugging_face_model_with_the_same_logits(
    tiny_model, word_tokenizer, tmp_path, family
):
    model = wrap(tiny_model(family, torch.float32))
    save_checkpoint(tmp_path / "checkpoint_1", model, word_tokenizer, SETTINGS)
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
    assert json.loads((tmp_path / "checkpoint_1" / "coconut.json").read_text()) == SETTINGS
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


def test_checkpoints_are_found_in_the_order_of_their_epochs_and_pruned(tmp_path):
    for name in ("checkpoint_10", "checkpoint_9", "checkpoint_best", "checkpoint_50"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "coconut.json").touch()
    (tmp_path / "checkpoint_8").write_text("a file")
    assert [number for number, _ in checkpoints(tmp_path)] == [9, 10, 50]
    prune_checkpoints(tmp_path, newest=10, keep=1)
    names = ["checkpoint_10", "checkpoint_50", "checkpoint_8", "checkpoint_best"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_checkpoint_that_was_moved_and_linked_is_never_pruned(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "disk"
    for folder in (elsewhere, run_dir / "checkpoint_2", run_dir / "checkpoint_3"):
        folder.mkdir(parents=True)
        (folder / "coconut.json").touch()
    (run_dir / "checkpoint_1").symlink_to(elsewhere)
    prune_checkpoints(run_dir, newest=3, keep=1)
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint_1", "checkpoint_3"]
    assert (elsewhere / "coconut.json").exists()


def failing(function, number):
    """`function`, which fails at call `number` (from 1) and from then on."""
    calls = []

    def wrapper(*arguments, **options):
        calls.append(1)
        if len(calls) >= number:
            raise OSError("disk full")
        return function(*arguments, **options)

    return wrapper


@pytest.mark.parametrize(
    "target, number, survivor",
    [
        ("transformers.PreTrainedModel.save_pretrained", 1, "old"),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", 1, "old"),
        ("pathlib.Path.write_text", 1, "old"),
        ("engine.checkpoint.fsync_file", 2, "old"),
        ("os.rename", 1, "old"),
        ("os.rename", 2, "old"),
        ("engine.checkpoint.fsync_directory", 2, "new"),
    ],
)
def test_a_crash_while_writing_leaves_the_old_checkpoint_or_the_new(
    tiny_model, word_tokenizer, tmp_path, monkeypatch, target, number, survivor
):
    """The clean-up that Python still does here is not relied on: runs are killed elsewhere."""
    path = tmp_path / "checkpoint_1"
    save_checkpoint(path, wrap(tiny_model("gpt2", seed=1)), word_tokenizer, SETTINGS)
    old = contents(path)
    new_model = wrap(tiny_model("gpt2", seed=2))
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(pkgutil.resolve_name(target), number))
        words = r"checkpoint_1 could not be written \(disk full\); nothing was saved before it"
        with pytest.raises(RunFailed, match=words):
            save_checkpoint(path, new_model, word_tokenizer, SETTINGS | {"epoch": 5})
    recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint_1"]
    if survivor == "old":
        assert contents(path) == old
    else:
        assert json.loads(contents(path)["coconut.json"])["epoch"] == 5
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        assert_same_weights(loaded.state_dict(), new_model.base_causallm.state_dict())


def test_recovery_after_each_interrupted_phase(tmp_path):
    def folder(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)

    folder(".checkpoint_1.part", "half")  # killed while writing, nothing there before
    folder("checkpoint_2", "old")  # killed while writing over an old one
    folder(".checkpoint_2.part", "half")
    folder(".checkpoint_3.old", "old")  # killed between the two renames
    folder(".checkpoint_3.part", "new")
    folder("checkpoint_4", "new")  # killed before the old one was removed
    folder(".checkpoint_4.old", "old")
    folder(".15.part", "half")
    (tmp_path / ".metrics.jsonl.4711.part").write_text("half")
    folder(".mine.old", "mine")
    (tmp_path / ".mine.part").write_text("mine")
    recover(tmp_path)
    assert contents(tmp_path) == {
        "checkpoint_2/file": b"old", "checkpoint_3/file": b"old", "checkpoint_4/file": b"new",
        ".mine.old/file": b"mine", ".mine.part": b"mine",
    }  # fmt: skip
    recover(tmp_path / "missing")


def test_what_a_crash_left_goes_though_it_is_a_link_and_not_what_it_leads_to(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "folder").mkdir(parents=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".checkpoint_1.part").symlink_to(elsewhere)
    recover(run_dir)
    assert list(run_dir.iterdir()) == []
    for name in (".checkpoint_1.part", ".checkpoint_1.old", "checkpoint_1"):
        (run_dir / name).symlink_to(elsewhere if name != "checkpoint_1" else "nowhere")
    with whole_directory(run_dir / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("new")
    assert contents(run_dir) == {"checkpoint_1/file": b"new"}
    assert [path.name for path in run_dir.iterdir()] == ["checkpoint_1"]
    assert [path.name for path in elsewhere.iterdir()] == ["folder"]


def test_what_a_crash_left_and_cannot_go_is_named(tmp_path, monkeypatch):
    (tmp_path / ".5.part").mkdir()
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    with pytest.raises(UserError, match=r"/\.5\.part: left by an .* \(disk full\); remove it"):
        recover(tmp_path)


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    tiny_model, word_tokenizer, tmp_path, monkeypatch
):
    model, notices = wrap(tiny_model("gpt2")), []
    for epoch in (1, 2):
        save_checkpoint(tmp_path / f"checkpoint_{epoch}", model, word_tokenizer, SETTINGS)
    monkeypatch.setattr("shutil.rmtree", failing(shutil.rmtree, 1))
    save_checkpoint(tmp_path / "checkpoint_2", model, word_tokenizer, SETTINGS | {"epoch": 5})
    assert json.loads((tmp_path / "checkpoint_2/coconut.json").read_text())["epoch"] == 5
    prune_checkpoints(tmp_path, 2, keep=1, notify=notices.append)
    old = tmp_path / "checkpoint_1"
    assert notices == [f"{old}: no longer needed, but cannot be removed (disk full)"]


def test_a_directory_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    for owner, name in (
        (checkpoint, "fsync_file"), (checkpoint, "fsync_directory"), (os, "rename"),
    ):  # fmt: skip
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda path, *rest, name=name, original=original: (
                events.append((name, Path(path).name)) or original(path, *rest)
            ),
        )
    with whole_directory(tmp_path / "checkpoint_1") as unfinished:
        (unfinished / "file").write_text("content")
    part = ".checkpoint_1.part"
    assert events == [
        ("fsync_file", "file"), ("fsync_directory", part), ("rename", part),
        ("fsync_directory", tmp_path.name),
    ]  # fmt: skip


# Training states


@pytest.fixture
def training(tiny_model, word_tokenizer, tmp_path):
    """(model, optimizer, save): `save(step)` does a step and writes its state."""
    model = wrap(tiny_model("gpt2", torch.float32, dropout=0.1))
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
    assert newest_state(tmp_path).progress == {"step": 11}
    update_progress(tmp_path, 11, {"step": "new"})
    assert newest_state(tmp_path).progress == {"step": "new"}


def test_folders_of_a_tokenizer_belong_to_a_state(tiny_model, word_tokenizer, tmp_path):
    word_tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model = wrap(tiny_model("gpt2", torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in (1, 2):
        train_step(model, optimizer)
        save_state(tmp_path, step, model, optimizer, word_tokenizer, {"step": step})
    newest = newest_state(tmp_path).folder
    assert AutoTokenizer.from_pretrained(newest).chat_template == word_tokenizer.chat_template
    notices = []
    (newest / "additional_chat_templates/tools.jinja").write_text("changed")
    assert newest_state(tmp_path, notices.append).progress == {"step": 1}
    assert "additional_chat_templates/tools.jinja does not match its sum" in notices[0]


def test_strangers_among_the_states_are_pruned_and_what_cannot_go_is_told(
    training, tmp_path, monkeypatch
):
    *_, save = training
    elsewhere, states, notices = tmp_path / "elsewhere", tmp_path / "resume", []
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
    monkeypatch.setattr(save_state, "__defaults__", (notices.append,))
    save(11)
    assert newest_state(tmp_path).progress == {"step": 11}
    assert notices == [f"{states / '9'}: no longer needed, but cannot be removed (disk full)"]


def test_a_state_that_went_missing_cannot_take_a_new_position(tmp_path):
    words = r"the position in .*/7 could not be written \(No such file or directory\); nothing was"
    with pytest.raises(RunFailed, match=words):
        update_progress(tmp_path, 7, {})


def test_a_failed_write_is_told_where_no_state_is_intact_either(tmp_path):
    (tmp_path / "resume" / "6").mkdir(parents=True)
    words = r"resume/7 could not be written \(No such file.*\); .*: no training state is intact"
    with pytest.raises(RunFailed, match=words):
        update_progress(tmp_path, 7, {})


def test_a_state_brings_back_weights_moments_and_generators_bit_for_bit(
    training, tiny_model, tmp_path
):
    model, optimizer, save = training
    save(1)
    expected = [train_step(model, optimizer) for _ in range(3)]
    other = wrap(tiny_model("gpt2", torch.float32, dropout=0.1, seed=5))
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


def test_a_new_rank_is_told_that_it_has_no_generators(training, tmp_path, monkeypatch):
    model, optimizer, save = training
    save(1)
    monkeypatch.setattr("engine.distributed.rank", lambda: 1)
    before = torch.get_rng_state()
    assert not load_state(newest_state(tmp_path), model, optimizer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"content": {}}', '{"content": null, "sha256": "0"}', "\xff", "{}" * 9],
)
def test_a_state_whose_description_is_broken_is_passed_over(training, tmp_path, content):
    *_, save = training
    save(1)
    save(2)
    (tmp_path / "resume" / "2" / "state.json").write_text(content, encoding="latin-1")
    notices = []
    assert newest_state(tmp_path, notices.append).progress == {"step": 1}
    assert len(notices) == 1 and "resume/2: damaged, trying the one before" in notices[0]
    (tmp_path / "resume" / "1" / TENSORS).unlink()
    with pytest.raises(UserError, match="resume: no training state is intact; remove the folder"):
        newest_state(tmp_path, notices.append)


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


# The run directory


def test_the_lock_refuses_a_second_holder_and_goes_with_the_first(tmp_path):
    run_dir = tmp_path / "exps" / "run"
    with run_lock(run_dir):
        words = "another training run is using this directory; wait for it, or change name"
        with pytest.raises(UserError, match=words), run_lock(run_dir):
            pass
        (run_dir / "config.yaml").write_text("kept")
    with run_lock(run_dir):
        pass
    assert (run_dir / "config.yaml").read_text() == "kept"


def test_a_lock_error_that_is_no_refusal_is_not_taken_for_one(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match="Input/output error"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_and_is_told(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, "no such thing")

    monkeypatch.setattr("fcntl.flock", flock)
    notices, entered = [], False
    with run_lock(tmp_path, notices.append):
        entered = True
    words = "knows no locks (no such thing); a second run on this directory would not be noticed"
    assert entered and notices == [f"{tmp_path}: this file system {words}"]


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="mistake"), run_lock(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "exps").mkdir()
    with pytest.raises(UserError, match="mistake"), run_lock(tmp_path / "exps" / "run"):
        raise UserError("mistake")
    assert list(tmp_path.rglob("*")) == [tmp_path / "exps"]


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    words = r"save_path: .* cannot be written \(Not a directory\); choose another save_path"
    with pytest.raises(UserError, match=words):
        make_writable(tmp_path / "file" / "run")
    # Root may write anywhere, so permission cannot be taken from this process.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"cannot be written \(no permission or mounted"):
        make_writable(tmp_path / "run")


def test_text_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "predictions_0.jsonl"
    utils.atomic_write_text(path, "old")
    monkeypatch.setattr(os, "replace", failing(os.replace, 1))
    with pytest.raises(OSError, match="disk full"):
        utils.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["checkpoint_2", "resume"])
def test_a_file_under_a_name_that_a_run_writes_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}: is not from a run of ours.*move it away"):
        checkpoint.refuse_obstacles(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_checkpoints_without_a_state_are_not_overwritten(tmp_path):
    (tmp_path / "checkpoint_2").mkdir()
    (tmp_path / "checkpoint_2" / "coconut.json").touch()
    with pytest.raises(UserError, match="holds checkpoints of an earlier run but no training"):
        checkpoint.refuse_obstacles(tmp_path)
    (tmp_path / "resume" / "7").mkdir(parents=True)
    checkpoint.refuse_obstacles(tmp_path)
