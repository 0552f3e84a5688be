"""Studies with closed-form latency and accuracy: who is trained how far, what survives a kill, what a user gets wrong."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import optuna
import pytest
import study_fakes as fakes

from lowsearch import footprint
from lowsearch.cli.found import print_summary
from lowsearch.errors import DataError, NothingLeftError, StudyError, UsageError
from lowsearch.report import tables
from lowsearch.report.study_files import read_study
from lowsearch.search import pareto
from lowsearch.search.objectives import parse_limits
from lowsearch.search.promotion import slice_edges, standing
from lowsearch.study import refinement
from lowsearch.study import run as studies
from lowsearch.study.explain import Change
from lowsearch.study.outputs import StudyFiles
from lowsearch.study.refinement import Lead
from lowsearch.study.run import Clock, run
from lowsearch.study.settings import StudySettings, check_resumable, stored_settings
from lowsearch.study.storage import candidates, n_proposals, open_study, why_ended
from lowsearch.study.workers.conductor import Conductor
from lowsearch.study.workers.crew import _user_error
from lowsearch.study.workers.worker import Abandoned, Plan, SearchWorker

SPACE, Death, Interrupting, essence, search = fakes.SPACE, fakes.Death, fakes.Interrupting, fakes.essence, fakes.search
FAMILY = [arch.arch_id for arch in SPACE.family.values()]
SAMPLERS = ["lowsearch", "nsga2", "nsga3", "tpe", "gp", "random"]
SHORT = {"trials": 3, "workers": 1}


@pytest.fixture(scope="module", autouse=True)
def short_beginnings():
    """Samplers leave their random beginning within a handful of trials, so that a short study shows what they do after it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lowsearch.search.samplers.POPULATION", 3)
        patched.setattr("lowsearch.search.foreign.N_STARTUP", 5)
        patched.setattr("lowsearch.search.foreign.N_SAMPLED", 256)
        patched.setattr("lowsearch.search.foreign.N_GENERATIONS", 2)
        yield


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Who is trained, and how far


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "study"
    return folder, search(folder, StudySettings(trials=12, workers=1))


def test_the_family_comes_first_and_is_trained_on_the_whole_schedule(searched):
    _, found = searched
    assert [c.name for c in found[: len(FAMILY)]] == list(SPACE.family)
    assert all(c.rung == 1.0 and c.origin == "family" for c in found[: len(FAMILY)])


def test_as_many_networks_are_proposed_as_asked_for_and_none_twice(searched):
    _, found = searched
    assert sum(c.origin == "proposed" for c in found) == 12
    assert len(np.unique([c.genome for c in found], axis=0)) == len(found)
    assert all(c.state == "complete" for c in found)


def test_some_proposals_stop_early_and_some_reach_the_top(searched):
    _, found = searched
    rungs = {c.rung for c in found if c.origin == "proposed"}
    assert min(rungs) < 1.0
    assert max(rungs) == 1.0


def test_the_diverse_start_is_trained_to_the_end_and_every_candidate_says_why(searched):
    folder, found = searched
    start = [c for c in found if c.why.startswith("diverse start")]
    assert len(start) == 4 and all(c.rung == 1.0 for c in start)
    for c in found:
        if c.origin == "family":
            assert c.why == ""
            continue
        assert c.why and ("stopped at" in c.why) == (c.rung < 1.0)
        assert c.rung == 1.0 or "in slice" in c.why
    StudyFiles(folder, StudySettings(), fakes.make_parts(folder, StudySettings()), Plan.read(folder).reference_costs).refresh(found)
    assert [row["why"] for row in rows(folder / "candidates.csv")] == [c.why for c in found]


def test_trial_values_are_the_estimate_and_the_predicted_latency(searched):
    folder, found = searched
    study = open_study(folder, StudySettings().objectives)
    for c, trial in zip(found, study.get_trials(), strict=True):
        assert trial.values == [c.accuracy, pytest.approx(fakes.FakeLatency().predict(c.genome[None])[0][0])]


@pytest.mark.parametrize(
    "objective", ["acc", "macs", "acc-throughput-memory", "acc-energy-size", "imagetime-size", "acc-latency-memory-params"]
)
def test_every_objective_is_searched_and_its_column_written(tmp_path, objective):
    folder, settings = tmp_path / "study", StudySettings(trials=3, workers=1, objective=objective, batch=4, sampler="lowsearch")
    found = search(folder, settings)
    assert sum(c.state == "complete" and c.origin != "family" for c in found) == 3
    study = open_study(folder, settings.objectives)
    StudyFiles(folder, settings, fakes.make_parts(folder, settings), Plan.read(folder).reference_costs).refresh(found)
    metrics = [metric for metric in settings.objectives.metrics if metric != "accuracy"]
    for row, trial in zip(rows(folder / "candidates.csv"), study.get_trials(), strict=True):
        assert [float(row[metric]) for metric in metrics] == pytest.approx(trial.values[len(trial.values) - len(metrics) :], rel=1e-6)
        arch = SPACE.decode(np.array(row["genome"].split(), dtype=np.int8))
        assert float(row["peak_memory_mb"]) == pytest.approx(footprint.peak_memory_mb(arch, batch=4), rel=1e-6)
        assert float(row["artifact_mb"]) == pytest.approx(footprint.artifact_mb(arch), rel=1e-6)
        assert float(row["throughput_ips"]) == pytest.approx(4000 / float(row["latency_ms"]), rel=1e-6)
    assert float(rows(folder / "hypervolume.csv")[-1]["hypervolume"]) > 0


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_networks_over_a_limit_are_never_trained_and_do_not_count(tmp_path, sampler):
    limits = parse_limits(maxima=["latency_ms=0.4", "params=700000"])
    found = search(tmp_path / "study", StudySettings(trials=6, workers=1, sampler=sampler, limits=limits))
    trained = {record.arch_id for record in fakes.FakeRecords(tmp_path / "study").read()}
    for c in found:
        mean_ms, std_ms = fakes.FakeLatency().predict(c.genome[None])
        allowed = mean_ms[0] + std_ms[0] <= 0.4 and fakes.SCORE(c.genome[None])[0, 1] <= 700_000
        assert (c.state == "complete") == allowed == (SPACE.decode(c.genome).arch_id in trained)
        assert allowed or "latency_ms <= 0.4" in c.reason
    assert sum(c.state == "complete" and c.origin != "family" for c in found) == 6
    if sampler in ("random", "gp"):
        assert all(c.state == "complete" for c in found if c.origin != "family")


@pytest.mark.parametrize("objective", ["latency", "acc-latency"])
def test_what_was_trained_and_misses_a_limit_on_accuracy_breaks_a_constraint_and_adds_no_hypervolume(tmp_path, objective):
    folder, limits = tmp_path / "study", parse_limits(minima=["accuracy=0.57"])
    settings = StudySettings(trials=4, workers=1, objective=objective, limits=limits)
    found = search(folder, settings)
    parts, plan = fakes.make_parts(folder, settings), Plan.read(folder)
    trials = open_study(folder, settings.objectives).get_trials()
    done = [(c, t) for c, t in zip(found, trials, strict=True) if c.state == "complete"]
    for c, trial in done:
        assert trial.constraints == {"limits": 0.0, "accuracy_limit": pytest.approx(0.57 - c.accuracy)}
    keeping = [trial.values for c, trial in done if c.accuracy >= 0.57]
    assert 0 < len(keeping) < len(done)
    written = StudyFiles(folder, settings, parts, plan.reference_costs).refresh(found)
    study = read_study(folder)
    assert tables.best_known_front(study) and all(network.val_accuracy >= 0.57 for network in tables.best_known_front(study))
    if objective == "latency":
        kept = np.minimum.accumulate([t.values[0] if c.accuracy >= 0.57 else np.inf for c, t in done])
        assert np.isnan(tables.best_so_far(study)).tolist() == np.isinf(kept).tolist()
        assert tables.best_so_far(study)[-1] == pytest.approx(kept[-1])
    assert written == pytest.approx(pareto.hypervolume(settings.objectives.costs(np.array(keeping)), plan.reference_costs))


def test_plain_optuna_reads_values_genes_and_what_the_study_notes(searched):
    folder, found = searched
    study = optuna.load_study(study_name="lowsearch", storage=f"sqlite:///{folder / 'study.db'}")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "latency_ms"]
    for c, trial in zip(found, study.trials, strict=True):
        assert trial.values[0] == c.accuracy
        assert (SPACE.canonical(np.array([[trial.params[gene.name] for gene in SPACE.genes]], dtype=np.int8))[0] == c.genome).all()
        assert trial.user_attrs["origin"] == c.origin and trial.user_attrs["score"]["rung"] == c.rung
    assert {trial.number for trial in study.best_trials} <= {c.number for c in found}
    assert len(study.trials_dataframe()) == len(found)


def test_enqueued_networks_are_trained_next_and_count_as_proposals(tmp_path):
    settings = StudySettings(trials=1, workers=1)
    folder = tmp_path / "study"
    search(folder, settings)
    archs = [SPACE.decode(genome) for genome in SPACE.sample(2, rng=np.random.default_rng(5))]
    nothing = {"latency_ms": 0.0, "latency_std_ms": 0.0, "latency_share": 0.0, "macs": 0, "macs_share": 0.0, "params": 0}
    nothing |= {"params_share": 0.0, "score": 0.0, "score_std": 0.0, "steps": ()}
    leads = [Lead(change=Change(arch=arch, **nothing), gain="faster", hypervolume=0.0) for arch in archs]
    ids = [arch.arch_id for arch in archs]
    assert refinement.enqueue(folder, settings, SPACE, leads) == ids
    assert refinement.enqueue(folder, settings, SPACE, leads) == ids  # Once is enough.
    found = search(folder, settings)
    assert [(c.name, c.state, c.origin) for c in found[-2:]] == [(arch_id, "complete", "proposed") for arch_id in ids]
    assert len(found) == len(FAMILY) + 3


def test_a_repeated_network_is_pruned_with_its_reason(tmp_path):
    settings = StudySettings(**SHORT)
    search(tmp_path / "study", settings)
    study = open_study(tmp_path / "study", settings.objectives)
    study.enqueue_trial(study.get_trials()[-1].params)
    found = search(tmp_path / "study", settings)
    assert (found[-1].state, found[-1].reason) == ("pruned", "was tried before")
    assert n_proposals(study) == 3


def test_what_a_worker_says_as_it_ends_reaches_the_user():
    said = json.dumps({"kind": "NothingLeftError", "message": "nothing is left", "hint": "loosen --max"})
    error = _user_error(f"some warning\n{said}\n", None)
    assert type(error) is NothingLeftError and (error.message, error.hint) == ("nothing is left", "loosen --max")


@pytest.mark.parametrize("kind", [SearchWorker, partial(Conductor, engine=None)], ids=["worker", "conductor"])
def test_a_sampler_that_only_repeats_ends_the_search_with_what_it_has(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("lowsearch.study.workers.worker.MAX_PRUNED_IN_A_ROW", 3)
    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", lambda *_: 0)
    settings = StudySettings(trials=4, workers=1, sampler="tpe")
    found = search(tmp_path / "study", settings, kind=kind)
    assert [c.state for c in found[-3:]] == ["pruned"] * 3
    assert "3 proposals of sampler 'tpe' in a row break a limit or were tried before; there may be some" in why_ended(
        open_study(tmp_path / "study", settings.objectives)
    )
    over = StudySettings(trials=4, workers=1, sampler="tpe", limits=parse_limits(maxima=["params=60000"]))
    with pytest.raises((StudyError, Abandoned), match="3 proposals of sampler 'tpe' in a row"):  # Then there is nothing to end with.
        search(tmp_path / "over", over, kind=kind)


# Promotion


def costs_of(*pairs):
    return np.array([[-accuracy, np.log(ms)] for accuracy, ms in pairs])


REFERENCE = np.array([-0.1, np.log(2.0)])


def goes_on(pairs, own, *, std=0.0, at_rung=None, edges=()):
    at = np.ones(len(pairs), dtype=bool) if at_rung is None else np.array(at_rung)
    costs = costs_of(*pairs)
    found = standing(costs, np.full(len(pairs), std), costs[:, 1], own=own, at_rung=at, edges=list(edges), reference=REFERENCE)
    assert found.may_go_on == (not found.why)
    return found.may_go_on


def test_the_first_network_of_a_slice_goes_on():
    assert goes_on([(0.5, 1.0)], 0)


def test_a_dominated_network_stops_unless_its_uncertainty_reaches_the_front():
    pairs = [(0.8, 0.5), (0.79, 1.0)]
    alone = [np.log(0.7)]
    assert not goes_on(pairs, 1, edges=alone)
    assert goes_on(pairs, 1, std=0.05, edges=alone)


def test_a_fast_weak_network_is_not_stopped_by_slow_accurate_ones():
    pairs = [(0.8, 1.0), (0.82, 1.1), (0.83, 1.2), (0.84, 1.3), (0.4, 0.1)]
    assert goes_on(pairs, 4)


def test_only_the_better_half_of_a_slice_goes_on():
    # A staircase whose steps add less and less volume; all in one slice, then the weakest alone in its own.
    pairs = [(0.3, 0.2), (0.5, 0.4), (0.6, 0.7), (0.62, 0.95)]
    assert [goes_on(pairs, i) for i in range(4)] == [True, True, False, False]
    assert goes_on(pairs, 3, edges=[np.log(0.9)])


def test_networks_that_did_not_reach_the_rung_do_not_compete():
    pairs = [(0.3, 0.2), (0.5, 0.4), (0.6, 0.7), (0.62, 0.95)]
    assert goes_on(pairs, 3, at_rung=[False, False, False, True])


def test_slices_hold_equal_shares_of_what_is_below_the_reference():
    costs = np.log(np.random.default_rng(0).uniform(0.1, 3, 4000))
    edges = slice_edges(costs, float(REFERENCE[1]))
    shares = np.bincount(np.digitize(costs[costs < REFERENCE[1]], edges))
    assert shares.max() - shares.min() <= 1
    assert slice_edges(np.array([5.0]), 1.0) == []


# Interruptions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {sampler: essence(search(folder / sampler, StudySettings(sampler=sampler, **SHORT))) for sampler in SAMPLERS}


DEATHS = {
    "while training": (fakes.FakeTraining, "run", 2, False),  # in the family
    "after recording": (fakes.FakeTraining, "run", 20, True),  # a proposal's rung is recorded, Optuna does not know
    "between genes": (optuna.trial.Trial, "suggest_int", 52 * 7 + 20, True),
    "before asking": (optuna.study.Study, "ask", 8, False),
    "between attributes": (optuna.trial.Trial, "set_user_attr", 25, True),
}


@pytest.mark.parametrize(
    ("sampler", "death"),
    [("lowsearch", death) for death in DEATHS] + [(s, d) for s in SAMPLERS[1:] for d in ("after recording", "between genes")],
)
def test_a_study_that_died_proposes_and_scores_as_if_it_had_not(tmp_path, monkeypatch, uninterrupted, sampler, death):
    owner, name, at, after = DEATHS[death]
    settings = StudySettings(sampler=sampler, **SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, Interrupting(getattr(owner, name), at, after=after))
        with pytest.raises(Death):
            search(tmp_path / "study", settings)
    assert essence(search(tmp_path / "study", settings)) == uninterrupted[sampler]


def test_another_seed_proposes_other_networks(tmp_path, uninterrupted):
    for sampler in ("lowsearch", "tpe"):
        other = essence(search(tmp_path / sampler, StudySettings(sampler=sampler, seed=1, **SHORT)))
        assert [row[1] for row in other[6:]] != [row[1] for row in uninterrupted[sampler][6:]]


def test_more_trials_go_on_from_where_the_study_stood(tmp_path, uninterrupted):
    search(tmp_path / "study", StudySettings(trials=1, workers=1))
    assert essence(search(tmp_path / "study", StudySettings(**SHORT))) == uninterrupted["lowsearch"]


# Whole runs in processes


def start(folder, *, step_s=0.0, **settings):
    env = {**os.environ, "FAKE_STEP_S": str(step_s)}
    # A background job inherits an ignored Ctrl-C, and would pass it on to the study.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, fakes.__file__, "run", folder, json.dumps(settings)], env=env, stderr=subprocess.PIPE, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(condition, process, *, limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the study does not get there"
        time.sleep(0.02)


def n_records(folder):
    path = folder / "records.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def end(process):
    process.wait(timeout=60)
    process.stderr.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study of two workers."""
    folder = tmp_path_factory.mktemp("finished") / "study"
    heard = []
    settings = StudySettings(trials=6, workers=2, limits=parse_limits(maxima=["latency_ms=0.62"]))
    result = run(settings, folder, backend=fakes.backend(), progress=lambda *event: heard.append(event))
    return folder, result, heard


def test_a_study_ends_with_the_files_that_the_report_reads(finished):
    folder, result, heard = finished
    files = read_study(folder)
    assert files.missing == ()
    assert [n.arch_id for n in files.front] == [row["arch_id"] for row in result.front]
    assert len([c for c in files.candidates if c.origin == "proposed"]) == 6
    assert len(files.finalists) >= 5 + sum(c.is_family and c.state == "complete" for c in files.candidates)
    assert {n.arch_id for n in (*files.candidates, *files.finalists)} <= set(files.networks)
    assert len(files.sample) > 300
    assert {n.accuracy_source for n in files.sample} == {"predicted"}
    assert set(files.settings["reference_point"]) >= {"accuracy", "latency_ms"}
    assert heard[-1][0] == heard[-1][1]


def test_family_members_over_the_limit_are_neither_trained_nor_finalists(finished):
    folder, _, _ = finished
    family = {row["name"]: row for row in rows(folder / "candidates.csv") if row["origin"] == "family"}
    assert family["micro-b-l"]["state"] == "pruned"
    assert "micro-b-l" not in {row["name"] for row in rows(folder / "finalists.csv")}


def test_hypervolume_never_falls_and_counts_from_the_stored_reference(finished):
    folder, result, _ = finished
    volumes = [float(row["hypervolume"]) for row in rows(folder / "hypervolume.csv")]
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(result.summary["hypervolume"], rel=1e-6)


def test_block_latencies_of_every_network_sum_to_its_prediction(finished):
    folder, _, _ = finished
    networks = json.loads((folder / "networks.json").read_text())
    for row in rows(folder / "candidates.csv"):
        assert sum(block["ms"] for block in networks[row["arch_id"]]["blocks"]) == pytest.approx(float(row["latency_ms"]), rel=1e-6)
        assert sum(block["macs"] for block in networks[row["arch_id"]]["blocks"]) == int(row["macs"])


def test_running_a_finished_study_again_changes_nothing(finished):
    folder, result, _ = finished
    names = ["candidates.csv", "finalists.csv", "front.csv", "records.jsonl", "hypervolume.csv"]
    before = {name: (folder / name).read_bytes() for name in names}
    again = run(stored_settings(folder), folder, backend=fakes.backend())
    assert {name: (folder / name).read_bytes() for name in names} == before
    assert again.front == result.front


def test_a_shortlist_measured_on_a_disturbed_machine_can_be_measured_anew_and_nothing_is_trained(finished, tmp_path, capsys):
    folder, result, _ = finished
    print_summary({**result.summary, "pace": 1.35})
    assert "35 % slower when it measured the shortlist" in (said := capsys.readouterr().err) and "remove measurements.json" in said
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    measured = json.loads((copy / "measurements.json").read_text())
    (copy / "measurements.json").unlink()
    records = (copy / "records.jsonl").read_bytes()
    again = run(stored_settings(copy), copy, backend=fakes.backend())
    new = json.loads((copy / "measurements.json").read_text())
    assert {row["arch_id"] for row in new["networks"]} <= {row["arch_id"] for row in measured["networks"]} and new["networks"]
    assert again.front == result.front and (copy / "records.jsonl").read_bytes() == records


@pytest.mark.parametrize("n_records_at_kill", [pytest.param(4, marks=pytest.mark.slow), 21])
def test_kill_9_loses_nothing_and_the_same_command_proposes_the_same(tmp_path, n_records_at_kill):
    settings = {"trials": 3, "workers": 1}
    whole = essence(search(tmp_path / "whole", StudySettings(**settings)))
    folder = tmp_path / "study"
    process = start(folder, step_s=0.05, **settings)
    wait_for(lambda: n_records(folder) >= n_records_at_kill, process)
    process.send_signal(signal.SIGKILL)
    end(process)
    acknowledged = (folder / "records.jsonl").read_text()
    process = start(folder, **settings)
    assert process.wait(timeout=120) == 0, process.stderr.read().decode()
    process.stderr.close()
    assert (folder / "records.jsonl").read_text().startswith(acknowledged)
    assert essence(candidates(open_study(folder, StudySettings().objectives), SPACE)) == whole
    assert (folder / "front.csv").exists()


def test_ctrl_c_stops_the_workers_and_the_same_command_resumes(tmp_path):
    folder = tmp_path / "study"
    process = start(folder, step_s=0.2, trials=2, workers=2)
    wait_for(lambda: n_records(folder) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to the parent and its workers.
    assert process.wait(timeout=60) != 0
    assert b"KeyboardInterrupt" in process.stderr.read()
    process.stderr.close()
    study = open_study(folder, StudySettings().objectives)
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.FAIL))
    result = run(StudySettings(trials=2, workers=2), folder, backend=fakes.backend())
    assert result.summary["candidates"] == {"complete": len(FAMILY) + 2}


def test_a_worker_that_dies_is_replaced_and_its_network_taken_up_again(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "crash-once").write_text(FAMILY[1])
    (folder / "crash-on").write_text(FAMILY[3])
    result = run(StudySettings(trials=1, workers=1), folder, backend=fakes.backend())
    by_id = {row["arch_id"]: row for row in rows(folder / "candidates.csv")}
    assert by_id[FAMILY[1]]["state"] == "complete"
    assert (by_id[FAMILY[3]]["state"], by_id[FAMILY[3]]["reason"]) == ("failed", "its process died 2 times")
    assert result.summary["candidates"] == {"complete": len(FAMILY), "failed": 1}


def test_a_mistake_found_by_a_worker_is_the_error_that_the_user_sees(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "mistake").touch()
    with pytest.raises(DataError, match="the images are gone; hint: bring them back"):
        run(StudySettings(**SHORT), folder, backend=fakes.backend())
    (folder / "mistake").unlink()
    assert run(StudySettings(**SHORT), folder, backend=fakes.backend()).summary["candidates"] == {"complete": len(FAMILY) + 3}


def test_workers_that_only_crash_end_the_study_with_the_name_of_their_log(tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "bug").touch()
    with pytest.raises(StudyError, match=r"died 3 times in a row: ZeroDivisionError: a bug.*worker-0\.log"):
        run(StudySettings(**SHORT), folder, backend=fakes.backend())


def test_a_spent_budget_ends_the_search_and_is_not_spent_again(tmp_path):
    folder = tmp_path / "study"
    settings = StudySettings(budget_s=0.01, workers=1)
    first = run(settings, folder, backend=fakes.backend())
    again = run(settings, folder, backend=fakes.backend())
    assert first.summary["candidates"] == again.summary["candidates"] == {"waiting": len(FAMILY)}
    assert {row["origin"] for row in rows(folder / "finalists.csv")} == {"family"}


def test_a_proxy_trains_nothing_and_is_never_called_accuracy(tmp_path):
    folder = tmp_path / "study"
    result = run(StudySettings(accuracy="macs", trials=4, workers=1), folder, backend=fakes.backend())
    assert not (folder / "records.jsonl").exists()
    assert not list(folder.glob("models/*/*.safetensors"))
    for name in ("candidates.csv", "finalists.csv"):
        for row in rows(folder / name):
            assert (row["accuracy_source"], row["accuracy_unit"], row["score_std"]) == ("proxy:macs", "rank", "")
            assert row["val_accuracy"] == ""
            assert float(row["score"]) == pytest.approx(np.log10(float(row["macs"])), rel=1e-6)
    assert all(row["latency_source"] == "measured" for row in result.front)


def test_on_a_device_that_is_not_attached_every_latency_comes_from_its_table(tmp_path):
    folder = tmp_path / "study"
    run(StudySettings(device="elsewhere", accuracy="params", trials=2, workers=1), folder, backend=fakes.backend())
    sources = {row["latency_source"] for name in ("candidates", "finalists", "space_sample") for row in rows(folder / f"{name}.csv")}
    assert sources == {"table"}


# What a user gets wrong


def test_two_runs_of_one_study_at_once_are_refused(tmp_path):
    folder = tmp_path / "study"
    with studies.locked(tmp_path), pytest.raises(StudyError, match="is being run by another process"), studies.locked(tmp_path):
        pass
    folder.mkdir()


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"seed": 1}, "made with seed 0, not 1", "--seed 0"),
        ({"objective": "acc-params"}, "made with objective acc-latency, not acc-params", "--objective acc-latency"),
        ({"sampler": "tpe"}, "made with sampler lowsearch, not tpe", "--sampler lowsearch"),
        ({"limits": parse_limits(maxima=["macs=1e6"])}, "made with limits none, not macs <= 1e+06", "no --max/--min"),
        ({"data": "npz:x.npz"}, "made with data none, not npz:x.npz", "no --data"),
    ],
)
def test_other_settings_are_refused_with_what_to_type(changed, message, hint):
    with pytest.raises(StudyError) as caught:
        check_resumable("s", StudySettings(), StudySettings(**changed))
    assert message in caught.value.message
    assert caught.value.hint and hint in caught.value.hint and "--study NAME" in caught.value.hint


def test_limits_of_a_study_are_quoted_as_flags():
    limits = parse_limits(maxima=["latency_ms=3"], minima=["accuracy=0.8"])
    with pytest.raises(StudyError, match=r"resume with --min accuracy=0\.8 --max latency_ms=3,"):
        check_resumable("s", StudySettings(limits=limits), StudySettings())
    surer = parse_limits(maxima=["latency_ms=3"], confidence=0.99)
    with pytest.raises(StudyError, match=r"resume with --max latency_ms=3 --confidence 0\.99,"):
        check_resumable("s", StudySettings(limits=surer), StudySettings(limits=parse_limits(maxima=["latency_ms=3"])))


def test_length_and_workers_of_a_study_may_change():
    check_resumable("s", StudySettings(), StudySettings(trials=9, budget_s=60.0, workers=7, final_seeds=2))


def test_settings_survive_their_file():
    limits = parse_limits(maxima=["latency_ms=0.1", "params=123456.789"], minima=["accuracy=0.8"], confidence=0.95)
    settings = StudySettings(limits=limits, budget_s=90.5, trials=3, accuracy="trained", data="folder:/x y")
    assert StudySettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    "changed",
    [
        {"sampler": "cma"}, {"accuracy": "synflow"}, {"workers": 0}, {"trials": 0}, {"trials": True}, {"seed": -1}, {"batch": 1.5},
        {"budget_s": 0.0}, {"budget_s": float("inf")}, {"final_seeds": 0},
        {"accuracy": "macs", "limits": parse_limits(minima=["accuracy=0.5"])},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_with_a_hint(changed):
    with pytest.raises(UsageError) as caught:
        StudySettings(**changed)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("study.yaml", "a: [1"),
        ("study.yaml", "- 1"),
        ("study.yaml", "schema: something-else"),
        ("study.yaml", "schema: lowsearch-study\nversion: 1\n"),
        ("study.yaml", "schema: lowsearch-study\nversion: 1\nsettings: {colour: red}\n"),
        ("study.yaml", "EDIT: settings.sampler"),
        ("study.yaml", "EDIT: reference_point"),
        ("study.db", "this is no database"),
        ("clock.json", "{"),
        ("clock.json", '{"search": "soon"}'),
        ("finalists.json", "{"),
        ("finalists.json", '{"finalists": [{}], "seeds": [], "n_candidates": 9}'),
        ("measurements.json", "[1]"),
    ],
)
def test_a_damaged_file_is_one_clear_line_and_stays_as_it_is(tmp_path, finished, name, content):
    original, _, _ = finished
    folder = tmp_path / "study"
    subprocess.run(["cp", "-r", original, folder], check=True)
    for log in folder.glob("study.db-*"):  # From a write-ahead log SQLite would mend the file.
        log.unlink()
    if content.startswith("EDIT: settings"):
        content = (folder / name).read_text().replace("  sampler: lowsearch", "  sampler: guess")
    elif content.startswith("EDIT: reference"):
        content = (folder / name).read_text().replace("reference_point:", "reference_pint:")
    (folder / name).write_text(content)
    settings = StudySettings(trials=6, workers=2, limits=parse_limits(maxima=["latency_ms=0.62"]))
    with pytest.raises(StudyError) as caught:
        run(settings, folder, backend=fakes.backend())
    assert name in caught.value.message
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert (folder / name).read_text() == content


# The clock


def test_the_clock_adds_up_over_runs_and_phases(tmp_path):
    now = iter([0.0, 10.0, 14.0, 14.0, 14.0, 20.0, 20.0, 20.0, 27.0, 27.0, 27.0, 27.0, 27.0]).__next__
    clock = Clock(tmp_path / "clock.json", now=now)
    with clock.running("search"):
        pass
    searched_s = clock.spent_s["search"]
    assert searched_s == 4.0
    later = Clock(tmp_path / "clock.json", now=itertools.count(100.0, 0.25).__next__)
    assert later.seconds("search") == searched_s
    with later.running("search"):
        for _ in range(10):
            later.tick()
        saved_s = json.loads((tmp_path / "clock.json").read_text())["search"]
        assert later.seconds("search") - saved_s < 2
    assert later.seconds("search") > searched_s


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_of_search_and_finals(tmp_path):
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    settings = {"trials": 6, "workers": 1, "final_seeds": 2}
    whole = essence(search(tmp_path / "whole", StudySettings(trials=6, workers=1)))
    folder = tmp_path / "study"
    kills = 0
    while True:
        process = start(folder, step_s=0.3, **settings)
        try:
            code = process.wait(timeout=float(rng.uniform(2.0, 7.0)) if kills < 10 else 300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if rng.random() < 0.5 else process.kill()
            kills += 1
            end(process)
            continue
        assert code == 0, process.stderr.read().decode()
        process.stderr.close()
        break
    assert kills >= 3
    assert essence(candidates(open_study(folder, StudySettings().objectives), SPACE)) == whole
    assert read_study(folder).missing == ()
