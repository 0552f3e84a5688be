"""What does one choice of design change in a trained network, and does a longer schedule change the answer?

    python benchmarks/controlled_pairs.py                    # about 20 minutes on two quiet cores; resumes where it stopped
    python benchmarks/controlled_pairs.py --recompute        # the tables again from the stored scores, without training

One micro network and variants of it that differ in one choice: a block more in a stage, no attention (in a stage, or at all), a smaller
MLP or none (and then no norm before the attention either, as in LowFormer-E3). Every variant and the network are trained with the same
seeds, so with the same order of images, by the recipe `micro` at once and three times its epochs. An effect is the mean over seeds of
(variant - network) in validation accuracy, with a 95 % t interval. Two networks flip where the mean says the one is better on the short
schedule and the other on the long; a flip is clear where both intervals exclude zero. Many pairs are looked at: of those without any
difference, one in twenty excludes zero by chance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from lowsearch import cost
from lowsearch.accuracy.ladder import Ladder
from lowsearch.arch import Arch, Stage
from lowsearch.data import ImageData, load_data
from lowsearch.space import SearchSpace
from lowsearch.train import Recipe, recipe

RESULTS = Path(__file__).parent / "results" / "controlled_pairs.json"
LENGTHS = (1, 3)
"""Epochs, as multiples of the recipe's."""
BASE = "as it is"


def variants(base: Arch) -> dict[str, Arch]:
    """The network, and those that differ from it in one choice, by what that is."""

    def changed(numbers: tuple[int, ...], change: Callable[[Stage], Stage]) -> Arch:
        stages = tuple(change(s) if i in numbers else s for i, s in enumerate(base.stages, start=1))
        return dataclasses.replace(base, stages=stages)  # pyright: ignore[reportArgumentType]

    return {
        BASE: base,
        "a block more in stage 3": changed((3,), lambda s: dataclasses.replace(s, depth=s.depth + 1)),
        "a block more in stage 4": changed((4,), lambda s: dataclasses.replace(s, depth=s.depth + 1)),
        "no attention in stage 3": changed((3,), lambda s: dataclasses.replace(s, attention=None)),
        "no attention": changed((3, 4), lambda s: dataclasses.replace(s, attention=None)),
        "MLP of half the width": changed((3, 4), lambda s: dataclasses.replace(s, mlp_ratio=s.mlp_ratio // 2)),
        "no MLP": changed((3, 4), lambda s: dataclasses.replace(s, mlp_ratio=0)),
    }


def schedules(name: str, epochs: int | None) -> dict[int, Recipe]:
    """Length -> recipe."""
    short = recipe(name if epochs is None else f"{name},epochs={epochs}")
    return {times: dataclasses.replace(short, name=f"{short.name}-x{times}", epochs=times * short.epochs) for times in LENGTHS}


@cache
def images(name: str) -> ImageData:
    """Once a process."""
    return load_data(name)


def train_one(arch: Arch, schedule: Recipe, data: str, seed: int, folder: Path) -> float:
    """Validation accuracy after the whole schedule; what is on record is not trained again."""
    import torch

    torch.set_num_threads(1)
    ladder = Ladder(images(data), schedule, folder=folder, rungs=(1.0,), seed=seed)
    accuracy = ladder.run(arch, 1.0).val_accuracy
    ladder.discard(arch)
    return accuracy


def train_all(args: argparse.Namespace) -> dict[str, Any]:
    """Length -> network -> validation accuracy by seed, in the order of the seeds."""
    data = images(args.data)
    space = SearchSpace.load("lowformer-micro").with_num_classes(len(data.classes))
    networks, lengths = variants(space.family[args.network]), schedules(args.recipe, args.epochs)
    scores: dict[str, Any] = {str(times): {name: [0.0] * args.seeds for name in networks} for times in lengths}
    # A seed is finished before the next begins: what there is after an interruption are whole pairs.
    tasks = [(seed, times, name) for seed in range(args.seeds) for times in reversed(lengths) for name in networks]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(train_one, networks[name], lengths[times], args.data, seed, args.work): (seed, times, name)
            for seed, times, name in tasks
        }
        for done, future in enumerate(as_completed(running), start=1):
            seed, times, name = running[future]
            scores[str(times)][name][seed] = future.result()
            print(f"{done}/{len(tasks)} {name}, x{times}, seed {seed}: {100 * future.result():.2f} %", flush=True)
    return {
        "command": "python benchmarks/controlled_pairs.py", "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "network": args.network, "data": data.name, "data_hash": data.data_hash, "seeds": args.seeds,
        "recipes": {str(times): schedule.to_dict() for times, schedule in lengths.items()},
        "networks": {
            name: {"arch": arch.to_dict(), "macs": cost.count(arch).macs, "params": cost.count(arch).params}
            for name, arch in networks.items()
        },
        "val_accuracy": scores,
    }  # fmt: skip


def effect(one: list[float], other: list[float]) -> dict[str, float | None]:
    """Mean of (other - one) over seeds, and its 95 % t interval; without two seeds there is none."""
    difference = np.array(other) - np.array(one)
    n, mean = len(difference), float(difference.mean())
    if n < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, n - 1)) * float(difference.std(ddof=1)) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def excludes_zero(found: dict[str, float | None]) -> bool:
    """Whether the interval lies on one side."""
    low, high = found["low"], found["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def statistics(scores: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Effects of every variant at both lengths, what the length changes in them, and every pair of networks that flips."""
    short, long = (scores[str(times)] for times in LENGTHS)
    names = [name for name in short if name != BASE]
    effects = {
        name: {
            **{str(times): effect(scores[str(times)][BASE], scores[str(times)][name]) for times in LENGTHS},
            "change": effect(list(np.subtract(short[name], short[BASE])), list(np.subtract(long[name], long[BASE]))),
        }
        for name in names
    }
    flips = []
    for one, other in combinations(short, 2):
        found = {str(times): effect(scores[str(times)][one], scores[str(times)][other]) for times in LENGTHS}
        before, after = (found[str(times)] for times in LENGTHS)
        if (before["mean"] or 0) * (after["mean"] or 0) < 0:
            flips.append({"one": one, "other": other, "effects": found, "clear": excludes_zero(before) and excludes_zero(after)})
    means = [[float(np.mean(table[name])) for name in short] for table in (short, long)]
    return {"effects": effects, "flips": flips, "pairs": math.comb(len(short), 2), "spearman": float(stats.spearmanr(*means).statistic)}


def show(result: dict[str, Any]) -> None:
    def points(found: dict[str, Any]) -> str:
        interval = "" if found["low"] is None else f" ({100 * found['low']:+.2f} to {100 * found['high']:+.2f})"
        return f"{100 * found['mean']:+.2f}{interval}"

    epochs = [result["recipes"][str(times)]["epochs"] for times in LENGTHS]
    print(f"\n{result['network']} on {result['data']}, {result['seeds']} seeds: points of validation accuracy (95 %)")
    print(f"{'':26} {'MACs':>6} {'params':>6}   {f'{epochs[0]} epochs':26} {f'{epochs[1]} epochs':26} change")
    own = result["networks"][BASE]
    for name, found in result["effects"].items():
        network = result["networks"][name]
        costs = "".join(f" {network[what] / own[what]:5.2f}x" for what in ("macs", "params"))
        columns = [points(found[key]) for key in (*map(str, LENGTHS), "change")]
        print(f"{name:26}{costs}   {columns[0]:26} {columns[1]:26} {columns[2]}")
    print(f"rank agreement of the two lengths over {len(result['networks'])} networks: Spearman {result['spearman']:.2f}")
    for flip in result["flips"]:
        found = [points(flip["effects"][str(times)]) for times in LENGTHS]
        print(f"rank flip{' (clear)' if flip['clear'] else ''}: '{flip['other']}' over '{flip['one']}': {found[0]}, then {found[1]}")
    clear = sum(flip["clear"] for flip in result["flips"])
    print(f"{len(result['flips'])} of {result['pairs']} pairs change their order, {clear} of them clearly")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="micro-b-s", help="of the family of the micro space")
    parser.add_argument("--data", default="fashion-mnist-mini", help="as `lowsearch train --data` takes it")
    parser.add_argument("--recipe", default="micro", help="as `lowsearch train --recipe` takes it")
    parser.add_argument("--epochs", type=int, help="of the short schedule; default: the recipe's")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="networks that train side by side, one thread each")
    parser.add_argument("--work", type=Path, default=Path(".bench/controlled_pairs"), help="where trainings are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recompute", action="store_true", help="statistics from --out, without training")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.recompute else train_all(args)
    result |= statistics(result["val_accuracy"])
    show(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
