"""Many workers on one study: leases, joined workers, a database on a server, and a server that goes away."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import optuna
import postgres_server
import pytest
import study_fakes as fakes
import yaml
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError, ProgrammingError

from lowsearch.cli import invoke
from lowsearch.errors import StudyError, UsageError
from lowsearch.study import merging
from lowsearch.study import run as studies
from lowsearch.study.settings import StudySettings, check_resumable
from lowsearch.study.storage import candidates, crew_of, enqueue, open_study, reclaim, set_search_open
from lowsearch.study.workers import leases
from lowsearch.study.workers.database import PASSWORD, Patience, PatientStorage, connect, split_password
from lowsearch.study.workers.joining import join
from lowsearch.study.workers.leases import Watch

SPACE = fakes.SPACE
N_FAMILY = len(SPACE.family)
NO_SERVER = postgres_server.missing()
needs_postgres = pytest.mark.skipif(bool(NO_SERVER), reason=NO_SERVER)


def essence(found):
    return [(c.number, c.genome.tolist(), c.origin, c.name, c.state, c.reason, c.rung, c.accuracy, c.accuracy_std) for c in found]


def assert_nothing_lost_or_done_twice(folder, settings, *, trials):
    """Every network that was asked for is scored, none is held twice, and no rung was trained twice."""
    found = candidates(open_study(folder, settings.objectives), SPACE)
    scored = [c for c in found if c.state == "complete"]
    assert Counter(c.state for c in found) == {"complete": len(found)}
    assert len(scored) == N_FAMILY + trials
    assert len({c.genome.tobytes() for c in scored}) == len(scored)
    trained = Counter((r.arch_id, r.rung) for r in fakes.FakeRecords(folder).read())
    assert set(trained.values()) == {1}
    assert {SPACE.decode(c.genome).arch_id for c in scored} == {arch_id for arch_id, _ in trained}


# Leases


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def held(number, worker, beat=None):
    attrs = {"worker": worker} | ({} if beat is None else {"beat": beat})
    return optuna.trial.FrozenTrial(
        number=number, state=TrialState.RUNNING, value=None, datetime_start=None, datetime_complete=None, params={}, distributions={},
        user_attrs=attrs, system_attrs={}, intermediate_values={}, trial_id=number,
    )  # fmt: skip


def test_a_lease_ends_after_silence_and_a_beat_renews_it():
    clock = Clock()
    watch = Watch(lease_s=90, now=clock)
    said = []
    for second in range(0, 400, 5):
        clock.now = float(second)
        # 1 beats for ever, 2 dies at 100 s, 3 never beats, 4 is handed to another worker at 80 s, who dies.
        trials = [held(1, "a", second // 10), held(2, "b", min(second, 100) // 10), held(3, "c"), held(4, "d" if second < 80 else "e")]
        said += [(number, second) for number in watch.silent(trials) if number not in dict(said)]
    assert said == [(3, 90), (4, 170), (2, 190)]


def test_time_in_which_nobody_could_look_ends_no_lease():
    clock = Clock()
    watch = Watch(lease_s=90, now=clock)
    for moment in (0, 60, 3600, 7200):  # The database was away, or the laptop asleep: 20 s each are counted.
        clock.now = float(moment)
        assert watch.silent([held(1, "a", 1)]) == []
    for _ in range(3):
        clock.now += 10
        silent = watch.silent([held(1, "a", 1)])
    assert silent == [1]


def test_a_worker_that_trains_renews_its_lease_until_the_trial_is_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.01)
    study = open_study(tmp_path, StudySettings().objectives)
    trial = study.ask()
    trial.set_user_attr("worker", "worker-0.a")

    def beat():
        return study.get_trials()[0].user_attrs.get("beat", 0)

    def wait_until(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    before = threading.active_count()
    with leases.kept(study._storage, trial._trial_id, "worker-0.a"):
        wait_until(lambda: beat() >= 3)
        study._storage.set_trial_user_attr(trial._trial_id, "worker", "worker-1.b")
        wait_until(lambda: threading.active_count() == before)
        last = beat()
    time.sleep(0.05)
    assert beat() == last
    assert not leases.is_held(study._storage, trial._trial_id, "worker-0.a")
    assert leases.is_held(study._storage, trial._trial_id, "worker-1.b")


def test_trials_of_other_crews_are_handed_back_only_when_they_are_silent(tmp_path):
    study = open_study(tmp_path, StudySettings().objectives)
    workers = ["worker-0.a", "worker-1.b", "worker-0@there.c", "worker-1@there.d", None]  # One died before it signed.
    for worker in workers:
        trial = study.ask()
        if worker:
            trial.set_user_attr("worker", worker)
    assert [crew_of(worker or "") for worker in workers] == ["", "", "there", "there", ""]
    assert reclaim(study, living=["worker-1.b"]) == [0, 4]
    assert reclaim(study, crew="there", living=["worker-0@there.c"]) == [3]
    assert reclaim(study, crew="elsewhere") == []
    assert reclaim(study, crew="elsewhere", silent=[2]) == [2]
    assert [t.state.name for t in study.get_trials()] == ["WAITING", "RUNNING", "WAITING", "WAITING", "WAITING"]


def test_who_was_overtaken_leaves_the_trial_and_nothing_is_trained_twice(tmp_path, monkeypatch):
    settings = StudySettings(trials=2, workers=1, sampler="random")
    undisturbed = essence(fakes.search(tmp_path / "calm", settings))
    folder = tmp_path / "study"
    train, calls = fakes.FakeTraining.run, itertools.count()

    def overtaken(self, arch, rung):
        record = train(self, arch, rung)
        if next(calls) == 4:  # As if this process had been asleep for longer than its lease.
            study = open_study(folder, settings.objectives)
            (trial,) = study.get_trials(states=(TrialState.RUNNING,))
            assert reclaim(study, crew="another", silent=[trial.number]) == [trial.number]
        return record

    monkeypatch.setattr(fakes.FakeTraining, "run", overtaken)
    assert essence(fakes.search(folder, settings)) == undisturbed
    assert next(calls) > 5
    assert_nothing_lost_or_done_twice(folder, settings, trials=2)


# Patience


AWAY = OperationalError("SELECT 1", {}, Exception("the server closed the connection\nmore"))


def failing(errors):
    """A call that raises each of `errors` once, then returns."""
    left = iter(errors)

    def call():
        error = next(left, None)
        if error is not None:
            raise error
        return "done"

    return call


def test_a_database_that_comes_back_in_time_is_waited_for(caplog):
    clock = Clock()
    patience = Patience("db", 300, now=clock, sleep=lambda s: setattr(clock, "now", clock.now + s))
    wrapped = StorageInternalError("commit")
    wrapped.__cause__ = AWAY
    assert patience(failing([AWAY, wrapped, ConnectionRefusedError("no")] * 4)) == "done"
    assert 10 < clock.now < 300
    assert [m.split(":")[0] for m in caplog.messages] == ["database away, retrying for 300 s", f"database back after {clock.now:.0f} s"]


def test_a_database_that_stays_away_is_given_up_once_and_then_at_once():
    clock = Clock()
    patience = Patience("db", 300, now=clock, sleep=lambda s: setattr(clock, "now", clock.now + s))
    with pytest.raises(StudyError, match=r"the database db has not answered for 300 s: the server closed the connection; hint: start"):
        patience(failing([AWAY] * 10_000))
    assert clock.now == pytest.approx(300)
    with pytest.raises(StudyError):
        patience(failing([AWAY] * 10_000))
    assert clock.now == pytest.approx(300)
    assert patience(failing([])) == "done"
    assert patience(failing([AWAY])) == "done"  # It was there again in between, so it is waited for again.


@pytest.mark.parametrize("error", [ProgrammingError("x", {}, Exception("no such table")), KeyError("x"), StorageInternalError("x")])
def test_what_is_refused_is_not_asked_again(error):
    with pytest.raises(type(error)):
        Patience("db", sleep=lambda _: pytest.fail("waited"))(failing([error]))


class Flaky:
    """A storage whose every `every`-th call fails, before it did anything or after."""

    def __init__(self, inner, every, after):
        self._inner, self._every, self._after, self._calls = inner, every, after, itertools.count(1)

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        def call(*args, **kwargs):
            fails = next(self._calls) % self._every == 0
            if fails and not self._after:
                raise AWAY
            result = method(*args, **kwargs)
            if fails:
                raise AWAY
            return result

        return call


@pytest.mark.parametrize("after", [False, True], ids=["question lost", "answer lost"])
def test_a_search_on_a_database_that_fails_again_and_again_loses_nothing(tmp_path, monkeypatch, after):
    settings = StudySettings(trials=4, workers=1, sampler="random")
    undisturbed = essence(fakes.search(tmp_path / "calm", settings))
    folder = tmp_path / "study"

    def flaky(path):
        inner = _CachedStorage(RDBStorage(f"sqlite:///{path / 'study.db'}"))
        return PatientStorage(Flaky(inner, 7, after), Patience("db", sleep=lambda _: None))

    monkeypatch.setattr("lowsearch.study.storage._file_storage", flaky)
    found = fakes.search(folder, settings)
    if not after:
        assert essence(found) == undisturbed
        return
    # Where the answer to "mine" was lost, nobody holds the trial, until it is handed back.
    for _ in range(20):
        if not open_study(folder, settings.objectives).get_trials(states=(TrialState.RUNNING, TrialState.WAITING)):
            break
        found = fakes.search(folder, settings)
    scored = [c for c in found if c.state == "complete"]
    assert len({c.genome.tobytes() for c in scored}) == len(scored) >= N_FAMILY + 4
    assert {c.state for c in found} <= {"complete", "pruned"}
    assert {c.reason for c in found if c.state == "pruned"} <= {"was tried before"}
    assert set(Counter((r.arch_id, r.rung) for r in fakes.FakeRecords(folder).read()).values()) == {1}


# Joined workers


STARTED = []


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start(*arguments, step_s=0.0, beat_and_lease_s="10 90"):
    env = {**os.environ, "FAKE_STEP_S": str(step_s), "FAKE_BEAT_AND_LEASE_S": beat_and_lease_s}
    process = subprocess.Popen(
        [sys.executable, fakes.__file__, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def wait_for(condition, *processes, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "it does not get there"
        time.sleep(0.05)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


def holders(folder, settings):
    """Crews that hold a trial now."""
    if not (folder / "study.yaml").exists():
        return set()
    running = open_study(folder, settings.objectives).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {crew_of(t.user_attrs["worker"]) for t in running if t.user_attrs.get("worker")}


def joined_and_killed(folder, settings, after_the_kill=lambda: None):
    """A run of one worker that two workers join; the joined ones are killed with their supervisor while they train."""
    folder.mkdir()
    (folder / "hold").touch()  # Nobody ends a training, however slow the others are to start.
    asked = {"trials": settings.trials, "workers": 1, "sampler": settings.sampler, "storage": settings.storage}
    run = start("run", folder, json.dumps(asked), step_s=0.05, beat_and_lease_s="0.5 5")
    wait_for(lambda: holders(folder, settings), run)
    there = start("join", folder, 2, beat_and_lease_s="0.5 5")
    wait_for(lambda: holders(folder, settings) - {""}, run, there)
    os.killpg(there.pid, signal.SIGKILL)
    there.communicate()
    assert holders(folder, settings) - {""}
    (folder / "hold").unlink()
    after_the_kill()
    _, said = ended(run)
    assert "handed back after the silence of their workers" in said
    return said


def test_workers_join_and_what_killed_ones_held_is_handed_back(tmp_path):
    settings = StudySettings(trials=3, workers=1, sampler="random")
    joined_and_killed(tmp_path / "study", settings)
    assert_nothing_lost_or_done_twice(tmp_path / "study", settings, trials=3)


def test_the_end_of_the_search_ends_joined_workers(tmp_path):
    settings, folder = StudySettings(trials=100, workers=1), tmp_path / "study"
    folder.mkdir()
    studies._opened(folder, settings, fakes.make_parts(folder, settings))
    (folder / studies.HOST).write_text(socket.gethostname())
    study = open_study(folder, settings.objectives)
    enqueue(study, SPACE, dict(SPACE.family), origin="family")
    with studies.locked(folder):
        there = start("join", folder, 1, step_s=0.1)
        wait_for(lambda: candidates(study, SPACE)[0].state == "complete", there)
        set_search_open(study, False)
        assert int(ended(there)[0]) > 0
    assert "running" not in {c.state for c in candidates(study, SPACE)}


def test_a_study_whose_trainings_are_tasks_of_ray_is_not_joined(tmp_path):
    settings, folder = StudySettings(trials=3, workers=1, engine="ray"), tmp_path / "study"
    folder.mkdir()
    studies._opened(folder, settings, fakes.make_parts(folder, settings))
    (folder / studies.HOST).write_text(socket.gethostname())
    with studies.locked(folder), pytest.raises(StudyError, match="tasks of Ray"):
        join(folder, workers=1, backend=fakes.backend())


def test_a_study_that_nobody_runs_or_another_machine_holds_is_not_joined(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="holds no study.yaml"):
        join(tmp_path, workers=1)
    folder = tmp_path / "study"
    fakes.search(folder, StudySettings(trials=1, workers=1))
    (folder / studies.HOST).write_text("another-machine\n")
    with pytest.raises(StudyError, match=r"of one machine \(another-machine\) may share; hint: start a study with --storage"):
        join(folder, workers=1)
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    with pytest.raises(StudyError, match="is not being run; hint: start it first: lowsearch run --study study"):
        join(folder, workers=1)


def test_a_run_that_is_making_ready_is_waited_for(tmp_path, monkeypatch):
    """As where a study that had ended is run for longer."""
    settings, folder = StudySettings(trials=1, workers=1), tmp_path / "study"
    fakes.search(folder, settings)
    (folder / studies.HOST).write_text(socket.gethostname())
    study = open_study(folder, settings.objectives)
    set_search_open(study, False)
    states = iter([False, False, True, True, False])
    heard = []
    monkeypatch.setattr("lowsearch.study.workers.joining.time.sleep", lambda _: set_search_open(study, next(states)))
    with studies.locked(folder):
        assert studies.is_run(folder)
        assert join(folder, workers=1, backend=fakes.backend(), progress=lambda *event: heard.append(event[2].split()[0])) == 0
    assert heard == ["waiting"] * 3 + ["networks"] * 2


# Urls and passwords


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql", "cannot be read"),
        ("sqlite:///x.db", "SQLite is a study's own file"),
        ("grpc://host", "names no host and port"),
        ("grpc://host:port", "names no host and port"),
        ("postgresql+psycopg://me:secret@host/db", "holds a password"),
        ("postgresql+psycopg://host/db?password=secret", "holds a password"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_its_password_not_repeated(url, message):
    with pytest.raises(UsageError, match=message) as caught:
        StudySettings(storage=url)
    assert caught.value.hint
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql+psycopg://me:s%40cret@host:5433/db?sslmode=require", "mysql+pymysql://me:s%40cret@host/db"])
def test_a_password_is_split_from_its_url(url):
    assert split_password(url) == (url.replace(":s%40cret", ""), "s@cret")
    StudySettings(storage=split_password(url)[0])


@pytest.mark.parametrize(
    ("url", "module", "hint"),
    [
        ("postgresql+psycopg://host/db", "psycopg", r'pip install "lowsearch\[postgresql\]"'),
        ("mysql+nosuchdriver://host/db", "nosuchdriver", "install it with pip"),
        ("grpc://host:1", "grpc", r'pip install "lowsearch\[grpc\]"'),
    ],
)
def test_a_missing_driver_is_one_line_with_what_installs_it(monkeypatch, url, module, hint):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("optuna.storages._grpc.client.grpc", optuna._imports._LazyImport("grpc"))
    with pytest.raises(StudyError, match=rf"is not installed: .*hint: {hint}") as caught:
        connect(url)
    assert "\n" not in str(caught.value)


def test_a_study_does_not_change_its_database():
    there = StudySettings(storage="postgresql+psycopg://host/db")
    check_resumable("s", there, there)
    with pytest.raises(StudyError, match=r"resume with --storage postgresql\+psycopg://host/db"):
        check_resumable("s", there, StudySettings())
    assert StudySettings.from_dict({k: v for k, v in StudySettings().to_dict().items() if k != "storage"}) == StudySettings()


# A server


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patched, postgres_server.PostgresServer() as started:
        patched.setenv(PASSWORD, postgres_server.PASSWORD)
        yield started


@pytest.fixture(autouse=True)
def no_open_connections():
    """Storages close their connections when they are collected, and psycopg would warn of open ones."""
    yield
    gc.collect()


def calm_search(tmp_path):
    """What LowSearchSampler proposes in a study in a file: random networks, and networks that the models promise most of."""
    found = fakes.search(tmp_path / "file", StudySettings(trials=3, workers=1))
    reasons = [c.why.split()[0] for c in found if c.origin == "proposed"]
    assert set(reasons) == {"diverse", "expected"}
    return essence(found)


@needs_postgres
def test_a_study_on_a_server_searches_as_one_in_a_file(tmp_path, server):
    calm = calm_search(tmp_path)
    settings = StudySettings(trials=3, workers=1, storage=server.url)
    folder, namesake = tmp_path / "study", tmp_path / "other" / "study"
    namesake.parent.mkdir()
    assert essence(fakes.search(folder, settings)) == calm
    assert not (folder / "study.db").exists()
    assert essence(fakes.search(namesake, settings)) == calm  # It shares the server, and no trial.
    assert postgres_server.PASSWORD not in (folder / "study.yaml").read_text()
    assert merging.has_database(folder)


@needs_postgres
def test_workers_survive_a_kill_and_a_restart_of_the_server(tmp_path, server):
    settings = StudySettings(trials=3, workers=1, sampler="random", storage=server.url)

    def restart():
        server.stop()
        time.sleep(4)
        server.start()

    said = joined_and_killed(tmp_path / "study", settings, restart)
    assert "database away, retrying" in said and "database back after" in said
    assert_nothing_lost_or_done_twice(tmp_path / "study", settings, trials=3)


@needs_postgres
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"password": "wrong secret"}, "password authentication failed"),
        ({"url": ("/postgres", "/nowhere")}, 'database "nowhere" does not exist'),
        ({"url": ("127.0.0.1:", "127.0.0.1:1")}, "does not answer"),
    ],
    ids=["password", "database", "port"],
)
def test_a_server_that_refuses_is_one_line_and_leaves_no_study(tmp_path, monkeypatch, server, changed, said):
    if "password" in changed:
        monkeypatch.setenv(PASSWORD, changed["password"])
    url = server.url.replace(*changed.get("url", ("", "")))
    url = url.replace(f"127.0.0.1:1{server.port}", "127.0.0.1:1")
    with pytest.raises(StudyError, match=said) as caught:
        studies.run(StudySettings(trials=1, storage=url), tmp_path / "study", backend=fakes.backend())
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert not (tmp_path / "study" / "study.yaml").exists()


@needs_postgres
def test_the_driver_finds_the_password_where_libpq_does(monkeypatch, server):
    monkeypatch.delenv(PASSWORD)
    monkeypatch.setenv("PGPASSWORD", postgres_server.PASSWORD)
    assert connect(server.url, patience_s=0).get_all_studies() is not None


@needs_postgres
def test_joining_at_the_wrong_database_makes_no_study_there(tmp_path, server):
    settings = StudySettings(trials=1, workers=1, storage=server.url)
    folder = tmp_path / "study"
    fakes.search(folder, settings)
    values = yaml.safe_load((folder / "study.yaml").read_text())
    assert values["optuna_study"].startswith("study-")
    studies.write_study_file(folder, values | {"optuna_study": "another"})
    before = len(connect(server.url).get_all_studies())
    with studies.locked(folder), pytest.raises(StudyError, match="holds no study 'another'; hint: name the --storage"):
        join(folder, workers=1)
    assert len(connect(server.url).get_all_studies()) == before


@needs_postgres
def test_the_command_line_keeps_a_password_to_itself(tmp_path, monkeypatch, capfd, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(PASSWORD, "")
    url = server.url.replace("lowsearch@", "lowsearch:wrong-secret@")
    assert invoke(["run", "--trials", "1", "--study", "mine", "--storage", url]) == 2
    assert "wrong-secret" not in "".join(capfd.readouterr())
    assert os.environ[PASSWORD] == "wrong-secret"
    assert not list(tmp_path.rglob("study.yaml"))


def test_a_search_through_the_grpc_proxy_is_the_same(tmp_path):
    pytest.importorskip("grpc", reason='grpcio is not installed: pip install "lowsearch[grpc]"')
    from optuna.storages._grpc.server import make_server

    calm = calm_search(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = make_server(RDBStorage(f"sqlite:///{tmp_path / 'behind.db'}"), "127.0.0.1", port)
    served.start()
    try:
        settings = StudySettings(trials=3, workers=1, storage=f"grpc://127.0.0.1:{port}")
        assert essence(fakes.search(tmp_path / "study", settings)) == calm
        database_again = connect(settings.storage)
    finally:
        served.stop(0).wait()
    with pytest.raises(StudyError, match="has not answered for 0 s|does not answer"):
        Patience("proxy", 0)(database_again.inner.get_all_studies)
