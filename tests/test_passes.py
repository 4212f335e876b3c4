"""passes.py: attention over parts, packed tokens, buffers for keys.

That Coconut as a whole equals the textbook is shown by test_coconut.py, through these functions.
Letters: B rows, H query heads, G key heads, C columns of a pass, L columns so far, E width.
"""

import gc
import itertools
import random
import weakref

import oracle
import pytest
import torch
from batches import (
    assert_matches_oracle,
    families,
    lay_out,
    make_labels,
    make_row,
    prompts_of,
    ragged_rows,
    settings_of,
    wrap,
)
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

import passes
from passes import Part, PassCache, PassTokens, attend_over_parts, find_blocks

exact = {"rtol": 1e-9, "atol": 1e-10}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# --- Attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(7,), (5, 2), (6, 1)])
@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_over_parts_is_attention(G, lengths, C, is_padded):
    torch.manual_seed(0)
    B, H, E, L = 3, 4, 8, sum(lengths)
    query, keys, values = draw(B, H, C, E), draw(B, G, L, E), draw(B, G, L, E)
    visible = torch.ones(C, L, dtype=torch.bool).tril(L - C)[None, None]
    if is_padded:
        visible = visible & (torch.arange(L) >= torch.tensor([0, 1, 3])[:, None])[:, None, None]
    wanted = F.scaled_dot_product_attention(
        query, keys.repeat_interleave(H // G, 1), values.repeat_interleave(H // G, 1),
        attn_mask=visible, scale=0.3,
    )  # fmt: skip
    parts = list(map(Part, keys.split(lengths, 2), values.split(lengths, 2)))
    got = attend_over_parts(query, parts, visible if is_padded else None, 0.0, 0.3)
    assert_close(got, wanted, **exact)
    upstream = torch.randn_like(got)
    inputs = (query, keys, values)
    assert_close(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        **exact,
    )


def test_attention_with_dropout_has_the_gradient_of_what_it_computed():
    query, keys, values = draw(2, 2, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4)

    def seeded(query, keys, values):
        torch.manual_seed(3)
        return attend_over_parts(query, [Part(keys, values)], None, 0.4, 0.5)

    with torch.no_grad():
        assert not torch.allclose(
            seeded(query, keys, values),
            attend_over_parts(query, [Part(keys, values)], None, 0.0, 0.5),
        )
    assert torch.autograd.gradcheck(seeded, (query, keys, values))


def test_attention_with_dropout_is_right_on_average():
    torch.manual_seed(0)
    query, keys, values = (x.detach().repeat(4000, 1, 1, 1) for x in
                           (draw(1, 2, 2, 4), draw(1, 2, 3, 4), draw(1, 2, 3, 4)))  # fmt: skip
    plain = attend_over_parts(query[:1], [Part(keys[:1], values[:1])], None, 0.0, 0.5)
    dropped = attend_over_parts(query, [Part(keys, values)], None, 0.25, 0.5)
    error = dropped.std(0) / 4000**0.5
    assert ((dropped.mean(0) - plain[0]).abs() < 5 * error + 1e-12).all()


def attend_seeded_in_blocks(visible, dropout=0.4):
    def attend(query, keys, values):
        torch.manual_seed(3)
        return passes._AttendInBlocks.apply(query, keys, values, visible, dropout, 0.5)

    return attend


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention_in_blocks_has_the_gradient_of_what_it_computed(
    monkeypatch, G, is_padded, dropout
):
    monkeypatch.setattr(passes, "BLOCK_COLUMNS", 2)
    monkeypatch.setattr(passes, "BLOCK_WEIGHTS", 32)  # both rows together at first, then one by one
    visible = None
    if is_padded:
        is_token = torch.arange(5) >= torch.tensor([0, 2])[:, None]
        visible = (is_token[:, None] & torch.ones(5, 5, dtype=torch.bool).tril())[:, None]
        visible = visible | torch.eye(5, dtype=torch.bool)
    inputs = draw(2, 4, 5, 3), draw(2, G, 5, 3), draw(2, G, 5, 3)
    assert torch.autograd.gradcheck(attend_seeded_in_blocks(visible, dropout), inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_single_block_computes_what_attention_over_parts_computes(dropout):
    query, keys, values = draw(2, 4, 5, 3), draw(2, 2, 5, 3), draw(2, 2, 5, 3)
    got = attend_seeded_in_blocks(None, dropout)(query, keys, values)
    torch.manual_seed(3)
    assert_close(got, attend_over_parts(query, [Part(keys, values)], None, dropout, 0.5), **exact)


@families
def test_in_bf16_a_cpu_attends_in_blocks(tiny_model, family, monkeypatch):
    def refuse(*_):
        raise AssertionError("torch's kernel is slow here")

    base = tiny_model(family).float().eval()
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    monkeypatch.setattr(passes, "_attend_by_kernel", refuse)
    with torch.autocast("cpu", torch.bfloat16):
        wrap(base)(**batch).loss.backward()
    with pytest.raises(AssertionError, match="slow"):
        wrap(base)(**batch)


@pytest.mark.parametrize("G", [4, 2])
def test_attention_in_blocks_in_bf16_rounds_its_gradients_once(monkeypatch, G):
    """Sums over many blocks lose no more than the products themselves do."""
    monkeypatch.setattr(passes, "BLOCK_COLUMNS", 4)
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 256, 8).bfloat16().requires_grad_() for heads in (4, G, G)]
    got = passes._AttendInBlocks.apply(*inputs, None, 0.0, 0.3)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    query, *others = exact_inputs
    keys, values = (x.repeat_interleave(4 // G, 1) for x in others)
    wanted = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.3)
    upstream = torch.randn(2, 4, 256, 8).bfloat16()
    ours = torch.autograd.grad(got, inputs, upstream)
    theirs = torch.autograd.grad(wanted, exact_inputs, upstream.double())
    for one, other in zip((got, *ours), (wanted, *theirs), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 0.005 * other.norm()


def test_attention_in_blocks_keeps_a_byte_for_each_weight():
    C = passes.BLOCK_COLUMNS
    query, keys, values = draw(1, 2, C, 4), draw(1, 2, C, 4), draw(1, 2, C, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend_seeded_in_blocks(None)(query, keys, values)
    assert sum(x.nbytes for x in kept) == 3 * query.nbytes + 2 * C * C


@families
def test_attention_in_blocks_matches_recompute(tiny_model, family, monkeypatch):
    """The CPU reads a first pass so under dropout; here it is so small that nothing is dropped."""
    base = tiny_model(family)
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    sizes = []
    whole = passes._blocks

    def spied(*inputs):
        for rows, columns, may_see in whole(*inputs):
            sizes.append((rows.stop - rows.start, columns.stop - columns.start))
            yield rows, columns, may_see

    for module in base.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 1e-12
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 1e-12
    monkeypatch.setattr(passes, "_blocks", spied)
    monkeypatch.setattr(passes, "BLOCK_COLUMNS", 4)
    monkeypatch.setattr(passes, "BLOCK_WEIGHTS", 128)
    assert_matches_oracle(base, batch)
    assert sizes[:3] == [(2, 4)] * 3 and {(1, 4), (1, 2)} <= set(sizes)


@families
def test_keys_of_a_question_take_one_product_for_the_gradients_of_all_passes(tiny_model, family):
    base = tiny_model(family)
    num_columns = 10  # of the first pass, and of no other nor of all later ones together

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **kwargs or {})
            if func is torch.ops.aten.bmm.default and output.size(1) == num_columns:
                counts[-1] += 1
            return output

    counts = []
    for num_latents in (1, 3, 5):
        rows = [make_row(random.Random(seed), num_columns - 1, num_latents, 3) for seed in (0, 1)]
        loss = wrap(base)(**lay_out(rows, [make_labels(row) for row in rows])).loss
        counts.append(0)
        with CountProducts():
            loss.backward()
    assert counts[0] >= 2 * len(find_blocks(base))
    assert counts == counts[:1] * 3


def test_sliding_windows_are_left_to_the_model():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        sliding_window=4, initializer_range=0.5,
    )  # fmt: skip
    base = MistralForCausalLM(config)
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    wanted, _, _ = oracle.batch_loss(base, **batch, **settings_of())
    assert_close(wrap(base)(**batch).loss, wanted, rtol=1e-5, atol=1e-6)
    config.sliding_window = None
    assert not torch.allclose(wrap(base)(**batch).loss, wanted, rtol=1e-3), "the window matters"


def test_a_compiled_model_is_read_without_what_tracing_would_lose(tiny_model):
    """Traced by torch.compile but run as it is: the compiler itself would take minutes."""
    base = tiny_model("gpt2")
    rows = ragged_rows()[:2]
    batch = lay_out(rows, [make_labels(row) for row in rows])
    model = wrap(base)
    model(**batch).loss.backward()
    wanted = [p.grad.clone() for p in base.parameters()]
    base.zero_grad()
    prompts = prompts_of(rows)
    answers = model.eval().generate(**prompts, max_new_tokens=3)
    base.base_model.compile(dynamic=True, backend="eager")
    assert torch.equal(model.generate(**prompts, max_new_tokens=3), answers)
    model.train()(**batch).loss.backward()
    assert_close([p.grad for p in base.parameters()], wanted, **exact)


@families
def test_the_models_choice_of_attention_is_restored(tiny_model, family):
    base = tiny_model(family)
    batch = lay_out(ragged_rows())
    wrap(base)(**batch)
    assert base.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="broken"):
        base.base_model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(
            RuntimeError("broken")))  # fmt: skip
        wrap(base)(**batch)
    assert base.config._attn_implementation == "sdpa"


@families
def test_the_last_block_is_restored_after_an_error_within(tiny_model, family):
    base = tiny_model(family)
    batch = prompts_of([make_row(random.Random(0), 9, 1, 0)])
    block = find_blocks(base)[-1]
    wrap(base)(**batch)
    assert "forward" not in vars(block)
    block.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wrap(base)(**batch)
    assert "forward" not in vars(block)


# --- Without gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [1, 3, 64])
def test_buffers_hold_the_keys_of_the_columns_and_rows_that_are_kept(monkeypatch, growth):
    monkeypatch.setattr(passes, "BUFFER_GROWTH", growth)
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
    with torch.no_grad():
        cache = PassCache()
    expected = {0: torch.zeros(2, 3, 2, 0, 4), 1: torch.zeros(2, 3, 2, 0, 4)}

    def read(columns, mask, token_indices=None):
        cache.begin_pass((len(mask), columns), mask, PassTokens(token_indices))
        for layer in expected:
            rows = torch.randn(2, len(mask), 2, columns, 4)
            if token_indices is not None:
                rows = rows * mask[None, :, None, -columns:, None]
            packed = [cache.pack(states.transpose(1, 2)).transpose(1, 2) for states in rows]
            cache.update(*packed, layer)
            expected[layer] = torch.cat([expected[layer], rows], 3)
            ((keys, values, *_),) = cache.parts[layer]
            assert_close(torch.stack([keys, values]), expected[layer], rtol=0, atol=0)

    read(4, mask[:, :4], mask[:, :4].flatten().nonzero().squeeze(1))
    read(2, mask, mask[:, 4:].flatten().nonzero().squeeze(1))
    cache.truncate(4)
    expected = {layer: rows[:, :, :, :4] for layer, rows in expected.items()}
    mask = F.pad(mask[:, :4], (0, 1), value=1)
    read(1, mask)
    visible = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) == 1
    assert torch.equal(cache.visible[:, 0, 0], visible)
    kept = torch.tensor([0, 2])
    cache.batch_select_indices(kept)
    expected = {layer: rows[:, kept] for layer, rows in expected.items()}
    mask = mask[kept]
    for _ in range(5):
        mask = F.pad(mask, (0, 1), value=1)
        read(1, mask)
    assert cache.visible.shape == (2, 1, 1, 10)


def test_keys_are_copied_only_when_the_buffer_is_full(monkeypatch):
    monkeypatch.setattr(passes, "BUFFER_GROWTH", 3)
    with torch.no_grad():
        cache, addresses = PassCache(), []
    for _ in range(9):
        cache.begin_pass((1, 1), None, PassTokens())
        cache.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
        addresses.append(cache.parts[0][0][0].untyped_storage().data_ptr())
    assert len(set(addresses[:4])) == 1
    was_copied = [before != after for before, after in itertools.pairwise(addresses)]
    assert was_copied == [i in (3, 7) for i in range(8)]


@pytest.mark.parametrize("is_padded", [False, True])
def test_spare_columns_of_a_buffer_change_no_result(monkeypatch, is_padded):
    monkeypatch.setattr(passes, "BUFFER_GROWTH", 3)
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]) if is_padded else None
    with torch.no_grad():
        cache = PassCache()
        # An answer that overflowed is read first, and its columns are cut off again.
        cache.begin_pass((2, 6), mask, PassTokens())
        cache.update(*torch.full((2, 1, 2, 12, 8), torch.inf), 0)
        cache.truncate(0)
        for columns, stop in ((4, 4), (2, 6)):
            cache.begin_pass((2, columns), mask[:, :stop] if is_padded else None, PassTokens())
            cache.update(*torch.randn(2, 1, 2, 2 * columns, 8), 0)
            parts, visible = cache.with_spare_columns(0)
            num_columns = parts[0].keys.size(2)
            assert num_columns == 9 and parts[0].keys.is_contiguous()
            assert not parts[0].keys[:, :, stop:].any() and not parts[0].values[:, :, stop:].any()
            query = torch.randn(2, 4, columns, 8)
            got = attend_over_parts(query, parts, visible, 0.0, 0.3)
            assert_close(got, attend_over_parts(query, cache.parts[0], cache.visible, 0.0, 0.3))


@pytest.mark.parametrize(("num_parts", "num_key_heads"), [(2, 4), (1, 2), (2, 2)])
def test_attention_without_a_backward_pass_leaves_nothing_behind(num_parts, num_key_heads):
    query = torch.randn(2, 4, 1, 8, requires_grad=True)
    leaf = torch.randn(2, num_key_heads, 5, 8, requires_grad=True)
    states = leaf * 1
    node = weakref.ref(states)
    parts = [passes.Part(states, states)] * num_parts
    attended = passes._attend_by_kernel(query, parts, None, 0.0, 0.5)
    del states, parts, attended
    gc.collect()
    assert node() is None
