"""The ladder: rungs continue one training, records are never trained again."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_images import few_images

from lowsearch.accuracy.ladder import TRAINED_TWICE, Ladder, climb
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.arch import Arch, Stage, Stem
from lowsearch.data import ImageData
from lowsearch.errors import UsageError
from lowsearch.train import Recipe, Rung, train
from lowsearch.train.checkpoint import load_tensors

BRIEF = Recipe(name="brief", epochs=2, train_images=96, batch_size=24)
THREE: dict[str, Any] = {"rungs": (0.25, 0.5, 1.0)}
ARCH = Arch(
    resolution_px=32, stem=Stem(width=4), stages=(Stage(width=8, down_expansion=2),) * 4, head_widths=(16, 16), num_classes=10  # pyright: ignore[reportArgumentType]
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> ImageData:
    return few_images(train=96, val=60, test=10)


def losses(record: AccuracyRecord) -> list[tuple[float, float, float]]:
    return [(p.fraction, p.val_accuracy, p.val_loss) for p in record.curve]


def test_climbing_gives_the_record_of_training_at_once(images: ImageData, tmp_path: Path) -> None:
    climbing = Ladder(images, BRIEF, **THREE, folder=tmp_path / "a")
    low, middle, top = (climbing.run(ARCH, rung) for rung in climbing.rungs)
    assert losses(low) == losses(top)[:1] and losses(middle) == losses(top)[:2] and len(top.curve) == 3
    assert low.cpu_seconds < middle.cpu_seconds < top.cpu_seconds
    at_once = Ladder(images, BRIEF, **THREE, folder=tmp_path / "b").run(ARCH, 1.0)
    assert losses(at_once) == losses(top)
    direct = train(ARCH, images, BRIEF, seed=0)
    assert [p.val_loss for p in direct.curve] == [p.val_loss for p in top.curve]


def test_recorded_rung_is_not_trained_again_not_even_by_another_process(images: ImageData, tmp_path: Path) -> None:
    first = Ladder(images, BRIEF, **THREE, folder=tmp_path).run(ARCH, 0.25)
    later = Ladder(images, BRIEF, **THREE, folder=tmp_path)
    assert later.run(ARCH, 0.25, progress=lambda done: pytest.fail("a step was trained")) == first
    assert later.reached(ARCH) == 0.25
    steps: list[float] = []
    later.run(ARCH, 0.5, progress=steps.append)
    assert steps == [0.375, 0.5]


def test_a_rung_that_was_trained_twice_is_recorded_once_and_told(images: ImageData, tmp_path: Path, caplog: Any) -> None:
    ladder, other = (Ladder(images, BRIEF, **THREE, folder=tmp_path) for _ in range(2))
    order = ladder.order(ARCH, 0.25)
    found = order.function(order.shared, **order.values)
    order.accept(found)
    assert not caplog.messages
    other.order(ARCH, 0.25).accept(found)
    assert [message.startswith(f"{TRAINED_TWICE} {ARCH.arch_id} to 0.25") for message in caplog.messages] == [True]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 1


def test_training_killed_between_checkpoint_and_record_is_recorded_from_the_checkpoint(images: ImageData, tmp_path: Path) -> None:
    ladder = Ladder(images, BRIEF, **THREE, folder=tmp_path)
    train(ARCH, images, BRIEF, seed=0, until=0.5, checkpoint=ladder.checkpoint(ARCH))
    record = ladder.run(ARCH, 0.25, progress=lambda done: pytest.fail("a step was trained"))
    assert record.rung == 0.25 and [p.fraction for p in record.curve] == [0.25]


def test_other_seed_recipe_or_data_is_another_training(images: ImageData, tmp_path: Path) -> None:
    Ladder(images, BRIEF, **THREE, folder=tmp_path).run(ARCH, 0.25)
    fewer = dataclasses.replace(images, val=images.val.take(np.arange(50)))
    for other in (
        Ladder(images, BRIEF, **THREE, folder=tmp_path, seed=1),
        Ladder(images, dataclasses.replace(BRIEF, learning_rate=0.01), **THREE, folder=tmp_path),
        Ladder(fewer, BRIEF, **THREE, folder=tmp_path / "other data"),
    ):
        assert other.record(ARCH, 0.25) is None
        other.run(ARCH, 0.25)
    assert len(Ladder(images, BRIEF, **THREE, folder=tmp_path).records) == 3


def test_discarded_network_keeps_its_records_and_can_start_again(images: ImageData, tmp_path: Path) -> None:
    ladder = Ladder(images, BRIEF, **THREE, folder=tmp_path)
    low = ladder.run(ARCH, 0.25)
    ladder.discard(ARCH)
    assert not ladder.checkpoint(ARCH).exists() and ladder.run(ARCH, 0.25) == low
    assert losses(ladder.run(ARCH, 0.5))[0] == losses(low)[0]


def test_record_says_what_made_it(images: ImageData, tmp_path: Path) -> None:
    ladder = Ladder(images, BRIEF, **THREE, folder=tmp_path, seed=3)
    ladder.run(ARCH, 0.25)
    values = json.loads((tmp_path / "records.jsonl").read_text())
    assert values["recipe"] == "brief" and values["recipe_hash"] == BRIEF.recipe_hash and values["data_hash"] == images.data_hash
    assert values["seed"] == 3 and values["versions"]["torch"] == torch.__version__.split("+")[0] and values["cpu_seconds"] > 0
    assert Arch.from_dict(values["arch"]) == ARCH and not values["diverged"]


# --- rungs apart ------------------------------------------------------------------------------------------------------------------

CHEAP: dict[str, Any] = {"rungs": ("0.5@0.5px", "1@0.5img", 0.75, 1.0)}
AT_64 = dataclasses.replace(ARCH, resolution_px=64)
MIXED = dataclasses.replace(BRIEF, epochs=4, shift=0.1, ema_decay=0.9, mixup=0.2, evaluate_at=(0.25, 0.75, 1.0))


def points(record: AccuracyRecord) -> list[tuple[int, float, float, float]]:
    return [(p.step, p.train_loss, p.val_accuracy, p.val_loss) for p in record.curve]


@pytest.mark.parametrize(
    ("rung", "network", "recipe"),
    [
        ("0.5@0.5px", ARCH, dataclasses.replace(MIXED, epochs=2)),
        ("1@0.5img", AT_64, dataclasses.replace(MIXED, train_images=48)),
        ("0.25@0.5px@0.75img", ARCH, dataclasses.replace(MIXED, epochs=1, train_images=72)),
    ],
)
def test_a_rung_apart_is_the_whole_training_of_a_smaller_recipe(
    rung: str, network: Arch, recipe: Recipe, images: ImageData, tmp_path: Path
) -> None:
    record = Ladder(images, MIXED, folder=tmp_path, rungs=[Rung.of(rung), 1.0]).run(AT_64, Rung.of(rung))
    expected = train(network, images, dataclasses.replace(recipe, evaluate_at=(1.0,)), seed=0)
    assert points(record) == [(p.step, p.train_loss, p.val_accuracy, p.val_loss) for p in expected.curve]
    assert record.arch == AT_64 and record.recipe_hash == MIXED.recipe_hash and str(record.rung) == rung
    assert [p.fraction for p in record.curve] == [float(Rung.of(rung))]


def test_rungs_apart_leave_the_others_as_they_are_bit_for_bit(images: ImageData, tmp_path: Path) -> None:
    plain = Ladder(images, MIXED, folder=tmp_path / "a", rungs=(0.75, 1.0))
    mixed = Ladder(images, MIXED, folder=tmp_path / "b", rungs=[Rung.of(rung) for rung in CHEAP["rungs"]])
    records = [mixed.run(AT_64, rung) for rung in mixed.rungs]
    assert [points(record) for record in records[2:]] == [points(plain.run(AT_64, rung)) for rung in plain.rungs]
    ours, theirs = (load_tensors(ladder.checkpoint(AT_64))[0] for ladder in (mixed, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in (tmp_path / "b" / "checkpoints").glob("*.safetensors")] == [mixed.checkpoint(AT_64).name]
    again = Ladder(images, MIXED, folder=tmp_path / "b", rungs=[Rung.of(rung) for rung in CHEAP["rungs"]])
    assert [again.run(AT_64, rung, progress=lambda done: pytest.fail("a step was trained")) for rung in again.rungs] == records
    assert again.reached(AT_64) == 1.0 and {record.rung for record in again.records} == set(again.rungs)
    lines = [json.loads(line) for line in (tmp_path / "b" / "records.jsonl").read_text().splitlines()]
    assert [line["rung"] for line in lines] == ["0.5@0.5px", "1@0.5img", 0.75, 1.0] and {line["schema"] for line in lines} == {1}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_step", range(1, 9))
def test_a_rung_apart_interrupted_at_any_step_ends_bit_identical(at_step: int, images: ImageData, tmp_path: Path) -> None:
    rung, steps = Rung.of("0.5@0.5px"), []

    def kill(done: float) -> None:
        steps.append(done)
        if len(steps) == at_step:
            raise Killed

    ladder = Ladder(images, MIXED, folder=tmp_path / "killed", rungs=[rung, 1.0])
    with pytest.raises(Killed):
        ladder.run(AT_64, rung, progress=kill)
    assert len(ladder.records) == 0 and ladder.checkpoint(AT_64, rung).exists() and not ladder.checkpoint(AT_64).exists()
    resumed = ladder.run(AT_64, rung)
    assert points(resumed) == points(Ladder(images, MIXED, folder=tmp_path / "through", rungs=[rung, 1.0]).run(AT_64, rung))
    assert not list((tmp_path / "killed" / "checkpoints").iterdir())
    assert steps == pytest.approx([float(rung) * (i + 1) / 8 for i in range(at_step)])


def test_another_machine_climbs_the_same_rungs(images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here, there = (Ladder(images, MIXED, folder=tmp_path / name, rungs=[Rung.of(rung) for rung in CHEAP["rungs"]]) for name in "ab")
    for rung in here.rungs:
        order = there.order(AT_64, rung)
        assert order.function is climb
        record = order.accept(climb(order.shared, **pickle.loads(pickle.dumps(order.values))))
        assert points(record) == points(here.run(AT_64, rung)) and record == there.record(AT_64, rung)
    assert len({there.order(AT_64, rung).name for rung in there.rungs}) == 3


def test_a_rung_with_fewer_images_than_classes_is_refused(images: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fewer than the 10 classes"):
        Ladder(images, BRIEF, folder=tmp_path, rungs=[Rung.of("1@0.09img"), 1.0])


# --- faults -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rungs", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0), (0.5, 1.5)])
def test_impossible_rungs_are_refused(rungs: tuple[float, ...], images: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rungs are"):
        Ladder(images, BRIEF, folder=tmp_path, rungs=rungs)


def test_unknown_rung_is_refused(images: ImageData, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rung is 0.3"):
        Ladder(images, BRIEF, **THREE, folder=tmp_path).run(ARCH, 0.3)


def test_held_out_trainings_are_recorded_apart(images: ImageData, tmp_path: Path) -> None:
    held_out = Ladder(images, BRIEF, folder=tmp_path, rungs=(1.0,), seed=5, records="trust.jsonl")
    record = held_out.run(ARCH, 1.0)
    assert not (tmp_path / "records.jsonl").exists() and len(Ladder(images, BRIEF, folder=tmp_path).records) == 0
    assert Ladder(images, BRIEF, folder=tmp_path, rungs=(1.0,), seed=5, records="trust.jsonl").record(ARCH, 1.0) == record
