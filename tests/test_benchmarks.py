"""The benchmarks compare equal work, count it correctly, and all run.

Times and memory are not tested: they depend on the machine.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import (
    LATENT,
    count_columns,
    families,
    lay_out,
    make_labels,
    prompts_of,
    ragged_rows,
    wrap,
)
from torch.utils.flop_counter import FlopCounterMode

import layers
from benchmarks import (
    arithmetic,
    breakdown,
    common,
    contenders,
    epoch,
    evaluation,
    generate,
    growth,
    launches,
    local_model,
    memory,
    prototype,
    train_step,
)
from benchmarks.contenders import CONTENDERS
from benchmarks.published import Published
from dataset import Collator, Curriculum, SpecialIds, StagedRecords, tokenize_records
from engine import distributed
from passes import find_blocks

ROOT = Path(__file__).parent.parent
NO_EOS = -1


def ragged_batch():
    rows = ragged_rows()
    batch = lay_out(rows, [make_labels(row) for row in rows])
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def even_batch():
    """Rows of equal shape without padding, the only batches the prototype supports."""
    shape = common.Shape(records=3, question=5, latents=2, answer=4)
    batch = common.make_batch(shape, LATENT + 1, torch.device("cpu"))
    assert int((batch["labels"] != -100).sum()) == shape.num_labels
    return batch


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def run(module, tmp_path, *arguments):
    """The report that a benchmark writes for the tiny model."""
    out = tmp_path / "report.json"
    options = ["--device", "cpu", "--model", "tiny", "--repeats", "1", "--out", str(out)]
    assert module.main([*options, *arguments]) == 0
    return json.loads(out.read_text())


# Equal work


@families
def test_published_has_the_loss_and_gradients_of_coconut(family, tiny_model):
    batch, model = ragged_batch(), tiny_model(family)
    expected = wrap(model, m=1)(**batch).loss
    loss, _, _ = Published(model, LATENT, NO_EOS)(**batch)
    torch.testing.assert_close(loss, expected)
    wanted, got = gradients(model, expected), gradients(model, loss)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=name)


def test_published_has_the_thoughts_of_coconut(tiny_model):
    batch, model = ragged_batch(), tiny_model("gpt2")
    real = batch["attention_mask"] == 1
    _, embeds, _ = Published(model, LATENT, NO_EOS)(**batch)
    torch.testing.assert_close(embeds[real], wrap(model, m=1)(**batch).inputs_embeds[real])


@families
def test_prototype_has_the_loss_and_gradients_of_coconut(family, tiny_model):
    batch, model = even_batch(), tiny_model(family)
    expected = wrap(model, m=1)(**batch).loss
    loss = prototype.loss(model, batch["input_ids"], batch["labels"], LATENT)
    torch.testing.assert_close(loss, expected)
    wanted, got = gradients(model, expected), gradients(model, loss)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], msg=name)


def test_published_generates_the_tokens_of_coconut(tiny_model):
    model = tiny_model("gpt2").eval()
    ours = wrap(model, m=1)
    prompts = prompts_of(ragged_rows())
    for ids, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True):
        prompt = ids[mask == 1][None]
        expected = ours.generate(prompt, torch.ones_like(prompt), max_new_tokens=8)
        assert Published(model, LATENT, ours.eos_token_id).generate(prompt, 8).equal(expected)


def test_published_stops_at_eos(tiny_model):
    model = tiny_model("gpt2").eval()
    prompt = torch.tensor([[3, 4, 5]])
    first = Published(model, LATENT, NO_EOS).generate(prompt, 4)[0, 3].item()
    assert Published(model, LATENT, first).generate(prompt, 4).tolist() == [[3, 4, 5, first]]


def test_prototype_generates_the_tokens_of_published(tiny_model):
    model = tiny_model("gpt2").eval()
    prompts = even_batch()["input_ids"]
    generated = prototype.generate(model, prompts, LATENT, 6)
    single = Published(model, LATENT, NO_EOS)
    assert generated.equal(torch.cat([single.generate(row[None], 6) for row in prompts]))


def test_contenders_have_equal_losses_and_learn():
    """Without dropout all three have the same losses, which fall."""
    shape = common.Shape(4, 6, 2, 5)
    losses = {}
    for name in CONTENDERS:
        model = common.build_model("tiny", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        step = train_step.train_step(name, model.train(), bf16=False)
        batch = common.make_batch(shape, model.config.vocab_size, torch.device("cpu"))
        losses[name] = [step(batch, shape.num_labels) for _ in range(5)]
        assert losses[name][-1] < losses[name][0]
    for name in CONTENDERS:
        assert losses[name] == pytest.approx(losses["ours"], rel=1e-4), name


# Counting


def test_flops_are_those_of_the_models_matrix_products(tiny_model):
    """Torch counts attention over all pairs; ours counts the causal half."""
    T, B = 7, 3
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 30, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = counts.pop(torch.ops.aten.bmm) * (T + 1) / (2 * T)
    flops = arithmetic.read_flops(model, B, T) + arithmetic.logit_flops(model, B * T)
    assert flops == sum(counts.values()) + attention


@pytest.mark.parametrize("kind, keys", [("llama", ("k_proj", "v_proj")), ("gpt2", ())])
def test_states_that_nothing_needs_cost_keys_and_values_of_the_last_block(tiny_model, kind, keys):
    T, B, unneeded = 7, 3, 4
    model = tiny_model(kind)
    block = find_blocks(model)[-1]
    matrices = {name: p.numel() for name, p in block.named_parameters() if p.dim() == 2}
    saved = sum(n for name, n in matrices.items() if not any(key in name for key in keys))
    if kind == "gpt2":
        saved -= matrices["attn.c_attn.weight"] * 2 // 3
    pairs = unneeded * (unneeded + 1) // 2
    wanted = B * (2 * saved * unneeded + 4 * pairs * model.config.hidden_size)
    whole, less = (arithmetic.read_flops(model, B, T, number) for number in (0, unneeded))
    assert whole - less == wanted


def test_a_step_costs_three_forward_passes(tiny_model):
    model = tiny_model("llama")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(1, 30, (2, 4)), use_cache=False).logits.sum().backward()
    blocks = 2 * arithmetic.block_parameters(model) * 8
    tied = arithmetic.logit_flops(model, 8)
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.aten.mm] == 3 * (blocks + tied)
    forward = arithmetic.read_flops(model, 2, 4) + arithmetic.logit_flops(model, 2 * 3)
    assert arithmetic.step_flops(model, 2, 4, labels=3) == 3 * forward


def test_generation_flops_read_every_token_but_the_last_once(tiny_model):
    model = tiny_model("gpt2")
    logits = arithmetic.logit_flops(model, 2 * 3)
    expected = arithmetic.read_flops(model, 2, 10 + 3 - 1) + logits
    assert arithmetic.generation_flops(model, records=2, prompt=10, new=3) == expected


def test_contenders_take_turns():
    order = []
    contenders = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = common.take_turns(contenders, 2, torch.device("cpu"))
    assert "".join(order) == "abcabc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.parametrize(("values", "expected"), [([3, 1, 9], 3), ([4, 1, 2, 9], 3), ([5], 5)])
def test_median(values, expected):
    assert common.median(values) == expected


def test_published_precision_is_torchs_default_and_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with common.published_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_drawn_records_have_the_lengths_of_gsm8k_aug():
    tokenizer = common.build_tokenizer(512)
    tokenized = tokenize_records(epoch.gsm_like_records(4000), tokenizer, "drawn")
    assert tokenized.question_lengths.mean() == pytest.approx(56.25, rel=0.02)
    assert tokenized.question_lengths.std() == pytest.approx(20.4, rel=0.05)
    assert tokenized.num_steps.mean() == pytest.approx(3.15, rel=0.02)
    assert tokenized.answer_lengths.mean() == pytest.approx(3.09, rel=0.01)
    assert tokenized.step_lengths.sum() / 4000 == pytest.approx(3.15 * 8.57, rel=0.03)


def staged_records(n, stage):
    tokenizer = common.build_tokenizer(512)
    tokenized = tokenize_records(epoch.gsm_like_records(n), tokenizer, "drawn")
    curriculum = Curriculum(method="coconut", **epoch.GSM)
    return StagedRecords.of(tokenized, curriculum, np.full(n, stage)), SpecialIds.of(tokenizer)


@pytest.mark.parametrize("split", epoch.SPLITS)
def test_an_epoch_contains_every_record_once(split):
    staged, _ = staged_records(150, stage=2)
    steps = list(epoch.plan_epoch(staged, split, epoch=6))
    assert all(len(indices) <= split[0] for parts in steps for indices in parts)
    taken = np.concatenate([indices for parts in steps for indices in parts])
    assert sorted(taken) == list(range(150))


@pytest.mark.parametrize("stage", epoch.STAGES)
def test_padding_is_what_layers_and_attention_compute_beyond_real_tokens(stage):
    staged, ids = staged_records(70, stage)
    lengths = staged.prompt_lengths + staged.num_labels
    collator = Collator(staged, ids)
    coconut = contenders.wrap(common.build_model("tiny"))
    measured = epoch.measure_padding(coconut, collator, (8, 4), epoch=0)
    computed, calls = 0, count_columns(coconut.base_causallm.base_model)
    for parts in epoch.plan_epoch(staged, (8, 4), epoch=0):
        for part in parts:
            with torch.no_grad():
                coconut(collator[part]["input_ids"], collator[part]["attention_mask"])
            questions = staged.tokenized.question_lengths[part]
            rest = lengths[part] - questions
            has_latents = staged.num_latents[part].min() > 0
            # With latents the questions end in the same column; without, all rows start in it.
            width = questions.max() + rest.max() if has_latents else lengths[part].max()
            computed += len(part) * width
    assert measured["real_tokens"] == lengths.sum()
    assert measured["tokens_read_by_layers"] == sum(rows * columns for rows, columns in calls)
    assert measured["padding_in_layers"] == 0
    assert measured["padding_in_attention"] == 1 - lengths.sum() / computed


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: x.view(6), False),
        (lambda x: x.t()[1:].unsqueeze(0).expand(5, -1, -1), False),
        (lambda x: x.split(1), False),
        (lambda x: torch.ops.aten._unsafe_view(x, [6]), False),
        (lambda x: x.detach(), False),
        (lambda x: torch.empty_like(x), False),
        (lambda x: x.new_empty(4), False),
        (lambda x: x.to(torch.float32), False),
        (lambda x: x.contiguous(), False),
        (lambda x: x.clone(), True),
        (lambda x: x.to(torch.bfloat16), True),
        (lambda x: x.t().contiguous(), True),
        (lambda x: x + 1, True),
        (lambda x: x.mul_(2), True),
        (lambda x: x @ x.t(), True),
        (lambda x: torch.zeros(3), True),
        (lambda x: torch._foreach_add_([x, x.clone()], 1), 2),
    ],
)
def test_what_makes_or_changes_numbers_is_a_launch_and_views_are_none(operation, expected):
    with launches.LaunchCounter() as counter:
        operation(torch.ones(2, 3))
    assert counter.counts.total() - 1 == expected, "beside torch.ones"


def count_of_tiny_step(bf16, num_latents, **fields):
    shape = common.Shape(3, 9, num_latents, 4)
    batch = common.make_batch(shape, 512, torch.device("cpu"))
    model = contenders.coconut_around(common.build_model("tiny", **{"attn_pdrop": 0.0} | fields))
    trainer = contenders.make_trainer(model, bf16)
    layout = model.layout(batch["input_ids"], batch["attention_mask"], batch["labels"])
    return launches.count_launches(trainer, batch, layout, shape.num_labels)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_without_storage_launches_what_a_real_one_does(bf16):
    counts = launches.measure("tiny", common.Shape(3, 9, 2, 4), bf16)[0]["counts"]
    assert counts == count_of_tiny_step(bf16, num_latents=2)
    assert counts["aten::_fused_adamw_"] == counts["aten::_foreach_norm"] == 1


def test_a_dropout_is_counted_once_for_each_layer_and_pass_that_reads_it():
    dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    counts = count_of_tiny_step(False, 2, **dropouts)
    num_passes, num_layers, dropouts_of_a_layer = 3, 2, 2
    expected = num_passes * num_layers * dropouts_of_a_layer
    assert counts["aten::native_dropout"] == counts["aten::native_dropout_backward"] == expected
    assert "aten::random_" not in counts


def test_logits_are_counted_in_a_gpus_blocks_and_the_cpus_are_restored(monkeypatch):
    expected = count_of_tiny_step(False, 2)
    monkeypatch.setitem(layers.LOGITS_BLOCK, "cpu", 512)  # one row
    assert count_of_tiny_step(False, 2) == expected
    assert layers.takes_cpu_path(torch.ones(1))


def test_each_further_latent_launches_one_pass_more():
    totals = [count_of_tiny_step(False, latents).total() for latents in (2, 3, 4)]
    assert totals[2] - totals[1] == totals[1] - totals[0] > 0


SIZES = breakdown.Sizes(vocab=512, inner=128, records=3)


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::addmm", [[96], [24, 32], [32, 96], []], breakdown.MATRICES),
        ("aten::mm", [[3, 32], [32, 96]], breakdown.NARROW),
        ("aten::mm", [[96, 3], [3, 32]], breakdown.NARROW),
        ("aten::mm", [[24, 32], [32, 512]], breakdown.LOGITS),
        ("aten::exp_", [[24, 512]], breakdown.LOGITS),
        ("aten::fill_", [[512, 32], []], breakdown.EMBEDDING),
        ("aten::mul", [[3, 8, 128], [3, 8, 128]], breakdown.ACTIVATION),
        ("aten::add_", [[32, 96], [32, 96], []], breakdown.SUMS),
        ("aten::_softmax", [[3, 4, 8, 8], [], []], "attention"),
        ("aten::bmm", [[8, 4, 4], [8, 4, 4]], "attention"),
        ("aten::_fused_adamw_", [], "optimizer"),
        ("aten::random_", [[192], [], [], []], "dropout"),
        ("aten::ge", [[3, 8, 32], []], "dropout"),
        ("aten::gelu", [[24, 128], []], breakdown.ACTIVATION),
        ("aten::mul", [[3, 8, 32], [3, 8, 32]], breakdown.REST),
    ],
)
def test_operations_are_grouped_by_kind(name, shapes, kind):
    assert breakdown.kind_of(name, shapes, SIZES) == kind


def refusal(capsys, module, *arguments):
    with pytest.raises(SystemExit) as stopped:
        module.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_missing_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(capsys, train_step, "--device", "cuda")
    assert "--device cuda: this machine has no usable GPU; write --device cpu" in message


def test_emulated_bf16_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(distributed, "computes_bf16_natively", lambda: False)
    message = refusal(capsys, train_step, "--device", "cpu", "--bf16")
    assert "--bf16: this machine only emulates bf16" in message


def test_zero_repeats_are_refused(capsys):
    assert "0 is not at least 1" in refusal(capsys, memory, "--repeats", "0")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (train_step, ["--question", "1100"]),
        (memory, ["--question", "1100"]),
        (breakdown, ["--question", "1100"]),
        (launches, ["--question", "1100"]),
        (growth, ["--answer", "600"]),
        (generate, ["--new", "1000"]),
        (evaluation, ["--new", "1000"]),
    ],
)
def test_records_longer_than_the_models_positions_are_refused(capsys, module, arguments):
    assert "tokens per record exceed the models' 1024; choose fewer" in refusal(
        capsys, module, "--device", "cpu", *arguments
    )


@pytest.mark.parametrize("module", [generate, evaluation])
def test_a_question_needs_a_token_on_each_side_of_its_latents(capsys, module):
    assert "--question 1: a token is needed before" in refusal(
        capsys, module, "--device", "cpu", "--question", "1"
    )


# Running

SMALL = ("--records", "3", "--question", "6", "--latents", "2")


def assert_environment(report, name):
    assert report["benchmark"] == name
    keys = {"device", "cores", "threads", "torch", "transformers", "commit", "clock", "date"}
    assert keys <= report["environment"].keys()


def test_train_step_measures_every_contender(tmp_path, capsys):
    report = run(train_step, tmp_path, *SMALL, "--answer", "4")
    assert_environment(report, "train_step")
    assert [row["contender"] for row in report["rows"]] == list(CONTENDERS)
    for row in report["rows"]:
        assert row["shape"] == "3 x (6 + 2 + 4)"
        assert row["times_published"] == report["rows"][0]["median_s"] / row["median_s"]
        assert row["share_of_floor"] == row["floor_s"] / row["median_s"]
        assert len(row["seconds"]) == 1
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in (*CONTENDERS, "floor"))


def test_generate_measures_every_contender(tmp_path):
    report = run(generate, tmp_path, *SMALL, "--new", "5")
    assert_environment(report, "generate")
    sizes = {row["contender"]: row["batch_size"] for row in report["rows"]}
    assert sizes == {"published": 1, "prototype": 3, "ours": 3}
    assert [row["share_of_same_tokens"] for row in report["rows"]] == [1.0, 1.0, 1.0]


def test_evaluation_measures_loss_and_answers_apart_and_together(tmp_path):
    report = run(evaluation, tmp_path, *SMALL, "--answer", "4", "--new", "3")
    assert_environment(report, "evaluation")
    assert [row["way"] for row in report["rows"]] == ["apart", "together"]
    for row in report["rows"]:
        assert row["shape"] == "3 x (6 + 2 + 4) + 3"
        assert row["median_s_per_record"] == row["seconds"][0] / 3 > 0
        assert row["share_of_same_tokens"] == 1


def test_memory_measures_in_its_own_process(tmp_path):
    report = run(memory, tmp_path, *SMALL, "--answer", "4", "--contenders", "published")
    assert_environment(report, "memory")
    (row,) = report["rows"]
    parameters = sum(p.numel() for p in common.build_model("tiny").parameters())
    assert row["state_bytes"] == 16 * parameters
    assert row["step_bytes"] == row["peak_bytes"] - row["state_bytes"] > 0
    assert row["published_over_peak_bytes"] == 1


def test_memory_names_the_contender_that_failed(monkeypatch):
    killed = subprocess.CompletedProcess([], returncode=-9, stdout="")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(SystemExit, match="prototype: its process ended with status -9"):
        memory.main(["--device", "cpu", "--contenders", "prototype"])


def test_epoch_measures_every_stage_and_split(tmp_path):
    report = run(epoch, tmp_path, "--records", "40")
    assert_environment(report, "epoch")
    rows = [(row["stage"], row["batch_size"], row["accumulation"]) for row in report["rows"]]
    assert rows == [(stage, *split) for stage in epoch.STAGES for split in epoch.SPLITS]
    assert all(row["trained_tokens_per_s"] > 0 for row in report["rows"])


def test_epoch_reads_records_from_a_file(tmp_path):
    data, folder = tmp_path / "data.json", tmp_path / "tokenizer"
    data.write_text(json.dumps(epoch.gsm_like_records(30, seed=5)))
    common.build_tokenizer(512).save_pretrained(folder)
    report = run(epoch, tmp_path, "--data", str(data), "--tokenizer", str(folder))
    staged, _ = staged_records(30, stage=0)
    assert report["rows"][0]["real_tokens"] > 0
    assert report["rows"][0]["real_tokens"] != (staged.prompt_lengths + staged.num_labels).sum()


def test_growth_covers_0_to_12_latents():
    assert growth.POINTS["latents"] == tuple(range(13))


def test_a_step_can_be_timed_as_on_a_gpu(tmp_path, monkeypatch):
    seen, step = [], contenders.Trainer.train_step
    monkeypatch.setattr(
        contenders.Trainer,
        "train_step",
        lambda *a: (seen.append(layers.takes_cpu_path(torch.ones(1))), step(*a))[1],
    )
    for options in ((), ("--as-on-gpu",)):
        run(train_step, tmp_path, *SMALL, "--answer", "4", "--contenders", "ours", *options)
    half = len(seen) // 2
    assert seen and seen == [True] * half + [False] * half


def test_growth_measures_and_plots_every_axis(tmp_path, monkeypatch):
    monkeypatch.setitem(growth.POINTS, "latents", (0, 3))
    monkeypatch.setitem(growth.POINTS, "window", (1, 2))
    report = run(growth, tmp_path, *SMALL, "--answer", "4", "--axes", "latents", "size", "window")
    assert_environment(report, "growth")
    model = common.build_model("tiny")
    values = {axis: [] for axis in report["options"]["axes"]}
    for row in report["rows"]:
        values[row["axis"]].append(row["value"])
        assert row["share_of_floor"] == row["floor_s"] / row["median_s"]
        if row["axis"] != "size":
            latents = row["value"] if row["axis"] == "latents" else 2
            unneeded = 6 - row["window"] if latents else 5
            flops = arithmetic.step_flops(model, 3, 6 + latents + 4, 4, unneeded)
            assert row["flops"] == flops
    assert values["latents"] == [0, 3]
    assert values["window"] == [1, 2]
    assert values["size"] == [12 * 64**2 * layers for layers in (1, 2, 4)]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_breakdown_accounts_for_the_whole_step(tmp_path):
    report = run(breakdown, tmp_path, *SMALL, "--answer", "4")
    assert_environment(report, "breakdown")
    assert sum(row["share"] for row in report["rows"]) == pytest.approx(1)
    kinds = {row["kind"] for row in report["rows"]}
    assert {breakdown.MATRICES, breakdown.NARROW, "optimizer", "between operations"} <= kinds


def test_launches_are_set_against_the_peaks_of_two_gpus(tmp_path, capsys):
    report = run(launches, tmp_path, *SMALL, "--answer", "4")
    assert_environment(report, "launches")
    first, second = report["rows"]
    assert (first["gpu"], second["gpu"]) == ("H100", "H200")
    assert first["operations"] == second["operations"] == sum(first["counts"].values())
    assert first["launch_s"] == 5e-6 * first["operations"]
    model = common.build_model("tiny")
    assert first["flops"] == arithmetic.step_flops(model, 3, 12, labels=4, unneeded=5)
    assert first["arithmetic_s"] == second["arithmetic_s"] == first["flops"] / 494.7e12
    matrices = 3 * arithmetic.block_parameters(model) + 512 * 64
    weight_bytes = 2 * 4 * matrices + 28 * model.num_parameters()
    assert first["memory_s"] == weight_bytes / 3.35e12
    assert second["memory_s"] == weight_bytes / 4.8e12
    assert first["launches_over_longer"] == first["launch_s"] / first["memory_s"] > 1
    assert "| yes, " in capsys.readouterr().out


def test_reports_go_under_exps_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = common.parse(common.new_parser("text"), ["--device", "cpu"])
    path = common.write_report("name", options, [{"key": 1}])
    assert path == Path("exps/benchmarks/name.json")
    assert json.loads(path.read_text())["rows"] == [{"key": 1}]


# The GPU script


def test_local_model_has_the_shape_of_gpt2_and_restores_text(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    texts = ["Every grimpus is a wumpus.", "Tom is a grimpus. Is Tom a wumpus or a yimpus?"]
    data = tmp_path / "data.json"
    records = [{"question": text, "answer": "x", "steps": []} for text in texts]
    data.write_text(json.dumps(records))
    assert local_model.main(["--text", str(data), "--out", str(tmp_path / "model")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in [*texts, "### Größe\n"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.n_layer, config.n_embd, config.n_head) == (12, 768, 12)
    assert not list((tmp_path / "model").glob("*.safetensors"))


def bash(*arguments):
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_gpu_script_is_valid_bash():
    assert bash("-n", "benchmarks/gpu.sh").returncode == 0


def test_gpu_script_prints_its_usage():
    done = bash("benchmarks/gpu.sh")
    assert done.returncode == 2
    assert "usage: bash benchmarks/gpu.sh OUTDIR" in done.stderr


def test_gpu_script_refuses_an_unknown_part(tmp_path):
    done = bash("benchmarks/gpu.sh", str(tmp_path / "out"), "nothing")
    assert done.returncode == 2
    assert "unknown part: nothing" in done.stdout


@pytest.mark.timeout(600)
def test_gpu_script_runs_all_parts_on_a_cpu(tmp_path):
    trial = {
        "PYTHON": sys.executable, "DEVICE": "cpu", "MODEL": "tiny", "PRECISION": "",
        "RECORDS": "40", "EPOCHS": "2", "REPEATS": "1", "WORKERS": "1",
        "TESTS": "tests/test_utils.py", "LIMIT_S": "580", "SLOWER": "5", "WHEELS": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | trial, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed: none" in done.stdout
    assert (tmp_path / "log.txt").read_text().count("status 0") == 10
    assert " passed" in (tmp_path / "tests.txt").read_text()
    with tarfile.open(tmp_path / "benchmarks.tar.gz") as bundle:
        assert sum(name.endswith(".json") for name in bundle.getnames()) == 8
    with tarfile.open(tmp_path / "training.tar.gz") as bundle:
        assert {"gpu/metrics.jsonl", "gpu/predictions_1.jsonl"} <= set(bundle.getnames())
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
