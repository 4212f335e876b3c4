"""The settings of one run: every key with its range, default and meaning, and rules between keys.

docs/specification.md, section 10. Each key is described at its field in `Config` and nowhere else.
Reading files and the words of errors are config_file.py's part; whether files, models or
checkpoints exist is checked by the modules which open them. Imports no torch, so that a wrong file
is reported within a second.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
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

# Evaluation takes these from the checkpoint; in training a silent default would change the run.
NEEDED_TO_TRAIN = {
    "train_path": METHODS,
    "num_epochs": METHODS,
    "batch_size_training": METHODS,
    "c_thought": ("coconut",),
    "epochs_per_stage": ("coconut", "no_thoughts"),
    "max_latent_stage": ("coconut", "no_thoughts"),
}

# NUL ends a name for the system, so what follows it would go unseen.
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]
# A larger count is a slip, and would take hours or all memory before anything is said.
Count = Annotated[int, Field(ge=0, le=1_000_000)]
PositiveCount = Annotated[int, Field(gt=0, le=1_000_000)]
Stages = Annotated[int, Field(ge=0, le=1000)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
# Named windows; exponential:R weighs state j by R^(j-1).
NAMED_WEIGHTS = r"^(uniform|learned|exponential:[0-9.eE+-]+)$"
WindowWeights = Annotated[
    Annotated[tuple[Weight, ...], Tag("list")]
    | Annotated[str, Field(pattern=NAMED_WEIGHTS), Tag("name")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "list"),
]
ThoughtNorm = Annotated[
    Annotated[None, Tag("none")]
    | Annotated[Literal["average"], Tag("name")]
    | Annotated[PositiveFloat, Tag("number")],
    Discriminator(
        lambda value: "none" if value is None else "name" if isinstance(value, str) else "number"
    ),
]
UNION_TAGS = ("list", "name", "none", "number")
# Below this the nearest state alone would be divided by nothing in the model's precision.
LEAST_FIRST_WEIGHT = 1e-9


class Config(BaseModel):
    """One experiment. Immutable; `model_fields_set` names the keys that were written out.

    Raises pydantic's ValidationError for a wrong type, an unknown key or an impossible
    combination; `load_config` turns these into one ConfigError with file, key, value and fix.
    Source: SPEC section 10.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    # General
    project: Text = "coconut"
    """Project name in Weights & Biases."""
    name: Text = Field(examples=["gsm-coconut"])
    """Name of this run: its folder under save_path, and its name in wandb."""
    save_path: Text = Field(examples=["exps"])
    """Folder that holds the runs; this one is save_path/name."""
    only_eval: bool = False
    """Evaluate load_model_path on val_path and stop, instead of training."""

    # Method: exactly one is true
    coconut: bool = False
    """Train with latent thoughts in place of steps."""
    cot: bool = False
    """Train on all reasoning steps as text."""
    no_thoughts: bool = False
    """Drop steps by the same curriculum as coconut, with nothing in place."""
    no_cot: bool = False
    """Train on question and answer alone, without steps."""

    # Curriculum
    c_thought: Count = 1
    """Latent thoughts for each replaced reasoning step."""
    epochs_per_stage: PositiveCount = 1
    """Epochs for each stage; one more step becomes latent at each stage."""
    max_latent_stage: Stages = Field(0, examples=["3"])
    """Most steps that are replaced by thoughts; one stage more drops all steps that are still text
    and adds no further thoughts."""
    pad_latent_to_max: bool = True
    """Whether a record with fewer steps than the stage still gets thoughts for the whole stage, in
    training and evaluation alike."""
    uniform_prob: float = Field(0.0, ge=0, le=1)
    """Probability that a training example takes a stage drawn from 0 to its number of steps instead
    of the epoch's."""
    curriculum: bool = True
    """false: every epoch is the last stage (w/o curriculum); coconut only."""

    # Latent thoughts
    thought: Literal["continuous", "pause", "pause_multipass"] = "continuous"
    """continuous: a thought is made from hidden states. pause: the latent positions keep their
    learned token embedding. pause_multipass: as pause, read in as many passes as continuous
    thoughts take; coconut only."""
    latent_window_size: PositiveCount = 3
    """Number m of hidden states that are averaged into a thought; 1 is the original Coconut."""
    latent_weights: WindowWeights = (0.6, 0.3, 0.1)
    """Weights of the window: a list, nearest state first, of which the first m count; uniform;
    exponential:R, where state j weighs R^(j-1); or learned, a softmax over m parameters."""
    window_scope: Literal["sequence", "pass"] = "sequence"
    """sequence: the window covers everything before the thought. pass: later thoughts of a row see
    one state alone, as in the published contextual code."""

    thought_norm: ThoughtNorm = None
    """None: a thought is the average. average: the nearest state at the norm of the average, the
    control for what averaging does to the norm. A number: the average times that number."""
    coconut_class: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = Field(
        None, examples=["my_thoughts:LastStateOnly"]
    )
    """Subclass of Coconut to train, as module:Class, found from the working directory."""

    # Model
    model_id: Text = Field(examples=["openai-community/gpt2"])
    """Hugging Face name or local folder of the base model and its tokenizer."""
    load_model_path: Text | None = Field(None, examples=["exps/gsm-cot/checkpoint_25"])
    """Weights to evaluate or to start from: a checkpoint directory, a Hugging Face model directory
    or a single-file state dict. None: model_id's own."""
    from_scratch: bool = False
    """Give model_id's architecture random weights; none are loaded."""
    new_token_init: Text = "<<"
    """The marker tokens' embeddings start as copies of this token's, where the tokenizer has it as
    one token; else as the mean of all."""
    attn_implementation: Text | None = None
    """Attention kernel as transformers names it (eager, sdpa, flash_attention_2). None: the model's
    default."""

    # Data
    train_path: Text | None = Field(None, examples=["data/gsm_train.json"])
    """Training records; not read by only_eval."""
    val_path: Text = Field(examples=["data/gsm_valid.json"])
    """Records evaluated after each epoch, or by only_eval."""
    allow_changed_data: bool = False
    """Go on with a run although train_path or val_path holds other records than when it began."""
    max_train_records: PositiveCount | None = None
    """Train on the first records of train_path only. None: all."""
    num_workers: Count = 2
    """Processes that make batches ahead of time, for each rank."""

    # Training
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of weights, record order, stage mixing and dropout."""
    resume: Count = 0
    """First epoch of a new run that starts from load_model_path; with only_eval the epoch whose
    stage is taken where the checkpoint records none."""
    first_stage: Stages | None = None
    """Stage that a new run starts at: resume is then this many times epochs_per_stage."""
    num_epochs: PositiveCount | None = Field(1, examples=["25"])
    """Epoch count in total, those skipped by resume included. None (coconut and no_thoughts): up to
    the end of the first stage in which no training record has text left."""
    batch_size_training: PositiveCount = 32
    """Records in a forward and backward pass, for each process."""
    tokens_per_micro_batch: PositiveCount | None = None
    """Cut an effective batch by rows x columns of a pass instead, so that long and short records
    use the memory alike; batch_size_training then only counts towards the effective batch."""
    batch_size_eval: PositiveCount | None = None
    """Records generated at once, for each process. None: batch_size_training."""
    gradient_accumulation_steps: PositiveCount = 1
    """Passes for an optimizer step; overruled by effective_batch_size."""
    effective_batch_size: PositiveCount | None = None
    """Records for an optimizer step over all processes; sets the accumulation. None:
    batch_size_training x gradient_accumulation_steps x processes."""
    lr: PositiveFloat = Field(1e-4, examples=["1.0e-4"])
    """Learning rate of AdamW."""
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warmup."""
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of AdamW, on every weight."""
    max_grad_norm: PositiveFloat | None = None
    """Gradients are clipped to this norm. None: never."""
    reset_optimizer: Literal["stage", "epoch", "never"] = "stage"
    """When AdamW forgets its moments: stage (or true) at each change of the acting stage, epoch at
    each epoch as the published code does, never (or false)."""
    bf16: bool = False
    """Compute in bf16 over fp32 master weights and optimizer state. false: in fp32, for whose
    products GPUs that have TF32 take that, unless deterministic is true."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory; not with continuous thoughts,
    which read a cache that recomputation drops."""
    compile: bool = False
    """Compile the base model with torch.compile."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the model; auto chooses."""
    deterministic: bool = False
    """Deterministic kernels only, and on GPUs no TF32 for fp32; slower, or an error where no such
    kernel exists."""
    debug: bool = False
    """Trial: at most 5,000 training and 32 validation records, no wandb, nothing saved."""

    # Evaluation, checkpoints, logging
    max_new_tokens: PositiveCount = 128
    """Most tokens generated for an answer, reasoning text included."""
    eval_every_steps: PositiveCount | None = None
    """Evaluate also after every so many optimizer steps, logged only. None: after epochs only."""
    save_only_improve: bool = False
    """Keep a checkpoint only when validation accuracy improves. For coconut leave it false: early
    stages still write text and win."""
    keep_checkpoints: PositiveCount | None = None
    """Newest checkpoints that are kept. None: all."""
    save_every_minutes: PositiveFloat | None = None
    """Save the state to resume from also at this interval. None: each epoch only."""
    wandb: Literal["online", "offline", "disabled"] = "online"
    """Weights & Biases; online goes offline where no key is stored. metrics.jsonl is written in any
    case."""

    @field_validator("latent_weights", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("reset_optimizer", mode="before")
    @classmethod
    def _reset_bool_as_word(cls, value: Any) -> Any:
        return {True: "stage", False: "never"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        problems = [problem for _, problem in combination_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def method(self) -> str:
        """The one method that is true: "coconut", "cot", "no_thoughts" or "no_cot"."""
        return next(method for method in METHODS if getattr(self, method))

    @property
    def window_weights(self) -> list[float] | str:
        """The weights of the window as numbers, nearest state first; "learned" where they are."""
        m, weights = self.latent_window_size, self.latent_weights
        if weights == "learned":
            return weights
        if weights == "uniform":
            return [1.0] * m
        if isinstance(weights, str):
            ratio = float(weights.partition(":")[2])
            return [ratio**j for j in range(m)]
        return list(weights[:m])

    @property
    def run_dir(self) -> Path:
        """Folder of the run, save_path/name."""
        return Path(self.save_path) / self.name

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches for an optimizer step on each of `world_size` processes.

        Raises ConfigError when effective_batch_size is not a multiple of the records that all
        processes take at once. Source: SPEC section 10.
        """
        if self.effective_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = self.batch_size_training * world_size
        steps, rest = divmod(self.effective_batch_size, at_once)
        if rest:
            processes = f" x {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"effective_batch_size={self.effective_batch_size} is not a multiple of "
                f"batch_size_training={self.batch_size_training}{processes}; write "
                f"effective_batch_size: {(steps + 1) * at_once} or change batch_size_training"
            )
        return steps

    def records_per_step(self, world_size: int) -> int:
        """The effective batch: records of an optimizer step over all `world_size` processes."""
        return self.batch_size_training * self.accumulation_steps(world_size) * world_size


Problem = tuple[tuple[str, ...], str]


def combination_problems(config: Config) -> Iterator[Problem]:
    """Yields (keys involved, problem with its fix) for settings that cannot stand together."""
    yield from _method_problems(config)
    yield from _missing_for_training(config)
    yield from _latent_problems(config)
    yield from _run_problems(config)


def _method_problems(config: Config) -> Iterator[Problem]:
    chosen = [method for method in METHODS if getattr(config, method)]
    if not chosen:
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
    if config.thought != "continuous" and method != "coconut":
        yield (
            (*METHODS, "thought"),
            f"thought={config.thought!r} needs latent positions, and {method} has none; write "
            f"thought: continuous, or coconut: true and {method}: false",
        )
    if not config.curriculum and method != "coconut":
        yield (
            (*METHODS, "curriculum"),
            f"curriculum=False is for coconut alone, not {method}; write curriculum: true",
        )
    for key in ("thought_norm", "coconut_class"):
        if getattr(config, key) is not None and method != "coconut":
            yield (
                (*METHODS, key),
                f"{key}={getattr(config, key)!r} is for coconut alone, not {method}; write"
                f" {key}: None",
            )


def _missing_for_training(config: Config) -> Iterator[Problem]:
    if config.only_eval:
        return
    chosen = {method for method in METHODS if getattr(config, method)}
    for key, methods in NEEDED_TO_TRAIN.items():
        written = key in config.model_fields_set
        if key == "num_epochs" and chosen & {"coconut", "no_thoughts"}:
            written = written or config.num_epochs is None
        else:
            written = written and getattr(config, key) is not None
        if not written and chosen & set(methods):
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
    if checkpointed and config.coconut and config.thought == "continuous":
        yield (
            ("activation_checkpointing", "thought", "only_eval", *METHODS),
            "activation_checkpointing=True drops the cache that continuous thoughts are read from; "
            "write activation_checkpointing: false (a smaller batch_size_training saves memory)",
        )
    window, weights = config.latent_window_size, config.latent_weights
    if isinstance(weights, str):
        yield from _named_weights_problems(weights)
        return
    if len(weights) < window:
        yield (
            ("latent_weights", "latent_window_size"),
            f"latent_weights={list(weights)} has {len(weights)} of the {window} weights that "
            f"latent_window_size={window} asks for; write {window} weights, nearest state first",
        )
    if weights and weights[0] < LEAST_FIRST_WEIGHT:
        yield (
            ("latent_weights",),
            f"latent_weights={list(weights)} gives the nearest state no weight, so a window of "
            "one state would be empty; write a first weight above 0",
        )


def _named_weights_problems(name: str) -> Iterator[Problem]:
    kind, _, ratio = name.partition(":")
    try:
        is_right = kind != "exponential" or 0 < float(ratio) < 1e3
    except ValueError:
        is_right = False
    if not is_right:
        yield (
            ("latent_weights",),
            f"latent_weights={name!r} has no positive number after the colon; write"
            " latent_weights: exponential:0.5",
        )


def _schedule_problems(config: Config) -> Iterator[Problem]:
    if config.first_stage is not None:
        keys = ("first_stage", "resume", "curriculum", *METHODS)
        if "resume" in config.model_fields_set:
            yield (
                keys,
                f"first_stage={config.first_stage} means resume="
                f"{config.first_stage * config.epochs_per_stage}, and resume={config.resume} is"
                " written too; keep one",
            )
        elif config.cot or config.no_cot or not config.curriculum:
            yield keys, "first_stage needs stages; write resume instead"
    if config.num_epochs is None and (config.cot or config.no_cot):
        yield (
            ("num_epochs", *METHODS),
            "num_epochs=None is for coconut and no_thoughts, whose stages end; write num_epochs:"
            f" {example('num_epochs')}",
        )


def _run_problems(config: Config) -> Iterator[Problem]:
    yield from _schedule_problems(config)
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
    starts_late = (
        config.num_epochs is not None
        and config.resume >= config.num_epochs
        and "num_epochs" in config.model_fields_set
    )
    if starts_late and not config.only_eval:
        yield (
            ("only_eval", "resume", "num_epochs"),
            f"resume={config.resume} leaves none of num_epochs={config.num_epochs} to train; "
            f"write num_epochs: {config.resume + 1} or more, or a smaller resume",
        )
    if not config.only_eval:
        try:
            config.accumulation_steps(world_size=1)
        except ConfigError as error:
            yield ("effective_batch_size", "batch_size_training"), str(error)


def example(key: str) -> str:
    """A value to suggest for `key`, as it is written in YAML."""
    field = Config.model_fields[key]
    if field.examples:
        return field.examples[0]
    return field.default if isinstance(field.default, str) else json.dumps(field.default)
