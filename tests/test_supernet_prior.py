"""A search by what networks inherit from a supernet: the regression ranks what it was not shown, and a study is made of it."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import made_knowledge
import numpy as np
import pytest
import yaml

from lowsearch import cli, cost
from lowsearch.accuracy import supernet_prior
from lowsearch.accuracy.agreement import spearman
from lowsearch.accuracy.supernet import InheritedScore, SupernetEstimator
from lowsearch.accuracy.supernet_prior import ScoredNetworks, SupernetPrior
from lowsearch.data import load_data
from lowsearch.errors import StudyError, UsageError
from lowsearch.space import SearchSpace
from lowsearch.study.parts import INHERITED_FILE, stand_in_of
from lowsearch.study.settings import StudySettings

TESTS = Path(__file__).parent
MICRO = SearchSpace.load("lowformer-micro").with_num_classes(10)


def loss_of(arch) -> float:
    """Falls with log MACs, less and less, and rises with depth."""
    return 3 - 0.4 * math.log10(cost.count(arch).macs / 1e4) + 0.05 * sum(stage.depth for stage in arch.stages)


def scored(space: SearchSpace, n: int, *, seed: int = 0) -> ScoredNetworks:
    archs = [space.decode(genome) for genome in space.sample(n, rng=np.random.default_rng(seed))]
    scores = tuple(InheritedScore(arch=arch, val_accuracy=0.3, val_loss=loss_of(arch), val_loss_std=0.01) for arch in archs)
    return ScoredNetworks(name="n", supernet_hash="h", data="d", num_classes=10, max_macs=None, scores=scores)


def test_the_regression_ranks_networks_that_it_was_not_shown(tmp_path: Path) -> None:
    scored(MICRO, 80).write(tmp_path / INHERITED_FILE)
    prior = stand_in_of(StudySettings(accuracy="supernet:n"), MICRO, tmp_path)
    assert isinstance(prior, SupernetPrior) and (prior.unit, prior.source) == ("rank", StudySettings(accuracy="supernet:n").stand_in)
    others = MICRO.sample(100, rng=np.random.default_rng(1))
    truth = np.array([-loss_of(MICRO.decode(genome)) for genome in others])
    for mean, std in (prior.predict(others), prior.predict_exact(others)):
        assert (spearman(mean, truth) or 0) > 0.9 and (std > 0).all()
        assert np.mean(np.abs(mean - truth) < 3 * std) > 0.9
    more, _ = prior.changes(others[0], others)
    assert (spearman(more, truth - truth[0]) or 0) > 0.9
    far = dataclasses.replace(prior.known, scores=tuple(dataclasses.replace(s, val_loss=9 + s.val_loss / 50) for s in prior.known.scores))
    shifted = SupernetPrior(MICRO, far).predict_exact(others)[0]
    assert np.allclose(50 * (shifted + 9), prior.predict_exact(others)[0], atol=1e-3), "the scale of losses does not matter"
    examined = prior.examined()
    assert examined["left out"].n_networks == len(prior.known.scores)
    assert (examined["left out"].spearman or 0) > 0.9


def test_scores_come_back_from_their_file_and_damage_is_told(tmp_path: Path) -> None:
    path, made = tmp_path / INHERITED_FILE, scored(MICRO, 5)
    made.write(path)
    assert ScoredNetworks.read(path) == made
    for content in ("", "[]", path.read_text().replace('"val_loss"', '"loss"'), path.read_text().replace('"schema": 1', '"schema": 2')):
        path.write_text(content)
        with pytest.raises(StudyError, match="does not hold a supernet's scores"):
            ScoredNetworks.read(path)
    with pytest.raises(StudyError, match="does not hold a supernet's scores"):
        ScoredNetworks.read(tmp_path / "absent.json")


@pytest.mark.parametrize("accuracy", ["supernet", "supernet:", "supernets:n", "best"])
def test_what_names_no_score_is_refused(accuracy: str) -> None:
    with pytest.raises(UsageError, match=r"known: trained, params, macs, published, supernet:NAME"):
        StudySettings(accuracy=accuracy)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SearchSpace:
    """The space of tiny.yaml, which lies in the current folder with a latency table of `some-board`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.yaml").write_text((TESTS / "tiny_space.yaml").read_text())
    space = SearchSpace.load("tiny.yaml").with_num_classes(10)
    made_knowledge.table_of(space).save(tmp_path / "latency_tables")
    return space


def test_a_search_by_a_supernet_from_the_command_line_to_the_page(
    tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supernet_prior, "N_SCORED", 60)
    upto = float(np.median([cost.count(tiny.decode(genome)).macs for genome in tiny.sample(200, rng=np.random.default_rng(0))]))
    train = ["supernet", "train", "--name", "n", "--space", "tiny.yaml", "--steps", "4", "--max-macs", str(upto)]
    assert cli.invoke(train) == 0
    of_macs = {}

    def scores(self: SupernetEstimator, archs, *, progress=None):
        """What a supernet of few steps cannot teach: scores that the architecture decides."""
        assert all(self.holds(arch) for arch in archs)
        of_macs.update({arch.arch_id: cost.count(arch).macs for arch in archs})
        return [InheritedScore(arch=arch, val_accuracy=0.3, val_loss=loss_of(arch), val_loss_std=0.01) for arch in archs]

    monkeypatch.setattr(SupernetEstimator, "score", scores)
    again = ["run", "--device", "some-board", "--study", "inherited", "--json"]
    new = ["--space", "tiny.yaml", "--accuracy", "supernet:n", "--workers", "1", "--trials", "8"]
    capsys.readouterr()
    assert cli.invoke([*again, *new]) == 0
    found = json.loads(capsys.readouterr().out)
    study = tmp_path / "studies" / "inherited"
    assert found["front"] and all((row["accuracy_source"], row["accuracy_unit"]) == ("supernet", "rank") for row in found["front"])
    assert all(row["macs"] <= upto for row in found["front"]), "the supernet knows no larger ones"
    values = yaml.safe_load((study / "study.yaml").read_text())
    assert values["settings"]["data"] == load_data("fashion-mnist-mini").name
    assert values["settings"]["limits"]["max"] == [f"macs={upto!r}"]
    assert values["supernet"]["n_networks"] == len(of_macs) and values["supernet"]["spearman"] > 0.5
    page = (study / "report.html").read_text()
    assert "Nothing was trained: scores of a supernet stand in for accuracy. They were learned from what" in page
    with (study / "candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["val_accuracy"] for row in rows} == {""}

    assert cli.invoke(["run", "--device", "some-board", "--study", "second", "--seed", "1", *new]) == 0
    shutil.rmtree(tmp_path / "supernets")
    assert cli.invoke(["study", "merge", "inherited", "second", "--study", "both"]) == 0
    assert (tmp_path / "studies" / "both" / INHERITED_FILE).read_text() == (study / INHERITED_FILE).read_text()
    assert cli.invoke(["explain", "--study", "both", "--arch", found["front"][0]["arch_id"]]) == 0
    other = yaml.safe_load((study.parent / "second" / "study.yaml").read_text())
    other["supernet"]["supernet_hash"] = "another"
    (study.parent / "second" / "study.yaml").write_text(yaml.safe_dump(other))
    assert cli.invoke(["study", "merge", "inherited", "second", "--study", "mixed"]) == 2
    assert "the hash of the supernet is" in capsys.readouterr().err
    assert cli.invoke([*again, "--trials", "10"]) == 0, "a study has kept what it needs of its supernet"
    assert len(json.loads(capsys.readouterr().out)["front"]) > 0
    assert cli.invoke(["explain", "--study", "inherited", "--arch", found["front"][0]["arch_id"]]) == 0
    assert "(supernet)" in capsys.readouterr().out
    assert cli.invoke(["run", "--device", "some-board", "--study", "other", *new]) == 2
    assert "no supernet 'n'" in capsys.readouterr().err


def test_a_supernet_of_another_space_and_one_that_says_nothing_are_refused(
    tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supernet_prior, "N_SCORED", 12)
    assert cli.invoke(["supernet", "train", "--name", "n", "--space", "tiny.yaml", "--steps", "1"]) == 0
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        SupernetEstimator,
        "score",
        lambda self, archs, progress=None: [
            InheritedScore(arch=arch, val_accuracy=0.1, val_loss=2.3 + 0.1 * rng.normal(), val_loss_std=0.01) for arch in archs
        ],
    )
    run = ["run", "--device", "some-board", "--trials", "2", "--accuracy", "supernet:n"]
    assert cli.invoke([*run, "--space", "lowformer-micro"]) == 2
    assert "is of space 'tiny'" in capsys.readouterr().err
    assert cli.invoke([*run, "--space", "tiny.yaml"]) == 2
    assert "cannot be told from chance by their architecture" in capsys.readouterr().err
