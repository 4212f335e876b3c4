"""Laws of training: a batch's split changes nothing, one step is AdamW's, a stopped run resumes.

Split and step are tested in float64 with dropout 0, resuming bit for bit in float32 with dropout.
Ranks are in test_distributed.py, mistakes of users in test_run.py.
"""

import copy
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from oracle import batch_loss
from runs import (
    TENSORS,
    Experiment,
    assert_same_weights,
    make_records,
    use_float64,
)
from safetensors.torch import load_file

from dataset import Collator, SpecialIds, StagedRecords, tokenize_records
from engine import evaluation
from engine import model as backbone
from engine.config_file import load_config
from engine.metadata import Metadata
from engine.setup import make_curriculum
from engine.tracking import Tracker
from engine.trainer import Trainer, learning_rate
from engine.weights import ModelSource
from utils import EXIT_FAILED, EXIT_INTERRUPTED, RunFailed

FAMILIES = ("gpt2", "llama")
EXACT = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture
def float64(monkeypatch):
    monkeypatch.setattr(backbone, "_build_options", backbone._build_options)
    use_float64()


# The gradient of an effective batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_split_of_an_effective_batch_changes_nothing(tmp_path, float64, family):
    shared = {"family": family, "uniform_prob": 0.3, "max_grad_norm": 1.0}
    whole = Experiment(tmp_path / "whole", batch_size_training=8, **shared)
    splits = [
        Experiment(tmp_path / "4x2", batch_size_training=4, effective_batch_size=8, **shared),
        Experiment(
            tmp_path / "1x8", batch_size_training=1, gradient_accumulation_steps=8, **shared
        ),
        Experiment(tmp_path / "tokens", batch_size_training=8, tokens_per_micro_batch=40, **shared),
    ]
    assert whole.main() == 0
    for split in splits:
        assert split.main() == 0
        np.testing.assert_allclose(split.losses(), whole.losses(), rtol=1e-6)
        assert len(split.losses()) == 9
        assert_same_weights(split.weights(), whole.weights(), **EXACT)
        for epoch in range(3):
            assert split.predictions(epoch) == whole.predictions(epoch)


def test_out_of_memory_ends_the_run_with_advice(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    experiment = Experiment(tmp_path, num_epochs=1)
    assert experiment.main() == EXIT_FAILED
    message = capsys.readouterr().err
    assert re.search(r"out of memory at optimizer step 0; write tokens_per_mi\w+: \d", message)
    assert not experiment.losses()


# One step


def make_trainer(folder, base, records, **keys):
    """A Trainer of `base` on `records`, which also serve for validation."""
    config = load_config(str(Experiment(folder, **keys).yaml))
    source = ModelSource.of(config)
    tokenizer = source.tokenizer
    tokenized = tokenize_records(records, tokenizer, config.train_path)
    coconut = backbone.build_coconut(config, backbone.Backbone(base, tokenizer, source, False))
    metadata = Metadata.of(config, tokenizer)
    tracker = Tracker(config.run_dir, {}, "tests", "run", "disabled", True)
    curriculum = make_curriculum(config)
    return Trainer(config, coconut, tokenizer, tokenized, tokenized, curriculum, metadata, tracker)


def logged(trainer, name):
    lines = (trainer.config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


@pytest.mark.parametrize(
    "reset, resets, max_grad_norm",
    [("stage", {2}, None), ("epoch", {1, 2, 3}, 0.5), ("never", set(), None)],
)
def test_steps_are_adamw_on_the_mean_cross_entropy(tmp_path, reset, resets, max_grad_norm):
    base = build_tiny_model("gpt2")
    twin = copy.deepcopy(base)
    rates = [0.005, 0.01, 0.01, 0.005]  # warmup over two steps, then a cosine over two
    trainer = make_trainer(
        tmp_path, base, make_records(7), reset_optimizer=reset, max_grad_norm=max_grad_norm,
        epochs_per_stage=2, max_latent_stage=2, num_epochs=4, batch_size_training=2,
        gradient_accumulation_steps=4, warmup_steps=2, lr_scheduler="cosine", lr=0.01,
        weight_decay=0.1, latent_window_size=2, latent_weights=[0.7, 0.3],
    )  # fmt: skip
    trainer.run()
    losses, norms = [], []
    for step, (rate, stage) in enumerate(zip(rates, [0, 0, 1, 1], strict=True)):
        staged = StagedRecords.of(trainer.train_records, trainer.curriculum, np.full(7, stage))
        batch = Collator(staged, SpecialIds.of(trainer.tokenizer))[np.arange(7)]
        del batch["indices"]
        if step == 0 or step in resets:
            optimizer = torch.optim.AdamW(
                twin.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1
            )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss, *_ = batch_loss(twin, **batch, latent_token_id=39, m=2, weights=[0.7, 0.3])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm or float("inf"))
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    assert logged(trainer, "train/lr") == pytest.approx(rates)
    assert logged(trainer, "train/loss") == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "train/grad_norm") == pytest.approx(norms, rel=1e-6)
    assert_same_weights(base.state_dict(), twin.state_dict(), rtol=1e-8, atol=1e-10)


def test_learned_window_weights_train_at_the_same_rate_without_decay(tmp_path):
    trained = []
    for weight_decay in (0.0, 0.5):
        trainer = make_trainer(
            tmp_path / str(weight_decay), build_tiny_model("gpt2"), make_records(7),
            latent_weights="learned", weight_decay=weight_decay, curriculum=False, num_epochs=1,
            batch_size_training=8, lr=0.01,
        )  # fmt: skip
        before = trainer.model.window_logits.detach().clone()
        trainer.run()
        moved = trainer.model.window_logits.detach() - before
        # AdamW's first step is the learning rate, whatever the gradient.
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3, atol=0)
        (logged_weights,) = logged(trainer, "train/window_weights")
        assert logged_weights == trainer.model.window_weights
        assert sum(logged_weights) == pytest.approx(1.0)
        trained.append(trainer.model.state_dict())
    no_decay, decay = trained
    assert torch.equal(no_decay["window_logits"], decay["window_logits"])
    name = "base_causallm.transformer.wte.weight"
    assert not torch.equal(no_decay[name], decay[name])


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    config = load_config(str(Experiment(tmp_path, lr=0.8, warmup_steps=4).yaml))
    cosine = config.model_copy(update={"lr_scheduler": "cosine"})
    assert [learning_rate(config, step, 10) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )
    # Steps 4 to 9 are at 0, 1/6 .. 5/6 of the half circle: cos 60 degrees is a half.
    assert learning_rate(cosine, 3, 10) == pytest.approx(0.8)
    assert learning_rate(cosine, 4, 10) == pytest.approx(0.8)
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.6)
    assert learning_rate(cosine, 7, 10) == pytest.approx(0.4)
    assert learning_rate(cosine, 8, 10) == pytest.approx(0.2)
    assert learning_rate(cosine, 12, 10) == pytest.approx(0.0)


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch):
    base = build_tiny_model("gpt2")
    trainer = make_trainer(tmp_path, base, make_records(7), max_grad_norm=1.0)
    before = copy.deepcopy(base.state_dict())
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr("engine.parallel.gradient_norm", lambda model: infinite)
    words = r"gradient norm inf is not finite at optimizer step 0 \(epoch 0\); the weights were not"
    with pytest.raises(RunFailed, match=words):
        trainer.run()
    assert_same_weights(base.state_dict(), before)
    (saved,) = json.loads((trainer.config.run_dir / "nonfinite_step0_rank0.json").read_text())
    assert np.shape(saved["input_ids"]) == np.shape(saved["labels"])
    assert len(saved["indices"]) == 4


def test_a_loss_that_is_not_finite_ends_the_run_with_status_1(tmp_path, capsys):
    experiment = Experiment(tmp_path, lr=1e30)
    assert experiment.main() == EXIT_FAILED
    message = capsys.readouterr().err
    assert re.fullmatch(
        r"loss \S+ or gradient norm \S+ is not finite at optimizer step 1 \(epoch 0\); the weights"
        r" were not changed, the batch is in \S+nonfinite_step1_rank0.json\n",
        message,
    )
    assert len(experiment.losses()) == 1
    assert experiment.change(debug=True, name="debug").main() == EXIT_FAILED
    assert "nothing saved (debug: true)" in capsys.readouterr().err
    assert not experiment.run_dir.exists()


def test_a_loss_that_is_not_finite_is_reported_on_a_full_disk(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.trainer.atomic_write_text", refuse)
    assert Experiment(tmp_path, lr=1e30).main() == EXIT_FAILED
    message = capsys.readouterr().err
    assert "is not finite at optimizer step 1 (epoch 0); the weights were not" in message
    assert "the batch could not be written (No space left on device)" in message


def test_bf16_computes_over_float32_weights_and_optimizer_state(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.distributed.computes_bf16_natively", lambda: False)
    full = Experiment(tmp_path / "fp32", num_epochs=1)
    half = Experiment(tmp_path / "bf16", num_epochs=1, bf16=True)
    assert (full.main(), half.main()) == (0, 0)
    assert capsys.readouterr().out.count("has no native bf16 and emulates it") == 1
    state = load_file(half.states()[-1] / TENSORS)
    for tensor in (*half.weights().values(), *state.values()):
        assert tensor.dtype == torch.float32
    assert half.losses() == pytest.approx(full.losses(), rel=0.03)
    assert half.losses() != full.losses()


# What a run keeps


def test_only_improving_epochs_are_kept(tmp_path, monkeypatch):
    keys = {"save_only_improve": True, "num_epochs": 4, "num_train": 8, "eval_every_steps": 1}
    experiment = Experiment(tmp_path, **keys)
    # Those within an epoch, here of the first of its two steps, do not count.
    accuracies = iter([1.0, 0.25, 1.0, 0.25, 1.0, 0.5, 1.0, 0.0])
    summarize = evaluation.summarize
    monkeypatch.setattr(
        evaluation, "summarize", lambda rows: summarize(rows) | {"acc": next(accuracies)}
    )
    assert experiment.main() == 0
    assert checkpoint_names(experiment) == ["checkpoint_1", "checkpoint_3"]
    best = [e["eval/best_acc"] for e in experiment.metrics() if "eval/acc" in e]
    assert best == [0.25, 0.25, 0.5, 0.5]
    assert len(experiment.states()) == 2


def checkpoint_names(experiment):
    return sorted(path.name for path in experiment.run_dir.glob("checkpoint_*"))


def test_the_newest_checkpoints_are_kept_and_those_of_later_epochs_left_alone(tmp_path):
    experiment = Experiment(tmp_path, keep_checkpoints=2, num_epochs=4, num_train=4)
    assert experiment.main("num_epochs=1") == 0
    shutil.copytree(experiment.run_dir / "checkpoint_1", experiment.run_dir / "checkpoint_40")
    assert experiment.main() == 0
    assert checkpoint_names(experiment) == ["checkpoint_3", "checkpoint_4", "checkpoint_40"]


def test_debug_saves_nothing_and_takes_few_records(tmp_path, monkeypatch, capsys):
    experiment = Experiment(tmp_path, debug=True, num_val=40)
    monkeypatch.setattr("engine.setup.DEBUG_TRAIN_RECORDS", 5)
    rows = []
    summarize = evaluation.summarize
    monkeypatch.setattr(evaluation, "summarize", lambda r: rows.append(len(r)) or summarize(r))
    assert experiment.main() == 0
    assert rows == [32, 32, 32]
    assert not (tmp_path / "exps").exists()
    monkeypatch.setattr(
        "engine.parallel.gradient_norm",
        lambda model: signal.raise_signal(signal.SIGTERM) or torch.ones(()),
    )
    assert experiment.main() == EXIT_INTERRUPTED
    assert "stopped; debug: true saves nothing" in capsys.readouterr().err
    assert not (tmp_path / "exps").exists()


def test_unknown_files_are_left_alone_with_a_warning(tmp_path, capsys):
    experiment = Experiment(tmp_path, num_epochs=1, num_train=4)
    unknown = [".notes.old", ".notes.part", "checkpoint_best", "notes.txt"]
    experiment.run_dir.mkdir(parents=True)
    for name in unknown:
        (experiment.run_dir / name).write_text("mine")
    for _ in range(2):
        assert experiment.main() == 0
        assert f"unknown files, left alone: {', '.join(unknown)}" in capsys.readouterr().out
    for name in unknown:
        assert (experiment.run_dir / name).read_text() == "mine"
