"""Studies whose first rung is a cheap training apart: resumed exactly, and from the command line to the page."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import made_knowledge
import numpy as np
import pytest
from few_images import few_images
from tiny_fakes import TESTS, fakes

from lowsearch import cli
from lowsearch.accuracy.ladder import Ladder
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.data import ImageData
from lowsearch.space import SearchSpace
from lowsearch.study.settings import StudySettings
from lowsearch.study.workers.conductor import Conductor
from lowsearch.study.workers.worker import SearchWorker
from lowsearch.train import Recipe, Rung, rungs_of

BRIEF = Recipe(name="brief", epochs=2, train_images=96, batch_size=24, evaluate_at=(1.0,))
RUNGS = "1@0.5px,0.5,1"
SETTINGS: dict[str, Any] = {"trials": 5, "workers": 1, "rungs": RUNGS}


@pytest.fixture(scope="module")
def images() -> ImageData:
    return few_images(train=96, val=60, test=10)


@pytest.fixture
def searched(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search of tiny networks, with latencies in closed form and real trainings; none but the family is trained to the end unasked."""
    made = fakes.make_parts

    def parts(folder: Path, settings: StudySettings) -> Any:
        def training() -> Ladder:
            return Ladder(images, BRIEF, folder=folder, rungs=rungs_of(settings.rungs), seed=settings.seed)

        def records() -> list[Any]:
            return sorted(AccuracyRecords(folder / "records.jsonl"), key=lambda record: (record.arch_id, record.rung))

        def fit(found: Any) -> Any:
            return AccuracyPredictor(fakes.SPACE).fit(found) if found else None

        return dataclasses.replace(made(folder, settings), training=training, records=records, fit=fit)

    monkeypatch.setattr(fakes, "make_parts", parts)
    monkeypatch.setattr(fakes.workers, "START", 0)
    return fakes.search


def lines(folder: Path) -> list[tuple[str, str, float]]:
    return sorted((record.arch_id, str(record.rung), record.curve[-1].val_loss) for record in AccuracyRecords(folder / "records.jsonl"))


@pytest.mark.parametrize("kind", [SearchWorker, lambda *args, **kwargs: Conductor(*args, engine=None, **kwargs)])
def test_an_interrupted_search_ends_as_one_that_ran_through(kind: Any, searched: Any, tmp_path: Path, monkeypatch: Any) -> None:
    settings = StudySettings(**SETTINGS)
    through = searched(tmp_path / "through", settings, kind=kind)
    stopped = [c for c in through if c.rung < 1]
    assert stopped and all(c.why.split("stopped at ")[1].startswith("1@0.5px:") for c in stopped if c.rung == 0.25)
    assert all(c.rung == 1 for c in through if c.origin == "family") and {c.rung for c in through} <= {0.25, 0.5, 1.0}
    for at, after in ((2, False), (5, True)):
        folder = tmp_path / f"killed-{at}"
        with monkeypatch.context() as patched:
            patched.setattr(Ladder, "run", fakes.Interrupting(Ladder.run, at, after=after))
            with pytest.raises(fakes.Death):
                searched(folder, settings, kind=kind)
        assert fakes.essence(searched(folder, settings, kind=kind)) == fakes.essence(through)
        assert lines(folder) == lines(tmp_path / "through")


@pytest.mark.usefixtures("only_own_tables")
def test_a_run_with_a_cheap_rung_from_the_command_line_to_the_page(
    images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.yaml").write_text((TESTS / "tiny_space.yaml").read_text())
    made_knowledge.table_of(SearchSpace.load("tiny.yaml")).save(tmp_path / "latency_tables")
    splits = {"train": images.train, "val": images.val, "test": images.test}
    arrays = {f"{axis}_{name}": getattr(split, what) for name, split in splits.items() for axis, what in (("x", "images"), ("y", "labels"))}
    np.savez(tmp_path / "few.npz", **arrays)
    again = ["run", "--device", "some-board", "--space", "tiny.yaml", "--study", "cheap", "--json"]
    recipe = [word for field in ("epochs=1", "train_images=64", "batch_size=32") for word in ("--recipe-set", field)]
    new = ["--data", "npz:few.npz", "--workers", "1", "--trials", "2", *recipe]
    assert cli.invoke([*again, *new, "--rungs", "1@0.5px,1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["front"] and found["summary"]["ladder"]["pairs"] >= 2

    study = tmp_path / "studies" / "cheap"
    records = AccuracyRecords(study / "records.jsonl")
    by_rung = {str(rung): {r.arch_id for r in records if r.rung == rung} for rung in rungs_of("1@0.5px,1")}
    assert by_rung["1"] and by_rung["1"] <= by_rung["1@0.5px"] and len(by_rung["1@0.5px"]) == 4
    with (study / "candidates.csv").open(newline="") as file:
        rows = {row["arch_id"]: float(row["rung"]) for row in csv.DictReader(file)}
    assert rows == {arch_id: 1.0 if arch_id in by_rung["1"] else float(Rung.of("1@0.5px")) for arch_id in by_rung["1@0.5px"]}
    assert "rungs 1@0.5px,1" in (study / "report.html").read_text()

    assert cli.invoke([*again, "--trials", "3"]) == 0, "its rungs are its own"
    capsys.readouterr()
    assert len({r.arch_id for r in AccuracyRecords(study / "records.jsonl")}) == 5
    assert cli.invoke([*again, "--rungs", "0.5,1"]) == 2
    assert "was made with rungs 1@0.5px,1, not 0.5,1" in capsys.readouterr().err
