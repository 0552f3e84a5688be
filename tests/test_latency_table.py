"""Latency tables on disk: what is saved is what is loaded, and a damaged or foreign table is refused by file and line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowsearch.arch import Arch, Block, ConvBranch, Head, Mlp, Stage, Stem, StemConv
from lowsearch.errors import MissingBlockError, TableError
from lowsearch.files import write_atomically
from lowsearch.latency.table import (
    BlockLatency,
    LatencyTable,
    Sibling,
    block_latency,
    check_fits,
    find_table,
    known_tables,
)
from lowsearch.latency.target import Device, Target, attached_devices, context
from lowsearch.latency.timing import NetworkLatency, Timing

TARGET = Target("rtx3090", "eager")
DEVICE = Device(slug="rtx3090", kind="cuda", name="NVIDIA GeForce RTX 3090", driver="550")
STEM = StemConv(out_channels=8, resolution_px=32, stride=1)
BLOCKS: tuple[Block, ...] = (
    STEM,
    ConvBranch(channels=8, resolution_px=32, fused=True, expansion=2, kernel=3, groups=1, bias=False),
    ConvBranch(channels=8, resolution_px=16, fused=False, expansion=2, kernel=3, groups=1, bias=False),
    Mlp(channels=64, resolution_px=4, ratio=4),
    Head(channels=64, resolution_px=2, conv_width=64, linear_width=64, num_classes=10),
)


def network(width: int) -> Arch:
    stages = (Stage(width=16), Stage(width=32), Stage(width=64), Stage(width=64))
    return Arch(resolution_px=32, stem=Stem(width=width, stride=1), stages=stages, head_widths=(64, 64), num_classes=10)


def row(hot: float = 0.01) -> BlockLatency:
    def rounds(ms: float) -> tuple[float, ...]:
        return tuple(round(ms * factor, 5) for factor in (1.0, 1.02, 1.1))

    timings = [Timing(item=STEM, process=p, hot_ms=rounds(hot), warm_ms=rounds(2 * hot), cold_ms=rounds(3 * hot)) for p in (0, 1)]
    return block_latency(timings, {(0, ""): (1.0, 1.01, 1.1), (1, ""): (1.0, 1.0, 1.0)})


def made_table(hots: list[float] | None = None) -> LatencyTable:
    here = context(TARGET, DEVICE, statistic="CUDA event time", versions={"torch": "2.9"}, runtime_options={"opset": 17})
    networks = tuple(
        NetworkLatency(arch=network(width), latency_ms=0.1 * width, samples_ms=((0.1 * width,) * 3,) * 2) for width in (8, 12, 16)
    )
    entries = {block: row(hot) for block, hot in zip(BLOCKS, hots or [0.01, 0.02, 0.03, 0.04, 0.05], strict=False)}
    return LatencyTable(target=TARGET, context=here, entries=entries, calibration={"tiny": networks, "other": networks[:1]})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return made_table().save(tmp_path)


def test_a_saved_table_loads_as_it_was(tmp_path: Path) -> None:
    table = made_table()
    path = table.save(tmp_path)
    assert path == tmp_path / "rtx3090" / "eager-fp32-b1-t1.jsonl"
    loaded = LatencyTable.load(path)
    assert (loaded.target, loaded.context, loaded.entries) == (table.target, table.context, table.entries)
    assert {space: set(rows) for space, rows in loaded.calibration.items()} == {s: set(rows) for s, rows in table.calibration.items()}
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def leaning_table() -> LatencyTable:
    """A table of two blocks that leans on one of four at batch 8."""
    beside = {block: BlockLatency(hot_ms=0.1 * i, warm_ms=0.2 * i, cold_ms=0.3 * i) for i, block in enumerate(BLOCKS[1:], start=1)}
    sibling = Sibling(batch=8, date_utc="2026-11-27T09:31:25Z", sha256="ab" * 32, entries=beside)
    table = made_table()
    return dataclasses.replace(table, entries={block: table.entries[block] for block in BLOCKS[:2]}, sibling=sibling)


def test_a_table_keeps_what_it_leans_on(tmp_path: Path) -> None:
    table = leaning_table()
    loaded = LatencyTable.load(table.save(tmp_path))
    assert loaded.sibling == table.sibling and loaded.entries == table.entries
    assert loaded.summary()["leans_on"] == {"batch": 8, "date_utc": "2026-11-27T09:31:25Z", "sha256": "ab" * 32, "blocks": 4}
    assert "sibling" not in made_table().save(tmp_path).read_text(), "a table by itself is written as ever"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=len(BLOCKS)))
def test_any_times_survive_the_file(tmp_path_factory: pytest.TempPathFactory, hots: list[float]) -> None:
    table = made_table(hots)
    assert LatencyTable.load(table.save(tmp_path_factory.mktemp("t"))).entries == table.entries


def test_the_file_does_not_depend_on_the_order_of_measuring(tmp_path: Path) -> None:
    table = made_table()
    turned = dataclasses.replace(
        table, entries=dict(reversed(table.entries.items())), calibration={k: v[::-1] for k, v in reversed(table.calibration.items())}
    )
    assert table.save(tmp_path / "a").read_bytes() == turned.save(tmp_path / "b").read_bytes()


def test_one_slower_block_changes_one_line(tmp_path: Path) -> None:
    before = made_table().save(tmp_path / "a").read_text().splitlines()
    after = made_table([0.01, 0.02, 0.033]).save(tmp_path / "b").read_text().splitlines()
    changed = [a for a, b in zip(before[1:4], after[1:4], strict=True) if a != b]
    assert len(changed) == 1 and json.loads(changed[0])["block"]["kind"] == "conv"


def test_a_missing_block_is_named_with_the_command_that_measures() -> None:
    with pytest.raises(MissingBlockError, match=r"Mlp\(channels=2.*lowsearch profile --device rtx3090 --runtime eager"):
        made_table().lookup(Mlp(channels=2, resolution_px=2, ratio=2))
    assert made_table().lookup(STEM).source == "measured"


Damage = Callable[[list[str]], list[str]]


def edited(number: int, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Line `number` (from 1) parsed, changed and written back."""

    def damage(lines: list[str]) -> list[str]:
        values = json.loads(lines[number - 1])
        change(values)
        return [*lines[: number - 1], json.dumps(values), *lines[number:]]

    return damage


def replaced(number: int, line: str) -> Damage:
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


N_BLOCKS, FIRST_NETWORK = len(BLOCKS), 2 + len(BLOCKS)
DAMAGES: dict[str, tuple[int, str, Damage]] = {
    "not json": (3, "damaged line", replaced(3, '{"block": {"kind"')),
    "empty line": (3, "damaged line", replaced(3, "")),
    "no object": (3, "no JSON object", replaced(3, "[1, 2]")),
    "binary": (3, "damaged line", replaced(3, "\x00\x01")),
    "other schema": (1, "schema is 'their-table'", edited(1, lambda v: v.update(schema="their-table"))),
    "other version": (1, "version 99", edited(1, lambda v: v.update(version=99))),
    "header gone": (1, "unknown field", lambda lines: lines[1:]),
    "header field gone": (1, "missing field 'target'", edited(1, lambda v: v.pop("target"))),
    "header field unknown": (1, "unknown field 'colour'", edited(1, lambda v: v.update(colour="red"))),
    "target damaged": (1, "target has fields", edited(1, lambda v: v["target"].pop("batch"))),
    "target impossible": (1, "batch is 0", edited(1, lambda v: v["target"].update(batch=0))),
    "context damaged": (1, "missing field 'driver'", edited(1, lambda v: v["context"].pop("driver"))),
    "context no object": (1, "context is no JSON object", edited(1, lambda v: v.update(context=3))),
    "versions no object": (1, "versions is no JSON object", edited(1, lambda v: v["context"].update(versions=[]))),
    "line gone": (1, "promises n_blocks 5, the file has 4", lambda lines: lines[:2] + lines[3:]),
    "network gone": (1, "promises n_networks 4, the file has 3", lambda lines: lines[:-1]),
    "block twice": (3, "second line for", lambda lines: [*lines[:2], lines[1], *lines[2:]]),
    "network twice": (2 + FIRST_NETWORK, "second line for network", lambda lines: [*lines[: FIRST_NETWORK + 1], *lines[FIRST_NETWORK:]]),
    "nan": (2, "NaN is no measurement", lambda lines: [lines[0], lines[1].replace('"hot_ms": 0.01', '"hot_ms": NaN'), *lines[2:]]),
    "infinity": (2, "Infinity is no", lambda lines: [lines[0], lines[1].replace('"hot_ms": 0.01', '"hot_ms": Infinity'), *lines[2:]]),
    "negative": (2, "warm_ms is -1", edited(2, lambda v: v.update(warm_ms=-1))),
    "zero": (2, "cold_ms is 0", edited(2, lambda v: v.update(cold_ms=0))),
    "text for a time": (2, "hot_ms is 'fast'", edited(2, lambda v: v.update(hot_ms="fast"))),
    "true for a time": (2, "hot_ms is True", edited(2, lambda v: v.update(hot_ms=True))),
    "time against samples": (2, "its samples give", edited(2, lambda v: v.update(hot_ms=0.5))),
    "samples flat": (2, "expected a list of rounds", edited(2, lambda v: v.update(hot_samples_ms=[1, 2]))),
    "samples empty": (2, "expected a list of rounds", edited(2, lambda v: v.update(hot_samples_ms=[[]]))),
    "paces no list": (2, "expected a number for every process", edited(2, lambda v: v.update(warm_paces=1))),
    "pace zero": (2, "warm_paces is 0", edited(2, lambda v: v.update(warm_paces=[0, 1]))),
    "paces too many": (2, "2 processes, but 3 paces", edited(2, lambda v: v.update(warm_paces=[1, 1, 1]))),
    "pace against time": (2, "its samples give", edited(2, lambda v: v.update(warm_paces=[2, 2]))),
    "sample negative": (2, "hot_samples_ms is -2", edited(2, lambda v: v["hot_samples_ms"][0].append(-2))),
    "unknown field": (2, "unknown field 'note'", edited(2, lambda v: v.update(note="x"))),
    "field gone": (2, "missing field 'cold_ms'", edited(2, lambda v: v.pop("cold_ms"))),
    "count text": (1, "measured_again is 'x'", edited(1, lambda v: v["context"].update(measured_again="x"))),
    "predicted row": (2, "source is 'predicted'", edited(2, lambda v: v.update(source="predicted"))),
    "unknown kind": (2, "unknown block kind 'magic'", edited(2, lambda v: v["block"].update(kind="magic"))),
    "block field gone": (2, "stride", edited(2, lambda v: v["block"].pop("stride"))),
    "block field text": (2, "stride", edited(2, lambda v: v["block"].update(stride="2"))),
    "arch impossible": (FIRST_NETWORK, "resolution_px 33", edited(FIRST_NETWORK, lambda v: v["arch"].update(resolution_px=33))),
    "arch no object": (FIRST_NETWORK, "", edited(FIRST_NETWORK, lambda v: v.update(arch=3))),
    "space no name": (FIRST_NETWORK, "space is 3", edited(FIRST_NETWORK, lambda v: v.update(space=3))),
    "load text": (FIRST_NETWORK, "load_average is 'high'", edited(FIRST_NETWORK, lambda v: v.update(load_average="high"))),
    "network time": (FIRST_NETWORK, "its samples give", edited(FIRST_NETWORK, lambda v: v.update(latency_ms=9.0))),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_table_is_refused_by_line(path: Path, name: str) -> None:
    line, message, damage = DAMAGES[name]
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(TableError) as raised:
        LatencyTable.load(path)
    assert f"{path}:{line}: " in raised.value.message and message in raised.value.message
    assert "lowsearch profile --device rtx3090 --runtime eager" in str(raised.value.hint)
    assert "\n" not in str(raised.value)


SIBLING_DAMAGES: dict[str, tuple[int, str, Damage]] = {
    "header without it": (1, "sibling is None, but the file has 4", edited(1, lambda v: v.pop("sibling"))),
    "no object": (1, "sibling is 8, but", edited(1, lambda v: v.update(sibling=8))),
    "field gone": (1, "missing field 'sha256'", edited(1, lambda v: v["sibling"].pop("sha256"))),
    "line gone": (1, "promises 4 blocks of the sibling, the file has 3", lambda lines: lines[:4] + lines[5:]),
    "block twice": (5, "second line for", lambda lines: [*lines[:4], lines[3], *lines[4:]]),
    "own batch": (1, "the sibling has batch 1, as the table itself", edited(1, lambda v: v["sibling"].update(batch=1))),
    "impossible batch": (1, "batch is 0", edited(1, lambda v: v["sibling"].update(batch=0))),
    "zero": (4, "warm_ms is 0", edited(4, lambda v: v.update(warm_ms=0))),
    "with samples": (4, "unknown field 'source'", edited(4, lambda v: v.update(source="measured"))),
}


@pytest.mark.parametrize("name", SIBLING_DAMAGES)
def test_a_table_with_a_damaged_sibling_is_refused_by_line(tmp_path: Path, name: str) -> None:
    line, message, damage = SIBLING_DAMAGES[name]
    path = leaning_table().save(tmp_path)
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    with pytest.raises(TableError) as raised:
        LatencyTable.load(path)
    assert f"{path}:{line}: " in raised.value.message and message in raised.value.message


def test_a_table_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(TableError):
            LatencyTable.load(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\n"])
def test_a_file_that_is_no_table_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(TableError, match=path.name):
        LatencyTable.load(path)


def test_a_folder_in_the_place_of_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").mkdir()
    with pytest.raises(TableError, match="cannot be read"):
        LatencyTable.load(tmp_path / "table.jsonl")


def test_a_table_of_other_versions_or_another_machine_does_not_fit() -> None:
    table = made_table()
    check_fits(table, TARGET, table.context)
    check_fits(table, TARGET, dataclasses.replace(table.context, date_utc="2030", load_average=3.0, git_sha="abc"))
    newer = dataclasses.replace(table.context, versions={"lowsearch": "1", "torch": "2.10"})
    with pytest.raises(TableError, match=r"torch: 2\.9 then, 2\.10 now.*lowsearch profile --device rtx3090"):
        check_fits(table, TARGET, newer)
    with pytest.raises(TableError, match="device_name"):
        check_fits(table, TARGET, dataclasses.replace(table.context, device_name="NVIDIA GeForce RTX 3090 D"))
    with pytest.raises(TableError, match="not of rtx3090 eager fp16"):
        check_fits(table, Target("rtx3090", "eager", "fp16"), table.context)


def test_a_table_from_before_clocks_were_kept_is_read(path: Path) -> None:
    damage = edited(1, lambda v: [v["context"].pop(name) for name in ("clocks", "power_limit")])
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    assert LatencyTable.load(path).context.clocks == ""


def test_tables_are_found_in_order_of_folders(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    made_table([0.5]).save(near)
    made_table().save(far)
    (far / "rtx3090" / "notes.jsonl").write_text("not a table")
    (far / "rtx3090" / "eager-fp32-b1-t1.partial.jsonl").write_text("")
    assert find_table(TARGET, folders=[near, far]).entries.keys() == {STEM}
    assert known_tables(folders=[near, far]) == {TARGET: near / TARGET.table_path}
    assert known_tables(folders=[tmp_path / "none"]) == {}


def test_a_missing_table_says_what_is_attached_what_exists_and_what_to_do(tmp_path: Path) -> None:
    made_table().save(tmp_path)
    with pytest.raises(TableError) as raised:
        find_table(Target("jetson-orin", "eager"), folders=[tmp_path])
    message = str(raised.value)
    assert attached_devices()[0].slug in message and "rtx3090 eager" in message
    assert "lowsearch profile --device jetson-orin --runtime eager" in message
    assert "copy latency_tables/jetson-orin/eager-fp32-b1-t1.jsonl here" in message
    assert "\n" not in message


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_summary_names_the_target_and_counts_what_it_holds() -> None:
    summary = made_table().summary()
    assert (summary["device"], summary["blocks"], summary["networks"]) == ("rtx3090", 5, {"tiny": 3, "other": 1})
    json.dumps(summary)
