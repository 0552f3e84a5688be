"""`--objective`, `--max` and `--min` as typed, and values turned into costs."""

from __future__ import annotations

import numpy as np
import pytest

from lowsearch.errors import UsageError
from lowsearch.search.objectives import LATENCY_METRICS, Limit, Objectives, of_latency, parse_limits, parse_objectives


def test_names_joined_by_dashes_become_objectives_with_direction_and_unit():
    objectives = parse_objectives("acc-latency-params")
    assert objectives.metrics == ("accuracy", "latency_ms", "params")
    assert objectives.directions == ["maximize", "minimize", "minimize"]
    assert [o.unit for o in objectives] == ["fraction correct", "ms", "weights"]
    assert str(objectives) == "acc-latency-params"


@pytest.mark.parametrize("text", ["acc", "latency", "acc-latency-memory-size-energy-macs-params"])
def test_any_number_of_them_has_values_that_their_costs_give_back(text):
    objectives = parse_objectives(text)
    values = np.random.default_rng(0).uniform(0.1, 0.9, size=(5, len(objectives)))
    costs = objectives.costs(values)
    assert len(objectives) == len(text.split("-")) == costs.shape[1]
    assert np.stack([o.value(column) for o, column in zip(objectives, costs.T, strict=True)], axis=1) == pytest.approx(values)


def test_networks_are_spread_over_the_second_objective_or_the_only_one_but_never_over_accuracy():
    assert [parse_objectives(t).spread_over.name for t in ("acc-latency", "latency-params", "size", "acc")] == [
        "latency", "params", "size", "macs",
    ]  # fmt: skip


def test_accuracy_comes_first_wherever_it_is_typed():
    assert str(parse_objectives("latency-acc")) == "acc-latency"
    assert str(parse_objectives("params-latency")) == "params-latency"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("acc-speed", "unknown objective 'speed'", "--objective acc-latency"),
        ("accuracy-latency", "unknown objective 'accuracy'", "write 'acc'"),
        ("acc-latencyy", "unknown objective 'latencyy'", "write 'latency'"),
        ("acc-Latency", "unknown objective 'Latency'", "write 'latency'"),
        ("acc-acc", "stands twice", "name it once"),
        ("acc-latency-acc", "stands twice", "acc-latency"),
        ("acc-latency-throughput", "latency and throughput in 'acc-latency-throughput' are one axis", "--objective acc-latency"),
        ("imagetime-throughput", "are one axis", "--objective imagetime"),
        ("acc-memroy", "unknown objective 'memroy'", "write 'memory'"),
        ("", "unknown objective ''", "join names"),
        ("acc-", "unknown objective ''", "join names"),
        ("acc latency", "unknown objective 'acc latency'", ""),
    ],
)
def test_malformed_objectives_are_refused_with_a_hint(text, message, hint):
    with pytest.raises(UsageError) as caught:
        parse_objectives(text)
    assert message in caught.value.message
    assert caught.value.hint and hint in caught.value.hint


def test_costs_are_minimised_with_latency_in_log_ms():
    objectives = parse_objectives("acc-latency")
    by_name = objectives.costs({"accuracy": np.array([0.9, 0.5]), "latency_ms": np.array([1.0, np.e])})
    assert by_name == pytest.approx(np.array([[-0.9, 0.0], [-0.5, 1.0]]))
    assert objectives.costs(np.array([[0.9, 1.0], [0.5, np.e]])) == pytest.approx(by_name)


@pytest.mark.parametrize("text", ["acc-latency", "acc-macs-params", "latency-params", "acc-throughput-memory", "imagetime-size"])
def test_a_better_value_has_a_lower_cost_in_its_column_only(text):
    objectives: Objectives = parse_objectives(text)
    value = np.full((1, len(objectives)), 0.5)
    for j, objective in enumerate(objectives):
        better = value.copy()
        better[0, j] = 0.6 if objective.direction == "maximize" else 0.4
        difference = objectives.costs(better) - objectives.costs(value)
        assert difference[0, j] < 0
        assert not np.delete(difference[0], j).any()


def test_limits_are_parsed_in_one_order_whatever_was_typed_first():
    one = parse_limits(maxima=["params=2e6", "latency_ms=3"], minima=["accuracy=0.8"])
    other = parse_limits(maxima=["latency_ms=3.0", "params=2000000"], minima=["accuracy=.80"])
    assert one == other
    assert [str(limit) for limit in one] == ["accuracy >= 0.8", "latency_ms <= 3", "params <= 2e+06"]


def test_excess_is_the_distance_beyond_the_bound():
    assert Limit(metric="latency_ms", bound=3.0, side="max").excess(np.array([2.5, 3.0, 4.0])) == pytest.approx([-0.5, 0.0, 1.0])
    assert Limit(metric="accuracy", bound=0.8, side="min").excess(np.array([0.9, 0.7])) == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize(
    ("maxima", "minima", "message"),
    [
        (["latency_ms"], [], "is not METRIC=NUMBER"),
        (["latency_ms="], [], "is not METRIC=NUMBER"),
        (["=3"], [], "is not METRIC=NUMBER"),
        (["latency_ms<=3"], [], "unknown metric 'latency_ms<'"),
        (["latency=3"], [], "unknown metric 'latency'"),
        (["speed=3"], [], "unknown metric 'speed'"),
        (["latency_ms=fast"], [], "'fast' is not a number"),
        (["latency_ms=3ms"], [], "without its unit"),
        (["latency_ms=nan"], [], "is not a number"),
        (["latency_ms=inf"], [], "is not a number"),
        (["latency_ms=-3"], [], "latency_ms is positive"),
        (["params=0"], [], "params is positive"),
        (["peak_memory_mb=0"], [], "peak_memory_mb is positive"),
        ([], ["throughput=100"], "unknown metric 'throughput'"),
        (["throughput_ips=1"], ["throughput_ips=2"], "no throughput_ips is at least 2 and at most 1"),
        ([], ["accuracy=80"], "accuracy is a fraction"),
        ([], ["accuracy=-0.1"], "accuracy is a fraction"),
        (["macs=1e6", "macs=2e6"], [], "given twice"),
        (["latency_ms=1"], ["latency_ms=2"], "no latency_ms is at least 2 and at most 1"),
    ],
)
def test_malformed_limits_are_refused_with_a_hint(maxima, minima, message):
    with pytest.raises(UsageError) as caught:
        parse_limits(maxima=maxima, minima=minima)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_percentage_is_answered_with_the_fraction_that_was_meant():
    with pytest.raises(UsageError, match=r"--min accuracy=0\.8"):
        parse_limits(minima=["accuracy=80"])


def test_a_surer_limit_lets_fewer_networks_through():
    from lowsearch.search.estimates import Estimates, excess

    zeros = np.zeros(200)
    estimates = Estimates(
        {"latency_ms": np.linspace(2, 4, 200), "macs": zeros, "params": zeros},
        {"latency_ms": np.full(200, 0.2), "macs": zeros, "params": zeros},
    )
    allowed = {c: excess(estimates, parse_limits(maxima=["latency_ms=3"], confidence=c)) == 0 for c in (0.5, 0.9, 0.99)}
    fastest_refused = {c: estimates.mean["latency_ms"][~mask].min() for c, mask in allowed.items()}
    # Normal quantiles: 0, 1.2816 and 2.3263 standard deviations below the bound.
    for confidence, deviations in ((0.5, 0.0), (0.9, 1.2816), (0.99, 2.3263)):
        assert fastest_refused[confidence] == pytest.approx(3 - deviations * 0.2, abs=0.011)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("batch", [1, 16])
def test_limits_on_throughput_and_time_per_image_are_the_limit_on_latency_they_amount_to(batch, confidence):
    from lowsearch.search.estimates import Estimates, excess

    rng = np.random.default_rng(0)
    latency_ms = rng.uniform(0.5, 6, 500)
    std_ms = latency_ms * rng.uniform(0, 0.8, 500)
    estimates = Estimates(
        {metric: of_latency(metric, latency_ms, batch) for metric in LATENCY_METRICS}, {"latency_ms": std_ms}, batch=batch
    )  # fmt: skip

    def kept(**sides):
        limits = parse_limits(**sides, confidence=confidence)
        return (excess(estimates, limits) == 0).tolist(), limits[0].caps_latency, limits[0].bound_ms(batch)

    slowest = kept(maxima=["latency_ms=3"])
    assert slowest[1:] == (True, 3.0) and 0 < sum(slowest[0]) < 500
    assert kept(minima=[f"throughput_ips={1000 * batch / 3!r}"]) == (slowest[0], True, pytest.approx(3.0))
    assert kept(maxima=[f"time_per_image_ms={3 / batch!r}"]) == (slowest[0], True, pytest.approx(3.0))
    fastest = kept(minima=["latency_ms=3"])
    assert fastest[1:] == (False, 3.0) and 0 < sum(fastest[0]) < 500
    assert kept(maxima=[f"throughput_ips={1000 * batch / 3!r}"]) == (fastest[0], False, pytest.approx(3.0))


def test_energy_keeps_its_limit_at_the_confidence_too():
    from lowsearch.search.estimates import Estimates, at_confidence

    estimates = Estimates({"energy_mj": np.array([10.0])}, {"energy_mj": np.array([2.0])})
    (cap,), (floor,) = (parse_limits(**{side: ["energy_mj=9"]}, confidence=0.9) for side in ("maxima", "minima"))
    assert at_confidence(estimates, cap) == pytest.approx(10 + 1.2816 * 2, abs=1e-3)
    assert at_confidence(estimates, floor) == pytest.approx(10 - 1.2816 * 2, abs=1e-3)


@pytest.mark.parametrize("confidence", [0.0, 0.49, 1.0, 1.5, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence):
    with pytest.raises(UsageError, match="confidence"):
        parse_limits(maxima=["latency_ms=3"], confidence=confidence)
