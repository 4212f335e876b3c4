"""The minimum number of floating-point operations (FLOPs) of the measured work.

A multiply-add counts as two. Only work that no implementation can avoid is counted: every token
once through the matrices of the blocks, attention from each token to those before it, and
vocabulary logits where a label or the next token depends on them. A backward pass costs twice its
forward pass. Norms, activations, softmax, dropout and the optimizer are left out: they are small,
or not matrix products. Divided by the measured matrix rate, this is the floor in the tables.
"""

from torch import nn
from transformers import PreTrainedModel

FORWARD_AND_BACKWARD = 3


def block_parameters(model: PreTrainedModel) -> int:
    """The number of entries in the matrices of the blocks: no embeddings, biases or norms."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = (p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in tables)
    return sum(matrix.numel() for matrix in matrices)


def read_flops(model: PreTrainedModel, records: int, length: int) -> int:
    """FLOPs of reading `records` sequences of `length` tokens, without logits."""
    config = model.config
    pairs = length * (length + 1) // 2  # (token, attended token), itself included
    attention = 2 * 2 * pairs * config.hidden_size * config.num_hidden_layers
    return records * (2 * block_parameters(model) * length + attention)


def logit_flops(model: PreTrainedModel, positions: int) -> int:
    """FLOPs of the vocabulary logits at `positions` positions."""
    return 2 * positions * model.get_output_embeddings().weight.numel()


def step_flops(model: PreTrainedModel, records: int, length: int, labels: int) -> int:
    """FLOPs of forward and backward over `records` rows of `length` tokens with `labels` labels."""
    forward = read_flops(model, records, length) + logit_flops(model, records * labels)
    return FORWARD_AND_BACKWARD * forward


def generation_flops(model: PreTrainedModel, records: int, prompt: int, new: int) -> int:
    """FLOPs of generating `new` tokens after `prompt` tokens; every token is read once."""
    return read_flops(model, records, prompt + new - 1) + logit_flops(model, records * new)
