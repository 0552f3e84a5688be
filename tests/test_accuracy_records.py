"""Accuracy records: nothing acknowledged is lost, nothing torn is believed, several processes share one file."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.arch import Arch, Stage, Stem
from lowsearch.errors import StudyError
from lowsearch.train import CurvePoint


def record(number: int = 0, *, rung: float = 0.25) -> AccuracyRecord:
    point = CurvePoint(fraction=rung, step=3, train_loss=1.1, val_accuracy=0.5 + 1e-4 * number, val_loss=1 / 3, cpu_seconds=0.1 + number)
    arch = Arch(resolution_px=32, stem=Stem(width=4 + 2 * number, stride=1), stages=(Stage(width=8),) * 4, num_classes=10)  # pyright: ignore[reportArgumentType]
    return AccuracyRecord(
        arch=arch, recipe="micro", recipe_hash="r", data="d", data_hash="h", seed=0, rung=rung, curve=(point,), versions={"torch": "2"}
    )  # fmt: skip


def test_records_round_trip_through_the_file(tmp_path: Path) -> None:
    written = [record(i) for i in range(3)]
    records = AccuracyRecords(tmp_path / "sub" / "r.jsonl")
    for r in written:
        records.append(r)
    assert list(records) == written == list(AccuracyRecords(records.path))
    assert records.get(written[1].key) == written[1] and records.of(written[2].arch_id) == (written[2],)
    assert [json.loads(line)["arch_id"] for line in records.path.read_text().splitlines()] == [r.arch_id for r in written]


def test_same_key_is_written_once_and_the_first_value_stays(tmp_path: Path) -> None:
    records = AccuracyRecords(tmp_path / "r.jsonl")
    records.append(record(1))
    records.append(replace(record(1), curve=record(5).curve))
    assert list(records) == [record(1)] and records.path.read_bytes().count(b"\n") == 1


def test_rungs_and_seeds_are_records_of_their_own(tmp_path: Path) -> None:
    records = AccuracyRecords(tmp_path / "r.jsonl")
    for r in (record(), record(rung=1.0), replace(record(), seed=1), replace(record(), data_hash="x"), replace(record(), recipe_hash="x")):
        records.append(r)
    assert len(records) == 5


def test_last_line_torn_at_any_byte_is_cut_off_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records = AccuracyRecords(path)
    records.append(record(0))
    before = path.stat().st_size
    records.append(record(1))
    whole = path.read_bytes()
    for size in range(before, len(whole)):
        path.write_bytes(whole[:size])
        torn = AccuracyRecords(path)
        assert list(torn) == [record(0)]
        torn.append(record(2))
        assert torn.repaired_bytes == size - before
        assert list(AccuracyRecords(path)) == [record(0), record(2)]


def test_reader_waits_for_a_line_that_is_still_being_written(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    AccuracyRecords(path).append(record(0))
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    reader = AccuracyRecords(path)
    assert len(reader) == 0
    path.write_bytes(whole)
    reader.refresh()
    assert list(reader) == [record(0)]


@pytest.mark.parametrize(
    "damage",
    [b"\n", b"garbage\n", b"\xff\xfe\n", b"null\n", b"{}\n", b"[1]\n", b"\0" * 40 + b"\n"],
    ids=["blank", "text", "bytes", "null", "empty", "list", "zeros"],
)
def test_damage_before_the_last_line_is_an_error_that_names_the_line(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    AccuracyRecords(path).append(record(0))
    line = path.read_bytes()
    path.write_bytes(line + damage + line)
    with pytest.raises(StudyError, match=r"line 2: not an accuracy record") as caught:
        AccuracyRecords(path)
    assert caught.value.hint and path.read_bytes() == line + damage + line


@pytest.mark.parametrize(("field", "value"), [("schema", 99), ("arch_id", "0" * 10), ("curve", []), ("rung", "low"), ("arch", {"stem": 1})])
def test_record_with_a_wrong_field_is_an_error(field: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({**record().to_dict(), field: value}) + "\n")
    with pytest.raises(StudyError, match="line 1"):
        AccuracyRecords(path)


def test_file_that_cannot_grow_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    records = AccuracyRecords(tmp_path / "r.jsonl")
    records.append(record(0))

    def full(_: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            records.append(record(1))
    records.append(record(2))
    assert record(0) in list(AccuracyRecords(records.path)) and record(2) in list(AccuracyRecords(records.path))


def _append_many(path: Path, numbers: range) -> None:
    records = AccuracyRecords(path)
    for number in numbers:
        records.append(record(number))


def test_two_processes_append_to_one_file_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append_many, args=(path, range(start, start + 25))) for start in (0, 15)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert {r.key for r in AccuracyRecords(path)} == {record(i).key for i in range(40)}
    assert path.read_bytes().count(b"\n") == 40
