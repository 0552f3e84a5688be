"""Really trained networks of the micro space, as a closed pool that samplers and predictors are judged on.

    OMP_NUM_THREADS=1 python benchmarks/network_pool.py --data npz:cifar10.npz --work /tmp/pool                      # CPU: hours
    OMP_NUM_THREADS=1 python benchmarks/network_pool.py --data npz:cifar10.npz --work /tmp/pool --device cuda --workers 14

Random networks, spread evenly over the logarithm of their MACs up to what the hand-made family needs, and the family: the same order
for every number of networks. All are trained on the whole schedule with the first seed, then the held-out ones, and then all others,
with the second. Resumable: a training on record is not repeated, nor one that `--out` holds of the same images and recipe, so that a
pool can grow on another machine. Ends after `--minutes`, at the end of a training. Writes benchmarks/results/network_pool.json: for every
network its genome, MACs, params, the accuracies of its curves, and on what each was trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.ladder import RECORDS, Ladder
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.arch import Arch
from lowsearch.data import ImageData, load_data
from lowsearch.space import SearchSpace
from lowsearch.train import Recipe, recipe

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1)
HELD_OUT = 64
"""The first so many networks: nothing is fitted on them. Frozen with the order."""
MAX_MACS = 13e6
"""The slowest member of the hand-made family has 12.8 M: beyond it nothing competes."""
_SAMPLES = 40_000
RESULTS = Path(__file__).parent / "results" / "network_pool.json"


def pool(space: SearchSpace, n: int) -> list[Arch]:
    """The first `n` networks of a fixed order, each from a random place on the scale of log MACs; then the family."""
    rng = np.random.default_rng(2026)
    genomes = np.unique(space.sample(_SAMPLES, rng=rng), axis=0)
    macs = space.block_sums(np.array([[cost.of_block(block).macs] for block in space.blocks], dtype=float))(genomes)[:, 0]
    order = np.argsort(macs, kind="stable")
    genomes, log_macs = genomes[order], np.log(macs[order])
    chosen: dict[Arch, None] = {}
    while len(chosen) < n:
        wanted = rng.uniform(log_macs[0], np.log(MAX_MACS))
        chosen.setdefault(space.decode(genomes[min(int(np.searchsorted(log_macs, wanted)), len(genomes) - 1)]))
    return [*chosen, *(arch for arch in space.family.values() if arch not in chosen)]


def jobs(archs: list[Arch], n_seeds: int) -> list[tuple[Arch, int]]:
    """Every training in the order of its worth: all networks with the first seed, then, the held-out ones first, with the second."""
    return [(arch, seed) for seed in SEEDS[:n_seeds] for arch in archs]


def kept(out: Path, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """The networks that `out` holds already, if they were trained on the same images by the same recipe."""
    stored = json.loads(out.read_text()) if out.exists() else {}
    return stored["networks"] if all(stored.get(key) == value for key, value in expected.items()) else []


def work(
    number: int, arguments: argparse.Namespace, data: ImageData, schedule: Recipe, trainings: list[tuple[Arch, int]], todo: Any, ends: float
) -> None:
    """One worker: takes the next training until none is left or the time is up."""
    import torch

    torch.set_num_threads(1)
    seeds = {seed for _, seed in trainings}
    ladders = {seed: Ladder(data, schedule, folder=arguments.work, rungs=(1.0,), seed=seed, device=arguments.device) for seed in seeds}
    while time.time() < ends:
        with todo.get_lock():
            index, todo.value = todo.value, todo.value + 1
        if index >= len(trainings):
            return
        arch, seed = trainings[index]
        began = time.perf_counter()
        record = ladders[seed].run(arch, 1.0)
        ladders[seed].discard(arch)
        if index % 20 == 0:
            seconds = time.perf_counter() - began
            print(f"{index:4} of {len(trainings)} worker {number}: {100 * record.val_accuracy:.2f} % in {seconds:.1f} s", flush=True)


def train_side_by_side(arguments: argparse.Namespace, data: ImageData, schedule: Recipe, trainings: list[tuple[Arch, int]]) -> None:
    """Run `trainings` in `workers` processes, records and checkpoints in `work`, until `minutes` are over: all fields of `arguments`."""
    processes = multiprocessing.get_context("fork")
    todo, ends = processes.Value("i", 0), time.time() + 60 * arguments.minutes
    workers = [processes.Process(target=work, args=(i, arguments, data, schedule, trainings, todo, ends)) for i in range(arguments.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def to_rows(
    space: SearchSpace, archs: list[Arch], records: list[AccuracyRecord], before: list[dict[str, Any]], device: str
) -> list[dict[str, Any]]:
    """What is kept of every trained network: `before`, and the full trainings among `records`, which ran on `device`."""
    found = {(record.arch_id, record.seed): record for record in records if record.rung == 1.0}
    earlier = {row["arch_id"]: row for row in before}
    family = {arch.arch_id: name for name, arch in space.family.items()}
    rows = []
    for number, arch in enumerate(archs):
        old = earlier.get(arch.arch_id, {})
        curves = {str(seed): found[arch.arch_id, seed].curve for seed in SEEDS if (arch.arch_id, seed) in found}
        if not curves and not old:
            continue
        counted = cost.count(arch)
        rows.append({
            "arch_id": arch.arch_id, "family": family.get(arch.arch_id), "held_out": number < HELD_OUT,
            "genome": space.encode(arch).tolist(), "macs": counted.macs, "params": counted.params,
            "accuracy": {**{seed: [round(p.val_accuracy, 5) for p in curve] for seed, curve in curves.items()}, **old.get("accuracy", {})},
            "loss": {**{seed: [round(p.val_loss, 4) for p in curve] for seed, curve in curves.items()}, **old.get("loss", {})},
            "device": {**dict.fromkeys(curves, device), **old.get("device", {})},
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--recipe", default="micro")
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, choices=(1, 2))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--work", type=Path, required=True, help="folder of records and checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began = time.time()
    data = load_data(arguments.data)
    schedule = dataclasses.replace(recipe(arguments.recipe), evaluate_at=FRACTIONS)
    space = SearchSpace.load(arguments.space).with_num_classes(len(data.classes))
    archs = pool(space, arguments.networks)
    expected = {"space": space.name, "data_hash": data.data_hash, "recipe_hash": schedule.recipe_hash}
    before = kept(arguments.out, expected)
    done = {(row["arch_id"], int(seed)) for row in before for seed in row["accuracy"]}
    trainings = [(arch, seed) for arch, seed in jobs(archs, arguments.seeds) if (arch.arch_id, seed) not in done]
    train_side_by_side(arguments, data, schedule, trainings)
    records = list(AccuracyRecords(arguments.work / RECORDS))
    rows = to_rows(space, archs, records, before, arguments.device)
    versions = next((dict(record.versions) for record in records), {})
    result = {
        **expected, "data": data.name.partition(":")[0], "images": len(data.train),
        "recipe": schedule.to_dict(), "fractions": FRACTIONS, "held_out": HELD_OUT,
        "machine": platform.machine(), "versions": versions, "networks": rows,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    n_trainings = sum(len(row["accuracy"]) for row in rows)
    print(f"{len(rows)} networks, {n_trainings} trainings, {time.time() - began:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
