"""Train and measure a tiny model that reasons in latent thoughts: what `make quickstart` runs.

It makes the questions and a tiny untrained model, trains it with the same commands a user would
type (CoT, then Coconut; meanwhile, on a second core, the baseline that answers at once), and prints
a summary and where its report lies, a page to look into. Everything but the questions goes into one
folder. Started again, it resumes where it stopped. The runs are configured in
cpu_args/quickstart_*.yaml; analysis/report.py and analysis/learning_curve.py do the measuring.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# `python scripts/quickstart.py` looks for modules in scripts/ alone.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.ablation_output import IN_WORDS
from analysis.learning_curve import Curve, read_curve, save_learning_curve
from analysis.report import measure, write_report
from analysis.tables import markdown_table
from dataset import read_records
from engine.config_file import as_override, load_config
from engine.distributed import environment_of_script_runs
from utils import ConfigError, UserError, atomic_write_text

DEFAULT_OUT = Path("exps/quickstart")
RUNS = ("cot", "coconut", "no_cot")
CHANCE = 0.1
PLOT_NAME = "learning_curve.png"
EXIT_INTERRUPTED = 130


class CommandFailed(Exception):
    """A command ended with this nonzero status, after reporting the reason itself."""


def overrides(run: str, out: Path, seed: int) -> list[str]:
    """The overrides that give a run another folder or seed; empty for the defaults."""
    stored = load_config(config_path(run))
    values = []
    if out != DEFAULT_OUT:
        values += [as_override("save_path", str(out)), as_override("model_id", str(out / "model"))]
        if stored.load_model_path is not None:
            moved = out / Path(stored.load_model_path).relative_to(DEFAULT_OUT)
            values.append(as_override("load_model_path", str(moved)))
    if seed != stored.seed:
        values.append(f"seed={seed}")
    return values


def config_path(run: str) -> str:
    return f"cpu_args/quickstart_{run}.yaml"


@contextmanager
def started(arguments: list[str], log: Path | None = None) -> Iterator[subprocess.Popen]:
    """Print and start `python ARGUMENTS` on one thread; output goes to the file `log`, if given.

    If the block fails or is interrupted, the process is asked to stop and saves before it ends.
    """
    print(f"\n$ python {' '.join(arguments)}" + (f" > {log}" if log else ""), flush=True)
    output = open(log, "w", encoding="utf-8") if log else None  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment_of_script_runs(),
        stdout=output,
        stderr=output,
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
    """Run `python ARGUMENTS` to its end.

    Raises: CommandFailed if its exit status is not 0.
    """
    with started(arguments) as process:
        finish(process)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process to end.

    Raises: CommandFailed if its exit status is not 0.
    """
    if process.wait():
        raise CommandFailed(process.returncode)


def train_all(out: Path, seed: int) -> None:
    """Make the questions and the model, then train all three runs, or resume them."""
    run_to_end(["preprocessing/arithmetic.py"])
    run_to_end(
        ["assets/make_quickstart_model.py", "--out", str(out / "model"), "--weights", str(seed)]
    )
    commands = {run: ["run.py", config_path(run), *overrides(run, out, seed)] for run in RUNS}
    log = out / "no_cot.log"
    with started(commands["no_cot"], log) as baseline:
        for run in ("cot", "coconut"):
            run_to_end(commands[run])
        print("\nwaiting for the baseline to finish", flush=True)
        try:
            finish(baseline)
        except CommandFailed:
            print(log.read_text(encoding="utf-8"), file=sys.stderr)
            raise


def last_of_each_stage(curve: Curve) -> list[dict]:
    """The evaluation after the last epoch of each stage."""
    return list({line["eval/stage"]: line for line in curve.evaluations}.values())


def accuracy_cells(figures: dict) -> tuple[str, str]:
    """Accuracy and its interval, from a line of metrics.jsonl or of ablations.json."""
    names = ("eval/acc", "eval/acc_low", "eval/acc_high")
    if "acc" in figures:
        names = ("acc", "low", "high")
    acc, low, high = (100 * figures[name] for name in names)
    return f"{acc:.1f} %", f"{low:.1f} to {high:.1f}"


def stage_section(evaluations: list[dict], num_steps: int) -> list[str]:
    """Accuracy at the end of each stage."""
    rows = []
    for line in evaluations:
        stage = line["eval/stage"]
        rows.append((str(stage), str(num_steps - stage), str(stage), *accuracy_cells(line)))
    head = ("stage", "steps written", "thoughts", "accuracy", "95 % interval")
    return [
        "## Stage by stage, thoughts replace the written steps",
        "",
        *markdown_table([head, *rows]),
    ]


def thought_section(ablations: dict, probes: dict, baseline: dict, share: float) -> list[str]:
    """What the thoughts contribute, and what they encode."""
    rows = [("its own thoughts", *accuracy_cells(ablations["own"]))]
    rows += [
        (IN_WORDS[entry["name"]], *accuracy_cells(entry))
        for entry in ablations["replacements"]
        if entry["name"] in ("zeros", "other_record")
    ]
    rows.append(("no thoughts: the baseline", *accuracy_cells(baseline)))
    readings = [
        f"thought {entry['k']} is step {entry['step']} in"
        f" {100 * entry['gold_step_word']['mean']:.0f} %"
        for entry in probes["thoughts"]
    ]
    return [
        "## What the thoughts contribute",
        "",
        *markdown_table([("the final model reads", "accuracy", "95 % interval"), *rows]),
        "",
        "The baseline is the same model, trained to answer at once, without steps or thoughts. It",
        f"trained for about the same time, on {share:.1f} times as many examples.",
        "",
        "Scored with the model's own output layer, a thought can be read as a number:",
        f"{', '.join(readings)} of the questions.",
    ]


def sample_section(sample: dict, words: list[str], steps: list[str]) -> list[str]:
    """One held-out question and the final model's answer to it."""
    verdict = "correct" if sample["correct"] else f"wrong, the answer is {sample['gold']}"
    return [
        "## A held-out question",
        "",
        f"    question   {sample['question']}",
        f"    thoughts   {' '.join(words)}   (as numbers; the steps are {' '.join(steps)})",
        f"    output     {sample['text']}   ({verdict})",
    ]


def summarize(out: Path, began: float) -> str:
    """Measure the finished runs under `out`, write plot and summary there, and return the summary.

    began: time.monotonic() when the quickstart started.

    Raises: UserError if a run is missing or unfinished.
    """
    config = load_config(out / "coconut" / "config.yaml")
    checkpoint, plot = out / "coconut" / f"checkpoint_{config.num_epochs}", out / PLOT_NAME
    measured = measure(checkpoint)
    ablations, probes = measured["ablations"], measured["probes"]
    report = write_report(checkpoint, baselines=[out / "cot", out / "no_cot"])
    curves = {run: read_curve(out / run) for run in RUNS}
    cot, coconut, baseline = (curves[run].evaluations[-1] for run in RUNS)
    epoch = coconut["eval/epoch"]
    predictions = out / "coconut" / f"predictions_{epoch}.jsonl"
    sample = json.loads(predictions.read_text(encoding="utf-8").partition("\n")[0])
    steps = read_records(config.val_path)[sample["index"]]["steps"]
    # Predictions lie in file order, so the first of them has its details.
    words = [thought["word"] for thought in probes["records"][sample["index"]]["thoughts"]]
    stages = [*last_of_each_stage(curves["cot"]), *last_of_each_stage(curves["coconut"])]
    share = baseline["step"] / (cot["step"] + coconut["step"])
    reference = ("answering at once", baseline["eval/acc"])
    save_learning_curve([out / "cot", out / "coconut"], plot, CHANCE, reference)
    minutes = (time.monotonic() - began) / 60
    sections = [
        [
            "# Quickstart: what the model learned",
            "",
            f"A question is a sum on a clock with ten hours: {sample['question']}",
            f"Accuracy is measured on {coconut['eval/num_records']} held-out questions. Guessing"
            f" gives {100 * CHANCE:.0f} %.",
        ],
        stage_section(stages, len(steps)),
        thought_section(ablations, probes, baseline, share),
        sample_section(sample, words, steps),
        [
            "## Files",
            "",
            f"    report (HTML)    {report}",
            f"    learning curve   {plot}",
            f"    last checkpoint  {checkpoint}",
            f"    predictions      {predictions}",
            f"    this summary     {out / 'summary.md'}",
            "",
            f"This took {minutes:.1f} minutes. Delete {out} to start over.",
        ],
    ]
    summary = "\n\n".join("\n".join(section) for section in sections)
    atomic_write_text(out / "summary.md", summary + "\n")
    return summary


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights and record order (0)")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help=f"folder for all output ({DEFAULT_OUT})"
    )
    options = parser.parse_args(argv)
    out, began = options.out, time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
        train_all(out, options.seed)
        print("\nmeasuring what the thoughts contribute", flush=True)
        summary = summarize(out, began)
    except CommandFailed as failure:
        return failure.args[0]
    except (UserError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(f"\n{summary}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
