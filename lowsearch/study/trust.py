"""How far a study's accuracy predictor can be trusted: its forecasts against trainings of networks that it never saw.

The networks are those of `study.held_out`, and the predictor learns from the study's records alone. Params, MACs and the training-free
proxies rank the same networks beside it, because a predictor that they beat has nothing to say.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from lowsearch.accuracy.agreement import Agreement, Lead, agreement, lead
from lowsearch.accuracy.scores import Scores, Unit
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.search.estimates import scores_of
from lowsearch.study import held_out
from lowsearch.study.assembly import build_parts
from lowsearch.study.held_out import Band
from lowsearch.study.parts import HeldOutSet, Parts, Progress, ProxyAccuracy, Record
from lowsearch.study.settings import StudySettings
from lowsearch.study.workers.worker import Plan
from lowsearch.train import Rung

Verdict = Literal["trusted", "weak", "not trusted"]
TRUST: dict[HeldOutSet, str] = {"range": "trust.json", "band": "trust-band.json"}
PREDICTOR = "accuracy predictor"
PLAIN: dict[str, Literal["params", "macs"]] = {"params": "params", "MACs": "macs"}
"""What a ranking costs nothing by."""
BETWEEN_SEEDS = "one seed for another"
TRUSTED_ABOVE = 0.2
"""Lower end of the 95 % interval of Spearman from which on a ranking is more than luck."""
N_BANDS = 3
MIN_IN_BAND = 8
WORKER = (sys.executable, "-m", "lowsearch.study.workers.process")
"""Command that starts a worker; folder, name and job are appended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How one signal ranks the held-out networks by their trained accuracy."""

    name: str
    band: str
    """Latency band that the networks are from; empty for all of them."""
    agreement: Agreement
    source: str = ""
    unit: Unit = "rank"
    cpu_seconds: float = dataclasses.field(default=0.0, compare=False)
    """What scoring one network costs, the study's trainings apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The outcome of the examination."""

    verdict: Verdict
    reason: str
    n_networks: int
    n_seeds: int
    n_records: int
    """Networks of the study that the predictor learned from."""
    learned_cpu_seconds: float
    """What their trainings cost."""
    coverage: float
    """Share of the trained accuracies within the predictor's 90 % intervals."""
    ceiling: float | None
    """Spearman that a predictor which knew every network's mean over seeds would reach; None with one seed, which does not tell."""
    leads: Mapping[str, Lead | None]
    """By how much the predictor ranks better than each of PLAIN, None where too few networks tell."""
    signals: tuple[Ranking, ...]
    """The predictor's first, then the others over all networks, then those within bands."""
    networks: tuple[Mapping[str, Any], ...]
    within: Band | None = None
    """The band of latency that all networks are from."""

    def rows(self) -> list[dict[str, Any]]:
        """The signals as flat rows."""
        return [
            {"signal": s.name, "band": s.band, "source": s.source, "unit": s.unit, "cpu_seconds": s.cpu_seconds}
            | dataclasses.asdict(s.agreement)
            for s in self.signals
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in trust.json."""
        leads = {name: None if found is None else dataclasses.asdict(found) for name, found in self.leads.items()}
        within = None if self.within is None else dataclasses.asdict(self.within)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "signals": self.rows(), "leads": leads, "within": within}


def trust(
    folder: Path,
    *,
    n_networks: int = 12,
    n_seeds: int = 1,
    band: Band | None = None,
    progress: Progress | None = None,
    parts: Callable[[Path, StudySettings], Parts] = build_parts,
    worker: Sequence[str] = WORKER,
) -> Trust:
    """Examine the predictor of the study in `folder`, training what the held-out set lacks (resumably), and write trust.json there.

    With a `band`, on networks that were drawn in it and are kept apart; that goes to trust-band.json.

    Raises StudyError where the study trains nothing, or has trained too little to predict.
    """
    try:
        with FileLock(folder / ".trust.lock", timeout=0.5):
            return _examined(folder, n_networks, n_seeds, band, progress, parts, worker)
    except Timeout as error:
        raise StudyError(f"the predictor of study {folder.name!r} is being examined by another process", hint="wait for it") from error


def _examined(
    folder: Path,
    n_networks: int,
    n_seeds: int,
    band: Band | None,
    progress: Progress | None,
    parts: Callable[[Path, StudySettings], Parts],
    worker: Sequence[str],
) -> Trust:
    plan = Plan.read(folder)
    made = parts(folder, plan.settings)
    if made.held_out is None or made.proxies is None or plan.settings.stand_in:
        raise StudyError(
            f"study {folder.name!r} trains nothing, so there is no accuracy to compare a predictor with",
            hint="a study with --data FOLDER and no --accuracy trains",
        )
    kept_in: HeldOutSet = "range" if band is None else "band"
    archs = held_out.networks(made, plan, n_networks, band=band)
    orders = held_out.Orders(kept_in=kept_in, archs=tuple(archs), seeds=tuple(held_out.seeds(plan, n_seeds)))
    by_arch = held_out.train(folder, made, plan, orders, command=worker, progress=progress)
    records = [r for r in made.records() if r.arch_id not in by_arch]
    scorer = made.fit(records)
    if scorer is None:
        raise StudyError(f"study {folder.name!r} has no trainings yet", hint=f"lowsearch run --study {folder.name}")

    genomes = np.stack([made.space.encode(arch) for arch in archs])
    accuracy = np.array([np.mean([r.val_accuracy for r in by_arch[arch.arch_id]]) for arch in archs])
    known = made.estimator.estimate(genomes).mean
    predicted = scores_of(scorer, genomes)
    plain = {name: scores_of(ProxyAccuracy(made.space, metric), genomes) for name, metric in PLAIN.items()}
    scores = {PREDICTOR: predicted, **plain, **made.proxies(archs, progress)}
    signals = [_ranking(name, values, accuracy) for name, values in scores.items()]
    ceiling = None
    if n_seeds > 1:
        first, second = (trained_scores([by_arch[arch.arch_id][k] for arch in archs]) for k in (0, 1))
        signals.append(_ranking(BETWEEN_SEEDS, first, second.mean))
        ceiling = ceiling_of(signals[-1].agreement.spearman, n_seeds)
    signals += [] if band else _in_bands({name: scores[name] for name in (PREDICTOR, *PLAIN)}, accuracy, known["latency_ms"])
    leads = {name: lead(predicted.mean, scores[name].mean, accuracy) for name in PLAIN}
    mean, std = predicted.mean, np.zeros(len(archs)) if predicted.std is None else predicted.std
    decided, reason = verdict_of(signals, leads, ceiling=ceiling)
    result = Trust(
        verdict=decided, reason=reason, n_networks=len(archs), n_seeds=min(len(found) for found in by_arch.values()),
        n_records=len({r.arch_id for r in records}), learned_cpu_seconds=_spent_s(records),
        coverage=float((np.abs(accuracy - mean) <= 1.645 * std).mean()),
        ceiling=ceiling, leads=leads, signals=tuple(signals),
        networks=tuple(
            {"arch_id": arch.arch_id, "latency_ms": float(known["latency_ms"][i]), "predicted_accuracy": float(mean[i]),
             "predicted_accuracy_std": float(std[i]), "val_accuracy": [r.val_accuracy for r in by_arch[arch.arch_id]]}
            for i, arch in enumerate(archs)
        ),
        within=band,
    )  # fmt: skip
    write_atomically(folder / TRUST[kept_in], json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def trained_scores(records: Sequence[Record]) -> Scores:
    """What trainings say, as an estimator of what another seed would say."""
    return Scores(
        source="trained", unit="top1", mean=np.array([r.val_accuracy for r in records]), cpu_seconds=sum(r.cpu_seconds for r in records)
    )  # fmt: skip


def _spent_s(records: Sequence[Record]) -> float:
    """CPU seconds of trainings, rungs that go on from each other counted once."""
    spent = {}
    for record in sorted(records, key=lambda r: r.rung):
        rung = Rung.of(record.rung)
        spent[record.arch_id, rung if rung.apart else None] = record.cpu_seconds
    return sum(spent.values())


def _ranking(name: str, scores: Scores, accuracy: np.ndarray) -> Ranking:
    n = max(len(accuracy), 1)
    return Ranking(
        name=name, band="", agreement=agreement(scores.mean, accuracy), source=scores.source, unit=scores.unit,
        cpu_seconds=scores.cpu_seconds / n,
    )  # fmt: skip


def ceiling_of(between_seeds: float | None, n_seeds: int) -> float | None:
    """What a perfect predictor's rank correlation with means over `n_seeds` seeds would be, from that between two seeds (Spearman-Brown).

    It is above the correlation between seeds, in which both sides have their luck.
    """
    if between_seeds is None or between_seeds <= 0:
        return None
    return float(np.sqrt(n_seeds * between_seeds / (1 + (n_seeds - 1) * between_seeds)))


def verdict_of(signals: Sequence[Ranking], leads: Mapping[str, Lead | None], *, ceiling: float | None = None) -> tuple[Verdict, str]:
    """The verdict, and why.

    `not trusted`: the 95 % interval of the predictor's Spearman reaches 0 or below, or there are too few networks for one. `trusted`:
    its lower end is above TRUSTED_ABOVE, and the paired bootstrap puts it above both params and MACs: a predictor that only may be better
    than what costs nothing has not earned trust. `weak`: anything between. The reason ends with what else is known: the ranking inside
    bands of latency, and the ceiling.
    """
    whole = {s.name: s.agreement for s in signals if not s.band}
    own = whole[PREDICTOR]
    if own.spearman is None or own.low is None or own.low <= 0:
        return "not trusted", f"its ranking cannot be told from chance on these networks{_beside(signals, ceiling)}"
    rival = max(PLAIN, key=lambda name: whole[name].spearman or 0.0)
    doubted = [name for name in PLAIN if (found := leads.get(name)) is None or found.low <= 0]
    if own.spearman < (whole[rival].spearman or 0.0):
        verdict, reason = "weak", f"{rival} alone rank these networks better{_by(own, whole[rival], leads.get(rival))}"
    elif doubted:
        worst = rival if rival in doubted else doubted[0]
        verdict, reason = "weak", f"not better than {worst} beyond doubt{_by(own, whole[worst], leads.get(worst))}"
    elif own.low <= TRUSTED_ABOVE:
        verdict, reason = "weak", f"its ranking may be as poor as Spearman {own.low:.2f}"
    else:
        lead_over = _by(own, whole[rival], leads.get(rival))
        verdict, reason = "trusted", f"its ranking is at least Spearman {own.low:.2f}, and better than that of {rival}{lead_over}"
    return verdict, reason + _beside(signals, ceiling)


def _by(own: Agreement, other: Agreement, found: Lead | None) -> str:
    difference = (own.spearman or 0.0) - (other.spearman or 0.0)
    text = f", by {abs(difference):.2f}"
    if found is not None:
        low, high = (found.low, found.high) if difference >= 0 else (-found.high, -found.low)
        text += f" ({low:.2f} to {high:.2f})"
    return text


def _beside(signals: Sequence[Ranking], ceiling: float | None) -> str:
    inside = [f"{s.agreement.spearman or 0.0:.2f}" for s in signals if s.band and s.name == PREDICTOR]
    bands = f"; within bands of latency {', '.join(inside)}" if inside else ""
    return bands + ("" if ceiling is None else f"; ceiling {ceiling:.2f}")


def _in_bands(scores: Mapping[str, Scores], accuracy: np.ndarray, latency_ms: np.ndarray) -> list[Ranking]:
    """The same within equal shares of latency, where there are networks enough: a front is decided among networks of like latency."""
    if len(accuracy) < N_BANDS * MIN_IN_BAND:
        return []
    found = []
    for band in np.array_split(np.argsort(latency_ms, kind="stable"), N_BANDS):
        name = f"{latency_ms[band].min():.3g} to {latency_ms[band].max():.3g} ms"
        for signal, values in scores.items():
            share = dataclasses.replace(values, mean=values.mean[band], cpu_seconds=values.cpu_seconds * len(band) / len(accuracy))
            found.append(dataclasses.replace(_ranking(signal, share, accuracy[band]), band=name))
    return found
