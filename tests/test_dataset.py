"""Tokenising, staging, collating and splitting records (docs/specification.md, sections 2 to 4).

Reading them is test_dataset_reading.py's.

Most tokenizers here make one token of each text they are given, so that an expected example reads
as the texts of docs/specification.md, section 2, and a text cut or glued differently is unknown.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EOS, UNK, build_word_tokenizer
from scipy.stats import binomtest, chisquare
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from dataset import (
    END_LATENT,
    IGNORE_INDEX,
    LATENT,
    MARKERS,
    START_LATENT,
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    draw_stages,
    effective_batches,
    leading_special_ids,
    micro_batches,
    read_records,
    tokenize_records,
)
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
GOOD = {"question": "Is ?", "answer": "4", "steps": ["1 + 1 = 2", "2 + 2 = 4"]}


# Tokenisation


def add_markers(tokenizer):
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return tokenizer


def whole_text_tokenizer(*texts):
    """One token for each of `texts`, `<unk>` for anything else; then EOS and the markers."""
    vocabulary = {text: i for i, text in enumerate([UNK, EOS, *texts])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    return add_markers(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token=UNK)
    )


def texts_of(record):
    """The texts of a record that are tokenised by themselves."""
    steps = [step + "\n" for step in record["steps"]]
    return [record["question"] + "\n", *steps, "### " + record["answer"]]


def test_markers_are_the_published_strings():
    assert MARKERS == ("<|start-latent|>", "<|end-latent|>", "<|latent|>")


def test_parts_are_tokenised_by_themselves_with_newlines_marks_and_eos():
    records = [GOOD, {"question": "Why?", "answer": "no", "steps": []}]
    tokenizer = whole_text_tokenizer(
        "Is ?\n", "1 + 1 = 2\n", "2 + 2 = 4\n", "### 4", "Why?\n", "### no"
    )
    table = tokenize_records(records, tokenizer, "a.json").table
    tokens = tokenizer.convert_ids_to_tokens
    assert [tokens(ids) for ids in table["question_ids"]] == [["Is ?\n"], ["Why?\n"]]
    assert [[tokens(ids) for ids in steps] for steps in table["step_ids"]] == [
        [["1 + 1 = 2\n"], ["2 + 2 = 4\n"]],
        [],
    ]
    assert [tokens(ids) for ids in table["answer_ids"]] == [["### 4", EOS], ["### no", EOS]]


def test_texts_and_lengths_stay_beside_the_ids():
    records = [GOOD, {"question": "a red or", "answer": "True", "steps": ["Is a"]}]
    tokenized = tokenize_records(records, build_word_tokenizer(), "a.json")
    assert tokenized.path == "a.json" and len(tokenized) == 2
    assert [tokenized.table[i]["steps"] for i in (0, 1)] == [GOOD["steps"], ["Is a"]]
    assert tokenized.table["question"][1] == "a red or"
    assert tokenized.table["answer"][1] == "True"
    assert tokenized.num_steps.tolist() == [2, 1]
    assert tokenized.question_lengths.tolist() == [2, 3]
    # steps of 5 and 5 tokens, of 2; answer: ###, one word, EOS
    assert tokenized.step_lengths.tolist() == [5, 5, 2]
    assert tokenized.answer_lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "field, value, where",
    [
        ("question", f"Is {EOS} a", "question"),
        ("steps", ["1 + 1", f"{EOS}"], "steps[1]"),
        ("answer", f"4 {EOS}", "answer"),
    ],
)
def test_a_text_that_holds_the_tokenizers_eos_is_refused(field, value, where):
    records = [GOOD, GOOD | {field: value}]
    with pytest.raises(UserError) as refusal:
        tokenize_records(records, build_word_tokenizer(), "a.json")
    assert str(refusal.value) == (
        f"a.json: record 1: {where} holds the tokenizer's EOS '{EOS}', which ends an answer;"
        " expected text without it"
    )


def test_unknown_tokens_are_counted_and_their_texts_shown():
    records = [GOOD, {"question": "Is ~ ~~ ?", "answer": "4 x", "steps": ["1", "~ is 2"]}]
    with pytest.raises(UserError) as refusal:
        tokenize_records(records, build_word_tokenizer(), "a.json")
    assert str(refusal.value).splitlines() == [
        "a.json: record 1: question 'Is ~ ~~ ?' holds '~', '~~', unknown to the tokenizer",
        "a.json: record 1: steps[1] '~ is 2' holds '~', unknown to the tokenizer",
        "a.json: record 1: answer '### 4 x' holds 'x', unknown to the tokenizer",
        "a.json: 3 faults in all; unknown tokens: 4; use a tokenizer that knows all words of this"
        " file",
    ]


def test_a_mark_unknown_to_the_tokenizer_is_refused():
    tokenizer = whole_text_tokenizer("Q?\n", "A?\n", "### 1")
    tokenize_records([{"question": "Q?", "answer": "1", "steps": []}], tokenizer, "a.json")
    with pytest.raises(UserError, match="answer '### 2' holds '### 2', unknown to the"):
        tokenize_records([{"question": "A?", "answer": "2", "steps": []}], tokenizer, "a.json")


def byte_tokenizer(**options):
    """Every byte is a token, as in GPT-2 and, behind SentencePiece, in Llama."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([EOS, UNK, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, **options)


@pytest.mark.parametrize("options", [{}, {"unk_token": EOS}, {"unk_token": UNK}])
def test_tokenizers_of_bytes_know_everything(options):
    record = {"question": "größer → 🜁?", "answer": "ä", "steps": ["\u0301", "\x00"]}
    tokenized = tokenize_records([record], byte_tokenizer(**options), "a.json")
    assert tokenized.question_lengths.tolist() == [len((record["question"] + "\n").encode())]


def test_an_eos_that_the_tokenizer_puts_before_a_text_is_not_one_in_it():
    table = tokenize_records([GOOD], special_around(before=EOS), "a.json").table
    assert table["question_ids"][0][0] == 0


def test_a_tokenizer_that_fails_is_reported():
    tokenizer = build_word_tokenizer()
    tokenizer.model_max_length = "long"
    with pytest.raises(UserError, match=r"a\.json: the tokenizer fails on its texts \(TypeError"):
        tokenize_records([GOOD], tokenizer, "a.json")


def special_around(before="", after=""):
    """The word tokenizer with special tokens put around a text by itself."""
    tokenizer = build_word_tokenizer()
    names = [name for name in (before + " " + after).split() if name]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([before, "$A", after]).split(),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in set(names)],
    )
    return tokenizer


@pytest.mark.parametrize(
    "before, after, leading",
    [
        ("", "", []),
        ("w0", "", ["w0"]),
        ("w0", EOS, ["w0"]),
        ("", EOS, []),
        ("w0 w1", "w1 " + EOS, ["w0", "w1"]),
        (EOS, EOS, [EOS]),
    ],
)
def test_only_the_question_gets_special_tokens_and_only_leading_ones(before, after, leading):
    tokenizer = special_around(before, after)
    table = tokenize_records([GOOD], tokenizer, "a.json").table
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(leading_special_ids(tokenizer, "1 + 1")) == leading
    assert tokens(table[0]["question_ids"]) == [*leading, "Is", "?"]
    assert [tokens(ids) for ids in table[0]["step_ids"]] == [step.split() for step in GOOD["steps"]]
    assert tokens(table[0]["answer_ids"]) == ["###", "4", EOS]


def test_leading_special_tokens_count_as_question():
    tokenized = tokenize_records([GOOD], special_around("w0", EOS), "a.json")
    assert tokenized.question_lengths.tolist() == [3]


def test_question_without_tokens_is_refused():
    records = [GOOD, {**GOOD, "question": "~~"}]
    tokenizer = build_word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    with pytest.raises(UserError) as caught:
        tokenize_records(records, tokenizer, "a.json")
    message = "a.json: record 1: question becomes no tokens; expected at least 1"
    assert str(caught.value) == message


# Stage examples


def tokenise(records, tokenizer):
    return tokenize_records(records, tokenizer, "made.json")


def stage_of(tokenized, method, stages, c_thought=1, last=3, pad=True):
    curriculum = Curriculum(method, c_thought, 1, last, pad)
    stages = np.broadcast_to(stages, len(tokenized))
    return StagedRecords.of(tokenized, curriculum, np.array(stages))


def example(method, stage, record=GOOD, **options):
    """(tokens, labels) of the only record, as texts; labels None where ignored."""
    tokenizer = whole_text_tokenizer(*texts_of(record))
    staged = stage_of(tokenise([record], tokenizer), method, stage, **options)
    batch = Collator(staged, SpecialIds.of(tokenizer))[np.array([0])]
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    labels = [
        None if label == IGNORE_INDEX else tokenizer.convert_ids_to_tokens(label)
        for label in batch["labels"][0].tolist()
    ]
    return tokens, labels


Q, STEP_1, STEP_2, ANSWER = "Is ?\n", "1 + 1 = 2\n", "2 + 2 = 4\n", "### 4"


def test_coconut_stage_0_has_both_markers_with_nothing_between():
    assert example("coconut", 0) == (
        [Q, START_LATENT, END_LATENT, STEP_1, STEP_2, ANSWER, EOS],
        [None, None, None, STEP_1, STEP_2, ANSWER, EOS],
    )


def test_coconut_stage_1_with_two_latents_a_step():
    assert example("coconut", 1, c_thought=2) == (
        [Q, START_LATENT, LATENT, LATENT, END_LATENT, STEP_2, ANSWER, EOS],
        [None, None, None, None, None, STEP_2, ANSWER, EOS],
    )


def test_coconut_stage_2_replaces_two_steps():
    assert example("coconut", 2) == (
        [Q, START_LATENT, LATENT, LATENT, END_LATENT, ANSWER, EOS],
        [None, None, None, None, None, ANSWER, EOS],
    )


def test_coconut_past_the_last_stage_drops_all_steps_and_keeps_the_latents():
    assert example("coconut", 2, last=1) == (
        [Q, START_LATENT, LATENT, END_LATENT, ANSWER, EOS],
        [None, None, None, None, ANSWER, EOS],
    )


def test_a_record_with_fewer_steps_is_padded_with_latents_or_not():
    padded, _ = example("coconut", 3, pad=True)
    assert padded == [Q, START_LATENT, LATENT, LATENT, LATENT, END_LATENT, ANSWER, EOS]
    bare, _ = example("coconut", 3, pad=False)
    assert bare == [Q, START_LATENT, LATENT, LATENT, END_LATENT, ANSWER, EOS]


def test_record_without_steps():
    record = {**GOOD, "steps": []}
    assert example("coconut", 1, record=record, pad=False) == (
        [Q, START_LATENT, END_LATENT, ANSWER, EOS],
        [None, None, None, ANSWER, EOS],
    )


@pytest.mark.parametrize("stage", [0, 2])
def test_cot_is_plain_text(stage):
    assert example("cot", stage) == (
        [Q, STEP_1, STEP_2, ANSWER, EOS],
        [None, STEP_1, STEP_2, ANSWER, EOS],
    )


def test_no_cot_has_the_answer_right_after_the_question():
    assert example("no_cot", 0) == ([Q, ANSWER, EOS], [None, ANSWER, EOS])


@pytest.mark.parametrize(
    "stage, rest", [(0, [STEP_1, STEP_2, ANSWER]), (1, [STEP_2, ANSWER]), (4, [ANSWER])]
)
def test_no_thoughts_drops_steps_and_puts_nothing_there(stage, rest):
    assert example("no_thoughts", stage) == ([Q, *rest, EOS], [None, *rest, EOS])


@pytest.mark.parametrize(
    "method, stage, prompt",
    [
        ("coconut", 0, [Q, START_LATENT, END_LATENT]),
        ("coconut", 2, [Q, START_LATENT, LATENT, LATENT, END_LATENT]),
        ("cot", 0, [Q]),
        ("no_cot", 0, [Q]),
        ("no_thoughts", 2, [Q]),
    ],
)
def test_a_prompt_ends_before_the_first_label(method, stage, prompt):
    tokens, labels = example(method, stage)
    assert tokens[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [None] * len(prompt) and None not in labels[len(prompt) :]


def test_each_record_takes_its_own_stage():
    tokenizer = whole_text_tokenizer(*texts_of(GOOD))
    staged = stage_of(tokenise([GOOD] * 3, tokenizer), "coconut", [0, 2, 1])
    assert staged.dropped.tolist() == [0, 2, 1]
    assert staged.num_latents.tolist() == [0, 2, 1]


# Batches


def words(count, start=0):
    return " ".join(str((start + i) % 10) for i in range(count))


def ragged(shapes, tokenizer):
    """Records of (question tokens, step lengths), answers of one token."""
    records = [
        {
            "question": words(question, i),
            "answer": str(i % 10),
            "steps": [words(length, i + 1) for length in lengths],
        }
        for i, (question, lengths) in enumerate(shapes)
    ]
    return tokenise(records, tokenizer)


def letters_of(rows, names):
    return ["".join(names.get(value, "?") for value in row) for row in rows.tolist()]


@pytest.fixture
def marked():
    return add_markers(build_word_tokenizer())


def ragged_batch(tokenizer, aligned="latents", **options):
    """Rows of 2, 0, 1 and 0 latents with questions of 2, 4, 5 and 7 tokens."""
    tokenized = ragged([(2, [1, 2]), (4, []), (5, [3]), (7, [])], tokenizer)
    staged = stage_of(tokenized, "coconut", 2, pad=False, **options)
    return Collator(staged, SpecialIds.of(tokenizer), aligned)[np.arange(4)]


def letters_of_tokens(batch, tokenizer):
    """A letter a token: q digit, s start, L latent, e end, # answer mark, . EOS; _ padding."""
    names = {tokenizer.convert_tokens_to_ids(str(digit)): "q" for digit in range(10)}
    special = {START_LATENT: "s", LATENT: "L", END_LATENT: "e", "###": "#", EOS: "."}
    names |= {tokenizer.convert_tokens_to_ids(token): letter for token, letter in special.items()}
    rows = letters_of(batch["input_ids"], names)
    masks = batch["attention_mask"].tolist()
    return [
        "".join(letter if kept else "_" for letter, kept in zip(row, mask, strict=True))
        for row, mask in zip(rows, masks, strict=True)
    ]


def test_first_latents_share_a_column_and_rows_without_latents_start_at_once(marked):
    assert letters_of_tokens(ragged_batch(marked), marked) == [
        "___qqsLLe#q.",
        "qqqqse#q.___",
        "qqqqqsLe#q._",
        "qqqqqqqse#q.",
    ]


def test_latents_align_even_when_rows_without_them_have_longer_questions(marked):
    tokenized = ragged([(1, [1]), (9, [])], marked)
    staged = stage_of(tokenized, "coconut", 1, pad=False)
    batch = Collator(staged, SpecialIds.of(marked))[np.arange(2)]
    assert letters_of_tokens(batch, marked) == ["qsLe#q._______", "qqqqqqqqqse#q."]


def test_padding_is_eos_without_attention_or_labels(marked):
    batch = ragged_batch(marked)
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == marked.eos_token_id).all()
    assert (batch["labels"][padding] == IGNORE_INDEX).all()


def test_positions_count_from_0_at_the_first_real_token(marked):
    batch = ragged_batch(marked)
    for positions, mask in zip(batch["position_ids"], batch["attention_mask"], strict=True):
        assert positions[mask == 1].tolist() == list(range(int(mask.sum())))
    assert batch["position_ids"][0].tolist() == [0, 0, 0, *range(9)]
    assert (batch["position_ids"] >= 0).all()


def test_labels_are_the_tokens_after_the_end_marker(marked):
    batch = ragged_batch(marked)
    labelled = batch["labels"] != IGNORE_INDEX
    assert letters_of(labelled.long(), {0: "_", 1: "x"}) == [
        "_________xxx",
        "______xxx___",
        "________xxx_",
        "_________xxx",
    ]
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_cot_rows_are_padded_on_the_right_alone(marked):
    tokenized = ragged([(2, [1]), (4, [])], marked)
    batch = Collator(stage_of(tokenized, "cot", 0), SpecialIds.of(marked))[np.arange(2)]
    assert letters_of_tokens(batch, marked) == ["qqq#q._", "qqqq#q."]


def test_aligned_prompts_end_in_the_same_column(marked):
    batch = ragged_batch(marked, "prompts")
    assert letters_of_tokens(batch, marked) == [
        "___qqsLLe#q.",
        "___qqqqse#q.",
        "_qqqqqsLe#q.",
        "qqqqqqqse#q.",
    ]
    assert batch["position_ids"][2].tolist() == [0, *range(11)]
    assert (batch["labels"] != IGNORE_INDEX).any(0).tolist() == [False] * 9 + [True] * 3


def test_batch_follows_the_order_of_its_indices(marked):
    tokenized = ragged([(2, [1, 2]), (4, []), (5, [3])], marked)
    collator = Collator(stage_of(tokenized, "coconut", 2, pad=False), SpecialIds.of(marked))
    batch = collator[np.array([2, 0, 2])]
    assert batch["indices"].tolist() == [2, 0, 2]
    assert letters_of_tokens(batch, marked) == ["qqqqqsLe#q._", "___qqsLLe#q.", "qqqqqsLe#q._"]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


@pytest.mark.parametrize("aligned", ["latents", "prompts"])
def test_no_records_make_one_unlabelled_token(marked, aligned):
    tokenized = ragged([(2, [1])], marked)
    collator = Collator(stage_of(tokenized, "coconut", 1), SpecialIds.of(marked), aligned)
    batch = collator[np.array([], dtype=int)]
    assert batch["input_ids"].tolist() == [[marked.eos_token_id]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX]]
    assert batch["attention_mask"].tolist() == [[1]]
    assert batch["position_ids"].tolist() == [[0]]
    assert batch["indices"].tolist() == []


def test_a_batch_for_training_is_at_least_as_wide_as_asked(marked):
    staged = stage_of(ragged([(2, [1])], marked), "coconut", 1)
    width = Collator(staged, SpecialIds.of(marked))[np.array([0])]["input_ids"].size(1)
    for indices in ([0], []):
        batch = Collator(staged, SpecialIds.of(marked), min_width=12)[np.array(indices, dtype=int)]
        real = width if indices else 1
        assert batch["attention_mask"].tolist() == [[1] * real + [0] * (12 - real)]
        assert (batch["labels"][0, real:] == IGNORE_INDEX).all()


METHODS = ["coconut", "cot", "no_cot", "no_thoughts"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("pad", [True, False])
def test_planned_lengths_are_those_of_the_built_examples(marked, method, stage, pad):
    shapes = [(2, [1, 2, 1, 4]), (4, []), (5, [3]), (1, [2, 2])]
    staged = stage_of(ragged(shapes, marked), method, stage, c_thought=2, last=3, pad=pad)
    ids = SpecialIds.of(marked)
    for index in range(len(shapes)):
        batch = Collator(staged, ids)[np.array([index])]
        assert staged.prompt_lengths[index] == (batch["labels"] == IGNORE_INDEX).sum()
        assert staged.num_labels[index] == (batch["labels"] != IGNORE_INDEX).sum()
        whole = staged.prompt_lengths[index] + staged.num_labels[index]
        assert batch["input_ids"].shape == (1, whole)


# Random stages


def curriculum(last=3, per_stage=1):
    return Curriculum("coconut", 1, per_stage, last, True)


def test_without_uniform_prob_every_record_takes_the_stage_of_the_epoch():
    stages = draw_stages(curriculum(), np.array([0, 3, 5]), epoch=2, uniform_prob=0, seed=1)
    assert stages.tolist() == [2, 2, 2]


@pytest.mark.parametrize("uniform_prob", [0.3, 1.0])
def test_draw_of_a_record_depends_on_seed_epoch_and_index_alone(uniform_prob):
    num_steps = np.arange(300) % 7

    def draw(n=300, epoch=2, seed=5):
        return draw_stages(curriculum(), num_steps[:n], epoch, uniform_prob, seed).tolist()

    assert draw(n=40) == draw()[:40]
    assert draw(n=1) == draw()[:1]
    assert draw() == draw()
    assert draw(seed=6) != draw()
    if uniform_prob == 1:
        assert draw(epoch=3) != draw()


def test_draw_of_a_record_ignores_the_steps_of_others():
    few = draw_stages(curriculum(), np.array([1, 0, 4]), 0, 1.0, 3)
    many = draw_stages(curriculum(), np.array([9, 8, 4]), 0, 1.0, 3)
    assert few[2] == many[2]


def test_drawn_stages_lie_between_0_and_the_number_of_steps_of_their_record():
    num_steps = np.arange(3000) % 6
    stages = draw_stages(curriculum(), num_steps, epoch=0, uniform_prob=1.0, seed=0)
    for steps in range(6):
        assert set(stages[num_steps == steps]) == set(range(steps + 1))


@pytest.mark.parametrize("uniform_prob", [0.3, 1.0])
@pytest.mark.parametrize("epoch", [0, 17])
def test_drawn_stages_are_uniform_and_as_frequent_as_uniform_prob(uniform_prob, epoch):
    n, never_drawn = 20_000, 5
    acting = Curriculum("coconut", 1, 1, 4, True, enabled=False)  # its last stage, 5, each epoch
    stages = draw_stages(acting, np.full(n, 3), epoch, uniform_prob, seed=11)
    drawn = stages[stages != never_drawn]
    assert chisquare(np.bincount(drawn, minlength=4)).pvalue > 1e-4
    assert binomtest(len(drawn), n, uniform_prob).pvalue > 1e-4


def test_draws_of_different_epochs_are_unrelated():
    steps = np.full(20_000, 3)
    first, second = (draw_stages(curriculum(), steps, epoch, 1.0, seed=4) for epoch in (0, 1))
    pairs = np.bincount(4 * first + second, minlength=16)
    assert chisquare(pairs).pvalue > 1e-4


# Order and split


def test_order_depends_on_seed_and_epoch_alone():
    def order(batch_size=8, seed=0, epoch=0):
        return np.concatenate(effective_batches(50, batch_size, seed, epoch)).tolist()

    assert order() == order(batch_size=13)
    np.random.seed(9)
    torch.manual_seed(9)
    assert order() == order()
    assert len({tuple(order()), tuple(order(epoch=1)), tuple(order(seed=1))}) == 3
    assert order(seed=1, epoch=0) != order(seed=0, epoch=1)
    assert order() != sorted(order())


@pytest.mark.parametrize("n, batch_size", [(1, 1), (7, 3), (12, 4), (5, 100)])
def test_effective_batches_hold_every_record_once_and_only_the_last_is_shorter(n, batch_size):
    batches = effective_batches(n, batch_size, seed=3, epoch=2)
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size


@pytest.fixture(scope="module")
def many():
    """60 records of random lengths, at stage 1."""
    rng = np.random.default_rng(0)
    shapes = [(int(q), rng.integers(1, 6, s)) for q, s in rng.integers((1, 0), (12, 5), (60, 2))]
    tokenizer = add_markers(build_word_tokenizer())
    tokenized = ragged(shapes, tokenizer)
    return stage_of(tokenized, "coconut", 1, pad=False), SpecialIds.of(tokenizer)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 33, 60])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_hold_every_record_once_and_are_even(many, n, batch_size, world_size):
    staged, _ = many
    indices = np.random.default_rng(1).permutation(60)[:n]
    shares = micro_batches(indices, staged, batch_size, world_size)
    assert {len(step) for step in shares} == {world_size}
    parts = [part for step in shares for part in step]
    assert sorted(np.concatenate(parts).tolist()) == sorted(indices.tolist())
    sizes = [len(part) for part in parts]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    assert len(shares) == -(-n // (batch_size * world_size))  # and no more steps than needed


def test_micro_batches_hold_records_of_like_question_length(many):
    staged, _ = many
    parts = [part for (part,) in micro_batches(np.arange(60), staged, 8, 1)]
    lengths = [staged.tokenized.question_lengths[part] for part in parts]
    for shorter, longer in zip(lengths, lengths[1:], strict=False):
        assert shorter.max() <= longer.min()


@pytest.mark.parametrize("max_tokens", [1, 40, 90, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_cut_by_tokens_are_as_large_as_they_may_be(many, max_tokens, world_size):
    staged, ids = many
    indices = np.random.default_rng(1).permutation(60)[:41]
    shares = micro_batches(indices, staged, 4, world_size, max_tokens)
    assert {len(step) for step in shares} == {world_size}
    parts = [part for step in shares for part in step]
    assert sorted(np.concatenate(parts).tolist()) == sorted(indices.tolist())
    sizes = [Collator(staged, ids)[part]["input_ids"].numel() for part in parts]
    assert all(n <= max_tokens or len(p) == 1 for n, p in zip(sizes, parts, strict=True))
    if world_size == 1:
        for part, following in zip(parts, parts[1:], strict=False):
            one_more = np.append(part, following[0])
            assert Collator(staged, ids)[one_more]["input_ids"].numel() > max_tokens


# Real data


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
def test_published_prosqa_is_read_and_decodes_to_its_texts():
    records = read_records(str(SHARED / "data/prosqa_valid.json"))
    assert len(records) == 300
    assert all(set(record) == {"question", "answer", "steps"} for record in records)
    folder = SHARED / "models/gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models")
    tokenizer = add_markers(GPT2Tokenizer.from_pretrained(folder))
    staged = stage_of(tokenise(records, tokenizer), "coconut", 2, last=6)
    batch = Collator(staged, SpecialIds.of(tokenizer))[np.arange(300)]
    for record, ids, mask in zip(
        records, batch["input_ids"], batch["attention_mask"].bool(), strict=True
    ):
        rest = "".join(step + "\n" for step in record["steps"][2:])
        assert tokenizer.decode(ids[mask], clean_up_tokenization_spaces=False) == (
            f"{record['question']}\n{START_LATENT}{LATENT}{LATENT}{END_LATENT}"
            f"{rest}### {record['answer']}{tokenizer.eos_token}"
        )
    latent_columns = (batch["input_ids"] == tokenizer.convert_tokens_to_ids(LATENT)).nonzero()
    assert latent_columns[:, 1].unique().numel() == 2
