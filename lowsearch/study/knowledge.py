"""What is known of the networks of a space: their predicted latency, and in a study their estimated accuracy.

Read from a latency table, or from a study's folder alone: no images, no device and no running search are needed. `explain` and `refine`
work on it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from lowsearch import locations
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.accuracy.scores import Unit
from lowsearch.arch import Arch
from lowsearch.errors import NotInSpaceError, StudyError, TableError
from lowsearch.latency.energy_model import fit_energy
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import usable_table
from lowsearch.latency.table import LatencyTable, default_runtime
from lowsearch.latency.target import Target, resolve_device, resolve_target
from lowsearch.search.devices import Fleet, fit_scales, scales_from
from lowsearch.search.estimates import AccuracyModel, Estimator, LatencyModel
from lowsearch.search.verification import Verifications, VerifiedLatency
from lowsearch.space import SearchSpace
from lowsearch.study.parts import stand_in_of
from lowsearch.study.settings import StudySettings, read_study_file, stored_settings

SPACE_FILE = "space.yaml"
RECIPE_FILE = "recipe.yaml"
TABLE_FILE = "latency_table.jsonl"
LARGEST_EMBEDDED_PX = 96
"""The embedded images have 28 pixels: what they say about networks for more than this is not worth training for."""


class ScoreModel(AccuracyModel, Protocol):
    """Estimated accuracy, or the proxy that stands for it; `accuracy.predictor.AccuracyPredictor` is one."""

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much each genome of `after` (n, n_genes) is better than `before` (n_genes,): mean (n,), standard deviation (n,)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """The predictors of one space on one target."""

    space: SearchSpace
    latency: LatencyPredictor
    latency_source: Literal["predicted", "table"]
    """`table` where the device is not attached."""
    score: ScoreModel | None = None
    """None without a study, and in a study that has trained nothing."""
    fleet: Fleet | None = None
    """All devices of the study, where there are several; `latency` is the first's."""

    @property
    def score_source(self) -> str:
        """Of the score, as in the column `accuracy_source`; empty without a score."""
        return "" if self.score is None else self.score.source

    @property
    def score_unit(self) -> Unit | Literal[""]:
        """Of the score; empty without one."""
        return "" if self.score is None else self.score.unit

    @property
    def estimator(self) -> Estimator:
        """Scores populations of the space, on the table's target."""
        return self._estimator(self.latency)

    def estimator_with(self, verifications: Verifications) -> Estimator:
        """As `estimator`, with the measured latency of networks that were verified."""
        return self._estimator(VerifiedLatency(self.latency, verifications))

    def _estimator(self, latency: LatencyModel) -> Estimator:
        target = self.latency.table.target
        latency = latency if self.fleet is None else self.fleet.with_first(latency)
        return Estimator(self.space, latency, batch=target.batch, precision=target.precision, energy=fit_energy(self.latency))


def targets_of(settings: StudySettings) -> tuple[Target, ...]:
    """The targets of a study's latencies, one a device."""
    named = settings.runtimes or (None,)
    runtimes = named * len(settings.devices) if len(named) == 1 else named
    return tuple(
        resolve_target(
            device, runtime or default_runtime(device), precision=settings.precision, batch=settings.batch, threads=settings.threads
        )
        for device, runtime in zip(settings.devices, runtimes, strict=True)
    )


def target_of(settings: StudySettings) -> Target:
    """The target that a study measures: the first."""
    return targets_of(settings)[0]


def table_files(settings: StudySettings) -> tuple[str, ...]:
    """Where a study keeps its latency tables, one a device."""
    return (TABLE_FILE, *(f"{Path(TABLE_FILE).stem}-{i}.jsonl" for i in range(2, len(settings.devices) + 1)))


def fleet_of(folder: Path, settings: StudySettings, space: SearchSpace, first: LatencyPredictor) -> Fleet | None:
    """The devices of the study in `folder`, `first` among them; None where there is one. Their scales are fitted where it is new."""
    if len(settings.devices) == 1:
        return None
    others = [LatencyPredictor(space, LatencyTable.load(folder / file)) for file in table_files(settings)[1:]]
    devices = dict(zip(settings.labels, (first, *others), strict=True))
    stored = read_study_file(folder) or {}
    scales = scales_from(stored["devices"]) if "devices" in stored else fit_scales(space, devices, _capacity(folder, settings, space))
    return Fleet(devices, scales)


def _capacity(folder: Path, settings: StudySettings, space: SearchSpace) -> AccuracyModel:
    """What tells which networks of different devices are worth the same before any is trained."""
    small = min(px for px, _ in space.genes[0].choices) <= LARGEST_EMBEDDED_PX
    plain = dataclasses.replace(settings, accuracy="macs" if small else "published")
    stand_in = stand_in_of(settings, space, folder) or stand_in_of(plain, space, folder)
    assert stand_in is not None
    return stand_in


def on_target(space: SearchSpace, target: Target) -> Knowledge:
    """What the latency table of `target` tells. Raises TableError where there is none of `space`, naming the command that measures it."""
    table = usable_table(space, target)
    if table is None:
        raise TableError(f"no latency table of {target} for space {space.name!r}", hint=f"{target.profile_command} --space {space.name}")
    return _known(space, table)


def of_study(folder: Path, settings: StudySettings | None = None) -> Knowledge:
    """What the study in `folder` knows, its own latency table before any other of its target.

    Raises StudyError where it is no study, TableError where no latency table can be found.
    """
    settings = settings or settings_of(folder)
    space = SearchSpace.load(folder / SPACE_FILE if (folder / SPACE_FILE).exists() else settings.space)
    space = space.with_num_classes(_num_classes(folder, space))
    stored = folder / TABLE_FILE
    known = _known(space, LatencyTable.load(stored)) if stored.exists() else on_target(space, target_of(settings))
    if stored.exists():
        known = dataclasses.replace(known, fleet=fleet_of(folder, settings, space, known.latency))
    stand_in = stand_in_of(settings, space, folder)
    if stand_in is not None:
        return dataclasses.replace(known, score=stand_in)
    records = sorted(AccuracyRecords(folder / "records.jsonl"), key=lambda record: (record.arch_id, record.rung))
    return dataclasses.replace(known, score=AccuracyPredictor(space).fit(records)) if records else known


def settings_of(folder: Path) -> StudySettings:
    """The settings of the study in `folder`. Raises StudyError where it is none."""
    settings = stored_settings(folder)
    if settings is None:
        raise StudyError(f"{folder} holds no study.yaml, so it is not a study", hint=f"lowsearch run --study {folder.name}")
    return settings


def space_of(arch: Arch) -> SearchSpace:
    """The first of the spaces found here that contains `arch`. Raises NotInSpaceError where none does."""
    names = sorted({path.stem for folder in locations.folders("search_spaces") for path in folder.glob("*.yaml")})
    for name in names:
        space = SearchSpace.load(name).with_num_classes(arch.num_classes)
        if space.contains(arch):
            return space
    raise NotInSpaceError(f"network {arch.arch_id} is in none of the spaces {', '.join(names)}", hint="name its space: --space FILE.yaml")


def _known(space: SearchSpace, table: LatencyTable) -> Knowledge:
    attached = resolve_device(table.target.device).attached
    return Knowledge(space=space, latency=LatencyPredictor(space, table), latency_source="predicted" if attached else "table")


def _num_classes(folder: Path, space: SearchSpace) -> int:
    """As in the networks that the study has described: its data set decided it."""
    path = folder / "networks.json"
    try:
        networks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        archs: Sequence[Arch] = [Arch.from_dict(values["arch"]) for values in list(networks.values())[:1]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint=f"lowsearch run --study {folder.name}") from error
    return archs[0].num_classes if archs else space.num_classes
