"""What a latency belongs to: the `Target` (device, runtime, precision, batch, threads), the devices of this machine, and the
`Context` (versions, driver, load, date) that every measurement carries. Two targets are never mixed.

A device has a slug, which names its folder under `latency_tables/`: `rtx3090`, `amd-epyc-9654`, `intel-core-i7-12700h`. A virtual
machine that hides its processor's name is told apart by what it does show: `intel-xeon-f6-m167-2vcpu`.
Nothing here imports torch: `lowsearch devices` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from lowsearch.errors import DeviceError
from lowsearch.footprint import Precision
from lowsearch.latency.machine import cpu_detail, cpu_facts, cpu_name, governor, load_average, query, system_name

DeviceKind = Literal["cpu", "cuda", "absent"]

_SLUG = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What a latency belongs to. `device` is a slug, never the alias `cpu`; `resolve_target` makes one from what a user typed."""

    device: str
    runtime: str
    precision: Precision = "fp32"
    batch: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("device", "runtime"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _SLUG.fullmatch(value):
                raise DeviceError(
                    f"{name} {value!r} is not a name of lower-case letters, digits, dots and dashes", hint="lowsearch devices"
                )
        if self.device in _ALIASES:
            raise DeviceError(f"device {self.device!r} is an alias, not a device; use resolve_target", hint="lowsearch devices")
        if self.precision not in get_args(Precision):
            raise DeviceError(f"precision is {self.precision!r}, expected one of {', '.join(get_args(Precision))}")
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DeviceError(f"{name} is {value!r}, expected a whole number of at least 1")

    @property
    def table_path(self) -> Path:
        """Where this target's table lies, relative to a folder of latency tables."""
        return Path(self.device) / f"{self.runtime}-{self.precision}-b{self.batch}-t{self.threads}.jsonl"

    @property
    def profile_command(self) -> str:
        """The command that measures this target's table."""
        words = f"lowsearch profile --device {self.device} --runtime {self.runtime}"
        for name, default in (("precision", "fp32"), ("batch", 1), ("threads", 1)):
            value = getattr(self, name)
            words += f" --{name} {value}" if value != default else ""
        return words

    def __str__(self) -> str:
        return f"{self.device} {self.runtime} {self.precision} batch {self.batch} threads {self.threads}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Target:
        """Inverse of `dataclasses.asdict`. Raises DeviceError on unknown or missing fields."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            raise DeviceError(f"target has fields {sorted(values)}, expected {sorted(names)}")
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device: attached to this machine (`cpu`, `cuda`), or known by name only (`absent`)."""

    slug: str
    kind: DeviceKind
    name: str
    """As its maker or driver calls it."""
    detail: str = ""
    """What tells it from others of the same name: processor signature and caches, or memory."""
    driver: str = ""

    @property
    def attached(self) -> bool:
        return self.kind != "absent"


_DECIDING = ("memory_format", "freed_memory")
"""Runtime options that two measurements have to agree in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything around a measurement that could change it. `fingerprint` is the part that must agree before a table is used."""

    device_name: str
    device_detail: str
    driver: str
    os: str
    python: str
    versions: Mapping[str, str]
    """Versions of lowsearch and of the packages that the runtime executes with."""
    runtime_options: Mapping[str, str | int]
    """What the runtime was told: exporter, opset, optimisation level, bytes flushed before a cold run."""
    statistic: str
    threads: int
    precision: str
    batch: int
    date_utc: str
    load_average: float | None
    governor: str
    """Frequency governor of the first core, or `unknown` where the kernel does not tell."""
    git_sha: str = ""
    """Commit of lowsearch when it ran from a checkout."""
    clocks: str = ""
    """Of a GPU: clocks of its processors and its memory as the driver told them then, and the highest that they may take."""
    power_limit: str = ""
    """Of a GPU: the power that its driver lets it draw."""
    origin: str = ""
    """`shipped` where it came with lowsearch: another machine measured it, whatever the names and versions say."""
    measured_again: int = 0
    """How many of a table's items were timed in further processes because they were doubtful (doubt.py)."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides whether two measurements may be compared: the device, the versions that execute, the layout of tensors, what
        becomes of freed memory, and who measured it."""
        executing = {name: version for name, version in self.versions.items() if name != "lowsearch"}
        executing |= {name: str(option) for name, option in self.runtime_options.items() if name in _DECIDING}
        shipped = {"origin": self.origin} if self.origin else {}
        return {"device_name": self.device_name, "device_detail": self.device_detail, "driver": self.driver, **executing, **shipped}


def attached_devices() -> list[Device]:
    """The devices that this machine can measure, its CPU first."""
    return [_cpu(), *_cuda_devices()]


def resolve_device(name: str, *, devices: Sequence[Device] | None = None) -> Device:
    """The device a user means by `name`: a slug, or `cpu` or `cuda` for the first attached of that kind.

    A name that is not attached gives an `absent` Device: its table may be used on purpose, but nothing can be measured.
    """
    devices = attached_devices() if devices is None else devices
    slug = name.strip().lower()
    if slug in _ALIASES:
        kind = _ALIASES[slug]
        found = next((device for device in devices if device.kind == kind), None)
        if found is None:
            raise DeviceError(f"no {kind} device is attached to this machine; attached: {_listed(devices)}", hint="lowsearch devices")
        return found
    found = next((device for device in devices if device.slug == slug), None)
    if found is not None:
        return found
    if not _SLUG.fullmatch(slug):
        raise DeviceError(f"device {name!r} is not a name of lower-case letters, digits, dots and dashes", hint="lowsearch devices")
    return Device(slug=slug, kind="absent", name=slug)


def resolve_target(
    device: str, runtime: str, *, precision: str = "fp32", batch: int = 1, threads: int = 1, devices: Sequence[Device] | None = None
) -> Target:
    """The Target a user means; `cpu` and `cuda` become the slug of the attached device."""
    slug = resolve_device(device, devices=devices).slug
    return Target(slug, runtime, precision, batch, threads)  # type: ignore[arg-type]  # __post_init__ checks the precision.


def require_attached(target: Target, *, devices: Sequence[Device] | None = None) -> Device:
    """The attached device of `target`. Raises DeviceError: what is attached, and how a table comes from elsewhere."""
    devices = attached_devices() if devices is None else devices
    device = resolve_device(target.device, devices=devices)
    if not device.attached:
        raise DeviceError(
            f"device {target.device} is not attached to this machine (attached: {_listed(devices)})",
            hint=f"on a machine that has it run `{target.profile_command}`, and copy latency_tables/{target.table_path} here",
        )
    return device


def context(
    target: Target, device: Device, *, statistic: str, versions: Mapping[str, str], runtime_options: Mapping[str, str | int]
) -> Context:
    """The Context of a measurement that starts now on this machine."""
    return Context(
        device_name=device.name, device_detail=device.detail, driver=device.driver,
        os=system_name(), python=platform.python_version(),
        versions={"lowsearch": metadata.version("lowsearch"), **versions}, runtime_options=dict(runtime_options), statistic=statistic,
        threads=target.threads, precision=target.precision, batch=target.batch,
        date_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), load_average=load_average(), governor=governor(), git_sha=_git_sha(),
        **gpu_state(device),
    )  # fmt: skip


def gpu_state(device: Device) -> dict[str, Any]:
    """`clocks` and `power_limit` of a CUDA device at this moment, for its Context; empty for others, and where its driver does not tell."""
    if device.kind != "cuda":
        return {}
    fields = "name,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    for line in query("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines():
        name, *values = (part.strip() for part in line.split(","))
        if cuda_slug(name) == device.slug and len(values) == 5:
            sm, max_sm, memory, max_memory, power = values
            return {"clocks": f"{sm} of {max_sm}, memory {memory} of {max_memory}", "power_limit": power}
    return {}


def gpu_clock_mhz(slug: str) -> float | None:
    """The clock of a CUDA device's processors at this moment; None where its driver does not tell."""
    for line in query("nvidia-smi", "--query-gpu=name,clocks.sm", "--format=csv,noheader,nounits").splitlines():
        name, _, mhz = line.rpartition(",")
        if cuda_slug(name) == slug and mhz.strip().isdigit():
            return float(mhz)
    return None


def cpu_slug(model_name: str, *, family: str = "", model: str = "", n_cpus: int = 1) -> str:
    """Slug of a processor. Names without a model number (virtual machines) get family, model and number of virtual CPUs."""
    text = re.sub(r"\(r\)|\(tm\)|\(c\)|™|®", " ", model_name.lower())
    text = re.sub(
        r"@.*$|^\d+th gen |\b\d+-core\b|\b(six|eight|twelve|quad|dual)-core\b|\bcpu\b|\bprocessor\b|\bversion\b|\bwith radeon.*$|\bw/.*$",
        " ",
        text,
    )
    slug = re.sub(r"[^a-z0-9]+", "-", text).strip("-")
    # "2.5+" of QEMU and the like name no processor; a model number has a digit run of its own or with a letter (7502p, i7-12700h, m2).
    generic = not slug or not re.search(r"\d", slug) or "qemu" in slug or "virtual" in slug
    if generic:
        parts = [
            slug or platform.machine().lower().replace("_", "-"),
            f"f{family}" if family else "",
            f"m{model}" if model else "",
            f"{n_cpus}vcpu",
        ]
        slug = "-".join(part for part in parts if part)
    return slug


def cuda_slug(name: str) -> str:
    """Slug of a CUDA device: `NVIDIA GeForce RTX 3090` is `rtx3090`, `NVIDIA A100-SXM4-80GB` is `a100-sxm4-80gb`."""
    text = re.sub(r"\b(nvidia|geforce|tesla|quadro|gpu)\b", " ", name.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", text).strip("-")
    return re.sub(r"\b(rtx|gtx)-(?=[a-z]?\d)", r"\1", slug) or "cuda"


_ALIASES: dict[str, DeviceKind] = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}


def _listed(devices: Sequence[Device]) -> str:
    return ", ".join(f"{device.slug} ({device.name})" for device in devices) or "none"


@cache
def _cpu() -> Device:
    facts, n_cpus = cpu_facts(), os.cpu_count() or 1
    name = cpu_name(facts)
    slug = cpu_slug(name, family=facts.get("cpu family", ""), model=facts.get("model", ""), n_cpus=n_cpus)
    return Device(slug=slug, kind="cpu", name=name, detail=cpu_detail(facts, n_cpus))


@cache
def _cuda_devices() -> tuple[Device, ...]:
    table = query("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    devices = []
    for line in table.splitlines():
        name, driver, memory = (part.strip() for part in (line.split(",") + ["", ""])[:3])
        devices.append(Device(slug=cuda_slug(name), kind="cuda", name=name, detail=memory, driver=driver))
    return tuple(devices)


@cache
def _git_sha() -> str:
    root = Path(__file__).resolve().parents[2]
    return query("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else ""
