"""Processes, devices and sharding: everything that knows that there may be more than one rank.

One process needs no group at all. Under torchrun the group is gloo on CPUs and gloo + NCCL on
GPUs, the local rank picks the device. Models are wrapped in DDP or sharded by FSDP2; both average
gradients over ranks, so the training step multiplies its loss by the number of ranks.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from utils import UserError

# Parameter, gradient and two AdamW moments in fp32.
TRAINING_BYTES_PER_PARAMETER = 16
# Above this share of a device, activations no longer fit beside the training state.
STATE_SHARE_OF_DEVICE = 0.6


def initialize(timeout_s: float = 1800) -> None:
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
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def shut_down() -> None:
    """Leave the process group."""
    if dist.is_initialized():
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


def choose_parallel(parallel: str, num_parameters: int) -> tuple[str, str]:
    """("none", "ddp" or "fsdp", the reason): `auto` shards when one device has too little room."""
    if world_size() == 1:
        return "none", "one process"
    if parallel != "auto":
        return parallel, "as configured"
    if not torch.cuda.is_available():
        return "ddp", "processes on CPUs share their memory"
    state_bytes = num_parameters * TRAINING_BYTES_PER_PARAMETER
    device_bytes = torch.cuda.get_device_properties(device()).total_memory
    sizes = f"training state {state_bytes / 2**30:.1f} GiB, device {device_bytes / 2**30:.1f} GiB"
    return ("ddp" if state_bytes < STATE_SHARE_OF_DEVICE * device_bytes else "fsdp"), sizes


def parallelize(model: nn.Module, parallel: str) -> nn.Module:
    """Wrap `model` for training on several ranks: "none", "ddp" or "fsdp" (sharded in place)."""
    if parallel == "ddp":
        device_ids = [local_rank()] if torch.cuda.is_available() else None
        return DistributedDataParallel(model, device_ids=device_ids)
    if parallel == "fsdp":
        fully_shard(model)
        register_fsdp_forward_method(model, "generate")
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DDP's shell."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients in the backward passes inside only when `enabled`: the last micro-step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    skip = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if skip else nullcontext():
        yield


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Hold whole parameters inside, so that ranks may run different numbers of passes there."""
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """() the global 2-norm of all gradients, the same on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
