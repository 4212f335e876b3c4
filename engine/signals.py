"""Signals to a training run: stop after this step, or save now.

The handlers only record the request; the trainer acts on it where all ranks can act together.
"""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from utils import log

# torchrun forwards a Ctrl-C to processes that already got it from the terminal.
SAME_SIGNAL_S = 1.0


@dataclass
class Requests:
    """The requests of signals since the last step."""

    stop: int = 0
    save: bool = False
    stopped_at: float = -math.inf


@contextmanager
def listen_for_signals() -> Iterator[Requests]:
    """Turn SIGINT and SIGTERM into a stop after the step, SIGUSR1 into a save.

    A second SIGINT or SIGTERM ends the run at once (KeyboardInterrupt).
    """
    requests = Requests()

    def on_stop(number: int, _frame: object) -> None:
        if requests.stop and time.monotonic() - requests.stopped_at > SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not requests.stop:
            requests.stopped_at = time.monotonic()
            log.info("stopping after this step; signal again to stop at once without saving")
        requests.stop = number

    def on_save(_number: int, _frame: object) -> None:
        requests.save = True

    handlers = {signal.SIGINT: on_stop, signal.SIGTERM: on_stop, signal.SIGUSR1: on_save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
