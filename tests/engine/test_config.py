"""config.py: what loads, what is refused with which words, and the shipped experiment files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import Config
from engine.config_file import dump_config, fields_help, load_config
from utils import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    path
    for folder in ("args", "cpu_args")
    for path in (ROOT / folder).glob("*.yaml")
    if not path.name.startswith("quickstart")
)
TRAINING_RUNS = [path for path in SHIPPED if not path.stem.endswith("_eval")]

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


def test_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(write(b"\xef\xbb\xbf" + PUBLISHED_COT.encode())).project == "coconut"


@pytest.mark.parametrize("value", ["stage", "epoch", "never"])
def test_reset_optimizer_takes_words_too(cot_file, value):
    assert load_config(cot_file, [f"reset_optimizer={value}"]).reset_optimizer == value


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
        ("name: [1\nlr: 2", "line 2: .*; mend the YAML there"),
        ("name: a\n\tlr: 2", "line 2: .*; mend the YAML there"),
        ("name: a\x01", "line 1: character .* is not allowed; mend the YAML there"),
        ("a: 1\n---\nb: 2", "line 2: but found another document; mend the YAML there"),
        ("# nothing", "is empty; write one `key: value` a line"),
        ("- a\n- b", "holds a sequence; write one `key: value` a line"),
        ("text", "holds a scalar; write one `key: value` a line"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused_with_its_line(write, text, problem):
    with pytest.raises(ConfigError, match=f"run.yaml: {problem}$"):
        load_config(write(text))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("lr: 2", "line 35: lr stands twice, first on line 33; keep one"),
        ("[a]: 2", "line 35: a sequence is no plain word for a key; write `key: value`"),
        ("num_workers: !!int x", "num_workers: line 35: cannot be read: .*; write a plain value"),
        ("deterministic: !!bool x", "deterministic: line 35: cannot be read: 'x'; write a plain"),
        ("compile: !!python/name:os.system", "compile: line 35: could not determine a constructor"),
    ],
)
def test_a_bad_line_is_named_by_its_number(write, line, problem):
    with pytest.raises(ConfigError, match=rf"^\S+run.yaml: {problem}[^\n]*$"):
        load_config(write(PUBLISHED_COT + line + "\n"))


# Refusals: single keys


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("lr=fast", "lr='fast' is not a number; write lr: 1.0e-4"),
        ("lr='1e-4'", "lr='1e-4' is not a number; write lr: 1.0e-4"),
        ("lr=true", "lr=True is not a number; write lr: 1.0e-4"),
        ("lr=0", "lr=0 is not above 0; write lr: 1.0e-4"),
        ("lr=1e999", "lr=inf is not a finite number; write lr: 1.0e-4"),
        ("lr=None", "lr=None is not a number; write lr: 1.0e-4"),
        ("weight_decay=-1", "weight_decay=-1 is below 0; write weight_decay: 0.01"),
        ("uniform_prob=1.5", "uniform_prob=1.5 is above 1; write uniform_prob: 0.0"),
        ("seed=4294967296", "seed=4294967296 is not below 4294967296; write seed: 0"),
        ("seed=true", "seed=True is not a whole number; write seed: 0"),
        ("cot=yes", "cot='yes' is not true or false; write cot: true or cot: false"),
        ("cot=1", "cot=1 is not true or false; write cot: true or cot: false"),
        ("name=7", "name=7 is not text; write 'name=\"7\"'"),
        ("name=", "name=None is not text; write name: gsm-coconut"),
        ("name=''", "name='' is empty; write name: gsm-coconut"),
        ('project="a\\0b"', "project='a\\x00b' holds a NUL character; write project: coconut"),
        ('project="\\ud800"', "project='\\ud800' is not valid Unicode; write project: coconut"),
        ("num_epochs=1000001", "num_epochs=1000001 is above 1000000; write num_epochs: 25"),
        ("max_latent_stage=1001", "max_latent_stage=1001 is above 1000; write max_latent_stage: 3"),
        ("name=" + "7" * 200, f"name={'7' * 38}...{'7' * 39} is not text; write 'name="),
        ("warmup_steps=-1", "warmup_steps=-1 is below 0; write warmup_steps: 0"),
        ("keep_checkpoints=0", "keep_checkpoints=0 is not above 0; write keep_checkpoints: null"),
        (
            "wandb=off",
            "wandb='off' is not one of its values; write wandb: online or offline or disabled",
        ),
        (
            "latent_weights=1.0",
            "latent_weights=1.0 is not a list of numbers; write latent_weights: [0.6, 0.3, 0.1]",
        ),
        (
            "latent_weights=[1, -1, 0]",
            "latent_weights[1]=-1 is below 0; write latent_weights: [0.6, 0.3, 0.1]",
        ),
        (
            "latent_weights=[1, 1e10, 0]",
            "latent_weights[1]=10000000000.0 is above 1000000000; write latent_weights: [0.6, 0.3",
        ),
        (
            "latent_weights=[1, 1e999, 0]",
            "latent_weights[1]=inf is not a finite number; write latent_weights: [0.6, 0.3, 0.1]",
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
def test_a_bad_value_is_answered_with_got_wanted_fix(cot_file, override, problem):
    (line,) = problems(cot_file, [override])
    assert line.startswith(f"command line: {problem}")


def test_the_last_of_an_override_given_twice_counts_and_is_logged(cot_file, caplog):
    with caplog.at_level("INFO"):
        config = load_config(cot_file, ["seed=1", "seed=2"])
    assert config.seed == 2
    assert "seed is given more than once; the last one, 2, counts" in caplog.text


@pytest.mark.parametrize("key", ["name", "save_path", "model_id", "val_path"])
def test_a_key_without_a_sensible_default_must_be_written(write, key):
    lines = [line for line in PUBLISHED_COT.splitlines() if not line.startswith(f"{key}:")]
    (problem,) = problems(write("\n".join(lines)))
    assert f"{key} is missing; add {key}: " in problem


@pytest.mark.parametrize(
    "key",
    [
        *("train_path", "num_epochs", "batch_size_training"),
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
        f"{cot_file}: line 36: name stands twice, first on line 5; keep one",
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
            "thought='pause' needs latent positions, and cot has none; write thought: continuous, "
            "or coconut: true and cot: false",
        ),
        (
            ["curriculum=false"],
            "curriculum=False is for coconut alone, not cot; write curriculum: true",
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
            "activation_checkpointing=True drops the cache that continuous thoughts are read from; "
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
def test_an_impossible_pair_is_refused_with_the_fix(cot_file, overrides, problem):
    assert problems(cot_file, overrides) == [f"command line: {problem}"]


@pytest.mark.parametrize("name", [".", "..", "../a", "a/b", "a\\b", "/a", "a\n", " a"])
def test_a_name_that_leaves_save_path_is_refused(cot_file, name):
    fields = load_config(cot_file).model_dump() | {"name": name}
    with pytest.raises(ValidationError, match="is not a plain folder name; write a name without"):
        Config(**fields)


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


def test_an_accumulation_that_would_be_overruled_is_refused():
    path = ROOT / "cpu_args/gsm_cot.yaml"
    (problem,) = problems(path, ["gradient_accumulation_steps=8"])
    assert "is overruled by effective_batch_size=64 in" in problem
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
    assert "num_epochs (required to train coconut, cot, no_thoughts, no_cot)" in text
    assert "latent_weights (default [0.6, 0.3, 0.1])" in text


def test_importing_config_loads_no_torch():
    heavy = "('torch', 'wandb', 'scipy')"
    code = f"import sys, engine.config; print(any(m in sys.modules for m in {heavy}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


texts = st.text(st.characters(exclude_categories=("C",)), min_size=1).filter(lambda t: t != "None")
yaml_look_alikes = st.sampled_from(
    [
        "1e-4",
        "01",
        "true",
        "off",
        "null",
        "~",
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
    path=texts | yaml_look_alikes,
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


# The shipped experiment files


def test_the_seven_experiments_are_shipped_twice():
    names = [
        *("gsm_coconut", "gsm_coconut_eval", "gsm_cot", "prontoqa_coconut"),
        *("prontoqa_coconut_eval", "prosqa_coconut", "prosqa_coconut_eval"),
    ]
    assert [path.stem for path in SHIPPED] == names * 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_loads(path):
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    processes = 4 if path.parent.name == "args" else 2
    command = f"--nproc_per_node {processes} run.py {path.parent.name}/{path.name}\n"
    assert command in text
    assert path.parent.name == "args" or "128" in text
    assert config.bf16 is False
    assert (config.lr, config.weight_decay) == (1e-4, 0.01)
    assert config.max_new_tokens == (64 if path.stem.startswith("gsm") else 128)
    assert config.latent_window_size == (1 if path.parent.name == "args" else 3)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_keeps_its_promise_of_the_effective_batch(path):
    config = load_config(path)
    paper = path.parent.name == "args"
    processes, effective = (4, 128) if paper else (2, 64)
    per_process = 32 if paper or path.stem.startswith("prosqa") else 8
    assert config.batch_size_training == per_process
    written = per_process * config.gradient_accumulation_steps * processes
    assert written == config.effective_batch_size == effective
    assert config.accumulation_steps(processes) == config.gradient_accumulation_steps
    for world_size in (1, 2):
        paper_batch = load_config(path, ["effective_batch_size=128"])
        assert paper_batch.accumulation_steps(world_size) * per_process * world_size == 128


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_has_the_schedule_of_the_paper(path):
    config = load_config(path)
    schedule = (
        config.method,
        config.c_thought,
        config.epochs_per_stage,
        config.max_latent_stage,
        config.num_epochs,
    )
    if path.stem == "gsm_cot":
        assert schedule == ("cot", 0, 1, 0, 25)
    elif path.stem.startswith("gsm"):
        assert schedule == ("coconut", 2, 3, 3, 25)
    else:
        assert schedule == ("coconut", 1, 5, 6, 50)


@pytest.mark.parametrize("folder", ["args", "cpu_args"])
def test_cot_coconut_and_evaluation_chain_without_edits(folder):
    cot = load_config(ROOT / folder / "gsm_cot.yaml")
    coconut = load_config(ROOT / folder / "gsm_coconut.yaml")
    assert Path(coconut.load_model_path) == cot.run_dir / f"checkpoint_{cot.num_epochs}"
    assert not cot.save_only_improve
    assert coconut.resume == coconut.epochs_per_stage
    for task in ("gsm", "prontoqa", "prosqa"):
        trained = load_config(ROOT / folder / f"{task}_coconut.yaml")
        evaluated = load_config(ROOT / folder / f"{task}_coconut_eval.yaml")
        last = trained.run_dir / f"checkpoint_{trained.num_epochs}"
        assert Path(evaluated.load_model_path) == last
        assert evaluated.resume == trained.num_epochs - 1
        assert evaluated.only_eval
        assert not trained.only_eval
        assert evaluated.val_path == trained.val_path.replace("valid", "test")
        kept = {"only_eval", "load_model_path", "val_path", "resume", "save_every_minutes"}
        same = set(Config.model_fields) - kept
        assert all(getattr(trained, key) == getattr(evaluated, key) for key in same)


def test_runs_of_one_folder_never_share_a_directory():
    folders = [load_config(path).run_dir for path in TRAINING_RUNS]
    assert len(set(folders)) == len(folders)


# Files that build on others


def write_chain(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder / "top.yaml"


def test_a_file_takes_from_its_base_what_it_does_not_hold(cot_file):
    top = write_chain(cot_file.parent, top="base: middle.yaml\nseed: 3\n",
                      middle=f"base: {cot_file.name}\nseed: 2\nlr: 0.5\n")  # fmt: skip
    assert load_config(top).model_dump() == load_config(cot_file, ["seed=3", "lr=0.5"]).model_dump()


@pytest.mark.parametrize(
    "files, words",
    [
        ({"top": "base: top.yaml"}, "top.yaml: base: leads back to this file"),
        ({"top": "base: two.yaml", "two": "base: top.yaml"}, "base: leads back to this file"),
        ({"top": "base: none.yaml"}, "none.yaml: No such file or directory"),
        ({"top": "base: [1]"}, "base=[1] is not text"),
    ],
)
def test_a_wrong_base_is_named(tmp_path, files, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(write_chain(tmp_path, **files))


def test_overrides_may_be_python_values(cot_file):
    values = {"name": 'a "b" # c', "lr": 0.5, "load_model_path": None}
    config = load_config(cot_file, values)
    assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize(
    "override, words",
    [
        ("latent_weights=mean", "'mean' is not a window"),
        ("latent_weights=exponential:0", "no positive number after the colon"),
        ("latent_weights=exponential:1e", "no positive number after the colon"),
        ("thought_norm=mean", "'mean' is not a norm"),
        ("thought_norm=0", "is not a norm"),
        ("coconut_class=Mine", "does not name a class"),
        ("eval_every_steps=0", "is not above 0"),
        ("max_train_records=0", "is not above 0"),
    ],
)
def test_wrong_windows_and_norms_are_named(cot_file, override, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(cot_file, ["cot=false", "coconut=true", override])


def test_first_stage_and_resume_exclude_each_other(cot_file):
    with pytest.raises(ConfigError, match="first_stage=1 means resume=1, and resume=1 is written"):
        load_config(cot_file, ["cot=false", "coconut=true", "first_stage=1", "resume=1"])


def test_an_open_number_of_epochs_is_for_methods_with_stages(cot_file):
    with pytest.raises(ConfigError, match="num_epochs=None is for coconut and no_thoughts"):
        load_config(cot_file, ["num_epochs=None"])
