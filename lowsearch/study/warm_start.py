"""A study that begins with what earlier ones trained: their records teach its predictor, and what they trained fully is not trained again.

What is taken over is copied into the new study when it is made: the records into its own `records.jsonl`, and who is from where into
`warm_start.json`. The earlier studies may be moved or removed after that. Accuracies compare only within one space, recipe and data set,
so anything else is refused; latencies are never taken over.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from lowsearch import locations
from lowsearch.accuracy.ladder import RECORDS
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.search.estimates import excess
from lowsearch.search.sampler import DIVERSE_START, LIMITS, WHOLE_SCHEDULE, accuracy_constraint
from lowsearch.space import SearchSpace
from lowsearch.study.knowledge import SPACE_FILE, settings_of
from lowsearch.study.parts import Parts
from lowsearch.study.settings import StudySettings
from lowsearch.study.storage import KNOWN_FROM, add_scored, candidates
from lowsearch.study.workers.worker import UNKNOWN_STD

WARM_START = "warm_start.json"


def copy_known(folder: Path, settings: StudySettings, parts: Parts) -> dict[str, Any]:
    """Copy what the studies of `settings.warm_start` trained into the new study `folder`; returns what study.yaml states of it.

    Raises StudyError where one of them trained nothing, or networks of another space, recipe or data set.
    """
    if (folder / WARM_START).exists():  # Of a run that ended before the study was made.
        for left in (WARM_START, RECORDS):
            (folder / left).unlink(missing_ok=True)
    if not settings.warm_start:
        return {}
    found = {name: _comparable(name, locations.study_folder(name), settings, parts) for name in settings.warm_start}
    family = {arch.arch_id: name for name, arch in parts.space.family.items()}
    networks: dict[str, dict[str, Any]] = {}
    for name, records in found.items():
        said = _candidates_of(records.path.parent)
        for arch_id in dict.fromkeys(record.arch_id for record in records if record.rung >= 1):
            row = said.get(arch_id, {})
            origin = "family" if arch_id in family else row.get("origin", "proposed")
            is_start = row.get("why", "").startswith(DIVERSE_START)
            entry = {"arch_id": arch_id, "study": name, "origin": origin, "name": family.get(arch_id, ""), "is_start": is_start}
            networks.setdefault(arch_id, entry)
    write_atomically(folder / WARM_START, json.dumps({"networks": list(networks.values())}, indent=1) + "\n")
    own = AccuracyRecords(folder / RECORDS)
    for records in found.values():
        for record in records:
            own.append(record)
    return {
        "warm_start": [
            {"study": name, "records": len(records), "networks": sum(n["study"] == name for n in networks.values())}
            for name, records in found.items()
        ]
    }


def add_known(folder: Path, study: optuna.Study, settings: StudySettings, parts: Parts) -> None:
    """Tell Optuna of the networks that earlier studies trained fully and that keep the limits here, each as a scored trial."""
    path = folder / WARM_START
    if not path.exists() or study.user_attrs.get(KNOWN_FROM):
        return
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["networks"]
        records = sorted(parts.records(), key=lambda record: record.rung)
        latest = {record.arch_id: record for record in records}
        networks = [(row, latest[row["arch_id"]]) for row in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint=f"remove {folder} and make the study again") from error
    scorer, estimator = parts.fit(parts.records()), parts.estimator
    present = {c.genome.tobytes() for c in candidates(study, parts.space)}
    for row, record in networks:
        genome = parts.space.encode(record.arch)
        estimates = estimator.estimate(genome[None])
        if genome.tobytes() in present or excess(estimates, settings.limits)[0] > 0:
            continue
        accuracy, std = scorer.predict_record(record) if scorer else (record.val_accuracy, UNKNOWN_STD)
        mean = {metric: float(values[0]) for metric, values in estimates.mean.items()} | {"accuracy": float(accuracy)}
        score = {"accuracy": float(accuracy), "accuracy_std": float(std), "rung": float(record.rung), "val_accuracy": record.val_accuracy}
        attrs = {
            "origin": row["origin"], "name": row["name"], "why": f"trained in study {row['study']}", KNOWN_FROM: row["study"],
            WHOLE_SCHEDULE: row["is_start"], "score": score, "elapsed_s": 0.0,
        }  # fmt: skip
        add_scored(
            study, parts.space, genome, values=[mean[metric] for metric in settings.objectives.metrics], attrs=attrs,
            constraints={**({LIMITS: 0.0} if settings.limits else {}), **accuracy_constraint(settings.limits, float(accuracy))},
        )  # fmt: skip
    study.set_user_attr(KNOWN_FROM, True)


def _comparable(name: str, source: Path, settings: StudySettings, parts: Parts) -> AccuracyRecords:
    """The records of an earlier study. Raises StudyError where they are none, or do not compare with what the new study trains."""

    def refuse(what: str, there: object, here: object) -> StudyError:
        return StudyError(
            f"{name} cannot start this study: {what} is {there} there and {here} here",
            hint="accuracies compare only within one space, recipe and data set: leave out --warm-start, or change what differs",
        )

    theirs = settings_of(source)
    space = SearchSpace.load(source / SPACE_FILE if (source / SPACE_FILE).exists() else theirs.space)
    if space.text != parts.space.text:
        raise refuse("the search space", f"{space.name!r} ({source / SPACE_FILE})", f"{parts.space.name!r}")
    records = AccuracyRecords(source / RECORDS)
    if not len(records):
        raise StudyError(f"study {name!r} has trained nothing to start from", hint="leave out --warm-start, or name one that trains")
    for record in records:
        for what, there, here in (
            ("data", record.data_hash, parts.facts.get("data_hash")),
            ("recipe", record.recipe_hash, parts.facts.get("recipe_hash")),
        ):
            if there != here:
                raise refuse(f"the {what}", f"{getattr(record, what)} (hash {there})", f"{getattr(settings, what)} (hash {here})")
        if not parts.space.contains(record.arch):
            raise refuse("the number of classes", record.arch.num_classes, parts.space.num_classes)
    return records


def _candidates_of(source: Path) -> Mapping[str, Mapping[str, str]]:
    """What an earlier study noted of its candidates, by arch_id; studies are not always kept whole, so there may be nothing."""
    path = source / "candidates.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["arch_id"]: row for row in csv.DictReader(file) if row.get("state") == "complete"}
