"""coconut.json: what it must hold, and when it stands in for what the configuration leaves out."""

import json

import pytest

from dataset import MARKERS
from engine.config import load_config
from engine.metadata import SETTINGS_NAME, checkpoint_settings, read_checkpoint_settings, reconcile
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
    """`stored(**keys)`: the settings of a checkpoint trained with these keys."""

    def build(**keys):
        return checkpoint_settings(configure(**keys), tokenizer, stage=2, epoch=7)

    return build


TRAINED = {
    "latent_window_size": 2, "latent_weights": [0.7, 0.3, 0.9], "window_scope": "pass",
    "thought": "pause", "c_thought": 2, "epochs_per_stage": 5, "max_latent_stage": 6,
    "pad_latent_to_max": False, "curriculum": False,
}  # fmt: skip


def test_settings_survive_the_file(stored, tmp_path):
    settings = stored(**TRAINED)
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(settings))
    assert read_checkpoint_settings(tmp_path) == settings
    assert settings == {
        "format_version": 1, "method": "coconut", "latent_token_id": 39, "start_latent_id": 37,
        "end_latent_id": 38, "eos_token_id": 0, "latent_window_size": 2,
        "latent_weights": [0.7, 0.3], "window_scope": "pass", "thought": "pause", "c_thought": 2,
        "stage": 2, "epoch": 7, "schedule": {
            "epochs_per_stage": 5, "max_latent_stage": 6, "pad_latent_to_max": False,
            "curriculum": False,
        },
    }  # fmt: skip


def test_paths_without_settings_give_none(tmp_path):
    file = tmp_path / "weights"
    file.touch()
    for path in (None, tmp_path, file, tmp_path / "nothing"):
        assert read_checkpoint_settings(path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"method": "icot"}, "method: Input should be 'coconut', 'cot'"),
        ({"stage": "2"}, "stage: Input should be a valid integer"),
        ({"c_thought": -1}, "c_thought: Input should be greater"),
        ({"latent_weights": [0.7]}, "are no weights for 2 states"),
        ({"latent_weights": [0.0, 1.0]}, "are no weights for 2 states"),
        ({"latent_weights": [1e-300, 1.0]}, "are no weights for 2 states"),
        ({"latent_weights": [1.0, 1e300]}, "latent_weights: 1: Input should be less than or equal"),
        ({"latent_weights": [1.0, -1.0]}, "latent_weights: 1: Input should be greater than or eq"),
        ({"latent_weights": [float("nan"), 1.0]}, "finite"),
        ({"stage": 10**9}, "stage: Input should be less than or equal to 1000000"),
        ({"schedule": {}}, "schedule: epochs_per_stage: Field required"),
        ({"window": 3}, "window: Extra inputs are not permitted"),
    ],
)
def test_broken_settings_are_named_by_field(stored, tmp_path, change, words):
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(stored(**TRAINED) | change))
    with pytest.raises(UserError, match=rf"coconut\.json: broken or of another version: .*{words}"):
        read_checkpoint_settings(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"method": ', b"\xff\xfe", b"[]"])
def test_file_that_is_no_settings_is_refused(tmp_path, content):
    (tmp_path / SETTINGS_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"coconut\.json: broken or of another version"):
        read_checkpoint_settings(tmp_path)


def test_unreadable_settings_are_refused(tmp_path, monkeypatch, stored):
    (tmp_path / SETTINGS_NAME).write_text(json.dumps(stored()))

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(UserError, match=r"coconut\.json: cannot be read \(Input/output error\)"):
        read_checkpoint_settings(tmp_path)


def test_stored_settings_stand_in_for_defaults_and_stay_defaults(configure, stored):
    config = configure()
    got = reconcile(config, stored(**TRAINED))
    expected = TRAINED | {"latent_weights": (0.7, 0.3)}
    assert {field: getattr(got, field) for field in TRAINED} == expected
    assert got.model_fields_set == config.model_fields_set
    assert config.latent_window_size == 3


def test_equal_explicit_values_pass(configure, stored):
    got = reconcile(configure(**TRAINED), stored(**TRAINED))
    assert got.latent_weights == (0.7, 0.3, 0.9)


def test_explicit_values_that_differ_are_all_shown(configure, stored):
    config = configure(c_thought=1, latent_window_size=3, pad_latent_to_max=True)
    with pytest.raises(UserError) as error:
        reconcile(config, stored(**TRAINED))
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert (
        "load_model_path exps/run/checkpoint_8: c_thought was 2 in training, the configuration says"
        " 1; write c_thought: 2 or leave the key out" in lines
    )
    assert any("latent_window_size was 2" in line and "says 3" in line for line in lines)
    assert any("pad_latent_to_max was False" in line and "says True" in line for line in lines)


def test_weights_are_compared_on_the_window_and_up_to_a_factor(configure, stored):
    settings = stored(latent_window_size=2, latent_weights=[0.6, 0.2])
    for weights in ([0.6, 0.2, 5.0], [3, 1]):
        explicit = configure(latent_window_size=2, latent_weights=weights)
        assert reconcile(explicit, settings).latent_weights == tuple(weights)
    with pytest.raises(UserError, match=r"latent_weights was \[0.6, 0.2\] .* says \[0.2, 0.6\]"):
        reconcile(configure(latent_window_size=2, latent_weights=[0.2, 0.6]), settings)
    with pytest.raises(UserError, match="latent_weights was .* says"):
        reconcile(configure(latent_window_size=1, latent_weights=[1.0]), settings)


def test_resume_reconciles_within_the_method_alone(configure, stored):
    settings = stored(**TRAINED)
    fresh = configure(only_eval=False)
    assert reconcile(fresh, settings) is fresh
    assert reconcile(configure(only_eval=False), None) is not None
    with pytest.raises(UserError, match="c_thought was 2 in training"):
        reconcile(configure(only_eval=False, resume=3), settings)
    with pytest.raises(UserError, match="c_thought was 2 in training"):
        reconcile(fresh, settings, continuing=True)
    after_cot = configure(only_eval=False, resume=3)
    assert reconcile(after_cot, stored(cot=True)) is after_cot


def test_only_what_acts_under_the_method_counts(configure, stored):
    cot = configure(cot=True, c_thought=3, max_latent_stage=1)
    assert reconcile(cot, stored(cot=True, c_thought=0)) == cot
    no_thoughts = configure(no_thoughts=True, c_thought=3)
    settings = stored(no_thoughts=True, c_thought=0, epochs_per_stage=4)
    assert reconcile(no_thoughts, settings).epochs_per_stage == 4


def test_weights_of_another_method_are_refused_where_they_cannot_serve(configure, stored):
    for keys in ({"only_eval": False}, {}):
        with pytest.raises(UserError, match="was trained as coconut, but this run is cot"):
            reconcile(configure(cot=True, **keys), stored())
    with pytest.raises(UserError, match="was trained as cot, but this run is coconut"):
        reconcile(configure(), stored(cot=True))
