"""The configuration of one experiment: its keys with meaning, range and default, and the rules.

A key is described at its field in `Config` and nowhere else (docs/configuration.md is made from
it). Reading files and overrides, and wording the errors, is left to config_file.py. Whether files,
models or checkpoints exist is left to the modules that open them. Imports no torch, so that a
mistake is reported within a second.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Tag,
    field_validator,
    model_validator,
)

from utils import ConfigError

METHODS = ("coconut", "cot", "no_thoughts", "no_cot")
METHODS_WITH_STAGES = ("coconut", "no_thoughts")
# Keys that only coconut uses, with the value that has no effect.
_COCONUT_ONLY = {"thought": "continuous", "thought_norm": None, "curriculum": True}
_COCONUT_ONLY |= {"coconut_class": None}

# Evaluation takes these from the checkpoint; in training a silent default would change the run.
NEEDED_TO_TRAIN = {
    "model_id": METHODS,
    "train_path": METHODS,
    "num_epochs": METHODS,
    "batch_size_training": METHODS,
    "c_thought": ("coconut",),
    "epochs_per_stage": METHODS_WITH_STAGES,
    "max_latent_stage": METHODS_WITH_STAGES,
}

# The operating system ends a name at a NUL.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
# A larger count is a mistake that would take hours or all memory before it shows.
Count = Annotated[int, Field(ge=0, le=1_000_000)]
PositiveCount = Annotated[int, Field(gt=0, le=1_000_000)]
Stages = Annotated[int, Field(ge=0, le=1000)]
MAX_WEIGHT = 1e9
Weight = Annotated[float, Field(ge=0, le=MAX_WEIGHT)]
# Below this the nearest state alone would be divided by nothing in the model's precision.
MIN_FIRST_WEIGHT = 1e-9


def expand_path(path: str) -> str:
    """`path` with `~` and `$VARIABLE` replaced.

    Raises: ValueError for an unknown user or variable; the text continues after `key=value`.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unknown = re.search(r"\$([A-Za-z0-9_]+|\{[^}]*\})", expanded)
    if unknown:
        name = unknown[1].strip("{}")
        raise ValueError(f"uses ${name}, which is not set; export {name} or write the path out")
    if expanded.startswith("~"):
        raise ValueError("starts with ~, but names no user; write the path out")
    return expanded


def _exponential_ratio(weights: Any) -> float | None:
    """R of the text `exponential:R`; None for anything else."""
    name, _, number = weights.partition(":") if isinstance(weights, str) else ("", "", "")
    try:
        ratio = float(number)
    except ValueError:
        return None
    return ratio if name == "exponential" and 0 < ratio < math.inf else None


def _class_name(text: str) -> str:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text):
        raise ValueError("is not module:Class; write coconut_class: mymodule:MyCoconut")
    return text


def _text_or_number(value: Any) -> str:
    return "text" if isinstance(value, str) else "number"


# The format is what docs/configuration.md calls the type.
FilePath = Annotated[Text, AfterValidator(expand_path), Field(json_schema_extra={"format": "path"})]
WeightsName = Annotated[
    str, Field(json_schema_extra={"format": "`uniform`, `exponential:R` or `learned`"})
]
ClassName = Annotated[
    Text, AfterValidator(_class_name), Field(json_schema_extra={"format": "`module:Class`"})
]
LatentWeights = Annotated[
    Annotated[tuple[Weight, ...], Tag("number")] | Annotated[WeightsName, Tag("text")],
    Discriminator(_text_or_number),
]
ThoughtNorm = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Literal["average"], Tag("text")],
    Discriminator(_text_or_number),
]


class Config(BaseModel):
    """One experiment. Immutable; `model_fields_set` names the keys that were written out.

    Raises: pydantic's ValidationError for a wrong type, an unknown key or an impossible
    combination; `load_config` turns these into one ConfigError with file, key, value and fix.
    Source: docs/specification.md, section 10.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    # General
    project: Text = "coconut"
    """Project name in Weights & Biases."""
    name: Text = Field(examples=["gsm-coconut"])
    """Name of this run: its folder under save_path, and its name in wandb."""
    save_path: FilePath = Field(examples=["exps"])
    """Folder that holds the runs; this one is save_path/name."""
    only_eval: bool = False
    """Evaluate load_model_path on val_path and stop, instead of training."""

    # Method: exactly one is true; in evaluation none is needed where the checkpoint records it
    coconut: bool = False
    """Train with latent thoughts in place of steps."""
    cot: bool = False
    """Train on all reasoning steps as text."""
    no_thoughts: bool = False
    """Drop steps by the same curriculum as coconut, with nothing in their place."""
    no_cot: bool = False
    """Train on question and answer alone, without steps."""

    # Curriculum
    c_thought: Count = 1
    """Latent thoughts for each replaced reasoning step."""
    epochs_per_stage: PositiveCount = 1
    """Epochs for each stage; one more step becomes latent at each stage."""
    max_latent_stage: Stages = Field(0, examples=["3"])
    """Maximum number of steps replaced by thoughts; the stage after it drops all steps that are
    still text and adds no further thoughts."""
    pad_latent_to_max: bool = True
    """Whether a record with fewer steps than the stage still gets the thoughts of the whole stage,
    in training and evaluation alike."""
    uniform_prob: float = Field(0.0, ge=0, le=1)
    """Probability that a training example takes a random stage, from 0 to its number of steps,
    instead of the epoch's."""
    curriculum: bool = True
    """false: every epoch is the last stage (w/o curriculum); coconut only."""

    # Latent thoughts
    thought: Literal["continuous", "pause", "pause_multipass"] = "continuous"
    """continuous: a thought is made from hidden states. pause: the latent positions keep their
    learned token embedding; pause_multipass: the same, read in as many passes as continuous
    thoughts take. Coconut only."""
    latent_window_size: PositiveCount = 3
    """Number m of hidden states that are averaged into a thought; 1 is the original Coconut. No
    benefit of 3 over 1 has been shown (docs/window.md)."""
    latent_weights: LatentWeights = (0.6, 0.3, 0.1)
    """Weights of the window: a list, nearest state first, of which the first m count; uniform;
    exponential:R, R^(j-1) for state j; or learned, the softmax of m parameters that start at
    0.6, 0.3, 0.1 (where m is not 3, at exponential:0.5)."""
    thought_norm: ThoughtNorm | None = None
    """average: the nearest state at the norm of the average, the control for what averaging does
    to the norm. A number: the thought is multiplied by it. Coconut only."""
    window_scope: Literal["sequence", "pass"] = "sequence"
    """sequence: the window covers everything before the thought. pass: later thoughts of a row see
    one state alone, as in the published contextual code."""
    coconut_class: ClassName | None = None
    """module:Class, a subclass of coconut.Coconut to train or evaluate, found from the working
    directory. Coconut only."""

    # Model
    model_id: FilePath | None = Field(None, examples=["openai-community/gpt2"])
    """Hugging Face name or local folder of the base model and its tokenizer; in evaluation not
    needed where load_model_path is a folder with both."""
    load_model_path: FilePath | None = Field(None, examples=["exps/gsm-cot/checkpoint_25"])
    """Weights to evaluate or to start from: a checkpoint directory, a Hugging Face model directory
    or a single-file state dict. None: model_id's own."""
    from_scratch: bool = False
    """Give model_id's architecture random weights; none are loaded."""
    new_token_init: Text = "<<"
    """The marker tokens' embeddings start as copies of this token's if the tokenizer has it as one
    token, else as the mean of all."""
    attn_implementation: Text | None = None
    """Attention kernel as transformers names it (eager, sdpa, flash_attention_2). None: the model's
    default."""

    # Data
    train_path: FilePath | None = Field(None, examples=["data/gsm_train.json"])
    """Training records; not read by only_eval."""
    val_path: FilePath = Field(examples=["data/gsm_valid.json"])
    """Records evaluated after each epoch, or by only_eval."""
    max_train_records: PositiveCount | None = None
    """Train on only the first N records of train_path. None: all."""
    allow_changed_data: bool = False
    """Resume a run even if train_path or val_path holds other records than when it began."""
    num_workers: Count = 2
    """Processes that prepare batches ahead of time, per rank."""

    # Training
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, record order, stage mixing and dropout."""
    resume: Count = 0
    """First epoch of a new run that starts from load_model_path; with only_eval, the epoch whose
    stage is evaluated where the checkpoint records none."""
    first_stage: Stages | None = None
    """First stage of a new run: another way to write resume: first_stage x epochs_per_stage."""
    num_epochs: PositiveCount | None = Field(None, examples=["25"])
    """Total number of epochs, including those skipped by resume. None, for coconut and no_thoughts:
    epochs_per_stage for each stage up to the first in which no training record has steps left."""
    batch_size_training: PositiveCount = 32
    """Records per forward and backward pass, per process."""
    tokens_per_micro_batch: PositiveCount | None = None
    """Split an effective batch by rows x columns of a pass instead, so that long and short records
    use memory evenly; batch_size_training then only counts towards the effective batch."""
    batch_size_eval: PositiveCount | None = None
    """Records generated at once, per process. None: batch_size_training."""
    gradient_accumulation_steps: PositiveCount = 1
    """Passes per optimizer step; overridden by effective_batch_size."""
    effective_batch_size: PositiveCount | None = None
    """Records per optimizer step over all processes; sets the accumulation. None:
    batch_size_training x gradient_accumulation_steps x processes."""
    lr: PositiveFloat = Field(1e-4, examples=["1.0e-4"])
    """Learning rate of AdamW."""
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule after the warmup."""
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW, on every weight but learned window weights."""
    max_grad_norm: PositiveFloat | None = None
    """Gradients are clipped to this norm. None: never."""
    reset_optimizer: Literal["stage", "epoch", "never"] = "stage"
    """When AdamW's moments are reset: stage (or true), whenever the acting stage changes; epoch, at
    every epoch as the published code does; never (or false)."""
    bf16: bool = False
    """Compute in bf16 over fp32 master weights and optimizer state. false: compute in fp32, with
    TF32 products on GPUs that have it, unless deterministic is true."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory; not with thoughts that take
    several passes, which read a cache that recomputation drops."""
    compile: bool = False
    """Compile the base model with torch.compile."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the model; auto chooses."""
    deterministic: bool = False
    """Deterministic kernels only, and on GPUs no TF32 for fp32; slower, or an error where no such
    kernel exists."""
    debug: bool = False
    """Trial run: at most 5,000 training and 32 validation records, no wandb, nothing saved."""

    # Evaluation, checkpoints, logging
    eval_every_steps: PositiveCount | None = None
    """Also evaluate every N optimizer steps, which writes to metrics.jsonl only. None: after each
    epoch only."""
    max_new_tokens: PositiveCount = 128
    """Maximum number of tokens generated for an answer, including reasoning text."""
    save_only_improve: bool = False
    """Keep a checkpoint only when validation accuracy improves. For coconut leave it false: early
    stages still write text and win."""
    keep_checkpoints: PositiveCount | None = None
    """Number of newest checkpoints to keep. None: all."""
    save_every_minutes: PositiveFloat | None = None
    """Also save the training state this often. None: after each epoch only."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """Weights & Biases; online falls back to offline where no key is stored. metrics.jsonl is
    written in any case."""

    @field_validator("latent_weights", mode="before")
    @classmethod
    def _list_or_name(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(value)
        if value in ("uniform", "learned") or _exponential_ratio(value) is not None:
            return value
        raise ValueError(
            "is not a list of numbers, uniform, learned or exponential:R with R above 0; write "
            "latent_weights: [0.6, 0.3, 0.1]"
        )

    @field_validator("reset_optimizer", mode="before")
    @classmethod
    def _reset_bool_as_word(cls, value: Any) -> Any:
        return {True: "stage", False: "never"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> "Config":
        problems = [problem for _, problem in combination_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        if self.first_stage is not None:
            # Everything else reads `resume` only.
            self.__dict__.update(resume=_first_epoch(self), first_stage=None)
            self.__pydantic_fields_set__.add("resume")
        return self

    @property
    def method(self) -> str | None:
        """The one method that is true: "coconut", "cot", "no_thoughts" or "no_cot".

        None in an evaluation that leaves it to the checkpoint, until the checkpoint is read.
        """
        return next((method for method in METHODS if getattr(self, method)), None)

    @property
    def run_dir(self) -> Path:
        """Folder of the run, save_path/name."""
        return Path(self.save_path) / self.name

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of `world_size` processes.

        Raises: ConfigError when effective_batch_size is not a multiple of the records in one pass
        of all processes.
        """
        if self.effective_batch_size is None:
            return self.gradient_accumulation_steps
        per_pass = self.batch_size_training * world_size
        steps, rest = divmod(self.effective_batch_size, per_pass)
        if rest:
            processes = f" x {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"effective_batch_size={self.effective_batch_size} is not a multiple of "
                f"batch_size_training={self.batch_size_training}{processes}; write "
                f"effective_batch_size: {(steps + 1) * per_pass} or change batch_size_training"
            )
        return steps

    def records_per_step(self, world_size: int) -> int:
        """The effective batch: records of an optimizer step over all `world_size` processes."""
        return self.batch_size_training * self.accumulation_steps(world_size) * world_size


Problem = tuple[tuple[str, ...], str]


def combination_problems(config: Config) -> Iterator[Problem]:
    """Yields (keys involved, problem with its fix) for settings that exclude each other."""
    yield from _method_problems(config)
    yield from _missing_for_training(config)
    yield from _latent_problems(config)
    yield from _run_problems(config)


def _method_problems(config: Config) -> Iterator[Problem]:
    chosen = [method for method in METHODS if getattr(config, method)]
    if not chosen:
        if not config.only_eval:
            yield METHODS, f"no method is chosen; set one of {', '.join(METHODS)} to true"
        return
    if len(chosen) > 1:
        fixes = [
            f"for {keep} set " + " and ".join(f"{m}: false" for m in chosen if m != keep)
            for keep in chosen
        ]
        yield METHODS, f"{' and '.join(chosen)} are true, only one may be; {', '.join(fixes)}"
        return
    method = chosen[0]
    if config.uniform_prob > 0 and method in ("cot", "no_cot"):
        yield (
            (*METHODS, "uniform_prob"),
            f"uniform_prob={config.uniform_prob} mixes stages, and {method} has only one; "
            "write uniform_prob: 0.0",
        )
    for key, neutral in _COCONUT_ONLY.items():
        value = getattr(config, key)
        if value != neutral and method != "coconut":
            yield (
                (*METHODS, key),
                f"{key}={value!r} is for coconut only, not {method}; write {key}: "
                f"{as_yaml(neutral)}",
            )


def _missing_for_training(config: Config) -> Iterator[Problem]:
    if config.only_eval:
        return
    chosen = {method for method in METHODS if getattr(config, method)}
    for key, methods in NEEDED_TO_TRAIN.items():
        is_counted = key == "num_epochs" and chosen <= set(METHODS_WITH_STAGES)
        is_given = key in config.model_fields_set and getattr(config, key) is not None
        is_null = key in config.model_fields_set and is_counted
        if chosen & set(methods) and not (is_given or is_null):
            yield (key,), f"{key} is missing; training needs it: add {key}: {example(key)}"


def _latent_problems(config: Config) -> Iterator[Problem]:
    if config.coconut and config.c_thought < 1:
        yield (
            ("c_thought", *METHODS),
            f"c_thought={config.c_thought} leaves coconut without thoughts; write c_thought: 1 "
            "or more, or choose no_thoughts",
        )
    if config.coconut and not config.curriculum and config.max_latent_stage < 1:
        yield (
            ("max_latent_stage", "curriculum", *METHODS),
            "max_latent_stage=0 with curriculum=False leaves no thoughts; write "
            "max_latent_stage: 1 or more",
        )
    checkpointed = config.activation_checkpointing and not config.only_eval
    if checkpointed and config.coconut and config.thought != "pause":
        yield (
            ("activation_checkpointing", "thought", "only_eval", *METHODS),
            f"activation_checkpointing=True drops the cache that thought={config.thought!r} reads; "
            "write activation_checkpointing: false (a smaller batch_size_training saves memory)",
        )
    is_pause = config.thought != "continuous"
    if is_pause and (config.thought_norm is not None or config.latent_weights == "learned"):
        key = "latent_weights" if config.latent_weights == "learned" else "thought_norm"
        yield (
            ("thought", key),
            f"{key}={getattr(config, key)!r} has no effect, because thought={config.thought!r} "
            "reads no hidden states; write thought: continuous, or leave "
            f"{key} out",
        )
    yield from _weights_problems(config)


def _weights_problems(config: Config) -> Iterator[Problem]:
    window, weights = config.latent_window_size, config.latent_weights
    if isinstance(weights, str):
        ratio = _exponential_ratio(weights)
        if ratio is not None and (window - 1) * math.log(ratio) > math.log(MAX_WEIGHT):
            yield (
                ("latent_weights", "latent_window_size"),
                f"latent_weights={weights!r} gives the last of {window} states a weight above "
                f"{MAX_WEIGHT:.0e}; write a smaller ratio",
            )
        return
    if len(weights) < window:
        yield (
            ("latent_weights", "latent_window_size"),
            f"latent_weights={list(weights)} has {len(weights)} of the {window} weights that "
            f"latent_window_size={window} asks for; write {window} weights, nearest state first",
        )
    if weights and weights[0] < MIN_FIRST_WEIGHT:
        yield (
            ("latent_weights",),
            f"latent_weights={list(weights)} gives the nearest state no weight, so a window of "
            "one state would be empty; write a first weight above 0",
        )


def _run_problems(config: Config) -> Iterator[Problem]:
    if config.name in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]|^\s|\s$", config.name):
        yield (
            ("name",),
            f"name={config.name!r} is not a plain folder name; write a name without separators, "
            "and put folders into save_path",
        )
    if config.only_eval and config.load_model_path is None:
        yield (
            ("only_eval", "load_model_path"),
            f"only_eval=True needs weights; write load_model_path: {example('load_model_path')}",
        )
    if config.from_scratch and config.load_model_path is not None:
        yield (
            ("from_scratch", "load_model_path"),
            f"from_scratch=True excludes load_model_path={config.load_model_path!r}; write "
            "from_scratch: false or load_model_path: None",
        )
    yield from _first_epoch_problems(config)
    if not config.only_eval:
        try:
            config.accumulation_steps(world_size=1)
        except ConfigError as error:
            yield ("effective_batch_size", "batch_size_training"), str(error)


def _first_epoch(config: Config) -> int:
    """The epoch that `first_stage` or `resume` names."""
    if config.first_stage is None:
        return config.resume
    return config.first_stage * config.epochs_per_stage


def _first_epoch_problems(config: Config) -> Iterator[Problem]:
    if config.first_stage is not None:
        yield from _first_stage_problems(config)
    first, last = _first_epoch(config), config.num_epochs
    if last is not None and first >= last and not config.only_eval:
        key = "resume" if config.first_stage is None else "first_stage"
        yield (
            ("only_eval", "num_epochs", key, "epochs_per_stage"),
            f"{key}={getattr(config, key)} leaves none of num_epochs={last} to train; write "
            f"num_epochs: {first + 1} or more, or a smaller {key}",
        )


def _first_stage_problems(config: Config) -> Iterator[Problem]:
    shown = f"first_stage={config.first_stage}"
    stages = config.max_latent_stage + 1
    if config.resume > 0:
        yield (
            ("first_stage", "resume"),
            f"{shown} and resume={config.resume} both name the first epoch; write resume: 0 or "
            "first_stage: null",
        )
    if config.cot or config.no_cot or not config.curriculum:
        what = "curriculum=False" if not config.curriculum else "cot" if config.cot else "no_cot"
        yield (
            ("first_stage", "curriculum", *METHODS),
            f"{shown} needs stages, and {what} has only one; write first_stage: null",
        )
    elif config.first_stage > stages:
        yield (
            ("first_stage", "max_latent_stage"),
            f"{shown} is past the last stage, max_latent_stage + 1 = {stages}; write a smaller one",
        )


def example(key: str) -> str:
    """A value for the key, as it would be written in a file."""
    field = Config.model_fields[key]
    if field.annotation is bool:
        return "true or false"
    return field.examples[0] if field.examples else as_yaml(field.default)


def as_yaml(value: Any) -> str:
    """A default of the schema as it would be written in a file."""
    return value if isinstance(value, str) else json.dumps(value)
