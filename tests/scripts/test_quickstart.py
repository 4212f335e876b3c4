"""The quickstart: its three runs, its summary, the learning curve and the analysis of thoughts."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import run
from analysis import learning_curve
from assets import draw_method, make_quickstart_model
from engine.config_file import load_config
from engine.metrics import extract_answer
from preprocessing import arithmetic
from scripts import quickstart
from utils import UserError

ROOT = Path(__file__).parents[2]
MODEL_FOLDER = ROOT / "assets" / "quickstart-model"


def test_the_answer_is_extracted_from_decoded_text():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    text = tokenizer.decode(tokenizer("7\n2\n### 5").input_ids)
    assert (text, extract_answer(text, "5")) == ("7 2 ### 5", "5")


def test_the_three_runs_fit_together():
    cot, coconut, no_cot = (load_config(quickstart.config_path(name)) for name in quickstart.RUNS)
    assert [config.method for config in (cot, coconut, no_cot)] == ["cot", "coconut", "no_cot"]
    assert coconut.load_model_path == f"{cot.save_path}/{cot.name}/checkpoint_{cot.num_epochs}"
    assert coconut.resume == coconut.epochs_per_stage
    assert coconut.num_epochs > coconut.epochs_per_stage * coconut.max_latent_stage
    assert {str(quickstart.DEFAULT_OUT)} == {c.save_path for c in (cot, coconut, no_cot)}
    for key in ("lr", "batch_size_training", "train_path", "val_path", "model_id", "weight_decay"):
        assert getattr(cot, key) == getattr(coconut, key) == getattr(no_cot, key)


def test_only_what_differs_is_overridden():
    assert quickstart.overrides("coconut", quickstart.DEFAULT_OUT, 0) == []
    checkpoint = Path(load_config(quickstart.config_path("coconut")).load_model_path).name
    assert quickstart.overrides("coconut", Path("/else"), 2) == [
        "save_path=/else",
        "model_id=/else/model",
        f"load_model_path=/else/cot/{checkpoint}",
        "seed=2",
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the three runs of the quickstart, on a few questions for a few steps."""
    out, data = tmp_path_factory.mktemp("quickstart"), tmp_path_factory.mktemp("data")
    arithmetic.main(["--out", str(data), "--train", "64", "--valid", "20"])
    make_quickstart_model.main(["--out", str(out / "model"), "--weights", "0"])
    files = {"train_path": "train.json", "val_path": "valid.json"}
    common = [f"{key}={data / name}" for key, name in files.items()]
    common += [f"save_path={out}", f"model_id={out / 'model'}", "epochs_per_stage=1"]
    coconut = ["resume=1", "num_epochs=4", f"load_model_path={out / 'cot' / 'checkpoint_1'}"]
    own = {"cot": ["num_epochs=1"], "coconut": coconut, "no_cot": ["num_epochs=2"]}
    for name in quickstart.RUNS:
        path = str(ROOT / quickstart.config_path(name))
        assert run.main([path, *common, *own[name]]) == 0
    return out


def test_the_summary_shows_every_figure_and_file(finished):
    summary = quickstart.summarize(finished, began=0.0)
    assert (finished / "summary.md").read_text() == summary + "\n"
    assert (finished / quickstart.PLOT_NAME).stat().st_size > 10_000
    evaluations = learning_curve.read_curve(finished / "coconut").evaluations
    last = evaluations[-1]
    interval = f"{100 * last['eval/acc_low']:.1f} to {100 * last['eval/acc_high']:.1f}"
    assert re.search(
        rf"\| 3 +\| 0 +\| 3 +\| {100 * last['eval/acc']:.1f} % +\| {interval}", summary
    )
    for row in ("its own thoughts", "zeros", "another question's", "the baseline"):
        assert re.search(rf"\| [^|]*{row}[^|]*\| \d+\.\d % +\|", summary)
    paths = re.findall(r"^    (?:\S+ )+ +(/\S+)$", summary, flags=re.MULTILINE)
    assert all(Path(path).exists() for path in paths)
    assert str(finished / "coconut" / "analysis" / "checkpoint_4" / "report.html") in paths
    assert summary.count(str(finished)) == 6
    folder = finished / "coconut" / "analysis" / "checkpoint_4"
    probes = json.loads((folder / "probes.json").read_text())
    for k, entry in enumerate(probes["thoughts"], start=1):
        share = 100 * entry["gold_step_word"]["mean"]
        assert re.search(rf"thought {k} is step {k} in {share:.0f} %", summary)
    words = " ".join(thought["word"] for thought in probes["records"][0]["thoughts"])
    assert f"thoughts   {words}   (as numbers" in summary


def test_stage_spans_merge_consecutive_equal_stages():
    lines = [{"eval/epoch": e, "eval/stage": s} for e, s in enumerate([0, 0, 1, 2, 2, 2])]
    assert learning_curve.stage_spans(lines) == [(0, 0, 2), (1, 2, 3), (2, 3, 6)]


def test_an_unfinished_epoch_is_drawn_up_to_its_last_step(tmp_path):
    epochs_done = [0.5, 1.0, 1.25]
    lines = [
        {"step": i, "train/epochs_done": x, "train/loss": 1.0} for i, x in enumerate(epochs_done)
    ]
    figures = dict.fromkeys(("acc", "acc_low", "acc_high", "loss"), 0.5)
    figures |= {"epoch": 0, "stage": 0}
    lines.append({"step": 2} | {f"eval/{name}": value for name, value in figures.items()})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curve = learning_curve.read_curve(tmp_path)
    assert [epoch for epoch, _ in curve.steps] == epochs_done
    _, bottom = learning_curve.draw_learning_curve([curve]).axes
    assert bottom.get_xlim() == (0, 1.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"metrics\.jsonl: No such file or directory; name the folder of a training run"),
        ('{"step": 1}\n{"st', r"metrics\.jsonl: broken \(.*\); resume the run, which fixes it"),
        ('{"step": 1}\n', r"metrics\.jsonl: no evaluation yet; let the run finish an epoch"),
        ('{"step": 1, "eval/epoch": 0}\n', r"metrics\.jsonl: no training losses with train"),
    ],
)
def test_unusable_metrics_are_reported(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        learning_curve.read_curve(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        learning_curve.main([str(tmp_path), "--out", str(tmp_path / "curve.png")])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "curve.png").exists()


def test_a_run_is_drawn_from_where_the_previous_one_ended():
    def curve(*epochs):
        return learning_curve.Curve(
            [(epoch + 0.5, 1.0) for epoch in epochs], [{"eval/epoch": epoch} for epoch in epochs]
        )

    assert learning_curve.concatenate([curve(0, 1, 2), curve(2, 3), curve(9)]) == [
        curve(0, 1, 2), curve(3, 4), curve(5)
    ]  # fmt: skip
    assert learning_curve.concatenate([curve(4, 5)]) == [curve(4, 5)]


@pytest.mark.parametrize("baseline", [0.09, 0.1, 0.12, 0.6])
def test_labels_of_close_levels_do_not_overlap(baseline):
    line = {"eval/epoch": 0, "eval/stage": 0, "eval/loss": 1.0}
    line |= {"eval/acc": 0.5, "eval/acc_low": 0.4, "eval/acc_high": 0.6}
    curve = learning_curve.Curve(steps=[(0.5, 1.0), (1.0, 0.9)], evaluations=[line])
    figure = learning_curve.draw_learning_curve([curve], 0.1, ("answering at once", baseline))
    figure.canvas.draw()
    one, other = (text.get_window_extent() for text in figure.axes[1].texts)
    assert not one.overlaps(other)


def test_consecutive_runs_are_drawn(finished, tmp_path, capsys):
    out = tmp_path / "curve.png"
    runs = [str(finished / name) for name in ("cot", "coconut")]
    assert learning_curve.main([*runs, "--out", str(out), "--chance", "0.1"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    figure = learning_curve.draw_learning_curve(
        [learning_curve.read_curve(Path(name)) for name in runs], chance=0.1
    )
    top, bottom = figure.axes
    stages = [text.get_text() for text in top.texts]
    assert stages == [f"stage {stage}" for stage in range(4)]
    assert bottom.get_xlim() == (0, 4)


def test_the_figure_of_the_method_is_drawn(tmp_path):
    draw_method.main(["--out", str(tmp_path / "coconut.png")])
    assert (tmp_path / "coconut.png").stat().st_size > 50_000
    assert (ROOT / "assets" / "coconut.png").stat().st_size > 50_000


def test_a_failing_command_ends_the_quickstart_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        quickstart, "train_all", lambda out, seed: quickstart.run_to_end(["-c", "exit(2)"])
    )
    assert quickstart.main(["--out", str(tmp_path)]) == 2


def test_a_quickstart_without_runs_reports_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "train_all", lambda out, seed: None)
    assert quickstart.main(["--out", str(tmp_path)]) == 2
    assert "config.yaml: No such file" in capsys.readouterr().err


def test_an_interruption_stops_the_runs_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    started = []

    def interrupted(out, seed):
        with quickstart.started(["-c", "import time; time.sleep(600)"], out / "log") as process:
            started.append(process)
            raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train_all", interrupted)
    assert quickstart.main(["--out", str(tmp_path)]) == quickstart.EXIT_INTERRUPTED
    assert "the same command resumes from here" in capsys.readouterr().err
    assert started[0].returncode is not None
