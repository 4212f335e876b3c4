"""Ask a trained model a question, and see its thoughts before it answers.

    python scripts/ask.py "3 + 4 - 2 + 5 ="
    python scripts/ask.py --checkpoint exps/quickstart/coconut --explain

Without `--checkpoint` the weights in assets/quickstart-checkpoint answer: they know sums on a clock
with ten hours, written as above. Without a question it asks for one after another; questions that
are piped in are read one a line. Each thought is shown by the words that the model's own output
layer reads in it (analysis/lens.py).
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

with contextlib.suppress(ImportError):  # not on every system; input() then has no history
    import readline  # noqa: F401

# `python scripts/ask.py` looks for modules in scripts/ alone.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis.lens import top_tokens
from analysis.subject import open_model
from coconut import Coconut
from dataset import MARKERS, SpecialIds, decode, leading_special_ids, unknown_words
from engine.metrics import extract_answer
from engine.model import max_positions
from utils import EXIT_INTERRUPTED, ReportedError, UserError, configure_logging, quote

SHIPPED = ROOT / "assets" / "quickstart-checkpoint"
EXAMPLE = "3 + 4 - 2 + 5 ="
MAX_NEW_TOKENS = 128
NUM_TOKENS = 5
# A vocabulary of at most so many words is shown when a word is unknown to it.
MAX_SHOWN_WORDS = 40
END = ("exit", "quit")


@dataclass(frozen=True)
class Thinker:
    """A model that can be asked.

    num_thoughts: the latent positions of the checkpoint's stage, for a question that has as many
        steps as the stage replaces.
    """

    model: Coconut
    tokenizer: PreTrainedTokenizerBase
    num_thoughts: int

    def ask(self, question: str, num_thoughts: int | None = None, explain: bool = False) -> dict:
        """The reply to a question, as JSON values.

        num_thoughts: how many instead of the checkpoint's own number.
        explain: also what the model writes after fewer thoughts.

        Raises: UserError for a question that cannot be read.
        """
        prompt = self._prompt(question)
        count = self.num_thoughts if num_thoughts is None else num_thoughts
        text, thoughts = self._think(prompt, count)
        reply = {"question": question, "answer": extract_answer(text, ""), "text": text}
        reply["thoughts"] = [{"k": k, "top": top} for k, top in enumerate(thoughts, start=1)]
        if explain:
            texts = [self._think(prompt, k)[0] for k in range(count)] + [text]
            reply["after"] = [
                {"k": k, "answer": extract_answer(text, ""), "text": text}
                for k, text in enumerate(texts)
            ]
        return reply

    def _prompt(self, question: str) -> list[int]:
        """The token ids of a question, as the training data's become (dataset.py)."""
        tokenizer = self.tokenizer
        if not question.strip():
            raise UserError("the question is blank; write one, such as those the model learned")
        for special in (*MARKERS, tokenizer.eos_token):
            if special in question:
                raise UserError(f"the question holds {special}, which is reserved for the model")
        ids = tokenizer(question + "\n", add_special_tokens=False).input_ids
        if tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id:
            raise UserError(
                f"{quote(question)} holds {unknown_words(tokenizer, question)}, which the model"
                f" does not know; {self._known_words()}"
            )
        return leading_special_ids(tokenizer, question) + ids

    def _known_words(self) -> str:
        hidden = {*self.tokenizer.all_special_tokens, *MARKERS, "###"}
        words = [word for word in self.tokenizer.get_vocab() if word not in hidden]
        if len(words) > MAX_SHOWN_WORDS:
            return "ask in the words of its training data"
        return f"it knows, with blanks between them: {' '.join(sorted(words))}"

    @torch.no_grad()
    def _think(self, prompt: list[int], count: int) -> tuple[str, list]:
        """What the model writes after `count` thoughts, and the top tokens of each of them."""
        model, ids = self.model, SpecialIds.of(self.tokenizer)
        row = [*prompt, ids.start_latent, *[ids.latent] * count, ids.end_latent]
        limit = max_positions(model.base_causallm.config.get_text_config())
        free = MAX_NEW_TOKENS if limit is None else min(MAX_NEW_TOKENS, limit - len(row))
        if free < 1:
            raise UserError(
                f"the question and its thoughts are {len(row)} tokens long, and the model reads"
                f" {limit}; ask a shorter one"
            )
        input_ids = torch.tensor([row], device=model.latent_weights.device)
        mask = torch.ones_like(input_ids)
        new = model.generate(input_ids, mask, free)[0, len(row) :].tolist()
        (text,) = decode(self.tokenizer, [new])
        _, embeds, _ = model.read(input_ids, mask)
        thoughts = embeds[0, len(prompt) + 1 : len(row) - 1]
        # Pause tokens hold no thoughts: all of them are the same embedding.
        if count == 0 or model.thought_kind != "continuous":
            return text.strip(), []
        return text.strip(), top_tokens(model, self.tokenizer, thoughts, NUM_TOKENS)


def load_thinker(checkpoint: Path, coconut_class: str | None = None) -> Thinker:
    """The Thinker of a checkpoint or of the last one of a run.

    Raises: UserError where analysis.subject.open_model does.
    """
    _, model, tokenizer, metadata = open_model(checkpoint, coconut_class)
    num_steps = min(metadata.stage, metadata.schedule.max_latent_stage)
    return Thinker(model, tokenizer, num_steps * metadata.c_thought)


def check_num_thoughts(num_thoughts: int | None, trained: int) -> None:
    """Raise UserError where --thoughts is out of range; `trained` is the checkpoint's number."""
    if num_thoughts is not None and not 0 <= num_thoughts <= 2 * trained:
        raise UserError(
            f"--thoughts {num_thoughts}: this checkpoint was trained with {trained}; write 0 to"
            f" {2 * trained}"
        )


def describe(reply: dict) -> str:
    """A reply as text."""
    lines = []
    for thought in reply["thoughts"]:
        top = "   ".join(f"{_shown(text)} {100 * p:.0f} %" for text, p in thought["top"])
        lines.append(f"  thought {thought['k']:<6}{top}")
    for after in reply.get("after", []):
        lines.append(f"  after {after['k']:<8}{_shown(after['text'])}")
    answer = reply["answer"]
    if answer is None:
        lines.append(f"  no answer     {_shown(reply['text'])}")
    else:
        lines.append(f"  answer        {answer}")
    return "\n".join(lines)


def _shown(text: str) -> str:
    """A text on one line; blank and unprintable ones as Python literals."""
    text = " ".join(text.splitlines()) if text.strip() else text
    return text.strip() if text.strip() and text.isprintable() else repr(text)


def questions_typed() -> Iterator[str]:
    """Questions, one a line, until the input ends or says so."""
    prompt = "question> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line in END:
            return
        if line:
            yield line


def reply_to(thinker: Thinker, question: str, options: argparse.Namespace) -> None:
    """Print the reply to one question."""
    reply = thinker.ask(question, options.thoughts, options.explain)
    print(json.dumps(reply, ensure_ascii=False) if options.json else describe(reply), flush=True)


def answer_all(thinker: Thinker, options: argparse.Namespace) -> None:
    """Reply to every question typed; one that cannot be read does not end the session."""
    if sys.stdin.isatty():
        example = f", such as {EXAMPLE}" if options.checkpoint == SHIPPED else ""
        print(f"Type a question{example}; Ctrl-D or `exit` ends.")
    for question in questions_typed():
        try:
            reply_to(thinker, question, options)
        except UserError as error:
            print(error, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Reply to the questions; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="?", help=f'such as "{EXAMPLE}"; typed if left out')
    parser.add_argument(
        "--checkpoint", type=Path, default=SHIPPED, metavar="FOLDER",
        help="a checkpoint_N folder, or a run for its last one (default: the shipped weights)",
    )  # fmt: skip
    parser.add_argument("--thoughts", type=int, metavar="K", help="number of thoughts")
    parser.add_argument(
        "--explain", action="store_true", help="also show what it writes after fewer thoughts"
    )
    parser.add_argument("--json", action="store_true", help="reply in JSON, one object a line")
    parser.add_argument(
        "--coconut-class", metavar="MODULE:CLASS", help="the class the checkpoint was trained with"
    )
    options = parser.parse_args(argv)
    configure_logging()
    try:
        thinker = load_thinker(options.checkpoint, options.coconut_class)
        check_num_thoughts(options.thoughts, thinker.num_thoughts)
        if options.question is None:
            answer_all(thinker, options)
        else:
            reply_to(thinker, options.question, options)
    except ReportedError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
