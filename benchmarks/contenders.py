"""The contenders: published algorithm, prototype and ours, as training steps and as generation.

Published and prototype share one base model; ours uses a copy, because layers.prepare changes its
layers. Ours is the project's own code: Trainer.train_step and Coconut.generate, with a window of
one state as in the published algorithm. The published algorithm always computes in fp32, the only
precision it supports.
"""

import copy
from argparse import ArgumentParser
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import prototype
from benchmarks.common import build_tokenizer, published_precision
from benchmarks.published import Published
from coconut import Coconut
from dataset import Curriculum
from engine.config import Config
from engine.evaluation import autocast
from engine.metadata import token_ids
from engine.trainer import Trainer

CONTENDERS = ("published", "prototype", "ours")
LEARNING_RATE = 1e-4

# (batch, its number of labelled tokens) -> loss
TrainStep = Callable[[dict[str, Tensor], int], float]
# (prompts (B, T), number of new tokens) -> (B, T + new), both int64
Generate = Callable[[Tensor, int], Tensor]


def add_options(parser: ArgumentParser) -> None:
    """--contenders and --latents."""
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
        help=f"any of {', '.join(CONTENDERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--latents", type=int, choices=range(65), metavar="K", help="latents per record (6)"
    )


def coconut_around(base: PreTrainedModel, window: int = 1) -> Coconut:
    """Coconut that uses `base` itself, with a plain average over `window` states."""
    ids = token_ids(build_tokenizer(base.config.vocab_size))
    return Coconut(base, **ids, latent_window_size=window, latent_weights=[1.0] * window)


def wrap(base: PreTrainedModel, window: int = 1) -> Coconut:
    """Coconut around a copy of `base`."""
    return coconut_around(copy.deepcopy(base), window)


def make_trainer(model: Coconut, bf16: bool) -> Trainer:
    """A Trainer of `model` without records that saves nothing, used for its optimizer step."""
    unused = "benchmark"
    config = Config(
        name=unused, save_path=unused, model_id=unused, train_path=unused, val_path=unused,
        coconut=True, c_thought=1, epochs_per_stage=1, max_latent_stage=1, num_epochs=1,
        batch_size_training=1, lr=LEARNING_RATE, bf16=bf16, debug=True, wandb="disabled",
    )  # fmt: skip
    curriculum = Curriculum("coconut", 1, 1, 1, True)
    trainer = Trainer(
        config, model, build_tokenizer(model.base_causallm.config.vocab_size), [], [], curriculum,
        {}, None,
    )  # fmt: skip
    # The trainer uses a GPU if there is one; --device may say otherwise.
    trainer.device = model.base_causallm.device
    trainer.model.train()
    return trainer


def train_step(name: str, base: PreTrainedModel, bf16: bool, window: int = 1) -> TrainStep:
    """The named contender's step over one batch (forward, backward, AdamW), which returns the loss.

    window: for ours; the others support only a window of one state.
    """
    if name == "ours":
        trainer = make_trainer(wrap(base, window), bf16)
        return lambda batch, num_labels: trainer.train_step([batch], num_labels, [None])[0]
    ids = token_ids(build_tokenizer(base.config.vocab_size))
    latent, eos = ids["latent_token_id"], ids["eos_token_id"]
    optimizer = torch.optim.AdamW(base.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    published = Published(base, latent, eos)

    def step(batch: dict[str, Tensor], num_labels: int) -> float:
        if name == "published":
            with published_precision():
                loss = published(**batch)[0]
                loss.backward()
        else:
            with autocast(bf16, base.device):
                loss = prototype.loss(base, batch["input_ids"], batch["labels"], latent)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def generation(name: str, base: PreTrainedModel, bf16: bool) -> Generate:
    """The named contender's greedy generation."""
    coconut = wrap(base)
    latent, eos = coconut.latent_token_id, coconut.eos_token_id
    published = Published(base, latent, eos)

    @torch.no_grad()
    def generate(prompts: Tensor, new: int) -> Tensor:
        if name == "published":
            with published_precision():
                return torch.cat([published.generate(row[None], new) for row in prompts])
        with autocast(bf16, base.device):
            if name == "prototype":
                return prototype.generate(base, prompts, latent, new)
            return coconut.generate(prompts, torch.ones_like(prompts), max_new_tokens=new)

    return generate
