"""The end of a study: who is chosen, what their numbers mean, and what is not done twice."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import study_fakes as fakes

from lowsearch.arch import Arch
from lowsearch.cli.found import print_front, print_summary
from lowsearch.report.page import build_report
from lowsearch.report.study_files import read_study
from lowsearch.search import pareto
from lowsearch.search.objectives import parse_limits
from lowsearch.study.finalists import (
    MAX_PROPOSALS,
    MIN_PROPOSALS,
    FinalPlan,
    choose,
    plan_finals,
    train_planned,
    trainings_done,
    write_finals,
)
from lowsearch.study.run import run
from lowsearch.study.settings import StudySettings
from lowsearch.study.shortlist import (
    MAX_SHORTLISTED,
    Measurement,
    Measurements,
    _draws,
    measure,
    shortlist,
    why_none_is_left,
    write_shortlist,
)
from lowsearch.study.storage import Candidate

SPACE = fakes.SPACE
SETTINGS = StudySettings(workers=1)
REFERENCE = SETTINGS.objectives.costs({"accuracy": np.array([0.1]), "latency_ms": np.array([1.0])})[0]


def candidate(number, genome, *, accuracy=None, **changes):
    truth = float(fakes.true_accuracy(genome[None])[0])
    values = {
        "number": number, "genome": genome, "origin": "proposed", "name": "", "state": "complete", "reason": "", "rung": 1.0,
        "accuracy": truth if accuracy is None else accuracy, "accuracy_std": 0.01, "val_accuracy": truth, "elapsed_s": float(number),
    }  # fmt: skip
    return Candidate(**values | changes)


def make_family():
    return [candidate(i, SPACE.encode(arch), origin="family", name=name) for i, (name, arch) in enumerate(SPACE.family.items())]


def make_candidates(n, *, seed=0):
    genomes = SPACE.sample(n, rng=np.random.default_rng(seed))
    return make_family() + [candidate(100 + i, genome) for i, genome in enumerate(genomes)]


def parts(folder=Path(), **changes):
    return dataclasses.replace(fakes.make_parts(folder, SETTINGS), **changes)


def finish(folder, settings, found, **changes):
    """Measure, plan, train and write; returns how the limit held and the rows of finalists.csv."""
    made = parts(folder, **changes)
    plan, measured = plan_finals(folder, settings, made, found, REFERENCE, schedule_cpu_s=10.0)
    train_planned(folder, made)
    write_finals(folder, settings, made, plan, measured, describe=lambda archs: None)
    check = write_shortlist(folder, settings, made, measured)
    return check, rows_of(folder / "finalists.csv")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def chosen_from(found, settings=SETTINGS, measured=None):
    """The finalists of a search that found `found`."""
    made = parts()
    listed = shortlist(settings, made, found, REFERENCE)
    return choose(settings, made, listed, measured or Measurements(), REFERENCE)


def proposals(finalists):
    return [f for f in finalists if f.origin != "family"]


def ms(archs):
    return fakes.FakeLatency().predict(np.stack([SPACE.encode(a) for a in archs]))[0]


# Choosing


@pytest.mark.parametrize("seed", range(3))
def test_the_family_and_the_best_cover_of_the_proposals_are_chosen(seed):
    found = make_candidates(40, seed=seed)
    finalists = chosen_from(found)
    assert [f.name for f in finalists if f.origin == "family"] == list(SPACE.family)
    chosen = proposals(finalists)
    assert MIN_PROPOSALS <= len(chosen) <= MAX_PROPOSALS
    everyone = [c for c in found if c.origin == "proposed"]
    costs = np.array([[-c.accuracy, math.log(ms([SPACE.decode(c.genome)])[0])] for c in everyone])
    mine = np.array([[-f.estimated_accuracy, math.log(ms([f.arch])[0])] for f in chosen])
    assert pareto.hypervolume(mine, REFERENCE) >= (1 - 1 / math.e) * pareto.hypervolume(costs, REFERENCE)


def test_dominated_proposals_fill_up():
    genomes = SPACE.sample(30, rng=np.random.default_rng(1))
    best = int(np.argmin(ms([SPACE.decode(g) for g in genomes])))
    found = [candidate(i, g, accuracy=0.9 if i == best else 0.5) for i, g in enumerate(genomes)]
    chosen = chosen_from(found)
    assert len(chosen) == MIN_PROPOSALS
    assert SPACE.decode(genomes[best]).arch_id in {f.arch_id for f in chosen}


def cover_of_pool(seed, *, n=60, size=9):
    """True hypervolume of `size` networks of a closed pool: chosen by single trainings, by estimates, and by draws from estimates."""
    rng = np.random.default_rng(seed)
    log_ms = rng.uniform(0, 1, n)
    trend, spread = 0.8 + 0.06 * log_ms, 0.015
    truth = trend + spread * rng.normal(size=n)
    noise = np.where(rng.random(n) < 0.4, 0.005, 0.015)  # Some were trained to the end, others half way.
    seen = truth + noise * rng.normal(size=n)
    weight = spread**2 / (spread**2 + noise**2)
    estimate = weight * seen + (1 - weight) * trend
    reference = np.array([-0.75, 1.05])
    volumes = []
    for accuracy, std in ((seen, None), (estimate, None), (estimate, np.sqrt(weight) * noise)):
        costs = np.stack([-accuracy, log_ms], axis=1)
        draws = costs[None] if std is None else _draws(dataclasses.replace(SETTINGS, seed=seed), costs, std)[:16]
        chosen, rest = [], list(range(n))
        while len(chosen) < size:  # Layer by layer, as `best_cover` fills up.
            chosen += [rest[i] for i in pareto.greedy_cover(draws[:, rest], reference, size - len(chosen))]
            rest = [i for i in range(n) if i not in chosen]
        volumes.append(pareto.hypervolume(np.stack([-truth[chosen], log_ms[chosen]], axis=1), reference))
    return volumes


def test_the_cover_by_expected_gain_is_truly_larger_than_that_by_single_trainings_and_not_smaller_than_that_by_estimates():
    by_training, by_estimate, by_draws = np.array([cover_of_pool(seed) for seed in range(200)]).T
    gain = by_draws - by_training
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))
    assert by_draws.mean() > by_estimate.mean()


def test_one_good_training_does_not_shut_out_faster_networks_that_may_be_as_good():
    genomes = SPACE.sample(400, rng=np.random.default_rng(2))
    genomes = genomes[np.argsort(ms([SPACE.decode(g) for g in genomes]))][::20]
    found = [candidate(i, g, accuracy=0.84, accuracy_std=0.008) for i, g in enumerate(genomes)]
    found[0] = dataclasses.replace(found[0], accuracy=0.86, accuracy_std=0.002)
    found[8] = dataclasses.replace(found[8], accuracy=0.87, accuracy_std=0.005)
    for i in (3, 12):
        found[i] = dataclasses.replace(found[i], accuracy=0.857, accuracy_std=0.012)  # Worse than a faster one, if its estimate is right.

    def chosen(candidates):
        costs = np.array([[-c.accuracy, math.log(ms([SPACE.decode(c.genome)])[0])] for c in candidates])
        return set(pareto.greedy_cover(_draws(SETTINGS, costs, np.array([c.accuracy_std for c in candidates])), REFERENCE, 4))

    assert chosen([dataclasses.replace(c, accuracy_std=0.0) for c in found]) == {0, 8}
    assert {0, 3, 8} < chosen(found)


def test_a_few_proposals_are_all_chosen():
    found = make_candidates(3)
    assert len(proposals(chosen_from(found))) == 3


def test_networks_that_broke_a_limit_or_were_not_scored_are_not_chosen():
    limits = parse_limits(maxima=["latency_ms=0.3"], minima=["accuracy=0.6"])
    settings = dataclasses.replace(SETTINGS, limits=limits)
    found = make_candidates(40)
    found += [dataclasses.replace(found[20], number=200, state="pruned"), dataclasses.replace(found[21], number=201, accuracy=math.nan)]
    chosen = proposals(chosen_from(found, settings))
    assert chosen
    mean_ms, std_ms = fakes.FakeLatency().predict(np.stack([SPACE.encode(f.arch) for f in chosen]))
    assert (mean_ms + std_ms <= 0.3).all()
    assert all(f.estimated_accuracy >= 0.6 for f in chosen)


def test_a_plan_is_kept_until_the_search_has_gone_on(tmp_path):
    found = make_candidates(10)
    first, measured = plan_finals(tmp_path, SETTINGS, parts(), found, REFERENCE, schedule_cpu_s=1.0)
    other_estimates = [dataclasses.replace(c, accuracy=0.5) for c in found]
    assert plan_finals(tmp_path, SETTINGS, parts(), other_estimates, REFERENCE, schedule_cpu_s=1.0) == (first, measured)
    assert FinalPlan.load(tmp_path) == first
    more = [*found, candidate(300, SPACE.sample(1, rng=np.random.default_rng(9))[0], accuracy=0.99)]
    later, _ = plan_finals(tmp_path, SETTINGS, parts(), more, REFERENCE, schedule_cpu_s=1.0)
    assert later.n_candidates == first.n_candidates + 1
    assert later.seeds == first.seeds


@pytest.mark.parametrize(
    ("settings", "schedule_cpu_s", "n_seeds"),
    [
        (StudySettings(budget_s=480.0, workers=2), 30.0, 1),
        (StudySettings(budget_s=3600.0, workers=2), 20.0, 2),
        (StudySettings(trials=10), 1.0, 1),
        (StudySettings(budget_s=480.0, final_seeds=3), 20.0, 3),
    ],
)
def test_a_second_seed_is_spent_where_the_budget_allows_it(tmp_path, settings, schedule_cpu_s, n_seeds):
    plan, _ = plan_finals(tmp_path, settings, parts(), make_candidates(10), REFERENCE, schedule_cpu_s=schedule_cpu_s)
    assert len(set(plan.seeds)) == n_seeds
    assert settings.seed not in plan.seeds


# Training and measuring


def test_every_finalist_is_trained_once_for_every_seed_and_never_again(tmp_path):
    asked = []

    def train(arch, seed, path):
        asked.append((arch.arch_id, seed))
        return fakes.train_final(arch, seed, path)

    settings = dataclasses.replace(SETTINGS, final_seeds=2)
    made = parts(tmp_path, train_final=train)
    plan, _ = plan_finals(tmp_path, settings, made, make_candidates(10), REFERENCE, schedule_cpu_s=1.0)
    train_planned(tmp_path, made)
    train_planned(tmp_path, made)
    assert sorted(asked) == sorted((f.arch_id, seed) for f in plan.finalists for seed in plan.seeds)
    assert [seed for _, seed in asked] == sorted((seed for _, seed in asked), key=plan.seeds.index), "every network once, then again"
    assert trainings_done(tmp_path, plan) == len(asked)


def test_a_training_that_died_is_the_only_one_repeated(tmp_path):
    asked = []

    def train(arch, seed, path):
        asked.append(arch.arch_id)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return fakes.train_final(arch, seed, path)

    made = parts(tmp_path, train_final=train)
    plan_finals(tmp_path, SETTINGS, made, make_candidates(10), REFERENCE, schedule_cpu_s=1.0)
    with pytest.raises(KeyboardInterrupt):
        train_planned(tmp_path, made)
    before = asked[:3]
    train_planned(tmp_path, made)
    assert not set(before) & set(asked[4:])
    assert asked[4] == asked[3]


def test_the_shortlist_is_measured_together_and_once(tmp_path):
    calls = []

    def measured_again(archs, progress):
        calls.append(list(archs))
        return fakes.measure(archs, progress)

    made = parts(tmp_path, measure=measured_again)
    archs = [SPACE.decode(c.genome) for c in shortlist(SETTINGS, made, make_candidates(40), REFERENCE)]
    first = measure(tmp_path, made, archs, None)
    assert len(first.networks) == len(SPACE.family) + MAX_SHORTLISTED
    assert measure(tmp_path, made, archs, None) == first
    assert measure(tmp_path, made, archs[:5], None) == first, "a part of what was measured is not measured again"
    assert calls == [archs]


def test_measured_energy_reaches_shortlist_and_finalists(tmp_path):
    def with_energy(archs, progress):
        return [dataclasses.replace(m, energy_mj=20 * m.latency_ms) for m in fakes.measure(archs, progress)]

    for name, measured in (("counted", with_energy), ("not", fakes.measure)):
        (tmp_path / name).mkdir()
        _, finals = finish(tmp_path / name, SETTINGS, make_candidates(20), measure=measured)
        for row in (*finals, *rows_of(tmp_path / name / "shortlist.csv")):
            expected = f"{20 * float(row['latency_ms']):.6g}" if name == "counted" else ""
            assert row["energy_mj"] == expected or float(row["energy_mj"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_network_that_measures_over_its_limit_on_energy_is_not_chosen():
    found = make_candidates(40)
    settings = dataclasses.replace(SETTINGS, limits=parse_limits(maxima=["energy_mj=5"]))
    proposed = [c for c in found if c.origin != "family"]
    over = {SPACE.decode(c.genome).arch_id for c in proposed[::2]}
    rows = {}
    for c in proposed:
        arch = SPACE.decode(c.genome)
        energy_mj = 6.0 if arch.arch_id in over else math.nan if arch.arch_id.startswith("0") else 4.0
        rows[arch.arch_id] = Measurement(*[float(ms([arch])[0])] * 3, energy_mj=energy_mj)
    chosen = choose(settings, parts(), found, Measurements(networks=rows), REFERENCE)
    assert proposals(chosen) and not {f.arch_id for f in proposals(chosen)} & over


def test_networks_of_the_table_measured_again_tell_the_pace(tmp_path):
    genomes = SPACE.sample(5, rng=np.random.default_rng(3))
    anchors = [(SPACE.decode(g), 1.03 * float(ms([SPACE.decode(g)])[0]) / 1.05) for g in genomes]  # The fakes measure 1.03 predictions.
    archs = list(SPACE.family.values())
    found = measure(tmp_path, parts(tmp_path, anchors=anchors), archs, None)
    assert found.pace == pytest.approx(1.05)
    assert found.networks.keys() == {arch.arch_id for arch in archs}
    assert math.isnan(measure(tmp_path / "other", parts(tmp_path), archs, None).pace), "no network of the table, no pace"


@pytest.mark.parametrize(
    ("paces", "counts", "n_measured"),
    [([1.02], 0, 1), ([1.3, 1.05, 1.0], 1, 2), ([1.4, 1.2, 1.3, 1.0], 1, 3)],
    ids=["quiet", "disturbed once", "never quiet"],
)
def test_on_a_disturbed_machine_the_shortlist_is_measured_again(tmp_path, monkeypatch, paces, counts, n_measured):
    pauses, tries, labels = [], [], []
    monkeypatch.setattr("lowsearch.study.shortlist.time.sleep", pauses.append)

    def measured(archs, progress):
        progress(len(archs), len(archs), "networks")
        slow = paces[len(tries)]
        tries.append([slow * 1.03 * float(ms([arch])[0]) for arch in archs])
        return [fakes.FakeMeasured(latency_ms, 0.001) for latency_ms in tries[-1]]

    anchors = [(SPACE.decode(g), 1.03 * float(ms([SPACE.decode(g)])[0])) for g in SPACE.sample(5, rng=np.random.default_rng(3))]
    archs = list(SPACE.family.values())
    made = parts(tmp_path, anchors=anchors, measure=measured)
    found = measure(tmp_path, made, archs, lambda *event: labels.append(event[2]))
    assert found.pace == pytest.approx(paces[counts])
    assert [found.networks[arch.arch_id].latency_ms for arch in archs] == pytest.approx(tries[counts][: len(archs)])
    assert len(tries) == n_measured and pauses == [20.0] * (n_measured - 1)
    assert labels[1:] == [
        f"measure the shortlist again, the machine was {100 * (p - 1):.0f} % slower than usual" for p in paces[: n_measured - 1]
    ]
    assert measure(tmp_path, made, archs, None) == found and len(tries) == n_measured, "what was measured is kept"


def test_who_is_chosen_goes_by_what_was_measured():
    """Of networks that are equal by prediction and accuracy, the one that measures fastest is chosen, and those over the limit are not."""
    found = make_candidates(60, seed=4)
    limit_ms = 0.9 * float(np.median(ms([SPACE.decode(c.genome) for c in found if c.origin == "proposed"])))
    settings = dataclasses.replace(SETTINGS, limits=parse_limits(maxima=[f"latency_ms={limit_ms}"]))
    listed = [c for c in shortlist(settings, parts(), found, REFERENCE) if c.origin == "proposed"]
    assert len(listed) > MIN_PROPOSALS
    slow = [SPACE.decode(c.genome).arch_id for c in listed[::2]]
    rows = {SPACE.decode(c.genome).arch_id: Measurement(0.5 * limit_ms, 0.001, 0.5 * limit_ms) for c in listed}
    rows |= {arch_id: Measurement(1.01 * limit_ms, 0.001, 0.5 * limit_ms) for arch_id in slow}
    chosen = {f.arch_id for f in proposals(chosen_from(found, settings, Measurements(networks=rows)))}
    assert chosen and not chosen & set(slow)
    all_slow = Measurements(networks={arch_id: Measurement(1.2 * limit_ms, 0.001, limit_ms) for arch_id in rows})
    assert not proposals(chosen_from(found, settings, all_slow))
    assert [f.name for f in chosen_from(found, settings, all_slow)] == list(SPACE.family)


def test_where_no_network_keeps_its_limits_one_line_names_the_nearest():
    settings = dataclasses.replace(SETTINGS, limits=parse_limits(maxima=["latency_ms=0.4", "energy_mj=2"]))
    ids = [SPACE.decode(c.genome).arch_id for c in make_candidates(3) if c.origin == "proposed"]
    member = next(iter(SPACE.family.values())).arch_id

    def measured(*rows):
        own = {i: Measurement(ms, 0.001, ms, energy_mj=mj) for i, (ms, mj) in zip(ids, rows, strict=True)}
        return Measurements(networks={member: Measurement(0.1, 0.001, 0.1, energy_mj=1.0), **own})

    why = why_none_is_left(settings, parts(), measured((0.5, 1.0), (0.42, 2.1), (0.1, 2.3)))
    assert why.startswith("all 3 shortlisted networks broke a limit")
    assert f"the nearest, {ids[1]}, takes 0.42 ms and breaks latency_ms <= 0.4 by 5.0 %, energy_mj <= 2 by 5.0 %" in why
    assert why_none_is_left(settings, parts(), measured((0.5, 1.0), (0.4, 2.0), (0.1, 2.3))) == ""
    assert why_none_is_left(settings, parts(), Measurements()) == ""


def test_a_study_whose_proposals_all_broke_their_limit_ends_with_the_family_and_says_so(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(fakes, "measure", lambda archs, progress: [fakes.FakeMeasured(9.0, 0.001) for _ in archs])
    settings = StudySettings(trials=2, workers=1, limits=parse_limits(maxima=["latency_ms=0.5"]))
    result = run(settings, tmp_path / "study", backend=fakes.backend())
    rows = rows_of(tmp_path / "study" / "finalists.csv")
    assert rows and {row["name"] for row in rows} <= set(SPACE.family)
    assert {(row["on_front"], row["breaks"]) for row in rows} == {("false", "latency_ms <= 0.5")}  # For comparison only.
    assert result.front == rows_of(tmp_path / "study" / "front.csv") == []
    assert result.summary["none_kept"] in caplog.messages and "\n" not in result.summary["none_kept"]
    print_summary(result.summary)
    print_front(read_study(tmp_path / "study"), result.front)
    printed = capsys.readouterr()
    assert f"latency_ms <= 0.5 ({len(rows)} of {len(rows)})" in printed.err and "no network kept the limits" in printed.err
    page = build_report(tmp_path / "study").read_text()
    assert "none of the search&#x27;s own is a finalist" in page


@pytest.mark.parametrize("objective", ["acc-latency", "latency"])
def test_no_finalist_whose_final_training_misses_a_limit_on_accuracy_is_on_the_front(tmp_path, objective):
    found = make_candidates(30)
    bound = float(np.median([c.accuracy for c in found]))
    settings = dataclasses.replace(SETTINGS, objective=objective, limits=parse_limits(minima=[f"accuracy={bound!r}"]))
    made = parts(tmp_path)
    reference = REFERENCE[-len(settings.objectives) :]
    plan, measured = plan_finals(tmp_path, settings, made, found, reference, schedule_cpu_s=10.0)
    train_planned(tmp_path, made)
    write_finals(tmp_path, settings, made, plan, measured, describe=lambda archs: None)
    rows = rows_of(tmp_path / "finalists.csv")
    for row in rows:
        assert (row["breaks"] == f"accuracy >= {bound:g}") == (float(row["val_accuracy"]) < bound)
    keeping = [row for row in rows if not row["breaks"]]
    costs = settings.objectives.costs(
        {m: np.array([float(r["val_accuracy" if m == "accuracy" else m]) for r in keeping]) for m in settings.objectives.metrics}
    )
    assert [row["arch_id"] for row in rows if row["on_front"] == "true"] == [
        row["arch_id"] for row, on_front in zip(keeping, pareto.non_dominated(costs), strict=True) if on_front
    ]
    assert keeping and len(keeping) < len(rows)


# The files


def test_the_front_is_what_nothing_dominates_by_validation_accuracy_and_measured_latency(tmp_path):
    _, rows = finish(tmp_path, SETTINGS, make_candidates(30))
    values = np.array([[-float(row["val_accuracy"]), math.log(float(row["latency_ms"]))] for row in rows])
    assert [row["on_front"] == "true" for row in rows] == pareto.non_dominated(values).tolist()
    assert rows_of(tmp_path / "front.csv") == [row for row in rows if row["on_front"] == "true"]
    assert {row["latency_source"] for row in rows} == {"measured"}
    for row in rows:
        assert float(row["latency_ms"]) == pytest.approx(1.03 * float(row["predicted_latency_ms"]), rel=1e-6)


def test_every_finalist_leaves_its_architecture_weights_and_metrics(tmp_path):
    _, rows = finish(tmp_path, dataclasses.replace(SETTINGS, final_seeds=2), make_candidates(10))
    for row in rows:
        home = tmp_path / "models" / row["arch_id"]
        assert (tmp_path / row["weights"]).read_bytes() == b"weights"
        assert Arch.from_json((home / "arch.json").read_text()).arch_id == row["arch_id"]
        metrics = json.loads((home / "metrics.json").read_text())
        assert metrics["test_accuracy"] == pytest.approx(float(row["test_accuracy"]), rel=1e-6)
        assert len(metrics["trainings"]) == 2
        assert not list(home.glob("*.checkpoint*"))


def test_writing_again_changes_nothing(tmp_path):
    found = make_candidates(10)
    finish(tmp_path, SETTINGS, found)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    finish(tmp_path, SETTINGS, found)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("factor", "broken"), [(0.9, 0), (1.5, None)])
def test_how_many_proposals_broke_their_limit_and_by_how_much(tmp_path, factor, broken):
    settings = dataclasses.replace(SETTINGS, limits=parse_limits(maxima=["latency_ms=0.4"]))

    def measured(archs, progress):
        return [fakes.FakeMeasured(factor * float(x), 0.001) for x in ms(archs)]

    check, rows = finish(tmp_path, settings, make_candidates(40), measure=measured)
    own = [row for row in rows_of(tmp_path / "shortlist.csv") if row["origin"] != "family"]
    over = [row for row in own if float(row["latency_ms"]) > 0.4]
    assert [row["over_limit"] == "true" for row in rows] == [float(row["latency_ms"]) > 0.4 for row in rows]
    assert not any(row["over_limit"] == "true" for row in rows if row["origin"] != "family"), "what broke its limit is not trained"
    assert (check.limited, check.broken) == (len(own), len(over))
    assert check.broken == 0 if broken == 0 else check.broken > 0
    assert broken == 0 or check.worst_excess == pytest.approx(max(float(row["latency_ms"]) for row in own) / 0.4 - 1, rel=1e-6)


@pytest.mark.parametrize("metric", ["throughput_ips", "time_per_image_ms"])
def test_a_limit_on_throughput_or_time_per_image_is_checked_on_the_measured_latency(tmp_path, metric):
    found = make_candidates(40)
    middle_ms = float(np.median([ms([SPACE.decode(c.genome)])[0] for c in found if c.origin != "family"]))
    bound, side = (8000 / middle_ms, "minima") if metric == "throughput_ips" else (middle_ms / 8, "maxima")
    limits = parse_limits(**{side: [f"{metric}={bound!r}"]}, confidence=0.5)
    as_latency = parse_limits(maxima=[f"latency_ms={middle_ms!r}"], confidence=0.5)
    made = []
    for name, wanted in (("other", limits), ("latency", as_latency)):
        settings = dataclasses.replace(SETTINGS, limits=wanted, batch=8)
        (tmp_path / name).mkdir()
        check, rows = finish(tmp_path / name, settings, found, batch=8)
        assert 0 < check.broken < check.limited
        for row in rows:
            assert float(row["throughput_ips"]) == pytest.approx(8000 / float(row["latency_ms"]), rel=1e-6)
            assert float(row["time_per_image_ms"]) == pytest.approx(float(row["latency_ms"]) / 8, rel=1e-6)
            assert float(row["limit_ms"]) == pytest.approx(middle_ms, rel=1e-6)
        made.append((check.limited, check.broken, [(row["arch_id"], row["over_limit"]) for row in rows]))
    assert made[0] == made[1]


def test_the_standard_error_joins_the_draw_of_images_and_the_spread_of_two_seeds(tmp_path):
    _, rows = finish(tmp_path, dataclasses.replace(SETTINGS, final_seeds=2), make_candidates(10))
    trainings = [json.loads((tmp_path / "models" / row["arch_id"] / "metrics.json").read_text())["trainings"] for row in rows]
    pooled = np.mean([np.var([t["val_accuracy"] for t in pair], ddof=1) for pair in trainings])
    for row in rows:
        p = float(row["test_accuracy"])
        assert float(row["accuracy_std"]) == pytest.approx(math.sqrt(p * (1 - p) / 2000 + pooled / 2), rel=1e-5)
        assert "2000 test images" in row["accuracy_std_origin"] and "2 seeds" in row["accuracy_std_origin"]


def test_with_one_seed_the_family_gives_the_spread_between_seeds(tmp_path):
    found = make_candidates(10)
    for i in range(len(SPACE.family)):  # Searched with a score 1 point off the truth; the fakes' final noise is 0.4 points.
        found[i] = dataclasses.replace(found[i], val_accuracy=found[i].val_accuracy + (0.01 if i % 2 else -0.01))
    _, rows = finish(tmp_path, SETTINGS, found)
    differences = [float(row["val_accuracy"]) - c.val_accuracy for row, c in zip(rows, found, strict=False) if c.origin == "family"]
    expected = np.mean(np.square(differences)) / 2
    p = float(rows[0]["test_accuracy"])
    assert float(rows[0]["accuracy_std"]) == pytest.approx(math.sqrt(p * (1 - p) / 2000 + expected), rel=1e-4)
    assert "6 family members" in rows[0]["accuracy_std_origin"]


def test_without_a_device_the_predictions_stand_and_say_so(tmp_path):
    _, rows = finish(tmp_path, SETTINGS, make_candidates(10), measure=None, latency_source="table")
    assert {row["latency_source"] for row in rows} == {"table"}
    assert all(row["latency_ms"] == row["predicted_latency_ms"] for row in rows)
    assert not (tmp_path / "measurements.json").exists()
    assert not (tmp_path / "shortlist.csv").exists()
