"""The examination of the accuracy predictor: who is held out, what survives a kill, what the verdict rests on, when steering ends."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_fakes as fakes
import yaml
from filelock import FileLock

from lowsearch import cli
from lowsearch.accuracy.agreement import Agreement, Lead, agreement, spearman
from lowsearch.accuracy.scores import Unit
from lowsearch.cli.found import print_front
from lowsearch.errors import DataError, StudyError, UsageError
from lowsearch.report import figures, sections
from lowsearch.report.study_files import read_study
from lowsearch.search.estimates import scores_of
from lowsearch.search.objectives import parse_limits
from lowsearch.search.sampler import LowSearchSampler, Proposal
from lowsearch.study import held_out
from lowsearch.study import run as studies
from lowsearch.study.gate import (
    MIN_NETWORKS,
    SIGNALS,
    USEFUL,
    Gate,
    Signal,
    at_most,
    clearly_fails,
    follows_next,
    judged_signals,
    unjudged,
    what_failed,
)
from lowsearch.study.held_out import Band
from lowsearch.study.parts import Parts, ProxyAccuracy
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import candidates, enqueue, open_study, reclaim
from lowsearch.study.trust import BETWEEN_SEEDS, PREDICTOR, Ranking, Trust, ceiling_of, trust, verdict_of
from lowsearch.study.workers.engines import HereEngine
from lowsearch.study.workers.worker import SearchWorker

SPACE = fakes.SPACE


class Liar:
    """A predictor whose forecasts have nothing to do with the networks; each `seed` has its own luck with a few of them."""

    unit: Unit = "top1"
    source = "estimated"

    def __init__(self, seed: int = 7) -> None:
        self.seed = seed

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        taste = np.random.default_rng(self.seed).normal(size=SPACE.n_genes)
        return 0.5 + 0.3 * (genomes.astype(float) @ taste % 1), np.full(len(genomes), 0.05)

    def predict_record(self, record: Any) -> tuple[float, float]:
        return float(np.random.default_rng([self.seed, int(record.arch_id, 16)]).uniform(0.3, 0.8)), 0.05


def make_parts(folder: Path, settings: StudySettings, *, fit: Any = None) -> Parts:
    parts = fakes.make_parts(folder, settings)
    return parts if fit is None else dataclasses.replace(parts, fit=fit)


def search(folder: Path, settings: StudySettings, *, fit: Any = None) -> list[Any]:
    folder.mkdir(exist_ok=True)
    parts = make_parts(folder, settings, fit=fit)
    plan = studies._opened(folder, settings, parts)
    study = open_study(folder, settings.objectives)
    reclaim(study)
    enqueue(study, SPACE, dict(SPACE.family), origin="family")
    SearchWorker(folder, plan, parts, name="worker-0.test", stopped=threading.Event(), clock=itertools.count().__next__).run()
    return candidates(study, SPACE)


def quick_proposal(sampler: LowSearchSampler, trials: Any, *, number: int) -> Proposal:
    """In place of the inner search, whose choices do not matter here."""
    return Proposal(SPACE.sample(1, rng=np.random.default_rng([5, number]))[0], "it is quick")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trust") / "study"
    search(folder, StudySettings(trials=14, workers=1, sampler="random"))
    return folder


@pytest.fixture(scope="module")
def long_searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With enough networks for the gate."""
    folder = tmp_path_factory.mktemp("gate") / "study"
    search(folder, StudySettings(trials=48, workers=1, sampler="random"))
    return folder


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "study"))


def examine(folder: Path, **options: Any) -> Trust:
    return trust(folder, parts=make_parts, worker=(sys.executable, fakes.__file__, "worker"), **options)


def by_name(found: Trust) -> dict[str, Agreement]:
    return {s.name: s.agreement for s in found.signals if not s.band}


# --- the held-out set -------------------------------------------------------------------------------------------------------------


def test_held_out_networks_are_new_spread_over_latency_and_trained_fully(study: Path) -> None:
    found = examine(study, n_networks=12)
    trained = {r.arch_id for r in fakes.FakeRecords(study).read()}
    ids = [n["arch_id"] for n in found.networks]
    assert len(set(ids)) == 12 and not set(ids) & trained
    latency_ms = np.array([n["latency_ms"] for n in found.networks])
    assert (np.diff(latency_ms) >= 0).all()
    pool = fakes.FakeLatency().predict(np.unique(SPACE.sample(4000, rng=np.random.default_rng(1)), axis=0))[0]
    pool = np.sort(pool[pool < studies.Plan.read(study).reference["latency_ms"]])
    ranks = np.searchsorted(pool, latency_ms) / len(pool)
    assert (np.abs(ranks - (np.arange(12) + 0.5) / 12) < 0.09).all()  # one from each of twelve equal shares
    assert found.n_seeds == 1 and json.loads((study / "trust.json").read_text())["verdict"] == found.verdict


def test_the_set_is_frozen_and_grows_only_when_asked(study: Path) -> None:
    first, again = (examine(study, n_networks=8) for _ in range(2))
    assert first == again
    more = examine(study, n_networks=16)
    assert {n["arch_id"] for n in first.networks} <= {n["arch_id"] for n in more.networks} and len(more.networks) == 16
    fewer = examine(study, n_networks=5)
    assert len(fewer.networks) == 16


def test_a_killed_examination_goes_on_where_it_stopped(study: Path, tmp_path: Path) -> None:
    (study / "die-at").write_text("5")
    with pytest.raises(KeyboardInterrupt):
        examine(study, n_networks=9)
    assert not (study / "trust.json").exists()
    (study / "die-at").unlink()
    resumed = examine(study, n_networks=9)
    for path in (study / "trust.json", *study.glob("held-out-*/records.jsonl")):
        path.unlink()
    assert examine(study, n_networks=9) == resumed


def test_workers_train_the_set_side_by_side_and_to_the_same_end(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = examine(study, n_networks=6)
    for path in (study / "trust.json", *study.glob("held-out-*/records.jsonl"), study / "trained-by.log"):
        path.unlink()
    settings = yaml.safe_load((study / "study.yaml").read_text())
    settings["settings"]["workers"] = 3
    (study / "study.yaml").write_text(yaml.safe_dump(settings))
    (study / "crash-once").write_text(alone.networks[2]["arch_id"])  # Kills the process that trains it.
    (study / "hold").touch()
    deadline = time.monotonic() + 120
    heard: list[tuple[int, int, str]] = []

    def trained_by() -> list[str]:
        return (study / "trained-by.log").read_text().split() if (study / "trained-by.log").exists() else []

    def progress(*what: Any) -> None:
        heard.append(what)
        if len(set(trained_by())) > 1 or time.monotonic() > deadline:
            (study / "hold").unlink(missing_ok=True)

    together = examine(study, n_networks=6, progress=progress)
    assert together == alone and not list(study.glob(".held-out-*.lock"))
    processes = trained_by()
    assert len(processes) == 7 and len(set(processes)) > 1 and str(os.getpid()) not in processes  # One of them twice.
    assert any("of 6 done" in label for _, _, label in heard)


def test_two_examinations_at_once_are_refused(study: Path) -> None:
    with FileLock(study / ".trust.lock"), pytest.raises(StudyError, match="being examined by another process"):
        examine(study, n_networks=6)


def test_a_workers_mistake_is_the_users_to_read(study: Path) -> None:
    settings = yaml.safe_load((study / "study.yaml").read_text())
    settings["settings"]["workers"] = 2
    (study / "study.yaml").write_text(yaml.safe_dump(settings))
    (study / "mistake").touch()
    with pytest.raises(DataError, match="the images are gone"):
        examine(study, n_networks=6)


def test_with_an_engine_its_tasks_train_the_set(study: Path) -> None:
    found = examine(study, n_networks=6)
    for path in study.glob("held-out-*/records.jsonl"):
        path.unlink()
    held_out.train_ordered(study, make_parts(study, StudySettings()), engine=HereEngine(), at_once=4)
    assert examine(study, n_networks=6) == found


def test_the_predictor_never_learns_from_the_held_out_set(study: Path) -> None:
    first = examine(study, n_networks=8)
    records = fakes.FakeRecords(study)
    for r in make_parts(study, StudySettings()).held_out_records("range"):  # As if the search had gone on and found the same networks.
        records.append(r)
    again = examine(study, n_networks=8)
    assert again.n_records == first.n_records
    assert [n["predicted_accuracy"] for n in again.networks] == [n["predicted_accuracy"] for n in first.networks]


def test_limits_of_the_study_hold_for_the_held_out_set(tmp_path: Path) -> None:
    limits = parse_limits(maxima=["params=400000"])
    search(tmp_path / "study", StudySettings(trials=4, workers=1, limits=limits, sampler="random"))
    found = examine(tmp_path / "study", n_networks=6)
    genomes = [SPACE.encode(r.arch) for r in make_parts(tmp_path / "study", StudySettings()).held_out_records("range")]
    assert len(found.networks) == 6 and (fakes.SCORE(np.stack(genomes))[:, 1] <= 400_000).all()


def test_a_second_seed_gives_the_ceiling_and_bands_need_networks(study: Path) -> None:
    found = examine(study, n_networks=24, n_seeds=2)
    between = by_name(found)[BETWEEN_SEEDS]
    assert between.spearman is not None and between.spearman > 0.9 and found.n_seeds == 2
    assert found.ceiling is not None and between.spearman < found.ceiling < 1
    once = examine(study, n_networks=24)
    assert once.ceiling is None and BETWEEN_SEEDS not in by_name(once)
    bands = [s for s in found.signals if s.band]
    assert len(bands) == 9 and all(s.agreement.n_networks == 8 for s in bands)
    assert not [s for s in examine(study, n_networks=5).signals if "fewer" in s.band]


def test_a_band_has_networks_of_its_own_in_it_frozen_and_resumed(study: Path) -> None:
    (study / "front.csv").write_text("arch_id,latency_ms\na,0.1\nb,0.2\nc,0.9\n")
    band = Band.of_front(study)
    assert (band.centre_ms, band.low_ms, band.high_ms) == pytest.approx((0.2, 0.17, 0.23))
    whole = examine(study, n_networks=6)
    (study / "die-at").write_text("5")
    with pytest.raises(KeyboardInterrupt):
        examine(study, n_networks=16, band=band)
    (study / "die-at").unlink()
    found = examine(study, n_networks=16, band=band)
    latency_ms = np.array([n["latency_ms"] for n in found.networks])
    assert len(found.networks) == 16 and band.holds(latency_ms).all() and np.ptp(latency_ms) > 0.8 * (band.high_ms - band.low_ms)
    assert not {n["arch_id"] for n in found.networks} & {r.arch_id for r in fakes.FakeRecords(study).read()}
    assert (
        not [s for s in found.signals if s.band] and json.loads((study / "trust-band.json").read_text())["within"]["low_ms"] == band.low_ms
    )
    assert examine(study, n_networks=12, band=band) == found  # Read, not trained again.
    other = examine(study, n_networks=6, band=Band.around(0.4))
    assert len(other.networks) == 6 and not {n["arch_id"] for n in other.networks} & {n["arch_id"] for n in found.networks}
    assert examine(study, n_networks=6) == whole
    page = sections.trust_card(read_study(study))
    assert page is not None and "6 held-out networks of 0.34 to 0.46 ms" in page.explanation


def test_a_band_that_cannot_be_is_refused(study: Path) -> None:
    with pytest.raises(StudyError, match="has no front"):
        Band.of_front(study)
    (study / "front.csv").write_text("arch_id\na\n")
    with pytest.raises(StudyError, match=r"front\.csv is damaged"):
        Band.of_front(study)
    with pytest.raises(StudyError, match="keep the study's limits and take 1.02e-05"):
        examine(study, band=Band.around(1.2e-5))
    with pytest.raises(UsageError, match="expected a positive latency"):
        Band.around(-1.0)


def test_every_signal_states_unit_source_and_cost(study: Path) -> None:
    found = {row["signal"]: row for row in examine(study, n_networks=6, n_seeds=2).rows()}
    assert {name: (row["unit"], row["source"]) for name, row in found.items()} == {
        PREDICTOR: ("top1", "estimated"), "params": ("rank", "proxy:params"), "MACs": ("rank", "proxy:macs"),
        "NASWOT": ("rank", "proxy:NASWOT"), BETWEEN_SEEDS: ("top1", "trained"),
    }  # fmt: skip
    assert found["NASWOT"]["cpu_seconds"] == 0.5 and found[BETWEEN_SEEDS]["cpu_seconds"] == 10.0
    latest = {r.arch_id: r for r in sorted(fakes.FakeRecords(study).read(), key=lambda r: r.rung)}
    assert json.loads((study / "trust.json").read_text())["learned_cpu_seconds"] == sum(10 * r.rung for r in latest.values())


def test_the_command_prints_the_ceiling_first_and_every_signal_s_unit_and_cost(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowsearch.study.trust.trust", partial(trust, parts=make_parts))
    assert cli.invoke(["trust", str(study), "--networks", "6", "--seeds", "2"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ceiling: one seed ranks these networks as another with Spearman") and lines[-1].startswith("verdict: ")
    assert "unit" in lines[2] and "CPU s a network" in lines[2]
    assert [line.split()[:2] for line in lines if line.startswith((" NASWOT", " MACs"))] == [["MACs", "rank"], ["NASWOT", "rank"]]
    assert cli.invoke(["trust", str(study), "--networks", "5", "--band-at", "0.3"]) in (0, 1)
    assert "held-out networks of 0.255 to 0.345 ms, trained with 1 seed each" in capsys.readouterr().out
    assert cli.invoke(["trust", str(study), "--band"]) == 2 and "--band-at MS" in capsys.readouterr().err


def test_scores_of_a_model_carry_its_error_and_cost_where_it_has_one() -> None:
    genomes = SPACE.sample(4, rng=np.random.default_rng(0))
    clock = iter([1.0, 3.5, 0.0, 0.0])
    liar = scores_of(Liar(), genomes, cpu_clock=lambda: next(clock))
    assert liar.std is not None and (liar.std == 0.05).all() and (liar.unit, liar.source, liar.cpu_seconds) == ("top1", "estimated", 2.5)
    proxy = scores_of(ProxyAccuracy(SPACE, "macs"), genomes, cpu_clock=lambda: next(clock))
    assert proxy.std is None and (proxy.unit, proxy.source, proxy.cpu_seconds) == ("rank", "proxy:macs", 0.0)


def test_a_study_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    search(tmp_path / "study", StudySettings(trials=2, workers=1, accuracy="macs", sampler="random"))
    with pytest.raises(StudyError, match="trains nothing"):
        examine(tmp_path / "study")


def test_progress_ends_at_its_total(study: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    examine(study, n_networks=6, progress=lambda *what: heard.append(what))
    assert all(done <= total for done, total, _ in heard)


# --- the verdict ------------------------------------------------------------------------------------------------------------------


def signals(own: tuple[float, float], macs: float = 0.3) -> list[Ranking]:
    return [
        Ranking(name=PREDICTOR, band="", agreement=Agreement(n_networks=12, spearman=own[0], low=own[1], high=1.0)),
        Ranking(name="params", band="", agreement=Agreement(n_networks=12, spearman=0.1)),
        Ranking(name="MACs", band="", agreement=Agreement(n_networks=12, spearman=macs)),
    ]


def leads(params: float = 0.1, macs: float = 0.1) -> dict[str, Lead | None]:
    return {name: Lead(difference=low + 0.4, low=low, high=low + 0.8) for name, low in (("params", params), ("MACs", macs))}


@pytest.mark.parametrize(
    ("own", "macs", "over", "expected"),
    [
        ((0.8, 0.4), 0.3, leads(), "trusted"),
        ((0.8, 0.4), 0.3, leads(macs=-0.01), "weak"),
        ((0.8, 0.4), 0.3, leads(params=0.0), "weak"),
        ((0.8, 0.4), 0.3, {}, "weak"),
        ((0.8, 0.4), 0.85, leads(), "weak"),
        ((0.6, 0.15), 0.3, leads(), "weak"),
        ((0.5, -0.1), 0.3, leads(), "not trusted"),
    ],
)
def test_verdict_follows_the_rule(own: tuple[float, float], macs: float, over: dict[str, Lead | None], expected: str) -> None:
    assert verdict_of(signals(own, macs), over)[0] == expected


def test_the_reason_says_how_far_the_lead_over_macs_is_from_chance() -> None:
    ahead = {**leads(), "MACs": Lead(difference=0.5, low=0.1, high=0.9)}
    assert "better than that of MACs, by 0.50 (0.10 to 0.90)" in verdict_of(signals((0.8, 0.4)), ahead)[1]
    perhaps = {**leads(), "MACs": Lead(difference=0.5, low=-0.1, high=0.9)}
    assert "not better than MACs beyond doubt, by 0.50 (-0.10 to 0.90)" in verdict_of(signals((0.8, 0.4)), perhaps)[1]
    behind = {"MACs": Lead(difference=-0.05, low=-0.4, high=0.3)}
    assert "MACs alone rank these networks better, by 0.05 (-0.30 to 0.40)" in verdict_of(signals((0.8, 0.4), 0.85), behind)[1]


@pytest.mark.parametrize("own", [(0.8, 0.4), (0.5, -0.1)])
def test_the_reason_ends_with_bands_and_ceiling(own: tuple[float, float]) -> None:
    bands = [Ranking(name=PREDICTOR, band=b, agreement=Agreement(n_networks=8, spearman=rho)) for b, rho in (("a", 0.61), ("b", 0.4))]
    assert verdict_of([*signals(own), *bands], leads(), ceiling=0.93)[1].endswith("; within bands of latency 0.61, 0.40; ceiling 0.93")


def test_the_ceiling_is_what_knowing_the_truth_would_reach() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20_000)
    scores = truth + 0.7 * rng.normal(size=(3, len(truth)))
    between = agreement(scores[0], scores[1], n_bootstrap=1).spearman
    for k in (1, 2, 3):
        reached = np.corrcoef(truth.argsort().argsort(), scores[:k].mean(axis=0).argsort().argsort())[0, 1]
        assert ceiling_of(between, k) == pytest.approx(reached, abs=0.01)
    assert ceiling_of(None, 2) is None and ceiling_of(-0.1, 2) is None


def test_a_predictor_that_does_not_vary_is_not_trusted() -> None:
    found = [Ranking(name=PREDICTOR, band="", agreement=agreement(np.ones(9), np.arange(9))), *signals((0, 0))[1:]]
    assert verdict_of(found, {})[0] == "not trusted"


def test_a_good_predictor_is_trusted_and_a_liar_is_not(study: Path) -> None:
    good = examine(study, n_networks=24)
    assert good.verdict != "not trusted" and (by_name(good)[PREDICTOR].spearman or 0) > 0.4
    liar = trust(study, n_networks=24, parts=lambda folder, settings: make_parts(folder, settings, fit=lambda records: Liar()))
    assert liar.verdict == "not trusted"


# --- the light version in a running search ----------------------------------------------------------------------------------------


class Lying(fakes.FakeScorer):
    """Useful, but for its ranking by the architecture (`predict`) or by the lowest rung (`predict_record`)."""

    def __init__(self, records: Any, what: str, seed: int = 7) -> None:
        super().__init__(records)
        setattr(self, what, getattr(Liar(seed), what))


def judged(records: Any, fit: Any = fakes.FakeScorer) -> dict[Signal, Agreement]:
    return judged_signals(records, SPACE, fit)


def test_signals_are_cross_validated_over_networks(searched: Path) -> None:
    records = fakes.FakeRecords(searched).read()
    full = {r.arch_id for r in records if r.rung >= 1}
    seen: list[set[str]] = []

    class Watched(fakes.FakeScorer):
        def predict(self, genomes: np.ndarray) -> Any:
            assert not {SPACE.decode(genome).arch_id for genome in genomes} & seen[-1]
            return super().predict(genomes)

        def predict_record(self, record: Any) -> Any:
            assert record.arch_id not in seen[-1] or not hasattr(self, "mean")  # While it is fitted it reads what it learns from.
            return super().predict_record(record)

    def fit(found: Any) -> Any:
        seen.append({r.arch_id for r in found})
        return Watched(found)

    found = judged(records, fit)
    assert all(signal.n_networks == len(full) and (signal.spearman or 0) > 0.5 for signal in found.values())
    assert all(full - fold and {r.arch_id for r in records} - full <= fold for fold in seen) and set.intersection(*seen) & full == set()


def test_nothing_is_judged_before_there_are_enough_networks() -> None:
    assert not clearly_fails(Agreement(n_networks=MIN_NETWORKS - 1, spearman=-0.9))
    assert clearly_fails(Agreement(n_networks=MIN_NETWORKS, spearman=-0.2))
    assert clearly_fails(Agreement(n_networks=MIN_NETWORKS))  # a signal that does not vary
    assert not clearly_fails(Agreement(n_networks=MIN_NETWORKS, spearman=0.2))
    assert clearly_fails(Agreement(n_networks=60, spearman=0.2))


@pytest.mark.parametrize("true", [0.2, 0.7])
def test_the_bound_on_a_rank_correlation_covers_what_it_says(true: float) -> None:
    rng = np.random.default_rng(0)
    correlation = 2 * np.sin(np.pi * true / 6)
    signal = rng.normal(size=(1500, 20))
    outcome = correlation * signal + np.sqrt(1 - correlation**2) * rng.normal(size=signal.shape)
    held = [true <= at_most(spearman(a, b) or 0.0, 20) for a, b in zip(signal, outcome, strict=True)]
    assert np.mean(held) == pytest.approx(0.9, abs=0.025)


def test_useless_signals_are_mostly_found_out_and_useful_ones_rarely(long_searched: Path) -> None:
    full = [r for r in fakes.FakeRecords(long_searched).read() if r.rung >= 1]
    assert len(full) >= MIN_NETWORKS
    rng = np.random.default_rng(0)
    truth = [fakes.true_accuracy(SPACE.encode(r.arch)[None])[0] for r in full]
    dealt = [[dataclasses.replace(r, val_accuracy=a) for r, a in zip(full, rng.permutation(truth), strict=True)] for _ in range(40)]
    assert np.mean([clearly_fails(judged(records)["steering"]) for records in dealt]) > 0.4
    noisy = [[dataclasses.replace(r, val_accuracy=r.val_accuracy + 0.01 * rng.normal()) for r in full] for _ in range(40)]
    assert np.mean([clearly_fails(judged(records)["steering"]) for records in noisy]) <= 0.1


def test_a_search_that_is_steered_by_a_useless_predictor_goes_on_at_random_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowSearchSampler, "proposal", quick_proposal)
    monkeypatch.setattr("lowsearch.study.gate.MIN_NETWORKS", 12)  # Else the search takes longer.
    folder = tmp_path / "study"
    found = search(folder, StudySettings(trials=30, workers=1, seed=1), fit=lambda records: Lying(records, "predict", seed=2))
    since = json.loads((folder / "gate.json").read_text())["steering"]["changes"][0]
    assert f"from trial {since} on, networks are drawn at random and trained on the whole schedule" in what_failed(folder, "steering")
    assert what_failed(folder, "promotion") == ""
    proposals = [c for c in found if c.origin != "family"]
    assert {c.origin for c in proposals if c.number < since} == {"proposed"}
    after = [c for c in proposals if c.number >= since]
    assert len(after) > 3 and {c.origin for c in after} == {"random"} and {c.rung for c in after} == {1.0}  # What it is judged by anew.
    resumed = search(folder, StudySettings(trials=33, workers=1, seed=1))  # with an honest predictor, which is not judged yet
    assert {c.origin for c in resumed[len(found) :]} == {"random"}


def test_a_predictor_that_has_learned_to_rank_steers_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowSearchSampler, "proposal", quick_proposal)
    monkeypatch.setattr("lowsearch.study.gate.MIN_NETWORKS", 12)  # Else the search takes longer.
    folder = tmp_path / "study"

    def fit(records: Any) -> Any:
        return Lying(records, "predict", seed=2) if len({r.arch_id for r in records if r.rung >= 1}) < 13 else fakes.FakeScorer(records)

    found = search(folder, StudySettings(trials=40, workers=1, seed=1), fit=fit)
    off, on = json.loads((folder / "gate.json").read_text())["steering"]["changes"]
    assert f"in trials {off} to {on - 1}, networks are drawn at random and trained on the whole schedule" in what_failed(folder, "steering")
    for c in found:
        assert c.origin == "family" or c.origin == ("random" if off <= c.number < on else "proposed")
    assert max(c.number for c in found) > on


def test_where_forecasts_fail_every_network_is_trained_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowSearchSampler, "proposal", quick_proposal)
    monkeypatch.setattr("lowsearch.study.gate.MIN_NETWORKS", 12)  # Else the search takes longer.
    folder = tmp_path / "study"
    found = search(folder, StudySettings(trials=40, workers=1, seed=1), fit=lambda records: Lying(records, "predict_record", seed=8))
    since = json.loads((folder / "gate.json").read_text())["promotion"]["changes"][0]
    assert f"from trial {since} on, every network is trained on the whole schedule" in what_failed(folder, "promotion")
    assert what_failed(folder, "steering") == ""
    proposals = [c for c in found if c.origin != "family"]
    assert {c.origin for c in proposals} == {"proposed"} and any(c.rung < 1 for c in proposals if c.number < since)
    after = [c for c in proposals if c.number >= since]
    assert len(after) > 3 and {c.rung for c in after} == {1.0}


def test_a_search_whose_predictor_works_keeps_following_it(long_searched: Path, tmp_path: Path) -> None:
    records = fakes.FakeRecords(long_searched).read()
    gate = Gate(tmp_path, SPACE, fakes.FakeScorer)
    gate.judge(records, n_trials=20)
    assert all(gate.follows(signal, trial=20) and not what_failed(tmp_path, signal) for signal in SIGNALS)
    assert len({r.arch_id for r in records if r.rung >= 1}) >= MIN_NETWORKS


def test_a_trial_keeps_what_it_began_with(tmp_path: Path) -> None:
    promotion = {"changes": [9, 14, 20], "n_networks": 30, "spearman": None}
    (tmp_path / "gate.json").write_text(json.dumps({"n_networks": 30, "promotion": promotion}))
    gate = Gate(tmp_path, SPACE, fakes.FakeScorer)
    assert [number for number in range(25) if not gate.follows("promotion", trial=number)] == [*range(9, 14), *range(20, 25)]
    assert all(gate.follows("steering", trial=number) for number in range(25)) and what_failed(tmp_path, "steering") == ""
    assert "does not vary); in trials 9 to 13 and from trial 20 on, every network" in what_failed(tmp_path, "promotion")


def test_what_failed_has_to_rank_as_a_useful_signal_does() -> None:
    doubtful, useful = (Agreement(n_networks=24, spearman=rho) for rho in (USEFUL - 0.1, USEFUL))
    assert follows_next(doubtful, followed=True) and not follows_next(doubtful, followed=False)
    assert follows_next(useful, followed=False)
    assert not follows_next(Agreement(n_networks=24), followed=False)


def test_judging_is_rare_and_shared(long_searched: Path, tmp_path: Path) -> None:
    records = fakes.FakeRecords(long_searched).read()
    fits: list[int] = []

    def liar(found: Any) -> Liar:
        fits.append(len(found))
        return Liar()

    full = sorted({r.arch_id for r in records if r.rung >= 1})
    gates = [Gate(tmp_path, SPACE, liar) for _ in range(2)]
    for n in range(MIN_NETWORKS + 2):
        for gate in gates:
            gate.judge([r for r in records if r.arch_id in full[:n]], n_trials=n)
    assert len(fits) == 10  # Two workers, one judgement, ten folds.


@pytest.mark.parametrize("content", ["{", "[]", '{"steering": {}}', '{"n_networks": 3, "steering": {"changes": []}}'])
def test_a_damaged_gate_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "gate.json").write_text(content)
    with pytest.raises(StudyError, match=r"gate\.json is damaged"):
        Gate(tmp_path, SPACE, lambda records: None)
    with pytest.raises(StudyError, match=r"gate\.json is damaged"):
        what_failed(tmp_path, "steering")


# --- what the page says -----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_forecast_the_verdict_and_the_end_of_steering(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    result = studies.run(StudySettings(trials=8, workers=1, sampler="random"), folder, backend=fakes.backend())
    steering, forecast = result.summary["steering"], result.summary["forecast"]
    assert steering["n_networks"] == forecast["n_networks"] >= 6 and result.summary["steering_ended"] == ""
    page = sections.body(read_study(folder))
    assert "Predictions rank networks" in page and f"{steering['spearman']:.2f}" in page
    assert f"which promote, {forecast['spearman']:.2f}" in page
    assert steering["n_networks"] < MIN_NETWORKS and "too few for the search to judge its predictor" in page
    assert not unjudged(MIN_NETWORKS)
    (folder / "summary.json").write_text(json.dumps({**result.summary, "unjudged": ""}))
    assert "too few" not in sections.body(read_study(folder))
    before = {name: value for name, value in result.summary.items() if name != "steering"}  # A study from before.
    (folder / "summary.json").write_text(json.dumps(before))
    assert "Forecasts rank networks" in sections.body(read_study(folder))
    found = examine(folder, n_networks=12)
    page = sections.body(read_study(folder))
    assert "Accuracy predictor" in page and found.reason in page and "12 held-out networks" in page
    (folder / "summary.json").write_text(
        json.dumps({**result.summary, "steering_ended": "the predictor <fails>", "promotion_ended": "stopping too"})
    )
    page = sections.body(read_study(folder))
    assert "the predictor &lt;fails&gt;" in page and "stopping too" in page


def test_a_study_by_the_published_trend_never_calls_it_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    result = studies.run(StudySettings(accuracy="published", trials=2, workers=1, sampler="random"), folder, backend=fakes.backend())
    for name in ("candidates.csv", "finalists.csv"):
        for row in csv.DictReader((folder / name).read_text().splitlines()):
            assert (row["accuracy_source"], row["accuracy_unit"], row["val_accuracy"]) == ("prior:published", "rank", "")
            assert float(row["score_std"]) > 0
    page = sections.body(read_study(folder))
    assert "Nothing was trained: published accuracies stand in for accuracy" in page and "a score (rank), no accuracy" in page
    assert "prior:published (rank)" in page
    figure = json.loads(str(figures.front_figure(read_study(folder), split="validation").to_json()))
    assert figure["layout"]["yaxis"]["title"]["text"] == "Rank score (trend of published accuracies), not accuracy"
    print_front(read_study(folder), result.front)
    assert "score (rank)" in capsys.readouterr().out
