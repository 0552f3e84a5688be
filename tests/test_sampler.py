"""LowSearchSampler on the micro space with closed-form latency and accuracy: feasible, new, repeatable, and better than chance."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from scipy import stats

from lowsearch import cost
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.prior import PublishedPrior
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.errors import StudyError, UsageError
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import SHIPPED, LatencyTable
from lowsearch.search import pareto
from lowsearch.search.devices import Fleet, Scale
from lowsearch.search.estimates import Estimator, excess
from lowsearch.search.objectives import parse_limits
from lowsearch.search.sampler import ACCURACY_LIMIT, WHOLE_SCHEDULE, WHY, Evolution, LowSearchSampler, gene_indices, suggest_genome
from lowsearch.search.samplers import Task, without_predictor
from lowsearch.search.training_time import TrainingTime
from lowsearch.space import SearchSpace

ROOT = Path(__file__).parents[1]
optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = SearchSpace.load("lowformer-micro")
SCORE = SPACE.block_sums(np.array([[c.macs, c.params] for c in map(cost.of_block, SPACE.blocks)], dtype=float))
EXACT = Estimator(SPACE, None)
SMALL = Evolution(initial=512, parents=64, children=192, generations=6)


class FakeLatency:
    """0.05 ms plus 50 ns per thousand MACs, known to 5 %."""

    def predict(self, genomes):
        mean_ms = 0.05 + SCORE(genomes)[:, 0] / 2e7
        return mean_ms, 0.05 * mean_ms


class FakeAccuracy:
    """Saturates in the MACs; a fixed direction in feature space says which of two equally large networks is better."""

    def predict(self, genomes):
        features = SPACE.features(genomes)
        taste = features @ np.random.default_rng(1).normal(size=features.shape[1])
        return 0.8 - 0.5 / (1 + SCORE(genomes)[:, 0] / 1e6) + 0.05 * np.tanh(taste / 10), np.full(len(genomes), 0.01)


def make_sampler(**changes):
    settings = {"latency": FakeLatency(), "accuracy": FakeAccuracy(), "seed": 0, "evolution": SMALL}
    return LowSearchSampler(SPACE, **settings | changes)


def truth(genomes, metrics):
    sums = SCORE(genomes)
    values = {
        "accuracy": FakeAccuracy().predict(genomes)[0], "latency_ms": FakeLatency().predict(genomes)[0],
        "macs": sums[:, 0], "params": sums[:, 1], **{m: EXACT.estimate(genomes).mean[m] for m in ("peak_memory_mb", "artifact_mb")},
    }  # fmt: skip
    return np.stack([values[m] for m in metrics], axis=1)


def run(sampler, n_trials, *, study=None, optuna_sampler=None):
    """Optimise against the truth; returns the study and its genomes."""
    study = study or optuna.create_study(directions=sampler.directions, sampler=optuna_sampler or sampler)
    study.optimize(lambda trial: tuple(truth(sampler.suggest(trial)[None], sampler.objectives.metrics)[0]), n_trials=n_trials)
    return study, np.array([[t.params[g.name] for g in SPACE.genes] for t in study.trials], dtype=np.int8)


def volume(sampler, values):
    return pareto.hypervolume(sampler.objectives.costs(np.asarray(values)), sampler._reference)


def test_proposals_are_canonical_and_never_repeat():
    _, genomes = run(make_sampler(), 15)
    assert (SPACE.canonical(genomes) == genomes).all()
    assert len(np.unique(genomes, axis=0)) == 15


@pytest.mark.parametrize("accuracy", [FakeAccuracy(), None], ids=["with a model of accuracy", "learning from its own trials"])
def test_twenty_five_proposals_beat_a_thousand_random_networks(accuracy):
    sampler = make_sampler(accuracy=accuracy, evolution=Evolution(initial=1024, generations=10))
    study, _ = run(sampler, 25)
    random = truth(SPACE.sample(1000, rng=np.random.default_rng(0)), sampler.objectives.metrics)
    assert volume(sampler, [t.values for t in study.trials]) > volume(sampler, random)


@pytest.mark.parametrize(
    "objectives", ["latency-params", "acc-latency-params", "acc-macs", "acc-latency-macs-params", "acc-latency-memory-size"]
)
def test_other_objectives_beat_as_many_random_networks(objectives):
    sampler = make_sampler(objectives=objectives)
    study, genomes = run(sampler, 10)
    random = truth(SPACE.sample(10, rng=np.random.default_rng(0)), sampler.objectives.metrics)
    assert volume(sampler, [t.values for t in study.trials]) > volume(sampler, random)
    assert len(np.unique(genomes, axis=0)) == 10


@pytest.mark.parametrize("objectives", ["acc", "latency", "params"])
@pytest.mark.parametrize("accuracy", [FakeAccuracy(), None], ids=["with a model of accuracy", "learning from its own trials"])
def test_the_best_network_by_one_objective_is_found_in_a_tenth_of_the_trials(objectives, accuracy):
    candidates = SPACE.sample(300, rng=np.random.default_rng(0))
    sampler = make_sampler(objectives=objectives, accuracy=accuracy, candidates=candidates)
    study, _ = run(sampler, 30)
    costs = sampler.objectives.costs(truth(candidates, sampler.objectives.metrics))[:, 0]
    found = sampler.objectives.costs(np.array([t.values for t in study.trials]))[:, 0]
    assert found.min() <= np.partition(costs, 2)[2]


def test_one_objective_is_searched_beyond_what_random_networks_reach():
    limits = parse_limits(maxima=["latency_ms=0.3"])
    sampler = make_sampler(objectives="acc", limits=limits, evolution=Evolution(explore=0.0, learn=0.0))
    random = SPACE.sample(20_000, rng=np.random.default_rng(0))
    mean_ms, std_ms = FakeLatency().predict(random)
    _, genomes = run(sampler, 3)
    assert FakeAccuracy().predict(genomes)[0].max() > FakeAccuracy().predict(random[mean_ms + 1.3 * std_ms <= 0.3])[0].max()
    mean_ms, std_ms = FakeLatency().predict(genomes)
    assert (mean_ms + std_ms <= 0.3).all()


def test_the_shortlist_is_judged_by_the_exact_form_of_the_model():
    class Coarse:
        """Knows nothing of single networks, its exact form everything."""

        def __init__(self):
            self.judged = []

        def predict(self, genomes):
            return np.full(len(genomes), 0.6), np.full(len(genomes), 0.1)

        def predict_exact(self, genomes):
            self.judged.append(genomes)
            return FakeAccuracy().predict(genomes)

    model = Coarse()
    sampler = make_sampler(accuracy=model, evolution=Evolution(initial=512, generations=4, shortlist=50))
    genome = sampler.propose([], number=0)
    [shortlist] = model.judged
    assert len(shortlist) == 50
    mean, std = FakeAccuracy().predict(shortlist)
    costs = sampler.objectives.costs({"accuracy": mean, "latency_ms": FakeLatency().predict(shortlist)[0]})
    gains = pareto.expected_gain(costs, std, np.empty((0, 2)), sampler._reference)
    assert (genome == shortlist[np.argmax(gains)]).all()


@pytest.mark.parametrize("accuracy", [FakeAccuracy(), None], ids=["with a model of accuracy", "learning from its own trials"])
def test_of_a_fixed_list_every_candidate_is_proposed_once_and_the_front_first(accuracy):
    candidates = SPACE.sample(60, rng=np.random.default_rng(0))
    sampler = make_sampler(accuracy=accuracy, candidates=candidates)
    study, genomes = run(sampler, 30)
    half = volume(sampler, [t.values for t in study.trials])
    assert half > 0.98 * volume(sampler, truth(candidates, sampler.objectives.metrics))
    study, genomes = run(sampler, 30, study=study)
    assert {tuple(g) for g in genomes} == {tuple(g) for g in candidates} and len(genomes) == 60
    with pytest.raises(StudyError, match="none of the 60 candidates is untried"):
        sampler.propose(study.get_trials(), number=60)


def dear(like):
    """A cost by which networks that have gene 5 in common with `like` train ten times as long as others."""
    return lambda genomes: np.where(genomes[:, 5] == like[5], 10.0, 1.0)


def gains_of(genomes):
    """Of the first network of a study."""
    sampler = make_sampler()
    costs = sampler.objectives.costs(truth(genomes, sampler.objectives.metrics))
    return pareto.expected_gain(costs, FakeAccuracy().predict(genomes)[1], np.empty((0, 2)), sampler._reference)


@pytest.mark.parametrize("exact", [False, True], ids=["linear model", "with an exact form"])
def test_where_a_cost_is_told_the_largest_gain_for_it_is_proposed(exact):
    model = FakeAccuracy()
    if exact:
        model.predict_exact = model.predict
    candidates = SPACE.sample(60, rng=np.random.default_rng(0))
    settings = dataclasses.replace(SMALL, explore=0.0, learn=0.0, shortlist=5)
    gains = gains_of(candidates)
    train_cost = dear(candidates[np.argmax(gains)])
    worth = gains / train_cost(candidates)
    assert np.argmax(worth) != np.argmax(gains)
    proposal = make_sampler(accuracy=model, candidates=candidates, evolution=settings, train_cost=train_cost).proposal([], number=0)
    assert (proposal.genome == candidates[np.argmax(worth)]).all()
    assert proposal.why == f"expected gain {gains[np.argmax(worth)]:.2g} for a cost of 1"


def test_a_population_evolves_towards_gain_for_cost():
    settings = Evolution(explore=0.0, learn=0.0)
    by_gain = make_sampler(evolution=settings).propose([], number=0)
    train_cost = dear(by_gain)
    by_worth = make_sampler(evolution=settings, train_cost=train_cost).propose([], number=0)
    gains = gains_of(np.stack([by_gain, by_worth]))
    random = SPACE.sample(2000, rng=np.random.default_rng(0))
    assert gains[0] > gains[1]
    assert gains[1] / train_cost(by_worth[None])[0] > (gains_of(random) / train_cost(random)).max()


def test_a_cost_that_is_the_same_for_all_changes_nothing():
    _, plain = run(make_sampler(), 6)
    _, priced = run(make_sampler(train_cost=lambda genomes: np.full(len(genomes), 4.0)), 6)
    assert (plain == priced).all()


def test_limits_hold_with_the_margin_of_the_prediction():
    limits = parse_limits(maxima=["latency_ms=0.3", "params=120000"], minima=["macs=1.5e6"])
    _, genomes = run(make_sampler(limits=limits), 12)
    mean_ms, std_ms = FakeLatency().predict(genomes)
    sums = SCORE(genomes)
    assert (mean_ms + std_ms <= 0.3).all()
    assert (sums[:, 1] <= 120_000).all()
    assert (sums[:, 0] >= 1.5e6).all()


def test_a_narrow_limit_that_random_sampling_misses_is_met_by_the_evolution():
    limits = parse_limits(maxima=["macs=6.5e5"])
    assert SCORE(SPACE.sample(5000, rng=np.random.default_rng(0)))[:, 0].min() > 6.5e5
    genome = make_sampler(limits=limits, evolution=Evolution()).propose([], number=0)
    assert SCORE(genome[None])[0, 0] <= 6.5e5


def test_limits_that_no_network_keeps_are_an_error_that_says_what_is_in_reach():
    sampler = make_sampler(limits=parse_limits(maxima=["latency_ms=0.01"]))
    with pytest.raises(StudyError, match=r"latency_ms <= 0\.01.*random networks reach latency_ms 0\.\d+"):
        sampler.propose([], number=0)


def test_a_minimum_accuracy_steers_proposals_above_it():
    limits = parse_limits(minima=["accuracy=0.7"])
    _, genomes = run(make_sampler(limits=limits), 8)
    mean, std = FakeAccuracy().predict(genomes)
    assert (mean + 2 * std >= 0.7).all()


def test_without_any_knowledge_proposals_fill_the_latency_axis():
    sampler = make_sampler(accuracy=lambda: None)
    _, genomes = run(sampler, 10)
    log_ms = np.sort(np.log(FakeLatency().predict(genomes)[0]))
    reference = sampler._reference[1]
    assert (log_ms < reference).all()
    span = reference - log_ms[0]
    assert np.diff(np.append(log_ms, reference)).max() < span / 3


def started(share, n_trials, *, start=4, **changes):
    """A study with a diverse start, and which of its trials belong to it."""
    sampler = make_sampler(start=start, evolution=dataclasses.replace(SMALL, start_share=share), **changes)
    study, genomes = run(sampler, n_trials)
    return genomes, [bool(t.user_attrs[WHOLE_SCHEDULE]) for t in study.trials], [t.user_attrs[WHY] for t in study.trials]


def test_the_diverse_start_takes_its_share_of_the_proposals_until_it_is_complete():
    _, of_start, why = started(1 / 3, 12, start=3)
    assert of_start == [i in (0, 3, 6) for i in range(12)]
    assert all(reason.startswith("diverse start") == is_start for reason, is_start in zip(why, of_start, strict=True))
    assert all("expected gain" in reason or "least certain" in reason for reason in why if not reason.startswith("diverse start"))
    assert started(1.0, 5, start=3)[1] == [True, True, True, False, False]


def test_the_diverse_start_is_spread_over_latency_within_the_limits():
    limits = parse_limits(maxima=["latency_ms=0.4"])
    genomes, of_start, _ = started(1.0, 8, start=8, limits=limits)
    assert all(of_start) and len(np.unique(genomes, axis=0)) == 8
    mean_ms, std_ms = FakeLatency().predict(genomes)
    assert (mean_ms + std_ms <= 0.4).all()
    log_ms = np.sort(np.log(mean_ms))
    pool = FakeLatency().predict(SPACE.sample(500, rng=np.random.default_rng(1)))[0]
    reach = np.log(pool[pool <= 0.3]).min(), np.log(0.4)
    assert np.diff(np.concatenate([[reach[0]], log_ms, [reach[1]]])).max() < (reach[1] - reach[0]) / 3


def test_a_start_among_trials_that_were_enqueued_pruned_or_run_elsewhere_is_counted_by_its_own_networks():
    sampler = make_sampler(start=2, evolution=dataclasses.replace(SMALL, start_share=1.0))
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    for arch in SPACE.family.values():
        study.enqueue_trial(gene_indices(SPACE.encode(arch), SPACE))
    run(sampler, len(SPACE.family), study=study)
    pruned = study.ask()
    sampler.suggest(pruned)
    study.tell(pruned, state=TrialState.PRUNED)
    in_flight = [study.ask() for _ in range(3)]
    for trial in in_flight:
        sampler.suggest(trial)
    assert [t.user_attrs.get(WHOLE_SCHEDULE) for t in study.trials[-4:]] == [True, True, True, False]


def test_gains_are_counted_from_what_is_estimated_now_not_from_a_lucky_trial():
    class Remembering(FakeAccuracy):
        """Knows that the trials were lucky."""

        def posterior(self, genomes):
            mean, std = self.predict(genomes)
            return np.where(np.arange(len(genomes)) < 3, mean, np.nan), std

    study, genomes = run(make_sampler(), 4)
    lucky = [optuna.trial.create_trial(params=t.params, distributions=t.distributions, values=[0.99, t.values[1]]) for t in study.trials]
    for number, trial in enumerate(lucky):
        trial.number = number
    sampler = make_sampler(accuracy=Remembering())
    costs, std = sampler._known_costs(lucky, genomes, Remembering(), sampler._estimator)
    assert std.tolist() == [0.01, 0.01, 0.01, 0]
    assert costs[:3, 0] == pytest.approx(-FakeAccuracy().predict(genomes[:3])[0])
    assert costs[3, 0] == -0.99  # Nothing is on record of it.
    costs, std = sampler._known_costs(lucky, genomes, FakeAccuracy(), sampler._estimator)
    assert (costs[:, 0] == -0.99).all() and not std.any()


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING])
def test_gains_are_means_over_what_the_accuracies_of_the_front_may_turn_out_to_be(state):
    class Doubting(FakeAccuracy):
        """Knows networks of trials to five points, be they trained or in training, and others to two."""

        def predict(self, genomes):
            known = (genomes[:, None] == tried[None]).all(axis=2).any(axis=1)
            return super().predict(genomes)[0], np.where(known, 0.05, 0.02)

        posterior = predict

    pool = SPACE.sample(60, rng=np.random.default_rng(0))
    best = pareto.non_dominated(make_sampler().objectives.costs(truth(pool, ("accuracy", "latency_ms"))))
    tried, candidates = pool[best], pool[~best]
    settings = dataclasses.replace(SMALL, explore=0.0, learn=0.0, front_draws=400)
    sampler = make_sampler(accuracy=Doubting(), candidates=pool, evolution=settings)
    study = optuna.create_study(directions=sampler.directions)
    for genome, values in zip(tried, truth(tried, sampler.objectives.metrics), strict=True):
        study.enqueue_trial(gene_indices(genome, SPACE))
        trial = study.ask()
        suggest_genome(trial, SPACE)
        if state == TrialState.COMPLETE:
            study.tell(trial, values.tolist())
    proposal = sampler.proposal(study.trials, number=99)
    assert (sampler.proposal(study.trials, number=99).genome == proposal.genome).all()

    rng, metrics = np.random.default_rng(1), sampler.objectives.metrics
    front, costs = sampler.objectives.costs(truth(tried, metrics)), sampler.objectives.costs(truth(candidates, metrics))
    gains = np.empty((600, len(candidates)))
    for gain in gains:
        drawn = front - np.outer(rng.normal(scale=0.05, size=len(front)), [1, 0])
        gain[:] = pareto.expected_gain(costs, np.full(len(costs), 0.02), drawn, sampler._reference)
    mean, error = gains.mean(axis=0), gains.std(axis=0) / np.sqrt(600)
    [chosen] = np.flatnonzero((candidates == proposal.genome).all(axis=1))
    assert mean[chosen] > mean.max() - 4 * error.max()
    assert float(proposal.why.split()[2]) == pytest.approx(mean[chosen], abs=7 * error[chosen] + 0.06 * mean[chosen])
    certain = pareto.expected_gain(costs, np.full(len(costs), 0.02), front, sampler._reference)
    assert abs(certain[chosen] - mean[chosen]) > 8 * error[chosen]


def test_now_and_then_the_least_certain_network_of_a_slice_is_proposed():
    class Uncertain(FakeAccuracy):
        def predict(self, genomes):
            return super().predict(genomes)[0], 0.001 + 0.02 * (genomes[:, 5] > 0)

    settings = dataclasses.replace(SMALL, explore=0.0, learn=1.0)
    proposal = make_sampler(accuracy=Uncertain(), evolution=settings).proposal([], number=0)
    assert proposal.genome[5] > 0 and proposal.why.startswith("least certain in slice")
    never = dataclasses.replace(SMALL, explore=0.0, learn=0.0)
    assert make_sampler(accuracy=Uncertain(), evolution=never).proposal([], number=0).why.startswith("expected gain")


def test_a_trial_taken_up_again_with_all_its_genes_keeps_why_it_was_proposed():
    sampler = make_sampler()
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    sampler.suggest(study.ask())
    why = study.trials[0].user_attrs[WHY]
    study.sampler = make_sampler(seed=9)
    assert study.sampler.sample_relative(study, study.trials[0], study.sampler.infer_relative_search_space(study, study.trials[0])) == {}
    assert study.trials[0].user_attrs[WHY] == why


def test_proposals_depend_only_on_seed_number_and_trials():
    study, _ = run(make_sampler(), 3)
    trials = study.get_trials()
    first = make_sampler().propose(trials, number=3)
    again = pickle.loads(pickle.dumps(make_sampler())).propose(trials, number=3)
    assert (first == again).all()
    assert (first != make_sampler(seed=1).propose(trials, number=3)).any()


def test_a_study_stopped_and_resumed_with_a_new_sampler_proposes_the_same():
    _, whole = run(make_sampler(), 6)
    study, _ = run(make_sampler(), 3)
    study.sampler = pickle.loads(pickle.dumps(make_sampler()))
    _, resumed = run(make_sampler(), 3, study=study)
    assert (whole == resumed).all()


def test_a_used_sampler_can_be_pickled():
    sampler = make_sampler()
    sampler.propose([], number=0)
    assert (pickle.loads(pickle.dumps(sampler)).propose([], number=1) == sampler.propose([], number=1)).all()


def fitted_on_real_trainings(space):
    return AccuracyPredictor(space).fit(AccuracyRecords(ROOT / "studies" / "example" / "records.jsonl"))


@pytest.mark.parametrize(
    "space_name, accuracy", [("lowformer-micro", fitted_on_real_trainings), ("lowformer", PublishedPrior)], ids=["trained", "published"]
)
def test_a_sampler_with_the_models_of_the_package_can_be_pickled_before_and_after_use(space_name, accuracy):
    space = SearchSpace.load(space_name)
    folder = ROOT / "latency_tables" / SHIPPED / "amd-epyc-f26-m2-2vcpu"
    one, other = (LatencyPredictor(space, LatencyTable.load(folder / f"{r}-fp32-b1-t1.jsonl")) for r in ("onnxruntime", "openvino"))
    fleet = Fleet({"one": one, "other": other}, {label: Scale(fast_ms=1.0, slow_ms=2.0, exponent=1.0) for label in ("one", "other")})
    for latency, objectives in ((one, "acc-latency"), (fleet, "acc-worstlatency-memory")):
        sampler = LowSearchSampler(
            space, latency=latency, accuracy=accuracy(space), objectives=objectives, evolution=SMALL, train_cost=TrainingTime(space)
        )
        fresh = pickle.loads(pickle.dumps(sampler))
        first = sampler.propose([], number=0)
        used = pickle.loads(pickle.dumps(sampler))
        assert (fresh.propose([], number=0) == first).all()
        assert (used.propose([], number=1) == sampler.propose([], number=1)).all()


def test_trials_that_suggest_gene_by_gene_in_turns_get_what_they_would_one_after_the_other():
    sampler = make_sampler()
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    whole = [sampler.suggest(study.ask()) for _ in range(3)]
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    trials = [study.ask() for _ in range(3)]
    for gene in SPACE.genes:
        for trial in trials:
            trial.suggest_int(gene.name, 0, len(gene.choices) - 1)
    assert [t.params for t in study.trials] == [gene_indices(genome, SPACE) for genome in whole]
    assert len(np.unique(whole, axis=0)) == 3


def test_what_another_worker_announces_during_the_search_for_a_proposal_is_given_up():
    candidates = SPACE.sample(40, rng=np.random.default_rng(0))
    settings = {"candidates": candidates, "evolution": dataclasses.replace(SMALL, explore=0.0, learn=0.0)}
    asked = []

    def accuracy():
        """As the first worker begins its search, a second one, that cannot know of it, makes its own."""
        if not asked:
            asked.append(study.ask())
            study.sampler = make_sampler(**settings)
            asked.append(study.sampler.suggest(asked[0]))
        return FakeAccuracy()

    first = make_sampler(accuracy=accuracy, **settings)
    study = optuna.create_study(directions=first.directions, sampler=first)
    found = first.suggest(study.ask())
    best = np.argsort(-gains_of(candidates))
    assert (asked[1] == candidates[best[0]]).all()
    remaining = make_sampler(**settings).proposal([t for t in study.trials if t.number == asked[0].number], number=0)
    assert (found == remaining.genome).all() and study.trials[0].user_attrs[WHY] == remaining.why
    assert (found != asked[1]).any()


def test_a_trial_whose_worker_died_between_two_genes_is_completed_as_announced():
    sampler = make_sampler()
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    trial = study.ask()
    for gene in SPACE.genes[:3]:
        trial.suggest_int(gene.name, 0, len(gene.choices) - 1)
    whole = trial.relative_params
    study._storage.set_trial_state_values(trial._trial_id, state=TrialState.WAITING)
    study.sampler = make_sampler(seed=7)
    assert gene_indices(study.sampler.propose([], number=trial.number), SPACE) != whole
    again = study.ask()
    assert again.number == trial.number
    assert gene_indices(study.sampler.suggest(again), SPACE) == whole


def test_an_enqueued_network_that_waits_is_not_proposed():
    candidates = SPACE.sample(10, rng=np.random.default_rng(0))
    sampler = make_sampler(candidates=candidates)
    study = optuna.create_study(directions=sampler.directions)
    for genome in candidates[:9]:
        study.enqueue_trial(gene_indices(genome, SPACE))
    assert (sampler.propose(study.trials, number=9) == candidates[9]).all()


def work_off(study, sampler, n_trials, **settings):
    study.sampler = sampler
    study.optimize(lambda trial: tuple(truth(sampler.suggest(trial)[None], sampler.objectives.metrics)[0]), n_trials=n_trials, **settings)


def work_on(url, sampler, n_trials):
    work_off(optuna.load_study(study_name=None, storage=url), sampler, n_trials)


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_workers_of_one_storage_propose_every_candidate_once(where, tmp_path):
    candidates = SPACE.sample(10, rng=np.random.default_rng(0))
    sampler = make_sampler(candidates=candidates)
    url = f"sqlite:///{tmp_path / 'study.db'}" if where == "processes" else None
    study = optuna.create_study(storage=url, directions=sampler.directions)
    if where == "threads":
        work_off(study, sampler, 10, n_jobs=2)
    else:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work_on, args=(url, sampler, 5)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
    genomes = [tuple(t.params[g.name] for g in SPACE.genes) for t in study.trials]
    assert len(genomes) == 10 and set(genomes) == {tuple(g) for g in candidates}


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.RUNNING])
def test_a_trial_that_breaks_a_constraint_takes_no_gain_from_others_and_is_not_proposed_again(state):
    candidates = SPACE.sample(40, rng=np.random.default_rng(0))
    sampler = make_sampler(candidates=candidates, evolution=dataclasses.replace(SMALL, explore=0.0, learn=0.0))
    best = sampler.propose([], number=0)
    others, _ = run(sampler, 6, study=optuna.create_study(directions=sampler.directions, sampler=make_sampler(seed=5)))

    def with_one_more(broken_by):
        study = optuna.create_study(directions=sampler.directions)
        study.add_trials(others.trials)
        study.enqueue_trial(gene_indices(best, SPACE))
        trial = study.ask()
        suggest_genome(trial, SPACE)
        trial.set_constraint("power", broken_by)
        trial.set_constraint("noise", -1.0)
        if state == TrialState.COMPLETE:
            study.tell(trial, [0.999, 1e-3])
        return study.trials

    left = make_sampler(candidates=candidates[(candidates != best).any(axis=1)], evolution=sampler.evolution)
    expected = left.proposal(others.trials, number=9)
    found = sampler.proposal(with_one_more(0.1), number=9)
    assert (found.genome == expected.genome).all() and found.why == expected.why
    assert found.why != "expected gain 0" and (found.genome != best).any()
    if state == TrialState.COMPLETE:
        assert float(sampler.proposal(with_one_more(0.0), number=9).why.removeprefix("expected gain ")) < 1e-9


def test_a_constraint_that_trials_tell_is_predicted_once_eight_told_it():
    candidates = SPACE.sample(400, rng=np.random.default_rng(0))
    params = SCORE(candidates)[:, 1]
    bound = float(np.quantile(params, 0.15))
    settings = {"candidates": candidates, "evolution": dataclasses.replace(SMALL, explore=0.0, learn=0.0)}

    def kept(name):
        """Of the ninth to the last proposal, the share that keeps a constraint called `name`."""
        sampler = make_sampler(**settings)
        study, shares = optuna.create_study(directions=sampler.directions, sampler=sampler), []

        def objective(trial):
            genome = sampler.suggest(trial)
            excess = float(np.log(SCORE(genome[None])[0, 1] / bound))
            trial.set_constraint(name, excess)
            shares.append(excess <= 0)
            return tuple(truth(genome[None], sampler.objectives.metrics)[0])

        study.optimize(objective, n_trials=24)
        return np.mean(shares[8:])

    assert kept("weights") > 2 * kept(ACCURACY_LIMIT) > 0  # One that studies set is not: its limit is known already.


@pytest.mark.parametrize("values", [[np.inf] * 5 + [-np.inf] * 5, [1.0] * 10, [np.inf, -1.0] * 5], ids=["infinite", "all broken", "mixed"])
def test_a_constraint_that_no_model_can_be_made_of_is_no_obstacle(values):
    sampler = make_sampler(evolution=dataclasses.replace(SMALL, explore=0.0, learn=0.0))
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    for value in values:
        trial = study.ask()
        genome = sampler.suggest(trial)
        trial.set_constraint("fits", value)
        study.tell(trial, truth(genome[None], sampler.objectives.metrics)[0].tolist())
    found = sampler.proposal(study.trials, number=0)
    assert float(found.why.removeprefix("expected gain ")) > 0


@pytest.mark.parametrize("tells", [True, False], ids=["as the objective says", "as predicted"])
def test_with_a_limit_on_accuracy_alone_a_gain_counts_by_the_chance_that_it_is_kept(tells):
    candidates = SPACE.sample(300, rng=np.random.default_rng(0))
    accuracy, latency_ms = FakeAccuracy().predict(candidates)[0], FakeLatency().predict(candidates)[0]
    bound = float(np.quantile(accuracy, 0.6))
    sampler = make_sampler(
        objectives="latency", limits=parse_limits(minima=[f"accuracy={bound}"]), candidates=candidates,
        evolution=dataclasses.replace(SMALL, explore=0.0, learn=0.0),
    )  # fmt: skip
    study = optuna.create_study(directions=sampler.directions)
    expected, best_ms = [], np.exp(sampler._reference[0])
    for number in range(12):
        left = ~np.isin(np.arange(len(candidates)), expected)
        gain = np.maximum(0.0, np.log(best_ms / latency_ms)) * stats.norm.cdf((accuracy - bound) / 0.01)
        expected.append(int(np.argmax(np.where(left & (accuracy + 0.02 >= bound), gain, -1.0))))
        found = sampler.propose(study.trials, number=number)
        assert (found == candidates[expected[-1]]).all()
        study.enqueue_trial(gene_indices(found, SPACE))
        trial = study.ask()
        suggest_genome(trial, SPACE)
        kept = accuracy[expected[-1]] >= bound
        if tells:
            trial.set_constraint(ACCURACY_LIMIT, bound - accuracy[expected[-1]])
        study.tell(trial, float(latency_ms[expected[-1]]))
        best_ms = min(best_ms, latency_ms[expected[-1]]) if kept else best_ms  # What falls short takes no gain from others.
    assert 0 < (accuracy[expected] < bound).sum() < 12


def test_a_limit_on_an_accuracy_of_which_nothing_is_known_yet_leaves_the_rest():
    limits = parse_limits(minima=["accuracy=0.5"])
    limited = make_sampler(objectives="latency", accuracy=lambda: None, limits=limits)
    assert (limited.propose([], number=0) == make_sampler(objectives="latency").propose([], number=0)).all()


def test_a_limit_on_an_accuracy_that_nothing_tells_is_refused():
    with pytest.raises(UsageError, match="nothing tells it"):
        make_sampler(objectives="latency", accuracy=None, limits=parse_limits(minima=["accuracy=0.5"]))


def test_without_a_predictor_networks_are_random_ones_within_limits_that_random_sampling_misses():
    limits = parse_limits(maxima=["macs=6.5e5"])
    assert (excess(EXACT.estimate(SPACE.sample(4096, rng=np.random.default_rng(1))), limits) > 0).all()
    timed = Estimator(SPACE, FakeLatency())
    task = Task(
        space=SPACE, estimator=timed, prediction=timed, accuracy=FakeAccuracy(), objectives=make_sampler().objectives,
        limits=limits, reference={}, seed=0, acceptable=lambda genomes: np.ones(len(genomes), dtype=bool),
    )  # fmt: skip
    _, genomes = run(without_predictor(task), 6)
    assert (excess(EXACT.estimate(genomes), limits) == 0).all() and len(np.unique(genomes, axis=0)) == 6


def test_a_training_in_flight_is_not_proposed_again_and_its_gain_is_taken():
    sampler = make_sampler(evolution=Evolution(explore=0.0))
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    in_flight = [sampler.suggest(study.ask()) for _ in range(3)]
    assert len(np.unique(in_flight, axis=0)) == 3
    costs = sampler.objectives.costs(truth(np.array(in_flight), sampler.objectives.metrics))
    assert pareto.non_dominated(costs).all()


def test_enqueued_networks_run_first_and_unchanged():
    sampler = make_sampler()
    study = optuna.create_study(directions=sampler.directions, sampler=sampler)
    family = np.stack([SPACE.encode(arch) for arch in SPACE.family.values()])
    for genome in family:
        study.enqueue_trial(gene_indices(genome, SPACE))
    _, genomes = run(sampler, len(family) + 2, study=study)
    assert (genomes[: len(family)] == family).all()


@pytest.mark.parametrize(
    "other", [optuna.samplers.RandomSampler(seed=0), optuna.samplers.TPESampler(seed=0), optuna.samplers.NSGAIISampler(seed=0)], ids=str
)
def test_its_trials_are_plain_parameters_for_every_optuna_sampler(other):
    study, genomes = run(make_sampler(), 12, optuna_sampler=other)
    assert SPACE.canonical(genomes).shape == (12, SPACE.n_genes)
    study.sampler = make_sampler()
    run(make_sampler(), 2, study=study)
    assert len(study.trials) == 14


def test_parameters_that_are_no_genes_are_drawn_repeatably():
    def rates():
        sampler = make_sampler()
        study = optuna.create_study(directions=sampler.directions, sampler=sampler)
        return [study.ask().suggest_float("learning_rate", 0, 1) for _ in range(3)]

    assert rates() == rates()
    assert len(set(rates())) == 3


def test_a_study_with_other_directions_is_refused():
    sampler = make_sampler()
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    with pytest.raises(UsageError, match="directions are minimize, minimize"):
        sampler.suggest(study.ask())


def test_a_latency_objective_without_a_latency_model_is_refused():
    with pytest.raises(UsageError, match="no latency model"):
        LowSearchSampler(SPACE, latency=None)
    LowSearchSampler(SPACE, latency=None, objectives="acc-macs").propose([], number=0)
