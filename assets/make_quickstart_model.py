"""Build a tiny model and its tokenizer: assets/quickstart-model, or another size for other data.

The committed folder holds no weights. `--out exps/quickstart/model --weights SEED` writes the same
folder with random ones: `from_scratch` could not, since a config has one scale for all weights.
Here matrices are drawn at about one over the square root of the width, and embeddings as long as
the hidden states that take their place as thoughts; with the library's 0.02 for both, a thought is
fifty times as long as a word, and learning to read it takes far longer.

The tokenizer knows one word for each number, operator and sign of the text (docs/specification.md,
section 2), or with `--data` for each word of the given records, and drops all white space, newlines
included. So each step of `preprocessing/arithmetic.py` is one token, and one thought can replace
it. The folder is committed; the same script gives the same bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, read_records, report, whole_number

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
RESERVED = (END_OF_TEXT, UNKNOWN, "###")
LARGEST_NUMBER = 9
VOCABULARY = (*RESERVED, "=", "+", "-", *(str(number) for number in range(LARGEST_NUMBER + 1)))

COMMITTED = Path(__file__).parent / "quickstart-model"
EMBEDDING_STD = 1.0
MATRIX_STD = 0.8  # times one over the square root of the width
MIN_POSITIONS = 128
POSITIONS = {"llama": "rotary", "gpt2": "learned"}  # of each kind of model


def architecture(
    kind: str = "llama",
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    num_words: int = len(VOCABULARY),
    num_positions: int = MIN_POSITIONS,
) -> dict:
    """Return the content of config.json.

    Raises:
        InputError: no model has these sizes.
    """
    if width % heads:
        raise InputError(f"--width {width}: cannot be divided among --heads {heads}; change one")
    if kind == "llama" and width // heads % 2:
        raise InputError(
            f"--width {width} --heads {heads}: heads are {width // heads} wide, and rotary "
            "positions need an even number; change one, or add --kind gpt2"
        )
    end = RESERVED.index(END_OF_TEXT)
    std = round(MATRIX_STD / math.sqrt(width), 4)
    if kind == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": kind,
            "vocab_size": num_words,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "max_position_embeddings": num_positions,
            "initializer_range": std,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": end,
        }
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": kind,
        "vocab_size": num_words,
        "n_embd": width,
        "n_layer": depth,
        "n_head": heads,
        "n_positions": num_positions,
        "initializer_range": std,
        # As in the Llama kind, so that the two differ in their blocks and positions alone.
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


ARCHITECTURE = architecture()


def tokenizer_config(num_positions: int) -> dict:
    """Return the content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": UNKNOWN,
        "model_max_length": num_positions,
        "clean_up_tokenization_spaces": False,
    }


def make_tokenizer(words: Iterable[str] = VOCABULARY) -> Tokenizer:
    """Return a tokenizer of one token a word, UNKNOWN for others; decoding adds blanks."""
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT), AddedToken(UNKNOWN)])
    return tokenizer


def record_words(record: dict) -> list[str]:
    """Return the words of a record's question, steps and answer."""
    return " ".join([record["question"], *record["steps"], record["answer"]]).split()


def vocabulary_of(records: list[dict]) -> list[str]:
    """Return the reserved words, then the records' own: signs and names, then numbers by value."""
    found = {word for record in records for word in record_words(record)} - set(RESERVED)

    def order(word: str) -> tuple:
        is_number = word.isascii() and word.isdigit()
        return is_number, int(word) if is_number else 0, word

    return [*RESERVED, *sorted(found, key=order)]


def positions_for(records: list[dict]) -> int:
    """Return a number of positions with room for the longest record, its thoughts and markers."""
    longest = max(len(record_words(record)) for record in records)
    return max(MIN_POSITIONS, 2 ** math.ceil(math.log2(2 * longest)))


def write_weights(folder: Path, seed: int) -> None:
    """Add random weights to a folder that this script made: `model_id` without from_scratch."""
    # Imported here since it takes seconds, and the committed folder needs none of it.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    if model.config.model_type == "gpt2":
        torch.nn.init.normal_(model.transformer.wpe.weight, std=EMBEDDING_STD)
    disable_progress_bar()
    model.save_pretrained(folder)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help=f"folder (default, alone: {COMMITTED})")
    parser.add_argument(
        "--weights", type=whole_number(0), metavar="SEED", help="draw weights from this seed"
    )
    parser.add_argument("--kind", choices=list(POSITIONS), help="(llama)")
    parser.add_argument(
        "--positions", choices=list(POSITIONS.values()), help="rotary means llama, learned gpt2"
    )
    parser.add_argument("--width", type=whole_number(1), default=64, help="of hidden states (64)")
    parser.add_argument("--depth", type=whole_number(1), default=3, help="number of layers (3)")
    parser.add_argument("--heads", type=whole_number(1), default=4, help="attention heads (4)")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="take the vocabulary from these records (default: the clock's, 0 to 9 and signs)",
    )
    return parser.parse_args(argv)


def chosen_kind(options: argparse.Namespace) -> str:
    """Return the kind of model that has the wanted positions.

    Raises:
        InputError: the wanted kind has other positions.
    """
    kinds = {positions: kind for kind, positions in POSITIONS.items()}
    kind = options.kind or kinds.get(options.positions, "llama")
    if options.positions not in (None, POSITIONS[kind]):
        raise InputError(
            f"--kind {kind} --positions {options.positions}: {kind} has {POSITIONS[kind]} "
            f"positions; leave --positions out, or give --kind {kinds[options.positions]}"
        )
    return kind


def main(argv: list[str] | None = None) -> int:
    """Write the folder; return 2, after one message, on a user's mistake."""
    options = parse_arguments(argv)
    folder = options.out or COMMITTED
    words, num_positions = VOCABULARY, MIN_POSITIONS
    try:
        if options.out is None and options != parse_arguments([]):
            raise InputError("--out: wanted a folder, as only the committed model has a default")
        kind = chosen_kind(options)
        if options.data:
            records = [record for path in options.data for record in read_records(path)]
            words, num_positions = vocabulary_of(records), positions_for(records)
        config = architecture(
            kind, options.width, options.depth, options.heads, len(words), num_positions
        )
    except InputError as error:
        return report(str(error))
    files = {
        "config.json": json.dumps(config, indent=2),
        "tokenizer_config.json": json.dumps(tokenizer_config(num_positions), indent=2),
        "tokenizer.json": make_tokenizer(words).to_str(pretty=True),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        return report(f"{folder}: cannot be written ({error.strerror}); give another --out")
    if options.weights is not None:
        write_weights(folder, options.weights)
    print(f"{folder}: {len(words)} words")
    return 0


if __name__ == "__main__":
    sys.exit(main())
