"""Does a larger network of a type score no worse than a smaller one, under the recipe that the search uses?

    OMP_NUM_THREADS=1 python benchmarks/family_types.py            # trains, resumably, then prints and writes the results
    python benchmarks/family_types.py --recompute                  # the table again from the stored scores, without training

The hand-made family of the micro space holds a small and a large member of each type: B (Lowtention and MLP), E (convolution only),
CPU (CPUBone's tweaks). A recipe under which attention trains badly would show here first: the search would then delete it for the
wrong reason. Scores are validation accuracies; standard errors are those of the mean over seeds, from the spread pooled over members.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.ladder import Ladder
from lowsearch.data import load_data
from lowsearch.space import SearchSpace
from lowsearch.train import recipe

TYPES = {"B": ("micro-b-s", "micro-b-l"), "E": ("micro-e-s", "micro-e-l"), "CPU": ("micro-cpu-s", "micro-cpu-l")}
RESULTS = Path(__file__).parent / "results" / "family_types.json"


def train_all(args: argparse.Namespace) -> dict[str, Any]:
    """The full-schedule scores of every member and seed; what is on record is not trained again."""
    import torch

    torch.set_num_threads(1)
    data = load_data(args.data)
    space = SearchSpace.load(args.space).with_num_classes(len(data.classes))
    members: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name in (name for pair in TYPES.values() for name in pair):
            ladder = Ladder(data, recipe(args.recipe), folder=args.work, seed=seed)
            record = ladder.run(space.family[name], 1.0)
            count = cost.count(record.arch)
            member = members.setdefault(
                name, {"macs": count.macs, "params": count.params, "val_accuracy": [], "val_loss": [], "cpu_seconds": []}
            )
            for what in ("val_accuracy", "val_loss", "cpu_seconds"):
                member.setdefault(what, []).append(getattr(record.curve[-1], what))
            print(f"{name:12} seed {seed}: {100 * record.val_accuracy:.2f} % after {record.cpu_seconds:.1f} CPU-seconds", flush=True)
    return {
        "command": "python benchmarks/family_types.py", "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "space": args.space, "data": args.data, "recipe": recipe(args.recipe).to_dict(), "members": members,
    }  # fmt: skip


def comparisons(members: dict[str, Any]) -> dict[str, Any]:
    """Per type: how much the larger member is better, and the standard error of that."""
    scores = {name: np.array(member["val_accuracy"]) for name, member in members.items()}
    seed_std = float(np.sqrt(np.mean([s.var(ddof=1) for s in scores.values()])))
    n_seeds = len(next(iter(scores.values())))
    return {
        "seed_std": seed_std,
        "standard_error_of_a_mean": seed_std / n_seeds**0.5,
        "types": {
            kind: {"gain": float(scores[large].mean() - scores[small].mean()), "standard_error": seed_std * (2 / n_seeds) ** 0.5}
            for kind, (small, large) in TYPES.items()
        },
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['data']}, recipe {result['recipe']['name']}")
    print(f"{'member':12} {'M MACs':>7} {'M params':>9} {'accuracy %':>11}   seeds")
    error = 100 * result["standard_error_of_a_mean"]
    for name, member in result["members"].items():
        scores = 100 * np.array(member["val_accuracy"])
        print(
            f"{name:12} {member['macs'] / 1e6:7.2f} {member['params'] / 1e6:9.3f} {scores.mean():6.2f} ± {error:.2f}   "
            f"{', '.join(f'{s:.2f}' for s in scores)}   {np.mean(member['cpu_seconds']):.0f} CPU-seconds"
        )
    for kind, row in result["types"].items():
        verdict = "not worse" if row["gain"] >= 0 else "WORSE"
        gain, error = 100 * row["gain"], 100 * row["standard_error"]
        print(f"{kind}-type: the larger is {verdict}, {gain:+.2f} ± {error:.2f} points ({gain / error:+.1f} standard errors)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--recipe", default="micro")
    parser.add_argument("--work", type=Path, default=Path(".bench/family_types"), help="where trainings are kept while they run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recompute", action="store_true", help="the table from --out, without training")
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.recompute else train_all(args)
    result = {**result, **comparisons(result["members"])}
    show(result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
