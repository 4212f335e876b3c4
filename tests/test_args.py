"""args/ and cpu_args/: every file loads, says how it is run, and is the experiment it should be."""

import re
from pathlib import Path

import pytest

from engine.config import Config
from engine.config_file import load_config

ROOT = Path(__file__).parents[1]
TASKS = ("gsm", "prontoqa", "prosqa")
ROWS = ("cot", "no_cot", "pause", "coconut", "no_curriculum", "no_thoughts", "pause_as_thought")
PAPER = sorted(ROOT.glob("args/*.yaml"))
CONTEXTUAL = [path for path in sorted(ROOT.glob("cpu_args/*.yaml")) if "quick" not in path.name]
SHIPPED = PAPER + CONTEXTUAL
TRAINING = [path for path in SHIPPED if not path.stem.endswith("_eval")]


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def load(name):
    return load_config(ROOT / f"{name}.yaml")


def differences(name, other):
    """The keys, without the run's name, in which two files resolve to different values."""
    one, two = load(name).model_dump(), load(other).model_dump()
    return {key: value for key, value in one.items() if value != two[key] and key != "name"}


def test_every_row_of_the_papers_table_and_the_contextual_reproduction_are_files():
    rows = {f"{task}_{row}" for task in TASKS for row in ROWS}
    evaluations = {f"{task}_coconut_eval" for task in TASKS}
    assert {path.stem for path in PAPER} == rows | evaluations
    trained = {"gsm_cot", *(f"{task}_coconut" for task in TASKS)}
    assert {path.stem for path in CONTEXTUAL} == trained | evaluations


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_a_file_says_how_it_is_run_and_holds_little(path):
    text = path.read_text(encoding="utf-8")
    processes = 4 if path.parent.name == "args" else 2
    assert f"--nproc_per_node {processes} run.py {name_of(path)}.yaml\n" in text
    assert "128" in text or path.parent.name == "args"
    assert len(re.findall(r"^\w", text, re.MULTILINE)) <= 25


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_the_rates_and_the_effective_batch_are_the_papers(path):
    config = load_config(path)
    is_paper = path.parent.name == "args"
    assert (config.lr, config.weight_decay, config.bf16) == (1e-4, 0.01, False)
    assert config.max_new_tokens == (64 if path.stem.startswith("gsm") else 128)
    if config.coconut:
        assert config.latent_window_size == (1 if is_paper else 3)
    processes, effective = (4, 128) if is_paper else (2, 64)
    rows = 32 if is_paper else 16 if path.stem.startswith("prosqa") else 8
    assert config.batch_size_training == rows
    assert rows * config.gradient_accumulation_steps * processes == effective
    assert config.effective_batch_size == effective
    for world_size in (1, 2):
        papers = load_config(path, ["effective_batch_size=128"])
        assert papers.accumulation_steps(world_size) * rows * world_size == 128


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_the_schedule_is_the_papers(path):
    config = load_config(path)
    is_gsm = path.stem.startswith("gsm")
    assert config.num_epochs == (25 if is_gsm else 50)
    if config.coconut or config.no_thoughts:
        stages = (config.c_thought, config.epochs_per_stage, config.max_latent_stage)
        assert stages == ((2, 3, 3) if is_gsm else (1, 5, 6))


@pytest.mark.parametrize("task", TASKS)
def test_a_row_differs_from_coconut_in_what_the_paper_changes(task):
    start = {"load_model_path": None, "resume": 0} if task == "gsm" else {}
    changes = {
        "pause": {"thought": "pause", "curriculum": False} | start,
        "no_curriculum": {"curriculum": False} | start,
        "no_thoughts": {"coconut": False, "no_thoughts": True},
        "pause_as_thought": {"thought": "pause"},
    }
    for row, changed in changes.items():
        assert differences(f"args/{task}_{row}", f"args/{task}_coconut") == changed
    cot = {"coconut": False, "cot": True}
    if task != "gsm":
        assert differences(f"args/{task}_cot", f"args/{task}_coconut") == cot
    no_cot = {"cot": False, "no_cot": True}
    assert differences(f"args/{task}_no_cot", f"args/{task}_cot") == no_cot


@pytest.mark.parametrize("row", ["cot", "no_cot", "pause", "no_curriculum"])
def test_on_gsm8k_a_row_without_stages_starts_from_gpt2_at_epoch_0(row):
    config = load(f"args/gsm_{row}")
    assert (config.model_id, config.load_model_path) == ("openai-community/gpt2", None)
    assert config.resume == 0


@pytest.mark.parametrize("folder", ["args", "cpu_args"])
def test_cot_coconut_and_evaluation_chain_without_edits(folder):
    cot, coconut = load(f"{folder}/gsm_cot"), load(f"{folder}/gsm_coconut")
    assert Path(coconut.load_model_path) == cot.run_dir / f"checkpoint_{cot.num_epochs}"
    assert not cot.save_only_improve
    assert coconut.resume == coconut.epochs_per_stage
    for task in TASKS:
        trained, evaluated = (load(f"{folder}/{task}_coconut{end}") for end in ("", "_eval"))
        last = trained.run_dir / f"checkpoint_{trained.num_epochs}"
        assert Path(evaluated.load_model_path) == last
        assert evaluated.run_dir == trained.run_dir
        assert evaluated.val_path == trained.val_path.replace("valid", "test")
        assert evaluated.max_new_tokens == trained.max_new_tokens
        assert evaluated.batch_size_eval == trained.batch_size_training


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_leaves_everything_to_the_checkpoint(task):
    written = load(f"args/{task}_coconut_eval").model_fields_set
    own = {"project", "name", "save_path", "only_eval", "load_model_path", "val_path"}
    assert written == own | {"batch_size_eval", "max_new_tokens"}


def test_runs_never_share_a_directory():
    folders = [load_config(path).run_dir for path in TRAINING]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_a_run_is_named_after_its_file(path):
    assert load_config(path).name == path.stem.replace("_", "-")


@pytest.mark.parametrize("path", sorted(ROOT.glob("*args/**/*.yaml")), ids=name_of)
def test_comments_point_to_files_that_exist(path):
    named = re.findall(r"\b((?:cpu_)?args/[\w/]+\.(?:yaml|sbatch))", path.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_quickstart_is_short_too():
    for name in ("cot", "coconut", "no_cot"):
        text = (ROOT / f"cpu_args/quickstart_{name}.yaml").read_text(encoding="utf-8")
        assert len(re.findall(r"^\w", text, re.MULTILINE)) <= 25
        assert load(f"cpu_args/quickstart_{name}").model_fields_set < set(Config.model_fields)
