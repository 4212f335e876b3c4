"""Mangled files: configuration, checkpoints, training states, weights.

One law: whatever a file holds, reading it succeeds or ends in one message that names the file and
the field; no other exception escapes, nothing hangs and nothing is written. Data files have
their own fuzz in test_dataset_reading.py. The examples are the same in every run; FUZZ=20 in the
environment tries twenty times as many, other ones each time.
"""

import contextlib
import copy
import io
import json
import math
import os
import shutil
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from runs import ROOT, Experiment, assert_refused, tree
from runs import TENSORS as STATE_TENSORS
from safetensors.torch import load_file, save_file
from test_security import renew_checksums, state_folder

import run
from dataset import read_records, tokenize_records
from engine import checkpoint
from engine.config import Config
from engine.config_file import dump_config, load_config
from engine.metadata import Metadata, check_stored_trainer, config_with_metadata
from engine.model import build_coconut, load_backbone, model_outline
from engine.setup import Data, check_answers, check_fit
from engine.weights import ModelSource
from utils import EXIT_USER_ERROR, ConfigError, UserError

FUZZ = int(os.environ.get("FUZZ", "0"))


def fuzz(max_examples):
    return profile(
        max_examples=max_examples * max(FUZZ, 1),
        derandomize=FUZZ == 0,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Explaining a failure would trace every line that any parser runs.
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )


# Mangling

DEEP = "[" * 40 + "]" * 40
# Each has broken some parser, or means something else than it seems to.
SCALARS = [
    *(None, True, False, 0, -1, 1, 2, 3, 5, 1.5, -0.5, 0.0, 1e308, math.nan, math.inf, -math.inf),
    *(10**6, 10**9, 2**31, 2**32, 2**63, 10**30, "", " ", "x", "1", "\ud800", "a\0b", "\u202e"),
    *("../..", "/dev/zero", "None", "true", "1e-4", "gpt2", "🜁" * 9),
]
VALUES = [*SCALARS, [], {}, [[]], [None], [0, 0, 0], ["a"], {"a": {}}, {"0": 1}, json.loads(DEEP)]
SNIPPETS = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\x1b[2J", b"\r", b"\t", b"\n", b"\n\n", b"\xc2\x85"),
    *(b"\xed\xa0\x80", b"\xe2\x80\xa8", b"[" * 3000, b"{a: " * 3000, b"- " * 3000, b"9" * 5000),
    *(b"&a", b"*a", b"&a [*a, *a]", b"!!", b"!!python/object/apply:os.system", b"!!int x"),
    *(b"!!binary aa", b"? ", b": ", b"- ", b"|", b">", b"%YAML 9.9\n---\n", b"---\n", b"...\n"),
    *(b'"\\ud800"', b'"\\UFFFFFFFF"', b'"\\x"', b"<<: *a", b"<<: {a: 1}", b"{", b"}", b"[", b"]"),
    *(b"\\", b'"', b"'", b"#", b",", b":", b"NaN", b"Infinity", b"null", b"-", b"1e999", b"1_0"),
]


@st.composite
def mangled_bytes(draw, good):
    """`good` with one to three stretches cut out, doubled or replaced."""
    content = good
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 40)))
        middle = draw(st.sampled_from([b"", *SNIPPETS]) | st.binary(max_size=8))
        content = content[:begin] + middle + content[end:]
    return content


def places(value, path=()):
    """The path of every value inside a JSON value."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else ()
    entries = enumerate(value) if isinstance(value, list) else entries
    for key, inner in entries:
        yield from places(inner, (*path, key))


@st.composite
def mangled_json(draw, good):
    """(JSON value, path): a copy of `good` in which the value at `path` was changed or is gone."""
    value = copy.deepcopy(good)
    path = draw(st.sampled_from(list(places(value))))
    owner = value
    for key in path[:-1]:
        owner = owner[key]
    change = draw(st.sampled_from(["delete", "rename", "replace", "replace", "replace"]))
    if change == "replace":
        owner[path[-1]] = draw(st.sampled_from(VALUES))
    else:
        old = owner.pop(path[-1])
        if change == "rename" and isinstance(owner, dict):
            owner[f"{path[-1]}x"] = old
    return value, path


def to_text(value):
    return json.dumps(value).encode()


def outcome_of(read, *names):
    """What `read()` gives, or the text of its refusal, which must hold one of `names`."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return read(), None
        except (UserError, ConfigError) as error:
            text = str(error)
    assert text.strip() and all(line.strip() for line in text.split("\n"))
    assert len(text) < 30_000
    assert any(str(name) in text for name in names), text
    return None, text


# Configuration

SHIPPED = sorted([*ROOT.glob("args/*.yaml"), *ROOT.glob("cpu_args/*.yaml")])


def check_config(folder, content, overrides=()):
    """Loading `content` gives a configuration that its dump repeats, or one message."""
    path = folder / "config.yaml"
    path.write_bytes(content)
    config, refusal = outcome_of(lambda: load_config(path, overrides), path, "command line")
    if refusal is None:
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config
    return refusal


@fuzz(150)
@given(st.data())
def test_any_bytes_as_yaml_load_or_give_a_message(tmp_path, data):
    pieces = st.sampled_from(SNIPPETS) | st.binary(max_size=20)
    keys = st.sampled_from([f"\n{key}: ".encode() for key in Config.model_fields])
    check_config(tmp_path, b"".join(data.draw(st.lists(pieces | keys, max_size=6))))


@fuzz(150)
@given(st.data())
def test_a_mangled_experiment_file_loads_or_gives_a_message(tmp_path, data):
    file = data.draw(st.sampled_from(SHIPPED))
    good = file.read_bytes().replace(b"base: ", b"base: " + bytes(file.parent) + b"/")
    check_config(tmp_path, data.draw(mangled_bytes(good)))


ODD_KEYS = ["lrr", "fp16", "", "method", "run_dir", "a\nb", "base"]
near_keys = st.sampled_from([*Config.model_fields, *ODD_KEYS])


@fuzz(200)
@given(st.dictionaries(near_keys, st.sampled_from(VALUES), max_size=4), st.booleans())
def test_any_values_under_the_keys_load_or_give_a_message(tmp_path, changes, complete):
    values = load_config(SHIPPED[0]).model_dump() if complete else {}
    refusal = check_config(tmp_path, to_text(values | changes))
    if refusal and complete:
        expected = [*changes, *map(repr, changes), "line 1: is nested too deeply"]
        assert any(words in refusal for words in expected)


@fuzz(100)
@given(st.lists(st.tuples(near_keys, st.sampled_from(SNIPPETS + [b"1", b"x"])), max_size=3))
def test_any_override_loads_or_gives_a_message(tmp_path, pairs):
    overrides = [f"{key}={text.decode('utf-8', 'surrogateescape')}" for key, text in pairs]
    check_config(tmp_path, SHIPPED[0].read_bytes(), overrides)


WIDE = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
HOSTILE = {
    "deep": ("lr: " + "[" * 3000, "line 1: is nested too deeply"),
    "deep maps": ("lr: " + "{a: " * 3000, "line 1: is nested too deeply"),
    "deep values": ("lr: " + "[" * 300 + "]" * 300, "line 1: is nested too deeply"),
    "deep blocks": ("lr:\n" + "- " * 3000, "line 2: is nested too deeply"),
    "aliases without end": ("a0: &a0 [x]\n" + WIDE + "name: *a9\nlr: *a9", "lr=[[[...], "),
    "an alias of itself": ("lr: &a [*a]", "found unconstructable recursive node"),
    "an unknown alias": ("lr: *a", "line 1: found undefined alias 'a'"),
    "equal anchors": ("lr: &a 1\nseed: &a 2", "line 2: an anchor's second occurrence"),
    "a long number": ("seed: " + "9" * 5000, "seed: line 1: cannot be read: Exceeds the limit"),
    "a large number": ("seed: " + "9" * 4000, "seed=9999"),
    "a large number for text": ("name: " + "9" * 4000, "name=9999"),
    "a large count": ("num_epochs: 10000000", "num_epochs=10000000 should be less than"),
    "a large stage": ("max_latent_stage: 1001", "max_latent_stage=1001 should be less than"),
    "an object": ("lr: !!python/object:os.x {}", "could not determine a constructor"),
    "a tag": ("lr: !!timestamp 2001-01-01", "could not determine a constructor"),
    "half a pair": ('name: "\\ud800"', "name='\\ud800' is not text"),
    "half a pair as key": ('"\\ud800": 1', "'\\ud800' is not a plain word"),
    "no character": ('name: "\\UFFFFFFFF"', "line 1: an escape is not a character"),
    "beyond the last character": ('name: "\\U00110000"', "line 1: an escape is not a character"),
    "a control character": ("name: \x07", "line 1: character 7 is not allowed"),
    "an escape in a key": ('"\\x1b[2J": 1', "'\\x1b[2J' is not a plain word"),
    "NUL": ('val_path: "a\\0b"', "val_path='a\\x00b' should match pattern"),
    "a mark in the middle": ("lr: 1\n\ufeffseed: 1", "line 2: key '\\ufeffseed' is not a plain"),
    "another encoding": ("name: a".encode("utf-16"), "byte 0 is not UTF-8"),
    "a data file": ("- [1, 2, 3]\n" * 10_000, "is longer than 100000 bytes; name a YAML"),
}


@pytest.mark.parametrize("content, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_gets_one_message_and_status_2(tmp_path, capsys, content, words):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run.main([str(path)]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: ") and words in error
    assert len(error) < 5000
    assert tree(tmp_path) == ["config.yaml"]


def test_a_hostile_override_gets_one_message_and_status_2(tmp_path, capsys):
    experiment = Experiment(tmp_path)
    for override, words in (
        ("lr=" + "[" * 3000, "line 1: is nested too deeply"),
        ('name="\\UFFFFFFFF"', "line 1: an escape is not a character"),
        ("\x1b[2J=1", "'\\x1b[2J' is not a plain word; write key=value"),
    ):
        assert experiment.main(override) == EXIT_USER_ERROR
        error = capsys.readouterr().err
        assert error.startswith("command line: ") and words in error


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A Coconut run of one epoch: one checkpoint, one training state."""
    experiment = Experiment(tmp_path_factory.mktemp("finished"), num_epochs=1, num_train=6)
    assert experiment.main() == 0
    return experiment


@pytest.fixture
def evaluation(finished, tmp_path):
    """Evaluation of a copy of the checkpoint, to be mangled; little is written out."""
    folder = tmp_path / "checkpoint_1"
    shutil.copytree(finished.run_dir / "checkpoint_1", folder)
    keys = ("c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max")
    keys += ("train_path", "num_epochs")
    return Experiment(
        tmp_path / "e", only_eval=True, load_model_path=folder, num_val=2,
        **dict.fromkeys(keys),
    )  # fmt: skip


def check_weights(experiment, *names):
    """Reading the checkpoint as an evaluation does succeeds, or gives one message."""
    config = load_config(experiment.yaml)

    def read():
        source = ModelSource.of(config)
        settled = config_with_metadata(config, source.metadata, source.name)
        texts = read_records(settled.val_path)
        records = tokenize_records(texts, source.tokenizer, settled.val_path)
        check_answers(records, source.tokenizer)
        outline = model_outline(settled, source)
        check_fit(settled, Data(source.tokenizer, None, records), {0}, outline)
        build_coconut(settled, load_backbone(settled, source))

    before = tree(experiment.folder.parent)
    outcome = outcome_of(read, *names, "load_model_path", config.val_path)
    assert tree(experiment.folder.parent) == before
    return outcome


@fuzz(120)
@given(st.data())
def test_mangled_metadata_loads_or_name_file_and_field(evaluation, data):
    file = evaluation.keys["load_model_path"] / "coconut.json"
    good = file.read_bytes()
    value, path = data.draw(mangled_json(json.loads(good)))
    file.write_bytes(to_text(value))
    config = load_config(evaluation.yaml)
    try:
        names = [field for field in path if isinstance(field, str)]
        metadata, refusal = outcome_of(lambda: Metadata.read(file.parent), file)
        if refusal:
            expected = [*names, "are not weights", "Invalid JSON"]
            assert any(words in refusal for words in expected)
        else:
            outcome_of(
                lambda: config_with_metadata(config, metadata, "load_model_path"), "load_model_path"
            )
    finally:
        file.write_bytes(good)


@fuzz(120)
@given(st.data())
def test_metadata_of_mangled_bytes_loads_or_names_the_file(evaluation, data):
    file = evaluation.keys["load_model_path"] / "coconut.json"
    good = file.read_bytes()
    file.write_bytes(data.draw(mangled_bytes(good)))
    try:
        outcome_of(lambda: Metadata.read(file.parent), file)
    finally:
        file.write_bytes(good)


@fuzz(30)
@given(st.data())
def test_mangled_architectures_load_or_give_a_message(evaluation, data):
    folder = evaluation.keys["load_model_path"]
    file = folder / data.draw(st.sampled_from(["config.json", "generation_config.json"]))
    good = file.read_bytes()
    file.write_bytes(to_text(data.draw(mangled_json(json.loads(good)))[0]))
    try:
        check_weights(evaluation, folder)
    finally:
        file.write_bytes(good)


@fuzz(20)
@given(data=st.data())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_mangled_base_models_load_or_give_a_message(tmp_path, family, data):
    experiment = Experiment(tmp_path / "e", family, num_val=2, cot=True)
    file = experiment.model / "config.json"
    good = file.read_bytes()
    file.write_bytes(to_text(data.draw(mangled_json(json.loads(good)))[0]))
    try:
        check_weights(experiment, experiment.model)
    finally:
        file.write_bytes(good)


@fuzz(50)
@given(st.data())
def test_mangled_tokenizers_load_or_give_a_message(evaluation, data):
    folder = evaluation.keys["load_model_path"]
    file = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    good = file.read_bytes()
    file.write_bytes(to_text(data.draw(mangled_json(json.loads(good)))[0]))
    try:
        check_weights(evaluation, folder)
    finally:
        file.write_bytes(good)


@fuzz(40)
@given(st.data())
def test_any_file_of_mangled_bytes_loads_or_gives_a_message(evaluation, data):
    folder = evaluation.keys["load_model_path"]
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    good = file.read_bytes()
    file.write_bytes(data.draw(mangled_bytes(good)))
    try:
        check_weights(evaluation, folder)
    finally:
        file.write_bytes(good)


def split_safetensors(content):
    """(header as JSON, tensors' bytes) of a safetensors file."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@fuzz(40)
@given(st.data())
def test_mangled_headers_of_weights_load_or_give_a_message(evaluation, data):
    folder = evaluation.keys["load_model_path"]
    file = folder / "model.safetensors"
    good = file.read_bytes()
    header, tensors = split_safetensors(good)
    text = to_text(data.draw(mangled_json(header))[0])
    size = len(text) + data.draw(st.sampled_from([0, 0, 0, -1, 1, 2**40, -len(text)]))
    file.write_bytes(size.to_bytes(8, "little") + text + tensors)
    try:
        check_weights(evaluation, folder)
    finally:
        file.write_bytes(good)


# Single files


@pytest.fixture
def single(finished, tmp_path):
    """Evaluation of a single-file state dict, as the published code saves it."""
    file = tmp_path / "checkpoint_1.pt"
    tensors = load_file(finished.run_dir / "checkpoint_1" / "model.safetensors")
    state = {f"base_causallm.{name}": tensor for name, tensor in tensors.items()}
    torch.save(state | {"embedding.weight": tensors["transformer.wte.weight"]}, file)
    return Experiment(
        tmp_path / "e", only_eval=True, load_model_path=file, num_val=2, latent_window_size=1,
        latent_weights=[1.0], window_scope="sequence", resume=0,
    )  # fmt: skip


@fuzz(50)
@given(st.data())
def test_a_mangled_single_file_loads_or_gives_a_message(single, data):
    file = single.keys["load_model_path"]
    good = file.read_bytes()
    file.write_bytes(data.draw(mangled_bytes(good)))
    try:
        check_weights(single, file)
    finally:
        file.write_bytes(good)


def rewrite(path, name, content):
    """Replace one member of a zip file, whose sums are then right again."""
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    (target,) = (member for member in members if member.endswith(name))
    members[target] = content(members[target])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, bytes_ in members.items():
            archive.writestr(member, bytes_)


@fuzz(50)
@given(st.data())
def test_a_mangled_pickle_in_a_sound_archive_loads_or_gives_a_message(single, data):
    file = single.keys["load_model_path"]
    good = file.read_bytes()
    rewrite(file, "data.pkl", lambda content: data.draw(mangled_bytes(content)))
    try:
        check_weights(single, file)
    finally:
        file.write_bytes(good)


TENSORS = [
    *(torch.zeros(()), torch.zeros(0), torch.zeros(1), torch.zeros(40, 32), torch.ones(37, 32)),
    *(torch.zeros(40, 32, dtype=torch.int64), torch.zeros(40, 32, dtype=torch.bfloat16)),
    *(torch.zeros(40, 32, dtype=torch.complex64), torch.zeros(40, 32).to_sparse()),
    *(torch.full((40, 32), math.nan), torch.zeros(1).expand(40, 32), torch.zeros(40, 64)[:, ::2]),
    *(torch.zeros(40, 32, dtype=torch.bool), torch.nn.Parameter(torch.zeros(40, 32))),
]


NAMES = [
    *("base_causallm.transformer.wte.weight", "base_causallm.transformer.wpe.weight"),
    *("transformer.wte.weight", "wte.weight", "embedding.weight", "lm_head.weight", ""),
    *("base_causallm.lm_head.weight", "base_causallm.", "base_causallm.transformer.ln_f.bias"),
]
any_entries = st.dictionaries(
    st.sampled_from([*NAMES, 1, None]), st.sampled_from([*TENSORS, *VALUES]), max_size=3
)
entries_of_tensors = st.dictionaries(
    st.sampled_from(NAMES), st.sampled_from(TENSORS), min_size=1, max_size=2
)


@fuzz(50)
@given(entries_of_tensors | any_entries, st.booleans())
def test_a_state_dict_of_anything_loads_or_gives_a_message(single, entries, complete):
    file = single.keys["load_model_path"]
    good = file.read_bytes()
    state = torch.load(file, weights_only=True) if complete else {}
    torch.save(state | entries, file)
    try:
        check_weights(single, file)
    finally:
        file.write_bytes(good)


# Training states


@pytest.fixture
def again(finished, tmp_path):
    """`again()`: a fresh copy of the finished run that has an epoch left to train."""

    def build():
        folder = tmp_path / "again"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished.folder, folder)
        return Experiment(folder, num_epochs=2, num_train=6)

    return build


def read_state(experiment):
    """What a resumed run reads before it loads a model."""
    config = load_config(experiment.yaml)
    state = checkpoint.newest_state(config.run_dir)
    if state is not None:
        check_stored_trainer(state.folder, state.trainer)
        metadata = Metadata(**state.trainer["metadata"])
        config_with_metadata(config, metadata, "the run", resumes=True)


@fuzz(80)
@given(st.data(), st.booleans())
def test_a_mangled_position_is_accepted_or_refused_by_name(again, data, repaired):
    experiment = again()
    file = state_folder(experiment) / "state.json"
    stored = json.loads(file.read_text())
    if repaired:
        changed, path = data.draw(mangled_json({"trainer": stored["content"]["trainer"]}))
        stored["content"] |= changed if "trainer" in changed else {"trainer": {}}
        stored["sha256"] = checkpoint._checksum(stored["content"])
    else:
        stored, path = data.draw(mangled_json(stored))
    file.write_text(json.dumps(stored))
    _, refusal = outcome_of(lambda: read_state(experiment), experiment.run_dir)
    if refusal and repaired:
        words = [*map(str, path), "position: Field required", ": Input should be an object"]
        # Half of a surrogate pair is not JSON; where it stands decides what is said of it.
        words += ["surrogate", "hex escape"]
        assert any(text in refusal for text in words)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("position", "epoch"), -1, "position: epoch: Input should be greater than or equal to 0"),
        (("position", "optimizer_step"), 7, "position: optimizer_step: is 7"),
        (("position", "loss_sum"), math.nan, "position: loss_sum: Input should be a finite number"),
        (("position", "mood"), 1, "position: mood: Unexpected keyword argument"),
        (("metadata", "stage"), "1", "metadata: stage: Input should be a valid integer"),
        (("metadata", "c_thought"), 10**30, "metadata: c_thought: Input should be less than"),
        (("wandb_id",), 3, "wandb_id: Input should be a valid string"),
        (("wandb_id",), "../../x", "wandb_id: String should match pattern"),
    ],
)
def test_a_position_changed_by_hand_is_refused_by_field(again, capsys, path, value, words):
    experiment = again()
    file = state_folder(experiment) / "state.json"
    stored = json.loads(file.read_text())
    owner = stored["content"]["trainer"]
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    file.write_text(json.dumps(stored))
    renew_checksums(file.parent)
    words = [f"{file}: changed by hand or of another version: {words}", f"remove {file.parent} to"]
    assert_refused(capsys, experiment, words=words)


@pytest.mark.parametrize("wandb_id", ["gsm.1", "größer & (b)", ".."])
def test_every_id_that_wandb_may_give_a_run_is_accepted(again, wandb_id):
    experiment = again()
    file = state_folder(experiment) / "state.json"
    stored = json.loads(file.read_text())
    stored["content"]["trainer"]["wandb_id"] = wandb_id
    file.write_text(json.dumps(stored))
    renew_checksums(file.parent)
    read_state(experiment)


@pytest.mark.parametrize(
    "sums",
    [
        *([], None, 7, {"/dev/zero": "0" * 64}, {"../../../config.yaml": "0" * 64}),
        *({"generators.json": None}, {"generators.json": []}, {"": "0" * 64}, {"\ud800": "0"}),
    ],
)
def test_checksums_of_anything_but_files_damage_a_state(again, capsys, sums):
    experiment = again()
    file = state_folder(experiment) / "state.json"
    content = json.loads(file.read_text())["content"] | {"sha256": sums}
    file.write_text(json.dumps({"content": content, "sha256": checkpoint._checksum(content)}))
    assert_refused(capsys, experiment, words=["resume: no training state is intact"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"content": ' * 3000, "9" * 5000, "NaN", "\0"])
def test_a_state_of_hostile_json_is_damaged(again, capsys, text):
    experiment = again()
    (state_folder(experiment) / "state.json").write_text(text)
    assert_refused(capsys, experiment, words=["resume: no training state is intact"])


def link_to_a_pipe(path):
    os.mkfifo(path.parents[2] / "pipe")
    path.symlink_to(path.parents[2] / "pipe")


@pytest.mark.parametrize("make", [os.mkfifo, link_to_a_pipe, os.mkdir])
@pytest.mark.parametrize("name", ["state.json", "config.json", STATE_TENSORS])
def test_anything_but_a_file_damages_a_state(again, capsys, name, make):
    experiment = again()
    path = state_folder(experiment) / name
    path.unlink()
    make(path)
    assert_refused(capsys, experiment, words=["resume: no training state is intact"])


def test_an_endless_description_damages_a_state(again, capsys):
    experiment = again()
    os.truncate(state_folder(experiment) / "state.json", 2**42)
    assert_refused(capsys, experiment, words=["resume: no training state is intact"])


def test_weights_that_do_not_belong_to_a_state_damage_it(again, capsys):
    experiment = again()
    save_file({"x": torch.zeros(1)}, state_folder(experiment) / "another.safetensors")
    assert_refused(capsys, experiment, words=["resume: no training state is intact"])


@fuzz(60)
@given(st.data())
def test_a_state_of_mangled_bytes_is_accepted_or_refused_by_name(again, data):
    experiment = again()
    files = sorted(state_folder(experiment).iterdir())
    file = data.draw(st.sampled_from(files))
    file.write_bytes(data.draw(mangled_bytes(file.read_bytes())))
    outcome_of(lambda: read_state(experiment), experiment.run_dir)


# Whole runs: what the user sees, and what is left in the folder


def check_run(experiment, capsys, *arguments):
    """Status 0, or status 2 with a message and nothing written. Returns the status."""
    before = tree(experiment.folder)
    status = experiment.main(*arguments)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert status in (0, EXIT_USER_ERROR)
    if status:
        assert str(experiment.folder.parent) in captured.err
        assert captured.err.replace("\n", "").isprintable()
        assert tree(experiment.folder) == before
    return status


@fuzz(8)
@given(st.data())
def test_a_run_resumes_from_a_mangled_state_or_refuses_it(again, capsys, data):
    experiment = again()
    folder = state_folder(experiment)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = (folder / name).read_bytes()
    if name.endswith(".json"):
        content = to_text(data.draw(mangled_json(json.loads(content)))[0])
    elif name.endswith(".safetensors"):
        header, tensors = split_safetensors(content)
        text = to_text(data.draw(mangled_json(header))[0])
        content = len(text).to_bytes(8, "little") + text + tensors
    else:
        content = data.draw(mangled_bytes(content))
    (folder / name).write_bytes(content)
    if name != "state.json":
        renew_checksums(folder)
    check_run(experiment, capsys)


def drop(tensors, name):
    del tensors[name]


def transpose(tensors, name):
    tensors[name] = tensors[name].T.contiguous()


def shorten(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def rename(tensors, name):
    tensors[f"x{name}"] = tensors.pop(name)


@pytest.mark.parametrize("change", [drop, transpose, shorten, rename])
@pytest.mark.parametrize(
    "name",
    [
        "model.base_causallm.transformer.h.1.attn.c_attn.weight",
        "optimizer.base_causallm.transformer.h.1.attn.c_attn.weight|exp_avg",
        "optimizer.base_causallm.transformer.h.1.attn.c_attn.weight|step",
    ],
)
def test_a_state_whose_tensors_do_not_fit_is_refused(again, capsys, name, change):
    experiment = again()
    path = state_folder(experiment) / STATE_TENSORS
    tensors = load_file(path)
    if tensors[name].dim() == 0:
        tensors[name] = torch.zeros(2, 3)
    change(tensors, name)
    save_file(tensors, path)
    renew_checksums(path.parent)
    assert_refused(capsys, experiment, words=[f"{path.parent}: cannot be restored", name])


@pytest.mark.parametrize(
    "content", ["[{}]", "[7]", '[{"python": [3, [1], null], "numpy": []}]', "null"]
)
def test_a_state_whose_generators_no_run_wrote_is_refused(again, capsys, content):
    experiment = again()
    folder = state_folder(experiment)
    (folder / "generators.json").write_text(content)
    renew_checksums(folder)
    words = f"{folder}: its tensors or generators are not this run's ("
    assert_refused(capsys, experiment, words=[words, "remove it to resume from an earlier state"])


@fuzz(12)
@given(st.data())
def test_a_run_resumes_over_mangled_records_of_its_past(again, capsys, data):
    experiment = again()
    name = data.draw(st.sampled_from(["metrics.jsonl", "config.yaml", "predictions_0.jsonl"]))
    file = experiment.run_dir / name
    lines = [b'{"step": "x"}', b'{"step": null}', b'{"step": [1]}', b'{"eval/epoch": "x"}', b"[]"]
    file.write_bytes(data.draw(mangled_bytes(file.read_bytes()) | st.sampled_from(lines)))
    assert check_run(experiment, capsys) == 0


@fuzz(25)
@given(st.data(), st.sampled_from(["--dry-run", "debug=true"]))
def test_an_evaluation_of_a_mangled_checkpoint_ends_well_or_refuses_it(
    evaluation, capsys, data, option
):
    folder = evaluation.keys["load_model_path"]
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    good = (folder / name).read_bytes()
    content = mangled_bytes(good)
    if name.endswith(".json"):
        content = mangled_json(json.loads(good)).map(lambda changed: to_text(changed[0]))
    (folder / name).write_bytes(data.draw(content))
    try:
        check_run(evaluation, capsys, option)
    finally:
        (folder / name).write_bytes(good)
