"""Processes, devices and sharding: everything that knows that there may be more than one rank.

One process needs no group at all. Under torchrun the group is gloo on CPUs and gloo + NCCL on
GPUs, the local rank picks the device. Models are wrapped in DDP or sharded by FSDP2; both average
gradients over ranks, so the training step multiplies its loss by the number of ranks. When a rank
hangs or dies the others find out which, at no cost before a collective has failed.

A training step of Coconut calls every block once for each latent pass. DDP does not notice. FSDP2
gathers a block's parameters before a call, and ranks whose batches take another number of passes
would wait for each other for ever; so under FSDP all ranks take the same number (`Coconut.layout`,
num_passes).
"""

import hashlib
import inspect
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import Store
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

# Parameter, gradient and two AdamW moments in fp32.
TRAINING_BYTES_PER_PARAMETER = 16
# Above this share of a device, activations no longer fit beside the training state.
STATE_SHARE_OF_DEVICE = 0.6
# A rank that comes to a collective later than this after another is taken for lost.
COLLECTIVE_TIMEOUT_S = 1800.0
STORE_TIMEOUT_S = 5.0
START_POLL_S = 0.02

_Answer = TypeVar("_Answer")


@contextmanager
def process_group() -> Iterator[None]:
    """Within, the process group that torchrun's environment asks for, if it asks for one.

    Joined here and left again, but where the process is in a group already.

    Raises: UserError for more processes than GPUs on this machine.
    """
    if has_group():
        yield
        return
    initialize()
    try:
        yield
    except BaseException:
        # NCCL would wait for ranks that may never come; the process ends anyway.
        if not torch.cuda.is_available():
            shut_down()
        raise
    shut_down()


def initialize() -> None:
    """Join the process group that torchrun describes in the environment, if there is one.

    Raises: UserError for more processes than GPUs on this machine.
    """
    if torch.cuda.is_available():
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > devices:
            raise UserError(
                f"--nproc_per_node {here} asks for more GPUs than the {devices} of this machine;"
                f" write --nproc_per_node {devices}"
            )
        torch.cuda.set_device(local_rank())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        store, number, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=_store_of_this_start(store, number, size),
            rank=number,
            world_size=size,
        )
        _store().set(_process_key(number), f"process {os.getpid()} on {socket.gethostname()}")


def _store_of_this_start(store: Store, number: int, size: int) -> Store:
    """A part of `store` for the ranks of this start alone; every one of the `size` ranks calls.

    When a rank has died, torchrun starts all again with the store that they had. There the former
    start's addresses still lie, and a rank that takes one for that of its peer never meets it.
    Nothing that torchrun tells a rank differs between the starts for certain, so each rank asks
    under a name of its own, and rank 0 answers with the name of the part.
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
            # The question may be the former start's, so it is read until the answer was heard.
            if store.check([f"ask/{other}"]):
                store.set(f"answer/{store.get(f'ask/{other}').decode()}", own)
        silent = {other for other in silent if not part.check([f"heard/{other}"])}
        time.sleep(START_POLL_S)
    return part


def has_group() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_initialized()


def shut_down() -> None:
    """Leave the process group."""
    if has_group():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine: it picks the device, the global rank never does."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is rank 0, which alone writes shared files and speaks to the user."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def computes_bf16_natively() -> bool:
    """Whether this rank's device multiplies bf16 in hardware rather than by emulation."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN's own answer counts AVX-512 without bf16 instructions as support.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch (all devices); `deterministic` also forbids random kernels.

    Without `deterministic`, fp32 matrix products on GPUs may take TF32, ten bits of a mantissa in
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

    Rank 0 draws what one process draws. The others' numbers hash seed and rank: by a sum, rank 1 of
    seed 0 would draw what rank 0 of seed 1 does.
    """
    if not is_main():
        seed = int.from_bytes(hashlib.sha256(f"{seed} {rank()}".encode()).digest()[:8], "big")
    torch.manual_seed(seed)


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        # A sum over a CPU tensor: dist.barrier() would occupy the GPU under NCCL.
        sum_over_ranks([0.0])


def sum_over_ranks(values: list[float]) -> list[float]:
    """Sums of the same list on every rank, in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def _least_over_ranks(value: int) -> int:
    least = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def gather_to_main(value: object) -> list | None:
    """Every rank's value in rank order on rank 0, None elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast_from_main(value: object) -> object:
    """Rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def run_on_all_ranks(work: Callable[[], _Answer]) -> _Answer:
    """What `work()` returns; every rank must call.

    A file may be missing on one machine alone, whose refusal must stop the others, or they would
    wait for it.

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


@dataclass(frozen=True)
class Parallel:
    """How the ranks share a model.

    kind: "none", "ddp" or "fsdp".
    gathered: under FSDP, whether whole parameters stay from a step's first pass to its end, which
        costs their memory and saves a gather for every pass of every block.
    reason: why, for the console; without GPUs the threads as well.
    """

    kind: str
    gathered: bool
    reason: str


def choose_parallel(parallel: str, num_parameters: int, bf16: bool) -> Parallel:
    """What `parallel` means here: `auto` shards where one device has too little room for it all.

    The smallest device decides for all; every rank must call.
    """
    threads = "" if torch.cuda.is_available() else f"; {_threads()}"
    if world_size() == 1:
        return Parallel("none", False, f"one process{threads}")
    if not torch.cuda.is_available():
        reason = "processes on CPUs share their memory" if parallel == "auto" else "as configured"
        return Parallel("ddp" if parallel == "auto" else parallel, True, reason + threads)
    # Ranks that chose differently would wait for each other for ever.
    memory_bytes = _least_over_ranks(torch.cuda.get_device_properties(device()).total_memory)
    room = STATE_SHARE_OF_DEVICE * memory_bytes
    state_bytes = num_parameters * TRAINING_BYTES_PER_PARAMETER
    sizes = f"training state {state_bytes / 2**30:.1f} GiB, room {room / 2**30:.1f} GiB a device"
    if parallel == "auto":
        kind, reason = ("ddp" if state_bytes < room else "fsdp"), sizes
    else:
        kind, reason = parallel, "as configured"
    if kind == "ddp":
        return Parallel(kind, False, reason)
    whole_bytes = num_parameters * (2 if bf16 else 4)
    gathered = whole_bytes + state_bytes / world_size() < room
    held = "held whole through a step" if gathered else "gathered for every pass of a block"
    return Parallel(kind, gathered, f"{reason}; parameters {held}")


def _threads() -> str:
    """The threads a process computes with, and how to have more where others set too few."""
    threads, here = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    told = f"{threads} thread{'' if threads == 1 else 's'}{' each' if here > 1 else ''}"
    # macOS does not say which cores a process may use.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    # Left alone, torch takes what pays; torchrun allows each of several processes one.
    if here > 1 and cores // here > threads:
        told += f" on {cores} cores: OMP_NUM_THREADS={cores // here} would use more"
    return told


def parallelize(
    model: nn.Module, parallel: Parallel, blocks: Sequence[nn.Module] = (), bf16: bool = False
) -> nn.Module:
    """`model` on this rank's device, wrapped for training on several ranks.

    Under FSDP it is sharded in place, block by block, then what is left: it should still lie on the
    CPU, because whole it may not fit the device.

    blocks: the modules of `model` that FSDP shards each by itself.
    bf16: under FSDP blocks gather their parameters in bf16, from shards that stay in fp32.
    """
    if parallel.kind != "fsdp":
        model = model.to(device())
        if parallel.kind == "none":
            return model
        device_ids = [local_rank()] if torch.cuda.is_available() else None
        # Every rank builds the same buffers (positions, masks), and training changes none. Before
        # torch 2.13 the option has another name.
        options = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, **{name: False}
        )
    # What autocast would compute in bf16 is gathered in bf16. All else stays in fp32, the sum of
    # the layers too, so that sharding changes no figure: norms are a group of their own, and
    # embeddings, final norm and head belong to the root.
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    for block in blocks:
        if bf16:
            fully_shard(_norms(block))
        fully_shard(block, mp_policy=policy)
    fully_shard(model)
    for module in _shards(model):
        # FSDP2 cannot be asked, and gathered_parameters has to restore it.
        module.reshards_after_forward = module is not model and not parallel.gathered
        module.set_reshard_after_forward(module.reshards_after_forward, recurse=False)
    if parallel.gathered:
        model.set_reshard_after_backward(False)
    for name in ("answer", "generate"):
        register_fsdp_forward_method(model, name)
    return model


def arrange_buckets(model: nn.Module, *example: torch.Tensor) -> None:
    """Let DDP arrange gradients for their exchange by a batch that every start has in common.

    It does so once, by the order in which they first come, and to the last bit a sum over three
    ranks or more depends on the arrangement: it must not depend on where a run goes on.

    model: a Coconut module, wrapped or not.
    example: what `model` is called with; its logits are differentiated, which is then forgotten.
    """
    if isinstance(model, DistributedDataParallel):
        model.eval()
        # DDP waits for the gradient of every parameter, and logits alone need no thought's.
        extra = unwrap(model).extra_parameters().values()
        unused = sum(parameter.sum() for parameter in extra)
        (model(*example).logits.sum() + 0 * unused).backward()
        model.zero_grad(set_to_none=True)


def _norms(block: nn.Module) -> list[nn.Module]:
    """The modules of `block` whose own parameters are all vectors: they scale, and multiply no
    matrices."""
    own = {module: list(module.parameters(recurse=False)) for module in block.modules()}
    return [
        module for module, params in own.items() if params and all(p.dim() == 1 for p in params)
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` lies in shards, so that ranks must take the same number of passes."""
    return isinstance(model, FSDPModule)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DDP's shell."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _release(model: nn.Module) -> None:
    """Drop whole parameters; what remains are the shards that the optimizer knows."""
    for module in _shards(model):
        module.reshard()


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients in the backward passes inside only when `enabled`: the last micro-step."""
    if is_sharded(model):
        model.set_requires_gradient_sync(enabled)
    skip = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if skip else nullcontext():
        yield
    if enabled:
        _release(model)


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Hold whole parameters inside, so that ranks may run different numbers of passes there."""
    shards = _shards(model)
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(module.reshards_after_forward, recurse=False)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """() the global 2-norm of all gradients, the same on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def is_lost_contact(error: BaseException) -> bool:
    """Whether `error` says that a collective failed: too late, or a connection broken."""
    # gloo raises plain RuntimeErrors that begin with the path of its source file.
    from_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return isinstance(error, dist.DistError) or from_gloo


def describe_rank(store: Store, other: int) -> str:
    """What can be said of a rank that gives no sign."""
    where = f" ({store.get(_process_key(other)).decode()})"
    return f"rank {other}{where} does not answer: it has died or hangs, or its machine is cut off"


def _process_key(of_rank: int) -> str:
    return f"process/{of_rank}"


def ask_store(question: Callable[[Store], None], timeout_s: float) -> None:
    """Run `question` on the store by which the ranks found each other, for at most `timeout_s`."""

    def ask() -> None:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with suppress(OSError, RuntimeError):
            # Asked in vain, the store itself would fill the screen with a stack trace.
            socket.create_connection(address, STORE_TIMEOUT_S).close()
            question(_store())

    # A store whose machine froze would hold this rank as well.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)


def _store() -> Store:
    return dist.PrefixStore("run.py", dist.distributed_c10d._get_default_store())
