"""Kinds of thoughts: named or learned weights, norms, pause embeddings, subclasses.

Models are tiny, random and float64; the textbook is oracle.py. Letters: m window, K latents.
"""

import types

import oracle
import pytest
import torch
from batches import (
    END,
    LATENT,
    SCOPES,
    START,
    assert_matches_oracle,
    count_columns,
    exact,
    families,
    gradients,
    lay_out,
    make_labels,
    prompts_of,
    ragged_rows,
    real_embeds,
    settings_of,
    wrap,
)
from torch.testing import assert_close

from coconut import Coconut, initial_weights


def labelled_batch(align="latent", rows=None):
    rows = ragged_rows() if rows is None else rows
    return lay_out(rows, [make_labels(row) for row in rows], align=align)


def assert_same_text(model, base, **choices):
    """`generate` and `answer` write what the oracle writes one row at a time, without a cache."""
    rows = ragged_rows()
    prompts = [row[: row.index(END) + 1] for row in rows]
    wanted = [oracle.generate_row(base, prompt, 6, **settings_of(**choices)) for prompt in prompts]
    model.eos_token_id = min(set(range(40)) - {token for row in wanted for token in row})
    width = prompts_of(rows)["input_ids"].shape[1]
    options = {"max_new_tokens": 6}
    assert model.generate(**prompts_of(rows), **options)[:, width:].tolist() == wanted
    by_base = model.generate(**prompts_of(rows), **options, num_beams=1)
    assert by_base[:, width:].tolist() == wanted
    assert model.answer(**labelled_batch("prompt"), **options)[1].tolist() == wanted


# --- Weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, m, wanted",
    [
        ("uniform", 4, [1, 1, 1, 1]),
        ("exponential:0.3", 3, [1, 0.3, 0.09]),
        ("exponential:2", 3, [1, 2, 4]),
        ("learned", 3, [0.6, 0.3, 0.1]),
        ("learned", 4, [1, 0.5, 0.25, 0.125]),
        ("learned", 1, [1]),
        ((0.5, 0.7, 0.2), 2, [0.5, 0.7]),
    ],
)
def test_names_of_weights_stand_for_numbers(tiny_model, name, m, wanted):
    assert initial_weights(name, m) == pytest.approx(wanted, rel=1e-15)
    shares = [weight / sum(wanted) for weight in wanted]
    model = wrap(tiny_model("gpt2"), m=m, weights=name)
    assert model.window_weights == pytest.approx(shares, rel=1e-15)
    assert (model.window_logits is None) == (name != "learned")


@families
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "name, numbers", [("uniform", [1] * 3), ("exponential:0.3", [1, 0.3, 0.09])]
)
def test_weights_by_name_match_recompute(tiny_model, family, scope, name, numbers):
    base = tiny_model(family)
    output = wrap(base, scope=scope, weights=name)(**labelled_batch())
    wanted, *_ = oracle.batch_loss(
        base, **labelled_batch(), **settings_of(scope=scope, weights=numbers)
    )
    assert_close(output.loss, wanted, **exact)
    assert_close(gradients(output.loss, base), gradients(wanted, base), **exact)


@families
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize("scope", SCOPES)
def test_learned_weights_match_recompute(tiny_model, family, m, scope):
    """Loss and every gradient, that of the weights' logarithms too, away from their start."""
    base = tiny_model(family)
    model = wrap(base, m=m, scope=scope, weights="learned")
    with torch.no_grad():
        model.window_logits.add_(torch.linspace(-0.4, 0.9, m, dtype=torch.float64))
    logits = model.window_logits.detach().clone().requires_grad_()
    weights = oracle.learned_weights(logits)
    output = model(**labelled_batch())
    settings = settings_of(m=m, scope=scope, weights=weights)
    wanted, _, embeds = oracle.batch_loss(base, **labelled_batch(), **settings)
    assert_close(output.loss, wanted, **exact)
    for ours, textbook in zip(real_embeds(output, labelled_batch()), embeds, strict=True):
        assert_close(ours, textbook, **exact)
    parameters = list(base.parameters())
    assert_close(
        torch.autograd.grad(output.loss, [model.window_logits, *parameters]),
        torch.autograd.grad(wanted, [logits, *parameters]),
        **exact,
    )
    assert model.window_weights == pytest.approx([w.item() for w in weights], rel=1e-12)
    assert_same_text(model.eval(), base, m=m, scope=scope, weights=weights)


@families
def test_learned_weights_stay_fp32_and_are_not_rounded_by_autocast(tiny_model, family):
    base = tiny_model(family, dtype=torch.float32)
    model = wrap(base, weights="learned")
    assert model.window_logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**labelled_batch(rows=[[5, 6, 7, START, LATENT, END, 8]]))
        states, embeds, _ = model.read(*lay_out([[5, 6, 7, START, LATENT, END, 8]]).values())
    output.loss.backward()
    assert model.window_logits.grad.dtype == torch.float32
    assert model.window_logits.grad.abs().max() > 0
    average = 0.6 * states[0, 3] + 0.3 * states[0, 2] + 0.1 * states[0, 1]
    assert_close(embeds[0, 4], average, rtol=1e-6, atol=1e-6)


def test_a_bf16_model_gets_fp32_logits_and_bf16_thoughts(tiny_model):
    base = tiny_model("gpt2", dtype=torch.bfloat16)
    model = wrap(base, weights="learned")
    assert model.window_logits.dtype == torch.float32
    assert model(**labelled_batch()).inputs_embeds.dtype == torch.bfloat16


# --- Norms ------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", ["average", 0.7, 2])
@pytest.mark.parametrize("align", ["latent", "end"])
def test_rescaled_thoughts_match_recompute(tiny_model, family, scope, norm, align):
    base = tiny_model(family)
    assert_matches_oracle(base, labelled_batch(align), scope=scope, norm=norm)


@families
def test_rescaled_thoughts_generate_as_recomputed(tiny_model, family):
    base = tiny_model(family).eval()
    for norm in ("average", 0.7):
        assert_same_text(wrap(base, norm=norm), base, norm=norm)


@families
def test_the_nearest_state_at_the_averages_norm_keeps_its_direction(tiny_model, family):
    base = tiny_model(family)
    row = [5, 6, 7, START, LATENT, END, 8]
    rescaled, averaged = (wrap(base, norm=norm)(**lay_out([row])) for norm in ("average", None))
    thought, average = rescaled.inputs_embeds[0, 4], averaged.inputs_embeds[0, 4]
    states, _ = oracle.run_model(base, list(rescaled.inputs_embeds[0]))
    assert_close(thought.norm(), average.norm(), **exact)
    assert_close(torch.cosine_similarity(thought, states[3], dim=0).item(), 1.0, **exact)
    assert torch.cosine_similarity(thought, average, dim=0) < 0.999


@families
@pytest.mark.parametrize("choices", [{"weights": "learned"}, {"weights": "uniform"},
                                     {"weights": "exponential:0.3"}, {"norm": "average"},
                                     {"norm": 1}])  # fmt: skip
def test_a_window_of_one_is_coconut_bit_for_bit_whatever_the_weights(tiny_model, family, choices):
    base = tiny_model(family, dtype=torch.float32)
    batch = labelled_batch()
    original = wrap(base, m=1, weights=(1.0,))(**batch)
    other = wrap(base, m=1, **choices)(**batch)
    assert torch.equal(other.loss, original.loss)
    real = batch["attention_mask"].bool()
    assert torch.equal(other.inputs_embeds[real], original.inputs_embeds[real])


# --- Pause embeddings in several passes -------------------------------------------------------


@families
def test_pause_in_many_passes_is_pause(tiny_model, family):
    base = tiny_model(family)
    batch = labelled_batch()
    calls = count_columns(base.base_model)
    wrap(base)(**batch)
    passes_of_thoughts = list(calls)
    many, one = wrap(base, thought="pause_multipass"), wrap(base, thought="pause")
    calls.clear()
    output = many(**batch)
    assert calls == passes_of_thoughts and len(calls) == 5
    wanted = one(**batch)
    assert_close(output.logits, wanted.logits, **exact)
    assert_close(gradients(output.loss, base), gradients(wanted.loss, base), **exact)
    whole, prompts = labelled_batch("prompt"), prompts_of(ragged_rows())
    calls.clear()
    assert torch.equal(
        many.eval().answer(**whole, max_new_tokens=6)[1],
        one.eval().answer(**whole, max_new_tokens=6)[1],
    )
    for options in ({}, {"num_beams": 2}):
        texts = [model.generate(**prompts, max_new_tokens=6, **options) for model in (many, one)]
        assert torch.equal(*texts)


@families
def test_pause_in_many_passes_may_start_a_row(tiny_model, family):
    base = tiny_model(family)
    batch = labelled_batch(rows=[[LATENT, LATENT, END, 7], [5, START, LATENT, END, 8]])
    assert_matches_oracle(base, batch, thought="pause")
    many, one = (wrap(base, thought=kind)(**batch) for kind in ("pause_multipass", "pause"))
    assert_close(many.loss, one.loss, **exact)


# --- Parameters outside the base model, subclasses, analysis ----------------------------------


class Gated(Coconut):
    """A subclass with parameters of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        width = self.base_causallm.get_input_embeddings().embedding_dim
        self.gate = torch.nn.Linear(width, width)

    def thought(self, hidden_states, attention_mask, is_first):
        average = super().thought(hidden_states, attention_mask, is_first)
        return average + self.gate(average.float()).tanh()


@families
def test_extra_parameters_are_all_outside_the_base_model(tiny_model, family):
    assert wrap(tiny_model(family)).extra_parameters() == {}
    model = wrap(tiny_model(family), weights="learned", kind=Gated)
    extra = model.extra_parameters()
    assert sorted(extra) == ["gate.bias", "gate.weight", "window_logits"]
    assert extra["window_logits"] is model.window_logits
    theirs = {id(parameter) for parameter in model.base_causallm.parameters()}
    assert theirs.isdisjoint(map(id, extra.values()))
    assert {id(p) for p in model.parameters()} == theirs | {id(p) for p in extra.values()}
    assert {f"base_causallm.{n}" for n in model.base_causallm.state_dict()} | set(extra) == set(
        model.state_dict()
    )


@families
def test_a_subclass_with_parameters_trains_on_every_path(tiny_model, family):
    model = wrap(tiny_model(family), weights="learned", kind=Gated)
    plain = wrap(tiny_model(family))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**labelled_batch()).loss
        loss.backward()
        assert all(p.grad.abs().max() > 0 for p in model.extra_parameters().values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    assert_close(
        model.answer(**labelled_batch("prompt"), max_new_tokens=2)[0],
        model(**labelled_batch()).loss,
    )
    prompts = prompts_of(ragged_rows())
    text = model.generate(**prompts, max_new_tokens=8)
    assert torch.equal(model.generate(**prompts, max_new_tokens=8, num_beams=1), text)
    assert text.shape != plain.generate(**prompts, max_new_tokens=8).shape or not torch.equal(
        text, plain.generate(**prompts, max_new_tokens=8)
    )


@families
def test_extra_parameters_get_a_gradient_from_batches_without_thoughts(tiny_model, family):
    """Of zeros: ranks wait for one another's gradients."""
    model = wrap(tiny_model(family), weights="learned", kind=Gated)
    rows = [row for row in ragged_rows() if LATENT not in row]
    loss = model(**labelled_batch(rows=rows)).loss
    assert torch.equal(loss, wrap(tiny_model(family))(**labelled_batch(rows=rows)).loss)
    loss.backward()
    assert all(p.grad.abs().max() == 0 for p in model.extra_parameters().values())


@families
def test_thoughts_of_one_model_may_be_replaced_for_a_while(tiny_model, family):
    model = wrap(tiny_model(family).eval())
    prompts = prompts_of(ragged_rows())
    batch = lay_out(ragged_rows())
    with torch.no_grad():
        before = model(**batch).inputs_embeds
        seen = []

        def watched(self, hidden_states, attention_mask, is_first):
            seen.append(type(self).thought(self, hidden_states, attention_mask, is_first))
            return torch.zeros_like(seen[-1])

        text = model.generate(**prompts, max_new_tokens=5)
        model.thought = types.MethodType(watched, model)
        latent = (batch["input_ids"] == LATENT) & (batch["attention_mask"] == 1)
        assert model(**batch).inputs_embeds[latent].abs().max() == 0
        assert len(seen) == 4
        model.generate(**prompts, max_new_tokens=5)
        assert len(seen) == 8
        del model.thought
        assert torch.equal(model(**batch).inputs_embeds, before)
        assert torch.equal(model.generate(**prompts, max_new_tokens=5), text)


@families
def test_what_was_read_is_read_again_in_one_pass_layer_by_layer(tiny_model, family):
    """How an analysis has the states of every layer and, eagerly, the attention weights."""
    base = tiny_model(family, dtype=torch.float32).eval()
    batch = lay_out(ragged_rows(), extra_left=1)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states, embeds, _ = wrap(base).read(**batch)
        base.set_attn_implementation("eager")
        again = base.base_model(
            inputs_embeds=embeds, attention_mask=batch["attention_mask"],
            position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), use_cache=False,
            output_hidden_states=True, output_attentions=True,
        )  # fmt: skip
    assert_close(again.hidden_states[-1][real], states[real], rtol=1e-4, atol=1e-5)
    B, T = real.shape
    assert [weights.shape for weights in again.attentions] == [(B, 4, T, T)] * 2
    of_tokens = again.attentions[0].transpose(1, 2)[real]  # (tokens, H, T)
    assert_close(of_tokens.sum(-1), torch.ones_like(of_tokens[..., 0]))
    on_padding = (again.attentions[0] * ~real[:, None, None]).transpose(1, 2)[real]
    assert on_padding.abs().max() == 0


def test_the_weights_of_the_average_are_public(tiny_model):
    model = wrap(tiny_model("gpt2"), weights=(0.6, 0.3, 0.1))
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    first = torch.tensor([True, False, True])
    wanted = torch.tensor([[0.1, 0.3, 0.6], [0, 1 / 3, 2 / 3], [0, 0, 0]], dtype=torch.float64)
    assert_close(model.average_weights(mask, first), wanted)
    model.window_scope = "pass"
    wanted[1] = torch.tensor([0, 0, 1])
    assert_close(model.average_weights(mask, first), wanted)
    assert_close(model.average_weights(mask[:, :1], first)[0], torch.ones(1, dtype=torch.float64))


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "gaussian", "exponential", "exponential:", "exponential:x", "exponential:0",
             "exponential:-1", "exponential:nan", "exponential:inf", "exponential:1e200",
             "uniform:2"],
)  # fmt: skip
def test_weights_of_an_unknown_name_are_refused(tiny_model, name):
    with pytest.raises(ValueError, match="latent_weights="):
        wrap(tiny_model("gpt2"), m=3, weights=name)


@pytest.mark.parametrize("norm", ["nearest", 0, -1.0, float("nan"), float("inf"), True, [1.0]])
def test_an_unknown_norm_is_refused(tiny_model, norm):
    with pytest.raises(ValueError, match="thought_norm=.*'average' or above 0"):
        wrap(tiny_model("gpt2"), norm=norm)
