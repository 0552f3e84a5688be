"""How surely does the gate of a search do without a useless predictor, and how often without a useful one?

    python benchmarks/gate_rule.py                       # a quarter of an hour; reads benchmarks/results/network_pool.json, trains nothing
    python benchmarks/gate_rule.py --studies studies/*   # adds how the predictor did in these searches

The gate looks at 24 fully trained networks and whenever there are a quarter more. What counts is the share of searches that do without the
signal after the look at n networks, whatever was judged before, beside a gate that begins to look at 12. Three ways:
- **drawn**: signal and outcome drawn from a bivariate normal of known Spearman, 20,000 searches each;
- **trained**: random networks of the closed pool in random order, really trained, judged by the gate's own cross-validation with the
  predictor of studies; with the accuracies as they are, and dealt out anew over the networks, which no predictor can foretell;
- **searches**: the records of real studies, judged as they stood when the n-th network had been trained whole. The committed ones are
  lowsearch-0 to 4 of front_quality.py --budget 1200; without --studies their Spearmans are kept, and judged by the rule of now.
Writes benchmarks/results/gate_rule.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from predictor_exam import records_of
from scipy.stats import rankdata

from lowsearch.accuracy.agreement import Agreement
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.space import SearchSpace
from lowsearch.study.gate import CONFIDENCE, GROWTH, MIN_NETWORKS, USEFUL, at_most, follows_next, judged_signals

RESULTS = Path(__file__).parent / "results"
RESULT = RESULTS / "gate_rule.json"
MOST = 60
TRUE_SPEARMANS = (0.0, 0.2, 0.4, 0.6, 0.8)
N_DRAWN, N_TRAINED = 20_000, 40
FIRST_LOOK = 12
"""Where the gate began to look before, and where the Spearman of a search is first reported."""


def looks() -> list[int]:
    """Networks at every judgement, of the gate and of the one that begins at `FIRST_LOOK`."""
    found = [FIRST_LOOK]
    while (more := int(np.ceil(GROWTH * found[-1]))) <= MOST:
        found.append(more)
    return found


Rule = Callable[[float, int, bool], bool]
"""Spearman, networks, whether the signal was followed so far -> whether it is from now on."""


def by_the_gate(rho: float, n: int, followed: bool) -> bool:
    return follows_next(Agreement(n_networks=n, spearman=rho), followed=followed)


def by_an_early_gate(rho: float, n: int, followed: bool) -> bool:
    return at_most(rho, n) > USEFUL if followed else rho >= USEFUL


def share_off(rhos: Sequence[Sequence[float]], rule: Rule) -> dict[str, float]:
    """Networks at a look -> share of the searches that do without the signal after it; `rhos` (n_looks, n_searches)."""
    followed = [True] * len(rhos[0])
    off = {}
    for n, row in zip(looks(), rhos, strict=True):
        followed = [rule(rho, n, before) for rho, before in zip(row, followed, strict=True)]
        off[str(n)] = round(1 - float(np.mean(followed)), 4)
    return off


def drawn(true: float) -> list[list[float]]:
    """Spearman at every look of every search, (n_looks, n_searches), of a signal whose true one is `true`."""
    rng = np.random.default_rng(0)
    correlation = 2 * np.sin(np.pi * true / 6)  # Of the normal whose Spearman is `true`.
    signal = rng.normal(size=(N_DRAWN, MOST))
    outcome = correlation * signal + np.sqrt(1 - correlation**2) * rng.normal(size=(N_DRAWN, MOST))
    found = []
    for n in looks():
        ranks = [rankdata(values[:, :n], axis=1) - (n + 1) / 2 for values in (signal, outcome)]
        found.append(((ranks[0] * ranks[1]).sum(axis=1) / np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))).tolist())
    return found


def trained(*, shuffled: bool) -> dict[str, Any]:
    pool = json.loads((RESULTS / "network_pool.json").read_text())
    space = SearchSpace.load(pool["space"])
    whole = [records_of(pool, row, space)[0] for row in pool["networks"]]
    untrained = AccuracyPredictor(space)

    def fit(records: Sequence[Any]) -> AccuracyPredictor:
        return copy.copy(untrained).fit(records)

    rhos = []
    for search in range(N_TRAINED):
        rng = np.random.default_rng([7, search])
        chosen = [whole[i] for i in rng.permutation(len(whole))[:MOST]]
        if shuffled:
            curves = [chosen[i].curve for i in rng.permutation(MOST)]
            chosen = [dataclasses.replace(record, curve=curve) for record, curve in zip(chosen, curves, strict=True)]
        found = [judged_signals(with_first_rung(chosen[:n]), space, fit)["steering"].spearman for n in looks()]
        rhos.append([-1.0 if rho is None else rho for rho in found])
    at_look = np.transpose(rhos).tolist()
    medians = {str(n): round(float(np.median(row)), 3) for n, row in zip(looks(), at_look, strict=True)}
    return {
        "searches": N_TRAINED,
        "off": share_off(at_look, by_the_gate),
        "off_by_an_early_gate": share_off(at_look, by_an_early_gate),
        "median_spearman": medians,
        "spearman": np.round(at_look, 4).tolist(),
    }


def searched(folder: Path) -> dict[str, Any]:
    """Steering's Spearman at every look of the study in `folder`."""
    space = SearchSpace.load(folder / "space.yaml")
    records = list(AccuracyRecords(folder / "records.jsonl"))
    untrained = AccuracyPredictor(space)
    found: dict[str, float] = {}
    whole: set[str] = set()
    for i, record in enumerate(records):
        if record.rung < 1 or record.arch_id in whole:
            continue
        whole.add(record.arch_id)
        if len(whole) in looks():
            rho = judged_signals(records[: i + 1], space, lambda known: copy.copy(untrained).fit(known))["steering"].spearman
            found[str(len(whole))] = -1.0 if rho is None else round(rho, 4)
    return {"study": folder.name, "data_hash": records[0].data_hash, "networks": len(whole), "spearman": found}


def off_at(spearmans: dict[str, float], rule: Rule) -> list[int]:
    """Networks at the looks after which a search of these Spearmans, by look, does without the signal."""
    followed, off = True, []
    for n, rho in spearmans.items():
        followed = rule(rho, int(n), followed)
        off += [] if followed else [int(n)]
    return off


def with_first_rung(records: Sequence[AccuracyRecord]) -> list[AccuracyRecord]:
    """Every record, and before it what it was half way."""
    half = [dataclasses.replace(r, rung=0.5, curve=tuple(p for p in r.curve if p.fraction <= 0.505)) for r in records]
    return [*half, *records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, nargs="+", metavar="FOLDER", help="studies whose searches are judged again")
    arguments = parser.parse_args()
    stored = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rhos = {str(true): drawn(true) for true in TRUE_SPEARMANS}
    result: dict[str, Any] = {
        "command": "python benchmarks/gate_rule.py", "first_look": MIN_NETWORKS, "useful": USEFUL, "confidence": CONFIDENCE,
        "searches_drawn": N_DRAWN,
        "drawn": {true: share_off(found, by_the_gate) for true, found in rhos.items()},
        "drawn_by_an_early_gate": {true: share_off(found, by_an_early_gate) for true, found in rhos.items()},
    }  # fmt: skip
    for how in ("drawn", "drawn_by_an_early_gate"):
        print(how)
        for true, shares in result[how].items():
            print(f"  Spearman {true}: " + "  ".join(f"{n}: {100 * share:.1f} %" for n, share in shares.items()), flush=True)
    result["searches"] = [searched(folder) for folder in arguments.studies] if arguments.studies else stored.get("searches", [])
    for found in result["searches"]:
        found |= {"off_at": off_at(found["spearman"], by_the_gate), "off_by_an_early_gate_at": off_at(found["spearman"], by_an_early_gate)}
        print(found, flush=True)
    result["trained"] = {"accuracies dealt out anew": trained(shuffled=True), "accuracies as they are": trained(shuffled=False)}
    for name, found in result["trained"].items():
        for how in ("off", "off_by_an_early_gate"):
            print(
                f"{name}, {how}: " + "  ".join(f"{n}: {100 * s:.0f} % ({found['median_spearman'][n]:.2f})" for n, s in found[how].items())
            )
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
