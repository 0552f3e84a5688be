"""What may propose the networks of a study, by the name that `--sampler` takes: ours, Optuna's, and trying everything.

Every one is made anew from the study's seed, and what it proposes depends on that, the trial's number and the stored trials alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from lowsearch.search.estimates import AccuracySource, Estimator
from lowsearch.search.feasible import all_to_try
from lowsearch.search.foreign import GaussianProcessSampler, SeededSampler, UniformSampler, gene_distributions
from lowsearch.search.objectives import Limit, Metric, Objectives
from lowsearch.search.sampler import LowSearchSampler, gene_indices
from lowsearch.space import SearchSpace

POPULATION = 16
"""Optuna's default of 50 would leave a study of some dozen trials in the random first generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a sampler may know of the study that it proposes for."""

    space: SearchSpace
    estimator: Estimator
    prediction: Estimator
    """As `estimator`, unmoved by what is measured while the study runs."""
    accuracy: AccuracySource
    objectives: Objectives
    limits: Sequence[Limit]
    reference: Mapping[Metric, float]
    seed: int
    acceptable: Callable[[np.ndarray], np.ndarray]
    """Genomes (n, n_genes) -> whether each keeps the limits and is new to the study, (n,)."""
    start: int = 0
    """How many networks of a diverse start are trained to the end whatever they promise."""


def _ours(task: Task) -> BaseSampler:
    return LowSearchSampler(
        task.space, latency=task.estimator.latency, batch=task.estimator.batch, precision=task.estimator.precision, 
        energy=task.estimator.energy, accuracy=task.accuracy, objectives=task.objectives, limits=task.limits,
        reference=task.reference, seed=task.seed, start=task.start,
    )  # fmt: skip


def without_predictor(task: Task) -> BaseSampler:
    """Ours with nothing known of accuracy: random networks that keep the limits, spread over latency."""
    return _ours(replace(task, accuracy=_nothing_known, start=0))


def _nothing_known() -> None:
    return None


def _nsga3(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna calls it so since 3.2; the tests hold what is used of it.
        return NSGAIIISampler(population_size=POPULATION, seed=seed)


SAMPLERS: dict[str, Callable[[Task], BaseSampler]] = {
    "lowsearch": _ours,
    "nsga2": lambda task: SeededSampler(lambda seed: NSGAIISampler(population_size=POPULATION, seed=seed), task.space, seed=task.seed),
    "nsga3": lambda task: SeededSampler(_nsga3, task.space, seed=task.seed),
    "tpe": lambda task: SeededSampler(lambda seed: TPESampler(seed=seed), task.space, seed=task.seed),
    "gp": lambda task: SeededSampler(
        lambda seed: GaussianProcessSampler(task.space, task.acceptable, seed=seed), task.space, seed=task.seed, accept=task.acceptable
    ),
    "random": lambda task: UniformSampler(task.space, task.acceptable, seed=task.seed),
    "exhaustive": lambda task: ExhaustiveSampler(all_to_try(task.prediction, task.limits), task.space, task.acceptable, seed=task.seed),
}


class ExhaustiveSampler(BaseSampler):
    """Proposes every one of `genomes` (n, n_genes) once, in an order drawn from the seed."""

    def __init__(self, genomes: np.ndarray, space: SearchSpace, acceptable: Callable[[np.ndarray], np.ndarray], *, seed: int) -> None:
        self._order = genomes[np.random.default_rng(seed).permutation(len(genomes))]
        self._space = space
        self._acceptable = acceptable

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return gene_distributions(self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs or len(trial.params) == self._space.n_genes:
            return {}  # An enqueued network, or one taken up again that has all its genes.
        left = np.flatnonzero(self._acceptable(self._order))
        genome = self._order[left[0]]
        return gene_indices(genome, self._space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return 0
