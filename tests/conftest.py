"""Tiny models and a word-level tokenizer that every test file shares.

All of it is random, seeded, built in memory and offline. Models carry no dropout and are float64
unless a test asks otherwise, so that equalities can be tested to rounding.
"""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A run says which allocator is preloaded.
os.environ.pop("LD_PRELOAD", None)

import pytest
import torch
from browser import find_chromium
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCAB_SIZE = 40
EOS, UNK = "<eos>", "<unk>"
WORDS = [EOS, UNK, *"0123456789", "+", "-", "*", "=", "<<", ">>", "###", "#", "?", ".", ",", ":"]
WORDS += ["Is", "Tom", "Every", "a", "or", "is", "wumpus", "True", "False", "red", "blue"]
MODEL_TOKENS = VOCAB_SIZE - 3  # the three markers bring it to VOCAB_SIZE

# The tensors of these models are too small for threads to help.
torch.set_num_threads(1)

# A suite started in the background inherits an ignored SIGINT, and would pass it on to the programs
# that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter):
    """Say in the last lines what was left out because the machine has no browser."""
    if find_chromium() is None:
        terminalreporter.write_line(
            "No Chromium was found: the report was not opened in a browser (apt install chromium)",
            yellow=True,
        )


def build_tiny_model(family, dtype=torch.float64, dropout=0.0, vocab_size=VOCAB_SIZE, seed=0):
    """A random 2-layer GPT-2 (tied) or Llama (untied, grouped keys), width 32, in training mode.

    Every parameter gets noise on top of its initial value: with all norms at one and all biases at
    zero, a test could not tell a state before the final norm's scale from one after it. In float64
    Llama's norms, which transformers computes in float32 whatever the model's dtype, give way to
    torch's, which keep float64.
    """
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=4,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            initializer_range=0.15, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=vocab_size, max_position_embeddings=64, hidden_size=32,
            intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=dropout, tie_word_embeddings=False,
            initializer_range=0.15, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (GPT2LMHeadModel if family == "gpt2" else LlamaForCausalLM)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).train()
    if family == "llama" and dtype == torch.float64:
        for parent in list(model.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, LlamaRMSNorm):
                    exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                    exact.weight = norm.weight
                    setattr(parent, name, exact)
    return model


def build_word_tokenizer():
    """Words and signs of a small arithmetic and ontology vocabulary; white space is dropped.

    Has MODEL_TOKENS entries, EOS and UNK first, no markers yet.
    """
    words = WORDS + [f"w{i}" for i in range(MODEL_TOKENS - len(WORDS))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


@pytest.fixture
def tiny_model():
    """`build_tiny_model(family, dtype, dropout, vocab_size, seed)`: a fresh model a call."""
    return build_tiny_model


@pytest.fixture
def word_tokenizer():
    """A fresh `build_word_tokenizer()`."""
    return build_word_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path):
    """`tiny_folder(family)`: a Hugging Face folder with a tiny float32 model and its tokenizer.

    The model has MODEL_TOKENS rows, so adding the three markers makes it grow.
    """

    def build(family="gpt2", **options):
        folder = tmp_path / f"tiny_{family}"
        options = {"dtype": torch.float32, "vocab_size": MODEL_TOKENS, **options}
        build_tiny_model(family, **options).save_pretrained(folder)
        build_word_tokenizer().save_pretrained(folder)
        return folder

    return build
