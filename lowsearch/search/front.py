"""The front of a space by its predictors alone: nothing is trained and nothing is measured, a million networks are scored in seconds.

    front = search_front(space, latency=LatencyPredictor(space, table), accuracy=PublishedPrior(space), candidates=1_000_000)
    for genome, (score, latency_ms) in zip(front.genomes, front.values):
        print(space.decode(genome).arch_id, score, latency_ms)

An archive holds the networks that nothing scored so far dominates; children of neighbours on it are scored and join it or are forgotten,
so memory does not grow with the number of candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowsearch.errors import StudyError, UsageError
from lowsearch.footprint import Precision
from lowsearch.search import pareto
from lowsearch.search.estimates import AccuracyModel, EnergyPredictor, Estimator, LatencyModel, check_models, excess, reference_values
from lowsearch.search.evolution import RecentMemory, breed, one_blas_thread
from lowsearch.search.feasible import MAX_LISTED
from lowsearch.search.objectives import Limit, Metric, Objectives, parse_objectives
from lowsearch.space import SearchSpace

DEFAULT_CANDIDATES = 1_000_000
_INITIAL, _CHILDREN = 8192, 4096
_ARCHIVE = 2000
"""More points than this are thinned to the ones that hold most hypervolume."""
_NEAR = 0.7
"""Share of the children whose parents are neighbours on the front; what is good in one is mostly good in the other."""
_NEIGHBOURHOOD = 0.03
_RATES = (1.0, 2.0, 4.0)
"""Mutations a child, in turn by chance: single steps refine a front, several at once leave what single steps cannot."""
_PATIENCE = 200
"""So many generations in a row of which hardly a child was not scored before: there is no more within reach."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchedFront:
    """Networks that nothing scored dominates, sorted by the second objective's cost. Estimates of the best flatter."""

    genomes: np.ndarray
    """(n, n_genes) int8, canonical."""
    values: np.ndarray
    """(n, n_objectives) predicted, in the order of `objectives`."""
    objectives: Objectives
    scored: int
    """How many candidates were scored; one that comes back much later counts again."""


def search_front(
    space: SearchSpace,
    *,
    latency: LatencyModel | None,
    accuracy: AccuracyModel | None = None,
    objectives: str | Objectives = "acc-latency",
    limits: Sequence[Limit] = (),
    reference: Mapping[Metric, float] | None = None,
    candidates: int | None = None,
    seconds: float | None = None,
    batch: int = 1,
    precision: Precision = "fp32",
    energy: EnergyPredictor | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> SearchedFront:
    """The front of `space` by predicted means, after `candidates` networks (a million unless told) or `seconds` on `clock`,
    whichever comes first. A space of up to 500,000 networks is gone through whole where `candidates` allow it.

    `reference`: worst value by metric, beyond which a network does not count; unless given, all count. Counted by
    `candidates`, the same seed gives the same front. Raises UsageError on a model that is missing for an objective or a limit, StudyError
    where no network within the limits was met.
    """
    objectives = parse_objectives(objectives) if isinstance(objectives, str) else objectives
    check_models(objectives, limits, latency=latency, energy=energy)
    if accuracy is None and "accuracy" in objectives.metrics:
        raise UsageError("accuracy is an objective, but no model of it was given", hint="pass accuracy=")
    if candidates is not None and candidates < 1:
        raise UsageError(f"candidates is {candidates}, expected at least 1", hint="candidates=1_000_000")
    if seconds is not None and not seconds > 0:
        raise UsageError(f"seconds is {seconds}, expected more than 0", hint="seconds=10")
    most = candidates if candidates is not None else DEFAULT_CANDIDATES if seconds is None else None
    deadline = None if seconds is None else clock() + seconds
    estimator = Estimator(space, latency, batch=batch, precision=precision, energy=energy)
    worst = dict(reference) if reference is not None else reference_values(estimator, chance_accuracy=1 / space.num_classes)
    reference_costs = objectives.costs({metric: np.array([worst[metric]]) for metric in objectives.metrics})[0]
    rng = np.random.default_rng(seed)

    def judge(genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        estimates = estimator.estimate(genomes, accuracy)
        costs, broken = objectives.costs({metric: estimates.mean[metric] for metric in objectives.metrics}), excess(estimates, limits)
        if reference is not None:
            broken = broken + np.maximum(costs - reference_costs, 0.0).sum(axis=1)
        return costs, broken

    with one_blas_thread():
        archive, scored = _searched(
            space, judge, reference_costs, most=most, out_of_time=lambda: deadline is not None and clock() >= deadline, rng=rng
        )
    if archive.excess.any():
        asked = ", ".join(map(str, limits)) or "the reference point"
        raise StudyError(
            f"none of {scored:,} networks of space {space.name!r} keeps the limits ({asked})",
            hint="loosen the limits, or score more candidates",
        )
    archive = archive.take(pareto.non_dominated(archive.costs))
    mean = estimator.estimate(archive.genomes, accuracy).mean
    values = np.stack([mean[metric] for metric in objectives.metrics], axis=1)
    return SearchedFront(genomes=archive.genomes, values=values, objectives=objectives, scored=scored)


def _searched(
    space: SearchSpace,
    judge: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    reference: np.ndarray,
    *,
    most: int | None,
    out_of_time: Callable[[], bool],
    rng: np.random.Generator,
) -> tuple[_Archive, int]:
    """The archive and how many candidates were scored. `judge`: genomes (n, n_genes) -> costs (n, k) and excess over the limits (n,)."""
    memory, scored, idle = RecentMemory(), 0, 0
    archive = _Archive(np.empty((0, space.n_genes), dtype=np.int8), np.empty((0, len(reference))), np.empty(0))
    if space.size() <= min(MAX_LISTED, most if most is not None else MAX_LISTED):
        everything = space.all_genomes()
        return archive.joined(everything, *judge(everything)).thinned(_ARCHIVE, reference), len(everything)
    children = np.vstack([space.sample(_INITIAL, rng=rng), *(space.encode(arch)[None] for arch in space.family.values())])
    while idle < _PATIENCE:
        children = children[memory.new_ones(children)]
        if most is not None:
            children = children[: most - scored]
        scored += len(children)
        idle = 0 if len(children) > 0.01 * _CHILDREN else idle + 1
        if len(children):
            archive = archive.joined(children, *judge(children)).thinned(_ARCHIVE, reference)
        if (most is not None and scored >= most) or out_of_time():
            break
        first, second = archive.couples(_CHILDREN, rng)
        children = breed(space, archive.genomes, first, second, rng=rng, rate=rng.choice(_RATES) / space.n_genes)
    return archive, scored


@dataclass(frozen=True, eq=False)
class _Archive:
    """The non-dominated of what was scored, sorted by their second cost; while nothing keeps the limits, what breaks them least, and of one
    objective what comes next to the best too, for children to be made of."""

    genomes: np.ndarray
    costs: np.ndarray
    excess: np.ndarray

    def joined(self, genomes: np.ndarray, costs: np.ndarray, broken: np.ndarray) -> _Archive:
        pairs = (self.genomes, genomes), (self.costs, costs), (self.excess, broken)
        together = _Archive(*map(np.concatenate, pairs))
        if together.excess.min() > 0:
            return together.take(np.argsort(together.excess, kind="stable")[: _ARCHIVE // 10])
        within = together.take(together.excess == 0)
        if within.costs.shape[1] == 1:
            return within.take(np.argsort(within.costs[:, 0], kind="stable")[: _ARCHIVE // 10])
        front = within.take(pareto.non_dominated(within.costs))
        return front.take(np.argsort(front.costs[:, 1], kind="stable"))

    def take(self, which: np.ndarray) -> _Archive:
        return _Archive(self.genomes[which], self.costs[which], self.excess[which])

    def thinned(self, size: int, reference: np.ndarray) -> _Archive:
        """At most `size` members where there are half more, by the hypervolume that each alone holds."""
        if len(self.costs) <= 1.5 * size:
            return self
        held = pareto.contributions(self.costs, reference)
        return self.take(np.sort(np.argsort(-held, kind="stable")[:size]))

    def couples(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the two parents of `n` children."""
        m = len(self.genomes)
        first = rng.integers(m, size=n)
        near = first + np.round(rng.normal(scale=max(1.0, _NEIGHBOURHOOD * m), size=n)).astype(int)
        return first, np.where(rng.random(n) < _NEAR, np.clip(near, 0, m - 1), rng.integers(m, size=n))
