"""YAML read strictly: YAML 1.2's scalars, every key once, all problems gathered.

PyYAML by itself reads YAML 1.1 and keeps the last of two equal keys, in silence. What the values
mean is config.py's business.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

UNREADABLE = object()  # stands for a value that YAML itself refused, reported already
# A data file or weights named by mistake would keep the parser busy for hours.
MOST_BYTES = 100_000
# The schema needs three levels; PyYAML's recursion would end in an error of Python's own.
MOST_LEVELS = 20


class YamlError(Exception):
    """A file out of which nothing can be read; the text says why and what to do."""


def dump_yaml(values: dict[str, Any]) -> str:
    """YAML of `values` in their order, one key a line, which `read_file` reads back equal."""
    return yaml.dump(
        values,
        Dumper=StrictDumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=float("inf"),
    )


def scalar_text(value: Any) -> str:
    """`value` as it would be written after a key."""
    return yaml.dump(value, Dumper=StrictDumper, default_flow_style=True).partition("\n")[0]


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's scalars, and None as null: PyYAML's own YAML 1.1 reads 1e-4 as text, `off` as
    false, 010 as eight and a plain << as a merge."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: dict = {}
    bool_values = {"true": True, "false": False}
    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.level == MOST_LEVELS:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "is nested too deeply", mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_text(self, node: yaml.ScalarNode) -> str | None:
        text = self.construct_scalar(node)
        return None if text == "None" else text


class StrictDumper(yaml.SafeDumper):
    """Quotes what `StrictLoader` would otherwise not read back as text."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _class in (StrictLoader, StrictDumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
        )
for _tag, _constructor in (
    ("null", StrictLoader.construct_yaml_null),
    ("bool", StrictLoader.construct_yaml_bool),
    ("int", StrictLoader.construct_int),
    ("float", StrictLoader.construct_yaml_float),
    ("str", StrictLoader.construct_text),
    ("seq", StrictLoader.construct_yaml_seq),
    ("map", StrictLoader.construct_yaml_map),
):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
StrictLoader.add_constructor(None, StrictLoader.construct_undefined)


def read_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """The file's values by key and its problems; raises YamlError where nothing can be read."""
    text = _read_text(path)
    loader, node, problem = _parse(text)
    if problem:
        raise YamlError(f"{path}: {problem}; mend the YAML there")
    if not isinstance(node, yaml.MappingNode):
        found = "is empty" if node is None else f"holds a {node.id}"
        raise YamlError(f"{path}: {found}; write one `key: value` a line")
    values: dict[str, Any] = {}
    first_lines: dict[str, int] = {}
    problems = []
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key.isprintable():
            shown = repr(key) if isinstance(key, str) else f"a {key_node.id}"
            problems.append(
                f"{path}: line {line}: {shown} is no plain word for a key; write `key: value`"
            )
        elif key in first_lines:
            problems.append(
                f"{path}: line {line}: {key} stands twice, first on line {first_lines[key]}; "
                "keep one"
            )
        else:
            first_lines[key] = line
            values[key], problem = _construct(loader, value_node)
            if problem:
                problems.append(f"{path}: {key}: {problem}")
    return values, problems


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of `key=value` arguments by key, and their problems."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"command line: {override!r} is not key=value; write {key}=VALUE")
            continue
        if not key.isprintable():
            problems.append(f"command line: {key!r} is no plain word for a key; write key=value")
            continue
        if key in values:
            problems.append(f"command line: {key} stands twice; keep one")
            continue
        loader, node, problem = _parse(text)
        if problem:
            values[key] = UNREADABLE
            problems.append(f"command line: {override!r}: {problem}; quote the value")
            continue
        values[key], problem = _construct(loader, node) if node is not None else (None, None)
        if problem:
            problems.append(f"command line: {override!r}: {problem}")
    return values, problems


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig") if len(content) <= MOST_BYTES else None
    except OSError as error:
        raise YamlError(
            f"{path}: {error.strerror}; name a YAML file such as args/gsm_coconut.yaml"
        ) from None
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    if text is None:
        raise YamlError(
            f"{path}: is longer than {MOST_BYTES} bytes, so it is no experiment; name a YAML file"
            " such as args/gsm_coconut.yaml"
        )
    return text


def _parse(text: str) -> tuple[StrictLoader | None, yaml.Node | None, str | None]:
    """(loader, root node, None), or (None, None, the problem with its line)."""
    try:
        loader = StrictLoader(text)
    except yaml.YAMLError as error:
        return None, None, _yaml_problem(error, text)
    try:
        return loader, loader.get_single_node(), None
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, text)
    except (ValueError, OverflowError):
        # PyYAML hands the number of an escape such as "\UFFFFFFFF" to chr() unchecked.
        problem = f"line {loader.line + 1}: an escape is no character"
    return None, None, problem


def _construct(loader: StrictLoader, node: yaml.Node) -> tuple[Any, str | None]:
    try:
        return loader.construct_object(node, deep=True), None
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, "")
    except (ValueError, KeyError) as error:
        problem = f"line {node.start_mark.line + 1}: cannot be read: {error}"
    return UNREADABLE, f"{problem}; write a plain value"


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        # Of two equal anchors PyYAML keeps the anchor's name to the first one's part of the error.
        problem = "an anchor's second occurrence" if problem == "second occurrence" else problem
        return f"line {mark.line + 1}: {problem}"
    line = text.count("\n", 0, error.position) + 1
    return f"line {line}: character {error.character!r} is not allowed"
