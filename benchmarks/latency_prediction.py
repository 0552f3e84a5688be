"""How well does the predictor know a network's latency before it runs? Held-out random networks, measured in fresh processes.

    python benchmarks/latency_prediction.py --space lowformer-micro          # 2 to 4 minutes
    python benchmarks/latency_prediction.py --space lowformer                # 8 to 12 minutes

Needs the latency table of this machine (`lowsearch profile`). Beside ours: the raw sum of hot blocks, and straight lines in the MACs and
in the parameters, fitted on the same calibration networks. Every network is measured in `--processes` fresh processes; the noise floor is
the difference between two of them, and says how much of an error is the measurement's. Eight of the calibration networks are measured once
more beside the held-out ones: a shared machine is faster or slower by some percent than when its table was made, and their median ratio,
the pace, is divided out of what was measured. Errors without that are printed too.

The learning curve fits the same predictor, and a ridge regression and boosted trees that know no table, on 5 to 50 of the measured networks
and judges all on the others. Writes benchmarks/results/latency_prediction-<space>-<runtime>.json with every network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lowsearch import cost
from lowsearch.arch import BLOCK_TYPES, Arch
from lowsearch.latency.measure import measure_networks
from lowsearch.latency.pace import pace_since
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import current_context
from lowsearch.latency.table import LatencyTable, check_fits, find_table
from lowsearch.latency.target import require_attached, resolve_target
from lowsearch.latency.timing import NetworkLatency, latency_ms
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
LEARNING = (5, 10, 20, 50)
_TABLE_LESS: dict[str, Callable[[], Any]] = {
    "without_table": lambda: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 13))),
    "boosting": lambda: GradientBoostingRegressor(subsample=0.8, random_state=0),
}
"""Regressions of log latency on `_features`."""
_STEADY = {"mape": 0.025, "within_5": 0.9, "within_10": 0.99, "spearman": 0.99}
_TORCH = {"mape": 0.045, "within_10": 0.95}
GOALS = {
    "lowformer": {"onnxruntime": _STEADY, "openvino": _STEADY, "eager": _TORCH, "torchscript": _TORCH, "compile": _TORCH},
    "lowformer-micro": {"onnxruntime": {"mape": 0.04, "spearman": 0.985}},
}
_OF_FLOOR = 0.8
"""No predictor is asked to be nearer to a measurement than this share of what two processes differ by."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--device", default="cpu", help="attached, as cuda")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2026, help="of the held-out networks; calibration uses other networks")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--recompute", action="store_true", help="judge the stored measurements again, without measuring")
    arguments = parser.parse_args()
    space = SearchSpace.load(arguments.space)
    target = resolve_target(arguments.device, arguments.runtime)
    table = find_table(target)
    device = require_attached(target)
    whose = "" if device.kind == "cpu" else f"{device.slug}-"
    path = RESULTS / f"latency_prediction-{space.name}-{whose}{target.runtime}.json"
    here = current_context(target, device)
    check_fits(table, target, here)

    command = (
        f"python benchmarks/latency_prediction.py --space {space.name} --device {arguments.device} --runtime {target.runtime} "
        f"--networks {arguments.networks} --processes {arguments.processes} --seed {arguments.seed}"
    )
    if arguments.recompute:
        stored = json.loads(path.read_text())
        command = stored["command"]
        context, seconds = stored["context"], stored["measuring_s"]
        rows, anchors = ([stored_network(values) for values in stored[name]] for name in ("networks", "anchors"))
    else:
        archs = held_out(space, table, arguments.networks, seed=arguments.seed)
        started = time.perf_counter()
        measured = measure_networks(
            [*archs, *(row.arch for row in table.anchors(space.name))], target,
            processes=arguments.processes, seed=arguments.seed, progress=print_progress,
        )  # fmt: skip
        rows, anchors = measured[: len(archs)], measured[len(archs) :]
        context, seconds = dataclasses.asdict(here), round(time.perf_counter() - started, 1)

    result = judge(space, table, rows, pace=pace(table, space, anchors))
    result["learning_curve"] = learning_curve(space, table, rows, seed=arguments.seed)
    goals = dict(GOALS.get(space.name, {}).get(target.runtime, {})) if device.kind == "cpu" else {}
    if goals:
        goals["mape"] = max(goals["mape"], _OF_FLOOR * result["noise_floor"]["mape"])
    met = {name: bool(_better(name, result["methods"]["ours"][name], goal)) for name, goal in goals.items()}
    print_table(space, target, result, goals, met)
    networks, again = (
        [{"arch": r.arch.to_dict(), "samples_ms": r.samples_ms, "paces": r.paces, "wall_over_cpu": r.wall_over_cpu} for r in measured]
        for measured in (rows, anchors)
    )
    for values, mean_ms, std_ms in zip(networks, *LatencyPredictor(space, table).predict_archs([row.arch for row in rows]), strict=True):
        values |= {"predicted_ms": float(mean_ms), "predicted_std_ms": float(std_ms)}
    then_ms = {row.arch: row.latency_ms for row in table.calibration[space.name]}
    for values, row in zip(again, anchors, strict=True):
        values["table_ms"] = then_ms[row.arch]
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": command,
        "space": space.name, "target": dataclasses.asdict(target), "context": context, "measuring_s": seconds, "goals": goals,
        "goals_met": met, **result, "anchors": again, "networks": networks,
    }  # fmt: skip
    head = json.dumps({name: value for name, value in content.items() if name not in ("networks", "anchors")}, indent=1)[:-2]
    parts = [
        f' "{name}": [\n' + ",\n".join("  " + json.dumps(network) for network in values) + "\n ]"
        for name, values in (("anchors", again), ("networks", networks))
    ]
    path.write_text(",\n".join([head, *parts]) + "\n}\n", encoding="utf-8")
    print(f"written: {path}")


def held_out(space: SearchSpace, table: LatencyTable, n: int, *, seed: int) -> list[Arch]:
    """`n` random networks that calibrated nothing."""
    known = {row.arch for row in table.calibration.get(space.name, ())}
    archs = dict.fromkeys(space.decode(genome) for genome in space.sample(2 * n, rng=np.random.default_rng(seed)))
    return [arch for arch in archs if arch not in known][:n]


def pace(table: LatencyTable, space: SearchSpace, anchors: Sequence[NetworkLatency]) -> float:
    """How much slower the machine was when `anchors` were measured than when the table was."""
    then_ms = {row.arch: row.latency_ms for row in table.calibration[space.name]}
    return pace_since([row.latency_ms for row in anchors], [then_ms[row.arch] for row in anchors])


def judge(space: SearchSpace, table: LatencyTable, rows: Sequence[NetworkLatency], *, pace: float) -> dict[str, Any]:
    """Every method's error on `rows`, and how honest our stated spread is. Latencies as measured are divided by `pace`."""
    calibration = table.calibration[space.name]
    predictor = LatencyPredictor(space, table)
    archs, measured_ms = [row.arch for row in rows], np.array([row.latency_ms for row in rows]) / pace
    mean_ms, std_ms = predictor.predict_archs(archs)
    raw_ms = np.array([sum(predictor.latency(block).hot_ms for block in arch.blocks()) for arch in archs])
    methods = {"ours": mean_ms, "raw sum of hot blocks": raw_ms}
    for name in ("macs", "params"):
        methods[f"{name} only"] = _line(calibration, name, archs)
    first, second = (
        np.array([latency_ms(row.samples_ms[process : process + 1], row.paces[process : process + 1]) for row in rows])
        for process in (0, 1)
    )
    z = np.abs(measured_ms - mean_ms) / std_ms
    shares = [share for arch in archs for share in predictor.explain(arch)]
    total_ms = sum(share.ms for share in shares)
    return {
        "n_networks": len(rows), "n_calibration": len(calibration), "n_blocks_measured": sum(b in table.entries for b in space.blocks),
        "n_blocks": len(space.blocks), "predicted_share_of_ms": sum(s.ms for s in shares if s.source == "predicted") / total_ms,
        "measured_ms": {"min": float(measured_ms.min()), "median": float(np.median(measured_ms)), "max": float(measured_ms.max())},
        "pace": pace, "methods": {name: _errors(values, measured_ms) for name, values in methods.items()},
        "ours_without_pace": _errors(mean_ms, pace * measured_ms),
        "noise_floor": _errors(second, first), "wall_over_cpu": float(np.median([row.wall_over_cpu for row in rows])),
        "within_1_std": float(np.mean(z < 1)), "within_90_percent_interval": float(np.mean(z < 1.645)),
        "mean_relative_std": float(np.mean(std_ms / mean_ms)),
        "correction": predictor.correction._asdict(),
    }  # fmt: skip


def learning_curve(space: SearchSpace, table: LatencyTable, rows: Sequence[NetworkLatency], *, seed: int) -> list[dict[str, float]]:
    """MAPE of the predictor and of regressions without a table, each fitted on n of `rows` and judged on the others; means of 5 draws."""
    rng = np.random.default_rng(seed)
    measured_ms = np.array([row.latency_ms for row in rows])
    features = np.array([_features(space, row.arch) for row in rows])
    curve = []
    for n in (n for n in LEARNING if n <= len(rows) // 2):
        ours, without = [], {name: [] for name in _TABLE_LESS}
        for _ in range(5):
            known = np.zeros(len(rows), dtype=bool)
            known[rng.choice(len(rows), n, replace=False)] = True
            chosen = tuple(row for row, use in zip(rows, known, strict=True) if use)
            fitted = LatencyPredictor(space, dataclasses.replace(table, calibration={space.name: chosen}))
            rest = [row.arch for row, use in zip(rows, known, strict=True) if not use]
            ours.append(np.abs(fitted.predict_archs(rest)[0] / measured_ms[~known] - 1).mean())
            for name, make in _TABLE_LESS.items():
                model = make().fit(features[known], np.log(measured_ms[known]))
                without[name].append(np.abs(np.exp(model.predict(features[~known])) / measured_ms[~known] - 1).mean())
        curve.append({"n": n, "ours": float(np.mean(ours)), **{name: float(np.mean(errors)) for name, errors in without.items()}})
    return curve


def _features(space: SearchSpace, arch: Arch) -> list[float]:
    """What a regression may know without measuring blocks: the genome, and log MACs, parameters and activations, in all and by kind."""
    counted = cost.count(arch)
    by_kind = {kind: [0.0, 0.0] for kind in BLOCK_TYPES}
    for place in counted.per_block:
        by_kind[place.block.kind][0] += place.cost.macs
        by_kind[place.block.kind][1] += place.cost.activations
    sums = [counted.macs, counted.params, counted.activations, len(counted.per_block), *(x for pair in by_kind.values() for x in pair)]
    return [*map(float, space.encode(arch)), *(math.log1p(x) for x in sums)]


def _line(calibration: Sequence[NetworkLatency], name: str, archs: Sequence[Arch]) -> np.ndarray:
    """a x + b with relative least squares on the calibration networks, x the MACs or the parameters."""

    def inputs(of: Sequence[Arch]) -> np.ndarray:
        return np.array([[getattr(cost.count(arch), name), 1.0] for arch in of])

    measured_ms = np.array([row.latency_ms for row in calibration])
    weights = np.linalg.lstsq(inputs([row.arch for row in calibration]) / measured_ms[:, None], np.ones(len(calibration)), rcond=None)[0]
    return inputs(archs) @ weights


def _errors(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> dict[str, float]:
    relative = predicted_ms / measured_ms - 1
    ranks: list[Any] = [spearmanr(predicted_ms, measured_ms)[0], kendalltau(predicted_ms, measured_ms)[0]]
    return {
        "mape": float(np.mean(np.abs(relative))),
        "within_5": float(np.mean(np.abs(relative) <= 0.05)),
        "within_10": float(np.mean(np.abs(relative) <= 0.10)),
        "spearman": float(ranks[0]),
        "kendall": float(ranks[1]),
        "bias": float(np.mean(relative)),
    }


def _better(name: str, value: float, goal: float) -> bool:
    return value <= goal if name == "mape" else value >= goal


def print_table(space: SearchSpace, target: object, result: dict[str, Any], goals: dict[str, float], met: dict[str, bool]) -> None:
    low, high = result["measured_ms"]["min"], result["measured_ms"]["max"]
    print(f"\n{space.name} on {target}: {result['n_networks']} held-out networks, {low:.3f} to {high:.3f} ms")
    print(
        f"{result['n_calibration']} calibration networks; {result['n_blocks_measured']} of {result['n_blocks']} blocks measured, "
        f"predicted ones make {result['predicted_share_of_ms']:.0%} of the time; wall/CPU {result['wall_over_cpu']:.2f}; "
        f"pace since the table {result['pace']:.3f}"
    )
    print(f"{'':24s} {'MAPE':>7s} {'in 5 %':>7s} {'in 10 %':>8s} {'Spearman':>9s} {'Kendall':>8s} {'bias':>7s}")
    others = {"ours, without the pace": result["ours_without_pace"], "noise floor": result["noise_floor"]}
    for name, errors in {**result["methods"], **others}.items():
        print(
            f"{name:24s} {errors['mape']:7.1%} {errors['within_5']:7.0%} {errors['within_10']:8.0%} {errors['spearman']:9.3f} "
            f"{errors['kendall']:8.3f} {errors['bias']:+7.1%}"
        )
    print(
        f"stated spread {result['mean_relative_std']:.1%}: {result['within_1_std']:.0%} of the networks within one, "
        f"{result['within_90_percent_interval']:.0%} within the 90 % interval"
    )
    for row in result["learning_curve"]:
        print(
            f"{row['n']:3d} calibration networks: MAPE {row['ours']:.1%}; without a table {row['without_table']:.1%}, "
            f"boosted trees {row['boosting']:.1%}"
        )
    for name, goal in goals.items():
        print(f"goal {name} {goal:.3g}: {'met' if met[name] else 'missed'}")


def stored_network(values: dict[str, Any]) -> NetworkLatency:
    samples, paces = tuple(tuple(rounds) for rounds in values["samples_ms"]), tuple(values["paces"])
    return NetworkLatency(
        arch=Arch.from_dict(values["arch"]), latency_ms=latency_ms(samples, paces), samples_ms=samples, paces=paces,
        wall_over_cpu=values["wall_over_cpu"],
    )  # fmt: skip


def print_progress(done: int, total: int, label: str) -> None:
    """Every twentieth step."""
    if done % 20 == 0 or done == total:
        print(f"{done}/{total} {label}", flush=True)


if __name__ == "__main__":
    main()
