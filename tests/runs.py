"""Small runs that the tests of training, evaluation, checkpoints and run.py share.

An experiment is a folder with a tiny model, ragged records and a YAML file. It runs in this
process through `run.main`, or in processes of its own where signals, locks or several ranks are
at stake. Those are forked from one server that has imported everything once, because importing
torch and transformers takes longer than any of these runs.
"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from conftest import MODEL_TOKENS, build_tiny_model, build_word_tokenizer
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging as transformers_logging

import run
from engine import model as backbone
from engine.config_file import load_config
from engine.setup import evaluation_folder
from utils import EXIT_USER_ERROR

ROOT = Path(__file__).parents[1]
PROCESS_TIMEOUT_S = 120
# What one process writes of a training state's tensors.
TENSORS = "shard-00001-model-00001-of-00001.safetensors"
# Measured, so different in every run.
CLOCKS = ("train/tokens_per_second", "eval/seconds_per_record")
CLOCKS += ("train/seconds", "eval/seconds", "time")


def make_records(n, seed=0, most_steps=3):
    """Records of 0 to `most_steps` steps, questions of 1 to 6 tokens, steps of 1 to 3."""
    rng = random.Random(seed)

    def words(low, high):
        return " ".join(rng.choice("0123456789+-*") for _ in range(rng.randint(low, high)))

    return [
        {
            "question": words(1, 6),
            "answer": str(rng.randrange(10)),
            "steps": [words(1, 3) for _ in range(rng.randint(0, most_steps))],
        }
        for _ in range(n)
    ]


class Experiment:
    """A folder with everything a run needs; `yaml` is its configuration file.

    keys: configuration that differs from a Coconut run of three epochs in ragged stages 0 to 2,
        five optimizer steps each, the last one over two records.
    """

    def __init__(self, folder, family="gpt2", dropout=0.0, num_train=18, num_val=7, **keys):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.folder / "model"
        if not self.model.exists():
            transformers_logging.disable_progress_bar()
            base = build_tiny_model(family, torch.float32, dropout, vocab_size=MODEL_TOKENS)
            base.save_pretrained(self.model)
            build_word_tokenizer().save_pretrained(self.model)
        self.train = self.write("train.json", make_records(num_train, seed=1))
        self.val = self.write("val.json", make_records(num_val, seed=2))
        self.yaml = self.folder / "config.yaml"
        self.keys = {
            "name": "run", "save_path": self.folder / "exps", "model_id": self.model,
            "train_path": self.train, "val_path": self.val, "c_thought": 1,
            "epochs_per_stage": 1, "max_latent_stage": 2, "pad_latent_to_max": False,
            "num_epochs": 3, "batch_size_training": 4, "lr": 1e-2, "max_new_tokens": 5,
            "num_workers": 0, "wandb": "disabled", "project": "tests",
        }  # fmt: skip
        if not {"coconut", "cot", "no_cot", "no_thoughts"} & keys.keys():
            self.keys["coconut"] = True
        self.change(**keys)

    @property
    def run_dir(self):
        return Path(self.keys["save_path"]) / self.keys["name"]

    @property
    def evaluation_folder(self):
        return evaluation_folder(load_config(self.yaml))

    def write(self, name, content):
        """A JSON file in the folder; text is written as it is."""
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def change(self, **keys):
        """Other configuration from now on; None takes a key out."""
        self.keys |= keys
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in self.keys.items()}
        lines = [f"{k}: {json.dumps(v)}" for k, v in plain.items() if v is not None]
        self.yaml.write_text("\n".join(lines))
        return self

    def main(self, *arguments):
        """Exit status of `run.py CONFIG arguments` in this process."""
        return run.main([str(self.yaml), *arguments])

    def start(self, *arguments, hook=None):
        """The same in a process of its own; `hook` (of a module of tests) is called there first."""
        return Ranks(1, self.folder, [[str(self.yaml), *arguments]], hook)

    def metrics(self, path="metrics.jsonl"):
        """The lines of metrics.jsonl without what clocks measured and where the run comes from."""
        lines = (self.run_dir / path).read_text().splitlines()
        entries = [json.loads(line) for line in lines if "run/commit" not in line]
        return [{k: v for k, v in e.items() if k not in CLOCKS} for e in entries]

    def losses(self):
        return [entry["train/loss"] for entry in self.metrics() if "train/loss" in entry]

    def weights(self, epochs=None):
        """The tensors of checkpoint `epochs`, by default of the last epoch."""
        epochs = self.keys["num_epochs"] if epochs is None else epochs
        return load_file(self.run_dir / f"checkpoint_{epochs}" / "model.safetensors")

    def metadata(self, epochs=None):
        """The coconut.json of checkpoint `epochs`, by default of the last epoch."""
        epochs = self.keys["num_epochs"] if epochs is None else epochs
        return json.loads((self.run_dir / f"checkpoint_{epochs}" / "coconut.json").read_text())

    def predictions(self, epoch):
        lines = (self.run_dir / f"predictions_{epoch}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def states(self):
        """Training states on disk, oldest first."""
        return sorted((self.run_dir / "resume").iterdir(), key=lambda path: int(path.name))


def assert_same_weights(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in expected:
        if tolerance:
            torch.testing.assert_close(got[name], expected[name], **tolerance, msg=name)
        else:
            assert torch.equal(got[name], expected[name]), name


def whole_state(experiment):
    """The tensors of an experiment's newest training state, put together from all shards."""
    reader = HuggingFaceStorageReader(str(experiment.states()[-1]))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(t.size, dtype=t.properties.dtype) for name, t in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def tree(folder):
    """Every path below a folder."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def assert_refused(capsys, experiment, *arguments, words):
    """Status 2, a message that holds `words` on standard error, and nothing written."""
    before = tree(experiment.folder)
    assert experiment.main(*arguments) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert tree(experiment.folder) == before
    return captured.err


def free_port():
    """A free port below the range from which Linux assigns ephemeral ports.

    An ephemeral port could be taken again before a later run of the same processes binds it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def use_float64():
    """Let run.py load its models in float64, in this process.

    Llama's norms, which transformers computes in float32 whatever the model's dtype, keep float64.
    """
    backbone._build_options = lambda config: {"dtype": torch.float64}
    LlamaRMSNorm.forward = exact_norm


def exact_norm(self, x, of_transformers=LlamaRMSNorm.forward):
    """Llama's norm; in float64 by torch, which keeps it."""
    if x.dtype != torch.float64:
        return of_transformers(self, x)
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


def at_call(number, target, action):
    """From now on the call number `number` (from 1) of module:attribute first runs `action`."""
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*arguments, **options):
        if next(calls) == number:
            action()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def signal_group(number):
    os.killpg(0, number)


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preload"])
# Starting a process also polls the running ones. An exit status can be read only once: of two
# threads that poll at the same time, one gets 255.
_ASKING = threading.Lock()


class Ranks:
    """Processes that run `run.main` on each list of arguments in turn, as ranks of one group.

    What they print is in output_<rank>.txt in `folder`.
    """

    def __init__(self, world_size, folder, commands, hook=None):
        self.outputs = [Path(folder) / f"output_{rank}.txt" for rank in range(world_size)]
        for output in self.outputs:
            output.write_text("")  # those of an earlier start
        ports = [free_port() for _ in commands]
        # The server reads its path from the environment alone.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.processes = [
            _CONTEXT.Process(
                target=_run_all, args=(rank, world_size, ports, commands, str(output), hook)
            )
            for rank, output in enumerate(self.outputs)
        ]
        with _ASKING:
            for process in self.processes:
                process.start()
        self.pid = self.processes[0].pid

    def wait(self):
        """Exit status of each, after all have ended; a hanging one is killed and fails the test."""
        for process in self.processes:
            wait([process.sentinel], PROCESS_TIMEOUT_S)
        with _ASKING:
            hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
            for rank in hanging:
                self.processes[rank].kill()
            assert not hanging, f"ranks {hanging} hang: {self.output()}"
            return [process.exitcode for process in self.processes]

    def output(self, rank=0):
        return self.outputs[rank].read_text()


def _run_all(rank, world_size, ports, commands, output, hook):
    file = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    # Data workers come as they do in a program started by hand.
    multiprocessing.set_start_method("fork", force=True)
    # A group of its own, as torchrun gives every rank.
    os.setsid()
    if hook is not None:
        hook()
    status = 0
    for port, command in zip(ports, commands, strict=True):
        if world_size > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
        status = max(status, run.main(command))
    sys.exit(status)
