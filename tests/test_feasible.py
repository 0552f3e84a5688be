"""Small spaces are searched whole and end by themselves; limits that nothing keeps are told before anything is trained."""

from __future__ import annotations

import dataclasses
import itertools
import re
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_fakes import fakes

from lowsearch import cost
from lowsearch.errors import StudyError
from lowsearch.search import feasible
from lowsearch.search.estimates import Estimator, excess
from lowsearch.search.objectives import parse_limits
from lowsearch.search.sampler import LowSearchSampler
from lowsearch.space import SearchSpace, _slots
from lowsearch.study import run as studies
from lowsearch.study.finalists import train_planned
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import candidates, enqueue, is_exhausted, nothing_to_start, open_study, reclaim, why_ended
from lowsearch.study.workers import crew
from lowsearch.study.workers.conductor import Conductor
from lowsearch.study.workers.worker import SearchWorker

TESTS = Path(__file__).parent
TINY, MICRO = fakes.SPACE, SearchSpace.load("lowformer-micro")
TINY_ESTIMATOR = Estimator(TINY, fakes.FakeLatency())
LIMITS = parse_limits(maxima=["latency_ms=0.18"], minima=["params=120000"])


class SlowMicro:
    def predict(self, genomes):
        mean_ms = Estimator(MICRO, None).estimate(genomes).mean["macs"] / 2e7
        return mean_ms, 0.05 * mean_ms


def search(folder, settings, *, stop_after=None):
    """The search of one worker in this process; returns the study. `stop_after` trials the process dies, in the midst of one."""
    folder.mkdir(exist_ok=True)
    parts = fakes.make_parts(folder, settings)
    plan = studies._opened(folder, settings, parts)
    study = open_study(folder, settings.objectives)
    reclaim(study)
    enqueue(study, TINY, dict(TINY.family), origin="family")
    calls = itertools.count()

    def clock():
        if next(calls) == stop_after:
            raise KeyboardInterrupt
        return 0.0

    SearchWorker(folder, plan, parts, name="worker-0.test", stopped=threading.Event(), clock=clock).run()
    return study


def within_limits():
    genomes = TINY.all_genomes()
    return {genome.tobytes() for genome in genomes[excess(TINY_ESTIMATOR.estimate(genomes), LIMITS) == 0]}


def genomes_of(study):
    return [c.genome.tobytes() for c in candidates(study, TINY) if c.state == "complete"]


# Trying everything


def test_exhaustive_tries_every_network_within_the_limits_once_and_ends(tmp_path):
    study = search(tmp_path / "study", StudySettings(sampler="exhaustive", trials=1000, workers=1, limits=LIMITS))
    found = genomes_of(study)
    assert set(found) == within_limits() and len(found) == len(set(found))
    assert 6 < len(found) < 60
    assert is_exhausted(study)


def test_exhaustive_proposes_the_same_after_an_interruption_and_another_order_for_another_seed(tmp_path):
    settings = StudySettings(sampler="exhaustive", trials=6, workers=1, limits=LIMITS)
    whole = genomes_of(search(tmp_path / "whole", settings))
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "study", settings, stop_after=5)
    assert genomes_of(search(tmp_path / "study", settings)) == whole
    other = StudySettings(sampler="exhaustive", trials=6, workers=1, limits=LIMITS, seed=1)
    assert genomes_of(search(tmp_path / "other", other)) != whole


def test_exhaustive_goes_on_in_its_order_whatever_was_measured_over_the_limit(tmp_path):
    limits = parse_limits(maxima=["latency_ms=0.2"])
    settings = StudySettings(sampler="exhaustive", trials=20, workers=1, seed=5, limits=limits, device="doubtful")
    whole = fakes.search(tmp_path / "whole", settings)
    assert any(c.reason.startswith("measured over limit") for c in whole[:6]), "else it proves nothing"
    for trials in (5, 10, 15, 20):
        resumed = fakes.search(tmp_path / "study", dataclasses.replace(settings, trials=trials))
    assert [(c.genome.tolist(), c.state) for c in resumed] == [(c.genome.tolist(), c.state) for c in whole]


def test_a_space_too_large_to_try_whole_is_refused_with_its_size_and_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match=r"'lowformer-micro' has 4\.62e\+16 networks") as caught:
        feasible.all_to_try(Estimator(MICRO, None), ())
    assert "--sampler lowsearch" in (caught.value.hint or "")
    monkeypatch.setattr(feasible, "MAX_EXHAUSTIVE", 107)
    with pytest.raises(StudyError, match="108 networks of space 'tiny' keep the limits"):
        studies.run(StudySettings(sampler="exhaustive", workers=1), tmp_path / "study", backend=fakes.backend())
    assert not (tmp_path / "study" / "records.jsonl").exists()


def test_another_sampler_ends_as_well_when_it_finds_nothing_new(tmp_path, monkeypatch):
    monkeypatch.setattr(feasible, "MAX_LISTED", 0)  # Nobody can tell that all were tried.
    monkeypatch.setenv("FAKE_SPACE", str(TESTS / "tiny_space.yaml"))
    monkeypatch.setattr("lowsearch.search.foreign.N_UNIFORM", 1)
    monkeypatch.setattr("lowsearch.search.foreign.MAX_UNIFORM", 3)
    study = search(tmp_path / "study", StudySettings(trials=1000, workers=1, sampler="random"))
    assert len(TINY.family) < len(genomes_of(study)) < TINY.size()
    assert not is_exhausted(study) and "the same command looks again" in why_ended(study)


def test_our_sampler_ends_as_well_when_nothing_is_left(tmp_path):
    study = search(tmp_path / "study", StudySettings(trials=1000, workers=1, limits=LIMITS))
    found = set(genomes_of(study))
    assert found <= within_limits() and len(found) > 0.8 * len(within_limits())
    assert is_exhausted(study) == (found == within_limits())
    assert why_ended(study)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_miss_in_a_space_too_large_to_list_is_no_proof_and_the_next_run_looks_again(tmp_path, monkeypatch, in_flight):
    monkeypatch.setattr(feasible, "MAX_LISTED", 0)
    monkeypatch.setenv("FAKE_SPACE", str(TESTS / "tiny_space.yaml"))
    evolve, folder = LowSearchSampler._evolve, tmp_path / "study"
    blind = []

    def seeing_nothing(self, *arguments):
        limits, self.limits = self.limits, (parse_limits(maxima=["macs=1"]) if blind else self.limits)
        try:
            return evolve(self, *arguments)
        finally:
            self.limits = limits

    monkeypatch.setattr(LowSearchSampler, "_evolve", seeing_nothing)
    settings = StudySettings(trials=6, workers=1, in_flight=in_flight, limits=parse_limits(maxima=["latency_ms=0.5"]))
    kind = SearchWorker if in_flight == 1 else partial(Conductor, engine=None)
    blind.append(True)
    found = fakes.search(folder, settings, kind=kind)
    study = open_study(folder, settings.objectives)
    assert not is_exhausted(study)
    assert re.match(r"no untried network of space 'tiny' that keeps the limits .* was found among [\d,]+ candidates", why_ended(study))
    assert nothing_to_start(study, 6) and {c.state for c in found} == {"complete"} and len(found) < 6 + len(TINY.family)
    blind.clear()
    with pytest.MonkeyPatch.context() as patched:  # Nothing to search: the run ends with its finals, and says why.
        patched.setattr(crew.Crew, "start_missing", lambda self, job, **_: train_planned(folder, fakes.make_parts(folder, settings)))
        result = studies.run(settings, folder, backend=fakes.backend())
    assert not result.summary["exhausted"] and "looks again" in result.summary["search_ended"]
    assert why_ended(study) == ""
    found = fakes.search(folder, settings, kind=kind)
    assert Counter(c.state for c in found) == {"complete": 6 + len(TINY.family)}


def test_a_whole_run_that_exhausts_its_space_goes_on_to_its_finals(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SPACE", str(TESTS / "tiny_space.yaml"))
    limits = parse_limits(maxima=["latency_ms=0.14"], minima=["params=113000"])
    settings = StudySettings(sampler="exhaustive", budget_s=500.0, workers=2, limits=limits)
    result = studies.run(settings, tmp_path / "study", backend=fakes.backend())
    assert result.summary["exhausted"]
    assert result.front


# Limits that nothing keeps


def test_the_nearest_network_found_by_descent_is_the_nearest_of_all(monkeypatch):
    for texts in (["latency_ms=0.001"], ["params=100", "latency_ms=0.02"], ["macs=1000"]):
        limits = parse_limits(maxima=texts)
        genome, least = feasible.nearest(TINY_ESTIMATOR, limits)
        assert least == excess(TINY_ESTIMATOR.estimate(TINY.all_genomes()), limits).min()
        with monkeypatch.context() as patched:
            patched.setattr(feasible, "MAX_LISTED", 0)
            by_descent, found = feasible.nearest(TINY_ESTIMATOR, limits)
        assert found == least
        assert excess(TINY_ESTIMATOR.estimate(np.stack([genome, by_descent])), limits).tolist() == [least, least]


def least_macs() -> float:
    """The smallest MACs of the micro space, exactly: a shortest path over the widths, for every input."""
    slots = {slot.name: slot for slot in _slots(MICRO.num_classes)}

    def least(name, **fixed):
        """Of what may stand in a place, the fewest MACs, given some settings."""
        settings = slots[name].settings
        combinations = itertools.product(*([fixed[s]] if s in fixed else MICRO._choices(s) for s in settings))
        blocks = (slots[name].block(dict(zip(settings, values, strict=True))) for values in combinations)
        return min(cost.of_block(block).macs if block is not None else 0 for block in blocks)

    totals = []
    for entry in MICRO._choices("input"):
        reach = {w: least("stem.conv", **{"input": entry, "stem.width": w}) for w in MICRO._choices("stem.width")}
        for number in range(1, 5):
            stage, before = f"stage{number}.", "stem.width" if number == 1 else f"stage{number - 1}.width"
            repeats = min(MICRO._choices(stage + "depth")) - 1  # More blocks are never fewer MACs.
            reach = {
                w: min(total + least(stage + "down", **{"input": entry, before: b, stage + "width": w}) for b, total in reach.items())
                + repeats * sum(least(stage + kind, **{"input": entry, stage + "width": w}) for kind in ("attention", "mlp", "conv"))
                for w in MICRO._choices(stage + "width")
            }
        totals += [total + least("head", **{"input": entry, "stage4.width": w}) for w, total in reach.items()]
    return min(totals)


def test_descent_finds_the_exact_least_macs_of_a_space_too_large_to_list():
    genome, _ = feasible.nearest(Estimator(MICRO, None), parse_limits(maxima=["macs=1"]))
    assert cost.count(MICRO.decode(genome)).macs == least_macs()


@pytest.mark.parametrize(
    "texts",
    [
        ["latency_ms=0.001"],
        ["macs=1e4"],
        ["params=1000", "latency_ms=0.5"],
        ["time_per_image_ms=0.001"],
        ["peak_memory_mb=0.01"],
        ["artifact_mb=0.01"],
    ],
)
@pytest.mark.parametrize("space", ["tiny", "micro"])
def test_the_bound_that_the_error_offers_is_kept_and_no_tighter_one(texts, space):
    estimator = TINY_ESTIMATOR if space == "tiny" else Estimator(MICRO, SlowMicro())
    with pytest.raises(StudyError) as caught:
        feasible.check_limits(estimator, parse_limits(maxima=texts))
    assert ("all 108 were looked at" if space == "tiny" else "none was found") in caught.value.message
    offered = dict(re.findall(r"--max (\w+)=(\S+)", caught.value.hint or ""))
    assert offered
    given = dict(text.split("=") for text in texts)
    feasible.check_limits(estimator, parse_limits(maxima=[f"{name}={value}" for name, value in {**given, **offered}.items()]))
    tighter = [f"{name}={0.98 * float(value)}" for name, value in offered.items()]
    with pytest.raises(StudyError):
        feasible.check_limits(estimator, parse_limits(maxima=tighter))


def test_the_throughput_that_the_error_offers_is_kept_and_no_higher_one():
    estimator = Estimator(TINY, fakes.FakeLatency(), batch=8)
    with pytest.raises(StudyError, match=r"throughput_ips .* ± ") as caught:
        feasible.check_limits(estimator, parse_limits(minima=["throughput_ips=1e9"]))
    (offered,) = re.findall(r"--min throughput_ips=(\S+)", caught.value.hint or "")
    feasible.check_limits(estimator, parse_limits(minima=[f"throughput_ips={offered}"]))
    with pytest.raises(StudyError):
        feasible.check_limits(estimator, parse_limits(minima=[f"throughput_ips={1.02 * float(offered)}"]))


def test_limits_that_contradict_each_other_name_the_network_that_comes_nearest():
    limits = parse_limits(maxima=["macs=2e6"], minima=["params=1.7e5"])
    with pytest.raises(StudyError, match=r"keeps macs <= 2e\+06, params >= 170000 \(all 108 were looked at\)"):
        feasible.check_limits(TINY_ESTIMATOR, limits)


def test_limits_that_some_network_keeps_pass():
    feasible.check_limits(TINY_ESTIMATOR, LIMITS)
    feasible.check_limits(Estimator(MICRO, SlowMicro()), parse_limits(maxima=["macs=6.5e5"]))  # Random sampling finds none.
    feasible.check_limits(TINY_ESTIMATOR, parse_limits(minima=["accuracy=0.99"]))  # Nothing is known of it yet.


@pytest.mark.parametrize("sampler", ["lowsearch", "random", "tpe"])
def test_a_study_with_limits_that_nothing_keeps_ends_before_anything_is_trained(tmp_path, sampler):
    settings = StudySettings(sampler=sampler, workers=1, limits=parse_limits(maxima=["latency_ms=0.001"]))
    with pytest.raises(StudyError, match="no network of space 'tiny' keeps latency_ms <= 0.001"):
        studies.run(settings, tmp_path / "study", backend=fakes.backend())
    assert not (tmp_path / "study" / "records.jsonl").exists()
    assert not (tmp_path / "study" / "study.yaml").exists()  # Another limit may be asked of the same name.
