"""layers.py: one gradient per weight for all passes, and layers that compute what they replace."""

import copy
import random
from collections import defaultdict

import oracle
import pytest
import torch
from batches import (
    LATENT,
    assert_matches_oracle,
    families,
    lay_out,
    make_labels,
    make_row,
    ragged_rows,
    settings_of,
    wrap,
)
from torch.nn import functional as F
from torch.testing import assert_close

import layers
import passes
from layers import prepare

exact = {"rtol": 1e-9, "atol": 1e-10}


@families
def test_a_gpus_operations_match_the_oracle(tiny_model, family, monkeypatch):
    """Also where the last block reads no more than the end of the questions."""
    rng = random.Random(0)
    rows = [make_row(rng, *shape) for shape in [(9, 3, 1), (12, 2, 3), (10, 1, 4)]]
    batch = lay_out(rows, [make_labels(row) for row in rows])
    kernel, calls = passes._attend_by_kernel, []

    def spied(query, parts, *rest):
        num_columns = sum(part.keys.size(2) for part in parts)
        calls.append((len(parts), "narrow" if query.size(2) < num_columns else "whole"))
        return kernel(query, parts, *rest)

    monkeypatch.setattr(passes, "_attend_by_kernel", spied)
    with layers.as_on_gpu():
        assert not layers.takes_cpu_path(batch["input_ids"])
        assert_matches_oracle(tiny_model(family), batch)
    assert calls[:2] == [(1, "whole"), (1, "narrow")]
    assert set(calls[2:]) == {(2, "narrow")}
    calls.clear()
    assert_matches_oracle(tiny_model(family), batch)
    assert calls == [(1, "whole")]


def test_a_gpu_draws_dropout_by_its_own_operation(monkeypatch):
    monkeypatch.setattr(layers, "draw_kept", None)
    with layers.as_on_gpu():
        kept = layers.dropout(torch.ones(10_000), 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    with pytest.raises(TypeError):
        layers.dropout(torch.ones(10_000), 0.25)


@families
def test_preparing_a_model_changes_no_result(tiny_model, family):
    base = tiny_model(family)
    plain = copy.deepcopy(base)
    prepare(base)
    prepare(base)
    ids = torch.tensor([[5, 8, 3, LATENT, 2]])
    got, wanted = base(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss
    assert_close(got, wanted, **exact)
    got.backward()
    wanted.backward()
    for (name, ours), (same, theirs) in zip(
        base.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == same
        assert_close(ours.grad, theirs.grad, **exact)


@families
def test_a_weight_gradient_takes_one_product_for_all_passes(tiny_model, family, monkeypatch):
    base = tiny_model(family)
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    linears = [m for m in base.modules() if type(m) in (torch.nn.Linear, layers.Conv1D)]
    taken, products = defaultdict(list), defaultdict(list)
    for name, calls in (("add_use", taken), ("multiply", products)):
        whole = getattr(layers._Pending, name)

        def counted(self, x, gradient, whole=whole, calls=calls):
            calls[id(self)].append(len(x))
            whole(self, x, gradient)

        monkeypatch.setattr(layers._Pending, name, counted)
    model = wrap(base)
    output = model(**batch)
    output.loss.backward()
    layout = model.layout(**batch)
    of_passes = [len(tokens.indices) for tokens in reversed(layout.tokens)]
    of_head = [len(output.logits)]
    assert sorted(taken.values()) == sorted([of_head] + [of_passes] * (len(linears) - 1))
    # Passes longer than a small weight is wide are multiplied alone, the others together.
    assert {sum(product) for product in products.values()} == {sum(of_passes), sum(of_head)}
    assert all(len(product) <= 3 < len(of_passes) for product in products.values())
    assert [of_passes[-1], sum(of_passes[:-1])] in products.values()


@families
@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_embedding_table_tied_to_the_head_gets_one_gradient(
    tiny_model, family, monkeypatch, is_frozen
):
    base = tiny_model(family)
    base.config.tie_word_embeddings = True
    base.tie_weights()
    table = base.get_input_embeddings().weight
    assert base.lm_head.weight is table
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    loss, _, _ = oracle.batch_loss(base, **batch, **settings_of())
    (wanted,) = torch.autograd.grad(loss, [table])
    table.requires_grad_(not is_frozen)
    num_rows = []
    whole = layers._Pending.pop

    def spied(self, weight):
        num_rows.append(len(self.row_uses))
        return whole(self, weight)

    monkeypatch.setattr(layers._Pending, "pop", spied)
    wrap(base)(**batch).loss.backward()
    if is_frozen:
        assert table.grad is None
    else:
        assert_close(table.grad, wanted, **exact)
    assert num_rows.count(1) == (not is_frozen)


@families
def test_frozen_weights_get_no_gradient_and_change_no_other(tiny_model, family):
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    base = tiny_model(family)
    wrap(base)(**batch).loss.backward()
    wanted = {name: p.grad for name, p in base.named_parameters()}
    frozen = tiny_model(family)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad = "weight" not in name or "layers.1" in name or "h.1" in name
    wrap(frozen)(**batch).loss.backward()
    assert any(p.grad is None for p in frozen.parameters())
    for name, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, wanted[name], **exact)
        else:
            assert parameter.grad is None


@families
def test_two_forwards_before_a_backward_keep_their_gradients_apart(tiny_model, family):
    rows = ragged_rows()
    batches = [lay_out(part, [make_labels(row) for row in part]) for part in (rows[:3], rows[3:])]
    base = tiny_model(family)
    for batch in batches:
        wrap(base)(**batch).loss.backward()
    wanted = [p.grad.clone() for p in base.parameters()]
    base.zero_grad()
    model = wrap(base)
    first, second = (model(**batch).loss for batch in batches)
    first.backward()
    second.backward()
    assert_close([p.grad for p in base.parameters()], wanted, **exact)


def test_a_retained_graph_gives_its_gradients_again(tiny_model):
    base = tiny_model("gpt2")
    rows = ragged_rows()
    loss = wrap(base)(**lay_out(rows, [make_labels(row) for row in rows])).loss
    once, again = (
        torch.autograd.grad(loss, list(base.parameters()), retain_graph=True) for _ in range(2)
    )
    assert_close(once, again, rtol=0, atol=0)


@families
def test_a_backward_pass_for_some_parameters_leaves_nothing_for_the_next(tiny_model, family):
    base = tiny_model(family)
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    model, parameters = wrap(base), list(base.parameters())
    wanted = torch.autograd.grad(model(**batch).loss, parameters)
    loss = model(**batch).loss
    for some in ([0], [len(parameters) - 1], [3, 5]):
        got = torch.autograd.grad(loss, [parameters[i] for i in some], retain_graph=True)
        assert_close(got, tuple(wanted[i] for i in some), **exact)
    assert_close(torch.autograd.grad(loss, parameters), wanted, **exact)


def test_a_padding_row_of_a_tied_table_gets_no_gradient_from_its_uses(tiny_model):
    base = tiny_model("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    table = base.get_input_embeddings()
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    table.padding_idx = rows[0][0]
    wrap(base)(**batch).loss.backward()
    # The oracle looks rows up without the table's own rule.
    loss, _, _ = oracle.batch_loss(base, **batch, **settings_of())
    (wanted,) = torch.autograd.grad(loss, [table.weight])
    others = torch.arange(len(wanted)) != table.padding_idx
    assert_close(table.weight.grad[others], wanted[others], **exact)
    assert not torch.allclose(table.weight.grad[~others], wanted[~others])


@families
def test_gradients_under_autocast_are_the_plain_ones_to_rounding(tiny_model, family):
    base = tiny_model(family).float()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    model, parameters = wrap(base), list(base.parameters())
    plain = torch.autograd.grad(model(**batch).loss, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    rounded = torch.autograd.grad(loss, parameters)
    for one, other in zip(plain, rounded, strict=True):
        assert other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * one.norm()


def test_gradients_of_gradients_are_refused(tiny_model):
    base = tiny_model("gpt2")
    rows = ragged_rows()
    loss = wrap(base)(**lay_out(rows, [make_labels(row) for row in rows])).loss
    with pytest.raises(RuntimeError, match="create_graph: .* cannot be differentiated again"):
        torch.autograd.grad(loss, list(base.parameters()), create_graph=True)


def test_the_fused_activation_is_gelu_new(tiny_model):
    base = tiny_model("gpt2")
    prepare(base)
    activations = [block.mlp.act for block in base.transformer.h]
    assert all(isinstance(act, torch.nn.GELU) for act in activations)
    assert base.config.activation_function == "gelu_new", "as the checkpoint will say"
    x = torch.linspace(-8, 8, 400, dtype=torch.float64)
    textbook = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    assert_close(activations[0](x), textbook, rtol=1e-12, atol=1e-14)


# --- Cross-entropy ----------------------------------------------------------------------------


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN multiplies fp32 matrices, whatever the processor; its calls, which grow."""
    calls = []
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def counted(x, *rest):
        calls.append(x.shape)
        return multiply(x, *rest)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", counted)
    monkeypatch.setattr(layers, "prefers_onednn", lambda: True)
    monkeypatch.setattr(layers, "MIN_ONEDNN_SIZE", 8 * 7 * 5)
    return calls


def test_products_by_onednn_are_products(onednn):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 7, 5), torch.randn(8, 5), torch.randn(8)
    columns = torch.randn(5, 8), torch.randn(5, 7)  # transposed, as for weight gradients
    assert_close(layers.linear(x, weight), x @ weight.t())
    assert_close(layers.linear(x, weight, bias), x @ weight.t() + bias)
    strided = torch.randn(16)[::2]
    assert_close(layers.linear(x, weight, strided), x @ weight.t() + strided)
    wide = torch.randn(8, 10)[:, ::2]
    assert_close(layers.linear(x[:1].expand(2, 7, 5), wide), x[:1].expand(2, 7, 5) @ wide.t())
    assert_close(layers.linear(columns[1].t(), columns[0].t()), columns[1].t() @ columns[0])
    assert len(onednn) == 5
    # Small ones, and other precisions, stay with torch.
    assert_close(layers.linear(x[0, :6], weight), x[0, :6] @ weight.t())
    assert_close(layers.linear(x.double(), weight.double()), x.double() @ weight.double().t())
    assert layers.linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert len(onednn) == 5


@families
def test_a_model_in_fp32_is_multiplied_by_onednn_to_rounding(tiny_model, family, onednn):
    base = tiny_model(family).float()
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    loss, *_ = oracle.batch_loss(base, **batch, **settings_of())
    wanted = torch.autograd.grad(loss, list(base.parameters()))
    model = wrap(base)
    ours = model(**batch).loss
    gradients = torch.autograd.grad(ours, list(base.parameters()))
    assert_close(ours, loss)
    for one, other in zip(gradients, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6
    in_training = len(onednn)
    with torch.no_grad():
        assert_close(model(**batch).loss, loss.detach())
    # A weight of a layer takes part in the product, its input's gradient and its own.
    assert 0 < len(onednn) - in_training < in_training / 2


@pytest.mark.parametrize("V", [1, 16, 37, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_vocabulary_in_blocks_has_the_same_largest_logit(monkeypatch, V, has_bias):
    monkeypatch.setattr(layers, "VOCABULARY_BLOCK", 16)
    torch.manual_seed(V)
    head = torch.nn.Linear(5, V, bias=has_bias, dtype=torch.float64)
    states = torch.randn(50, 5, dtype=torch.float64)
    logits = states @ head.weight.T + (head.bias if has_bias else 0)
    assert layers.argmax_tokens(head, states).tolist() == logits.argmax(1).tolist()


def test_of_equal_logits_the_first_token_wins(monkeypatch):
    monkeypatch.setattr(layers, "VOCABULARY_BLOCK", 3)
    head = torch.nn.Linear(2, 8, bias=False)
    torch.nn.init.ones_(head.weight)
    assert layers.argmax_tokens(head, torch.tensor([[1.0, 2.0], [-1.0, 0.5]])).tolist() == [0, 0]


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("N", [0, 1, 7])
def test_cross_entropy_in_blocks_is_cross_entropy(monkeypatch, block, N):
    monkeypatch.setitem(layers.LOGITS_BLOCK, "cpu", block)
    torch.manual_seed(0)
    logits = (20 * torch.randn(N, 13, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(13, (N,))
    got, wanted = (
        loss(logits, targets)
        for loss in (layers.cross_entropy, lambda x, y: F.cross_entropy(x, y, reduction="sum"))
    )
    assert_close(got, wanted, **exact)
    got, wanted = (torch.autograd.grad(3 * loss, logits) for loss in (got, wanted))
    assert_close(got, wanted, **exact)


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    torch.manual_seed(0)
    logits = (5 * torch.randn(9, 300)).bfloat16().requires_grad_()
    targets = torch.randint(300, (9,))
    loss = layers.cross_entropy(logits, targets)
    wanted = F.cross_entropy(logits.float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    assert_close(loss, wanted)
    # Both are rounded to bf16 once, at the end.
    assert_close(*(torch.autograd.grad(x, logits) for x in (loss, wanted)), rtol=2**-8, atol=1e-9)


def test_cross_entropy_keeps_one_table():
    logits = torch.randn(4, 50, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layers.cross_entropy(logits, torch.arange(4))
    assert [x.data_ptr() for x in kept if x.numel() >= logits.numel()] == [logits.data_ptr()]


# --- Dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_drops_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.full((501, 403), 2.0, requires_grad=True)
    dropped = layers.dropout(x, p)
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float((dropped == 0).float().mean()) - p) < 5 * error
    assert_close(dropped[dropped != 0].unique(), torch.tensor([2 / (1 - p)]), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(dropped.sum(), x)
    assert_close(gradient, dropped / 2)


def test_dropout_draws_every_entry_on_its_own():
    """Four entries share a word; none of them says anything about another."""
    torch.manual_seed(0)
    kept, _ = layers.draw_kept(torch.empty(100_000, 8), 0.5)
    correlations = torch.corrcoef(kept.T.double()) - torch.eye(8)
    assert correlations.abs().max() < 5 / 100_000**0.5


def test_dropout_keeps_a_byte_for_each_entry():
    x = torch.randn(8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers.dropout(x, 0.5)
    assert sum(t.nbytes for t in kept) == x.numel()


def test_a_dropout_layer_is_off_in_evaluation_and_drops_all_or_nothing_as_torchs_does(tiny_model):
    base = tiny_model("gpt2")
    base.transformer.drop.p = 0.5
    prepare(base)
    layer, x = base.transformer.drop, torch.ones(50, 50)
    assert type(layer) is not torch.nn.Dropout
    assert 0 < (layer.train()(x) == 0).sum() < x.numel()
    assert torch.equal(layer.eval()(x), x)
    for p, wanted in ((0, x), (1, 0 * x)):
        layer.p = p
        assert torch.equal(layer.train()(x), wanted)
