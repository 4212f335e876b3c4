"""How the ranks share a model: DDP copies it, FSDP2 shards it.

Both average gradients over ranks, so the training step multiplies its loss by the number of ranks.
A training step of Coconut calls every block once per latent pass. DDP is not affected. FSDP2
gathers a block's parameters before each call, and ranks whose batches take different numbers of
passes would wait for each other forever; so under FSDP all ranks take the same number of passes
(`Coconut.layout`, num_passes).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from engine import distributed

# The rest of a device is for its runtime, and for what its allocator cannot use.
USABLE_SHARE_OF_DEVICE = 0.9


@dataclass(frozen=True)
class Parallel:
    """How the ranks share a model.

    kind: "none", "ddp" or "fsdp".
    gathered: under FSDP, whether whole parameters stay from a step's first pass to its end, which
        costs their memory and saves a gather for every pass of every block.
    reason: why, for the log.
    """

    kind: str
    gathered: bool
    reason: str


def choose_parallel(parallel: str, peak_bytes: Callable[[str, bool], int]) -> Parallel:
    """What `parallel` means here: `auto` shards where a step does not fit one device.

    peak_bytes: (kind, gathered) -> what a training step needs of a device; called on GPUs alone,
        for several ranks.

    The smallest device decides for all; every rank must call.
    """
    if distributed.world_size() == 1:
        return Parallel("none", False, "one process")
    if not torch.cuda.is_available():
        reason = "processes on CPUs share their memory" if parallel == "auto" else "as configured"
        return Parallel("ddp" if parallel == "auto" else parallel, True, reason)
    if parallel == "ddp":
        return Parallel("ddp", False, "as configured")
    # Ranks that chose differently would wait for each other for ever.
    memory_bytes = distributed.min_over_ranks(
        torch.cuda.get_device_properties(distributed.device()).total_memory
    )
    limit = USABLE_SHARE_OF_DEVICE * memory_bytes
    reason = "as configured"
    if parallel == "auto":
        needed = peak_bytes("ddp", False)
        reason = f"a step needs {needed / 2**30:.1f} GiB, limit {limit / 2**30:.1f} GiB per device"
        if needed < limit:
            return Parallel("ddp", False, reason)
    gathered = peak_bytes("fsdp", True) < limit
    held = "held whole through a step" if gathered else "gathered for every pass of a block"
    return Parallel("fsdp", gathered, f"{reason}; parameters {held}")


def parallelize(
    model: nn.Module, parallel: Parallel, blocks: Sequence[nn.Module] = (), bf16: bool = False
) -> nn.Module:
    """`model` on this rank's device, wrapped for training on several ranks.

    Under FSDP it is sharded in place, block by block, then the rest: it should still be on the CPU,
    because the whole model may not fit the device.

    blocks: the modules of `model` that FSDP shards separately.
    bf16: under FSDP blocks gather their parameters in bf16, from shards that stay in fp32.
    """
    if parallel.kind != "fsdp":
        model = model.to(distributed.device())
        if parallel.kind == "none":
            return model
        device_ids = [distributed.local_rank()] if torch.cuda.is_available() else None
        # Every rank builds the same buffers (positions, masks), and training changes none. Before
        # torch 2.13 the option has another name.
        options = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, **{name: False}
        )
    # What autocast would compute in bf16 is gathered in bf16. Everything else stays in fp32, also
    # the residual stream, so that sharding changes no figure: norms are a separate group, and
    # embeddings, final norm and head belong to the root.
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    policy = MixedPrecisionPolicy(**dtypes, cast_forward_inputs=False)
    for block in blocks:
        if bf16:
            fully_shard(_norms(block))
        fully_shard(block, mp_policy=policy)
    fully_shard(model)
    for module in _shards(model):
        # FSDP2 does not report this setting, and gathered_parameters has to restore it.
        module.reshards_after_forward = module is not model and not parallel.gathered
        module.set_reshard_after_forward(module.reshards_after_forward, recurse=False)
    if parallel.gathered:
        model.set_reshard_after_backward(False)
    for name in ("answer", "generate"):
        register_fsdp_forward_method(model, name)
    return model


def arrange_buckets(model: nn.Module, *example: torch.Tensor) -> None:
    """Let DDP arrange its gradient buckets by a batch that is the same at every start.

    DDP arranges them once, in the order in which gradients first arrive. The last bits of a sum
    over three or more ranks depend on that order, which must not depend on where a run resumes.

    model: a Coconut module, wrapped or not.
    example: the arguments of `model`; its logits are differentiated and the gradients dropped.
    """
    if isinstance(model, DistributedDataParallel):
        model.eval()
        # DDP waits for the gradient of every parameter, and these logits depend on no thought.
        extra = unwrap(model).extra_parameters().values()
        unused = sum(parameter.sum() for parameter in extra)
        (model(*example).logits.sum() + 0 * unused).backward()
        model.zero_grad(set_to_none=True)


def _norms(block: nn.Module) -> list[nn.Module]:
    """The modules of `block` whose own parameters are all vectors, which scale but do not multiply
    matrices."""
    own = {module: list(module.parameters(recurse=False)) for module in block.modules()}
    return [
        module for module, params in own.items() if params and all(p.dim() == 1 for p in params)
    ]


def is_sharded(model: nn.Module) -> bool:
    """Whether `model` is sharded, so that ranks must take the same number of passes."""
    return isinstance(model, FSDPModule)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _shards(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _release(model: nn.Module) -> None:
    """Free the whole parameters; the shards, which the optimizer updates, remain."""
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
