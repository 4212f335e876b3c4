"""What is checked of a run's data before its weights load: that the model has room for it."""

import numpy as np
import pytest
from conftest import build_word_tokenizer

from dataset import MARKERS, Curriculum, StagedRecords, tokenize_records
from engine.setup import check_lengths, check_vocabulary
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
