"""Does a Ray cluster of two workers find what one process finds? By the same seed, `--trials` and `--in-flight`, with a frozen table.

    python benchmarks/ray_local.py [--trials 60] [--trained 10]        # minutes; needs pip install "lowsearch[ray]"

Pairs of studies, one process with `--engine local --workers 1` against `--engine ray --workers 2`, a cluster of Ray's own on this machine:
`--trials` proposals on the study of the tests (tests/study_fakes.py: closed-form latency and accuracy, trainings of random length), once
with 4 trials in flight, which is what Ray does unless told, and once with 1, the plain search; and `--trained` networks really trained on
600 images by `lowsearch run`, with a closed-form latency table of a device that is not there, so that nothing is measured. Compared are
number, genome, origin, state, reason, rung, accuracy and its deviation of all candidates; of the real ones also every point of every
learning curve and the weights of the finalists. Writes benchmarks/results/ray_local.json; exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

from kill_resume import N_IMAGES, prepare

from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.files import write_atomically
from lowsearch.space import SearchSpace
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import candidates, open_study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ray_local.json"
sys.path.insert(0, str(ROOT / "tests"))
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
SPACE = os.environ["FAKE_SPACE"] = "lowformer-micro"
os.environ["FAKE_STEP_S"] = "0.03"
ENGINES = {"one_process": {"engine": "local", "workers": 1}, "ray": {"engine": "ray", "workers": 2}}
PATIENCE_S = 1800


def made(home: Path, trials: int, in_flight: int) -> tuple[dict[str, Any], list[Any]]:
    """One process and Ray on made trainings; and the genomes in their order."""
    import study_fakes as fakes

    found, seconds, folder = {}, {}, home
    for name, engine in ENGINES.items():
        folder = home / f"{name}-{in_flight}"
        settings = {"trials": trials, "in_flight": in_flight, **engine}
        folder.mkdir()
        seconds[name] = _seconds_of(
            [sys.executable, str(ROOT / "tests" / "study_fakes.py"), "run", str(folder), json.dumps(settings)], home
        )
        found[name] = fakes.essence(candidates(open_study(folder, StudySettings().objectives), fakes.SPACE))
    tasks = [line.split() for line in (folder / "tasks.log").read_text().splitlines()]
    row = {**_compared(found, seconds), "tasks": len(tasks), "task_processes": len({pid for *_, pid in tasks})}
    return row, [genome for _, genome, *_ in found["ray"]]


def trained(home: Path, trials: int) -> dict[str, Any]:
    """One process and Ray by `lowsearch run` on real images, in the same directory."""
    import made_knowledge
    import study_fakes as fakes

    prepare(home)
    space = SearchSpace.load(home / "small.yaml").with_num_classes(10)
    made_knowledge.table_of(space).save(home / "latency_tables")
    in_flight = 2 * ENGINES["ray"]["workers"]
    found, curves, weights, seconds = {}, {}, {}, {}
    for name, engine in ENGINES.items():
        command = [sys.executable, "-m", "lowsearch", "run", "--study", name, "--space", "small.yaml", "--data", "npz:small.npz"]
        command += ["--device", made_knowledge.TARGET.device, "--trials", str(trials), "--in-flight", str(in_flight)]
        seconds[name] = _seconds_of([*command, *(part for flag, value in engine.items() for part in (f"--{flag}", str(value)))], home)
        folder = home / "studies" / name
        found[name] = fakes.essence(candidates(open_study(folder, StudySettings().objectives), space))
        points = [(r.arch_id, r.rung, [(p.step, p.train_loss, p.val_loss, p.val_accuracy) for p in r.curve])
                  for r in AccuracyRecords(folder / "records.jsonl")]  # fmt: skip
        curves[name] = sorted(points)
        weights[name] = {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("models/*/model.safetensors")}
    same_curves, same_weights = (values["ray"] == values["one_process"] for values in (curves, weights))
    compared = _compared(found, seconds)
    return {
        **compared, "same": compared["same"] and same_curves and same_weights and bool(weights["ray"]), "images": N_IMAGES,
        "rungs_trained": len(curves["ray"]), "same_curves": same_curves, "finalists": len(weights["ray"]), "same_weights": same_weights,
    }  # fmt: skip


def _seconds_of(command: list[str], home: Path) -> int:
    """Of one run to its end."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return round(time.monotonic() - began)


def _compared(found: Mapping[str, list[Any]], seconds: Mapping[str, int]) -> dict[str, Any]:
    one, other = (_as_text(found[name]) for name in ENGINES)
    return {
        "same": one == other, "candidates": len(one), "first_difference": _first_difference(one, other),
        "distinct_networks": len({tuple(row[1]) for row in found["ray"]}), "seconds": dict(seconds),
    }  # fmt: skip


def _first_difference(one: list[Any], other: list[Any]) -> int | None:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)


def _as_text(rows: list[Any]) -> list[str]:
    return list(map(str, rows))  # As text NaN equals NaN.


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--trained", type=int, default=10)
    arguments = parser.parse_args()
    if util.find_spec("ray") is None:
        sys.exit('Ray is not installed; pip install "lowsearch[ray]"')
    with tempfile.TemporaryDirectory() as folder:
        four, ahead = made(Path(folder), arguments.trials, 4)
        one, plain = made(Path(folder), arguments.trials, 1)
        studies = {"made, 4 in flight": four, "made, 1 in flight": one, "trained, 4 in flight": trained(Path(folder), arguments.trained)}
    for name, row in studies.items():
        print(f"{name:20s} {'same' if row['same'] else 'DIFFERENT'}: {row['candidates']} candidates, {row['seconds']} s", flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/ray_local.py", *sys.argv[1:]]), "date_utc": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version(), "space": SPACE,
        "versions": {n: metadata.version(n) for n in ("lowsearch", "numpy", "optuna", "ray", "torch")}, "engines": ENGINES,
        "studies": studies, "first_proposal_that_differs_with_1_and_4_in_flight": _first_difference(ahead, plain),
        "passed": all(row["same"] for row in studies.values()),
    }  # fmt: skip
    write_atomically(RESULTS, json.dumps(result, indent=1) + "\n")
    if not result["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
