"""Laws of Coconut.forward, most of them against the uncached recomputation in oracle.py.

Models are tiny, random and float64, so "equal" means to rounding. Letters: B batch, T columns,
D width, V vocabulary, N labelled tokens, K latents of a row, P first latent column, m window.
"""

import itertools
import random

import oracle
import pytest
import torch
from batches import (
    END,
    EOS,
    LATENT,
    SCOPES,
    START,
    WEIGHTS,
    assert_matches_oracle,
    count_columns,
    enable_checkpointing,
    exact,
    families,
    gradients,
    laws,
    lay_out,
    make_labels,
    make_row,
    prompts_of,
    ragged_rows,
    real_embeds,
    settings_of,
    wrap,
)
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from coconut import Coconut
from passes import find_blocks

# --- Training: cached passes against the textbook ---------------------------------------------


@laws
@pytest.mark.parametrize("align", ["latent", "end"])
def test_cached_passes_match_recompute(tiny_model, family, m, scope, align):
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows], align=align)
    assert_matches_oracle(tiny_model(family), batch, m=m, scope=scope)


@families
@pytest.mark.parametrize("scope", SCOPES)
def test_any_token_but_the_first_may_have_a_label(tiny_model, family, scope):
    """Labels on the question, on the markers and on latents are predicted by the column before."""
    rows = ragged_rows(seed=1)
    rng = random.Random(1)
    labels = [[-100] + [token if rng.random() < 0.6 else -100 for token in row[1:]] for row in rows]
    assert_matches_oracle(tiny_model(family), lay_out(rows, labels), scope=scope)


@families
def test_random_shapes_and_single_rows_match_recompute(tiny_model, family):
    rng = random.Random(2)
    base = tiny_model(family, seed=3)
    for size in (1, 1, 3, 4):
        shapes = [(rng.randrange(6), rng.randrange(4), rng.randrange(1, 5)) for _ in range(size)]
        rows = [make_row(rng, *shape) for shape in shapes]
        batch = lay_out(rows, [make_labels(row) for row in rows], extra_left=rng.randrange(3))
        assert_matches_oracle(base, batch)


@families
def test_latents_need_not_be_adjacent(tiny_model, family):
    rows = [
        [5, 6, START, LATENT, 7, LATENT, END, 8, 9],
        [3, START, LATENT, LATENT, 4, 5, LATENT, END, 2],
        [4, 4, START, END, 1],
    ]
    assert_matches_oracle(tiny_model(family), lay_out(rows, [make_labels(row) for row in rows]))


@families
def test_a_latent_may_be_the_last_column(tiny_model, family):
    rows = [[5, 6, START, LATENT, LATENT], [3, START, LATENT]]
    labels = [[-100, 6, START, LATENT, LATENT], [-100, START, LATENT]]
    assert_matches_oracle(tiny_model(family), lay_out(rows, labels))


@families
def test_eager_attention_matches_recompute(tiny_model, family):
    """In float32: eager attention's softmax is never float64, and its mask overflows there."""
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows], extra_left=2)
    base = tiny_model(family)
    textbook, _, _ = oracle.batch_loss(base, **batch, **settings_of())
    wanted = {name: value.float() for name, value in gradients(textbook, base).items()}
    eager = tiny_model(family, dtype=torch.float32)
    eager.set_attn_implementation("eager")
    output = wrap(eager)(**batch)
    assert_close(output.loss, textbook.float(), rtol=1e-5, atol=1e-5)
    assert_close(gradients(output.loss, eager), wanted, rtol=1e-3, atol=1e-4)


@families
def test_position_ids_are_honoured(tiny_model, family):
    rows = ragged_rows(seed=4)
    batch = lay_out(rows, [make_labels(row) for row in rows])
    counted = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    stretched = 2 * counted + 3
    assert_matches_oracle(tiny_model(family), batch, position_ids=stretched)
    model = wrap(tiny_model(family))
    with torch.no_grad():
        given, derived = model(**batch, position_ids=counted), model(**batch)
    assert_close(given.logits, derived.logits, rtol=0, atol=0)


@families
def test_the_gradient_is_the_derivative_of_the_loss(tiny_model, family):
    """By finite differences, which no cache, graph or detach can mislead."""
    base = tiny_model(family)
    rows = ragged_rows(seed=5)
    batch = lay_out(rows, [make_labels(row) for row in rows])
    model = wrap(base)
    found = gradients(model(**batch).loss, base)
    torch.manual_seed(0)
    direction = {name: torch.randn_like(value) for name, value in base.named_parameters()}
    slope = sum((found[name] * direction[name]).sum() for name in found)
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in base.named_parameters():
                parameter += sign * step * direction[name]
            losses.append(model(**batch).loss)
    assert_close(slope, (losses[0] - losses[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@families
def test_gradients_flow_to_the_question_through_every_thought(tiny_model, family):
    base = tiny_model(family)
    question_token = 5
    row = [question_token, 6, 7, START, LATENT, LATENT, LATENT, END, 8]
    batch = lay_out([row, [9, *row[1:]]])
    embeds = wrap(base, m=1)(**batch).inputs_embeds
    table = base.get_input_embeddings().weight
    for column in (4, 5, 6):
        (gradient,) = torch.autograd.grad(embeds[0, column].sum(), table, retain_graph=True)
        assert gradient[question_token].norm() > 1e-3
        (gradient,) = torch.autograd.grad(embeds[1, column].sum(), table, retain_graph=True)
        assert gradient[question_token].norm() == 0


# --- Padding ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("extra_left, extra_right", [(1, 0), (0, 1), (4, 3)])
def test_the_amount_of_padding_changes_nothing(tiny_model, family, scope, extra_left, extra_right):
    base = tiny_model(family)
    rows = ragged_rows()
    labels = [make_labels(row) for row in rows]
    model = wrap(base, scope=scope)
    tight = model(**lay_out(rows, labels))
    loose = model(**lay_out(rows, labels, extra_left=extra_left, extra_right=extra_right))
    assert_close(loose.logits, tight.logits, **exact)
    assert_close(gradients(loose.loss, base), gradients(tight.loss, base), **exact)


@families
@pytest.mark.parametrize("content", ["words", "latents", "markers"])
def test_the_content_of_padding_changes_nothing(tiny_model, family, content):
    base = tiny_model(family)
    rows = ragged_rows()
    labels = [make_labels(row) for row in rows]
    rng = random.Random(0)
    tokens = {"words": range(1, START), "latents": [LATENT], "markers": [START, END]}[content]
    model = wrap(base)
    plain = model(**lay_out(rows, labels, extra_left=2, extra_right=2))
    filled = model(
        **lay_out(rows, labels, extra_left=2, extra_right=2, pad=lambda: rng.choice(tokens))
    )
    assert_close(filled.logits, plain.logits, **exact)
    assert_close(gradients(filled.loss, base), gradients(plain.loss, base), **exact)


@laws
def test_a_row_does_not_depend_on_its_batch(tiny_model, family, m, scope):
    rows = ragged_rows()
    labels = [make_labels(row) for row in rows]
    model = wrap(tiny_model(family), m=m, scope=scope)
    with torch.no_grad():
        together = model(**lay_out(rows, labels)).logits
        alone = [
            model(**lay_out([row], [label])).logits for row, label in zip(rows, labels, strict=True)
        ]
    assert_close(together, torch.cat(alone), **exact)


# --- The thought ------------------------------------------------------------------------------


def states_before(base, embeds):
    """Last-layer states after the final norm (T, D) over one row's embeddings (T, D)."""
    states, _ = oracle.run_model(base, list(embeds))
    return states


@families
def test_window_of_one_is_the_original_coconut(tiny_model, family):
    base = tiny_model(family)
    batch = lay_out(ragged_rows())
    output = wrap(base, m=1)(**batch)
    checked = 0
    for row, embeds in zip(ragged_rows(), real_embeds(output, batch), strict=True):
        states = states_before(base, embeds)
        for t in [t for t, token in enumerate(row) if token == LATENT]:
            assert_close(embeds[t], states[t - 1], **exact)
            checked += 1
    assert checked == 10


@families
def test_a_window_of_one_never_scales_the_state(tiny_model, family):
    """Whatever w_1, the thought is the state itself, bit for bit."""
    batch = lay_out(ragged_rows())
    base = tiny_model(family)
    one = wrap(base, m=1, weights=(1.0,))(**batch).inputs_embeds
    tenth = wrap(base, m=1, weights=(0.1, 0.7))(**batch).inputs_embeds
    real = batch["attention_mask"].bool()
    assert_close(tenth[real], one[real], rtol=0, atol=0)


@families
def test_a_window_cut_short_is_renormalised(tiny_model, family):
    base = tiny_model(family)
    row = [5, START, LATENT, LATENT, LATENT, END, 7]
    batch = lay_out([row, make_row(random.Random(0), 9, 3, 2)])
    embeds = real_embeds(wrap(base, m=5)(**batch), batch)[0]
    h = states_before(base, embeds)
    w = WEIGHTS
    assert_close(embeds[2], (w[0] * h[1] + w[1] * h[0]) / (w[0] + w[1]), **exact)
    assert_close(
        embeds[3], (w[0] * h[2] + w[1] * h[1] + w[2] * h[0]) / (w[0] + w[1] + w[2]), **exact
    )
    assert_close(
        embeds[4],
        (w[0] * h[3] + w[1] * h[2] + w[2] * h[1] + w[3] * h[0]) / (w[0] + w[1] + w[2] + w[3]),
        **exact,
    )


@families
def test_a_whole_window_covers_question_marker_and_thoughts(tiny_model, family):
    base = tiny_model(family)
    batch = lay_out([[5, 6, START, LATENT, LATENT, LATENT, LATENT, END, 7]])
    embeds = wrap(base, weights=(0.6, 0.3, 0.1))(**batch).inputs_embeds[0]
    h = states_before(base, embeds)
    for t in (3, 4, 5, 6):
        assert_close(embeds[t], 0.6 * h[t - 1] + 0.3 * h[t - 2] + 0.1 * h[t - 3], **exact)


@families
def test_weights_beyond_the_window_are_ignored(tiny_model, family):
    base = tiny_model(family)
    batch = lay_out(ragged_rows())
    many = wrap(base, m=2, weights=(0.5, 0.7, 0.2, 0.9))(**batch).inputs_embeds
    two = wrap(base, m=2, weights=(0.5, 0.7))(**batch).inputs_embeds
    real = batch["attention_mask"].bool()
    assert_close(many[real], two[real], rtol=0, atol=0)


@families
def test_a_window_of_one_is_exact_under_autocast(tiny_model, family):
    """The state reaches the next pass bit for bit, also where matrix products round to bf16."""
    base = tiny_model(family, dtype=torch.float32)
    states = []
    base.base_model.register_forward_hook(
        lambda _, args, output: states.append(output.last_hidden_state[:, -1])
    )
    with torch.autocast("cpu", torch.bfloat16):
        embeds = wrap(base, m=1)(**lay_out([[5, 6, START, LATENT, LATENT, END, 7]])).inputs_embeds
    assert_close(embeds[:, 3], states[0], rtol=0, atol=0)
    assert_close(embeds[:, 4], states[1], rtol=0, atol=0)


@families
def test_a_subclass_may_change_the_thought(tiny_model, family):
    class Zeroed(Coconut):
        def thought(self, *args, **kwargs):
            return torch.zeros_like(super().thought(*args, **kwargs))

    base = tiny_model(family).eval()
    rows = ragged_rows()
    model = Zeroed(base, LATENT, START, END, EOS)
    batch = lay_out(rows)
    with torch.no_grad():
        embeds = model(**batch).inputs_embeds
    latent = (batch["input_ids"] == LATENT) & (batch["attention_mask"] == 1)
    assert embeds[latent].abs().max() == 0
    assert embeds[~latent].abs().min(1).values.min() > 0
    with torch.no_grad():
        base.get_input_embeddings().weight[LATENT] = 0
    # Suppressed: a latent token that the model writes itself is an ordinary token, not a thought.
    options = {**prompts_of(rows), "max_new_tokens": 5, "suppress_tokens": [LATENT]}
    assert torch.equal(model.generate(**options), wrap(base, thought="pause").generate(**options))


@families
def test_scope_pass_reproduces_the_published_fork(tiny_model, family):
    """Its weights run oldest first, and the windows of a row's later thoughts hold one state."""
    base = tiny_model(family)
    rows = [
        [5, 6, 7, START, LATENT, LATENT, LATENT, END, 8],
        [4, 3, START, LATENT, END, 9, 9],
        [2, 1, 8, 7, START, LATENT, LATENT, END, 6],
        [4, START, END, 3],
    ]
    for align in ("latent", "end"):
        batch = lay_out(rows, align=align)
        model = wrap(base, m=3, scope="pass", weights=[0.1, 0.3, 0.6])
        for row, embeds in zip(rows, real_embeds(model(**batch), batch), strict=True):
            h = states_before(base, embeds)
            latents = [t for t, token in enumerate(row) if token == LATENT]
            for t in latents[:1]:
                oldest_first = 0.6 * h[t - 3] + 0.3 * h[t - 2] + 0.1 * h[t - 1]
                assert_close(embeds[t], oldest_first, **exact)
            for t in latents[1:]:
                assert_close(embeds[t], h[t - 1], **exact)


@families
def test_both_scopes_agree_on_the_first_thought_alone(tiny_model, family):
    base = tiny_model(family)
    batch = lay_out([[5, 6, 7, START, LATENT, LATENT, END, 8]])
    sequence, by_pass = (wrap(base, scope=s)(**batch).inputs_embeds[0] for s in SCOPES)
    assert_close(by_pass[:5], sequence[:5], **exact)
    assert (by_pass[5] - sequence[5]).abs().max() > 1e-3


# --- Neighbours: ordinary language model, pause tokens ----------------------------------------


@families
def test_zero_latents_is_an_ordinary_language_model(tiny_model, family):
    base = tiny_model(family)
    torch.manual_seed(0)
    input_ids = torch.randint(1, START, (3, 9))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    output = wrap(base)(**batch, labels=input_ids)
    ordinary = base(**batch, labels=input_ids)
    # Hugging Face's own loss is float32 whatever the model's dtype.
    assert_close(output.loss.float(), ordinary.loss, rtol=1e-6, atol=1e-6)
    assert_close(output.logits, ordinary.logits[:, :-1].reshape(-1, 40), **exact)
    assert_close(output.inputs_embeds, base.get_input_embeddings()(input_ids), rtol=0, atol=0)


@families
def test_pause_thoughts_are_an_ordinary_language_model(tiny_model, family):
    base = tiny_model(family)
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    assert_matches_oracle(base, batch, thought="pause")
    calls = count_columns(base.base_model)
    wrap(base, thought="pause")(**batch)
    assert calls == [(1, batch["attention_mask"].sum())]


@families
def test_without_labels_the_logits_are_the_last_columns(tiny_model, family):
    base = tiny_model(family)
    rows = ragged_rows()
    output = wrap(base)(**lay_out(rows, align="end"))
    assert output.loss is None
    assert output.logits.shape == (len(rows), 1, 40)
    for row, logits in zip(rows, output.logits, strict=True):
        embeds = oracle.embed_row(base, row, **settings_of())
        _, textbook = oracle.run_model(base, embeds)
        assert_close(logits[0], textbook[-1], **exact)


# --- Cost -------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("latents", [(0, 0), (1,), (0, 2), (3, 1, 0), (5, 5)])
def test_a_batch_takes_one_pass_more_than_its_latents(tiny_model, family, latents):
    base = tiny_model(family)
    rng = random.Random(0)
    rows = [make_row(rng, rng.randrange(1, 6), num_latents, 3) for num_latents in latents]
    batch = lay_out(rows, [make_labels(row) for row in rows])
    calls = count_columns(base.base_model)
    wrap(base)(**batch)
    assert len(calls) == max(latents) + 1
    # Padding is read by none of them.
    tokens = batch["attention_mask"].sum(0)
    if max(latents):
        first = (batch["input_ids"] == LATENT).any(0).nonzero()[0].item()
        last = first + max(latents) - 1
        passes = (tokens[:first].sum(), *tokens[first:last], tokens[last:].sum())
        assert calls == [(1, n) for n in passes]
    else:
        assert calls == [(1, tokens.sum())]


@families
@pytest.mark.parametrize("kind", ["thoughts", "no latents", "pause"])
def test_more_passes_than_the_thoughts_need_change_nothing(tiny_model, family, kind):
    base = tiny_model(family)
    rows = [row for row in ragged_rows() if kind != "no latents" or LATENT not in row]
    batch = lay_out(rows, [make_labels(row) for row in rows], extra_right=2)
    model = wrap(base, thought="pause" if kind == "pause" else "continuous")
    calls = count_columns(base.base_model)
    plain = model(**batch)
    needed, width = len(calls), batch["input_ids"].size(1)
    for num_passes in (needed, needed + 1, width):
        calls.clear()
        padded = model(**batch, layout=model.layout(**batch, num_passes=num_passes))
        assert len(calls) == num_passes
        assert_close(padded.logits, plain.logits, **exact)
        assert_close(padded.inputs_embeds, plain.inputs_embeds, **exact)
        assert_close(gradients(padded.loss, base), gradients(plain.loss, base), **exact)
        plain = model(**batch)
    for num_passes in (needed - 1, width + 1):
        with pytest.raises(
            ValueError, match=rf"num_passes={num_passes}: thoughts need at least {needed} pa"
        ):
            model.layout(**batch, num_passes=num_passes)


# Operations that make the host wait for what the device computed.
WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")


@families
@pytest.mark.parametrize("padding", [0, 2])
def test_nothing_waits_for_the_device_between_layout_and_gradients(tiny_model, family, padding):
    rng = random.Random(0)
    rows = [make_row(rng, 9, 3, 3) for _ in range(2)]
    batch = lay_out(rows, [make_labels(row) for row in rows], extra_left=padding)
    model = wrap(tiny_model(family))
    layout = model.layout(**batch)
    assert layout.tokens[0].needed is not None
    assert (layout.tokens[0].indices is None) == (padding == 0)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(**batch, layout=layout).loss.backward()
    seen = {event.key for event in profiled.key_averages()}
    assert "aten::mm" in seen and not seen & set(WAITS)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(**batch)
    assert {event.key for event in profiled.key_averages()} & set(WAITS), "waits are seen"


@families
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("thought", ["continuous", "pause", "pause_multipass"])
@pytest.mark.parametrize("num_questions", [(9, 9), (9, 4, 7)])
def test_the_last_block_reads_only_tokens_whose_states_are_needed(
    tiny_model, family, m, thought, num_questions
):
    """Thoughts need the m states before them, labels their own; other tokens keys and values."""
    rng = random.Random(0)
    rows = [make_row(rng, length, 2, 2) for length in num_questions]
    batch = lay_out(rows, [make_labels(row) for row in rows], align="latent")
    base = tiny_model(family)
    read = count_columns(find_blocks(base)[-1].mlp, "hidden_states")
    wrap(base, m=m, thought=thought)(**batch)
    # The end of a question, a latent, then a latent, the end marker and two labels.
    columns = [m if thought == "continuous" else 1, 1, 4]
    if thought == "pause":
        columns = [3]  # the end marker and two labels
    assert read == [(1, len(rows) * number) for number in columns]
    assert_matches_oracle(base, batch, m=m, thought=thought)


@families
def test_generate_reads_the_end_of_a_prompt_to_the_end(tiny_model, family):
    """The last block leaves out the question, which answers need the keys and values of alone."""
    rng = random.Random(0)
    prompts = prompts_of([make_row(rng, length, 0, 0) for length in (9, 6)])
    base = tiny_model(family).eval()
    read = count_columns(find_blocks(base)[-1].mlp, "hidden_states")
    wrap(base).generate(**prompts, max_new_tokens=2)
    assert read[0] == (1, 2)  # the last column of both rows, packed


@families
def test_vocabulary_logits_are_computed_at_labelled_positions_only(tiny_model, family):
    base = tiny_model(family)
    rows = ragged_rows()
    labels = [make_labels(row) for row in rows]
    num_labelled = sum(label != -100 for row in labels for label in row)
    computed = []
    base.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: computed.append(args[0].numel() // args[0].shape[-1])
    )
    model = wrap(base)
    assert model(**lay_out(rows, labels)).logits.shape == (num_labelled, 40)
    assert sum(computed) == num_labelled
    computed.clear()
    model(**lay_out(rows, align="end"))
    assert sum(computed) == len(rows)


# --- The module -------------------------------------------------------------------------------


@families
def test_no_parameters_are_added(tiny_model, family):
    base = tiny_model(family)
    model = wrap(base)
    assert {id(p) for p in model.parameters()} == {id(p) for p in base.parameters()}
    assert set(model.state_dict()) == {f"base_causallm.{name}" for name in base.state_dict()}


@families
def test_the_weights_follow_the_models_dtype(tiny_model, family):
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    textbook, *_ = oracle.batch_loss(tiny_model(family), **batch, **settings_of())
    model = wrap(tiny_model(family)).to(torch.bfloat16)
    output = model(**batch)
    output.loss.backward()
    assert output.inputs_embeds.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.double(), textbook, rtol=0.05, atol=0)
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)
    raised = wrap(tiny_model(family, dtype=torch.float32)).to(torch.float64)
    fresh = wrap(raised.base_causallm)
    with torch.no_grad():
        assert_close(raised(**batch).loss, fresh(**batch).loss, rtol=1e-6, atol=0)


@families
def test_bf16_autocast_stays_near_the_textbook(tiny_model, family):
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    textbook_base = tiny_model(family)
    textbook, *_ = oracle.batch_loss(textbook_base, **batch, **settings_of())
    base = tiny_model(family, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = wrap(base)(**batch)
    assert output.loss.dtype == torch.float32
    assert_close(output.loss.double(), textbook, rtol=0.05, atol=0)
    found = torch.cat([g.flatten() for g in gradients(output.loss, base).values()]).double()
    wanted = torch.cat([g.flatten() for g in gradients(textbook, textbook_base).values()])
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.97


@families
def test_the_gradient_does_not_depend_on_the_split(tiny_model, family):
    base = tiny_model(family)
    model = wrap(base)
    rows = ragged_rows()
    labels = [make_labels(row) for row in rows]
    counts = [sum(label != -100 for label in row) for row in labels]
    whole = gradients(model(**lay_out(rows, labels)).loss, base)
    for cuts in ([0, 1, 6], [0, 2, 4, 6], [0, 1, 2, 3, 4, 5, 6]):
        total = {name: torch.zeros_like(value) for name, value in whole.items()}
        for start, stop in itertools.pairwise(cuts):
            loss = model(**lay_out(rows[start:stop], labels[start:stop])).loss
            share = sum(counts[start:stop]) / sum(counts)
            for name, gradient in gradients(loss * share, base).items():
                total[name] += gradient
        assert_close(total, whole, **exact)


@families
def test_activation_checkpointing_is_right_without_thoughts_and_refused_with(tiny_model, family):
    """Under it transformers drops the cache in training mode, with only a warning in the log."""
    base = tiny_model(family)
    model = wrap(base)
    thoughts = ragged_rows()
    plain = [row for row in thoughts if LATENT not in row]
    with_thoughts, without = (
        lay_out(rows, [make_labels(row) for row in rows]) for rows in (thoughts, plain)
    )
    wanted = gradients(model(**without).loss, base)
    enable_checkpointing(base)
    assert_close(gradients(model(**without).loss, base), wanted, **exact)
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        model(**with_thoughts)


@families
def test_a_batch_whose_labels_are_all_ignored_adds_zero(tiny_model, family):
    base = tiny_model(family)
    row = [5, 6, START, LATENT, END, 7]
    output = wrap(base)(**lay_out([row], [[-100] * len(row)]))
    assert output.loss == 0
    assert output.logits.shape == (0, 40)
    assert all(gradient.abs().max() == 0 for gradient in gradients(output.loss, base).values())


def test_dropout_stays_on_in_training_and_off_in_evaluation(tiny_model):
    batch = lay_out(ragged_rows(), [make_labels(row) for row in ragged_rows()])
    model = wrap(tiny_model("gpt2", dropout=0.3)).train()
    torch.manual_seed(0)
    first, second = model(**batch).loss, model(**batch).loss
    torch.manual_seed(0)
    assert_close(model(**batch).loss, first, rtol=0, atol=0)
    assert (first - second).abs() > 1e-4
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    assert_close(model(**batch).loss, model(**batch).loss, rtol=0, atol=0)
    without_dropout = wrap(tiny_model("gpt2"))
    assert_close(model(**batch).loss, without_dropout(**batch).loss, **exact)


# --- Refusals ---------------------------------------------------------------------------------


def test_fewer_weights_than_the_window_are_refused(tiny_model):
    with pytest.raises(ValueError, match="latent_weights"):
        wrap(tiny_model("gpt2"), m=3, weights=(0.6, 0.4))


def test_an_empty_window_is_refused(tiny_model):
    with pytest.raises(ValueError, match="latent_window_size"):
        wrap(tiny_model("gpt2"), m=0)


@pytest.mark.parametrize(
    "weights", [(-0.6, 0.3), (0.6, -0.3), (0.0, 1.0), (float("inf"), 1.0), (float("nan"), 1.0)]
)
def test_weights_that_cannot_average_are_refused(tiny_model, weights):
    with pytest.raises(ValueError, match="latent_weights=.*finite"):
        wrap(tiny_model("gpt2"), m=2, weights=weights)


def test_an_unknown_scope_is_refused(tiny_model):
    with pytest.raises(ValueError, match="window_scope.*batch"):
        wrap(tiny_model("gpt2"), scope="batch")


def test_an_unknown_thought_is_refused(tiny_model):
    with pytest.raises(ValueError, match="thought.*deep"):
        wrap(tiny_model("gpt2"), thought="deep")


@families
def test_a_latent_with_nothing_before_it_is_refused(tiny_model, family):
    model = wrap(tiny_model(family))
    row = [LATENT, 5, END, 6]
    with pytest.raises(ValueError, match="starts with a latent"):
        model(**lay_out([row], [make_labels(row)]))
    padded = {
        "input_ids": torch.tensor([[5, 6, 7, LATENT, END, 8], [0, 0, 0, LATENT, END, 8]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
    }
    with pytest.raises(ValueError, match="starts with a latent"):
        model(**padded)
    with pytest.raises(ValueError, match="starts with a latent"):
        model.generate(**padded, max_new_tokens=2)
