"""README keeps its word: its commands name what exists and load, its keys are the schema's."""

import re
import shlex
from pathlib import Path

import pytest

from engine.config_file import fields_page, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = re.findall(r"^torchrun .*?run\.py (\S+)", README, re.MULTILINE)
SCRIPTS = sorted(set(re.findall(r"(?:python|bash) (preprocessing/[\w.]+)", README)))
TABLE_1 = re.findall(r"^\| [^|]+ \| `([^`]+name=[^`]+)` \|$", README, re.MULTILINE)


def test_the_page_of_keys_is_current():
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == fields_page()


@pytest.mark.parametrize("file", RUNS)
def test_readme_runs_load(file):
    load_config(ROOT / file)


def test_readme_names_every_paper_experiment():
    assert sorted(RUNS) == sorted(f"args/{path.name}" for path in (ROOT / "args").glob("*.yaml"))


@pytest.mark.parametrize("overrides", TABLE_1)
def test_rows_of_the_papers_table_are_overrides_that_load(overrides):
    config = load_config(ROOT / "args/prosqa_coconut.yaml", shlex.split(overrides))
    assert config.name != "prosqa-coconut"


def test_readme_gives_overrides_for_every_row_but_coconut():
    assert len(TABLE_1) == 6


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_scripts_exist(script):
    assert (ROOT / script).is_file()


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_file_tree_lists_every_module_and_folder():
    tree = README.split("## Files")[1].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()[1:]}
    folders = {"args", "cpu_args", "preprocessing", "analysis", "benchmarks", "assets", "data"}
    folders |= {"docs", "engine", "scripts", "tests"}
    assert listed == {path.name for path in ROOT.glob("*.py")} | folders
