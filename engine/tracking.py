"""Where a run's figures are logged: metrics.jsonl and, on request, wandb.

metrics.jsonl is the record: every `log` appends a line there first (docs/specification.md,
sections 9 and 10). What is logged, and under which name, is decided by trainer.py and
evaluation.py. Logging never stops a run: wandb may be absent, unreachable or without a key, and
lines that do not fit on a full disk wait in memory.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import atomic_write_text, log

# wandb waits this long for its server before the run continues offline.
WANDB_TIMEOUT_S = 30
# In order of how much is sent; wandb also calls offline dryrun.
WANDB_MODES = ("online", "offline", "disabled")


class Tracker:
    """Logs one run. Every rank makes one; ranks other than 0 write nothing.

    run_dir: folder of metrics.jsonl and of wandb's files; None saves nothing, wandb included.
    config_dict: the resolved configuration, shown in wandb.
    wandb_mode: "online", "offline" or "disabled"; online falls back to offline, with a warning, and
        WANDB_MODE in the environment can ask for less, never for more.
    wandb_id: the id of the run to continue there, as `wandb_id` gave it before; None is a new one.
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
        self.wandb_id = wandb_id
        self._wandb = self._wandb_run = self._metrics_path = None
        # Saving ends a run whose disk stays full, so at most an epoch's lines wait here.
        self._unwritten = ""
        if not is_main or run_dir is None:
            return
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self._metrics_path = Path(run_dir) / "metrics.jsonl"
        self._drop_torn_line()
        wandb_mode = _allowed_mode(wandb_mode)
        if wandb_mode != "disabled":
            self._start_wandb(Path(run_dir), config_dict, project, name, wandb_mode)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Records `metrics` at optimizer step `step`, as one line {"step": step, ...} and in wandb.

        Values are numbers, text or nested lists and dicts of them, NumPy and torch scalars
        included. JSON knows no infinity: a non-finite number is written as null.
        """
        self._record({"step": step, **metrics})

    def log_changed(self, facts: dict[str, Any], step: int) -> None:
        """`log`, unless metrics.jsonl already holds each fact as its latest value."""
        if self._metrics_path is None:
            return
        known = {}
        if self._metrics_path.exists():
            text = self._metrics_path.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                known |= _entry(line) or {}
        if {name: known.get(name) for name in facts} != facts:
            self._record({"step": step, **facts})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Records a table of what the run begins with, as a line of its first step and in wandb."""
        content = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._append(_to_line({"step": 1, name: content}))
        self._guarded(lambda run: run.log({name: self._wandb.Table(**content)}))

    def truncate(self, step: int, epoch: int | None = None) -> None:
        """Drops the lines of metrics.jsonl past optimizer step `step`, when a run resumes there.

        epoch: the epoch that the run resumes in; its evaluation is repeated at its end, so its line
            is dropped too. None keeps all evaluations. Evaluations within an epoch are made before
            the state of their step is saved: their lines stay up to `step`.
        Lines that `log` cannot have written (a crash tears the last one) are dropped too, and a
        file that ends too early (a crash while lines waited) is reported. The file is replaced
        whole: an interruption leaves the old one.
        """
        if self._metrics_path is None or not self._metrics_path.exists():
            return
        lines = self._metrics_path.read_text(encoding="utf-8", errors="replace").split("\n")
        entries = [(line, _entry(line)) for line in lines if line.strip()]
        unreadable = sum(entry is None for _, entry in entries)
        if unreadable:
            log.warning(f"{self._metrics_path}: dropped {unreadable} unreadable line(s)")
        kept = [
            (line, entry.get("step", 0))
            for line, entry in entries
            if entry is not None
            and entry.get("step", 0) <= step
            and (epoch is None or entry.get("eval/epoch", -1) < epoch)
        ]
        last = max((number for _, number in kept), default=0)
        if last < step < sys.maxsize:
            log.warning(f"{self._metrics_path}: the lines from step {last + 1} to {step} are lost")
        atomic_write_text(self._metrics_path, "".join(line + "\n" for line, _ in kept))

    def close(self) -> None:
        """Ends the wandb run, which waits for what is still being sent. May be called twice.

        Lines that still cannot be written are reported as lost.
        """
        if self._unwritten:
            self._append("")
        if self._unwritten:
            num_lines = self._unwritten.count("\n")
            log.error(
                f"{self._metrics_path}: {num_lines} line(s) could not be written and are lost"
            )
            self._unwritten = ""
        self._guarded(lambda run: run.finish())
        self._wandb_run = None

    def _record(self, entry: dict[str, Any]) -> None:
        self._append(_to_line(entry))
        self._guarded(lambda run: run.log(entry))

    def _append(self, line: str) -> None:
        """Appends all waiting lines and `line`, or nothing, so that the file never has a gap."""
        if self._metrics_path is None:
            return
        waited = bool(self._unwritten)
        self._unwritten += line
        try:
            _append_whole(self._metrics_path, self._unwritten)
        except OSError as error:
            if not waited:
                log.warning(
                    f"{self._metrics_path}: cannot be written ({error.strerror}); training"
                    " continues, and lines wait in memory until it can"
                )
            return
        if waited:
            num_lines = self._unwritten.count("\n")
            log.info(f"{self._metrics_path}: written again, {num_lines} line(s) at once")
        self._unwritten = ""

    def _drop_torn_line(self) -> None:
        """Truncates a file to its last whole line; the next line would continue a torn one."""
        if self._metrics_path.exists() and self._metrics_path.read_bytes()[-1:] not in (b"", b"\n"):
            self.truncate(sys.maxsize)

    def _start_wandb(
        self, run_dir: Path, config_dict: dict[str, Any], project: str, name: str, mode: str
    ) -> None:
        try:
            # An optional package that takes long to import.
            import wandb
        except ImportError:
            log.warning(
                f"wandb={mode!r} but wandb is not installed; only metrics.jsonl is written "
                "(pip install wandb, or write wandb: disabled)"
            )
            return
        self._wandb = wandb
        if mode == "online" and not self._has_wandb_key(wandb):
            log.warning("wandb='online' but no key is stored (wandb login); continuing offline")
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
                log.warning(f"wandb did not start {attempt}: {_first_line(error)}")
                # Its background service would still hold the run's id.
                wandb.teardown()

    def _has_wandb_key(self, wandb: Any) -> bool:
        try:
            # Looks into environment, settings and netrc; the prompt it could open would hang a job.
            return bool(wandb.login(prompt=False, verify=False))
        except Exception as error:
            log.warning(f"wandb cannot log in: {_first_line(error)}")
            return False

    def _guarded(self, action: Callable[[Any], None]) -> None:
        """Runs `action` on the wandb run; the first failure is logged and ends logging to wandb."""
        if self._wandb_run is None:
            return
        try:
            action(self._wandb_run)
        except Exception as error:
            self._wandb_run = None
            log.warning(f"wandb stopped, metrics.jsonl continues: {_first_line(error)}")


def _allowed_mode(mode: str) -> str:
    """`mode`, or the environment's WANDB_MODE where that sends less."""
    asked = os.environ.get("WANDB_MODE", mode).replace("dryrun", "offline")
    if asked not in WANDB_MODES or WANDB_MODES.index(asked) <= WANDB_MODES.index(mode):
        return mode
    log.info(f"wandb: {asked} instead of {mode}, because of WANDB_MODE in the environment")
    return asked


def _to_line(entry: dict[str, Any]) -> str:
    return json.dumps(_plain(entry), allow_nan=False) + "\n"


def _append_whole(path: Path, text: str) -> None:
    """Appends `text` or nothing: a disk that fills up would keep only its beginning."""
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
