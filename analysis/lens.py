"""Reading vectors as words: the model's output layer applied to thoughts and hidden states.

    p(v) = softmax(U v)

with U the output layer and v a state after the final norm, or a thought, which is an average of
such states. `ask`, `probes` and the report read thoughts with this one function.
Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

import torch
from torch import Tensor

from coconut import Coconut

# Entries of one block of logits, 32 MB in float32: with GPT-2's vocabulary 167 rows.
MAX_LOGITS = 2**23
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_text(tokenizer, token_id: int) -> str:
    """The text of a token, spaces included; the tokenizer's own name for it where it is not text
    on its own, such as one byte of a longer character."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if text and REPLACEMENT not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token_id))


@torch.no_grad()
def lens(model: Coconut, vectors: Tensor) -> Tensor:
    """(..., V) float32 or wider: the probability of each token at each of `vectors` (..., D)."""
    logits = model.base_causallm.get_output_embeddings()(vectors)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def top_tokens(
    model: Coconut, tokenizer, vectors: Tensor, num_tokens: int = 5
) -> list[list[tuple[str, float]]]:
    """The most probable tokens at each of `vectors` (n, D): (text, probability), best first."""
    # Rows past the tokenizer's end only pad the vocabulary.
    best = lens(model, vectors)[:, : len(tokenizer)].topk(num_tokens, dim=-1)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        [(token_text(tokenizer, i), p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in rows
    ]


@torch.no_grad()
def token_log_probabilities(model: Coconut, states: Tensor, token_ids: Tensor) -> Tensor:
    """(n,) float32 or wider: the natural logarithm of the probability of one token at each state.

    states: (n, D); token_ids: (n,) long. The vocabulary is scored for a block of states at a time.
    """
    head = model.base_causallm.get_output_embeddings()
    found = [states.new_zeros(0, dtype=torch.promote_types(states.dtype, torch.float32))]
    for block, ids in zip(blocks(model, states), blocks(model, token_ids), strict=True):
        logits = head(block)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(found)


def blocks(model: Coconut, rows: Tensor) -> tuple[Tensor, ...]:
    """`rows` in parts whose logits over the vocabulary fill no more than MAX_LOGITS numbers."""
    vocab_size = model.base_causallm.get_input_embeddings().num_embeddings
    return rows.split(max(1, MAX_LOGITS // vocab_size))
