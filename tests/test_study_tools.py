"""Studies as values: listed, shown, exported whole, and compared by closed-form hypervolumes and brute-force dominance."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from lowsearch import cli
from lowsearch.arch import Arch
from lowsearch.errors import StudyError, UsageError
from lowsearch.report import study_tools
from lowsearch.report.study_files import read_study

EXAMPLE = Path(__file__).parent.parent / "studies" / "example"
SETTINGS = {
    "schema": "lowsearch-study", "version": 1, "objective": "acc-latency", "device": "board", "data_hash": "d", "recipe": "micro",
    "reference_point": {"accuracy": 0.1, "latency_ms": 2.0},
}  # fmt: skip


def made_study(folder: Path, points: list[tuple[float, float]], **settings) -> Path:
    """A finished study with networks of the given (test accuracy, latency_ms), all on its front."""
    folder.mkdir(parents=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({**SETTINGS, "name": folder.name, **settings}))
    columns = ("arch_id", "val_accuracy", "test_accuracy", "accuracy_std", "latency_ms", "latency_std_ms", "latency_source", "on_front")
    for name in ("finalists.csv", "front.csv"):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([f"{folder.name}{i}", a, a, 0.001, ms, 0.001, "measured", "true"] for i, (a, ms) in enumerate(points))
    return folder


def compared(tmp_path, first, second, **settings):
    one, other = made_study(tmp_path / "a", first), made_study(tmp_path / "b", second, **settings)
    return study_tools.diff(read_study(one), read_study(other))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    shutil.copytree(EXAMPLE, tmp_path / "studies" / "mine")
    return tmp_path


def test_export_holds_every_candidate_and_finalist_with_its_architecture(tmp_path):
    study = read_study(EXAMPLE)
    n = study_tools.export(study, tmp_path / "all.csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert len(rows) == n == len(study.candidates) + len(study.finalists)
    assert [row["arch_id"] for row in rows] == [network.arch_id for network in (*study.candidates, *study.finalists)]
    assert all(Arch.from_dict(json.loads(row["arch"])).arch_id == row["arch_id"] for row in rows)
    study_tools.export(study, tmp_path / "all.json")
    written = json.loads((tmp_path / "all.json").read_text())["networks"]
    assert [(row["role"], row["latency_ms"], row["macs"]) for row in written] == [
        (row["role"], float(row["latency_ms"]), float(row["macs"])) for row in rows
    ]


def test_hypervolumes_of_a_comparison_are_those_of_the_staircase(tmp_path):
    found = compared(tmp_path, [(0.5, 0.5), (0.8, 1.0)], [(0.6, 0.5)], reference_point={"accuracy": 0.2, "latency_ms": 4.0})
    # One reference point for both: accuracy 0.1, 4 ms; latency counts as its logarithm.
    expected = [0.4 * math.log(1.0 / 0.5) + 0.7 * math.log(4.0 / 1.0), 0.5 * math.log(4.0 / 0.5)]
    assert [front["hypervolume"] for front in found["fronts"]] == pytest.approx(expected)


def test_who_dominates_whom(tmp_path):
    found = compared(tmp_path, [(0.5, 0.5), (0.8, 1.0), (0.9, 3.0)], [(0.5001, 0.5), (0.7, 0.9), (0.8, 1.0)])
    first, second = found["fronts"]
    assert first["dominated_by"] == {"a0": ["b0"]} and first["dominated"] == 1
    assert first["clearly"] == 0  # By a hundredth of a percent: within the errors.
    assert second["dominated"] == 0 and second["dominated_by"] == {}


def test_a_study_compared_with_itself_differs_in_nothing():
    found = study_tools.diff(read_study(EXAMPLE), read_study(EXAMPLE))
    assert found["settings"] == {} and found["caveats"] == []
    assert found["fronts"][0] == found["fronts"][1]
    assert found["fronts"][0]["clearly"] == 0


def test_what_makes_a_comparison_unfair_is_said(tmp_path):
    found = compared(tmp_path, [(0.5, 0.5)], [(0.5, 0.5)], device="other", data_hash="x")
    assert found["settings"] == {"device": ["board", "other"], "data_hash": ["d", "x"]}
    assert found["caveats"] == ["latencies of different targets (device)", "accuracies of different data_hash"]


def test_studies_that_do_not_compare_are_refused(tmp_path):
    with pytest.raises(UsageError, match="a searches for acc-latency, b for acc-macs"):
        compared(tmp_path / "x", [(0.5, 0.5)], [(0.5, 0.5)], objective="acc-macs")
    with pytest.raises(StudyError, match="no front yet"):
        compared(tmp_path / "y", [(0.5, 0.5)], [])


def test_the_list_names_every_study_and_says_which_is_damaged(in_folder, capsys):
    (in_folder / "studies" / "broken").mkdir()
    (in_folder / "studies" / "broken" / "study.yaml").write_text("- 1")
    assert cli.invoke(["study", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"mine", "broken", "example"} <= set(rows)  # The checkout's own is found as well.
    summary = json.loads((in_folder / "studies" / "mine" / "summary.json").read_text())
    assert rows["mine"]["scored"] == sum(summary["scored"].values()) and rows["mine"]["front"] == summary["front"]
    assert rows["mine"]["hypervolume"] == pytest.approx(summary["hypervolume"], abs=1e-3)
    assert "expected a mapping" in rows["broken"]["problem"]
    assert cli.invoke(["study", "list"]) == 0
    assert "broken" in capsys.readouterr().out


def test_a_study_is_shown_exported_and_compared_by_name(in_folder, capsys):
    assert cli.invoke(["study", "show", "mine", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["space"] == "lowformer-micro" and shown["front"]
    assert cli.invoke(["study", "show", "mine"]) == 0
    assert f"Front of example: {len(shown['front'])} networks" in capsys.readouterr().out
    assert cli.invoke(["study", "export", "mine", "--out", "all.csv"]) == 0
    assert (in_folder / "all.csv").exists()
    assert cli.invoke(["study", "diff", "mine", "example"]) == 0
    assert "one reference point" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["study", "show", "nowhere"], "no study"),
        (["study", "export", "mine", "--out", "all.xlsx"], "known are .csv and .json"),
        (["study", "diff", "mine"], "Missing argument"),
        (["study", "merge", "mine", "example", "--study", "mine"], "exists already"),
        (["study", "merge", "mine", "example", "--study", "new"], "holds no study.db"),
        (["study", "merge", "mine", "mine", "--study", "new"], "cannot be merged with itself"),
    ],
)
def test_mistakes_are_one_line(in_folder, capsys, arguments, says):
    assert cli.invoke(arguments) == 2
    assert says in capsys.readouterr().err
    assert not (in_folder / "studies" / "new").exists()
