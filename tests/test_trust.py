"""The examination of the accuracy predictor: who is held out, what survives a kill, what the verdict rests on, when steering ends."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_fakes as fakes

from lowsearch.accuracy.agreement import Agreement, Lead, agreement
from lowsearch.errors import StudyError
from lowsearch.report import sections
from lowsearch.report.study_files import read_study
from lowsearch.search.objectives import parse_limits
from lowsearch.search.sampler import LowSearchSampler, Proposal
from lowsearch.study import run as studies
from lowsearch.study.gate import MIN_NETWORKS, SteeringGate, clearly_fails, forecast_agreement, why_steering_ended
from lowsearch.study.parts import Parts
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import candidates, enqueue, open_study, reclaim
from lowsearch.study.trust import BETWEEN_SEEDS, PREDICTOR, Signal, Trust, ceiling_of, trust, verdict_of
from lowsearch.study.workers.worker import SearchWorker

SPACE = fakes.SPACE


class Liar:
    """A predictor whose forecasts have nothing to do with the networks."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return 0.5 + 0.3 * (genomes.astype(float) @ np.random.default_rng(7).normal(size=SPACE.n_genes) % 1), np.full(len(genomes), 0.05)

    def predict_record(self, record: Any) -> tuple[float, float]:
        return float(np.random.default_rng(int(record.arch_id, 16)).uniform(0.3, 0.8)), 0.05


def make_parts(folder: Path, settings: StudySettings, *, lie: bool = False) -> Parts:
    """The fakes' parts, with a held-out set in trust.jsonl, and a `trained` file that counts its trainings."""

    class HeldOut(fakes.FakeTraining):
        rungs = (1.0,)

        def __init__(self, seed: int) -> None:
            super().__init__(folder, seed)
            self.records = fakes.FakeRecords(folder / f"held-out-{seed}")
            self.records.path.parent.mkdir(exist_ok=True)

        def run(self, arch: Any, rung: float, *, progress: Any = None) -> Any:
            if (folder / "die-at").exists() and len(held_out()) == int((folder / "die-at").read_text()):
                raise KeyboardInterrupt
            return super().run(arch, rung)

    def held_out() -> list[Any]:
        return [r for path in sorted(folder.glob("held-out-*/records.jsonl")) for r in map(fakes.parsed, path.read_text().splitlines())]

    return dataclasses.replace(
        fakes.make_parts(folder, settings), held_out=HeldOut, held_out_records=held_out,
        proxies=lambda archs, progress: {"NASWOT": np.arange(len(archs), dtype=float)},
        **({"fit": lambda records: Liar()} if lie else {}),
    )  # fmt: skip


def search(folder: Path, settings: StudySettings, *, lie: bool = False) -> list[Any]:
    folder.mkdir(exist_ok=True)
    parts = make_parts(folder, settings, lie=lie)
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


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(searched, tmp_path / "study"))


def examine(folder: Path, **options: Any) -> Trust:
    return trust(folder, parts=make_parts, **options)


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


def test_the_predictor_never_learns_from_the_held_out_set(study: Path) -> None:
    first = examine(study, n_networks=8)
    records = fakes.FakeRecords(study)
    for r in make_parts(study, StudySettings()).held_out_records():  # As if the search had gone on and found the same networks.
        records.append(r)
    again = examine(study, n_networks=8)
    assert again.n_records == first.n_records
    assert [n["predicted_accuracy"] for n in again.networks] == [n["predicted_accuracy"] for n in first.networks]


def test_limits_of_the_study_hold_for_the_held_out_set(tmp_path: Path) -> None:
    limits = parse_limits(maxima=["params=400000"])
    search(tmp_path / "study", StudySettings(trials=4, workers=1, limits=limits, sampler="random"))
    found = examine(tmp_path / "study", n_networks=6)
    genomes = [SPACE.encode(r.arch) for r in make_parts(tmp_path / "study", StudySettings()).held_out_records()]
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


def test_a_study_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    search(tmp_path / "study", StudySettings(trials=2, workers=1, accuracy="macs", sampler="random"))
    with pytest.raises(StudyError, match="trains nothing"):
        examine(tmp_path / "study")


def test_progress_ends_at_its_total(study: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    examine(study, n_networks=6, progress=lambda *what: heard.append(what))
    assert all(done <= total for done, total, _ in heard)


# --- the verdict ------------------------------------------------------------------------------------------------------------------


def signals(own: tuple[float, float], macs: float = 0.3) -> list[Signal]:
    return [
        Signal(name=PREDICTOR, band="", agreement=Agreement(n_networks=12, spearman=own[0], low=own[1], high=1.0)),
        Signal(name="params", band="", agreement=Agreement(n_networks=12, spearman=0.1)),
        Signal(name="MACs", band="", agreement=Agreement(n_networks=12, spearman=macs)),
    ]


@pytest.mark.parametrize(
    ("own", "macs", "expected"),
    [((0.8, 0.4), 0.3, "trusted"), ((0.8, 0.4), 0.85, "weak"), ((0.6, 0.15), 0.3, "weak"), ((0.5, -0.1), 0.3, "not trusted")],
)
def test_verdict_follows_the_rule(own: tuple[float, float], macs: float, expected: str) -> None:
    assert verdict_of(signals(own, macs), {})[0] == expected


def test_the_reason_says_how_far_the_lead_over_macs_is_from_chance() -> None:
    ahead = Lead(difference=0.5, low=-0.1, high=0.9)
    assert "better than that of MACs by 0.50 (-0.10 to 0.90)" in verdict_of(signals((0.8, 0.4)), {"MACs": ahead})[1]
    behind = Lead(difference=-0.05, low=-0.4, high=0.3)
    assert "MACs alone rank these networks better, by 0.05 (-0.30 to 0.40)" in verdict_of(signals((0.8, 0.4), 0.85), {"MACs": behind})[1]


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
    found = [Signal(name=PREDICTOR, band="", agreement=agreement(np.ones(9), np.arange(9))), *signals((0, 0))[1:]]
    assert verdict_of(found, {})[0] == "not trusted"


def test_a_good_predictor_is_trusted_and_a_liar_is_not(study: Path) -> None:
    good = examine(study, n_networks=24)
    assert good.verdict != "not trusted" and (by_name(good)[PREDICTOR].spearman or 0) > 0.4
    liar = trust(study, n_networks=24, parts=lambda folder, settings: make_parts(folder, settings, lie=True))
    assert liar.verdict == "not trusted"


# --- the light version in a running search ----------------------------------------------------------------------------------------


def test_forecasts_are_cross_validated_over_networks(searched: Path) -> None:
    records = fakes.FakeRecords(searched).read()
    full = {r.arch_id for r in records if r.rung >= 1}
    seen: list[set[str]] = []

    def fit(found: Any) -> Any:
        seen.append({r.arch_id for r in found})
        return fakes.FakeScorer(found)

    found = forecast_agreement(records, fit)
    assert found.n_networks == len(full) and (found.spearman or 0) > 0.8
    assert all(fold < full for fold in seen) and set.intersection(*seen) == set()


def test_nothing_is_judged_before_there_are_enough_networks() -> None:
    assert not clearly_fails(Agreement(n_networks=MIN_NETWORKS - 1, spearman=-0.9, low=-1.0, high=-0.5))
    assert clearly_fails(Agreement(n_networks=MIN_NETWORKS, spearman=-0.2, low=-0.7, high=0.2))
    assert clearly_fails(Agreement(n_networks=MIN_NETWORKS))  # forecasts that do not vary
    assert not clearly_fails(Agreement(n_networks=MIN_NETWORKS, spearman=0.1, low=-0.5, high=0.6))


def test_a_search_whose_predictor_fails_goes_on_at_random_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowsearch.study.gate.HOPELESS", 0.7)  # A dozen random forecasts are seldom proven to be below 0.2.
    monkeypatch.setattr(LowSearchSampler, "proposal", quick_proposal)
    folder = tmp_path / "study"
    found = search(folder, StudySettings(trials=30, workers=1, seed=1), lie=True)
    why = why_steering_ended(folder)
    since = json.loads((folder / "steering.json").read_text())["ended_at_trial"]
    assert f"from trial {since} on, networks are drawn at random" in why
    proposals = [c for c in found if c.origin != "family"]
    assert {c.origin for c in proposals if c.number < since} == {"proposed"}
    after = [c for c in proposals if c.number >= since]
    assert len(after) > 3 and all(c.origin == "random" and c.rung == 1.0 for c in after)
    resumed = search(folder, StudySettings(trials=33, workers=1, seed=1))  # with an honest predictor: what has ended stays so
    assert {c.origin for c in resumed[len(found) :]} == {"random"}


def test_a_search_whose_predictor_works_keeps_steering(searched: Path, tmp_path: Path) -> None:
    records = fakes.FakeRecords(searched).read()
    gate = SteeringGate(tmp_path, fakes.FakeScorer)
    gate.judge(records, n_trials=20)
    assert not gate.ended and why_steering_ended(tmp_path) == ""
    assert len({r.arch_id for r in records if r.rung >= 1}) >= MIN_NETWORKS


def test_judging_is_rare_shared_and_final(searched: Path, tmp_path: Path) -> None:
    records = fakes.FakeRecords(searched).read()
    fits: list[int] = []

    def liar(found: Any) -> Liar:
        fits.append(len(found))
        return Liar()

    full = sorted({r.arch_id for r in records if r.rung >= 1})
    gates = [SteeringGate(tmp_path, liar) for _ in range(2)]
    for n in range(MIN_NETWORKS + 2):
        for gate in gates:
            gate.judge([r for r in records if r.arch_id in full[:n]], n_trials=n)
    assert len(fits) == 10  # Two workers, one judgement, ten folds.
    (tmp_path / "steering.json").write_text(json.dumps({"ended_at_trial": 9, "n_networks": 12, "spearman": 0.0, "high": 0.1}))
    for gate in (*gates, SteeringGate(tmp_path, fakes.FakeScorer)):
        gate.judge(records, n_trials=99)
        assert gate.ended


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_steering_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "steering.json").write_text(content)
    with pytest.raises(StudyError, match=r"steering\.json is damaged"):
        SteeringGate(tmp_path, lambda records: None)
    with pytest.raises(StudyError, match=r"steering\.json is damaged"):
        why_steering_ended(tmp_path)


# --- what the page says -----------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_forecast_the_verdict_and_the_end_of_steering(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    result = studies.run(StudySettings(trials=8, workers=1, sampler="random"), folder, backend=fakes.backend())
    forecast = result.summary["forecast"]
    assert forecast["n_networks"] >= 6 and result.summary["steering_ended"] == ""
    page = sections.body(read_study(folder))
    assert "Forecasts rank networks" in page and f"{forecast['spearman']:.2f}" in page
    found = examine(folder, n_networks=12)
    page = sections.body(read_study(folder))
    assert "Accuracy predictor" in page and found.reason in page and "12 held-out networks" in page
    (folder / "summary.json").write_text(json.dumps({**result.summary, "steering_ended": "the predictor <fails>"}))
    assert "the predictor &lt;fails&gt;" in sections.body(read_study(folder))


def test_a_study_by_the_published_trend_never_calls_it_accuracy(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    studies.run(StudySettings(accuracy="published", trials=2, workers=1, sampler="random"), folder, backend=fakes.backend())
    for name in ("candidates.csv", "finalists.csv"):
        for row in csv.DictReader((folder / name).read_text().splitlines()):
            assert row["accuracy_source"] == "prior:published" and row["val_accuracy"] == ""
            assert float(row["score_std"]) > 0
    page = sections.body(read_study(folder))
    assert "Nothing was trained: published accuracies stand in for accuracy" in page and "not an accuracy" in page
