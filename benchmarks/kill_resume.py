"""kill -9 at random moments of `profile`, `run` and `train`: each resumes, nothing acknowledged is lost, and the outcome is the same.

    python benchmarks/kill_resume.py [--kills 10] [--verbs profile run train]

Every verb runs once undisturbed and once under fire, in folders of its own. Between kills, what the files acknowledged (measured rows,
trainings, finished trials) must still be there. At the end the killed run must have proposed the same networks in the same order, and
trained the same weights, as the undisturbed one: `train` with all that a recipe draws at random. Results go to
benchmarks/results/kill_resume.json.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowsearch.data import load_data
from lowsearch.space import SearchSpace

RESULTS = Path(__file__).parent / "results" / "kill_resume.json"
N_IMAGES = {"train": 600, "val": 200, "test": 200}
PATIENCE_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--verbs", nargs="+", default=["profile", "train", "run"], choices=["profile", "train", "run"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        prepare(home)
        for verb in arguments.verbs:
            results[verb] = {"profile": profile, "train": train, "run": run}[verb](home, arguments.kills, rng)
            print(verb, json.dumps(results[verb]), flush=True)
            results["context"] = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if not all(results[verb]["passed"] for verb in arguments.verbs):
        sys.exit(1)


def prepare(home: Path, n_images: Mapping[str, int] = N_IMAGES) -> None:
    """small.yaml and small.npz in `home`: a space and a data set of real images, so small that a training takes a second."""
    images = load_data("fashion-mnist-mini")
    arrays: dict[str, Any] = {}
    for name, n in n_images.items():
        split = getattr(images, name)
        arrays |= {f"x_{name}": split.images[:n], f"y_{name}": split.labels[:n]}
    np.savez(home / "small.npz", **arrays)
    values = yaml.safe_load(SearchSpace.load("lowformer-micro").text)
    values["name"] = "small"
    values["input"] = values["input"][:1]
    values["family"] = {name: arch for name, arch in values["family"].items() if name.endswith("-s")}
    (home / "small.yaml").write_text(yaml.safe_dump(values))


def profile(home: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    command = ["profile", "--space", "../small.yaml"]
    calm, fired = home / "profile-calm", home / "profile-fired"
    seconds = undisturbed(calm, command)

    def acknowledged() -> set[str]:
        rows = {}
        for path in (fired / "latency_tables").rglob("*.jsonl"):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
                try:
                    values = json.loads(line)
                except ValueError:
                    continue  # A torn last line was never acknowledged.
                if "block" in values or "arch" in values or "kind" in values:
                    rows[json.dumps(values.get("block") or values.get("arch") or values, sort_keys=True)[:400]] = 1
        return set(rows)

    report = under_fire(fired, command, seconds, kills, rng, acknowledged)
    keys = [sorted(_table_keys(folder)) for folder in (calm, fired)]
    return {**report, "rows": len(keys[0]), "same_rows": keys[0] == keys[1], "passed": report["lost"] == 0 and keys[0] == keys[1]}


def _table_keys(folder: Path) -> list[str]:
    keys = []
    for path in (folder / "latency_tables").rglob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            values = json.loads(line)
            # Which networks calibrate depends on the block times of the run: only their number must agree.
            keys.append(json.dumps({k: values[k] for k in ("memory_bytes", "block", "space") if k in values}, sort_keys=True))
    return keys


def train(home: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    network = home / "arch.json"
    network.write_text(SearchSpace.load("lowformer-micro").family["micro-b-s"].to_json())
    command = ["train", "../arch.json", "--data", "npz:../small.npz", "--epochs", "20", "--out", "out"]
    for change in ("random_crop=0.5", "auto_augment=rand-m9-n2-mstd0.5-inc1", "erasing=0.25", "mixup=0.2", "cutmix=1", "drop_path=0.1"):
        command += ["--recipe-set", change]
    calm, fired = home / "train-calm", home / "train-fired"
    seconds = undisturbed(calm, command)

    def acknowledged() -> set[str]:
        checkpoint = fired / "out" / "checkpoint.safetensors"
        if not checkpoint.exists():
            return set()
        from safetensors import safe_open

        with safe_open(str(checkpoint), framework="pt") as file:
            step = json.loads(file.metadata()["lowsearch"])["step"]
        return {f"step {i}" for i in range(step)}

    report = under_fire(fired, command, seconds, kills, rng, acknowledged, until=lambda: (fired / "out" / "metrics.json").exists())
    weights = [hashlib.sha256((f / "out" / "model.safetensors").read_bytes()).hexdigest() for f in (calm, fired)]
    same = weights[0] == weights[1]
    return {**report, "same_weights": same, "passed": report["lost"] == 0 and same}


def run(home: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    command = ["run", "--space", "../small.yaml", "--data", "npz:../small.npz", "--trials", "10", "--workers", "1", "--study", "s"]
    command += ["--seed", "3"]
    calm, fired = home / "run-calm", home / "run-fired"
    for folder in (calm, fired):  # The same table for both: proposals depend on it.
        folder.mkdir()
        shutil.copytree(home / "profile-calm" / "latency_tables", folder / "latency_tables")
    seconds = undisturbed(calm, command)
    study = fired / "studies" / "s"

    def acknowledged() -> set[str]:
        path = study / "records.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        done = {f"model {p}" for p in study.glob("models/*/seed-*.json")}
        return {hashlib.sha256(line).hexdigest() for line in lines} | done

    report = under_fire(fired, command, seconds, kills, rng, acknowledged, until=lambda: (study / "summary.json").exists())
    columns = ("number", "arch_id", "origin", "rung", "val_accuracy")
    proposals = [
        [tuple(row[c] for c in columns) for row in csv.DictReader((f / "studies" / "s" / "candidates.csv").open())] for f in (calm, fired)
    ]
    same = proposals[0] == proposals[1]
    return {**report, "candidates": len(proposals[0]), "same_candidates_in_order": same, "passed": report["lost"] == 0 and same}


def undisturbed(folder: Path, command: list[str]) -> float:
    """Seconds of one run to the end."""
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lowsearch", *command], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed undisturbed: {done.stderr[-2000:]}")
    return time.monotonic() - began


def under_fire(
    folder: Path,
    command: list[str],
    seconds: float,
    kills: int,
    rng: random.Random,
    acknowledged: Callable[[], set[str]],
    until: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Kill the command `kills` times at random moments, then let it finish; counts what was acknowledged and then lost."""
    folder.mkdir(exist_ok=True)
    lost = 0
    known: set[str] = set()
    moments = []
    while len(moments) < kills:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowsearch", *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        moment = rng.uniform(0.3, 3.0 + seconds / kills)
        try:
            process.wait(moment)
            break  # It was done before the shot.
        except subprocess.TimeoutExpired:
            # Every second time only the parent dies, as with `kill -9 PID`: its children have to notice.
            if len(moments) % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        moments.append(round(moment, 2))
        time.sleep(0.3)
        if until is None or not until():
            now = acknowledged()
            lost += len(known - now)
            known = now
    last = subprocess.run(
        [sys.executable, "-m", "lowsearch", *command], cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    if last.returncode != 0:
        sys.exit(f"{' '.join(command)} did not resume: {last.stderr[-2000:]}")
    return {"kills": len(moments), "killed_after_s": moments, "undisturbed_s": round(seconds, 1), "lost": lost}


if __name__ == "__main__":
    main()
