"""Does a study resume exactly, whatever proposes? 60 trials in one process, in three of 20, in sixty of 1: the same candidates in order.

    python benchmarks/resume_exact.py [--trials 60] [--samplers lowsearch tpe]        # minutes; trains nothing real

Every sampler of `lowsearch run` on the study of the tests (tests/study_fakes.py: closed-form latency and accuracy, noise by seed, the
real storage, ladder and promotion), with every process a fresh one that finds nothing but the study's folder. Compared are number,
genome, origin, state, reason, rung, accuracy and its deviation of all candidates. `exhaustive` runs on the tests' tiny space, the others on
`lowformer-micro`. Writes benchmarks/results/resume_exact.json; exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "resume_exact.json"
TESTS = ROOT / "tests"
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
TINY_LIMITS = {"maxima": ["latency_ms=0.18"], "minima": ["params=120000"]}
"""Few enough networks keep them for `exhaustive`."""


def advance(folder: Path, sampler: str, trials: int) -> list[Any]:
    """In this process: the study goes on until it has `trials` proposals. Returns what must be the same."""
    import study_fakes as fakes

    from lowsearch.search.objectives import parse_limits
    from lowsearch.study.settings import StudySettings

    limits = parse_limits(**TINY_LIMITS) if sampler == "exhaustive" else ()
    found = fakes.search(folder, StudySettings(sampler=sampler, trials=trials, workers=1, limits=limits))
    return [[None if value != value else value for value in row] for row in fakes.essence(found)]  # NaN is unlike itself.


def in_processes(folder: Path, sampler: str, ends: list[int]) -> list[Any]:
    """One process after the other, each up to one of `ends`. They are forked from a server that has only imported modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["study_fakes"])
    found: list[Any] = []
    for end in ends:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(advance, folder, sampler, end).result()
    return found


def examined(sampler: str, trials: int) -> dict[str, Any]:
    os.environ["FAKE_SPACE"] = str(TESTS / "tiny_space.yaml") if sampler == "exhaustive" else "lowformer-micro"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    plans = {"whole": [trials], "thirds": [trials // 3, 2 * trials // 3, trials], "single": list(range(1, trials + 1))}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        found = {name: in_processes(Path(home) / name, sampler, ends) for name, ends in plans.items()}
    differing = {
        name: next((i for i, pair in enumerate(zip(found["whole"], rows, strict=False)) if pair[0] != pair[1]), None)
        for name, rows in found.items()
    }
    same = all(rows == found["whole"] for rows in found.values())
    return {
        "same": same, "candidates": len(found["whole"]), "processes": {name: len(ends) for name, ends in plans.items()},
        "first_difference": differing, "distinct_networks": len({tuple(row[1]) for row in found["whole"]}),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def main() -> None:
    from lowsearch.files import write_atomically
    from lowsearch.search.samplers import SAMPLERS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/resume_exact.py", *sys.argv[1:]]), "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.machine(), "python": platform.python_version(), "trials": arguments.trials,
        "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "optuna")}, "samplers": {},
    }  # fmt: skip
    for sampler in arguments.samplers:  # The fork server keeps the environment that it was started in, so each sampler has its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(examined, sampler, arguments.trials).result()
        result["samplers"][sampler] = row
        print(f"{sampler:10s} {'same' if row['same'] else 'DIFFERENT'}: {row['candidates']} candidates, {row['seconds']} s", flush=True)
    result["passed"] = all(row["same"] for row in result["samplers"].values())
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    if not result["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
