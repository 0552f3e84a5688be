"""How much does `lowsearch profile --quick` lose? A quick and a full table of this machine, judged on the same held-out networks.

    python benchmarks/quick_table.py                              # the large space, 12 to 18 minutes
    python benchmarks/quick_table.py --space lowformer-micro

Both tables are measured from nothing in temporary folders, the quick one first. Then held-out random networks are measured once, and
beside them networks of both tables: their median ratio to the table, its pace, is divided out of what was measured (as in
latency_prediction.py, whose errors these are). Writes benchmarks/results/quick_table-<space>-<runtime>.json. `--full-blocks` and
`--quick-blocks` make both tables smaller, to try the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from latency_prediction import held_out, judge, pace, print_progress

from lowsearch.latency.machine import load_average
from lowsearch.latency.measure import measure_networks
from lowsearch.latency.profile import current_context, profile
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.target import Target, require_attached, resolve_target
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results"
GOALS = {"quick_s": 60.0, "error_ratio": 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="lowformer")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--processes", type=int, default=4, help="that every held-out network is measured in")
    parser.add_argument("--seed", type=int, default=2027, help="of the held-out networks")
    parser.add_argument("--full-blocks", type=int, help="default: as lowsearch profile")
    parser.add_argument("--quick-blocks", type=int, help="default: as lowsearch profile --quick")
    arguments = parser.parse_args()
    space, target = SearchSpace.load(arguments.space), resolve_target("cpu", arguments.runtime)
    here = current_context(target, require_attached(target))
    tables, seconds = {}, {}
    for name, quick, max_blocks in (("quick", True, arguments.quick_blocks), ("full", False, arguments.full_blocks)):
        tables[name], seconds[name] = timed_profile(space, target, quick=quick, max_blocks=max_blocks)
        print(f"{name}: {seconds[name]:.0f} s, {len(tables[name].entries)} blocks, verdicts {tables[name].verdicts}", flush=True)

    known = tuple(row for table in tables.values() for row in table.calibration[space.name])
    both = dataclasses.replace(tables["full"], calibration={space.name: known})
    archs = held_out(space, both, arguments.networks, seed=arguments.seed)
    anchors = {name: [row.arch for row in table.anchors(space.name)] for name, table in tables.items()}
    everything = list(dict.fromkeys([*archs, *anchors["quick"], *anchors["full"]]))
    rows = dict(
        zip(
            everything,
            measure_networks(everything, target, processes=arguments.processes, seed=arguments.seed, progress=print_progress),
            strict=True,
        )
    )
    found: dict[str, Any] = {}
    for name, table in tables.items():
        judged = judge(space, table, [rows[a] for a in archs], pace=pace(table, space, [rows[a] for a in anchors[name]]))
        kept = ("n_calibration", "n_blocks_measured", "n_blocks", "pace", "noise_floor", "within_90_percent_interval", "mean_relative_std")
        found[name] = {
            "seconds": round(seconds[name], 1), "verdicts": table.verdicts, "measured_again": table.context.measured_again,
            **{key: judged[key] for key in kept}, "errors": judged["methods"]["ours"], "errors_without_pace": judged["ours_without_pace"],
        }  # fmt: skip
        errors = found[name]["errors"]
        print(f"{name}: MAPE {errors['mape']:.1%}, within 10 % {errors['within_10']:.0%}, Spearman {errors['spearman']:.3f}")
    ratio = found["quick"]["errors"]["mape"] / found["full"]["errors"]["mape"]
    met = {"quick_s": seconds["quick"] <= GOALS["quick_s"], "error_ratio": ratio <= GOALS["error_ratio"]}
    print(f"the quick table errs {ratio:.2f} times as much as the full one; goals {GOALS}: {met}")
    result = {
        "command": f"python benchmarks/quick_table.py --space {space.name} --runtime {target.runtime} --networks {len(archs)} "
        f"--processes {arguments.processes} --seed {arguments.seed}",
        "space": space.name, "target": dataclasses.asdict(target), "context": dataclasses.asdict(here), "load_after": load_average(),
        "n_networks": len(archs), "error_ratio": ratio, "goals": GOALS, "goals_met": met, **found,
    }  # fmt: skip
    path = RESULTS / f"quick_table-{space.name}-{target.runtime}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def timed_profile(space: SearchSpace, target: Target, *, quick: bool, max_blocks: int | None) -> tuple[LatencyTable, float]:
    """A table measured from nothing, and the wall time that it took in seconds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = profile(
            space, target, folder=Path(folder), fresh=True, alone=True, quick=quick, max_blocks=max_blocks, progress=print_progress
        )
    return table, time.perf_counter() - started


if __name__ == "__main__":
    main()
