"""What the page says, as plain values and tables: the half of the report that draws nothing.

Everything is computed from `StudyFiles`. Uncertainties are one standard error; where one network enters a mean several times its error
is counted with its full weight. Networks are compared on test accuracy where both have one. Which networks are compared was decided on
validation accuracy, so the comparison does not flatter the winner.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowsearch.report.study_files import NAN, Network, StudyFiles
from lowsearch.search import pareto
from lowsearch.search.objectives import (
    LATENCY_METRICS,
    METRICS,
    OBJECTIVES,
    Metric,
    Objectives,
    accuracy_excess,
    of_latency,
    parse_limits,
    parse_objectives,
)

MEASURED = "measured"


STAND_INS = {
    "proxy:params": "params", "proxy:macs": "macs", "prior:published": "published accuracies", "supernet": "scores of a supernet"
}  # fmt: skip
"""`accuracy_source` of a study without training, and what stood in for accuracy, in words."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How to read a network's accuracy: on the images of `split`."""

    split: str

    def __call__(self, network: Network) -> float:
        return network.test_accuracy if self.split == "test" else network.val_accuracy


ON_VALIDATION, ON_TEST = Accuracy("validation"), Accuracy("test")


@dataclass(frozen=True, slots=True)
class Axis:
    """One measure of a network as a plot shows it."""

    title: str
    value: Callable[[Network], float]
    std: Callable[[Network], float] = lambda network: NAN
    log: bool = True
    more_is_better: bool = False


AXES: dict[Metric, Axis] = {
    "latency_ms": Axis("Latency, ms", lambda n: n.latency_ms, lambda n: n.latency_std_ms),
    "throughput_ips": Axis(
        "Throughput, images/s", lambda n: n.throughput_ips, lambda n: n.throughput_ips * relative_std(n), more_is_better=True
    ),
    "time_per_image_ms": Axis("Time per image, ms", lambda n: n.time_per_image_ms, lambda n: n.time_per_image_ms * relative_std(n)),
    "worst_latency": Axis("Worst-case latency over all devices, on their common scale", lambda n: n.worst_latency),
    "peak_memory_mb": Axis("Peak memory, MB", lambda n: n.peak_memory_mb),
    "artifact_mb": Axis("File size, MB", lambda n: n.artifact_mb),
    "energy_mj": Axis("Energy, mJ", lambda n: n.energy_mj),
    "macs": Axis("MACs, millions", lambda n: n.macs / 1e6),
    "params": Axis("Parameters, thousands", lambda n: n.params / 1e3),
}
UNITS: dict[Metric, str] = {objective.metric: objective.unit for objective in OBJECTIVES.values()}
STANDARD_ERRORS_TO_BEAT = 2.0
"""A hand-made network counts as beaten where one network is better by more than this in both accuracy and latency."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error (NaN where that is not known)."""

    value: float
    std: float = NAN


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyComparison:
    """One hand-made network against the networks that the search proposed."""

    member: Network
    at_equal_latency: Network | None
    """The most accurate proposed network (validation) that is not slower; None where every one is slower."""
    accuracy_gain: Estimate
    """Accuracy of `at_equal_latency` minus the member's, as a fraction."""
    at_equal_accuracy: Network | None
    """The fastest proposed network that is not less accurate (validation); None where none is."""
    latency_change: Estimate
    """Latency of `at_equal_accuracy` over the member's, minus 1."""
    beaten_by: Network | None
    """A proposed network better by more than two standard errors in both axes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How the latency limit held once the networks were measured."""

    n_limited: int
    """Networks that had a limit."""
    n_broken: int
    worst_excess: float
    """Largest measured latency over its limit, minus 1; NaN where no network had a limit."""
    limit_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionError:
    """Measured latency of networks against the prediction that the search used."""

    n_networks: int
    median: float
    """Median of |measured / predicted - 1|."""
    worst: float
    beyond_pace: float
    """The median again, once the machine's own change of speed is divided out; NaN where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostAgainstLatency:
    """How well a count of operations ranks latency over the same networks."""

    spearman: float
    n_networks: int
    source: str
    largest_ratio: float
    """Largest ratio of latencies between two of them whose MACs differ by at most 5 %."""


def finals_are_known(study: StudyFiles) -> bool:
    """Whether the final training and measurement of the front is done."""
    return bool(study.finalists)


def test_was_read(study: StudyFiles) -> bool:
    """Whether final networks have an accuracy on test images."""
    return any(math.isfinite(network.test_accuracy) for network in study.finalists)


def cost_networks(study: StudyFiles) -> tuple[Network, ...]:
    """The networks that say how well MACs stand for latency: random members of the space, else the candidates."""
    return study.sample or study.candidates


def final_front(study: StudyFiles) -> list[Network]:
    """The front after its final training and measurement, fastest first."""
    rows = study.front or tuple(network for network in study.finalists if network.on_front)
    return sorted(rows, key=lambda network: network.latency_ms)


def objectives(study: StudyFiles) -> Objectives:
    """What the study searches for; accuracy and latency where study.yaml does not say."""
    return parse_objectives(str(study.settings.get("objective") or "acc-latency"))


def search_values(network: Network) -> dict[Metric, float]:
    """The values that the search's objectives read; what stands in for accuracy where there is none."""
    accuracy = network.val_accuracy if math.isfinite(network.val_accuracy) else network.score
    return {"accuracy": accuracy, **{metric: getattr(network, metric) for metric in METRICS if metric != "accuracy"}}


def scored_candidates(study: StudyFiles) -> list[Network]:
    """The candidates whose objectives are all known, one row per network: the furthest rung it reached."""
    metrics = objectives(study).metrics
    furthest: dict[str, Network] = {}
    for network in study.candidates:
        values = search_values(network)
        if network.state in ("", "complete") and all(math.isfinite(values[metric]) for metric in metrics):
            held = furthest.get(network.arch_id)
            if held is None or not network.rung < held.rung:
                furthest[network.arch_id] = network
    return list(furthest.values())


def non_dominated(study: StudyFiles, networks: Sequence[Network]) -> list[Network]:
    """The networks that no other beats in all objectives of the study, by validation accuracy; fastest first."""
    if not networks:
        return []
    wanted = objectives(study)
    values = np.array([[search_values(network)[metric] for metric in wanted.metrics] for network in networks])
    mask = pareto.non_dominated(wanted.costs(values))
    return sorted((network for network, kept in zip(networks, mask, strict=True) if kept), key=lambda network: network.latency_ms)


def has_two_objectives(study: StudyFiles) -> bool:
    """Whether the front is a line in the main plot, and not the shadow of a surface."""
    return len(objectives(study)) == 2


def plot_metrics(study: StudyFiles) -> tuple[Metric, Metric]:
    """What the study's main plot has on its horizontal and its vertical axis: the cost, and what it buys.

    A study of accuracy and one cost has that cost on the horizontal axis; with more costs, or without accuracy, latency has precedence.
    A single objective is drawn against latency, and latency beside MACs.
    """
    wanted = objectives(study)
    costs: list[Metric] = [metric for metric in wanted.metrics if metric != "accuracy"]
    across = wanted.latency_metric or (costs[0] if len(wanted) > 1 else "latency_ms")
    if "accuracy" in wanted.metrics:
        return across, "accuracy"
    others: list[Metric] = [metric for metric in (*costs, "macs") if metric != across]  # type: ignore[misc]
    return across, others[0]


def further_metrics(study: StudyFiles) -> list[Metric]:
    """The objectives that the main plot has no axis for: none of one or two."""
    return [metric for metric in objectives(study).metrics if metric not in plot_metrics(study)]


def plot_axes(study: StudyFiles, split: str) -> tuple[Axis, Axis]:
    """Horizontal and vertical axis of the study's main plot."""
    across, up = plot_metrics(study)
    return AXES[across], _accuracy_axis(study, split) if up == "accuracy" else AXES[up]


def best_so_far(study: StudyFiles) -> list[float]:
    """Of a study of one objective, its best value at every point of the hypervolume's curve, which is its distance from the reference."""
    [objective] = objectives(study)
    worst = (study.settings.get("reference_point") or {}).get(objective.metric, NAN)
    volumes = np.array([point.hypervolume for point in study.hypervolume])
    costs = np.where(volumes != 0, objective.cost(np.array(worst)) - volumes, NAN)  # Nothing kept the limits so far, or all were worse.
    return objective.value(costs).tolist()


def asked_metrics(study: StudyFiles) -> set[str]:
    """The metrics of the study's objectives and limits, and energy where it was measured."""
    counted = {"energy_mj"} if any(network.energy_source == MEASURED for network in study.finalists) else set()
    return {*counted, *objectives(study).metrics, *(str(limit).partition(" ")[0] for limit in study.settings.get("limits") or ())}


def device_sources(study: StudyFiles) -> dict[str, str]:
    """Where latencies are from by the label of the device, in a study of several; empty for one. The first is the one measured."""
    return {str(device["device"]): str(device["latency_source"]) for device in study.settings.get("devices") or ()}


def latency_axis(study: StudyFiles, device: str = "") -> Axis:
    """Latency on `device`, or on the one that the study measures."""
    sources = device_sources(study)
    if device:
        return Axis(f"Latency on {device}, ms ({sources.get(device, '')})", lambda n: n.by_device.get(device, NAN))
    plain = AXES["latency_ms"]
    return replace(plain, title=f"Latency on {next(iter(sources))}, ms") if sources else plain


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFront:
    """A front of networks for all devices, or for one, and how much slower they are than each device's own."""

    name: str
    """`shared`, or the label of the device that it is for."""
    networks: tuple[Network, ...]
    """As the search estimated them, the lowest worst case first."""
    regret: Mapping[str, tuple[float, ...]]
    """By device, for every network: how many times slower than that device's own front at no loss."""

    @property
    def worst(self) -> tuple[float, ...]:
        """For every network, on the device where it loses most."""
        return tuple(map(max, zip(*self.regret.values(), strict=True)))


def shared_fronts(study: StudyFiles) -> list[SharedFront]:
    """The shared front and that of every device; none where the study has one device or is not finished."""
    candidates = {network.arch_id: network for network in scored_candidates(study)}
    fronts = []
    for name in dict.fromkeys(row.front for row in study.regrets):
        rows = [row for row in study.regrets if row.front == name and row.arch_id in candidates]
        arch_ids = list(dict.fromkeys(row.arch_id for row in rows))
        regret = {device: tuple(row.regret for row in rows if row.device == device) for device in dict.fromkeys(row.device for row in rows)}
        fronts.append(SharedFront(name=name, networks=tuple(candidates[arch_id] for arch_id in arch_ids), regret=regret))
    return fronts if fronts and fronts[0].name == "shared" and fronts[0].networks else []


def mean_ratio(ratios: Sequence[float]) -> float:
    """Geometric mean; NaN where there are none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else NAN


def searches_latency(study: StudyFiles) -> bool:
    """Whether accuracy and latency are objectives, be it as throughput or as time per image."""
    wanted = objectives(study)
    return "accuracy" in wanted.metrics and wanted.latency_metric is not None


def limit_on(study: StudyFiles, axis: Axis) -> tuple[float, str] | None:
    """Where on `axis` the limit on latency lies, and in words; None where there is none, or where it is another axis."""
    limit_ms = limits(study).limit_ms
    for metric in LATENCY_METRICS:
        if axis is AXES[metric] and math.isfinite(limit_ms):
            value = of_latency(metric, limit_ms, int(study.settings.get("batch") or 1))
            return value, f"limit {value:.4g} {UNITS[metric]}"
    return None


def relative_std(network: Network) -> float:
    """Standard error of the latency over the latency, which throughput and time per image share."""
    return network.latency_std_ms / network.latency_ms if network.latency_ms > 0 else NAN


def stand_in(study: StudyFiles) -> str:
    """What stands in for accuracy in a study without training, one of STAND_INS; empty where accuracy is trained."""
    sources = (network.accuracy_source for network in (*study.candidates, *study.finalists))
    return next((source for source in sources if source in STAND_INS), "")


def supernet_in_words(known: Mapping[str, Any]) -> str:
    """What study.yaml says of the supernet that a study searched by."""
    spearman = f"{known['spearman']:.2f} ({known['low']:.2f} to {known['high']:.2f}; MACs {known['macs_spearman']:.2f})"
    return (
        f"They were learned from what {known['n_networks']} networks inherit from supernet {known['name']}, trained on {known['data']}, "
        f"and rank these, each left out, with Spearman {spearman}."
    )


def _accuracy_axis(study: StudyFiles, split: str) -> Axis:
    if source := stand_in(study):
        score = {"prior": "trend of ", "supernet": ""}.get(source.partition(":")[0], "log10 of ") + STAND_INS[source]
        return Axis(f"Rank score ({score}), not accuracy", lambda n: n.score, lambda n: n.score_std, log=False)
    accuracy = Accuracy(split)
    return Axis(f"{split.capitalize()} accuracy, %", lambda n: 100 * accuracy(n), lambda n: 100 * n.accuracy_std, log=False)


def best_known_front(study: StudyFiles) -> list[Network]:
    """The final front, or before there is one the front of the candidates scored so far."""
    return final_front(study) if finals_are_known(study) else non_dominated(study, _accurate_enough(study, scored_candidates(study)))


def _accurate_enough(study: StudyFiles, networks: Sequence[Network]) -> list[Network]:
    """Those that keep the study's limits on accuracy as it is estimated; what breaks another is never scored."""
    stored = (study.settings.get("settings") or {}).get("limits") or {}
    asked = parse_limits(maxima=stored.get("max", ()), minima=stored.get("min", ())) if isinstance(stored, Mapping) else ()
    over = accuracy_excess(asked, np.array([network.val_accuracy for network in networks])) > 0
    return [network for network, is_over in zip(networks, over, strict=True) if not is_over]


def comparable_accuracy(*networks: Network) -> Accuracy:
    """How to read accuracy so that `networks` compare fairly: on test images where all have that, else on validation images."""
    if all(math.isfinite(network.test_accuracy) for network in networks):
        return ON_TEST
    return ON_VALIDATION


def against_family(study: StudyFiles) -> list[FamilyComparison]:
    """Every hand-made finalist against the proposed finalists, fastest first.

    Empty where the study does not search for accuracy and latency, or has something else in place of accuracy.
    """
    if not searches_latency(study):
        return []
    known = [n for n in study.finalists if math.isfinite(n.val_accuracy)]
    family = sorted((n for n in known if n.is_family), key=lambda n: n.latency_ms)
    proposed = [n for n in known if not n.is_family and not n.breaks]
    return [_compare(member, proposed) for member in family] if proposed else []


def _compare(member: Network, proposed: Sequence[Network]) -> FamilyComparison:
    faster = max((n for n in proposed if n.latency_ms <= member.latency_ms), key=lambda n: n.val_accuracy, default=None)
    as_good = min((n for n in proposed if n.val_accuracy >= member.val_accuracy), key=lambda n: n.latency_ms, default=None)
    return FamilyComparison(
        member=member,
        at_equal_latency=faster,
        accuracy_gain=mean_accuracy_gain([(faster, member)] if faster else []),
        at_equal_accuracy=as_good,
        latency_change=mean_latency_change([(as_good, member)] if as_good else []),
        beaten_by=next((n for n in sorted(proposed, key=lambda n: n.latency_ms) if clearly_better(n, member)), None),
    )


def clearly_better(network: Network, other: Network) -> bool:
    """Whether `network` is more accurate and faster than `other`, each by more than two standard errors of the difference."""
    accuracy = comparable_accuracy(network, other)
    more_accurate = accuracy(network) - accuracy(other) > STANDARD_ERRORS_TO_BEAT * math.hypot(network.accuracy_std, other.accuracy_std)
    faster = other.latency_ms - network.latency_ms > STANDARD_ERRORS_TO_BEAT * math.hypot(network.latency_std_ms, other.latency_std_ms)
    return more_accurate and faster


def mean_accuracy_gain(pairs: Sequence[tuple[Network, Network]]) -> Estimate:
    """Mean over `pairs` of (network, reference) of the difference in accuracy."""
    accuracy = comparable_accuracy(*(network for pair in pairs for network in pair))
    return _mean_difference(pairs, accuracy, lambda network: network.accuracy_std)


def mean_latency_change(pairs: Sequence[tuple[Network, Network]]) -> Estimate:
    """Geometric mean over `pairs` of (network, reference) of the latency ratio, minus 1."""
    logs = _mean_difference(pairs, lambda n: math.log(n.latency_ms), lambda n: n.latency_std_ms / n.latency_ms)
    ratio = math.exp(logs.value)
    return Estimate(ratio - 1, ratio * logs.std)


def _mean_difference(
    pairs: Sequence[tuple[Network, Network]], value: Callable[[Network], float], std: Callable[[Network], float]
) -> Estimate:
    if not pairs:
        return Estimate(NAN, NAN)
    weights: defaultdict[Network, float] = defaultdict(float)
    for network, reference in pairs:
        weights[network] += 1 / len(pairs)
        weights[reference] -= 1 / len(pairs)
    return Estimate(
        sum(weight * value(network) for network, weight in weights.items()),
        math.sqrt(sum((weight * std(network)) ** 2 for network, weight in weights.items())),
    )


def gain_at_equal_latency(comparisons: Sequence[FamilyComparison]) -> tuple[Estimate, int]:
    """Mean accuracy gain over the hand-made networks that a proposed one is not slower than, and how many those are."""
    pairs = [(c.at_equal_latency, c.member) for c in comparisons if c.at_equal_latency is not None]
    return mean_accuracy_gain(pairs), len(pairs)


def change_at_equal_accuracy(comparisons: Sequence[FamilyComparison]) -> tuple[Estimate, int]:
    """Mean latency change over the hand-made networks that a proposed one is not less accurate than, and how many those are."""
    pairs = [(c.at_equal_accuracy, c.member) for c in comparisons if c.at_equal_accuracy is not None]
    return mean_latency_change(pairs), len(pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypervolumes:
    """Hypervolume of the proposed finalists and of the hand-made ones, up to the study's reference point."""

    proposed: float
    family: float
    where: str
    """The reference point and the images, in words."""


def hypervolumes(study: StudyFiles) -> Hypervolumes | None:
    """None where the study is not about accuracy and latency, has no reference point, or one side has no finalists."""
    wanted, reference = objectives(study), study.settings.get("reference_point") or {}
    proposed = [n for n in study.finalists if not n.is_family and not n.breaks]
    family = [n for n in study.finalists if n.is_family and not n.breaks]
    accuracy = comparable_accuracy(*proposed, *family)
    if len(wanted) != 2 or not searches_latency(study) or not set(wanted.metrics) <= reference.keys():
        return None
    cost = wanted.metrics[1]
    if not proposed or not family or not all(math.isfinite(accuracy(n)) for n in (*proposed, *family)):
        return None
    worst = wanted.costs(np.array([[reference["accuracy"], reference[cost]]]))[0]

    def volume(networks: Sequence[Network]) -> float:
        return pareto.hypervolume(wanted.costs(np.array([[accuracy(n), getattr(n, cost)] for n in networks])), worst)

    return Hypervolumes(
        proposed=volume(proposed),
        family=volume(family),
        where=f"up to {percent(reference['accuracy'])} and {amount(reference[cost], UNITS[cost])}, {accuracy.split} images",
    )


def limits(study: StudyFiles) -> Limits:
    """How the latency limit held over the networks of the search's own that were measured: the shortlist."""
    limited = [n for n in study.shortlist if math.isfinite(n.limit_ms) and not n.is_family]
    excess = [n.latency_ms / n.limit_ms - 1 for n in limited]
    return Limits(
        n_limited=len(limited),
        n_broken=sum(n.over_limit for n in limited),
        worst_excess=max(excess, default=NAN),
        limit_ms=max((n.limit_ms for n in (*limited, *study.finalists) if math.isfinite(n.limit_ms)), default=NAN),
    )


def prediction_error(study: StudyFiles) -> PredictionError:
    """How far the measured networks lie from their predicted latency."""
    measured = [n for n in study.shortlist if n.latency_source == MEASURED and n.predicted_latency_ms > 0]
    ratios = np.array([n.latency_ms / n.predicted_latency_ms for n in measured])
    if not measured:
        return PredictionError(n_networks=0, median=NAN, worst=NAN, beyond_pace=NAN)
    off = np.abs(ratios - 1)
    return PredictionError(
        n_networks=len(measured),
        median=float(np.median(off)),
        worst=float(off.max()),
        beyond_pace=float(np.median(np.abs(ratios / study.pace - 1))),
    )


def cost_against_latency(networks: Sequence[Network]) -> CostAgainstLatency | None:
    """How well MACs rank the latency of `networks`; None for fewer than three."""
    known = [n for n in networks if n.macs > 0 and n.latency_ms > 0]
    if len(known) < 3:
        return None
    macs = np.array([n.macs for n in known])
    latency_ms = np.array([n.latency_ms for n in known])
    return CostAgainstLatency(
        spearman=spearman(macs, latency_ms),
        n_networks=len(known),
        source=", ".join(sorted({n.latency_source for n in known if n.latency_source})),
        largest_ratio=_largest_ratio_at_equal(macs, latency_ms, tolerance=0.05),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of `a` (n,) and `b` (n,), ties sharing their mean rank; NaN where one of them is constant."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(a), ranks(b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return NAN
    return float(np.corrcoef(a, b)[0, 1])


def _largest_ratio_at_equal(cost: np.ndarray, latency_ms: np.ndarray, *, tolerance: float) -> float:
    order = np.argsort(cost)
    cost, latency_ms = cost[order], latency_ms[order]
    ends = np.searchsorted(cost, cost * (1 + tolerance), side="right")
    return max(float(latency_ms[i:end].max() / latency_ms[i:end].min()) for i, end in enumerate(ends))


def stage_rows(arch: Mapping[str, Any]) -> list[dict[str, str]]:
    """The network of `Arch.to_dict()` as a table, one row per part: stem, stages 1 to 4, head."""
    stem, stages = arch["stem"], arch["stages"]
    px = arch["resolution_px"] // stem["stride"]
    rows = [
        _part("stem", px, stem["width"], stem["depth"], f"3×3 stride {stem['stride']}")
        | (_convolution(stem, kernel=3) if stem["depth"] > 1 else {})
    ]
    for number, stage in enumerate(stages, start=1):
        px //= 2
        blocks = _convolution(stage, kernel=stage["kernel"]) if stage["depth"] > 1 else {}
        attention, mlp = stage["attention"], stage["mlp_ratio"]
        down = ["fused" if stage["down_fused"] else "MBConv", f"×{stage['down_expansion']}", *_groups(stage["down_groups"])]
        rows.append(
            _part(f"stage {number}", px, stage["width"], stage["depth"], " ".join(down))
            | blocks
            | {"attention": _attention(attention) if attention else "", "mlp": f"×{mlp}" if mlp else ""}
        )
    conv_width, linear_width = arch["head_widths"]
    return [*rows, _part("head", px, f"{conv_width} / {linear_width}", "", "") | {"conv": f"{arch['num_classes']} classes"}]


def _part(part: str, px: int, width: object, depth: object, entry: str) -> dict[str, str]:
    """A row of the stage table with every column; `entry` is the convolution or downsampler that opens the part."""
    columns = {"part": part, "px": px, "width": width, "depth": depth, "entry": entry}
    return {name: str(value) for name, value in columns.items()} | dict.fromkeys(("conv", "attention", "mlp"), "")


def _convolution(values: Mapping[str, Any], *, kernel: int) -> dict[str, str]:
    kind = "fused" if values["fused"] else "MBConv"
    return {"conv": " ".join([kind, f"{kernel}×{kernel}", f"×{values['expansion']}", *_groups(values["groups"])])}


def _groups(groups: int) -> list[str]:
    return [f"g{groups}"] if groups > 1 else []


def _attention(values: Mapping[str, Any]) -> str:
    return f"÷{values['stride']} {values['kernel']}×{values['kernel']} c{values['compression']:g} {values['projection']}"


def short_description(arch: Mapping[str, Any]) -> str:
    """One line: resolution, widths, depths, and where attention and MLPs are."""
    parts = [arch["stem"], *arch["stages"]]
    widths, depths = ("·".join(str(part[key]) for part in parts) for key in ("width", "depth"))
    with_attention = [str(i) for i, stage in enumerate(arch["stages"], start=1) if stage["attention"]]
    with_mlp = [str(i) for i, stage in enumerate(arch["stages"], start=1) if stage["mlp_ratio"]]
    where = f"attention in {', '.join(with_attention)}" if with_attention else "no attention"
    mlps = f"MLP in {', '.join(with_mlp)}" if with_mlp else "no MLP"
    return f"{arch['resolution_px']} px, widths {widths}, depths {depths}, {where}, {mlps}"


def candidate_counts(study: StudyFiles) -> dict[str, int]:
    """How many candidates there are by what became of them: `family`, `proposed`, `untrained` (refused before any training)."""
    scored = scored_candidates(study)
    family = sum(network.is_family for network in scored)
    refused = sum(network.state == "pruned" for network in study.candidates)
    return {"family": family, "proposed": len(scored) - family, "untrained": refused}


def spent_seconds(study: StudyFiles) -> dict[str, float]:
    """Where the study's time went: phase -> seconds."""
    spent = study.settings.get("spent_s") or {}
    return {str(phase): float(seconds) for phase, seconds in spent.items()}


def network_details(study: StudyFiles) -> dict[str, dict[str, Any]]:
    """What the page shows for a chosen network: arch_id -> its numbers, stage table and per-block latency.

    The shares of the blocks are of their own sum, which is the predicted latency.
    """
    rows = {network.arch_id: network for network in (*scored_candidates(study), *study.finalists)}
    details: dict[str, dict[str, Any]] = {}
    for arch_id, network in rows.items():
        known = study.networks.get(arch_id)
        if known is None:
            continue
        total_ms = sum(block["ms"] for block in known["blocks"])
        details[arch_id] = {
            "label": network.label,
            "origin": network.origin,
            "is_family": network.is_family,
            "has_weights": bool(network.weights),
            "short": short_description(known["arch"]),
            "numbers": number_rows(network, device_sources(study)),
            "device": next(iter(device_sources(study)), ""),
            "stages": stage_rows(known["arch"]),
            "total_ms": total_ms,
            "blocks": [
                [b["place"], b["kind"], b["ms"], b["ms"] / total_ms if total_ms else 0.0, b["source"], b["macs"], b["params"]]
                for b in known["blocks"]
            ],
        }
    return details


def number_rows(network: Network, sources: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The figures of one network as (word, value, source). `sources`: those of several devices, by label."""
    accuracy_std = network.accuracy_std
    first, *others = sources or [""]
    rows = [
        ("Test accuracy", percent(network.test_accuracy, accuracy_std), network.accuracy_source),
        ("Validation accuracy", percent(network.val_accuracy, accuracy_std), network.accuracy_source),
        (
            "Score (unit: rank)",
            f"{network.score:.4g}{_score_error(network)}" if math.isfinite(network.score) else "",
            network.accuracy_source,
        ),
        (f"Latency on {first}" if first else "Latency", milliseconds(network.latency_ms, network.latency_std_ms), network.latency_source),
        *((f"Latency on {label}", milliseconds(network.by_device.get(label, NAN)), sources[label]) for label in others),
        ("Worst-case latency", amount(network.worst_latency, UNITS["worst_latency"]), ""),
        ("Predicted latency", milliseconds(network.predicted_latency_ms), "predicted"),
        ("Throughput", amount(network.throughput_ips, "images/s", network.throughput_ips * relative_std(network)), network.latency_source),
        ("Time per image", _time_per_image(network), network.latency_source),
        ("Peak memory", amount(network.peak_memory_mb, "MB"), ""),
        ("File size", amount(network.artifact_mb, "MB"), ""),
        ("Energy", amount(network.energy_mj, "mJ"), network.energy_source),
        ("MACs", count(network.macs), ""),
        ("Parameters", count(network.params), ""),
        ("Resolution", f"{network.resolution_px:.0f} px" if math.isfinite(network.resolution_px) else "", ""),
        ("Trained for", f"{network.rung:.0%} of a full training" if network.rung < 1 else "", ""),
        ("Standard error from", network.accuracy_std_origin, ""),
    ]
    return [row for row in rows if row[1]]


def _time_per_image(network: Network) -> str:
    """Empty where it is the latency itself, at batch 1."""
    alone = network.time_per_image_ms == network.latency_ms
    return "" if alone else milliseconds(network.time_per_image_ms, network.time_per_image_ms * relative_std(network))


def _score_error(network: Network) -> str:
    return f" ± {network.score_std:.2g}" if network.score_std > 0 else ""


def percent(value: float, std: float = NAN, *, signed: bool = False) -> str:
    """A fraction as `91.2 ± 0.4 %`; empty where it is not known."""
    if not math.isfinite(value):
        return ""
    return f"{100 * value:{'+' if signed else ''}.1f}{plus_minus(100 * std, 1)} %".replace("-", "−")


def milliseconds(value: float, std: float = NAN) -> str:
    """Three significant digits, `0.352 ± 0.006 ms`; empty where it is not known."""
    return amount(value, "ms", std)


def amount(value: float, unit: str, std: float = NAN) -> str:
    """`value` of `unit` with three significant digits; empty where it is not known."""
    if not math.isfinite(value):
        return ""
    digits = _digits(value)
    return f"{value:.{digits}f}{plus_minus(std, digits)} {unit}"


def plus_minus(std: float, digits: int) -> str:
    """With so many digits after the point, and as many more as it takes not to read 0."""
    if not math.isfinite(std):
        return ""
    if std > 0:
        digits = max(digits, -math.floor(math.log10(2 * std)))
    return f" ± {std:.{digits}f}"


def _digits(value: float) -> int:
    """Digits after the point that show three significant ones."""
    return max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2


def count(value: float) -> str:
    """A count with three significant digits and K, M or G; empty where it is not known."""
    if not math.isfinite(value):
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.{_digits(value / size)}f} {unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """`8 min 5 s`, `42 s`, `1 h 12 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min" + (f" {seconds % 60} s" if seconds % 60 else "")
    return f"{seconds // 3600} h" + (f" {seconds % 3600 // 60} min" if seconds % 3600 // 60 else "")
