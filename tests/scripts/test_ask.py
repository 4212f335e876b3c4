"""Asking the shipped checkpoint, and refusing what it cannot read."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.lens import lens
from assets import make_quickstart_checkpoint
from dataset import Curriculum, tokenize_records
from engine import evaluation, metrics
from preprocessing.arithmetic import Clock, make_record
from scripts import ask

QUESTION, ANSWER = ask.EXAMPLE, "0"


@pytest.fixture(scope="module")
def thinker():
    return ask.load_thinker(ask.SHIPPED)


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))


def test_a_clone_answers_a_question_and_shows_its_thoughts(capsys):
    assert ask.main([QUESTION]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["thought", "1"], ["thought", "2"], ["thought", "3"], ["answer", ANSWER],
    ]  # fmt: skip
    assert all(len(re.findall(r"\d+ %", line)) == ask.NUM_TOKENS for line in lines[:3])


def test_it_answers_as_evaluation_does(thinker):
    records = [make_record(Clock(), number, place=0) for number in range(0, 80_000, 4001)]
    curriculum = Curriculum("coconut", 1, 2, 3, True)
    rows = evaluation.evaluate(
        thinker.model, thinker.tokenizer, tokenize_records(records, thinker.tokenizer, "test"),
        curriculum, 3, batch_size=7, max_new_tokens=8,
    ).predictions  # fmt: skip
    replies = [thinker.ask(record["question"]) for record in records]
    assert [reply["text"] for reply in replies] == [row["text"].strip() for row in rows]
    assert [reply["answer"] for reply in replies] == [row["prediction"] for row in rows]


def test_thoughts_are_read_from_what_the_model_reads_at_their_columns(thinker):
    tokenizer, model = thinker.tokenizer, thinker.model
    text = f"{QUESTION}\n<|start-latent|><|latent|><|latent|><|end-latent|>"
    ids = torch.tensor([tokenizer(text).input_ids])
    columns = (ids[0] == model.latent_token_id).nonzero()[:, 0]
    embeds = model(ids, torch.ones_like(ids)).inputs_embeds[0, columns]
    reply = thinker.ask(QUESTION, num_thoughts=2)
    for thought, p in zip(reply["thoughts"], lens(model, embeds), strict=True):
        shares = {tokenizer.convert_ids_to_tokens(i): share for i, share in enumerate(p.tolist())}
        best = sorted(shares, key=shares.get, reverse=True)[: ask.NUM_TOKENS]
        assert [word for word, _ in thought["top"]] == best
        shown = [share for _, share in thought["top"]]
        assert np.allclose(shown, [shares[word] for word in best], atol=1e-6)


def test_explain_tells_what_follows_each_number_of_thoughts(thinker):
    reply = thinker.ask(QUESTION, explain=True)
    assert [after["k"] for after in reply["after"]] == [0, 1, 2, 3]
    for after in reply["after"]:
        alone = thinker.ask(QUESTION, num_thoughts=after["k"])
        assert after == {"k": after["k"], "answer": alone["answer"], "text": alone["text"]}
    assert reply["after"][-1]["text"] == reply["text"]


def test_piped_questions_give_one_json_object_each_and_errors_end_nothing(monkeypatch, capsys):
    typed(monkeypatch, QUESTION, "", "3 + 4 - two =", "1 + 1 + 1 + 1 =", "exit", "never read")
    assert ask.main(["--json", "--explain"]) == 0
    output = capsys.readouterr()
    replies = [json.loads(line) for line in output.out.splitlines()]
    assert [reply["question"] for reply in replies] == [QUESTION, "1 + 1 + 1 + 1 ="]
    assert replies[0]["answer"] == ANSWER
    assert output.err.count("\n") == 1 and "'two'" in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3 + 4 - two ="], r"holds 'two', which the model does not know; it knows, .*: \+ - 0 1"),
        (["3+4-2+5="], r"holds '3\+4-2\+5='.* with blanks between them"),
        ([" "], "the question is blank"),
        (["3 <|latent|> ="], r"holds <\|latent\|>"),
        (["3 <|endoftext|> ="], r"holds <\|endoftext\|>"),
        (["1 + " * 63 + "1 ="], r"are 133 tokens long, and the model reads 128; ask a shorter"),
        ([QUESTION, "--thoughts", "7"], r"--thoughts 7: .* trained with 3; write 0 to 6"),
        ([QUESTION, "--thoughts", "-1"], r"--thoughts -1: .* write 0 to 6"),
        ([QUESTION, "--checkpoint", "nowhere"], "nowhere: does not exist"),
        ([QUESTION, "--coconut-class", "nothing:Here"], "there is no module nothing"),
    ],
)
def test_what_cannot_be_asked_is_one_message_and_status_2(arguments, message, capsys):
    assert ask.main(arguments) == 2
    output = capsys.readouterr()
    assert re.search(message, output.err) and output.err.count("\n") == 1
    assert output.out == ""


def test_the_longest_question_that_fits_is_answered(thinker):
    reply = thinker.ask("1 + " * 60 + "1 =")  # 122 tokens, two markers and three thoughts
    assert len(reply["text"].split()) == 1


def test_the_card_says_what_the_run_logged(tmp_path, capsys):
    run = tmp_path / "coconut"
    run.mkdir()
    (run / "checkpoint_8").symlink_to(ask.SHIPPED)
    (run / "config.yaml").write_text("# commit: abc\nseed: 5\n")
    low, high = metrics.wilson_interval(487, 500)
    figures = {"epoch": 7, "acc": 0.974, "acc_low": low, "acc_high": high}
    figures |= {"num_correct": 487, "num_records": 500}
    line = json.dumps({f"eval/{name}": value for name, value in figures.items()})
    (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    out = tmp_path / "shipped"
    assert make_quickstart_checkpoint.main([str(run), "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    size = sum(tensor.numel() for tensor in ask.load_thinker(out).model.parameters())
    assert f"{size:,} parameters" in card and "seed 5" in card
    assert "97.4 % of 500 held-out questions (487 right; 95 % interval 95.6 to 98.5)" in " ".join(
        line.strip() for line in card.splitlines()
    )
    assert make_quickstart_checkpoint.main([str(tmp_path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err


def test_the_shipped_folder_is_small_and_its_card_says_where_it_comes_from():
    sizes = {path.name: path.stat().st_size for path in ask.SHIPPED.iterdir()}
    assert sum(sizes.values()) < make_quickstart_checkpoint.MAX_BYTES
    card = (ask.SHIPPED / "README.md").read_text(encoding="utf-8")
    metadata = json.loads((ask.SHIPPED / "coconut.json").read_text(encoding="utf-8"))
    assert metadata["provenance"]["commit"] in card
    assert metadata["provenance"]["data"]["val_path"]["sha256"] in card
    assert re.search(r"\d % of 500\s+held-out questions", card) and "license: mit" in card
    assert Path(make_quickstart_checkpoint.COMMITTED) == ask.SHIPPED
