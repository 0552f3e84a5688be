"""How far the trend of published accuracies holds: for a network left out, a whole type left out, and networks that are no LowFormer.

    python benchmarks/published_prior.py        # half a minute on one core; writes benchmarks/results/published_prior.json

The family is what the prior is fitted on. Leaving a type out asks whether the trend carries over to another way of building; the
relatives (timm's networks in `lowsearch.published`) differ in their recipes too, so their error is an upper end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowsearch import cost
from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.prior import Trend, features_of, leave_one_out, published_points
from lowsearch.model.zoo import build_timm, count_timm
from lowsearch.presets import PRESETS
from lowsearch.published import TOP1_PERCENT

RESULTS = Path(__file__).parent / "results" / "published_prior.json"
TYPES = ("lowformer_b", "lowformer_e", "cpubone")


def activations(name: str, resolution_px: int) -> int:
    """Output elements of the convolutions and linear layers of timm's network `name`; attention's products are left out."""
    total = 0

    def add(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel()

    with torch.device("meta"):
        model = build_timm(name, resolution_px)
        for part in model.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.register_forward_hook(add)
        model(torch.zeros(1, 3, resolution_px, resolution_px))
    return total


def errors(predicted: np.ndarray, std: np.ndarray, observed: np.ndarray) -> dict[str, Any]:
    error = predicted - observed
    return {
        "n_networks": len(error), "rmse_points": float(np.sqrt(np.mean(error**2))), "bias_points": float(error.mean()),
        "spearman": spearman(predicted, observed), "within_90_percent_interval": float((np.abs(error) <= 1.645 * std).mean()),
    }  # fmt: skip


def without_type(start: str) -> dict[str, Any]:
    """The networks whose names begin with `start`, at 224 px, by the trend of all others."""
    features, top1, names = published_points()
    own = np.array([name.startswith(start) for name in names])
    trend = Trend.fit(features[~own], top1[~own], [name for name in names if not name.startswith(start)])
    first = own & np.array([i == names.index(name) for i, name in enumerate(names)])
    return errors(*trend.predict(features[first]), top1[first])


def counts_alone() -> dict[str, dict[str, Any]]:
    """Baselines: a straight line through one count at 224 px, each network left out."""
    counted = {name: cost.count(arch) for name, arch in PRESETS.items()}
    observed = np.array([TOP1_PERCENT[name] for name in PRESETS])
    found = {}
    for what in ("macs", "params", "activations"):
        x = np.log([getattr(counted[name], what) for name in PRESETS])
        predicted = np.array([np.polyval(np.polyfit(np.delete(x, i), np.delete(observed, i), 1), x[i]) for i in range(len(x))])
        found[what] = errors(predicted, np.full(len(x), np.nan), observed)
        del found[what]["within_90_percent_interval"]
    return found


def relatives(resolution_px: int = 224) -> dict[str, Any]:
    names = [name for name in TOP1_PERCENT if name not in PRESETS]
    counted = [count_timm(name, resolution_px) for name in names]
    costs = np.array([[c.macs, c.params, activations(name, resolution_px)] for c, name in zip(counted, names, strict=True)], dtype=float)
    predicted, std = Trend.fit(*published_points()).predict(features_of(costs, np.full(len(names), resolution_px)))
    observed = np.array([TOP1_PERCENT[name] for name in names])
    rows = {
        name: {"predicted": round(float(p), 2), "std": round(float(s), 2), "published": float(o)}
        for name, p, s, o in zip(names, predicted, std, observed, strict=True)
    }
    return {**errors(predicted, std, observed), "networks": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    alone = leave_one_out()
    result = {
        "command": "python benchmarks/published_prior.py", "date": time.strftime("%Y-%m-%d"),
        "leave_one_out": {"n_networks": alone.n_networks, "rmse_points": alone.rmse_points, "spearman": alone.spearman,
                          "std_over_networks_points": alone.std_over_networks_points},
        "one_count_alone_leave_one_out": counts_alone(), "leave_one_type_out": {start: without_type(start) for start in TYPES},
        "relatives": relatives(),
    }  # fmt: skip
    for what in ("leave_one_out", "one_count_alone_leave_one_out", "leave_one_type_out", "relatives"):
        print(what, json.dumps(result[what], indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
