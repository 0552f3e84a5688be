"""How well does the accuracy predictor rank networks that it never saw? Held-out random networks of the closed pool, really trained.

    python benchmarks/predictor_exam.py          # a minute; reads benchmarks/results/network_pool.json and trains nothing

The first 64 networks of the pool's fixed order are held out, the predictor learns from the full trainings of the others: by the
architecture alone, nothing of a held-out curve. Beside it, on the same networks, MACs and params; the difference to MACs is bootstrapped
over networks, paired. The networks are random, spread over log MACs; inside a third of them, MACs vary least and the ranking is hardest.
The learning curve fits on the first n of the others. Writes benchmarks/results/predictor_exam.json.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch.accuracy.agreement import agreement, lead, spearman
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint

RESULTS = Path(__file__).parent / "results"
GOALS = {"spearman": 0.80, "spearman_low": 0.65, "above_macs": 0.15, "spearman_in_bands": 0.5, "coverage": (0.86, 0.94)}
N_BANDS = 3
LEARNING = (6, 12, 20, 30, 45, 60)


def records_of(pool: dict[str, Any], row: dict[str, Any], space: SearchSpace) -> list[AccuracyRecord]:
    """The full trainings of one network of the pool."""
    found = []
    for seed, accuracies in row["accuracy"].items():
        curve = tuple(
            CurvePoint(fraction=f, step=0, train_loss=0.0, val_accuracy=a, val_loss=loss, cpu_seconds=0.0)
            for f, a, loss in zip(pool["fractions"], accuracies, row["loss"][seed], strict=True)
        )
        found.append(
            AccuracyRecord(
                arch=space.decode(np.array(row["genome"], dtype=np.int8)), recipe=pool["recipe"]["name"], recipe_hash=pool["recipe_hash"],
                data=pool["data"], data_hash=pool["data_hash"], seed=int(seed), rung=1.0, curve=curve,
            )
        )  # fmt: skip
    return found


def main() -> None:
    pool = json.loads((RESULTS / "network_pool.json").read_text())
    space = SearchSpace.load(pool["space"])
    rows = {held: [row for row in pool["networks"] if row["held_out"] == held] for held in (True, False)}
    genomes = np.array([row["genome"] for row in rows[True]], dtype=np.int8)
    accuracy = np.array([np.mean([curve[-1] for curve in row["accuracy"].values()]) for row in rows[True]])
    beside = {name: np.log([row[name] for row in rows[True]]) for name in ("macs", "params")}
    known = [record for row in rows[False] for record in records_of(pool, row, space)]

    mean, std = AccuracyPredictor(space).fit(known).predict_exact(genomes)
    signals = {"predictor": mean, **beside}
    more = lead(mean, beside["macs"], accuracy)
    assert more is not None, "scores that vary, of enough networks"
    result: dict[str, Any] = {
        "command": "python benchmarks/predictor_exam.py", "n_held_out": len(accuracy), "n_learned_from": len(known),
        "seeds_of_held_out": max(len(row["accuracy"]) for row in rows[True]), "accuracy_std": float(accuracy.std()),
        "rmse": float(np.sqrt(np.mean((mean - accuracy) ** 2))),
        "coverage_of_90_percent": float(np.mean(np.abs(mean - accuracy) < 1.645 * std)),
        "signals": {name: dataclasses.asdict(agreement(values, accuracy)) for name, values in signals.items()},
        "above_macs": dataclasses.asdict(more),
        "bands": bands(signals, beside["macs"], accuracy),
        "learning_curve": [
            {"n": n, "spearman": rho(AccuracyPredictor(space).fit(known[:n]).predict_exact(genomes)[0], accuracy)}
            for n in LEARNING
            if n < len(known)
        ],
        "rungs": rungs(pool),
    }  # fmt: skip
    result["goals"], result["goals_met"] = GOALS, judge(result)
    (RESULTS / "predictor_exam.json").write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)


def bands(signals: dict[str, np.ndarray], macs: np.ndarray, accuracy: np.ndarray) -> list[dict[str, float]]:
    """Spearman of every signal within thirds by MACs."""
    parts = np.array_split(np.argsort(macs, kind="stable"), N_BANDS)
    return [
        {
            "n": len(i),
            "spread_of_macs": float(np.exp(np.ptp(macs[i]))),
            **{name: rho(values[i], accuracy[i]) for name, values in signals.items()},
        }
        for i in parts
    ]


def rungs(pool: dict[str, Any]) -> dict[str, float]:
    """Spearman of the accuracy at each fraction of the schedule with the last, over all networks, same seed."""
    curves = np.array([next(iter(row["accuracy"].values())) for row in pool["networks"]])
    return {str(fraction): rho(curves[:, i], curves[:, -1]) for i, fraction in enumerate(pool["fractions"][:-1])}


def rho(a: np.ndarray, b: np.ndarray) -> float:
    value = spearman(a, b)
    assert value is not None, "scores that do not vary"
    return value


def judge(result: dict[str, Any]) -> dict[str, bool]:
    ours = result["signals"]["predictor"]
    low, high = GOALS["coverage"]
    return {
        "spearman": ours["spearman"] >= GOALS["spearman"], "spearman_low": ours["low"] >= GOALS["spearman_low"],
        "above_macs": result["above_macs"]["difference"] >= GOALS["above_macs"],
        "spearman_in_bands": min(band["predictor"] for band in result["bands"]) >= GOALS["spearman_in_bands"],
        "coverage": low <= result["coverage_of_90_percent"] <= high,
    }  # fmt: skip


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['n_held_out']} held-out networks, learned from {result['n_learned_from']} trainings")
    for name, one in result["signals"].items():
        print(f"{name:10s} Spearman {one['spearman']:.2f} (95 % {one['low']:.2f} to {one['high']:.2f}), Kendall {one['kendall']:.2f}")
    more = result["above_macs"]
    print(f"above MACs by {more['difference']:.2f} (95 % {more['low']:.2f} to {more['high']:.2f})")
    for band in result["bands"]:
        print(f"band of {band['n']} within {band['spread_of_macs']:.1f}x MACs: predictor {band['predictor']:.2f}, MACs {band['macs']:.2f}")
    print(f"90 % intervals hold {result['coverage_of_90_percent']:.0%}; root mean square error {100 * result['rmse']:.2f} points")
    print("learned from " + ", ".join(f"{row['n']}: {row['spearman']:.2f}" for row in result["learning_curve"]))
    print("rungs " + ", ".join(f"{fraction}: {value:.2f}" for fraction, value in result["rungs"].items()))
    for name, met in result["goals_met"].items():
        print(f"goal {name} {result['goals'][name]}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
