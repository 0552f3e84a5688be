"""How well do trainings with one seed rank networks as trainings with another do? No predictor can be shown to rank better than that.

    OMP_NUM_THREADS=1 python benchmarks/seed_ceiling.py                                # Fashion-MNIST: 15 minutes, two quiet cores
    OMP_NUM_THREADS=1 python benchmarks/seed_ceiling.py --data npz:cifar10.npz
    python benchmarks/seed_ceiling.py --recompute benchmarks/results/seed_ceiling-npz.json

The networks are the first of the closed pool (`network_pool.py`), random and spread over the logarithm of their MACs, and every one is
trained on the whole schedule with every seed. Printed: Spearman between two seeds, the mean over pairs of seeds; what it says a perfect
predictor could reach against the mean of one, two, ... seeds (Spearman-Brown); how far networks and how far seeds lie apart; with 95 %
bootstrap intervals over networks. Resumable: a training on record is not repeated, nor one that benchmarks/results/network_pool.json
holds of the same images and recipe. Writes benchmarks/results/seed_ceiling-DATA.json.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from network_pool import FRACTIONS, RESULTS, kept, pool, train_side_by_side

from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.ladder import RECORDS
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.data import load_data
from lowsearch.space import SearchSpace
from lowsearch.study.trust import ceiling_of
from lowsearch.train import recipe

N_BOOTSTRAP = 2000
LEAST_NETWORKS, LEAST_SEEDS = 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--recipe", default="micro")
    parser.add_argument("--networks", type=int, default=LEAST_NETWORKS)
    parser.add_argument("--seeds", type=int, default=LEAST_SEEDS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--work", type=Path, default=Path(".bench") / "seed_ceiling", help="folder of records and checkpoints")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recompute", type=Path, metavar="FILE", help="statistics of the accuracies in FILE, without training")
    arguments = parser.parse_args()
    if arguments.recompute:
        out, result = arguments.recompute, json.loads(arguments.recompute.read_text())
    else:
        result = trained(arguments)
        out = arguments.out or RESULTS.parent / f"seed_ceiling-{result['data']}.json"
    result["statistics"] = statistics(np.array([row["accuracy"] for row in result["networks"]]))
    out.write_text(json.dumps(result, indent=1) + "\n")
    print_result(result)


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """The networks with their final accuracies by seed, those without all seeds left out; trains what is missing."""
    data = load_data(arguments.data)
    schedule = dataclasses.replace(recipe(arguments.recipe), evaluate_at=FRACTIONS)
    space = SearchSpace.load(arguments.space).with_num_classes(len(data.classes))
    archs, seeds = pool(space, arguments.networks)[: arguments.networks], range(arguments.seeds)
    expected = {"space": space.name, "data_hash": data.data_hash, "recipe_hash": schedule.recipe_hash}
    accuracy = {
        (row["arch_id"], int(seed)): curve[-1] for row in kept(RESULTS, expected) for seed, curve in row["accuracy"].items()
    }  # fmt: skip
    folder = arguments.work / data.data_hash
    todo = [(arch, seed) for seed in seeds for arch in archs if (arch.arch_id, seed) not in accuracy]
    train_side_by_side(argparse.Namespace(**{**vars(arguments), "work": folder}), data, schedule, todo)
    accuracy |= {(r.arch_id, r.seed): r.val_accuracy for r in AccuracyRecords(folder / RECORDS) if r.rung == 1.0}
    return {
        "command": "python benchmarks/seed_ceiling.py", **expected, "data": data.name.partition(":")[0], "images": len(data.train),
        "recipe": schedule.to_dict(),
        "networks": [
            {"arch_id": arch.arch_id, "accuracy": [accuracy[arch.arch_id, seed] for seed in seeds]}
            for arch in archs
            if all((arch.arch_id, seed) in accuracy for seed in seeds)
        ],
    }  # fmt: skip


def statistics(accuracy: np.ndarray) -> dict[str, Any]:
    """Of the accuracies (networks, seeds)."""
    n, n_seeds = accuracy.shape
    between = interval(between_seeds, accuracy)
    return {
        "n_networks": n, "n_seeds": n_seeds, "enough": n >= LEAST_NETWORKS and n_seeds >= LEAST_SEEDS,
        "spearman_between_seeds": between,
        "spearman_of_each_pair": {
            f"{a} and {b}": spearman(accuracy[:, a], accuracy[:, b]) for a, b in itertools.combinations(range(n_seeds), 2)
        },
        "ceiling_against_mean_of_seeds": {str(k): ceiling_of(between["value"], k) for k in range(1, n_seeds + 1)},
        "std_between_networks": float(accuracy.mean(1).std(ddof=1)),
        "std_between_seeds": interval(lambda drawn: float(np.sqrt(drawn.var(axis=1, ddof=1).mean())), accuracy),
    }  # fmt: skip


def between_seeds(accuracy: np.ndarray) -> float:
    """Mean Spearman of two columns."""
    pairs = itertools.combinations(range(accuracy.shape[1]), 2)
    return float(np.mean([spearman(accuracy[:, a], accuracy[:, b]) or 0.0 for a, b in pairs]))


def interval(of: Callable[[np.ndarray], float], accuracy: np.ndarray) -> dict[str, float]:
    """The statistic with its 95 % bootstrap interval over networks."""
    picks = np.random.default_rng(0).integers(len(accuracy), size=(N_BOOTSTRAP, len(accuracy)))
    low, high = np.quantile([of(accuracy[pick]) for pick in picks], [0.025, 0.975]).tolist()
    return {"value": of(accuracy), "low": low, "high": high}


def print_result(result: dict[str, Any]) -> None:
    found = result["statistics"]
    between, seeds = found["spearman_between_seeds"], found["std_between_seeds"]
    print(f"{found['n_networks']} networks x {found['n_seeds']} seeds, {result['data']}, {result['images']} training images")
    print(f"Spearman between two seeds {between['value']:.2f} (95 % {between['low']:.2f} to {between['high']:.2f})")
    for k, value in found["ceiling_against_mean_of_seeds"].items():
        print(f"a perfect predictor against the mean of {k}: {value or 0:.2f}")
    print(
        f"standard deviation between networks {100 * found['std_between_networks']:.2f} points, between seeds "
        f"{100 * seeds['value']:.2f} ({100 * seeds['low']:.2f} to {100 * seeds['high']:.2f})"
    )


if __name__ == "__main__":
    main()
