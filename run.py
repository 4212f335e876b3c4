"""Train or evaluate one experiment: `torchrun --nproc_per_node N run.py CONFIG [key=value ...]`.

Arguments -> configuration -> set-up -> train or evaluate -> tear-down. Loops and tensor maths live
elsewhere. Every mistake that can be known beforehand is reported as one message with exit status
2 before a model loads. `python run.py CONFIG` is the same for one process; `--dry-run` shows what
would happen.
"""

import argparse
import atexit
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from engine.config import Config, dump_config, fields_help, load_config
from utils import ConfigError, configure_logging

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def parse_arguments(arguments: Sequence[str] | None, speaks: bool = True) -> argparse.Namespace:
    """The command line; `--help` explains every configuration key. `speaks`: not in silence."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Train or evaluate a language model that reasons in latent thoughts.",
        epilog="Configuration keys:\n\n" + fields_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the experiment, such as those in args/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a key of the file: lr=5e-5"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show configuration, schedule and sizes, then stop"
    )
    with contextlib.ExitStack() as silenced:
        if not speaks:
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                silenced.enter_context(redirect(io.StringIO()))
        return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit status."""
    # Until the ranks meet, nobody knows what the other machines saw: one process of each speaks.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    options = parse_arguments(arguments, speaks)

    def complain(error: object) -> None:
        # It may quote a file of others, whose control characters a terminal would obey.
        text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(error))
        if speaks:
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    try:
        config = load_config(options.config, options.overrides)
        # Only now what takes seconds to import: a mistake in the file is told at once.
        from transformers.utils import logging as transformers_logging

        from engine import distributed

        # Bars over loading and saving a file would tear the epochs' lines apart.
        transformers_logging.disable_progress_bar()
    except ConfigError as error:
        complain(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    try:
        distributed.initialize()
        configure_logging(distributed.rank())
        speaks = distributed.is_main()
        distributed.require_same(config.model_dump())
        if not config.only_eval:
            config.accumulation_steps(distributed.world_size())  # refuses what cannot be divided
        if options.dry_run:
            dry_run(config)
        elif config.only_eval:
            evaluate_only(config)
        else:
            train(config)
        return 0
    except BaseException as error:
        status = tell_end(error, config, complain)
        if status is None:
            raise
        return status
    finally:
        distributed.shut_down()


def tell_end(error: BaseException, config: Config, complain: Callable) -> int | None:
    """Say why the run ends early: the exit status, or None where only a traceback tells more."""
    import torch

    from engine import distributed
    from utils import ReportedError

    saves = not (config.only_eval or config.debug)
    continues = "; the same command continues from the last saved state" if saves else ""
    if distributed.is_lost_contact(error):
        lost = distributed.lost_ranks(error)
        if lost:
            where = " ".join(["lost contact", *getattr(error, "__notes__", [])])
            with contextlib.suppress(OSError):
                print(f"{where}: {lost}{continues}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    distributed.leave_word(error)
    if isinstance(error, KeyboardInterrupt):
        complain("interrupted" + continues)
        return EXIT_INTERRUPTED
    if isinstance(error, ReportedError):
        complain(error)
        return error.exit_status
    if isinstance(error, torch.OutOfMemoryError):
        where = " ".join(["out of memory", *getattr(error, "__notes__", [])])
        cause = (str(error) or "no more is known").splitlines()[0]
        # On the rank that it happens to, which need not be the first.
        with contextlib.suppress(OSError):
            print(
                f"rank {distributed.rank()}: {where} ({cause}); training needs less with a smaller"
                " batch_size_training or parallel: fsdp, evaluation with a smaller batch_size_eval"
                f" or max_new_tokens{continues}",
                file=sys.stderr,
                flush=True,
            )
        return EXIT_FAILED
    return None


def require_shared(run_dir: Path) -> None:
    """Make sure that every rank sees rank 0's `run_dir`, which exists; every rank must call.

    Raises: UserError naming the machine that does not.
    """
    import socket
    import uuid

    from engine import checkpoint, distributed
    from utils import UserError

    # run_dir.recover drops such a name, should this start be killed.
    name = distributed.broadcast_from_main(f".shared.{uuid.uuid4().int}.part")

    def look() -> None:
        if not (run_dir / name).exists():
            raise UserError(
                f"save_path: {run_dir} on {socket.gethostname()} is not the folder that rank 0"
                " writes; under FSDP every rank saves its own shard there: let save_path lie on a"
                " file system that all machines share, or write parallel: ddp"
            )

    if distributed.is_main():
        with checkpoint.writing(run_dir, name):
            (run_dir / name).touch()
    try:
        distributed.barrier()
        distributed.together(look)
    finally:
        if distributed.is_main():
            (run_dir / name).unlink(missing_ok=True)


def make_model(config: Config, source):
    """Coconut module on the CPU, seeded; `share_model` is what is left to do."""
    import torch

    from engine import distributed
    from engine.distributed import say
    from engine.model import build_coconut, load_backbone

    if config.bf16 and not source.is_state and not distributed.computes_bf16_natively():
        say("bf16: this hardware has no native bf16 and emulates it; bf16: false is faster")
    distributed.seed_everything(config.seed, config.deterministic)
    model = build_coconut(config, load_backbone(config, source))
    # From here on only dropout draws, and it must differ between ranks.
    torch.manual_seed(config.seed + distributed.rank())
    return model


def share_model(config: Config, model):
    """`model` on this rank's device, wrapped for the ranks; every rank must call."""
    from engine import distributed
    from engine.distributed import say

    num_parameters = sum(p.numel() for p in model.parameters())
    parallel = distributed.choose_parallel(config.parallel, num_parameters, config.bf16)
    say(f"parallel: {parallel.kind} ({parallel.reason})")
    if config.compile:
        model.base_causallm.base_model.compile(dynamic=True)
    return distributed.parallelize(model, parallel, model.blocks, config.bf16)


def train(config: Config) -> None:
    """Train from the beginning, or go on from the newest training state of the run directory."""
    from engine import distributed, run_dir
    from engine.distributed import say

    with contextlib.ExitStack() as held:

        def take_run_dir() -> None:
            # One process holds the directory for all of its run's ranks.
            if distributed.is_main() and not config.debug:
                held.enter_context(run_dir.run_lock(config.run_dir, say))
                run_dir.recover(config.run_dir)
                run_dir.refuse_obstacles(config.run_dir)
                run_dir.recover(config.run_dir / run_dir.RESUME_FOLDER)

        distributed.together(take_run_dir)
        # It takes seconds to import, and the directory may be refused.
        from engine.setup import newest_state, prepare

        state = newest_state(config)
        train_from(prepare(config, state), state)


def train_from(prepared, state) -> None:
    """Build the model and run the training, from `state` where there is one."""
    from engine import checkpoint, distributed
    from engine.metadata import Metadata
    from engine.setup import make_curriculum
    from engine.tracking import Tracker
    from engine.trainer import Trainer

    config, data, source = prepared.config, prepared.data, prepared.source
    model = distributed.together(lambda: make_model(config, source))
    model = share_model(config, model)
    saves = not config.debug
    if saves and distributed.is_sharded(model):
        require_shared(config.run_dir)
    with checkpoint.writing(config.run_dir, "metrics.jsonl"):
        tracker = Tracker(
            config.run_dir if saves else None,
            config.model_dump(),
            config.project,
            config.name,
            config.wandb if saves else "disabled",
            distributed.is_main(),
            state.trainer["wandb_id"] if state else None,
        )
    metadata = Metadata.of(config, source.tokenizer)
    try:
        trainer = Trainer(
            config,
            model,
            source.tokenizer,
            data.train,
            data.val,
            make_curriculum(config),
            metadata,
            tracker,
            state,
        )
        with checkpoint.writing(config.run_dir, "config.yaml or metrics.jsonl"):
            if saves and distributed.is_main():
                tell_strangers(config)
                write_config(config, config.run_dir)
            if state is None:
                tracker.truncate(0, config.resume)
        trainer.run()
    finally:
        tracker.close()


def tell_strangers(config: Config) -> None:
    """Name what lies in the run directory and is not ours."""
    from engine import run_dir
    from engine.distributed import say

    strangers = run_dir.foreign_files(config.run_dir)
    if strangers:
        say(f"{config.run_dir}: left alone, not files of a run: {', '.join(strangers)}")


def write_config(config: Config, folder: Path) -> None:
    """Write the resolved configuration into `folder`; tell what changed in it."""
    from engine.distributed import say
    from utils import atomic_write_text

    path, text = folder / "config.yaml", dump_config(config)
    if path.exists():
        before = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in text.splitlines():
            if line not in before:
                say(f"{path}: changed since the last start: {line}")
    atomic_write_text(path, text)


def evaluate_only(config: Config) -> None:
    """Evaluate load_model_path on val_path at the stage it was trained to."""
    from engine import checkpoint, distributed, run_dir
    from engine.console import progress_bar
    from engine.evaluation import describe, evaluate, write_predictions
    from engine.setup import check_place, evaluation_folder, make_curriculum, prepare
    from engine.tracking import Tracker

    check_place(config)
    prepared = prepare(config, None)
    config, (stage, epoch) = prepared.config, prepared.evaluated
    model = distributed.together(lambda: make_model(config, prepared.source))
    model = share_model(config, model)
    folder = None if config.debug else evaluation_folder(config)
    if folder is not None:
        distributed.together(lambda: distributed.is_main() and run_dir.make_writable(folder))
    with checkpoint.writing(folder or config.run_dir, "metrics.jsonl"):
        tracker = Tracker(
            folder,
            config.model_dump(),
            config.project,
            f"{config.name}-eval",
            "disabled" if config.debug else config.wandb,
            distributed.is_main(),
        )
    with contextlib.closing(tracker):
        outcome = evaluate(
            distributed.unwrap(model),
            prepared.source.tokenizer,
            prepared.data.val,
            make_curriculum(config),
            stage,
            batch_size=config.batch_size_eval or config.batch_size_training,
            max_new_tokens=config.max_new_tokens,
            bf16=config.bf16,
            num_workers=config.num_workers,
            progress_bar=progress_bar,
        )
        figures = outcome.figures
        named = {f"eval/{name}": value for name, value in figures.items()}
        # Only now, and the largest first: what an interruption leaves is of the same weights.
        with checkpoint.writing(folder or config.run_dir, "the evaluation"):
            if outcome.predictions is not None and folder is not None:
                write_predictions(folder / f"predictions_{epoch}.jsonl", outcome.predictions)
            tracker.truncate(0, epoch)
            tracker.log(named | {"eval/epoch": epoch}, step=0)
            if folder is not None and distributed.is_main():
                write_config(config.model_copy(update={"resume": epoch}), folder)
        what = f"{config.load_model_path} on {config.val_path}, stage {stage}"
        tracker.message(f"{what}\n{describe(figures)}")
        if folder is not None:
            tracker.message(f"predictions and figures are in {folder}")


def dry_run(config: Config) -> None:
    """Show the resolved configuration, the schedule and the sizes; train nothing, write nothing."""
    from engine import distributed
    from engine.distributed import say
    from engine.setup import check_place, newest_state, prepare

    check_place(config)
    state = newest_state(config)
    prepared = prepare(config, state)
    config, data = prepared.config, prepared.data
    say(dump_config(config))
    if prepared.evaluated is not None:
        say(f"stage               {prepared.evaluated[0]}")
    else:
        steps = config.accumulation_steps(distributed.world_size())
        effective = config.records_per_step(distributed.world_size())
        per_epoch = -(-len(data.train) // effective)
        epochs = max(config.num_epochs - config.resume, 0)
        say(schedule_table(config, data.train))
        say(
            f"examples            {len(data.train)} training, {len(data.val)} validation\n"
            f"effective batch     {effective} = {config.batch_size_training} records x {steps}"
            f" accumulation x {distributed.world_size()} processes\n"
            f"optimizer steps     {per_epoch} an epoch, {per_epoch * epochs} in all"
        )
        if state is not None:
            done = state.trainer["position"]
            say(f"goes on             in epoch {done['epoch']}, step {done['optimizer_step']}")
    say(f"parameters          {prepared.outline.num_parameters:,}")
    say("dry run: nothing trained or written")


def schedule_table(config: Config, records) -> str:
    """Epochs of the same stage in one line: stage, latents and steps kept, over the records."""
    from itertools import groupby

    import numpy as np

    from dataset import StagedRecords
    from engine.setup import make_curriculum

    curriculum = make_curriculum(config)
    lines = [f"{'epochs':>9}  {'stage':>5}  {'latents':>16}  {'steps kept':>16}"]
    epochs_of = groupby(range(config.resume, config.num_epochs), curriculum.stage)
    for stage, epochs in epochs_of:
        epochs = list(epochs)
        staged = StagedRecords.of(records, curriculum, np.full(len(records), stage))
        kept = records.num_steps - staged.dropped
        cells = [
            f"{values.mean():.2f} ({values.min()}-{values.max()})"
            for values in (staged.num_latents, kept)
        ]
        span = f"{epochs[0]}-{epochs[-1]}"
        lines.append(f"{span:>9}  {stage:>5}  {cells[0]:>16}  {cells[1]:>16}")
    return "\n".join(lines)


def let_go_of_the_console() -> None:
    """Keep a console that takes no more from changing the exit status when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(status: int) -> NoReturn:
    """End this process with `status`; one of several without finalizing Python.

    A thread of gloo frees the tensors of the last collective when it gets round to it. Should
    Python be finalized by then the process aborts, and torchrun takes a finished run for failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        let_go_of_the_console()
        sys.exit(status)
    atexit._run_exitfuncs()
    let_go_of_the_console()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
