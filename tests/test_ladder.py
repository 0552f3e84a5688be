"""The ladder: rungs continue one training, records are never trained again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_images import few_images

from lowsearch.accuracy.ladder import Ladder
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.arch import Arch, Stage, Stem
from lowsearch.data import ImageData
from lowsearch.errors import UsageError
from lowsearch.train import Recipe, train

BRIEF = Recipe(name="brief", epochs=2, train_images=96, batch_size=24)
THREE: dict[str, Any] = {"rungs": (0.25, 0.5, 1.0)}
ARCH = Arch(
    resolution_px=32, stem=Stem(width=4), stages=(Stage(width=8, down_expansion=2),) * 4, head_widths=(16, 16), num_classes=10  # pyright: ignore[reportArgumentType]
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


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
