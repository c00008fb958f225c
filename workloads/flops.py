"""How much arithmetic a step is, and how much a device could do: model FLOPs utilisation (MFU).

Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: the arithmetic that the model asks for, without what is
computed again to save memory, over what the devices could have done in that time.
"""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workloads.methods.base import Batch, Method, Progress

logger = logging.getLogger(__name__)

LATER = Progress(step=1, epoch=1, total_steps=2)  # in the first epoch some methods only fill a memory

# Dense peaks in TFLOP/s from NVIDIA's data sheets (where those quote sparsity: half of it) as the words that the
# device's name must hold, fp32 without TF32, fp16 on tensor cores, bf16 likewise (None: not in hardware). The first
# row that fits counts.
_PEAKS: tuple[tuple[set[str], float, float, float | None], ...] = (
    ({"V100", "PCIE"}, 14.0, 112.0, None),
    ({"V100"}, 15.7, 125.0, None),  # SXM2
    ({"T4"}, 8.1, 65.0, None),
    ({"A10"}, 31.2, 125.0, 125.0),
    ({"A10G"}, 31.52, 70.0, 70.0),
    ({"L4"}, 30.3, 121.0, 121.0),
    ({"L40S"}, 91.6, 362.05, 362.05),
    ({"A100"}, 19.5, 312.0, 312.0),
    ({"H100", "PCIE"}, 51.0, 756.0, 756.0),
    ({"H100", "NVL"}, 60.0, 835.5, 835.5),
    ({"H100"}, 67.0, 989.4, 989.4),  # SXM
    ({"H200", "NVL"}, 60.0, 835.5, 835.5),
    ({"H200"}, 67.0, 989.4, 989.4),  # SXM
    ({"B200"}, 75.0, 2250.0, 2250.0),
)


class _Emptied(TorchFunctionMode):
    """Within, deep copies of tensors are on the meta device: shapes without memory or values.

    Reaches tensors that no module has registered too, such as the teachers that methods hold in tuples.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            original, memo = args
            memo[id(original)] = emptied = self._empty(original)
            return emptied
        if func is Tensor.clone:  # `nn.Parameter` deep-copies itself by this
            return self._empty(args[0])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _empty(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)


def count(method: Method, batch: Batch, progress: Progress) -> int | None:
    """FLOPs of forward and backward of one micro-batch: matrix products and convolutions, 2 a multiply-add.

    Runs a copy of the method on the meta device: nothing is computed, and nothing of the method, of the batch or of
    torch's generators changes. Call it before the method is spread: what is recomputed is not to be counted, and
    sharded weights do not copy.

    Args:
        method: as it trains.
        batch: a micro-batch on any device, as the method gets it; only shapes and types matter.
        progress: where in the training; matters to methods that change with it.

    Returns:
        None, with the reason in the log, where the loss cannot be had from shapes alone: a method whose control flow
        or whose shapes depend on values (`.item()`, `if tensor`, indexing by a boolean mask), talks to other ranks in
        its forward, or has no loss yet.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    devices = {p.device for p in method.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            with _Emptied():
                shapes, inputs = copy.deepcopy((method, batch))
            # fused attention computes its scores again in backward, and on CPUs it is not counted at all
            with torch.enable_grad(), counter, sdpa_kernel(SDPBackend.MATH):
                loss = shapes(inputs, progress).loss
                if loss is None:
                    raise ValueError(f"it has no loss at step {progress.step}")
                loss.backward()
    except Exception as error:  # whatever a method's own code raises where it meets a tensor without values
        reason = (str(error).splitlines() or [""])[0]
        logger.info("FLOPs of %s are not counted: %s: %s", type(method).__name__, type(error).__name__, reason)
        return None
    return int(counter.get_total_flops())


def peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device can do at most, by its data sheet.

    Args:
        device: any.
        precision: fp32 (convolutions may exceed it: torch lets cuDNN use TF32 for them), bf16 or fp16.

    Returns:
        None for CPUs, for parts of a GPU (MIG) and for GPUs that are not in the table.
    """
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """The same by the name that the driver gives, such as `NVIDIA H100 80GB HBM3`."""
    words = set(re.split(r"[\s-]+", name.upper()))
    if "MIG" in words:
        return None
    for needed, fp32, fp16, bf16 in _PEAKS:
        if needed <= words:
            tera = {"fp32": fp32, "fp16": fp16, "bf16": bf16}[precision]
            return None if tera is None else tera * 1e12
    return None


def mfu(flops_per_step: float, step_time_s: float, peak: float, devices: int) -> float:
    """Share of the peak that is put to use.

    Args:
        flops_per_step: of all devices together.
        step_time_s: of an optimizer step.
        peak: FLOP/s of one device.
        devices: how many.
    """
    return flops_per_step / (step_time_s * peak * devices)
