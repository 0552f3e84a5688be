"""How low may the lowest rung of the ladder be? Rank agreement of short trainings with the full schedule.

    OMP_NUM_THREADS=1 python benchmarks/lowest_rung.py             # trains, resumably, then prints and writes the results
    python benchmarks/lowest_rung.py --rungs 0.25@0.5px,1@0.25img  # judges these rungs too; full trainings of the results are not repeated
    python benchmarks/lowest_rung.py --recompute                   # statistics again from the stored curves, without training

Random members of the micro space are trained fully with two seeds. A signal taken from one seed (accuracy or loss at a fraction of the
schedule) is compared with the full schedule's accuracy of the other seed, so that a lucky seed cannot agree with itself; both
directions are averaged. `--rungs` are those of `lowsearch run`, fewer images and lower resolutions included: back one here, on your
data and space, before a search relies on it. Beside it: what costs no training (MACs, params, the predictor from the architecture alone,
leave-one-out), and the ceiling, full schedule against full schedule.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.ladder import RECORDS, Ladder
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.data import load_data
from lowsearch.errors import UsageError
from lowsearch.space import SearchSpace
from lowsearch.train import Rung, recipe

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1)
MAX_MACS = 13e6
"""The slowest member of the hand-made family has 12.8 M: beyond it nothing competes."""
RESULTS = Path(__file__).parent / "results" / "lowest_rung.json"


def random_networks(space: SearchSpace, n: int) -> np.ndarray:
    """The first `n` genomes of a fixed random stream that stay below MAX_MACS."""
    genomes = space.sample(20 * n, rng=np.random.default_rng(0))
    macs = np.array([cost.count(space.decode(g)).macs for g in genomes])
    return genomes[macs <= MAX_MACS][:n]


def train_all(args: argparse.Namespace, known: list[AccuracyRecord]) -> list[AccuracyRecord]:
    """Records of the full schedule and of `args.rungs` for every network and seed; what is on record or `known` is not trained again."""
    import torch

    torch.set_num_threads(1)
    data = load_data(args.data)
    space = SearchSpace.load(args.space).with_num_classes(len(data.classes))
    plain = sorted({*FRACTIONS, *(float(rung) for rung in args.rungs if not rung.apart)})
    full = dataclasses.replace(recipe(args.recipe), evaluate_at=tuple(plain))
    apart = [rung for rung in args.rungs if rung.apart]
    on_file = AccuracyRecords(args.work / RECORDS)
    for record in known:
        if record.apart or all(record.at(fraction) for fraction in plain):
            on_file.append(record)
    records = []
    for number, genome in enumerate(random_networks(space, args.networks), start=1):
        arch = space.decode(genome)
        for seed in SEEDS:
            for rung in (Rung(1.0), *apart):
                ladder = Ladder(data, full, folder=args.work, rungs=[rung, Rung(1.0)] if rung.apart else [rung], seed=seed)
                record = ladder.run(arch, rung)
                ladder.discard(arch)
                records.append(record)
                print(
                    f"{number:3} seed {seed}, {rung}: {100 * record.val_accuracy:.2f} % in {record.cpu_seconds:.1f} CPU-seconds", flush=True
                )
    return records


def signals(records: list[AccuracyRecord], space: SearchSpace) -> dict[str, np.ndarray]:
    """name -> (n_networks, n_seeds): what each signal says, larger meaning better."""
    by_arch: dict[str, list[AccuracyRecord]] = {}
    for record in sorted(records, key=lambda r: r.seed):
        if record.rung == 1:
            by_arch.setdefault(record.arch_id, []).append(record)
    groups = [group for group in by_arch.values() if len(group) == len(SEEDS)]

    def table(value: Callable[[AccuracyRecord], float]) -> np.ndarray:
        return np.array([[value(record) for record in group] for group in groups])

    def at(fraction: float, what: str, record: AccuracyRecord) -> float:
        point = record.at(fraction)
        assert point is not None
        return getattr(point, what)

    found = {
        "MACs": table(lambda r: cost.count(r.arch).macs),
        "params": table(lambda r: cost.count(r.arch).params),
        "architecture, leave-one-out": _leave_one_out(groups, space),
    }
    for fraction in [point.fraction for point in groups[0][0].curve[:-1]]:
        found[f"accuracy at {100 * fraction:.0f} %"] = table(lambda r, f=fraction: at(f, "val_accuracy", r))
        found[f"loss at {100 * fraction:.0f} %"] = -table(lambda r, f=fraction: at(f, "val_loss", r))
    apart = {(record.rung, record.arch_id, record.seed): record for record in records if record.apart}
    for rung in sorted({rung for rung, *_ in apart}):
        for what, sign in (("accuracy", 1), ("loss", -1)):
            name, value = f"{what} at {rung}", f"val_{what}"
            found[name] = sign * table(lambda r, rung=rung, value=value: getattr(apart[rung, r.arch_id, r.seed].curve[-1], value))
    found["full schedule"] = table(lambda r: r.val_accuracy)
    return found


def _leave_one_out(groups: list[list[AccuracyRecord]], space: SearchSpace) -> np.ndarray:
    """Predicted from the architectures and scores (one seed) of all other networks."""
    columns = []
    for seed in range(len(SEEDS)):
        loo = AccuracyPredictor(space).fit([group[seed] for group in groups]).leave_one_out()
        by_id = dict(zip(loo.arch_ids, loo.predicted, strict=True))
        columns.append([by_id[group[0].arch_id] for group in groups])
    return np.array(columns).T


def agreement(signal: np.ndarray, full: np.ndarray) -> float:
    """Mean over both directions of the rank correlation of one seed's `signal` with the other seed's `full`, (n_networks, 2) each."""
    values = [spearman(signal[:, 0], full[:, 1]), spearman(signal[:, 1], full[:, 0])]
    return float(np.mean([0.0 if v is None else v for v in values]))


def statistics(records: list[AccuracyRecord], space: SearchSpace, *, n_bootstrap: int = 2000) -> dict[str, Any]:
    """Agreement of every signal with the full schedule, with 95 % bootstrap intervals over networks."""
    found = signals(records, space)
    full = found["full schedule"]
    picks = np.random.default_rng(0).integers(len(full), size=(n_bootstrap, len(full)))
    rows = {}
    for name, signal in found.items():
        low, high = np.quantile([agreement(signal[p], full[p]) for p in picks], [0.025, 0.975])
        rows[name] = {"spearman": agreement(signal, full), "low": float(low), "high": float(high)}
    return {
        "n_networks": len(full), "signals": rows, "full_accuracy_std_over_networks": float(full.mean(1).std(ddof=1)),
        "full_accuracy_std_over_seeds": float(np.sqrt(full.var(axis=1, ddof=1).mean())),
        "cpu_seconds": {
            "median": float(np.median([r.cpu_seconds for r in records if r.rung == 1])), "sum": float(sum(r.cpu_seconds for r in records)),
            **{
                str(rung): float(np.median([r.cpu_seconds for r in records if r.rung == rung]))
                for rung in sorted({r.rung for r in records if r.apart})
            },
        },
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['n_networks']} random networks of {result['space']}, {result['data']}, recipe {result['recipe']['name']}")
    print(f"{'signal of one seed':30} Spearman with the full schedule of the other seed (95 % interval)")
    for name, row in result["signals"].items():
        print(f"{name:30} {row['spearman']:5.2f}   ({row['low']:.2f} to {row['high']:.2f})")
    networks, seeds = (100 * result[f"full_accuracy_std_over_{over}"] for over in ("networks", "seeds"))
    print(f"accuracy: {networks:.2f} points spread over networks, {seeds:.2f} over seeds", end="; ")
    medians = ", ".join(f"{what} {value:.1f}" for what, value in result["cpu_seconds"].items() if what != "sum")
    print(f"CPU-seconds a network: {medians}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--recipe", default="micro")
    parser.add_argument("--rungs", default="", metavar="RUNG,…", help="judge these too, as 0.25@0.5px,1@0.25img")
    parser.add_argument("--work", type=Path, default=Path(".bench/lowest_rung"), help="where trainings are kept while they run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recompute", action="store_true", help="statistics from --out, without training")
    args = parser.parse_args()
    try:
        args.rungs = [Rung.of(text) for text in args.rungs.split(",") if text]
    except UsageError as error:
        parser.error(str(error))
    result = json.loads(args.out.read_text()) if args.out.exists() else {"records": []}
    records = [AccuracyRecord.from_dict(values) for values in result["records"]]
    if not args.recompute:
        records = train_all(args, records if args.rungs else [])
        command = " ".join(["python benchmarks/lowest_rung.py", *(["--rungs", ",".join(map(str, args.rungs))] if args.rungs else [])])
        result = {
            "command": command, "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
            "space": args.space, "data": args.data, "recipe": recipe(args.recipe).to_dict(),
        }  # fmt: skip
    space = SearchSpace.load(result["space"]).with_num_classes(records[0].arch.num_classes)
    result = {**result, **statistics(records, space), "records": [r.to_dict() for r in records]}
    show(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
