"""Ranks: the process group, device and threads of each, what they compare and sum, their seeds.

A single process needs no group. Under torchrun the group is gloo on CPUs and gloo + NCCL on GPUs,
and the local rank picks the device. How the ranks share a model is left to parallel.py, what they
print when one of them fails to failures.py.
"""

import ctypes
import hashlib
import os
import random
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from utils import UserError

# A rank that reaches a collective later than this after another is taken to be lost.
COLLECTIVE_TIMEOUT_S = 1800.0
START_POLL_S = 0.02
# A second thread speeds up a small model little on idle cores, and slows it down where another job,
# such as a second run of a study, keeps one of them busy.
PARAMETERS_PER_THREAD = 1_000_000
THREADS_VARIABLE = "OMP_NUM_THREADS"
# glibc returns large blocks to the system when they are freed, and the next step has to request
# them again; docs/performance.md says what this library saves.
ALLOCATOR = "tcmalloc_minimal"

_Answer = TypeVar("_Answer")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun's environment asks for, if any, and leave it at the end.

    Does nothing where the process is in a group already.

    Raises: UserError for more processes than GPUs on this machine.
    """
    if has_group():
        yield
        return
    _take_gpu()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _join()
    try:
        yield
    except BaseException:
        # NCCL would wait for ranks that may never come; the process ends anyway.
        if has_group() and not torch.cuda.is_available():
            dist.destroy_process_group()
        raise
    if has_group():
        dist.destroy_process_group()


def _take_gpu() -> None:
    if torch.cuda.is_available():
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > devices:
            raise UserError(
                f"--nproc_per_node {here} asks for more GPUs than the {devices} of this machine;"
                f" write --nproc_per_node {devices}"
            )
        torch.cuda.set_device(local_rank())


def _join() -> None:
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store, number, size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timeout,
        store=_store_of_this_start(store, number, size),
        rank=number,
        world_size=size,
    )
    ranks_store().set(f"process/{number}", f"process {os.getpid()} on {socket.gethostname()}")


def _store_of_this_start(store: Store, number: int, size: int) -> Store:
    """A part of `store` for the ranks of this start only; each of the `size` ranks must call.

    When a rank has died, torchrun restarts all ranks with the same store. It still holds addresses
    from the previous start, and a rank that takes one for its peer's never connects. Nothing that
    torchrun passes to a rank is certain to differ between starts, so each rank asks under a new
    name, and rank 0 answers with the name of the part.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"ask/{number}", own)
        part = dist.PrefixStore(store.get(f"answer/{own}").decode(), store)
        part.set(f"heard/{number}", "")
        return part
    part, silent = dist.PrefixStore(own, store), set(range(1, size))
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT_S
    while silent:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"waited {COLLECTIVE_TIMEOUT_S:g} s for {sorted(silent)}")
        for other in silent:
            # It may date from the previous start, so it is read again until the answer was heard.
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
        silent = {other for other in silent if not part.check([f"heard/{other}"])}
        time.sleep(START_POLL_S)
    return part


def has_group() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_initialized()


def ranks_store() -> Store:
    """The store by which the ranks of this start found each other: keys and values of text."""
    return dist.PrefixStore("run.py", dist.distributed_c10d._get_default_store())


def rank() -> int:
    """This process's number among all, 0 without a group."""
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    """The number of processes that train together, 1 without a group."""
    return dist.get_world_size() if has_group() else 1


def local_rank() -> int:
    """This process's number on its machine: it picks the device, the global rank never does."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, the only one that writes shared files and logs."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def computes_bf16_natively() -> bool:
    """Whether this rank's device multiplies bf16 in hardware rather than by emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN itself counts AVX-512 without bf16 instructions as support.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Threads:
    """The number of CPU threads of this process, and why, as a clause.

    reason: None on a GPU, where they hardly matter.
    """

    number: int
    reason: str | None


def choose_threads(num_parameters: int) -> Threads:
    """The threads for a model of this size, the same whenever it is trained or evaluated here.

    OMP_NUM_THREADS decides where the user has set it. Otherwise one for each PARAMETERS_PER_THREAD,
    and no more than this process's share of the physical cores.
    """
    current = torch.get_num_threads()
    if device().type == "cuda":
        return Threads(current, None)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    useful, available = max(num_parameters // PARAMETERS_PER_THREAD, 1), max(num_cores() // here, 1)
    number = min(useful, available)
    if _user_chose_threads():
        advice = f"; it would be {number} if unset" if current < number else ""
        return Threads(current, f"set by {THREADS_VARIABLE}{advice}")
    if useful < available:
        return Threads(number, "the model is small")
    return Threads(number, "one for each core" if here == 1 else "shared by the processes")


def use_threads(num_parameters: int) -> None:
    """Compute with the threads that `choose_threads` chooses."""
    torch.set_num_threads(choose_threads(num_parameters).number)


def environment_of_script_runs() -> dict[str, str]:
    """The environment in which scripts start runs.

    One thread, because models are small and several runs share the cores; and ALLOCATOR, where
    Linux has it and LD_PRELOAD is not set (an empty one turns this off).
    """
    environment = os.environ | {THREADS_VARIABLE: "1"}
    if sys.platform == "linux" and (allocator := find_library(ALLOCATOR)):
        environment.setdefault("LD_PRELOAD", allocator)
    return environment


def preloads_allocator() -> bool:
    """Whether ALLOCATOR was to be preloaded into this process, and was found."""
    # The loader goes on without a library that it does not find.
    is_requested = ALLOCATOR in os.environ.get("LD_PRELOAD", "")
    return is_requested and hasattr(ctypes.CDLL(None), "tc_malloc")


def num_cores() -> int:
    """The physical cores that this process may use; logical ones if only those are known."""
    # macOS does not say which processors a process may use.
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core(processor) for processor in os.sched_getaffinity(0)})


def _core(processor: int) -> str:
    """A name of the physical core of a logical processor."""
    topology = Path(f"/sys/devices/system/cpu/cpu{processor}/topology")
    try:
        return (topology / "thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is set, and not by torchrun.

    For several processes of one machine torchrun sets it to 1 where the user has not.
    """
    value, here = os.environ.get(THREADS_VARIABLE), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if here == "1" or value != "1":
        return value is not None
    try:
        # What torchrun was started with, without the changes it has made since.
        before = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(f"{THREADS_VARIABLE}=".encode()) for entry in before.split(b"\0"))


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices); `deterministic` also forbids nondeterminism.

    Without `deterministic`, fp32 matrix products on GPUs may use TF32, with 10 bits of mantissa in
    place of 23.

    Raises: nothing here; with `deterministic`, torch later raises RuntimeError where an operation
    has no deterministic kernel.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
    if deterministic:
        # cuBLAS reads this when its first handle is made, so it must precede any CUDA product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def seed_rank(seed: int) -> None:
    """Seed torch on this rank for what must differ between ranks: dropout.

    Rank 0 draws what a single process draws. The others hash seed and rank: with their sum, rank 1
    of seed 0 would draw what rank 0 of seed 1 draws.
    """
    if not is_main():
        seed = int.from_bytes(hashlib.sha256(f"{seed} {rank()}".encode()).digest()[:8], "big")
    torch.manual_seed(seed)


def barrier() -> None:
    """Wait until every rank is here."""
    if has_group():
        # A sum over a CPU tensor: dist.barrier() would occupy the GPU under NCCL.
        sum_over_ranks([0.0])


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums of the same list on every rank, in float64."""
    if not has_group():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def min_over_ranks(value: int) -> int:
    """The smallest of the ranks' values, on every rank."""
    smallest = torch.tensor(value)
    if has_group():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def gather_to_main(value: object) -> list | None:
    """Every rank's value in rank order on rank 0, None elsewhere."""
    if not has_group():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast_from_main(value: object) -> object:
    """Rank 0's value on every rank."""
    if not has_group():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def run_on_all_ranks(work: Callable[[], _Answer]) -> _Answer:
    """Return `work()`; every rank must call.

    A file may be missing on one machine only, and its error must stop the other ranks too, or they
    would wait.

    Raises: UserError on all ranks when `work` raises it on any.
    """
    result, refusal = None, None
    try:
        result = work()
    except UserError as error:
        refusal = f"rank {rank()}: {error}" if rank() else str(error)
    refusals = gather_to_main(refusal) or []
    refusal = broadcast_from_main(next(filter(None, refusals), None))
    if refusal:
        raise UserError(refusal)
    return result


def require_same(facts: dict[str, object]) -> None:
    """Compare the ranks' `facts`, by name; every rank must call.

    Raises: UserError for the first that is not the same on all of them.
    """
    expected = broadcast_from_main(facts)

    def compare() -> None:
        for name, value in facts.items():
            if value != expected[name]:
                raise UserError(
                    f"{name} is {value} here, {expected[name]} on rank 0; every machine needs the"
                    " same command and the same files, or a file system that they share"
                )

    run_on_all_ranks(compare)


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` means that a collective failed: a time-out or a lost connection."""
    # gloo raises plain RuntimeErrors that begin with the path of its source file.
    from_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return isinstance(error, dist.DistError) or from_gloo
