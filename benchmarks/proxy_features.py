"""Do training-free proxies rank trained networks, and does the accuracy predictor become better by knowing them?

    OMP_NUM_THREADS=1 python benchmarks/proxy_features.py --data npz:cifar10.npz      # minutes; trains nothing
    python benchmarks/proxy_features.py                                               # again, with the proxies of the stored result

The networks and their accuracies are those of benchmarks/results/network_pool.json, the proxies are computed on 64 of the training images
that the networks learned from. Alone: Spearman with the accuracy, over all networks, beside MACs and params. In the predictor: each as one
more feature of the Gaussian process (its ranks, as normal scores), and all together; learned from random n of the networks that are not
held out, asked of the held-out ones. The gain is the mean over draws of the difference in Spearman, with and without, with a 90 % interval
from a bootstrap over held-out networks. A proxy helps where the interval is above zero. Writes benchmarks/results/proxy_features.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from predictor_exam import records_of, rho
from scipy.stats import norm, rankdata

from lowsearch.accuracy.agreement import _spearmans
from lowsearch.accuracy.gaussian import Points
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.proxies import proxy_scores
from lowsearch.data import Split, load_data
from lowsearch.files import write_atomically
from lowsearch.space import SearchSpace

HERE = Path(__file__).parent / "results"
RESULTS = HERE / "proxy_features.json"
BATCH = 64
LEARNED_FROM = (15, 40, 75)
DRAWS = 10
RESAMPLES = 1000
FEATURE_SCALE = 0.5
"""Of a normal score among features whose length is about one in sum: a proxy may count as much as a quarter of the architecture."""


class WithProxies(AccuracyPredictor):
    """The predictor with normal scores (n_networks, k) as further features of the networks `genomes` (n_networks, n_genes)."""

    def __init__(self, space: SearchSpace, genomes: np.ndarray, scores: np.ndarray) -> None:
        self._rows = {genome.tobytes(): row for genome, row in zip(genomes, FEATURE_SCALE * scores, strict=True)}
        self._width = scores.shape[1]
        super().__init__(space)

    def _points(self, genomes: np.ndarray) -> Points:
        points = super()._points(genomes)
        more = np.array([self._rows[genome.tobytes()] for genome in genomes]).reshape(len(genomes), self._width)
        return Points(cost=points.cost, features=np.hstack([points.features, more]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the images of the pool; without them the stored proxies are judged again")
    arguments = parser.parse_args()
    pool = json.loads((HERE / "network_pool.json").read_text())
    space = SearchSpace.load(pool["space"])
    rows = pool["networks"]
    genomes = space.canonical(np.array([row["genome"] for row in rows], dtype=np.int8))
    if arguments.data is None:
        stored = json.loads(RESULTS.read_text())["scores"]
        scores = {name: np.array([values[row["arch_id"]] for row in rows]) for name, values in stored.items()}
    else:
        scores = computed(arguments.data, pool, genomes)
    ids = [row["arch_id"] for row in rows]
    result: dict[str, Any] = {
        "command": "python benchmarks/proxy_features.py", "data": pool["data"], "networks": len(rows), "draws": DRAWS,
        "alone": alone(scores, rows), "in_predictor": in_predictor(pool, space, genomes, scores),
        "scores": {name: {i: float(f"{v:.6g}") for i, v in zip(ids, values, strict=True)} for name, values in scores.items()},
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result) + "\n")


def computed(data_name: str, pool: dict[str, Any], genomes: np.ndarray) -> dict[str, np.ndarray]:
    space = SearchSpace.load(pool["space"])
    data = load_data(data_name)
    if data.data_hash != pool["data_hash"]:
        raise SystemExit(f"the pool was trained on other images than {data_name} holds")
    space = space.with_num_classes(len(data.classes))
    chosen = np.random.default_rng(0).choice(len(data.train), BATCH, replace=False)
    batch = Split(images=data.train.images[chosen], labels=data.train.labels[chosen])

    def progress(done: int, of: int, what: str) -> None:
        if done % 20 == 0:
            print(f"{what}: {done} of {of} networks", flush=True)

    found = proxy_scores([space.decode(genome) for genome in genomes], batch, progress=progress)
    return {name: scores.mean for name, scores in found.items()}


def accuracies(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([np.mean([curve[-1] for curve in row["accuracy"].values()]) for row in rows])


def alone(scores: dict[str, np.ndarray], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman with the accuracy, of proxies, MACs and params."""
    beside = {name: np.array([row[name] for row in rows], dtype=float) for name in ("macs", "params")}
    found = {name: rho(values, accuracies(rows)) for name, values in {**beside, **scores}.items()}
    print("Spearman with the accuracy: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def in_predictor(pool: dict[str, Any], space: SearchSpace, genomes: np.ndarray, scores: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """For every proxy, and all of them, what the predictor gains by it."""
    held = np.array([row["held_out"] for row in pool["networks"]])
    records = [records_of(pool, row, space) for row in pool["networks"]]
    truth = accuracies(pool["networks"])[held]
    normal = {name: norm.ppf((rankdata(values) - 0.5) / len(values)) for name, values in scores.items()}
    drawn = [np.random.default_rng(i).permutation(np.flatnonzero(~held)) for i in range(DRAWS)]
    groups = {"none": [], **{name: [name] for name in normal}, "all": list(normal)}
    predictors = {
        name: WithProxies(space, genomes, np.stack([normal[n] for n in names], axis=1) if names else np.empty((len(genomes), 0)))
        for name, names in groups.items()
    }
    resamples = np.random.default_rng(0).integers(held.sum(), size=(RESAMPLES, held.sum()))
    found = []
    for n in LEARNED_FROM:
        ranks: dict[str, np.ndarray] = {}
        for name, predictor in predictors.items():
            guesses = [predictor.fit([r for i in order[:n] for r in records[i]]).predict_exact(genomes[held])[0] for order in drawn]
            ranks[name] = np.mean([_spearmans(guess[resamples], truth[resamples]) for guess in guesses], axis=0)
            whole = float(np.mean([rho(guess, truth) for guess in guesses]))
            gain = ranks[name] - ranks["none"]
            low, high = np.quantile(gain, (0.05, 0.95))
            found.append({"proxy": name, "learned_from": n, "spearman": whole, "gain_low": float(low), "gain_high": float(high)})
            print(f"learned from {n} with {name}: Spearman {whole:.3f}, gain {low:+.3f} to {high:+.3f}", flush=True)
    return found


if __name__ == "__main__":
    main()
