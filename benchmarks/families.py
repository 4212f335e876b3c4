"""Which families of models Coconut can read: the table of docs/models.md.

`python -m benchmarks.families [NAME ...]` tries the configurations below, which are the defaults of
transformers except for what is written here, as a run does before it loads weights. It needs
neither weights nor a network.
"""

import argparse
import time
from collections.abc import Callable, Sequence

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from engine.architecture import examine

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48,
    "long_factor": [4.0] * 48,
}
# Name -> (model_type of transformers, what differs from its default configuration).
FAMILIES: dict[str, tuple[str, dict]] = {
    "GPT-2": ("gpt2", {}),
    "GPT-Neo": ("gpt_neo", {}),
    "GPT-J": ("gptj", {}),
    "GPT-NeoX, Pythia": ("gpt_neox", {}),
    "OPT": ("opt", {}),
    "BLOOM": ("bloom", {}),
    "Falcon": ("falcon", {}),
    "MPT": ("mpt", {}),
    "Llama": ("llama", {"num_key_value_heads": 8}),
    "Mistral, no window": ("mistral", {"sliding_window": None}),
    "Mistral, window": ("mistral", {"sliding_window": 4096}),
    "Mixtral (experts)": ("mixtral", {}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 16}),
    "Qwen 3": ("qwen3", {}),
    "Qwen 3 (experts)": ("qwen3_moe", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {}),
    "Gemma 3, text": ("gemma3_text", {}),
    "Gemma 3, text and images": ("gemma3", {}),
    "Gemma 4, text": ("gemma4_text", {}),
    "Phi": ("phi", {}),
    "Phi-3": ("phi3", {}),
    "Phi-3, long positions": ("phi3", {"rope_parameters": LONG_ROPE}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "OLMoE (experts)": ("olmoe", {}),
    "SmolLM 3": ("smollm3", {}),
    "StableLM": ("stablelm", {}),
    "StarCoder 2": ("starcoder2", {}),
    "GPT-OSS (experts)": ("gpt_oss", {}),
    "Granite": ("granite", {}),
    "Cohere": ("cohere", {}),
    "DeepSeek V3": ("deepseek_v3", {}),
    "GPT-1": ("openai-gpt", {}),
    "CTRL": ("ctrl", {}),
    "BERT as a decoder": ("bert", {"is_decoder": True}),
    "Qwen 3.5": ("qwen3_5_text", {}),
    "Qwen3-Next": ("qwen3_next", {}),
    "Falcon-H1": ("falcon_h1", {}),
    "LFM2": ("lfm2", {"full_attn_idxs": [2, 5, 8, 10, 12, 14], "num_hidden_layers": 16}),
    "Mamba": ("mamba", {}),
    "Mamba 2": ("mamba2", {}),
    "Jamba": ("jamba", {}),
    "Nemotron-H": ("nemotron_h", {}),
    "RWKV": ("rwkv", {}),
}


def configuration(name: str) -> PretrainedConfig:
    """The configuration that represents a family."""
    model_type, changes = FAMILIES[name]
    return CONFIG_MAPPING[model_type](**changes)


def table(names: Sequence[str], clock: Callable[[], float] = time.process_time) -> str:
    """A table in Markdown: family, kinds of layers, what it gives, CPU seconds of the trial."""
    lines = ["| family | layers | what it gives | s |", "|---|---|---|---:|"]
    for name in names:
        config = configuration(name)
        kinds = sorted(set(getattr(config.get_text_config(), "layer_types", None) or []))
        began = clock()
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        finding = examine(model_class, config)
        result = finding.fault and f"refused: {finding.fault}"
        if finding.fault and examine(model_class, config, "eager").fault is None:
            result = "works with `attn_implementation: eager`"
        if finding.unreached:
            result = f"works; frozen: {', '.join(finding.unreached)}"
        cells = [f"{name} (`{config.model_type}`)", ", ".join(kinds), result or "works"]
        lines.append("| " + " | ".join([*cells, f"{clock() - began:.1f}"]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="families (default: all)")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    print(table(options.names or list(FAMILIES)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
