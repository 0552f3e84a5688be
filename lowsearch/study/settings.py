"""What a study is asked to do: the settings of `lowsearch run`, checked, stored in study.yaml, and compared on resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lowsearch.accuracy.ladder import RUNGS
from lowsearch.errors import StudyError, UsageError
from lowsearch.search.devices import device_labels
from lowsearch.search.objectives import DEFAULT_CONFIDENCE, Limit, Objectives, parse_limits, parse_objectives
from lowsearch.search.samplers import SAMPLERS
from lowsearch.study.workers.database import check_url
from lowsearch.study.workers.engines import check_engine
from lowsearch.train import rungs_of

TRAINED, SUPERNET = "trained", "supernet"
TrainDevice = Literal["cpu", "cuda"]
STAND_INS = {"params": "proxy:params", "macs": "proxy:macs", "published": "prior:published", SUPERNET: "supernet"}
"""What may stand in for accuracy where nothing is trained, and the `accuracy_source` that every file then states. `supernet` is followed by
a colon and a name."""

DEFAULT_BUDGET_S = 480.0
DEFAULT_DATA = "fashion-mnist-mini"
DEFAULT_RUNGS = ",".join(map(str, rungs_of(RUNGS)))
SCHEMA = "lowsearch-study"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """Settings of one study. `device` may be an alias (`cpu`); study.yaml holds what it meant."""

    device: str = "cpu"
    """Several are joined by commas; networks are measured on the first."""
    runtime: str | None = None
    """One for all devices, or one for each, joined by commas; None for what each is usually measured with."""
    precision: str = "fp32"
    batch: int = 1
    threads: int = 1
    """CPU threads of the runtime that latency is measured with."""
    space: str = "lowformer-micro"
    """Name or YAML file."""
    data: str | None = None
    """Data set by name; None for the embedded one."""
    objective: str = "acc-latency"
    limits: tuple[Limit, ...] = ()
    budget_s: float | None = None
    """Seconds of search; 8 minutes where neither a budget nor a number of trials is given."""
    trials: int | None = None
    """Networks that the sampler proposes and that are scored; the hand-made family comes on top."""
    sampler: str = "lowsearch"
    """One of `samplers.SAMPLERS`."""
    seed: int = 0
    workers: int = 2
    """Processes that train side by side, one thread each."""
    train_device: TrainDevice | None = None
    """Where networks are trained; None for the GPU where a GPU of this machine is searched for, else the CPU."""
    recipe: str | None = None
    """Training recipe, as `train.recipe` reads it; None for the one made for the data."""
    rungs: str = DEFAULT_RUNGS
    """How far networks are trained before they are judged, the cheapest first, as `train.rung` reads them."""
    accuracy: str | None = None
    """`trained`, or what stands in for it: a proxy, the published trend, or `supernet:NAME`; None for `trained`, where the data suit the
    space."""
    final_seeds: int | None = None
    """Fresh trainings of every finalist; None for 1, or 2 where the budget allows."""
    allow_stale: bool = False
    """Whether a latency table of this machine may be used that other versions, or another driver, measured."""
    storage: str | None = None
    """Url of the database server that holds the trials, without a password; None for study.db in the study's folder."""
    engine: str = "local"
    """Where networks are trained: `local`, in worker processes of this machine, or as tasks of Ray: `ray`, `ray:auto`, `ray://host:port`."""
    in_flight: int | None = None
    """Trials proposed before the first of them has to be known; None for 1, with Ray for twice the workers."""
    trial_cpus: float = 1.0
    """CPUs that a task of Ray takes, and from 2 on the threads it trains on."""
    trial_gpus: float | None = None
    """GPUs that a task of Ray takes; None for 1 where networks are trained on GPUs, else 0."""
    warm_start: tuple[str, ...] = ()
    """Earlier studies, by name or folder, whose trainings the study began with (`warm_start.py`)."""

    def __post_init__(self) -> None:
        parse_objectives(self.objective)
        if len(self.runtimes) not in (0, 1, len(self.devices)):
            raise UsageError(
                f"{len(self.runtimes)} runtimes ({', '.join(self.runtimes)}) for --device {self.device}: expected one for all, or one each",
                hint=f"--device {self.device} --runtime {self.runtimes[0]}",
            )
        if "worst_latency" in self.objectives.metrics and len(self.devices) == 1:
            raise UsageError(
                f"worstlatency is over several devices, and there is one, {self.device}",
                hint=f"--objective {self.objective.replace('worstlatency', 'latency')}, or one more --device",
            )
        for name, choices in (
            ("sampler", tuple(SAMPLERS)), ("train_device", (None, *get_args(TrainDevice))),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(c for c in choices if c)
                raise UsageError(
                    f"{name} is {value!r}; known: {listed}", hint=f"--{name.replace('_', '-')} {next(c for c in choices if c)}"
                )
        known = (TRAINED, *(name for name in STAND_INS if name != SUPERNET))
        if self.accuracy is not None and self.accuracy not in known and not self.supernet:
            raise UsageError(f"accuracy is {self.accuracy!r}; known: {', '.join(known)}, supernet:NAME", hint=f"--accuracy {TRAINED}")
        for name, least in (("batch", 1), ("threads", 1), ("workers", 1), ("seed", 0), ("trials", 1), ("final_seeds", 1), ("in_flight", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise UsageError(
                    f"{name} is {value!r}, expected a whole number of at least {least}", hint=f"--{name.replace('_', '-')} {least}"
                )
        if self.budget_s is not None and not 0 < self.budget_s < float("inf"):
            raise UsageError(f"budget is {self.budget_s!r} seconds, expected more than 0", hint="--budget 8m")
        object.__setattr__(self, "rungs", ",".join(map(str, rungs_of(self.rungs))))
        check_engine(self.engine)
        if not self.trial_cpus > 0 or not (self.trial_gpus is None or self.trial_gpus >= 0):
            raise UsageError("a task of Ray takes CPUs, and maybe GPUs or a part of one", hint="--trial-cpus 1 --trial-gpus 0.25")
        if self.n_ahead > 1 and self.engine == "local" and self.workers > 1:
            raise UsageError(
                "several workers of this machine propose as they become free, so --in-flight has no meaning for them",
                hint="--workers 1, or --engine ray",
            )
        if self.storage is not None:
            check_url(self.storage)
        if self.warm_start and not self.trains:
            raise UsageError(
                "a study that trains nothing has no use for the trainings of others",
                hint="leave out --warm-start, or search by acc without --accuracy",
            )
        if self.stand_in and any(limit.metric == "accuracy" for limit in self.limits):
            raise UsageError(f"accuracy has a limit, but --accuracy {self.accuracy} measures none", hint="drop the limit or --accuracy")

    @property
    def stand_in(self) -> str:
        """`accuracy_source` of what stands in for accuracy; empty where networks are trained."""
        return STAND_INS.get((self.accuracy or "").partition(":")[0], "")

    @property
    def supernet(self) -> str:
        """Name or folder of the supernet whose scores stand in for accuracy; empty where none does."""
        kind, _, name = (self.accuracy or "").partition(":")
        return name if kind == SUPERNET else ""

    @property
    def trains(self) -> bool:
        """Whether the search trains networks."""
        asked = (*self.objectives.metrics, *(limit.metric for limit in self.limits))
        return "accuracy" in asked and not self.stand_in

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that are searched for, the one whose networks are measured first."""
        return tuple(name.strip() for name in self.device.split(","))

    @property
    def runtimes(self) -> tuple[str, ...]:
        """As many as devices once `assembly.resolve` has named them all; empty where none was named."""
        return tuple(name.strip() for name in self.runtime.split(",")) if self.runtime else ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What files and limits call the devices of resolved settings."""
        return device_labels(self.devices, self.runtimes) if len(self.devices) > 1 else self.devices

    @property
    def measured_limits(self) -> tuple[Limit, ...]:
        """The limits that hold on the first device, the one whose networks are measured."""
        return tuple(limit for limit in self.limits if limit.device in ("", self.labels[0]))

    @property
    def trains_elsewhere(self) -> bool:
        """Whether trainings are tasks on a cluster that this machine need not be like."""
        return self.engine not in ("local", "ray")

    @property
    def n_ahead(self) -> int:
        """How many trials may be proposed before the first of them is known."""
        return self.in_flight or (1 if self.engine == "local" else 2 * self.workers)

    @property
    def task_gpus(self) -> float:
        """GPUs that one task of Ray takes."""
        return float(self.train_device == "cuda") if self.trial_gpus is None else self.trial_gpus

    @property
    def objectives(self) -> Objectives:
        return parse_objectives(self.objective)

    @property
    def confidence(self) -> float:
        """With which a latency limit has to be kept."""
        return self.limits[0].confidence if self.limits else DEFAULT_CONFIDENCE

    @property
    def search_budget_s(self) -> float | None:
        """Seconds of search, None where only the number of trials ends it."""
        return self.budget_s if self.budget_s is not None or self.trials is not None else DEFAULT_BUDGET_S

    def to_dict(self) -> dict[str, Any]:
        """Plain values for study.yaml; `from_dict` inverts it."""
        values = dataclasses.asdict(self)
        bounds = {side: [f"{x.name}={x.bound!r}" for x in self.limits if x.side == side] for side in ("max", "min")}
        values["limits"] = {**bounds, "confidence": self.confidence}
        values["warm_start"] = list(self.warm_start)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudySettings:
        """Inverse of `to_dict`. Raises StudyError on unknown or missing settings."""
        # Studies from before there was a choice have none.
        engine = {"engine": "local", "in_flight": None, "trial_cpus": 1.0, "trial_gpus": None}
        later = {"rungs": DEFAULT_RUNGS, "allow_stale": False, "train_device": "cpu", "storage": None, "warm_start": []}
        values = {**later, **engine, **values}
        names = {field.name for field in dataclasses.fields(cls)}
        for kind, wrong in (("unknown", set(values) - names), ("missing", names - set(values))):
            if wrong:
                raise StudyError(f"{kind} setting {min(wrong)!r}", hint="the study was made by another version, or study.yaml was edited")
        limits = values["limits"]
        if not isinstance(limits, Mapping) or set(limits) != {"max", "min", "confidence"}:
            raise StudyError(f"limits are {limits!r}, expected lists max and min, and confidence")
        parsed = parse_limits(maxima=limits["max"], minima=limits["min"], confidence=limits["confidence"])
        earlier = values["warm_start"]
        if not isinstance(earlier, list) or not all(isinstance(name, str) for name in earlier):
            raise StudyError(f"warm_start is {earlier!r}, expected a list of studies")
        return cls(**{**values, "limits": parsed, "warm_start": tuple(earlier)})


_ENGINE = ("engine", "in_flight", "trial_cpus", "trial_gpus")
EXTENSIBLE = ("budget_s", "trials", "workers", "final_seeds", "allow_stale", "train_device", *_ENGINE)
"""Settings that a resumed study may change: more of the same search, with the table it has. Any other change would mix two studies."""

_FLAGS = {"objective": "--objective", "limits": "--max/--min", "budget_s": "--budget"}


def check_resumable(name: str, stored: StudySettings, asked: StudySettings) -> None:
    """Raise StudyError where `asked` differs from the study's settings in anything but its length and its workers."""
    for field in dataclasses.fields(StudySettings):
        then, now = getattr(stored, field.name), getattr(asked, field.name)
        if then == now or field.name in EXTENSIBLE:
            continue
        flag = _FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
        again = _as_flags(field.name, then)
        raise StudyError(
            f"study {name!r} was made with {field.name} {_shown(then)}, not {_shown(now)}",
            hint=f"resume with {again or f'no {flag}'}, or start another study with another --study NAME",
        )


def _as_flags(name: str, value: Any) -> str:
    if name == "limits":
        flags = [f"--{x.side} {x.name}={x.bound:g}" for x in value]
        confidences = {x.confidence for x in value} - {DEFAULT_CONFIDENCE}
        return " ".join([*flags, *(f"--confidence {confidence:g}" for confidence in confidences)])
    if name == "warm_start":
        return " ".join(f"--warm-start {study}" for study in value)
    return f"--{name.replace('_', '-')} {value}" if value is not None else ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def read_study_file(folder: Path) -> dict[str, Any] | None:
    """The values of study.yaml, or None where the study does not exist yet. Raises StudyError on a damaged file."""
    path = folder / "study.yaml"
    return _read(path, hint=f"mend the file, or remove {folder}") if path.exists() else None


def _read(path: Path, *, hint: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not YAML: {' '.join(str(error).split())}", hint=hint) from error
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}", hint="name a study, or a study.yaml") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA or values.get("version") != VERSION:
        found = f"{values.get('schema')!r} version {values.get('version')!r}" if isinstance(values, dict) else type(values).__name__
        raise StudyError(f"{path} is {found}, expected {SCHEMA!r} version {VERSION}", hint=hint)
    return values


def stored_settings(folder: Path) -> StudySettings | None:
    """The settings of the study in `folder`, or None where there is none yet. `lowsearch run --study NAME` starts from them."""
    path = folder / "study.yaml"
    return settings_in(path, hint=f"mend the file, or remove {folder}") if path.exists() else None


def settings_in(path: Path, *, hint: str = "mend the file, or name another") -> StudySettings:
    """The settings in a study.yaml, wherever it lies. Raises StudyError where it cannot be read, or is none."""
    settings = _read(path, hint=hint).get("settings")
    if not isinstance(settings, Mapping):
        raise StudyError(f"{path}: settings are {settings!r}, expected a mapping", hint=hint)
    try:
        return StudySettings.from_dict(settings)
    except (StudyError, UsageError, TypeError) as error:
        message = error.message if isinstance(error, StudyError | UsageError) else str(error)
        raise StudyError(f"{path}: {message}", hint=hint) from error
