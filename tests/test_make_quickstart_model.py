"""make_quickstart_model.py: the committed folder, other sizes and kinds, vocabularies from data."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets import make_quickstart_model as maker
from preprocessing import arithmetic

MODEL_FOLDER = Path(__file__).parent.parent / "assets" / "quickstart-model"


def build(folder, *arguments):
    """Build a model folder with weights; return its tokenizer and model."""
    assert maker.main(["--out", str(folder), "--weights", "0", *map(str, arguments)]) == 0
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def lagged_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lagged")
    arithmetic.main(["--task", "lagged", "--out", str(folder), "--train", "200", "--valid", "20"])
    return folder / "train.json"


def test_committed_model_folder_is_what_its_script_builds(tmp_path):
    maker.main(["--out", str(tmp_path)])
    names = {path.name for path in MODEL_FOLDER.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()}
    for name in names:
        assert (tmp_path / name).read_bytes() == (MODEL_FOLDER / name).read_bytes()


def test_every_hour_and_sign_is_one_token_and_white_space_none():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert tokenizer.eos_token_id is not None
    for record in arithmetic.make_splits(arithmetic.Clock(), {"any": 50}, seed=0)["any"]:
        words = record["question"].split()
        ids = tokenizer(record["question"] + "\n").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == words
        steps = " ".join(record["steps"])
        assert tokenizer.convert_ids_to_tokens(tokenizer(steps).input_ids) == steps.split()
    assert tokenizer("\n").input_ids == []


def test_weights_depend_on_the_seed_and_embeddings_are_drawn_wider(tmp_path):
    models = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        maker.main(["--out", str(tmp_path / folder), "--weights", seed])
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / folder))
    a, b, c = (model.state_dict() for model in models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    embeddings, matrix = a["model.embed_tokens.weight"], a["lm_head.weight"]
    assert embeddings.std().item() == pytest.approx(maker.EMBEDDING_STD, rel=0.1)
    wanted = maker.ARCHITECTURE["initializer_range"]
    assert matrix.std().item() == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(("kind", "positions"), [("llama", "rotary"), ("gpt2", "learned")])
def test_kind_and_positions_imply_each_other(tmp_path, kind, positions):
    sizes = ["--width", 32, "--depth", 2, "--heads", 2]
    for folder, arguments in (("a", ["--kind", kind]), ("b", ["--positions", positions])):
        _, model = build(tmp_path / folder, *sizes, *arguments)
        config = model.config
        assert config.model_type == kind
        assert (config.hidden_size, config.num_hidden_layers) == (32, 2)
        assert config.num_attention_heads == 2
        assert any("wpe" in name for name, _ in model.named_parameters()) == (kind == "gpt2")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in "ab")
    assert a == b


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_are_as_long_as_the_embeddings_they_replace(tmp_path, kind):
    _, model = build(tmp_path, "--kind", kind, "--width", 128)
    with torch.no_grad():
        states = model(torch.arange(10)[None], output_hidden_states=True).hidden_states[-1]
    embeddings = model.get_input_embeddings().weight
    ratio = (states.norm(dim=-1).mean() / embeddings.norm(dim=-1).mean()).item()
    assert ratio == pytest.approx(1, rel=0.1)


def test_vocabulary_is_that_of_the_data(tmp_path, lagged_file):
    tokenizer, model = build(tmp_path, "--data", lagged_file)
    words = [maker.END_OF_TEXT, maker.UNKNOWN, "###", "=", "0", "1", "2", "3", "4"]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == words
    assert model.config.vocab_size == len(words)
    for record in json.loads(lagged_file.read_text()):
        for text in (record["question"], "### " + record["answer"], *record["steps"]):
            assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == text.split()


def test_several_files_give_one_vocabulary_in_order_of_value(tmp_path):
    files = []
    for name, words in (("a", "10 2 |"), ("b", "9 x [Q]")):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps([{"question": words, "answer": "2", "steps": []}]))
    tokenizers = [build(tmp_path / "m", "--data", *order)[0] for order in (files, files[::-1])]
    words = ["[Q]", "x", "|", "2", "9", "10"]
    assert tokenizers[0].convert_ids_to_tokens(range(3, 9)) == words
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_positions_have_room_for_twice_the_longest_record(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"question": "1 " * 200, "answer": "2", "steps": []}]))
    tokenizer, model = build(tmp_path / "m", "--kind", "gpt2", "--data", path)
    assert tokenizer.model_max_length == model.config.n_positions == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "llama", "--positions", "learned"], "llama has rotary .*--kind gpt2"),
        (["--kind", "gpt2", "--positions", "rotary"], "gpt2 has learned .*--kind llama"),
        (["--width", "30"], "--width 30: cannot be divided among --heads 4"),
        (["--width", "12"], "heads are 3 wide, and rotary positions need an even number"),
        (["--data", "none.json"], r"none.json: cannot be read \(No such file"),
        (["--data", __file__], r"is not UTF-8 JSON \(.* at line 1.*; give a data file"),
    ],
)
def test_impossible_models_get_one_message_and_no_folder(tmp_path, capsys, arguments, message):
    assert maker.main(["--out", str(tmp_path / "m"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("arguments", [["--width", "128"], ["--weights", "0"]])
def test_the_committed_folder_is_never_overwritten_by_another_model(capsys, arguments):
    assert maker.main(arguments) == 2
    assert "--out: wanted a folder" in capsys.readouterr().err
