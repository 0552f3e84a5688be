"""Run the experiments on a device: measure everything they ask for, in one resumable session a batch size, and judge the claims."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowsearch import locations
from lowsearch.errors import UsageError
from lowsearch.files import write_atomically
from lowsearch.insights.claims import CLAIMS
from lowsearch.insights.evidence import Finding, Latency, Wanted
from lowsearch.insights.experiments import CountTimm, experiments
from lowsearch.latency.measure import Effort, Launcher, Progress
from lowsearch.latency.pace import hot_samples
from lowsearch.latency.profile import current_context
from lowsearch.latency.session import Found, Partial, Session, locked
from lowsearch.latency.target import Context, Device, Target, require_attached
from lowsearch.latency.timing import Item, Network, latency_ms, standard_error_ms

SCHEMA = "lowsearch-insights"
VERSION = 1
BLOCK_EFFORT = Effort(cold_samples=1, turns_ms=1.0, min_turns=1, max_turns=1)
"""Only hot times are compared here; the other states get as little time as can be."""
NETWORK_EFFORT = Effort(round_ms=40.0, max_samples=60)
LARGE_BATCH = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Insights:
    """What the experiments found on one target."""

    target: Target
    context: Context
    large_batch: int
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; a number that is not known is null."""
        findings = [
            {
                **dataclasses.asdict(f.claim), "verdict": f.verdict, "evidence": f.evidence, "rows": [dict(row) for row in f.rows],
            }
            for f in self.findings
        ]  # fmt: skip
        head = {"schema": SCHEMA, "version": VERSION, "target": dataclasses.asdict(self.target)}
        return _plain({**head, "context": dataclasses.asdict(self.context), "large_batch": self.large_batch, "claims": findings})


def insights_path(target: Target, folder: Path | None = None) -> Path:
    """Where the numbers of `target` go: insights/DEVICE/RUNTIME-….json, the page beside it."""
    return (locations.new("insights") if folder is None else folder) / target.table_path.with_suffix(".json")


def insights(
    target: Target,
    *,
    claims: Sequence[int] | None = None,
    folder: Path | None = None,
    seed: int = 0,
    block_effort: Effort | None = None,
    network_effort: Effort | None = None,
    progress: Progress | None = None,
    launch: Launcher | None = None,
    devices: Sequence[Device] | None = None,
    count_timm: CountTimm | None = None,
) -> Insights:
    """Measure what the `claims` (numbers; None: all) need on `target`, judge them, and write insights/DEVICE/RUNTIME-….json.

    Killed at any moment, the same call resumes. Raises UsageError on an unknown claim or a target of another batch than 1, DeviceError
    where the device is not attached, ParityError where the runtime computes something else than torch.
    """
    numbers = sorted(set(CLAIMS if claims is None else claims))
    unknown = [number for number in numbers if number not in CLAIMS]
    if unknown or not numbers:
        raise UsageError(f"unknown claim {unknown[0] if unknown else 'none'}; known: 1 to {len(CLAIMS)}", hint="--claim 3")
    if target.batch != 1:
        raise UsageError(f"batch is {target.batch}: the claims are about batch 1, and one of them about a large batch beside it")
    device = require_attached(target, devices=devices)
    if count_timm is None:
        from lowsearch.model.zoo import count_timm  # imports torch
    chosen = {number: experiment for number, experiment in experiments(count_timm).items() if number in numbers}
    wanted = Wanted(batch=LARGE_BATCH.get(device.kind, 8))
    for experiment in chosen.values():
        experiment(wanted)
    path = insights_path(target, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    efforts = (block_effort or BLOCK_EFFORT, network_effort or NETWORK_EFFORT)
    measured: list[Mapping[Item, Latency]] = []
    with locked(path):
        here = current_context(target, device)
        large = dataclasses.replace(target, batch=wanted.batch)
        partials = [(target, path, list(wanted.single)), (large, path.with_suffix(".large.json"), list(wanted.large))]
        partials = [entry for entry in partials if entry[2]]
        for one, place, items in partials:
            label = f"insights on {one}"
            with Partial(place, one, here) as partial:
                measured.append(_measure(items, partial, device, efforts, seed=seed, launch=launch, label=label, progress=progress))
        times = _Measured(wanted.batch, measured[0], measured[1] if wanted.large else {})
        findings = tuple(experiment(times) for experiment in chosen.values())
        found = Insights(target=target, context=here, large_batch=wanted.batch, findings=findings)
        write_atomically(path, json.dumps(found.to_dict(), indent=1) + "\n")
        for _, place, _ in partials:
            place.with_suffix(".partial.jsonl").unlink()
    return found


def _measure(
    items: Sequence[Item],
    partial: Partial,
    device: Device,
    efforts: tuple[Effort, Effort],
    *,
    seed: int,
    launch: Launcher | None,
    label: str,
    progress: Progress | None,
) -> Mapping[Item, Latency]:
    networks = [item for item in items if isinstance(item, Network)]
    parts = [item for item in items if not isinstance(item, Network)]
    expected = efforts[0].processes * len(parts) + efforts[1].processes * len(networks)
    session = Session(partial, expected, device=device, seed=seed, launch=launch, label=label, progress=progress)
    return {**_latencies(session.measure(parts, efforts[0])), **_latencies(session.measure(networks, efforts[1]))}


def _latencies(found: Found) -> dict[Item, Latency]:
    """With hot caches, at the usual pace of the machine."""
    samples = hot_samples({item: list(by_process.values()) for item, by_process in found.items()})
    return {item: Latency(latency_ms(rounds, paces), standard_error_ms(rounds, paces)) for item, (rounds, paces) in samples.items()}


class _Measured:
    """`evidence.Times` of what was measured."""

    def __init__(self, batch: int, single: Mapping[Item, Latency], large: Mapping[Item, Latency]) -> None:
        self.batch = batch
        self._single, self._large = single, large

    def has(self, item: Item) -> bool:
        return item in self._single

    def of(self, item: Item) -> Latency:
        return self._single[item]

    def batched(self, item: Item) -> Latency:
        return self._large[item]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
