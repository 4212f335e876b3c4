"""Why a job ends early: one message and an exit status, however many ranks fail.

Ranks that fail agree, through the store by which they found each other, on which of them prints:
the lowest with a fault of its own, else the lowest of those that lost contact with another. All
wait until it has printed, since torchrun kills the rest as soon as one process has ended.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from engine import distributed
from engine.config import Config
from engine.run_dir import states
from utils import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ReportedError,
    configure_logging,
    log,
    wait_for_first_process,
)

# Ranks that lost contact wait this long for the others, and ranks with a fault for lower ones.
LOST_TIMEOUT_S = 10.0
LOWER_RANK_TIMEOUT_S = 3.0
# Rank 0 may hold the store, and waits this long for ranks that still use it.
LEAVING_TIMEOUT_S = 2.0
STORE_TIMEOUT_S = 5.0
POLL_S = 0.05
NO_STORE = "rank 0 or torchrun, whichever held the ranks' store, has ended or does not answer"


def report_failure(error: BaseException, config: Config) -> int:
    """Print on standard error why the job ends, once for all ranks; returns the exit status.

    A mistake of the user gets its message, a bug its traceback. Every failing rank must call and
    end soon after; ranks other than the one that prints return once it has printed.
    """
    status, text, ending = _describe(error, config)
    is_lost = distributed.is_lost_contact(error)
    if distributed.has_group() and distributed.world_size() > 1:
        _print_once(text, ending, "" if is_lost else type(error).__name__)
    elif distributed.local_rank() == 0 or is_lost:
        _print(text + ending)
    else:
        wait_for_first_process()
    return status


def _describe(error: BaseException, config: Config) -> tuple[int, str, str]:
    """(exit status, what happened, how to continue).

    The error's notes, which the trainer adds, name the last optimizer step.
    """
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", []))
    if distributed.is_lost_contact(error):
        if not distributed.has_group():
            return EXIT_FAILED, f"the ranks did not find each other ({_first_line(error)})", ""
        return EXIT_FAILED, f"lost contact{notes}", _how_to_continue(config)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted", _how_to_continue(config)
    if isinstance(error, ReportedError):
        return error.exit_status, str(error), ""
    if isinstance(error, torch.OutOfMemoryError):
        text = (
            f"out of memory{notes} ({_first_line(error)}); training needs less with a smaller"
            " batch_size_training or parallel: fsdp, evaluation with a smaller batch_size_eval or"
            " max_new_tokens"
        )
        return EXIT_FAILED, text, _how_to_continue(config)
    return EXIT_FAILED, "".join(traceback.format_exception(error)).rstrip(), ""


def _how_to_continue(config: Config) -> str:
    saves = not (config.only_eval or config.debug)
    with contextlib.suppress(OSError):
        if saves and states(config.run_dir):
            return "; the same command continues from the last saved state"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _print(text: str) -> None:
    # This may be a rank other than 0, whose logger is silent.
    configure_logging(0)
    log.error(text)
    # torchrun repeats it in its own summary of what failed.
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        content = {"message": {"message": text, "extraInfo": extra}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def _print_once(text: str, ending: str, fault: str) -> None:
    """Print `text` and `ending` if it is this rank's turn, else wait until another has printed.

    fault: its kind; "" where this rank merely lost contact, in which case the silent ranks are
        named between text and ending.
    """
    # torchrun ends all processes as soon as one has ended, but one must survive to print.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    rank, is_settled = distributed.rank(), threading.Event()
    if fault and rank > 0:
        text = f"rank {rank}: {text}"

    def report(store: distributed.Store) -> None:
        printer, silent = _await_turn(store, fault)
        is_settled.set()
        if printer == rank:
            names = "; ".join(_describe_silent(store, other) for other in silent)
            _print(text + (f": {names}" if names and not fault else "") + ending)
        elif printer is not None:
            _wait_until(lambda: store.check([f"left/{printer}"]), LOST_TIMEOUT_S)
        store.set(f"left/{rank}", "")
        if rank == 0:
            others = [f"left/{other}" for other in range(distributed.world_size())]
            _wait_until(lambda: store.check(others), LEAVING_TIMEOUT_S)

    ask_store(report, timeout_s=2 * LOST_TIMEOUT_S)
    if not is_settled.is_set():
        _print(text + ("" if fault else f": {NO_STORE}") + ending)


def _await_turn(store: distributed.Store, fault: str) -> tuple[int | None, list[int]]:
    """Agree which rank prints: (that rank, or None where one has already; the silent ranks).

    Of ranks with the same fault the lowest prints; lost contact, which follows from the fault of
    another, is printed only if no rank has a fault.
    """
    rank, faults = distributed.rank(), {}
    others = [other for other in range(distributed.world_size()) if other != rank]
    store.set(f"fault/{rank}", fault)

    def first() -> int | None:
        candidates = [
            other
            for other in faults
            if (faults[other] == fault and other < rank) or (faults[other] and not fault)
        ]
        return min(candidates, key=lambda other: (not faults[other], other), default=None)

    def is_settled() -> bool:
        for other in others:
            if other not in faults and store.check([f"fault/{other}"]):
                faults[other] = store.get(f"fault/{other}").decode()
        return first() is not None or faults.keys() >= set(others[:rank] if fault else others)

    _wait_until(is_settled, LOWER_RANK_TIMEOUT_S if fault else LOST_TIMEOUT_S)
    if (printer := first()) is None and store.add(f"printing/{fault}", 1) == 1:
        printer = rank
    return printer, [other for other in others if other not in faults]


def _describe_silent(store: distributed.Store, rank: int) -> str:
    process = store.get(f"process/{rank}").decode()
    return (
        f"rank {rank} ({process}) does not answer: it has died or hangs, or its machine is cut off"
    )


def ask_store(question: Callable[[distributed.Store], None], timeout_s: float) -> None:
    """Run `question` on the store by which the ranks found each other, for at most `timeout_s`."""

    def ask() -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with contextlib.suppress(OSError, RuntimeError):
            # Otherwise a store that does not answer would fill the screen with a stack trace.
            socket.create_connection(address, STORE_TIMEOUT_S).close()
            question(distributed.ranks_store())

    # A store on a frozen machine would block this rank as well.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(POLL_S)
