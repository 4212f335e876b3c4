"""Laws of Coconut.generate and answer: cached and batched equals uncached one by one.

Models are tiny, random and float64; the textbook is oracle.py. Letters: K latents of a row.
"""

import random

import oracle
import pytest
import torch
from batches import (
    END,
    EOS,
    LATENT,
    START,
    count_columns,
    enable_checkpointing,
    families,
    laws,
    lay_out,
    make_labels,
    make_row,
    prompts_of,
    ragged_rows,
    settings_of,
    wrap,
)
from torch.testing import assert_close
from transformers import (
    GenerationConfig,
    GenerationMixin,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.generation import logits_process as processors

import coconut
from coconut import GENERATE_OPTIONS


def cut_at_eos(tokens, eos_token_id):
    """Tokens up to and including EOS; asserts that nothing but padding with EOS follows."""
    tokens = tokens.tolist()
    if eos_token_id not in tokens:
        return tokens
    end = tokens.index(eos_token_id) + 1
    assert set(tokens[end:]) <= {eos_token_id}
    return tokens[:end]


def greedy_streams(base, rows, num_tokens, eos_token_id=None, **choices):
    """The oracle's new tokens after each row's prompt."""
    prompts = [row[: row.index(END) + 1] for row in rows]
    return [
        oracle.generate_row(base, prompt, num_tokens, eos_token_id, **settings_of(**choices))
        for prompt in prompts
    ]


@laws
def test_cached_batched_generation_equals_uncached_one_by_one(tiny_model, family, m, scope):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    streams = greedy_streams(base, rows, 8, m=m, scope=scope)
    # An EOS that the second row writes early and others later or never, with a pair of others.
    for eos_token_id in {streams[1][2], streams[4][5], streams[0][7]}:
        wanted = [
            stream[: stream.index(eos_token_id) + 1] if eos_token_id in stream else stream
            for stream in streams
        ]
        prompts = prompts_of(rows)
        model = wrap(base, m=m, scope=scope, eos_token_id=eos_token_id)
        output = model.generate(**prompts, max_new_tokens=8)
        width = prompts["input_ids"].shape[1]
        assert output.dtype == torch.long
        assert output.shape == (len(rows), width + max(map(len, wanted)))
        assert torch.equal(output[:, :width], prompts["input_ids"])
        assert [cut_at_eos(new, eos_token_id) for new in output[:, width:]] == wanted


@families
def test_generation_stops_at_an_eos_that_comes_first(tiny_model, family):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    streams = greedy_streams(base, rows, 4)
    eos_token_id = streams[0][0]
    wanted = greedy_streams(base, rows, 4, eos_token_id)
    assert wanted[0] == [eos_token_id]
    assert any(len(stream) == 4 for stream in wanted)
    prompts = prompts_of(rows)
    width = prompts["input_ids"].shape[1]
    model = wrap(base, eos_token_id=eos_token_id)
    output = model.generate(**prompts, max_new_tokens=4)
    assert output[0, width:].tolist() == [eos_token_id] * 4
    assert [cut_at_eos(new, eos_token_id) for new in output[:, width:]] == wanted
    alone = model.generate(**prompts_of(rows[:1]), max_new_tokens=4)
    assert alone[0].tolist() == rows[0][: rows[0].index(END) + 1] + [eos_token_id]


@families
def test_generation_adds_at_most_max_new_tokens(tiny_model, family):
    base = tiny_model(family).eval()
    prompts = prompts_of(ragged_rows())
    width = prompts["input_ids"].shape[1]
    unused = set(range(40)) - {t for s in greedy_streams(base, ragged_rows(), 7) for t in s}
    model = wrap(base, eos_token_id=min(unused))
    longest = model.generate(**prompts, max_new_tokens=7)
    for max_new_tokens in (1, 2, 7):
        output = model.generate(**prompts, max_new_tokens=max_new_tokens)
        assert torch.equal(output, longest[:, : width + max_new_tokens])


@families
@pytest.mark.parametrize("prompt", [[5], [5, END], [5, LATENT, END]])
def test_the_shortest_prompts_generate(tiny_model, family, prompt):
    base = tiny_model(family).eval()
    wanted = oracle.generate_row(base, prompt, 5, **settings_of())
    unused = min(set(range(40)) - set(wanted))
    batch = lay_out([prompt], align="end")
    output = wrap(base, eos_token_id=unused).generate(**batch, max_new_tokens=5)
    assert output[0].tolist() == prompt + wanted


@families
def test_pause_thoughts_generate_as_an_ordinary_language_model(tiny_model, family):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    prompts = prompts_of(rows)
    width = prompts["input_ids"].shape[1]
    wanted = greedy_streams(base, rows, 5, EOS, thought="pause")
    output = wrap(base, thought="pause").generate(**prompts, max_new_tokens=5)
    assert [cut_at_eos(new, EOS) for new in output[:, width:]] == wanted


@families
def test_generation_reads_every_token_once(tiny_model, family):
    base = tiny_model(family).eval()
    prompts = prompts_of(ragged_rows())
    size = len(prompts["input_ids"])
    unused = set(range(40)) - {t for s in greedy_streams(base, ragged_rows(), 6) for t in s}
    model = wrap(base, eos_token_id=min(unused))
    calls = count_columns(base.base_model)
    model.generate(**prompts, max_new_tokens=6)
    # The last state of the prompt gives the first token, and nothing follows the last one.
    prompt, new = calls[:-5], calls[-5:]
    assert sum(rows * columns for rows, columns in prompt) == prompts["attention_mask"].sum()
    assert new == [(1, size)] * 5


@families
def test_finished_rows_leave_the_batch(tiny_model, family, monkeypatch):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    streams = greedy_streams(base, rows, 8)
    prompts = prompts_of(rows)
    eos_token_id = streams[1][2]
    lengths = [(s + [eos_token_id]).index(eos_token_id) + 1 for s in streams]
    assert len(set(lengths)) > 1 and min(lengths) < 8 < max(lengths)
    model = wrap(base, eos_token_id=eos_token_id)
    outputs = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(coconut, "MAX_UNFINISHED_SHARE", share)
        calls = count_columns(base.base_model)
        outputs.append(model.generate(**prompts, max_new_tokens=8))
        # Token n + 1 is decoded for the rows that are unfinished after n tokens.
        unfinished = [sum(length > n for length in lengths) for n in range(1, 8)]
        counts = unfinished if share else [len(rows)] * 7
        assert calls[-7:] == [(1, count) for count in counts]
    assert torch.equal(*outputs)


@laws
def test_answer_gives_the_loss_of_forward_and_the_text_of_generate(tiny_model, family, m, scope):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    choices = {"m": m, "scope": scope, "eos_token_id": greedy_streams(base, rows, 3)[1][2]}
    model, prompts = wrap(base, **choices), prompts_of(rows)
    width = prompts["input_ids"].shape[1]
    whole = lay_out(rows, [make_labels(row) for row in rows], align="prompt")
    assert torch.equal(whole["input_ids"][:, :width], prompts["input_ids"])
    calls = count_columns(base.base_model)
    loss, new = model.answer(**whole, max_new_tokens=8)
    read = sum(rows * columns for rows, columns in calls[: -new.size(1) + 1])
    assert read == whole["attention_mask"].sum(), "prompts are read once"
    assert_close(loss, model(**lay_out(rows, [make_labels(row) for row in rows])).loss)
    assert torch.equal(new, model.generate(**prompts, max_new_tokens=8)[:, width:])


@families
def test_answers_without_packing_are_the_same(tiny_model, family):
    # Llama's eager attention computes its softmax in fp32, for which a mask of fp64 is infinite.
    base = tiny_model(family).eval().float()
    rows = ragged_rows()
    whole = lay_out(rows, [make_labels(row) for row in rows], align="prompt")
    loss, new = wrap(base).answer(**whole, max_new_tokens=8)
    base.set_attn_implementation("eager")
    again, same = wrap(base).answer(**whole, max_new_tokens=8)
    assert_close(again, loss)
    assert torch.equal(new, same)


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_finished_rows_leave_every_kind_of_cache(sliding_window):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        sliding_window=sliding_window, initializer_range=0.5,
    )  # fmt: skip
    base = MistralForCausalLM(config).eval()
    rows = ragged_rows()
    streams = greedy_streams(base, rows, 8)
    eos_token_id = streams[1][2]
    model = wrap(base, eos_token_id=eos_token_id)
    whole = lay_out(rows, [make_labels(row) for row in rows], align="prompt")
    calls = count_columns(base.base_model)
    _, new = model.answer(**whole, max_new_tokens=8)
    wanted = greedy_streams(base, rows, 8, eos_token_id)
    assert [cut_at_eos(row, eos_token_id) for row in new] == wanted
    # Packed, the tokens of all rows are one row.
    assert len({max(call) for call in calls[-6:]}) > 1, "rows left the batch"


@families
def test_checkpointing_in_training_mode_is_refused(tiny_model, family):
    base = tiny_model(family)
    enable_checkpointing(base)
    model, prompt = wrap(base), lay_out([[5, 6, 7]], align="end")
    for options in ({}, {"do_sample": False}):
        with pytest.raises(ValueError, match="checkpointing drops the cache that answers need"):
            model.generate(**prompt, max_new_tokens=2, **options)
    wanted = greedy_streams(base.eval(), [[5, 6, 7, END]], 4)
    output = model.eval().generate(**lay_out([[5, 6, 7, END]], align="end"), max_new_tokens=4)
    assert output[0, 4:].tolist() == cut_at_eos(torch.tensor(wanted[0]), EOS)


@families
def test_answers_need_prompts_that_end_in_one_column(tiny_model, family):
    model = wrap(tiny_model(family))
    rows = ragged_rows()
    with pytest.raises(ValueError, match="labels that begin in the same column"):
        model.answer(**lay_out(rows, [make_labels(row) for row in rows]))
    with pytest.raises(ValueError, match="labels that begin in the same column"):
        model.answer(**lay_out(rows[:1], [[-100] * len(rows[0])]))
    row = [5, START, LATENT, 7]
    with pytest.raises(ValueError, match="ends with a latent"):
        model.answer(**lay_out([row], [[-100, -100, -100, 7]]))


@families
@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_beams_equal_hugging_faces_search(tiny_model, family, num_latents):
    """Record by record over embeddings from the oracle, without padding or our cache."""
    base = tiny_model(family).eval()
    rng = random.Random(num_latents)
    rows = [make_row(rng, size, num_latents, 1) for size in (4, 1, 7)]
    eos_token_id = greedy_streams(base, rows, 3)[0][2]
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    prompts = prompts_of(rows)
    width = prompts["input_ids"].shape[1]
    ours = wrap(base, eos_token_id=eos_token_id).generate(**prompts, **options)
    assert ours.shape[0] == 2 * len(rows)
    assert torch.equal(ours[:, :width], prompts["input_ids"].repeat_interleave(2, 0))
    wanted = []
    for row in rows:
        prompt = row[: row.index(END) + 1]
        with torch.no_grad():
            embeds = torch.stack(oracle.embed_row(base, prompt, **settings_of()))[None]
        wanted += base.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, eos_token_id=eos_token_id, pad_token_id=eos_token_id, **options,
        )  # fmt: skip
    assert [cut_at_eos(new, eos_token_id) for new in ours[:, width:]] == [
        cut_at_eos(new, eos_token_id) for new in wanted
    ]


@families
def test_beams_without_latents_equal_the_base_models_generate(tiny_model, family):
    base = tiny_model(family).eval()
    rows = [[5, 6, 7, END], [8, END], [1, 2, 3, 4, 5, 6, END]]
    prompts = prompts_of(rows)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    ours = wrap(base).generate(**prompts, **options)
    theirs = base.generate(**prompts, eos_token_id=EOS, pad_token_id=EOS, **options)
    assert torch.equal(ours, theirs)


@families
def test_sampling_follows_the_seed_and_its_options(tiny_model, family):
    base = tiny_model(family).eval()
    model = wrap(base)
    prompts = prompts_of(ragged_rows())
    greedy = model.generate(**prompts, max_new_tokens=6)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(
            model.generate(
                **prompts, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=0,
                num_return_sequences=2,
            )
        )  # fmt: skip
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape[0] == 2 * len(ragged_rows())
    assert not torch.equal(draws[0][0::2], draws[0][1::2])
    narrow = model.generate(**prompts, max_new_tokens=6, do_sample=True, top_k=1)
    assert torch.equal(narrow, greedy)


@families
def test_minimum_length_counts_new_tokens(tiny_model, family):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    eos_token_id = greedy_streams(base, rows, 1)[0][0]
    prompts = prompts_of(rows)
    width = prompts["input_ids"].shape[1]
    model = wrap(base, eos_token_id=eos_token_id)
    output = model.generate(**prompts, max_new_tokens=4, min_new_tokens=3)
    assert not (output[:, width : width + 3] == eos_token_id).any()


# Option -> its value and what it does to logits, by transformers' own processors, after a prompt of
# `length` tokens; a and b are tokens that are decoded without it.
ADJUSTMENTS = {
    "repetition_penalty": lambda a, b, length, eos: (
        3.0, processors.RepetitionPenaltyLogitsProcessor(3.0),
    ),
    "no_repeat_ngram_size=1": lambda a, b, length, eos: (
        1, processors.NoRepeatNGramLogitsProcessor(1),
    ),
    "no_repeat_ngram_size=2": lambda a, b, length, eos: (
        2, processors.NoRepeatNGramLogitsProcessor(2),
    ),
    "suppress_tokens": lambda a, b, length, eos: (
        [a, b], processors.SuppressTokensLogitsProcessor([a, b]),
    ),
    "begin_suppress_tokens": lambda a, b, length, eos: (
        [a, b], processors.SuppressTokensAtBeginLogitsProcessor([a, b], length),
    ),
    "bad_words_ids": lambda a, b, length, eos: (
        [[a], [b, a]], processors.NoBadWordsLogitsProcessor([[a], [b, a]], eos),
    ),
    "sequence_bias": lambda a, b, length, eos: (
        [[[a], -9.0], [[b, a], 4.0]],
        processors.SequenceBiasLogitsProcessor([[[a], -9.0], [[b, a], 4.0]]),
    ),
    "min_new_tokens": lambda a, b, length, eos: (
        7, processors.MinNewTokensLengthLogitsProcessor(length, 7, eos),
    ),
    "exponential_decay_length_penalty": lambda a, b, length, eos: (
        (2, 1.5), processors.ExponentialDecayLengthPenalty((2, 1.5), eos, length),
    ),
}  # fmt: skip


@families
@pytest.mark.parametrize("name", ADJUSTMENTS)
@pytest.mark.parametrize("padding", [EOS, 9])
def test_penalties_see_the_prompt_without_its_padding(tiny_model, family, name, padding):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    plain = greedy_streams(base, rows, 8)
    first, second, eos = plain[0][0], plain[5][0], plain[0][5]
    assert len({first, second, eos}) == 3
    prompts = prompts_of(rows)
    prompts["input_ids"] = prompts["input_ids"].where(prompts["attention_mask"] != 0, padding)
    width = prompts["input_ids"].shape[1]
    wanted = []
    for row in rows:
        prompt = row[: row.index(END) + 1]
        value, adjust = ADJUSTMENTS[name](first, second, len(prompt), torch.tensor([eos]))
        wanted.append(oracle.generate_row(base, prompt, 8, eos, adjust, **settings_of()))
    model = wrap(base, eos_token_id=eos)
    output = model.generate(**prompts, max_new_tokens=8, **{name.split("=")[0]: value})
    assert torch.equal(output[:, :width], prompts["input_ids"])
    assert [cut_at_eos(new, eos) for new in output[:, width:]] == wanted
    assert wanted != greedy_streams(base, rows, 8, eos), "the option matters"


REFUSED = {
    "use_cache": False, "cache_implementation": "static", "cache_config": {"nbits": 4},
    "max_cache_len": 64, "past_key_values": object(), "assistant_model": object(),
    "prompt_lookup_num_tokens": 2, "assistant_early_exit": 1, "use_mtp": True,
    "speculation_type": "dflash", "is_assistant": True, "custom_generate": "some/repository",
    "trust_remote_code": True, "penalty_alpha": 0.6, "dola_layers": "low", "num_beam_groups": 2,
    "constraints": [object()], "force_words_ids": [[3]], "token_healing": True,
    "guidance_scale": 1.5, "negative_prompt_ids": object(), "encoder_repetition_penalty": 2.0,
    "prefill_chunk_size": 2, "inputs_embeds": object(), "inputs": object(),
    "position_ids": object(), "max_length": 20, "min_length": 20, "output_scores": True,
    "return_dict_in_generate": True, "temprature": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("prompt", [[5, START, LATENT, END], [5, END]])
def test_options_that_do_not_continue_the_cache_are_refused_by_name(tiny_model, name, prompt):
    model = wrap(tiny_model("gpt2").eval())
    with pytest.raises(ValueError, match=f"generate refuses {name}: options must continue"):
        model.generate(**lay_out([prompt], align="end"), num_beams=1, **{name: REFUSED[name]})


def test_options_at_their_neutral_values_change_nothing(tiny_model):
    base = tiny_model("gpt2").eval()
    prompts, model = prompts_of(ragged_rows()), wrap(base)
    wanted = model.generate(**prompts, max_new_tokens=5)
    neutral = {"use_cache": True, "return_dict_in_generate": False, "assistant_model": None}
    neutral |= {"num_beams": None, "do_sample": False, "output_scores": False}
    neutral |= {"generation_config": None, "disable_compile": True, "bos_token_id": 3}
    for name, value in neutral.items():
        output = model.generate(**prompts, max_new_tokens=5, **{name: value})
        assert torch.equal(output, wanted), name
    with pytest.raises(ValueError, match="give generation options one by one"):
        model.generate(**prompts, generation_config=GenerationConfig())


def test_every_option_of_the_list_is_one_of_transformers():
    known = set(vars(GenerationConfig())) | set(GenerationMixin.generate.__annotations__)
    assert known | {"tokenizer"} >= GENERATE_OPTIONS


def test_stop_lists_and_streamers_work_over_thoughts(tiny_model):
    base = tiny_model("llama").eval()
    prompt = [5, 6, START, LATENT, LATENT, END]
    batch = lay_out([prompt], align="end")
    stream = oracle.generate_row(base, prompt, 8, **settings_of())
    model = wrap(base, eos_token_id=min(set(range(40)) - set(stream)))

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    model.generate(**batch, max_new_tokens=8, streamer=streamer)
    assert streamer.tokens == [*prompt, *stream, "end"]
    stops = [stream[3], stream[5]]
    until_stop = stream[: min(map(stream.index, stops)) + 1]
    output = model.generate(**batch, max_new_tokens=8, eos_token_id=stops)
    assert output[0, len(prompt) :].tolist() == until_stop
    output = model.generate(
        **batch, max_new_tokens=8, stopping_criteria=[lambda ids, _: ids[:, -1] == stops[0]]
    )
    assert output[0, len(prompt) :].tolist() == stream[: stream.index(stops[0]) + 1]


@families
def test_generation_ignores_the_models_generation_config(tiny_model, family):
    base = tiny_model(family).eval()
    rows = ragged_rows()
    prompts = prompts_of(rows)
    wanted = wrap(base).generate(**prompts, max_new_tokens=6)
    foreign = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, num_beams=2, num_return_sequences=2,
        repetition_penalty=9.0, no_repeat_ngram_size=1, eos_token_id=[int(wanted[0, -1]), 3],
        pad_token_id=7, max_length=3, min_new_tokens=5, suppress_tokens=list(range(20)),
        forced_eos_token_id=30, use_cache=False, return_dict_in_generate=True, output_scores=True,
        bad_words_ids=[[5]], length_penalty=3.0,
    )  # fmt: skip
    base.generation_config = foreign
    before = foreign.to_dict()
    model = wrap(base)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert torch.equal(model.generate(**prompts, max_new_tokens=6), wanted)
    assert base.generation_config.to_dict() == before


@families
def test_generation_leaves_gradients_and_mode_alone(tiny_model, family):
    base = tiny_model(family)
    model = wrap(base).eval()
    prompts = prompts_of(ragged_rows())
    model.generate(**prompts, max_new_tokens=3)
    assert not any(module.training for module in model.modules())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in base.parameters())


@families
def test_bf16_generation_runs(tiny_model, family):
    model = wrap(tiny_model(family).eval()).to(torch.bfloat16)
    prompts = prompts_of(ragged_rows())
    width = prompts["input_ids"].shape[1]
    output = model.generate(**prompts, max_new_tokens=4)
    assert torch.equal(output[:, :width], prompts["input_ids"])
    assert ((output >= 0) & (output < 40)).all()


@families
def test_prompts_that_cannot_be_continued_are_refused(tiny_model, family):
    model = wrap(tiny_model(family))
    rows = [[5, 6, START, LATENT, END], [7, START, LATENT, END]]
    with pytest.raises(ValueError, match="left-padded"):
        model.generate(**lay_out(rows, align="latent", extra_right=1), max_new_tokens=2)
    with pytest.raises(ValueError, match="ends with a latent"):
        model.generate(**lay_out([[5, START, LATENT]], align="end"), max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        model.generate(**lay_out([[5]], align="end"), max_new_tokens=0)
