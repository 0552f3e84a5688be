"""Profiling: measure the blocks and some whole networks of a search space on a target, and leave a latency table.

Not every block is measured (a large space has thousands): all stems and heads, and of the other kinds as many as the budget allows,
spread over their sizes; the predictor fills in the rest and marks it. Whole networks, spread over the sizes that the space holds,
calibrate the sum of blocks. Where another batch of the target was measured already, far fewer blocks are, and the others lean on that
table, the sibling. Everything measured is appended to `<table>.partial.jsonl` at once, so that a killed run resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lowsearch import cost, locations
from lowsearch.arch import Arch, Block
from lowsearch.errors import TableError
from lowsearch.latency.block_model import BlockModel
from lowsearch.latency.features import block_features
from lowsearch.latency.measure import Effort, Launcher, Progress, measure_energy, network_latencies, with_energy
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.pace import step_paces
from lowsearch.latency.session import Found, Partial, Session, locked
from lowsearch.latency.table import (
    BlockLatency,
    LatencyTable,
    Sibling,
    block_latency,
    changes,
    check_fits,
    find_table,
    known_tables,
    memory_latency,
    table_file,
)
from lowsearch.latency.target import (
    Context,
    Device,
    Target,
    attached_devices,
    context,
    gpu_state,
    require_attached,
    resolve_device,
)
from lowsearch.space import SearchSpace

log = logging.getLogger(__name__)

NETWORK_EFFORT = Effort(processes=4, round_ms=40.0, max_samples=60)
"""Few networks decide how blocks add up, so each is measured twice as often as a block."""
N_NETWORKS = 20
QUICK_BLOCKS = 400
"""Of a space whose table of 1,400 blocks is measured quickly. With all 20 networks so few, as well measured, err 1.2 times as much
(docs/measurement.md)."""
SIBLING_BLOCKS = 200
"""Of a space that was measured at another batch. On one CPU they told as much of batch 8 as 400 without it (docs/measurement.md)."""
QUICK_EFFORT = Effort(rounds=2, turns_ms=60.0)
"""What is left of the noise of a block is small beside the error of those that were not measured; so what two processes disagree about is
not measured again either. Networks tell more for their time."""
QUICK_NETWORK_EFFORT = dataclasses.replace(NETWORK_EFFORT, processes=2)
_DESCENT_STEPS = 60


def profile(
    space: SearchSpace,
    target: Target,
    *,
    folder: Path | None = None,
    max_blocks: int | None = None,
    n_calibration: int | None = None,
    seed: int = 0,
    quick: bool = False,
    alone: bool = False,
    fresh: bool = False,
    effort: Effort | None = None,
    network_effort: Effort | None = None,
    progress: Progress | None = None,
    launch: Launcher | None = None,
    devices: Sequence[Device] | None = None,
) -> LatencyTable:
    """Measure what the table of `target` lacks for `space`, and write it under `folder` (default: ./latency_tables).

    At most `max_blocks` blocks of the space are measured; None for as many as the runtime prepares in reasonable time. With `quick` fewer
    blocks are measured, these and the networks for less time; a later profile without it adds the other blocks. Where this machine has
    a table of the space at another batch, few blocks are measured and the others lean on it, unless `alone`.
    Killed at any moment, the same call resumes. A table of the same machine and versions is extended, any other is replaced;
    with `fresh` it is replaced in any case.
    Raises DeviceError where the device is not attached, ParityError where the runtime computes something else than torch.
    """
    device = require_attached(target, devices=devices)
    here = current_context(target, device)
    folder = locations.new("latency_tables") if folder is None else folder
    path = folder / target.table_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        table = _empty(target, here) if fresh else table_to_extend(target, here, folder)
        before = None if alone else table.sibling
        # A table that was begun by itself goes on so.
        leans = not alone and (before is not None or len(_measured(space, table)) < SIBLING_BLOCKS)
        sibling = find_sibling(space, target, here, folder) if leans else None
        table = dataclasses.replace(table, sibling=sibling or before)
        if max_blocks is None:
            # Of a runtime that is slow to prepare the sibling holds few as well; half of them are pairs enough.
            usual = min(SIBLING_BLOCKS, len(_measured(space, sibling)) // 2) if sibling else QUICK_BLOCKS if quick else None
            most = runtime_max_blocks(target)
            max_blocks = most if usual is None else min(most, usual)
        n_calibration = N_NETWORKS if n_calibration is None else n_calibration
        effort = effort or (QUICK_EFFORT if quick else Effort())
        network_effort = network_effort or (QUICK_NETWORK_EFFORT if quick else NETWORK_EFFORT)
        known = table.calibration.get(space.name, ())
        n_networks = max(0, n_calibration - len(known))
        reads = [] if table.memory else [MemoryRead(n_bytes) for n_bytes in READ_BYTES]
        with Partial(path, target, here) as partial:
            # What an interrupted profile of more blocks, or of another space, had finished is kept.
            chosen = choose_blocks(space, max_blocks, seed=seed, always=("stem",) if sibling else ("stem", "head"))
            wanted = [*chosen, *(b for b in partial.finished(effort) if isinstance(b, Block))]
            blocks = [block for block in dict.fromkeys(wanted) if block not in table.entries]
            expected = effort.processes * (len(reads) + len(blocks)) + network_effort.processes * n_networks
            session = Session(
                partial, expected, device=device, seed=seed, launch=launch, label=f"{space.name} on {target}", progress=progress
            )
            table = _with_reads(table, session.measure(reads, effort))
            table = _with_blocks(table, session.measure(blocks, effort, again=not quick))
            # A later profile draws others, over all sizes again.
            networks = choose_networks(space, n_networks, seed=seed + len(known), table=table) if n_networks else []
            archs = [arch for arch in networks if arch not in {row.arch for row in known}]
            session.expect_fewer(network_effort.processes * (n_networks - len(archs)))  # A small space may not hold as many.
            table = _with_networks(table, space, session.measure(archs, network_effort))
        table = _with_energy(table, space, device, seed=seed, launch=launch, progress=progress)
        # A GPU's clocks say something while it is warm, as it is now.
        again = table.context.measured_again + session.measured_again
        table = dataclasses.replace(table, context=dataclasses.replace(here, measured_again=again, **gpu_state(device)))
        if len(_measured(space, table)) == len(space.blocks):
            table = dataclasses.replace(table, sibling=before)  # Nothing is left to predict.
        table.save(folder)
        partial.path.unlink()
    return table


def usable_table(
    space: SearchSpace, target: Target, *, allow_stale: bool = False, devices: Sequence[Device] | None = None
) -> LatencyTable | None:
    """The table that a search in `space` may use, or None where this machine has yet to measure it (`profile`).

    For an attached device the table must come from this machine and these versions, unless `allow_stale`; for one that is not attached
    it is used as it is. A table that came with lowsearch is the last one looked for, and on an attached device only with `allow_stale`.
    Raises TableError where a table does not fit or is damaged, or where only another machine could measure it.
    """
    device = next((d for d in (attached_devices() if devices is None else devices) if d.slug == target.device), None)
    if device is None:
        table = find_table(target, shipped=True)
        if not table.calibration.get(space.name):
            raise TableError(
                f"the table of {target} holds no networks of space {space.name!r}",
                hint=f"on a machine that has the device run `{target.profile_command} --space {space.name}`, and copy the table here",
            )
        return table
    if table_file(target, shipped=allow_stale) is None:
        return None
    table = find_table(target, shipped=allow_stale)
    if not allow_stale:
        check_fits(table, target, current_context(target, device))
    return table if table.calibration.get(space.name) else None


def staleness(table: LatencyTable, *, devices: Sequence[Device] | None = None) -> list[str]:
    """In what this machine differs from when it measured `table`, in words; nothing for a device that is not attached."""
    device = resolve_device(table.target.device, devices=devices)
    return changes(table.context, current_context(table.target, device)) if device.attached else []


def find_sibling(space: SearchSpace, target: Target, here: Context, folder: Path) -> Sibling | None:
    """What a table of this machine and these versions that differs from `target` in the batch only says of its blocks: of several tables
    the one that holds most of `space`, then the nearest batch. None where none holds SIBLING_BLOCKS of it."""
    found: list[tuple[LatencyTable, Path]] = []
    for other, path in known_tables(folders=list(dict.fromkeys([folder, *locations.folders("latency_tables")]))).items():
        if other != target and dataclasses.replace(other, batch=target.batch) == target:
            try:
                table = LatencyTable.load(path)
                check_fits(table, other, here)
                found.append((table, path))
            except TableError as error:
                log.warning("not used for batch %d: %s", target.batch, error.message)
    found = [(table, path) for table, path in found if len(_measured(space, table)) >= SIBLING_BLOCKS]
    if not found:
        return None
    table, path = max(found, key=lambda one: (len(_measured(space, one[0])), -abs(np.log2(one[0].target.batch / target.batch))))
    times = {block: BlockLatency(hot_ms=row.hot_ms, warm_ms=row.warm_ms, cold_ms=row.cold_ms) for block, row in table.entries.items()}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Sibling(batch=table.target.batch, date_utc=table.context.date_utc, sha256=sha256, entries=times)


def _measured(space: SearchSpace, table: LatencyTable | Sibling) -> set[Block]:
    return {block for block in space.blocks if block in table.entries}


def table_of(target: Target, measured_on: Context, space: SearchSpace, found: Found) -> LatencyTable:
    """The table that the timings of one whole profile of `space` give."""
    table = _with_blocks(_with_reads(_empty(target, measured_on), found), found)
    return _with_networks(table, space, found)


def table_to_extend(target: Target, here: Context, folder: Path) -> LatencyTable:
    """The existing table of this machine and these versions, or an empty one."""
    folders = list(dict.fromkeys([folder, *locations.folders("latency_tables")]))
    if table_file(target, folders=folders) is not None:
        try:
            table = find_table(target, folders=folders)
            check_fits(table, target, here)
            return table
        except TableError as error:
            log.warning("starting a new table: %s", error.message)
    return _empty(target, here)


def current_context(target: Target, device: Device) -> Context:
    """What a measurement of `target` that starts now would state about itself. Raises DeviceError for what the runtime cannot do."""
    from lowsearch.latency.runtimes import check_supported, runtime  # imports torch
    from lowsearch.latency.timers import cpu_flush_bytes, timer_class

    check_supported(target, device.kind)
    chosen = runtime(target.runtime)
    statistic = f"25th percentile of {timer_class(device.kind, target.threads).statistic}"
    flushed = {"flush_bytes": target.threads * cpu_flush_bytes()} if device.kind == "cpu" else {}
    options = {**chosen.options(target, device.kind), **flushed}
    return context(target, device, statistic=statistic, versions=chosen.versions(), runtime_options=options)


def choose_blocks(space: SearchSpace, max_blocks: int, *, seed: int, always: Sequence[str] = ("stem", "head")) -> list[Block]:
    """The blocks of `space` to measure: all where they fit in `max_blocks`; else all of the kinds in `always`, and of every other kind a
    share by the square root of their number, spread over their features.

    With the same seed, a larger budget measures the same blocks and more.
    """
    by_kind: dict[str, list[Block]] = {}
    for block in space.blocks:
        by_kind.setdefault(block.kind, []).append(block)
    rng = np.random.default_rng(seed)
    first = [block for kind in always for block in by_kind.pop(kind, [])]
    budget = max(0, max_blocks - len(first))
    order = {kind: [blocks[i] for i in _spread(block_features(blocks), rng)] for kind, blocks in sorted(by_kind.items())}
    wishes = _shares({kind: len(blocks) for kind, blocks in order.items()}, budget)
    return [*first[:max_blocks], *(block for kind, blocks in order.items() for block in blocks[: wishes[kind]])]


def choose_networks(space: SearchSpace, n: int, *, seed: int, table: LatencyTable | None = None) -> list[Arch]:
    """`n` networks of `space` to calibrate on: half of them random, one from every quantile of their size; the others spread evenly in
    log size from the smallest networks of the space up to the median.

    Size is the sum of the hot times that `table` knows of the blocks or predicts, or MACs without a table. A search goes to the fast
    end, where hardly any random network lies and where the overhead of a call weighs most. The smallest by MACs are not the
    fastest: there a network's time is the number of its blocks.
    """
    rng = np.random.default_rng(seed)
    size = space.block_sums(np.array([[ms] for ms in _block_sizes(space, table)], dtype=float))
    pool = np.unique(space.sample(max(400, 20 * n), rng=rng), axis=0)
    pool = pool[np.argsort(size(pool)[:, 0], kind="stable")]
    n_small = n // 2
    chosen = [pool[rng.choice(part)] for part in np.array_split(np.arange(len(pool)), n - n_small) if len(part)]
    descent = _descended(space, pool, lambda genomes: size(genomes)[:, 0], rng)
    log_size = np.log(size(descent)[:, 0])
    for goal in np.linspace(log_size.min(), np.log(np.median(size(pool)[:, 0])), n_small + 1)[:-1] if n_small else ():
        nearest = np.flatnonzero(np.abs(log_size - goal) <= np.sort(np.abs(log_size - goal))[min(9, len(log_size) - 1)])
        chosen.append(descent[rng.choice(nearest)])
    return list(dict.fromkeys(space.decode(genome) for genome in chosen))


def runtime_max_blocks(target: Target) -> int:
    from lowsearch.latency.runtimes import runtime  # imports torch

    return runtime(target.runtime).max_blocks


def _block_sizes(space: SearchSpace, table: LatencyTable | None) -> list[float]:
    """A size for every block of `space`: its hot time, or its MACs without a table."""
    if table is None:
        return [float(cost.of_block(block).macs) for block in space.blocks]
    missing = [block for block in space.blocks if block not in table.entries]
    predicted = BlockModel(table).predict(missing) if missing else {}
    return [table.entries[b].hot_ms if b in table.entries else predicted[b].latency.hot_ms for b in space.blocks]


def _descended(
    space: SearchSpace, genomes: np.ndarray, size_of: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Every network met on the way down from `genomes` by mutations that lower the size, without repeats."""
    met = [genomes]
    current, size = genomes, size_of(genomes)
    for _ in range(_DESCENT_STEPS):
        mutants = space.mutate(current, rng=rng)
        smaller = size_of(mutants) < size
        current = np.where(smaller[:, None], mutants, current)
        size = size_of(current)
        met.append(current[smaller])
    return np.unique(np.concatenate(met), axis=0)


def _shares(counts: dict[str, int], budget: int) -> dict[str, int]:
    """How many of each kind fit in `budget`: by the square root of their number; what a small kind does not use goes to the others."""
    shares = dict.fromkeys(counts, 0)
    while (left := budget - sum(shares.values())) > 0 and any(shares[kind] < counts[kind] for kind in counts):
        weights = {kind: np.sqrt(count) for kind, count in counts.items() if shares[kind] < count}
        for kind, weight in weights.items():
            more = max(1, int(left * weight / sum(weights.values())))
            shares[kind] += min(more, counts[kind] - shares[kind], budget - sum(shares.values()))
    return shares


def _spread(features: np.ndarray, rng: np.random.Generator) -> list[int]:
    """All rows in an order in which every beginning is spread out: the next one is the farthest from those before it."""
    spans = np.ptp(features, axis=0)
    scaled = features / np.where(spans > 0, spans, 1.0)
    chosen = [int(rng.integers(len(features)))]
    nearest = ((scaled - scaled[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(len(features) - 1):
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((scaled - scaled[chosen[-1]]) ** 2).sum(axis=1))
    return chosen


def _empty(target: Target, here: Context) -> LatencyTable:
    return LatencyTable(target=target, context=here, entries={}, calibration={})


def _with_reads(table: LatencyTable, found: Found) -> LatencyTable:
    reads = {item.n_bytes: list(timings.values()) for item, timings in found.items() if isinstance(item, MemoryRead)}
    return dataclasses.replace(table, memory=table.memory or tuple(memory_latency(*read) for read in reads.items()))


def _with_blocks(table: LatencyTable, found: Found) -> LatencyTable:
    blocks = {item: list(timings.values()) for item, timings in found.items() if isinstance(item, Block)}
    paces = step_paces([timing for timings in blocks.values() for timing in timings])
    return dataclasses.replace(table, entries={**table.entries, **{b: block_latency(timings, paces) for b, timings in blocks.items()}})


def _with_networks(table: LatencyTable, space: SearchSpace, found: Found) -> LatencyTable:
    added = network_latencies({item: list(timings.values()) for item, timings in found.items() if isinstance(item, Arch)})
    networks = (*table.calibration.get(space.name, ()), *added.values())
    return dataclasses.replace(table, calibration={**table.calibration, space.name: networks})


def _with_energy(
    table: LatencyTable, space: SearchSpace, device: Device, *, seed: int, launch: Launcher | None, progress: Progress | None
) -> LatencyTable:
    """With the energy of the space's networks, where the device counts it."""
    rows = {row.arch: row for row in table.calibration.get(space.name, ())}
    uncounted = [arch for arch, row in rows.items() if row.energy_mj is None]
    energies = measure_energy(uncounted, table.target, device, seed=seed, launch=launch, progress=progress)
    return dataclasses.replace(table, calibration={**table.calibration, space.name: tuple(with_energy(rows, energies).values())})
