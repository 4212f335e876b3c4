"""Ragged rows, padded batches, settings and comparisons that the tests of coconut.py share.

`wrap` builds a Coconut, `settings_of` gives oracle.py the same choices.
Letters: B batch, T columns, K latents of a row, m window.
"""

import itertools
import random

import oracle
import pytest
import torch
from torch.testing import assert_close

from coconut import Coconut

START, END, LATENT = 37, 38, 39
EOS = 0
WEIGHTS = (0.5, 0.7, 0.2, 0.9, 0.4)  # neither sorted nor summing to 1 at any length
FAMILIES = ("gpt2", "llama")
WINDOWS = (1, 3, 5)
SCOPES = ("sequence", "pass")

exact = {"rtol": 1e-9, "atol": 1e-10}

laws = pytest.mark.parametrize(
    "family, m, scope", list(itertools.product(FAMILIES, WINDOWS, SCOPES))
)
families = pytest.mark.parametrize("family", FAMILIES)


def wrap(
    base, m=3, scope="sequence", weights=WEIGHTS, thought="continuous", norm=None, eos_token_id=EOS,
    kind=Coconut,
):  # fmt: skip
    return kind(
        base, LATENT, START, END, eos_token_id,
        latent_window_size=m, latent_weights=weights, window_scope=scope, thought=thought,
        thought_norm=norm,
    )  # fmt: skip


def settings_of(m=3, scope="sequence", weights=WEIGHTS, thought="continuous", norm=None):
    """The same choices as `wrap`'s, for the oracle."""
    return {
        "latent_token_id": LATENT, "m": m, "weights": weights, "scope": scope, "thought": thought,
        "norm": norm,
    }  # fmt: skip


def make_row(rng, num_question, num_latents, num_rest):
    """Question, start marker, latents, end marker, rest: token ids (a list)."""
    words = [rng.randrange(1, START) for _ in range(num_question + num_rest)]
    thoughts = [START, *[LATENT] * num_latents, END]
    return words[:num_question] + thoughts + words[num_question:]


def make_labels(row):
    """-100 up to and including the end marker, then the tokens."""
    cut = row.index(END) + 1
    return [-100] * cut + row[cut:]


def pack(rows, starts, width, fill, pad):
    """`rows` at columns `starts` of a (B, width) tensor; `pad()` gives the other entries."""
    packed = []
    for row, start in zip(rows, starts, strict=True):
        left = [pad() for _ in range(start)]
        right = [pad() for _ in range(width - start - len(row))]
        packed.append(left + list(map(fill, row)) + right)
    return torch.tensor(packed)


def lay_out(rows, labels=None, align="latent", extra_left=0, extra_right=0, pad=lambda: EOS):
    """Batch of ragged rows as keyword arguments of forward.

    align "latent": the first latents share a column, rows without latents start at column 0;
    "prompt": the end markers share a column; "end": all rows end in the last column.
    """
    if align == "latent":
        firsts = [row.index(LATENT) if LATENT in row else None for row in rows]
        column = max((first for first in firsts if first is not None), default=0)
        starts = [0 if first is None else column - first for first in firsts]
    else:
        ends = [row.index(END) if align == "prompt" else len(row) for row in rows]
        starts = [max(ends) - end for end in ends]
    starts = [start + extra_left for start in starts]
    width = max(s + len(row) for s, row in zip(starts, rows, strict=True)) + extra_right
    batch = {
        "input_ids": pack(rows, starts, width, int, pad),
        "attention_mask": pack(rows, starts, width, lambda _: 1, lambda: 0),
    }
    if labels is not None:
        batch["labels"] = pack(labels, starts, width, int, lambda: -100)
    return batch


def prompts_of(rows):
    """Left-padded prompts (all before the rest), as `generate` takes them."""
    return lay_out([row[: row.index(END) + 1] for row in rows], align="end")


def ragged_rows(seed=0):
    """K from 0 to 4, a question shorter than the window, an empty one, two rows without latents."""
    rng = random.Random(seed)
    shapes = [(5, 2, 4), (1, 4, 6), (7, 0, 3), (0, 1, 2), (9, 3, 1), (3, 0, 5)]
    return [make_row(rng, *shape) for shape in shapes]


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def real_embeds(output, batch):
    """Per row, inputs_embeds without padding: tensors (T_row, D)."""
    mask = batch["attention_mask"].bool()
    return [embeds[real] for embeds, real in zip(output.inputs_embeds, mask, strict=True)]


def assert_matches_oracle(base, batch, position_ids=None, **choices):
    """Loss, logits, inputs_embeds and every gradient of one batch equal the textbook's."""
    output = wrap(base, **choices)(**batch, position_ids=position_ids)
    loss, logits, embeds = oracle.batch_loss(
        base, **batch, position_ids=position_ids, **settings_of(**choices)
    )
    assert_close(output.loss, loss, **exact)
    assert_close(output.logits, logits, **exact)
    for ours, textbook in zip(real_embeds(output, batch), embeds, strict=True):
        assert_close(ours, textbook, **exact)
    assert_close(gradients(output.loss, base), gradients(loss, base), **exact)


def enable_checkpointing(base):
    """Recompute activations in backward passes; transformers 5.17 has the older name alone."""
    name = "activation_checkpointing_enable"
    getattr(base, name, base.gradient_checkpointing_enable)()


def count_columns(module, argument="inputs_embeds"):
    """A list that grows by (rows, columns) at every call of a transformer body."""
    calls = []

    def hook(_, args, kwargs):
        tensor = kwargs.get(argument)
        if tensor is None:
            tensor = kwargs.get("input_ids", args[0] if args else None)
        calls.append(tuple(tensor.shape[:2]))

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return calls
