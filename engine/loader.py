"""Batches made ahead of time by worker processes, in the order requested.

What a batch holds is left to dataset.Collator. A batch depends on its indices alone, so workers
change nothing but the time; one that fails ends the run, which can be resumed.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset import Collator
from utils import RunFailed

# A batch takes milliseconds; the first one also the start of a process.
WORKER_TIMEOUT_S = 120.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def batch_loader(
    collator: Collator, batches: Sequence[np.ndarray], num_workers: int, pin_memory: bool
) -> Iterator[dict[str, Tensor]]:
    """The batch of each entry of `batches`, made ahead by `num_workers` processes (0: none).

    Raises: RunFailed when a worker cannot start, dies or gives no batch for WORKER_TIMEOUT_S.
    """
    num_workers = min(num_workers, len(batches))
    loader = DataLoader(
        collator,
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        timeout=WORKER_TIMEOUT_S if num_workers else 0,
        worker_init_fn=_guard_worker,
        # Without one the loader would draw from the generator that makes runs reproducible.
        generator=torch.Generator(),
    )
    yield from _from_workers(loader) if num_workers else loader


def _from_workers(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    earlier = set(multiprocessing.active_children())
    workers: set[BaseProcess] = set()
    # A traceback can keep this generator alive until Python exits, and Python waits for children.
    end = Finalize(None, _kill, [workers], exitpriority=0)
    on_child_exit = signal.getsignal(signal.SIGCHLD)
    try:
        try:
            made = iter(loader)
        finally:
            workers |= set(multiprocessing.active_children()) - earlier
        # torch would raise a worker's death from a signal handler, in the middle of any step.
        if signal.getsignal(signal.SIGCHLD) is not on_child_exit:
            signal.signal(signal.SIGCHLD, on_child_exit)
        yield from made
    except (OSError, RuntimeError) as error:
        if str(error).startswith("Caught "):  # by the worker, in making a batch
            raise
        raise RunFailed(
            f"data workers failed ({error}); start again (training resumes), or set num_workers: 0"
        ) from error
    finally:
        made = None  # responsive workers now end by themselves
        end()


def _kill(workers: set[BaseProcess]) -> None:
    while workers:
        worker = workers.pop()
        worker.kill()
        worker.join()


def _guard_worker(_number: int) -> None:
    """Let a data worker end with the process that it works for, neither before nor after."""
    # Ctrl-C, torchrun and Slurm signal the whole process group, but the run ends its step first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # The fork inherited the run's lock and connections to other ranks.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():
        os._exit(1)
