"""The house rules of imports, owners and sizes, read from the source with `ast`.

A room's line in MAY_IMPORT is the law; a new room needs a line there.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = sorted(path.stem for path in ROOT.glob("*.py"))
FOLDERS = ("analysis", "assets", "benchmarks", "preprocessing")
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
)

MAY_IMPORT = {
    "strict_yaml": set(),
    "config": {"strict_yaml"},
    "curriculum": set(),
    "metrics": set(),
    "passes": set(),
    "coconut": {"passes"},
    "utils": set(),
    "distributed": {"utils"},
    "tracking": {"utils"},
    "dataset": {"curriculum", "utils"},
    "settings": {"config", "utils"},
    "sources": {"settings", "utils"},
    "backbone": {"config", "coconut", "settings", "sources", "utils"},
    "checkpoint": {"distributed", "utils"},
    "evaluation": {"coconut", "curriculum", "dataset", "metrics", "distributed", "utils"},
    "progress": {"checkpoint", "config", "dataset", "distributed", "settings", "tracking", "utils"},
    "preparation": set(ROOMS) - {"evaluation", "preparation", "run", "tracking", "training"},
    "training": set(ROOMS) - {"preparation", "run", "training"},
    "run": set(ROOMS) - {"run"},
}

# package -> the rooms (or folders) that alone may import it
OWNERS = {
    "yaml": {"strict_yaml"},
    "wandb": {"tracking"},
    "datasets": {"dataset"},
    "matplotlib": {"analysis", "assets", "benchmarks", "preprocessing"},
    "torch.distributed": {"distributed", "checkpoint"},
    "torch.nn.parallel": {"distributed", "checkpoint"},
}

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60


def text_of(source):
    return (ROOT / source).read_text(encoding="utf-8")


@cache
def parse(source):
    return ast.parse(text_of(source))


def opening(source):
    return ast.get_docstring(parse(source))


def imported(source):
    """Dotted names that a file imports, anywhere in it; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(source):
    return {name.split(".")[0] for name in imported(source)}


def mentions(source):
    """Dotted attribute chains that a file spells out, such as torch.distributed.barrier."""
    return {
        ast.unparse(node) for node in ast.walk(parse(source)) if isinstance(node, ast.Attribute)
    }


def room_of(source):
    return source.stem if len(source.parts) == 1 else source.parts[0]


def belongs_to(name, package):
    return name == package or name.startswith(package + ".")


def test_every_room_has_its_law():
    assert set(MAY_IMPORT) == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below_them(room):
    ours = packages(Path(f"{room}.py")) & {*ROOMS, *FOLDERS, "tests"}
    assert ours <= MAY_IMPORT[room], f"{room} imports {sorted(ours - MAY_IMPORT[room])}"


def test_imports_point_one_way():
    placed = set()
    while placed != set(MAY_IMPORT):
        ready = {room for room, below in MAY_IMPORT.items() if below <= placed} - placed
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - placed)}"
        placed |= ready


@pytest.mark.parametrize("package", OWNERS)
def test_each_package_has_its_owners(package):
    users = {
        str(source)
        for source in SOURCES
        if room_of(source) not in OWNERS[package]
        and any(belongs_to(name, package) for name in imported(source) | mentions(source))
    }
    assert not users, f"{package} belongs to {sorted(OWNERS[package])}, not {sorted(users)}"


def test_nothing_is_imported_by_a_computed_name():
    names = {str(source): imported(source) | mentions(source) for source in SOURCES}
    assert not [source for source, known in names.items() if "importlib.import_module" in known]


def test_coconut_and_passes_need_torch_and_transformers_alone():
    foreign = packages(Path("coconut.py")) | packages(Path("passes.py"))
    assert foreign - sys.stdlib_module_names == {"passes", "torch", "transformers"}


def test_config_curriculum_and_metrics_load_without_torch():
    code = "import sys, config, curriculum, metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_evaluation_and_training_leave_answers_to_metrics():
    for room in ("evaluation", "training"):
        assert "re" not in packages(Path(f"{room}.py"))


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if room_of(source) == "preprocessing"], ids=str
)
def test_preprocessing_imports_nothing_of_ours(source):
    siblings = {path.stem for path in SOURCES if room_of(path) == "preprocessing"}
    assert not packages(source) & {*ROOMS, *FOLDERS, *siblings}


def test_modules_open_with_a_paragraph():
    silent = [str(source) for source in SOURCES if text_of(source).strip() and not opening(source)]
    assert not silent


def test_modules_are_short():
    lengths = {str(source): text_of(source).count("\n") for source in SOURCES}
    assert not {name: n for name, n in lengths.items() if n > MAX_MODULE_LINES}


def test_functions_are_short():
    lengths = {
        f"{source}: {node.name}": node.end_lineno - node.lineno + 1
        for source in SOURCES
        for node in ast.walk(parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}
