"""Before weights load: what a start reads, and what it settles from checkpoint and data."""

import os
import sys
from collections import Counter
from contextlib import contextmanager

import pytest
from runs import Experiment

from engine.config_file import load_config
from engine.model import build_coconut, load_backbone
from engine.setup import prepare

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
