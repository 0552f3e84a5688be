"""Training-free proxies: what an untrained network is said to reveal of its accuracy, each written from the definitions in its paper.

A proxy is `(arch, batch, seed) -> score`, larger meaning better. The networks get the random weights that the papers assume (He,
fan in), not ours, in which residual branches start at zero and would be invisible. A score ranks networks at best and is never called
an accuracy; `lowsearch trust` says how well each ranks those of a study, beside MACs and params, which are hard to beat.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.scores import Scores
from lowsearch.arch import Arch
from lowsearch.data import Split

if TYPE_CHECKING:
    from torch import Tensor, nn

N_IMAGES = 32
"""In a batch, unless told otherwise: what 224 px networks leave room for."""
_ZICO_BATCHES = 2
_EPSILON = 1e-8


def naswot(arch: Arch, batch: Split, *, seed: int) -> float:
    """NAS without training (arXiv 2006.04647): how differently images switch the activation functions on."""
    return naswot_of(_random_network(arch, seed), _input(arch, batch))


def synflow(arch: Arch, batch: Split, *, seed: int) -> float:
    """Synaptic flow (arXiv 2006.05467), summed over all weights, as a logarithm. Reads no image."""
    return synflow_of(_random_network(arch, seed), (1, 3, arch.resolution_px, arch.resolution_px))


def zico(arch: Arch, batch: Split, *, seed: int) -> float:
    """ZiCo (arXiv 2301.11300): how steady the size of every weight's gradient is from one part of the batch to the next."""
    return zico_of(_random_network(arch, seed), _input(arch, batch), batch.labels)


def az_nas_parts(arch: Arch, batch: Split, *, seed: int) -> AzNasParts:
    """The four scores of AZ-NAS. As in the paper the input is noise, as many images as the batch has; complexity is MACs."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise_BCHW = torch.randn((len(batch), 3, arch.resolution_px, arch.resolution_px), generator=generator)
    network = _random_network(arch, seed)
    places = [place for place, block in arch.named_blocks() if block.kind != "head"]
    parts = az_nas_of(network, noise_BCHW, [network.get_submodule(place) for place in places], generator=generator)
    return dataclasses.replace(parts, complexity=float(cost.count(arch).macs))


PROXIES: dict[str, Callable[..., float]] = {"NASWOT": naswot, "SynFlow": synflow, "ZiCo": zico}
"""By the name that tables show; AZ-NAS beside them ranks networks among each other (`az_nas`)."""


def proxy_scores(
    archs: Sequence[Arch],
    batch: Split,
    *,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Scores]:
    """By name, every proxy and every part of AZ-NAS, which are computed together; its aggregate compares the networks of this very call."""
    rows: list[dict[str, float]] = []
    parts: list[AzNasParts] = []
    spent_s = dict.fromkeys([*PROXIES, "AZ-NAS"], 0.0)

    def timed(name: str, score: Callable[..., Any], arch: Arch) -> Any:
        before = cpu_clock()
        value = score(arch, batch, seed=seed)
        spent_s[name] += cpu_clock() - before
        return value

    for number, arch in enumerate(archs, start=1):
        rows.append({name: timed(name, score, arch) for name, score in PROXIES.items()})
        parts.append(timed("AZ-NAS", az_nas_parts, arch))
        if progress is not None:
            progress(number, len(archs), "proxies")
    found = {name: np.array([row[name] for row in rows]) for name in PROXIES}
    found["AZ-NAS"] = az_nas(parts)
    found |= {f"AZ-NAS {name}": np.array([getattr(p, name) for p in parts]) for name in AzNasParts.__slots__}
    return {
        name: Scores(source=f"proxy:{name}", unit="rank", mean=values, cpu_seconds=spent_s[name if name in PROXIES else "AZ-NAS"])
        for name, values in found.items()
    }


# The equations, on any network ------------------------------------------------------------------------------------------


def naswot_of(network: nn.Module, x: Tensor) -> float:
    """log |det K|, where K (B, B) counts the activation functions that two images leave in the same state, on or off."""
    import torch

    kernel = np.zeros((len(x), len(x)))

    def count(values: Tensor) -> Tensor:
        on = (values > 0).reshape(len(values), -1).double().numpy()
        kernel[...] += on @ on.T + (1 - on) @ (1 - on).T
        return values

    with torch.no_grad(), _intercepting(activations=count, instead=False):
        network.train()(x)
    return float(np.linalg.slogdet(kernel)[1])


def synflow_of(network: nn.Module, input_shape: tuple[int, ...]) -> float:
    """log of the sum over weights of |w dR/dw|, R being the sum of the outputs for an image of ones with all weights made positive.

    Norms and activation functions are taken out: the measure is of the linear network. The logarithm, because the sum spans
    hundreds of orders of magnitude.
    """
    import torch

    network = network.double().eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.abs_()
    with _intercepting(activations=lambda values: values, norms=lambda values: values):
        network(torch.ones(input_shape, dtype=torch.float64)).sum().backward()
    flow = sum(float((w.detach() * w.grad).abs().sum()) for w in network.parameters() if w.grad is not None)
    return float(np.log(flow))


def zico_of(network: nn.Module, x: Tensor, labels: np.ndarray, *, n_batches: int = _ZICO_BATCHES) -> float:
    """Sum over layers of the log of the sum over weights of mean / standard deviation of |gradient| over `n_batches` parts of the batch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    network.train()
    sizes: list[list[np.ndarray]] = [[] for _ in layers]
    for part, targets in zip(x.chunk(n_batches), torch.from_numpy(labels).chunk(n_batches), strict=True):
        network.zero_grad()
        F.cross_entropy(network(part), targets).backward()
        for layer, seen in zip(layers, sizes, strict=True):
            assert layer.weight.grad is not None
            seen.append(layer.weight.grad.abs().double().numpy().ravel())
    return zico_of_gradients([np.stack(seen) for seen in sizes])


def zico_of_gradients(sizes: Sequence[np.ndarray]) -> float:
    """The sum from the |gradients| of every layer, (n_batches, n_weights); weights whose gradient never changes say nothing."""
    total = 0.0
    for layer in sizes:
        mean, std = layer.mean(axis=0), layer.std(axis=0)
        steady = float((mean[std > 0] / std[std > 0]).sum())
        total += np.log(steady) if steady > 0 else 0.0
    return float(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class AzNasParts:
    """The four scores of AZ-NAS (arXiv 2403.19232) of one network."""

    expressivity: float
    """Sum over blocks of the entropy of the principal components of their features."""
    progressivity: float
    """Smallest growth of that entropy from one block to the next."""
    trainability: float
    """Mean over blocks of 2 - s - 1 / s, s being the spectral norm of the block's Jacobian: 0 where gradients keep their size."""
    complexity: float = 0.0


def az_nas(parts: Sequence[AzNasParts]) -> np.ndarray:
    """(n,) the aggregate: sum over the four scores of the log of the network's rank over n; 0 for one that is best in all."""
    from scipy.stats import rankdata

    table = np.array([[getattr(p, name) for name in AzNasParts.__slots__] for p in parts], dtype=float).reshape(len(parts), -1)
    return np.log(rankdata(table, axis=0) / max(len(parts), 1)).sum(axis=1)


def az_nas_of(network: nn.Module, x: Tensor, blocks: Sequence[nn.Module], *, generator: Any) -> AzNasParts:
    """The scores of `network` on `x`, from the outputs (B, C, H, W) of its `blocks`, in the order they run."""
    features: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        features.append(output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    network.train()(x)
    for hook in hooks:
        hook.remove()
    entropies = np.array([_entropy(f) for f in features])
    norms = [_jacobian_norm(before, after, generator) for before, after in zip(features, features[1:], strict=False)]
    return AzNasParts(
        expressivity=float(entropies.sum()), progressivity=float(np.diff(entropies).min()),
        trainability=float(np.mean([2 - s - 1 / (s + _EPSILON) for s in norms])),
    )  # fmt: skip


def _entropy(feature_BCHW: Tensor) -> float:
    """Entropy of the shares that the principal components of the channels have in their variance."""
    rows = feature_BCHW.detach().double().permute(0, 2, 3, 1).reshape(-1, feature_BCHW.shape[1]).numpy()
    rows = rows - rows.mean(axis=0)
    values = np.clip(np.linalg.eigvalsh(rows.T @ rows / len(rows)), 0, None)
    shares = values / max(values.sum(), 1e-300)
    return float(-(shares * np.log(shares + _EPSILON)).sum())


def _jacobian_norm(before: Tensor, after: Tensor, generator: Any) -> float:
    """Spectral norm of the mean of J^T v v^T over pixels, v random signs: an estimate of the block's Jacobian J (Hutchinson).

    Where the block has a stride, each pixel of `after` is paired with all pixels of `before` that it covers.
    """
    import torch
    import torch.nn.functional as F

    signs = torch.randint(0, 2, after.shape, generator=generator).to(after) * 2 - 1
    (pulled,) = torch.autograd.grad(after, before, signs, retain_graph=True)
    stride = before.shape[-1] // after.shape[-1]
    if stride > 1:
        pulled = F.pixel_unshuffle(pulled, stride)
    left, right = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (pulled, signs))
    return float(torch.linalg.matrix_norm(left.T @ right / len(right), ord=2))


def _random_network(arch: Arch, seed: int) -> nn.Module:
    """The network of `arch` with He's initialisation in every layer, the closing ones of residual branches included."""
    import torch
    from torch import nn

    from lowsearch.model.lowformer import build_model

    network = build_model(arch, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.ones_(part.weight)
    return network


def _input(arch: Arch, batch: Split) -> Tensor:
    from lowsearch.train.feed import network_input

    return network_input(batch.images, arch.resolution_px)


def _intercepting(*, activations: Callable[[Tensor], Tensor], norms: Callable[[Tensor], Tensor] | None = None, instead: bool = True) -> Any:
    """While entered, activation functions (and norms) call `activations` (`norms`) on their input: in place of their work, or before it."""
    import torch.nn.functional as F
    from torch.overrides import TorchFunctionMode

    calls = dict.fromkeys((F.relu, F.hardswish, F.gelu), activations)
    if norms is not None:
        calls |= dict.fromkeys((F.batch_norm, F.group_norm, F.layer_norm), norms)

    class Intercepting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
            call = calls.get(func)
            if call is not None:
                called = call(args[0])
                if instead:
                    return called
            return func(*args, **(kwargs or {}))

    return Intercepting()
