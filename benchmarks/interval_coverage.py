"""How often the accuracy predictor's 90 % intervals hold on real trainings that it was not fitted to.

    python benchmarks/interval_coverage.py      # two minutes on one core; writes benchmarks/results/interval_coverage.json

Cross-validated over networks, pooled over several ways of dividing them, on the records of a study (`--study`, default the committed
example: networks that its search chose) and on those of benchmarks/lowest_rung.py (random networks). Trains nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.space import SearchSpace

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "interval_coverage.json"
FOLDS, REPEATS = 5, 8
WIDTH_90 = 1.645
TARGET = (0.86, 0.94)


def of_study(folder: Path) -> tuple[SearchSpace, list[AccuracyRecord]]:
    records = list(AccuracyRecords(folder / "records.jsonl"))
    return SearchSpace.load(folder / "space.yaml").with_num_classes(records[0].arch.num_classes), records


def of_lowest_rung() -> tuple[SearchSpace, list[AccuracyRecord]]:
    """Seed 0 of the pilot's networks, cut to the rungs that a ladder has."""
    result = json.loads((HERE / "results" / "lowest_rung.json").read_text())
    full = [AccuracyRecord.from_dict(values) for values in result["records"]]
    found = []
    for record in (r for r in full if r.seed == 0 and r.rung == 1):
        half = tuple(p for p in record.curve if p.fraction < 0.505)
        found += [dataclasses.replace(record, rung=0.5, curve=half), record]
    return SearchSpace.load(result["space"]).with_num_classes(full[0].arch.num_classes), found


def coverage(space: SearchSpace, records: Sequence[AccuracyRecord]) -> dict[str, Any]:
    """Share of full-schedule accuracies within the intervals of a predictor that saw no record of their network."""
    full = {r.arch_id: r for r in records if r.rung >= 1}
    low = {r.arch_id: r for r in records if r.rung < 1}
    names = sorted({r.arch_id for r in records})
    inside: dict[str, list[bool]] = {"predict": [], "predict_exact": [], "forecast": []}
    widths: dict[str, list[float]] = {name: [] for name in inside}
    empty = AccuracyPredictor(space)
    for repeat in range(REPEATS):
        fold_of = dict(zip(names, np.random.default_rng(repeat).permutation(len(names)) % FOLDS, strict=True))
        for fold in range(FOLDS):
            predictor = empty.fit([r for r in records if fold_of[r.arch_id] != fold])
            held = [arch_id for arch_id in full if fold_of[arch_id] == fold and space.contains(full[arch_id].arch)]
            genomes = np.array([space.encode(full[arch_id].arch) for arch_id in held], dtype=np.int8).reshape(-1, space.n_genes)
            truth = np.array([full[arch_id].val_accuracy for arch_id in held])
            for name in ("predict", "predict_exact"):
                mean, std = getattr(predictor, name)(genomes)
                inside[name] += (np.abs(mean - truth) <= WIDTH_90 * std).tolist()
                widths[name] += std.tolist()
            for arch_id, accuracy in zip(held, truth, strict=True):
                if arch_id in low:
                    mean, std = predictor.forecast(low[arch_id])
                    inside["forecast"].append(bool(abs(mean - accuracy) <= WIDTH_90 * std))
                    widths["forecast"].append(std)
    return {
        "n_networks": len(names), "n_full": len(full),
        **{name: {"coverage": float(np.mean(hits)), "mean_std": float(np.mean(widths[name]))} for name, hits in inside.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=HERE.parent / "studies" / "example")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = {"command": "python benchmarks/interval_coverage.py", "date": time.strftime("%Y-%m-%d")}
    result |= {"nominal": 0.9, "folds": FOLDS, "repeats": REPEATS}
    result["records"] = {args.study.name: coverage(*of_study(args.study)), "random networks of lowest_rung": coverage(*of_lowest_rung())}
    for name, found in result["records"].items():
        print(f"{name}: {found['n_full']} networks trained fully, of {found['n_networks']}")
        for what in ("predict", "predict_exact", "forecast"):
            share = found[what]["coverage"]
            verdict = "as asked" if TARGET[0] <= share <= TARGET[1] else "off target"
            print(
                f"  {what:16} {100 * share:5.1f} % within 90 % intervals ({verdict}), mean std {100 * found[what]['mean_std']:.2f} points"
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
