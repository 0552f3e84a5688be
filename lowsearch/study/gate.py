"""Whether a running search may go on steering by its accuracy predictor, judged by the trainings it has anyway.

Every network that was trained on the whole schedule is foretold from its lowest rung and its architecture, by a predictor that was
fitted without it; the rank correlation of forecasts and outcomes says what the forecasts are worth. Where it clearly fails, the rest
of the search proposes at random and trains whatever it proposes to the end: that is slower, and true. A judgement is a function of the
fully trained networks alone, so that a resumed study judges as an uninterrupted one would.

Only networks that earned it are trained to the end, and they are more alike than random ones, so this errs on the side of doubt; it
is a smoke alarm. `lowsearch trust` is the examination, on networks held out for it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowsearch.accuracy.agreement import Agreement, agreement
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.study.parts import Record, Scorer

MIN_NETWORKS = 12
"""Fully trained networks before anything is judged."""
HOPELESS = 0.2
"""Steering ends where the upper end of the 95 % interval of the rank correlation is no higher."""
GROWTH = 1.25
FOLDS = 10
STEERING = "steering.json"

Fit = Callable[[Sequence[Any]], Scorer | None]


def forecast_agreement(records: Sequence[Record], fit: Fit) -> Agreement:
    """Forecasts from the lowest rung and the architecture against the full schedule, cross-validated over networks."""
    climbed: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.arch_id, r.rung)):
        climbed.setdefault(record.arch_id, []).append(record)
    pairs = {arch_id: rungs for arch_id, rungs in climbed.items() if rungs[0].rung < 1 <= rungs[-1].rung}
    forecasts, outcomes = [], []
    for fold in range(min(FOLDS, len(pairs))):
        held = [rungs for i, rungs in enumerate(pairs.values()) if i % FOLDS == fold]
        scorer = fit([r for i, rungs in enumerate(pairs.values()) if i % FOLDS != fold for r in rungs])
        if scorer is None:
            return Agreement(n_networks=len(pairs))
        forecasts += [scorer.predict_record(rungs[0])[0] for rungs in held]
        outcomes += [rungs[-1].val_accuracy for rungs in held]
    return agreement(forecasts, outcomes)


def clearly_fails(found: Agreement) -> bool:
    """Whether forecasts of this agreement rank networks no better than about at random, and enough networks say so."""
    return found.n_networks >= MIN_NETWORKS and (found.high is None or found.high <= HOPELESS)


class SteeringGate:
    """Asked before every proposal, by all workers in turn. What was judged last is in the study's folder; once ended, it stays so."""

    def __init__(self, folder: Path, fit: Fit) -> None:
        self._path, self._fit = folder / STEERING, fit
        self.ended = (_stored(self._path) or {"ended_at_trial": None})["ended_at_trial"] is not None

    def judge(self, records: Sequence[Record], *, n_trials: int) -> None:
        """Bring `ended` up to date. Judged anew with GROWTH times as many fully trained networks: it takes a second."""
        last = _stored(self._path) or {"n_networks": 0, "ended_at_trial": None}
        self.ended = last["ended_at_trial"] is not None
        n_full = len({r.arch_id for r in records if r.rung >= 1})
        if self.ended or n_full < max(MIN_NETWORKS, GROWTH * last["n_networks"]):
            return
        found = forecast_agreement(records, self._fit)
        self.ended = clearly_fails(found)
        values = {"ended_at_trial": n_trials if self.ended else None, **dataclasses.asdict(found)}
        write_atomically(self._path, json.dumps(values, indent=1) + "\n")


def why_steering_ended(folder: Path) -> str:
    """One line about a study whose predictor failed; empty where it steers."""
    last = _stored(folder / STEERING)
    if last is None or last["ended_at_trial"] is None:
        return ""
    rho, high = last["spearman"], last["high"]
    rank = "does not vary" if rho is None else f"ranks them with Spearman {rho:.2f}, at most {high:.2f}"
    return (
        f"the accuracy predictor fails on {last['n_networks']} fully trained networks (its forecast {rank}); "
        f"from trial {last['ended_at_trial']} on, networks are drawn at random and all trained on the whole schedule"
    )


def _stored(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not {"ended_at_trial", "n_networks", "spearman", "high"} <= values.keys():
            raise ValueError("entries are missing")
    except (ValueError, AttributeError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint="remove the file; the predictor is judged again") from error
    return values
