"""config.py and config_file.py: what loads, and what is refused with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import Config
from engine.config_file import (
    as_override,
    dump_config,
    fields_help,
    load_config,
    read_file,
    read_overrides,
)
from utils import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# A file of the layout and value spellings that the published repositories use.
PUBLISHED_COT = """\
# need 4 gpus

project: coconut
save_path: YOUR_PATH_TO_SAVE_THE_MODEL
name: gsm-cot

only_eval: False

coconut: False
cot: True
no_thoughts: False
no_cot: False

c_thought: 0
epochs_per_stage: 1
max_latent_stage: 0
pad_latent_to_max: True

save_only_improve: True
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: None
seed: 0
resume: 0
bf16: false
train_path: data/gsm_train.json
val_path: data/gsm_valid.json
reset_optimizer: False
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
"""
COCONUT = ["coconut=true", "cot=false", "c_thought=2", "epochs_per_stage=3", "max_latent_stage=3"]


@pytest.fixture
def cot_file(tmp_path):
    path = tmp_path / "gsm_cot.yaml"
    path.write_text(PUBLISHED_COT, encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path):
    def write_file(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def problems(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).split("\n")


# Reading


def test_published_file_loads_with_its_values(cot_file):
    config = load_config(cot_file)
    assert config.method == "cot"
    assert config.lr == 1e-4
    assert config.load_model_path is None
    assert config.reset_optimizer == "never"
    assert config.run_dir == Path("YOUR_PATH_TO_SAVE_THE_MODEL/gsm-cot")
    assert "latent_weights" not in config.model_fields_set
    assert config.latent_weights == (0.6, 0.3, 0.1)


def test_published_coconut_and_evaluation_settings_load(cot_file):
    config = load_config(cot_file, [*COCONUT, "resume=3", "reset_optimizer=True"])
    assert (config.method, config.reset_optimizer) == ("coconut", "stage")
    evaluation = [*COCONUT, "only_eval=True", "load_model_path=a/best.pt", "resume=40"]
    assert load_config(cot_file, evaluation).resume == 40


@pytest.mark.parametrize(
    "text", ["1e-4", "1.0e-4", "1E-4", "0.0001", ".0001", "+1e-4", '!!float "1e-4"']
)
def test_every_spelling_of_a_number_is_that_number(cot_file, text):
    assert load_config(cot_file, [f"lr={text}"]).lr == 1e-4


@pytest.mark.parametrize("text", ["None", "null", "~", "", '"None"', "'None'"])
def test_none_and_null_mean_none(cot_file, text):
    config = load_config(cot_file, [f"load_model_path={text}", f"effective_batch_size={text}"])
    assert config.load_model_path is None
    assert config.effective_batch_size is None


def test_plain_words_stay_text(cot_file):
    overrides = ["new_token_init=<<", "name=2024-01-01", "project=off"]
    config = load_config(cot_file, overrides)
    assert (config.new_token_init, config.name, config.project) == ("<<", "2024-01-01", "off")
    assert load_config(cot_file, ["new_token_init=="]).new_token_init == "="
    assert load_config(cot_file, ['name="7"']).name == "7"


def test_leading_zeros_are_decimal(cot_file):
    assert load_config(cot_file, ["seed=010"]).seed == 10


def test_a_float_takes_a_whole_number_and_an_int_takes_no_float(cot_file):
    assert load_config(cot_file, ["weight_decay=1"]).weight_decay == 1.0
    assert problems(cot_file, ["seed=2.0"]) == [
        "command line: seed=2.0 is not a whole number; write seed: 0"
    ]


def test_overrides_win_and_are_explicit(cot_file):
    config = load_config(cot_file, ["lr=5e-5", "latent_weights=[1, 0.5, 0]"])
    assert config.lr == 5e-5
    assert config.latent_weights == (1.0, 0.5, 0.0)
    assert {"lr", "latent_weights"} <= config.model_fields_set


def test_byte_order_mark_is_not_part_of_the_first_key(write):
    assert load_config(write(b"\xef\xbb\xbf" + PUBLISHED_COT.encode())).project == "coconut"


@pytest.mark.parametrize("value", ["stage", "epoch", "never"])
def test_reset_optimizer_takes_words_too(cot_file, value):
    assert load_config(cot_file, [f"reset_optimizer={value}"]).reset_optimizer == value


def test_values_from_python_need_no_text(cot_file):
    name = 'it\'s "#1": 7'
    overrides = {"name": name, "project": "None", "lr": 1e-5, "save_path": Path("a#b")}
    overrides |= {"latent_weights": [1, 0.5, 0.25], "load_model_path": None}
    config = load_config(cot_file, overrides)
    assert (config.name, config.project, config.save_path) == (name, "None", "a#b")
    assert (config.lr, config.latent_weights) == (1e-5, (1.0, 0.5, 0.25))
    assert problems(cot_file, {"lr": "1e-5", "sede": 1}) == [
        "overrides: lr='1e-5' is not a number; write lr: 1.0e-4",
        "overrides: unknown key 'sede'; did you mean seed?",
    ]


@pytest.mark.parametrize("value", ["a #b", "it's", '"', "", "1e-4", " a: b", "a\nb", "~", 7])
def test_a_value_written_as_an_override_is_read_back(value):
    assert read_overrides([as_override("name", value)]) == ({"name": value}, [])


def test_home_and_variables_are_expanded_in_every_path(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/big")
    text = PUBLISHED_COT.replace("YOUR_PATH_TO_SAVE_THE_MODEL", "~/exps")
    config = load_config(
        write(text.replace("data/gsm_train.json", "$DATA/train.json")),
        ["val_path=${DATA}/v$DATA.json", "model_id=~/m", "load_model_path=~/a$", 'name="~"'],
    )
    assert (config.save_path, config.train_path) == ("/home/me/exps", "/big/train.json")
    assert (config.val_path, config.model_id) == ("/big/v/big.json", "/home/me/m")
    assert (config.load_model_path, config.name) == ("/home/me/a$", "~")


# Base files


def write_chain(folder, **texts):
    """Files by stem; returns the first one's path."""
    for stem, text in texts.items():
        path = folder / f"{stem}.yaml"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    return folder / f"{next(iter(texts))}.yaml"


def test_a_file_is_its_differences_from_its_base(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "cot.yaml").write_text(PUBLISHED_COT)
    (tmp_path / "more/middle.yaml").write_text("base: ../cot.yaml\nseed: 1\nlr: 0.5\n")
    path = write_chain(tmp_path, top="base: more/middle.yaml\nname: top\nseed: 2\n")
    config = load_config(path, ["weight_decay=0"])
    assert (config.name, config.seed, config.lr, config.weight_decay) == ("top", 2, 0.5, 0.0)
    assert config.num_epochs == 25
    assert "base" not in dump_config(config)
    assert load_config(tmp_path / "more/middle.yaml").name == "gsm-cot"


def test_home_and_variables_are_expanded_in_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINE", str(tmp_path))
    path = write_chain(tmp_path, top="base: $MINE/a.yaml\nseed: 2\n", a="base: ~/cot.yaml\nlr: 0.5")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/cot.yaml").write_text(PUBLISHED_COT)
    config = load_config(path)
    assert (config.seed, config.lr, config.num_epochs) == (2, 0.5, 25)


def test_a_problem_names_the_file_that_holds_the_key(tmp_path):
    base = PUBLISHED_COT.replace("seed: 0", "seed: x") + "sede: 1\n"
    path = write_chain(tmp_path, top="base: cot.yaml\nlr: fast\nc_thought: 0\n", cot=base)
    cot = tmp_path / "cot.yaml"
    assert problems(path, ["coconut=true", "cot=false", "lrr=2"]) == [
        f"{cot}: seed='x' is not a whole number; write seed: 0",
        f"{path}: lr='fast' is not a number; write lr: 1.0e-4",
        f"{cot}: unknown key 'sede'; did you mean seed?",
        "command line: unknown key 'lrr'; did you mean lr?",
        "command line: c_thought=0 leaves coconut without thoughts; write c_thought: 1 or more, or "
        "choose no_thoughts",
    ]
    path.write_text("base: cot.yaml\nresume: 30\n")
    cot.write_text(PUBLISHED_COT)
    assert [line.split(":")[0] for line in problems(path)] == [str(path)]


def test_a_wrong_base_is_named(tmp_path):
    path = write_chain(tmp_path, a="base: b.yaml", b="base: c.yaml", c="base: ./a.yaml\nlr: 1")
    assert problems(path) == [
        f"{tmp_path}/c.yaml: base='./a.yaml' leads back to {path}; remove one of the bases"
    ]
    write_chain(tmp_path, a="base: a.yaml")
    assert problems(path) == [
        f"{path}: base='a.yaml' leads back to {path}; remove one of the bases"
    ]
    write_chain(tmp_path, a="base: none.yaml")
    assert problems(path) == [
        f"{path}: base='none.yaml' is not a file; write its path relative to {path}"
    ]
    write_chain(tmp_path, a="base: $NO_SUCH/b.yaml")
    assert problems(path)[0] == (
        f"{path}: base='$NO_SUCH/b.yaml' uses $NO_SUCH, which is not set; export NO_SUCH or write"
        " the path out"
    )
    write_chain(tmp_path, a="base: [b.yaml]\n" + PUBLISHED_COT)
    assert problems(path) == [f"{path}: base=['b.yaml'] is not text; write base: other.yaml"]
    write_chain(tmp_path, a="base: b.yaml", b="- 1")
    assert problems(path) == [f"{tmp_path}/b.yaml: holds a sequence; write one `key: value` a line"]


# Refusals: files


def test_missing_file_is_named(tmp_path):
    (problem,) = problems(tmp_path / "none.yaml")
    assert problem.endswith(
        "none.yaml: No such file or directory; name a YAML file such as args/gsm_coconut.yaml"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"name: \xff", "byte 6 is not UTF-8; save it as UTF-8"),
        ("name: [1\nlr: 2", "line 2: .*; fix the YAML"),
        ("name: a\n\tlr: 2", "line 2: .*; fix the YAML"),
        ("name: a\x01", "line 1: character .* is not allowed; fix the YAML"),
        ("a: 1\n---\nb: 2", "line 2: but found another document; fix the YAML"),
        ("# nothing", "is empty; write one `key: value` a line"),
        ("- a\n- b", "holds a sequence; write one `key: value` a line"),
        ("text", "holds a scalar; write one `key: value` a line"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused_with_its_line(write, text, problem):
    with pytest.raises(ConfigError, match=f"run.yaml: {problem}$"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("lr: 2", "duplicate key: lr on lines 33 and 35; keep one"),
        ("[a]: 2", "line 35: key a sequence is not a plain word; fix the YAML"),
        ("num_workers: !!int x", "num_workers: line 35: cannot be read: .*; write a plain value"),
        ("deterministic: !!bool x", "deterministic: line 35: cannot be read: 'x'; write a plain"),
        ("compile: !!python/name:os.system", "compile: line 35: could not determine a constructor"),
    ],
)
def test_a_bad_line_is_named_by_its_number(write, line, problem):
    with pytest.raises(ConfigError, match=rf"^\S+run.yaml: {problem}[^\n]*$"):
        load_config(write(PUBLISHED_COT + line + "\n"))


def test_duplicate_keys_are_refused_below_the_first_level_too(write):
    values, refusals = read_file(str(path := write("arms:\n  m1: {a: 1}\n  m1: {b: 1}\nb: 2\n")))
    assert values["b"] == 2
    assert refusals == [f"{path}: arms: line 3: duplicate key: m1; write a plain value"]


# Refusals: single keys


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lr=fast", "lr='fast' is not a number; write lr: 1.0e-4"),
        ("lr='1e-4'", "lr='1e-4' is not a number; write lr: 1.0e-4"),
        ("lr=true", "lr=True is not a number; write lr: 1.0e-4"),
        ("lr=0", "lr=0 should be greater than 0; write lr: 1.0e-4"),
        ("lr=1e999", "lr=inf should be a finite number; write lr: 1.0e-4"),
        ("lr=None", "lr=None is not a number; write lr: 1.0e-4"),
        (
            "weight_decay=-1",
            "weight_decay=-1 should be greater than or equal to 0; write weight_decay: 0.01",
        ),
        (
            "uniform_prob=1.5",
            "uniform_prob=1.5 should be less than or equal to 1; write uni",
        ),
        ("seed=4294967296", "seed=4294967296 should be less than 4294967296; write seed: 0"),
        ("seed=true", "seed=True is not a whole number; write seed: 0"),
        ("cot=yes", "cot='yes' is not true or false; write cot: true or false"),
        ("cot=1", "cot=1 is not true or false; write cot: true or false"),
        ("name=7", "name=7 is not text; write 'name=\"7\"'"),
        ("name=", "name=None is not text; write name: gsm-coconut"),
        ("name=''", "name='' should have at least 1 character; write name: gsm-coconut"),
        ('project="a\\0b"', "project='a\\x00b' should match pattern"),
        ('project="\\ud800"', "project='\\ud800' is not text"),
        (
            "num_epochs=1000001",
            "num_epochs=1000001 should be less than or equal to 1000000; write num",
        ),
        (
            "max_latent_stage=1001",
            "max_latent_stage=1001 should be less than or equal to 1000",
        ),
        (
            "name=" + "7" * 200,
            f"name={'7' * 38}...{'7' * 39} is not text; write 'name=",
        ),
        (
            "warmup_steps=-1",
            "warmup_steps=-1 should be greater than or equal to 0; write warmup_steps: 0",
        ),
        (
            "keep_checkpoints=0",
            "keep_checkpoints=0 should be greater than 0; write keep_checkpoints: null",
        ),
        (
            "wandb=off",
            "wandb='off' should be 'online', 'offline' or 'disabled'; write wandb: online",
        ),
        (
            "latent_weights=1.0",
            "latent_weights=1.0 is not a list of numbers, uniform, learned or exponential:R with R "
            "above 0; write "
            "latent_weights: [0.6, 0.3, 0.1]",
        ),
        *(
            (
                f"latent_weights={name}",
                f"latent_weights={name!r} is not a list of numbers, uniform, learned or "
                "exponential:R with R above 0; write latent_weights: [0.6, 0.3, 0.1]",
            )
            for name in (
                "even",
                "exponential",
                "exponential:0",
                "exponential:-1",
                "exponential:inf",
                "exponential:nan",
                "exponential:x",
                "linear:1",
            )
        ),
        ("thought_norm=0", "thought_norm=0 should be greater than 0; write thought_norm: null"),
        (
            "thought_norm=true",
            "thought_norm=True is not a number; write thought_norm: null",
        ),
        (
            "thought_norm=mean",
            "thought_norm='mean' should be 'average'; write thought_norm: null",
        ),
        (
            "thought=pauses",
            "thought='pauses' should be 'continuous', 'pause' or 'pause_multipass'; wr",
        ),
        (
            "coconut_class=mine",
            "coconut_class='mine' is not module:Class; write coconut_class: mymod",
        ),
        (
            "coconut_class=a.b:1",
            "coconut_class='a.b:1' is not module:Class; write coconut_class: my",
        ),
        (
            "first_stage=-1",
            "first_stage=-1 should be greater than or equal to 0; write first_stage: null",
        ),
        (
            "eval_every_steps=0",
            "eval_every_steps=0 should be greater than 0; write eval_every_steps: null",
        ),
        (
            "max_train_records=0",
            "max_train_records=0 should be greater than 0; write max_train_records: null",
        ),
        ("base=a.yaml", "base is for files only; name the file that is based on another"),
        (
            "save_path=~no-such-user/a",
            "save_path='~no-such-user/a' starts with ~, but names no user; write the",
        ),
        (
            "val_path=$NO_SUCH/a",
            "val_path='$NO_SUCH/a' uses $NO_SUCH, which is not set; export NO_SUCH or",
        ),
        (
            "train_path=${NO_SUCH}",
            "train_path='${NO_SUCH}' uses $NO_SUCH, which is not set; export",
        ),
        (
            "latent_weights=[1, -1, 0]",
            "latent_weights[1]=-1 should be greater than or equal to 0; write latent_weights: [0.",
        ),
        (
            "latent_weights=[1, 1e10, 0]",
            "latent_weights[1]=10000000000.0 should be less than or equal to 1000000000",
        ),
        (
            "latent_weights=[1, 1e999, 0]",
            "latent_weights[1]=inf should be a finite number; write latent_weights: [0.6, 0.3, ",
        ),
        ("lrr=1", "unknown key 'lrr'; did you mean lr?"),
        ("--num-epochs=1", "unknown key '--num-epochs'; did you mean num_epochs?"),
        ("qqq=1", "unknown key 'qqq'; python run.py --help lists the keys"),
        ("fp16=true", "fp16 is refused, its range is too small to train in; write bf16: true or"),
        ("lr", "'lr' is not key=value; write lr=VALUE"),
        ("name=[", "'name=[': line 1: expected the node content, but found '<stream end>'; quote"),
        ("seed=!!int x", "'seed=!!int x': line 1: cannot be read: invalid literal for int()"),
    ],
)
def test_a_bad_value_is_refused_with_got_wanted_and_fix(cot_file, override, problem):
    (line,) = problems(cot_file, [override])
    assert line.startswith(f"command line: {problem}")


def test_the_last_of_two_overrides_wins_and_is_logged(cot_file, caplog):
    caplog.set_level("INFO", "coconut")
    assert load_config(cot_file, ["lr=1", "seed=1", "lr=2"]).lr == 2.0
    assert caplog.messages == [
        "command line: 'lr=2': lr is given more than once; this value counts"
    ]


@pytest.mark.parametrize("key", ["name", "save_path", "val_path"])
def test_a_key_without_a_sensible_default_must_be_written(write, key):
    lines = [line for line in PUBLISHED_COT.splitlines() if not line.startswith(f"{key}:")]
    (problem,) = problems(write("\n".join(lines)))
    assert f"{key} is missing; add {key}: " in problem


@pytest.mark.parametrize(
    "key",
    [
        *("model_id", "train_path", "num_epochs", "batch_size_training"),
        *("c_thought", "epochs_per_stage", "max_latent_stage"),
    ],
)
def test_training_keys_must_be_written_to_train_and_not_to_evaluate(write, key):
    text = PUBLISHED_COT.replace("cot: True", "cot: False").replace(
        "coconut: False", "coconut: True"
    )
    text = text.replace("c_thought: 0", "c_thought: 1")
    path = write("\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:")))
    (problem,) = problems(path)
    assert f"{key} is missing; training needs it: add {key}: " in problem
    load_config(path, ["only_eval=true", "load_model_path=a"])


def test_all_problems_come_at_once_each_with_its_source(cot_file):
    cot_file.write_text(PUBLISHED_COT.replace("seed: 0", "seed: x") + "sede: 1\nname: b\n")
    assert problems(cot_file, ["lr=fast", "coconut=true"]) == [
        f"{cot_file}: duplicate key: name on lines 5 and 36; keep one",
        f"{cot_file}: seed='x' is not a whole number; write seed: 0",
        "command line: lr='fast' is not a number; write lr: 1.0e-4",
        f"{cot_file}: unknown key 'sede'; did you mean seed?",
        "command line: coconut and cot are true, only one may be; for coconut set cot: false, "
        "for cot set coconut: false",
        "command line: c_thought=0 leaves coconut without thoughts; write c_thought: 1 or more, "
        "or choose no_thoughts",
    ]


# Refusals: combinations


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["cot=false"],
            "no method is chosen; set one of coconut, cot, no_thoughts, no_cot to true",
        ),
        (
            ["no_cot=true", "no_thoughts=true"],
            "cot and no_thoughts and no_cot are true, only one may be; for cot set no_thoughts: "
            "false and no_cot: false, for no_thoughts set cot: false and no_cot: false, "
            "for no_cot set cot: false and no_thoughts: false",
        ),
        (
            ["uniform_prob=0.1"],
            "uniform_prob=0.1 mixes stages, and cot has only one; write uniform_prob: 0.0",
        ),
        (
            ["uniform_prob=0.1", "cot=false", "no_cot=true"],
            "uniform_prob=0.1 mixes stages, and no_cot has only one; write uniform_prob: 0.0",
        ),
        (
            ["thought=pause"],
            "thought='pause' is for coconut only, not cot; write thought: continuous",
        ),
        (
            ["thought_norm=average"],
            "thought_norm='average' is for coconut only, not cot; write thought_norm: null",
        ),
        (
            ["coconut_class=a:B"],
            "coconut_class='a:B' is for coconut only, not cot; write coconut_class: null",
        ),
        (
            ["curriculum=false"],
            "curriculum=False is for coconut only, not cot; write curriculum: true",
        ),
        (
            [*COCONUT, "thought=pause", "thought_norm=2"],
            "thought_norm=2 has no effect, because thought='pause' reads no hidden states; write "
            "thought: continuous, or leave thought_norm out",
        ),
        (
            [*COCONUT, "thought=pause_multipass", "latent_weights=learned"],
            "latent_weights='learned' has no effect, because thought='pause_multipass' reads no "
            "hidden states; write thought: continuous, or leave latent_weights out",
        ),
        (
            ["latent_weights=exponential:100", "latent_window_size=6"],
            "latent_weights='exponential:100' gives the last of 6 states a weight above 1e+09; "
            "write a smaller ratio",
        ),
        (
            ["num_epochs=null"],
            "num_epochs is missing; training needs it: add num_epochs: 25",
        ),
        (
            ["first_stage=1"],
            "first_stage=1 needs stages, and cot has only one; write first_stage: null",
        ),
        (
            [*COCONUT, "first_stage=1", "curriculum=false"],
            "first_stage=1 needs stages, and curriculum=False has only one; write first_stage: "
            "null",
        ),
        (
            [*COCONUT, "first_stage=5"],
            "first_stage=5 is past the last stage, max_latent_stage + 1 = 4; write a smaller one",
        ),
        (
            [*COCONUT, "first_stage=2", "num_epochs=6"],
            "first_stage=2 leaves none of num_epochs=6 to train; write num_epochs: 7 or more, or a "
            "smaller first_stage",
        ),
        (
            ["coconut=true", "cot=false"],
            "c_thought=0 leaves coconut without thoughts; write c_thought: 1 or more, or choose "
            "no_thoughts",
        ),
        (
            ["coconut=true", "cot=false", "curriculum=false", "c_thought=1"],
            "max_latent_stage=0 with curriculum=False leaves no thoughts; write "
            "max_latent_stage: 1 or more",
        ),
        (
            ["coconut=true", "cot=false", "c_thought=1", "activation_checkpointing=true"],
            "activation_checkpointing=True drops the cache that thought='continuous' reads; "
            "write activation_checkpointing: false (a smaller batch_size_training saves memory)",
        ),
        (
            ["latent_window_size=4"],
            "latent_weights=[0.6, 0.3, 0.1] has 3 of the 4 weights that latent_window_size=4 asks "
            "for; write 4 weights, nearest state first",
        ),
        (
            ["latent_weights=[0, 0, 1]"],
            "latent_weights=[0, 0, 1] gives the nearest state no weight, so a window of one "
            "state would be empty; write a first weight above 0",
        ),
        (
            ["latent_weights=[1e-10, 0, 1]"],
            "latent_weights=[1e-10, 0, 1] gives the nearest state no weight, so a window of one "
            "state would be empty; write a first weight above 0",
        ),
        (
            ["only_eval=true"],
            "only_eval=True needs weights; write load_model_path: exps/gsm-cot/checkpoint_25",
        ),
        (
            ["from_scratch=true", "load_model_path=a"],
            "from_scratch=True excludes load_model_path='a'; write from_scratch: false or "
            "load_model_path: None",
        ),
        (
            ["resume=25"],
            "resume=25 leaves none of num_epochs=25 to train; write num_epochs: 26 or more, or a "
            "smaller resume",
        ),
        (
            ["effective_batch_size=48"],
            "effective_batch_size=48 is not a multiple of batch_size_training=32; write "
            "effective_batch_size: 64 or change batch_size_training",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_fix(cot_file, overrides, problem):
    assert problems(cot_file, overrides) == [f"command line: {problem}"]


@pytest.mark.parametrize("name", [".", "..", "../a", "a/b", "a\\b", "/a", "a\n", " a"])
def test_a_name_that_leaves_save_path_is_refused(cot_file, name):
    fields = load_config(cot_file).model_dump() | {"name": name}
    with pytest.raises(ValidationError, match="is not a plain folder name; write a name without"):
        Config(**fields)


def test_first_stage_and_resume_exclude_each_other(cot_file):
    (problem,) = problems(cot_file, [*COCONUT, "first_stage=1", "resume=3"])
    assert problem == (
        "command line: first_stage=1 and resume=3 both name the first epoch; write resume: 0 or "
        "first_stage: null"
    )


def test_first_stage_means_the_epoch_in_which_it_begins(cot_file):
    config = load_config(cot_file, [*COCONUT, "first_stage=2"])
    assert (config.resume, config.first_stage) == (6, None)
    assert "resume" in config.model_fields_set
    cot_file.write_text(dump_config(config))
    assert load_config(cot_file) == config


def test_the_number_of_epochs_may_follow_from_the_data_where_there_are_stages(cot_file):
    assert load_config(cot_file, [*COCONUT, "num_epochs=None"]).num_epochs is None
    no_thoughts = ["cot=false", "no_thoughts=true", "num_epochs=null", "resume=40"]
    assert load_config(cot_file, no_thoughts).num_epochs is None


@pytest.mark.parametrize("name", ["uniform", "learned", "exponential:0.3", "exponential:2"])
def test_weights_may_be_named(cot_file, name):
    config = load_config(cot_file, [*COCONUT, f"latent_weights={name}", "latent_window_size=5"])
    assert config.latent_weights == name


def test_controls_of_the_thought_load(cot_file):
    controls = ["thought_norm=average", "coconut_class=my.module:Mine", "thought=continuous"]
    config = load_config(cot_file, [*COCONUT, *controls])
    assert (config.thought_norm, config.coconut_class) == ("average", "my.module:Mine")
    assert load_config(cot_file, [*COCONUT, "thought_norm=2"]).thought_norm == 2.0
    assert load_config(cot_file, [*COCONUT, "thought=pause_multipass"]).thought == "pause_multipass"


def test_an_evaluation_may_leave_method_and_model_to_the_checkpoint(write):
    lines = ["name: a", "save_path: exps", "val_path: v", "only_eval: true", "load_model_path: c"]
    config = load_config(write("\n".join(lines)))
    assert (config.method, config.model_id) == (None, None)
    write(dump_config(config))
    assert load_config(write(dump_config(config))) == config


def test_longer_weights_than_the_window_are_fine(cot_file):
    assert load_config(cot_file, ["latent_window_size=1"]).latent_weights == (0.6, 0.3, 0.1)


def test_pause_and_no_curriculum_belong_to_coconut(cot_file):
    config = load_config(cot_file, [*COCONUT, "thought=pause", "curriculum=false"])
    assert (config.thought, config.curriculum) == ("pause", False)


# The effective batch


def test_effective_batch_size_sets_the_accumulation(cot_file):
    config = load_config(cot_file, ["effective_batch_size=128"])
    assert [config.accumulation_steps(world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        ConfigError,
        match="effective_batch_size=128 is not a multiple of batch_size_training=32 x 3 processes; "
        "write effective_batch_size: 192 or change batch_size_training",
    ):
        config.accumulation_steps(3)


def test_without_an_effective_batch_size_the_accumulation_is_as_written(cot_file):
    config = load_config(cot_file, ["gradient_accumulation_steps=5"])
    assert config.accumulation_steps(1) == config.accumulation_steps(3) == 5


def test_an_accumulation_that_would_be_overridden_is_refused():
    path = ROOT / "cpu_args/gsm_cot.yaml"
    (problem,) = problems(path, ["gradient_accumulation_steps=8"])
    assert f"is overridden by effective_batch_size=64 in {path};" in problem
    alone = load_config(path, ["gradient_accumulation_steps=8", "effective_batch_size=None"])
    assert alone.accumulation_steps(2) == 8


# The schema and its dump


def test_config_is_frozen(cot_file):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(cot_file).lr = 1.0


def test_every_key_is_explained():
    text = fields_help()
    for key, field in Config.model_fields.items():
        assert field.description, key
        assert f"{key} (" in text
    assert "num_epochs (required to train)" in text
    assert "c_thought (required to train coconut)" in text
    assert "latent_weights (default [0.6, 0.3, 0.1])" in text


def test_importing_config_loads_no_torch():
    heavy = "('torch', 'wandb', 'scipy')"
    code = f"import sys, engine.config; print(any(m in sys.modules for m in {heavy}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


texts = st.text(st.characters(exclude_categories=("C",)), min_size=1).filter(lambda t: t != "None")
paths = texts.filter(lambda text: text[0] != "~" and "$" not in text)
yaml_look_alikes = st.sampled_from(
    [
        "1e-4",
        "01",
        "true",
        "off",
        "null",
        "<<",
        "=",
        "- a",
        "a: b",
        "#",
        "*a",
        "&a",
        "!!x",
        "'",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    project=texts | yaml_look_alikes,
    path=paths | yaml_look_alikes,
    token=texts | yaml_look_alikes,
    lr=st.floats(1e-300, 1e300),
    weights=st.lists(st.floats(1e-9, 1e9), min_size=3, max_size=6),
    reset=st.sampled_from(["stage", "epoch", "never"]),
    minutes=st.none() | st.floats(1e-3, 1e6),
)
def test_a_dump_loads_back_equal(
    tmp_path_factory, project, path, token, lr, weights, reset, minutes
):
    config = Config(
        project=project,
        name="run",
        save_path=path,
        coconut=True,
        c_thought=1,
        epochs_per_stage=1,
        max_latent_stage=1,
        model_id="gpt2",
        new_token_init=token,
        train_path=path,
        val_path=path,
        num_epochs=1,
        batch_size_training=1,
        lr=lr,
        latent_weights=weights,
        reset_optimizer=reset,
        save_every_minutes=minutes,
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize("weights", [[], ["latent_weights=learned"]])
def test_a_dump_lists_every_key_in_schema_order(cot_file, weights):
    lines = dump_config(load_config(cot_file, weights)).splitlines()
    assert [line.partition(":")[0] for line in lines] == list(Config.model_fields)
