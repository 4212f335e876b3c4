"""Which models Coconut can read: what a trial of a small copy accepts and refuses, and why."""

import time

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BertGenerationConfig,
    CTRLConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Qwen3MoeConfig,
    XLMConfig,
)

from benchmarks.families import FAMILIES, configuration, table
from engine import architecture
from engine.architecture import examine, require_readable, shrink
from passes import PassCache
from utils import UserError


def find(config, attention=None):
    return examine(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, attention)


# Families


@pytest.mark.parametrize(
    "name",
    [
        "GPT-2", "GPT-NeoX, Pythia", "OPT", "BLOOM", "MPT", "Llama", "Mistral, no window",
        "Mistral, window", "Qwen 2", "Qwen 2, window", "Qwen 3", "Qwen 3 (experts)",
        "Gemma 3, text", "Phi-3", "Phi-3, long positions", "OLMo 2", "SmolLM 3",
    ],
)  # fmt: skip
def test_families_of_attention_layers_are_read_correctly(name):
    assert find(configuration(name)) == architecture.Finding(None)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("Qwen 3.5", "keeps a recurrent state in its linear_attention layers, which is not an"),
        ("Qwen3-Next", "keeps a recurrent state in its linear_attention layers"),
        ("Falcon-H1", "keeps a recurrent state in its hybrid layers"),
        ("LFM2", "keeps a recurrent state in its conv layers"),
        ("Mamba 2", "keeps a recurrent state in its linear_attention layers"),
        ("Jamba", "keeps a recurrent state in its linear_attention layers"),
        ("Nemotron-H", "keeps a recurrent state in its linear_attention layers"),
        ("RWKV", "keeps a recurrent state, which is not an attention cache"),
        ("GPT-1", "keeps no key-value cache to continue a sequence from"),
        ("CTRL", "overwrites the input embeddings that it is given"),
        ("Gemma 2", "with final_logit_softcapping 30.0 does not score a hidden state by its"),
        ("Cohere", "with logit_scale 0.0625 does not score a hidden state by its output layer"),
        ("BERT as a decoder", "does not score a hidden state by its output layer alone"),
        ("Gemma 4, text", "without providing `input_ids`"),
    ],
)
def test_families_that_cannot_be_read_are_refused_for_the_true_reason(name, reason):
    assert reason in find(configuration(name)).fault


def test_a_refusal_names_source_family_reason_and_fix():
    config = CTRLConfig()
    with pytest.raises(UserError) as refusal:
        require_readable("model_id here", MODEL_FOR_CAUSAL_LM_MAPPING[CTRLConfig], config)
    assert str(refusal.value) == (
        "model_id here: ctrl overwrites the input embeddings that it is given; choose a model of"
        " attention layers such as GPT-2, Llama, Qwen 3 or Gemma 3 (docs/models.md lists more)"
    )


def test_a_model_that_works_with_another_kernel_is_refused_with_that_advice():
    config = configuration("DeepSeek V3")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with pytest.raises(UserError, match="; write attn_implementation: eager, with which it works"):
        require_readable("model_id here", model_class, config)
    assert require_readable("model_id here", model_class, config, "eager") == ()


def test_the_table_has_a_row_for_every_family():
    rows = table(["GPT-2", "Mamba 2", "Gemma 3, text and images"], clock=lambda: 0.0).splitlines()
    assert rows[2] == "| GPT-2 (`gpt2`) |  | works | 0.0 |"
    assert "| refused: keeps a recurrent state in its linear_attention layers" in rows[3]
    assert "| works; frozen: model.vision_tower, model.multi_modal_projector |" in rows[4]
    assert all(configuration(name).model_type == FAMILIES[name][0] for name in FAMILIES)


# What a trial notices


class Swapped(GPT2LMHeadModel):
    """Swaps the last two tokens of what it reads all at once, not of what follows a cache."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer.register_forward_pre_hook(self.swap, with_kwargs=True)

    def swap(self, module, args, options):
        embeds, cache = options.get("inputs_embeds"), options.get("past_key_values")
        if embeds is not None and embeds.size(1) > 2 and cache is None:
            options = options | {"inputs_embeds": self.change(embeds)}
        return args, options

    def change(self, embeds):
        return torch.cat([embeds[:, :-2], embeds[:, -2:].flip(1)], 1)


class Detached(Swapped):
    """Gives no gradient to what it reads all at once."""

    def change(self, embeds):
        return embeds.detach()


def trial(model_class, number):
    """What one of the trials raises about a small copy."""
    model = architecture._build(model_class, shrink(GPT2Config()), None, torch.float64)
    with pytest.raises(architecture._Unfit) as unfit:
        list(architecture._TRIALS.values())[number](model)
    return str(unfit.value)


def test_a_trial_notices_wrong_states_thoughts_and_gradients():
    assert trial(Swapped, 0) == "reads token ids differently from their embeddings"
    assert trial(Swapped, 2) == "writes other answers with its cache than without one"
    assert (
        trial(Swapped, 3) == "computes other thoughts in passes over its cache than without a cache"
    )
    assert trial(Detached, 3).startswith("gives transformer.")


def test_a_trial_notices_a_cache_that_keeps_finished_rows(monkeypatch):
    def keep_first(cache, indices):
        select(cache, torch.arange(len(indices)))

    select = PassCache.batch_select_indices
    monkeypatch.setattr(PassCache, "batch_select_indices", keep_first)
    assert trial(GPT2LMHeadModel, 2) == "writes other answers with its cache than without one"


def test_a_model_that_is_not_causal_or_has_no_cache_is_refused():
    assert "lets a token see the ones after it" in find(BertGenerationConfig()).fault
    assert find(XLMConfig()).fault.startswith("keeps no key-value cache")


# The copy


def test_the_copy_is_small_and_has_every_kind_of_layer():
    small = shrink(Gemma3TextConfig())
    assert small.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert (small.hidden_size, small.head_dim, small.num_attention_heads) == (64, 16, 4)
    assert small.sliding_window < 10 and small.vocab_size < 50
    experts = shrink(Qwen3MoeConfig(num_key_value_heads=4))
    assert (experts.num_experts, experts.num_key_value_heads) == (128, 1)
    window = shrink(MistralConfig(sliding_window=4096, hidden_size=4096))
    assert (window.hidden_size, window.sliding_window) == (64, 6)


def test_examining_a_configuration_leaves_it_unchanged():
    config = Gemma3TextConfig()
    before = config.to_json_string(use_diff=False)
    find(config)
    assert config.to_json_string(use_diff=False) == before


def test_a_trial_leaves_the_generator_alone_and_is_made_once(monkeypatch):
    config = LlamaConfig(num_attention_heads=6, hidden_size=192, num_key_value_heads=3)
    state = torch.get_rng_state()
    assert find(config).fault is None
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(architecture, "_try", lambda *_: pytest.fail("tried again"))
    assert find(config).fault is None
    # Another size gives the same copy.
    twice = LlamaConfig(num_attention_heads=12, hidden_size=384, num_key_value_heads=6)
    assert find(twice).fault is None


def test_a_trial_takes_well_under_two_seconds():
    find(LlamaConfig())  # what is imported and compiled at first use
    began = time.process_time()
    find(Gemma3TextConfig(num_attention_heads=4, num_key_value_heads=4))
    assert time.process_time() - began < 1.5


# What no text reaches


def test_a_vision_tower_is_not_reached_and_all_else_is():
    config = Gemma3Config()
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[Gemma3Config]
    assert require_readable("model_id", model_class, config) == (
        "model.vision_tower", "model.multi_modal_projector",
    )  # fmt: skip
