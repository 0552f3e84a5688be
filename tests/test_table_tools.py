"""Tables as files: found by name, judged for this machine, merged without mixing devices, and held side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lowsearch import cli
from lowsearch.arch import Block, Mlp
from lowsearch.errors import TableError
from lowsearch.latency.memory import MemoryLatency
from lowsearch.latency.profile import current_context
from lowsearch.latency.table import BlockLatency, LatencyTable, default_runtime
from lowsearch.latency.table_tools import difference, merge, open_table, why_unreliable, why_unusable
from lowsearch.latency.target import Device, Target, attached_devices, context
from lowsearch.latency.timing import NetworkLatency, latency_ms
from lowsearch.presets import PRESETS

TARGET = Target("rtx3090", "eager")
DEVICE = Device(slug="rtx3090", kind="cuda", name="NVIDIA GeForce RTX 3090", driver="550")
BLOCKS: list[Block] = [Mlp(channels=8 * n, resolution_px=4, ratio=2) for n in range(1, 7)]


def made(blocks: list[Block], *, slower: float = 1.0, networks: tuple[str, ...] = ("lowformer_b0",), driver: str = "550") -> LatencyTable:
    here = context(
        TARGET, dataclasses.replace(DEVICE, driver=driver), statistic="CUDA event time", versions={"torch": "2.9"}, runtime_options={}
    )
    entries = {b: BlockLatency(hot_ms=slower * 0.01, warm_ms=slower * 0.02, cold_ms=0.03) for b in blocks}
    rows = tuple(NetworkLatency(arch=PRESETS[n], latency_ms=slower, samples_ms=((slower,),), paces=(1.0,)) for n in networks)
    memory = (MemoryLatency(n_bytes=2**20, latency_ms=0.01 * slower),)
    return LatencyTable(target=TARGET, context=here, entries=entries, calibration={"lowformer": rows}, memory=memory)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_table_is_found_by_file_and_by_name(folder: Path) -> None:
    path = made(BLOCKS).save(folder / "latency_tables")
    assert open_table(str(path)).entries == open_table("rtx3090/eager-fp32-b1-t1").entries == made(BLOCKS).entries
    with pytest.raises(TableError, match=r"no latency table 'a100/x'; known: .*rtx3090/eager-fp32-b1-t1"):
        open_table("a100/x")


def test_merging_keeps_every_row_once_and_the_firsts_where_both_have_one() -> None:
    first, second = made(BLOCKS[:4]), made(BLOCKS[2:], slower=2.0, networks=("lowformer_b0", "lowformer_b1"))
    merged = merge(first, second)
    assert set(merged.entries) == set(BLOCKS)
    assert all(merged.entries[b] == first.entries[b] for b in BLOCKS[:4]) and merged.entries[BLOCKS[5]] == second.entries[BLOCKS[5]]
    assert [(r.arch, r.latency_ms) for r in merged.calibration["lowformer"]] == [
        (PRESETS["lowformer_b0"], 1.0),
        (PRESETS["lowformer_b1"], 2.0),
    ]
    assert merged.memory == first.memory
    assert merge(merged, merged) == merged


def test_what_was_measured_on_something_else_is_not_merged() -> None:
    with pytest.raises(TableError, match="different devices or versions .driver: 550 and 560"):
        merge(made(BLOCKS), made(BLOCKS, driver="560"))
    other = dataclasses.replace(made(BLOCKS), target=Target("rtx3090", "eager", batch=8))
    with pytest.raises(TableError, match="merge tables of one target only"):
        merge(made(BLOCKS), other)


def test_a_planted_difference_comes_back() -> None:
    rows = {(row["what"], row["state"]): row for row in difference(made(BLOCKS[:4]), made(BLOCKS[1:], slower=1.5))}
    assert set(rows) == {("mlp", "hot"), ("mlp", "warm"), ("mlp", "cold"), ("network", ""), ("memory", "")}
    hot = rows["mlp", "hot"]
    assert (hot["common"], hot["only_first"], hot["only_second"]) == (3, 1, 2)
    assert hot["median"] == pytest.approx(1.5) and rows["mlp", "cold"]["median"] == pytest.approx(1.0)
    assert rows["network", ""]["median"] == rows["memory", ""]["median"] == pytest.approx(1.5)


def test_a_table_of_this_machine_is_judged_and_one_of_an_absent_device_may_be_named() -> None:
    assert why_unusable(made(BLOCKS)) == ""
    cpu = attached_devices()[0]
    target = Target(cpu.slug, "onnxruntime")
    mine = dataclasses.replace(made(BLOCKS), target=target, context=current_context(target, cpu))
    assert why_unusable(mine) == ""
    stale = dataclasses.replace(mine, context=dataclasses.replace(mine.context, versions={"lowsearch": "0", "onnxruntime": "0.1"}))
    assert "onnxruntime: 0.1 then" in why_unusable(stale) and "lowsearch profile" in why_unusable(stale)


def test_the_verbs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(BLOCKS[:4]).save(folder / "a")
    made(BLOCKS[2:], slower=1.5).save(folder / "b")
    a, b = (f"{one}/rtx3090/eager-fp32-b1-t1.jsonl" for one in "ab")
    assert cli.invoke(["table", "show", a, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == 4
    assert cli.invoke(["table", "check", a]) == 0
    assert cli.invoke(["table", "merge", a, b, "--out", "merged"]) == 0
    merged = folder / "merged" / "rtx3090" / "eager-fp32-b1-t1.jsonl"
    assert set(LatencyTable.load(merged).entries) == set(BLOCKS)
    before = merged.read_bytes()
    assert cli.invoke(["table", "merge", b, a, "--out", "merged"]) == 2 and merged.read_bytes() == before
    capsys.readouterr()
    assert cli.invoke(["table", "diff", a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["median"] == pytest.approx(1.5)
    (folder / "torn.jsonl").write_text(merged.read_text()[:-40])
    assert cli.invoke(["table", "check", "torn.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torn.jsonl" in error and "hint:" in error


def with_samples(table: LatencyTable, processes: list[float], n: int, *, state: str = "warm", wall_over_cpu: float = 1.0) -> LatencyTable:
    """`table` with the first `n` blocks' `state` measured so much slower than the fastest process, by process."""
    fast = min(processes)
    rows = {}
    for block in list(table.entries)[:n]:
        ms = getattr(table.entries[block], f"{state}_ms")
        samples = tuple((ms * factor / fast,) * 3 for factor in processes)
        times = {f"{state}_ms": latency_ms(samples), f"{state}_samples_ms": samples, f"{state}_paces": (1.0,) * len(processes)}
        rows[block] = dataclasses.replace(table.entries[block], **times, wall_over_cpu=wall_over_cpu)
    return dataclasses.replace(table, entries={**table.entries, **rows})


def test_every_row_has_a_verdict_by_its_samples() -> None:
    assert made(BLOCKS).verdicts == {"valid": 7, "noisy": 0, "invalid": 0} and made(BLOCKS).advice == ""
    assert with_samples(made(BLOCKS), [1.0, 1.08], 2).verdicts == {"valid": 5, "noisy": 2, "invalid": 0}
    assert with_samples(made(BLOCKS), [1.0, 1.5], 2, state="hot").verdicts == {"valid": 5, "noisy": 0, "invalid": 2}
    assert with_samples(made(BLOCKS), [1.0, 1.5], 2, state="cold").verdicts["valid"] == 7, "cold calls are few, and count little"
    assert "end it" in with_samples(made(BLOCKS), [1.0, 1.5], 2, wall_over_cpu=2.0).advice
    (network,) = made([]).calibration["lowformer"]
    loose = dataclasses.replace(network, samples_ms=((1.0,), (1.1,), (1.2,), (1.3,)), paces=())
    assert dataclasses.replace(made([]), calibration={"lowformer": (loose,)}).verdicts == {"valid": 0, "noisy": 1, "invalid": 0}


def test_a_table_with_many_invalid_rows_is_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks: list[Block] = [Mlp(channels=8 * n, resolution_px=4, ratio=2) for n in range(1, 41)]
    few, many = (with_samples(made(blocks), [1.0, 1.5], n) for n in (2, 3))  # of 41 rows
    assert why_unreliable(few) == "" and why_unreliable(many).startswith("7% of its rows are invalid, more than 5%: ")
    few.save(folder / "few")
    many.save(folder / "many")
    assert cli.invoke(["table", "check", "few/rtx3090/eager-fp32-b1-t1.jsonl"]) == 0
    assert "39 of 41 rows are valid, 0 noisy, 2 invalid; may be used here" in capsys.readouterr().out
    assert cli.invoke(["table", "check", "many/rtx3090/eager-fp32-b1-t1.jsonl", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"] == {"valid": 38, "noisy": 0, "invalid": 3} and not found["usable"] and "measure again" in found["reason"]
    assert cli.invoke(["table", "show", "many/rtx3090/eager-fp32-b1-t1.jsonl"]) == 0
    assert "'invalid': 3" in capsys.readouterr().out


def test_a_device_has_a_runtime_where_none_is_named(folder: Path) -> None:
    gpu = Device(slug="rtx3090", kind="cuda", name="NVIDIA GeForce RTX 3090")
    cpu = Device(slug="some-cpu", kind="cpu", name="Some CPU")
    table = made(BLOCKS[:2])

    def measured_with(*runtimes: str) -> None:
        for runtime in runtimes:
            dataclasses.replace(table, target=Target("absent-board", runtime)).save(folder / "latency_tables")

    assert [default_runtime(name, devices=[cpu, gpu]) for name in ("cpu", "cuda", "rtx3090")] == ["onnxruntime", "cudagraphs", "cudagraphs"]
    assert default_runtime("rtx3090", devices=[cpu]) == "onnxruntime", "nothing is known of it"
    measured_with("torchscript", "eager")
    assert default_runtime("absent-board", devices=[cpu]) == "eager"
    measured_with("cudagraphs")
    assert default_runtime("absent-board", devices=[cpu]) == "cudagraphs"


@pytest.mark.usefixtures("only_own_tables")
def test_shipped_tables_are_listed_and_marked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = attached_devices()[0]
    target = Target(cpu.slug, "onnxruntime")
    mine = dataclasses.replace(made(BLOCKS[:4]), target=target, context=current_context(target, cpu))
    mine.save(folder / "latency_tables" / "shipped")
    name = str(target.table_path.with_suffix(""))
    assert cli.invoke(["table", "check", name]) == 1
    assert "it came with lowsearch" in capsys.readouterr().out
    dataclasses.replace(mine, entries={b: mine.entries[b] for b in BLOCKS[:2]}).save(folder / "latency_tables")
    shown = {}
    for one in (name, f"shipped/{name}"):
        assert cli.invoke(["table", "show", one, "--json"]) == 0
        shown[one] = json.loads(capsys.readouterr().out)
    assert [(row["origin"], row["blocks"]) for row in shown.values()] == [("", 2), ("shipped", 4)]
    assert cli.invoke(["table", "check", name]) == 0
    assert cli.invoke(["table", "merge", name, f"shipped/{name}", "--out", "merged"]) == 2
    capsys.readouterr()
    assert cli.invoke(["devices", "--json"]) == 0
    listed = [row for row in json.loads(capsys.readouterr().out)["tables"] if row["device"] == cpu.slug and str(folder) in row["file"]]
    assert [row["origin"] for row in listed] == ["", "shipped"]


def test_a_table_that_may_not_be_used_here_is_exit_code_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = attached_devices()[0]
    target = Target(cpu.slug, "onnxruntime")
    table = dataclasses.replace(made(BLOCKS), target=target)  # with the context of another device
    path = table.save(folder / "latency_tables")
    assert cli.invoke(["table", "check", str(path)]) == 1
    assert "measured elsewhere" in capsys.readouterr().out
    assert cli.invoke(["table"]) == 2
