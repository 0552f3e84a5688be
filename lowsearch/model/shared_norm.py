"""BatchNorm over the images of several processes, on a CPU too, where torch's SyncBatchNorm refuses to work.

Tensors are (batch, channels, height, width); processes may hold different numbers of images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def share_batch_norms(model: nn.Module) -> nn.Module:
    """`model`, with every BatchNorm2d replaced by one over all processes of the same state; parameters are new objects."""
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                shared = SharedBatchNorm(part.num_features, part.eps, part.momentum)
                shared.load_state_dict(part.state_dict())
                setattr(parent, name, shared)
    return model


class SharedBatchNorm(nn.BatchNorm2d):
    """In training, mean and variance are those of the images of all processes; gradients are of the sum of the processes' losses."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = (0, 2, 3)
        here = input.new_tensor([input.numel() // input.shape[1]])
        total, count = _Summed.apply(torch.cat([input.sum(dims), here])).split([input.shape[1], 1])
        count = count.detach()
        mean = total / count
        centred = input - mean.view(1, -1, 1, 1)
        variance = _Summed.apply(centred.square().sum(dims)) / count
        with torch.no_grad():
            assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # unbiased, as torch keeps it
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class _Summed(torch.autograd.Function):
    """The sum of a tensor over the processes; whose losses depend on it are all asked for their gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # type: ignore[override]
        return _sum(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _sum(gradient)


def _sum(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
