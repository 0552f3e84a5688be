"""Proposing ahead: the same networks whoever trains them and whatever dies; trainings as orders; Ray."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_tasks
import numpy as np
import optuna
import pytest
import torch
from tiny_fakes import fakes

from lowsearch.accuracy.ladder import Ladder
from lowsearch.arch import Arch, Stage, Stem
from lowsearch.cli import invoke
from lowsearch.data import load_data
from lowsearch.errors import StudyError, UsageError
from lowsearch.study import assembly, gate
from lowsearch.study.finalists import train_planned
from lowsearch.study.settings import StudySettings, check_resumable
from lowsearch.study.storage import candidates, open_study
from lowsearch.study.workers import process
from lowsearch.study.workers import worker as workers
from lowsearch.study.workers.conductor import KNOWS, Conductor
from lowsearch.study.workers.engines import DiedError, Job, check_engine, require_engine
from lowsearch.study.workers.worker import Plan, SearchWorker
from lowsearch.train import Recipe

TINY_SPACE = {"FAKE_SPACE": str(Path(__file__).with_name("tiny_space.yaml"))}  # Few genes, so few commits for every trial.
SPACE, Death, Interrupting, search = fakes.SPACE, fakes.Death, fakes.Interrupting, fakes.search

N_FAMILY = len(SPACE.family)
AHEAD = {"trials": 7, "workers": 1, "in_flight": 3}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


class ShuffledEngine:
    """Carries out orders, which end in an order drawn from `seed`; trainings of `deadly` networks die."""

    def __init__(self, seed=0, deadly=()):
        self.rng, self.deadly, self.most, self.began = np.random.default_rng(seed), deadly, 0, Counter()

    def start(self, order):
        self.began[order.name, order.values.get("rung")] += 1
        return Job(order)

    def wait(self, jobs):
        self.most = max(self.most, len(jobs))
        return [jobs[i] for i in np.flatnonzero(self.rng.random(len(jobs)) < 0.3)] or [jobs[self.rng.integers(len(jobs))]]

    def result(self, job):
        if job.order.name in self.deadly:
            raise DiedError("its process died 2 times")
        return job.order.accept(job.order.function(job.order.shared, **job.order.values))


def essence(found):
    return list(map(str, fakes.essence(found)))  # As text NaN equals NaN.


RAY = {"engine": "ray", "workers": 2}


def conducted(folder, by=None, **settings):
    return search(folder, StudySettings(**{**AHEAD, **settings}), kind=partial(Conductor, engine=by))


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory):
    """What one process finds that proposes ahead, by sampler."""
    return {name: essence(conducted(tmp_path_factory.mktemp(name) / "study", sampler=name)) for name in ("lowsearch", "nsga2")}


# Proposing ahead


def test_who_works_on_the_trials(monkeypatch):
    monkeypatch.setattr(process, "RayEngine", lambda *_, **__: "a cluster")
    kinds = {}
    for name, crew, asked in (
        ("plain", "worker-0.a", {"workers": 4}), ("ahead", "worker-0.a", {"workers": 1, "in_flight": 2}),
        ("ray", "worker-0.a", {"engine": "ray", "in_flight": 1}), ("joined", "worker-0@there.a", {"engine": "ray"}),
    ):  # fmt: skip
        kind = process._kind(Plan(settings=StudySettings(**asked), reference={}, slice_edges=[]), crew)
        kinds[name] = kind if isinstance(kind, type) else (kind.func, kind.keywords["engine"])
    assert kinds == {"plain": SearchWorker, "ahead": (Conductor, None), "ray": (Conductor, "a cluster"), "joined": SearchWorker}


def test_one_trial_in_flight_is_the_plain_search(tmp_path):
    settings = StudySettings(trials=3, workers=1)
    plain = essence(search(tmp_path / "plain", settings))
    assert essence(search(tmp_path / "ahead", settings, kind=partial(Conductor, engine=None))) == plain


@pytest.mark.parametrize(("sampler", "workers"), [("lowsearch", 2), ("lowsearch", 3), ("nsga2", 2)])
def test_an_engine_finds_what_one_process_finds_whichever_training_ends_first(tmp_path, in_one_process, sampler, workers):
    by = ShuffledEngine(seed=workers)
    found = essence(conducted(tmp_path / "study", by, engine="ray", sampler=sampler, workers=workers))
    assert found == in_one_process[sampler]
    assert by.most == workers and set(by.began.values()) == {1}


def test_an_engine_finds_the_same_where_the_predictor_fails_while_trials_are_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "MIN_NETWORKS", N_FAMILY + 2)
    monkeypatch.setattr(gate, "USEFUL", 2.0)  # Every signal fails as soon as it is judged.
    monkeypatch.setattr(workers, "standing", lambda *_, **__: SimpleNamespace(why="it promises little"))
    alone = conducted(tmp_path / "alone", trials=9)
    judged = json.loads((tmp_path / "alone" / gate.GATE).read_text())
    (since,) = judged["steering"]["changes"]
    assert judged["promotion"]["changes"] == [since] and N_FAMILY + 2 < since < len(alone) - 1
    assert {c.origin for c in alone[since:]} == {"random"} and {c.rung for c in alone[since:]} == {1.0}
    assert {c.rung for c in alone[since - AHEAD["in_flight"] + 1 : since]} == {fakes.RUNGS[0]}  # Under way when it failed.
    together = conducted(tmp_path / "together", ShuffledEngine(seed=5), engine="ray", workers=3, trials=9)
    assert essence(together) == essence(alone)


def test_a_trial_knows_what_had_ended_when_it_was_proposed(tmp_path):
    folder = tmp_path / "study"
    seen = []

    class Watching(Conductor):
        def _judged_at(self, record, rung, *, whole):
            seen.append((record.arch_id, {r.arch_id for r in self._records()}))
            return super()._judged_at(record, rung, whole=whole)

    settings = StudySettings(**{**AHEAD, "workers": 3, "engine": "ray"})
    found = search(folder, settings, kind=partial(Watching, engine=ShuffledEngine()))
    number = {SPACE.decode(c.genome).arch_id: c.number for c in found}
    knows = {t.number: t.user_attrs[KNOWS] for t in open_study(folder, settings.objectives).get_trials()}
    assert [knows[n] for n in sorted(knows)] == [max(0, n - 2) for n in sorted(knows)]
    for arch_id, known in seen:
        assert {number[a] for a in known} == {*range(knows[number[arch_id]]), number[arch_id]}


DEATHS = {
    "while training": (fake_tasks, "train_rung", 10, False),
    "after recording": (fakes.FakeTraining, "_recorded", 12, True),
    "between genes": (optuna.trial.Trial, "suggest_int", SPACE.n_genes * (N_FAMILY + 3) + 20, True),
    "before telling": (optuna.study.Study, "tell", N_FAMILY + 2, False),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_search_that_died_goes_on_as_if_it_had_not(tmp_path, monkeypatch, in_one_process, death):
    owner, name, at, after = DEATHS[death]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, Interrupting(getattr(owner, name), at, after=after))
        with pytest.raises(Death):
            conducted(tmp_path / "study", ShuffledEngine(), **RAY)
    engine = ShuffledEngine(seed=1)
    assert essence(conducted(tmp_path / "study", engine, **RAY)) == in_one_process["lowsearch"]
    trained = Counter((r.arch_id, r.rung) for r in fakes.FakeRecords(tmp_path / "study").read())
    assert set(trained.values()) == {1} and 0 < len(engine.began) < len(trained)


def test_a_network_whose_task_dies_is_given_up_and_the_others_are_not(tmp_path):
    deadly = next(iter(SPACE.family.values())).arch_id
    found = conducted(tmp_path / "study", ShuffledEngine(deadly={deadly}), **RAY)
    (failed,) = [c for c in found if c.state != "complete"]
    assert SPACE.decode(failed.genome).arch_id == deadly and failed.reason == "its process died 2 times"
    assert len(found) == N_FAMILY + AHEAD["trials"]


def test_what_was_not_begun_when_the_search_is_stopped_is_left_to_be_handed_back(tmp_path):
    class Stopping(Conductor):
        def _tell(self, flight):
            super()._tell(flight)
            self._stopped.set()

    found = search(tmp_path / "study", StudySettings(**AHEAD), kind=partial(Stopping, engine=None))
    assert Counter(c.state for c in found) == {"complete": 1, "running": 2}
    settings = StudySettings(**AHEAD)
    assert Counter(c.state for c in search(tmp_path / "study", settings, kind=partial(Conductor, engine=None))) == {
        "complete": N_FAMILY + AHEAD["trials"]
    }


def test_a_study_that_trains_nothing_proposes_ahead_too(tmp_path):
    found = conducted(tmp_path / "study", ShuffledEngine(), accuracy="macs", **RAY)
    assert Counter(c.state for c in found) == {"complete": N_FAMILY + AHEAD["trials"]}


# Orders


ARCH = Arch(
    resolution_px=32, stem=Stem(width=4), stages=(Stage(width=8, down_expansion=2),) * 4, head_widths=(16, 16), num_classes=10  # pyright: ignore[reportArgumentType]
)  # fmt: skip
BRIEF = Recipe(name="brief", epochs=2, train_images=96, batch_size=24)


@pytest.fixture
def images(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setattr("lowsearch.train.order.user_cache_path", lambda name: tmp_path / "cache" / name)
    data = load_data("fashion-mnist-mini")
    parts = {"train": data.train.take(np.arange(96)), "val": data.val.take(np.arange(60)), "test": data.test.take(np.arange(10))}
    return dataclasses.replace(data, **parts)


def carried_out(order):
    return order.accept(order.function(order.shared, **order.values))


def test_ordered_rungs_are_those_of_one_training_and_leave_nothing_behind(images, tmp_path):
    away, here = (Ladder(images, BRIEF, folder=tmp_path / name) for name in ("away", "here"))
    for rung in away.rungs:
        found, expected = carried_out(away.order(ARCH, rung)), here.run(ARCH, rung)
        assert [(p.fraction, p.val_loss) for p in found.curve] == [(p.fraction, p.val_loss) for p in expected.curve]
        assert away.record(ARCH, rung) == found
        if rung < 1:
            assert away.order(ARCH, 1.0).values["checkpoint"] == away.checkpoint(ARCH).read_bytes()
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_a_task_that_died_goes_on_from_its_own_checkpoint_when_it_is_ordered_again(images, tmp_path, monkeypatch):
    ladder = Ladder(images, BRIEF, folder=tmp_path / "study")
    order = ladder.order(ARCH, 1.0)
    with monkeypatch.context() as patched:
        run = __import__("lowsearch.train.engine", fromlist=["_Run"])._Run
        patched.setattr(run, "_train_step", Interrupting(run._train_step, 6))
        with pytest.raises(Death):
            carried_out(order)
    steps = []
    run = __import__("lowsearch.train.engine", fromlist=["_Run"])._Run
    step = run._train_step
    monkeypatch.setattr(run, "_train_step", lambda self, batch: (steps.append(self.step), step(self, batch)))
    found = carried_out(order)
    assert steps[0] > 0
    monkeypatch.undo()
    torch.set_num_threads(1)
    expected = Ladder(images, BRIEF, folder=tmp_path / "whole").run(ARCH, 1.0)
    assert [p.val_loss for p in found.curve] == [p.val_loss for p in expected.curve]


def test_an_ordered_final_training_brings_its_weights_home(images, tmp_path):
    found, weights = assembly.train_final_elsewhere(images, arch=ARCH, schedule=BRIEF, seed=3, device="cpu")
    assert assembly._accept_final(tmp_path / "seed-3", (found, weights)) is found
    expected = assembly.train_final(ARCH, images, BRIEF, seed=3, path=tmp_path / "here")
    assert (tmp_path / "seed-3.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    assert (found.val_accuracy, found.test_accuracy) == (expected.val_accuracy, expected.test_accuracy)


def test_finals_by_orders_leave_what_a_worker_would_and_do_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(fake_tasks, "process_id", lambda shared: -1)
    monkeypatch.setenv("FAKE_SPACE", TINY_SPACE["FAKE_SPACE"])
    folder = tmp_path / "study"
    settings = StudySettings(trials=2, workers=1)
    fakes.run(settings, folder, backend=fakes.backend())
    parts = fakes.make_parts(folder, settings)
    files = sorted((folder / "models").glob("*/seed-*.json"))
    before = {path: path.read_text() for path in files}
    for path in files[1:]:
        path.unlink()
    engine = ShuffledEngine()
    train_planned(folder, parts, engine=engine, at_once=2)
    assert {path: path.read_text() for path in files} == before
    assert engine.most == 2 and engine.began.total() == len(files) - 1
    files[0].unlink()
    with pytest.raises(StudyError, match=r"was given up: its process died 2 times; hint: give its task more memory"):
        train_planned(folder, parts, engine=ShuffledEngine(deadly={files[0].parent.name}), at_once=3)


# What is asked for


@pytest.mark.parametrize("name", ["dask", "ray:", "ray:///x", "ray://host", "ray://host:0", "ray://host:99999", "ray://me@host:1"])
def test_other_engines_are_refused(name, capsys):
    with pytest.raises(UsageError, match=r"unknown engine .*; hint: local, --engine ray, "):
        check_engine(name)
    assert invoke(["run", "--engine", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_engine_may_change_and_several_local_workers_do_not_propose_ahead():
    ray = StudySettings(engine="ray", workers=3, in_flight=4, trial_gpus=0.25)
    check_resumable("s", ray, StudySettings(engine="local"))
    assert StudySettings.from_dict(ray.to_dict()) == ray
    assert (ray.n_ahead, StudySettings(engine="ray", workers=3).n_ahead, StudySettings().n_ahead) == (4, 6, 1)
    assert [StudySettings(train_device=d).task_gpus for d in ("cpu", "cuda", None)] == [0, 1, 0]
    with pytest.raises(UsageError, match="--workers 1, or --engine ray"):
        StudySettings(in_flight=2, workers=2)
    with pytest.raises(UsageError, match="--trial-cpus 1 --trial-gpus"):
        StudySettings(engine="ray", trial_cpus=0)


def test_ray_is_asked_for_in_one_line_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r'--engine ray needs Ray, which is not installed; hint: pip install "lowsearch\[ray\]"'):
        require_engine("ray")
    require_engine("local")


def test_a_cluster_that_does_not_answer_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        name = f"ray://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(StudyError, match=rf"no Ray cluster answers at {name}: .*; hint: on its head: ray start --head"):
            require_engine(name)


# Ray


def started(folder, **settings):
    command = [sys.executable, fakes.__file__, "run", str(folder), json.dumps(settings)]
    env = {**os.environ, "FAKE_STEP_S": "0.03", **TINY_SPACE}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def n_tasks(folder):
    return (folder / "tasks.log").read_text().count("\n") if (folder / "tasks.log").exists() else 0


@pytest.mark.ray
@needs_ray
def test_ray_finds_what_one_process_finds_though_a_task_and_the_whole_run_are_killed(tmp_path, in_one_process):
    settings = {**AHEAD, **RAY}
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "crash-once").write_text(list(SPACE.family.values())[1].arch_id)
    run = started(folder, **settings)
    deadline = time.monotonic() + 120
    while n_tasks(folder) < 7:
        assert run.poll() is None, run.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    again = started(folder, **settings)
    assert again.wait(timeout=120) == 0, again.communicate()[1].decode()
    again.communicate()
    assert not (folder / "crash-once").exists()
    found = candidates(open_study(folder, StudySettings().objectives), SPACE)
    assert essence(found) == in_one_process["lowsearch"]
    assert set(Counter((r.arch_id, r.rung) for r in fakes.FakeRecords(folder).read()).values()) == {1}
    by_process = Counter(line.split()[2] for line in (folder / "tasks.log").read_text().splitlines())
    assert len(by_process) >= 3 and str(run.pid) not in by_process
    assert json.loads((folder / "summary.json").read_text())["finalists"] > 0
