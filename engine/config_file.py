"""From a YAML file and overrides to a configuration, or to one error with every problem in it.

YAML is read strictly: YAML 1.2's scalars, every key once. PyYAML by itself reads YAML 1.1 and keeps
the last of two equal keys without a word. What keys mean is config.py's part. `python -m
engine.config_file` prints the page docs/configuration.md.
"""

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from engine.config import (
    NEEDED_TO_TRAIN,
    UNION_TAGS,
    Config,
    Problem,
    combination_problems,
    example,
)
from utils import ConfigError, log

UNREADABLE = object()  # stands for a value that YAML itself refused, reported already
# A data file or weights named by mistake would keep the parser busy for hours.
MOST_BYTES = 100_000
# The schema needs three levels; PyYAML's recursion would end in an error of Python's own.
MOST_LEVELS = 20


class YamlError(Exception):
    """A file out of which nothing can be read; the text says why and what to do."""


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML of `values` in their order, one key a line, which `read_file` reads back equal."""
    return "".join(f"{key}: {scalar_text(value)}\n" for key, value in values.items())


def scalar_text(value: Any) -> str:
    """`value` as it would be written after a key."""
    options = {"default_flow_style": True, "allow_unicode": True, "width": float("inf")}
    return yaml.dump(value, Dumper=StrictDumper, **options).partition("\n")[0]


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
# PyYAML writes a mapping without lists in it on one line.
StrictDumper.add_representer(
    dict, lambda dumper, values: dumper.represent_mapping("tag:yaml.org,2002:map", values, False)
)


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
            log.info(f"command line: {key} is given more than once; the last one, {text}, counts")
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


# From a file to a configuration

# Values in messages, whose size an alias of an alias could multiply without end.
_shown = reprlib.Repr()
_shown.maxlevel = 2
_shown.maxstring = _shown.maxlong = _shown.maxother = 80


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Reads the YAML file at `path` with the files that it builds on, then the overrides.

    overrides: `key=value` texts, read by the same rules as YAML, or Python values by key.

    Raises ConfigError with every problem, one a line as `source: key=value problem; fix`, where
    the source is the file or, for overrides, "command line".
    """
    try:
        values, problems = _read_chain(Path(path), ())
    except YamlError as error:
        raise ConfigError(str(error)) from None
    if isinstance(overrides, Mapping):
        overridden, override_problems = dict(overrides), []
    else:
        overridden, override_problems = read_overrides(overrides)
    problems += override_problems
    values |= overridden

    def source(keys: Sequence[str]) -> str:
        return "command line" if any(key in overridden for key in keys) else str(path)

    try:
        config = Config(**values)
    except ValidationError as error:
        problems += [
            f"{source(keys)}: {problem}"
            for keys, problem in _schema_problems(error, values, overridden.keys())
        ]
    if "gradient_accumulation_steps" in overridden and "effective_batch_size" not in overridden:
        effective = values.get("effective_batch_size")
        if effective is not None:
            problems.append(
                "command line: gradient_accumulation_steps is overruled by effective_batch_size="
                f"{effective} in {path}; write effective_batch_size=None beside it"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _read_chain(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[str]]:
    """The values of a YAML file over those of its `base`, and the problems of all files.

    above: the files that led here.
    """
    if path.resolve() in above:
        raise YamlError(f"{path}: base: leads back to this file; remove one base")
    values, problems = read_file(str(path))
    if "base" not in values:
        return values, problems
    base = values.pop("base")
    if not isinstance(base, str):
        return values, [*problems, f"{path}: base={base!r} is not text; write base: other.yaml"]
    inherited, more = _read_chain(path.parent / base, (*above, path.resolve()))
    return inherited | values, more + problems


def dump_config(config: Config) -> str:
    """YAML of every key in schema order, which loads back to an equal Config."""
    return dump_yaml(config.model_dump())


def fields_help() -> str:
    """Every key with its default and meaning, one paragraph a key, for `--help`."""
    lines = []
    for key, field in Config.model_fields.items():
        lines.append(f"{key} ({_note(key)})")
        lines += wrap(field.description, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _note(key: str) -> str:
    """Whether `key` is required, or its default."""
    if key in NEEDED_TO_TRAIN:
        return f"required to train {', '.join(NEEDED_TO_TRAIN[key])}"
    field = Config.model_fields[key]
    return "required" if field.is_required() else f"default {scalar_text(field.default)}"


def _schema_problems(
    error: ValidationError, values: dict[str, Any], overridden: Collection[str]
) -> Iterator[Problem]:
    """Yields what pydantic found, then what is wrong between the keys it found no fault with.

    overridden: the keys of `values` that came from the command line.
    """
    field_errors = [item for item in error.errors() if item["loc"]]
    for item in field_errors:
        if item["input"] is not UNREADABLE:
            yield (str(item["loc"][0]),), _field_problem(item, overridden)
    wrong = {str(item["loc"][0]) for item in field_errors}
    stand_ins = {"name": "unknown", "save_path": "unknown", "model_id": "", "val_path": ""}
    sound = {key: value for key, value in values.items() if key not in wrong}
    partial = Config.model_construct(_fields_set=set(values), **(stand_ins | sound))
    for keys, problem in combination_problems(partial):
        if wrong.isdisjoint(keys):
            yield keys, problem


def _field_problem(item: dict[str, Any], overridden: Collection[str]) -> str:
    """The words for one of pydantic's errors about a single key: got, wanted, fix."""
    key, kind, value = str(item["loc"][0]), item["type"], item["input"]
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "missing":
        return f"{key} is missing; add {key}: {example(key)}"
    indices = [index for index in item["loc"][1:] if index not in UNION_TAGS]
    shown = f"{key}{''.join(f'[{index}]' for index in indices)}={_shown.repr(value)}"
    limit = next(iter(item.get("ctx", {}).values()), None)
    limit = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
    wanted = {
        "bool_type": "is not true or false",
        "int_type": "is not a whole number",
        "int_from_float": "is not a whole number",
        "float_type": "is not a number",
        "finite_number": "is not a finite number",
        "string_type": "is not text",
        "string_unicode": "is not valid Unicode",
        "string_too_short": "is empty",
        "string_pattern_mismatch": "holds a NUL character",
        "tuple_type": "is not a list of numbers",
        "greater_than": f"is not above {limit}",
        "greater_than_equal": f"is below {limit}",
        "less_than": f"is not below {limit}",
        "less_than_equal": f"is above {limit}",
    }.get(kind, item["msg"])
    if key == "latent_weights" and kind == "string_pattern_mismatch":
        return f"{shown} is not a window; write numbers, uniform, exponential:0.5 or learned"
    if key == "thought_norm":
        return f"{shown} is not a norm; write thought_norm: average, a positive number or None"
    if key == "coconut_class":
        return f"{shown} does not name a class; write coconut_class: {example(key)}"
    if kind == "literal_error":
        choices = get_args(Config.model_fields[key].annotation)
        return f"{shown} is not one of its values; write {key}: {' or '.join(choices)}"
    if kind == "bool_type":
        return f"{shown} {wanted}; write {key}: true or {key}: false"
    if kind == "string_type" and isinstance(value, int | float):
        text = f'"{_shown.repr(value)}"'
        # A shell would take the quotes off.
        fix = f"'{key}={text}'" if key in overridden else f"{key}: {text}"
        return f"{shown} {wanted}; write {fix}"
    return f"{shown} {wanted}; write {key}: {example(key)}"


def _unknown_key(key: str) -> str:
    if key == "fp16":
        return "fp16 is refused, its range is too small to train in; write bf16: true or drop it"
    nearest = get_close_matches(key, Config.model_fields, n=1)
    fix = f"did you mean {nearest[0]}?" if nearest else "python run.py --help lists the keys"
    return f"unknown key {key!r}; {fix}"


def fields_page() -> str:
    """Every key with its default and meaning as a Markdown page, docs/configuration.md."""
    lines = ["# Configuration", "", "Every key of an experiment's YAML file, as the schema has it"]
    lines += ["(made by `python -m engine.config_file`, and shown by `python run.py --help`)."]
    lines += ["`base: other.yaml`, relative to the file, takes that file's keys for those which a"]
    lines += ["file does not hold itself. `key=value` arguments replace keys; the last one wins."]
    for key, field in Config.model_fields.items():
        lines += ["", f"### `{key}`", "", f"{_note(key).capitalize()}.", "", field.description]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(fields_page(), end="")
