"""Records on disk -> token ids -> curriculum -> the examples of a stage -> padded batches.

Implements docs/specification.md, sections 1 to 4. A record is tokenised once, part by part
(question, each step, answer), and the examples of every stage are put together from those ids while
batching, so a new stage costs nothing. The order of records, their random stages and their split
into effective batches depend on (seed, epoch) alone: every rank computes the same and takes its
share. Models are left to the engine, and nothing is downloaded.

Shapes: B batch, T tokens, n records.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import datasets
import numpy as np
import torch
from torch import Tensor

from utils import UserError, log, quote, raise_faults

START_LATENT = "<|start-latent|>"
END_LATENT = "<|end-latent|>"
LATENT = "<|latent|>"
MARKERS = (START_LATENT, END_LATENT, LATENT)
IGNORE_INDEX = -100
METHODS_WITHOUT_STAGES = ("cot", "no_cot")
HOW_TO_MAKE = "README's Data section says how to make it"
# First bytes of files that are mistaken for data files -> what they are.
OTHER_FILES = {
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a Parquet file; write its records as JSON",
    b"<": "HTML or XML, as failed downloads leave it; download it again",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
}
TRAILING_COMMA = re.compile(r",\s*[\]}]")
GSM_LINE = re.compile(r"[^\n]*\|\|[^\n]*####")

# Tokenisation ends before any worker is forked; without this it warns at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class FileRecords(list):
    """The records of a file, and `sha256`, the checksum of the bytes that were read."""

    sha256: str


def read_records(path: str, limit: int | None = None) -> FileRecords:
    """The records of a data file, JSON or JSON Lines, as {"question", "answer", "steps"} of texts.

    Blank steps are dropped, and their number is logged.

    limit: keep at most this many records, the first ones; sha256 stays that of the whole file.

    Raises: UserError naming the file and its first faults: record, field, what was expected.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {HOW_TO_MAKE}") from None
    raw = parse_records(path, content)[:limit]
    raise_faults(
        path, [f"record {i}: {fault}" for i, record in enumerate(raw) for fault in _faults(record)]
    )
    num_steps = sum(len(record["steps"]) for record in raw)
    records = FileRecords(
        {
            "question": record["question"],
            "answer": record["answer"],
            "steps": [step for step in record["steps"] if step.strip()],
        }
        for record in raw
    )
    records.sha256 = hashlib.sha256(content).hexdigest()
    num_blank = num_steps - sum(len(record["steps"]) for record in records)
    if num_blank:
        log.info(f"{path}: dropped {num_blank} blank steps")
    return records


def parse_records(path: str, content: bytes) -> list:
    """The records of a file with all their fields, unchecked.

    Raises: UserError saying what the file is instead.
    """
    for start, kind in OTHER_FILES.items():
        if content.startswith(start):
            raise UserError(f"{path}: is {kind}")
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: is empty; {HOW_TO_MAKE}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        first_line = text.lstrip().partition("\n")[0].rstrip(", \r")
        if str(path).endswith(".jsonl") or _is_object(first_line):
            return _parse_lines(path, text)
        raise UserError(f"{path}: is not JSON ({_json_fault(text, error)})") from None
    if isinstance(raw, dict) and ("question" in raw or str(path).endswith(".jsonl")):
        return [raw]  # JSON Lines of one line
    if isinstance(raw, dict) and isinstance(raw.get("example1"), dict):
        raise UserError(
            f"{path}: is ProntoQA as its generator writes it; convert it with"
            f" python preprocessing/prontoqa.py {path} and use the files which that makes"
        )
    if not isinstance(raw, list) or not raw:
        got = "an empty list" if raw == [] else _kind(raw)
        raise UserError(f"{path}: holds {got}; expected a list of at least one record")
    return raw


def _parse_lines(path: str, text: str) -> list:
    records, faults = [], []
    # Texts may hold other line breaks than "\n".
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip(" \t\r\ufeff")
        try:
            records += [json.loads(line)] if line else []
        except (ValueError, RecursionError) as error:
            faults.append(_json_fault(line, error, number))
    raise_faults(path, faults, "expected one JSON object a line")
    return records


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_fault(text: str, error: Exception, first_line: int = 1) -> str:
    """Where and why a text is not JSON, with the fix where it is known; `text` starts at a line."""
    if not isinstance(error, json.JSONDecodeError):
        return f"line {first_line}: {error}"
    place = f"line {first_line + error.lineno - 1}, column {error.colno}"
    if text[error.pos :].strip() == ",":
        return f"{place}: there is a comma after the object; remove it"
    comma = TRAILING_COMMA.match(text, max(text.rfind(",", 0, error.pos + 1), 0))
    if comma and comma.end() > error.pos:
        line = first_line + text.count("\n", 0, comma.start())
        return f"line {line}: there is a comma before a closing bracket; remove it"
    if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
        return f"{place}: it ends too early, like a truncated copy; copy it or make it again"
    if GSM_LINE.match(text):
        return f"{place}: it is GSM8K's text format; convert it with preprocessing/gsm_icot.py"
    return f"{place}: {error.msg}"


def _faults(record: object) -> Iterator[str]:
    """Everything that is wrong with a raw record: field, what it holds, what was expected."""
    if not isinstance(record, dict):
        yield f"the record is {_kind(record)}; expected an object with question, answer and steps"
        return
    for field in ("question", "answer", "steps"):
        if field not in record:
            yield f"{field} is missing; expected question, answer and steps"
    texts = {field: record[field] for field in ("question", "answer") if field in record}
    steps = record.get("steps", [])
    if isinstance(steps, list):
        texts |= {f"steps[{number}]": step for number, step in enumerate(steps)}
    else:
        yield f"steps is {_kind(steps)}; expected a list of texts"
    for field, text in texts.items():
        if not isinstance(text, str):
            yield f"{field} is {_kind(text)}; expected text"
            continue
        if not text.strip() and not field.startswith("steps"):
            yield f"{field} is blank; expected text"
        for marker in MARKERS:
            if marker in text:
                yield f"{field} holds the marker {marker}; expected text without it"
        if not text.isascii() and text.encode("utf-8", "ignore").decode("utf-8") != text:
            yield f"{field} holds half a surrogate pair; expected valid Unicode text"


def _kind(value: object) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def leading_special_ids(tokenizer, text: str) -> list[int]:
    """The ids `tokenizer` puts before a text by itself (Llama's BOS), not those it puts after."""
    plain = tokenizer(text, add_special_tokens=False).input_ids
    with_special = tokenizer(text).input_ids
    for begin in range(len(with_special) - len(plain) + 1):
        if with_special[begin : begin + len(plain)] == plain:
            return with_special[:begin]
    return []


def decode(tokenizer, rows: list[list[int]]) -> list[str]:
    """The texts of generated tokens, as answers are read from them: without special tokens."""
    return tokenizer.batch_decode(
        rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True)
class TokenizedRecords:
    """Records as token ids, with the lengths by which they are batched.

    path: the file they came from, for messages.
    sha256: the file's checksum when it was read, "" without a file.
    table: Hugging Face data set with columns question, answer, steps (texts) and question_ids,
        step_ids (one list a step), answer_ids ("### " + answer, then EOS), highest_id (of these).
    num_steps: (n,) steps a record has.
    question_lengths: (n,) tokens of the question, leading special tokens included.
    answer_lengths: (n,) tokens of answer and EOS.
    step_lengths: (all steps,) tokens of the steps of all records, one record after the other.
    """

    path: str
    sha256: str
    table: datasets.Dataset
    num_steps: np.ndarray
    question_lengths: np.ndarray
    answer_lengths: np.ndarray
    step_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.num_steps)


def tokenize_records(records: list[dict], tokenizer, path: str) -> TokenizedRecords:
    """Tokenise each part of each record by itself (docs/specification.md, section 2).

    Raises: UserError when a question becomes no tokens at all, a text holds the tokenizer's EOS or
        tokens unknown to it, or the tokenizer fails.
    """
    faults: list[tuple[str, int]] = []

    def tokenize(batch: dict, indices: list[int]) -> dict:
        rows = zip(indices, batch["question"], batch["steps"], batch["answer"], strict=True)
        parts = [part for row in rows for part in _parts(*row)]
        # Masks would be lists as long as the ids, and are not needed.
        options = {"add_special_tokens": False, "return_attention_mask": False}
        ids = tokenizer([text for _, _, text in parts], **options).input_ids
        faults.extend(_token_faults(tokenizer, parts, ids))
        following = iter(ids)
        columns = {name: [] for name in ("question_ids", "step_ids", "answer_ids", "highest_id")}
        for steps in batch["steps"]:
            question_ids = prefix + next(following)
            step_ids = [next(following) for _ in steps]
            answer_ids = next(following) + [tokenizer.eos_token_id]
            highest_id = max(chain(question_ids, *step_ids, answer_ids))
            row = (question_ids, step_ids, answer_ids, highest_id)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        return columns

    text, ids = datasets.Value("string"), datasets.List(datasets.Value("int32"))
    texts = {"question": text, "answer": text, "steps": datasets.List(text)}
    added = {"question_ids": ids, "step_ids": datasets.List(ids), "answer_ids": ids}
    features = datasets.Features(**texts, **added, highest_id=datasets.Value("int32"))
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(records, features=datasets.Features(texts))
    # The tokenizer of a broken file raises even a bare Exception.
    try:
        prefix = leading_special_ids(tokenizer, records[0]["question"])
        table = table.map(tokenize, batched=True, with_indices=True, features=features)
    except Exception as error:
        raise UserError(
            f"{path}: the tokenizer fails on its texts ({error!r}); restore the tokenizer's files"
        ) from error
    num_unknown = sum(count for _, count in faults)
    fix = f"unknown tokens: {num_unknown}; use a tokenizer that knows all words of this file"
    raise_faults(path, [fault for fault, _ in faults], fix if num_unknown else "")
    sha256 = records.sha256 if isinstance(records, FileRecords) else ""
    return TokenizedRecords(path, sha256, table, *_lengths(table))


def _parts(
    index: int, question: str, steps: list[str], answer: str
) -> Iterator[tuple[int, str, str]]:
    """(record index, field, text) of every text that is tokenised by itself."""
    yield index, "question", question + "\n"
    for number, step in enumerate(steps):
        yield index, f"steps[{number}]", step + "\n"
    yield index, "answer", f"### {answer}"


def _token_faults(
    tokenizer, parts: list[tuple[int, str, str]], ids: list[list[int]]
) -> Iterator[tuple[str, int]]:
    """(what is wrong with the tokens of a text, number of unknown tokens), of those at fault."""
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    for (index, field, text), tokens in zip(parts, ids, strict=True):
        where = f"record {index}: {field}"
        if not tokens and field == "question":
            yield f"{where} becomes no tokens; expected at least 1", 0
        if eos in tokens:
            holds = f"holds the tokenizer's EOS {tokenizer.eos_token!r}, which ends an answer"
            yield f"{where} {holds}; expected text without it", 0
        # GPT-2's unknown token is its EOS; tokenizers of bytes have none.
        elif unknown in tokens:
            words = unknown_words(tokenizer, text)
            holds = f"{quote(text.strip())} holds {words}, unknown to the tokenizer"
            yield f"{where} {holds}", tokens.count(unknown)


def unknown_words(tokenizer, text: str) -> str:
    """The words of `text` that are unknown to `tokenizer`, for a message."""
    encoded = tokenizer(text, add_special_tokens=False)
    if not encoded.is_fast:  # such tokenizers do not know which token came from where
        return "words"
    spans = [
        encoded.token_to_chars(place)
        for place, token in enumerate(encoded.input_ids)
        if token == tokenizer.unk_token_id
    ]
    words = dict.fromkeys(repr(text[span.start : span.end]) for span in spans if span)
    return ", ".join(words) or "words"


def _lengths(table: datasets.Dataset) -> tuple[np.ndarray, ...]:
    """num_steps, question_lengths, answer_lengths and step_lengths of a tokenised table."""

    def lengths_of(lists) -> np.ndarray:
        return lists.value_lengths().to_numpy().astype(np.int64)

    question_ids, step_ids, answer_ids = (
        table.data.column(name).combine_chunks()
        for name in ("question_ids", "step_ids", "answer_ids")
    )
    step_lengths = lengths_of(step_ids.flatten())
    return lengths_of(step_ids), lengths_of(question_ids), lengths_of(answer_ids), step_lengths


@dataclass(frozen=True)
class Curriculum:
    """The schedule of one run.

    method: "coconut", "cot", "no_cot" or "no_thoughts".
    c_thought: latent positions per latent step.
    enabled: False is the paper's "w/o curriculum": every epoch is the last stage.
    """

    method: str
    c_thought: int
    epochs_per_stage: int
    max_latent_stage: int
    pad_latent_to_max: bool
    enabled: bool = True

    @property
    def last_stage(self) -> int:
        """The stage past `max_latent_stage`, in which no reasoning text is left."""
        return 0 if self.method in METHODS_WITHOUT_STAGES else self.max_latent_stage + 1

    def stage(self, epoch: int) -> int:
        """The stage that acts in `epoch` (counted from 0)."""
        if not self.enabled:
            return self.last_stage
        return min(epoch // self.epochs_per_stage, self.last_stage)

    def first_stage_without_text(self, num_steps: np.ndarray) -> int:
        """The first stage in which none of the records with `num_steps` (n,) steps has one left."""
        return min(int(num_steps.max()), self.last_stage)

    def plan(self, stage: int, num_steps: int) -> tuple[int, int]:
        """(dropped steps, latent positions) of a record of `num_steps` steps at `stage`."""
        if self.method == "cot":
            return 0, 0
        if self.method == "no_cot":
            return num_steps, 0
        dropped = num_steps if stage > self.max_latent_stage else min(stage, num_steps)
        if self.method == "no_thoughts":
            return dropped, 0
        latent_steps = min(stage, self.max_latent_stage)
        if not self.pad_latent_to_max:
            latent_steps = min(latent_steps, num_steps)
        return dropped, latent_steps * self.c_thought


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that examples are built with."""

    start_latent: int
    end_latent: int
    latent: int
    eos: int

    @classmethod
    def of(cls, tokenizer) -> "SpecialIds":
        """The ids of the three markers and of EOS in `tokenizer`."""
        ids = tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT, LATENT])
        return cls(*ids, tokenizer.eos_token_id)


@dataclass(frozen=True)
class StagedRecords:
    """Records together with the stage each of them takes: what one epoch is made of.

    dropped, num_latents: (n,) from Curriculum.plan.
    with_markers: whether sequences carry start and end markers (Coconut) or none.
    """

    tokenized: TokenizedRecords
    dropped: np.ndarray
    num_latents: np.ndarray
    with_markers: bool

    @classmethod
    def of(
        cls, tokenized: TokenizedRecords, curriculum: Curriculum, stages: np.ndarray
    ) -> "StagedRecords":
        """Every record at its own stage; `stages`: (n,) integers."""
        max_steps = int(tokenized.num_steps.max())
        distinct, rows = np.unique(stages, return_inverse=True)
        plans = np.array(  # (row of a stage, number of steps) -> dropped steps, latents
            [
                [curriculum.plan(stage, steps) for steps in range(max_steps + 1)]
                for stage in distinct.tolist()
            ]
        )
        chosen = plans[rows, tokenized.num_steps]
        return cls(tokenized, chosen[:, 0], chosen[:, 1], curriculum.method == "coconut")

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """(n,) tokens before the first label: question, markers and latents."""
        markers = 2 if self.with_markers else 0
        return self.tokenized.question_lengths + self.num_latents + markers

    @cached_property
    def num_labels(self) -> np.ndarray:
        """(n,) labelled tokens: the remaining steps, the answer and EOS."""
        steps_before = np.concatenate([[0], self.tokenized.num_steps.cumsum()])
        tokens_before = np.concatenate([[0], self.tokenized.step_lengths.cumsum()])
        first, end = steps_before[:-1] + self.dropped, steps_before[1:]
        return tokens_before[end] - tokens_before[first] + self.tokenized.answer_lengths


def draw_stages(
    curriculum: Curriculum, num_steps: np.ndarray, epoch: int, uniform_prob: float, seed: int
) -> np.ndarray:
    """(n,) the stage of each record: the epoch's, or with `uniform_prob` one of 0..its steps.

    Depends on (seed, epoch, record index) alone: entry i of a counter-based stream stays the same
    whatever the number of records, workers or ranks.
    """
    stages = np.full(len(num_steps), curriculum.stage(epoch))
    if uniform_prob == 0:
        return stages
    draws = np.random.Generator(np.random.Philox(key=[seed, epoch])).random((len(num_steps), 2))
    random_stages = np.floor(draws[:, 1] * (num_steps + 1)).astype(int)
    return np.where(draws[:, 0] < uniform_prob, random_stages, stages)


def effective_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Records 0..n-1 in the order of (seed, epoch), cut into batches; the last may be shorter."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]


def micro_batches(
    indices: np.ndarray,
    staged: StagedRecords,
    batch_size: int,
    world_size: int,
    max_tokens: int | None = None,
) -> list[list[np.ndarray]]:
    """Split one effective batch: result[micro_step][rank] holds at most `batch_size` indices.

    Records of similar lengths share a batch, which saves padding and leaves the gradient as it is.
    All ranks get the same number of micro-steps, so some arrays are empty when records are few.

    max_tokens: replaces `batch_size`: a batch has no more rows x columns, padding included, unless
        it is a single record.
    """
    # By question first, because latents are aligned on it.
    keys = (staged.num_labels + staged.num_latents, staged.tokenized.question_lengths)
    indices = indices[np.lexsort([key[indices] for key in keys])]
    if max_tokens is None:
        micro_steps = -(-len(indices) // (batch_size * world_size))
        parts = np.array_split(indices, micro_steps * world_size)
    else:
        parts = _cut_by_tokens(indices, staged, max_tokens)
        while len(parts) % world_size:
            largest = max(range(len(parts)), key=lambda number: len(parts[number]))
            parts[largest : largest + 1] = np.array_split(parts[largest], 2)
    return [parts[i : i + world_size] for i in range(0, len(parts), world_size)]


def _cut_by_tokens(indices: np.ndarray, staged: StagedRecords, max_tokens: int) -> list[np.ndarray]:
    """`indices` in their order, cut wherever one more record would make a batch too large."""
    # Columns up to the first latent and from there on; a row without latents begins at column 0.
    has_latents = staged.num_latents[indices] > 0
    lengths = staged.prompt_lengths[indices] + staged.num_labels[indices]
    before = np.where(has_latents, staged.tokenized.question_lengths[indices] + 1, 0)
    after = np.where(has_latents, lengths - before, 0)
    cuts, begin = [], 0
    for end in range(1, len(indices) + 1):
        rows = slice(begin, end)
        aligned = before[rows].max() + after[rows].max()
        columns = max(aligned, lengths[rows][~has_latents[rows]].max(initial=0))
        if columns * (end - begin) > max_tokens and end - begin > 1:
            begin = end - 1
            cuts.append(begin)
    return np.split(indices, cuts)


@dataclass(frozen=True)
class Collator:
    """Turns record indices into the padded batch of docs/specification.md, section 4.

    aligned: "latents": first latents share a column, for the fewest passes; "prompts": prompts end
        in the same column, from which answers can be generated.
    min_width: batches have at least that many columns, by padding on the right.
    """

    staged: StagedRecords
    ids: SpecialIds
    aligned: str = "latents"
    min_width: int = 1

    def __getitem__(self, indices: np.ndarray) -> dict[str, Tensor]:
        """input_ids, attention_mask, position_ids, labels (each (B, T) long), indices (B,) long.

        Without indices the batch is one unlabelled token: a rank that has no records left still
        takes part in the step, and contributes zero.
        """
        if len(indices) == 0:
            unlabelled = [([self.ids.eos], [IGNORE_INDEX])]
            return _pad(unlabelled, [0], self.ids.eos, indices, self.min_width)
        rows = self.staged.tokenized.table[indices.tolist()]
        parts = zip(
            rows["question_ids"], rows["step_ids"], rows["answer_ids"], indices, strict=True
        )
        examples = [self._example(*part) for part in parts]
        if self.aligned == "prompts":
            widths = self.staged.prompt_lengths[indices].tolist()
        else:
            # The first latents share a column; a row without latents needs no padding before it.
            widths = [
                len(question) + 1 if self.staged.num_latents[index] > 0 else None
                for question, index in zip(rows["question_ids"], indices, strict=True)
            ]
        column = max((width for width in widths if width is not None), default=0)
        left_pads = [0 if width is None else column - width for width in widths]
        return _pad(examples, left_pads, self.ids.eos, indices, self.min_width)

    def _example(
        self, question: list[int], steps: list[list[int]], answer: list[int], index: int
    ) -> tuple[list[int], list[int]]:
        """(token ids, labels) of one record at its stage."""
        num_latents = int(self.staged.num_latents[index])
        prompt = list(question)
        if self.staged.with_markers:
            latents = [self.ids.latent] * num_latents
            prompt += [self.ids.start_latent, *latents, self.ids.end_latent]
        kept = steps[int(self.staged.dropped[index]) :]
        target = [*chain(*kept), *answer]
        return prompt + target, [IGNORE_INDEX] * len(prompt) + target


def _pad(
    rows: list[tuple[list[int], list[int]]],
    left_pads: list[int],
    pad_id: int,
    indices: np.ndarray,
    min_width: int,
) -> dict[str, Tensor]:
    """Rows of (token ids, labels) as a rectangular batch, each behind its padding on the left."""
    ends = [left + len(tokens) for left, (tokens, _) in zip(left_pads, rows, strict=True)]
    width = max(min_width, *ends)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, (left, (tokens, row_labels)) in enumerate(zip(left_pads, rows, strict=True)):
        columns = slice(left, left + len(tokens))
        input_ids[row, columns] = torch.tensor(tokens)
        labels[row, columns] = torch.tensor(row_labels)
        attention_mask[row, columns] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
        "indices": torch.as_tensor(np.asarray(indices, dtype=np.int64)),
    }
