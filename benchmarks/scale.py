"""Eight workers on one study in PostgreSQL, under fire: is a trial lost or done twice, and what does the database cost?

    python benchmarks/scale.py [--trials 200] [--alone 30]

Needs PostgreSQL's binaries and `pip install "lowsearch[postgresql]"`; the server is its own, in a temporary folder. Four workers of
`lowsearch run` and four of `lowsearch worker` train the smallest members of a small space on 256 images. Meanwhile one worker of each
is killed with -9, then the whole second crew with its supervisor (its lease has to end before its trials go on; another crew joins),
and the server is stopped as in a crash and started again a minute later. Then the database and the records are checked. One worker
without fire runs `--alone` trials for comparison. Writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from kill_resume import prepare
from optuna.trial import TrialState

from lowsearch.accuracy.ladder import TRAINED_TWICE
from lowsearch.search.objectives import parse_objectives
from lowsearch.search.sampler import suggest_genome
from lowsearch.space import SearchSpace
from lowsearch.study.run import write_study_file
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import Candidate, candidates, crew_of, open_study, running
from lowsearch.study.workers.database import PASSWORD
from lowsearch.study.workers.leases import LEASE_S, WORKER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import postgres_server

RESULTS = Path(__file__).parent / "results" / "scale.json"
N_IMAGES = {"train": 256, "val": 200, "test": 200}
PATIENCE_S = 2400
AWAY_S = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--alone", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if reason := postgres_server.missing():
        sys.exit(reason)
    os.environ[PASSWORD] = postgres_server.PASSWORD
    with tempfile.TemporaryDirectory() as folder, postgres_server.PostgresServer() as server:
        home = Path(folder)
        prepare(home, N_IMAGES)
        space = SearchSpace.load(home / "small.yaml").with_num_classes(10)
        lowsearch(home, "profile", "--space", "small.yaml").wait_for_success()
        alone = run_alone(home, server, arguments.alone)
        print("one worker:", json.dumps(alone), flush=True)
        fired = run_under_fire(home, server, space, arguments.trials, random.Random(arguments.seed))
        print("eight workers:", json.dumps(fired), flush=True)
        overhead = {name: overhead_ms(home / name, space, url) for name, url in (("file", None), ("postgresql", server.url))}
        print("database, ms a trial:", json.dumps(overhead), flush=True)
    result: dict[str, Any] = {
        "command": f"python benchmarks/scale.py --trials {arguments.trials} --alone {arguments.alone}",
        "context": {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version(),
                    "optuna": optuna.__version__, "load_average": os.getloadavg()},
        "one_worker": alone, "eight_workers": fired, "database_ms_per_trial": overhead, "lease_s": LEASE_S,
        "passed": fired["lost"] == fired["duplicates"] == fired["scored_without_a_record"] == fired["rungs_trained_twice"] == 0
                  and fired["scored"] == arguments.trials and fired["handed_back_by_lease"] > 0 and fired["times_database_was_away"] > 0,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{'passed' if result['passed'] else 'FAILED'}; written: {RESULTS}")
    sys.exit(not result["passed"])


class Process:
    """A command of lowsearch in a process group of its own."""

    def __init__(self, home: Path, arguments: tuple[str, ...]) -> None:
        self.name = " ".join(arguments[:1])
        self._log = home / f"{self.name}-{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lowsearch", *arguments], cwd=home, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_success(self) -> None:
        if self._process.wait(PATIENCE_S) != 0:
            sys.exit(f"lowsearch {self.name} failed: {self.said()[-3000:]}")

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send it, and its children, a signal."""
        os.killpg(self._process.pid, number)

    def kill_with_children(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()

    def children(self) -> list[int]:
        """Process ids of its workers."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                after_name = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It has ended.
            if int(after_name[1]) == self._process.pid:
                found.append(int(stat.parent.name))
        return found


def lowsearch(home: Path, *arguments: str) -> Process:
    return Process(home, arguments)


def settings_of(home: Path, name: str, server: postgres_server.PostgresServer, trials: int, workers: int) -> list[str]:
    flags = ["--space", "small.yaml", "--data", f"npz:{home / 'small.npz'}", "--study", name, "--storage", server.url]
    return ["run", *flags, "--trials", str(trials), "--workers", str(workers), "--max", "params=60000"]


def run_alone(home: Path, server: postgres_server.PostgresServer, trials: int) -> dict[str, Any]:
    """One worker, to the end of its search; its finals are none of this benchmark's business."""
    process = lowsearch(home, *settings_of(home, "alone", server, trials, 1))
    found = search_of(home / "studies" / "alone", process, lambda _: None)
    process.kill_with_children()
    return {"trials": trials, "workers": 1, **pace(found)}


def run_under_fire(
    home: Path, server: postgres_server.PostgresServer, space: SearchSpace, trials: int, rng: random.Random
) -> dict[str, Any]:
    folder = home / "studies" / "many"
    run = lowsearch(home, *settings_of(home, "many", server, trials, 4))
    joined: list[Process] = []
    fired: list[str] = []

    def join() -> None:
        joined.append(lowsearch(home, "worker", "many", "--workers", "4"))

    def kill_child(process: Process) -> Callable[[], None]:
        return lambda: os.kill(rng.choice(process.children()), signal.SIGKILL)

    def kill_crew() -> None:
        study = open_study(folder, parse_objectives("acc-latency"))
        while True:  # Most of the time its workers wait for their turn to propose: frozen, it is killed where one of them holds a trial.
            joined[0].signal(signal.SIGSTOP)
            if any(crew_of(trial.user_attrs.get(WORKER) or "") for trial in running(study)):
                break
            joined[0].signal(signal.SIGCONT)
            time.sleep(0.05)
        joined[0].kill_with_children()
        join()

    def restart() -> None:
        server.stop()
        time.sleep(AWAY_S)
        server.start()

    plan: list[tuple[float, str, Callable[[], None]]] = [
        (0.02, "another crew joins", join),
        (0.2, "kill -9 of a worker of `lowsearch run`", kill_child(run)),
        (0.3, "kill -9 of a worker of `lowsearch worker`", lambda: kill_child(joined[0])()),
        (0.4, "kill -9 of `lowsearch worker` and its four; another crew joins", kill_crew),
        (0.6, f"PostgreSQL stopped as in a crash, started {AWAY_S} s later", restart),
    ]

    def fire(n_done: int) -> None:
        while plan and n_done >= plan[0][0] * trials:
            _, what, act = plan.pop(0)
            act()
            fired.append(f"at {n_done} trials: {what}")
            print(fired[-1], flush=True)

    found = search_of(folder, run, fire)
    said = run.said() + "".join(process.said() for process in joined)
    run.kill_with_children()
    for process in joined[1:]:
        process.kill_with_children()
    study = open_study(folder, parse_objectives("acc-latency"))
    trials_of = study.get_trials(deepcopy=False)
    proposals = [c for c in found if c.origin != "family"]
    scored = [c for c in proposals if c.state == "complete"]
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    recorded = {(line["arch_id"], line["rung"]) for line in lines}
    # A rung that is on record already gets no second line; who trained it all the same has told its log.
    in_vain = sum(path.read_text(encoding="utf-8", errors="replace").count(TRAINED_TWICE) for path in (folder / "logs").glob("*.log"))
    finished = (TrialState.COMPLETE, TrialState.PRUNED)
    crews = Counter(crew_of(t.user_attrs[WORKER]) for t in trials_of if t.state == TrialState.COMPLETE)
    return {
        "trials": trials, "workers": 8, "events": fired, "scored": len(scored),
        "lost": len(set(range(len(trials_of))) - {t.number for t in trials_of if t.state in finished}),
        "duplicates": len([c for c in found if c.state == "complete"]) - len({c.genome.tobytes() for c in found if c.state == "complete"}),
        "pruned": dict(Counter(c.reason.split(" by ")[0] for c in found if c.state == "pruned")),
        "rungs_recorded": len(recorded), "rungs_trained_twice": len(lines) - len(recorded) + in_vain,
        "scored_without_a_record": len({space.decode(c.genome).arch_id for c in scored} - {arch_id for arch_id, _ in recorded}),
        "crews": sorted(crews.values(), reverse=True), "handed_back_by_lease": said.count("handed back after the silence"),
        "times_database_was_away": said.count("database away, retrying"), **pace(found),
    }  # fmt: skip


def search_of(folder: Path, process: Process, fire: Callable[[int], None]) -> list[Candidate]:
    """Wait for the end of the search in `folder`, calling `fire` with the number of scored networks; returns the candidates."""
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / "study.yaml").exists():
        time.sleep(0.2)
        if not process.is_running or time.monotonic() > deadline:
            sys.exit(f"{process.name} did not start: {process.said()[-3000:]}")
    study, space = open_study(folder, parse_objectives("acc-latency")), SearchSpace.load(folder / "space.yaml")
    while time.monotonic() < deadline:
        fire(sum(c.state == "complete" for c in candidates(study, space)))
        if study.user_attrs.get("search_open") is False:  # The search is over; what follows are the finals.
            return candidates(study, space)
        if not process.is_running:
            sys.exit(f"{process.name} ended early: {process.said()[-3000:]}")
        time.sleep(1)
    sys.exit(f"{process.name} did not end: {process.said()[-3000:]}")


def pace(found: list[Candidate]) -> dict[str, float]:
    """Seconds of search, and scored networks a minute of it."""
    scored = [c.elapsed_s for c in found if c.state == "complete"]
    return {"search_s": round(max(scored), 1), "networks_a_minute": round(60 * len(scored) / max(scored), 1)}


def overhead_ms(folder: Path, space: SearchSpace, url: str | None) -> dict[str, float]:
    """What Optuna and the database take of a trial: asking, every gene, five notes, a look at all trials, telling."""
    folder.mkdir()
    write_study_file(folder, {"schema": "lowsearch-study", "version": 1, "settings": StudySettings(storage=url).to_dict(),
                              "optuna_study": "overhead"})  # fmt: skip
    study = open_study(folder, parse_objectives("acc-latency"), sampler=optuna.samplers.RandomSampler(seed=0))
    taken_ms = []
    for i in range(220):
        began = time.perf_counter()
        trial = study.ask()
        trial.set_user_attr(WORKER, "worker-0")
        suggest_genome(trial, space)
        candidates(study, space)
        for name in ("origin", "reason", "score", "elapsed_s"):
            trial.set_user_attr(name, i)
        for name in ("reason", "score"):
            trial.set_user_attr(name, {})
        study.tell(trial, (0.5, 1.0))
        taken_ms.append(1000 * (time.perf_counter() - began))
    first, last = (float(np.median(part)) for part in (taken_ms[:20], taken_ms[-20:]))
    return {"first_20": round(first, 1), "after_200": round(last, 1), "genes": float(len(space.genes))}


if __name__ == "__main__":
    main()
