"""tracking.py: metrics.jsonl whatever happens, and wandb that never stops or holds up a run."""

import json
import logging
import math
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import Experiment

from engine.tracking import Tracker


class FakeWandb:
    """wandb's calls, recorded; each can be made to fail."""

    def __init__(self, has_key=True, failing=()):
        self.has_key = has_key
        self.failing = failing
        self.inits, self.logged, self.finished, self.teardowns = [], [], 0, 0
        self.Table = lambda columns, data: (columns, data)
        self.Settings = lambda **settings: settings

    def login(self, prompt, verify):
        assert not prompt
        assert not verify
        if "login" in self.failing:
            raise OSError("key is malformed\nsecond line")
        return self.has_key

    def init(self, **arguments):
        self.inits.append(arguments)
        if arguments["mode"] in self.failing:
            raise OSError("server is away\nsecond line")
        return SimpleNamespace(
            id=arguments["id"] or "fresh",
            log=self.log,
            finish=self.finish,
            define_metric=lambda name, step_metric: None,
        )

    def log(self, metrics):
        if "log" in self.failing:
            raise OSError("disk is full")
        self.logged.append(metrics)

    def finish(self):
        self.finished += 1

    def teardown(self):
        self.teardowns += 1


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level(logging.INFO, logger="coconut")


@pytest.fixture(autouse=True)
def no_wandb_environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def use_wandb(monkeypatch):
    def install(**arguments):
        fake = FakeWandb(**arguments)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def make(run_dir, wandb_mode="disabled", is_main=True, wandb_id=None):
    return Tracker(run_dir, {"lr": 1e-4}, "project", "name", wandb_mode, is_main, wandb_id)


def entries(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_each_log_is_one_line_at_once(tmp_path):
    tracker = make(tmp_path / "new" / "run")
    tracker.log({"train/loss": 1.5}, step=1)
    assert entries(tmp_path / "new" / "run") == [{"step": 1, "train/loss": 1.5}]
    tracker.log({"eval/acc": 0.5, "note": "é"}, step=2)
    make(tmp_path / "new" / "run").log({"train/loss": 1}, step=3)
    assert [entry["step"] for entry in entries(tmp_path / "new" / "run")] == [1, 2, 3]


def test_non_finite_numbers_become_null_and_scalars_plain(tmp_path):
    values = {
        "nan": math.nan,
        "inf": [-math.inf, np.float32("inf"), torch.tensor(math.nan)],
        "numpy": np.int64(3),
        "numpy64": np.float64(0.5),
        "torch": {"loss": torch.tensor(0.5)},
        "true": True,
        "none": None,
    }
    make(tmp_path).log(values, step=0)
    assert entries(tmp_path) == [
        {
            "step": 0,
            "nan": None,
            "inf": [None, None, None],
            "numpy": 3,
            "numpy64": 0.5,
            "torch": {"loss": 0.5},
            "true": True,
            "none": None,
        }
    ]


def test_truncate_keeps_lines_up_to_the_step_and_drops_a_torn_one(tmp_path, caplog):
    tracker = make(tmp_path)
    for step in (1, 2, 3):
        tracker.log({"x": step}, step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "x')
    tracker.truncate(2)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2]
    assert "dropped 1 unreadable line(s)" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_drops_what_no_run_wrote(tmp_path, caplog):
    tracker = make(tmp_path)
    tracker.log({"x": 1}, 1)
    foreign = ["[]", "7", '{"step": "x"}', '{"step": null}', '{"step": [1]}', "[" * 100_000]
    foreign += ['{"step": 1, "eval/epoch": "x"}', '{"step": 1, "eval/epoch": null}', "\0"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n".join(foreign) + "\n")
    tracker.truncate(2, epoch=3)
    assert entries(tmp_path) == [{"step": 1, "x": 1}]
    assert f"dropped {len(foreign)} unreadable line(s)" in caplog.text


def test_truncate_drops_the_evaluation_that_will_be_made_again(tmp_path):
    tracker = make(tmp_path)
    tracker.log({"eval/epoch": 0}, step=2)
    tracker.log({"train/loss": 1.0}, step=4)
    tracker.log({"eval/epoch": 1}, step=4)
    tracker.truncate(4)
    assert len(entries(tmp_path)) == 3
    tracker.truncate(4, epoch=1)
    assert entries(tmp_path) == [{"step": 2, "eval/epoch": 0}, {"step": 4, "train/loss": 1.0}]


def test_truncate_keeps_evaluations_within_an_epoch_up_to_the_step(tmp_path):
    tracker = make(tmp_path)
    for step in (2, 4, 6):
        tracker.log({"train/loss": 1.0}, step)
        tracker.log({"eval_step/acc": 0.5, "eval_step/epoch": 1}, step)
    tracker.truncate(4, epoch=1)
    assert [(entry["step"], "eval_step/acc" in entry) for entry in entries(tmp_path)] == [
        (2, False), (2, True), (4, False), (4, True),
    ]  # fmt: skip


def test_truncate_without_a_file_does_nothing(tmp_path):
    make(tmp_path).truncate(3)
    make(None).truncate(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b'{"step": 2', b'{"step": 2, "x": "\xc3', b"[1]"])
def test_a_line_torn_by_a_crash_does_not_spoil_the_next(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    make(tmp_path).log({}, step=5)
    assert entries(tmp_path) == [{"step": 1}, {"step": 5}]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    make(tmp_path).log({}, step=5)
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 5]


@pytest.fixture
def fill_disk(tmp_path):
    """`fill_disk(n)`: from now on metrics.jsonl may grow by n bytes; `fill_disk(None)`: at will.

    The file is so long that nothing else that tests write comes near the limit.
    """
    path, before = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text(json.dumps({"step": 0, "long": "x" * 10**6}) + "\n")

    def fill(room):
        limit = before[0] if room is None else path.stat().st_size + room
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    yield fill
    fill(None)


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, fill_disk, caplog):
    path, tracker = tmp_path / "metrics.jsonl", make(tmp_path)
    tracker.log({"x": 1}, 1)
    # Room for a part of a line must not tear it.
    fill_disk(10)
    for step in (2, 3, 4):
        tracker.log({"x": step}, step)
        assert len(entries(tmp_path)) == 2
    fill_disk(None)
    tracker.log({"x": 5}, 5)
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 1, 2, 3, 4, 5]
    tracker.log({"x": 6}, 6)
    # The next time it is reported again, and the end of the run is a last chance.
    fill_disk(0)
    tracker.log({"x": 7}, 7)
    fill_disk(None)
    tracker.close()
    assert entries(tmp_path)[-1] == {"step": 7, "x": 7}
    refused = "cannot be written (File too large); training continues, and lines wait in memory"
    assert caplog.messages == [
        f"{path}: {refused} until it can", f"{path}: written again, 4 line(s) at once",
        f"{path}: {refused} until it can", f"{path}: written again, 1 line(s) at once",
    ]  # fmt: skip


def test_lines_that_are_never_written_are_counted_at_the_end(tmp_path, fill_disk, caplog):
    tracker = make(tmp_path)
    fill_disk(5)
    for step in range(1, 4):
        tracker.log({}, step)
    tracker.close()
    assert caplog.messages[-1].endswith(": 3 line(s) could not be written and are lost")
    tracker.close()
    assert len(caplog.messages) == 2
    assert len(entries(tmp_path)) == 1


def test_a_resumed_run_reports_lines_that_its_crash_lost(tmp_path, caplog):
    tracker = make(tmp_path)
    for step in (1, 2, 5):
        tracker.log({}, step)
    tracker.truncate(5)
    assert caplog.messages == []
    tracker.truncate(4)
    assert caplog.messages == [f"{tmp_path / 'metrics.jsonl'}: the lines from step 3 to 4 are lost"]


def test_other_ranks_write_nothing(tmp_path, use_wandb):
    fake = use_wandb()
    tracker = make(tmp_path / "run", wandb_mode="online", is_main=False)
    tracker.log({"x": 1}, 1)
    tracker.table("t", ["a"], [[1]])
    tracker.truncate(0)
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert not fake.inits


def test_without_a_run_directory_nothing_is_saved(use_wandb):
    fake = use_wandb()
    make(None, wandb_mode="online").log({"x": 1}, 1)
    assert not fake.inits


def test_disabled_never_imports_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = make(tmp_path, wandb_id="kept")
    tracker.table("t", ["a"], [[1]])
    tracker.close()
    assert tracker.wandb_id == "kept"


def test_a_missing_wandb_is_reported_and_the_run_continues(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    make(tmp_path, wandb_mode="online").log({"x": 1}, 1)
    assert "wandb='online' but wandb is not installed" in caplog.text
    assert entries(tmp_path) == [{"step": 1, "x": 1}]


def test_wandb_gets_the_same_names_and_lives_in_the_run_directory(tmp_path, use_wandb):
    fake = use_wandb()
    tracker = make(tmp_path, wandb_mode="online")
    tracker.log({"train/loss": 1.0}, step=7)
    tracker.table("data_table", ["question", "answer"], [("q", "a")])
    tracker.close()
    tracker.close()
    (init,) = fake.inits
    assert (init["mode"], init["dir"], init["config"]) == ("online", str(tmp_path), {"lr": 1e-4})
    assert fake.logged == [
        {"step": 7, "train/loss": 1.0},
        {"data_table": (["question", "answer"], [["q", "a"]])},
    ]
    assert fake.finished == 1


def test_a_resumed_run_continues_its_wandb_run(tmp_path, use_wandb):
    fake = use_wandb()
    first = make(tmp_path, wandb_mode="online")
    assert first.wandb_id == "fresh"
    assert make(tmp_path, wandb_mode="online", wandb_id="old").wandb_id == "old"
    assert [(init["id"], init["resume"]) for init in fake.inits] == [
        (None, "allow"),
        ("old", "allow"),
    ]


def test_the_id_of_the_wandb_run_is_saved_with_the_training_state(tmp_path, use_wandb):
    fake = use_wandb()
    experiment = Experiment(tmp_path, wandb="online", num_train=4)
    for num_epochs in (1, 2, 3):
        assert experiment.main(f"num_epochs={num_epochs}") == 0
    assert [init["id"] for init in fake.inits] == [None, "fresh", "fresh"]


def test_online_without_a_key_goes_offline_with_a_warning(tmp_path, use_wandb, caplog):
    fake = use_wandb(has_key=False)
    make(tmp_path, wandb_mode="online")
    assert [init["mode"] for init in fake.inits] == ["offline"]
    assert "no key is stored (wandb login); continuing offline" in caplog.text


def test_a_malformed_key_goes_offline_with_a_warning(tmp_path, use_wandb, caplog):
    fake = use_wandb(failing=("login",))
    make(tmp_path, wandb_mode="online")
    assert [init["mode"] for init in fake.inits] == ["offline"]
    out = caplog.text
    assert "wandb cannot log in: key is malformed\n" in out


def test_an_unreachable_server_goes_offline_under_the_same_id(tmp_path, use_wandb, caplog):
    fake = use_wandb(failing=("online",))
    tracker = make(tmp_path, wandb_mode="online", wandb_id="old")
    assert [(init["mode"], init["id"]) for init in fake.inits] == [
        ("online", "old"),
        ("offline", "old"),
    ]
    assert fake.teardowns == 1
    assert "wandb did not start online: server is away\n" in caplog.text
    tracker.log({"x": 1}, 1)
    assert fake.logged == [{"step": 1, "x": 1}]


def test_a_wandb_that_cannot_start_at_all_leaves_metrics_jsonl(tmp_path, use_wandb, caplog):
    use_wandb(failing=("offline",))
    make(tmp_path, wandb_mode="offline").log({"x": 1}, 1)
    assert "wandb did not start offline: server is away\n" in caplog.text
    assert entries(tmp_path) == [{"step": 1, "x": 1}]


@pytest.mark.parametrize(
    "mode, environment, acting",
    [
        ("online", "offline", "offline"),
        ("online", "dryrun", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "nonsense", "online"),
    ],
)
def test_the_environment_can_let_wandb_send_less_but_never_more(
    tmp_path, use_wandb, monkeypatch, caplog, mode, environment, acting
):
    fake = use_wandb()
    monkeypatch.setenv("WANDB_MODE", environment)
    make(tmp_path, wandb_mode=mode)
    assert [init["mode"] for init in fake.inits] == [acting] * (acting != "disabled")
    assert ("WANDB_MODE" in caplog.text) is (acting != mode)


def test_a_failing_wandb_is_reported_once_and_training_continues(tmp_path, use_wandb, caplog):
    use_wandb(failing=("log",))
    tracker = make(tmp_path, wandb_mode="online")
    tracker.log({"x": 1}, 1)
    tracker.log({"x": 2}, 2)
    tracker.close()
    out = caplog.text
    assert out.count("wandb stopped, metrics.jsonl continues: disk is full") == 1
    assert len(entries(tmp_path)) == 2


def test_the_real_wandb_without_a_key_neither_asks_nor_stops(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))
    run_dir = tmp_path / "run"
    tracker = make(run_dir, wandb_mode="online", wandb_id="abcd1234")
    tracker.log({"train/loss": math.nan}, 1)
    tracker.table("data_table", ["a"], [[1]])
    tracker.close()
    out = caplog.text
    assert "continuing offline" in out
    assert "wandb stopped" not in out
    assert list(run_dir.glob("wandb/offline-run-*-abcd1234/*.wandb"))
    table = {"columns": ["a"], "data": [[1]]}
    assert entries(run_dir) == [{"step": 1, "train/loss": None}, {"step": 1, "data_table": table}]
