"""Energy that a machine counts by itself: RAPL's package domains of a CPU, NVML's total of a GPU.

A counter is read before and after many passes of one network, from one of its updates to a later one, with nothing else measured beside
it. The energy of a pass is all that the package or the board took meanwhile, what it takes at rest included; power at rest is recorded
beside it. Where a machine exposes no counter, `why_not_exposed` says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lowsearch.errors import DeviceError

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
LOOP_S = 1.0
"""So long a network is repeated: NVML brings its total up to date every 20 to 100 ms."""
REST_S = 0.5
_CHUNK_S = 0.002
"""Between two looks at the counter: a look at NVML's takes a good part of a millisecond."""
_STALLED_S = 2.0

Run = Callable[[], None]


class EnergyCounter(Protocol):
    """Counts energy for as long as it is looked at."""

    def read_mj(self) -> float:
        """Millijoules since the counter was opened; rises in steps."""
        ...


class RaplCounter:
    """The sum of RAPL's package domains: cores, caches and memory controller of every socket, without the memory itself.

    A domain counts microjoules up to `max_energy_range_uj` and starts again from 0, at 200 W after some twenty minutes; the counter has
    to be read more often than that.
    """

    def __init__(self, domains: Sequence[Path]) -> None:
        self._domains = tuple(domains)
        self._ranges_uj = [_whole_number(domain / "max_energy_range_uj") for domain in self._domains]
        self._last_uj = self._now_uj()
        self._total_uj = 0

    def read_mj(self) -> float:
        now_uj = self._now_uj()
        for last, now, span in zip(self._last_uj, now_uj, self._ranges_uj, strict=True):
            self._total_uj += now - last if now >= last else now + span - last
        self._last_uj = now_uj
        return self._total_uj / 1000

    def _now_uj(self) -> list[int]:
        return [_whole_number(domain / "energy_uj") for domain in self._domains]


class NvmlCounter:
    """What a whole board has taken since its driver was loaded, in steps of 20 to 100 ms. `nvml` is pynvml, or a fake of it in tests."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._first_mj = self._now_mj()

    def read_mj(self) -> float:
        return float(self._now_mj() - self._first_mj)

    def _now_mj(self) -> int:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            raise DeviceError(f"NVML counts no energy of this GPU: {error}") from error


def open_counter(kind: str, *, uuid: str | None = None, powercap: Path = POWERCAP, nvml: Any = None) -> EnergyCounter:
    """The counter of a device of `kind` (`cpu`, `cuda`); `uuid` names one of several GPUs, None the first.

    Raises DeviceError, with the reason, where the machine exposes none.
    """
    if kind == "cuda":
        return _open_nvml(nvml, uuid)
    domains = sorted(domain for domain in powercap.glob("intel-rapl:*") if _is_package(domain))
    if not domains:
        raise DeviceError(f"no RAPL package domain under {powercap} (virtual machines hide it)")
    try:
        return RaplCounter(domains)
    except PermissionError as error:
        path = domains[0] / "energy_uj"
        raise DeviceError(f"{path} is not readable", hint=f"sudo chmod a+r {powercap}/intel-rapl:*/energy_uj") from error
    except (OSError, ValueError) as error:
        raise DeviceError(f"RAPL does not count: {error}") from error


def why_not_exposed(kind: str, *, powercap: Path = POWERCAP, nvml: Any = None) -> str:
    """Why a device of `kind` has no energy counter here, with the command that mends it where there is one; empty where it has one."""
    try:
        open_counter(kind, powercap=powercap, nvml=nvml)
    except DeviceError as error:
        return error.message + (f" ({error.hint})" if error.hint else "")
    return ""


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """How time passes while energy is counted; tests pass another."""

    now_s: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


def energy_of_pass_mj(
    run: Run, counter: EnergyCounter, *, wait: Run = lambda: None, loop_s: float = LOOP_S, watch: Stopwatch | None = None
) -> float:
    """Millijoules of one `run`, over at least `loop_s` of them back to back; `wait` returns when all that was queued is done.

    Raises DeviceError where the counter stands still or fails.
    """
    watch = watch or Stopwatch()
    run()
    wait()
    began = watch.now_s()
    run()
    wait()
    chunk = max(1, round(_CHUNK_S / max(watch.now_s() - began, 1e-9)))

    def work() -> None:
        for _ in range(chunk):
            run()
        wait()

    energy_mj, _, chunks = _between_updates(work, counter, loop_s, watch)
    return energy_mj / (chunks * chunk)


def power_at_rest_w(counter: EnergyCounter, *, rest_s: float = REST_S, watch: Stopwatch | None = None) -> float:
    """Watts while this process does nothing. Raises DeviceError where the counter stands still."""
    watch = watch or Stopwatch()
    energy_mj, seconds, _ = _between_updates(lambda: watch.sleep(_CHUNK_S), counter, rest_s, watch)
    return energy_mj / seconds / 1000


def _between_updates(work: Run, counter: EnergyCounter, least_s: float, watch: Stopwatch) -> tuple[float, float, int]:
    """Energy (mJ), seconds and calls of `work` from one update of the counter to the first after `least_s`."""
    start_mj, _ = _next_update(work, counter, watch)
    began, calls = watch.now_s(), 0
    while watch.now_s() - began < least_s:
        work()
        calls += 1
    end_mj, more = _next_update(work, counter, watch)
    return end_mj - start_mj, watch.now_s() - began, calls + more


def _next_update(work: Run, counter: EnergyCounter, watch: Stopwatch) -> tuple[float, int]:
    """The counter's value after it has changed, and how often `work` was called meanwhile."""
    before, began, calls = counter.read_mj(), watch.now_s(), 0
    while watch.now_s() - began < _STALLED_S:
        work()
        calls += 1
        now = counter.read_mj()
        if now > before:
            return now, calls
    raise DeviceError(f"the energy counter has not moved for {_STALLED_S:g} s", hint="latencies are measured without it")


def _open_nvml(nvml: Any, uuid: str | None) -> NvmlCounter:
    try:
        nvml = import_module("pynvml") if nvml is None else nvml
    except ImportError as error:
        raise DeviceError("NVML needs nvidia-ml-py", hint="pip install 'lowsearch[energy]'") from error
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0) if uuid is None else nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        raise DeviceError(f"NVML counts no energy: {error}") from error
    return NvmlCounter(nvml, handle)


def _is_package(domain: Path) -> bool:
    """Whether a folder of powercap is a whole socket: cores and memory are domains of their own inside it."""
    try:
        return (domain / "name").read_text(encoding="ascii").startswith("package")
    except OSError:
        return False


def _whole_number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))
