"""`lowsearch run --from`: the same question asked anew, with what was typed changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from tiny_fakes import fakes

from lowsearch.cli import invoke
from lowsearch.study import run as studies
from lowsearch.study.settings import StudySettings, stored_settings
from lowsearch.study.storage import candidates, open_study

ASKED = ["--trials", "3", "--workers", "1", "--seed", "4", "--max", "latency_ms=0.5", "--confidence", "0.8", "--runtime", "onnxruntime"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the study `old`, where every run is one of fakes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FAKE_SPACE", str(Path(__file__).with_name("tiny_space.yaml")))
        patched.setattr(studies, "Backend", fakes.backend)
        patched.chdir(tmp_path_factory.mktemp("home"))
        assert invoke(["run", "--study", "old", *ASKED]) == 0
        yield Path.cwd() / "studies"


def essence(folder):
    return list(map(str, fakes.essence(candidates(open_study(folder, StudySettings().objectives), fakes.SPACE))))


def test_it_proposes_the_same_networks_by_the_same_settings(home):
    assert invoke(["run", "--from", "old", "--name", "new"]) == 0
    assert stored_settings(home / "new") == stored_settings(home / "old")
    assert essence(home / "new") == essence(home / "old")


def test_a_file_alone_is_enough_and_what_is_typed_takes_its_place(home, tmp_path):
    shutil.copyfile(home / "old" / "study.yaml", tmp_path / "asked.yaml")
    assert invoke(["run", "--from", str(tmp_path / "asked.yaml"), "--seed", "5", "--trials", "2"]) == 0
    old, new = stored_settings(home / "old"), stored_settings(home / "asked-again")
    assert old and new and new.to_dict() == {**old.to_dict(), "seed": 5, "trials": 2}
    n_family = len(fakes.SPACE.family)
    assert essence(home / "asked-again")[n_family:] != essence(home / "old")[n_family:]


@pytest.mark.parametrize(
    ("typed", "changed"),
    [
        (["--budget", "9s"], {"budget_s": 9.0, "trials": None}),
        (["--device", "elsewhere"], {"device": "elsewhere", "runtime": None}),
        (["--device", "elsewhere", "--runtime", "openvino"], {"device": "elsewhere", "runtime": "openvino"}),
        (["--max", "macs=1e6"], {"limits": {"max": ["macs=1000000.0"], "min": [], "confidence": 0.9}}),
    ],
)
def test_what_is_typed_changes_what_belongs_to_it(home, monkeypatch, typed, changed):
    asked = []

    class Ended(BaseException):
        pass

    def run(settings, folder, **_):
        asked.append(settings)
        raise Ended

    monkeypatch.setattr(studies, "run", run)
    with pytest.raises(Ended):
        invoke(["run", "--from", "old", *typed])
    old = stored_settings(home / "old")
    assert old and asked[0].to_dict() == {**old.to_dict(), **changed}
    if "--budget" in typed:  # A study that goes on is made longer alike: by trials alone it would end at once.
        with pytest.raises(Ended):
            invoke(["run", "--study", "old", *typed])
        assert asked[1].to_dict() == asked[0].to_dict()
        with pytest.raises(Ended):
            invoke(["run", "--study", "old", "--trials", "9"])
        assert asked[2].to_dict() == {**old.to_dict(), "trials": 9, "budget_s": None}


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--from", "absent", "--name", "x"], "no study 'absent'; hint: known: "),
        (["--from", "absent.yaml", "--name", "x"], "absent.yaml cannot be read: No such file or directory; hint: name a study"),
        (["--from", "old", "--name", "old"], "'old' is the study that --from names; hint: give the new one a name: --name NEW"),
        (["--from", "edited.yaml", "--name", "x"], "edited.yaml: unknown setting 'colour'"),
        (["--from", "old", "--name", "other"], "study 'other' was made with seed 4, not 9"),
    ],
)
def test_a_mistake_is_one_clear_line(home, capsys, typed, says):
    values = yaml.safe_load((home / "old" / "study.yaml").read_text())
    Path("edited.yaml").write_text(yaml.safe_dump({**values, "settings": {**values["settings"], "colour": "red"}}))
    (home / "other").mkdir(exist_ok=True)
    shutil.copyfile(home / "old" / "study.yaml", home / "other" / "study.yaml")
    assert invoke(["run", *typed, *(["--seed", "9"] if "other" in typed else [])]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
