"""The real parts of a study, put together from its folder: space, latency table, training ladder, device.

What decides the numbers is copied into the folder when the study is made (space.yaml, recipe.yaml, latency_table.jsonl), so that a
resumed study works with what it began with, whatever has been edited or measured since.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowsearch.accuracy.ladder import RECORDS, Ladder, require_images
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.prior import RELATIVES_RMSE_POINTS, leave_one_out
from lowsearch.accuracy.records import AccuracyRecord, AccuracyRecords
from lowsearch.accuracy.scores import Scores
from lowsearch.accuracy.supernet import SupernetEstimator
from lowsearch.accuracy.supernet_prior import ScoredNetworks, SupernetPrior
from lowsearch.arch import Arch
from lowsearch.data import ImageData, load_data
from lowsearch.errors import StudyError, UsageError
from lowsearch.files import write_atomically
from lowsearch.latency.energy import why_not_exposed
from lowsearch.latency.energy_model import MIN_COUNTED, counted_networks, fit_energy
from lowsearch.latency.measure import measure_networks
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.profile import current_context, profile, staleness, usable_table
from lowsearch.latency.table import LatencyTable, check_fits
from lowsearch.latency.target import Target, resolve_device
from lowsearch.latency.timing import NetworkLatency
from lowsearch.search.devices import Fleet
from lowsearch.search.estimates import Estimator
from lowsearch.search.feasible import check_limits
from lowsearch.search.objectives import EXACT_METRICS, METRICS, ON_DEVICES, Limit, parse_limits
from lowsearch.search.verification import VERIFIED, Verifications
from lowsearch.space import SearchSpace
from lowsearch.study.knowledge import (
    LARGEST_EMBEDDED_PX,
    RECIPE_FILE,
    SPACE_FILE,
    TABLE_FILE,
    fleet_of,
    table_files,
    target_of,
    targets_of,
)
from lowsearch.study.parts import INHERITED_FILE, FinalScore, HeldOutSet, Parts, Progress
from lowsearch.study.settings import DEFAULT_DATA, TRAINED, StudySettings, TrainDevice, stored_settings
from lowsearch.train import Order, Recipe, can_train, check_recipe, evaluate, recipe, require_trainable, rungs_of, train
from lowsearch.train.order import replace_bytes, scratch
from lowsearch.train.recipe import DEFAULT_RECIPE
from lowsearch.train.supernet import find_supernet

log = logging.getLogger(__name__)

HELD_OUT_FILES: dict[HeldOutSet, str] = {"range": "trust.jsonl", "band": "trust-band.jsonl"}


def resolve(settings: StudySettings) -> StudySettings:
    """`settings` with every default and alias replaced by what it means here.

    Raises StudyError where nothing on this machine can tell the accuracy of the space's networks.
    """
    settings = _resolve_devices(settings)
    space = SearchSpace.load(settings.space)
    small = min(px for px, _ in space.genes[0].choices) <= LARGEST_EMBEDDED_PX
    if settings.accuracy == "published" and small:
        raise StudyError(
            f"published accuracies are of ImageNet networks; they say nothing about space {space.name!r} with its smaller images",
            hint="train (leave --accuracy out), or search the 224 px class: --space lowformer --accuracy published",
        )
    if settings.supernet:
        return _resolve_supernet(settings, space)
    if settings.stand_in:
        return settings
    if settings.data is None and not small:
        raise StudyError(
            f"there is no accuracy signal for space {space.name!r} on this machine: its networks are too large for the embedded images",
            hint="search by a score (--accuracy published, or the proxy --accuracy macs), or train on your images (--data folder:PATH)",
        )
    return dataclasses.replace(
        settings, accuracy=TRAINED, data=settings.data or DEFAULT_DATA, recipe=settings.recipe or DEFAULT_RECIPE,
        train_device=_train_device(settings),
    )  # fmt: skip


def _train_device(settings: StudySettings) -> TrainDevice:
    """Where networks are trained, or scored by a supernet. Raises UsageError where what was asked for cannot be done here."""
    if settings.train_device is not None and not settings.trains_elsewhere:
        require_trainable(settings.train_device)
    return settings.train_device or ("cuda" if _on_gpu(settings) and can_train("cuda") else "cpu")


def _resolve_supernet(settings: StudySettings, space: SearchSpace) -> StudySettings:
    """`settings` with the images of their supernet, and a limit where it was trained for networks up to one.

    Raises StudyError where there is no such supernet, or where it is one of another space.
    """
    try:
        folder, plan = find_supernet(settings.supernet)
    except StudyError:
        if settings.data is None:
            raise
        return settings  # A study that goes on has kept what it needs of it.
    if plan.search_space().genes != space.with_num_classes(plan.num_classes).genes:
        raise StudyError(
            f"supernet {folder.name!r} is of space {plan.search_space().name!r}, not of {settings.space!r} as it is now",
            hint=f"--space {plan.search_space().name}, or train a supernet of {settings.space}",
        )
    limits = settings.limits
    macs = next((limit for limit in limits if limit.metric == "macs" and limit.side == "max"), None)
    if plan.max_macs is not None and (macs is None or macs.bound > plan.max_macs):
        upto, *_ = parse_limits(maxima=[f"macs={plan.max_macs!r}"], confidence=settings.confidence)
        limits = tuple(sorted((*(x for x in limits if x != macs), upto), key=lambda x: (METRICS.index(x.metric), x.device, x.side)))
    return dataclasses.replace(settings, data=settings.data or plan.data, limits=limits, train_device=_train_device(settings))


def _resolve_devices(settings: StudySettings) -> StudySettings:
    """`settings` with its devices, runtimes, objective and the devices of its limits as they are stored."""
    targets = targets_of(settings)
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise UsageError(
                f"{target.device} with runtime {target.runtime} is named twice", hint="drop one --device, or give them different --runtime"
            )
    settings = dataclasses.replace(settings, device=",".join(t.device for t in targets), runtime=",".join(t.runtime for t in targets))
    objectives = settings.objective.split("-")
    if len(targets) > 1:
        if clash := {"throughput", "imagetime"} & {*objectives}:
            raise UsageError(
                f"{min(clash)} is of one device, and {len(targets)} are searched for",
                hint=f"--objective {settings.objective.replace(min(clash), 'latency')}: with several devices, the worst case over them",
            )
        objectives = [ON_DEVICES.get(name, name) for name in objectives]
    limits = tuple(dataclasses.replace(limit, device=_label_meant(limit, settings)) if limit.device else limit for limit in settings.limits)
    return dataclasses.replace(settings, objective="-".join(objectives), limits=limits)


def _label_meant(limit: Limit, settings: StudySettings) -> str:
    """The label of the device that a user's limit names: as it is, by an alias, or by its beginning; empty where there is one device."""
    typed, _, runtime = limit.device.partition("/")
    typed = resolve_device(typed).slug + (f"/{runtime}" if runtime else "")
    found = [label for label in settings.labels if label == typed] or [label for label in settings.labels if label.startswith(typed)]
    if len(found) != 1:
        raise UsageError(
            f"--{limit.side} {limit.name}={limit.bound:g}: {limit.device!r} is {'none' if not found else 'more than one'} of the devices "
            f"{', '.join(settings.labels)}",
            hint=f"--{limit.side} {limit.metric}@{settings.labels[0]}={limit.bound:g}, or {limit.metric} alone for every device",
        )
    return found[0] if len(settings.devices) > 1 else ""


def _on_gpu(settings: StudySettings) -> bool:
    """Whether a GPU of this machine is among the devices searched for."""
    return any(resolve_device(device).kind == "cuda" for device in settings.devices)


def prepare(folder: Path, settings: StudySettings, progress: Progress | None) -> None:
    """Put the space, the recipe and the latency table into the study's folder; measures the table where this machine has none yet."""
    if stored_settings(folder) is None:  # What a run left that ended before the study was made says nothing.
        for left in (folder / SPACE_FILE, folder / RECIPE_FILE, folder / INHERITED_FILE, *folder.glob(f"{Path(TABLE_FILE).stem}*.jsonl")):
            left.unlink(missing_ok=True)
    schedule = _schedule(folder, settings)
    space, data = _space(folder, settings), _data(settings, progress)
    if data is not None:
        space = space.with_num_classes(len(data.classes))
        if schedule is not None:
            check_recipe(schedule, num_classes=len(data.classes))
            require_images(rungs_of(settings.rungs), data, schedule)
    if stored_settings(folder) is None and not settings.supernet:  # What needs no measurement is told before anything is measured.
        exact = [limit for limit in settings.limits if limit.metric in EXACT_METRICS]
        check_limits(Estimator(space, None, batch=settings.batch, precision=targets_of(settings)[0].precision), exact)
    if settings.supernet and not (folder / INHERITED_FILE).exists():
        _score_networks(settings, progress).write(folder / INHERITED_FILE)
    space = _with_classes(space, folder, settings)
    if not (folder / SPACE_FILE).exists():
        write_atomically(folder / SPACE_FILE, SearchSpace.load(settings.space).text)
    if schedule is not None and not (folder / RECIPE_FILE).exists():
        write_atomically(folder / RECIPE_FILE, yaml.safe_dump(schedule.to_dict(), sort_keys=False))
    targets = targets_of(settings)
    if not (folder / TABLE_FILE).exists():
        _require_first_attached(settings)
        for target in targets[1:]:  # Before anything is measured: a table that is missing elsewhere is told at once.
            usable_table(space, target, allow_stale=settings.allow_stale)
    for target, file in zip(targets, table_files(settings), strict=True):
        _prepare_table(folder / file, settings, space, target, progress, first=target == targets[0])


def _require_first_attached(settings: StudySettings) -> None:
    """Raise UsageError where a device that is attached stands behind one that is not: only the first is measured."""
    attached = [resolve_device(device).attached for device in settings.devices]
    if any(attached) and not attached[0]:
        order = sorted(zip(settings.devices, settings.runtimes, attached, strict=True), key=lambda row: not row[2])
        devices, runtimes, _ = zip(*order, strict=True)
        raise UsageError(
            f"{settings.devices[0]} is not attached to this machine, {devices[0]} is; networks are measured on the device named first",
            hint=" ".join([*(f"--device {device}" for device in devices), *(f"--runtime {runtime}" for runtime in runtimes)]),
        )


def _prepare_table(
    stored: Path, settings: StudySettings, space: SearchSpace, target: Target, progress: Progress | None, *, first: bool
) -> None:
    """Put the table of one target at `stored`. Energy is the first device's."""
    if not stored.exists():
        table = usable_table(space, target, allow_stale=settings.allow_stale)
        lacks_energy = first and _lacks_energy(settings, space, table)
        if lacks_energy:
            require_counter(target)
        if table is None or lacks_energy:
            profile(space, target, progress=progress)
            table = usable_table(space, target, allow_stale=settings.allow_stale)
        assert table is not None, "profile has just measured it"
        LatencyPredictor(space, table)  # Raises where the table cannot carry a search.
        if first and _lacks_energy(settings, space, table):
            raise StudyError(f"energy is asked for, but the counter of {target.device} gave none", hint=_WITHOUT_ENERGY)
        _copy_table(table, stored)
    elif not settings.allow_stale and (device := resolve_device(target.device)).attached:
        check_fits(LatencyTable.load(stored), target, current_context(target, device))
    if settings.allow_stale and (stale := staleness(LatencyTable.load(stored))):
        log.warning("the latency table does not fit this machine (%s); it is used all the same, as --allow-stale says", "; ".join(stale))


_LOADED: dict[str, ImageData] = {}
"""Of this process, by name."""
_WITHOUT_ENERGY = "leave energy out of --objective, --max and --min, or search on a machine that counts it"


def _lacks_energy(settings: StudySettings, space: SearchSpace, table: LatencyTable | None) -> bool:
    """Whether the study asks for energy and `table` cannot tell it."""
    asked = {*settings.objectives.metrics, *(limit.metric for limit in settings.limits)}
    return "energy_mj" in asked and (table is None or len(counted_networks(table, space)) < MIN_COUNTED)


def require_counter(target: Target, *, why_not: Callable[[str], str] = why_not_exposed) -> None:
    """Raise StudyError, with the reason, where the energy of `target`'s networks cannot be counted here."""
    device = resolve_device(target.device)
    if not device.attached:
        raise StudyError(f"energy is asked for, but the latency table of {target} holds none", hint=_WITHOUT_ENERGY)
    if why := why_not(device.kind):
        raise StudyError(f"energy is asked for, but this machine exposes no energy counter: {why}", hint=_WITHOUT_ENERGY)


def build_parts(folder: Path, settings: StudySettings) -> Parts:
    """The parts of the study in `folder`, after `prepare`."""
    space, data = _space(folder, settings), _data(settings)
    if data is not None:
        space = space.with_num_classes(len(data.classes))
    space = _with_classes(space, folder, settings)
    target = target_of(settings)
    attached = resolve_device(target.device).attached
    table = LatencyTable.load(folder / TABLE_FILE)
    predictor = LatencyPredictor(space, table)
    fleet = fleet_of(folder, settings, space, predictor)
    untrained = AccuracyPredictor(space)

    def records() -> Sequence[AccuracyRecord]:
        found = AccuracyRecords(folder / RECORDS)
        return sorted(found, key=lambda record: (record.arch_id, record.rung))

    def fit(found: Sequence[Any]) -> AccuracyPredictor | None:
        return copy.copy(untrained).fit(found) if found else None

    def measure(archs: Sequence[Arch], progress: Progress | None) -> Sequence[NetworkLatency]:
        return measure_networks(archs, target, progress=progress)

    def verify(archs: Sequence[Arch]) -> Sequence[NetworkLatency]:
        return measure_networks(archs, target, max_processes=2, energy=False)

    def training() -> Ladder:
        assert data is not None and schedule is not None
        return Ladder(data, schedule, folder=folder, rungs=rungs_of(settings.rungs), seed=settings.seed, device=trains_on)

    def held_out(seed: int, kept_in: HeldOutSet) -> Ladder:
        import torch

        assert data is not None and schedule is not None
        torch.set_num_threads(1)  # As in the workers: on one thread the same training gives the same weights.
        return Ladder(data, schedule, folder=folder, rungs=(1.0,), seed=seed, records=HELD_OUT_FILES[kept_in], device=trains_on)

    def held_out_records(kept_in: HeldOutSet) -> Sequence[AccuracyRecord]:
        return tuple(AccuracyRecords(folder / HELD_OUT_FILES[kept_in]))

    def proxies(archs: Sequence[Arch], progress: Progress | None) -> Mapping[str, Scores]:
        from lowsearch.accuracy.proxies import N_IMAGES, proxy_scores

        assert data is not None
        return proxy_scores(archs, data.train.take(np.arange(min(N_IMAGES, len(data.train)))), progress=progress)

    def finalist(arch: Arch, seed: int, path: Path) -> FinalScore:
        assert data is not None and schedule is not None
        return train_final(arch, data, schedule, seed=seed, path=path, device=trains_on)

    stale = staleness(table) if settings.allow_stale else []

    def order_final(arch: Arch, seed: int, path: Path) -> Order:
        assert data is not None and schedule is not None
        return Order(
            name=f"{arch.arch_id}-s{seed}", function=train_final_elsewhere, shared=data,
            values={"arch": arch, "schedule": schedule, "seed": seed, "device": trains_on},
            accept=partial(_accept_final, path), here=partial(finalist, arch, seed, path),
        )  # fmt: skip

    schedule = _schedule(folder, settings)
    trains_on = settings.train_device or "cpu"
    trains = data is not None and schedule is not None
    return Parts(
        space=space, latency=predictor, latency_source="predicted" if attached else "table", explain=predictor.explain,
        chance_accuracy=1 / space.num_classes, training=training if trains else None, records=records, fit=fit,
        train_final=finalist if trains else None, order_final=order_final if trains else None,
        held_out=held_out if trains else None, held_out_records=held_out_records,
        proxies=proxies if trains else None, measure=measure if attached else None, batch=target.batch, precision=target.precision,
        energy=fit_energy(predictor), fleet=fleet, sources=_sources(settings),
        verify=verify if attached and can_time_beside_trainings(settings) else None,
        verifications=Verifications(folder / VERIFIED),
        anchors=[(row.arch, row.latency_ms) for row in table.anchors(space.name)],
        facts={
            **_facts(settings, table, data, schedule, stale=stale), **_device_facts(folder, settings, fleet),
            **({"supernet": _supernet_facts(space, ScoredNetworks.read(folder / INHERITED_FILE))} if settings.supernet else {}),
        },
    )  # fmt: skip


def can_time_beside_trainings(settings: StudySettings) -> bool:
    """Whether a worker can measure a network while others train: not in wall time (several threads), and not on the GPU they train on."""
    on_their_gpu = settings.train_device == "cuda" and resolve_device(settings.devices[0]).kind == "cuda"
    return settings.workers == 1 or (settings.threads == 1 and not on_their_gpu)


def train_final(arch: Arch, data: ImageData, schedule: Recipe, *, seed: int, path: Path, device: str = "cpu") -> FinalScore:
    """Train `arch` on the whole schedule, read the test split, and leave the weights at `<path>.safetensors`."""
    checkpoint = path.with_name(f"{path.name}.checkpoint.safetensors")
    result = train(arch, data, schedule, seed=seed, checkpoint=checkpoint, device=device)
    test_accuracy = evaluate(result.model(), data.test, arch.resolution_px, device=device)
    result.save_weights(path.with_name(f"{path.name}.safetensors"))
    curve = [{"fraction": p.fraction, "train_loss": p.train_loss, "val_accuracy": p.val_accuracy} for p in result.curve]
    return FinalScore(
        val_accuracy=result.val_accuracy, test_accuracy=test_accuracy, n_val=len(data.val), n_test=len(data.test),
        cpu_seconds=result.cpu_seconds, details={"recipe": schedule.name, "curve": curve, "diverged": result.diverged},
    )  # fmt: skip


def schedule_of_study(folder: Path) -> Recipe | None:
    """The recipe that the study in `folder` trains by, or None where it trains nothing."""
    settings = stored_settings(folder)
    return None if settings is None else _schedule(folder, settings)


def _schedule(folder: Path, settings: StudySettings) -> Recipe | None:
    """As the study began with it, whatever became of the file it was read from since; studies from before that have only its name."""
    if settings.recipe is None:
        return None
    stored = folder / RECIPE_FILE
    return recipe(str(stored) if stored.exists() else settings.recipe)


def train_final_elsewhere(data: ImageData, *, arch: Arch, schedule: Recipe, seed: int, device: str) -> tuple[FinalScore, bytes]:
    """`train_final` on a machine that shares no folder: the score, and the weights as the bytes of their file."""
    with scratch(f"{arch.arch_id}-{schedule.recipe_hash}-{data.data_hash}-s{seed}-{device}-final") as folder:
        score = train_final(arch, data, schedule, seed=seed, path=folder / "final", device=device)
        return score, (folder / "final.safetensors").read_bytes()


def _accept_final(path: Path, found: tuple[FinalScore, bytes]) -> FinalScore:
    score, weights = found
    replace_bytes(path.with_name(f"{path.name}.safetensors"), weights)
    return score


def _space(folder: Path, settings: StudySettings) -> SearchSpace:
    path = folder / SPACE_FILE
    return SearchSpace.load(path) if path.exists() else SearchSpace.load(settings.space)


def _data(settings: StudySettings, progress: Progress | None = None) -> ImageData | None:
    if settings.data is None or settings.stand_in:
        return None
    if settings.data not in _LOADED:
        _LOADED[settings.data] = load_data(settings.data, progress=progress)
    return _LOADED[settings.data]


def _with_classes(space: SearchSpace, folder: Path, settings: StudySettings) -> SearchSpace:
    """The space for the classes of the supernet that is searched by, if one is."""
    return space.with_num_classes(ScoredNetworks.read(folder / INHERITED_FILE).num_classes) if settings.supernet else space


def _score_networks(settings: StudySettings, progress: Progress | None) -> ScoredNetworks:
    """What some networks inherit from the supernet of `settings`. Raises StudyError where that cannot be foretold by the architecture."""
    assert settings.data is not None, "resolved"
    folder, plan = find_supernet(settings.supernet)
    estimator = SupernetEstimator(folder, load_data(settings.data, progress=progress), device=settings.train_device or "cpu")
    found = ScoredNetworks.draw(estimator, progress=progress)
    own = SupernetPrior(plan.search_space(), found).examined()["left out"]
    if own.low is None or own.low <= 0:
        raise StudyError(
            f"what networks inherit from supernet {folder.name!r} cannot be told from chance by their architecture (Spearman "
            f"{own.spearman or 0:.2f}), so it cannot steer a search",
            hint="train the supernet for longer, under another --name",
        )
    return found


def _supernet_facts(space: SearchSpace, known: ScoredNetworks) -> dict[str, Any]:
    """What study.yaml states of the supernet that is searched by."""
    examined = SupernetPrior(space, known).examined()
    own, macs = examined["left out"], examined["macs"]
    return {
        "name": known.name, "supernet_hash": known.supernet_hash, "data": known.data, "n_networks": len(known.scores),
        "spearman": own.spearman, "low": own.low, "high": own.high, "macs_spearman": macs.spearman or 0.0,
    }  # fmt: skip


def _copy_table(table: LatencyTable, path: Path) -> None:
    staging = path.with_name(f".{path.name}.parts")
    written = table.save(staging)
    written.replace(path)
    shutil.rmtree(staging)


def _sources(settings: StudySettings) -> dict[str, str]:
    """Where latencies are from until they are measured, by the label of the device."""
    attached = [resolve_device(device).attached for device in settings.devices]
    return {label: "predicted" if here else "table" for label, here in zip(settings.labels, attached, strict=True)}


def _device_facts(folder: Path, settings: StudySettings, fleet: Fleet | None) -> dict[str, Any]:
    """What study.yaml states of each of several devices: where its latencies are from, and its scale."""
    if fleet is None:
        return {}
    tables = [LatencyTable.load(folder / file) for file in table_files(settings)]
    sources = _sources(settings)
    return {
        "devices": [
            {
                "device": label, "runtime": table.target.runtime, "device_name": table.context.device_name,
                "latency_source": sources[label], "measured": table.context.date_utc, **dataclasses.asdict(fleet.scales[label]),
            }
            for label, table in zip(fleet.labels, tables, strict=True)
        ]
    }  # fmt: skip


def _facts(
    settings: StudySettings, table: LatencyTable, data: ImageData | None, schedule: Recipe | None, *, stale: list[str]
) -> dict[str, Any]:
    """What study.yaml states beside the settings. `stale`: in what the table does not fit this machine."""
    facts: dict[str, Any] = {
        "device_name": table.context.device_name,
        "latency_table": {
            "measured": table.context.date_utc, "blocks": len(table.entries), "statistic": table.context.statistic,
            "versions": dict(table.context.versions), **({"stale": stale} if stale else {}),
        },
    }  # fmt: skip
    if settings.accuracy == "published":
        facts["prior"] = {**dataclasses.asdict(leave_one_out()), "relatives_rmse_points": RELATIVES_RMSE_POINTS}
    if data is not None:
        facts["data_hash"] = data.data_hash
        facts |= {"recipe_hash": schedule.recipe_hash} if schedule is not None else {}
        facts["images"] = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    return facts
