"""What all benchmarks share: options, model and batch, taking turns, tables and JSON."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from analysis.tables import markdown_table
from benchmarks import environment
from dataset import MARKERS
from engine import distributed
from utils import atomic_write_text

DEFAULT_FOLDER = Path("exps/benchmarks")
NUM_WORDS = 100
EOS = "<|endoftext|>"
SHAPES = Path(__file__).parent / "shapes"
QUICKSTART_MODEL = Path(__file__).parent.parent / "assets/quickstart-model"
# GPT-2's vocabulary and shape with the three markers; a model of its depth, so narrow that the
# host's work dominates; and a tiny model for trial runs.
MODELS = {
    "gpt2": {"vocab_size": 50260},
    "narrow": {"vocab_size": 512, "n_embd": 64, "n_head": 4, "attn_pdrop": 0.0},
    "tiny": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
}
LLAMA, QUICKSTART = "smollm2-135m", "quickstart"


@dataclass(frozen=True)
class Shape:
    """Records of equal length: question (with start marker), latents, answer (all labelled)."""

    records: int
    question: int
    latents: int
    answer: int

    @property
    def length(self) -> int:
        return self.question + self.latents + self.answer

    @property
    def num_labels(self) -> int:
        return self.records * self.answer

    def num_unneeded(self, window: int = 1) -> int:
        """The question's tokens whose states nothing needs.

        A thought averages the last `window` states before it; without thoughts a label needs one.
        """
        return max(self.question - (window if self.latents else 1), 0)

    def __str__(self) -> str:
        return f"{self.records} x ({self.question} + {self.latents} + {self.answer})"


# Options


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; the first paragraph of `doc` describes it."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--bf16", action="store_true", help="all but published in bf16")
    parser.add_argument(
        "--model",
        choices=(*MODELS, LLAMA, QUICKSTART),
        default="gpt2",
        help="shape; weights are random",
    )
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each contender")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: in {DEFAULT_FOLDER})")
    return parser


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, is_timed: bool = True
) -> argparse.Namespace:
    """The options; ends with status 2 if the device does not support them.

    is_timed: whether times are taken, which emulated bf16 would spoil.
    """
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable GPU; write --device cpu")
    if is_timed and options.bf16 and not distributed.computes_bf16_natively():
        parser.error("--bf16: this machine only emulates bf16, so its times mean nothing; omit it")
    return options


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape given by --records, --question, --latents and --answer."""
    return Shape(options.records, options.question, options.latents, options.answer)


def check_fits(parser: argparse.ArgumentParser, shape: Shape, new: int = 0) -> None:
    """End with status 2 unless the models have positions for `shape` and `new` more tokens."""
    length, limit = shape.length + new, GPT2Config().n_positions
    if length > limit:
        parser.error(f"{length} tokens per record exceed the models' {limit}; choose fewer")


def check_prompt(parser: argparse.ArgumentParser, question: int) -> None:
    """End with status 2 unless a question has a token before and one after its latents."""
    if question < 2:
        parser.error("--question 1: a token is needed before and one after the latents; write 2")


# Model and batch


def architecture_of(name: str, **shape) -> PretrainedConfig:
    """The named model's, with rows for the markers. shape: fields that override its own."""
    if name in MODELS:
        fields = MODELS[name] | shape
        end = fields["vocab_size"] - len(MARKERS) - 1
        return GPT2Config(**fields, bos_token_id=end, eos_token_id=end)
    folder = QUICKSTART_MODEL if name == QUICKSTART else SHAPES / name
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **shape)
    # Room for the words of `build_tokenizer` as well.
    config.vocab_size = max(config.vocab_size, 2 * NUM_WORDS) + len(MARKERS)
    return config


def build_model(name: str, **shape) -> PreTrainedModel:
    """The named model with seeded random weights and its own dropout, on the CPU.

    shape: as `architecture_of` takes it.
    """
    config = architecture_of(name, **shape)
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0 to w99 and ###; EOS and markers come last, spaces are dropped."""
    names = [f"w{i}" for i in range(NUM_WORDS)] + ["###"]
    words = {name: i for i, name in enumerate(names)}
    start, end, latent = MARKERS
    for number, name in enumerate((latent, end, start, EOS), 1):
        words[name] = vocab_size - number
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    return tokenizer


def make_batch(shape: Shape, vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """A seeded random batch without padding, as dataset.Collator would make it: (B, T), int64."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.records, shape.length)
    input_ids = torch.randint(vocab_size - len(MARKERS) - 1, size, generator=generator)
    labels = torch.full_like(input_ids, -100)
    answer = slice(shape.question + shape.latents, None)
    labels[:, answer] = input_ids[:, answer]
    input_ids[:, shape.question : shape.question + shape.latents] = vocab_size - 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "position_ids": torch.arange(shape.length).expand(size).contiguous(),
        "labels": labels,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


# Time


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the middle two."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock that times contenders: wall-clock seconds, or CPU seconds of this process.

    CPU time is used with one thread on a CPU: unlike wall-clock time it excludes other jobs.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def take_turns(
    contenders: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contender in each of `repeats` rounds; every round runs all, one by one."""
    clock = clock_of(device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            synchronize(device)
            began = clock()
            contender()
            synchronize(device)
            seconds[name].append(clock() - began)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def published_precision():
    """Use torch's default precision for fp32 products, whatever engine.distributed has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Results


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table whose columns are also aligned as plain text."""
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    print("\n".join(markdown_table(cells)), flush=True)


def write_report(name: str, options: argparse.Namespace, rows: list[dict]) -> Path:
    """Write the JSON of a benchmark (name, environment, options, rows); returns its path."""
    path = report_path(name, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    content = {
        "benchmark": name,
        "environment": environment.describe(device) | {"clock": clock_of(device).__name__},
        "options": plain,
        "rows": rows,
    }
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")
    print(f"\n{path}")
    return path


def report_path(name: str, options: argparse.Namespace) -> Path:
    """The path of the JSON of benchmark `name`."""
    return options.out or DEFAULT_FOLDER / f"{name}.json"
