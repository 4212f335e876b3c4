"""Run a study: every arm over every seed, from one YAML file, with results that can be committed.

    python scripts/reproduce.py args/studies/window_lags.yaml --jobs 2

Runs go seed by seed, prerequisites first, so that any stop leaves complete pairs. Each runs in its
own process on one thread; an interrupted one resumes. When a run ends, its outcomes
are measured and written to results/STUDY/; from there the study resumes on another machine, and
analysis/compare.py rebuilds tables and figures. The source must be committed: the arms of a seed
share commit and machine, so work on a study in a worktree of its own
(`git worktree add --detach ../study`). analysis/study.py says what a study is.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

# `python scripts/reproduce.py` looks for modules in scripts/ alone.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from analysis.ablations import accuracy_with_zeroed_thoughts
from analysis.cost import cost_table
from analysis.results import (
    RunResult,
    encode_bits,
    epochs_of,
    epochs_to,
    read_metrics,
    read_predictions,
    read_result,
    result_path,
    step_evaluations_of,
    write_result,
)
from analysis.study import Run, Study
from engine.config import Config
from engine.config_file import dump_yaml, load_config
from engine.distributed import environment_of_script_runs
from engine.provenance import provenance
from utils import (
    RunFailed,
    UserError,
    atomic_write_text,
    configure_logging,
    log,
    run_command,
    sha256_file,
)

# Where a group of runs records the commit and the machine that it began with.
ORIGIN_NAME = "origin.txt"
DATA_KEYS = ("train_path", "val_path")


class Runner:
    """Runs the missing runs of a study.

    results: folder of the study's result files.
    """

    def __init__(self, study: Study, results: Path, origin: dict):
        self.study = study
        self.results = results
        self.origin = origin
        self.processes: set[subprocess.Popen] = set()
        self.stopping = threading.Event()
        self.preparing = threading.Lock()

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs still to be done, in order; complete groups and finished runs are left out.

        A group that is incomplete and began with another commit or machine is discarded whole.
        """
        groups: dict[tuple, list[Run]] = {}
        for run in runs:
            groups.setdefault(run.group, []).append(run)
        missing = []
        for group in groups.values():
            arms = [run for run in group if not run.is_prerequisite]
            if all(self._is_finished(run) for run in arms):
                continue
            if not all(self._matches_origin(run) for run in group):
                self._discard(group)
            todo = [run for run in arms if not self._is_finished(run)]
            needed = {name for run in todo for name in run.needs}
            missing += [
                run
                for run in group
                if run in todo or (run.arm in needed and not self._can_start_others(run))
            ]
        return missing

    def _result(self, run: Run) -> RunResult | None:
        path = result_path(self.results, run.condition, run.arm, run.seed)
        return read_result(path) if path.exists() else None

    def _is_finished(self, run: Run) -> bool:
        """Whether a result of the current configuration and data exists."""
        result = self._result(run)
        if result is None or _differences(result.config, self.study.config(run)):
            return False
        return all(
            not os.path.exists(result.config[key])
            or sha256_file(Path(result.config[key])) == result.data[key]["sha256"]
            for key in result.data
        )

    def _matches_origin(self, run: Run) -> bool:
        """Whether nothing of the run, finished or not, is from another commit or machine."""
        result = self._result(run)
        origin = run.folder / ORIGIN_NAME
        began = origin.read_text(encoding="utf-8") if origin.exists() else self._origin_text()
        is_same = result is None or (
            result.commit == self.origin["commit"] and result.machine == self.origin["machine"]
        )
        return is_same and began == self._origin_text()

    def _origin_text(self) -> str:
        return f"{self.origin['commit']}\n{self.origin['machine']}\n"

    def _can_start_others(self, run: Run) -> bool:
        config = self.study.config(run)
        return (
            self._is_finished(run)
            and (run.run_dir / f"checkpoint_{config.num_epochs}" / "coconut.json").is_file()
        )

    def _discard(self, group: Iterable[Run]) -> None:
        for run in group:
            result_path(self.results, run.condition, run.arm, run.seed).unlink(missing_ok=True)
            shutil.rmtree(run.run_dir, ignore_errors=True)
            (run.folder / ORIGIN_NAME).unlink(missing_ok=True)
            log.info(f"{run.label}: starts over, its seed was begun at another commit or machine")

    def run_all(self, runs: Sequence[Run], jobs: int) -> None:
        """Run `runs`, at most `jobs` at once; each waits for what it starts from.

        Raises: RunFailed for the first run that fails; those that are running are stopped first.
        """
        waiting, running, done = list(runs), {}, set()
        times: dict[str, list[float]] = {}
        pending = {(run.group, run.arm) for run in runs}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while waiting or running:
                    for run in [r for r in waiting if self._is_ready(r, pending, done)]:
                        if len(running) >= jobs:
                            break
                        waiting.remove(run)
                        running[pool.submit(self._run_one, run)] = run
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        self._after(future, running.pop(future), times, done, waiting, jobs)
            except BaseException:
                self.stop()
                raise

    def _is_ready(self, run: Run, pending: set, done: set) -> bool:
        needed = {(run.group, name) for name in run.needs} & pending
        return needed <= done

    def _after(
        self, future: Future, run: Run, times: dict, done: set, waiting: list[Run], jobs: int
    ) -> None:
        """Count a finished run and log it with the remaining time."""
        result = future.result()
        done.add((run.group, run.arm))
        times.setdefault(run.arm, []).append(result.seconds)
        known = [seconds for values in times.values() for seconds in values]
        mean = sum(known) / len(known)
        left = sum(
            sum(times[r.arm]) / len(times[r.arm]) if r.arm in times else mean for r in waiting
        )
        log.info(
            f"{run.label}: {100 * result.last.acc:.1f} % after stage {result.last.stage},"
            f" {result.seconds:.0f} s; {len(waiting)} to start, about {left / jobs / 60:.0f} min"
        )

    def stop(self) -> None:
        """Ask every running process to save and end, and wait for it."""
        self.stopping.set()
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in list(self.processes):
            process.wait()

    def _run_one(self, run: Run) -> RunResult:
        """Train one run to its end, measure its outcomes, write its result, clean up."""
        began = time.monotonic()
        self._prepare(run)
        config = self.study.config(run)
        text = f"base: {Path(os.path.relpath(run.base, run.folder))}\n"
        text += dump_yaml(dict(run.overrides))
        yaml = run.folder / f"{run.arm}.yaml"
        atomic_write_text(yaml, text)
        self._process(["run.py", str(yaml)], run.folder / f"{run.arm}.log", run)
        result = self._measure(run, time.monotonic() - began)
        write_result(self.results, result)
        shutil.rmtree(run.run_dir / "resume", ignore_errors=True)
        for path in run.run_dir.glob("predictions_*.jsonl"):
            if path.name != f"predictions_{config.num_epochs - 1}.jsonl":
                path.unlink()
        return result

    def _prepare(self, run: Run) -> None:
        """Make data and model of the run's group, once.

        Raises: UserError where the configuration then names data that do not exist.
        """
        with self.preparing:
            run.folder.mkdir(parents=True, exist_ok=True)
            origin = run.folder / ORIGIN_NAME
            if not origin.exists():
                for command in run.commands:
                    self._process(command, run.folder / "prepare.log", run)
                atomic_write_text(origin, self._origin_text())
        config = self.study.config(run)
        for key in DATA_KEYS:
            if not os.path.exists(getattr(config, key)):
                raise UserError(
                    f"{self.study.path}: {key}: {getattr(config, key)} does not exist, and no"
                    " command under `prepare` made it"
                )

    def _process(self, command: list[str], log_path: Path, run: Run) -> None:
        """Run a Python script of this repository on one thread, its output in `log_path`.

        Raises: RunFailed when it fails, with the end of its output.
        """
        with open(log_path, "a", encoding="utf-8") as output:
            script, *arguments = command
            process = subprocess.Popen(
                [sys.executable, str(ROOT / script), *arguments],
                env=environment_of_script_runs(),
                stdout=output,
                stderr=output,
            )
            self.processes.add(process)
            try:
                if self.stopping.is_set():
                    process.send_signal(signal.SIGTERM)
                status = process.wait()
            finally:
                self.processes.discard(process)
        if status:
            last = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise RunFailed(
                f"{run.label}: {' '.join(command)} ended with status {status}; {log_path} ends"
                " with\n" + "\n".join(f"  {line}" for line in last)
            )

    def _measure(self, run: Run, seconds: float) -> RunResult:
        """The result of a finished run, its outcomes measured.

        Raises: RunFailed where the run's own config.yaml is not what the study asked for.
        """
        config = self.study.config(run)
        resolved = load_config(run.run_dir / "config.yaml").model_dump(mode="json")
        if keys := _differences(resolved, config):
            raise RunFailed(f"{run.label}: the run resolved {', '.join(keys)} to other values")
        lines = read_metrics(run.run_dir)
        epochs = epochs_of(lines)
        rows = read_predictions(run.run_dir / f"predictions_{epochs[-1].epoch}.jsonl")
        asked = self.study.file.outcomes
        reached = epochs_to(asked.threshold, epochs)
        outcomes = {
            "last_stage_accuracy": epochs[-1].acc,
            "epochs_to_threshold": {str(stage): count for stage, count in reached.items()},
        }
        has_thoughts = config.coconut and config.thought == "continuous"
        if asked.zeroed_thoughts and has_thoughts:
            checkpoint = run.run_dir / f"checkpoint_{epochs[-1].epoch + 1}"
            outcomes["accuracy_zeroed_thoughts"] = accuracy_with_zeroed_thoughts(
                checkpoint,
                config.val_path,
                config.max_new_tokens,
                config.batch_size_eval or config.batch_size_training,
            )
        return RunResult(
            study=self.study.name,
            condition=run.condition,
            block=run.block,
            is_prerequisite=run.is_prerequisite,
            arm=run.arm,
            seed=run.seed,
            commit=self.origin["commit"],
            changed=self.origin["changed"],
            machine=self.origin["machine"],
            versions=self.origin["versions"],
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(seconds, 1),
            config=resolved,
            data={key: _sums(getattr(config, key)) for key in DATA_KEYS},
            epochs=epochs,
            steps=step_evaluations_of(lines),
            num_records=len(rows),
            correct=encode_bits([row["correct"] for row in rows]),
            outcomes=outcomes,
        )


def _differences(resolved: dict, config: Config) -> list[str]:
    """The keys in which a finished run differs from its study's configuration.

    A run may fill in what the study leaves open (None).
    """
    asked = config.model_dump(mode="json")
    is_open = {key for key, value in asked.items() if value is None}
    return [
        key for key, value in asked.items() if key not in is_open and resolved.get(key) != value
    ]


def _sums(path: str) -> dict:
    """What identifies a data file."""
    return {"sha256": sha256_file(Path(path)), "bytes": os.path.getsize(path)}


def check_source(origin: dict) -> None:
    """Raise UserError where the source is not exactly that of a commit."""
    if origin["changed"]:
        raise UserError(
            "the source differs from its last commit, so results could not be traced to it; commit"
            " the change, or run the study in a worktree of its own: git worktree add --detach"
            " ../study && cd ../study"
        )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "study", type=Path, help="YAML file of a study, such as those in args/studies/"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="folder (default: results)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the runs and what they cost, then stop"
    )
    parser.add_argument(
        "--flops-per-second", type=float, metavar="RATE",
        help="with --dry-run: also give the hours at this rate, such as 4e14",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    options = parse_arguments(argv)
    configure_logging()
    # A stop of the whole process group must reach the runs only through this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> None:
        study = Study(options.study)
        runs = study.runs(options.arms, options.seeds)
        study.check(runs)
        origin = provenance()
        results = options.results / study.name
        runner = Runner(study, results, origin)
        if options.dry_run:
            print(cost_table(study, runs, results, origin["machine"], options.flops_per_second))
            return
        check_source(origin)
        missing = runner.missing(runs)
        log.info(f"{study.file.question}\n{len(missing)} of {len(runs)} runs to do")
        runner.run_all(missing, options.jobs)
        log.info(f"results: {results}; compare them: python -m analysis.compare {results}")

    return run_command(work, "the same command continues")


if __name__ == "__main__":
    raise SystemExit(main())
