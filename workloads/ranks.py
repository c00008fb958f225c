"""Who else runs this job: rank, world size, and the few things that ranks agree on.

One process is the world of size 1, where every agreement is free; the loop has no
branch for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks, on the CPU."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values.cpu()

    def means(self, *values: float) -> list[float]:
        """Mean over ranks of each of `values`, in one exchange."""
        if self.world_size == 1:
            return list(values)
        return self.mean(torch.tensor(values, dtype=torch.float32, device=self.device)).tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.means(flag)[0] > 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
