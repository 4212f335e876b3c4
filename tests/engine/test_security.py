"""Security: files are never executed, nothing is written elsewhere, no key is disclosed.

Every attack creates a folder when it runs, so that its absence shows that it did not; the first
tests show that the traps work on a reader that trusts its input.
"""

import ast
import base64
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import TENSORS, Experiment, assert_refused, tree
from safetensors.torch import load_file
from test_house import SOURCES, parse

from dataset import tokenize_records
from engine import checkpoint, tracking
from utils import EXIT_USER_ERROR, sha256_file


class Trap:
    """Unpickled by a reader that trusts, it creates the folder `trace`."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def trap_code(trace):
    return f"import os\nos.mkdir({str(trace)!r})\n"


# Weights of a size that the tests' models have, so that nothing but the content is refused.
PADDING = 100_000


def save_zip(path, trace):
    torch.save({"a": torch.zeros(PADDING), "transformer.wte.weight": Trap(trace)}, path)


def save_legacy(path, trace):
    state = {"a": torch.zeros(PADDING), "transformer.wte.weight": Trap(trace)}
    torch.save(state, path, _use_new_zipfile_serialization=False)


def save_pickle(path, trace):
    path.write_bytes(pickle.dumps([bytes(PADDING), Trap(trace)]))


WRITERS = [save_zip, save_legacy, save_pickle]


@pytest.fixture
def trace(tmp_path):
    """Where an attack would leave its trace; whatever the test did, it must not be there."""
    path = tmp_path / "trace"
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A Coconut run of one epoch: one checkpoint, one training state."""
    experiment = Experiment(tmp_path_factory.mktemp("finished"), num_epochs=1, num_train=6)
    assert experiment.main() == 0
    return experiment


@pytest.fixture
def again(finished, tmp_path):
    """A copy of the finished run that has an epoch left to train."""
    folder = tmp_path / "again"
    shutil.copytree(finished.folder, folder)
    return Experiment(folder, num_epochs=2, num_train=6)


# The traps


@pytest.mark.parametrize("save", WRITERS)
def test_the_traps_work_on_a_reader_that_trusts(tmp_path, save):
    path, trace = tmp_path / "weights", tmp_path / "trace"
    save(path, trace)
    if save is save_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.is_dir()
    exec(trap_code(tmp_path / "code"))
    assert (tmp_path / "code").is_dir()


# What the source may call

# The last reads the pickle that torch.distributed.checkpoint calls .metadata.
UNPICKLERS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"}
UNPICKLERS |= {"shelve.open", "joblib.load", "dill.load", "dill.loads", "FileSystemReader"}
RUNNERS = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def calls(source):
    """(name as written, keyword arguments by name) of every call in a file."""
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_no_source_unpickles_or_runs_what_it_reads():
    for source in SOURCES:
        for name, options in calls(source):
            assert name not in UNPICKLERS | RUNNERS, source
            assert name.split(".")[-1] not in UNPICKLERS, source
            assert options.get("allow_pickle", "False") == "False", source
            if name == "torch.load":
                assert options.get("weights_only") == "True", source


def test_every_hugging_face_load_declines_code():
    loads = [
        (str(source), options)
        for source in SOURCES
        for name, options in calls(source)
        if name.endswith(".from_pretrained")
    ]
    assert {source for source, _ in loads} >= {"engine/weights.py"}
    for source, options in loads:
        assert options.get("trust_remote_code") == "False", source


def test_no_key_of_the_configuration_allows_code(tmp_path, capsys):
    words = ["unknown key 'trust_remote_code'"]
    assert_refused(capsys, Experiment(tmp_path), "trust_remote_code=true", words=words)


# Files of weights


@pytest.mark.parametrize("name", ["weights", "weights.pt", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("save", WRITERS)
def test_a_single_file_with_code_is_refused_and_not_run(tmp_path, capsys, trace, save, name):
    experiment = Experiment(tmp_path / "e", load_model_path=tmp_path / name)
    save(tmp_path / name, trace)
    error = assert_refused(capsys, experiment, words=[f"{tmp_path / name}: "])
    assert error.count("\n") == 1
    # A safetensors file is read by a parser that knows no code.
    reason = "truncated or corrupt" if name.endswith("safetensors") else "such a file is never run"
    assert reason in error
    assert_refused(capsys, experiment, "only_eval=true", words=[reason])


@pytest.mark.parametrize("save", WRITERS)
@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
def test_a_folder_of_pickled_weights_with_code_is_refused_and_not_run(
    tmp_path, capsys, trace, key, save
):
    experiment = Experiment(tmp_path / "e")
    folder = tmp_path / "e" / "published"
    shutil.copytree(experiment.model, folder)
    (folder / "model.safetensors").unlink()
    save(folder / "pytorch_model.bin", trace)
    words = [f"{folder / 'pytorch_model.bin'}: ", "such a file is never run"]
    assert assert_refused(capsys, experiment.change(**{key: folder}), words=words).count("\n") == 1


def test_a_shard_with_code_is_refused_and_not_run(tmp_path, capsys, trace):
    experiment = Experiment(tmp_path / "e")
    tensors = load_file(experiment.model / "model.safetensors")
    (experiment.model / "model.safetensors").unlink()
    shards = {name: f"pytorch_model-0000{i % 2}.bin" for i, name in enumerate(tensors)}
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (experiment.model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save(tensors, experiment.model / "pytorch_model-00000.bin")
    torch.save(tensors | {"trap": Trap(trace)}, experiment.model / "pytorch_model-00001.bin")
    words = ["pytorch_model-00001.bin: ", "such a file is never run"]
    assert_refused(capsys, experiment, words=words)


def test_a_checkpoint_whose_settings_are_a_pickle_is_refused(tmp_path, capsys, trace, again):
    folder = again.run_dir / "checkpoint_1"
    save_pickle(folder / "coconut.json", trace)
    again.change(load_model_path=folder, name="other")
    assert_refused(capsys, again, words=["coconut.json: broken or of another version"])


def test_data_and_configuration_that_are_pickles_are_refused(tmp_path, capsys, trace):
    experiment = Experiment(tmp_path / "e")
    save_pickle(experiment.train, trace)
    assert_refused(capsys, experiment, words=[f"{experiment.train}: is not"])
    save_pickle(experiment.yaml, trace)
    assert_refused(capsys, experiment, words=[f"{experiment.yaml}: "])


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"])
def test_a_yaml_tag_that_names_code_is_refused(tmp_path, capsys, trace, tag):
    experiment = Experiment(tmp_path / "e")
    with open(experiment.yaml, "a") as file:
        file.write(f"\ndeterministic: !!python/{tag} [{trace}]\n")
    assert_refused(capsys, experiment, words=["deterministic: line "])


# Model folders with code of their own


OWN = "modeling_own.Own"


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": OWN}}),
        # transformers knows the type, and would load it as if the folder brought no code.
        ("config.json", {"auto_map": {"AutoConfig": OWN, "AutoModelForCausalLM": OWN}}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": OWN}}),
        ("config.json", {"auto_map": {"AutoConfig": f"some/where--{OWN}"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [OWN, None]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, OWN]}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [OWN, OWN]}},
        ),
    ],
)
@pytest.mark.parametrize("key", ["model_id", "load_model_path"])
def test_a_folder_that_brings_code_is_refused_and_the_code_not_run(
    tmp_path, capsys, trace, file, change, key
):
    experiment = Experiment(tmp_path / "e")
    folder = tmp_path / "e" / "published"
    shutil.copytree(experiment.model, folder)
    (folder / "modeling_own.py").write_text(trap_code(trace))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    words = [f"{key}: {folder} comes with code of its own", "never run and cannot be allowed"]
    for option in ("--dry-run", "debug=false"):
        error = assert_refused(capsys, experiment.change(**{key: folder}), option, words=words)
        assert error.count("\n") == 1
        assert "trust_remote_code" not in error


def spread_traps(folder, trace):
    """Files with code under every name that some program is known to load or run."""
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Trap(trace), folder / name)
    for name in (".metadata", "tokenizer.pkl", "vocab.pkl", "coconut.pkl"):
        save_pickle(folder / name, trace)
    for name in ("__init__.py", "setup.py", "handler.py", "configuration_gpt2.py", "gpt2.py"):
        (folder / name).write_text(trap_code(trace))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap_code(trace))
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.mkdir(" + repr(str(trace)) + ") }}"
    )


def test_files_with_code_beside_a_sound_model_are_never_touched(tmp_path, trace):
    experiment = Experiment(tmp_path / "e", num_epochs=1, num_train=4)
    spread_traps(experiment.model, trace)
    assert experiment.main() == 0
    other = {"name": "other", "load_model_path": experiment.model, "only_eval": True}
    assert experiment.change(**other).main() == 0


# Training states


def state_folder(experiment):
    (state,) = experiment.states()
    return state


def renew_checksums(folder):
    """Make the checksums of a training state those of its files as they are now."""
    stored = json.loads((folder / "state.json").read_text())["content"]
    stored["sha256"] = {name: sha256_file(folder / name) for name in stored["sha256"]}
    text = json.dumps({"content": stored, "sha256": checkpoint._checksum(stored)})
    (folder / "state.json").write_text(text)


def test_files_with_code_beside_a_training_state_are_never_touched(again, finished, trace):
    spread_traps(state_folder(again), trace)
    assert again.main() == 0
    assert again.metrics()[: len(finished.metrics())] == finished.metrics()


@pytest.mark.parametrize("save", WRITERS)
def test_no_file_of_a_training_state_is_unpickled(tmp_path, finished, capsys, trace, save):
    names = sorted(path.name for path in state_folder(finished).iterdir())
    assert {"state.json", TENSORS} <= set(names)
    for name in names:
        folder = tmp_path / name
        shutil.copytree(finished.folder, folder)
        again = Experiment(folder, num_epochs=2, num_train=6)
        save(state_folder(again) / name, trace)
        if name != "state.json":
            renew_checksums(state_folder(again))
        status = again.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        # Not every tokenizer file is read.
        assert status == EXIT_USER_ERROR or "token" in name or "generation" in name, name


def test_a_training_state_is_not_a_checkpoint_and_the_message_names_one(again, capsys):
    state = state_folder(again)
    words = [
        f"load_model_path: {state} is a training state, from which its own run resumes by itself;",
        f"name a checkpoint_N in {again.run_dir} instead",
    ]
    again.change(load_model_path=state, name="other")
    assert_refused(capsys, again, words=words)


def test_no_data_set_is_read_back_from_a_cache(word_tokenizer):
    records = [{"question": "1", "answer": "1", "steps": []}]
    assert tokenize_records(records, word_tokenizer, "a.json").table.cache_files == []


# Writing only inside save_path


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "../run", "a/b", "a/../../b", "/tmp/elsewhere", "\\\\server\\share", "a\\b"),
        *("a\nb", "a\0b", "a\tb", " a", "a ", "", "\x7f", "\u0000", "x" * 300),
    ],
)
def test_a_name_that_is_not_a_plain_folder_name_is_refused(tmp_path, capsys, name):
    experiment = Experiment(tmp_path / "e", save_path=tmp_path / "e" / "in" / "exps")
    experiment.change(name=name)
    before = tree(tmp_path)
    assert_refused(capsys, experiment, words=["name" if len(name) < 300 else "File name too long"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["..x", "-rf", "~", "$HOME", "a b", "größer", "CON", "%2e%2e"])
def test_a_name_that_only_looks_dangerous_stays_inside_save_path(tmp_path, name):
    experiment = Experiment(tmp_path / "e", num_epochs=1, num_train=4, num_val=2, name=name)
    before = set(tree(tmp_path))
    assert experiment.main() == 0
    assert (experiment.run_dir / "config.yaml").is_file()
    written = set(tree(tmp_path)) - before
    assert all(path.startswith(("e/exps/" + name, "e/exps")) for path in written)
    assert os.listdir(tmp_path / "e" / "exps") == [name]


def link_to(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("kind", ["folder", "file", "nothing", "itself"])
def test_a_run_directory_that_is_a_link_is_refused(tmp_path, capsys, kind):
    experiment, elsewhere = Experiment(tmp_path / "e"), tmp_path / "elsewhere"
    if kind == "folder":
        elsewhere.mkdir()
    elif kind == "file":
        elsewhere.write_text("mine")
    target = experiment.run_dir if kind == "itself" else elsewhere
    link_to(experiment.run_dir, target)
    before = tree(tmp_path)
    words = [f"save_path: {experiment.run_dir} is a link to {target}", "inside save_path only"]
    assert_refused(capsys, experiment, words=words)
    evaluation = {"only_eval": True, "load_model_path": experiment.model}
    assert_refused(capsys, experiment.change(**evaluation), words=words)
    assert tree(tmp_path) == before
    assert kind != "file" or elsewhere.read_text() == "mine"


def test_an_evaluation_folder_that_is_a_link_is_refused(tmp_path, capsys):
    experiment, elsewhere = Experiment(tmp_path / "e"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    experiment.change(only_eval=True, load_model_path=experiment.model)
    folder = experiment.evaluation_folder
    link_to(folder, elsewhere)
    assert_refused(capsys, experiment, words=[f"save_path: {folder} is a link to {elsewhere}"])
    assert tree(elsewhere) == []


@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl", "resume", "wandb"])
def test_a_link_inside_a_run_directory_is_not_written_through(tmp_path, capsys, name):
    experiment, elsewhere = Experiment(tmp_path / "e"), tmp_path / "precious"
    elsewhere.write_text("mine")
    link_to(experiment.run_dir / name, elsewhere)
    assert_refused(capsys, experiment, words=[f"{experiment.run_dir / name}: is not a plain f"])
    assert elsewhere.read_text() == "mine"


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", [".lock", "config.yaml", "metrics.jsonl"])
def test_a_pipe_or_folder_in_place_of_a_file_of_a_run_is_refused(tmp_path, capsys, name, kind):
    experiment = Experiment(tmp_path / "e")
    evaluation = {"only_eval": True, "load_model_path": experiment.model}
    evaluation = Experiment(tmp_path / "e", **evaluation)
    evaluated = evaluation.evaluation_folder
    evaluated.mkdir(parents=True)
    kind(evaluated / name)
    words = [f"{evaluated / name}: is not a plain file", "move it away"]
    assert_refused(capsys, evaluation, words=words)
    kind(experiment.run_dir / name)
    experiment.change()
    words = [f"{experiment.run_dir / name}: is not a plain file", "move it away"]
    assert_refused(capsys, experiment, words=words)


def test_a_save_path_may_be_a_link_since_the_user_wrote_it(tmp_path):
    (tmp_path / "disk").mkdir()
    experiment = Experiment(tmp_path / "e", num_epochs=1, num_train=4, num_val=2)
    link_to(tmp_path / "e" / "exps", tmp_path / "disk")
    assert experiment.main() == 0
    assert (tmp_path / "disk" / "run" / "checkpoint_1" / "model.safetensors").is_file()


# What reaches the terminal


@pytest.mark.parametrize("file", ["config.json", "coconut.json", "tokenizer_config.json"])
def test_a_message_that_quotes_a_file_sends_no_control_characters(tmp_path, capsys, file):
    experiment = Experiment(tmp_path / "e")
    content = {"\x1b[2J": 1, "model_type": "\x1b]0;x\x07", "eos_token": {"\u009b2J": "\ud800"}}
    (experiment.model / file).write_text(json.dumps(content))
    experiment.change(load_model_path=experiment.model, only_eval=True)
    error = assert_refused(capsys, experiment, words=[str(experiment.model)])
    assert error.replace("\n", "").isprintable()


# Keys

KEY = "5ec2e7" + "0123456789abcdef" * 2 + "77"
SERVER = "http://127.0.0.1:9"  # no server listens there


def hold_a_key(key, home):
    """In a process of its own: what a user of wandb has, and a home to find its files in."""
    home.mkdir()
    places = {name: str(home) for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR")}
    os.environ.update(places, WANDB_API_KEY=key, WANDB_BASE_URL=SERVER, NETRC=str(home / "netrc"))
    tracking.WANDB_TIMEOUT_S = 1


def appearances(folder):
    """Files below a folder that hold the key, or enough of it, in any of its usual spellings."""
    spellings = {KEY, KEY[:20], KEY[-20:], KEY.upper(), KEY[::-1]}
    encoded = {base64.b64encode(f"{prefix}{KEY}".encode()) for prefix in ("", "api:")}
    patterns = [spelling.encode() for spelling in spellings] + [text[:-4] for text in encoded]
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return [path for path in files if any(p in path.read_bytes() for p in patterns)]


@pytest.mark.parametrize(
    "key, line", [(KEY, "wandb did not start online"), (KEY[:20], "wandb cannot log in")]
)
def test_the_key_of_wandb_is_neither_printed_nor_saved(tmp_path, key, line):
    pytest.importorskip("wandb")
    experiment = Experiment(tmp_path / "e", num_epochs=1, num_train=4, num_val=2, wandb="online")
    process = experiment.start(hook=partial(hold_a_key, key, tmp_path / "home"))
    assert process.wait() == [0], process.output()
    assert line in process.output()
    assert list(experiment.run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert appearances(tmp_path) == []


def test_the_search_for_keys_finds_one(tmp_path):
    for number, text in enumerate([f"key={KEY}", KEY[:20], f"x{KEY[-20:]}", KEY[::-1]]):
        (tmp_path / str(number)).write_text(text)
    (tmp_path / "basic").write_bytes(b"\0" + base64.b64encode(f"api:{KEY}".encode()))
    assert len(appearances(tmp_path)) == 5
