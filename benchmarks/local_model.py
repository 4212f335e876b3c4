"""Write a model folder without a download: GPT-2's shape, and a tokenizer trained on a text.

`python -m benchmarks.local_model --text data/prosqa_train.json --out DIR [--model tiny]`. The
folder holds config.json and a byte-level BPE tokenizer but no weights, for `model_id` with
`from_scratch`. The tokenizer has so few merges that ProsQA's questions get as many tokens as with
GPT-2's own (360 on average): a run with it costs as much as a real one, but does not learn as much.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, PreTrainedTokenizerFast

from benchmarks.common import EOS, MODELS
from dataset import read_records

NUM_TOKENS = 286  # 256 bytes, EOS and 29 merges


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; decoding restores any text exactly."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", required=True, help="JSON of records")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", choices=tuple(MODELS), default="gpt2")
    options = parser.parse_args(arguments)
    tokenizer = make_tokenizer([record["question"] for record in read_records(options.text)])
    tokenizer.save_pretrained(options.out)
    end = tokenizer.eos_token_id
    config = GPT2Config(**MODELS[options.model], bos_token_id=end, eos_token_id=end)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(options.out)
    print(f"{options.out}: {options.model}, {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
