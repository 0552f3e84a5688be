"""Supernets: trained by the sandwich rule, the same weights after every interruption and in every process; scores and what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from few_images import few_images
from torch import Tensor

from lowsearch import cli, cost
from lowsearch.accuracy import supernet as scoring
from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.predictor import Coordinates
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.accuracy.supernet import SCORES, Calibration, SupernetEstimator
from lowsearch.arch import Arch
from lowsearch.data import ImageData, load_data
from lowsearch.errors import DataError, NotInSpaceError, StudyError, UsageError
from lowsearch.model.elastic import Supernet
from lowsearch.search.estimates import scores_of
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint, Recipe, evaluate
from lowsearch.train.distributed import Ranks
from lowsearch.train.engine import hash_of_init
from lowsearch.train.feed import network_input
from lowsearch.train.supernet import (
    CHECKPOINT,
    PLAN,
    WEIGHTS,
    SupernetPlan,
    _Training,
    estimate_statistics,
    extremes,
    inherit,
    load_supernet,
    read_plan,
    sample_within,
    steps_within,
    train_supernet,
    validate,
)

TINY = """
name: tiny
input: [{resolution_px: 32, stem_stride: 2}, {resolution_px: 64, stem_stride: 2}]
stem: {width: [4, 6]}
stages:
  - {width: [8, 6], down_expansion: [2], down_groups: [1, 2]}
  - {width: [8], down_expansion: [1, 2]}
  - width: [16, 12]
    depth: [1, 2]
    down_expansion: [2]
    fused: [true, false]
    expansion: [1, 2]
    attention: {enabled: [true, false], projection: [unfused, nearest]}
  - {width: [16], down_expansion: [2]}
head_widths: [[16, 16], [32, 16]]
"""
BRIEF = Recipe(name="brief", epochs=1, train_images=96, batch_size=16, learning_rate=2e-3)
STEPS = 6


@pytest.fixture(scope="module")
def images() -> ImageData:
    return few_images(train=1500, val=500, test=20)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return SearchSpace.from_yaml(TINY).with_num_classes(10)


def plan_of(images: ImageData, **changes: Any) -> SupernetPlan:
    values: dict[str, Any] = {"space": TINY, "num_classes": 10, "data": images.name, "data_hash": images.data_hash, "steps": STEPS}
    return SupernetPlan(**{**values, "recipe": BRIEF, **changes})


@pytest.fixture(scope="module")
def uninterrupted(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return train_supernet(plan_of(images), images, tmp_path_factory.mktemp("supernet")).weights


@pytest.fixture(scope="module")
def learned(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet that has learned something."""
    folder = tmp_path_factory.mktemp("supernets") / "learned"
    recipe = Recipe(name="short", epochs=1, batch_size=64, learning_rate=5e-3)
    train_supernet(plan_of(images, steps=80, recipe=recipe), images, folder)
    return folder


def assert_same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


# --- what a step trains -----------------------------------------------------------------------------------------------------------


def test_extremes_are_those_of_all_networks(space: SearchSpace) -> None:
    costs = [cost.count(space.decode(genome)) for genome in space.all_genomes()]
    counted = [(c.macs, c.params) for c in costs]
    largest, smallest = (cost.count(arch) for arch in extremes(space))
    assert (largest.macs, largest.params) == max(counted) and (smallest.macs, smallest.params) == min(counted)


def test_a_step_trains_the_largest_the_smallest_and_random_networks(images: ImageData, space: SearchSpace) -> None:
    training = _Training(plan_of(images, n_random=3), images, None, device="cpu", ranks=Ranks())
    first = training.networks()
    assert tuple(first[:2]) == extremes(space) and len(first) == 5
    training.step = 1
    assert training.networks()[:2] == first[:2] and training.networks()[2:] != first[2:]
    training.step = 0
    assert training.networks() == first, "drawn by (seed, step) alone"


def test_within_a_limit_the_largest_that_was_drawn_teaches(images: ImageData, space: SearchSpace) -> None:
    macs = sorted(cost.count(space.decode(genome)).macs for genome in space.all_genomes())
    limit = macs[len(macs) // 2]
    training = _Training(plan_of(images, max_macs=float(limit), n_random=4), images, None, device="cpu", ranks=Ranks())
    for step in range(20):
        training.step = step
        teacher, *others = (cost.count(arch).macs for arch in training.networks())
        assert max(teacher, *others) <= limit
        assert teacher > 0.5 * limit, "the largest of sixteen"


def test_the_largest_learns_labels_and_the_others_what_it_said(images: ImageData) -> None:
    plan = plan_of(images, n_random=1)
    training = _Training(plan, images, None, device="cpu", ranks=Ranks())
    batch = np.random.default_rng([plan.seed, 1, 0]).permutation(BRIEF.train_images)[: BRIEF.batch_size]
    seen: list[tuple[Arch, Tensor]] = []
    logits_of = training.supernet.logits

    def watched(arch: Arch, x: Tensor) -> Tensor:
        seen.append((arch, x))
        return logits_of(arch, x)

    training.supernet.logits = watched  # type: ignore[method-assign]
    training.compute_gradients()
    assert [arch for arch, _ in seen] == training.networks()
    got = {key: weight.grad for key, weight in training.supernet.weights.items()}

    fresh = Supernet(plan.search_space(), seed=plan.seed)
    teacher = fresh.logits(*seen[0])
    loss = F.cross_entropy(teacher, torch.from_numpy(images.train.labels[batch]), label_smoothing=BRIEF.label_smoothing)
    for arch, x in seen[1:]:
        loss = loss - (teacher.detach().softmax(1) * fresh.logits(arch, x).log_softmax(1)).sum(1).mean()
    (loss / len(seen)).backward()
    for key, weight in fresh.weights.items():
        assert (weight.grad is None) == (got[key] is None), key
        if weight.grad is not None:
            assert torch.allclose(weight.grad, got[key], atol=1e-6), key  # type: ignore[arg-type]


def test_too_small_a_limit_is_refused(space: SearchSpace) -> None:
    with pytest.raises(UsageError, match="hardly any network"):
        sample_within(space, 2, 10.0, rng=np.random.default_rng(0))


# --- interruption and company -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_step", [1, 2, 5])
def test_interrupted_training_ends_bit_identical(at_step: int, images: ImageData, uninterrupted: dict[str, Tensor], tmp_path: Path) -> None:
    def kill(done: int, total: int, label: str) -> None:
        if done == at_step:
            raise Killed

    with pytest.raises(Killed):
        train_supernet(plan_of(images), images, tmp_path, progress=kill)
    with pytest.raises(StudyError, match="not finished"):
        load_supernet(tmp_path)
    steps: list[int] = []
    supernet = train_supernet(plan_of(images), images, tmp_path, progress=lambda done, total, label: steps.append(done))
    assert steps == list(range(at_step + 1, STEPS + 1)), "nothing is done twice"
    assert_same(supernet.weights, uninterrupted)
    assert not (tmp_path / CHECKPOINT).exists()
    assert_same(load_supernet(tmp_path).weights, uninterrupted)


SCRIPT = """
import dataclasses, json, pathlib, sys
import numpy as np, torch
from lowsearch.data import load_data
from lowsearch.train.distributed import launched_ranks
from lowsearch.train.supernet import SupernetPlan, train_supernet
data = load_data("fashion-mnist-mini")
data = dataclasses.replace(data, **{k: getattr(data, k).take(np.arange(n)) for k, n in (("train", 1500), ("val", 500), ("test", 20))})
plan = SupernetPlan.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
folder = pathlib.Path(sys.argv[2])
with launched_ranks("cpu") as ranks:
    supernet = train_supernet(plan, data, folder, ranks=ranks)
    if ranks.size > 1:
        torch.save({k: w.detach() for k, w in supernet.weights.items()}, folder / f"rank{ranks.rank}.pt")
"""


def test_training_survives_kill_9(images: ImageData, tmp_path: Path) -> None:
    plan = plan_of(images, steps=60)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "plan.json"), str(folder)])
    deadline = time.monotonic() + 120
    while not (folder / CHECKPOINT).exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / CHECKPOINT).exists() and not (folder / WEIGHTS).exists()
    steps: list[int] = []
    resumed = train_supernet(plan, images, folder, progress=lambda done, total, label: steps.append(done))
    assert steps[0] > 1
    assert_same(resumed.weights, train_supernet(plan, images, tmp_path / "through").weights)


def test_two_processes_train_what_the_sum_of_their_gradients_says(images: ImageData, tmp_path: Path) -> None:
    plan = plan_of(images, steps=3, processes=2)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    (tmp_path / "script.py").write_text(SCRIPT)
    folder = tmp_path / "pair"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path / "plan.json"), str(folder)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)

    class Beside(Ranks):
        """Half a pair: `sum` adds what the other half has computed."""

        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank
            self.other: list[Tensor] = []

        def sum(self, gradients: list[Tensor]) -> None:
            for mine, theirs in zip(gradients, self.other, strict=True):
                mine += theirs

    pair = [_Training(plan, images, None, device="cpu", ranks=Beside(rank)) for rank in (0, 1)]
    for _ in range(plan.steps):
        for training in pair:
            training.compute_gradients()
        shares = [[w.grad.clone() for w in t.supernet.weights.values() if w.grad is not None] for t in pair]
        for training, other in zip(pair, reversed(shares), strict=True):
            assert isinstance(training.ranks, Beside)
            training.ranks.other = other
            training.train_step()
            training.step += 1
    assert_same({key: weight.detach() for key, weight in pair[0].supernet.weights.items()}, first)
    assert_same(load_supernet(folder).weights, {key: weight for key, weight in pair[0].supernet.weights.items()})


OWN_FOLDERS = """
import contextlib, os, pathlib, sys
import torch
from lowsearch import cli
from lowsearch.train import distributed, supernet
with distributed.launched_ranks("cpu") as ranks:
    os.chdir(pathlib.Path(sys.argv[1]) / str(ranks.rank))
    distributed.launched_ranks = lambda device: contextlib.nullcontext(ranks)
    save, steps = supernet._Training.train_step, []
    supernet._Training.train_step = lambda training: (steps.append(training.step), save(training))
    for _ in range(2):  # The second time it is finished.
        assert cli.invoke(["supernet", "train", "--name", "n", "--json"]) == 0
    finished = supernet.load_supernet(pathlib.Path("supernets/n"), ranks=ranks)
    torch.save({"steps": steps, "weights": {k: w.detach() for k, w in finished.weights.items()}}, "found.pt")
"""


def test_processes_without_a_shared_folder_go_by_what_the_first_one_has(images: ImageData, tmp_path: Path) -> None:
    whole = load_data("fashion-mnist-mini")
    plan = plan_of(whole, steps=5, processes=2)
    own, other = (tmp_path / str(rank) / "supernets" / "n" for rank in (0, 1))
    (tmp_path / "script.py").write_text(OWN_FOLDERS)
    for folder, stored in ((own, plan), (other, plan_of(images, steps=9))):
        folder.mkdir(parents=True)
        (folder / PLAN).write_text(json.dumps(stored.to_dict()))
    begun = _Training(plan, whole, own, device="cpu", ranks=Ranks())
    for _ in range(2):
        begun.train_step()
        begun.step += 1
    begun._save()
    (other / WEIGHTS).write_bytes(b"of another supernet")

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "LOWSEARCH_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / str(rank) / "found.pt", weights_only=True) for rank in (0, 1))
    assert first["steps"] == second["steps"] == [2, 3, 4]
    assert_same(first["weights"], second["weights"])
    assert_same(first["weights"], load_supernet(own).weights)
    assert (other / WEIGHTS).read_bytes() == b"of another supernet"


def test_a_finished_supernet_is_read(images: ImageData, learned: Path) -> None:
    plan = read_plan(learned)
    assert plan is not None
    again = train_supernet(plan, images, learned, progress=lambda *_: pytest.fail("a step was trained"))
    assert_same(again.weights, load_supernet(learned).weights)


def test_a_budget_becomes_steps_by_the_time_of_a_few(images: ImageData) -> None:
    ticks = iter([10.0, 12.0])  # four steps in two seconds
    assert steps_within(100.0, plan_of(images), images, clock=lambda: next(ticks)) == 200


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 7}, {"n_random": 1}, {"processes": 2}, {"max_macs": 1e9}])
def test_another_plan_is_refused_and_the_supernet_stays(change: dict[str, Any], images: ImageData, learned: Path) -> None:
    stored = read_plan(learned)
    assert stored is not None
    with pytest.raises(StudyError, match=f"another {next(iter(change))}"):
        train_supernet(dataclasses.replace(stored, **change), images, learned)
    assert read_plan(learned) == stored
    assert dataclasses.replace(stored, **change).supernet_hash != stored.supernet_hash


def test_damaged_and_foreign_files_are_one_clear_error(images: ImageData, learned: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no supernet"):
        load_supernet(tmp_path)
    (tmp_path / PLAN).write_text('{"schema": 1}')
    with pytest.raises(StudyError, match="damaged"):
        read_plan(tmp_path)
    (tmp_path / PLAN).write_text(json.dumps(plan_of(images).to_dict()))
    (tmp_path / WEIGHTS).write_bytes((learned / WEIGHTS).read_bytes())
    with pytest.raises(StudyError, match="not of the plan"):
        load_supernet(tmp_path)
    with pytest.raises(DataError, match="other images"):
        train_supernet(plan_of(images, data_hash="x"), images, tmp_path / "new")


# --- statistics -------------------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_images(space: SearchSpace) -> None:
    arch = extremes(space)[0]
    model = Supernet(space, seed=0).subnet(arch)
    pixels = torch.randint(0, 256, (200, arch.resolution_px, arch.resolution_px, 3), dtype=torch.uint8)
    inputs: list[Tensor] = []
    stem = model.block("stem.conv")
    stem.norm.register_forward_hook(lambda module, args, output: inputs.append(args[0]))  # type: ignore[union-attr]
    estimate_statistics(model, pixels)
    assert not model.training
    norm: Any = stem.norm
    assert torch.allclose(norm.running_mean, inputs[0].mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, inputs[0].var((0, 2, 3)), rtol=1e-4)
    assert norm.momentum == 0.1, "a training goes on as usual"


def test_the_largest_with_estimated_statistics_scores_as_with_those_of_batches(images: ImageData, learned: Path) -> None:
    supernet = load_supernet(learned)
    largest, _ = extremes(supernet.space)
    with torch.no_grad():  # Nothing to BatchNorm with statistics of its input, everything to one with others.
        for key in ("stem.conv.conv.weight", "head.conv.weight"):
            weight = supernet.weights[key]
            weight.mul_(torch.logspace(0, 3, len(weight)).view(-1, 1, 1, 1))
    estimated, *_ = validate(inherit(supernet, largest, images), images, largest.resolution_px)
    with torch.no_grad():
        logits = supernet.logits(largest, network_input(images.val.images, largest.resolution_px))
    by_batch = float((logits.argmax(1).numpy() == images.val.labels).mean())
    assert by_batch > 0.35, "it has learned"
    assert abs(estimated - by_batch) < 0.03
    unestimated, *_ = validate(supernet.subnet(largest), images, largest.resolution_px)
    assert unestimated < by_batch - 0.1, "fresh statistics would not do"


def test_validation_is_the_mean_over_images_and_its_standard_error(images: ImageData, learned: Path) -> None:
    supernet = load_supernet(learned)
    arch = extremes(supernet.space)[1]
    model = inherit(supernet, arch, images)
    accuracy, loss, loss_std = validate(model, images, arch.resolution_px)
    with torch.no_grad():
        logits = model(network_input(images.val.images, arch.resolution_px))
    labels = torch.from_numpy(images.val.labels)
    each = F.cross_entropy(logits, labels, reduction="none").double()
    assert accuracy == evaluate(model, images.val, arch.resolution_px)
    assert np.isclose(loss, each.mean(), rtol=1e-5) and np.isclose(loss_std, each.std() / np.sqrt(len(each)), rtol=1e-2)


# --- scores -----------------------------------------------------------------------------------------------------------------------


def record(arch: Arch, accuracy: float, images: ImageData, **changes: Any) -> AccuracyRecord:
    point = CurvePoint(fraction=1.0, step=1, train_loss=1.0, val_accuracy=accuracy, val_loss=1.0, cpu_seconds=1.0)
    values: dict[str, Any] = {"recipe": "r", "recipe_hash": "r", "data": "d", "data_hash": images.data_hash, "seed": 0, "rung": 1.0}
    return AccuracyRecord(arch=arch, curve=(point,), **{**values, **changes})


@pytest.fixture
def archs(space: SearchSpace) -> list[Arch]:
    genomes = np.unique(space.sample(30, rng=np.random.default_rng(7)), axis=0)
    return [space.decode(genome) for genome in genomes[:10]]


def test_scores_are_those_of_the_networks_and_are_computed_once(
    images: ImageData, learned: Path, archs: list[Arch], monkeypatch: pytest.MonkeyPatch
) -> None:
    (learned / SCORES).unlink(missing_ok=True)
    estimator = SupernetEstimator(learned, images)
    scores = estimator.score(archs[:3])
    assert [score.arch for score in scores] == archs[:3]
    expected = validate(inherit(estimator.supernet, archs[1], images), images, archs[1].resolution_px)
    assert (scores[1].val_accuracy, scores[1].val_loss, scores[1].val_loss_std) == expected
    with (learned / SCORES).open("a") as file:
        file.write('{"torn')
    monkeypatch.setattr(scoring, "inherit", lambda *_, **__: pytest.fail("computed again"))
    again = SupernetEstimator(learned, images)
    assert again.score(archs[:3]) == scores
    monkeypatch.undo()
    again.score(archs[:4])
    assert len((learned / SCORES).read_text().splitlines()) == 4
    assert SupernetEstimator(learned, images).score(archs[:4])[:3] == scores
    (learned / SCORES).write_text("{}\n")
    with pytest.raises(StudyError, match="line 1"):
        SupernetEstimator(learned, images)
    (learned / SCORES).unlink()


def test_scores_are_ranks_until_trained_networks_calibrate_them(
    images: ImageData, learned: Path, archs: list[Arch], space: SearchSpace
) -> None:
    estimator = SupernetEstimator(learned, images)
    genomes = np.array([space.encode(arch) for arch in archs])
    mean, std = estimator.predict(genomes)
    assert estimator.unit == "rank"
    scores = estimator.score(archs)
    assert mean.tolist() == [-score.val_loss for score in scores] and std.tolist() == [score.val_loss_std for score in scores]
    said = scores_of(estimator, genomes)
    assert (said.source, said.unit) == ("supernet", "rank") and said.std is not None and said.mean.tolist() == mean.tolist()
    trained = 0.9 + 0.1 * np.array([score.val_accuracy for score in scores])
    estimator.calibrate([record(arch, accuracy, images) for arch, accuracy in zip(archs[:8], trained[:8], strict=True)])
    assert estimator.unit == scores_of(estimator, genomes).unit == "top1"
    estimates, spread = estimator.predict(genomes)
    assert np.all(np.abs(estimates - trained) < 3 * spread) and np.all(spread < 0.05)
    assert np.abs(estimates - trained).max() < 0.02


def test_calibration_learns_what_inherited_scores_leave_out() -> None:
    """In a made world large networks inherit worse than they train, and one choice of the architecture is not seen in the loss at all."""
    micro, rng = SearchSpace.load("lowformer-micro"), np.random.default_rng(0)
    coordinates, fused = Coordinates(micro), [gene.name for gene in micro.genes].index("stage4.down_fused")
    held, raw, fitted = [], [], []
    for _ in range(20):
        genomes = np.unique(micro.sample(100, rng=rng), axis=0)
        rng.shuffle(genomes)
        larger, quality = coordinates(genomes).cost[:, 0], rng.normal(0, 1, len(genomes))
        accuracy = 0.5 + 0.012 * larger + 0.012 * quality + 0.02 * (genomes[:, fused] == 0) + rng.normal(0, 0.004, len(genomes))
        losses = 2 + 0.015 * larger - 0.03 * quality + rng.normal(0, 0.01, len(genomes))
        calibration = Calibration(coordinates, genomes[:32], losses[:32], accuracy[:32], np.full(32, 0.007**2))
        mean, std = calibration.predict(genomes[32:], losses[32:])
        held.append(np.mean(np.abs(mean - accuracy[32:]) < 1.645 * std))
        raw.append(spearman(-losses[32:], accuracy[32:]))
        fitted.append(spearman(mean, accuracy[32:]))
    assert np.mean(fitted) > np.mean(raw) + 0.2 and np.mean(fitted) > 0.8  # type: ignore[operator]
    assert 0.82 < np.mean(held) < 0.995


def test_what_cannot_calibrate_is_refused(images: ImageData, learned: Path, archs: list[Arch]) -> None:
    estimator = SupernetEstimator(learned, images)
    with pytest.raises(UsageError, match="4 fully trained networks"):
        estimator.calibrate([*(record(arch, 0.8, images) for arch in archs[:4]), record(archs[4], 0.8, images, rung=0.5)])
    with pytest.raises(UsageError, match="several recipes"):
        estimator.calibrate([record(arch, 0.8, images, recipe_hash=str(i)) for i, arch in enumerate(archs)])
    with pytest.raises(DataError, match="other images"):
        estimator.calibrate([record(arch, 0.8, images, data_hash="other") for arch in archs])
    assert estimator.unit == "rank"


def test_what_the_supernet_was_not_trained_for_is_refused(images: ImageData, learned: Path, space: SearchSpace, tmp_path: Path) -> None:
    largest, smallest = extremes(space)
    with pytest.raises(NotInSpaceError):
        SupernetEstimator(learned, images).score([dataclasses.replace(smallest, head_widths=(8, 8))])
    limit = float(cost.count(largest).macs - 1)
    train_supernet(plan_of(images, steps=1, max_macs=limit), images, tmp_path)
    limited = SupernetEstimator(tmp_path, images)
    assert limited.holds(smallest) and not limited.holds(largest)
    with pytest.raises(StudyError, match="was trained up to"):
        limited.score([largest])
    with pytest.raises(DataError, match="was trained on"):
        SupernetEstimator(learned, dataclasses.replace(images, test=images.test.take(np.arange(10))))


# --- command line -----------------------------------------------------------------------------------------------------------------


def test_the_verbs_train_resume_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.yaml").write_text(TINY)
    train = ["supernet", "train", "--name", "n", "--json"]
    assert cli.invoke([*train, "--space", "tiny.yaml", "--steps", "2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["steps"] == 2 and (tmp_path / "supernets" / "n" / WEIGHTS).is_file()
    assert cli.invoke(train) == 0, "what was not typed is as it was"
    assert json.loads(capsys.readouterr().out) == made

    space = SearchSpace.from_yaml(TINY).with_num_classes(10)
    paths = []
    for number, genome in enumerate(space.sample(6, rng=np.random.default_rng(0))):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(space.decode(genome).to_json())
    score = ["supernet", "score", "n", "--json", *(word for path in paths for word in ("--arch", path.name))]
    assert cli.invoke(score) == 0
    ranks = json.loads(capsys.readouterr().out)
    assert ranks["unit"] == "rank" and len(ranks["networks"]) == 6
    whole = load_data("fashion-mnist-mini")
    lines = [json.dumps(record(Arch.from_json(path.read_text()), 0.5 + i / 50, whole).to_dict()) for i, path in enumerate(paths)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.invoke([*score, "--calibrate", "records.jsonl"]) == 0
    top1 = json.loads(capsys.readouterr().out)
    assert top1["unit"] == "top1" and all(0.3 < row["estimate"] < 0.9 and row["estimate_std"] > 0 for row in top1["networks"])

    warm = ["train", "0.json", "--recipe-set", "train_images=128", "--epochs", "1", "--json"]
    assert cli.invoke([*warm, "--from-supernet", "n"]) == 0
    started = json.loads(capsys.readouterr().out)
    expected = inherit(load_supernet(tmp_path / "supernets" / "n"), Arch.from_json(paths[0].read_text()), whole).state_dict()
    assert started["init"] == hash_of_init(expected) and started["origin"]["source"] == "supernet-n"
    assert cli.invoke(warm) == 0
    cold = json.loads(capsys.readouterr().out)
    assert cold["init"] is None and cold["folder"] != started["folder"]
    assert cli.invoke([*warm, "--from-supernet", "n", "--out", cold["folder"]]) == 2
    assert "holds a training with init None" in capsys.readouterr().err

    macs = sorted((cost.count(Arch.from_json(path.read_text())).macs, path.name) for path in paths)
    limit = f"{(macs[2][0] + macs[3][0]) / 2}"
    assert cli.invoke(["supernet", "train", "--name", "s", "--json", "--space", "tiny.yaml", "--steps", "1", "--max-macs", limit]) == 0
    assert cli.invoke(["train", macs[2][1], *warm[2:], "--from-supernet", "s"]) == 0
    capsys.readouterr()

    for arguments, what in (
        (["train", macs[3][1], *warm[2:], "--from-supernet", "s"], "'s' was trained up to"),
        (["train", "0.json", "--from-supernet", "n", "--init", "pretrained"], "not from both"),
        (["train", "lowformer_b0", "--from-supernet", "n"], "space 'tiny' offers"),
        (["supernet", "score", "n"], "no network was named"),
        (["supernet", "score", "other", "--arch", "x.json"], "no supernet 'other'; hint: known: n, s"),
        (["supernet", "score", "n", "--arch", "0.json", "--calibrate", "missing.jsonl"], "there is no missing.jsonl"),
        (["supernet", "train", "--name", "n", "--steps", "3"], "made with another steps"),
        (["supernet", "train", "--name", "../n"], "no folder name"),
        (["supernet", "train", "--budget", "soon"], "not a duration"),
    ):
        assert cli.invoke(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.strip().splitlines()) == 1 and what in printed.err
