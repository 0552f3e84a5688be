"""Two studies as one: what both found, once, under one table; and everything that does not compare is refused with its reason."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import made_knowledge as made
import numpy as np
import pytest
import yaml
from tiny_fakes import fakes

from lowsearch import cli
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.errors import StudyError
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import BlockLatency
from lowsearch.search.objectives import parse_limits
from lowsearch.search.verification import VERIFIED, Verification, Verifications
from lowsearch.study import run as studies
from lowsearch.study.merging import merge
from lowsearch.study.settings import StudySettings, stored_settings
from lowsearch.study.storage import candidates, enqueue, open_study
from lowsearch.study.workers.worker import SearchWorker

TINY_SPACE = Path(__file__).with_name("tiny_space.yaml")
SPACE = fakes.SPACE
RECORDS = made.records_of(SPACE, 12)
OBJECTIVES = StudySettings().objectives


def make(folder, *, records=(), trials=4, **changes):
    """A study by MACs as a proxy, of the family and some proposals, with its space, its table and its records."""
    settings = StudySettings(**{"accuracy": "macs", "device": "some-board", "trials": trials, "workers": 1, **changes})
    folder.mkdir(parents=True)
    (folder / "space.yaml").write_text(SPACE.text)
    made.table_of(SPACE).save(folder / "tables").replace(folder / "latency_table.jsonl")
    parts = fakes.make_parts(folder, settings)
    plan = studies._opened(folder, settings, parts)
    study = open_study(folder, settings.objectives)
    enqueue(study, SPACE, dict(SPACE.family), origin="family")
    SearchWorker(folder, plan, parts, name="worker-0.test", stopped=threading.Event(), clock=lambda: 1.0).run()
    (folder / "clock.json").write_text(json.dumps({"search": 10.0}))
    (folder / "records.jsonl").unlink(missing_ok=True)
    for record in records:
        AccuracyRecords(folder / "records.jsonl").append(record)
    return folder


def found_in(folder):
    return {c.genome.tobytes(): c for c in candidates(open_study(folder, StudySettings().objectives), SPACE)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    return make(folder / "one", records=RECORDS[:7]), make(folder / "two", seed=1, sampler="random", records=RECORDS[5:])


def test_a_merger_holds_what_either_scored_once_with_latencies_of_one_table(pair, tmp_path):
    counts = merge(*pair, tmp_path / "both")
    first, second, both = (found_in(folder) for folder in (*pair, tmp_path / "both"))
    assert set(both) == set(first) | set(second)
    assert counts == {"first": len(first), "second": len(second.keys() - first.keys()), "records": len(RECORDS)}
    predictor = LatencyPredictor(SPACE, made.table_of(SPACE))
    study = open_study(tmp_path / "both", StudySettings().objectives)
    for c, trial in zip(both.values(), study.trials, strict=True):
        origin = first.get(c.genome.tobytes()) or second[c.genome.tobytes()]
        assert (c.accuracy, c.origin, c.name, c.state) == (origin.accuracy, origin.origin, origin.name, "complete")
        assert trial.values[1] == pytest.approx(predictor.predict(c.genome[None])[0][0])
    assert {r.arch_id for r in AccuracyRecords(tmp_path / "both" / "records.jsonl")} == {r.arch_id for r in RECORDS}
    assert json.loads((tmp_path / "both" / "clock.json").read_text()) == {"search": 20.0}


def verified(genome, latency_ms):
    arch_id = SPACE.decode(genome).arch_id
    return Verification(
        arch_id=arch_id, genome=tuple(map(int, genome)), latency_ms=latency_ms, latency_std_ms=0.01 * latency_ms, predicted_latency_ms=1.0,
        predicted_latency_std_ms=0.1, pace=1.2, anchor_ratios=(1.2,), samples_ms=((1.2 * latency_ms,),),
    )  # fmt: skip


def test_what_either_measured_is_not_forgotten_and_stands_at_the_pace_of_the_first_table(pair, tmp_path):
    one, two = (shutil.copytree(folder, tmp_path / folder.name) for folder in pair)
    table = made.table_of(SPACE)
    twice = {b: BlockLatency(hot_ms=2 * t.hot_ms, warm_ms=2 * t.warm_ms, cold_ms=2 * t.cold_ms) for b, t in table.entries.items()}
    dataclasses.replace(table, entries=twice).save(tmp_path / "slow").replace(two / "latency_table.jsonl")
    genomes = [c.genome for c in found_in(two).values()]
    shared = next(g for g in genomes if g.tobytes() in found_in(one))
    alone = next(g for g in genomes if g.tobytes() not in found_in(one))
    pruned = next(g for g in SPACE.all_genomes() if g.tobytes() not in {**found_in(one), **found_in(two)})
    Verifications(one / VERIFIED).append(verified(shared, 7.0))
    for genome, ms in ((shared, 16.0), (alone, 10.0), (pruned, 30.0)):
        Verifications(two / VERIFIED).append(verified(genome, ms))
    merge(one, two, tmp_path / "both")
    found = Verifications(tmp_path / "both" / VERIFIED)
    assert [found.of(g).latency_ms for g in (shared, alone, pruned)] == pytest.approx([7.0, 5.0, 15.0])
    assert (found.of(alone).latency_std_ms, found.of(alone).pace) == pytest.approx((0.05, 2.4))
    trials = open_study(tmp_path / "both", OBJECTIVES).get_trials()
    values = {genome: trial.values[1] for genome, trial in zip(found_in(tmp_path / "both"), trials, strict=True)}
    assert (values[shared.tobytes()], values[alone.tobytes()]) == pytest.approx((7.0, 5.0))


def test_a_network_that_the_other_measured_over_the_limit_is_not_within_it(tmp_path):
    limits = parse_limits(maxima=["latency_ms=1"])
    one, two = make(tmp_path / "one", limits=limits), make(tmp_path / "two", limits=limits, trials=1)
    genome = next(iter(found_in(one).values())).genome
    Verifications(two / VERIFIED).append(verified(genome, 1.1))
    merge(one, two, tmp_path / "both")
    broken = [t.constraints["limits"] for t in open_study(tmp_path / "both", OBJECTIVES).get_trials()]
    assert broken[0] == pytest.approx(0.1) and set(broken[1:]) == {0.0}


def test_a_merged_study_goes_on_and_does_not_propose_what_either_tried(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SPACE", str(TINY_SPACE))
    merge(*pair, tmp_path / "both")
    (tmp_path / "both" / "records.jsonl").unlink()  # The fakes read others.
    settings = stored_settings(tmp_path / "both")
    before = found_in(tmp_path / "both")
    proposals = sum(c.origin != "family" for c in before.values())
    settings = StudySettings.from_dict({**settings.to_dict(), "trials": proposals + 2})
    result = studies.run(settings, tmp_path / "both", backend=fakes.backend())
    after = found_in(tmp_path / "both")
    assert len(after) == len(before) + 2 and set(before) < set(after)
    assert result.front


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": "acc-macs"}, "objective is acc-latency in one and acc-macs in the other"),
        ({"accuracy": "params"}, "accuracy is macs"),
        ({"device": "other-board"}, "device is some-board"),
        ({"threads": 2}, "threads is 1 in one and 2"),
    ],
)
def test_other_questions_do_not_merge(pair, tmp_path, changes, says):
    other = make(tmp_path / "other", trials=1, **changes)
    with pytest.raises(StudyError, match=says) as caught:
        merge(pair[0], other, tmp_path / "both")
    assert "lowsearch study diff one other" in (caught.value.hint or "")
    assert not (tmp_path / "both").exists()


def test_other_images_recipes_and_spaces_do_not_merge(pair, tmp_path):
    other = make(tmp_path / "other", trials=1)
    values = yaml.safe_load((other / "study.yaml").read_text())
    (other / "study.yaml").write_text(yaml.safe_dump({**values, "data_hash": "another"}))
    with pytest.raises(StudyError, match="hash of the data is made in one and another"):
        merge(pair[0], other, tmp_path / "both")
    (other / "study.yaml").write_text(yaml.safe_dump(values))
    line = json.loads((pair[0] / "records.jsonl").read_text().splitlines()[0])
    (other / "records.jsonl").write_text(json.dumps({**line, "recipe_hash": "longer"}) + "\n")
    with pytest.raises(StudyError, match="hash of the recipe"):
        merge(pair[0], other, tmp_path / "both")
    (other / "records.jsonl").unlink()
    (other / "space.yaml").write_text(SPACE.text + "\n# edited\n")
    with pytest.raises(StudyError, match="the search space"):
        merge(pair[0], other, tmp_path / "both")


def test_a_study_that_is_being_run_is_not_merged_and_a_failed_merger_leaves_nothing(pair, tmp_path, monkeypatch):
    with studies.locked(pair[1]), pytest.raises(StudyError, match="is being run"):
        merge(*pair, tmp_path / "both")
    monkeypatch.setattr("lowsearch.study.merging.of_study", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merge(*pair, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_studies_merge_from_the_command_line(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.invoke(["study", "merge", str(pair[0]), str(pair[1]), "--study", "both", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["study"] == "both"
    assert (tmp_path / "studies" / "both" / "study.yaml").exists()
    assert np.isfinite([c.accuracy for c in found_in(tmp_path / "studies" / "both").values()]).all()
