"""Targets, devices and contexts: what a latency belongs to."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from lowsearch.errors import DeviceError
from lowsearch.latency import target as targets
from lowsearch.latency.target import (
    Device,
    Target,
    attached_devices,
    context,
    cpu_slug,
    cuda_slug,
    require_attached,
    resolve_device,
    resolve_target,
)

CPU = Device(slug="amd-epyc-9654", kind="cpu", name="AMD EPYC 9654 96-Core Processor")
GPU = Device(slug="rtx3090", kind="cuda", name="NVIDIA GeForce RTX 3090", detail="24576 MiB", driver="550.54")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD Ryzen 9 5950X 16-Core Processor", "amd-ryzen-9-5950x"),
        ("12th Gen Intel(R) Core(TM) i7-12700H", "intel-core-i7-12700h"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", "intel-xeon-platinum-8375c"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "amd-ryzen-7-7840u"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654"),
        ("Apple M2 Pro", "apple-m2-pro"),
    ],
)
def test_a_processor_is_named_by_its_model(name: str, slug: str) -> None:
    assert cpu_slug(name, family="6", model="85", n_cpus=2) == slug


@pytest.mark.parametrize(
    "name", ["Intel(R) Xeon(R) Processor", "AMD EPYC", "QEMU Virtual CPU version 2.5+", "Intel Core Processor (Skylake, IBRS)", ""]
)
def test_a_hidden_processor_is_told_apart_by_family_model_and_size(name: str) -> None:
    slugs = {cpu_slug(name, family=f, model=m, n_cpus=n) for f, m, n in [("6", "85", 2), ("6", "143", 2), ("6", "85", 4), ("25", "85", 2)]}
    assert len(slugs) == 4
    assert all(Target(slug, "onnxruntime").device == slug for slug in slugs)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090-ti"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-laptop"),
        ("NVIDIA GeForce GTX 1080 Ti", "gtx1080-ti"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("Tesla T4", "t4"),
        ("TITAN RTX", "titan-rtx"),
    ],
)
def test_a_gpu_is_named_as_people_write_it(name: str, slug: str) -> None:
    assert cuda_slug(name) == slug


def test_this_machine_has_a_processor_with_a_usable_name() -> None:
    cpu, *_ = attached_devices()
    assert cpu.kind == "cpu" and cpu.attached and cpu.name
    assert resolve_device("cpu") == cpu == resolve_device(cpu.slug) == resolve_device(f" {cpu.slug.upper()} ")


def test_finding_devices_imports_no_torch() -> None:
    code = "import sys, lowsearch.latency.target as t; t.attached_devices(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "query", lambda *_: "NVIDIA GeForce RTX 3090, 550.54, 24576 MiB\nTesla T4, 550.54, 15360 MiB")
    assert targets._cuda_devices.__wrapped__() == (
        GPU,
        Device(slug="t4", kind="cuda", name="Tesla T4", detail="15360 MiB", driver="550.54"),
    )


def test_a_gpus_clocks_and_power_limit_are_in_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "Tesla T4, 300 MHz, 1590 MHz, 405 MHz, 5001 MHz, 70.00 W\nNVIDIA GeForce RTX 3090, 1695 MHz, 2100 MHz, 9501 MHz, 9751 MHz, 350.00 W"
    )
    monkeypatch.setattr(targets, "query", lambda *command: told if "power.limit" in str(command) else "")
    made = context(Target("rtx3090", "eager"), GPU, statistic="t", versions={}, runtime_options={})
    assert made.clocks == "1695 MHz of 2100 MHz, memory 9501 MHz of 9751 MHz" and made.power_limit == "350.00 W"
    assert context(Target(CPU.slug, "eager"), CPU, statistic="t", versions={}, runtime_options={}).clocks == ""
    assert dataclasses.replace(made, clocks="", power_limit="").fingerprint == made.fingerprint
    monkeypatch.setattr(targets, "query", lambda *command: "")  # An old driver, or none.
    assert targets.gpu_state(GPU) == {}


def test_aliases_mean_the_first_device_of_their_kind() -> None:
    assert resolve_device("cpu", devices=[CPU, GPU]) == CPU
    assert resolve_device("cuda", devices=[CPU, GPU]) == resolve_device("gpu", devices=[CPU, GPU]) == GPU
    with pytest.raises(DeviceError, match=r"no cuda device .* attached: amd-epyc-9654"):
        resolve_device("cuda", devices=[CPU])


def test_an_absent_device_can_be_named_but_not_measured() -> None:
    target = resolve_target("RTX3090", "eager", devices=[CPU])
    assert target == Target("rtx3090", "eager")
    assert not resolve_device("rtx3090", devices=[CPU]).attached
    with pytest.raises(DeviceError) as raised:
        require_attached(target, devices=[CPU])
    assert "amd-epyc-9654 (AMD EPYC 9654 96-Core Processor)" in raised.value.message  # what is attached
    assert "lowsearch profile --device rtx3090 --runtime eager" in str(raised.value.hint)  # where a table comes from
    assert "latency_tables/rtx3090/eager-fp32-b1-t1.jsonl" in str(raised.value.hint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "values",
    [
        {"device": "RTX 3090"},
        {"device": ""},
        {"device": "../etc"},
        {"device": "cpu"},
        {"runtime": "Torch!"},
        {"precision": "int3"},
        {"batch": 0},
        {"batch": 1.5},
        {"batch": True},
        {"threads": -1},
    ],
)
def test_a_malformed_target_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(DeviceError):
        Target(**{"device": "rtx3090", "runtime": "eager", **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a b", "../x", "ä"])
def test_a_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(DeviceError):
        resolve_device(name, devices=[CPU])


def test_a_target_names_its_file_and_its_command() -> None:
    target = Target("rtx3090", "eager", "fp16", 64)
    assert target.table_path.as_posix() == "rtx3090/eager-fp16-b64-t1.jsonl"
    assert target.profile_command == "lowsearch profile --device rtx3090 --runtime eager --precision fp16 --batch 64"
    assert Target.from_dict(dataclasses.asdict(target)) == target
    with pytest.raises(DeviceError, match="fields"):
        Target.from_dict({"device": "rtx3090"})


def test_the_fingerprint_changes_with_device_driver_and_runtime_only() -> None:
    def fingerprint(device: Device = GPU, **versions: str) -> dict[str, str]:
        made = context(Target(device.slug, "eager"), device, statistic="t", versions={"torch": "2.9", **versions}, runtime_options={})
        return dataclasses.replace(made, date_utc="later", load_average=9.0, versions={**made.versions, "lowsearch": "99"}).fingerprint

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(torch="2.10")
    assert fingerprint() != fingerprint(dataclasses.replace(GPU, driver="560"))
    assert fingerprint() != fingerprint(dataclasses.replace(GPU, detail="12 GiB"))


def test_the_fingerprint_changes_with_layout_and_freed_memory_but_not_with_other_options() -> None:
    def fingerprint(**options: str | int) -> dict[str, str]:
        return context(Target(GPU.slug, "eager"), GPU, statistic="t", versions={}, runtime_options=options).fingerprint

    assert fingerprint(memory_format="contiguous") != fingerprint(memory_format="channels-last")
    assert fingerprint(memory_format="contiguous") != fingerprint(memory_format="contiguous", freed_memory="kept")
    assert fingerprint(memory_format="contiguous", flush_bytes=1) == fingerprint(memory_format="contiguous", flush_bytes=2)
