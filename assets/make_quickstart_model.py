"""Builds assets/quickstart-model: the shape of the quickstart's tiny Llama and its tokenizer.

The committed folder holds no weights. `--out exps/quickstart/model --weights SEED` writes the same
folder with random ones: `from_scratch` could not, since a Llama config has one scale for all
weights. Here matrices are drawn at about one over the square root of the width, and token
embeddings as long as the hidden states that take their place as thoughts; with the library's 0.02
for both, a thought is fifty times as long as a word, and learning to read it takes far longer.

The tokenizer knows one word a number, operator and sign of SPEC section 2's text, and drops
all white space, newlines included; so each step of `preprocessing/arithmetic.py` is one token, and
one thought can stand for it. The folder is committed; the same script gives the same bytes.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
LARGEST_NUMBER = 9
VOCABULARY = (END_OF_TEXT, UNKNOWN, "###", "=", "+", "-")
VOCABULARY += tuple(str(number) for number in range(LARGEST_NUMBER + 1))

EMBEDDING_STD = 1.0
MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY.index(END_OF_TEXT),
    "pad_token_id": VOCABULARY.index(END_OF_TEXT),
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "pad_token": END_OF_TEXT,
    "unk_token": UNKNOWN,
    "model_max_length": MODEL_CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
}


def make_tokenizer() -> Tokenizer:
    """One token a word; words it does not know become UNKNOWN; decoding puts blanks between."""
    vocabulary = {word: token_id for token_id, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT), AddedToken(UNKNOWN)])
    return tokenizer


def write_weights(folder: Path, seed: int) -> None:
    """Adds random weights to a folder that this script made: `model_id` without from_scratch."""
    # Only now what takes seconds to import: the committed folder needs none of it.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(seed)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(model_config)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    disable_progress_bar()
    model.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "quickstart-model"
    parser.add_argument("--out", type=Path, default=default, help=f"folder (default: {default})")
    parser.add_argument("--weights", type=int, metavar="SEED", help="draw weights from this seed")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(MODEL_CONFIG, indent=2),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "tokenizer.json": make_tokenizer().to_str(pretty=True),
    }
    for name, text in files.items():
        (options.out / name).write_text(text + "\n", encoding="utf-8")
    if options.weights is not None:
        write_weights(options.out, options.weights)
    print(f"{options.out}: {len(VOCABULARY)} words")


if __name__ == "__main__":
    main()
