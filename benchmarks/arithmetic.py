"""The least arithmetic of the work that is measured, in floating-point operations (FLOPs).

A multiplication with an addition counts as two. Counted is what no implementation can do without:
every token once through the matrices of the blocks, attention from each token to those before it,
and the vocabulary's logits where a label or the next token depends on them. A backward pass costs
twice its forward pass. Left out, since it is small or not matrix products: norms, activations,
softmax, dropout, optimizer. Divided by the measured matrix rate this is the floor of the tables.
"""

from torch import nn
from transformers import PreTrainedModel

FORWARD_AND_BACKWARD = 3


def block_parameters(model: PreTrainedModel) -> int:
    """Entries of the matrices that every token passes: all but embeddings, biases and norms."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = (p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in tables)
    return sum(matrix.numel() for matrix in matrices)


def read_flops(model: PreTrainedModel, records: int, length: int) -> int:
    """Reading `records` sequences of `length` tokens, without logits."""
    config = model.config
    pairs = length * (length + 1) // 2  # of a token and one it attends to, itself included
    attention = 2 * 2 * pairs * config.hidden_size * config.num_hidden_layers
    return records * (2 * block_parameters(model) * length + attention)


def logit_flops(model: PreTrainedModel, positions: int) -> int:
    """Logits over the vocabulary at `positions` places."""
    return 2 * positions * model.get_output_embeddings().weight.numel()


def step_flops(model: PreTrainedModel, records: int, length: int, labels: int) -> int:
    """Forward and backward over `records` rows of `length` tokens and `labels` labels each."""
    forward = read_flops(model, records, length) + logit_flops(model, records * labels)
    return FORWARD_AND_BACKWARD * forward


def generation_flops(model: PreTrainedModel, records: int, prompt: int, new: int) -> int:
    """Writing `new` tokens after prompts of `prompt` tokens, every token read once."""
    return read_flops(model, records, prompt + new - 1) + logit_flops(model, records * new)
