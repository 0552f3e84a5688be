"""How well does the accuracy predictor rank networks that it never saw? Random networks of the closed pool, really trained.

    python benchmarks/predictor_exam.py          # minutes; reads benchmarks/results/network_pool.json and trains nothing

- Held out: the first 64 networks of the pool's fixed order, trained with two seeds where the pool has them; the predictor learns from the
  full trainings of the others, by the architecture alone, nothing of a held-out curve. Beside it MACs and params; the difference to MACs
  is bootstrapped over networks, paired. The learning curve fits on the first n of the others.
- Cross-validated over all random networks, in ten folds: how many of the 90 % intervals hold, and the ranking inside bands of latency
  (±15 % around the quartiles, by the AMD table that comes with lowsearch), where MACs vary least and ranking is hardest.
- Seeds: how the trainings of one seed rank networks by those of another, which no predictor of single trainings can exceed by much.
- Rungs: accuracy, loss and the forecast of the curve model (and that of one without the loss) at parts of the schedule, against its end,
  of the other seed where a network has two; errors are those of the same training. Each forecast is by a model that saw the others.

Writes benchmarks/results/predictor_exam.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch.accuracy.agreement import agreement, lead, spearman
from lowsearch.accuracy.predictor import AccuracyPredictor, CurveModel
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "latency_tables" / "shipped" / "amd-epyc-f26-m2-2vcpu" / "onnxruntime-fp32-b1-t1.jsonl"
GOALS = {"spearman": 0.80, "spearman_low": 0.65, "above_macs": 0.15, "spearman_in_band": 0.5, "coverage": (0.86, 0.94), "rung": 0.85}
"""`rung`: of the forecast at half of the schedule, from which the ladder starts."""
BAND = 0.15
FOLDS = 10
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
        "cross_validated": cross_validated(pool, space),
        "learning_curve": [
            {"n": n, "spearman": rho(AccuracyPredictor(space).fit(known[:n]).predict_exact(genomes)[0], accuracy)}
            for n in LEARNING
            if n < len(known)
        ],
        "rungs": rungs(pool, space),
    }  # fmt: skip
    result["goals"], result["goals_met"] = GOALS, judge(result)
    (RESULTS / "predictor_exam.json").write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)


def cross_validated(pool: dict[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Predictions of every random network by a predictor that saw nine tenths of the others."""
    rows = [row for row in pool["networks"] if row["family"] is None]
    genomes = np.array([row["genome"] for row in rows], dtype=np.int8)
    records = [records_of(pool, row, space) for row in rows]
    mean, std = np.empty(len(rows)), np.empty(len(rows))
    predictor = AccuracyPredictor(space)
    for fold in range(FOLDS):
        held = np.arange(len(rows)) % FOLDS == fold
        predictor.fit([r for own, out in zip(records, held, strict=True) if not out for r in own])
        mean[held], std[held] = predictor.predict_exact(genomes[held])
    single = np.array([own[0].val_accuracy for own in records])  # The intervals are of one fresh training.
    accuracy = np.array([np.mean([r.val_accuracy for r in own]) for own in records])
    latency_ms = LatencyPredictor(space, LatencyTable.load(TABLE)).predict(genomes)[0]
    signals = {"predictor": mean, "macs": np.array([row["macs"] for row in rows])}
    bands = []
    for centre in np.quantile(latency_ms, (0.25, 0.5, 0.75)):
        inside = np.abs(latency_ms / centre - 1) <= BAND
        ranks = {name: dataclasses.asdict(agreement(values[inside], accuracy[inside])) for name, values in signals.items()}
        bands.append({"centre_ms": float(centre), **ranks})
    return {
        "n": len(rows), "spearman": rho(mean, accuracy), "rmse": float(np.sqrt(np.mean((mean - accuracy) ** 2))),
        "coverage_of_90_percent": float(np.mean(np.abs(mean - single) < 1.645 * std)), "bands": bands,
    }  # fmt: skip


def rungs(pool: dict[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Spearman of what is known at each part of the schedule with its end: of the other seed or, where no network has two, the same."""
    several = [row for row in pool["networks"] if len(row["accuracy"]) > 1]
    rows = several or pool["networks"]
    records = [records_of(pool, row, space) for row in rows]
    ends = np.array([own[-1].val_accuracy for own in records])
    curves = [own[0] for own in records]
    found: dict[str, Any] = {"n": len(rows), "between_seeds": bool(several)}
    if several:
        found["ceiling"] = dataclasses.asdict(agreement([curve.val_accuracy for curve in curves], ends))
        found["seed_std"] = float(np.sqrt(np.mean([np.var([r.val_accuracy for r in own], ddof=1) for own in records])))
    for i, fraction in enumerate(pool["fractions"][:-1]):
        points = [curve.curve[i] for curve in curves]
        forecasts = {"forecast": points, "forecast without loss": [dataclasses.replace(p, val_loss=math.nan) for p in points]}
        found[str(fraction)] = {
            "accuracy": rho(np.array([point.val_accuracy for point in points]), ends),
            "loss": rho(np.array([-point.val_loss for point in points]), ends),
        }
        for name, seen in forecasts.items():
            guesses = np.empty(len(rows))
            for fold in range(FOLDS):
                known = [
                    dataclasses.replace(c, curve=(p, c.curve[-1]))
                    for j, (c, p) in enumerate(zip(curves, seen, strict=True))
                    if j % FOLDS != fold
                ]
                model = CurveModel(known)
                guesses[fold::FOLDS] = [model.extrapolate(point)[0] for point in seen[fold::FOLDS]]
            own = np.array([curve.val_accuracy for curve in curves])
            found[str(fraction)] |= {
                name: rho(guesses, ends),
                f"{name}, rmse in points": 100 * float(np.sqrt(np.mean((guesses - own) ** 2))),
            }
    return found


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
        "spearman_in_band": result["cross_validated"]["bands"][1]["predictor"]["spearman"] >= GOALS["spearman_in_band"],
        "coverage": low <= result["cross_validated"]["coverage_of_90_percent"] <= high,
        "rung": result["rungs"]["0.5"]["forecast"] >= GOALS["rung"],
    }  # fmt: skip


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['n_held_out']} held-out networks, learned from {result['n_learned_from']} trainings")
    for name, one in result["signals"].items():
        print(f"{name:10s} Spearman {one['spearman']:.2f} (95 % {one['low']:.2f} to {one['high']:.2f}), Kendall {one['kendall']:.2f}")
    more = result["above_macs"]
    print(f"above MACs by {more['difference']:.2f} (95 % {more['low']:.2f} to {more['high']:.2f})")
    print(f"90 % intervals hold {result['coverage_of_90_percent']:.0%}; root mean square error {100 * result['rmse']:.2f} points")
    print("learned from " + ", ".join(f"{row['n']}: {row['spearman']:.2f}" for row in result["learning_curve"]))
    crossed = result["cross_validated"]
    print(
        f"cross-validated over {crossed['n']}: Spearman {crossed['spearman']:.2f}, intervals hold {crossed['coverage_of_90_percent']:.0%}"
    )
    for band in crossed["bands"]:
        ours, macs = band["predictor"], band["macs"]
        print(f"within 15 % of {band['centre_ms']:.3f} ms ({ours['n_networks']} networks): predictor {ours['spearman']:.2f}"
              f" (95 % {ours['low']:.2f} to {ours['high']:.2f}), MACs {macs['spearman']:.2f}")  # fmt: skip
    rungs = result["rungs"]
    if rungs["between_seeds"]:
        print(f"two seeds of {rungs['n']} networks: Spearman {rungs['ceiling']['spearman']:.2f}, std {100 * rungs['seed_std']:.2f} points")
    for fraction in (key for key in rungs if key[0].isdigit()):
        print(f"at {fraction} of the schedule: " + ", ".join(f"{what} {value:.2f}" for what, value in rungs[fraction].items()))
    for name, met in result["goals_met"].items():
        print(f"goal {name} {result['goals'][name]}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
