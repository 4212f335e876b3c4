"""Continuations scored as a tree against each of them read by itself."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    MistralConfig,
    MptConfig,
)

from analysis.continuations import Branch, NoBranches, continuation_log_probabilities
from analysis.lens import blocks, token_log_probabilities
from coconut import Coconut

LATENT = 38


def one_by_one(model, embeds, branch):
    """Logarithms of probabilities, each by a pass of its own over text, forced tokens and ids."""
    table, found = model.get_input_embeddings().weight, []
    for ids in branch.continuations:
        before = torch.cat([embeds[: branch.column + 1], table[branch.forced_ids]])
        row = torch.cat([before, table[ids]])[None]
        log_p = model(inputs_embeds=row, use_cache=False).logits[0].log_softmax(-1)
        found.append(sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(ids)))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_tree_gives_each_continuation_what_it_has_alone(family, tiny_model, monkeypatch):
    monkeypatch.setattr("analysis.lens.MAX_LOGITS", 200)  # five states at a time
    model = Coconut(tiny_model(family).eval(), LATENT, 36, 37, 0)
    # Rows of different lengths, padded on the left, with two and one thoughts.
    ids = torch.tensor([[5, 6, 7, 36, LATENT, LATENT], [0, 0, 9, 8, 36, LATENT]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    _, embeds, _ = model.read(ids, mask)
    branches = [
        [
            Branch(3, [37], [[4], [5, 6], [5, 7, 8]]),
            Branch(4, [37, 9], [[4], [5, 6]]),
            Branch(5, [37], [[4, 4, 4, 4]]),
        ],
        [Branch(5, [], [[1], [2, 3]])],
    ]
    found = continuation_log_probabilities(model, embeds, mask, branches)
    for row, first in enumerate([0, 2]):
        for branch, values in zip(branches[row], found[row], strict=True):
            moved = Branch(branch.column - first, branch.forced_ids, branch.continuations)
            expected = one_by_one(model.base_causallm, embeds[row, first:], moved)
            assert values == pytest.approx(expected, abs=1e-10)


@torch.no_grad()
def test_blocks_of_the_vocabulary_change_no_probability(tiny_model, monkeypatch):
    monkeypatch.setattr("analysis.lens.MAX_LOGITS", 2 * 40)
    model = Coconut(tiny_model("gpt2").eval(), LATENT, 36, 37, 0)
    states = torch.randn(7, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    tokens = torch.arange(7)
    logits = model.base_causallm.get_output_embeddings()(states)
    expected = logits.log_softmax(-1)[tokens, tokens]
    assert torch.allclose(token_log_probabilities(model, states, tokens), expected, atol=1e-12)
    assert len(blocks(model, states)) == 4


@pytest.mark.parametrize("kind", ["window", "local", "alibi", "columns"])
def test_models_that_need_more_than_a_mask_are_refused(kind):
    sizes = {"vocab_size": 40, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "window": lambda: MistralConfig(
            **sizes, **layers, intermediate_size=16, num_key_value_heads=2, sliding_window=3
        ),
        "local": lambda: GPTNeoConfig(
            **sizes, num_layers=2, num_heads=2, attention_types=[[["local"], 2]], window_size=5
        ),
        "alibi": lambda: BloomConfig(**sizes, n_layer=2, n_head=2),
        "columns": lambda: MptConfig(vocab_size=40, d_model=16, n_layers=2, n_heads=2),
    }[kind]()
    base = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(generator=torch.manual_seed(0))
    model = Coconut(base, LATENT, 36, 37, 0)
    ids = torch.arange(1, 5)[None]
    with torch.no_grad():
        _, embeds, _ = model.read(ids, torch.ones_like(ids))
    # The local layers' window would hold each continuation alone, but not with the others' columns.
    branch = Branch(3, [], [[1, 2]] * 6)
    with pytest.raises(NoBranches, match=f"{config.model_type}: its layers depend on where"):
        continuation_log_probabilities(model, embeds, torch.ones_like(ids), [[branch]])
