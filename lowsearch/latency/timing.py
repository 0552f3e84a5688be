"""What is timed and what comes of it: items, the timing of one item in one process, the latency of a network, and the statistic.

Values only; measure.py fills them, pace.py and table.py read them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from lowsearch.arch import Arch, Block, block_from_dict, block_to_dict
from lowsearch.cost import Cost
from lowsearch.latency.memory import MemoryRead


@dataclass(frozen=True, slots=True)
class TimmNetwork:
    """A network of timm by its name, at a resolution."""

    name: str
    resolution_px: int
    num_classes: int | None = None
    """None for as many as timm gives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer that is no block of the space, for comparison with those that are. Input (channels, resolution_px, resolution_px).

    `conv`: a kernel x kernel convolution at constant width in `groups`. `linear_attention`: EfficientViT's ReLU-linear attention in heads
    of `head_dim`, at full resolution and width, with its 5x5 aggregation and its projections (arXiv 2205.14756).
    """

    kind: Literal["conv", "linear_attention"]
    channels: int
    resolution_px: int
    kernel: int = 3
    groups: int = 1
    head_dim: int = 16

    @property
    def cost(self) -> Cost:
        """Counted as `lowsearch.cost` counts blocks."""
        c, pixels = self.channels, self.resolution_px**2
        if self.kind == "conv":
            weights = c * c // self.groups * self.kernel**2
            return Cost(macs=weights * pixels, params=weights, activations=c * pixels)
        # Queries, keys and values; their 5x5 depthwise and grouped 1x1 aggregation; the projection of both scales.
        weights = 3 * c * c + 3 * c * 25 + 3 * c * self.head_dim + 2 * c * c
        heads = 2 * c // self.head_dim
        products = 2 * heads * self.head_dim * (self.head_dim + 1) * pixels
        return Cost(macs=weights * pixels + products, params=weights + 2 * c, activations=12 * c * pixels)


Network = Arch | TimmNetwork
Item = Block | Layer | Network | MemoryRead

_ITEM_KEYS = ("block", "layer", "arch", "memory_bytes", "timm", "resolution_px", "num_classes")

STATES = ("hot", "warm", "cold")
"""The states of the caches that a block is timed in; docs/measurement.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one process measured of one item: a number for every round."""

    item: Item
    process: int
    hot_ms: tuple[float, ...]
    """Called back to back: what it needs is in the caches."""
    warm_ms: tuple[float, ...] = ()
    """Called in turn with other blocks, as in a network. Empty for networks and reads of memory, which are timed as they are used: back
    to back."""
    cold_ms: tuple[float, ...] = ()
    """Called after a flush of the caches. Empty where `warm_ms` is."""
    wall_over_cpu: float = 1.0
    """Wall time over the statistic, in sum over the hot samples."""
    load_average: float | None = None
    parity: float = 0.0
    """Largest difference from torch's output, as a share of the largest output."""
    step: str = ""
    """Label of the step of its process that it was interleaved in."""
    clock_mhz: float | None = None
    """Clock of a GPU's processors right after that step; None where nobody tells."""
    energy_mj: float | None = None
    """Of one pass, where the request asked for energy (energy.py) and not for times; None where the counter gave none."""
    idle_power_w: float | None = None
    """Of the device at rest, just before."""
    refused: str = ""
    """Why the runtime cannot execute the item, or not rightly; then nothing was timed. Only networks of timm are refused: one of the space
    that fails is an error."""

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "item"}
        return {**item_to_dict(self.item), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Timing:
        others = {name: value for name, value in values.items() if name not in _ITEM_KEYS}
        others |= {name: tuple(others[name]) for name in ("hot_ms", "warm_ms", "cold_ms")}
        return cls(item=item_from_dict(values), **others)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLatency:
    """Measured latency of one whole network."""

    arch: Arch
    latency_ms: float
    samples_ms: tuple[tuple[float, ...], ...]
    """A tuple for every process, in it a number for every round."""
    paces: tuple[float, ...] = ()
    """For every process, how much slower than usual the machine was then (pace.py); divided out of `latency_ms`, not of the samples."""
    wall_over_cpu: float = 1.0
    load_average: float | None = None
    energy_mj: float | None = None
    """Of one pass, rest included, by the device's own counter (energy.py); None where the machine exposes none."""
    idle_power_w: float | None = None
    """Of the device at rest, just before; None where `energy_mj` is."""

    @property
    def latency_std_ms(self) -> float:
        """Standard error of `latency_ms`, from the differences between processes; 0 where there was only one."""
        return standard_error_ms(self.samples_ms, self.paces)

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What the latency is worth, and what would make it better."""
        return verdict(row_error(self.samples_ms, self.paces), self.wall_over_cpu)


def latency_ms(samples_ms: Sequence[Sequence[float]], paces: Sequence[float] = ()) -> float:
    """The statistic over the rounds of all processes: their 25th percentile, which a few disturbed rounds do not move.

    `paces`: for every process, how much slower than usual the machine was (pace.py); it is divided out.
    """
    at_pace = [np.divide(rounds, pace) for rounds, pace in zip(samples_ms, _all(paces, samples_ms), strict=True)]
    return float(np.percentile(np.concatenate(at_pace), 25))


def standard_error_ms(samples_ms: Sequence[Sequence[float]], paces: Sequence[float] = ()) -> float:
    """Standard error of `latency_ms`, from the differences between processes; 0 where there was only one."""
    processes = [float(np.median(rounds)) / pace for rounds, pace in zip(samples_ms, _all(paces, samples_ms), strict=True)]
    return float(np.std(processes, ddof=1) / np.sqrt(len(processes))) if len(processes) > 1 else 0.0


def row_error(samples_ms: Sequence[Sequence[float]], paces: Sequence[float] = ()) -> float:
    """Relative standard error of a row of a table; 0 where there was only one process, or none.

    Of three processes or more the slowest is left out: `latency_ms`, a lower quartile, does not hear it either.
    """
    rows = sorted(
        (statistics.median(rounds) / pace, rounds, pace) for rounds, pace in zip(samples_ms, _all(paces, samples_ms), strict=True)
    )
    kept = rows[:-1] if len(rows) > 2 else rows
    if len(kept) < 2:
        return 0.0
    processes, samples, at_paces = zip(*kept, strict=True)
    return statistics.stdev(processes) / len(kept) ** 0.5 / latency_ms(samples, at_paces)


Verdict = Literal["valid", "noisy", "invalid"]
VALID, NOISY = 0.02, 0.08
"""Relative standard errors up to which a latency is valid, and noisy; beyond, it is invalid."""
BUSY = 1.3
"""Wall time over CPU time from which other work is taken to have had the processor."""


def verdict(relative_std: float, wall_over_cpu: float = 1.0) -> tuple[Verdict, str]:
    """What a measured latency is worth, and what would make it better; nothing where it is valid."""
    if relative_std <= VALID:
        return "valid", ""
    busy = wall_over_cpu > BUSY
    why = "other work took the processor: end it" if busy else "the machine changed its speed: fix its clock, or wait"
    return ("noisy" if relative_std <= NOISY else "invalid"), f"{why}, and measure again"


def _all(paces: Sequence[float], samples_ms: Sequence[object]) -> Sequence[float]:
    """A pace for every process: the usual one where none is known."""
    return paces or [1.0] * len(samples_ms)


def item_to_dict(item: Item) -> dict[str, Any]:
    if isinstance(item, MemoryRead):
        return {"memory_bytes": item.n_bytes}
    if isinstance(item, TimmNetwork):
        return {"timm": item.name, "resolution_px": item.resolution_px, "num_classes": item.num_classes}
    if isinstance(item, Layer):
        return {"layer": asdict(item)}
    return {"arch": item.to_dict()} if isinstance(item, Arch) else {"block": block_to_dict(item)}


def item_from_dict(values: Mapping[str, Any]) -> Item:
    if "memory_bytes" in values:
        return MemoryRead(int(values["memory_bytes"]))
    if "timm" in values:
        return TimmNetwork(str(values["timm"]), int(values["resolution_px"]), values.get("num_classes"))
    if "layer" in values:
        return Layer(**values["layer"])
    return Arch.from_dict(values["arch"]) if "arch" in values else block_from_dict(values["block"])
