"""A latency table that does not fit this machine: refused by a search, or used with --allow-stale, and then seen everywhere."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.errors import StudyError, TableError
from lowsearch.latency.measure import Request
from lowsearch.latency.memory import MemoryRead
from lowsearch.latency.profile import profile
from lowsearch.latency.runtimes import runtime
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.target import Target, attached_devices, resolve_target
from lowsearch.latency.timing import Timing
from lowsearch.report.sections import body
from lowsearch.report.study_files import read_study
from lowsearch.space import SearchSpace
from lowsearch.study.assembly import build_parts, prepare
from lowsearch.study.run import _opened
from lowsearch.study.settings import StudySettings, check_resumable, stored_settings

CPU = attached_devices()[0].slug
SETTINGS = {"device": CPU, "accuracy": "macs", "trials": 1}


def launch(request: Request) -> Iterator[Timing]:
    """A machine on which time is MACs."""
    for item in (item for step in request.steps for item in step):
        macs = item.n_bytes if isinstance(item, MemoryRead) else (cost.count if isinstance(item, Arch) else cost.of_block)(item).macs
        yield Timing(item=item, process=request.process, hot_ms=(1e-6 * macs + 0.01,), warm_ms=(1e-6 * macs + 0.01,), cold_ms=(0.02,))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a study on a machine whose runtime has been updated since it measured its table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    profile(SearchSpace.load("lowformer-micro"), resolve_target("cpu", "onnxruntime"), max_blocks=150, launch=launch)
    monkeypatch.setattr(type(runtime("onnxruntime")), "versions", lambda self: {"onnxruntime": "99.<b>"})
    folder = tmp_path / "studies" / "mine"
    folder.mkdir(parents=True)
    return folder


def test_a_stale_table_is_refused_or_used_in_the_open(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TableError, match="onnxruntime: .* then, 99.* now.*lowsearch profile .*--allow-stale"):
        prepare(study, StudySettings(**SETTINGS), None)
    settings = StudySettings(**SETTINGS, allow_stale=True)
    with caplog.at_level(logging.WARNING):
        prepare(study, settings, None)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "99.<b> now" in caplog.text
    parts = build_parts(study, settings)
    (stale,) = parts.facts["latency_table"]["stale"]
    assert (
        stale.endswith("then, 99.<b> now") and np.isfinite(parts.latency.predict(parts.space.sample(3, rng=np.random.default_rng(0)))).all()
    )
    _opened(study, settings, parts)
    assert stored_settings(study) == settings
    html = body(read_study(study))
    assert "The latency table was stale" in html and "99.&lt;b&gt; now" in html and "99.<b>" not in html
    with pytest.raises(TableError, match="99"):  # Resumed without the permission.
        prepare(study, StudySettings(**SETTINGS), None)


def test_a_study_may_be_allowed_a_stale_table_when_it_is_resumed(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(study.parents[1])
    fresh, allowed = StudySettings(**SETTINGS), StudySettings(**SETTINGS, allow_stale=True)
    prepare(study, fresh, None)
    _opened(study, fresh, build_parts(study, fresh))
    assert "was stale" not in body(read_study(study))
    check_resumable("mine", fresh, allowed)
    with pytest.raises(StudyError):
        check_resumable("mine", fresh, StudySettings(**{**SETTINGS, "seed": 1}))
    monkeypatch.setattr(type(runtime("onnxruntime")), "versions", lambda self: {"onnxruntime": "99"})
    prepare(study, allowed, None)
    _opened(study, allowed, build_parts(study, allowed))
    assert "The latency table was stale" in body(read_study(study))


@pytest.mark.usefixtures("only_own_tables")
def test_a_search_measures_a_machine_whose_name_has_a_shipped_table(
    study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where machine and versions are the same by all they tell."""
    monkeypatch.undo()
    monkeypatch.chdir(study.parents[1])
    monkeypatch.setenv("LOWSEARCH_HOME", str(study / "home"))
    shipped = study.parents[1] / "latency_tables" / "shipped" / CPU
    shipped.parent.mkdir()
    (study.parents[1] / "latency_tables" / CPU).rename(shipped)
    profiled: list[SearchSpace] = []

    def measured(space: SearchSpace, target: Target, **_: object) -> LatencyTable:
        profiled.append(space)
        return profile(space, target, max_blocks=150, launch=launch)

    monkeypatch.setattr("lowsearch.study.assembly.profile", measured)
    allowed = StudySettings(**SETTINGS, allow_stale=True)
    prepare(study, allowed, None)
    assert not profiled and "it came with lowsearch" in caplog.text
    _opened(study, allowed, build_parts(study, allowed))
    assert "it came with lowsearch" in body(read_study(study))
    with pytest.raises(TableError, match="it came with lowsearch"):  # Resumed without the permission.
        prepare(study, StudySettings(**SETTINGS), None)
    (study / "latency_table.jsonl").unlink()
    prepare(study, StudySettings(**SETTINGS), None)
    assert len(profiled) == 1 and LatencyTable.load(study / "latency_table.jsonl").context.origin == ""


def test_a_device_that_is_not_attached_is_searched_for_with_its_shipped_table(study: Path) -> None:
    own = study.parents[1] / "latency_tables"
    table = LatencyTable.load(own / resolve_target("cpu", "onnxruntime").table_path)
    dataclasses.replace(table, target=Target("other-cpu", "onnxruntime")).save(own / "shipped")
    settings = StudySettings(**{**SETTINGS, "device": "other-cpu"})
    prepare(study, settings, None)
    prepare(study, settings, None)  # Resumed.
    parts = build_parts(study, settings)
    assert parts.latency_source == "table" and parts.measure is None and "stale" not in parts.facts["latency_table"]


def test_a_study_from_before_there_was_a_choice_is_read() -> None:
    values = StudySettings(**SETTINGS).to_dict()
    del values["allow_stale"]
    assert StudySettings.from_dict(values) == StudySettings(**SETTINGS)
