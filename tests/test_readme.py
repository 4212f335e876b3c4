"""README's claims hold: its commands name what exists and load, its keys are the schema's."""

import re
from pathlib import Path

import pytest

from engine.config_file import fields_page, load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = re.findall(r"^torchrun .*?run\.py (\S+)", README, re.MULTILINE)
SCRIPTS = sorted(set(re.findall(r"(?:python|bash) (preprocessing/[\w.]+)", README)))


def test_the_page_of_keys_is_current():
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == fields_page()


@pytest.mark.parametrize("file", RUNS)
def test_readme_runs_load(file):
    load_config(ROOT / file)


def test_readme_names_every_row_of_the_papers_table():
    """Files are named DATA_ROW.yaml; README gives the data sets and the rows."""
    named = set(re.findall(r"`(\w+)`", README)) | {"coconut", "coconut_eval"}
    rows = {path.stem.partition("_")[2] for path in (ROOT / "args").glob("*.yaml")}
    assert rows <= named


def test_readme_is_short():
    assert README.count("\n") <= 220


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
    folders |= {"docs", "engine", "results", "scripts", "tests"}
    assert listed == {path.name for path in ROOT.glob("*.py")} | folders
