"""Train or evaluate one experiment: `torchrun --nproc_per_node N run.py CONFIG [key=value ...]`.

Arguments -> configuration -> engine.jobs -> exit status. A mistake that can be found beforehand is
reported as one message with exit status 2 before a model loads. `python run.py CONFIG` is the same
for one process; `--dry-run` shows what would happen.
"""

import argparse
import atexit
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from engine.config_file import fields_help, load_config
from utils import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    ConfigError,
    configure_logging,
    log,
    wait_for_first_process,
)


def parse_arguments(arguments: Sequence[str] | None, is_silent: bool) -> argparse.Namespace:
    """The command line; `--help` explains every configuration key.

    is_silent: whether another process on this machine prints what is wrong.
    """
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
    parser.add_argument(
        "--lengths",
        metavar="QUESTION,STEPS,ANSWER",
        help="with --dry-run: for records of so many tokens, such as 64,3x8,5; needs no data",
    )
    with contextlib.ExitStack() as silenced:
        if is_silent:
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                silenced.enter_context(redirect(io.StringIO()))
        options = parser.parse_intermixed_args(arguments)
        if options.lengths is not None and not options.dry_run:
            parser.error("--lengths is for --dry-run; write both, or neither")
        return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment; returns the exit status."""
    # Until the ranks have met, one process of each machine prints that machine's errors.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    configure_logging(local_rank)
    try:
        options = parse_arguments(arguments, is_silent=local_rank > 0)
    except SystemExit as ended:
        if ended.code:
            wait_for_first_process()
        raise
    try:
        config = load_config(options.config, options.overrides)
        # Imported late because it takes seconds: a mistake in the file is reported at once.
        from engine import jobs
    except ConfigError as error:
        log.error(error)
        wait_for_first_process()
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    job = jobs.dry_run if options.dry_run else jobs.evaluate if config.only_eval else jobs.train
    if options.lengths is not None:
        job = partial(jobs.dry_run_of_lengths, lengths=options.lengths)
    return jobs.exit_status_of(job, config)


def flush_streams() -> None:
    """Keep a full disk or a closed pipe from changing the exit status when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def exit_process(status: int) -> NoReturn:
    """End this process with `status`; one of several ranks without finalizing Python.

    A gloo thread frees the tensors of the last collective at some later time. If Python has been
    finalized by then, the process aborts, and torchrun reports a finished run as failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        flush_streams()
        sys.exit(status)
    atexit._run_exitfuncs()
    flush_streams()
    os._exit(status)


if __name__ == "__main__":
    exit_process(main())
