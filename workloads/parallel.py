"""How a method is spread over the ranks and how its blocks compute: DDP or FSDP2, checkpointed, compiled.

All of it is put on the blocks of the network, which are found by their shape: two or more
siblings of one class that hold parameters. So a method needs to know nothing of it. Tables of rows that are shared
out by themselves (`RowsOverRanks`) are left alone: each rank trains its own rows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.checkpoint_state import is_shared_out
from workloads.parts import batch_norm
from workloads.parts.lars_lamb import own_parts
from workloads.parts.sharded_softmax import RowsOverRanks
from workloads.ranks import Ranks
from workloads.spec_training import Engine

logger = logging.getLogger(__name__)

BYTES_OF_STATE = 16  # of a trained parameter: weight, gradient and two moments in fp32
SHARE_FOR_STATE = 1 / 3  # of a GPU's memory; the rest is for activations


class Spread:
    """A method as a rank calls it.

    Attributes:
        sharded: whether weights are shared out (FSDP).
        in_parts: whether some are, by FSDP or by the method itself: then all ranks write a checkpoint together.
        channels_last: the memory format of weights, and that images should have.
    """

    def __init__(self, method: nn.Module, engine: Engine, ranks: Ranks) -> None:
        """Changes `method` in place; its optimizer is made afterwards.

        Args:
            method: on its device.
            engine: what is wanted.
            ranks: those of the job.
        """
        self.method, self._ranks = method, ranks
        self.sharded = ranks.world_size > 1 and _shards(method, engine, ranks.device)
        self.channels_last = _convolves(method) if engine.channels_last is None else engine.channels_last
        if self.channels_last:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if engine.sync_batchnorm and ranks.world_size > 1:
            _synchronise(method, ranks.device)
        for module in method.modules():
            if isinstance(module, RowsOverRanks):
                module.share_out(ranks.device)
        self._apart = {name: p for name, p in method.named_parameters() if is_shared_out(p)}
        self.in_parts = self.sharded or bool(self._apart)
        blocks = blocks_of(method)
        for block in blocks:  # one after the other: alike blocks are compiled once, and the method stays Python
            if engine.compile:
                block.forward = torch.compile(block.forward)
            if engine.activation_checkpointing:  # around what is compiled: dynamo passes over a block with it inside
                _recompute(block)
        self._model = self._wrapped(blocks, engine)

    def _wrapped(self, blocks: list[nn.Module], engine: Engine) -> nn.Module:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for block in blocks:
                fully_shard(block)
            fully_shard(self.method, ignored_params=set(self._apart.values()))
            return self.method
        if self._ranks.world_size == 1:
            return self.method
        from torch.nn.parallel import DistributedDataParallel

        device = self._ranks.device
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.method, list(self._apart))
        return DistributedDataParallel(
            self.method,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # neither memory for them twice nor a copy back
            forward_sync_buffers=not engine.sync_batchnorm,  # else they stay equal; queues are tens of MB a step
        )

    def __call__(self, *args: Any) -> Any:
        return self._model(*args)

    def averaging(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are averaged over ranks with the last one."""
        if self._ranks.world_size == 1:
            return contextlib.nullcontext()
        if self.sharded:
            self._model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self._model.no_sync()  # type: ignore[operator]

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Length of all tensors together, over all ranks."""
        return torch.linalg.vector_norm(self._lengths(tensors))

    def clip_each(self, tensors: Sequence[Tensor], longest: float) -> None:
        """Shortens each tensor that is longer than `longest`, by its own length over all ranks."""
        factors = (longest / (self._lengths(tensors) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(own_parts(tensors), list(factors.unbind()))

    def _lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of each tensor over all ranks; those of whole ones are the same on all."""
        lengths = list(torch._foreach_norm(own_parts(tensors)))
        if shared := [place for place, tensor in enumerate(tensors) if is_shared_out(tensor)]:
            squares = torch.stack([lengths[place] for place in shared]).square()
            dist.all_reduce(squares)
            for place, length in zip(shared, squares.sqrt().unbind(), strict=True):
                lengths[place] = length
        return torch.stack(lengths)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the method's own parameters are there in full, for calls that do not go through its forward."""
        if self.sharded:
            self._model.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            if self.sharded:
                self._model.reshard()  # type: ignore[operator]

    def finite(self) -> bool:
        """Whether every weight is, and what is remembered beside them; on every rank what is true of all."""
        tensors = own_parts([*self.method.parameters(), *self.method.buffers()])
        return not self._ranks.any(not all(bool(tensor.isfinite().all()) for tensor in tensors))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: siblings of one class, the outermost of them, each of several modules."""
    found: list[nn.Module] = []
    for child in module.children():
        alike = [other for other in module.children() if type(other) is type(child)]
        repeated = isinstance(module, nn.ModuleList | nn.Sequential) and len(alike) > 1
        if repeated and next(child.children(), None) is not None and next(child.parameters(), None) is not None:
            found.append(child)
        else:
            found += blocks_of(child)
    return found


def _convolves(method: nn.Module) -> bool:
    """Whether windows overlap anywhere, as those of the patches of a ViT do not."""
    kernels = [(m.kernel_size, m.stride) for m in method.modules() if isinstance(m, nn.Conv2d)]
    return any(size > step for kernel, stride in kernels for size, step in zip(kernel, stride, strict=True))


def _shards(method: nn.Module, engine: Engine, device: torch.device) -> bool:
    if engine.strategy != "auto":
        return engine.strategy == "fsdp"
    if device.type != "cuda":
        return False
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return trained * BYTES_OF_STATE > SHARE_FOR_STATE * torch.cuda.get_device_properties(device).total_memory


def _recompute(block: nn.Module) -> None:
    """Keeps only what goes into the block; its forward is run again in backward, with the same random numbers."""
    from torch.utils.checkpoint import checkpoint

    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _synchronise(method: nn.Module, device: torch.device) -> None:
    """BatchNorm over all ranks, in place; torch has it for GPUs, we for CPUs."""
    if device.type == "cuda":
        from workloads.models.timm_import import timm

        timm.layers.convert_sync_batchnorm(method)  # torch's own drops the activations that timm has in some
    else:
        batch_norm.convert(method)
