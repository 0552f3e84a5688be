"""MACs of a built network by three public tools, as cross-checks of the closed form in `lowsearch.cost`.

Each counts something else. Only torch's counter agrees exactly; the gaps of the other two are stated here and held by tests.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowsearch.arch import Arch
from lowsearch.model.lowformer import LowFormer


def count_with_torch(arch: Arch) -> int:
    """MACs by torch's FlopCounterMode on the meta device, which allocates no weights and computes nothing. Equal to the closed form.

    Counts convolutions, transposed convolutions and matrix products, attention's included. (On the CPU it misses fused attention.)
    """
    model, image = _network(arch, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def count_with_fvcore(arch: Arch) -> int:
    """MACs by fvcore, which calls them flops. Compared with the closed form it

    - misses attention's two matrix products: it does not know the fused operation and reads it as 0;
    - adds 2 for every element of a BatchNorm, 5 of a GroupNorm or LayerNorm, 1 of nearest upsampling and of what is pooled.
    """
    return sum(count_operators_with_fvcore(arch).values())


def count_operators_with_fvcore(arch: Arch) -> Counter[str]:
    """fvcore's MACs by operator: `conv`, `linear`, and the norms, upsampling and pooling that have none."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(*_network(arch, device="cpu"))  # it traces, which the meta device does not support
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return Counter({name: int(macs) for name, macs in analysis.by_operator().items()})


def count_with_thop(arch: Arch) -> int:
    """MACs by thop. Compared with the closed form it

    - never counts attention's two matrix products: it sees modules only;
    - counts a transposed convolution by its output pixels, which is stride^2 times too often;
    - adds 4 for every element of a BatchNorm or LayerNorm (not of a GroupNorm).

    It also leaves its own buffers in the network's state dict, so it never gets to see a network that somebody goes on using.
    """
    from thop import profile

    model, image = _network(arch, device="meta")
    return int(profile(model, inputs=(image,), verbose=False)[0])


def _network(arch: Arch, *, device: str) -> tuple[nn.Module, Tensor]:
    """A throwaway network of `arch` and an image for it."""
    with torch.device(device):
        return LowFormer(arch).eval(), torch.zeros(1, 3, arch.resolution_px, arch.resolution_px)
