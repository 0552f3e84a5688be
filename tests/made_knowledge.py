"""A latency table and accuracy records in closed form, for tests that need predictors and no device."""

from __future__ import annotations

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.records import AccuracyRecord, CurvePoint
from lowsearch.latency.table import BlockLatency, LatencyTable
from lowsearch.latency.target import Device, Target, context
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

TARGET = Target("some-board", "onnxruntime")


def table_of(space: SearchSpace, *, without: str = "") -> LatencyTable:
    """Blocks cost 10 us and 20 ns per thousand MACs in every state of the caches, and networks are their sum.

    Every second block of the kind `without` was not measured.
    """

    def block_ms(block):
        return round(0.01 + 2e-8 * cost.of_block(block).macs, 5)

    of_kind = [block for block in space.blocks if block.kind == without]
    blocks = [block for block in space.blocks if block not in of_kind[::2]]
    archs = [space.decode(genome) for genome in space.sample(12, rng=np.random.default_rng(0))]
    times = {arch: sum(map(block_ms, arch.blocks())) for arch in archs}
    networks = [NetworkLatency(arch=arch, latency_ms=ms, samples_ms=((ms,),)) for arch, ms in times.items()]
    here = context(TARGET, Device(slug=TARGET.device, kind="cpu", name="Fake"), statistic="t", versions={}, runtime_options={})
    return LatencyTable(
        target=TARGET, context=here, calibration={space.name: tuple(networks)},
        entries={b: BlockLatency(hot_ms=block_ms(b), warm_ms=block_ms(b), cold_ms=block_ms(b)) for b in blocks},
    )  # fmt: skip


def records_of(space: SearchSpace, n: int) -> list[AccuracyRecord]:
    """Full trainings of random networks whose accuracy grows with log MACs and falls with depth."""
    found = []
    for genome in np.unique(space.sample(n, rng=np.random.default_rng(1)), axis=0):
        arch = space.decode(genome)
        accuracy = 0.5 + 0.05 * np.log10(cost.count(arch).macs) - 0.01 * sum(stage.depth for stage in arch.stages)
        curve = (CurvePoint(fraction=1.0, step=1, train_loss=1.0, val_loss=1.0, val_accuracy=round(float(accuracy), 5), cpu_seconds=1.0),)
        found.append(AccuracyRecord(arch=arch, recipe="micro", recipe_hash="r", data="d", data_hash="h", seed=0, rung=1.0, curve=curve))
    return found
