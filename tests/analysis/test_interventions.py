"""Exchanged thoughts: a textbook recomputation row by row, each replacement's formula, the gate."""

import numpy as np
import oracle
import pytest
import torch
from batches import LATENT, WEIGHTS, families, lay_out, prompts_of, ragged_rows, wrap
from torch.testing import assert_close

from analysis.interventions import (
    REPLACEMENTS,
    OwnThoughts,
    check_replacement,
    make_vectors,
    partners,
    read_thoughts,
    replaced_thoughts,
    thought_positions,
    zeros,
)
from coconut import Coconut
from utils import UserError

EXACT = {"rtol": 1e-9, "atol": 1e-10}
QUESTIONS = ["a", "b", "a", "c", "d", "e"]
DONORS = np.array([1, 4, 3, 0, 1, 0])


@pytest.fixture
def model(tiny_model):
    return wrap(tiny_model("gpt2")).eval()


def own_thoughts(model, rows):
    prompts = prompts_of(rows)
    counts = torch.tensor([row.count(LATENT) for row in rows])
    return OwnThoughts(read_thoughts(model, **prompts), counts)


def replacing_works(model):
    prompts = prompts_of(ragged_rows())
    return check_replacement(model, **prompts, thoughts=read_thoughts(model, **prompts))


def states_of_row(base, row, exchanged):
    """States (T, D) of a row whose thought number k is exchanged[k] where that is given."""
    embeds, table, number = [], base.get_input_embeddings().weight, 0
    for token in row:
        if token != LATENT:
            embeds.append(table[token])
            continue
        if number in exchanged:
            embeds.append(exchanged[number])
        else:
            states, _ = oracle.run_model(base, embeds)
            embeds.append(oracle.contextual_thought(states, 3, WEIGHTS))
        number += 1
    return oracle.run_model(base, embeds)[0]


@families
@pytest.mark.parametrize("align", ["latent", "end"])
@torch.no_grad()
def test_exchanged_thoughts_equal_a_textbook_recomputation_of_each_row(tiny_model, family, align):
    base = tiny_model(family)
    model, rows = wrap(base).eval(), ragged_rows()
    own = own_thoughts(model, rows)
    batch = lay_out(rows, align=align)
    for where in ("all", "only 2", "first 1", "last 2"):
        vectors = make_vectors("other_record", own, where, model, DONORS)
        replacement = vectors.of(np.arange(len(rows)), torch.device("cpu"))
        with replaced_thoughts(model, replacement):
            states, _, _ = model.read(**batch)
        for i, row in enumerate(rows):
            exchanged = {
                k: vectors.values[i, k] for k in range(own.counts[i]) if vectors.is_chosen[i, k]
            }
            got = states[i][batch["attention_mask"][i].bool()]
            assert_close(got, states_of_row(base, row, exchanged), **EXACT)


def test_a_column_holds_different_positions_of_different_rows(model):
    rows = [[5, LATENT, LATENT, 6], [5, 5, LATENT, 6], [5, 5, 5, 6]]
    batch = lay_out(rows, align="end", extra_left=1, pad=lambda: LATENT)
    columns = thought_positions(model, batch["input_ids"], batch["attention_mask"])
    assert [column.tolist() for column in columns] == [[0, -1, -1], [1, 0, -1]]


def test_positions_count_within_each_record():
    own = OwnThoughts(torch.ones(3, 3, 1), torch.tensor([3, 1, 0]))
    none = [False, False, False]
    expected = {
        "all": [[True, True, True], [True, False, False], none],
        "only 2": [[False, True, False], none, none],
        "first 2": [[True, True, False], [True, False, False], none],
        "last 1": [[False, False, True], [True, False, False], none],
    }
    assert {where: own.choose(where).tolist() for where in expected} == expected


def test_every_replacement_keeps_its_formula(model):
    own = own_thoughts(model, ragged_rows())
    values, counts = own.values, own.counts.tolist()
    made = {name: make_vectors(name, own, "all", model, DONORS).values for name in REPLACEMENTS}
    for k in range(4):
        there = [i for i, count in enumerate(counts) if count > k]
        column = torch.stack([values[i, k] for i in there])
        noise = made["noise_added"] - values
        for i in there:
            assert not made["zeros"][i, k].any()
            assert_close(made["mean"][i, k], column.mean(0), **EXACT)
            assert_close(made["noise"][i, k].norm(), values[i, k].norm(), **EXACT)
            assert torch.equal(
                made["placeholder"][i, k],
                model.base_causallm.get_input_embeddings().weight[LATENT],
            )
            donor = int(DONORS[i])
            assert torch.equal(made["other_record"][i, k], values[donor, k % counts[donor]])
            # No noise where the deviation is 0 or cannot be estimated.
            assert noise[i, k].any() == (len(there) > 1)


def test_added_noise_has_the_deviation_of_the_thoughts_in_each_dimension(model):
    values = torch.randn(4000, 1, 3, generator=torch.Generator().manual_seed(1))
    values = values * torch.tensor([0.1, 1.0, 10.0]) + 5
    own = OwnThoughts(values, torch.ones(4000, dtype=torch.long))
    noise = make_vectors("noise_added", own, "all", model, DONORS).values - values
    assert_close(noise.std(0), values.std(0), rtol=0.05, atol=0)
    assert (noise.mean(0).abs() < 0.05 * values.std(0)).all()


def test_permuted_thoughts_change_places_among_the_exchanged_ones(model):
    own = own_thoughts(model, ragged_rows())
    vectors = make_vectors("permuted", own, "first 3", model, DONORS)
    for i, count in enumerate(own.counts.tolist()):
        num = min(count, 3)
        before, after = own.values[i, :num], vectors.values[i, :num]
        taken = [next(j for j in range(num) if torch.equal(before[j], row)) for row in after]
        assert sorted(taken) == list(range(num))
        assert num < 2 or all(j != k for k, j in enumerate(taken))


def test_another_records_thoughts_answer_another_question_and_are_enough():
    counts = [3, 3, 2, 1, 3, 2]
    chosen = partners(QUESTIONS, counts)
    for i, donor in enumerate(chosen):
        assert QUESTIONS[donor] != QUESTIONS[i]
        assert counts[donor] >= counts[i]
    # The only record with five thoughts takes those of the one with the most after it.
    assert partners(["a", "b", "c"], [5, 2, 3])[0] == 2


def test_another_record_needs_another_question():
    with pytest.raises(UserError, match="a second question, but there is only 'a'"):
        partners(["a", "a"], [1, 1])


@families
def test_replacing_thoughts_by_themselves_changes_no_bit(tiny_model, family):
    model = wrap(tiny_model(family, dtype=torch.float32)).eval()
    assert replacing_works(model)


def test_the_gate_finds_a_model_that_does_not_read_its_thoughts(tiny_model):
    class Deaf(Coconut):
        def read(self, *arguments, **options):
            own = self.thought
            self.thought = super().thought
            try:
                return super().read(*arguments, **options)
            finally:
                self.thought = own

    assert not replacing_works(wrap(tiny_model("gpt2"), kind=Deaf))


def test_a_model_whose_thoughts_are_drawn_draws_the_same_each_time(tiny_model):
    class Noisy(Coconut):
        def thought(self, hidden_states, attention_mask, is_first):
            own = super().thought(hidden_states, attention_mask, is_first)
            return own + torch.randn_like(own)

    model = wrap(tiny_model("gpt2"), kind=Noisy).eval()
    before = torch.random.get_rng_state()
    assert replacing_works(model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_model_is_itself_again_afterwards(model):
    batch = prompts_of(ragged_rows())
    before, _, _ = model.read(**batch)
    with pytest.raises(ZeroDivisionError), replaced_thoughts(model, zeros):
        assert not torch.equal(model.read(**batch)[0], before)
        raise ZeroDivisionError
    assert torch.equal(model.read(**batch)[0], before)
