"""Checkpoints of a method whose weights are shared out (FSDP): each rank writes its part, any number of ranks reads.

    step-00000050/__0_0.distcp, __1_0.distcp, ...   parts of torch.distributed.checkpoint: tensors by name
    step-00000050/.metadata                         which part of which tensor is where
    step-00000050/rest.pt                           all that is no tensor of the method or its optimizer

All ranks see one folder. The metadata is a pickle, and torch unpickles what is no tensor without care: so nothing
but tensors is given to it, and the metadata is read by names that are allowed.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import async_save as save_parts
from torch.optim import Optimizer

from workloads.checkpoint_folder import FileSum, remove, stem, sum_of
from workloads.checkpoint_state import Buffers, is_shared_out, write
from workloads.ranks import Ranks

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
REST = "rest.pt"
UNREADABLE = (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError, CheckpointException)


class ShardedWriter:
    """Writes what all ranks hold together.

    Its collectives run in a thread, on a group of their own: those of training go on meanwhile.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )
        self._buffers = Buffers()

    def copy(
        self, step: int, method: nn.Module, optimizer: Optimizer, extra: dict[str, Any]
    ) -> Callable[[], dict[str, FileSum]]:
        """Copies the state aside -> what writes it, for another thread, and tells the files."""
        path = self._folder / stem(step)
        tensors, rest = _split(method, optimizer)
        rest = self._buffers.copy(rest | {"step": step, "extra": extra})
        parts = save_parts(
            tensors,
            storage_writer=FileSystemWriter(path),
            planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),  # statistics of BatchNorm: those of rank 0
            process_group=self._group,
            async_stager=self._stager,
        )

        def finish() -> dict[str, FileSum]:
            try:
                parts.result()  # type: ignore[union-attr]
            except CheckpointException as error:  # a BaseException, which would end the thread
                raise OSError("; ".join(f"rank {rank}: {why[0]}" for rank, why in error.failures.items())) from error
            return self._together(path, lambda: self._own(path, rest))

        return finish

    def _own(self, path: Path, rest: dict[str, Any]) -> dict[str, FileSum]:
        rank = self._ranks.rank
        own = {part.name: sum_of(part) for part in path.glob(f"__{rank}_*.distcp")}
        if rank == 0:
            own |= {".metadata": sum_of(path / ".metadata"), REST: write(path / REST, rest)}
        return own

    def _together(self, path: Path, own: Callable[[], dict[str, FileSum]]) -> dict[str, FileSum]:
        """The files of all ranks; when one has failed, all do."""
        mine: dict[str, FileSum] | str
        try:
            mine = own()
        except (OSError, RuntimeError) as error:
            mine = f"rank {self._ranks.rank}: {error}"
        answers: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(answers, mine, group=self._group)
        if failed := [answer for answer in answers if isinstance(answer, str)]:
            raise OSError("; ".join(failed))
        files: dict[str, FileSum] = {name: total for answer in answers for name, total in answer.items()}
        if self._ranks.rank == 0:
            for old in path.iterdir():
                if old.name not in files:  # of an attempt with more ranks that was cut short
                    remove(old)
        return {f"{path.name}/{name}": files[name] for name in sorted(files)}


def _split(method: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of method and optimizer by name, and the rest."""
    tensors = {f"method.{name}": value for name, value in method.state_dict().items()}
    packed = optimizer.state_dict()
    others: dict[int, dict[str, Any]] = {}
    for number, name in _names(method, optimizer).items():
        slots = packed["state"].get(number)
        if slots is not None:
            tensors |= {f"optimizer.{name}.{key}": v for key, v in slots.items() if isinstance(v, Tensor)}
            others[number] = {key: v for key, v in slots.items() if not isinstance(v, Tensor)}
    return tensors, {"optimizer": packed | {"state": others}}


def _names(method: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """The names of the parameters that an optimizer numbers."""
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {number: names[id(parameter)] for number, parameter in enumerate(parameters)}


def read_metadata(path: Path) -> Metadata:
    """What the parts of a checkpoint hold.

    Raises:
        OSError, or one of UNREADABLE: it cannot be read, or names what no metadata holds.
    """
    with open(path / ".metadata", "rb") as file:
        return _Metadata(file).load()


def read(path: Path, method: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """The state in a checkpoint: each rank reads its share of what its method shares out, all of the rest."""
    state: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    own = {f"method.{name}": value for name, value in method.state_dict().items()}
    numbers: dict[str, int] = {}
    if optimizer is not None:
        numbers = {name: number for number, name in _names(method, optimizer).items()}
    parameters = dict(method.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, saved in read_metadata(path).state_dict_metadata.items():
        name = key.removeprefix("optimizer.").rpartition(".")[0]
        if key.startswith("optimizer.") and name not in numbers:
            continue
        target = own.get(key) if key.startswith("method.") else parameters[name]
        if target is not None and is_shared_out(target) and target.shape == saved.size:  # type: ignore[union-attr]
            tensors[key] = torch.empty_like(target)
        else:
            tensors[key] = torch.empty(saved.size, dtype=saved.properties.dtype)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # on purpose: a reader needs nobody else
        load_parts(tensors, storage_reader=_Reader(path), planner=DefaultLoadPlanner(), no_dist=True)
    state["method"] = {key.removeprefix("method."): v for key, v in tensors.items() if key.startswith("method.")}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, _, slot = key.removeprefix("optimizer.").rpartition(".")
            state["optimizer"]["state"].setdefault(numbers[name], {})[slot] = value
    return state


class _Reader(FileSystemReader):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(self._path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Metadata(pickle.Unpickler):
    """Makes nothing but descriptions of tensors."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        described = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        value = super().find_class(module, name) if described or module in _ALLOWED else None
        if described and isinstance(value, type) and value.__module__ == module:
            return value
        if value is not None and name in _ALLOWED.get(module, ()):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


_ALLOWED = {
    "torch": ("Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "Path"),
}
