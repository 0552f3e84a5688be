"""`explain` and `refine`: shares add up, changes are differences of independent predictions, leads are what brute force finds."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from made_knowledge import records_of, table_of

from lowsearch import cli, cost
from lowsearch.accuracy.gaussian import GaussianProcess, Points
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.arch import Arch
from lowsearch.errors import NotInSpaceError, StudyError, TableError
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.search.objectives import parse_limits
from lowsearch.space import SearchSpace
from lowsearch.study import knowledge, refinement
from lowsearch.study.explain import Change, explain
from lowsearch.study.knowledge import Knowledge
from lowsearch.study.parts import ProxyAccuracy, stand_in_of
from lowsearch.study.settings import StudySettings

MICRO = SearchSpace.load("lowformer-micro")
TINY = SearchSpace.load(Path(__file__).with_name("tiny_space.yaml"))
EXAMPLE = Path(__file__).parent.parent / "studies" / "example"
REFERENCE = {"accuracy": 0.1, "latency_ms": 5.0, "macs": 1e9, "params": 1e9}


def known_of(space: SearchSpace, *, without: str = "", score: bool = True) -> Knowledge:
    latency = LatencyPredictor(space, table_of(space, without=without))
    known = Knowledge(space=space, latency=latency, latency_source="table")
    if not score:
        return known
    return dataclasses.replace(known, score=AccuracyPredictor(space).fit(records_of(space, 30)))


@pytest.fixture(scope="module")
def micro() -> Knowledge:
    return known_of(MICRO, without="mlp")


@pytest.fixture(scope="module")
def tiny() -> Knowledge:
    return known_of(TINY)


def one_change(space: SearchSpace, before: np.ndarray) -> set[bytes]:
    """What one setting taken to an adjacent value makes of `before`, found by trying all values of all settings."""
    found = set()
    for i, gene in enumerate(space.genes):
        for choice, value in enumerate(gene.choices):
            low, high = sorted((gene.choices[before[i]], value))
            between = [] if isinstance(value, str) else [other for other in gene.choices if low < other < high]
            changed = before.copy()
            changed[i] = choice
            if choice != before[i] and not between and space.active(before[None])[0, i]:
                found.add(space.canonical(changed[None])[0].tobytes())
    return found


def two_changes(space: SearchSpace, genome: np.ndarray) -> set[bytes]:
    once = one_change(space, genome)
    twice = {key for middle in once for key in one_change(space, np.frombuffer(middle, dtype=np.int8))}
    return (once | twice) - {genome.tobytes()}


# The space


def test_all_genomes_are_the_networks_of_the_space_each_once():
    genomes = TINY.all_genomes()
    assert len(genomes) == TINY.size() == 108
    assert (TINY.canonical(genomes) == genomes).all()
    assert len({TINY.decode(genome).arch_id for genome in genomes}) == 108


def test_neighbours_are_those_that_brute_force_finds():
    for space, genomes in ((TINY, TINY.all_genomes()[::3]), (MICRO, MICRO.sample(5, rng=np.random.default_rng(0)))):
        for genome in genomes:
            _, found = space.neighbours(genome)
            assert {other.tobytes() for other in found} == one_change(space, genome)
            assert len(np.unique(found, axis=0)) == len(found)


def test_a_neighbour_of_the_micro_space_is_in_it_and_differs_in_the_gene_named():
    for genome in MICRO.sample(20, rng=np.random.default_rng(0)):
        genes, found = MICRO.neighbours(genome)
        assert (MICRO.canonical(found) == found).all()
        assert (found[np.arange(len(genes)), genes] != genome[genes]).all()
        assert len(np.unique(found, axis=0)) == len(found)


# Explanations


def test_blocks_and_stages_add_up_to_the_prediction(micro):
    everything = [explain(micro, arch) for arch in MICRO.family.values()]
    assert {block.source for found in everything for block in found.blocks} == {"measured", "predicted"}
    found, arch = everything[0], everything[0].arch
    for parts in (found.blocks, found.stages):
        assert sum(part.latency_ms for part in parts) == pytest.approx(found.latency_ms)
        assert sum(part.macs for part in parts) == found.macs == cost.count(arch).macs
        assert sum(part.params for part in parts) == found.params == cost.count(arch).params
        assert sum(part.latency_share for part in parts) == pytest.approx(1) == sum(part.macs_share for part in parts)
    assert [part.place for part in found.stages] == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]


def test_every_change_is_the_difference_of_two_independent_predictions(micro):
    arch = MICRO.family["micro-cpu-s"]
    found = explain(micro, arch)
    archs = [change.arch for change in found.changes]
    latency_ms, _ = micro.latency.predict_archs([arch, *archs])
    accuracy, _ = micro.score.predict_exact(np.stack([MICRO.encode(a) for a in (arch, *archs)]))
    for i, change in enumerate(found.changes, start=1):
        assert change.latency_ms == pytest.approx(latency_ms[i] - latency_ms[0], abs=1e-9)
        assert change.latency_share == pytest.approx(latency_ms[i] / latency_ms[0] - 1)
        assert change.macs == cost.count(change.arch).macs - cost.count(arch).macs
        assert change.params == cost.count(change.arch).params - cost.count(arch).params
        assert change.score == pytest.approx(accuracy[i] - accuracy[0], abs=1e-6)
    assert len(archs) == len(MICRO.neighbours(MICRO.encode(arch))[0])


def test_the_deviation_of_a_change_is_that_of_blocks_that_err_independently(micro):
    """Simulated: every distinct block gets an error, networks are summed with it, and the spread of the differences is counted."""
    arch = MICRO.family["micro-b-s"]
    _, genomes = MICRO.neighbours(MICRO.encode(arch))
    archs = [MICRO.decode(genome) for genome in genomes]
    blocks = list({block for network in (arch, *archs) for block in network.blocks()})
    ms = np.zeros((len(genomes) + 1, len(blocks)))
    for row, network in zip(ms, (arch, *archs), strict=True):
        for share in micro.latency.explain(network):
            row[blocks.index(share.block)] += share.ms
    std = np.full(
        len(blocks), micro.latency.relative_std * ms[0].sum() / np.linalg.norm(ms[0])
    )  # What gives the network its stated spread.
    guessed = micro.latency._predictions
    std = np.hypot(std, [guessed[block].relative_std if block in guessed else 0.0 for block in blocks])
    assert any(block in guessed for block in blocks)
    totals = ms @ (std * np.random.default_rng(0).normal(size=(4000, len(blocks)))).T
    _, std_ms = micro.latency.changes(arch, archs)
    assert std_ms == pytest.approx((totals[1:] - totals[0]).std(axis=1), rel=0.06)


def test_a_network_does_not_differ_from_itself_and_a_change_is_known_better_than_two_networks(micro):
    arch = MICRO.family["micro-b-s"]
    assert np.array(micro.latency.changes(arch, [arch])).ravel().tolist() == [0.0, 0.0]
    _, std_ms = micro.latency.predict(MICRO.encode(arch)[None])
    changes = explain(micro, arch).changes
    assert np.median([change.latency_std_ms for change in changes]) < 0.5 * np.sqrt(2) * std_ms[0]


def test_accuracy_differences_are_those_of_the_joint_posterior():
    rng = np.random.default_rng(0)
    trained, origin, asked = (Points(cost=rng.normal(size=(n, 2)), features=rng.normal(size=(n, 3))) for n in (9, 1, 4))
    process = GaussianProcess(trained, rng.normal(0, 0.02, 9), np.full(9, 1e-5), curved=True)
    cost_, features = (np.vstack([getattr(p, part) for p in (trained, origin, asked)]) for part in ("cost", "features"))
    c, f, noise, curved, length = process.scales
    x = np.hstack([cost_, features])
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    prior = 0.3**2 + c**2 * cost_ @ cost_.T + f**2 * features @ features.T + curved**2 * np.exp(-0.5 * squared / length**2)
    prior += noise**2 * np.eye(14)
    gain = prior[9:, :9] @ np.linalg.inv(prior[:9, :9] + 1e-5 * np.eye(9))
    joint, expected = prior[9:, 9:] - gain @ prior[:9, 9:], gain @ process.residual
    mean, variance = process.predict_differences(origin, asked)
    assert mean == pytest.approx(expected[1:] - expected[0])
    assert variance == pytest.approx(np.diag(joint)[1:] + joint[0, 0] - 2 * joint[0, 1:])


@pytest.mark.parametrize(
    ("latency_share", "std_share", "macs_share", "says"),
    [
        (0.10, 0.01, 0.11, ""),  # In proportion.
        (0.10, 0.01, 0.40, "too much"),
        (0.40, 0.01, 0.10, "too little"),
        (-0.20, 0.01, 0.10, "opposite"),
        (0.10, 0.20, 0.40, ""),  # Not known well enough.
        (0.001, 0.0001, 0.02, ""),  # Clear, but too little to speak of.
        (0.0, 0.01, -0.30, "too much"),
        (0.08, 0.045, -0.07, "too much"),
        (-0.01, 0.02, 0.30, "too much"),  # The other direction, but within the uncertainty.
    ],
)
def test_macs_mislead_only_where_proportions_clearly_differ(latency_share, std_share, macs_share, says):
    change = Change(
        steps=(), arch=MICRO.family["micro-b-s"], latency_ms=2 * latency_share, latency_std_ms=2 * std_share, latency_share=latency_share,
        macs=0, macs_share=macs_share, params=0, params_share=0.0, score=None, score_std=None,
    )  # fmt: skip
    assert change.macs_say == says


def test_a_network_outside_the_space_is_refused(micro):
    with pytest.raises(NotInSpaceError, match="num_classes is 1000"):
        explain(micro, dataclasses.replace(MICRO.family["micro-b-s"], num_classes=1000))


# Refinement


def test_one_and_two_changes_are_those_that_brute_force_finds():
    for genome in TINY.all_genomes()[::25]:
        genomes, steps = refinement.within_two_changes(TINY, genome)
        assert {found.tobytes() for found in genomes} == two_changes(TINY, genome)
        assert {len(path) for path in steps} == {1, 2}


def test_leads_are_what_brute_force_finds(tiny):
    arch = TINY.decode(TINY.all_genomes()[40])
    genome = TINY.encode(arch)
    found = refinement.refine(tiny, arch, settings=StudySettings(), reference=REFERENCE)
    expected = {}
    for key in two_changes(TINY, genome):
        other = np.frombuffer(key, dtype=np.int8)
        ms, ms_std = (float(x[0]) for x in tiny.latency.changes(arch, [TINY.decode(other)]))
        gain, gain_std = (float(x[0]) for x in tiny.score.changes(genome, other[None]))
        faster, better = -ms > 2 * ms_std, gain > 2 * gain_std
        if gain >= 0 and ms <= 0 and (faster or better):
            expected[TINY.decode(other).arch_id] = "faster and better" if faster and better else "faster" if faster else "better"
    assert {lead.change.arch_id: lead.gain for lead in found.leads} == expected
    assert expected
    volumes = [lead.hypervolume for lead in found.leads]
    assert volumes == sorted(volumes, reverse=True)
    assert found.n_judged == len(two_changes(TINY, genome))


def test_leads_keep_the_limits_and_are_new_to_the_study(micro):
    arch = MICRO.family["micro-b-l"]
    free = refinement.refine(micro, arch, settings=StudySettings(), reference=REFERENCE)
    limit = float(np.median([cost.count(lead.change.arch).macs for lead in free.leads]))
    tried = {MICRO.encode(free.leads[0].change.arch).tobytes()}
    bound = StudySettings(limits=parse_limits(maxima=[f"macs={limit}"]))
    found = refinement.refine(micro, arch, settings=bound, reference=REFERENCE, tried=tried)
    assert 0 < len(found.leads) < len(free.leads)
    assert all(cost.count(lead.change.arch).macs <= limit for lead in found.leads)
    assert free.leads[0].change.arch_id not in {lead.change.arch_id for lead in found.leads}


def test_under_a_proxy_a_lead_is_faster_at_no_fewer_macs():
    known = dataclasses.replace(known_of(MICRO, score=False), score=ProxyAccuracy(MICRO, "macs"))
    arch = MICRO.family["micro-cpu-l"]
    found = refinement.refine(known, arch, settings=StudySettings(accuracy="macs"), reference={**REFERENCE, "accuracy": 5.0})
    assert found.leads
    assert all(cost.count(lead.change.arch).macs >= cost.count(arch).macs for lead in found.leads)


def test_without_a_score_there_is_nothing_to_refine_by():
    with pytest.raises(StudyError, match="no score"):
        refinement.refine(known_of(TINY, score=False), TINY.family["tiny-plain"], settings=StudySettings(), reference=REFERENCE)


# From the command line


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The example study, with a latency table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "studies" / "mine"
    shutil.copytree(EXAMPLE, folder)
    written = table_of(MICRO).save(tmp_path / "tables")
    shutil.copyfile(written, folder / "latency_table.jsonl")
    return folder


def said(capsys, *arguments):
    assert cli.invoke(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def proposed_on_front(study):
    """The arch_id of the fastest network on the front."""
    with (study / "front.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == "proposed"]
    return min(rows, key=lambda row: float(row["latency_ms"]))["arch_id"]


def test_explain_answers_for_a_network_of_a_study(study, capsys):
    arch_id = proposed_on_front(study)
    values = json.loads(said(capsys, "explain", "--study", "mine", "--arch", arch_id[:6], "--json"))
    assert values["arch_id"] == arch_id
    assert values["target"].startswith("some-board")
    assert 0.5 < values["score"] < 1 and values["score_source"] == "estimated"
    assert {"arch", "latency_ms", "latency_std_ms", "macs_say", "score", "score_std", "steps"} <= set(values["changes"][0])
    text = said(capsys, "explain", "--study", "mine", "--arch", "micro-b-s")
    assert "One change" in text and "stage3.attention.enabled True -> False" in text and "MACs mislead about" in text


@pytest.mark.parametrize(("accuracy", "source"), [("published", "prior:published"), ("macs", "proxy:macs"), (None, "estimated")])
def test_explain_and_refine_name_unit_and_source_of_the_score(study, capsys, accuracy, source):
    values = yaml.safe_load((study / "study.yaml").read_text())
    values["settings"]["accuracy"] = accuracy or values["settings"]["accuracy"]
    (study / "study.yaml").write_text(yaml.safe_dump(values))
    found = json.loads(said(capsys, "explain", "--study", "mine", "--arch", "micro-b-s", "--json"))
    assert (found["score_source"], found["score_unit"]) == (source, "rank" if accuracy else "top1")
    assert (
        (found["score_std"] is None) == (found["changes"][0]["score_std"] is None) == (accuracy == "macs")
    )  # A proxy has no error to give.
    text = said(capsys, "explain", "--study", "mine", "--arch", "micro-b-s")
    assert ("score (rank)" in text) == bool(accuracy) and ("accuracy %" in text) != bool(accuracy) and f"({source})" in text
    arch_id = found["arch_id"]
    text = said(capsys, "refine", "mine", "--arch", arch_id)
    assert ("score (rank)" in text) == bool(accuracy) and ("accuracy %" in text) != bool(accuracy)


@pytest.mark.parametrize("accuracy", ["published", "macs", "params"])
def test_what_stands_in_for_accuracy_only_ranks(accuracy, tmp_path):
    settings = StudySettings(accuracy=accuracy)
    model = stand_in_of(settings, MICRO, tmp_path)
    assert model.unit == "rank" and model.source == settings.stand_in
    std = model.predict(MICRO.sample(5, rng=np.random.default_rng(0)))[1]
    assert (std > 0).all() if accuracy == "published" else (std == 0).all()


def test_explain_answers_from_a_table_alone(study, capsys):
    shutil.move(study.parent.parent / "tables", study.parent.parent / "latency_tables")
    arguments = ["explain", "--arch", "micro-e-s", "--space", "lowformer-micro", "--device", "some-board"]
    values = json.loads(said(capsys, *arguments, "--json"))
    assert values["score"] is None
    assert values["latency_source"] == "table"
    assert "accuracy" not in said(capsys, *arguments)


def test_refine_writes_its_leads_and_names_what_it_did_not_try_yet(study, capsys):
    arch_id = SearchSpace.load("lowformer-micro").family["micro-b-l"].arch_id  # Much is better than the slowest of the family.
    values = json.loads(said(capsys, "refine", "mine", "--arch", arch_id, "--json"))
    written = json.loads((study / f"refine-{arch_id}.json").read_text())
    assert written["leads"] == values["leads"]
    tried = {line.split(",")[1] for line in (study / "candidates.csv").read_text().splitlines()}
    assert values["leads"] and not tried & {lead["arch_id"] for lead in values["leads"]}
    assert [Arch.from_dict(lead["arch"]).arch_id for lead in values["leads"]] == [lead["arch_id"] for lead in values["leads"]]
    assert "promise more" in said(capsys, "refine", "mine", "--arch", arch_id, "--top", "3")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["explain"], "--arch"),
        (["explain", "--arch", "lowformer_b9"], "unknown preset"),
        (["explain", "--arch", "lowformer_b1", "--space", "lowformer-micro"], "num_classes|resolution|input"),
        (["explain", "--arch", "lowformer_b1", "--device", "rtx3090"], "rtx3090"),
        (["explain", "--arch", "micro-b-s", "--study", "nowhere"], "no study"),
        (["explain", "--arch", "ffffff", "--study", "mine"], "no network"),
        (["explain", "--arch", "micro-b-s", "--study", "mine", "--device", "cpu"], "a study has its own device"),
        (["refine", "mine", "--arch", "micro-b-s", "--enqueue", "2"], "study.db"),
        (["refine", "mine", "--arch", "lowformer_b1"], "not in|is "),
    ],
)
def test_mistakes_are_one_line(study, capsys, arguments, says):
    assert cli.invoke(arguments) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_study_without_a_table_names_the_command_that_measures_it(study):
    (study / "latency_table.jsonl").unlink()
    settings = dataclasses.replace(knowledge.settings_of(study), device="some-board")
    with pytest.raises(TableError, match="some-board"):
        knowledge.of_study(study, settings)


def test_a_damaged_candidates_file_is_one_clear_line(study):
    (study / "candidates.csv").write_text("number,genome\n1,not numbers\n")
    with pytest.raises(StudyError, match="candidates.csv is damaged"):
        refinement.tried_in(study, MICRO)
