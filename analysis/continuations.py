"""The probabilities of many continuations of one text, all scored in one pass.

Each of several places in a text is followed by forced tokens and then by separate continuations,
whose probabilities are wanted. All of them form a tree on the text's own columns, and a mask lets
each column see only its ancestors. So the text is read once for all places and
continuations, and no cache is copied.

The text comes as the embeddings that Coconut.read returned, thoughts in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from analysis.layers import TOLERANCE
from analysis.lens import token_log_probabilities
from coconut import Coconut
from utils import UserError


class NoBranches(UserError):
    """The model cannot read a tree of continuations."""


@dataclass(frozen=True)
class Branch:
    """Continuations of a text from one place.

    column: the last column of the text that they see.
    forced_ids: tokens that follow it.
    continuations: the ids of each text to score after these, at least one id each.
    """

    column: int
    forced_ids: list[int]
    continuations: list[list[int]]


@dataclass
class _Tree:
    """The columns of one row, text first: the parent, token and position of each added one."""

    parents: list[int]  # of added columns
    token_ids: list[int]
    depths: list[int]  # position ids
    # Of every token that is scored: the column that predicts it, its id, which continuation.
    scored: list[tuple[int, int, tuple[int, int]]] = field(default_factory=list)


@torch.no_grad()
def continuation_log_probabilities(
    model: Coconut,
    embeds: Tensor,
    attention_mask: Tensor,
    branches: Sequence[Sequence[Branch]],
) -> list[list[np.ndarray]]:
    """For each row and branch, (number of continuations,) natural logarithms of probabilities.

    embeds: (B, T, D) as Coconut.read returned them; attention_mask: (B, T).
    branches: those of each row.

    Raises: NoBranches for a model that depends on where a column is besides its mask and position,
        as under a sliding window.
    """
    trees = [_grow(mask, row) for mask, row in zip(attention_mask.cpu(), branches, strict=True)]
    num_added = max(len(tree.parents) for tree in trees)
    visible = np.stack([
        _visible(mask, tree, num_added)
        for mask, tree in zip(attention_mask.cpu().numpy(), trees, strict=True)
    ])  # fmt: skip
    device = embeds.device
    tokens = _pad([tree.token_ids for tree in trees], num_added).to(device)
    depths = _pad([tree.depths for tree in trees], num_added).to(device)
    own = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    added = model.base_causallm.get_input_embeddings()(tokens).to(embeds.dtype)
    embeds = torch.cat([embeds, added], 1)
    states = _read_tree(
        model, embeds, torch.cat([own, depths], 1), torch.from_numpy(visible).to(device)
    )
    _check_last_branch(model, states[0], embeds[0], attention_mask[0], trees[0])
    scored = [(row, *each) for row, tree in enumerate(trees) for each in tree.scored]
    rows, columns, ids = (torch.tensor([each[i] for each in scored]) for i in range(3))
    log_p = token_log_probabilities(model, states[rows, columns], ids.to(device)).tolist()
    sums = [[np.zeros(len(b.continuations)) for b in row_branches] for row_branches in branches]
    for (row, _, _, (branch, continuation)), value in zip(scored, log_p, strict=True):
        sums[row][branch][continuation] += value
    return sums


def _grow(mask: Tensor, branches: Sequence[Branch]) -> _Tree:
    """The tree that `branches` make on a text with this mask (T,)."""
    width = len(mask)
    depth_of = (mask.long().cumsum(0) - 1).tolist()  # of all columns, added ones included
    tree = _Tree([], [], [])

    def add(parent: int, token_id: int) -> int:
        tree.parents.append(parent)
        tree.token_ids.append(token_id)
        tree.depths.append(depth_of[parent] + 1)
        depth_of.append(depth_of[parent] + 1)
        return width + len(tree.parents) - 1

    for number, branch in enumerate(branches):
        end = branch.column
        for token_id in branch.forced_ids:
            end = add(end, token_id)
        for which, ids in enumerate(branch.continuations):
            assert ids
            column = end
            for place, token_id in enumerate(ids):
                tree.scored.append((column, token_id, (number, which)))
                if place + 1 < len(ids):
                    column = add(column, token_id)
    return tree


def _visible(mask: np.ndarray, tree: _Tree, num_added: int) -> np.ndarray:
    """(C, C) bool: which columns each column sees. Padding sees itself: a softmax needs one."""
    width = len(mask)
    visible = np.eye(width + num_added, dtype=bool)
    visible[:width, :width] |= np.tril(np.ones((width, width), dtype=bool)) & (mask != 0)
    for column, parent in enumerate(tree.parents, start=width):
        visible[column] |= visible[parent]
    return visible


def _pad(lists: Sequence[list[int]], length: int) -> Tensor:
    return torch.tensor([each + [0] * (length - len(each)) for each in lists], dtype=torch.long)


def _read_tree(model: Coconut, embeds: Tensor, position_ids: Tensor, visible: Tensor) -> Tensor:
    """The states (B, C, D) of all columns under the mask `visible` (B, C, C)."""
    base = model.base_causallm
    mask = torch.zeros(visible.shape, dtype=embeds.dtype, device=embeds.device)
    mask = mask.masked_fill(~visible, torch.finfo(embeds.dtype).min)[:, None]  # (B, 1, C, C)
    # Families whose positions are part of the mask fail in various ways.
    try:
        return base.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _refusal(model) from error


def _check_last_branch(
    model: Coconut, states: Tensor, embeds: Tensor, attention_mask: Tensor, tree: _Tree
) -> None:
    """Refuse a model that reads the last branch of a row differently on its own.

    states, embeds: (C, D) of the row's tree; attention_mask: (T,) of its text.
    """
    width = len(attention_mask)
    column, path = width + len(tree.parents) - 1, []
    while column >= width:
        path.insert(0, column)
        column = tree.parents[column - width]
    text = attention_mask[: column + 1].nonzero().squeeze(1).tolist()
    path = torch.tensor(text + path, device=embeds.device)
    base = model.base_causallm.base_model
    alone = base(inputs_embeds=embeds[path][None], use_cache=False).last_hidden_state[0]
    distance = torch.linalg.vector_norm(states[path] - alone, dim=-1)
    if bool((distance > TOLERANCE * torch.linalg.vector_norm(alone, dim=-1)).any()):
        raise _refusal(model)


def _refusal(model: Coconut) -> NoBranches:
    kind = model.base_causallm.config.model_type
    return NoBranches(
        f"{kind}: its layers depend on where a column is besides its mask, so values of nodes"
        " cannot be read; use a model with full attention, such as GPT-2 or Llama"
    )
