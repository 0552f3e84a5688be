"""Optuna's own samplers in a study: made anew for every trial, seeded from (study seed, trial number).

Optuna does not store a sampler's random state, so a sampler that lives as long as its process would propose other networks after a
resume. Here every proposal depends on the seed, the trial's number and the stored trials alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from lowsearch.errors import NothingLeftError
from lowsearch.search.sampler import gene_indices
from lowsearch.space import SearchSpace

N_UNIFORM, MAX_UNIFORM = 1024, 262_144
"""Random networks that are drawn at a time, and in all before the search is given up."""
N_STARTUP = 10
"""So many networks are scored before a Gaussian process is asked; until then, random ones."""
N_SAMPLED, N_PARENTS, N_CHILDREN, N_GENERATIONS = 2048, 32, 16, 8
"""Of the evolution that finds the largest acquisition."""
_PROPOSED = "gp:relative_params:0"  # Where Optuna's sampler keeps what it proposed.


def gene_distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Every gene as Optuna's parameter: the index of its choice."""
    return {gene.name: IntDistribution(0, len(gene.choices) - 1) for gene in space.genes}


class UniformSampler(BaseSampler):
    """Networks at random, every gene uniform over its choices, drawn again until one is accepted: (n, n_genes) -> (n,)."""

    def __init__(self, space: SearchSpace, accept: Callable[[np.ndarray], np.ndarray], *, seed: int) -> None:
        self._space, self.accept, self._seed = space, accept, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return gene_distributions(self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if not search_space or "fixed_params" in trial.system_attrs:
            return {}
        rng = np.random.default_rng([self._seed, trial.number])
        for _ in range(MAX_UNIFORM // N_UNIFORM):
            genomes = self._space.sample(N_UNIFORM, rng=rng)
            if (accepted := np.flatnonzero(self.accept(genomes))).size:
                return gene_indices(genomes[accepted[0]], self._space)
        raise _nothing_accepted(MAX_UNIFORM)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        raise AssertionError(f"{param_name} is no gene of the space")


class SeededSampler(BaseSampler):
    """A fresh sampler from `make` for every trial. Where `accept` is given, (n, n_genes) -> (n,), a random network takes the place of one
    that is not accepted."""

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        space: SearchSpace,
        *,
        seed: int,
        accept: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._make = make
        self._seed = seed
        self._instead = UniformSampler(space, accept, seed=seed) if accept else None
        self._distributions = gene_distributions(space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """All genes at once, so that a trial interrupted between two of them is completed as it would have been."""
        if not search_space:
            return {}
        sampler = self._make(int(np.random.default_rng([self._seed, trial.number]).integers(2**31)))
        params = dict(sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial)))
        if "fixed_params" in trial.system_attrs:
            return {}  # An enqueued network; NSGA-II has noted its generation by now.
        for name, distribution in search_space.items():
            if name not in params:
                params[name] = sampler.sample_independent(study, trial, name, distribution)
        if self._instead is None or self._instead.accept(np.array([[params[name] for name in self._distributions]], dtype=np.int8))[0]:
            return params
        return self._instead.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        seed = int(np.random.default_rng([self._seed, trial.number, *param_name.encode()]).integers(2**31))
        return self._make(seed).sample_independent(study, trial, param_name, param_distribution)


def _nothing_accepted(n: int) -> NothingLeftError:
    return NothingLeftError(
        f"{n:,} random networks in a row break a limit or were tried before",
        hint="loosen --max or --min, or use --sampler lowsearch, which searches for networks within limits",
    )


class GaussianProcessSampler(GPSampler):
    """Optuna's, with its acquisition maximised over networks that may be tried.

    Optuna learns what is feasible from finished trials, but here a network over a limit never gets that far: limits are known before
    training. And its optimiser would propose equal networks as different vectors.
    """

    def __init__(self, space: SearchSpace, acceptable: Callable[[np.ndarray], np.ndarray], *, seed: int) -> None:
        super().__init__(seed=seed, n_startup_trials=N_STARTUP, warn_independent_sampling=False)
        self._space = space
        self._acceptable = acceptable
        self._population_rng = np.random.default_rng(seed)
        self._columns: list[int] = []

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        names = [gene.name for gene in self._space.genes]
        self._columns = [names.index(name) for name in search_space]
        if _PROPOSED in trial.system_attrs:  # It died in this trial: forget the proposal, or it would count as one in flight.
            study._storage.set_trial_system_attr(trial._trial_id, _PROPOSED, "")
        return super().sample_relative(study, trial, search_space)

    def _optimize_acqf(self, acqf: Any, best_params: np.ndarray | None) -> np.ndarray:
        """The acceptable network, as Optuna normalises it, of the largest acquisition that an evolution finds."""
        space, rng = self._space, self._population_rng
        genomes = space.sample(N_SAMPLED, rng=rng)
        if best_params is not None and len(best_params):
            front = self._genomes(best_params)
            genomes = np.vstack([genomes, space.mutate(front[rng.integers(len(front), size=N_SAMPLED)], rng=rng)])
        best = np.empty((0, space.n_genes), dtype=np.int8)
        for _ in range(N_GENERATIONS):
            genomes = np.unique(np.vstack([best, genomes[self._acceptable(genomes)]]), axis=0)
            if not len(genomes):
                raise _nothing_accepted(2 * N_SAMPLED)
            best = genomes[np.argsort(-acqf.eval_acqf_no_grad(self._normalised(genomes)), kind="stable")[:N_PARENTS]]
            genomes = space.mutate(np.repeat(best, N_CHILDREN, axis=0), rng=rng)
        return self._normalised(best)[0]

    def _normalised(self, genomes: np.ndarray) -> np.ndarray:
        """Choice i of n is at (i + 1/2) / n, (n, n_columns)."""
        return ((genomes + 0.5) / self._space.cardinalities)[:, self._columns]

    def _genomes(self, normalised: np.ndarray) -> np.ndarray:
        genomes = np.zeros((len(normalised), self._space.n_genes), dtype=np.int8)
        genomes[:, self._columns] = np.round(normalised * self._space.cardinalities[self._columns] - 0.5)
        return self._space.canonical(genomes)
