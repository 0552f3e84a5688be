"""Candidates near a latency limit: who is measured before training, what that decides, and what an interruption leaves of it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from itertools import zip_longest

import numpy as np
import pytest
import study_fakes as fakes

from lowsearch.errors import StudyError
from lowsearch.latency.target import Device
from lowsearch.report.study_files import read_study
from lowsearch.search.objectives import parse_limits
from lowsearch.search.verification import (
    BAND,
    N_ANCHORS,
    VERIFIED,
    Verifications,
    VerifiedLatency,
    broken_limit,
    checked,
    is_near_limit,
    verify,
)
from lowsearch.study import assembly
from lowsearch.study.outputs import StudyFiles
from lowsearch.study.run import run
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import enqueue, n_proposals, open_study

SPACE = fakes.SPACE
LIMIT_MS = 0.2
LIMITS = parse_limits(maxima=[f"latency_ms={LIMIT_MS}"])
SETTINGS = StudySettings(trials=6, workers=1, limits=LIMITS, device="doubtful")


def predicted(genome):
    return tuple(float(values[0]) for values in fakes.FakeLatency().predict(genome[None]))


def measured_ids(folder):
    """Whom the device was asked about, in order."""
    path = folder / "verified.log"
    return path.read_text().split() if path.exists() else []


def chosen():
    """Networks that are asked for first: two that are far below the limit, and near it two that the device finds over and three below."""
    genomes = SPACE.sample(4000, rng=np.random.default_rng(5))
    mean_ms, std_ms = fakes.FakeLatency().predict(genomes)
    near = (mean_ms + 1.2816 * std_ms <= LIMIT_MS) & (mean_ms + BAND * std_ms >= LIMIT_MS)
    over = np.array([fakes.true_ms(SPACE.decode(g)) > LIMIT_MS if n else False for g, n in zip(genomes, near, strict=True)])
    groups = (genomes[mean_ms < 0.7 * LIMIT_MS][:2], genomes[near & over][:2], genomes[near & ~over][:3])
    archs = [SPACE.decode(genome) for group in zip_longest(*groups) for genome in group if genome is not None]
    return {arch.arch_id: arch for arch in archs}


def search(folder, settings, **options):
    folder.mkdir(exist_ok=True)
    enqueue(open_study(folder, settings.objectives), SPACE, chosen(), origin="proposed")
    return fakes.search(folder, settings, **options)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified") / "study"
    return folder, search(folder, SETTINGS)


# In a search


def test_the_device_decides_who_near_the_limit_is_trained(searched):
    folder, found = searched
    trained = {record.arch_id for record in fakes.FakeRecords(folder).read()}
    cases = set()
    for c in found:
        arch = SPACE.decode(c.genome)
        mean_ms, std_ms = predicted(c.genome)
        refused = mean_ms + 1.2816 * std_ms > LIMIT_MS
        doubtful = not refused and mean_ms + BAND * std_ms >= LIMIT_MS
        over = doubtful and fakes.true_ms(arch) > LIMIT_MS
        cases.add((doubtful, over))
        assert (arch.arch_id in measured_ids(folder)) == doubtful
        assert (c.state == "complete") == (arch.arch_id in trained) == (not refused and not over)
        assert c.reason.startswith("measured over limit") == over
    assert cases == {(False, False), (True, False), (True, True)}
    assert sum(c.state == "complete" and c.origin != "family" for c in found) == SETTINGS.trials, "who is over does not count"
    assert len(measured_ids(folder)) == len(set(measured_ids(folder)))


def test_what_was_measured_is_what_the_search_knows(searched):
    folder, found = searched
    trials = {t.number: t for t in open_study(folder, SETTINGS.objectives).get_trials()}
    kept = 0
    for c in found:
        arch, trial = SPACE.decode(c.genome), trials[c.number]
        measured = arch.arch_id in measured_ids(folder)
        if c.state == "complete":  # The pace of the machine is divided out.
            assert trial.values[1] == pytest.approx(fakes.true_ms(arch) if measured else predicted(c.genome)[0])
            assert trial.constraints["limits"] == 0
            kept += measured
        elif measured:
            assert trial.constraints["limits"] == pytest.approx(fakes.true_ms(arch) / LIMIT_MS - 1)
    assert kept


def test_the_files_show_the_measured_latency(searched, tmp_path):
    folder = shutil.copytree(searched[0], tmp_path / "study")
    StudyFiles(folder, SETTINGS, fakes.make_parts(folder, SETTINGS), np.array([-0.1, math.log(2.0)])).refresh(searched[1])
    with (folder / "candidates.csv").open(newline="") as file:
        rows = {row["arch_id"]: row for row in csv.DictReader(file)}
    for arch_id, row in rows.items():
        assert row["latency_source"] == ("measured" if arch_id in measured_ids(folder) else "predicted")
    for v in Verifications(folder / VERIFIED).found().values():
        assert float(rows[v.arch_id]["latency_ms"]) == pytest.approx(v.latency_ms)
        assert float(rows[v.arch_id]["latency_std_ms"]) == pytest.approx(v.latency_std_ms) and v.latency_std_ms > 0


def test_a_network_that_was_measured_over_is_refused_again_without_measuring(searched, tmp_path):
    folder = shutil.copytree(searched[0], tmp_path / "study")
    out = next(c for c in searched[1] if c.reason.startswith("measured"))
    study = open_study(folder, SETTINGS.objectives)
    study.enqueue_trial({gene.name: int(g) for gene, g in zip(SPACE.genes, out.genome, strict=True)})
    again = search(folder, SETTINGS)[-1]
    assert (again.state, again.reason) == ("pruned", out.reason)
    assert measured_ids(folder) == measured_ids(searched[0])
    assert n_proposals(study) == SETTINGS.trials


@pytest.mark.parametrize("sampler", ["random", "nsga2"])
def test_other_samplers_are_held_to_the_limit_alike(tmp_path, sampler):
    found = search(tmp_path / "study", StudySettings(trials=7, workers=1, limits=LIMITS, device="doubtful", sampler=sampler))
    measured = measured_ids(tmp_path / "study")
    for c in found:
        arch = SPACE.decode(c.genome)
        assert c.reason.startswith("measured over limit") == (arch.arch_id in measured and fakes.true_ms(arch) > LIMIT_MS)
        assert (c.state == "complete") == (not c.reason)
    assert measured


@pytest.mark.parametrize(
    ("owner", "name", "at", "after", "lost"),
    [
        (Verifications, "append", 2, False, 1),  # Measured, but not on disk yet.
        (Verifications, "append", 3, True, 0),
        (fakes.FakeTraining, "run", 8, True, 0),
    ],
)
def test_an_interrupted_study_decides_alike_and_measures_nothing_again(tmp_path, monkeypatch, searched, owner, name, at, after, lost):
    folder = tmp_path / "study"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fakes.Interrupting(getattr(owner, name), at, after=after))
        with pytest.raises(fakes.Death):
            search(folder, SETTINGS)
    assert repr(fakes.essence(search(folder, SETTINGS))) == repr(fakes.essence(searched[1]))  # NaN is not itself.
    assert (folder / VERIFIED).read_text() == (searched[0] / VERIFIED).read_text()
    assert len(measured_ids(folder)) == len(measured_ids(searched[0])) + lost


def test_nothing_is_measured_where_nothing_is_trained(tmp_path):
    search(tmp_path / "proxy", StudySettings(trials=5, workers=1, limits=LIMITS, device="doubtful", accuracy="macs"))
    assert not measured_ids(tmp_path / "proxy")


def test_a_joined_worker_measures_nothing_as_its_machine_may_be_another(tmp_path):
    search(tmp_path / "joined", SETTINGS, name="worker-0@elsewhere-1a2b3c.test")
    assert not measured_ids(tmp_path / "joined")


def test_a_whole_run_says_how_many_were_measured_and_how_many_were_over(tmp_path):
    folder = tmp_path / "study"
    settings = StudySettings(trials=5, workers=2, limits=LIMITS, device="doubtful")
    folder.mkdir()
    enqueue(open_study(folder, settings.objectives), SPACE, chosen(), origin="proposed")
    summary = run(settings, folder, backend=fakes.backend()).summary
    found = Verifications(folder / VERIFIED).found().values()
    over = [v.latency_ms / LIMIT_MS - 1 for v in found if v.latency_ms > LIMIT_MS]
    assert summary["verified"] == {"networks": len(found), "over": len(over), "worst_excess": pytest.approx(max([0, *over]))}
    assert read_study(folder).summary["verified"]["networks"] == len(measured_ids(folder)) > 0


# Parts


@pytest.mark.parametrize(
    ("settings", "can"),
    [
        ({"workers": 2}, True),
        ({"workers": 2, "threads": 2}, False),
        ({"workers": 1, "threads": 2}, True),
        ({"workers": 2, "device": "a-gpu", "train_device": "cuda"}, False),
        ({"workers": 2, "device": "a-gpu", "train_device": "cpu"}, True),
        ({"workers": 1, "device": "a-gpu", "train_device": "cuda"}, True),
    ],
)
def test_nobody_is_timed_where_trainings_would_be_in_the_time(monkeypatch, settings, can):
    gpu, cpu = Device(slug="a-gpu", kind="cuda", name="Fake"), Device(slug="cpu", kind="cpu", name="Fake")
    monkeypatch.setattr(assembly, "resolve_device", lambda name: gpu if name == "a-gpu" else cpu)
    assert assembly.can_time_beside_trainings(StudySettings(**settings)) == can


class Clock:
    """Takes `factor` times what the table says of the anchors, and `own_ms` for everyone else."""

    def __init__(self, anchors, factors, own_ms):
        self.then, self.factors, self.own_ms, self.asked = dict(anchors), factors, own_ms, []

    def __call__(self, archs):
        self.asked = list(archs)
        return [
            fakes.FakeMeasured(self.then[a] * self.factors[a] if a in self.then else self.own_ms, 0.01, samples_ms=((1.0, 2.0), (3.0,)))
            for a in archs
        ]


@pytest.fixture
def networks():
    genomes = SPACE.sample(9, rng=np.random.default_rng(3))
    return genomes, [SPACE.decode(genome) for genome in genomes]


def test_the_pace_of_the_nearest_anchors_is_divided_out(networks):
    genomes, (own, *others) = networks
    anchors = [(arch, 0.1 * 2**i) for i, arch in enumerate(others)]
    device = Clock(anchors, {arch: f for arch, f in zip(others, [9, 9, 1.1, 1.2, 1.3, 1.4, 9, 9], strict=True)}, own_ms=1.0)
    found = verify(own, genomes[0], (0.1 * 2**3.5, 0.05), anchors=[*anchors, (own, 1.1)], measure=device)
    assert device.asked[0] == own and set(device.asked[1:]) == set(others[2:6]) and len(device.asked) == 1 + N_ANCHORS
    assert found.pace == pytest.approx(1.25) and found.latency_ms == pytest.approx(1 / 1.25)
    spread = np.std(np.log([1.1, 1.2, 1.3, 1.4]), ddof=1) / 2
    assert found.latency_std_ms / found.latency_ms == pytest.approx(math.hypot(0.01, math.sqrt(math.pi / 2) * spread))
    assert found.samples_ms == ((1.0, 2.0), (3.0,))


def test_without_anchors_a_measurement_counts_as_it_is(networks):
    genomes, (own, *_) = networks
    found = verify(own, genomes[0], (1.0, 0.1), anchors=[(own, 2.0)], measure=Clock([], {}, own_ms=1.5))
    assert (found.latency_ms, found.latency_std_ms, found.pace, found.anchor_ratios) == (1.5, pytest.approx(0.01), 1.0, ())


def made(genome, latency_ms):
    return verify(SPACE.decode(genome), genome, (1.0, 0.1), anchors=(), measure=Clock([], {}, own_ms=latency_ms))


def test_verifications_survive_a_torn_line_and_are_seen_by_others(tmp_path, networks):
    genomes, _ = networks
    path = tmp_path / VERIFIED
    writer, reader = Verifications(path), Verifications(path)
    assert reader.of(genomes[0]) is None
    writer.append(made(genomes[0], 1.5))
    assert reader.of(genomes[0]) == writer.of(genomes[0]) == made(genomes[0], 1.5)
    with path.open("a") as file:
        file.write('{"arch_id": "torn')
    assert reader.of(genomes[1]) is None
    Verifications(path).append(made(genomes[1], 2.5))
    assert reader.of(genomes[1]) == made(genomes[1], 2.5)
    assert [json.loads(line)["latency_ms"] for line in path.read_text().splitlines()] == [1.5, 2.5]


@pytest.mark.parametrize("change", [{"latency_ms": -1.0}, {"pace": "fast"}, {"more": 1}, {"genome": None}])
def test_a_damaged_line_is_an_error_that_names_the_file(tmp_path, networks, change):
    path = tmp_path / VERIFIED
    Verifications(path).append(made(networks[0][0], 1.5))
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(StudyError, match=VERIFIED):
        Verifications(path).found()


def test_a_measured_network_has_its_measured_latency_and_no_other_has(tmp_path, networks):
    genomes, _ = networks
    model = VerifiedLatency(fakes.FakeLatency(), Verifications(tmp_path / VERIFIED))
    before = model.predict(genomes)
    model.verifications.append(made(genomes[4], 7.5))
    after = model.predict(genomes)
    others = np.arange(len(genomes)) != 4
    assert (after[0][4], after[1][4]) == (7.5, 0.0)
    for was, now, plain in zip(before, after, fakes.FakeLatency().predict(genomes), strict=True):
        assert np.array_equal(was, plain) and np.array_equal(now[others], plain[others])


def test_near_is_within_two_deviations_of_a_latency_limit_on_either_side():
    both = parse_limits(maxima=["latency_ms=2", "macs=1e9"], minima=["latency_ms=1"])
    assert [is_near_limit(both, ms, 0.1) for ms in (0.79, 0.81, 1.19, 1.21, 1.79, 1.81, 2.19, 2.21)] == [
        False, True, True, False, False, True, True, False,
    ]  # fmt: skip
    assert not is_near_limit(parse_limits(maxima=["macs=5"]), 5, 1)
    images = parse_limits(minima=["throughput_ips=1000"])  # Of 4 images: 4 ms.
    assert [is_near_limit(images, ms, 0.1, batch=4) for ms in (3.79, 3.81, 4.19, 4.21)] == [False, True, True, False]
    assert broken_limit(images, 3.99, batch=4) is None and broken_limit(images, 4.01, batch=4) == images[0]


def test_breaks_are_counted_against_the_limit_they_break(networks):
    both = parse_limits(maxima=["latency_ms=2"], minima=["latency_ms=1"])
    found = [made(genome, ms) for genome, ms in zip(networks[0], (1.0, 1.5, 2.0, 2.5, 0.5), strict=False)]
    check = checked(found, both)
    assert (check.networks, check.over, check.worst_excess) == (5, 2, 0.5)
    assert [str(broken_limit(both, v.latency_ms) or "") for v in found] == ["", "", "", "latency_ms <= 2", "latency_ms >= 1"]
    assert checked([], both).worst_excess == 0
