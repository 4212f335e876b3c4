"""Reading vectors as words."""

import pytest
import torch

from analysis.lens import lens, token_text, top_tokens
from coconut import Coconut


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_lens_is_the_models_own_next_token_distribution(family, tiny_model):
    model = Coconut(tiny_model(family).eval(), 38, 36, 37, 0, latent_window_size=2)
    ids = torch.tensor([[5, 6, 38, 38, 7]])
    states, embeds, _ = model.read(ids, torch.ones_like(ids))
    expected = model.base_causallm(inputs_embeds=embeds).logits.softmax(-1)
    assert torch.allclose(lens(model, states), expected, atol=1e-12)


def test_top_tokens_are_the_most_probable_and_known_to_the_tokenizer(tiny_model, word_tokenizer):
    model = Coconut(tiny_model("gpt2").eval(), 38, 36, 37, 0)  # 40 rows, 37 words
    vectors = torch.randn(3, 32, dtype=torch.float64, generator=torch.manual_seed(0))
    vectors[0] = 50 * model.base_causallm.get_output_embeddings().weight[39]  # a row without a word
    rows = top_tokens(model, word_tokenizer, vectors, 4)
    for row, p in zip(rows, lens(model, vectors), strict=True):
        ranked = sorted(range(len(word_tokenizer)), key=lambda i: -p[i])[:4]
        assert [text for text, _ in row] == [word_tokenizer.decode([i]) for i in ranked]
        assert [share for _, share in row] == [p[i].item() for i in ranked]


def test_special_tokens_and_parts_of_characters_keep_their_names(word_tokenizer):
    class Bytes:
        def decode(self, ids, **options):
            return "\N{REPLACEMENT CHARACTER}"

        def convert_ids_to_tokens(self, token_id):
            return "Ã"

    assert token_text(word_tokenizer, word_tokenizer.eos_token_id) == word_tokenizer.eos_token
    assert token_text(Bytes(), 0) == "Ã"
