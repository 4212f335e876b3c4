"""The minimum number of floating-point operations (FLOPs) of the measured work.

A multiply-add counts as two. Only work that no implementation can avoid is counted: every token
once through the matrices of the blocks and attention from it to those before it; of the last block
no more than keys and values where neither a thought nor a label needs the token's state; and
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


def key_value_parameters(model: PreTrainedModel) -> int:
    """The number of entries in the matrices that make one block's keys and values."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_width = config.hidden_size // config.num_attention_heads
    return 2 * config.hidden_size * heads * getattr(config, "head_dim", head_width)


def read_flops(model: PreTrainedModel, records: int, length: int, unneeded: int = 0) -> int:
    """FLOPs of reading `records` sequences of `length` tokens, without logits.

    unneeded: how many first tokens of a sequence have states that nothing needs.
    """
    config, matrices = model.config, block_parameters(model)
    last_block = matrices // config.num_hidden_layers - key_value_parameters(model)

    def attention(tokens):
        """Of the first so many tokens, in one block: (token, attended token), itself included."""
        return 2 * 2 * (tokens * (tokens + 1) // 2) * config.hidden_size

    whole = 2 * matrices * length + config.num_hidden_layers * attention(length)
    return records * (whole - 2 * last_block * unneeded - attention(unneeded))


def logit_flops(model: PreTrainedModel, positions: int) -> int:
    """FLOPs of the vocabulary logits at `positions` positions."""
    return 2 * positions * model.get_output_embeddings().weight.numel()


def step_flops(
    model: PreTrainedModel, records: int, length: int, labels: int, unneeded: int = 0
) -> int:
    """FLOPs of forward and backward over `records` rows of `length` tokens with `labels` labels.

    unneeded: as `read_flops` takes it.
    """
    forward = read_flops(model, records, length, unneeded) + logit_flops(model, records * labels)
    return FORWARD_AND_BACKWARD * forward


def generation_flops(
    model: PreTrainedModel, records: int, prompt: int, new: int, unneeded: int = 0
) -> int:
    """FLOPs of generating `new` tokens after `prompt` tokens; every token is read once.

    unneeded: as `read_flops` takes it.
    """
    reading = read_flops(model, records, prompt + new - 1, unneeded)
    return reading + logit_flops(model, records * new)
