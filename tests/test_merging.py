"""Two studies as one: what both found, once, under one table; and everything that does not compare is refused with its reason."""

from __future__ import annotations

import json
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
from lowsearch.study import run as studies
from lowsearch.study.merging import merge
from lowsearch.study.settings import StudySettings, stored_settings
from lowsearch.study.storage import candidates, enqueue, open_study
from lowsearch.study.workers.worker import SearchWorker

TINY_SPACE = Path(__file__).with_name("tiny_space.yaml")
SPACE = fakes.SPACE
RECORDS = made.records_of(SPACE, 12)


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
