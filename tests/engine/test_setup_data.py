"""What is checked of a run's data before its weights load: that it fits tokenizer and model."""

import numpy as np
import pytest
from conftest import build_word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dataset import MARKERS, Curriculum, StagedRecords, tokenize_records
from engine.setup import check_answers, check_lengths, check_vocabulary
from utils import UserError


def test_a_token_that_the_model_lacks_is_named_with_its_record():
    tokenizer = build_word_tokenizer()
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    good = {"question": "1 ?", "answer": "4", "steps": []}
    tokenized = tokenize_records([good, good | {"steps": ["1", f"1 {last}"]}], tokenizer, "a.json")
    check_vocabulary(tokenized, len(tokenizer))
    wanted = (
        f"a.json: record 1: the tokenizer gives the token id {len(tokenizer) - 1}, the model has"
        f" embeddings for 0 to {len(tokenizer) - 2}; use the tokenizer that belongs to the model"
    )
    with pytest.raises(UserError) as refusal:
        check_vocabulary(tokenized, len(tokenizer) - 1)
    assert str(refusal.value) == wanted


@pytest.fixture
def long_records():
    """Sequences of 2 + 3 + 5 = 10, 14 and 12 tokens at stage 1: prompt 3 longer than question."""
    tokenizer = build_word_tokenizer()
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    shapes = [("1 2 3 4", ["1"]), ("1 2 3 4 5 6 7 8", ["1"]), ("1 2 3 4", ["1", "1 2"])]
    records = [{"question": q, "answer": "4", "steps": steps} for q, steps in shapes]
    curriculum = Curriculum("coconut", 1, 1, 1, True)
    return StagedRecords.of(
        tokenize_records(records, tokenizer, "made.json"), curriculum, np.ones(3, dtype=int)
    )


def test_lengths_that_fit_pass(long_records):
    assert (long_records.prompt_lengths + long_records.num_labels).tolist() == [10, 14, 12]
    check_lengths(long_records, 14)
    check_lengths(long_records, 14, max_new_tokens=3)
    check_lengths(long_records, None)
    check_lengths(long_records, None, max_new_tokens=10**6)


def test_too_long_sequence_is_named_with_the_count(long_records):
    with pytest.raises(UserError) as caught:
        check_lengths(long_records, 11)
    assert str(caught.value) == (
        "made.json: record 1: its sequence of 14 tokens (question 8) does not fit the model's 11"
        " positions (records too long: 2); remove or shorten it"
    )


def test_too_long_prompt_is_named_with_the_count(long_records):
    with pytest.raises(UserError) as caught:
        check_lengths(long_records, 14, max_new_tokens=4)
    assert str(caught.value) == (
        "made.json: record 1: its prompt of 11 tokens plus max_new_tokens=4 does not fit the"
        " model's 14 positions (records too long: 1); lower max_new_tokens or remove the record"
    )


# Answers


def byte_tokenizer(normalizer=None):
    """A token for every byte, and EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def check_golds(tokenizer, *golds, steps=()):
    records = [{"question": "?", "answer": gold, "steps": list(steps)} for gold in golds]
    check_answers(tokenize_records(records, tokenizer, "a.json"), tokenizer)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        check_golds(*arguments, **options)
    return str(caught.value).splitlines()


FIX = (
    "no generated answer could be right; write answers as the tokenizer gives them back, or use"
    " another tokenizer"
)


def test_answers_that_the_tokenizer_gives_back_pass():
    golds = ["True", "1,000", " x ", "größer\n→", "C#", "#", "a\u0308"]
    check_golds(byte_tokenizer(), *golds, steps=["one # two", "### three"])
    check_golds(build_word_tokenizer(), "True", "a red wumpus .", "# 5")


CHANGED = [
    (byte_tokenizer(normalizers.Lowercase()), "True", "true"),
    (byte_tokenizer(normalizers.Lowercase()), "C#", "c#"),
    (byte_tokenizer(normalizers.NFC()), "a\u0308", "ä"),
    (build_word_tokenizer(), "1.5", "1 . 5"),
]


@pytest.mark.parametrize(("tokenizer", "gold", "back"), CHANGED, ids=[c[1] for c in CHANGED])
def test_an_answer_that_the_tokenizer_changes_is_refused(tokenizer, gold, back):
    wanted = (
        f"a.json: record 0: the answer '{gold}' comes back from the tokenizer as '{back}'; {FIX}"
    )
    assert refusal(tokenizer, gold) == [wanted]


def test_special_tokens_in_an_answer_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    (line,) = refusal(tokenizer, "a <tool>")
    assert "the answer 'a <tool>' comes back from the tokenizer as 'a'" in line


@pytest.mark.parametrize("gold", [",", " , ,\n"])
def test_an_answer_that_is_empty_when_compared_is_refused(gold):
    (line,) = refusal(byte_tokenizer(), gold)
    assert line == (
        f"a.json: record 0: the answer {gold!r} is empty without commas and surrounding white"
        f" space, which do not count when answers are compared; {FIX}"
    )


def test_an_answer_with_a_mark_needs_the_line_break_before_it():
    check_golds(byte_tokenizer(), "C#", steps=["one"])
    tokenizer = build_word_tokenizer()  # drops line breaks
    check_golds(tokenizer, "a #")
    (line,) = refusal(tokenizer, "a #", steps=["1 + 1"])
    assert "the answer 'a #' comes back from the tokenizer as '1 + 1 ### a #'" in line


def test_the_first_ten_changed_answers_are_shown_and_all_are_counted():
    lines = refusal(byte_tokenizer(normalizers.Lowercase()), *["x", "True"] * 12)
    assert [line.split(":")[1] for line in lines[:10]] == [f" record {i}" for i in range(1, 21, 2)]
    assert lines[10:] == [f"a.json: 12 faults in all; {FIX}"]
