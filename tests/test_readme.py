"""README's commands name files that exist and load; the pages made from code are current."""

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
def test_the_configs_of_readmes_runs_load(file):
    load_config(ROOT / file)


def test_readme_runs_every_file_of_args():
    named = set(re.findall(r"\b\w+\.yaml\b", README))
    assert {path.name for path in (ROOT / "args").glob("*.yaml")} <= named


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_of_readme_exist(script):
    assert (ROOT / script).is_file()


def test_the_links_and_images_of_readme_exist():
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readmes_file_tree_lists_every_module_and_folder():
    tree = README.split("## Files")[1].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.strip().splitlines()[1:]}
    folders = {"args", "cpu_args", "preprocessing", "analysis", "benchmarks", "assets", "data"}
    folders |= {"docs", "engine", "scripts", "tests"}
    assert listed == {path.name for path in ROOT.glob("*.py")} | folders
