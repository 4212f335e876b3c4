"""The house rules of imports, owners and sizes, read from the source with `ast`.

MAY_IMPORT says what each module on top and in engine/ may import of this repository, FOLDERS what
the modules of the other folders may. A new module of engine/ needs a line, and nothing imports
tests.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = sorted(path.stem for path in ROOT.glob("*.py"))
ENGINE = sorted(path.stem for path in (ROOT / "engine").glob("[!_]*.py"))
MODULES = TOP + [f"engine.{name}" for name in ENGINE]

FOLDERS = {
    "analysis": {"coconut", "dataset", "engine", "utils", "preprocessing.graphs"},
    "scripts": {"analysis", "coconut", "dataset", "engine", "utils"},
    "benchmarks": {
        "analysis.tables",
        "coconut",
        "dataset",
        "engine",
        "layers",
        "passes",
        "utils",
    },
    # Data are prepared without the rest of the repository.
    "preprocessing": {"preprocessing.common", "preprocessing.graphs"},
    "assets": {"preprocessing.common"},
}
MAY_IMPORT_THEIR_OWN = {"analysis", "benchmarks", "scripts"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "engine/**/*.py", *(f"{folder}/**/*.py" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
)

# The modules at the top of engine/ and run.py: each is imported only by later ones in this list.
LAST = {"engine.failures", "engine.trainer", "engine.jobs", "run"}

MAY_IMPORT = {
    "utils": set(),
    "layers": set(),
    "passes": {"layers"},
    "coconut": {"layers", "passes"},
    "dataset": {"utils"},
    "engine.config": {"utils"},
    "engine.config_file": {"engine.config", "utils"},
    "engine.metrics": set(),
    "engine.loader": {"dataset", "utils"},
    "engine.provenance": set(),
    "engine.distributed": {"utils"},
    "engine.parallel": {"engine.distributed"},
    "engine.tracking": {"utils"},
    "engine.metadata": {"coconut", "dataset", "engine.config", "utils"},
    "engine.weights": {"dataset", "engine.config", "engine.metadata", "utils"},
    "engine.architecture": {"coconut", "utils"},
    "engine.memory": {"coconut", "dataset", "engine.config", "layers", "utils"},
    "engine.model": {
        "coconut", "dataset", "engine.architecture", "engine.config", "engine.memory",
        "engine.metadata", "engine.weights", "utils",
    },
    "engine.run_dir": {"utils"},
    "engine.checkpoint": {
        "engine.distributed", "engine.metadata", "engine.parallel", "engine.run_dir", "utils",
    },
    "engine.evaluation": {
        "coconut", "dataset", "engine.distributed", "engine.loader", "engine.metrics",
        "engine.parallel", "utils",
    },
    "engine.failures": {"engine.config", "engine.distributed", "engine.run_dir", "utils"},
    "engine.signals": {"utils"},
    "engine.console": {
        "coconut", "dataset", "engine.config", "engine.distributed", "engine.metadata", "utils",
    },
    "engine.setup": {*MODULES} - {"engine.evaluation", "engine.setup", "engine.tracking", *LAST},
    "engine.trainer": {*MODULES} - {"engine.setup", *LAST},
    "engine.jobs": {*MODULES} - {"engine.jobs", "run"},
    "run": {"engine.config_file", "engine.jobs", "utils"},
}  # fmt: skip

# Imported inside a function: it takes seconds, and earlier checks or other commands of the same
# file do without it.
LATE = {
    "run.py": {"engine"},
    "assets/make_quickstart_model.py": {"torch", "transformers"},
    "preprocessing/describe.py": {"matplotlib", "transformers"},
    "engine/tracking.py": {"wandb"},  # may not be installed
}

# package -> the modules (or folders) that alone may import it
OWNERS = {
    "yaml": {"engine.config_file"},
    "wandb": {"engine.tracking"},
    "datasets": {"dataset", "engine.memory"},
    "filelock": {"engine.run_dir"},
    "matplotlib": {"analysis", "assets", "benchmarks", "preprocessing"},
    "torch.distributed": {"engine.distributed", "engine.parallel", "engine.checkpoint"},
    "torch.nn.parallel": {"engine.parallel"},
}

MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 60


def text_of(source):
    return (ROOT / source).read_text(encoding="utf-8")


@cache
def parse(source):
    return ast.parse(text_of(source))


def imports_in(tree):
    """Dotted names that are imported in a tree; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def imported(source):
    """Dotted names that a file imports, anywhere in it."""
    return imports_in(parse(source))


def packages(source):
    return {name.split(".")[0] for name in imported(source)}


def mentions(source):
    """Dotted attribute chains that a file spells out, such as torch.distributed.barrier."""
    return {
        ast.unparse(node) for node in ast.walk(parse(source)) if isinstance(node, ast.Attribute)
    }


def module_of(source):
    """`engine.config` for engine/config.py, the folder's name for a file of another folder."""
    if len(source.parts) == 1:
        return source.stem
    is_engine = source.parts[0] == "engine" and source.stem != "__init__"
    return f"engine.{source.stem}" if is_engine else source.parts[0]


def own_imports(source):
    """The modules of this repository that a file imports, such as utils and engine.config."""
    modules = {".".join(path.with_suffix("").parts) for path in SOURCES}
    return {name for name in imported(source) if name in modules or belongs_to(name, "tests")}


def belongs_to(name, package):
    return name == package or name.startswith(package + ".")


def test_every_module_has_its_line():
    assert set(MAY_IMPORT) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_lies_below_them(module):
    ours = own_imports(Path(module.replace(".", "/") + ".py"))
    assert ours <= MAY_IMPORT[module], f"{module} imports {sorted(ours - MAY_IMPORT[module])}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_import_only_what_lies_below_them(folder):
    may = FOLDERS[folder] | ({folder} & MAY_IMPORT_THEIR_OWN)
    wrong = {
        f"{source} imports {name}"
        for source in SOURCES
        if source.parts[0] == folder
        for name in own_imports(source)
        if not any(belongs_to(name, package) for package in may)
    }
    assert not wrong


def test_imports_point_one_way():
    placed = set()
    while placed != set(MAY_IMPORT):
        ready = {module for module, below in MAY_IMPORT.items() if below <= placed} - placed
        assert ready, f"a circle among {sorted(set(MAY_IMPORT) - placed)}"
        placed |= ready


@pytest.mark.parametrize("package", OWNERS)
def test_each_package_has_its_owners(package):
    users = {
        str(source)
        for source in SOURCES
        if module_of(source) not in OWNERS[package]
        and any(belongs_to(name, package) for name in imported(source) | mentions(source))
    }
    assert not users, f"{package} belongs to {sorted(OWNERS[package])}, not {sorted(users)}"


def test_only_coconut_class_is_imported_by_a_computed_name():
    names = {str(source): imported(source) | mentions(source) for source in SOURCES}
    users = {source for source, known in names.items() if "importlib.import_module" in known}
    assert users == {"engine/jobs.py"}


def test_imports_are_at_the_top_of_their_files():
    late = {}
    for source in SOURCES:
        functions = [n for n in ast.walk(parse(source)) if isinstance(n, ast.FunctionDef)]
        names = {name.split(".")[0] for function in functions for name in imports_in(function)}
        if names:
            late[str(source)] = names
    assert late == LATE
    run_py = ast.walk(parse(Path("run.py")))
    (function,) = [n for n in run_py if isinstance(n, ast.FunctionDef) and [*imports_in(n)]]
    assert imports_in(function) == {"engine", "engine.jobs"}


def test_coconut_passes_and_layers_need_torch_and_transformers_alone():
    names = {"coconut", "layers", "passes"}
    foreign = set().union(*(packages(Path(f"{name}.py")) for name in names))
    assert foreign - sys.stdlib_module_names - names == {"torch", "transformers"}


def test_config_and_metrics_load_without_torch():
    light = "engine.config, engine.metrics, engine.run_dir, run, utils"
    code = f"import sys, {light}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_evaluation_and_training_leave_answers_to_metrics():
    for name in ("evaluation", "trainer"):
        assert "re" not in packages(Path(f"engine/{name}.py"))


@pytest.mark.parametrize("name", ["common"])
def test_helpers_of_preprocessing_need_the_standard_library_alone(name):
    source = Path("preprocessing") / f"{name}.py"
    assert packages(source) <= sys.stdlib_module_names


def test_modules_open_with_a_paragraph():
    silent = [source for source in SOURCES if ast.get_docstring(parse(source)) is None]
    assert not [str(source) for source in silent if text_of(source).strip()]


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
