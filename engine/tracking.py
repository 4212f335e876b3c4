"""Where a run's numbers and words go: the console, metrics.jsonl and, if wanted, wandb.

Carries out the logging of SPEC sections 9 and 10. What is logged, and under which name, is
decided by training.py and evaluation.py. metrics.jsonl is the record: every `log` appends a line
there first. Logging stops no run: wandb may be absent, unreachable or without a key, and lines that
a full disk refuses wait in memory.
"""

import contextlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils import atomic_write_text

# wandb waits this long for its server before the run goes on offline.
WANDB_TIMEOUT_S = 30
# About 5 MB of memory; then the oldest give way.
MAX_WAITING_LINES = 20_000


class Tracker:
    """Logs one run. Every rank makes one; ranks other than 0 write and show nothing.

    run_dir: folder of metrics.jsonl and of wandb's files; None saves nothing, wandb included.
    config_dict: the resolved configuration, shown in wandb.
    wandb_mode: "online", "offline" or "disabled"; online falls back to offline, with a notice.
    wandb_id: the id of the run to continue there, as `wandb_id` gave it before; None is a new one.
    Source: SPEC sections 9 and 10.
    """

    def __init__(
        self,
        run_dir: Path | None,
        config_dict: dict[str, Any],
        project: str,
        name: str,
        wandb_mode: str,
        is_main: bool,
        wandb_id: str | None = None,
    ) -> None:
        self.is_main = is_main
        self.wandb_id = wandb_id
        self._wandb_run = None
        self._metrics_path = None
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._num_lost = 0
        self._is_refused = False
        if not is_main or run_dir is None:
            return
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self._metrics_path = Path(run_dir) / "metrics.jsonl"
        self._drop_torn_line()
        if wandb_mode != "disabled":
            self._start_wandb(Path(run_dir), config_dict, project, name, wandb_mode)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Records `metrics` at optimizer step `step`, as one line {"step": step, ...} and in wandb.

        Values are numbers, text or nested lists and dicts of them, NumPy and torch scalars
        included. JSON knows no infinity: a non-finite number is written as null.
        """
        self._append({"step": step, **metrics})
        self._guarded(lambda run: run.log({"step": step, **metrics}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table of what the run begins with, as a line of its first step and in wandb."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._append({"step": 1, name: content})
        self._guarded(send)

    def message(self, text: str) -> None:
        """Prints a line that stays above progress bars, on rank 0's standard output."""
        if self.is_main:
            # Nor does a console that takes no more: there is nowhere to tell of it.
            with contextlib.suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def truncate(self, step: int, epoch: int | None = None) -> None:
        """Drops the lines of metrics.jsonl past optimizer step `step`, when a run resumes there.

        epoch: the epoch that the run goes on in; an evaluation of it will be made again, so its
            line goes too. None keeps all evaluations.
        Lines that `log` cannot have written (a crash tears the last one) go too, with a notice; so
        does a file that ends too early (a crash while lines waited) not pass unnoticed. The file is
        replaced whole: an interruption leaves the old one.
        """
        if self._metrics_path is None or not self._metrics_path.exists():
            return
        lines = self._metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        entries = [(line, _entry(line)) for line in lines if line.strip()]
        unreadable = sum(entry is None for _, entry in entries)
        if unreadable:
            self.message(f"{self._metrics_path}: dropped {unreadable} unreadable line(s)")
        kept = [
            (line, entry.get("step", 0))
            for line, entry in entries
            if entry is not None
            and entry.get("step", 0) <= step
            and (epoch is None or entry.get("eval/epoch", -1) < epoch)
        ]
        last = max((number for _, number in kept), default=0)
        if last < step < sys.maxsize:
            self.message(f"{self._metrics_path}: what followed step {last} up to {step} was lost")
        atomic_write_text(self._metrics_path, "".join(line + "\n" for line, _ in kept))

    def close(self) -> None:
        """Ends the wandb run, which waits for what is still being sent. May be called twice.

        Lines that still cannot be written are counted aloud.
        """
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            lost = self._num_lost + len(self._waiting)
            self.message(f"{self._metrics_path}: {lost} line(s) could not be written and are lost")
            self._waiting.clear()
        self._guarded(lambda run: run.finish())
        self._wandb_run = None

    def _append(self, entry: dict[str, Any]) -> None:
        if self._metrics_path is None:
            return
        self._num_lost += len(self._waiting) == MAX_WAITING_LINES
        self._waiting.append(json.dumps(_plain(entry), allow_nan=False) + "\n")
        self._write_waiting()

    def _write_waiting(self) -> None:
        """Appends the waiting lines, all or none; tells when the disk begins and ceases to refuse.

        The lines are kept in order, so the file never has a gap but at what was lost.
        """
        path = self._metrics_path
        try:
            _append_whole(path, "".join(self._waiting))
        except OSError as error:
            if not self._is_refused:
                self.message(
                    f"{path}: cannot be written ({error.strerror}); training goes on, up to"
                    f" {MAX_WAITING_LINES} lines wait in memory until it can"
                )
            self._is_refused = True
            return
        if self._is_refused:
            late, lost = len(self._waiting), self._num_lost
            self.message(f"{path}: written again, {late} line(s) late, {lost} lost")
        self._waiting.clear()
        self._num_lost, self._is_refused = 0, False

    def _drop_torn_line(self) -> None:
        """Mends a file that ends inside a line, lest the next line is glued to the torn one."""
        if self._metrics_path.exists() and self._metrics_path.read_bytes()[-1:] not in (b"", b"\n"):
            self.truncate(sys.maxsize)

    def _start_wandb(
        self, run_dir: Path, config_dict: dict[str, Any], project: str, name: str, mode: str
    ) -> None:
        try:
            import wandb
        except ImportError:
            self.message(
                f"wandb={mode!r} but wandb is not installed; metrics.jsonl alone is written "
                "(pip install wandb, or write wandb: disabled)"
            )
            return
        wished = os.environ.get("WANDB_MODE", mode)
        if mode == "online" and wished in ("offline", "disabled"):
            self.message(f"wandb='online' but WANDB_MODE={wished} in the environment: {wished}")
            mode = wished
        if mode == "disabled":
            return
        if mode == "online" and not self._has_wandb_key(wandb):
            self.message("wandb='online' but no key is stored (wandb login): going offline")
            mode = "offline"
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self._wandb_run = wandb.init(
                    project=project,
                    name=name,
                    config=config_dict,
                    dir=str(run_dir),
                    mode=attempt,
                    id=self.wandb_id,
                    # Offline files cannot know what the server holds; `wandb sync` appends by id.
                    resume="allow" if attempt == "online" else None,
                    settings=wandb.Settings(init_timeout=WANDB_TIMEOUT_S),
                )
                # A resumed run logs some steps again, which wandb's own counter would refuse.
                self._wandb_run.define_metric("*", step_metric="step")
                self.wandb_id = self._wandb_run.id
                return
            except Exception as error:
                self._wandb_run = None
                self.message(f"wandb did not start {attempt}: {_first_line(error)}")
                # Its background service would still hold the run's id.
                wandb.teardown()

    def _has_wandb_key(self, wandb: Any) -> bool:
        try:
            # Looks into environment, settings and netrc; the prompt it could open would hang a job.
            return bool(wandb.login(prompt=False, verify=False))
        except Exception as error:
            self.message(f"wandb cannot log in: {_first_line(error)}")
            return False

    def _guarded(self, action: Callable[[Any], None]) -> None:
        """Does something with the wandb run; the first failure is told and ends wandb's part."""
        if self._wandb_run is None:
            return
        try:
            action(self._wandb_run)
        except Exception as error:
            self._wandb_run = None
            self.message(f"wandb stopped, metrics.jsonl goes on: {_first_line(error)}")


def _append_whole(path: Path, text: str) -> None:
    """Appends `text` or nothing: a disk that fills up takes the beginning and refuses the rest."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _plain(value: Any) -> Any:
    """`value` in JSON's own types, scalars of NumPy and torch unpacked, non-finite numbers None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _plain(value.item())
    return value


def _entry(line: str) -> dict[str, Any] | None:
    """The line as `log` wrote it, None for anything else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    positions = (entry.get("step", 0), entry.get("eval/epoch", 0))
    return entry if all(isinstance(position, int) for position in positions) else None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
