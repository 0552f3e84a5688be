"""Parameters of the twelve presets against timm, and closed-form MACs against torch's FlopCounter, presets and random networks.

    python benchmarks/params_macs.py            # about two minutes on one core; writes benchmarks/results/params_macs.json

Exit code 1 where any difference is not zero.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from lowsearch import cost
from lowsearch.model.counters import count_with_torch
from lowsearch.model.lowformer import LowFormer
from lowsearch.presets import PRESETS
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results" / "params_macs.json"
SPACES = ("lowformer", "lowformer-micro")


def timm_params(name: str) -> int:
    """Parameters of timm's network of preset `name`; three CPUBones are published there with two more norms in each late MBConv."""
    extra: dict[str, Any] = {"local_mbconv_norm": "proj"} if name in ("cpubone_b0", "cpubone_b1", "cpubone_b2") else {}
    with torch.device("meta"):
        model = timm.create_model(f"{name}_bfrobust" if extra else name, **extra)
    return sum(p.numel() for p in model.parameters())


def compare_preset(name: str) -> dict[str, int | str]:
    arch = PRESETS[name]
    total = cost.count(arch)
    with torch.device("meta"):
        model = LowFormer(arch)
    return {
        "name": name,
        "params_closed_form": total.params,
        "params_built": sum(p.numel() for p in model.parameters()),
        "params_timm": timm_params(name),
        "macs_closed_form": total.macs,
        "macs_flop_counter": count_with_torch(arch),
        "activations_closed_form": total.activations,
    }


def compare_members(space_name: str, n: int, seed: int) -> dict[str, Any]:
    space = SearchSpace.load(space_name)
    closed, built, largest = [], [], 0
    started = time.perf_counter()
    for genome in space.sample(n, rng=np.random.default_rng(seed)):
        arch = space.decode(genome)
        closed.append(cost.count(arch).macs)
        built.append(count_with_torch(arch))
        largest = max(largest, abs(closed[-1] - built[-1]))
    return {
        "space": space_name,
        "networks": n,
        "seed": seed,
        "largest_difference_macs": largest,
        "networks_that_differ": int(np.count_nonzero(np.array(closed) != np.array(built))),
        "smallest_macs": min(closed),
        "largest_macs": max(closed),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=500, help="random members of each space (default: 500)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    presets = [compare_preset(name) for name in PRESETS]
    print(f"{'preset':<14}{'params':>12}{'- built':>9}{'- timm':>8}{'MACs':>15}{'- FlopCounter':>15}")
    wrong = 0
    for row in presets:
        params, macs = int(row["params_closed_form"]), int(row["macs_closed_form"])
        differences = (params - int(row["params_built"]), params - int(row["params_timm"]), macs - int(row["macs_flop_counter"]))
        wrong += any(differences)
        print(f"{row['name']:<14}{params:>12}{differences[0]:>9}{differences[1]:>8}{macs:>15}{differences[2]:>15}")
    members = [compare_members(name, options.networks, options.seed) for name in SPACES]
    for row in members:
        wrong += bool(row["largest_difference_macs"])
        span_m = f"{row['smallest_macs'] / 1e6:.1f} to {row['largest_macs'] / 1e6:.1f} M MACs"
        print(f"{row['networks']} random members of {row['space']}, {span_m}: largest difference {row['largest_difference_macs']}")
    RESULTS.parent.mkdir(exist_ok=True)
    context = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    RESULTS.write_text(json.dumps({"context": context, "presets": presets, "random_members": members}, indent=1) + "\n")
    print(f"written to {RESULTS}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
