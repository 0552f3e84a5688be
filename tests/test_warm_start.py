"""Warm starts: earlier trainings teach a new study from its first proposal, are not repeated, and are its own from then on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml
from tiny_fakes import fakes

from lowsearch.cli import invoke
from lowsearch.errors import StudyError, UsageError
from lowsearch.search.objectives import parse_limits
from lowsearch.study import run as studies
from lowsearch.study.outputs import StudyFiles
from lowsearch.study.settings import StudySettings, check_resumable, read_study_file
from lowsearch.study.storage import candidates, n_proposals, open_study
from lowsearch.study.workers.worker import Plan, SearchWorker

SPACE = fakes.SPACE
TINY_SPACE = Path(__file__).with_name("tiny_space.yaml")
FAMILY = {arch.arch_id for arch in SPACE.family.values()}


def make_earlier(folder, **changes):
    """A study that trained 12 networks and the family, with the files that a real one leaves."""
    settings = StudySettings(**{"trials": 12, "workers": 1, **changes})
    found = fakes.search(folder, settings)
    (folder / "space.yaml").write_text(SPACE.text)
    StudyFiles(folder, settings, fakes.make_parts(folder, settings), Plan.read(folder).reference_costs).refresh(found)
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    return make_earlier(tmp_path_factory.mktemp("studies") / "earlier")


def started(earlier, **changes):
    return StudySettings(**{"trials": 4, "workers": 1, "seed": 7, "warm_start": (str(earlier),), **changes})


def trained(folder, *, seed=None, least=0.0):
    """arch_ids with a record of `seed` at `least` or above."""
    records = fakes.FakeRecords(folder).read()
    return {r.arch_id for r in records if r.rung >= least and seed in (None, r.seed)}


def essence(found):
    return list(map(str, fakes.essence(found)))  # As text NaN equals NaN.


def ids(found):
    return [SPACE.decode(c.genome).arch_id for c in found]


@pytest.fixture(scope="module")
def warm(earlier, tmp_path_factory):
    """What a search finds that starts warm, and what it knew before each proposal: networks, and predictions for all of the space."""
    knew = []

    class Watching(SearchWorker):
        def _judge_signals(self):  # Called before every proposal.
            model = self._newest_model()
            knew.append(({r.arch_id for r in self._records()}, None if model is None else model.predict(SPACE.all_genomes())[0]))
            super()._judge_signals()

    folder = tmp_path_factory.mktemp("studies") / "warm"
    return folder, fakes.search(folder, started(earlier), kind=Watching), knew


def test_the_predictor_knows_the_earlier_networks_before_the_first_proposal(earlier, warm):
    _, _, knew = warm
    networks, predicted = knew[0]
    assert networks == trained(earlier) and networks - FAMILY
    assert predicted == pytest.approx(fakes.FakeScorer(fakes.FakeRecords(earlier).read()).predict(SPACE.all_genomes())[0])


def test_what_was_trained_fully_is_known_and_not_trained_again(earlier, warm):
    folder, found, _ = warm
    whole = trained(earlier, least=1.0)
    assert len(whole) > len(FAMILY)
    assert Counter(c.state for c in found) == {"complete": len(whole) + 4}
    assert set(ids(found[: len(whole)])) == whole and len(set(ids(found))) == len(found)
    assert trained(folder, seed=7).isdisjoint(whole)
    assert trained(folder, seed=7) == set(ids(found[len(whole) :]))


def test_known_networks_keep_their_origin_and_are_no_proposals(earlier, warm):
    folder, found, _ = warm
    then = {i: c for c in candidates(open_study(earlier, StudySettings().objectives), SPACE) for i in ids([c])}
    known = found[: len(trained(earlier, least=1.0))]
    for arch_id, c in zip(ids(known), known, strict=True):
        assert (c.origin, c.name, c.rung) == (then[arch_id].origin, then[arch_id].name, 1.0)
        assert c.why == f"trained in study {earlier}" and c.val_accuracy == then[arch_id].val_accuracy
    assert n_proposals(open_study(folder, StudySettings().objectives)) == 4


def test_a_diverse_start_that_was_trained_is_not_begun_anew(earlier, warm):
    _, found, _ = warm
    begun = sum(c.why.startswith("diverse start") for c in candidates(open_study(earlier, StudySettings().objectives), SPACE))
    own = [c.why for c in found if c.number >= len(found) - 4]
    assert begun == 4 and f"diverse start, {begun + 1} of 24" in " ".join(own)
    assert not all(why.startswith("diverse start") for why in own)


@pytest.mark.parametrize("sampler", ["lowsearch", "tpe", "random"])
def test_resumed_without_the_earlier_study_it_proposes_the_same(earlier, tmp_path, sampler):
    asked = started(earlier, sampler=sampler)
    whole = essence(fakes.search(tmp_path / "whole", asked))
    copy = shutil.copytree(earlier, tmp_path / "copy")
    asked = dataclasses.replace(asked, warm_start=(str(copy),))
    for trials in (1, 2, 4):
        found = fakes.search(tmp_path / "study", dataclasses.replace(asked, trials=trials))
        shutil.rmtree(copy, ignore_errors=True)
    assert essence(found) == whole


@pytest.mark.parametrize("at", [1, 3])
def test_killed_while_it_takes_over_it_goes_on_as_if_it_had_not_been(earlier, tmp_path, monkeypatch, warm, at):
    with monkeypatch.context() as patched:
        patched.setattr(optuna.study.Study, "add_trial", fakes.Interrupting(optuna.study.Study.add_trial, at, after=True))
        with pytest.raises(fakes.Death):
            fakes.search(tmp_path / "study", started(earlier))
    assert essence(fakes.search(tmp_path / "study", started(earlier))) == essence(warm[1])


def test_killed_before_the_study_was_made_it_begins_anew(earlier, tmp_path, monkeypatch, warm):
    other = make_earlier(tmp_path / "other", trials=2, seed=3)
    with monkeypatch.context() as patched:
        patched.setattr(studies, "write_study_file", fakes.Interrupting(studies.write_study_file, 1))
        with pytest.raises(fakes.Death):
            fakes.search(tmp_path / "study", started(other))
    assert (tmp_path / "study" / "records.jsonl").exists()
    assert essence(fakes.search(tmp_path / "study", started(earlier))) == essence(warm[1])


def test_another_target_has_latencies_and_limits_of_its_own(earlier, tmp_path, monkeypatch):
    slow = {"latency": fakes.OtherLatency()}
    make_parts = fakes.make_parts
    monkeypatch.setattr(fakes, "make_parts", lambda folder, settings: dataclasses.replace(make_parts(folder, settings), **slow))
    whole = trained(earlier, least=1.0)
    bound = sorted(fakes.OtherLatency().predict(SPACE.encode(r.arch)[None])[0][0] for r in known_of(earlier))[len(whole) // 2]
    settings = started(earlier, limits=parse_limits(maxima=[f"latency_ms={bound}"]))
    found = fakes.search(tmp_path / "study", settings)
    study = open_study(tmp_path / "study", settings.objectives)
    for c, trial in zip(found, study.get_trials(), strict=True):
        if c.state == "complete":
            assert trial.values[1] == pytest.approx(fakes.OtherLatency().predict(c.genome[None])[0][0])
            assert trial.constraints["limits"] == 0
    kept = {i for i, c in zip(ids(found), found, strict=True) if c.why.startswith("trained in study")}
    assert 0 < len(kept) < len(whole)
    assert trained(tmp_path / "study", seed=7).isdisjoint(whole) and trained(tmp_path / "study") > trained(earlier)


def known_of(folder):
    return [r for r in fakes.FakeRecords(folder).read() if r.rung >= 1]


def test_several_studies_start_one_and_each_network_is_known_once(earlier, tmp_path):
    other = make_earlier(tmp_path / "other", seed=3, trials=6)
    folder = tmp_path / "study"
    found = fakes.search(folder, started(earlier, warm_start=(str(earlier), str(other)), trials=1))
    whole = [trained(earlier, least=1.0), trained(other, least=1.0)]
    assert len(set(ids(found))) == len(found) == len(whole[0] | whole[1]) + 1
    stated = (read_study_file(folder) or {})["warm_start"]
    assert [(s["study"], s["networks"]) for s in stated] == [
        (str(earlier), len(whole[0])), (str(other), len(whole[1] - whole[0]))
    ]  # fmt: skip
    assert trained(folder, seed=0) == trained(earlier) and trained(folder, seed=3) == trained(other)


def test_a_whole_run_starts_warm_and_says_so(earlier, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SPACE", str(TINY_SPACE))
    result = studies.run(started(earlier, trials=2), tmp_path / "study", backend=fakes.backend())
    assert result.summary["known"] == len(trained(earlier, least=1.0))
    assert result.front


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "longer"}, "the recipe is made (hash made) there and longer (hash longer) here"),
        ({"data": "npz:other.npz"}, "the data is made (hash made) there and npz:other.npz (hash npz:other.npz) here"),
    ],
)
def test_trainings_that_do_not_compare_are_refused(earlier, tmp_path, changes, says):
    with pytest.raises(StudyError) as caught:
        fakes.search(tmp_path / "study", started(earlier, **changes))
    assert says in caught.value.message and caught.value.hint and "\n" not in str(caught.value)
    assert not (tmp_path / "study" / "study.yaml").exists() and not (tmp_path / "study" / "records.jsonl").exists()


def test_other_spaces_classes_and_studies_without_trainings_are_refused(earlier, tmp_path):
    copy = shutil.copytree(earlier, tmp_path / "copy")
    (copy / "space.yaml").write_text(SPACE.text + "\n# edited\n")
    with pytest.raises(StudyError, match="the search space is 'tiny'"):
        fakes.search(tmp_path / "study", started(copy))
    (copy / "space.yaml").write_text(SPACE.text)
    archs = [dataclasses.replace(r, arch=dataclasses.replace(r.arch, num_classes=20)) for r in fakes.FakeRecords(copy).read()]
    (copy / "records.jsonl").unlink()
    for record in archs:
        fakes.FakeRecords(copy).append(record)
    with pytest.raises(StudyError, match="the number of classes is 20 there and 10 here"):
        fakes.search(tmp_path / "study", started(copy))
    (copy / "records.jsonl").unlink()
    with pytest.raises(StudyError, match="has trained nothing to start from"):
        fakes.search(tmp_path / "study", started(copy))


def test_a_study_that_is_not_there_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowsearch.study.assembly.profile", lambda *_, **__: pytest.fail("a table was measured"))
    assert invoke(["run", "--warm-start", "absent", "--study", "new", "--trials", "1"]) == 2
    said = capsys.readouterr().err
    assert "no study 'absent'" in said and said.count("\n") == 1


@pytest.mark.parametrize("changes", [{"accuracy": "macs"}, {"objective": "latency-params"}])
def test_a_study_that_trains_nothing_has_nothing_to_start_from(earlier, changes):
    with pytest.raises(UsageError, match="trains nothing") as caught:
        started(earlier, **changes)
    assert caught.value.hint


def test_a_warm_start_is_part_of_the_settings():
    settings = StudySettings(warm_start=("one", "two"))
    assert StudySettings.from_dict(yaml.safe_load(yaml.safe_dump(settings.to_dict()))) == settings
    old = {name: value for name, value in StudySettings().to_dict().items() if name != "warm_start"}
    assert StudySettings.from_dict(old) == StudySettings()
    with pytest.raises(StudyError, match="resume with --warm-start one --warm-start two"):
        check_resumable("s", settings, StudySettings())


def test_a_damaged_list_is_one_clear_line(earlier, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(optuna.study.Study, "add_trial", fakes.Interrupting(optuna.study.Study.add_trial, 1))
        with pytest.raises(fakes.Death):
            fakes.search(tmp_path / "study", started(earlier))
    (tmp_path / "study" / "warm_start.json").write_text(json.dumps({"networks": [{"arch_id": "gone"}]}))
    with pytest.raises(StudyError, match=r"warm_start.json is damaged") as caught:
        fakes.search(tmp_path / "study", started(earlier))
    assert caught.value.hint
