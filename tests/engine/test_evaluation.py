"""Laws of evaluation: every record once, answered as if alone, and figures computed by hand.

Models are float64 and tiny; the textbook is oracle.py, one row at a time without a cache.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batches import EOS, FAMILIES, WEIGHTS, count_columns, settings_of, wrap
from oracle import batch_loss, generate_row
from runs import make_records

from dataset import (
    IGNORE_INDEX,
    MARKERS,
    Collator,
    Curriculum,
    SpecialIds,
    StagedRecords,
    tokenize_records,
)
from engine.evaluation import Decoder, evaluate, summarize, write_predictions

NEW_TOKENS = 6


@pytest.fixture
def tokenizer(word_tokenizer):
    word_tokenizer.pad_token = word_tokenizer.eos_token
    word_tokenizer.add_special_tokens({"extra_special_tokens": list(MARKERS)})
    # As batches.py has them, which the models of this file are wrapped with.
    assert word_tokenizer.convert_tokens_to_ids(list(MARKERS)) == [37, 38, 39]
    return word_tokenizer


@pytest.fixture
def records(tokenizer):
    """Nine records of 0 to 3 steps, in an order that is not that of their lengths."""
    return tokenize_records(make_records(9, seed=3), tokenizer, "val.json")


def curriculum(method="coconut", pad=False):
    return Curriculum(method, 1, 1, 2, pad)


def staged_at(records, stage, pad=False):
    return StagedRecords.of(records, curriculum(pad=pad), np.full(len(records), stage))


def settings_for_rows(m=3):
    return settings_of(m, "sequence", WEIGHTS)


def some_end(model):
    """Make EOS likely enough that some answers end by it and others do not."""
    is_tied = model.base_causallm.config.tie_word_embeddings
    with torch.no_grad():
        model.base_causallm.get_output_embeddings().weight[EOS] *= 1.25 if is_tied else 2.5
    return model


# Answers


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_and_loss_equal_the_textbook_at_any_batch_size(
    tiny_model, tokenizer, records, family, pad
):
    model = some_end(wrap(tiny_model(family)))
    base, ids = model.base_causallm, SpecialIds.of(tokenizer)
    staged = staged_at(records, 2, pad)
    assert set(staged.num_latents) == ({2} if pad else {0, 1, 2})
    collator = Collator(staged, ids)
    expected = []
    base.eval()
    for index in range(len(records)):
        row = collator[np.array([index])]
        prompt = row["input_ids"][row["labels"] == IGNORE_INDEX].tolist()
        assert prompt.count(ids.latent) == staged.num_latents[index]
        row = generate_row(base, prompt, NEW_TOKENS, EOS, **settings_for_rows())
        expected.append(row)
    assert 0 < sum(EOS in row for row in expected) < len(expected)
    whole = collator[np.arange(len(records))]
    del whole["indices"]
    loss, *_ = batch_loss(base, **whole, **settings_for_rows())
    for batch_size in (1, 4, 9):
        outcome = evaluate(
            model, tokenizer, records, curriculum(pad=pad), 2,
            batch_size=batch_size, max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        assert outcome.figures["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert [row["index"] for row in outcome.predictions] == list(range(len(records)))
        for row, tokens in zip(outcome.predictions, expected, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            ended = EOS in tokens
            assert (row["text"], row["ended"]) == (text, ended)
            assert row["num_tokens"] == len(tokens) - ended
            assert row["question"] == records.table[row["index"]]["question"]
            assert row["gold"] == records.table[row["index"]]["answer"]


@pytest.mark.parametrize("stage", [0, 2])
def test_forward_passes_are_those_the_base_model_makes_for_the_record_alone(
    tiny_model, tokenizer, stage
):
    model = some_end(wrap(tiny_model("gpt2")))
    calls = count_columns(model.base_causallm.base_model)
    for record in make_records(6, seed=3):
        alone = tokenize_records([record], tokenizer, "val.json")
        num_latents = int(staged_at(alone, stage).num_latents[0])
        calls.clear()
        outcome = evaluate(
            model, tokenizer, alone, curriculum(), stage, batch_size=1, max_new_tokens=NEW_TOKENS
        )
        (row,) = outcome.predictions
        assert row["num_thoughts"] == num_latents
        assert row["forward_passes"] == len(calls)


@pytest.mark.parametrize("thought", ["pause", "pause_multipass"])
def test_pause_embeddings_are_not_thoughts_and_cost_the_passes_made(tiny_model, tokenizer, thought):
    model = wrap(tiny_model("gpt2"), thought=thought)
    calls = count_columns(model.base_causallm.base_model)
    alone = tokenize_records([make_records(9, seed=3)[0] | {"steps": ["1", "2"]}], tokenizer, "v")
    outcome = evaluate(
        model, tokenizer, alone, curriculum(), 2, batch_size=1, max_new_tokens=NEW_TOKENS
    )
    (row,) = outcome.predictions
    assert (row["num_thoughts"], row["forward_passes"]) == (0, len(calls))


def test_evaluation_leaves_the_mode_of_the_model_and_the_generators_alone(
    tiny_model, tokenizer, records
):
    model = wrap(tiny_model("gpt2", dropout=0.5))
    shown = []

    def progress_bar(total, description):
        bar = SimpleNamespace(update=lambda: shown.append(total), close=lambda: None)
        assert description == "evaluating stage 1"
        return bar

    def once():
        return evaluate(
            model, tokenizer, records, curriculum(), 1,
            batch_size=4, max_new_tokens=NEW_TOKENS, progress_bar=progress_bar,
            before_batch=lambda: torch.rand(1),
        )  # fmt: skip

    before = torch.get_rng_state()
    first, second = once(), once()
    assert first.predictions == second.predictions
    assert first.figures["loss"] == second.figures["loss"]
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert shown == [3] * 6


# One prediction


def decode(tokenizer, steps, stage, new_tokens, method="coconut"):
    """The prediction record of a model that writes `new_tokens`, whose gold answer is 1,0."""
    record = {"question": "1 + 2", "answer": "1,0", "steps": steps}
    tokenized = tokenize_records([record], tokenizer, "val.json")
    staged = StagedRecords.of(tokenized, curriculum(method), np.array([stage]))

    def answer(input_ids, attention_mask, labels, max_new_tokens):
        return torch.tensor(0.5), torch.tensor([new_tokens])

    model = SimpleNamespace(answer=answer, thought_kind="continuous", reads_in_passes=True)
    batch = Collator(staged, SpecialIds.of(tokenizer), aligned="prompts")[np.array([0])]
    loss, (row,) = Decoder(model, tokenizer, staged, len(new_tokens)).predict(batch)
    assert loss == 0.5
    return row


def test_markers_the_model_writes_never_reach_text_or_answer(tokenizer):
    start, end, latent = tokenizer.convert_tokens_to_ids(list(MARKERS))
    one, zero, mark = tokenizer.convert_tokens_to_ids(["1", "0", "###"])
    row = decode(tokenizer, ["1"], 0, [latent, one, start, mark, end, one, latent, EOS, zero])
    assert row["text"].split() == ["1", "###", "1"]
    assert row["prediction"] == "1"
    assert not row["correct"]
    assert row["cot_match"]
    # They are tokens the model wrote, so they count.
    assert (row["num_tokens"], row["ended"]) == (7, True)


@pytest.mark.parametrize(
    "text, stage, correct, cot_match, ended",
    [
        ("1 + 2 ### 1 <eos>", 0, False, False, True),
        ("1 2 3 ### 1", 0, False, True, False),
        ("2 3 ### 1 <eos> <eos>", 1, False, True, True),
        ("### 1 <eos>", 3, False, None, True),
        ("1 2 3", 0, False, True, False),
    ],
)
def test_an_answer_is_judged_by_what_the_stage_leaves(
    tokenizer, text, stage, correct, cot_match, ended
):
    tokens = tokenizer.convert_tokens_to_ids(text.split())
    row = decode(tokenizer, ["1", "2 3"], stage, tokens)
    assert (row["correct"], row["cot_match"], row["ended"]) == (correct, cot_match, ended)
    assert row["prediction"] == ("1" if "###" in text else None)
    assert row["num_thoughts"] == min(stage, 2)


def test_commas_in_an_answer_do_not_count(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: "1\n### 10")
    assert decode(tokenizer, ["1"], 0, [EOS])["correct"]


# Figures


def prediction(**fields):
    row = {
        "correct": False, "cot_match": None, "num_tokens": 0, "num_thoughts": 0, "ended": True,
        "prediction": "1",
    }  # fmt: skip
    return row | fields


def test_figures_of_predictions_by_hand():
    rows = [
        prediction(correct=True, cot_match=True, num_tokens=4, num_thoughts=2),
        prediction(correct=True, cot_match=False, num_tokens=2, num_thoughts=2),
        prediction(num_tokens=5, num_thoughts=1, ended=False, prediction=None),
        prediction(cot_match=False, num_tokens=1, num_thoughts=1),
    ]
    figures = summarize(rows)
    # Wilson at 2 of 4: (p + z^2 / 2n -+ z sqrt(pq/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964.
    assert figures.pop("acc_low") == pytest.approx(0.150039, abs=1e-6)
    assert figures.pop("acc_high") == pytest.approx(0.849961, abs=1e-6)
    assert figures == {
        "acc": 0.5, "num_correct": 2, "num_records": 4, "cot_em": pytest.approx(1 / 3),
        "mean_tokens": 3.0, "mean_thoughts": 1.5, "mean_tokens_and_thoughts": 4.5,
        "num_hit_max_new_tokens": 1, "num_without_answer": 1,
    }  # fmt: skip
    assert summarize([prediction()])["cot_em"] is None


def test_predictions_are_one_json_object_a_line(tmp_path):
    rows = [{"index": 0, "text": "é\n\u2028"}, {"index": 1, "text": ""}]
    write_predictions(tmp_path / "predictions_0.jsonl", rows)
    lines = (tmp_path / "predictions_0.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == rows
    assert lines[-1] == b""
