"""The prototype: what someone who knows key-value caches would write first.

A loop over passes that extend one cache, with logits at labels only; no window, no checks, no
ragged batches. In the tables it is between the published algorithm and ours.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel


def read(model: PreTrainedModel, input_ids: Tensor, latent_token_id: int):
    """Hidden states (B, T, D) and the cache; every latent column holds its thought."""
    embeds = model.get_input_embeddings()(input_ids)
    columns = (input_ids[0] == latent_token_id).nonzero().flatten().tolist()
    cache = DynamicCache(config=model.config)
    states = []
    for begin, stop in pairwise([0, *columns, input_ids.size(1)]):
        piece = embeds[:, begin:stop]
        if begin > 0:
            piece = torch.cat([states[-1][:, -1:].to(piece.dtype), piece[:, 1:]], 1)
        output = model.base_model(inputs_embeds=piece, past_key_values=cache, use_cache=True)
        states.append(output.last_hidden_state)
    return torch.cat(states, 1), cache


def loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, latent_token_id: int) -> Tensor:
    """The mean cross-entropy () over the labels."""
    states, _ = read(model, input_ids, latent_token_id)
    labelled = labels[:, 1:] != -100
    logits = model.get_output_embeddings()(states[:, :-1][labelled])
    return F.cross_entropy(logits.to(model.dtype), labels[:, 1:][labelled])


@torch.no_grad()
def generate(
    model: PreTrainedModel, input_ids: Tensor, latent_token_id: int, max_new_tokens: int
) -> Tensor:
    """Token ids (B, T + max_new_tokens), int64; EOS does not end a row."""
    states, cache = read(model, input_ids, latent_token_id)
    tokens = [input_ids]
    for number in range(max_new_tokens):
        if number > 0:
            output = model.base_model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
            states = output.last_hidden_state
        tokens.append(model.get_output_embeddings()(states[:, -1:]).argmax(-1))
    return torch.cat(tokens, 1)
