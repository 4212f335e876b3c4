"""What the thoughts of a checkpoint are worth: accuracy when they are replaced.

The model answers held-out questions as in evaluation, but each thought is changed before it is
read. Numbers come from the model's own passes (Coconut.thought is exchanged, nothing else).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from coconut import Coconut
from dataset import Curriculum, read_records, tokenize_records
from engine.evaluation import evaluate
from engine.model import load_coconut

# (own thought (B, D), hidden states (B, n, D)) -> what is read in its place (B, D)
Replacement = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def replaced_thoughts(model: Coconut, replacement: Replacement) -> Iterator[None]:
    """Within, `model` reads what `replacement` makes of each thought."""
    own = model.thought

    def thought(hidden_states: Tensor, attention_mask: Tensor, is_first: Tensor) -> Tensor:
        return replacement(own(hidden_states, attention_mask, is_first), hidden_states)

    model.thought = thought
    try:
        yield
    finally:
        del model.thought


def zeros(thought: Tensor, hidden_states: Tensor) -> Tensor:
    """Nothing: the position stays, its content goes."""
    return torch.zeros_like(thought)


def accuracy_with_zeroed_thoughts(
    checkpoint: Path, val_path: str, max_new_tokens: int, batch_size: int
) -> float:
    """Accuracy (0 to 1) on `val_path` at the checkpoint's stage, all thoughts replaced by zeros."""
    model, tokenizer, metadata = load_coconut(checkpoint)
    records = tokenize_records(read_records(val_path), tokenizer, val_path)
    curriculum = Curriculum(
        metadata.method,
        metadata.c_thought,
        metadata.schedule.epochs_per_stage,
        metadata.schedule.max_latent_stage,
        metadata.schedule.pad_latent_to_max,
        metadata.schedule.curriculum,
    )
    with replaced_thoughts(model, zeros):
        outcome = evaluate(
            model,
            tokenizer,
            records,
            curriculum,
            metadata.stage,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
        )
    return outcome.figures["acc"]
