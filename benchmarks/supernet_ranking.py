"""Does a supernet rank networks as trainings of their own do? Trains one, scores networks that were really trained, compares.

    python benchmarks/supernet_ranking.py --minutes 20                                              # the example study's networks
    python benchmarks/supernet_ranking.py --minutes 60 --pool --data npz:cifar10.npz                # random ones: the closed pool

The networks are the fully trained ones of `--records`, or with `--pool` those of benchmarks/results/network_pool.json, whose data has to be
given. The supernet is trained for networks up to the largest of them. Spearman with the trained accuracy: of the inherited accuracy and
loss as they are, over all networks; and calibrated, on those networks that did not calibrate, over random choices of `--calibrating` ones.
Beside it MACs, params, and what the same few networks say without a supernet: a regression on MACs and params alone, and the accuracy
predictor. Resumable: the supernet and every score are kept in `--work`. Writes benchmarks/results/supernet_ranking-DATA.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from predictor_exam import records_of

from lowsearch import cost
from lowsearch.accuracy.agreement import agreement, spearman
from lowsearch.accuracy.predictor import SEED_STD, AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.accuracy.supernet import Calibration, SupernetEstimator, features_of
from lowsearch.arch import Arch
from lowsearch.data import load_data
from lowsearch.space import SearchSpace
from lowsearch.train.supernet import SupernetPlan, read_plan, steps_within, train_supernet

HERE = Path(__file__).parent
GOALS = {"inherited loss": 0.5, "calibrated": 0.7}
N_SPLITS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--records", type=Path, default=HERE.parent / "studies" / "example" / "records.jsonl")
    parser.add_argument("--pool", action="store_true", help="the networks of the closed pool instead")
    parser.add_argument("--networks", type=int, help="score so many at most, the first ones")
    parser.add_argument("--minutes", type=float, default=20, help="of training")
    parser.add_argument("--calibrating", type=int, default=16, help="networks that calibrate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path(".bench") / "supernet_ranking", help="folder of the supernet")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    data = load_data(arguments.data)
    space = SearchSpace.load(arguments.space).with_num_classes(len(data.classes))
    records = of_pool(space) if arguments.pool else [r for r in AccuracyRecords(arguments.records) if r.rung == 1.0]
    if any(record.data_hash != data.data_hash for record in records):
        raise SystemExit(f"the networks were trained on other images than {data.name} holds")
    trained: dict[Arch, list[AccuracyRecord]] = defaultdict(list)
    for record in records:
        if space.contains(record.arch):
            trained[record.arch].append(record)
    archs = list(trained)[: arguments.networks]
    max_macs = float(max(cost.count(arch).macs for arch in archs))

    plan = read_plan(arguments.work)
    if plan is None:
        plan = SupernetPlan(
            space=space.text, num_classes=space.num_classes, data=data.name, data_hash=data.data_hash, steps=1, max_macs=max_macs
        )  # fmt: skip
        plan = dataclasses.replace(plan, steps=steps_within(60 * arguments.minutes, plan, data, device=arguments.device))
        print(f"{plan.steps} steps, networks up to {max_macs / 1e6:.1f} M MACs", flush=True)
    train_supernet(plan, data, arguments.work, device=arguments.device, progress=said_every(100))
    scores = SupernetEstimator(arguments.work, data, device=arguments.device).score(archs, progress=said_every(10))

    accuracy = np.array([np.mean([r.val_accuracy for r in trained[arch]]) for arch in archs])
    features = features_of(scores)
    signals = {
        "inherited accuracy": features[:, 0], "inherited loss": -features[:, 1], "MACs": features[:, 2], "params": features[:, 3]
    }  # fmt: skip
    result: dict[str, Any] = {
        "command": "python benchmarks/supernet_ranking.py", "space": space.name, "data": data.name.partition(":")[0],
        "data_hash": data.data_hash, "networks_of": "network_pool.json" if arguments.pool else arguments.records.parent.name,
        "n_networks": len(archs), "accuracy_std": float(accuracy.std()), "steps": plan.steps, "images_a_step": plan.recipe.batch_size,
        "max_macs": plan.max_macs, "device": arguments.device, "inherited_accuracy_mean": float(features[:, 0].mean()),
        "signals": {name: dataclasses.asdict(agreement(values, accuracy)) for name, values in signals.items()},
        "calibrated": calibrated(space, trained, archs, features, accuracy, arguments.calibrating),
    }  # fmt: skip
    reached = {
        "inherited loss": result["signals"]["inherited loss"]["spearman"] or 0.0,
        "calibrated": result["calibrated"]["spearman"]["calibrated"]["mean"],
    }
    result["goals"], result["goals_met"] = GOALS, {name: reached[name] >= goal for name, goal in GOALS.items()}
    out = arguments.out or HERE / "results" / f"supernet_ranking-{result['data']}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)


def of_pool(space: SearchSpace) -> list[AccuracyRecord]:
    """The full trainings of the closed pool, in its fixed order."""
    pool = json.loads((HERE / "results" / "network_pool.json").read_text())
    return [record for row in pool["networks"] for record in records_of(pool, row, space)]


def calibrated(
    space: SearchSpace, trained: dict[Arch, list[AccuracyRecord]], archs: list[Arch], features: np.ndarray, accuracy: np.ndarray, n: int
) -> dict[str, Any]:
    """Spearman on the others after learning from `n` random networks, and how many accuracies the 90 % intervals hold."""
    rng = np.random.default_rng(0)
    noise = np.array([SEED_STD**2 / len(trained[arch]) for arch in archs])
    without = np.hstack([np.zeros((len(archs), 2)), features[:, 2:]])
    genomes = np.array([space.encode(arch) for arch in archs], dtype=np.int8)
    found: dict[str, list[float]] = defaultdict(list)
    held = []
    for _ in range(N_SPLITS):
        order = rng.permutation(len(archs))
        known, others = order[:n], order[n:]
        mean, std = Calibration(features[known], accuracy[known], noise[known]).predict(features[others])
        held.append(float(np.mean(np.abs(mean - accuracy[others]) < 1.645 * std)))
        alone = Calibration(without[known], accuracy[known], noise[known]).predict(without[others])[0]
        predictor = AccuracyPredictor(space).fit([record for i in known for record in trained[archs[i]]])
        guesses = {"calibrated": mean, "without a supernet": alone, "predictor": predictor.predict_exact(genomes[others])[0]}
        for name, values in guesses.items():
            found[name].append(spearman(values, accuracy[others]) or 0.0)
    return {
        "n_calibrating": n, "splits": N_SPLITS, "coverage_of_90_percent": float(np.mean(held)),
        "spearman": {
            name: {"mean": float(np.mean(values)), "low": float(np.quantile(values, 0.05)), "high": float(np.quantile(values, 0.95))}
            for name, values in found.items()
        },
    }  # fmt: skip


def said_every(n: int) -> Any:
    def say(done: int, total: int, label: str) -> None:
        if done % n == 0 or done == total:
            print(f"{label} {done}/{total}", flush=True)

    return say


def print_result(result: dict[str, Any]) -> None:
    print(f"{result['n_networks']} networks of {result['networks_of']}, supernet of {result['steps']} steps")
    for name, one in result["signals"].items():
        if one["spearman"] is not None and one["low"] is not None:
            print(f"{name:20s} Spearman {one['spearman']:.2f} (95 % {one['low']:.2f} to {one['high']:.2f})")
    fitted = result["calibrated"]
    for name, one in fitted["spearman"].items():
        print(f"{name:20s} Spearman {one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f}) from {fitted['n_calibrating']} networks")
    print(f"90 % intervals hold {fitted['coverage_of_90_percent']:.0%}")
    for name, met in result["goals_met"].items():
        print(f"goal {name} {result['goals'][name]}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
