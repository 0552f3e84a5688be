"""Does the search find better fronts than the hand-made family, and than random search with the same CPU time?

    python benchmarks/front_quality.py [--seeds 5] [--budget 240] [--folder WORK]
    python benchmarks/front_quality.py --recompute          # statistics of the stored results, without training

For every seed two studies run side by side, one core each, on the same latency table: LowSearchSampler and random search (uniform over
the space, with the same ladder and promotion). The family climbs the ladder once for a seed and its records are given to both; that time
counts for neither. The best proposals of each are trained on the full schedule with a fresh seed, by the recipe of the family's own final
trainings (means over FAMILY_SEEDS seeds), measured in fresh processes, and compared by hypervolume (test accuracy, log latency; reference
point of the study: chance, 1.1 times the slowest family member). Results go to benchmarks/results/front_quality.json. Interrupted, the
same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from lowsearch.accuracy.ladder import Ladder
from lowsearch.data import load_data
from lowsearch.files import write_atomically
from lowsearch.search import pareto
from lowsearch.space import SearchSpace
from lowsearch.study import assembly
from lowsearch.study.finalists import FINAL_SEED_STREAM
from lowsearch.train import recipe

RESULTS = Path(__file__).parent / "results" / "front_quality.json"
SAMPLERS = ("lowsearch", "random")
FAMILY_SEEDS = 2
ONE_THREAD = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=240, help="seconds of search, one core, for each study")
    parser.add_argument("--folder", type=Path, default=Path("front-quality"), help="where the studies are kept, to resume")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--family", type=int, help=argparse.SUPPRESS)  # a worker of this script: train the family for one seed
    arguments = parser.parse_args()
    if arguments.family is not None:
        return train_family(arguments.folder, arguments.family)
    if arguments.recompute:
        stored = json.loads(RESULTS.read_text())
        stored["statistics"] = statistics(stored["seeds"])
        print(json.dumps(stored["statistics"], indent=1))
        return None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / "latency_tables").exists():
        subprocess.run([sys.executable, "-m", "lowsearch", "profile", "--space", "lowformer-micro"], cwd=arguments.folder, check=True)
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        prepare_family(arguments.folder, max(seed + 1, FAMILY_SEEDS))
        rows.append(run_seed(arguments.folder, seed, arguments.budget))
        results = {
            "claim": "proposed points against the hand-made family and against random search with the same CPU time",
            "command": f"python benchmarks/front_quality.py --seeds {arguments.seeds} --budget {arguments.budget}",
            "context": context(arguments.folder), "seeds": rows, "statistics": statistics(rows),
        }  # fmt: skip
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["statistics"]), flush=True)
    return None


def run_seed(folder: Path, seed: int, budget_s: int) -> dict[str, Any]:
    """Both studies of one seed, brought to their ends, and what came out of them."""
    for sampler in SAMPLERS:
        study = folder / "studies" / f"{sampler}-{seed}"
        if not study.exists():
            study.mkdir(parents=True)
            shutil.copy(folder / f"family-{seed}" / "records.jsonl", study / "records.jsonl")
            final_seed = final_seed_of(seed)
            for arch in SearchSpace.load("lowformer-micro").family.values():
                # Under the name that the study looks for, so that it does not train the family once more.
                trained = folder / "family-0" / "models" / arch.arch_id / f"seed-{final_seed_of(0)}.json"
                home = study / "models" / arch.arch_id
                home.mkdir(parents=True)
                shutil.copy(trained, home / f"seed-{final_seed}.json")
    with ThreadPoolExecutor(len(SAMPLERS)) as pool:
        list(pool.map(lambda sampler: search(folder, sampler, seed, budget_s), SAMPLERS))
    return {"seed": seed, **{sampler: outcome(folder / "studies" / f"{sampler}-{seed}") for sampler in SAMPLERS}}


def prepare_family(folder: Path, seeds: int) -> None:
    """Every family member's ladder under the first `seeds` seeds, two processes side by side."""
    for seed in range(seeds):
        shared = folder / f"family-{seed}"
        if (shared / "done").exists():
            continue
        for claim in shared.glob("*.claimed"):  # of a run that was killed
            claim.unlink()
        halves = [
            subprocess.Popen([sys.executable, __file__, "--folder", str(folder), "--family", str(seed)], env=ONE_THREAD) for _ in range(2)
        ]
        if any([half.wait() for half in halves]):
            sys.exit("training the family failed")
        (shared / "done").touch()


def final_seed_of(seed: int) -> int:
    """The seed of the final trainings of a study."""
    return int(np.random.default_rng([seed, FINAL_SEED_STREAM]).integers(2**31, size=1)[0])


def search(folder: Path, sampler: str, seed: int, budget_s: int) -> None:
    command = ["run", "--study", f"{sampler}-{seed}", "--sampler", sampler, "--seed", str(seed), "--workers", "1"]
    command += ["--budget", f"{budget_s}s", "--final-seeds", "1"]
    with (folder / f"{sampler}-{seed}.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "lowsearch", *command], cwd=folder, check=True, env=ONE_THREAD, stdout=log, stderr=log)


def train_family(folder: Path, seed: int) -> None:
    """The family's ladder records under one study seed, and its final trainings under the first few. Two of these share the work."""
    shared = folder / f"family-{seed}"
    data, schedule = load_data("fashion-mnist-mini"), recipe("micro")
    ladder = Ladder(data, schedule, folder=shared, seed=seed)
    shared.mkdir(parents=True, exist_ok=True)
    for arch in SearchSpace.load("lowformer-micro").family.values():
        for part in ("ladder", "final") if seed < FAMILY_SEEDS else ("ladder",):
            try:
                (shared / f"{arch.arch_id}-{part}.claimed").touch(exist_ok=False)
            except FileExistsError:
                continue
            if part == "ladder":
                for rung in ladder.rungs:
                    ladder.run(arch, rung)
                continue
            path = shared / "models" / arch.arch_id / f"seed-{final_seed_of(seed)}"
            if not path.with_suffix(".json").exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                score = assembly.train_final(arch, data, schedule, seed=final_seed_of(seed), path=path)
                write_atomically(path.with_suffix(".json"), json.dumps({"seed": final_seed_of(seed), **dataclasses.asdict(score)}) + "\n")


def family_points(folder: Path, finalists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The family's finalists with the mean of their final trainings; latencies as measured beside the proposals."""
    points = []
    for row in finalists:
        scores = [
            json.loads((folder / f"family-{k}" / "models" / row["arch_id"] / f"seed-{final_seed_of(k)}.json").read_text())["test_accuracy"]
            for k in range(FAMILY_SEEDS)
        ]
        points.append({**row, "test_accuracy": float(np.mean(scores))})
    return points


def outcome(study: Path) -> dict[str, Any]:
    """The finalists of a study and what it spent."""
    columns = ("arch_id", "name", "origin", "test_accuracy", "accuracy_std", "latency_ms", "latency_std_ms", "macs", "params")
    with (study / "finalists.csv").open() as file:
        finalists = [{c: row[c] if c in ("arch_id", "name", "origin") else float(row[c]) for c in columns} for row in csv.DictReader(file)]
    records = [json.loads(line) for line in (study / "records.jsonl").read_text().splitlines()]
    family = {row["arch_id"] for row in finalists if row["origin"] == "family"}
    spent: dict[str, float] = {}
    for record in records:
        if record["arch_id"] not in family:
            spent[record["arch_id"]] = max(spent.get(record["arch_id"], 0.0), record["cpu_seconds"])
    values = yaml.safe_load((study / "study.yaml").read_text())
    own = [row for row in finalists if row["origin"] != "family"]
    others = family_points(study.parents[1], [row for row in finalists if row["origin"] == "family"])
    return {
        "reference_point": values["reference_point"], "finalists": own + others, "networks_trained": len(spent),
        "training_cpu_s": round(sum(spent.values()), 1), "search_s": values["spent_s"]["search"],
    }  # fmt: skip


def statistics(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Hypervolumes by seed, their differences with 95 % t intervals, and how many family members are clearly dominated."""
    volumes: dict[str, list[float]] = {"proposed": [], "family": [], "random": []}
    dominated: list[int] = []
    members: list[int] = []
    ranges: list[float] = []
    for row in rows:
        ours, other = row["lowsearch"], row["random"]
        reference = ours["reference_point"]
        proposed = [f for f in ours["finalists"] if f["origin"] != "family"]
        family = [f for f in ours["finalists"] if f["origin"] == "family"]
        random = [f for f in other["finalists"] if f["origin"] != "family"]
        for name, points in (("proposed", proposed), ("family", family), ("random", random)):
            volumes[name].append(hypervolume(points, reference))
        dominated.append(sum(any(clearly_better(p, member) for p in proposed) for member in family))
        members.append(len(family))
        ranges.append(best_speedup_at_equal_accuracy(proposed, family))
    return {
        "hypervolume": {name: [round(v, 4) for v in values] for name, values in volumes.items()},
        "proposed_minus_family": interval(np.subtract(volumes["proposed"], volumes["family"])),
        "proposed_minus_random": interval(np.subtract(volumes["proposed"], volumes["random"])),
        "family_dominated_by_2_standard_errors_in_both": dominated, "family_members": members,
        "median_speedup_at_no_less_accuracy": [round(r, 3) for r in ranges],
        "networks_trained": {s: [row[s]["networks_trained"] for row in rows] for s in SAMPLERS},
        "training_cpu_s": {s: [row[s]["training_cpu_s"] for row in rows] for s in SAMPLERS},
    }  # fmt: skip


def hypervolume(points: list[dict[str, Any]], reference: dict[str, float]) -> float:
    costs = np.array([[-p["test_accuracy"], math.log(p["latency_ms"])] for p in points]).reshape(-1, 2)
    return float(pareto.hypervolume(costs, np.array([-reference["accuracy"], math.log(reference["latency_ms"])])))


def clearly_better(point: dict[str, Any], member: dict[str, Any]) -> bool:
    accuracy = point["test_accuracy"] - member["test_accuracy"]
    latency = member["latency_ms"] - point["latency_ms"]
    return accuracy > 2 * math.hypot(point["accuracy_std"], member["accuracy_std"]) and latency > 2 * math.hypot(
        point["latency_std_ms"], member["latency_std_ms"]
    )


def best_speedup_at_equal_accuracy(proposed: list[dict[str, Any]], family: list[dict[str, Any]]) -> float:
    """Median over the family of: its latency over that of the fastest proposal with at least its test accuracy; 0 where there is none."""
    return float(
        np.median([
            max((m["latency_ms"] / p["latency_ms"] for p in proposed if p["test_accuracy"] >= m["test_accuracy"]), default=0.0)
            for m in family
        ])
    )  # fmt: skip


def interval(differences: np.ndarray) -> dict[str, Any]:
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return {"mean": round(mean, 4), "n": len(differences)}
    half = float(stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / math.sqrt(len(differences)))
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "n": len(differences)}


def context(folder: Path) -> dict[str, Any]:
    table = next((folder / "latency_tables").rglob("*.jsonl"))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "device": table.parent.name, "runtime": table.stem, "cpus": os.cpu_count(),
        "python": platform.python_version(), "versions": {n: metadata.version(n) for n in ("lowsearch", "torch", "onnxruntime", "optuna")},
        "load_average": os.getloadavg(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
