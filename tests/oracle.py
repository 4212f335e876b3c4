"""The oracle: Coconut by recomputation, one row at a time, without cache, padding or batches.

Written only from docs/specification.md, sections 5 to 7. It shares no code with coconut.py, so
agreement is evidence that both are right. Slow on purpose. The base model is a Hugging Face causal
LM; gradients go through plain autograd.
Letters: T tokens of a row, D width, V vocabulary, N labelled tokens of a batch, m window.
"""

import torch
import torch.nn.functional as F


def strip(values, mask):
    """The entries of one padded row (T,) where its mask is 1, as a plain list."""
    return [value for value, real in zip(values.tolist(), mask.tolist(), strict=True) if real]


def run_model(model, embeds, positions=None):
    """Last-layer states after the final norm (T, D) and logits (T, V) of one whole row (T, D)."""
    position_ids = None if positions is None else torch.tensor([positions[: len(embeds)]])
    output = model(
        inputs_embeds=torch.stack(embeds)[None],
        # Without a mask, transformers treats a jump in position_ids as the start of another text.
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        position_ids=position_ids,
        use_cache=False,
        output_hidden_states=True,
    )
    return output.hidden_states[-1][0], output.logits[0]


def learned_weights(logits):
    """The softmax of logits (m,), written out: a list of m tensors ()."""
    return [logit.exp() / sum(other.exp() for other in logits) for logit in logits]


def contextual_thought(states, m, weights, norm=None):
    """The thought (D,) at t = len(states); `weights` run nearest first, truncated at column 0.

    Source: docs/specification.md, section 6.
    """
    t = len(states)
    numerator, denominator = 0, 0
    for j in range(1, m + 1):
        if t - j >= 0:
            numerator = numerator + weights[j - 1] * states[t - j]
            denominator = denominator + weights[j - 1]
    average = numerator / denominator
    if norm is None:
        return average
    if norm == "average":
        ratio = average.pow(2).sum().sqrt() / states[t - 1].pow(2).sum().sqrt()
        return states[t - 1] * ratio.detach()
    return average * norm


def embed_row(
    model, token_ids, latent_token_id, m, weights, scope="sequence", thought="continuous",
    norm=None, positions=None,
):  # fmt: skip
    """Input embeddings of a row without padding, thoughts included: a list of T tensors (D,).

    Every thought costs a pass over the whole row before it.
    """
    table = model.get_input_embeddings().weight
    embeds = []
    num_thoughts = 0
    for token in token_ids:
        if token == latent_token_id and thought == "continuous":
            states, _ = run_model(model, embeds, positions)
            reach = 1 if scope == "pass" and num_thoughts > 0 else m
            embeds.append(contextual_thought(states, reach, weights, norm))
            num_thoughts += 1
        else:
            embeds.append(table[token])
    return embeds


def batch_loss(model, input_ids, attention_mask, labels, position_ids=None, **settings):
    """Loss (sum over labels / number of labels), logits (N, V) in row order, embeddings by row.

    A row's first real token has no token before it, so its label does not count.
    """
    logits, targets, embeds_by_row = [], [], []
    for b in range(len(input_ids)):
        row_ids = strip(input_ids[b], attention_mask[b])
        row_labels = strip(labels[b], attention_mask[b])
        positions = None
        if position_ids is not None:
            positions = strip(position_ids[b], attention_mask[b])
        embeds = embed_row(model, row_ids, positions=positions, **settings)
        _, row_logits = run_model(model, embeds, positions)
        for t in range(1, len(row_ids)):
            if row_labels[t] != -100:
                logits.append(row_logits[t - 1])
                targets.append(row_labels[t])
        embeds_by_row.append(torch.stack(embeds))
    logits = torch.stack(logits)
    loss = F.cross_entropy(logits, torch.tensor(targets), reduction="sum") / len(targets)
    return loss, logits, embeds_by_row


@torch.no_grad()
def generate_row(model, prompt_ids, max_new_tokens, eos_token_id=None, adjust=None, **settings):
    """Greedy new tokens (a list) after one prompt without padding, up to and including EOS.

    The entire row, thoughts included, is recomputed for every token. A latent token that the model
    generates is an ordinary token. `adjust(token_ids, logits)` takes the tokens so far (1, n) and
    the next logits (1, V), and returns the logits to use.
    """
    table = model.get_input_embeddings().weight
    new_tokens = []
    while len(new_tokens) < max_new_tokens:
        embeds = embed_row(model, prompt_ids, **settings) + [table[token] for token in new_tokens]
        _, logits = run_model(model, embeds)
        scores = logits[-1:]
        if adjust is not None:
            scores = adjust(torch.tensor([prompt_ids + new_tokens]), scores.float())
        new_tokens.append(int(scores.argmax()))
        if new_tokens[-1] == eos_token_id:
            break
    return new_tokens
