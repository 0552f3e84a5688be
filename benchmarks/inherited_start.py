"""Does a training that starts from a supernet's weights need fewer epochs than one from random weights?

    python benchmarks/supernet_ranking.py --pool --data npz:cifar10.npz --minutes 60 --work supernet    # the supernet
    python benchmarks/inherited_start.py --data npz:cifar10.npz --supernet supernet                     # 20 minutes, two quiet cores
    python benchmarks/inherited_start.py --recompute                                                    # the table again

The networks are the first of the closed pool (`network_pool.py`): random ones, which the supernet was not made for. Each is trained by the
recipe `micro` for fewer and for all of its epochs, from random weights and from those that it inherits (also at a third of the learning
rate, as fine-tuning is done), with one seed, so on the same images in the same order. Printed: the mean validation accuracy, and the mean
gain over random weights, after as many epochs and after all, with its 95 % t interval over networks. Resumable: every training is kept
in `--work`. Writes benchmarks/results/inherited_start.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from controlled_pairs import effect, images
from network_pool import pool

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.space import SearchSpace
from lowsearch.train import recipe
from lowsearch.train.full import train_fully
from lowsearch.train.supernet import inherit, load_supernet, read_plan

RESULTS = Path(__file__).parent / "results" / "inherited_start.json"
STARTS = {"random": 1.0, "inherited": 1.0, "inherited-slow": 1 / 3}
"""With what share of the recipe's learning rate, which was made for random weights."""


def train_one(arch: Arch, epochs: int, start: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Metrics of one training, from its folder where it is finished there."""
    import torch

    torch.set_num_threads(1)
    data = images(arguments.data)
    schedule = dataclasses.replace(recipe("micro"), name=f"micro-{epochs}ep", epochs=epochs)
    schedule = dataclasses.replace(schedule, learning_rate=STARTS[start] * schedule.learning_rate)
    init = None if start == "random" else inherit(load_supernet(arguments.supernet), arch, data).state_dict()
    folder = arguments.work / f"{arch.arch_id}-{epochs}-{start}-s{arguments.seed}"
    return train_fully(arch, data, schedule, seed=arguments.seed, folder=folder, init=init)


def train_all(arguments: argparse.Namespace) -> dict[str, Any]:
    plan, data = read_plan(arguments.supernet), images(arguments.data)
    if plan is None or plan.data_hash != data.data_hash:
        raise SystemExit(f"{arguments.supernet} holds no supernet of these images: benchmarks/supernet_ranking.py makes one")
    space = SearchSpace.load("lowformer-micro").with_num_classes(len(data.classes))
    archs = pool(space, arguments.networks)[: arguments.networks]
    tasks = [(arch, epochs, start) for arch in archs for epochs in sorted(arguments.epochs, reverse=True) for start in STARTS]
    accuracy: dict[Arch, dict[str, float]] = {arch: {} for arch in archs}
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as workers:
        running = {workers.submit(train_one, *task, arguments): task for task in tasks}
        for done, future in enumerate(as_completed(running), start=1):
            (arch, epochs, start), metrics = running[future], future.result()
            accuracy[arch][f"{start} {epochs}"] = metrics["val_accuracy"]
            print(f"{done}/{len(tasks)} {arch.arch_id} {epochs} epochs, {start}: {100 * metrics['val_accuracy']:.2f} %", flush=True)
    return {
        "command": "python benchmarks/inherited_start.py", "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "data": data.name.partition(":")[0], "data_hash": data.data_hash, "seed": arguments.seed, "epochs": sorted(arguments.epochs),
        "supernet": {"supernet_hash": plan.supernet_hash, "steps": plan.steps, "max_macs": plan.max_macs},
        "networks": [
            {"arch_id": arch.arch_id, "macs": cost.count(arch).macs, "val_accuracy": accuracy[arch]} for arch in archs
        ],
    }  # fmt: skip


def statistics(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every start and schedule: mean accuracy, and the gain over all epochs from random weights."""
    columns = {
        key: [row["val_accuracy"][key] for row in result["networks"]]
        for key in (f"{start} {epochs}" for start in STARTS for epochs in result["epochs"])
    }
    whole = columns[f"random {max(result['epochs'])}"]
    rows = []
    for key, values in columns.items():
        start, epochs = key.split()
        rows.append({
            "start": start, "epochs": int(epochs), "val_accuracy_mean": float(np.mean(values)),
            "gain_over_whole_schedule_from_random": effect(whole, values),
            "gain_over_random_of_equal_epochs": effect(columns[f"random {epochs}"], values),
        })  # fmt: skip
    return rows


def show(result: dict[str, Any]) -> None:
    def points(found: dict[str, Any]) -> str:
        return f"{100 * found['mean']:+6.2f}" + (
            "" if found["low"] is None else f" ({100 * found['low']:+.2f} to {100 * found['high']:+.2f})"
        )

    print(f"{len(result['networks'])} networks, {result['data']}, a supernet of {result['supernet']['steps']} steps; points (95 %)")
    print(f"{'start':14} {'epochs':>6} {'accuracy':>9}  {'against equal epochs':26}  against all epochs from random")
    for row in result["statistics"]:
        equal, whole = points(row["gain_over_random_of_equal_epochs"]), points(row["gain_over_whole_schedule_from_random"])
        print(f"{row['start']:14} {row['epochs']:6} {100 * row['val_accuracy_mean']:7.2f} %  {equal:26}  {whole}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="npz:cifar10.npz", help="the images of the supernet")
    parser.add_argument("--supernet", type=Path, default=Path(".bench") / "supernet_ranking", help="its folder")
    parser.add_argument("--networks", type=int, default=12)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="networks that train side by side, one thread each")
    parser.add_argument("--work", type=Path, default=Path(".bench") / "inherited_start", help="where trainings are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recompute", action="store_true", help="statistics of what --out holds, without training")
    arguments = parser.parse_args()
    result = json.loads(arguments.out.read_text()) if arguments.recompute else train_all(arguments)
    result["statistics"] = statistics(result)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


if __name__ == "__main__":
    main()
