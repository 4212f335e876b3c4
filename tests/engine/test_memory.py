"""The memory of a training step is known before it runs, as measured when it does."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from runs import ROOT, Experiment, assert_refused
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from coconut import Coconut
from dataset import Curriculum, SpecialIds, StagedRecords
from engine import memory
from engine.config_file import load_config
from engine.memory import Lengths, ModelShape, StepMemory
from engine.model import model_shape
from engine.setup import make_curriculum
from engine.weights import ModelSource
from run import main

IDS = SpecialIds(start_latent=97, end_latent=98, latent=99, eos=0)
WIDTH, HEADS = 64, 4


def wrap(base):
    return Coconut(base, 99, 97, 98, 0, latent_window_size=2, latent_weights="uniform")


def make_shape(kind, depth=2):
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=100,
            n_embd=WIDTH,
            n_layer=depth,
            n_head=HEADS,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=0,
        )
        return ModelShape(GPT2LMHeadModel, config, wrap)
    config = LlamaConfig(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=depth,
        num_attention_heads=HEADS, num_key_value_heads=2,
    )  # fmt: skip
    return ModelShape(LlamaForCausalLM, config, wrap)


def make_batch(question=30, latents=3, answer=12, rows=6):
    """Rows of unlike lengths whose first latents share a column."""
    generator = np.random.default_rng(0)
    lengths = question - generator.integers(0, 10, rows)
    width = question + latents + answer
    ids = torch.full((rows, width), 5)
    ids[:, question : question + latents] = 99
    mask = torch.ones(rows, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : question - length] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -answer:] = 7
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions,
    }  # fmt: skip


def measure(shape, batch, bf16, num_steps=1):
    """Highest bytes allocated in the last of so many micro-steps beyond what was there, by torch.

    Gradients stay between them, and those from before the last are not counted.
    """
    torch.manual_seed(0)
    model = shape.build()
    for _ in range(num_steps):
        layout = model.layout(batch["input_ids"], batch["attention_mask"], batch["labels"])
        with torch.profiler.profile(profile_memory=True) as profile:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch, layout=layout).loss
            loss.backward()
        del loss
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_traced_step_needs_what_a_real_one_allocates(kind, bf16):
    shape, batch = make_shape(kind), make_batch()
    traced = memory.share(
        memory.trace_step(shape, batch, bf16), memory.Sizes.of(shape), "none", 1, bf16, False
    )
    num_parameters = sum(p.numel() for p in shape.build().parameters())
    assert traced.parameters == 4 * num_parameters and traced.optimizer == 8 * num_parameters
    step = traced.peak - traced.parameters - traced.optimizer
    assert step == pytest.approx(measure(shape, batch, bf16), rel=0.15)
    # Six rows of twelve labels over a hundred tokens: logits, their softmax and a gradient.
    assert traced.logits % (6 * 12 * 100 * 2) == 0
    assert traced.activations > traced.logits


def test_gradients_that_are_there_already_add_to_the_peak():
    shape, batch = make_shape("llama"), make_batch()
    sizes, peaks = memory.Sizes.of(shape), memory.trace_step(shape, batch, False)
    held = memory.share(peaks, sizes, "none", 1, False, accumulates=True)
    assert held.gradients == 4 * sizes.whole
    step = held.peak - held.parameters - held.optimizer - held.gradients
    assert step == pytest.approx(measure(shape, batch, False, num_steps=2), rel=0.1)
    assert memory.share(peaks, sizes, "ddp", 2, False, accumulates=False) == held


@pytest.mark.parametrize("batch", [make_batch(), make_batch(3, 1, 1, 1)], ids=["long", "short"])
def test_the_depth_of_a_model_is_extrapolated(batch):
    """Short: a layer's gradients are larger than its activations, so the peak is at the end."""
    shape = make_shape("gpt2", depth=7)
    traced, extrapolated = (
        memory.trace_step(shape, batch, False),
        memory.step_peaks(shape, batch, False, on_gpu=False),
    )
    whole, guessed = (max(memory.peak for memory in peaks) for peaks in (traced, extrapolated))
    assert guessed == pytest.approx(whole, rel=0.05)
    assert shape.depth == 7  # the traced copies are copies


def test_kernels_of_a_gpu_keep_nothing_for_dropout_of_attention_weights():
    shape = make_shape("gpt2")
    batch = make_batch(question=200)
    cpu, gpu = (memory.step_peaks(shape, batch, False, on_gpu) for on_gpu in (False, True))
    lost = cpu[0].activations - gpu[0].activations
    # What is dropped: a byte for every pair of columns, in the first of two layers. Half of them
    # are kept, and a kernel keeps its output.
    assert lost > 0.3 * HEADS * 6 * 200 * 200


def test_a_gpus_passes_keep_no_copy_of_the_questions_keys_and_values():
    shape, keys = make_shape("llama", depth=2), 6 * 200 * WIDTH * 4
    few, many = (
        memory.step_peaks(shape, make_batch(question=200, latents=latents), False)[0]
        for latents in (1, 5)
    )
    # A copy for each of four more passes, of two layers, would be sixteen times this.
    assert many.activations - few.activations < 3 * keys


def test_tracing_a_gpus_step_takes_no_longer_for_more_records(monkeypatch):
    """On a CPU attention in bf16 has a block for each few records; a GPU's kernel takes all."""
    entered = []
    enter = memory._Ledger._enter
    monkeypatch.setattr(
        memory._Ledger, "_enter", lambda ledger, x: (entered.append(x.shape), enter(ledger, x))
    )
    counts = []
    for rows in (6, 60):
        memory.step_peaks(make_shape("gpt2"), make_batch(question=200, rows=rows), True)
        counts.append(len(entered))
        entered.clear()
    assert 0 < counts[1] < 1.1 * counts[0]


def test_ranks_that_shard_hold_a_share_each():
    peaks = [StepMemory(4000, 0, 8000, 400, 60), StepMemory(4000, 0, 8000, 500, 60, 7)]
    peaks += [StepMemory(4000, 1000, 8000, 20, 60, 70), StepMemory(4000, 3000, 8000)]
    sizes = memory.Sizes(whole=1000, blocks=800, largest_block=100, largest_parameter=90)
    ddp = memory.share(peaks, sizes, "ddp", 4, False, accumulates=False)
    assert ddp == StepMemory(4000, 4000, 8000, 500, 60, 7)
    # A quarter, and all of the parameters for the passes.
    whole = memory.share(peaks, sizes, "fsdp", 4, False, accumulates=False)
    assert whole == dataclasses.replace(
        ddp, parameters=1000 + 4000, gradients=1000 + 4 * 200, optimizer=2000
    )
    passing = memory.share(peaks, sizes, "fsdp", 4, True, accumulates=False, gathered=False)
    assert passing.parameters == 1000 + 2 * 2 * 100 + 4 * 200
    accumulated = memory.share(peaks, sizes, "fsdp", 4, False, accumulates=True)
    assert accumulated.gradients == 1000 + 4000


def test_the_largest_micro_batch_is_found(tmp_path):
    experiment = Experiment(tmp_path, num_epochs=3, uniform_prob=0.3)
    config = load_config(experiment.yaml, [])
    records = Lengths(9, 3, 2, 4).records(40)
    curriculum = Curriculum("coconut", 1, 1, 2, False)
    found = memory.largest_micro_batches(config, records, curriculum, IDS, 1)
    assert found.keys() == {curriculum.stage(epoch) for epoch in range(config.resume, 3)}
    staged = StagedRecords.of(records, curriculum, np.full(40, 0))
    longest = int((staged.prompt_lengths + staged.num_labels).max())
    assert found[0]["input_ids"].shape == (config.batch_size_training, longest)


@pytest.mark.parametrize(
    ("file", "lengths"),
    # Records as in the largest micro-batches that were met (docs/scale.md), or longer.
    [
        ("gsm_cot", "190,10x20,6"),
        ("gsm_coconut", "190,10x20,6"),
        ("prontoqa_coconut", "250,6x14,6"),
        ("prosqa_coconut", "450,4x20,12"),
    ],
)
def test_the_files_for_two_small_gpus_fit_them(file, lengths):
    path = ROOT / "cpu_args" / f"{file}.yaml"
    config = load_config(path, [f"model_id={ROOT / 'benchmarks/shapes/gpt2'}", "num_epochs=50"])
    records = Lengths.parse(lengths).records(config.records_per_step(2))
    curriculum = make_curriculum(config)
    source = ModelSource("model_id", config.model_id, config.model_id, has_weights=False)
    ids = SpecialIds(50257, 50258, 50259, 50256)
    shape = model_shape(config, source, ids)
    # The first stage has most labels, the last most passes.
    for epoch in (config.resume, config.num_epochs - 1):
        part = {"resume": epoch, "num_epochs": epoch + 1, "uniform_prob": 0.0}
        at = config.model_copy(update=part)
        batches = memory.largest_micro_batches(at, records, curriculum, ids, 2)
        peak = memory.peak_function(at, shape, batches, 2)("ddp", False)
        assert 2 * 2**30 < peak < 10 * 2**30


def test_a_dry_run_shows_what_a_step_needs_by_stage(tmp_path, capsys):
    experiment = Experiment(tmp_path, num_epochs=2)
    assert experiment.main("--dry-run") == 0
    output = capsys.readouterr().out
    assert "GiB on each GPU: estimated" in output
    table = output.partition("GiB on each GPU")[2].splitlines()
    assert "one process     DDP, 2 ranks    FSDP, 2 ranks" in table[1]
    assert "gradients     optimizer   activations" in output


def test_lengths_need_neither_data_nor_a_tokenizer(capsys):
    arguments = ["cpu_args/gsm_coconut.yaml", "--dry-run", "model_id=benchmarks/shapes/gpt2"]
    arguments += ["num_epochs=3", "epochs_per_stage=3", "resume=0"]
    assert main([str(ROOT / arguments[0]), *arguments[1:], "--lengths", "64,3x8,5"]) == 0
    output = capsys.readouterr().out
    (row,) = [line.split() for line in output.splitlines() if " x 95 " in line]
    assert row[:4] == ["0", "8", "x", "95"]  # 64 + 2 markers + 24 + 5
    # Weights, gradients and two moments of 124.4 M parameters are 1.85 GiB of it.
    assert 2.3 < float(row[4]) < 2.9


@pytest.mark.parametrize(
    ("lengths", "override", "message"),
    [
        ("64,3,5", "lr=0.1", "--lengths 64,3,5: write tokens of the question"),
        ("64,3x8,0", "lr=0.1", "--lengths 64,3x8,0: write tokens of the question"),
        ("64,3x8,5", "model_id=nowhere/at/all", "model_id"),
    ],
)
def test_mistaken_lengths_are_refused(lengths, override, message, tmp_path, capsys):
    experiment = Experiment(tmp_path, num_epochs=1)
    assert_refused(capsys, experiment, "--dry-run", "--lengths", lengths, override, words=[message])


def test_lengths_are_for_a_dry_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        Experiment(tmp_path, num_epochs=1).main("--lengths", "64,3x8,5")
    assert "--lengths is for --dry-run" in capsys.readouterr().err
