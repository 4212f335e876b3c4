"""Builds assets/quickstart-model: the shape of the quickstart's tiny Llama and its tokenizer.

The folder holds no weights: the runs draw them (`from_scratch: true`), so another seed is another
model. The tokenizer knows one word a number, operator and sign of SPEC section 2's text, and drops
all white space, newlines included; so each step of `preprocessing/arithmetic.py` is one token, and
one thought can stand for it. The folder is committed; the same script gives the same bytes.

`initializer_range` is what small models need and the library's 0.02 is not: about one over the
square root of the width for matrices, and token embeddings not much shorter than the hidden states
that replace them as thoughts.
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).parent / "quickstart-model"
    parser.add_argument("--out", type=Path, default=default, help=f"folder (default: {default})")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(MODEL_CONFIG, indent=2),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "tokenizer.json": make_tokenizer().to_str(pretty=True),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    print(f"{folder}: {len(VOCABULARY)} words, {', '.join(files)}")


if __name__ == "__main__":
    main()
