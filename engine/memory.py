"""What a training step needs of a device's memory, counted before anything runs.

The step itself is carried out on fake tensors, which have shapes and no storage: forward and
backward pass of Coconut over a micro-batch of the data's own lengths. A ledger follows every
storage from its making to its release and remembers what was alive at the peak, so that whatever
the passes or autograd keep is counted and no constant has to be kept true. Depth is extrapolated
from two shallow copies of the model, since every layer after the first few costs the same.

What accumulation, DDP and FSDP add is arithmetic over the sizes of parameters (`share`). Not
counted: what the device's runtime and its allocator keep for themselves, on a GPU about half a GiB.
"""

import copy
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache

import datasets
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from coconut import Coconut, Layout
from dataset import (
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    TokenizedRecords,
    draw_stages,
    effective_batches,
    micro_batches,
)
from engine.config import Config
from layers import as_on_gpu
from utils import ConfigError, UserError

# Shallow copies whose steps are traced; a model of no more layers is traced as it is.
TRACED_DEPTHS = (2, 3)
# GPUs attend by kernels that keep no attention weights, dropout or not; CPUs have such a kernel
# without dropout alone.
ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
BYTES_OF_FP32 = 4
# Forward pass; backward pass until the first gradient of a block's parameter; until those of all
# blocks; to the end.
PHASES = ("forward", "backward", "blocks", "end")
BYTES_OF_MOMENTS = 2 * BYTES_OF_FP32  # AdamW's


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the peak of a training step, by what they hold.

    parameters: whole or sharded, and what FSDP gathers.
    gradients: those that the optimizer reads.
    optimizer: AdamW's moments.
    activations: what the forward pass left for the backward pass.
    logits: at the labels, and their gradients.
    temporaries: made in the backward pass and released in it.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0

    @property
    def peak(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ModelShape:
    """A model that can be built at another depth.

    model_class, architecture: of transformers; architecture counts the markers' rows.
    wrap: makes a Coconut of the base model.
    """

    model_class: type[PreTrainedModel]
    architecture: PretrainedConfig
    wrap: Callable[[PreTrainedModel], Coconut]

    def at_depth(self, depth: int, attention_dropout: bool = True) -> "ModelShape":
        """The same with `depth` layers, and without dropout of attention weights if so asked."""
        architecture = copy.deepcopy(self.architecture)
        text_config = architecture.get_text_config()
        for name, value in list(vars(text_config).items()):
            if isinstance(value, list) and len(value) == self.depth:
                setattr(text_config, name, value[:depth])
        text_config.num_hidden_layers = depth
        if not attention_dropout:
            for name in ATTENTION_DROPOUTS:
                if getattr(text_config, name, None):
                    setattr(text_config, name, 0.0)
        return replace(self, architecture=architecture)

    @property
    def depth(self) -> int:
        return self.architecture.get_text_config().num_hidden_layers

    def build(self) -> Coconut:
        """The model in training mode, on whatever device or mode is the current one."""
        base = self.model_class(copy.deepcopy(self.architecture))
        return self.wrap(base).train()


@dataclass(eq=False)
class _Storage:
    """A storage made in a traced step; made_in: the phase. num_elements: of its first tensor."""

    num_bytes: int
    num_elements: int
    made_in: str
    watch: weakref.ref


class _Ledger(TorchDispatchMode):
    """Within, follows the storages that operations make; remembers those alive at each peak.

    phase: of the step now. peaks: phase -> what was alive when most was in it.
    """

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.phase = "forward"
        self.num_bytes = 0
        self.alive: dict[int, _Storage] = {}  # by address
        self.peaks: dict[str, tuple[int, list[_Storage]]] = {}
        # Kept here, so that no storage made later has the address of one of them.
        self.known = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive or key in self.known:
            return
        watch = weakref.ref(storage, lambda _: self._leave(key))
        self.alive[key] = _Storage(storage.nbytes(), tensor.numel(), self.phase, watch)
        self.num_bytes += storage.nbytes()
        if self.num_bytes > self.peaks.get(self.phase, (-1,))[0]:
            self.peaks[self.phase] = self.num_bytes, list(self.alive.values())

    def _leave(self, key: int) -> None:
        self.num_bytes -= self.alive.pop(key).num_bytes


def trace_step(shape: ModelShape, batch: dict[str, Tensor], bf16: bool) -> list[StepMemory]:
    """One step of `shape` at its own depth, over one micro-batch without sharding.

    By a CPU's operations, or a GPU's within layers.as_on_gpu.

    batch: as dataset.Collator makes it, on the CPU.
    Returns the peak of each of PHASES. Each of them grows linearly with the depth of the model; the
    highest of all need not, since another phase may hold it in a shallow model than in a deep one.
    """
    keys = ("input_ids", "attention_mask", "labels", "position_ids")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model = shape.build()
    layout = model.layout(*(batch[key] for key in keys[:3]))
    with fake:
        inputs = {key: fake.from_tensor(batch[key]) for key in keys}
        inputs["layout"] = fake_layout(fake, layout)
        parameters = [p for p in model.parameters() if p.requires_grad]
        ledger = _Ledger([*model.parameters(), *model.buffers(), *_tensors(inputs)])
        _announce_gradients(model, ledger)
        with ledger:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**inputs)
            num_logits = output.logits.numel()
            ledger.phase = "backward"
            output.loss.backward()
        keys = {p.grad.untyped_storage()._cdata for p in parameters if p.grad is not None}
        gradients = {id(ledger.alive[key]) for key in keys if key in ledger.alive}
    peaks = [ledger.peaks.get(phase, (0, [])) for phase in PHASES]
    return [_sort(alive, parameters, gradients, num_logits) for _, alive in peaks]


def _announce_gradients(model: Coconut, ledger: _Ledger) -> None:
    """Let the ledger's phase follow the gradients of parameters as the backward pass makes them."""
    in_blocks = {id(p) for block in model.blocks for p in block.parameters()}

    def announce(parameter: Tensor) -> None:
        if id(parameter) in in_blocks:
            ledger.phase = "blocks"
        elif ledger.phase == "blocks":
            ledger.phase = "end"

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(announce)


def _tensors(tree: dict) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def fake_layout(fake: FakeTensorMode, layout: Layout) -> Layout:
    """`layout` with tensors of `fake`, which have no storage."""
    tokens = [tokens.map(fake.from_tensor) for tokens in layout.tokens]
    labels = fake.from_tensor(layout.label_indices)
    return Layout(layout.pass_starts, layout.thought_columns, tokens, labels)


def _sort(
    alive: list[_Storage], parameters: list[Tensor], gradients: set[int], num_logits: int
) -> StepMemory:
    """What was `alive`, by what it holds. gradients: the identities of storages of gradients."""
    sums = dict.fromkeys(("gradients", "activations", "logits", "temporaries"), 0)
    for storage in alive:
        if id(storage) in gradients:
            held = "gradients"
        elif storage.num_elements == num_logits:
            held = "logits"
        else:
            held = "activations" if storage.made_in == "forward" else "temporaries"
        sums[held] += storage.num_bytes
    num_bytes = sum(p.numel() * p.element_size() for p in parameters)
    moments = BYTES_OF_MOMENTS * sum(p.numel() for p in parameters)
    return StepMemory(parameters=num_bytes, optimizer=moments, **sums)


def step_peaks(
    shape: ModelShape, batch: dict[str, Tensor], bf16: bool, on_gpu: bool = True
) -> list[StepMemory]:
    """The peaks of a step of the whole model, by two shallow copies of it where it is deep.

    As `trace_step`, but of a step on a GPU unless `on_gpu` is false.
    """
    depth, (first, second) = shape.depth, TRACED_DEPTHS

    def trace(at: int) -> list[StepMemory]:
        # A GPU's kernels keep nothing for dropout of attention weights.
        copied = shape.at_depth(at, attention_dropout=not on_gpu)
        with as_on_gpu() if on_gpu else nullcontext():
            return trace_step(copied, batch, bf16)

    if depth <= second:
        return trace(depth)
    ratio = (depth - first) / (second - first)
    pairs = zip(trace(first), trace(second), strict=True)
    return [_extrapolate(low, high, ratio) for low, high in pairs]


def _extrapolate(low: StepMemory, high: StepMemory, ratio: float) -> StepMemory:
    sums = {}
    for field in fields(StepMemory):
        begin, end = getattr(low, field.name), getattr(high, field.name)
        sums[field.name] = round(begin + ratio * (end - begin))
    return StepMemory(**sums)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all, those of the blocks together, the largest block, the largest."""

    whole: int
    blocks: int
    largest_block: int
    largest_parameter: int

    @classmethod
    def of(cls, shape: ModelShape) -> "Sizes":
        """Those of the model itself, built without storage."""
        with torch.device("meta"):
            model = shape.build()
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        sizes = [p.numel() for p in model.parameters()]
        return cls(sum(sizes), sum(blocks), max(blocks, default=0), max(sizes))


def share(
    peaks: list[StepMemory],
    sizes: Sizes,
    kind: str,
    num_ranks: int,
    bf16: bool,
    accumulates: bool,
    gathered: bool = True,
) -> StepMemory:
    """The peak on one of `num_ranks` devices that share a model as parallel.py does.

    peaks: from `step_peaks`, of the largest micro-batch of a rank.
    kind: "none", "ddp" or "fsdp"; gathered: of FSDP, as parallel.Parallel has it.
    accumulates: whether a step has several micro-batches, so that gradients are there before the
        last of them.
    """
    if kind == "none" and not accumulates:
        return max(peaks, key=lambda memory: memory.peak)
    # Gradients are kept whole from the start, and a new one is made before it is added to its own.
    whole, new = BYTES_OF_FP32 * sizes.whole, BYTES_OF_FP32 * sizes.largest_parameter
    kept = [
        replace(
            memory,
            gradients=whole,
            temporaries=memory.temporaries + new * (phase in ("blocks", "end")),
        )
        for phase, memory in zip(PHASES, peaks, strict=True)
    ]
    memory = max(kept, key=lambda memory: memory.peak)
    if kind != "fsdp":
        return memory
    width = 2 if bf16 else BYTES_OF_FP32
    held = sizes.blocks if gathered else 2 * sizes.largest_block
    gathered_bytes = width * held + BYTES_OF_FP32 * (sizes.whole - sizes.blocks)
    # Without accumulation a unit's gradients are whole only until they are reduced.
    largest_unit = max(sizes.largest_block, sizes.whole - sizes.blocks)
    gradients = whole if accumulates else BYTES_OF_FP32 * largest_unit
    return replace(
        memory,
        parameters=whole // num_ranks + gathered_bytes,
        gradients=whole // num_ranks + gradients,
        optimizer=memory.optimizer // num_ranks,
    )


@dataclass(frozen=True)
class Lengths:
    """Tokens of a record's parts, for a dry run without data."""

    question: int
    num_steps: int
    step: int
    answer: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """From "QUESTION,COUNTxSTEP,ANSWER", such as 64,3x8,5.

        Raises: UserError for anything else.
        """
        match = re.fullmatch(r"(\d+),(\d+)x(\d+),(\d+)", text)
        lengths = cls(*map(int, match.groups())) if match else None
        if lengths is None or min(lengths.question, lengths.step, lengths.answer) < 1:
            raise UserError(
                f"--lengths {text}: write tokens of the question, number x tokens of the steps,"
                " tokens of the answer: --lengths 64,3x8,5"
            )
        return lengths

    def records(self, num_records: int) -> TokenizedRecords:
        """That many records of these lengths."""
        row = {
            "question_ids": [0] * self.question,
            "step_ids": [[0] * self.step] * self.num_steps,
            "answer_ids": [0] * self.answer,
        }
        table = datasets.Dataset.from_list([row] * num_records)
        lengths = (self.num_steps, self.question, self.answer)
        columns = [np.full(num_records, length) for length in lengths]
        steps = np.full(num_records * self.num_steps, self.step)
        return TokenizedRecords("--lengths", "", table, *columns, steps)


def largest_micro_batches(
    config: Config, records: TokenizedRecords, curriculum: Curriculum, ids: SpecialIds, ranks: int
) -> dict[int, dict[str, Tensor]]:
    """For each stage of the run's epochs, the micro-batch of most tokens and labels it will make.

    A label counts as a token: its logits take about as much memory as a token's layers.
    """
    largest: dict[int, tuple[int, StagedRecords, np.ndarray]] = {}
    for epoch in range(config.resume, config.num_epochs):
        stage = curriculum.stage(epoch)
        stages = draw_stages(curriculum, records.num_steps, epoch, config.uniform_prob, config.seed)
        staged = StagedRecords.of(records, curriculum, stages)
        sizes = staged.prompt_lengths + 2 * staged.num_labels
        for indices in _micro_batches(config, staged, epoch, ranks):
            size = int(sizes[indices].sum())
            if stage not in largest or size > largest[stage][0]:
                largest[stage] = size, staged, indices
    return {
        stage: Collator(staged, ids)[indices] for stage, (_, staged, indices) in largest.items()
    }


def _micro_batches(
    config: Config, staged: StagedRecords, epoch: int, ranks: int
) -> Iterator[np.ndarray]:
    """All micro-batches of an epoch, whichever rank reads them."""
    num_records = len(staged.num_latents)
    records_per_step = config.records_per_step(ranks)
    for effective in effective_batches(num_records, records_per_step, config.seed, epoch):
        for shares in micro_batches(
            effective, staged, config.batch_size_training, ranks, config.tokens_per_micro_batch
        ):
            yield from shares


def peak_function(
    config: Config, shape: ModelShape, batches: dict[int, dict[str, Tensor]], ranks: int
) -> Callable[[str, bool], int]:
    """(kind, gathered) -> bytes that the run's largest step needs of each of `ranks` GPUs.

    batches: stage -> its largest micro-batch.
    """
    tokens = {
        stage: int(batch["attention_mask"].sum() + (batch["labels"] >= 0).sum())
        for stage, batch in batches.items()
    }
    batch = batches[max(tokens, key=tokens.get)]
    accumulates = config.accumulation_steps(ranks) > 1 or bool(config.tokens_per_micro_batch)
    sizes = Sizes.of(shape)

    @cache
    def peaks() -> list[StepMemory]:
        return step_peaks(shape, batch, config.bf16)

    def peak(kind: str, gathered: bool) -> int:
        return share(peaks(), sizes, kind, ranks, config.bf16, accumulates, gathered).peak

    return peak


@dataclass(frozen=True)
class StagePeaks:
    """The peaks of one stage's largest micro-batch, from `step_peaks`: in fp32 and in bf16."""

    stage: int
    batch_shape: tuple[int, int]
    fp32: list[StepMemory]
    bf16: list[StepMemory]


def memory_lines(
    config: Config, shape: ModelShape, batches: dict[int, dict[str, Tensor]], num_ranks: int
) -> list[str]:
    """A table of peaks on a GPU by stage, device sharing and precision, and what they consist of.

    batches: stage -> its largest micro-batch. num_ranks: those of DDP and FSDP.
    """
    sizes = Sizes.of(shape)
    stages = [
        StagePeaks(
            stage,
            tuple(batch["input_ids"].shape),
            *(step_peaks(shape, batch, bf16) for bf16 in (False, True)),
        )
        for stage, batch in sorted(batches.items())
    ]
    columns = {"one process": ("none", 1)}
    for kind in ("ddp", "fsdp"):
        columns[f"{kind.upper()}, {num_ranks} ranks"] = (kind, num_ranks)
    lines = [
        "memory at the peak of a training step, GiB on each GPU: estimated, without about half a"
        " GiB of CUDA's own and freed memory that torch keeps",
        f"{'stage':>5}  {'micro-batch':>12}" + "".join(f"  {name:>15}" for name in columns),
        " " * 19 + "".join(f"  {'fp32':>7} {'bf16':>7}" for _ in columns),
    ]
    for peaks in stages:
        rows, length = peaks.batch_shape
        line = f"{peaks.stage:>5}  {f'{rows} x {length}':>12}"
        for kind, ranks in columns.values():
            both = (_shared(config, peaks, sizes, kind, ranks, bf16) for bf16 in (False, True))
            line += "  " + " ".join(f"{_gib(memory):>7}" for memory in both)
        lines.append(line)
    held = [(p.stage, _shared(config, p, sizes, "none", 1, config.bf16)) for p in stages]
    names = [field.name for field in fields(StepMemory)]
    lines += [
        f"what it holds in one process, {'bf16' if config.bf16 else 'fp32'}",
        f"{'stage':>5}" + "".join(f"  {name:>12}" for name in names),
    ]
    for stage, memory in held:
        cells = (getattr(memory, name) / 2**30 for name in names)
        lines.append(f"{stage:>5}" + "".join(f"  {cell:>12.2f}" for cell in cells))
    return lines


def _shared(
    config: Config, peaks: StagePeaks, sizes: Sizes, kind: str, ranks: int, bf16: bool
) -> StepMemory | None:
    """`share` of a stage's peaks; None where the effective batch cannot be split so."""
    try:
        accumulates = config.accumulation_steps(ranks) > 1 or bool(config.tokens_per_micro_batch)
    except ConfigError:
        return None
    return share(peaks.bf16 if bf16 else peaks.fp32, sizes, kind, ranks, bf16, accumulates)


def _gib(memory: StepMemory | None) -> str:
    return "-" if memory is None else f"{memory.peak / 2**30:.2f}"
