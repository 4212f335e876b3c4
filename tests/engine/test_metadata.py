"""coconut.json: what it must hold, and when it replaces what the configuration leaves out."""

import json
import sys
from types import SimpleNamespace

import pytest

from coconut import Coconut
from dataset import MARKERS
from engine.config_file import load_config
from engine.metadata import METADATA_FILE, Metadata, config_with_metadata, require_class
from utils import UserError


@pytest.fixture
def configure(tmp_path):
    """`configure(**keys)`: a Config for evaluation of `checkpoint_8` unless keys say otherwise."""

    def build(**keys):
        values = {
            "name": "run", "save_path": "exps", "model_id": "tiny", "val_path": "val.json",
            "only_eval": True, "load_model_path": "exps/run/checkpoint_8",
        }  # fmt: skip
        if not {"coconut", "cot", "no_cot", "no_thoughts"} & keys.keys():
            values["coconut"] = True
        values |= keys
        if not values["only_eval"]:
            training = {"train_path": "train.json", "num_epochs": 9, "batch_size_training": 2}
            training |= {"c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 2}
            values = training | values
        path = tmp_path / "config.yaml"
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()))
        return load_config(str(path))

    return build


@pytest.fixture
def tokenizer(word_tokenizer):
    word_tokenizer.add_special_tokens({"extra_special_tokens": list(MARKERS)})
    return word_tokenizer


@pytest.fixture
def stored(configure, tokenizer):
    """`stored(**keys)`: the metadata of a checkpoint trained with these keys."""

    def build(**keys):
        return Metadata.of(configure(**keys), tokenizer).at(stage=2, epoch=7)

    return build


TRAINED = {
    "latent_window_size": 2, "latent_weights": [0.7, 0.3, 0.9], "window_scope": "pass",
    "thought": "pause", "c_thought": 2, "epochs_per_stage": 5, "max_latent_stage": 6,
    "pad_latent_to_max": False, "curriculum": False,
}  # fmt: skip


def write(folder, content):
    (folder / METADATA_FILE).write_text(json.dumps(content))


def test_metadata_survives_its_file(stored, tmp_path):
    metadata = stored(**TRAINED)
    write(tmp_path, metadata.model_dump())
    assert Metadata.read(tmp_path) == metadata
    assert metadata.model_dump() == {
        "format_version": 2, "method": "coconut", "latent_token_id": 39, "start_latent_id": 37,
        "end_latent_id": 38, "eos_token_id": 0, "latent_window_size": 2,
        "latent_weights": [0.7, 0.3], "learned_weights": None, "window_scope": "pass",
        "thought": "pause", "thought_norm": None, "coconut_class": None, "c_thought": 2,
        "stage": 2, "epoch": 7, "schedule": {
            "epochs_per_stage": 5, "max_latent_stage": 6, "pad_latent_to_max": False,
            "curriculum": False,
        },
        "provenance": None,
    }  # fmt: skip


def test_paths_without_metadata_give_none(tmp_path):
    file = tmp_path / "weights"
    file.touch()
    for path in (tmp_path, file, tmp_path / "nothing"):
        assert Metadata.read(path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 3}, "format_version: Input should be 1 or 2"),
        ({"method": "icot"}, "method: Input should be 'coconut', 'cot'"),
        ({"stage": "2"}, "stage: Input should be a valid integer"),
        ({"c_thought": -1}, "c_thought: Input should be greater"),
        ({"latent_weights": [0.7]}, "are not weights of 2 states"),
        ({"latent_weights": [0.0, 1.0]}, "are not weights of 2 states"),
        ({"latent_weights": [1e-300, 1.0]}, "are not weights of 2 states"),
        (
            {"latent_weights": [1.0, 1e300]},
            "latent_weights: .*1: Input should be less than or equal",
        ),
        (
            {"latent_weights": [1.0, -1.0]},
            "latent_weights: .*1: Input should be greater than or eq",
        ),
        ({"latent_weights": [float("nan"), 1.0]}, "finite"),
        ({"stage": 10**9}, "stage: Input should be less than or equal to 1000000"),
        ({"schedule": {}}, "schedule: epochs_per_stage: Field required"),
        ({"window": 3}, "window: Extra inputs are not permitted"),
    ],
)
def test_broken_metadata_is_named_by_field(stored, tmp_path, change, words):
    write(tmp_path, stored(**TRAINED).model_dump() | change)
    with pytest.raises(UserError, match=rf"coconut\.json: broken or of another version: .*{words}"):
        Metadata.read(tmp_path)


def test_version_1_is_read_as_version_2(stored, tmp_path):
    metadata = stored(**TRAINED)
    new = ("learned_weights", "thought_norm", "coconut_class")
    old = {name: value for name, value in metadata.model_dump().items() if name not in new}
    write(tmp_path, old | {"format_version": 1})
    assert Metadata.read(tmp_path) == metadata


@pytest.mark.parametrize("content", [b"", b'{"method": ', b"\xff\xfe", b"[]"])
def test_a_file_of_other_content_is_refused(tmp_path, content):
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"coconut\.json: broken or of another version"):
        Metadata.read(tmp_path)


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch, stored):
    write(tmp_path, stored().model_dump())

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(UserError, match=r"coconut\.json: cannot be read \(Input/output error\)"):
        Metadata.read(tmp_path)


def settle(config, metadata, resumes=False):
    return config_with_metadata(config, metadata, "load_model_path exps/run/checkpoint_8", resumes)


def test_stored_values_replace_defaults_and_stay_defaults(configure, stored):
    config = configure()
    got = settle(config, stored(**TRAINED))
    expected = TRAINED | {"latent_weights": (0.7, 0.3)}
    assert {field: getattr(got, field) for field in TRAINED} == expected
    assert got.model_fields_set == config.model_fields_set
    assert config.latent_window_size == 3


def test_equal_explicit_values_pass(configure, stored):
    got = settle(configure(**TRAINED), stored(**TRAINED))
    assert got.latent_weights == (0.7, 0.3, 0.9)


def test_explicit_values_that_differ_are_all_shown(configure, stored):
    config = configure(c_thought=1, latent_window_size=3, pad_latent_to_max=True)
    with pytest.raises(UserError) as error:
        settle(config, stored(**TRAINED))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert (
        "load_model_path exps/run/checkpoint_8: c_thought was 2 in training, the configuration says"
        " 1; write c_thought: 2 or leave the key out" in lines
    )
    assert any("latent_window_size was 2" in line and "says 3" in line for line in lines)
    assert any("pad_latent_to_max was False" in line and "says True" in line for line in lines)


def test_weights_are_compared_on_the_window_and_up_to_a_factor(configure, stored):
    metadata = stored(latent_window_size=2, latent_weights=[0.6, 0.2])
    for weights in ([0.6, 0.2, 5.0], [3, 1]):
        explicit = configure(latent_window_size=2, latent_weights=weights)
        assert settle(explicit, metadata).latent_weights == tuple(weights)
    with pytest.raises(UserError, match=r"latent_weights was \[0.6, 0.2\] .* says \[0.2, 0.6\]"):
        settle(configure(latent_window_size=2, latent_weights=[0.2, 0.6]), metadata)
    with pytest.raises(UserError, match="latent_weights was .* says"):
        settle(configure(latent_window_size=1, latent_weights=[1.0]), metadata)


def test_metadata_counts_where_training_of_its_method_continues(configure, stored):
    metadata = stored(**TRAINED)
    fresh = configure(only_eval=False)
    assert settle(fresh, metadata) is fresh
    assert settle(fresh, None) is fresh
    with pytest.raises(UserError, match="c_thought was 2 in training"):
        settle(configure(only_eval=False, resume=3), metadata)
    with pytest.raises(UserError, match="c_thought was 2 in training"):
        settle(fresh, metadata, resumes=True)
    after_cot = configure(only_eval=False, resume=3)
    assert settle(after_cot, stored(cot=True)) is after_cot


def test_only_what_acts_under_the_method_counts(configure, stored):
    cot = configure(cot=True, c_thought=3, max_latent_stage=1)
    assert settle(cot, stored(cot=True, c_thought=0)) == cot
    no_thoughts = configure(no_thoughts=True, c_thought=3)
    metadata = stored(no_thoughts=True, c_thought=0, epochs_per_stage=4)
    assert settle(no_thoughts, metadata).epochs_per_stage == 4


def test_weights_of_another_method_are_refused_where_they_cannot_be_used(configure, stored):
    for keys in ({"only_eval": False}, {}):
        with pytest.raises(UserError, match="was trained as coconut, but this run is cot"):
            settle(configure(cot=True, **keys), stored())
    with pytest.raises(UserError, match="was trained as cot, but this run is coconut"):
        settle(configure(), stored(cot=True))


# A subclass of Coconut


class Mine(Coconut):
    pass


class Variant(Mine):
    pass


def test_a_class_is_recorded_by_module_and_name(configure, tokenizer, monkeypatch):
    config = configure()
    assert Metadata.of(config, tokenizer, Coconut).coconut_class is None
    assert Metadata.of(config, tokenizer, Mine).coconut_class == "test_metadata:Mine"
    # In a script that is run, the module of the same class has another name.
    script = SimpleNamespace(__file__="/home/me/thoughts.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(Mine, "__module__", "__main__")
    assert Metadata.of(config, tokenizer, Mine).coconut_class == "thoughts:Mine"


def test_weights_of_a_class_require_it_or_a_variant_of_it(configure, tokenizer):
    metadata = Metadata.of(configure(), tokenizer, Mine)
    for coconut_class in (Mine, Variant):
        require_class(metadata, coconut_class, "checkpoint_8")
    for plain in (None, Metadata.of(configure(), tokenizer)):
        require_class(plain, Mine, "checkpoint_8")
    words = "checkpoint_8: was trained with coconut_class test_metadata:Mine, this run has"
    for coconut_class in (None, Coconut):
        with pytest.raises(UserError, match=f"{words} Coconut itself; write coconut_class: test_m"):
            require_class(metadata, coconut_class, "checkpoint_8")
    other = Metadata.of(configure(), tokenizer, Variant)
    with pytest.raises(UserError, match="coconut_class test_metadata:Variant, this run has test_m"):
        require_class(other, Mine, "checkpoint_8")


def test_an_evaluation_without_a_method_takes_the_checkpoints(configure, stored):
    config = configure(coconut=False)
    assert config.method is None
    assert config_with_metadata(config, stored(), "weights").method == "coconut"
    with pytest.raises(UserError, match="^weights: has no coconut.json that names the method"):
        config_with_metadata(config, None, "weights")


def test_named_weights_are_stored_as_numbers(configure, stored):
    assert stored(latent_weights="uniform").latent_weights == [1, 1, 1]
    metadata = stored(latent_weights="exponential:0.5", latent_window_size=4)
    assert metadata.latent_weights == [1, 0.5, 0.25, 0.125]
    same = configure(latent_weights="exponential:0.5", latent_window_size=4)
    assert config_with_metadata(same, metadata, "weights").latent_weights == "exponential:0.5"
    with pytest.raises(UserError, match="latent_weights was"):
        config_with_metadata(configure(latent_weights="uniform"), metadata, "weights")
