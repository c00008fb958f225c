"""BatchNorm over the batch of all ranks where torch has none: on CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from workloads.parts.gather import over_ranks


class GlobalBatchNorm(_BatchNorm):
    """While it trains, mean and variance are those of the global batch; gradients flow through them over all ranks.

    So two ranks compute what one does. `nn.SyncBatchNorm` is this on GPUs. What a BatchNorm of timm has behind it, an
    activation, is behind this one too, as its children by the same names.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, f"got {input.ndim} axes, expected [B, C, ...]"

    def forward(self, input: Tensor) -> Tensor:
        x = self._over_ranks(input) if self.training and dist.is_initialized() else super().forward(input)
        for behind in self.children():
            x = behind(x)
        return x

    def _over_ranks(self, input: Tensor) -> Tensor:
        axes = [axis for axis in range(input.ndim) if axis != 1]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.float()
        n = over_ranks(torch.tensor(float(x.numel() // x.shape[1])))
        mean = over_ranks(x.sum(axes)) / n
        centred = x - mean.view(shape)
        var = over_ranks(centred.square().sum(axes)) / n
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * n / (n - 1), momentum)
        x = centred * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)


def convert(module: nn.Module) -> nn.Module:
    """The network, each BatchNorm replaced in place by one over all ranks with the same parameters and buffers."""
    if isinstance(module, _BatchNorm):
        ours = GlobalBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        ours.weight, ours.bias = module.weight, module.bias
        ours._buffers = module._buffers
        for name, child in module.named_children():
            ours.add_module(name, child)
        return ours.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert(child))
    return module
