"""Optuna's own samplers in a study: made anew for every trial, seeded from (study seed, trial number).

Optuna does not store a sampler's random state, so a sampler that lives as long as its process would propose other networks after a
resume. Here every proposal depends on the seed, the trial's number and the stored trials alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from lowsearch.errors import StudyError
from lowsearch.space import SearchSpace

NSGA2_POPULATION = 16
"""Optuna's default of 50 would leave a study of some dozen trials in the random first generation."""
MAX_DRAWS = 1000

FOREIGN: dict[str, Callable[[int], BaseSampler]] = {
    "nsga2": lambda seed: NSGAIISampler(population_size=NSGA2_POPULATION, seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


class SeededSampler(BaseSampler):
    """A fresh sampler from `make` for every trial; `accept`, where given, has it draw again until it accepts a genome (n_genes,)."""

    def __init__(
        self,
        make: Callable[[int], BaseSampler],
        space: SearchSpace,
        *,
        seed: int,
        accept: Callable[[np.ndarray], bool] | None = None,
    ) -> None:
        self._make = make
        self._seed = seed
        self._accept = accept
        self._distributions: dict[str, BaseDistribution] = {g.name: IntDistribution(0, len(g.choices) - 1) for g in space.genes}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """All genes at once, so that a trial interrupted between two of them is completed as it would have been."""
        if not search_space:
            return {}
        for draw in range(MAX_DRAWS if self._accept else 1):
            seed = int(np.random.default_rng([self._seed, trial.number, draw]).integers(2**31))
            sampler = self._make(seed)
            params = dict(sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial)))
            if "fixed_params" in trial.system_attrs:
                return {}  # An enqueued network; NSGA-II has noted its generation by now.
            for name, distribution in search_space.items():
                if name not in params:
                    params[name] = sampler.sample_independent(study, trial, name, distribution)
            if self._accept is None or self._accept(np.array([params[name] for name in self._distributions], dtype=np.int8)):
                return params
        raise StudyError(
            f"{MAX_DRAWS} random networks in a row break a limit or were tried before",
            hint="loosen --max or --min, or use --sampler lowsearch, which searches for networks within limits",
        )

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        seed = int(np.random.default_rng([self._seed, trial.number, *param_name.encode()]).integers(2**31))
        return self._make(seed).sample_independent(study, trial, param_name, param_distribution)
