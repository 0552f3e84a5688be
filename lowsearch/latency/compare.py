"""Whole networks of any origin side by side: presets, `arch.json` files, and timm's, in the protocol that measures everything else.

Nothing is predicted here. All networks are timed in fresh processes, interleaved with each other, after their output was compared with
torch's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.errors import DeviceError, UsageError
from lowsearch.latency.measure import Effort, Launcher, Progress, measure_energy, time_until_tight
from lowsearch.latency.pace import Samples, hot_samples
from lowsearch.latency.target import Device, Target, require_attached
from lowsearch.latency.timing import Timing, TimmNetwork, Verdict, latency_ms, standard_error_ms, verdict
from lowsearch.presets import PRESETS
from lowsearch.published import TOP1_PERCENT

DEFAULT_PX = 224
EFFORT = Effort(processes=3, round_ms=60.0, max_samples=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedNetwork:
    """One network beside the others."""

    name: str
    resolution_px: int
    latency_ms: float
    latency_std_ms: float
    """Standard error, from the differences between processes."""
    wall_over_cpu: float
    macs: int
    params: int
    top1_percent: float | None
    """Published ImageNet top-1 of the network of this name, whatever resolution it was published at; None where we know none."""

    energy_mj: float | None = None
    """Of one pass, rest included; None where the device counts none."""
    idle_power_w: float | None = None

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """What the latency is worth, and what would make it better."""
        return verdict(self.latency_std_ms / self.latency_ms, self.wall_over_cpu)

    @property
    def gmacs_per_s(self) -> float:
        """Achieved rate: where it differs, MACs and time part."""
        return self.macs / self.latency_ms / 1e6


def compare(
    names: Sequence[str],
    target: Target,
    *,
    resolution_px: int | None = None,
    seed: int = 0,
    effort: Effort | None = None,
    progress: Progress | None = None,
    launch: Launcher | None = None,
    devices: Sequence[Device] | None = None,
) -> list[ComparedNetwork]:
    """Measure the networks called `names` (presets, paths of an arch.json, timm's names) on `target`; fastest first.

    `resolution_px` holds for all of them; None: 224 px, and a file's own for an arch.json. Raises UsageError for a name nobody knows,
    DeviceError where the device is not attached or the runtime cannot execute any of them, ParityError where it computes something else
    than torch. A network of timm that it cannot execute, or not rightly, is left out with a warning.
    """
    device = require_attached(target, devices=devices)
    effort = effort or EFFORT
    items = {name: _item(name, resolution_px) for name in dict.fromkeys(names)}
    counted = {name: _count(item) for name, item in items.items()}
    unique = list(dict.fromkeys(items.values()))
    found = time_until_tight(unique, target, effort, device, seed=seed, launch=launch, progress=progress)
    samples = hot_samples(found)
    energies = measure_energy([i for i in unique if i in found], target, device, seed=seed, launch=launch, progress=progress)
    rows = [
        _row(name, item, counted[name], found[item], *samples[item], energies.get(item)) for name, item in items.items() if item in found
    ]
    if not rows:
        raise DeviceError(f"runtime {target.runtime} can execute none of {', '.join(items)}", hint="choose another --runtime")
    return sorted(rows, key=lambda row: row.latency_ms)


def _item(name: str, resolution_px: int | None) -> Arch | TimmNetwork:
    if name in PRESETS:
        return dataclasses.replace(PRESETS[name], resolution_px=resolution_px or DEFAULT_PX)
    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no such file: {name}", hint="give a preset's name, one of timm's, or the arch.json of a network")
        arch = Arch.from_json(path.read_text(encoding="utf-8"))
        return arch if resolution_px is None else dataclasses.replace(arch, resolution_px=resolution_px)
    from lowsearch.model.zoo import check_name  # imports torch

    check_name(name)
    return TimmNetwork(name, resolution_px or DEFAULT_PX)


def _count(item: Arch | TimmNetwork) -> tuple[int, int]:
    """MACs and params."""
    if isinstance(item, Arch):
        counted = cost.count(item)
    else:
        from lowsearch.model.zoo import count_timm

        counted = count_timm(item.name, item.resolution_px)
    return counted.macs, counted.params


def _row(
    name: str,
    item: Arch | TimmNetwork,
    counted: tuple[int, int],
    timings: Sequence[Timing],
    samples: Samples,
    paces: tuple[float, ...],
    energy: Timing | None,
) -> ComparedNetwork:
    return ComparedNetwork(
        name=name, resolution_px=item.resolution_px, latency_ms=latency_ms(samples, paces),
        latency_std_ms=standard_error_ms(samples, paces),
        wall_over_cpu=max(timing.wall_over_cpu for timing in timings), macs=counted[0], params=counted[1],
        top1_percent=TOP1_PERCENT.get(name), energy_mj=energy.energy_mj if energy else None,
        idle_power_w=energy.idle_power_w if energy else None,
    )  # fmt: skip
