"""Why a network costs what it costs, and what every single change of it would cost: by block, by stage, and by setting.

A change is one setting of the space taken one step (`SearchSpace.neighbours`). Its latency is the difference of two predictions, with
the deviation of the difference: what both networks share errs in both alike (`LatencyPredictor.changes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.scores import Unit
from lowsearch.arch import Arch
from lowsearch.footprint import artifact_mb, peak_memory_mb
from lowsearch.space import SearchSpace
from lowsearch.study.knowledge import Knowledge

Misled = Literal["", "opposite", "too much", "too little"]
"""What MACs say of a change that its latency does not follow: the other direction, a larger share, a smaller one."""

CLEAR_STD = 2.0
"""A difference counts beyond this many of its standard deviations."""
CLEAR_SHARE = 0.05
"""Shares of MACs and latency that differ by less than this of the network are not called different, however well they are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """What one block, or all of one stage, costs. Shares are of the network's own sums."""

    place: str
    kind: str
    """Of the block; how many blocks it has, for a stage."""
    latency_ms: float
    latency_share: float
    source: str
    macs: int
    macs_share: float
    params: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One setting that changes its value."""

    gene: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.gene} {_shown(self.before)} -> {_shown(self.after)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a network with one or more settings changed costs, as differences to the one it was made from."""

    steps: tuple[Step, ...]
    arch: Arch
    latency_ms: float
    latency_std_ms: float
    latency_share: float
    """`latency_ms` over the latency before."""
    macs: int
    macs_share: float
    params: int
    params_share: float
    peak_memory_mb: float = 0.0
    artifact_mb: float = 0.0
    score: float | None
    """In the unit of the explanation; None where nothing is known of it."""
    score_std: float | None
    """None where the score has no error of its own."""

    @property
    def arch_id(self) -> str:
        return self.arch.arch_id

    @property
    def macs_say(self) -> Misled:
        """How the MACs of the change mislead about its latency; empty where they do not, beyond what is uncertain."""
        std = self.latency_std_ms * (self.latency_share / self.latency_ms) if self.latency_ms else 0.0
        gap = abs(self.latency_share - self.macs_share)
        if gap <= max(CLEAR_STD * std, CLEAR_SHARE):
            return ""
        turned = self.latency_share * self.macs_share < 0
        if turned and abs(self.latency_share) > CLEAR_STD * std:
            return "opposite"
        return "too much" if turned or abs(self.macs_share) > abs(self.latency_share) else "too little"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, `arch` as `Arch.to_dict()`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"steps": [dataclasses.asdict(step) for step in self.steps], "arch": self.arch.to_dict()}
        return {"arch_id": self.arch_id, **values, "macs_say": self.macs_say}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One network taken apart, and its neighbours."""

    arch: Arch
    target: str
    latency_ms: float
    latency_std_ms: float
    latency_source: str
    macs: int
    params: int
    peak_memory_mb: float
    artifact_mb: float
    score: float | None
    """As the study's model estimates it for a fresh training; None where there is none."""
    score_std: float | None
    """None, too, where the score has no error of its own."""
    score_source: str
    """`estimated` for an accuracy, else `prior:published`, `proxy:macs` or `proxy:params`; empty without a score."""
    score_unit: Unit | Literal[""]
    """`top1` (a fraction) for an accuracy, `rank` for a score that is none; empty without a score."""
    stages: tuple[PartCost, ...]
    blocks: tuple[PartCost, ...]
    changes: tuple[Change, ...]
    """One setting changed by one step; those that save most latency first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, `arch` as `Arch.to_dict()`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: [dataclasses.asdict(part) for part in getattr(self, name)] for name in ("stages", "blocks")}
        values |= {"arch": self.arch.to_dict(), "changes": [change.to_dict() for change in self.changes]}
        return {"arch_id": self.arch.arch_id, **values}


def explain(known: Knowledge, arch: Arch) -> Explanation:
    """Take `arch` apart. Raises NotInSpaceError where the space does not contain it."""
    space = known.space
    genome = space.encode(arch)
    mean_ms, std_ms = known.latency.predict_archs([arch])
    total, target = cost.count(arch), known.latency.table.target
    score = known.score.predict(genome[None]) if known.score is not None else None
    genes, genomes = space.neighbours(genome)
    steps = [(step_between(space, genome, after, int(gene)),) for gene, after in zip(genes, genomes, strict=True)]
    blocks = _blocks(known, arch)
    return Explanation(
        arch=arch, target=str(target), latency_ms=float(mean_ms[0]), latency_std_ms=float(std_ms[0]),
        latency_source=known.latency_source, macs=total.macs, params=total.params,
        peak_memory_mb=peak_memory_mb(arch, precision=target.precision, batch=target.batch),
        artifact_mb=artifact_mb(arch, precision=target.precision),
        score=None if score is None else float(score[0][0]), score_std=None if score is None else float(score[1][0]) or None,
        score_source=known.score_source, score_unit=known.score_unit,
        stages=_stages(blocks), blocks=blocks,
        changes=tuple(sorted(changes(known, genome, genomes, steps), key=lambda change: change.latency_ms)),
    )  # fmt: skip


def changes(known: Knowledge, before: np.ndarray, after: np.ndarray, steps: Sequence[tuple[Step, ...]]) -> list[Change]:
    """Each genome of `after` (n, n_genes), reached from `before` (n_genes,) by its `steps`, as a Change."""
    if not len(after):
        return []
    space = known.space
    arch, archs = space.decode(before), [space.decode(genome) for genome in after]
    latency_ms, latency_std_ms = known.latency.changes(arch, archs)
    base_ms = float(known.latency.predict_archs([arch])[0][0])
    sums = known.estimator.estimate(np.vstack([before[None], after])).mean
    macs, params = sums["macs"], sums["params"]
    score, score_std = known.score.changes(before, after) if known.score is not None else (None, None)
    return [
        Change(
            steps=steps[i], arch=archs[i],
            latency_ms=float(latency_ms[i]), latency_std_ms=float(latency_std_ms[i]), latency_share=float(latency_ms[i] / base_ms),
            macs=int(macs[i + 1] - macs[0]), macs_share=float(macs[i + 1] / macs[0] - 1),
            params=int(params[i + 1] - params[0]), params_share=float(params[i + 1] / params[0] - 1),
            peak_memory_mb=float(sums["peak_memory_mb"][i + 1] - sums["peak_memory_mb"][0]),
            artifact_mb=float(sums["artifact_mb"][i + 1] - sums["artifact_mb"][0]),
            score=None if score is None else float(score[i]), score_std=None if score_std is None else float(score_std[i]) or None,
        )
        for i in range(len(after))
    ]  # fmt: skip


def step_between(space: SearchSpace, before: np.ndarray, after: np.ndarray, gene: int) -> Step:
    """The step that `gene` takes between two genomes (n_genes,)."""
    choices = space.genes[gene].choices
    return Step(gene=space.genes[gene].name, before=choices[before[gene]], after=choices[after[gene]])


def _blocks(known: Knowledge, arch: Arch) -> tuple[PartCost, ...]:
    counted = cost.count(arch)
    shares = known.latency.explain(arch)
    total_ms = sum(share.ms for share in shares)
    return tuple(
        PartCost(
            place=share.place, kind=share.block.kind, latency_ms=share.ms, latency_share=share.ms / total_ms, source=share.source,
            macs=item.cost.macs, macs_share=item.cost.macs / counted.macs, params=item.cost.params,
        )
        for share, item in zip(shares, counted.per_block, strict=True)
    )  # fmt: skip


def _stages(blocks: Sequence[PartCost]) -> tuple[PartCost, ...]:
    """The blocks summed over stem, stages and head."""
    stages: dict[str, list[PartCost]] = {}
    for block in blocks:
        stages.setdefault(block.place.partition(".")[0], []).append(block)
    return tuple(
        PartCost(
            place=stage, kind=f"{len(members)} block{'s' if len(members) > 1 else ''}",
            source=", ".join(sorted({member.source for member in members})),
            **{
                name: sum(getattr(member, name) for member in members)
                for name in ("latency_ms", "latency_share", "macs", "macs_share", "params")
            },
        )
        for stage, members in stages.items()
    )  # fmt: skip


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
