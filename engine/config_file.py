"""Configuration files: strict YAML, base files, overrides, help, and the wording of errors.

Reading is strict: YAML 1.2's scalars (PyYAML reads YAML 1.1 and silently keeps the last of two
equal keys), no unknown keys, no silent conversion. All problems are gathered before they are
raised, so that a user fixes a file once. Which keys there are and what they may hold is left to
config.py.
"""

import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml
from pydantic import ValidationError

from engine.config import (
    METHODS,
    NEEDED_TO_TRAIN,
    Config,
    Problem,
    as_yaml,
    combination_problems,
    example,
    expand_path,
)
from utils import ConfigError, log

UNREADABLE = object()  # in place of a value that YAML refused, which has been reported already
# A data file or weights named by mistake would keep the parser busy for hours.
MAX_BYTES = 100_000

# Values in messages, whose size an alias of an alias could multiply without end.
_shown = reprlib.Repr()
_shown.maxlevel = 2
_shown.maxstring = _shown.maxlong = _shown.maxother = 80


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The configuration of the YAML file at `path`, of its bases, and of the overrides.

    overrides: `key=value` texts, of which the last for a key counts, or Python values by key.

    Raises: ConfigError with every problem, one a line as `place: key=value problem; fix`, where the
    place is the file that holds the key, "command line" for texts, "overrides" for values by
    key.
    """
    values, places, problems = read_file_and_bases(str(path))
    outside = "overrides" if isinstance(overrides, Mapping) else "command line"
    if isinstance(overrides, Mapping):
        overridden = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
    else:
        overridden, override_problems = read_overrides(overrides)
        problems += override_problems
    values |= overridden
    places |= dict.fromkeys(overridden, outside)
    # What the user wrote last comes first: overrides, then the file itself, then its bases.
    nearest_first = [outside, *places.values(), str(path)]

    def place_of(keys: Sequence[str]) -> str:
        return min((places.get(key, str(path)) for key in keys), key=nearest_first.index)

    try:
        config = Config(**values)
    except ValidationError as error:
        typed = overridden if outside == "command line" else ()
        problems += [f"{place_of(k)}: {text}" for k, text in _problems(error, values, typed)]
    if "gradient_accumulation_steps" in overridden and "effective_batch_size" not in overridden:
        effective = values.get("effective_batch_size")
        if effective is not None:
            problems.append(
                f"{outside}: gradient_accumulation_steps is overridden by effective_batch_size="
                f"{effective} in {places['effective_batch_size']}; write "
                "effective_batch_size=None as well"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def dump_config(config: Config) -> str:
    """YAML of every key in schema order, which loads back to an equal Config."""
    return dump_yaml(config.model_dump())


def dump_yaml(values: Mapping[str, Any]) -> str:
    """YAML of `values` in their order, one key a line, which `read_file` reads back equal."""
    return yaml.dump(
        dict(values),
        Dumper=StrictDumper,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=float("inf"),
    )


def as_override(key: str, value: Any) -> str:
    """The `key=value` argument that is read back as `value`, whatever characters it holds."""
    return f"{key}={dump_yaml({key: value}).partition(': ')[2].rstrip()}"


def fields_help() -> str:
    """Every key with its default and meaning, one paragraph a key, for `--help`."""
    lines = []
    for key, field in Config.model_fields.items():
        lines.append(f"{key} ({_default(key)})")
        lines += wrap(field.description, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _default(key: str) -> str:
    """The value that applies where the key is left out."""
    methods = NEEDED_TO_TRAIN.get(key)
    if methods:
        return "required to train" + f" {', '.join(methods)}" * (methods != METHODS)
    field = Config.model_fields[key]
    return "required" if field.is_required() else f"default {as_yaml(field.default)}"


# First key of each section -> its title.
SECTIONS = {
    "project": "General",
    "coconut": "Method",
    "c_thought": "Curriculum",
    "thought": "Latent thoughts",
    "model_id": "Model",
    "train_path": "Data",
    "seed": "Training",
    "eval_every_steps": "Evaluation, checkpoints, logging",
}
PAGE_OPENING = """\
# Configuration

One YAML file is one experiment. `python run.py FILE key=value ...` replaces keys; the last of
repeated ones counts, and values are read as in a file. `base: other.yaml`, relative to the file
that holds it, takes all keys that the file leaves out from another file. `null` and `None` mean
none. Paths may begin with `~` and hold `$VARIABLES`. Unknown or duplicate keys, wrong types and
impossible combinations are reported together before anything loads. `python run.py FILE --dry-run`
shows what a file resolves to.

This page is made from the schema: `python -m engine.config_file > docs/configuration.md`.
"""


def fields_page() -> str:
    """docs/configuration.md: every key with its type, range, default and meaning."""
    properties = Config.model_json_schema()["properties"]
    lines = [PAGE_OPENING.rstrip()]
    for key, field in Config.model_fields.items():
        if key in SECTIONS:
            lines += ["", f"## {SECTIONS[key]}", ""]
            lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        default = _default(key).removeprefix("default ")
        meaning = " ".join(field.description.split())
        lines.append(f"| `{key}` | {_type_words(properties[key])} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type_words(schema: dict[str, Any]) -> str:
    """A JSON schema of one value in words, with its range."""
    if "anyOf" in schema or "oneOf" in schema:
        kinds = schema.get("anyOf") or schema["oneOf"]
        return " or ".join(_type_words(kind) for kind in kinds)
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if values:
        return ", ".join(f"`{value}`" for value in values)
    if schema["type"] == "array":
        return f"list of numbers{_range_words(schema['items'])}"
    names = {"boolean": "true or false", "integer": "whole number", "null": "null"}
    name = schema.get("format") or names.get(schema["type"], schema["type"])
    return name.replace("string", "text") + _range_words(schema)


def _range_words(schema: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}
    bounds = [f"{sign}{schema[name]:,.0f}" for name, sign in signs.items() if name in schema]
    return f" ({', '.join(bounds)})" * bool(bounds)


# Files and overrides


def read_file_and_bases(path: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values by key, the file that each comes from, and the problems of `path` and its bases.

    `base: other.yaml`, relative to the file that holds it, gives what that file leaves out.

    Raises: ConfigError where a file cannot be read, or is its own base.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    problems: list[str] = []
    seen: list[str] = []
    while True:
        seen.append(os.path.realpath(path))
        own, own_problems = read_file(path)
        problems += own_problems
        base = own.pop("base", None)
        places |= dict.fromkeys(own.keys() - places.keys(), path)
        values = own | values
        if base is UNREADABLE or base is None:
            return values, places, problems
        named = f"{path}: base={_shown.repr(base)}"
        if not isinstance(base, str):
            return values, places, [*problems, f"{named} is not text; write base: other.yaml"]
        try:
            below = os.path.normpath(os.path.join(os.path.dirname(path), expand_path(base)))
        except ValueError as error:
            return values, places, [*problems, f"{named} {error}"]
        if not os.path.isfile(below):
            raise ConfigError(f"{named} is not a file; write its path relative to {path}")
        if os.path.realpath(below) in seen:
            raise ConfigError(f"{named} leads back to {below}; remove one of the bases")
        path = below


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of `key=value` arguments by key, and their problems."""
    values: dict[str, Any] = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        named = f"command line: {_shown.repr(override)}"
        if not equals:
            problems.append(f"{named} is not key=value; write {key}=VALUE")
            continue
        if not key.isprintable():
            problems.append(
                f"command line: {_shown.repr(key)} is not a plain word; write key=value"
            )
            continue
        if key in values:
            log.info(f"{named}: {key} is given more than once; this value counts")
        loader, node, problem = _parse(text)
        values[key] = UNREADABLE if problem else None
        if problem:
            problems.append(f"{named}: {problem}; quote the value")
        elif node is not None:
            values[key], problem = _construct(loader, node)
            if problem:
                problems.append(f"{named}: {problem}")
    return values, problems


def read_file(path: str) -> tuple[dict[str, Any], list[str]]:
    """The values of a YAML file by key, and its problems, one a line as `path: problem; fix`.

    Raises: ConfigError where nothing can be read.
    """
    loader, node, problem = _parse(_read_text(path))
    if problem:
        raise ConfigError(f"{path}: {problem}; fix the YAML")
    if not isinstance(node, yaml.MappingNode):
        found = "is empty" if node is None else f"holds a {node.id}"
        raise ConfigError(f"{path}: {found}; write one `key: value` a line")
    values: dict[str, Any] = {}
    first_lines: dict[str, int] = {}
    problems = []
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or not key.isprintable():
            shown = _shown.repr(key) if isinstance(key, str) else f"a {key_node.id}"
            problems.append(f"{path}: line {line}: key {shown} is not a plain word; fix the YAML")
        elif key in first_lines:
            problems.append(
                f"{path}: duplicate key: {key} on lines {first_lines[key]} and {line}; keep one"
            )
        else:
            first_lines[key] = line
            values[key], problem = _construct(loader, value_node)
            if problem:
                problems.append(f"{path}: {key}: {problem}")
    return values, problems


def _read_text(path: str) -> str:
    fix = "name a YAML file such as args/gsm_coconut.yaml"
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path}: is longer than {MAX_BYTES} bytes; {fix}")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {fix}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None


# Wording of errors


# pydantic's names of types -> ours.
TYPE_WORDS = {"integer": "a whole number", "number": "a number", "string": "text"}
TYPE_WORDS |= {"boolean": "true or false"}


def _problems(
    error: ValidationError, values: dict[str, Any], typed: Collection[str]
) -> Iterator[Problem]:
    """Yields what pydantic found, then what is wrong between the remaining keys.

    typed: the keys of `values` that were typed in a shell.
    """
    field_errors = [item for item in error.errors() if item["loc"]]
    for item in field_errors:
        if item["input"] is not UNREADABLE:
            key = str(item["loc"][0])
            yield (key,), _field_problem(item, key, key in typed)
    wrong = {str(item["loc"][0]) for item in field_errors}
    stand_ins = {"name": "unknown", "save_path": "unknown", "val_path": ""}
    sound = {key: value for key, value in values.items() if key not in wrong}
    partial = Config.model_construct(_fields_set=set(values), **(stand_ins | sound))
    for keys, problem in combination_problems(partial):
        if wrong.isdisjoint(keys):
            yield keys, problem


def _field_problem(item: dict[str, Any], key: str, is_typed: bool) -> str:
    """The message for one of pydantic's errors about a single key: got, wanted, fix."""
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "missing":
        return f"{key} is missing; add {key}: {example(key)}"
    indices = [f"[{index}]" for index in item["loc"][1:] if isinstance(index, int)]
    shown = f"{key}{''.join(indices)}={_shown.repr(value)}"
    if kind == "value_error":
        return f"{shown} {item['ctx']['error']}"
    # "Input should be greater than 0": the value takes the place of the first word.
    wanted = re.sub(
        r"should be a valid (\w+)(.*)",
        lambda match: f"is not {TYPE_WORDS.get(match[1], match[1])}",
        item["msg"].partition(" ")[2],
    )
    fix = f"{key}: {example(key)}"
    if kind == "string_type" and isinstance(value, int | float):
        text = f'"{_shown.repr(value)}"'
        # A shell would take the quotes off.
        fix = f"'{key}={text}'" if is_typed else f"{key}: {text}"
    return f"{shown} {wanted}; write {fix}"


def _unknown_key(key: str) -> str:
    if key == "base":
        return "base is for files only; name the file that is based on another"
    if key == "fp16":
        return "fp16 is refused, its range is too small to train in; write bf16: true or drop it"
    nearest = get_close_matches(key, Config.model_fields, n=1)
    fix = f"did you mean {nearest[0]}?" if nearest else "python run.py --help lists the keys"
    return f"unknown key {_shown.repr(key)}; {fix}"


# Strict YAML


TYPES = ("null", "bool", "float", "seq", "map")


class StrictDumper(yaml.SafeDumper):
    """Quotes what `StrictLoader` would otherwise not read back as text."""

    yaml_implicit_resolvers: dict = {}


class StrictLoader(yaml.SafeLoader):
    """YAML 1.2's scalars, and None as null: PyYAML's own YAML 1.1 reads 1e-4 as text, `off` as
    false, 010 as eight and a plain << as a merge."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *map("tag:yaml.org,2002:{}".format, TYPES))
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse a key that a mapping below the first level holds twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key: {key}", mark)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))

    def construct_text(self, node: yaml.ScalarNode) -> str | None:
        # In quotes too: to the published code both are the text None.
        text = self.construct_scalar(node)
        return None if text == "None" else text


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_int)
StrictLoader.add_constructor("tag:yaml.org,2002:str", StrictLoader.construct_text)
# PyYAML writes a mapping without lists in it on one line.
StrictDumper.add_representer(
    dict, lambda dumper, values: dumper.represent_mapping("tag:yaml.org,2002:map", values, False)
)
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


def _parse(text: str) -> tuple[StrictLoader | None, yaml.Node | None, str | None]:
    """(loader, root node, None), or (None, None, the problem with its line)."""
    try:
        loader = StrictLoader(text)
        return loader, loader.get_single_node(), None
    except yaml.YAMLError as error:
        return None, None, _yaml_problem(error, text)
    except (ValueError, OverflowError):
        # PyYAML passes the number of an escape such as "\UFFFFFFFF" to chr() unchecked.
        return None, None, f"line {loader.line + 1}: an escape is not a character"
    except RecursionError:
        return None, None, f"line {loader.line + 1}: is nested too deeply"


def _construct(loader: StrictLoader, node: yaml.Node) -> tuple[Any, str | None]:
    try:
        return loader.construct_object(node, deep=True), None
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, "")
    except (ValueError, KeyError) as error:
        problem = f"line {node.start_mark.line + 1}: cannot be read: {error}"
    except RecursionError:
        problem = f"line {node.start_mark.line + 1}: is nested too deeply"
    return UNREADABLE, f"{problem}; write a plain value"


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        # For a duplicate anchor PyYAML names the anchor only in the context of the error.
        problem = "an anchor's second occurrence" if problem == "second occurrence" else problem
        return f"line {mark.line + 1}: {problem}"
    line = text.count("\n", 0, error.position) + 1
    return f"line {line}: character {error.character!r} is not allowed"


if __name__ == "__main__":
    print(fields_page(), end="")
