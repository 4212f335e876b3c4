"""Before weights load: what a start reads, and what it settles from checkpoint and data."""

import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
from runs import Experiment

from engine.config_file import load_config
from engine.model import build_coconut, load_backbone
from engine.setup import prepare
from utils import UserError

# Files of one start that are opened by name, as often as they are opened.
OPENED = None


def _count(event, arguments):
    if OPENED is not None and event == "open" and isinstance(arguments[0], str):
        OPENED[arguments[0]] += 1


sys.addaudithook(_count)  # for good: Python has no way to take one off


@contextmanager
def opened_files(folder):
    """A Counter of the files of `folder` by name, filled when the block ends."""
    global OPENED
    counts, OPENED = Counter(), Counter()
    try:
        yield counts
    finally:
        for path, number in OPENED.items():
            if os.path.dirname(path) == str(folder):
                counts[os.path.basename(path)] = number
        OPENED = None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A Coconut run of one epoch."""
    experiment = Experiment(tmp_path_factory.mktemp("finished"), num_epochs=1, num_train=6)
    assert experiment.main() == 0
    return experiment


def start(experiment):
    """All that a start does before it trains or evaluates."""
    prepared = prepare(load_config(experiment.yaml), None)
    return build_coconut(prepared.config, load_backbone(prepared.config, prepared.source))


@pytest.mark.parametrize("kind", ["model_id", "from_scratch", "load_model_path", "only_eval"])
def test_a_start_reads_each_file_of_its_model_once(finished, tmp_path, kind):
    checkpoint = finished.run_dir / "checkpoint_1"
    keys = {
        "model_id": {},
        "from_scratch": {"from_scratch": True},
        "load_model_path": {"load_model_path": checkpoint},
        "only_eval": {"load_model_path": checkpoint, "only_eval": True},
    }[kind]
    experiment = Experiment(tmp_path, num_train=4, num_val=2, **keys)
    folder = keys.get("load_model_path", experiment.model)
    with opened_files(folder) as counts:
        start(experiment)
    assert counts["config.json"] == counts["tokenizer.json"] == 1
    assert counts["coconut.json"] == ("load_model_path" in keys)


# What checkpoint and data settle


def test_an_evaluation_needs_no_more_than_weights_and_data(finished, tmp_path):
    (tmp_path / "e.yaml").write_text(
        f"name: e\nsave_path: {tmp_path}\nonly_eval: true\nval_path: {finished.val}\n"
        f"load_model_path: {finished.run_dir / 'checkpoint_1'}\nmax_new_tokens: 5\n"
    )
    prepared = prepare(load_config(tmp_path / "e.yaml"), None)
    config = prepared.config
    assert (config.method, config.max_latent_stage, config.model_id) == ("coconut", 2, None)
    assert prepared.evaluated == (0, 0)
    build_coconut(config, load_backbone(config, prepared.source))


def test_weights_without_a_method_or_a_tokenizer_need_them_written_out(finished, tmp_path):
    weights = shutil.copytree(finished.model, tmp_path / "weights")
    keys = {"coconut": None, "load_model_path": weights, "only_eval": True}
    experiment = Experiment(tmp_path / "e", **keys)
    with pytest.raises(UserError, match=r"has no coconut\.json that names the method"):
        start(experiment)
    for file in weights.glob("tokenizer*"):
        file.unlink()
    experiment.change(cot=True, model_id=None, epochs_per_stage=1, max_latent_stage=2, resume=0)
    with pytest.raises(UserError, match="has no tokenizer of its own; write model_id"):
        start(experiment)
    experiment.change(load_model_path=finished.model / "model.safetensors")
    with pytest.raises(UserError, match=r"no config\.json and tokenizer of its own; write model"):
        start(experiment)


@pytest.mark.parametrize("most_steps, num_epochs", [(0, 2), (1, 4), (2, 6), (3, 8), (7, 8)])
def test_epochs_end_with_the_first_stage_that_leaves_no_text(tmp_path, most_steps, num_epochs):
    experiment = Experiment(tmp_path, epochs_per_stage=2, max_latent_stage=2, num_epochs=None)
    step = "1 + 1 = 2"
    records = [
        {"question": "1 + 1 ?", "answer": "2", "steps": [step] * n} for n in range(most_steps + 1)
    ]
    experiment.write("train.json", records)
    experiment.yaml.write_text(experiment.yaml.read_text() + "\nnum_epochs: null\n")
    assert prepare(load_config(experiment.yaml), None).config.num_epochs == num_epochs


def test_only_the_first_records_are_read(tmp_path):
    experiment = Experiment(tmp_path, num_train=6, max_train_records=4)
    assert len(prepare(load_config(experiment.yaml), None).data.train) == 4
    experiment.change(debug=True)
    assert len(prepare(load_config(experiment.yaml), None).data.train) == 4
