"""Do networks that a study proposes beat every hand-made member on real images, trained by one recipe with fresh seeds?

    python benchmarks/real_study.py --data npz:cifar10.npz --minutes 10
    python benchmarks/real_study.py --report               # the result again from the folder, without training or measuring

1. For every study seed one `lowsearch run` (micro space, ONNX Runtime, two workers), `--minutes` of search each.
2. Of every front up to `--points` proposals, all hand-made members, and networks of timm in the same size class are measured in fresh
   processes, interleaved, on the machine that was searched for, while nothing is trained: twice before the trainings, twice after them.
   Disturbed sets are left out (`joined`).
3. All of them go through one final recipe, that of the study, with the same `--seeds` fresh seeds; train images teach, test images are read
   once a training. timm's networks are trained by the same engine, from random weights; NAME@PX says the resolution, to which images are
   resized as they are for ours. Accuracies are of no machine, so the trainings may go on elsewhere: `--contest` with contest.json,
   latencies.json and trainings/ of the folder.

The points are chosen without test images (`choose`): for every member the study's own replacement, the proposal of its front that scores
best on validation images among those 1.3 times faster, or where there is none, no slower. A point **dominates** a member where it is

- `faster`: at least 1.3 times, the lower end of two standard errors above 1, and no less accurate: the lower end of two standard errors
  of the accuracy difference is not below -MARGIN_POINTS, half of the point that the claim calls a gain; or
- `better`: by at least 1.0 point, the lower end above 0, and no slower by more than two standard errors.

The standard error of a difference of accuracies joins seeds and test images. Seeds: the variance over seeds, pooled over our networks.
Images: the spread over test images of the difference between two networks, both of which saw the same images. What both contain, the
noise of a single image under a single seed, counts once (two-way random effects). The best of a study's points is looked for by the
same test images, which favours it a little. The claim holds where every study has a point that dominates, for every member.

Everything is in `--folder` (default .bench/real_study): killed at any moment, the same command goes on, no training is done twice. More
`--seeds`, `--points` or `--minutes` add to what is there. Writes benchmarks/results/real_study.json.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.cli import invoke
from lowsearch.data import ImageData, Split, load_data
from lowsearch.errors import LowsearchError, StudyError, UsageError
from lowsearch.files import write_atomically
from lowsearch.latency.compare import EFFORT
from lowsearch.latency.machine import load_average
from lowsearch.latency.measure import Effort, time_until_tight
from lowsearch.latency.pace import DISTURBED, hot_samples, pace_since
from lowsearch.latency.target import require_attached, resolve_target
from lowsearch.latency.timing import Network, TimmNetwork, latency_ms, standard_error_ms
from lowsearch.space import SearchSpace
from lowsearch.train import OtherNetwork, Recipe, recipe, train
from lowsearch.train.recipe import recipe_spec

RESULTS = Path(__file__).parent / "results" / "real_study.json"
CONTEST, LATENCIES = "contest.json", "latencies.json"
SEED_STREAM = 2_000_003
"""Keeps the contest's seeds apart from those of the studies and of their own finals."""
FASTER, BETTER_POINTS, MARGIN_POINTS = 1.3, 1.0, 0.5
RUNTIME = "onnxruntime"
SETS = 2
"""Measurements of all networks before the trainings, and again after them."""
TIMM = ("lcnet_050@64", "mobilenetv3_small_050@64", "mobilenetv4_conv_small_050@64", "starnet_s050@64", "efficientvit_b0@64")
"""0.4 to 2.1 M params and 2 to 9 M MACs with ten classes. Their stems and strides are as timm has them: 64 px leave them a last map of
2x2, as 32 px leave the hand-made family; of 32 px one pixel would be left."""
TIMM_STRIDE = 32
ONE_THREAD = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist-mini")
    parser.add_argument("--space", default="lowformer-micro")
    parser.add_argument("--recipe", default="micro", help="of the studies and of the finals")
    parser.add_argument("--recipe-set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--studies", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="one study for every seed")
    parser.add_argument("--minutes", type=float, default=10, help="of search, for every study")
    parser.add_argument("--trials", type=int, help="networks that a study proposes, instead of --minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes that train side by side, one thread each")
    parser.add_argument("--points", type=int, default=4, help="proposals of every study in the contest")
    parser.add_argument("--seeds", type=int, default=3, help="fresh trainings of every network in the contest, at least 2")
    parser.add_argument("--timm", nargs="*", default=list(TIMM), metavar="NAME@PX")
    parser.add_argument("--folder", type=Path, default=Path(".bench/real_study"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--contest", action="store_true", help="the trainings that are left of the contest in the folder, and the result")
    parser.add_argument("--report", action="store_true", help="the result from the folder, of what is trained and measured there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a process of this script that trains for the contest
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    try:
        if arguments.worker:
            work(folder)
            return
        if arguments.contest:
            go_on(folder, workers=arguments.workers)
        elif not arguments.report:
            run_all(arguments, folder)
        result = report(folder)
    except LowsearchError as error:
        sys.exit(_complain(error))
    write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written to {arguments.out}")


def run_all(arguments: argparse.Namespace, folder: Path) -> None:
    """Every step that is not done yet."""
    if arguments.seeds < 2:
        raise UsageError(f"--seeds {arguments.seeds}: the spread between seeds needs at least 2", hint="--seeds 3")
    data_name, space_name = _absolute(arguments.data), _absolute(arguments.space)
    spec = recipe_spec(_absolute(arguments.recipe), arguments.recipe_set)
    data, schedule = load_data(data_name), recipe(spec)
    timm = [_timm_network(text, len(data.classes)) for text in arguments.timm]
    counts = {key_of(network): _count(network) for network in timm}  # Before hours of work: whether each can be built, and runs.
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        for seed in arguments.studies:
            search(arguments, folder, seed, data=data_name, space=space_name)
        contest = Contest.between(arguments, folder, timm, counts, data, data_name, space_name, spec, schedule)
        contest.save(folder)
        measure(folder, contest, sets=SETS)
        train_all(folder, contest, schedule, workers=arguments.workers)
        measure(folder, contest, sets=2 * SETS)


def go_on(folder: Path, *, workers: int) -> None:
    """The trainings that are left. Raises StudyError where the folder holds no contest, or its data set is another one here."""
    contest = Contest.load(folder)
    if (found := load_data(contest.data).data_hash) != contest.data_hash:
        raise StudyError(
            f"{contest.data} has the hash {found}, that of the contest {contest.data_hash}", hint="give the same images the same place"
        )
    with alone_in(folder):
        train_all(folder, contest, recipe(contest.recipe), workers=workers)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises StudyError where another process works in `folder`."""
    try:
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise StudyError(f"another process works in {folder}", hint="wait for it, or give another --folder") from error
    with lock:
        yield


# The studies -----------------------------------------------------------------------------------------------------------


def search(arguments: argparse.Namespace, folder: Path, seed: int, *, data: str, space: str) -> None:
    """Bring the study of `seed` to its end, by the command line that a user would type. It runs in this process, and ends with it."""
    command = ["run", "--study", f"real-{seed}", "--seed", str(seed), "--data", data, "--space", space, "--runtime", RUNTIME]
    command += ["--recipe", _absolute(arguments.recipe), *(word for change in arguments.recipe_set for word in ("--recipe-set", change))]
    command += ["--workers", str(arguments.workers)]
    command += ["--trials", str(arguments.trials)] if arguments.trials else ["--budget", f"{round(60 * arguments.minutes)}s"]
    done = folder / f"study-{seed}.done"
    if done.exists() and done.read_text() == shlex.join(command):
        return
    _say(f"lowsearch {shlex.join(command)}")
    with contextlib.chdir(folder):
        code = invoke(command)
    if code != 0:
        sys.exit(code)
    write_atomically(done, shlex.join(command))


def front_of(study: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(proposals on the front, hand-made members) of a finished study, as its own final training and measurement have them."""
    with (study / "finalists.csv").open(encoding="utf-8") as file:
        rows = [
            {
                "arch_id": row["arch_id"], "name": row["name"], "origin": row["origin"], "on_front": row["on_front"].lower() == "true",
                **{name: float(row[name]) for name in ("val_accuracy", "latency_ms")},
            }
            for row in csv.DictReader(file)
        ]  # fmt: skip
    members = [row for row in rows if row["origin"] == "family"]
    return [row for row in rows if row["on_front"] and row["origin"] != "family"], members


def choose(front: Sequence[Mapping[str, Any]], members: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """Up to `n` points of `front`, the fastest first, by validation accuracy and latency alone.

    For every member its replacement: the most accurate point that is FASTER times as fast, or where there is none, no slower. Of more
    than `n`, those spread over the logarithm of latency; of fewer, others of the front join, spread alike.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for member in members:
        for most_ms in (member["latency_ms"] / FASTER, member["latency_ms"]):
            if found := [point for point in front if point["latency_ms"] <= most_ms]:
                best = max(found, key=lambda point: (point["val_accuracy"], -point["latency_ms"]))
                chosen[best["arch_id"]] = best
                break
    points = spread(list(chosen.values()), n)
    others = [point for point in front if point["arch_id"] not in chosen]
    return sorted([*points, *spread(others, n - len(points))], key=lambda point: point["latency_ms"])


def spread(points: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """`n` of `points` (all where there are no more), nearest to equal steps of log latency; the fastest and the slowest are among them."""
    left = sorted(points, key=lambda point: point["latency_ms"])
    if n <= 0 or not left:
        return []
    if n == 1:
        return [max(left, key=lambda point: point["val_accuracy"])]
    chosen = []
    wanted = np.linspace(math.log(left[0]["latency_ms"]), math.log(left[-1]["latency_ms"]), n)
    for log_ms in [wanted[0], wanted[-1], *wanted[1:-1]]:
        if left:
            chosen.append(left.pop(min(range(len(left)), key=lambda i: abs(math.log(left[i]["latency_ms"]) - log_ms))))
    return chosen


# The contest -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Who is trained, how, and with which seeds; written before the first training."""

    command: str
    data: str
    data_hash: str
    images: dict[str, int]
    space: str
    num_classes: int
    recipe: str
    recipe_hash: str
    seeds: tuple[int, ...]
    networks: tuple[dict[str, Any], ...]
    """`key`; `origin`: proposed, family or timm; `name`; `arch` or `timm`; `resolution_px`, `macs`, `params`; the `studies` it is from."""
    studies: tuple[dict[str, Any], ...]

    @classmethod
    def between(
        cls,
        arguments: argparse.Namespace,
        folder: Path,
        timm: Sequence[TimmNetwork],
        counts: Mapping[str, cost.Cost],
        data: ImageData,
        data_name: str,
        space_name: str,
        spec: str,
        schedule: Recipe,
    ) -> Contest:
        """The contest of the finished studies in `folder`."""
        space = SearchSpace.load(space_name).with_num_classes(len(data.classes))
        networks: dict[str, dict[str, Any]] = {}
        for name, arch in space.family.items():
            networks[arch.arch_id] = _row(arch, cost.count(arch), origin="family", name=name)
        studies = []
        for seed in arguments.studies:
            home = folder / "studies" / f"real-{seed}"
            front, members = front_of(home)
            points = choose(front, members, arguments.points)
            for point in points:
                arch = Arch.from_json((home / "models" / point["arch_id"] / "arch.json").read_text(encoding="utf-8"))
                row = networks.setdefault(arch.arch_id, _row(arch, cost.count(arch), origin="proposed", name=arch.arch_id))
                row["studies"].append(seed)
            measured_ms = {row["arch_id"]: row["latency_ms"] for row in (*points, *members)}
            studies.append(_facts_of(home, seed, arguments.workers, front, points) | {"measured_ms": measured_ms})
        for network in timm:
            networks[key_of(network)] = _row(network, counts[key_of(network)], origin="timm", name=network.name)
        seeds = [int(np.random.default_rng([SEED_STREAM, k]).integers(2**31)) for k in range(arguments.seeds)]
        return cls(
            command=_command_without_paths(), data=data_name, data_hash=data.data_hash, space=space_name, num_classes=len(data.classes),
            images={name: len(getattr(data, name)) for name in ("train", "val", "test")},
            recipe=spec, recipe_hash=schedule.recipe_hash, seeds=tuple(seeds), networks=tuple(networks.values()), studies=tuple(studies),
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        write_atomically(folder / CONTEST, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Contest:
        """Raises StudyError where there is none yet."""
        path = folder / CONTEST
        if not path.exists():
            raise StudyError(f"{folder} holds no finished studies", hint="run the same command without --report")
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def trainings(self) -> list[tuple[dict[str, Any], int]]:
        """Every network of ours with the first seed, then with the second, and so on; then timm's likewise, beside the claim."""
        ours = [network for network in self.networks if network["origin"] != "timm"]
        beside = [network for network in self.networks if network["origin"] == "timm"]
        return [(network, seed) for networks in (ours, beside) for seed in self.seeds for network in networks]


def key_of(network: Network) -> str:
    """Names a network in files."""
    return network.arch_id if isinstance(network, Arch) else f"{network.name}@{network.resolution_px}"


def network_of(row: Mapping[str, Any]) -> Network:
    """The network of a row of `Contest.networks`."""
    return Arch.from_dict(row["arch"]) if "arch" in row else TimmNetwork(**row["timm"])


def _row(network: Network, counted: cost.Cost, *, origin: str, name: str) -> dict[str, Any]:
    value = {"arch": network.to_dict()} if isinstance(network, Arch) else {"timm": dataclasses.asdict(network)}
    return {
        "key": key_of(network), "origin": origin, "name": name, **value, "resolution_px": network.resolution_px,
        "macs": counted.macs, "params": counted.params, "studies": [],
    }  # fmt: skip


def _facts_of(study: Path, seed: int, workers: int, front: Sequence[Any], points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    summary = json.loads((study / "summary.json").read_text(encoding="utf-8"))
    return {
        "seed": seed, "scored": summary["scored"], "spent_s": {phase: round(s, 1) for phase, s in summary["spent_s"].items()},
        "cpu_minutes_at_most": round(workers * sum(summary["spent_s"].values()) / 60, 1), "proposals_on_front": len(front),
        "points": [{name: point[name] for name in ("arch_id", "val_accuracy", "latency_ms")} for point in points],
    }  # fmt: skip


# Training, in the workers ----------------------------------------------------------------------------------------------


def train_all(folder: Path, contest: Contest, schedule: Recipe, *, workers: int) -> None:
    """Train what is missing, in so many processes; they end when this one does."""
    total = len(contest.trainings)
    done = _done(folder, contest)
    if len(done) == total:
        return
    (folder / "logs").mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--folder", str(folder)]
    names = {row["key"]: row["name"] for row in contest.networks}
    crew: list[subprocess.Popen[bytes]] = []
    for i in range(workers):
        with (folder / "logs" / f"contest-{i}.log").open("a") as log:
            crew.append(subprocess.Popen(command, env=ONE_THREAD, stdin=subprocess.PIPE, stderr=log))
    _say(f"the contest: {len(contest.networks)} networks, {len(contest.seeds)} seeds, {total} trainings, {len(done)} of them done")
    while True:
        codes = [worker.poll() for worker in crew]  # Before the look at what is done, which then misses nothing.
        now = _done(folder, contest)
        for path, found in now.items():
            if path not in done:
                percent, seconds = 100 * found["test_accuracy"], found["cpu_seconds"]
                left_min = _left_min(contest, now, workers)
                name = names[found["network"]]
                _say(f"{len(now):3} of {total}: {name:26} {percent:.2f} % in {seconds:.0f} s; {left_min:.0f} minutes left")
        done = now
        if any(code not in (None, 0) for code in codes):
            for worker in crew:
                worker.kill()
            failed = next(i for i, code in enumerate(codes) if code not in (None, 0))
            log_path = folder / "logs" / f"contest-{failed}.log"
            last = (log_path.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise StudyError(f"a training of the contest failed: {last}", hint=f"read {log_path}; the same command goes on")
        if all(code == 0 for code in codes):
            return
        time.sleep(1)


def work(folder: Path) -> None:
    """One worker: trains what no other has done or is doing."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)  # On one thread the same training gives the same weights, killed or not.
    contest = Contest.load(folder)
    data = load_data(contest.data)
    # How often the validation images are looked at on the way changes no weights, and is no part of the hash.
    schedule = dataclasses.replace(recipe(contest.recipe), evaluate_at=(1.0,))
    assert (data.data_hash, schedule.recipe_hash) == (contest.data_hash, contest.recipe_hash), "the contest was written a moment ago"
    for patience_s in (0, -1):  # Then again, and waiting: one that held a training may have ended before it.
        for row, seed in contest.trainings:
            path = training_path(folder, row["key"], seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(Timeout), FileLock(f"{path}.lock", timeout=patience_s):
                if not path.exists():
                    _train_one(path, network_of(row), seed, data, schedule)


def _train_one(path: Path, network: Network, seed: int, data: ImageData, schedule: Recipe) -> None:
    """Train one network with one seed, read the test images, and leave what came of it at `path`."""
    checkpoint = path.with_suffix(".safetensors")
    trained = train(as_trained(network), data, schedule, seed=seed, checkpoint=checkpoint)
    right = correct(trained.model(), data.test, network.resolution_px)
    found = {
        "network": key_of(network), "seed": seed, "recipe_hash": schedule.recipe_hash, "data_hash": data.data_hash,
        "val_accuracy": trained.val_accuracy, "test_accuracy": float(right.mean()), "diverged": trained.diverged,
        "cpu_seconds": round(trained.cpu_seconds, 2), "n_test": len(right), "correct": np.packbits(right).tobytes().hex(),
    }  # fmt: skip
    write_atomically(path, json.dumps(found) + "\n")
    checkpoint.unlink(missing_ok=True)


def as_trained(network: Network) -> Arch | OtherNetwork:
    """`network` as the engine takes it; one of timm's as timm makes it for training, initialised by the seed."""
    if isinstance(network, Arch):
        return network

    def build(seed: int, drop_path: float) -> Any:
        import timm
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            changed: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
            return timm.create_model(network.name, pretrained=False, num_classes=network.num_classes, **changed)

    assert network.num_classes is not None
    return OtherNetwork(
        arch_id=key_of(network), resolution_px=network.resolution_px, num_classes=network.num_classes, total_stride=TIMM_STRIDE, build=build
    )  # fmt: skip


def correct(model: Any, split: Split, resolution_px: int) -> np.ndarray:
    """Which images of `split` the trained `model` classifies rightly, (n,) bool."""
    import torch

    from lowsearch.train.feed import network_input

    found = []
    with torch.inference_mode():
        for start in range(0, len(split), 250):
            part = slice(start, start + 250)
            logits = model(network_input(split.images[part], resolution_px))
            found.append(logits.argmax(1).numpy() == split.labels[part])
    return np.concatenate(found)


def training_path(folder: Path, key: str, seed: int) -> Path:
    return folder / "trainings" / f"{key}-s{seed}.json"


def _done(folder: Path, contest: Contest) -> dict[Path, dict[str, Any]]:
    """The trainings of the contest that are on disk. Raises StudyError where one was made of other data or by another recipe."""
    found = {}
    for row, seed in contest.trainings:
        path = training_path(folder, row["key"], seed)
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            for what in ("recipe_hash", "data_hash"):
                if values[what] != getattr(contest, what):
                    raise StudyError(
                        f"{path} has {what} {values[what]}, the contest {getattr(contest, what)}", hint="give another --folder"
                    )  # fmt: skip
            found[path] = values
    return found


def _left_min(contest: Contest, done: Mapping[Path, Mapping[str, Any]], workers: int) -> float:
    """Minutes that the missing trainings will take, by those of the same network, or of all."""
    seconds: dict[str, list[float]] = {}
    for found in done.values():
        seconds.setdefault(found["network"], []).append(found["cpu_seconds"])
    usual = float(np.mean([s for values in seconds.values() for s in values])) if seconds else math.nan
    had = {(found["network"], found["seed"]) for found in done.values()}
    missing = [row["key"] for row, seed in contest.trainings if (row["key"], seed) not in had]
    return sum(float(np.mean(seconds[key])) if key in seconds else usual for key in missing) / workers / 60


def _end_with_parent() -> None:
    """End this process when the parent is gone: whoever resumes must not meet it."""
    while os.read(0, 64):
        pass
    os._exit(1)


# Measuring -------------------------------------------------------------------------------------------------------------


def measure(folder: Path, contest: Contest, *, sets: int, effort: Effort = EFFORT) -> None:
    """Latency of all networks, interleaved in fresh processes, until there are so many sets; what the runtime cannot execute is left out.

    A set is a whole measurement. Another choice of networks begins anew.
    """
    path = folder / LATENCIES
    keys = sorted(row["key"] for row in contest.networks)
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if stored.get("asked") != keys or "sets" not in stored:
        stored = {"asked": keys, "sets": []}
    target = resolve_target("cpu", RUNTIME)
    device = require_attached(target)
    networks = {row["key"]: network_of(row) for row in contest.networks}
    while len(stored["sets"]) < sets:
        number, load = len(stored["sets"]), load_average()
        _say(f"measuring {len(networks)} networks on {target}, set {number + 1}")
        timings = time_until_tight(list(networks.values()), target, effort, device, seed=100 * number)
        samples = hot_samples(timings)
        found = {
            key: {
                "latency_ms": latency_ms(*samples[network]), "latency_std_ms": standard_error_ms(*samples[network]),
                "wall_over_cpu": round(max(timing.wall_over_cpu for timing in timings[network]), 3),
            }
            for key, network in networks.items()
            if network in samples
        }  # fmt: skip
        stored["context"] = {"device": target.device, "target": str(target), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        stored["sets"].append({"at": datetime.now(UTC).isoformat(timespec="seconds"), "load_average_before": load, "networks": found})
        write_atomically(path, json.dumps(stored, indent=1) + "\n")


def joined(sets: Sequence[Mapping[str, Mapping[str, float]]]) -> tuple[dict[str, dict[str, float]], list[float]]:
    """({network: its latency over all quiet sets}, how many times slower each set was than the quietest).

    A neighbour on the host may slow a set down from its beginning to its end, some networks more than others, and nothing inside of the
    set tells. So a set whose median network took more than DISTURBED times as long as in the quietest one does not count. The standard
    error of a network is that of its own sets or that between sets, pooled over networks, whichever is larger.
    """
    keys = [key for key in sets[0] if all(key in found for found in sets)]
    log_ms = np.log([[found[key]["latency_ms"] for key in keys] for found in sets])
    log_pace = np.median(log_ms - np.median(log_ms, axis=0), axis=1)
    log_pace -= log_pace.min()
    quiet = np.flatnonzero(log_pace <= math.log(DISTURBED))
    at_one_pace = (log_ms - log_pace[:, None])[quiet]
    between = float(np.mean(np.var(at_one_pace, axis=0, ddof=1))) if len(quiet) > 1 else 0.0
    latencies = {}
    for i, key in enumerate(keys):
        own = float(np.mean([(sets[s][key]["latency_std_ms"] / sets[s][key]["latency_ms"]) ** 2 for s in quiet]))
        ms = math.exp(at_one_pace[:, i].mean() + log_pace[quiet].mean())
        latencies[key] = {
            "latency_ms": ms, "latency_std_ms": ms * math.sqrt(max(own, between) / len(quiet)),
            "wall_over_cpu": max(sets[s][key]["wall_over_cpu"] for s in quiet),
        }  # fmt: skip
    return latencies, [round(math.exp(pace), 3) for pace in log_pace]


def paces_since(studies: Sequence[Mapping[str, Any]], latencies: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """For every study, how many times longer its finalists took here than when it measured them itself: the median."""
    found = {}
    for study in studies:
        then_ms = {key: ms for key, ms in study["measured_ms"].items() if key in latencies}
        found[str(study["seed"])] = round(pace_since([latencies[key]["latency_ms"] for key in then_ms], list(then_ms.values())), 3)
    return found


# The verdict -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A proposed point against another network."""

    points: float
    """Its test accuracy minus the other's, in percentage points."""
    points_se: float
    speedup: float
    """The other's latency over its own."""
    speedup_se: float

    @property
    def low_points(self) -> float:
        return self.points - 2 * self.points_se

    @property
    def verdict(self) -> Literal["", "faster", "better", "faster and better"]:
        """By which of the two rules it dominates; empty where by none."""
        low_speedup, high_speedup = self.speedup - 2 * self.speedup_se, self.speedup + 2 * self.speedup_se
        faster = self.speedup >= FASTER and low_speedup > 1 and self.low_points >= -MARGIN_POINTS
        better = self.points >= BETTER_POINTS and self.low_points > 0 and high_speedup >= 1
        return "faster and better" if faster and better else "faster" if faster else "better" if better else ""


def difference(a: Mapping[str, Any], b: Mapping[str, Any], seed_var: float) -> Difference:
    """`a` against `b`: `correct` (n_seeds, n_images) bool, `latency_ms`, `latency_std_ms`. `seed_var`: of an accuracy, over seeds."""
    right_a, right_b = np.asarray(a["correct"], dtype=float), np.asarray(b["correct"], dtype=float)
    speedup = b["latency_ms"] / a["latency_ms"]
    relative = math.hypot(a["latency_std_ms"] / a["latency_ms"], b["latency_std_ms"] / b["latency_ms"])
    return Difference(
        points=100 * float(right_a.mean() - right_b.mean()), points_se=100 * standard_error(right_a, right_b, seed_var),
        speedup=speedup, speedup_se=speedup * relative,
    )  # fmt: skip


def standard_error(a: np.ndarray, b: np.ndarray, seed_var: float) -> float:
    """Of the difference of two mean accuracies on the same images, (n_seeds, n_images) each.

    Two-way random effects: seeds and images each vary, and their interaction is in the spread of both, so it is taken off once.
    """
    n_images = a.shape[1]
    seeds = seed_var * (1 / len(a) + 1 / len(b))
    images = float(np.var(a.mean(0) - b.mean(0), ddof=1)) / n_images
    both = sum(interaction(x) / len(x) for x in (a, b)) / n_images
    return math.sqrt(max(seeds + images - both, seeds, images))


def interaction(right: np.ndarray) -> float:
    """Variance of a single image under a single seed, beyond what image and seed each explain, of (n_seeds, n_images); 0 for one seed."""
    if len(right) < 2:
        return 0.0
    residual = right - right.mean(0) - right.mean(1, keepdims=True) + right.mean()
    return float((residual**2).sum() / ((len(right) - 1) * (right.shape[1] - 1)))


def pooled_seed_variance(accuracies: Sequence[Sequence[float]]) -> float:
    """Variance over seeds, pooled over networks by their degrees of freedom; 0 where no network has two seeds."""
    squares = sum(float(np.var(values) * len(values)) for values in accuracies)
    freedom = sum(len(values) - 1 for values in accuracies)
    return squares / freedom if freedom else 0.0


def best_against(points: Sequence[Mapping[str, Any]], member: Mapping[str, Any], seed_var: float) -> tuple[str, Difference]:
    """(key, difference) of the point that dominates `member` most clearly, or else comes nearest: of those no slower, the most accurate."""
    differences = [(str(point["key"]), difference(point, member, seed_var)) for point in points]
    return max(differences, key=lambda pair: (bool(pair[1].verdict), pair[1].speedup >= 1, pair[1].low_points))


# The result ------------------------------------------------------------------------------------------------------------


def report(folder: Path) -> dict[str, Any]:
    """The result from what is trained and measured in `folder`. Raises StudyError where that is not enough."""
    contest = Contest.load(folder)
    path = folder / LATENCIES
    if not path.exists():
        raise StudyError(f"{folder} holds no latencies yet", hint="run the same command without --report")
    measured = json.loads(path.read_text(encoding="utf-8"))
    latencies, set_paces = joined([found["networks"] for found in measured["sets"]])
    trainings = _done(folder, contest)
    rows = []
    for row in contest.networks:
        found = [trainings[p] for seed in contest.seeds if (p := training_path(folder, row["key"], seed)) in trainings]
        latency = latencies.get(row["key"])
        if len(found) < 2 or latency is None:
            _say(f"left out: {row['key']}, {len(found)} trainings, latency {'known' if latency else 'not known'}")
            continue
        right = np.array([_unpacked(values) for values in found])
        rows.append({**row, **latency, "found": found, "correct": right})
    ours = [row for row in rows if row["origin"] != "timm"]
    seed_var = pooled_seed_variance([[f["test_accuracy"] for f in row["found"]] for row in ours])
    verdicts = _verdicts(contest, rows, seed_var, "family")
    by_study = {
        str(study["seed"]): sum(bool(v["verdict"]) for v in verdicts if v["study"] == study["seed"]) for study in contest.studies
    }  # fmt: skip
    members = sum(row["origin"] == "family" for row in contest.networks)
    return {
        "claim": "proposed points dominate every hand-made member on real images, one final recipe for all, fresh seeds",
        "command": contest.command, "context": _context(measured["context"]),
        "latency_sets": [
            {"at": found["at"], "load_average_before": found["load_average_before"], "times_slower_than_quietest": pace}
            for found, pace in zip(measured["sets"], set_paces, strict=True)
        ],
        "pace_since_studies": paces_since(contest.studies, latencies),
        "data": _without_path(contest.data), "data_hash": contest.data_hash, "images": contest.images,
        "space": _without_path(contest.space), "recipe": recipe(contest.recipe).to_dict(), "recipe_hash": contest.recipe_hash,
        "seeds": len(contest.seeds),
        "rule": {
            "faster": FASTER, "no_less_accurate_than_points": -MARGIN_POINTS, "better_points": BETTER_POINTS, "standard_errors": 2,
            "standard_error": "two-way: seeds (pooled over our networks) and test images (paired), their interaction once",
        },
        "seed_std_points": round(100 * math.sqrt(seed_var), 3),
        "trainings": {"asked": len(contest.trainings), "done": len(trainings)},
        "studies": list(contest.studies), "members": members, "dominated_by_study": by_study,
        "holds": all(n == members for n in by_study.values()), "verdicts": verdicts,
        "beside_timm": _verdicts(contest, rows, seed_var, "timm"),
        "networks": [_to_json(row, seed_var) for row in sorted(rows, key=lambda row: row["latency_ms"])],
        "training_cpu_s": round(sum(f["cpu_seconds"] for row in rows for f in row["found"]), 1),
    }  # fmt: skip


def _verdicts(contest: Contest, rows: Sequence[Mapping[str, Any]], seed_var: float, origin: str) -> list[dict[str, Any]]:
    """The best point of every study against every network of `origin`."""
    found = []
    for other in (row for row in rows if row["origin"] == origin):
        for study in contest.studies:
            points = [row for row in rows if study["seed"] in row["studies"]]
            if points:
                key, d = best_against(points, other, seed_var)
                found.append({
                    "against": other["name"], "study": study["seed"], "point": key, "times_faster": round(d.speedup, 3),
                    "times_faster_se": round(d.speedup_se, 3), "points_more": round(d.points, 2), "points_se": round(d.points_se, 2),
                    "verdict": d.verdict,
                })  # fmt: skip
    return found


def _to_json(row: Mapping[str, Any], seed_var: float) -> dict[str, Any]:
    found = row["found"]
    return {
        **{name: row[name] for name in ("key", "name", "origin", "studies", "resolution_px", "macs", "params")},
        "latency_ms": float(f"{row['latency_ms']:.5g}"), "latency_std_ms": float(f"{row['latency_std_ms']:.3g}"),
        "wall_over_cpu": row["wall_over_cpu"],
        "test_accuracy": round(float(np.mean([f["test_accuracy"] for f in found])), 5),
        "test_accuracy_se_of_seeds": round(math.sqrt(seed_var / len(found)), 5),
        "test_accuracies": [round(f["test_accuracy"], 5) for f in found], "val_accuracies": [round(f["val_accuracy"], 5) for f in found],
        "diverged": sum(f["diverged"] for f in found), "cpu_seconds": round(float(np.mean([f["cpu_seconds"] for f in found])), 1),
        **({"arch": row["arch"]} if row["origin"] == "proposed" else {}),
    }  # fmt: skip


def _unpacked(values: Mapping[str, Any]) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(values["correct"]), dtype=np.uint8))
    return bits[: values["n_test"]].astype(bool)


def show(result: Mapping[str, Any]) -> None:
    """The result as tables for people."""
    print(f"\n{result['data']}, {result['images']}, recipe {result['recipe']['name']}, {result['seeds']} seeds")
    _print_table(
        ("network", "from", "px", "latency ms", "±", "test %", "± seeds", "val %", "MMACs", "Mparams"),
        [
            (
                row["name"], f"study {', '.join(map(str, row['studies']))}" if row["studies"] else row["origin"], row["resolution_px"],
                f"{row['latency_ms']:.4f}", f"{row['latency_std_ms']:.4f}", f"{100 * row['test_accuracy']:.2f}",
                f"{100 * row['test_accuracy_se_of_seeds']:.2f}", f"{100 * np.mean(row['val_accuracies']):.2f}",
                f"{row['macs'] / 1e6:.2f}", f"{row['params'] / 1e6:.3f}",
            )
            for row in result["networks"]
        ],
    )  # fmt: skip
    _print_table(
        ("against", "study", "point", "times faster", "±", "points more", "±", "dominates"),
        [
            (
                v["against"], v["study"], v["point"], f"{v['times_faster']:.2f}", f"{v['times_faster_se']:.2f}", f"{v['points_more']:+.2f}",
                f"{v['points_se']:.2f}", v["verdict"] or "no",
            )
            for v in [*result["verdicts"], *result["beside_timm"]]
        ],
    )  # fmt: skip
    paces = ", ".join(str(found["times_slower_than_quietest"]) for found in result["latency_sets"])
    print(f"sets of latencies, times slower than the quietest: {paces}")
    for study in result["studies"]:
        seed, minutes = str(study["seed"]), study["cpu_minutes_at_most"]
        print(
            f"study {seed}: {result['dominated_by_study'][seed]} of {result['members']} members dominated, at most {minutes} CPU-minutes; "
            f"networks took {result['pace_since_studies'][seed]:.2f} times what they had in it"
        )
    print(f"every member dominated in every study: {'yes' if result['holds'] else 'no'}")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for row in ("", columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(map(str, row))} |" if row else "")


def _context(measured: Mapping[str, Any]) -> dict[str, Any]:
    names = ("lowsearch", "torch", "timm", "onnxruntime", "optuna")
    versions = {name: metadata.version(name) for name in names}
    return {**measured, "cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "versions": versions}


# Names and paths -------------------------------------------------------------------------------------------------------


def _timm_network(text: str, num_classes: int) -> TimmNetwork:
    name, _, px = text.partition("@")
    if not px.isdigit():
        raise UsageError(f"--timm {text!r}: expected NAME@PX", hint=f"--timm {name}@64")
    return TimmNetwork(name, int(px), num_classes)


def _count(network: TimmNetwork) -> cost.Cost:
    from lowsearch.model.zoo import count_timm

    return count_timm(network.name, network.resolution_px, network.num_classes)


def _absolute(name: str) -> str:
    """A data set, space or recipe named by a path, with that path absolute: studies run in the folder."""
    kind, colon, path = name.partition(":")
    if colon:
        return f"{kind}:{Path(path).expanduser().resolve()}" if kind != "torchvision" else name
    return str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name


def _without_path(name: str) -> str:
    kind, colon, path = name.partition(":")
    return f"{kind}:{Path(path).name}" if colon else Path(name).name


def _command_without_paths() -> str:
    """What was typed, with the names of files alone."""
    words = [_without_path(word) if "/" in word else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/real_study.py", *words])


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", flush=True)


def _complain(error: LowsearchError) -> int:
    print(f"error: {error.message}" + (f"\nto mend it: {error.hint}" if error.hint else ""), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
