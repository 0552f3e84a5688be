"""Measuring, seen from the process that wants numbers: it starts fresh worker processes and collects what they time.

The protocol (docs/measurement.md): every block or network is timed in `processes` fresh processes, in each over `rounds` rounds that
are interleaved with its neighbours in shuffled order. A round's number is the 25th percentile of its samples, the latency the
25th percentile over the rounds of all processes. Nothing here imports torch: networks run in the workers (worker.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import lowsearch
from lowsearch import cost, errors
from lowsearch.arch import Arch, Block
from lowsearch.errors import DeviceError, LowsearchError
from lowsearch.latency.energy import why_not_exposed
from lowsearch.latency.memory import MemoryRead
from lowsearch.latency.pace import Samples, hot_samples
from lowsearch.latency.target import Device, Target, require_attached
from lowsearch.latency.timing import (
    Item,
    Layer,
    Network,
    NetworkLatency,
    Timing,
    TimmNetwork,
    item_from_dict,
    item_to_dict,
    latency_ms,
    standard_error_ms,
)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, label) after every step of a long job."""

log = logging.getLogger(__name__)

BLOCKS_PER_STEP = 24
TIGHT = 0.02
"""Relative standard error that whole networks are measured to, if that takes no more than MAX_PROCESSES."""
MAX_PROCESSES = 5
TIMM_BYTES = 100 << 20
BYTES_PER_STEP = 400 << 20
"""Weights of the networks that are interleaved with each other; a runtime may hold them three times over."""
BYTES_PER_PROCESS = 4 << 30
"""A runtime may not let go of what it compiled (TorchScript keeps more than a network's weights): the next step has a new process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often things are timed. The defaults resolve about 1 % on a virtual machine with other work on it."""

    processes: int = 2
    rounds: int = 3
    warmups: int = 3
    """Untimed calls before the samples of every round."""
    sample_ms: float = 0.2
    """A sample repeats a short call for about this long: it must be long beside a reading of the clock (0.5 us)."""
    round_ms: float = 2.0
    """Time for the hot samples of one round, within the two limits on their number."""
    min_samples: int = 3
    max_samples: int = 6
    turns_ms: float = 120.0
    """Time for the warm samples of one round: all blocks of a step are called in turn, again and again, within the two limits."""
    min_turns: int = 5
    max_turns: int = 20
    cold_samples: int = 3
    """Single calls of a block after a flush of the caches, each round."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}, expected a positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What one worker process is asked to do: the steps in order, the items of a step interleaved with each other."""

    target: Target
    process: int
    seed: int
    effort: Effort
    steps: tuple[tuple[Item, ...], ...]
    energy: bool = False
    """Count the energy of every network, one after the other, instead of timing it."""

    def to_json(self) -> str:
        values = dataclasses.asdict(dataclasses.replace(self, steps=()))
        return json.dumps({**values, "steps": [[item_to_dict(item) for item in step] for step in self.steps]})

    @classmethod
    def from_json(cls, text: str) -> Request:
        values = json.loads(text)
        return cls(
            target=Target.from_dict(values["target"]), process=values["process"], seed=values["seed"], effort=Effort(**values["effort"]),
            steps=tuple(tuple(item_from_dict(item) for item in step) for step in values["steps"]), energy=values["energy"],
        )  # fmt: skip


Launcher = Callable[[Request], Iterator[Timing]]
"""Runs one request in a fresh process and yields its timings as they come."""


_WORKER = ("-m", "lowsearch.latency.worker")


def steps(items: Sequence[Item], *, rng: np.random.Generator) -> tuple[tuple[Item, ...], ...]:
    """`items` in random groups that are interleaved with each other, small enough to be held in memory side by side.

    How warm a block runs depends on the blocks it takes turns with, so each group of blocks gets its share of every size. Reads of
    memory are a group of their own.
    """
    blocks = [item for item in items if not isinstance(item, Network | MemoryRead)]
    reads = [item for item in items if isinstance(item, MemoryRead)]
    sizes = np.array([size_bytes(block) for block in blocks])
    n_groups = max(-(-len(blocks) // BLOCKS_PER_STEP), int(sizes.sum() // BYTES_PER_STEP) + 1) if blocks else 0
    groups: list[list[Item]] = [[] for _ in range(n_groups)]
    by_size = np.lexsort((rng.random(len(blocks)), sizes))
    for start in range(0, len(blocks), max(1, n_groups)):
        alike = by_size[start : start + n_groups]
        for group, index in zip(rng.permutation(n_groups)[: len(alike)], alike, strict=True):
            groups[group].append(blocks[index])
    networks = [item for item in items if isinstance(item, Network)]
    held = 0
    for network in (networks[i] for i in rng.permutation(len(networks))):
        size = size_bytes(network)
        if not held or held + size > BYTES_PER_STEP:
            groups.append([])
            held = 0
        groups[-1].append(network)
        held += size
    return tuple(tuple(group) for group in [*([reads] if reads else []), *groups])


def size_bytes(item: Block | Layer | Network) -> int:
    """Weights and activations in fp32; a guess for a network that only torch could count."""
    if isinstance(item, TimmNetwork):
        return TIMM_BYTES
    counted = cost.count(item) if isinstance(item, Arch) else item.cost if isinstance(item, Layer) else cost.of_block(item)
    return 4 * (counted.params + counted.activations)


def measure_networks(
    archs: Sequence[Arch],
    target: Target,
    *,
    processes: int = 2,
    rounds: int = 3,
    max_processes: int = MAX_PROCESSES,
    energy: bool = True,
    seed: int = 0,
    effort: Effort | None = None,
    progress: Progress | None = None,
    launch: Launcher | None = None,
    devices: Sequence[Device] | None = None,
) -> list[NetworkLatency]:
    """Latency of every network, in fresh processes and interleaved, in the order of `archs`; equal networks are measured once.

    Those that are not tight after `processes` are measured in more, up to `max_processes`. Where the device has an energy counter, with the
    energy of a pass, unless `energy` is False. Raises DeviceError where the target's device is not attached, ParityError where the runtime
    computes something else than torch.
    """
    device = require_attached(target, devices=devices)
    effort = effort or Effort(processes=processes, rounds=rounds, round_ms=40.0, max_samples=60)
    unique = list(dict.fromkeys(archs))
    timings = time_until_tight(
        unique, target, effort, device, max_processes=max_processes, seed=seed, launch=launch, progress=progress
    )  # fmt: skip
    by_arch = network_latencies({arch: timings[arch] for arch in unique})
    if energy:
        by_arch = with_energy(by_arch, measure_energy(unique, target, device, seed=seed, launch=launch, progress=progress))
    return [by_arch[arch] for arch in archs]


def time_until_tight(
    items: Sequence[Item],
    target: Target,
    effort: Effort,
    device: Device,
    *,
    max_processes: int = MAX_PROCESSES,
    seed: int = 0,
    launch: Launcher | None = None,
    progress: Progress | None = None,
    label: str = "networks",
) -> dict[Item, list[Timing]]:
    """Time `items` in the processes of `effort`; then those whose standard error is above TIGHT in further ones, up to `max_processes`.

    What the runtime cannot execute is left out, with a warning.
    """
    timings: dict[Item, list[Timing]] = {item: [] for item in items}
    refused: dict[Item, str] = {}
    total = done = 0

    def run(wanted: Sequence[Item], processes: Iterable[int]) -> None:
        nonlocal total, done
        requests = [
            Request(
                target=target, process=process, seed=seed + process, effort=effort,
                steps=steps(wanted, rng=np.random.default_rng((seed, process))),
            )
            for process in processes
        ]  # fmt: skip
        total += len(wanted) * len(requests)
        for timing in run_requests(requests, device, launch=launch):
            if timing.refused:
                refused.setdefault(timing.item, timing.refused)
            else:
                timings[timing.item].append(timing)
            done += 1
            if progress is not None:
                progress(done, total, label)

    run(items, range(effort.processes))
    warn_of_refused(refused)
    timings = {item: found for item, found in timings.items() if item not in refused}
    for process in range(effort.processes, max_processes if effort.processes > 1 else 0):
        loose = [
            item for item, (samples, at) in hot_samples(timings).items() if standard_error_ms(samples, at) > TIGHT * latency_ms(samples, at)
        ]
        if not loose:
            break
        run(loose, [process])
    return timings


def warn_of_refused(refused: Mapping[Item, str]) -> None:
    """Say what is left out, and why."""
    for reason in refused.values():
        log.warning("left out: %s", reason)


def measure_energy(
    networks: Sequence[Network],
    target: Target,
    device: Device,
    *,
    seed: int = 0,
    launch: Launcher | None = None,
    progress: Progress | None = None,
    exposed: bool | None = None,
) -> dict[Network, Timing]:
    """Energy of every network, in one fresh process of its own: a counter hears everything that runs beside it.

    Nothing where the device exposes no counter (`exposed`; None: ask this machine, unless `launch` stands in for it), and no entry
    for a network whose counter stood still.
    """
    if exposed is None:
        exposed = launch is None and not why_not_exposed(device.kind)
    if not exposed or not networks:
        return {}
    groups = steps(networks, rng=np.random.default_rng(seed))
    request = Request(target=target, process=0, seed=seed, effort=Effort(), steps=groups, energy=True)
    found: dict[Network, Timing] = {}
    for done, timing in enumerate((launch or launch_worker)(request), start=1):
        if timing.energy_mj is not None:
            found[cast(Network, timing.item)] = timing
        if progress is not None:
            progress(done, len(networks), "energy")
    return found


def with_energy(latencies: Mapping[Arch, NetworkLatency], energies: Mapping[Network, Timing]) -> dict[Arch, NetworkLatency]:
    """`latencies` with the energy of those networks that it was counted of."""
    return {
        arch: dataclasses.replace(row, energy_mj=energies[arch].energy_mj, idle_power_w=energies[arch].idle_power_w)
        if arch in energies
        else row
        for arch, row in latencies.items()
    }


def network_latencies(timings: Mapping[Arch, Sequence[Timing]]) -> dict[Arch, NetworkLatency]:
    """The latency of every network from what the processes measured of it, at the usual pace of the machine."""
    samples = hot_samples(dict(timings.items()))
    return {arch: _network_latency(arch, found, *samples[arch]) for arch, found in timings.items()}


def _network_latency(arch: Arch, timings: Sequence[Timing], samples: Samples, paces: tuple[float, ...]) -> NetworkLatency:
    loads = [timing.load_average for timing in timings if timing.load_average is not None]
    return NetworkLatency(
        arch=arch, latency_ms=latency_ms(samples, paces), samples_ms=samples, paces=paces,
        wall_over_cpu=max(timing.wall_over_cpu for timing in timings), load_average=max(loads, default=None),
    )  # fmt: skip


def run_requests(requests: Sequence[Request], device: Device, *, launch: Launcher | None = None) -> Iterator[Timing]:
    """The timings of all requests as they come, each request in a process of its own.

    On a CPU with several cores the processes run side by side: the statistic is CPU time of one thread, and what a
    neighbour adds is small (docs/measurement.md). A GPU is one device: on a machine with cores to spare processes get ready side by
    side, and take turns with it (worker.py). Wall time of several threads wants the machine for itself: there they run one after the
    other.
    """
    launch = launch or launch_worker
    cores = os.cpu_count() or 1
    able = 1 if any(request.target.threads > 1 for request in requests) else min(cores, 2) if device.kind == "cpu" else min(cores // 2, 3)
    at_once = min(len(requests), able)
    if at_once < 2:
        for request in requests:
            yield from launch(request)
        return
    results: queue.Queue[Timing | BaseException | None] = queue.Queue()
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    stopped = threading.Event()
    for request in requests:
        waiting.put(request)

    def work() -> None:
        try:
            while not stopped.is_set():
                for timing in launch(waiting.get_nowait()):
                    results.put(timing)
                    if stopped.is_set():
                        return
        except queue.Empty:
            pass
        except BaseException as error:  # Handed to the caller, who raises it.
            results.put(error)
        finally:
            results.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        running = at_once
        while running:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stopped.set()


def launch_worker(request: Request) -> Iterator[Timing]:
    """Run `request` in a fresh Python process (worker.py), which dies with this one; in several, where it would fill the memory of one."""
    for part in _parts(request.steps):
        yield from _launch_one(dataclasses.replace(request, steps=part))


def _parts(all_steps: Sequence[Sequence[Item]]) -> list[tuple[Sequence[Item], ...]]:
    """`all_steps` in runs of at most BYTES_PER_PROCESS; a step is never divided."""
    parts: list[tuple[Sequence[Item], ...]] = [()]
    held = 0
    for step in all_steps:
        size = sum(size_bytes(item) for item in step if not isinstance(item, MemoryRead))
        if parts[-1] and held + size > BYTES_PER_PROCESS:
            parts.append(())
            held = 0
        parts[-1] = (*parts[-1], step)
        held += size
    return parts


def _launch_one(request: Request) -> Iterator[Timing]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(request.target.threads))
    # fp32 means fp32, also in the libraries that do not ask us.
    environment = {**os.environ, **threads, "NVIDIA_TF32_OVERRIDE": "0"}
    package_root = str(Path(lowsearch.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    worker = subprocess.Popen(
        [sys.executable, *_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, encoding="utf-8", env=environment,
    )  # fmt: skip
    assert worker.stdin and worker.stdout and worker.stderr
    complaints: list[str] = []
    listener = threading.Thread(target=lambda stream=worker.stderr: complaints.extend(stream), daemon=True)
    listener.start()
    try:
        with suppress(BrokenPipeError):  # Of a process that died at once its exit code tells.
            worker.stdin.write(request.to_json() + "\n")
            worker.stdin.flush()
        for line in worker.stdout:
            values = json.loads(line)
            if "error" in values:
                raise _error(values)
            yield Timing.from_dict(values)
        if worker.wait() != 0:
            listener.join()
            last = complaints[-1].strip() if complaints else "no message"
            raise DeviceError(f"the measuring process ended with code {worker.returncode}: {last}", hint="run the same command again")
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        listener.join()
        with suppress(BrokenPipeError):
            worker.stdin.close()
        worker.stdout.close()
        worker.stderr.close()


def _error(values: Mapping[str, Any]) -> LowsearchError:
    kind = getattr(errors, values["error"], LowsearchError)
    return kind(values["message"], hint=values["hint"])
