"""The state in a checkpoint: copied aside while training goes on, sent to all ranks, put back.

A state is a tree of dicts, lists and tuples with tensors and plain values at its ends.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from workloads.checkpoint_folder import FileSum, HashingFile
from workloads.ranks import Ranks


def map_tensors(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same tree with each tensor changed, always in the same order."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        new = copy.copy(tree)  # keeps what nn.Module.state_dict hangs on its dict: the versions of modules
        for name, value in tree.items():
            new[name] = map_tensors(value, change)
        return new
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


class Buffers:
    """Memory of the CPU that holds one copy of the state, used again for the next; pinned where it comes from a GPU."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, tree: Any) -> Any:
        """The tree with copies of its tensors, which the next call overwrites."""
        before, self._buffers = iter(self._buffers), []

        def copied(tensor: Tensor) -> Tensor:
            buffer = next(before, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers.append(buffer)
            return buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)

        state = map_tensors(tree, copied)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return state


def write(path: Path, state: Any) -> FileSum:
    """Writes a state whole or not at all, and onto the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written; torch says so with a RuntimeError too.
    """
    scratch = path.with_suffix(".tmp")
    try:
        with open(scratch, "wb") as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # it writes and flushes, nothing else
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return hashing.sum


def broadcast(state: Any, ranks: Ranks) -> Any:
    """The state of rank 0, on the CPU of every rank; one tensor at a time goes through the device."""
    if ranks.world_size == 1:
        return state
    box = [map_tensors(state, lambda tensor: tensor.to("meta"))]
    dist.broadcast_object_list(box, device=ranks.device)
    sent: list[Tensor] = []
    map_tensors(state, sent.append)
    source = iter(sent)

    def received(meta: Tensor) -> Tensor:
        whole = torch.empty(meta.shape, dtype=meta.dtype, device=ranks.device)  # contiguous, as collectives want it
        if ranks.rank == 0:
            whole.copy_(next(source))
        dist.broadcast(whole, 0)
        return torch.empty_like(meta, device="cpu").copy_(whole)

    return map_tensors(box[0], received)


def load(state: dict[str, Any], method: nn.Module, optimizer: Optimizer | None) -> None:
    """Puts a state back; what is whole in it is shared out where the parameter is.

    Raises:
        RuntimeError: of another model; names the keys.
        ValueError: of another optimizer.
    """
    own = method.state_dict()
    weights = copy.copy(state["method"])
    for name, value in weights.items():
        weights[name] = _like(value, own.get(name))
    method.load_state_dict(weights)
    if optimizer is not None:
        numbered = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
        moments = {
            number: {key: _like(value, numbered.get(number)) for key, value in slots.items()}
            for number, slots in state["optimizer"]["state"].items()
        }
        optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def _like(value: Any, target: Tensor | None) -> Any:
    if not is_shared_out(target) or is_shared_out(value) or getattr(value, "shape", None) != target.shape:  # type: ignore[union-attr]
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[union-attr]
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)  # type: ignore[union-attr]


def is_shared_out(value: Any) -> bool:
    """Whether it is a DTensor; asked so because most runs have none, and never import them."""
    return hasattr(value, "device_mesh")
