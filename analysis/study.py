"""A study: which runs, in which order, with which settings; read from one YAML file.

    question: what the study asks
    base: settings.yaml            # of every arm, relative to the study's file
    baseline: m1                   # the arm that others are compared with
    prepare: [command, ...]        # makes data and model of one condition and seed
    set: {key: value}              # settings with placeholders, for every run
    conditions: {name: {word: value}}
    prerequisites: {cot: {key: value}}
    arms: {name: {key: value}}
    plan: [{conditions: [...], arms: [...], seeds: 5}]
    outcomes: {threshold: 0.95, zeroed_thoughts: true}

Placeholders in all of these: {folder} of a condition and seed, {seed}, the words of the condition,
and {cot} (any prerequisite's name): the last checkpoint of that run. An arm or prerequisite may
name a `base` of its own. Nothing is run here; scripts/reproduce.py does that, and results.py holds
the outcomes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from engine.config import Config
from engine.config_file import load_config, read_file
from utils import UserError

NAME = r"^[a-z][a-z0-9_]*$"
Name = Annotated[str, Field(pattern=NAME)]
Overrides = dict[str, Any]


class Block(BaseModel):
    """One part of the plan; earlier parts run first.

    seeds: their number (0 to n - 1) or a list.
    set: settings of this part alone, such as another number of epochs; its conditions are then
        reported under their name and `suffix`.
    """

    model_config = ConfigDict(extra="forbid")

    conditions: list[Name] | None = None
    arms: list[Name]
    seeds: list[int]
    set: Overrides = {}
    suffix: Name | None = None

    @field_validator("seeds", mode="before")
    @classmethod
    def _number_as_list(cls, value: Any) -> Any:
        return list(range(value)) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _suffix_names_settings(self) -> "Block":
        if bool(self.set) != bool(self.suffix):
            raise ValueError("set and suffix belong together: the suffix names the settings")
        return self


class Outcomes(BaseModel):
    """What is measured of every finished run, fixed before the first.

    threshold: accuracy whose first epoch counts in each stage.
    zeroed_thoughts: whether accuracy with every thought replaced by zeros is measured.
    """

    model_config = ConfigDict(extra="forbid")

    threshold: float = Field(0.95, gt=0, le=1)
    zeroed_thoughts: bool = True


class Size(BaseModel):
    """Sizes in place of data and model, which may not exist when costs are estimated.

    question, answer: mean tokens of a record; steps: mean tokens of each of its steps.
    """

    model_config = ConfigDict(extra="forbid")

    parameters: float
    records: int
    question: float
    steps: list[float]
    answer: float


class StudyFile(BaseModel):
    """The content of a study's YAML file."""

    model_config = ConfigDict(extra="forbid")

    question: str
    base: str
    prepare: list[str] = []
    set: Overrides = {}
    conditions: dict[Name, dict[str, Any]] = {"all": {}}
    prerequisites: dict[Name, Overrides] = {}
    arms: dict[Name, Overrides]
    baseline: Name
    plan: list[Block]
    outcomes: Outcomes = Outcomes()
    sizes: dict[Name, Size] = {}


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    base: the YAML file whose settings it overrides.
    group: (block, condition, seed) of runs that share data, commit and machine.
    folder: of the group; the run is in folder/arm.
    overrides: what differs from the base, placeholders filled in.
    own_keys: keys that the arm itself, its prerequisite's role or the plan overrides.
    needs: names of the prerequisites that it starts from.
    commands: make data and model of the group.
    """

    study: str
    block: int
    condition: str
    arm: str
    seed: int
    folder: Path
    base: Path
    overrides: Mapping[str, Any]
    own_keys: frozenset[str]
    needs: tuple[str, ...]
    is_prerequisite: bool
    commands: list[list[str]]

    @property
    def group(self) -> tuple[int, str, int]:
        return self.block, self.condition, self.seed

    @property
    def run_dir(self) -> Path:
        return self.folder / self.arm

    @property
    def label(self) -> str:
        """The run in words: condition, seed and arm."""
        where = "" if self.condition == "all" else f"{self.condition} "
        return f"{where}seed {self.seed} {self.arm}"


class Study:
    """A study file with everything resolved.

    path: of the YAML file; its stem names the study.
    work: folder under which runs lie.

    Raises: UserError for anything wrong in the file, with the key and the fix.
    """

    def __init__(self, path: Path, work: Path = Path("exps/studies")):
        self.path, self.name, self.work = path, path.stem, work
        self.file = _read(path)
        self._check_names()

    def _check_names(self) -> None:
        file = self.file
        if file.baseline not in file.arms:
            raise UserError(f"{self.path}: baseline: {file.baseline!r} is not one of the arms")
        clash = file.arms.keys() & file.prerequisites.keys()
        if clash:
            raise UserError(f"{self.path}: {min(clash)!r} is an arm and a prerequisite; rename one")
        for number, block in enumerate(file.plan):
            where = f"{self.path}: plan[{number}]"
            for kind, known in (("arms", file.arms), ("conditions", file.conditions)):
                for name in getattr(block, kind) or []:
                    if name not in known:
                        raise UserError(
                            f"{where}: {kind}: {name!r} is not defined; known: {', '.join(known)}"
                        )
            if repeated := [seed for seed, count in Counter(block.seeds).items() if count > 1]:
                raise UserError(f"{where}: seeds: {repeated[0]} is given twice; keep one")

    def runs(
        self, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Run]:
        """All runs in their order: block, condition, seed, prerequisites first.

        arms, seeds: only these; prerequisites of the chosen arms are always included.

        Raises: UserError for an arm or seed that the study does not have.
        """
        runs = []
        for number, block in enumerate(self.file.plan):
            for condition in block.conditions or self.file.conditions:
                for seed in block.seeds:
                    if seeds is None or seed in seeds:
                        runs += self._group(number, block, condition, seed, arms)
        if arms and (unknown := set(arms) - self.file.arms.keys()):
            raise UserError(
                f"--arms: {min(unknown)!r} is not an arm of {self.path}; known:"
                f" {', '.join(self.file.arms)}"
            )
        if not runs:
            raise UserError(f"{self.path}: no run has these arms and seeds")
        known = sorted({seed for block in self.file.plan for seed in block.seeds})
        if seeds and (unknown := set(seeds) - set(known)):
            raise UserError(
                f"--seeds: {min(unknown)} is not a seed of {self.path}; known: {known[0]} to"
                f" {known[-1]}"
            )
        return runs

    def _group(
        self, number: int, block: Block, condition: str, seed: int, arms: Sequence[str] | None
    ) -> list[Run]:
        words = dict(self.file.conditions[condition])
        condition = f"{condition}_{block.suffix}" if block.suffix else condition
        folder = self.work / self.name / condition / f"seed{seed}"
        words |= {"folder": folder, "seed": seed}
        commands = [_fill(command, words, self.path).split() for command in self.file.prepare]
        checkpoints, made = {}, {}

        def build(name: str, raw: Overrides, is_prerequisite: bool) -> Run:
            own = _fill({"base": self.file.base} | raw, words | checkpoints, self.path)
            base = self.path.parent / own.pop("base")
            rest = {key: value for key, value in self.file.set.items() if key not in own}
            common = _fill(rest, words | checkpoints, self.path)
            place = {"name": name, "save_path": str(folder), "seed": seed, "keep_checkpoints": 1}
            return Run(
                study=self.name,
                block=number,
                condition=condition,
                arm=name,
                seed=seed,
                folder=folder,
                base=base,
                overrides=place | common | own,
                # The configuration keeps first_stage as resume.
                own_keys=frozenset(own) | ({"resume"} if "first_stage" in own else set()),
                needs=(),
                is_prerequisite=is_prerequisite,
                commands=commands,
            )

        for name, overrides in self.file.prerequisites.items():
            made[name] = build(name, overrides, True)
            epochs = self.config(made[name]).num_epochs
            checkpoints[name] = folder / name / f"checkpoint_{epochs}"
        chosen = []
        for name in block.arms:
            if arms is None or name in arms:
                run = build(name, self.file.arms[name] | block.set, False)
                start = str(self.config(run).load_model_path)
                needs = tuple(p for p, path in checkpoints.items() if start == str(path))
                chosen.append(replace(run, needs=needs))
        needed = {name for run in chosen for name in run.needs}
        return [made[name] for name in made if name in needed] + chosen

    def config(self, run: Run) -> Config:
        """The configuration of `run`.

        Raises: UserError for a setting that the schema refuses, with the arm's name.
        """
        try:
            return load_config(run.base, dict(run.overrides))
        except UserError as error:
            kind = "prerequisites" if run.is_prerequisite else "arms"
            raise UserError(f"{self.path}: {kind}.{run.arm}: {error}") from None

    def size_of(self, run: Run) -> Size:
        """The sizes that the study writes down for the run's condition.

        Raises: UserError where it writes none.
        """
        for name, size in self.file.sizes.items():
            if run.condition == name or run.condition.startswith(f"{name}_"):
                return size
        raise UserError(
            f"{self.path}: sizes: {run.condition} is missing; add {run.condition}: {{parameters:"
            " ..., records: ..., question: ..., steps: [...], answer: ...}, for costs"
        )

    def check(self, runs: Sequence[Run]) -> None:
        """Check every configuration before anything starts.

        Raises: UserError for the first arm whose settings are refused, or that differs from the
            base in a key which the arm does not override.
        """
        place = {"name", "save_path", "seed", "keep_checkpoints", *self.file.set}
        for run in runs:
            base, config = load_config(run.base).model_dump(), self.config(run).model_dump()
            for key, value in config.items():
                if value != base[key] and key not in place | run.own_keys:
                    raise UserError(
                        f"{self.path}: arms.{run.arm}: {key} is {value} and {base[key]} in"
                        f" {run.base}, but the arm does not override it"
                    )


def _read(path: Path) -> StudyFile:
    values, problems = read_file(str(path))
    if problems:
        raise UserError("\n".join(problems))
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in error.errors()
        ]
        raise UserError("\n".join(lines)) from None


def _fill(value: Any, words: Mapping[str, Any], path: Path) -> Any:
    """`value` with every {placeholder} in its texts filled in."""
    if isinstance(value, dict):
        return {key: _fill(item, words, path) for key, item in value.items()}
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"{(\w+)}", value)
    if whole and whole[1] in words and not isinstance(words[whole[1]], Path):
        # Alone in its text, a placeholder keeps the type of what it stands for.
        return _fill(words[whole[1]], {w: v for w, v in words.items() if w != whole[1]}, path)
    for word in re.findall(r"{(\w+)}", value):
        if word not in words:
            known = ", ".join(f"{{{name}}}" for name in words)
            raise UserError(f"{path}: {value!r} holds {{{word}}}, which is not one of {known}")
    return re.sub(r"{(\w+)}", lambda match: str(words[match[1]]), value)
