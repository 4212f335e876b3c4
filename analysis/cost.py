"""What a study costs before it runs: optimizer steps, arithmetic and hours of every arm.

A record of T tokens costs 6 N T operations in a forward and backward pass through N parameters
(2 N T forward, twice that backward), without attention and evaluation; latent passes extend one
cache, so every token is counted once. Sizes of data and model are those that the study writes down,
since neither need exist yet. Hours are given at the rate of finished runs on this machine, and at a
rate that the user names.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.results import read_results
from analysis.study import Run, Size, Study
from dataset import Curriculum
from engine.config import Config
from engine.setup import make_curriculum


@dataclass(frozen=True)
class Cost:
    """What one run costs: optimizer steps, and floating-point operations of training."""

    steps: int
    operations: float


def run_cost(config: Config, size: Size) -> Cost:
    """Steps and operations of one run on records of the given mean size."""
    records = size.records if config.max_train_records is None else config.max_train_records
    records = min(records, size.records)
    batch = config.effective_batch_size or (
        config.batch_size_training * config.gradient_accumulation_steps
    )
    curriculum = make_curriculum(config)
    num_steps = len(size.steps)
    num_epochs = config.num_epochs or curriculum.epochs_per_stage * (curriculum.last_stage + 1)
    tokens = 0.0
    for epoch in range(config.resume, num_epochs):
        tokens += records * _tokens(curriculum, curriculum.stage(epoch), num_steps, size)
    epochs = max(num_epochs - config.resume, 0)
    return Cost(-(-records // batch) * epochs, 6 * size.parameters * tokens)


def _tokens(curriculum: Curriculum, stage: int, num_steps: int, size: Size) -> float:
    """Mean tokens of a training example at `stage`."""
    dropped, latents = curriculum.plan(stage, num_steps)
    return size.question + latents + sum(size.steps[dropped:]) + size.answer


def measured_rate(results: Path, machine: str, costs: dict[tuple[str, str], Cost]) -> float | None:
    """Operations per second of the finished runs on this machine; None where there are none.

    costs: (condition, arm) -> what such a run costs.
    """
    if not any(results.glob("*.seed*.json")):
        return None
    known = [
        (costs[run.condition, run.arm].operations, run.seconds)
        for run in read_results(results)
        if run.machine == machine and (run.condition, run.arm) in costs
    ]
    operations, seconds = map(sum, zip(*known, strict=True)) if known else (0, 0)
    return operations / seconds if seconds else None


def cost_table(
    study: Study,
    runs: Sequence[Run],
    results: Path,
    machine: str,
    flops_per_second: float | None = None,
) -> str:
    """The runs by condition and arm with their costs, as text."""
    costs = {
        (run.condition, run.arm): run_cost(study.config(run), study.size_of(run)) for run in runs
    }
    rate = measured_rate(results, machine, costs)
    rates = {"this machine": rate, "given rate": flops_per_second}
    counts = Counter((run.condition, run.arm) for run in runs)
    lines = [f"{'condition':<12}{'arm':<18}{'runs':>5}{'steps each':>12}{'FLOPs each':>12}"]
    lines[0] += "".join(f"{'h, ' + name:>18}" for name, value in rates.items() if value)
    total = 0.0
    for (condition, arm), count in counts.items():
        cost = costs[condition, arm]
        total += count * cost.operations
        line = f"{condition:<12}{arm:<18}{count:>5}{cost.steps:>12,}{cost.operations:>12.2e}"
        for value in filter(None, rates.values()):
            line += f"{count * cost.operations / value / 3600:>18.2f}"
        lines.append(line)
    line = f"{'all':<30}{len(runs):>5}{'':>12}{total:>12.2e}"
    lines.append(line + "".join(f"{total / r / 3600:>18.2f}" for r in rates.values() if r))
    if rate is None:
        lines.append("no finished run on this machine yet, so its hours are unknown")
    return "\n".join(lines)
