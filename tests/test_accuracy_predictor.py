"""The accuracy predictor: right where the answer is known, honest about its intervals, never without an answer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct

from lowsearch import cost
from lowsearch.accuracy.gaussian import CONSTANT_STD, GaussianProcess, Points
from lowsearch.accuracy.predictor import LOG_LOSS_SLOPE, AccuracyPredictor, CurveModel, _CurveFit
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.errors import UsageError
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint, Rung

SPACE = SearchSpace.load("lowformer-micro")
FRACTIONS = (0.25, 0.5, 1.0)


def record(genome: np.ndarray, accuracies: list[float], *, seed: int = 0, **changes: Any) -> AccuracyRecord:
    """A training of `genome` that reached as many of FRACTIONS as there are `accuracies`."""
    curve = tuple(
        CurvePoint(
            fraction=f, step=int(100 * f), train_loss=1.0, val_accuracy=a, val_loss=2.5 * max(1 - a, 0.01) ** 0.8, cpu_seconds=10 * f
        )
        for f, a in zip(FRACTIONS, accuracies, strict=False)
    )
    values: dict[str, Any] = {"recipe": "r", "recipe_hash": "r", "data": "d", "data_hash": "d", **changes}
    return AccuracyRecord(arch=SPACE.decode(genome), seed=seed, rung=curve[-1].fraction, curve=curve, **values)


def at(fraction: float, accuracy: float, loss: float = 1.0) -> CurvePoint:
    return CurvePoint(fraction=fraction, step=int(100 * fraction), train_loss=1.0, val_accuracy=accuracy, val_loss=loss, cpu_seconds=1.0)


def rank(a: Any, b: Any) -> float:
    return float(spearmanr(a, b)[0])  # pyright: ignore[reportArgumentType]


class World:
    """Accuracies that follow a hidden rule of the features: mostly MACs, some attention, something curved, noise of the seed."""

    def __init__(self, seed: int, *, spread: float = 1.0) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = self.rng.normal(size=SPACE.features(SPACE.sample(1, rng=self.rng)).shape[1])
        reference = SPACE.features(SPACE.sample(500, rng=self.rng))
        self.mean, self.std = reference.mean(0), np.maximum(reference.std(0), 1e-9)
        self.spread = spread

    def truth(self, genomes: np.ndarray) -> np.ndarray:
        z = (SPACE.features(genomes) - self.mean) / self.std
        macs = np.log([cost.count(SPACE.decode(g)).macs / 5e6 for g in genomes])
        return 0.8 + self.spread * (0.02 * macs - 0.008 * macs**2 + 0.012 * z @ self.weights / math.sqrt(z.shape[1]))

    def train(self, genomes: np.ndarray, *, upto: int = 3, seed: int = 0) -> list[AccuracyRecord]:
        final = self.truth(genomes) + 0.006 * self.rng.normal(size=len(genomes))
        half = 1 - (1 - final) * np.exp(0.25 + 0.04 * self.rng.normal(size=len(genomes)))
        low = 1 - (1 - half) * np.exp(0.3 + 0.06 * self.rng.normal(size=len(genomes)))
        return [record(g, list(row[:upto]), seed=seed) for g, row in zip(genomes, np.stack([low, half, final], 1), strict=True)]


# --- the Gaussian process against other implementations ---------------------------------------------------------------------------


def some_points(n: int, seed: int = 0) -> Points:
    rng = np.random.default_rng(seed)
    return Points(cost=rng.normal(size=(n, 2)), features=rng.normal(size=(n, 5)) / math.sqrt(5))


@pytest.fixture
def process() -> GaussianProcess:
    points = some_points(25)
    y = 0.03 * points.cost[:, 0] + 0.02 * np.sin(2 * points.features[:, 1]) + 0.01 * np.random.default_rng(1).normal(size=25)
    return GaussianProcess(points, y, np.full(25, 1e-4) + np.arange(25) * 1e-5, curved=True)


def test_process_agrees_with_scikit_learn(process: GaussianProcess) -> None:
    c, f, _, curved, length = process.scales
    x = np.hstack([process.points.cost, process.points.features])
    new = some_points(9, seed=5)
    scaled = np.array([c, c, f, f, f, f, f])

    class Kernel(RBF):  # linear parts on scaled, distances on unscaled coordinates
        def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
            other = X if Y is None else Y
            linear = DotProduct(sigma_0=CONSTANT_STD)(X * scaled, other * scaled)
            return linear + (ConstantKernel(curved**2) * RBF(length))(X, other)

        def diag(self, X: Any) -> Any:
            return np.array([self(row[None])[0, 0] for row in X])

    options: dict[str, Any] = {"alpha": process.noise_var + process.lack_of_fit_var, "optimizer": None}
    reference: Any = GaussianProcessRegressor(Kernel(length), **options)
    reference.fit(x, process.residual)
    mean, std = reference.predict(np.hstack([new.cost, new.features]), return_std=True)
    got_mean, got_var = process.predict(new)
    assert np.allclose(got_mean, mean, atol=1e-9)
    assert np.allclose(got_var - process.lack_of_fit_var, std**2, atol=1e-9)


def test_leave_one_out_in_closed_form_equals_leaving_one_out(process: GaussianProcess) -> None:
    mean, variance = process.leave_one_out()
    for i in (0, 7, 24):
        rest = np.delete(np.arange(25), i)
        points = Points(cost=process.points.cost[rest], features=process.points.features[rest])
        other = GaussianProcess(points, process.residual[rest], process.noise_var[rest], curved=True)
        other.scales = process.scales.copy()
        other._condition()
        left_out = Points(cost=process.points.cost[[i]], features=process.points.features[[i]])
        expected_mean, expected_var = other.predict(left_out)
        assert mean[i] == pytest.approx(expected_mean[0]) and variance[i] == pytest.approx(expected_var[0] + process.noise_var[i])


def test_population_form_equals_the_linear_process() -> None:
    world = World(0)
    genomes = SPACE.sample(30, rng=world.rng)
    predictor = AccuracyPredictor(SPACE).fit(world.train(genomes))
    new = SPACE.sample(20_000, rng=world.rng)  # several chunks
    mean, std = predictor.predict(new)
    linear = GaussianProcess(predictor._exact.points, predictor._exact.residual, predictor._exact.noise_var, curved=False)
    points = predictor._points(new[-50:])
    expected, variance = linear.predict(points)
    assert np.allclose(mean[-50:], expected + predictor._prior_mean(points), atol=1e-6)
    assert np.allclose(std[-50:], np.sqrt(predictor._linear_scale**2 * variance + predictor._seed_var), rtol=1e-3)


# --- predicting from the architecture ---------------------------------------------------------------------------------------------


def test_intervals_cover_what_they_say_on_held_out_networks() -> None:
    covered: dict[str, list[float]] = {"predict": [], "predict_exact": []}
    for seed in range(8):
        world = World(seed)
        predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(20, rng=world.rng)))
        new = SPACE.sample(100, rng=world.rng)
        score = np.array([r.val_accuracy for r in world.train(new)])
        for name in covered:
            mean, std = getattr(predictor, name)(new)
            covered[name].append(float((np.abs(score - mean) < 1.645 * std).mean()))
    assert all(0.82 < np.mean(shares) < 0.98 for shares in covered.values()), covered


def test_leave_one_out_intervals_are_calibrated_even_where_the_world_is_wilder_than_the_prior() -> None:
    world = World(1, spread=8.0)
    predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(40, rng=world.rng)))
    loo = predictor.leave_one_out()
    z = np.abs(loo.observed - loo.predicted) / (loo.std * predictor._exact_scale)
    assert len(loo.arch_ids) == 40 and (z < 1.645).mean() >= 0.8
    assert rank(loo.observed, loo.predicted) > 0.5


def test_predictions_rank_unseen_networks_better_than_macs_alone() -> None:
    gains = []
    for seed in range(4):
        world = World(seed)
        predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(60, rng=world.rng)))
        new = SPACE.sample(150, rng=world.rng)
        truth, macs = world.truth(new), [cost.count(SPACE.decode(g)).macs for g in new]
        gains.append(rank(predictor.predict_exact(new)[0], truth) - rank(macs, truth))
    assert np.mean(gains) > 0.03, gains


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_few_records_give_an_answer_with_a_wide_interval(n: int) -> None:
    world = World(0)
    predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(n, rng=world.rng)))
    new = SPACE.sample(50, rng=world.rng)
    for mean, std in (predictor.predict(new), predictor.predict_exact(new)):
        assert np.isfinite(mean).all() and ((mean >= 0) & (mean <= 1)).all()
        assert std.min() > (0.25 if n == 0 else 0.015)
    assert predictor.n_networks == n and len(predictor.leave_one_out().arch_ids) == n


def test_more_networks_narrow_the_interval() -> None:
    world = World(0)
    genomes, new = SPACE.sample(60, rng=world.rng), SPACE.sample(100, rng=world.rng)
    records = world.train(genomes)
    widths = [AccuracyPredictor(SPACE).fit(records[:n]).predict_exact(new)[1].mean() for n in (0, 4, 15, 60)]
    assert widths == sorted(widths, reverse=True)


def test_diverged_network_does_not_spoil_the_others() -> None:
    world = World(0)
    genomes, new = SPACE.sample(30, rng=world.rng), SPACE.sample(50, rng=world.rng)
    records = world.train(genomes)
    ruined = [*records[:-1], record(genomes[-1], [0.1, 0.1, 0.1], diverged=True)]
    clean, spoiled = (AccuracyPredictor(SPACE).fit(r).predict_exact(new)[0] for r in (records[:-1], ruined))
    assert np.abs(clean - spoiled).max() < 0.05


# --- predicting from a curve ------------------------------------------------------------------------------------------------------


def test_before_anything_is_known_a_full_training_is_its_measured_accuracy_give_or_take_the_seed() -> None:
    genome = SPACE.sample(1, rng=np.random.default_rng(0))[0]
    trained = record(genome, [0.6, 0.7, 0.81])
    mean, std = AccuracyPredictor(SPACE).predict_record(trained)
    assert mean == pytest.approx(0.81, abs=2e-4) and 0.002 < std < 0.02
    assert AccuracyPredictor(SPACE).forecast(trained) == (0.81, 0.0)  # What this very training ended at is no question.


def test_the_best_trainings_are_pulled_towards_what_another_seed_would_score() -> None:
    """The winner's curse: the raw score of the best of many promises too much, the estimate of them does not, and errs less."""
    promised: dict[str, list[float]] = {"raw": [], "estimate": []}
    errors: dict[str, list[float]] = {"raw": [], "estimate": []}
    for seed in range(8):
        world = World(seed)
        genomes = SPACE.sample(40, rng=world.rng)
        records, truth = world.train(genomes), world.truth(genomes)
        predictor = AccuracyPredictor(SPACE).fit(records)
        scores = {"raw": np.array([r.val_accuracy for r in records]), "estimate": predictor.posterior(genomes)[0]}
        assert scores["estimate"] == pytest.approx([predictor.predict_record(r)[0] for r in records])
        for name, score in scores.items():
            best = np.argsort(-score)[:4]
            promised[name].append(float(np.mean(score[best] - truth[best])))
            errors[name].append(float(np.sqrt(np.mean((score - truth) ** 2))))
    assert np.mean(promised["raw"]) > 0.003 and abs(np.mean(promised["estimate"])) < 0.5 * np.mean(promised["raw"]), promised
    assert np.mean(errors["estimate"]) < 0.95 * np.mean(errors["raw"]), errors


def test_intervals_of_trained_networks_cover_their_mean_over_seeds() -> None:
    covered = []
    for seed in range(8):
        world = World(seed)
        genomes = SPACE.sample(40, rng=world.rng)
        partial = [replace(r, curve=r.curve[:2], rung=FRACTIONS[1]) for r in world.train(genomes[20:])]
        mean, std = AccuracyPredictor(SPACE).fit([*world.train(genomes[:20]), *partial]).posterior(genomes)
        covered.append(float((np.abs(world.truth(genomes) - mean) < 1.645 * std).mean()))
    assert 0.82 < np.mean(covered) < 0.99, covered


def test_a_second_seed_counts_and_unknown_networks_have_no_posterior() -> None:
    world = World(0)
    genomes = SPACE.sample(21, rng=world.rng)
    records = world.train(genomes[:20])
    again = record(genomes[0], [0.6, 0.7, records[0].val_accuracy + 0.004], seed=1)
    once, twice = (AccuracyPredictor(SPACE).fit(found).posterior(genomes) for found in (records, [*records, again]))
    assert twice[0][0] > once[0][0] and twice[1][0] < once[1][0]
    assert np.isnan(once[0][20]) and np.isnan(once[1][20]) and np.isfinite(once[0][:20]).all()
    ruined = record(genomes[20], [0.1, 0.1, 0.1], diverged=True)
    assert AccuracyPredictor(SPACE).fit([*records, ruined]).posterior(genomes)[0][20] == pytest.approx(0.1)


def test_spread_over_seeds_is_learned() -> None:
    rng = np.random.default_rng(0)
    genomes = SPACE.sample(15, rng=rng)
    noisy = [record(g, [0.6, 0.7, 0.8 + 0.03 * rng.normal()], seed=s) for g in genomes for s in (0, 1)]
    assert AccuracyPredictor(SPACE).fit(noisy).seed_std == pytest.approx(0.03, rel=0.35)


@pytest.mark.parametrize("upto", [1, 2])
def test_curve_intervals_cover_what_they_say(upto: int) -> None:
    covered, widths = [], []
    for seed in range(6):
        world = World(seed)
        predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(15, rng=world.rng)))
        for trained in world.train(SPACE.sample(30, rng=world.rng)):
            partial = replace(trained, curve=trained.curve[:upto], rung=FRACTIONS[upto - 1])
            mean, std = predictor.forecast(partial)
            covered.append(abs(mean - trained.val_accuracy) < 1.645 * std)
            widths.append(std)
    assert 0.8 < np.mean(covered) <= 0.99 and np.mean(widths) < 0.03


def test_further_along_the_curve_the_interval_narrows() -> None:
    world = World(0)
    predictor = AccuracyPredictor(SPACE).fit(world.train(SPACE.sample(15, rng=world.rng)))
    trained = world.train(SPACE.sample(1, rng=world.rng))[0]
    for judge in (predictor.predict_record, predictor.forecast):
        stds = [judge(replace(trained, curve=trained.curve[:n], rung=FRACTIONS[n - 1]))[1] for n in (1, 2, 3)]
        assert stds == sorted(stds, reverse=True)


def test_curve_is_extrapolated_upwards_before_anything_went_further() -> None:
    low, half = (CurveModel(()).extrapolate(at(f, 0.7)) for f in (0.25, 0.5))
    assert 0.7 < half[0] < low[0] < 0.95 and half[1] < low[1]


def test_curve_model_learns_how_errors_fall() -> None:
    world = World(3)
    records = world.train(SPACE.sample(40, rng=world.rng))
    model = CurveModel(records)
    held_out = world.train(SPACE.sample(40, rng=world.rng))
    error = [model.extrapolate(r.curve[1])[0] - r.val_accuracy for r in held_out]
    assert abs(np.mean(error)) < 0.004 and np.std(error) < 0.012


def test_curve_model_is_the_posterior_of_its_regression() -> None:
    """Against a joint normal of coefficients and outcomes, conditioned on the outcomes."""
    rng = np.random.default_rng(0)
    points = [at(0.5, a, loss) for a, loss in zip(rng.uniform(0.4, 0.6, 7), rng.uniform(1, 2, 7), strict=True)]
    fit = _CurveFit(0.5, list(zip(points, rng.uniform(0.6, 0.7, 7), strict=True)))
    x = np.log(1 - np.array([p.val_accuracy for p in points]))
    z = np.log([p.val_loss for p in points])
    design = np.stack([np.ones(7), x - x.mean(), z - z.mean() - LOG_LOSS_SLOPE * (x - x.mean())], axis=1)
    assert np.array([fit._row(p) for p in points]) == pytest.approx(design)
    prior = np.diag(np.array([0.3 * np.sqrt(0.5), 0.5, 0.7]) ** 2) / (0.06**2 * 0.5)  # In units of the noise.
    gain = prior @ design.T @ np.linalg.inv(design @ prior @ design.T + np.eye(7))
    covariance = prior - gain @ design @ prior
    assert np.linalg.inv(fit._precision) == pytest.approx(covariance)


def test_of_two_trainings_alike_in_accuracy_the_one_of_lower_loss_is_expected_to_end_higher() -> None:
    rng = np.random.default_rng(1)
    genomes = SPACE.sample(40, rng=rng)
    skill, luck = rng.normal(0, 1, 40), rng.normal(0, 1, 40)  # The loss tells the skill, the accuracy mostly the luck.
    found = []
    for genome, s, noise in zip(genomes, skill, luck, strict=True):
        trained = record(genome, [0.5, 0.5 + 0.01 * s + 0.02 * noise, 0.7 + 0.02 * s])
        curve = list(trained.curve)
        curve[1] = replace(curve[1], val_loss=float(np.exp(-0.05 * s)))
        found.append(replace(trained, curve=tuple(curve)))
    model = CurveModel(found[:20])
    better = [model.extrapolate(at(0.5, 0.5, loss))[0] for loss in (1.1, 1.0, 0.9)]
    assert better == sorted(better)
    guesses = [model.extrapolate(r.curve[1])[0] for r in found[20:]]
    outcomes = [r.val_accuracy for r in found[20:]]
    assert rank(guesses, outcomes) > rank([r.curve[1].val_accuracy for r in found[20:]], outcomes) + 0.2


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_no_number_is_left_out(loss: float) -> None:
    model = CurveModel(World(3).train(SPACE.sample(10, rng=np.random.default_rng(0))))
    usual = 2.5 * 0.5**0.8
    assert model.extrapolate(at(0.5, 0.5, loss)) == pytest.approx(model.extrapolate(at(0.5, 0.5, usual)), abs=0.02)


def at_rung(of: AccuracyRecord, rung: str, accuracy: float) -> AccuracyRecord:
    point = CurvePoint(fraction=float(Rung.of(rung)), step=9, train_loss=1.0, val_accuracy=accuracy, val_loss=1.0, cpu_seconds=1.0)
    return replace(of, rung=Rung.of(rung), curve=(point,))


def test_rungs_apart_are_extrapolated_by_their_own_pairs_alone() -> None:
    """Errors of `1@0.5px` are three times the final ones, of `1@0.25img` the root of them; those at 25 % of the schedule something else."""
    world = World(3)
    full = world.train(SPACE.sample(60, rng=world.rng))
    halves = [at_rung(r, "1@0.5px", 1 - 3 * (1 - r.val_accuracy)) for r in full[:40]]
    few = [at_rung(r, "1@0.25img", 1 - (1 - r.val_accuracy) ** 0.5) for r in full[:40]]
    lonely = [at_rung(r, "1@0.5px", 0.99) for r in world.train(SPACE.sample(30, rng=world.rng), seed=1)]
    model, plain = CurveModel([*halves, *few, *lonely, *full[:40]]), CurveModel(full[:40])
    for r in full[40:]:
        for accuracy, rung in ((1 - 3 * (1 - r.val_accuracy), "1@0.5px"), (1 - (1 - r.val_accuracy) ** 0.5, "1@0.25img")):
            mean, var = model.extrapolate(at(float(Rung.of(rung)), accuracy), apart=Rung.of(rung))
            assert mean == pytest.approx(r.val_accuracy, abs=0.01) and var < 0.02**2
        assert model.extrapolate(r.curve[0]) == plain.extrapolate(r.curve[0])
    (_, unknown), (_, fraction) = (CurveModel(()).extrapolate(at(0.25, 0.7), apart=rung) for rung in (Rung.of("1@0.5px"), None))
    assert unknown > fraction


def test_a_network_counts_by_its_longest_training_and_not_by_rungs_apart() -> None:
    world = World(0)
    full = world.train(SPACE.sample(20, rng=world.rng))
    halves = [at_rung(r, "1@0.5px", 1 - 3 * (1 - r.val_accuracy)) for r in full]
    alone, both = AccuracyPredictor(SPACE).fit(full), AccuracyPredictor(SPACE).fit([*halves, *full])
    genomes = SPACE.sample(50, rng=world.rng)
    assert np.array_equal(alone.predict(genomes), both.predict(genomes)) and alone.seed_std == both.seed_std
    assert both.predict_record(full[0]) == alone.predict_record(full[0])
    cheap = AccuracyPredictor(SPACE).fit([*halves, *full[1:]])
    mean, std = cheap.predict_record(halves[0])
    assert abs(mean - full[0].val_accuracy) < 0.02 and std > both.predict_record(full[0])[1]
    diverged = replace(halves[1], diverged=True)
    assert np.array_equal(AccuracyPredictor(SPACE).fit([*full, diverged]).predict(genomes), alone.predict(genomes))


def test_known_network_is_judged_without_counting_its_curve_twice() -> None:
    world = World(0)
    genomes = SPACE.sample(13, rng=world.rng)
    records = world.train(genomes[:12])
    partial = world.train(genomes[12:], upto=1)[0]
    fresh = AccuracyPredictor(SPACE).fit(records).predict_record(partial)
    known = AccuracyPredictor(SPACE).fit([*records, partial]).predict_record(partial)
    assert known == pytest.approx(fresh, abs=0.004)


def test_curves_of_partly_trained_networks_inform_the_regression() -> None:
    world = World(2)
    records = world.train(SPACE.sample(10, rng=world.rng))
    partial = world.train(SPACE.sample(60, rng=world.rng), upto=2)
    new = SPACE.sample(150, rng=world.rng)
    truth = world.truth(new)
    few, many = (rank(AccuracyPredictor(SPACE).fit(r).predict_exact(new)[0], truth) for r in (records, records + partial))
    assert many > few


# --- what does not belong together ------------------------------------------------------------------------------------------------


def test_records_of_two_recipes_are_refused() -> None:
    genomes = SPACE.sample(2, rng=np.random.default_rng(0))
    mixed = [record(genomes[0], [0.5]), record(genomes[1], [0.5], recipe_hash="other")]
    with pytest.raises(UsageError, match="several recipes"):
        AccuracyPredictor(SPACE).fit(mixed)


def test_networks_outside_the_space_are_left_out() -> None:
    inside = record(SPACE.sample(1, rng=np.random.default_rng(0))[0], [0.5, 0.6, 0.7])
    outside = replace(inside, arch=replace(inside.arch, num_classes=7))
    predictor = AccuracyPredictor(SPACE).fit([inside, outside])
    assert predictor.n_networks == 1
    assert predictor.predict_record(replace(outside, curve=outside.curve[:1]))[0] > 0.5
