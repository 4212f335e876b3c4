"""Everything that is read of a thought against a slow loop over single rows in float64.

The loop shares nothing with the code under test but the tiny models: tests/oracle.py makes the
thoughts, and each probability, share and attention weight is computed by itself, without padding,
batches, trees or hooks.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import build_tiny_model, build_word_tokenizer
from transformers import FalconConfig, FalconForCausalLM

from analysis import readings
from analysis.graph_values import read_graphs
from analysis.layers import final_norm, window_shares
from analysis.readings import batches_of, read_thoughts
from analysis.subject import Subject
from coconut import Coconut
from dataset import MARKERS, Curriculum, tokenize_records
from utils import UserError

# Names of one to three tokens; two heads, Tom and "red", of which Tom is the root.
NAMES = ["Tom", "red", "5", "2+3", "4", "9", "6+7"]
EDGES = [[0, 2], [0, 3], [2, 4], [3, 5], [1, 6]]
GRAPH = {"idx_to_symbol": NAMES, "edges": EDGES, "root": 0, "target": 5, "neg_target": 6}
SENTENCES = [
    {
        "question": "Every 5 is a 4. Tom is a 5. Every 2+3 is a 9. Tom is a 2+3."
        " red is a 6+7. Is Tom a 9 or 6+7?",
        "steps": ["Tom is a 2+3.", "Every 2+3 is a 9."],
        "answer": "Tom is a 9.",
        **GRAPH,
    },
    {
        "question": "red is a 5. Every 5 is a 4. Is red a 4 or blue?",
        "steps": ["red is a 5."],
        "answer": "red is a 4.",
        "idx_to_symbol": ["red", "Tom", "5", "4", "blue"],
        "edges": [[0, 2], [2, 3], [1, 4]], "root": 0, "target": 3, "neg_target": 4,
    },
]  # fmt: skip
# Of the next text: what precedes the name, what follows it, by record and number of steps replaced.
FORCED = [
    [("", "", 0), ("Every", "", 1), ("### Tom is a", ".", 2)],
    [("", "", 0), ("### red is a", ".", 2)],
]
SETTINGS = {
    "m3": ("gpt2", 1, {"latent_weights": [0.6, 0.3, 0.1]}),
    "average_norm": ("llama", 1, {"latent_window_size": 2, "thought_norm": "average"}),
    "scaled_pass": ("gpt2", 1, {"window_scope": "pass", "thought_norm": 0.5}),
    "two_a_step": ("llama", 2, {"latent_window_size": 1}),
}


def add_markers(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS)})
    return tokenizer


def make_subject(model, tokenizer, records, c_thought=1, stage=2, batch_size=8):
    """A subject whose model is `model`, as open_subject would return it."""
    texts = [{key: row[key] for key in ("question", "answer", "steps")} for row in records]
    return Subject(
        folder=Path("checkpoint_1"),
        model=model,
        tokenizer=tokenizer,
        metadata=SimpleNamespace(c_thought=c_thought),
        curriculum=Curriculum("coconut", c_thought, 1, stage, pad_latent_to_max=False),
        stage=stage,
        data=Path("data.json"),
        records=tokenize_records(texts, tokenizer, "data.json"),
        raw=records,
        indices=list(range(len(records))),
        batch_size=batch_size,
        max_new_tokens=4,
    )


class NoBar:
    """Takes the place of a progress bar."""

    def __init__(self, *_):
        pass

    def update(self):
        pass

    close = update


@pytest.fixture(scope="module", params=SETTINGS)
def case(request):
    """(subject, settings of the oracle, what was read, graphs), for one setting."""
    family, c_thought, settings = SETTINGS[request.param]
    tokenizer = add_markers(build_word_tokenizer())
    start, end, latent = tokenizer.convert_tokens_to_ids(list(MARKERS))
    model = Coconut(build_tiny_model(family).eval(), latent, start, end, 0, **settings).eval()
    # In float64 transformers' Llama makes padding nan where attention weights are asked for: its
    # softmax is float32, in which the mask's least number is infinite. GPT-2 tests padding.
    batch_size = 1 if family == "llama" else 8
    subject = make_subject(model, tokenizer, SENTENCES, c_thought, batch_size=batch_size)
    graphs = read_graphs(SENTENCES, "data.json", are_required=True)
    return subject, settings, read_thoughts(subject, graphs, NoBar), graphs


@torch.no_grad()
def embed_prompt(subject, settings, row):
    """Embeddings (a list) of question, start marker and thoughts, and the thoughts' columns."""
    model = subject.model
    ids = subject.records.table[row]["question_ids"] + [model.start_latent_id]
    columns = range(len(ids), len(ids) + len(SENTENCES[row]["steps"]) * subject.metadata.c_thought)
    embeds = oracle.embed_row(
        model.base_causallm, ids + [model.latent_token_id] * len(columns), model.latent_token_id,
        model.latent_window_size, settings.get("latent_weights", [0.6, 0.3, 0.1]),
        scope=settings.get("window_scope", "sequence"), norm=settings.get("thought_norm"),
    )  # fmt: skip
    return embeds, list(columns)


def own_norm(base):
    return base.transformer.ln_f if hasattr(base, "transformer") else base.model.norm


def row_of_model(base, embeds, **options):
    return base(inputs_embeds=torch.stack(embeds)[None], use_cache=False, **options)


def test_a_thought_reads_as_the_output_layer_says(case):
    subject, settings, found, _ = case
    base, tokenizer = subject.model.base_causallm, subject.tokenizer
    head, table = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    with torch.no_grad():
        mean_norm = sum(e.norm().item() for e in table) / len(table)
        for row, record in enumerate(SENTENCES):
            embeds, columns = embed_prompt(subject, settings, row)
            for k, column in enumerate(columns):
                t = embeds[column]
                exps = [torch.dot(u, t).exp().item() for u in head]
                p = [x / sum(exps) for x in exps]
                best = sorted(range(len(p)), key=lambda i: -p[i])[:5]
                assert found.top_ids[row, k].tolist() == best
                assert found.top_p[row, k] == pytest.approx([p[i] for i in best], rel=1e-5)
                assert found.entropy[row, k] == pytest.approx(
                    -sum(x * np.log(x) for x in p), rel=1e-5
                )
                cosines = [(torch.dot(e, t) / e.norm() / t.norm()).item() for e in table]
                assert found.nearest_ids[row, k] == np.argmax(cosines)
                assert found.max_cosine[row, k] == pytest.approx(max(cosines), rel=1e-5)
                assert found.norm_ratio[row, k] == pytest.approx(
                    t.norm().item() / mean_norm, rel=1e-5
                )
                step = record["steps"][k // subject.metadata.c_thought]
                words = [w for w in step.replace("+", " ").strip(".").split() if w.isalnum()]
                # With two records a word of both is in more than half of them.
                shared = {"is", "a"} if k // subject.metadata.c_thought == 0 else set()
                ids = tokenizer.convert_tokens_to_ids([w for w in words if w not in shared])
                rank = 1 + min(sum(other > p[i] for other in p) for i in ids)
                assert found.gold_rank[row, k] == rank
                # The answers differ in these: Tom, red, 4, 9.
                answers = tokenizer.convert_tokens_to_ids(["Tom", "red", "4", "9"])
                assert found.word_ids[row, k] == max(answers, key=lambda i: p[i])


def test_the_shares_of_the_window_are_those_of_the_formula(case):
    subject, settings, found, _ = case
    model = subject.model
    weights = settings.get("latent_weights", [0.6, 0.3, 0.1])[: model.latent_window_size]
    for row in range(len(SENTENCES)):
        embeds, columns = embed_prompt(subject, settings, row)
        for k, column in enumerate(columns):
            with torch.no_grad():
                states, _ = oracle.run_model(model.base_causallm, embeds[:column])
            t = embeds[column]
            alone = settings.get("window_scope") == "pass" and k > 0
            if alone or settings.get("thought_norm") == "average":
                own = [1.0] + [0.0] * (len(weights) - 1)  # one state makes the thought
            else:
                own = [w / sum(weights) for w in weights]
            total = sum(w * states[column - 1 - j] for j, w in enumerate(own))
            scale = (t.norm() / total.norm()).item()
            shares = [
                scale * w * torch.dot(states[column - 1 - j], t).item() / torch.dot(t, t).item()
                for j, w in enumerate(own)
            ]
            assert found.window[row, k] == pytest.approx(shares, abs=1e-6)
            assert found.window[row, k].sum() == pytest.approx(1, abs=1e-6)
            last = states[column - 1]
            cosine = (torch.dot(last, t) / last.norm() / t.norm()).item()
            assert found.cosine_last_state[row, k] == pytest.approx(cosine, abs=1e-6)
            assert found.thoughts[row, k] == pytest.approx(t.detach().numpy(), rel=1e-5)
            if k == 0:
                assert np.isnan(found.cosine_previous[row, k])
            else:
                before = embeds[column - 1]
                cosine = (torch.dot(before, t) / before.norm() / t.norm()).item()
                assert found.cosine_previous[row, k] == pytest.approx(cosine, abs=1e-6)


@torch.no_grad()
def test_layers_and_attention_are_those_of_one_row_alone(case):
    subject, settings, found, graphs = case
    base = subject.model.base_causallm
    head, norm = base.get_output_embeddings(), own_norm(base)
    for row in range(len(SENTENCES)):
        embeds, columns = embed_prompt(subject, settings, row)
        base.set_attn_implementation("eager")
        output = row_of_model(base, embeds, output_hidden_states=True, output_attentions=True)
        base.set_attn_implementation("sdpa")
        num_words = int(subject.records.question_lengths[row])
        for k, column in enumerate(columns):
            for layer, states in enumerate(output.hidden_states):
                state = states[0, column - 1]
                is_last = layer == len(output.hidden_states) - 1
                p = head(state if is_last else norm(state)).softmax(-1)
                assert found.layer_ids[row, k, layer] == p.argmax()
                assert found.layer_p[row, k, layer] == pytest.approx(p.max().item(), rel=1e-5)
                assert found.layer_entropy[row, k, layer] == pytest.approx(
                    -(p * p.log()).sum().item(), rel=1e-5
                )
            heads = [weights[0, h, column] for weights in output.attentions for h in range(4)]
            mean = (sum(heads) / len(heads))[:num_words]
            assert found.question_attention[row][k] == pytest.approx(mean.numpy(), abs=1e-6)
        # The first edge of record 0, Tom is a 5, stands after "Every 5 is a 4.", 6 tokens.
        if row == 0:
            attention = found.question_attention[0][:, 6:10].sum(1)
            assert found.edge_attention[0][:, 0] == pytest.approx(attention)


@torch.no_grad()
def test_the_value_of_a_node_is_the_product_of_its_tokens_probabilities(case):
    subject, settings, found, graphs = case
    base, tokenizer = subject.model.base_causallm, subject.tokenizer
    table, c_thought = base.get_input_embeddings().weight, subject.metadata.c_thought
    for row, record in enumerate(SENTENCES):
        embeds, columns = embed_prompt(subject, settings, row)
        assert len(found.values[row]) == len(columns) + 1
        for k in range(len(columns) + 1):
            before, after, depth = FORCED[row][k // c_thought]
            prefix = embeds[: columns[0] + k] + [table[subject.model.end_latent_id]]
            prefix += [table[i] for i in tokenizer(before).input_ids]
            assert found.places[row][k].depth == depth
            for node, name in enumerate(record["idx_to_symbol"]):
                value, so_far = 1.0, list(prefix)
                for token in tokenizer(name + after).input_ids:
                    p = row_of_model(base, so_far).logits[0, -1].softmax(-1)
                    value *= p[token].item()
                    so_far.append(table[token])
                assert found.values[row][k][node] == pytest.approx(value, rel=1e-5)


@torch.no_grad()
def test_confidence_is_the_probability_of_what_the_model_writes(case):
    subject, settings, found, _ = case
    base = subject.model.base_causallm
    table = base.get_input_embeddings().weight
    for row in range(len(SENTENCES)):
        embeds, _ = embed_prompt(subject, settings, row)
        so_far, log_p = embeds + [table[subject.model.end_latent_id]], 0.0
        for _ in range(subject.max_new_tokens):
            p = row_of_model(base, so_far).logits[0, -1].log_softmax(-1)
            token = int(p.argmax())
            log_p += p[token].item()
            so_far.append(table[token])
            if token == subject.model.eos_token_id:
                break
        assert found.log_p[row] == pytest.approx(log_p, rel=1e-5)


def test_no_more_thoughts_and_details_are_kept_than_allowed(case, monkeypatch):
    subject, _, found, graphs = case
    monkeypatch.setattr(readings, "MAX_KEPT", 1)
    monkeypatch.setattr(readings, "MAX_DETAILED", 1)
    fewer = read_thoughts(subject, graphs, NoBar)
    assert len(fewer.thoughts) == len(fewer.question_attention) == 1
    assert np.array_equal(fewer.thoughts, found.thoughts[:1])
    assert len(fewer.values) == len(fewer.edge_attention) == 2


def test_batches_hold_no_more_attention_than_allowed(case, monkeypatch):
    subject = replace(case[0], batch_size=8)
    longest = int(subject.staged.prompt_lengths.max()) + subject.max_new_tokens
    per_record = 2 * 4 * longest**2  # two layers of four heads
    for allowed, sizes in ((2 * per_record, [2]), (2 * per_record - 1, [1, 1]), (1, [1, 1])):
        monkeypatch.setattr(readings, "MAX_ATTENTION", allowed)
        assert [len(batch) for batch in batches_of(subject, subject.staged)] == sizes


def test_models_that_attend_otherwise_when_watched_are_refused():
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = FalconForCausalLM(FalconConfig(**sizes, initializer_range=0.5)).eval()
    tokenizer = add_markers(build_word_tokenizer())
    start, end, latent = tokenizer.convert_tokens_to_ids(list(MARKERS))
    subject = make_subject(Coconut(base, latent, start, end, 0), tokenizer, SENTENCES)
    with pytest.raises(UserError, match="falcon: this version of transformers computes different"):
        read_thoughts(subject, None, NoBar)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_final_norm_is_found(family, tiny_model):
    base = tiny_model(family).eval()
    assert final_norm(Coconut(base, 38, 36, 37, 0)) is own_norm(base)


def test_a_thought_that_comes_from_no_state_has_no_shares(tiny_model):
    class Fixed(Coconut):
        def thought(self, hidden_states, attention_mask, is_first):
            return torch.ones_like(hidden_states[:, -1]).detach()

    model = Fixed(tiny_model("gpt2").eval(), 38, 36, 37, 0)
    states, mask = torch.randn(1, 5, 32, dtype=torch.float64), torch.ones(1, 5, dtype=torch.long)
    shares = window_shares(
        model, states, mask, torch.ones(1, 32, dtype=torch.float64),
        rows=torch.tensor([0]), columns=torch.tensor([4]), is_first=torch.tensor([True]),
    )  # fmt: skip
    assert shares.tolist() == [[0, 0, 0]]
