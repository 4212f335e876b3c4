"""What a run prints: the opening block, progress, a line per epoch, the closing block.

Only wording and timing; the figures come from the trainer and the evaluation. Lines go through the
logger, so only rank 0 prints them.
"""

import logging
import sys
import time

import torch
from tqdm import tqdm

from coconut import initial_weights
from dataset import Curriculum
from engine import distributed
from engine.config import Config
from engine.distributed import Threads
from engine.metadata import Position
from utils import log

# Without a terminal progress is logged this often.
SECONDS_BETWEEN_LINES = 30.0


def progress_bar(total: int, description: str, initial: int = 0) -> "tqdm | ProgressLines":
    """A bar over `total` batches on standard error at a terminal, otherwise a line now and then."""
    if not sys.stderr.isatty():
        return ProgressLines(total, description, initial)
    return tqdm(
        total=total,
        desc=description,
        initial=initial,
        disable=not log.isEnabledFor(logging.INFO),
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
    )


class ProgressLines:
    """tqdm's progress as log lines at least SECONDS_BETWEEN_LINES apart."""

    def __init__(self, total: int, description: str, initial: int = 0) -> None:
        self.total, self.description, self.postfix = total, description, ""
        self.initial = self.done = initial
        self.began_s = self.logged_s = time.monotonic()

    def set_postfix_str(self, text: str) -> None:
        self.postfix = f", {text}"

    def update(self) -> None:
        self.done += 1
        now_s = time.monotonic()
        if now_s - self.logged_s < SECONDS_BETWEEN_LINES:
            return
        self.logged_s = now_s
        left_s = (now_s - self.began_s) / (self.done - self.initial) * (self.total - self.done)
        log.info(
            f"{self.description}: {self.done:,} of {self.total:,}{self.postfix},"
            f" {duration(left_s)} left"
        )

    def close(self) -> None:
        pass


def opening_lines(
    config: Config,
    curriculum: Curriculum,
    *,
    num_parameters: int,
    threads: Threads,
    num_val: int,
    num_train: int | None = None,
    stage: int | None = None,
    position: Position | None = None,
) -> list[str]:
    """What a run is about to do, one fact a line.

    num_train, num_val: records; an evaluation has a `stage` instead of num_train.
    position: of a training run that resumes.
    """
    model = config.model_id or config.load_model_path
    weights = config.load_model_path or "its own"
    facts = {
        "run": f"{config.run_dir}{', a trial that saves nothing' if config.debug else ''}",
        "device": describe_device(threads.number) + _describe_threads(threads),
        "model": f"{model}, {num_parameters:,} parameters; weights:"
        f" {'random' if config.from_scratch else weights}",
        "method": config.method,
        "thought": describe_thought(config),
        "records": f"{num_val:,} validation",
    }
    if stage is not None:
        facts["stage"] = stage
    if num_train is not None:
        facts["records"] = f"{num_train:,} training, {num_val:,} validation"
        facts |= _training_facts(config, curriculum, num_train)
    if position is not None:
        facts["resumes"] = f"in epoch {position.epoch}, after step {position.optimizer_step:,}"
    return [f"{name:<20}{fact}" for name, fact in facts.items() if fact is not None]


def _training_facts(config: Config, curriculum: Curriculum, num_train: int) -> dict[str, str]:
    """Schedule, effective batch and steps of a training run, by name."""
    world_size = distributed.world_size()
    accumulation, processes = config.accumulation_steps(world_size), _count(world_size, "process")
    effective = config.records_per_step(world_size)
    steps_per_epoch = -(-num_train // effective)
    num_epochs = max(config.num_epochs - config.resume, 0)
    return {
        "schedule": describe_schedule(config, curriculum),
        "effective batch": f"{effective} = {config.batch_size_training} records x {accumulation}"
        f" accumulation x {processes}",
        "optimizer steps": f"{steps_per_epoch:,} per epoch,"
        f" {steps_per_epoch * num_epochs:,} in total",
    }


def describe_device(num_threads: int | None = None) -> str:
    """The processes, devices and threads of this run, and on a CPU the allocator it preloads.

    num_threads: of each process; by default what this one uses now.
    """
    device, world_size = distributed.device(), distributed.world_size()
    cpu = f"the CPU{' with tcmalloc' if distributed.preloads_allocator() else ''}"
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    threads = _count(num_threads or torch.get_num_threads(), "thread")
    return f"{_count(world_size, 'process')} on {on}, {threads}{' each' if world_size > 1 else ''}"


def _describe_threads(threads: Threads) -> str:
    """The cores and the reason for the number of threads; empty on a GPU."""
    if threads.reason is None:
        return ""
    return f" ({_count(distributed.num_cores(), 'core')}; {threads.reason})"


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def describe_thought(config: Config) -> str | None:
    """A description of what is fed back at latent positions; None for methods without thoughts."""
    if config.method != "coconut":
        return None
    if config.thought != "continuous":
        passes = "in one pass" if config.thought == "pause" else "in as many passes as Coconut's"
        return f"{config.thought}: the latent token's learned embedding, read {passes}"
    m = config.latent_window_size
    text = "the last hidden state alone, as in the original Coconut"
    if m > 1:
        weights = initial_weights(config.latent_weights, m)
        shares = ", ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        learned = "learned, from " if config.latent_weights == "learned" else ""
        text = f"average of the last {m} states ({learned}{shares})"
        if config.window_scope == "pass":
            text += " for a row's first thought, the last state for the others"
        if config.thought_norm == "average":
            text = f"the last hidden state at the norm of the {text}"
        text += "; latent_window_size: 1 is the original Coconut"
    if isinstance(config.thought_norm, float):
        text = f"{config.thought_norm:g} times the {text.removeprefix('the ')}"
    if config.coconut_class is not None:
        text = f"made by {config.coconut_class}; in Coconut itself the {text.removeprefix('the ')}"
    return text


def describe_schedule(config: Config, curriculum: Curriculum) -> str:
    """The epochs and their stages."""
    last = config.num_epochs - 1
    epochs = f"epochs {config.resume} to {last}"
    stages = sorted({curriculum.stage(epoch) for epoch in (config.resume, last)})
    if config.method in ("cot", "no_cot"):
        return epochs
    acting = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[1]}"
    return (
        f"{epochs}, {acting} of 0 to {curriculum.last_stage}, epochs_per_stage"
        f" {config.epochs_per_stage}"
    )


def epoch_line(
    epoch: int, train_loss: float, figures: dict, train_seconds: float, eval_seconds: float
) -> str:
    """The outcome of an epoch; figures: those of its evaluation."""
    f = figures
    cot = "" if f["cot_em"] is None else f", CoT match {100 * f['cot_em']:.1f} %"
    num_hit = f["num_hit_max_new_tokens"]
    hit = f", {num_hit} hit max_new_tokens" if num_hit else ""
    return (
        f"epoch {epoch} stage {f['stage']}: train loss {train_loss:.4f}, val loss {f['loss']:.4f},"
        f" accuracy {100 * f['acc']:.1f} %"
        f" [{100 * f['acc_low']:.1f}, {100 * f['acc_high']:.1f}]{cot},"
        f" tokens {f['mean_tokens']:.1f} + {f['mean_thoughts']:.1f} thoughts{hit}"
        f" (train {train_seconds:.0f} s, evaluation {eval_seconds:.0f} s)"
    )


def closing_lines(config: Config, curriculum: Curriculum, position: Position) -> list[str]:
    """The outcome of a finished run, and where its files are."""
    num_epochs = position.epoch - config.resume
    trained, evaluated = duration(position.train_seconds), duration(position.eval_seconds)
    facts = {
        "finished": f"{_count(num_epochs, 'epoch')},"
        f" {_count(position.optimizer_step, 'optimizer step')}; training {trained}, evaluation"
        f" {evaluated}",
        "best of any stage": _best(config, curriculum, position.best_epoch, position.best_accuracy),
        "best of last stage": _best(
            config, curriculum, position.stage_best_epoch, position.stage_best_accuracy
        ),
    }
    if not config.debug:
        facts["files"] = f"{config.run_dir}: config.yaml, metrics.jsonl, predictions, checkpoints"
    return [f"{name:<20}{fact}" for name, fact in facts.items()]


def _best(config: Config, curriculum: Curriculum, epoch: int, accuracy: float) -> str:
    """An epoch with the best accuracy, and its checkpoint if that was kept."""
    name = f"checkpoint_{epoch + 1}"
    kept = name if (config.run_dir / name).is_dir() else "its checkpoint was not kept"
    return (
        f"epoch {epoch} (stage {curriculum.stage(epoch)}), accuracy {100 * accuracy:.1f} %, {kept}"
    )


def duration(seconds: float) -> str:
    """Seconds in readable units: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
