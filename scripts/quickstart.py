"""What `make quickstart` does: from nothing to a model that reasons in latent thoughts, measured.

It makes the questions and a tiny untrained model, trains it with the very commands a user would
type (CoT, then Coconut; beside them, on a second core, the baseline that answers at once), and ends
with a summary in plain words. Everything but the questions lies under one folder. Started again, it
goes on where it stopped. Settings of the runs are in cpu_args/quickstart_*.yaml, and what is
measured at the end is analysis/thoughts.py's and analysis/learning_curve.py's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `python scripts/quickstart.py` looks for modules in scripts/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.learning_curve import Curve, read_curve, save_learning_curve
from analysis.thoughts import ThoughtReport, examine
from dataset import read_records
from engine.config_file import load_config
from utils import ConfigError, UserError, atomic_write_text

DEFAULT_OUT = Path("exps/quickstart")
RUNS = ("cot", "coconut", "no_cot")
CHANCE = 0.1
PICTURE_NAME = "learning_curve.png"
EXIT_INTERRUPTED = 130


class StepFailed(Exception):
    """A command ended with the given status, which is not 0; it has said why itself."""


def overrides(run: str, out: Path, seed: int) -> list[str]:
    """The arguments after the YAML that move a run to another folder or seed; mostly none."""
    stored = load_config(config_path(run))
    values = []
    if out != DEFAULT_OUT:
        values += [f"save_path={out}", f"model_id={out / 'model'}"]
        if stored.load_model_path is not None:
            moved = out / Path(stored.load_model_path).relative_to(DEFAULT_OUT)
            values.append(f"load_model_path={moved}")
    if seed != stored.seed:
        values.append(f"seed={seed}")
    return values


def config_path(run: str) -> str:
    return f"cpu_args/quickstart_{run}.yaml"


@contextmanager
def started(arguments: list[str], log: Path | None = None) -> Iterator[subprocess.Popen]:
    """`python ARGUMENTS` on one thread, shown before it starts; `log` takes what it prints.

    A block that fails or is interrupted asks the process to stop, and waits until it has saved.
    """
    print(f"\n$ python {' '.join(arguments)}" + (f" > {log}" if log else ""), flush=True)
    # More threads do not help matrices this small, and two runs share two cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = open(log, "w", encoding="utf-8") if log else None  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=output, stderr=output
    )
    try:
        yield process
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if output:
            output.close()


def run_to_end(arguments: list[str]) -> None:
    """Run `python ARGUMENTS`; raises StepFailed unless it ends well."""
    with started(arguments) as process:
        finish(process)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process; raises StepFailed unless it ends well."""
    if process.wait():
        raise StepFailed(process.returncode)


def train_all(out: Path, seed: int) -> None:
    """Make questions and model, then train all three runs, or go on with them."""
    run_to_end(["preprocessing/arithmetic.py"])
    run_to_end(
        ["assets/make_quickstart_model.py", "--out", str(out / "model"), "--weights", str(seed)]
    )
    commands = {run: ["run.py", config_path(run), *overrides(run, out, seed)] for run in RUNS}
    log = out / "no_cot.log"
    with started(commands["no_cot"], log) as baseline:
        for run in ("cot", "coconut"):
            run_to_end(commands[run])
        print("\nwaiting for the baseline, which runs beside", flush=True)
        try:
            finish(baseline)
        except StepFailed:
            print(log.read_text(encoding="utf-8"), file=sys.stderr)
            raise


def last_of_each_stage(curve: Curve) -> list[dict]:
    """The evaluation after the last epoch of each stage."""
    return list({line["eval/stage"]: line for line in curve.evaluations}.values())


def table(*rows: tuple[str, ...]) -> list[str]:
    """A Markdown table whose columns line up in plain text too; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = (rows[0], tuple("-" * width for width in widths), *rows[1:])
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def accuracy_cells(figures: dict) -> tuple[str, str]:
    """Accuracy and its interval; the names may stand with or without eval/."""
    acc, low, high = (
        100 * figures.get(name, figures.get(f"eval/{name}"))
        for name in ("acc", "acc_low", "acc_high")
    )
    return f"{acc:.1f} %", f"{low:.1f} to {high:.1f}"


def stage_section(evaluations: list[dict], num_steps: int) -> list[str]:
    """Accuracy at the end of each stage."""
    rows = []
    for line in evaluations:
        stage = line["eval/stage"]
        rows.append((str(stage), str(num_steps - stage), str(stage), *accuracy_cells(line)))
    head = ("stage", "steps written", "thoughts", "right answers", "95 % interval")
    return ["## Stage by stage, thoughts take the place of written steps", "", *table(head, *rows)]


def thought_section(thoughts: ThoughtReport, baseline: dict, share: float) -> list[str]:
    """What the thoughts are good for, and what they hold."""
    names = {
        "own": "its own thoughts",
        "zero": "zeros for thoughts",
        "other": "another question's thoughts",
    }
    rows = [(names[key], *accuracy_cells(thoughts.figures[key])) for key in names]
    rows.append(("no thoughts: the baseline", *accuracy_cells(baseline)))
    readings = [
        f"thought {i} is step {i} in {100 * a:.0f} %" for i, a in enumerate(thoughts.agreement, 1)
    ]
    return [
        "## What the thoughts contribute",
        "",
        *table(("the last model reads", "right answers", "95 % interval"), *rows),
        "",
        "The baseline is the same model, trained to answer at once, without steps or thoughts. It",
        f"trained for about the same time and saw {share:.1f} times as many examples.",
        "",
        "Scored with the model's own output layer, a thought can be read as a number:",
        f"{', '.join(readings)} of the questions.",
    ]


def sample_section(sample: dict, words: list[str], steps: list[str]) -> list[str]:
    """One held-out question and what the last model made of it."""
    verdict = "right" if sample["correct"] else f"wrong, it is {sample['gold']}"
    return [
        "## A question it never trained on",
        "",
        f"    question   {sample['question']}",
        f"    thoughts   {' '.join(words)}   (as numbers; the steps are {' '.join(steps)})",
        f"    it writes  {sample['text']}   ({verdict})",
    ]


def summarize(out: Path, began: float) -> str:
    """Measure the finished runs under `out`; writes picture and summary there, returns the latter.

    began: the time.monotonic() at which the quickstart started.

    Raises: UserError where a run is missing or unfinished.
    """
    config = load_config(out / "coconut" / "config.yaml")
    checkpoint, picture = out / "coconut" / f"checkpoint_{config.num_epochs}", out / PICTURE_NAME
    thoughts = examine(checkpoint)
    curves = {run: read_curve(out / run) for run in RUNS}
    cot, coconut, baseline = (curves[run].evaluations[-1] for run in RUNS)
    epoch = coconut["eval/epoch"]
    predictions = out / "coconut" / f"predictions_{epoch}.jsonl"
    sample = json.loads(predictions.read_text(encoding="utf-8").partition("\n")[0])
    steps = read_records(config.val_path)[sample["index"]]["steps"]
    stages = [*last_of_each_stage(curves["cot"]), *last_of_each_stage(curves["coconut"])]
    share = baseline["step"] / (cot["step"] + coconut["step"])
    reference = ("answering at once", baseline["eval/acc"])
    save_learning_curve([out / "cot", out / "coconut"], picture, CHANCE, reference)
    minutes = (time.monotonic() - began) / 60
    sections = [
        [
            "# Quickstart: what the model learned",
            "",
            f"A question is a sum on a clock with ten hours: {sample['question']}",
            f"These {coconut['eval/num_records']} were kept out of training. Guessing is right in"
            f" {100 * CHANCE:.0f} %.",
        ],
        stage_section(stages, len(steps)),
        thought_section(thoughts, baseline, share),
        sample_section(sample, thoughts.words[sample["index"]], steps),
        [
            "## Where to look",
            "",
            f"    learning curve   {picture}",
            f"    last checkpoint  {checkpoint}",
            f"    every answer     {predictions}",
            f"    this summary     {out / 'summary.md'}",
            "",
            f"All this took {minutes:.1f} minutes. Delete {out} to start afresh.",
        ],
    ]
    summary = "\n\n".join("\n".join(section) for section in sections)
    atomic_write_text(out / "summary.md", summary + "\n")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help=f"folder of all products ({DEFAULT_OUT})"
    )
    options = parser.parse_args(argv)
    out, began = options.out, time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        train_all(out, options.seed)
        print("\nmeasuring what the thoughts contribute", flush=True)
        summary = summarize(out, began)
    except StepFailed as failure:
        return failure.args[0]
    except (UserError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{summary}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
