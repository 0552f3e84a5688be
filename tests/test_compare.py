"""`lowsearch compare`: networks of any origin in one protocol, named errors, and a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowsearch import cost
from lowsearch.errors import DeviceError, UsageError
from lowsearch.latency import worker
from lowsearch.latency.compare import ComparedNetwork, compare
from lowsearch.latency.measure import Effort, Request, steps
from lowsearch.latency.target import Device, Target, attached_devices
from lowsearch.latency.timing import Timing, TimmNetwork, item_from_dict, item_to_dict
from lowsearch.model.zoo import build_timm, count_timm
from lowsearch.presets import PRESETS
from lowsearch.report.comparison import build_comparison, figure

CPU = Device(slug="fake-cpu", kind="cpu", name="Fake processor")
TARGET = Target("fake-cpu", "onnxruntime")
NAMES = ["lowformer_b0", "resnet18", "cpubone_b0", "mobilenetv4_conv_small"]
MS = {"lowformer_b0": 4.0, "resnet18": 3.0, "cpubone_b0": 2.0, "mobilenetv4_conv_small": 1.0}


def launch(request: Request) -> Iterator[Timing]:
    """A device on which every network takes its time in MS, and the second process runs 10 % slower throughout."""
    for number, step in enumerate(request.steps):
        for item in step:
            name = item.name if isinstance(item, TimmNetwork) else next(n for n, arch in PRESETS.items() if arch == item)
            ms = MS[name] * (1.1 if request.process == 1 else 1.0)
            yield Timing(item=item, process=request.process, hot_ms=(ms,) * 3, step=str(number))


def compared(names: list[str] | None = None, **options: object) -> list[ComparedNetwork]:
    return compare(names or NAMES, TARGET, devices=[CPU], launch=launch, **options)  # type: ignore[arg-type]


def test_networks_come_fastest_first_with_what_they_cost() -> None:
    rows = compared()
    assert [row.name for row in rows] == ["mobilenetv4_conv_small", "cpubone_b0", "resnet18", "lowformer_b0"]
    assert [row.latency_ms for row in rows] == pytest.approx([1.0, 2.0, 3.0, 4.0], rel=0.02), "the slow process is divided out"
    counted = cost.count(PRESETS["lowformer_b0"])
    assert (rows[-1].macs, rows[-1].params) == (counted.macs, counted.params)
    assert rows[-1].gmacs_per_s == pytest.approx(counted.macs / rows[-1].latency_ms / 1e6)
    assert {row.name: row.top1_percent for row in rows}["resnet18"] == 73.3


def without_resnet(request: Request) -> Iterator[Timing]:
    for timing in launch(request):
        if timing.item == TimmNetwork("resnet18", 224):
            timing = dataclasses.replace(timing, hot_ms=(), refused="network resnet18: no kernel")
        yield timing


def test_what_the_runtime_cannot_execute_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    rows = compare(NAMES, TARGET, devices=[CPU], launch=without_resnet)
    assert [row.name for row in rows] == ["mobilenetv4_conv_small", "cpubone_b0", "lowformer_b0"]
    assert [record.message for record in caplog.records] == ["left out: network resnet18: no kernel"]
    with pytest.raises(DeviceError, match="can execute none of resnet18"):
        compare(["resnet18"], TARGET, devices=[CPU], launch=without_resnet)


@pytest.mark.parametrize("name", ["lowformer_b0", "cpubone_b3"])
def test_a_preset_and_timms_network_of_that_name_cost_the_same(name: str) -> None:
    timm_name = {"cpubone_b3": "cpubone_b3"}.get(name, name)
    counted, ours = count_timm(timm_name, 224), cost.count(PRESETS[name])
    assert (counted.macs, counted.params) == (ours.macs, ours.params)


def test_a_network_is_taken_as_it_would_be_deployed() -> None:
    """RepVGG's training branches are folded into one convolution."""
    import timm

    trained = timm.create_model("repvit_m0_9", pretrained=False).eval()
    deployed = build_timm("repvit_m0_9", 224)
    assert len(list(deployed.modules())) < len(list(trained.modules()))
    with torch.no_grad():
        assert deployed(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_resolution_holds_for_all_and_a_file_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = dataclasses.replace(PRESETS["lowformer_b0"], resolution_px=160)
    path = tmp_path / "arch.json"
    path.write_text(own.to_json())

    def any_time(request: Request) -> Iterator[Timing]:
        for step in request.steps:
            for item in step:
                yield Timing(item=item, process=request.process, hot_ms=(1.0,) * 3)

    rows = compare([str(path), "resnet18", "lowformer_b1"], TARGET, devices=[CPU], launch=any_time)
    assert {Path(r.name).name: r.resolution_px for r in rows} == {"arch.json": 160, "resnet18": 224, "lowformer_b1": 224}
    rows = compare([str(path), "resnet18"], TARGET, devices=[CPU], launch=any_time, resolution_px=192)
    assert {r.resolution_px for r in rows} == {192}
    assert rows[0].macs != count_timm("resnet18", 224).macs


@pytest.mark.parametrize(
    ("name", "message"),
    [("repvit_m1_x", "did you mean repvit_m1"), ("no/such/arch.json", "no such file"), ("", "unknown network")],
)
def test_a_name_nobody_knows_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compared([name])


def test_a_network_of_timm_takes_the_number_of_classes_that_is_asked_for() -> None:
    own, few = count_timm("resnet18", 64), count_timm("resnet18", 64, 10)
    assert own.params - few.params == (1000 - 10) * (512 + 1)
    assert own.macs - few.macs == (1000 - 10) * 512
    module, *_ = worker.build(TimmNetwork("test_efficientnet", 32, 10))
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_timm_network_travels_as_json_and_gets_its_place_in_a_step() -> None:
    import numpy as np

    item = TimmNetwork("resnet18", 192)
    for one in (item, TimmNetwork("resnet18", 192, 10)):
        assert item_from_dict(json.loads(json.dumps(item_to_dict(one)))) == one
    assert item_from_dict({"timm": "resnet18", "resolution_px": 192}) == item, "as it was written before there was a choice"
    timing = Timing(item=item, process=1, hot_ms=(1.0, 2.0))
    assert Timing.from_dict(json.loads(json.dumps(timing.to_dict()))) == timing
    items = [item, *PRESETS.values()]
    grouped = steps(items, rng=np.random.default_rng(0))
    assert sorted(map(str, (one for group in grouped for one in group))) == sorted(map(str, items))


def test_real_networks_run_and_agree_with_torch() -> None:
    cpu = attached_devices()[0]
    effort = Effort(processes=1, rounds=1, warmups=1, round_ms=1.0, max_samples=3)
    rows = compare(["mobilenetv4_conv_small", "lowformer_b0"], Target(cpu.slug, "onnxruntime"), resolution_px=128, effort=effort)
    assert {row.name for row in rows} == {"mobilenetv4_conv_small", "lowformer_b0"} and all(row.latency_ms > 0 for row in rows)


def test_the_page_stands_alone_and_shows_every_network(tmp_path: Path) -> None:
    rows = compared()
    text = build_comparison(rows, str(TARGET), tmp_path / "compare.html").read_text(encoding="utf-8")
    assert all(name in text for name in NAMES) and "Plotly" in text
    assert "https://cdn" not in text.split("Plotly.newPlot")[-1]
    front = figure(rows).data[0]
    assert list(front.x) == pytest.approx([1.0, 2.0, 4.0], rel=0.02), "resnet18 is dominated"


def test_a_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    row = dataclasses.replace(compared(["resnet18"])[0], name="</script><b>x</b>", top1_percent=None)
    text = build_comparison([row], "<i>t</i>", tmp_path / "c.html").read_text(encoding="utf-8")
    assert "</script><b>" not in text and "<i>t</i>" not in text
