"""Whether a running search may go on believing its accuracy predictor, judged by the trainings it has anyway.

Two things rest on the predictor, and each is judged for itself on the networks that were trained on the whole schedule, every one
predicted by a predictor that was fitted without it. **Steering**: which networks are proposed is decided by their architecture alone, so
predictions by the architecture are held against outcomes; where they clearly fail, the search proposes at random, and trains to the end,
for only whole trainings teach and examine the predictor anew. **Promotion**: who trains on is decided by the forecast from the lowest rung
and the architecture; where that clearly fails, every network is trained to the end. Both are slower, and true. What failed has to earn
its trust: it is followed again once it ranks as a useful signal does. A judgement is a function of the records and the judgement before,
so that a resumed study judges as an uninterrupted one would.

Networks that were promoted are more alike than random ones, so this errs on the side of doubt; it is a smoke alarm. `lowsearch trust` is
the examination, on networks held out for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from lowsearch.accuracy.agreement import Agreement, agreement
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.space import SearchSpace
from lowsearch.study.parts import Record, Scorer

Signal = Literal["steering", "promotion"]
SIGNALS: tuple[Signal, ...] = ("steering", "promotion")
MIN_NETWORKS = 24
"""Fully trained networks before anything is judged. Of eleven others a predictor has learned little: at 12 to 19 networks one that ranks
well later looks useless in up to a fifth of the searches, at 24 in a tenth (benchmarks/gate_rule.py), and short ones end before its return.
"""
USEFUL = 0.4
"""A signal fails where its rank correlation is with CONFIDENCE below this, and is followed again where the estimate reaches it."""
CONFIDENCE = 0.9
"""One-sided, so the upper end of an 80 % interval is held against USEFUL. benchmarks/gate_rule.py: a signal of true Spearman 0 is off in
74 % of the searches at 24 networks, in 91 % at 38 and in 98 % at 60; one of .4 in 9 %, 15 % and 19 %, of .6 in less than 1 % throughout, of
.8 in none of 20,000. Coming back costs no power."""
GROWTH = 1.25
"""Judged anew with so many times as many fully trained networks: it takes seconds."""
FOLDS = 10
GATE = "gate.json"

Fit = Callable[[Sequence[Any]], Scorer | None]


def judged_signals(records: Sequence[Record], space: SearchSpace, fit: Fit) -> dict[Signal, Agreement]:
    """How both signals rank the fully trained networks, cross-validated over networks."""
    climbed: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.arch_id, r.rung)):
        climbed.setdefault(record.arch_id, []).append(record)
    full = [rungs for rungs in climbed.values() if rungs[-1].rung >= 1 and space.contains(rungs[-1].arch)]
    pairs: dict[Signal, list[tuple[float, float]]] = {"steering": [], "promotion": []}
    for fold in range(min(FOLDS, len(full))):
        held = {rungs[0].arch_id: rungs for rungs in full[fold::FOLDS]}
        scorer = fit([record for arch_id, rungs in climbed.items() if arch_id not in held for record in rungs])
        if scorer is None:
            return {signal: Agreement(n_networks=len(full)) for signal in SIGNALS}
        genomes = np.stack([space.encode(rungs[-1].arch) for rungs in held.values()])
        predicted = getattr(scorer, "predict_exact", scorer.predict)(genomes)[0]
        pairs["steering"] += [(float(p), rungs[-1].val_accuracy) for p, rungs in zip(predicted, held.values(), strict=True)]
        partly = [rungs for rungs in held.values() if rungs[0].rung < 1]
        pairs["promotion"] += [(scorer.predict_record(rungs[0])[0], rungs[-1].val_accuracy) for rungs in partly]
    return {signal: agreement([p for p, _ in pairs[signal]], [a for _, a in pairs[signal]]) for signal in SIGNALS}


def at_most(spearman: float, n_networks: int) -> float:
    """What the true rank correlation does with CONFIDENCE not exceed, by Fisher's z with the variance for ranks (Fieller et al., 1957)."""
    z = math.atanh(min(max(spearman, -0.999), 0.999)) + NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(1.06 / (n_networks - 3))
    return math.tanh(z)


def clearly_fails(found: Agreement) -> bool:
    """Whether a signal of this agreement ranks networks too poorly to be followed, and enough networks say so."""
    return found.n_networks >= MIN_NETWORKS and (found.spearman is None or at_most(found.spearman, found.n_networks) <= USEFUL)


def follows_next(found: Agreement, *, followed: bool) -> bool:
    """Whether a signal of this agreement is followed from now on, by whether it was so far."""
    return not clearly_fails(found) if followed else found.spearman is not None and found.spearman >= USEFUL


class Gate:
    """Asked before every proposal, by all workers in turn. What was judged last is in the study's folder."""

    def __init__(self, folder: Path, space: SearchSpace, fit: Fit, *, signals: Sequence[Signal] = SIGNALS) -> None:
        """`signals`: what the study follows."""
        self._path, self._space, self._fit = folder / GATE, space, fit
        self._signals: tuple[Signal, ...] = tuple(signals)
        self._stored = _stored(self._path)

    def follows(self, signal: Signal, *, trial: int) -> bool:
        """Whether trial number `trial` goes by `signal`. A trial keeps what it began with, however long it is under way."""
        return sum(change <= trial for change in _changes(self._stored, signal)) % 2 == 0

    def judge(self, records: Sequence[Record], *, n_trials: int) -> None:
        """Bring up to date what is followed, before trial number `n_trials` is proposed."""
        self._stored = _stored(self._path)
        n_full = len({r.arch_id for r in records if r.rung >= 1})
        if n_full < max(MIN_NETWORKS, GROWTH * self._stored.get("n_networks", 0)):
            return
        found, judged = judged_signals(records, self._space, self._fit), {}
        for signal in self._signals:
            followed = self.follows(signal, trial=n_trials)
            changed = follows_next(found[signal], followed=followed) != followed
            changes = [*_changes(self._stored, signal), *([n_trials] if changed else [])]
            judged[signal] = {"changes": changes, **dataclasses.asdict(found[signal])}
        self._stored = {"n_networks": n_full, **judged}
        write_atomically(self._path, json.dumps(self._stored, indent=1) + "\n")


def what_failed(folder: Path, signal: Signal) -> str:
    """One line about a study that did without `signal`, for good or for a while; empty where it was followed throughout."""
    stored = _stored(folder / GATE)
    changes = _changes(stored, signal)
    if not changes:
        return ""
    who, by, what = {
        "steering": (
            "the accuracy predictor",
            "its prediction by the architecture",
            "networks are drawn at random and trained on the whole schedule",
        ),
        "promotion": ("early stopping", "the forecast from the lowest rung", "every network is trained on the whole schedule"),
    }[signal]
    rho, n = stored[signal]["spearman"], stored[signal]["n_networks"]
    rank = "does not vary" if rho is None else f"ranks them with Spearman {rho:.2f}"
    ends = [f"{start} to {end - 1}" for start, end in zip(changes[::2], changes[1::2], strict=False)]
    if len(changes) % 2:
        most = "" if rho is None else f", with {CONFIDENCE:.0%} at most {at_most(rho, n):.2f}"
        since = " and ".join([f"in trials {', '.join(ends)}", f"from trial {changes[-1]} on"] if ends else [f"from trial {changes[-1]} on"])
        return f"{who} fails on {n} fully trained networks ({by} {rank}{most}); {since}, {what}"
    return f"{who} failed for a while: in trials {', '.join(ends)}, {what}; by now, on {n} fully trained networks, {by} {rank}"


def unjudged(n_networks: int) -> str:
    """Why a search with so many fully trained networks followed its signals as they were; empty where they were judged."""
    return "" if n_networks >= MIN_NETWORKS else f"too few for the search to judge its predictor, which it does from {MIN_NETWORKS} on"


def _changes(stored: Mapping[str, Any], signal: Signal) -> list[int]:
    """Numbers of the trials since which `signal` is no longer followed, followed again, and so on in turn."""
    return stored[signal]["changes"] if signal in stored else []


def _stored(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = [values[signal] for signal in SIGNALS if signal in values]
        if "n_networks" not in values or not all({"changes", "n_networks", "spearman"} <= one.keys() for one in found):
            raise ValueError("entries are missing")
    except (ValueError, AttributeError, TypeError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint="remove the file; the predictor is judged again") from error
    return values
