"""One rank of test_nodes.py: run.py in float64, watched and, where asked for, disturbed.

`python node.py FOLDER SAVE_PATH HOOK CONFIG [key=value ...]`, started by torchrun. What the rank
does to files under SAVE_PATH, to data and to other ranks is noted in FOLDER/rank_<rank>.jsonl while
it happens, so that it survives a kill; HOOK names a function of this module that is called first.
"""

import json
import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from runs import at_call, kill_self, use_float64

import dataset
import run
from engine.trainer import Trainer

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink",
    "os.chmod", "os.utime", "shutil.rmtree",
}  # fmt: skip


def notes(folder, rank, kind):
    """What rank `rank` noted of one kind, in order."""
    path = Path(folder) / f"rank_{rank}.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry[kind] for entry in entries if kind in entry]


def watch(folder, save_path):
    """Note every file written ("written"), batch made ("made") and object sent ("sent": bytes)."""

    def note(kind, value):
        with open(Path(folder) / f"rank_{os.environ['RANK']}.jsonl", "a") as file:
            file.write(json.dumps({kind: value}) + "\n")

    def note_written(*paths):
        for path in paths:
            if isinstance(path, str | os.PathLike) and Path(save_path) in Path(path).parents:
                note("written", os.fspath(path))

    def note_sent(object_list, *_, **__):
        note("sent", len(pickle.dumps(object_list)))

    def audit(event, arguments):
        if event == "open" and arguments[2] & WRITING:
            note_written(arguments[0])
        elif event in CHANGING:
            note_written(*arguments[:2])

    sys.addaudithook(audit)
    _before(dist, "broadcast_object_list", note_sent)
    _before(dataset.Collator, "__getitem__", lambda _, indices: note("made", indices.tolist()))
    # safetensors writes in Rust, which no audit hook of Python sees.
    import safetensors.torch

    _before(safetensors.torch, "serialize_file", lambda _, path, *__, **___: note_written(path))
    # The examples that rank 0 shows are no part of training.
    Trainer._show_examples = lambda *_: None


def _before(owner, name, action):
    original = getattr(owner, name)

    def watched(*arguments, **options):
        action(*arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, watched)


def undisturbed(_folder):
    """Nothing happens."""


def killed_then_stopped(folder):
    """Rank 1 dies in step 7; after the restart both agents are asked to stop in step 8."""
    # torchrun counts restarts for each agent separately, so its count cannot serve here.
    killed = Path(folder) / "killed"

    def die():
        killed.touch()
        kill_self()

    if killed.exists():
        stop_agent = partial(os.kill, os.getppid(), signal.SIGTERM)
        at_call(3, "engine.tracking:Tracker.log", stop_agent)
    elif os.environ["RANK"] == "1":
        # Call 6 is the evaluation after five steps.
        at_call(8, "engine.tracking:Tracker.log", die)


if __name__ == "__main__":
    folder, save_path, hook, *command = sys.argv[1:]
    use_float64()
    watch(folder, save_path)
    globals()[hook](folder)
    run.exit_process(run.main(command))
