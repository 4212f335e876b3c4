"""What a model's thoughts are made from: states by layer, attention, and the window's states.

Coconut.read keeps only the last layer's states, and its kernels keep no attention weights; one pass
of the base model over the embeddings that it returned gives both (docstring of Coconut.read).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coconut import Coconut
from utils import UserError

# The distance by rounding between two ways to read a column, as a share of the state's norm.
TOLERANCE = 0.01


def window_shares(
    model: Coconut, states: Tensor, attention_mask: Tensor, thoughts: Tensor, rows: Tensor,
    columns: Tensor, is_first: Tensor,
) -> Tensor:  # fmt: skip
    """(thoughts, m): what each state of the window contributes to a thought, nearest first.

    t . (dt/dh_j) h_j / |t|^2 for thought t and state h_j, which is w_j (h_j . t) / |t|^2 where t is
    the average of the states.

    states: (B, T, D); attention_mask: (B, T). thoughts: (thoughts, D), read at columns[i] of
    rows[i]. is_first: (thoughts,) bool, whether it is its row's first.
    """
    places = columns[:, None] + torch.arange(-model.latent_window_size, 0, device=columns.device)
    rows = rows[:, None].expand_as(places)
    mask = attention_mask[rows, places.clamp(min=0)] * (places >= 0)  # (thoughts, m)
    with torch.enable_grad():
        window = states[rows, places.clamp(min=0)].detach().requires_grad_()  # (thoughts, m, D)
        again = model.thought(window, mask, is_first)
        if not again.requires_grad:  # a subclass's thought that comes from no state
            return thoughts.new_zeros(mask.shape)
        (slope,) = torch.autograd.grad((again * thoughts).sum(), window)
    squares = thoughts.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return ((slope * window.detach()).sum(-1) / squares).flip(1)


def read_layers(
    model: Coconut, embeds: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One pass over embeddings that Coconut.read returned: states by layer, and attention.

    embeds: (B, T, D); attention_mask: (B, T).
    Returns (B, T, D) for the embeddings and each layer, the last after the final norm; and
    (thoughts, T), what columns[i] of rows[i] attends to, a mean over layers and heads.
    """
    base = model.base_causallm
    with eager_attention(base):
        output = base.base_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            output_attentions=True,
            use_cache=False,
        )
    weights = [layer[rows, :, columns].mean(1) for layer in output.attentions]  # (thoughts, T) each
    # Some families list the last layer's states before the norm.
    states = (*output.hidden_states[:-1], output.last_hidden_state)
    return states, torch.stack(weights).mean(0)


def check_states(model: Coconut, states: Tensor, again: Tensor, attention_mask: Tensor) -> None:
    """Refuse a model that computes different states when its attention weights are requested.

    states, again: (B, T, D), of Coconut.read and of `read_layers`; attention_mask: (B, T).

    Raises: UserError naming the family.
    """
    is_token = attention_mask != 0
    distance = torch.linalg.vector_norm((again - states)[is_token], dim=-1)
    if bool((distance > TOLERANCE * torch.linalg.vector_norm(states[is_token], dim=-1)).any()):
        kind = model.base_causallm.config.model_type
        raise UserError(
            f"{kind}: this version of transformers computes different states when attention weights"
            " are requested; probe a model of another family, such as GPT-2 or Llama"
        )


@contextmanager
def eager_attention(base: PreTrainedModel) -> Iterator[None]:
    """Within, the model computes attention step by step, since kernels keep no weights."""
    chosen = base.config.get_text_config()._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(chosen)


@torch.no_grad()
def final_norm(model: Coconut) -> nn.Module:
    """The module from which the base model's states come: its last norm."""
    base = model.base_causallm
    within = {part for block in model.blocks for part in block.modules()}
    called: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output: called.append((module, output)))
        for module in base.base_model.modules()
        if module not in within and not [*module.children()]
    ]
    try:
        embeds = base.get_input_embeddings().weight[:1, None]  # (1, 1, D)
        states = base.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    module, output = called[-1]
    is_last = isinstance(output, Tensor) and output.shape == states.shape
    return module if is_last and torch.equal(output, states) else nn.Identity()
