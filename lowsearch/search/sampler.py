"""LowSearchSampler: an Optuna sampler that searches whole populations of genomes before it proposes one network.

Optuna keeps what is expensive, the trainings. Some early networks are random ones, spread over latency, for the accuracy model to learn
from. For each other trial this sampler evolves thousands of genomes against the latency and accuracy models and returns the one
with the largest expected hypervolume gain over the study's front. Networks over a limit, and networks the study already holds, are
dropped before that. Optuna stores no sampler state, so every proposal is seeded from the study seed and the trial number: a resumed
study proposes what an uninterrupted one would have.

    sampler = LowSearchSampler(space, latency=predictor, objectives="acc-latency", seed=0)
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    study.optimize(lambda trial: my_accuracy_and_latency(sampler.suggest(trial)), n_trials=50)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from lowsearch.accuracy.scores import Unit
from lowsearch.errors import NothingLeftError, UsageError
from lowsearch.footprint import Precision
from lowsearch.search import pareto
from lowsearch.search.devices import Fleet
from lowsearch.search.estimates import (
    AccuracyModel,
    AccuracySource,
    EnergyPredictor,
    Estimates,
    Estimator,
    LatencyModel,
    chance_within,
    check_models,
    excess,
    of_limit,
    probability_at_most,
    reference_values,
)
from lowsearch.search.evolution import breed, first_of_each, one_blas_thread, unseen_mask
from lowsearch.search.objectives import OBJECTIVES, Direction, Limit, Metric, Objectives, accuracy_excess, parse_objectives
from lowsearch.search.surrogate import TrialSurrogate
from lowsearch.space import SearchSpace

logger = logging.getLogger(__name__)

ACCURACY_KEY = "accuracy"
LIMITS, ACCURACY_LIMIT = "limits", "accuracy_limit"
"""Constraints that studies set on their trials, for Optuna's samplers: by how much one breaks the limits that are known before training,
and the one on accuracy. This sampler has models of both."""
MIN_TRIALS_FOR_SURROGATE = 8
"""Below this many finished trials, a sampler without an accuracy model spreads its proposals instead of guessing."""
WHY = "why"
"""User attribute of a trial: why it was proposed, in words."""
DIVERSE_START = "diverse start"
"""How the reasons of the diverse start begin."""
WHOLE_SCHEDULE = "whole_schedule"
"""User attribute of a trial: whether its network is to be trained to the end whatever it promises, because others are judged by it."""

PROPOSED = "lowsearch:genome"
"""System attribute of a trial: the genome proposed for it, there before the first gene is, so that no other worker proposes it too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """Settings of the inner search; the defaults cost about 0.1 s a proposal on one core."""

    initial: int = 4096
    """Random genomes that are scored first."""
    parents: int = 256
    children: int = 1024
    generations: int = 16
    niches: int = 16
    """Half of the parents are the best of equal slices of latency, or of what else is the second objective, so that no part of the front
    dies out."""
    shortlist: int = 512
    """Of the last population, those that are judged again: by the accuracy model's exact form (`predict_exact`), where it has one, and over
    a front that is not taken for certain."""
    front_draws: int = 8
    """Of the accuracies of the front and of what is in training, from what is known of them; the shortlist's gains are means over these."""
    explore: float = 0.1
    """Probability that a proposal is chosen within a random slice of latency rather than over all of it."""
    learn: float = 0.05
    """Probability that it is the network of a random slice whose accuracy is least certain."""
    start_share: float = 1 / 3
    """Share of the proposals that belongs to the diverse start until it is complete; 1 would have it before anything else. As
    benchmarks/first_networks.py found it: the predictor gains, and a search that ends early has not spent its budget on learning."""


Posterior = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of an accuracy model: genomes (n, n_genes) -> what is known of those that it learned from, mean and standard deviation (n,); else NaN."""

TrainCost = Callable[[np.ndarray], np.ndarray]
"""Genomes (n, n_genes) -> what training each of them costs, (n,), positive, in any unit. It has to give the same for the same genomes, or
a resumed study proposes others."""


class Proposal(NamedTuple):
    """A network, and why it."""

    genome: np.ndarray
    """(n_genes,)"""
    why: str
    is_start: bool = False
    """Whether it belongs to the start of the search."""


class LowSearchSampler(BaseSampler):
    """Proposes networks of `space` by the expected hypervolume gain under models of latency and accuracy."""

    def __init__(
        self,
        space: SearchSpace,
        *,
        latency: LatencyModel | None,
        accuracy: AccuracySource | None = None,
        objectives: str | Objectives = "acc-latency",
        limits: Sequence[Limit] = (),
        reference: Mapping[Metric, float] | None = None,
        batch: int = 1,
        precision: Precision = "fp32",
        energy: EnergyPredictor | None = None,
        seed: int = 0,
        start: int = 0,
        evolution: Evolution | None = None,
        candidates: np.ndarray | None = None,
        train_cost: TrainCost | None = None,
    ) -> None:
        """`latency`: a model, or a Fleet of them for several devices. By the objective `worstlatency` every other proposal is then for one
        of them alone, in turn; `latency` is that of the first.
        `accuracy`: a model, or a function that returns the newest one; without it, one is learned from the study's own trials where
        accuracy is an objective.
        `candidates`: genomes (n, n_genes), the only networks that may be proposed, such as a list that was trained before.
        `start`: how many random networks, spread over latency, are proposed early on for the model to learn from.
        `train_cost`: what an expected gain is divided by where the budget is time rather than a number of trainings, such as
        `training_time.TrainingTime(space)`. Studies of `lowsearch run` do without: docs/search.md says why.
        `reference`: worst value by metric; by default `estimates.reference_values`. `batch` and `precision` are those of `latency`.
        """
        self.space = space
        self.objectives = parse_objectives(objectives) if isinstance(objectives, str) else objectives
        self.limits = tuple(limits)
        self.seed = seed
        self.evolution = evolution or Evolution()
        self._candidates = None if candidates is None else space.canonical(candidates)
        self._accuracy = accuracy
        self.start = start
        self._train_cost = train_cost
        self._estimator = Estimator(space, latency, batch=batch, precision=precision, energy=energy)
        check_models(self.objectives, limits, latency=latency, energy=energy)
        # Where accuracy is an objective, the reference point is at its limit: beyond it nothing is gained anyway.
        is_objective = ACCURACY_KEY in self.objectives.metrics
        self._accuracy_limits = () if is_objective else tuple(limit for limit in self.limits if limit.metric == ACCURACY_KEY)
        if accuracy is None and self._accuracy_limits:
            raise UsageError("accuracy has a limit, but nothing tells it", hint="pass accuracy=, or make accuracy an objective")
        self._axis = self.objectives.spread_over
        values = {**reference_values(self._estimator, chance_accuracy=1 / space.num_classes), **(reference or {})}
        for limit in self.limits:  # Beyond a limit nothing is gained, so the acquisition counts from there.
            if limit.side == next((_worse_side(o.direction) for o in (*self.objectives, self._axis) if o.metric == limit.metric), ""):
                values[limit.metric] = (min if limit.side == "max" else max)(values[limit.metric], limit.bound)
        self._reference = self.objectives.costs({metric: np.array([values[metric]]) for metric in self.objectives.metrics})[0]
        self._axis_end = float(self._axis.cost(np.array(values[self._axis.metric])))
        self._distributions: dict[str, BaseDistribution] = {g.name: IntDistribution(0, len(g.choices) - 1) for g in space.genes}

    @property
    def directions(self) -> list[Direction]:
        """What `optuna.create_study(directions=...)` needs; values come in the order of `objectives`, accuracy first."""
        return list(self.objectives.directions)

    def suggest(self, trial: Trial) -> np.ndarray:
        """The canonical genome (n_genes,) of `trial`; `space.decode` makes it an Arch. Works with any Optuna sampler."""
        return suggest_genome(trial, self.space)

    # Optuna's side -----------------------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        if not search_space or "fixed_params" in trial.system_attrs or all(name in trial.params for name in search_space):
            return {}  # An enqueued network, or one taken up again that has all its genes: nothing to propose.
        if [d.name.lower() for d in study.directions] != self.directions:
            asked = ", ".join(d.name.lower() for d in study.directions)
            raise UsageError(
                f"the study's directions are {asked}, {self.objectives} has {', '.join(self.directions)}",
                hint="optuna.create_study(directions=sampler.directions)",
            )
        return gene_indices(self._announced(study, trial), self.space)

    def _announced(self, study: Study, trial: FrozenTrial) -> np.ndarray:
        """The genome (n_genes,) proposed for `trial`, made known to other workers; another one where one of them has the same meanwhile.

        Of two that announce one network at once, whichever does it later sees the other: both may give way, but never neither.
        """
        stored = trial.system_attrs.get(PROPOSED)  # By whoever took the trial up before, and died before its last gene.
        genome, others = None if stored is None else np.array(stored, dtype=np.int8), _but(trial, study)
        while genome is None or not unseen_mask(genome[None], _held(others, self.space)[1])[0]:
            genome, why, is_start = self.proposal(others, number=trial.number)
            for name, value in ((WHY, why), (WHOLE_SCHEDULE, is_start)):
                study._storage.set_trial_user_attr(trial._trial_id, name, value)
                trial.set_user_attr(name, value)  # The copy that whoever asked for the trial holds.
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSED, genome.tolist())
            logger.info("trial %d: %s", trial.number, why)
            others = _but(trial, study)
        return genome

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """A parameter that is no gene: at random."""
        seed = int(np.random.default_rng([self.seed, trial.number, *param_name.encode()]).integers(2**31))
        return RandomSampler(seed=seed).sample_independent(study, trial, param_name, param_distribution)

    # The search --------------------------------------------------------------------------------------------------------

    def propose(self, trials: Sequence[FrozenTrial], *, number: int) -> np.ndarray:
        """The next genome (n_genes,) after `trials`. Deterministic in the seed, `number`, the trials and the models.

        Raises NothingLeftError where no untried network keeps the limits.
        """
        return self.proposal(trials, number=number).genome

    def proposal(self, trials: Sequence[FrozenTrial], *, number: int) -> Proposal:
        """As `propose`, with the reason."""
        rng = np.random.default_rng([self.seed, number])
        held, seen = _held(trials, self.space)
        own = [t for t in held if "fixed_params" not in t.system_attrs and t.state != TrialState.PRUNED]
        if self.start and ACCURACY_KEY in self.objectives.metrics:
            begun = sum(bool(t.user_attrs.get(WHOLE_SCHEDULE)) for t in own)
            due = begun < min(self.start, self.evolution.start_share * (len(own) + 1))
            if due and (genome := self.spread(self._random(rng), seen, index=begun)) is not None:
                return Proposal(genome, f"{DIVERSE_START}, {begun + 1} of {self.start}: a random network of its latency", is_start=True)
        accuracy = self._newest_accuracy(held, seen)
        if accuracy is None and ACCURACY_KEY in self.objectives.metrics:
            if (genome := self.spread(self._random(rng), seen, index=len(own))) is not None:
                return Proposal(genome, "nothing to go by: a random network of its latency")
            return self._evolve(seen, np.empty((0, len(self.objectives))), np.empty(0), _Judge(self, None, self._estimator), rng)
        with one_blas_thread():
            judge = _Judge(self, accuracy, self._estimator_for(number), self._constraint_models(held, seen))
            return self._evolve(seen, *self._known_costs(held, seen, accuracy, judge.estimator), judge, rng)

    def _known_costs(
        self, held: Sequence[FrozenTrial], seen: np.ndarray, accuracy: AccuracyModel | None, estimator: Estimator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Costs (n, n_objectives) of what the study has and expects, and the standard deviation (n,) of the first, 0 where it is known.

        An accuracy is what is estimated of it now: a trial's own value is from when less was known, and the best of many are the lucky
        ones. A training in flight is taken to end as predicted, so that parallel workers spread out. What broke a constraint that its
        objective set, or a limit on accuracy, is left out: nothing it dominates is worse for it.
        """
        posterior = getattr(accuracy, "posterior", None)
        feasible = self._feasible(held, seen, accuracy)
        done = feasible & np.array([t.state == TrialState.COMPLETE for t in held], dtype=bool)
        costs = self.objectives.costs(np.array([t.values for t, d in zip(held, done, strict=True) if d], dtype=float))
        std = np.zeros(len(costs))
        if posterior is not None and done.any() and self.objectives.metrics[0] == ACCURACY_KEY:
            mean, std = posterior(seen[done])
            costs[:, 0] = np.where(np.isnan(mean), costs[:, 0], self.objectives.members[0].cost(mean))
            std = np.where(np.isnan(mean), 0.0, std)
        if estimator is not self._estimator and done.any():
            alone = estimator.estimate(seen[done]).mean["worst_latency"]
            costs[:, self.objectives.metrics.index("worst_latency")] = OBJECTIVES["worstlatency"].cost(alone)
        pending = feasible & np.array([t.state in (TrialState.RUNNING, TrialState.WAITING) for t in held], dtype=bool)
        if pending.any():
            estimates = estimator.estimate(seen[pending], accuracy)
            counts = chance_within(estimates, self._accuracy_limits) >= 0.5
            costs, std = np.vstack([costs, self._costs(estimates)[counts]]), np.append(std, self._std(estimates)[counts])
        return costs, std

    def _feasible(self, held: Sequence[FrozenTrial], seen: np.ndarray, accuracy: AccuracyModel | None) -> np.ndarray:
        """Whether each trial (n,) breaks no constraint that was set on it (Optuna's are broken above 0), nor a limit on its accuracy.

        Its accuracy is what the model's `posterior` knows of it now; without one, what the study said when the trial ended, or else the
        prediction.
        """
        feasible = np.array([all(v <= 0 for name, v in t.constraints.items() if name != ACCURACY_LIMIT) for t in held], dtype=bool)
        if not len(held) or not self._accuracy_limits:
            return feasible
        broken = np.array([t.constraints.get(ACCURACY_LIMIT, np.nan) for t in held])
        posterior: Posterior | None = getattr(accuracy, "posterior", None)
        if posterior is not None:
            now = accuracy_excess(self._accuracy_limits, posterior(seen)[0])
            broken = np.where(np.isnan(now), broken, now)
        elif accuracy is not None:
            broken = np.where(np.isnan(broken), accuracy_excess(self._accuracy_limits, accuracy.predict(seen)[0]), broken)
        return feasible & ~(broken > 0)  # Of what nothing is known, nothing is broken.

    def _constraint_models(self, held: Sequence[FrozenTrial], seen: np.ndarray) -> dict[str, TrialSurrogate]:
        """A model of every constraint that objectives set, where it was broken by some and kept by others of enough trials.

        An infinite value, of what cannot be told in numbers, counts as twice the largest other.
        """
        models = {}
        for name in sorted({name for t in held for name in t.constraints} - {LIMITS, ACCURACY_LIMIT}):
            known = np.array([t.state == TrialState.COMPLETE and name in t.constraints for t in held], dtype=bool)
            values = np.array([t.constraints[name] for t, k in zip(held, known, strict=True) if k])
            if len(values) >= MIN_TRIALS_FOR_SURROGATE and 0 < (values > 0).sum() < len(values):
                most = 2 * np.abs(values[np.isfinite(values)]).max(initial=0.5)
                models[name] = TrialSurrogate(self._estimator, seen[known], np.clip(values, -most, most))
        return models

    def _estimator_for(self, number: int) -> Estimator:
        """Whom trial `number` is proposed for: every other one of several devices for all of them, the rest for one alone, in turn.

        What sharing one network costs is told by the fronts of the devices alone, so they are searched for too.
        """
        latency = self._estimator.latency
        if not isinstance(latency, Fleet) or "worst_latency" not in self.objectives.metrics or number % 2 == 0:
            return self._estimator
        return self._estimator.on_device(latency.labels[number // 2 % len(latency.labels)])

    def _newest_accuracy(self, held: Sequence[FrozenTrial], seen: np.ndarray) -> AccuracyModel | None:
        if ACCURACY_KEY not in self.objectives.metrics and not self._accuracy_limits:
            return None
        if self._accuracy is not None:
            return self._accuracy if hasattr(self._accuracy, "predict") else self._accuracy()  # type: ignore[operator, return-value]
        done = np.array([t.state == TrialState.COMPLETE for t in held], dtype=bool)
        if done.sum() < MIN_TRIALS_FOR_SURROGATE:
            return None
        column = self.objectives.metrics.index(ACCURACY_KEY)
        accuracies = np.array([t.values[column] for t, d in zip(held, done, strict=True) if d])
        return TrialSurrogate(self._estimator, seen[done], accuracies)

    def _costs(self, estimates: Estimates) -> np.ndarray:
        return self.objectives.costs({metric: estimates.mean[metric] for metric in self.objectives.metrics})

    def _std(self, estimates: Estimates) -> np.ndarray:
        """Standard deviation (n,) of the first cost."""
        exact = np.zeros(len(estimates.mean["macs"]))
        return estimates.std[ACCURACY_KEY] if self.objectives.metrics[0] == ACCURACY_KEY else exact

    def _slices(self, estimates: Estimates) -> np.ndarray:
        """Slice (n,) of latency, or of what else networks are spread over, that each falls into; 0 holds the fastest decade."""
        x = self._axis.cost(estimates.mean[self._axis.metric])
        span = np.log(20.0) if self._axis.log else 1.0
        return np.clip(((x - self._axis_end + span) / span * self.evolution.niches).astype(int), 0, self.evolution.niches - 1)

    def _random(self, rng: np.random.Generator) -> np.ndarray:
        """The population (n, n_genes) that everything begins with."""
        return self.space.sample(self.evolution.initial, rng=rng) if self._candidates is None else self._candidates

    def spread(self, pool: np.ndarray, seen: np.ndarray, *, index: int) -> np.ndarray | None:
        """Of `pool` (n, n_genes) the network that keeps the limits, is not among those `seen` (m, n_genes), and lies nearest to place
        `index` of a sequence that fills the latency axis (or whatever else `Objectives.spread_over` is). None where none keeps them.

        From a random pool it is random in all else: networks chosen to be far apart are odd ones, and a model learns less from them.
        """
        pool = pool[unseen_mask(pool, seen)]
        estimates = self._estimator.estimate(pool)
        x = self._axis.cost(estimates.mean[self._axis.metric])
        allowed = excess(estimates, self.limits) == 0
        inside = allowed & (x < self._axis_end)
        use = np.flatnonzero(inside if inside.any() else allowed)
        if not len(use):
            return None
        place = x[use].min() + _van_der_corput(index) * np.ptp(x[use])
        return pool[use[int(np.argmin(np.abs(x[use] - place)))]]

    def _evolve(
        self,
        seen: np.ndarray,
        costs: np.ndarray,
        std: np.ndarray,
        judge: _Judge,
        rng: np.random.Generator,
    ) -> Proposal:
        """Evolve a population and propose its best member: feasible, unseen, with the largest expected hypervolume gain; now and then
        the best, or the least certain, of one slice.

        `costs` (n, k) with `std` (n,) in the first column are those of the networks that the study has.
        """
        settings = self.evolution
        gains = pareto.ExpectedGain(costs, self._reference)
        accuracy = judge.accuracy
        family = [self.space.encode(arch)[None] for arch in self.space.family.values()]
        known = np.vstack([*family, seen, np.empty((0, self.space.n_genes), dtype=np.int8)])
        population = [self._random(rng)]
        if len(known) and self._candidates is None:
            population.append(
                self.space.mutate(known[rng.integers(len(known), size=settings.initial)], rng=rng, rate=2 / self.space.n_genes)
            )
        pool = judge.pool(np.vstack(population), gains)
        n_scored = len(pool.genomes)
        for _ in range(settings.generations if self._candidates is None else 0):
            parents = pool.take(pool.survivors(settings.parents, settings.niches, rng))
            first, second = rng.integers(len(parents.genomes), size=(2, settings.children))
            children = breed(self.space, parents.genomes, first, second, rng=rng)
            scored = judge.pool(children, gains)
            n_scored += len(scored.genomes)
            pool = parents.joined(scored)
        pool = pool.take(unseen_mask(pool.genomes, seen))
        feasible = pool.excess == 0
        if not feasible.any():
            raise self._nothing_feasible(n_scored, accuracy, rng)
        pool = pool.take(feasible)
        if judge.is_blind:
            return Proposal(pool.genomes[rng.integers(len(pool.genomes))], "nothing to go by: a network within the limits")
        draw, where = rng.random(), ""
        learns = settings.explore <= draw < settings.explore + settings.learn and pool.std.any()
        if draw < settings.explore or learns:
            present = np.unique(pool.slices)
            slice_ = rng.choice(present)
            pool = pool.take(pool.slices == slice_)
            where = f" in slice {slice_ + 1} of {settings.niches}"
        exact = getattr(accuracy, "predict_exact", None)
        if exact is not None or std.any():
            best = pool.take(np.argsort(-(pool.std if learns else pool.worth), kind="stable")[: settings.shortlist])
            noisy = _NoisyGain(costs, std, self._reference, n_draws=settings.front_draws, rng=rng)
            pool = judge.exactly().pool(best.genomes, noisy)
        if learns:
            i = int(np.argmax(pool.std))
            return Proposal(pool.genomes[i], f"least certain{where}: accuracy known to {pool.std[i]:.2g}")
        i = int(np.argmax(pool.worth))
        price = "" if self._train_cost is None else f" for a cost of {self._train_cost(pool.genomes[i : i + 1])[0]:.2g}"
        return Proposal(pool.genomes[i], f"expected gain {pool.gain[i]:.2g}{price}{where}")

    def _nothing_feasible(self, n_scored: int, accuracy: AccuracyModel | None, rng: np.random.Generator) -> NothingLeftError:
        limits = ", ".join(map(str, self.limits)) or "none"
        if self._candidates is not None:
            return NothingLeftError(
                f"none of the {len(self._candidates):,} candidates is untried and keeps the limits ({limits})",
                hint="give more candidates",
            )
        probe = self._estimator.estimate(self.space.sample(20_000, rng=rng), accuracy)
        reached = [(limit.name, of_limit(probe, limit)[0]) for limit in self.limits if limit.metric in probe.mean]
        reach = ", ".join(f"{name} {values.min():.3g} to {values.max():.3g}" for name, values in reached)
        return NothingLeftError(
            f"no untried network of space {self.space.name!r} that keeps the limits ({limits}) with the margin of the predictions was "
            f"found among {n_scored:,} candidates",
            hint=f"random networks reach {reach}" if reach else "choose a larger space",
        )


class _NoisyGain:
    """Expected hypervolume gain over a front of which the first cost is uncertain: the mean over draws of it (noisy expected hypervolume
    improvement, arXiv 2105.08195)."""

    def __init__(self, costs: np.ndarray, std: np.ndarray, reference: np.ndarray, *, n_draws: int, rng: np.random.Generator) -> None:
        draws = np.repeat(costs[None], n_draws if std.any() else 1, axis=0)
        draws[:, :, 0] += std * rng.normal(size=draws.shape[:2])
        self._gains = [pareto.ExpectedGain(drawn, reference) for drawn in draws]

    def __call__(self, costs: np.ndarray, std: np.ndarray) -> np.ndarray:
        return np.mean([gain(costs, std) for gain in self._gains], axis=0)


class _Exact:
    """The exact form of an accuracy model, too slow for populations, as a model of its own."""

    def __init__(self, model: AccuracyModel, predict_exact: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        self._model, self._predict_exact = model, predict_exact

    @property
    def unit(self) -> Unit:
        return self._model.unit

    @property
    def source(self) -> str:
        return self._model.source

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._predict_exact(genomes)


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores populations for one proposal."""

    sampler: LowSearchSampler
    accuracy: AccuracyModel | None
    estimator: Estimator
    """With several devices, that of whom is proposed for."""
    constraints: Mapping[str, TrialSurrogate] = field(default_factory=dict)
    """By name: what is known of constraints that only a trial can tell."""

    @property
    def is_blind(self) -> bool:
        """Whether nothing is known of an objective, so that only limits can be told."""
        return self.accuracy is None and ACCURACY_KEY in self.sampler.objectives.metrics

    def exactly(self) -> _Judge:
        """By the exact form of the accuracy model, where it has one."""
        exact = getattr(self.accuracy, "predict_exact", None)
        return self if self.accuracy is None or exact is None else replace(self, accuracy=_Exact(self.accuracy, exact))

    def pool(self, genomes: np.ndarray, gains: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Pool:
        """`genomes` (n, n_genes) without repeats, scored. A gain counts by the chance that the network may have it at all."""
        sampler = self.sampler
        genomes = genomes[first_of_each(genomes)]
        estimates = self.estimator.estimate(genomes, self.accuracy)
        broken = excess(sampler._estimator.as_its_own(estimates), sampler.limits)
        slices = sampler._slices(estimates)
        if self.is_blind:
            zero = np.zeros(len(genomes))
            return _Pool(genomes, zero, zero, broken, zero, slices, zero)
        costs, std = sampler._costs(estimates), sampler._std(estimates)
        gain = gains(costs, std) * self._chance(genomes, estimates)
        worth = gain if sampler._train_cost is None else gain / sampler._train_cost(genomes)
        return _Pool(genomes, gain, worth, broken, costs[:, 0] - 2 * std, slices, std)

    def _chance(self, genomes: np.ndarray, estimates: Estimates) -> np.ndarray:
        """Probability (n,) that a network keeps what only its training tells."""
        chance = chance_within(estimates, self.sampler._accuracy_limits)
        for model in self.constraints.values():
            chance = chance * probability_at_most(0.0, *model.predict(genomes))
        return chance


@dataclass(frozen=True, eq=False)
class _Pool:
    """A scored population without repeats."""

    genomes: np.ndarray
    gain: np.ndarray
    """Expected hypervolume gain."""
    worth: np.ndarray
    """The gain for what the training costs; the gain itself where no cost is told."""
    excess: np.ndarray
    optimistic: np.ndarray
    """First cost at two standard deviations below its mean."""
    slices: np.ndarray
    std: np.ndarray
    """Of the accuracy; 0 where it is not an objective."""

    def take(self, which: np.ndarray) -> _Pool:
        return _Pool(*(getattr(self, f.name)[which] for f in fields(self)))

    def joined(self, other: _Pool) -> _Pool:
        pool = _Pool(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))
        return pool.take(first_of_each(pool.genomes))

    def survivors(self, n: int, niches: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of at most `n`: half by worth, half the best by optimism in every slice; those that break limits less come first."""
        tie = rng.random(len(self.genomes))
        by_worth = np.lexsort((tie, -self.worth, self.excess))[: n // 2]
        by_slice = np.lexsort((tie, self.optimistic, self.excess, self.slices))
        ordered = self.slices[by_slice]
        rank_in_slice = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
        return np.unique(np.concatenate([by_worth, by_slice[rank_in_slice < max(1, n // 2 // niches)]]))


def suggest_genome(trial: Trial, space: SearchSpace) -> np.ndarray:
    """Ask `trial` for every gene (its index among the choices) and return the canonical genome (n_genes,)."""
    indices = [trial.suggest_int(gene.name, 0, len(gene.choices) - 1) for gene in space.genes]
    return space.canonical(np.array([indices], dtype=np.int8))[0]


def gene_indices(genome: Sequence[int] | np.ndarray, space: SearchSpace) -> dict[str, int]:
    """A genome as Optuna parameters."""
    return {gene.name: int(index) for gene, index in zip(space.genes, genome, strict=True)}


def accuracy_constraint(limits: Sequence[Limit], accuracy: float) -> dict[str, float]:
    """The constraint, by its name, that a trial of this `accuracy` is given; none where `limits` hold none on it."""
    limited = any(limit.metric == ACCURACY_KEY for limit in limits)
    return {ACCURACY_LIMIT: float(accuracy_excess(limits, np.array(accuracy)))} if limited else {}


def _but(trial: FrozenTrial, study: Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]


def _held(trials: Sequence[FrozenTrial], space: SearchSpace) -> tuple[list[FrozenTrial], np.ndarray]:
    """Those of `trials` whose network is known, and their canonical genomes (n, n_genes). That of a trial that has not all its genes yet
    is what was enqueued or announced for it."""
    held, rows = [], []
    for trial in trials:
        params = trial.params
        if not trial.state.is_finished():
            announced = trial.system_attrs.get(PROPOSED)
            params = {**(gene_indices(announced, space) if announced else {}), **trial.system_attrs.get("fixed_params", {}), **params}
        if all(gene.name in params for gene in space.genes):
            held.append(trial)
            rows.append([params[gene.name] for gene in space.genes])
    return held, space.canonical(np.array(rows, dtype=np.int8).reshape(-1, space.n_genes))


def _van_der_corput(index: int) -> float:
    """Element `index` of the sequence 1/2, 1/4, 3/4, 1/8, ...: every start of it fills (0, 1) evenly."""
    value, share, rest = 0.0, 0.5, index + 1
    while rest:
        value, share, rest = value + share * (rest % 2), share / 2, rest // 2
    return value


def _worse_side(direction: str) -> str:
    return "max" if direction == "minimize" else "min"
