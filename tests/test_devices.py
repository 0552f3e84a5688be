"""One search for several devices: scales, limits by device, whom a network is proposed for, and what sharing one costs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny_fakes import fakes

from lowsearch import cli
from lowsearch.errors import DeviceError, StudyError, TableError, UsageError
from lowsearch.latency.table import SHIPPED, LatencyTable
from lowsearch.latency.target import Target, attached_devices
from lowsearch.report.page import build_report, page_data
from lowsearch.report.sections import body
from lowsearch.report.study_files import read_study
from lowsearch.report.study_tools import export
from lowsearch.report.tables import shared_fronts
from lowsearch.search.devices import Fleet, Scale, device_labels, fit_scales, scales_from
from lowsearch.search.estimates import Estimator, at_confidence, excess
from lowsearch.search.objectives import parse_limits, parse_objectives
from lowsearch.search.sampler import Evolution, LowSearchSampler
from lowsearch.space import SearchSpace
from lowsearch.study import run as studies
from lowsearch.study.assembly import build_parts, prepare, resolve
from lowsearch.study.knowledge import of_study
from lowsearch.study.parts import ProxyAccuracy
from lowsearch.study.settings import StudySettings, check_resumable, read_study_file
from lowsearch.study.sharing import regrets
from lowsearch.study.storage import open_study

TESTS = Path(__file__).parent
TINY = fakes.SPACE
MODELS = {"here": fakes.FakeLatency(), "there": fakes.OtherLatency()}
MACS = ProxyAccuracy(TINY, "macs")
SCALES = fit_scales(TINY, MODELS, MACS)
FLEET = Fleet(MODELS, SCALES)
SETTINGS = StudySettings(device="here,there", runtime="fast,slow", objective="acc-worstlatency", trials=8, workers=1)
OFFICE, LAB = "office-cpu", "lab-cpu"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Scales


def test_the_ends_of_a_scale_are_the_fastest_networks_worth_the_smallest_and_the_largest_of_the_family():
    genomes = TINY.all_genomes()
    score = MACS.predict(genomes)[0]
    of_family = MACS.predict(np.stack([TINY.encode(arch) for arch in TINY.family.values()]))[0]
    for label, model in MODELS.items():
        latency_ms = model.predict(genomes)[0]
        slow_ms = latency_ms[score >= of_family.max() - 1e-12].min()
        assert SCALES[label].slow_ms == pytest.approx(slow_ms)
        assert SCALES[label].fast_ms == pytest.approx(min(slow_ms, latency_ms[score >= of_family.min() - 1e-12].min()))


def test_both_ends_are_the_same_number_on_every_device():
    models = {"here": fakes.FakeLatency(), "slower": mock.Mock(predict=lambda g: (7 * np.sqrt(fakes.FakeLatency().predict(g)[0]), None))}
    scales = fit_scales(TINY, models, MACS)
    ends = np.array([[s.relative(np.array(ms)) for ms in (s.fast_ms, s.slow_ms)] for s in scales.values()])
    assert ends[:, 0] == pytest.approx([1, 1])
    assert ends[0, 1] == pytest.approx(ends[1, 1]) and ends[0, 1] > 1
    assert {label: s.exponent for label, s in scales.items()} == pytest.approx({"here": 0.75, "slower": 1.5})


def test_scales_without_a_span_are_plain_ratios():
    scales = fit_scales(TINY, {"here": MODELS["here"], "flat": mock.Mock(predict=lambda g: (np.full(len(g), 2.0), None))}, MACS)
    assert [s.exponent for s in scales.values()] == [1.0, 1.0]
    assert scales["flat"].relative(np.array([2.0, 3.0])) == pytest.approx([1.0, 1.5])


def test_worst_case_latency_is_the_largest_place_on_the_scales_with_the_error_of_the_device_that_decides():
    scales = {"a": Scale(fast_ms=1, slow_ms=4, exponent=1), "b": Scale(fast_ms=10, slow_ms=100, exponent=0.5)}
    latencies = {"a": (np.array([2.0, 2.0]), np.array([0.2, 0.2])), "b": (np.array([10.0, 90.0]), np.array([1.0, 9.0]))}
    mean, std = Fleet(MODELS | {"a": None, "b": None}, scales, counted=("a", "b")).worst(latencies)
    assert mean == pytest.approx([2.0, 3.0])
    assert std == pytest.approx([2.0 * 0.1, 3.0 * 0.5 * 0.1])
    assert Fleet({"a": None, "b": None}, scales).alone("b").worst(latencies)[0] == pytest.approx([1.0, 3.0])


def test_damaged_scales_are_told():
    with pytest.raises(StudyError, match="devices of study.yaml are damaged"):
        scales_from([{"device": "here", "fast_ms": "much"}])


def test_a_device_of_two_runtimes_is_labelled_by_both():
    assert device_labels(("a", "b"), ("x", "x")) == ("a", "b")
    assert device_labels(("a", "b", "a"), ("x", "x", "y")) == ("a/x", "b", "a/y")


# Estimates and limits


def test_a_limit_holds_on_its_device_and_without_one_on_all():
    estimator, genomes = Estimator(TINY, FLEET), TINY.all_genomes()
    estimates = estimator.estimate(genomes)
    quantile = 1.2815515655446004
    upper = {label: mean + quantile * std for label, (mean, std) in FLEET.predict_each(genomes).items()}
    bound_ms = float(np.median(upper["there"]))
    allowed = {
        text: excess(estimates, parse_limits(maxima=[f"{text}={bound_ms}"])) == 0
        for text in ("latency_ms@here", "latency_ms@there", "latency_ms")
    }
    for label in MODELS:
        assert (allowed[f"latency_ms@{label}"] == (upper[label] <= bound_ms)).all()
    assert (allowed["latency_ms"] == (allowed["latency_ms@here"] & allowed["latency_ms@there"])).all()
    assert 0 < allowed["latency_ms"].sum() < len(genomes)
    least = parse_limits(minima=["throughput_ips=1"])[0]
    assert at_confidence(estimates, least) == pytest.approx(1000 / np.maximum(upper["here"], upper["there"]))


def test_a_measured_latency_of_the_first_device_moves_the_worst_case():
    estimator, genomes = Estimator(TINY, FLEET, batch=2), TINY.all_genomes()[:50]
    before = estimator.estimate(genomes)
    after = estimator.as_measured(before, 100 * before.mean["latency_ms"])
    assert after.mean["throughput_ips"] == pytest.approx(2000 / after.mean["latency_ms"])
    assert after.mean["worst_latency"] == pytest.approx(SCALES["here"].relative(after.mean["latency_ms"]))
    assert (after.by_device["there"][0] == before.by_device["there"][0]).all()
    assert (after.mean["macs"] == before.mean["macs"]).all()


def test_every_other_network_is_proposed_for_all_devices_and_the_rest_for_one_alone_in_turn():
    evolution = Evolution(initial=64, parents=16, children=32, generations=2)
    sampler = LowSearchSampler(TINY, latency=FLEET, accuracy=MACS, objectives="acc-worstlatency", evolution=evolution)
    counted = [sampler._estimator_for(number).latency.counted for number in range(6)]
    assert counted == [(), ("here",), (), ("there",), (), ("here",)]
    assert sampler.propose([], number=1).shape == (TINY.n_genes,)
    with pytest.raises(UsageError, match="of several devices"):
        LowSearchSampler(TINY, latency=MODELS["here"], accuracy=MACS, objectives="acc-worstlatency")


# Regret


@pytest.mark.parametrize("number", range(6))
def test_a_limit_on_the_worst_case_holds_for_whom_a_network_is_proposed_for_too(number):
    genomes = TINY.all_genomes()
    medians = {label: float(np.median(model.predict(genomes)[0])) for label, model in MODELS.items()}
    fleet = Fleet(MODELS, {label: Scale(fast_ms=ms, slow_ms=2 * ms, exponent=1.0) for label, ms in medians.items()})
    limits, whole = parse_limits(maxima=["worst_latency=1"]), Estimator(TINY, fleet)
    for label in fleet.labels:
        assert (excess(whole.on_device(label).estimate(genomes), limits) < excess(whole.estimate(genomes), limits)).any()
    sampler = LowSearchSampler(TINY, latency=fleet, accuracy=MACS, objectives="acc-worstlatency", limits=limits, candidates=genomes)
    for _ in range(20):
        genome = sampler.propose([], number=number)
        assert excess(whole.estimate(genome[None]), limits)[0] == 0
        number += 6


@pytest.mark.parametrize("n_others", [1, 2])
def test_regret_is_what_going_through_all_pairs_gives(n_others):
    rng = np.random.default_rng(n_others)
    others, latency_ms = rng.integers(6, size=(80, n_others)).astype(float), rng.uniform(1, 5, size=(80, 3))
    found = regrets(others, latency_ms)
    for i in range(80):
        for d in range(3):
            least = min(latency_ms[j, d] for j in range(80) if all(others[j, k] <= others[i, k] for k in range(n_others)))
            assert found.regret[i, d] == pytest.approx(latency_ms[i, d] / least)
            assert latency_ms[found.best[i, d], d] == least and (others[found.best[i, d]] <= others[i]).all()
    assert (found.regret >= 1).all()
    assert found.fronts.any(axis=0).all() and (found.regret[found.fronts] == 1).all()


# Whole studies


@pytest.fixture(scope="module", autouse=True)
def tiny_workers():
    """Worker processes load the space of this module, too."""
    with mock.patch.dict(os.environ, {"FAKE_SPACE": str(TESTS / "tiny_space.yaml")}):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices") / "study"
    return folder, studies.run(SETTINGS, folder, backend=fakes.backend())


def test_trials_hold_the_worst_case_and_candidates_every_device(finished):
    folder, _ = finished
    for row, trial in zip(rows(folder / "candidates.csv"), open_study(folder, SETTINGS.objectives).get_trials(), strict=True):
        genome = np.array([row["genome"].split()], dtype=np.int8)
        each = FLEET.predict_each(genome)
        assert float(row["latency_ms"]) == pytest.approx(each["here"][0][0], rel=1e-6)
        for label, (mean_ms, _) in each.items():
            assert float(row[f"latency_ms@{label}"]) == pytest.approx(mean_ms[0], rel=1e-6)
        worst = max(SCALES[label].relative(each[label][0][0]) for label in MODELS)
        assert trial.values[1] == pytest.approx(worst) == pytest.approx(float(row["worst_latency"]), rel=1e-6)


def test_scales_are_fixed_in_study_yaml_and_a_resume_takes_them_from_there(finished):
    folder, _ = finished
    values = read_study_file(folder)
    assert scales_from(values["devices"]) == SCALES
    assert [device["latency_source"] for device in values["devices"]] == ["predicted", "table"]
    with mock.patch.object(fakes, "fit_scales", side_effect=AssertionError("fitted anew")):
        assert fakes.make_parts(folder, SETTINGS).fleet.scales == SCALES


def test_an_interrupted_study_proposes_what_an_uninterrupted_one_does(tmp_path):
    short = dataclasses.replace(SETTINGS, trials=4)
    whole = fakes.search(tmp_path / "whole", short)
    fakes.search(tmp_path / "cut", dataclasses.replace(SETTINGS, trials=2))
    assert fakes.essence(fakes.search(tmp_path / "cut", short)) == fakes.essence(whole)


def test_limits_of_both_devices_hold_for_everything_proposed(tmp_path):
    limits = parse_limits(maxima=["latency_ms@there=0.35", "latency_ms@here=0.3"])
    found = fakes.search(tmp_path / "study", dataclasses.replace(SETTINGS, limits=limits, trials=4))
    scored = np.stack([c.genome for c in found if c.state == "complete"])
    assert len(scored) > 4 and (excess(Estimator(TINY, FLEET).estimate(scored), limits) == 0).all()


def test_only_the_first_device_is_measured_and_the_front_is_by_its_measurements(finished):
    folder, result = finished
    for row in rows(folder / "finalists.csv"):
        assert row["latency_source"] == "measured"
        assert float(row["latency_ms"]) == pytest.approx(1.03 * float(row["predicted_latency_ms"]), rel=1e-6)
        arch = json.loads((folder / "models" / row["arch_id"] / "arch.json").read_text())
        genome = TINY.encode(type(next(iter(TINY.family.values()))).from_dict(arch))[None]
        there_ms = FLEET.predict_each(genome)["there"][0][0]
        assert float(row["latency_ms@there"]) == pytest.approx(there_ms, rel=1e-6)
        here_ms = float(row["latency_ms@here"])
        assert here_ms == float(row["latency_ms"])
        worst = max(SCALES["here"].relative(here_ms), SCALES["there"].relative(there_ms))
        assert float(row["worst_latency"]) == pytest.approx(worst, rel=1e-6)
    assert {row["arch_id"] for row in result.front} == {row["arch_id"] for row in rows(folder / "front.csv")}


@pytest.mark.parametrize("limit", ["latency_ms=0.5", "worst_latency=2"])
def test_where_everything_is_measured_over_a_limit_nothing_is_trained_for_it_and_the_page_is_made(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(fakes, "measure", lambda archs, progress: [fakes.FakeMeasured(9.0, 0.001) for _ in archs])
    settings = dataclasses.replace(SETTINGS, trials=2, limits=parse_limits(maxima=[limit]))
    result = studies.run(settings, tmp_path / "study", backend=fakes.backend())
    finalists = rows(tmp_path / "study" / "finalists.csv")
    assert {row["origin"] for row in finalists} == {"family"} and all(row["breaks"] for row in finalists)
    assert result.front == [] and "broke a limit when they were measured" in result.summary["none_kept"]
    assert shared_fronts(read_study(tmp_path / "study")) == []
    assert "One network for all devices" not in build_report(tmp_path / "study").read_text()


def test_regret_csv_is_what_the_candidates_give_pair_by_pair(finished):
    folder, result = finished
    known = {row["arch_id"]: row for row in rows(folder / "candidates.csv") if row["state"] == "complete"}
    found = rows(folder / "regret.csv")
    for row in found:
        own = known[row["arch_id"]]
        column = f"latency_ms@{row['device']}"
        least = min(float(o[column]) for o in known.values() if float(o["val_accuracy"]) >= float(own["val_accuracy"]))
        assert float(row["best_latency_ms"]) == pytest.approx(least, rel=1e-6)
        assert float(row["regret"]) == pytest.approx(float(own[column]) / least, rel=1e-6)
        both = [float(r["regret"]) for r in found if (r["front"], r["arch_id"]) == (row["front"], row["arch_id"])]
        assert len(both) == 2 and float(row["worst_regret"]) == pytest.approx(max(both))
    shared = {row["arch_id"] for row in found if row["front"] == "shared"}
    assert shared == {row["arch_id"] for row in result.front}
    summed = result.summary["sharing"]["fronts"]
    assert summed["here"]["mean_regret"]["here"] == summed["there"]["mean_regret"]["there"] == 1
    worst = [float(row["worst_regret"]) for row in found if row["front"] == "shared" and row["device"] == "here"]
    assert summed["shared"]["worst_regret"] == pytest.approx(max(worst), rel=1e-6)
    assert summed["shared"]["mean_worst_regret"] == pytest.approx(float(np.exp(np.log(worst).mean())), rel=1e-6)


def test_a_study_of_one_device_has_none_of_it(tmp_path):
    folder = tmp_path / "study"
    result = studies.run(StudySettings(trials=2, workers=1, accuracy="macs"), folder, backend=fakes.backend())
    assert "sharing" not in result.summary and not (folder / "regret.csv").exists()
    assert not any("@" in column or "worst" in column for column in rows(folder / "candidates.csv")[0])
    text = (folder / "study.yaml").read_text()
    assert "devices" not in text and "worst_latency" not in text
    assert "together" not in body(read_study(folder)) and shared_fronts(read_study(folder)) == []


def test_the_page_shows_what_sharing_costs(finished):
    folder, result = finished
    study = read_study(folder)
    fronts = {front.name: front for front in shared_fronts(study)}
    assert list(fronts) == ["shared", "here", "there"]
    assert {n.arch_id for n in fronts["shared"].networks} == {row["arch_id"] for row in result.front}
    text = build_report(folder).read_text()
    assert "What sharing one network costs" in text and "<b>there</b>" in text and "there, table" in text
    figures = page_data(study)["figures"]
    assert "Latency on there, ms (table)" in json.dumps(figures["device-1"])
    drawn = {trace["name"]: trace["customdata"] for trace in figures["device-0"]["data"] if trace["mode"] == "markers"}
    assert set(drawn["Front for all devices"]) == {n.arch_id for n in fronts["shared"].networks}
    assert set(drawn["Front of this device alone"]) == {n.arch_id for n in fronts["here"].networks}
    export(study, folder / "all.csv")
    assert all(row["latency_ms@there"] for row in rows(folder / "all.csv"))


# What a user types


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where two CPUs that are not attached have the tables that came with lowsearch."""
    folder = tmp_path_factory.mktemp("tables")
    shipped = TESTS.parent / "latency_tables" / SHIPPED / "amd-epyc-f26-m2-2vcpu"
    for name, runtime in ((OFFICE, "openvino"), (LAB, "torchscript")):
        table = LatencyTable.load(shipped / f"{runtime}-fp32-b1-t1.jsonl")
        dataclasses.replace(table, target=Target(name, runtime)).save(folder / "latency_tables")
    return folder


@pytest.fixture
def tables(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("LOWSEARCH_HOME", str(home / "home"))


def test_settings_are_resolved_to_devices_runtimes_and_labels(tables):
    asked = StudySettings(device=f"{OFFICE},{LAB}", accuracy="macs", limits=parse_limits(maxima=["latency_ms@lab=2", "latency_ms=9"]))
    found = resolve(asked)
    assert (found.runtime, found.objective) == ("openvino,torchscript", "acc-worstlatency")
    assert [limit.name for limit in found.limits] == ["latency_ms", f"latency_ms@{LAB}"]
    assert [limit.name for limit in found.measured_limits] == ["latency_ms"]
    assert resolve(found) == found == StudySettings.from_dict(found.to_dict())
    twice = resolve(dataclasses.replace(asked, device=f"{OFFICE},{OFFICE}", runtime="openvino,torchscript", limits=()))
    assert twice.labels == (f"{OFFICE}/openvino", f"{OFFICE}/torchscript")


def test_one_device_is_resolved_as_ever(tables):
    plain = resolve(StudySettings(device=OFFICE, accuracy="macs", limits=parse_limits(maxima=["latency_ms=2"])))
    named = resolve(StudySettings(device=OFFICE, accuracy="macs", limits=parse_limits(maxima=[f"latency_ms@{OFFICE}=2"])))
    assert plain == named
    assert (plain.device, plain.runtime, plain.objective) == (OFFICE, "openvino", "acc-latency")
    assert plain.to_dict()["limits"]["max"] == ["latency_ms=2.0"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": f"{OFFICE},{OFFICE}"}, "named twice"),
        ({"device": f"{OFFICE},"}, "not a name"),
        ({"objective": "acc-throughput"}, "throughput is of one device"),
        ({"limits": parse_limits(maxima=["latency_ms@phone=2"])}, "none of the devices office-cpu, lab-cpu"),
    ],
)
def test_what_cannot_be_meant_is_refused(tables, changed, message):
    with pytest.raises((UsageError, DeviceError), match=message):
        resolve(StudySettings(**{"device": f"{OFFICE},{LAB}", "accuracy": "macs", **changed}))


def test_wrong_numbers_of_runtimes_devices_and_limits_are_refused():
    with pytest.raises(UsageError, match="3 runtimes"):
        StudySettings(device="a,b", runtime="x,y,z")
    with pytest.raises(UsageError, match="there is one, a"):
        StudySettings(device="a", objective="acc-worstlatency")
    with pytest.raises(UsageError, match="one axis"):
        parse_objectives("acc-latency-worstlatency")
    with pytest.raises(UsageError, match="not held device by device"):
        parse_limits(maxima=["macs@a=3"])
    with pytest.raises(UsageError, match="given twice"):
        parse_limits(maxima=["latency_ms@a=3", "latency_ms@A=4"])


def test_a_missing_table_and_an_attached_device_that_is_not_first_are_told_before_anything_is_measured(tables, tmp_path):
    with pytest.raises(TableError, match="no latency table for phone .*lowsearch profile --device phone --runtime openvino"):
        prepare(tmp_path / "study", resolve(StudySettings(device=f"cpu,{OFFICE},phone", runtime="openvino", accuracy="macs")), None)
    attached = attached_devices()[0].slug
    with pytest.raises(UsageError, match=f"named first.*--device {attached} --device {OFFICE}"):
        prepare(tmp_path / "study", resolve(StudySettings(device=f"{OFFICE},cpu", runtime="openvino", accuracy="macs")), None)


def test_a_limit_that_needs_no_measurement_is_judged_before_anything_is_measured(home, tmp_path, monkeypatch):
    monkeypatch.setattr("lowsearch.study.assembly._prepare_table", lambda *_, **__: pytest.fail("it measures first"))
    (tmp_path / "study").mkdir()
    settings = resolve(StudySettings(accuracy="macs", limits=parse_limits(maxima=["macs=1"])))
    with pytest.raises(StudyError, match="no network of space 'lowformer-micro' keeps macs <= 1") as caught:
        prepare(tmp_path / "study", settings, None)
    assert "--max macs=" in (caught.value.hint or "")


def test_what_a_run_left_that_ended_before_its_study_was_made_says_nothing(tables, home):
    folder = home / "begun"
    prepare(folder, resolve(StudySettings(device=f"{OFFICE},{LAB}", accuracy="macs")), None)
    prepare(folder, resolve(StudySettings(device=LAB, space="lowformer", accuracy="macs")), None)
    assert SearchSpace.load(folder / "space.yaml").name == "lowformer"
    assert [path.name for path in folder.glob("latency_table*")] == ["latency_table.jsonl"]
    assert LatencyTable.load(folder / "latency_table.jsonl").target.device == LAB


def test_two_shipped_tables_make_a_study_of_two_devices(tables, home):
    folder, settings = home / "both", resolve(StudySettings(device=f"{OFFICE},{LAB}", accuracy="macs", trials=1))
    prepare(folder, settings, None)
    assert sorted(path.name for path in folder.glob("latency_table*")) == ["latency_table-2.jsonl", "latency_table.jsonl"]
    parts = build_parts(folder, settings)
    assert parts.measure is None and parts.sources == {OFFICE: "table", LAB: "table"}
    plan = studies._opened(folder, settings, parts)
    assert plan.reference["worst_latency"] > 1
    devices = read_study_file(folder)["devices"]
    assert [(d["device"], d["runtime"]) for d in devices] == [(OFFICE, "openvino"), (LAB, "torchscript")]
    assert of_study(folder).fleet.scales == scales_from(devices) == parts.fleet.scales
    check_resumable("both", settings, resolve(dataclasses.replace(settings, objective="acc-latency")))
    with pytest.raises(StudyError, match="was made with device office-cpu,lab-cpu"):
        check_resumable("both", settings, resolve(dataclasses.replace(settings, device=f"{LAB},{OFFICE}", runtime="torchscript,openvino")))


def test_the_command_line_tells_what_sharing_costs(finished, tmp_path, monkeypatch, capsys):
    folder, result = finished
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowsearch.study.run.run", lambda settings, folder, progress: result)
    shutil.copytree(folder, tmp_path / "studies" / "both")
    assert cli.invoke(["run", "--study", "both", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["summary"]["sharing"]["devices"] == ["here", "there"] and "latency_ms@there" in found["front"][0]
    assert cli.invoke(["run", "--study", "both"]) == 0
    text = capsys.readouterr().out
    assert "What sharing costs" in text and "ms on there (table)" in text and "here alone" in text
    assert cli.invoke(["run", "--study", "both", "--batch", "1", "--batch", "8"]) == 2
    assert "one search has one batch" in capsys.readouterr().err


def test_flags_of_several_devices_reach_the_settings(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowsearch.study.run.run", lambda settings, folder, progress: asked.append(settings) or exit())
    flags = ["--device", "a", "--device", "b", "--runtime", "x", "--runtime", "y", "--max", "latency_ms@b=3", "--threads", "2"]
    with pytest.raises(SystemExit):
        cli.invoke(["run", *flags])
    assert (asked[0].devices, asked[0].runtimes, asked[0].threads, asked[0].batch) == (("a", "b"), ("x", "y"), 2, 1)
    assert [limit.name for limit in asked[0].limits] == ["latency_ms@b"]
    with pytest.raises(SystemExit):
        cli.invoke(["run"])
    assert asked[1] == StudySettings()
