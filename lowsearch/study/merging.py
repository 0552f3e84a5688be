"""Two studies of one question as one: the same space, data, recipe, target and limits, searched twice.

What was trained is kept, so the accuracy model learns from both and the search goes on from both fronts. Everything else that could
differ between them would mix numbers that do not compare, and is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import TrialState

from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.errors import StudyError
from lowsearch.latency.pace import pace_since
from lowsearch.latency.table import LatencyTable
from lowsearch.search.estimates import excess
from lowsearch.search.sampler import LIMITS, WHOLE_SCHEDULE, accuracy_constraint
from lowsearch.search.verification import VERIFIED, Verifications
from lowsearch.study.knowledge import RECIPE_FILE, SPACE_FILE, TABLE_FILE, of_study, settings_of, table_files
from lowsearch.study.parts import INHERITED_FILE
from lowsearch.study.run import CLOCK, Clock, locked, write_study_file
from lowsearch.study.settings import EXTENSIBLE, StudySettings, read_study_file
from lowsearch.study.storage import DATABASE, KNOWN_FROM, SERVER_STUDY, add_scored, candidates, has_database, open_study

MAY_DIFFER = (*EXTENSIBLE, "seed", "sampler", "space", "storage", "warm_start")
"""`space` is compared by what it says, not by its name or path."""
KEPT = ("origin", "name", "score", "why", WHOLE_SCHEDULE, KNOWN_FROM)
"""Attributes of a trial that it keeps."""


def merge(first: Path, second: Path, into: Path) -> dict[str, int]:
    """Make the study `into` of the scored networks and the records of two others; returns how many came from each.

    Settings, latency table and reference point are the first's, and latencies are predicted again by its table, but for networks that
    either had measured before their training. A network that both scored is kept as the first scored it; the trainings of both are on
    record. Raises StudyError where the two do not compare, where
    one is being run, and where `into` exists.
    """
    if into.exists():
        raise StudyError(f"study {into.name!r} exists already", hint="choose another --study NAME")
    settings = _common_settings(first, second)
    with locked(first), locked(second):
        into.mkdir(parents=True)
        try:
            return _write(first, second, into, settings)
        except BaseException:
            shutil.rmtree(into)  # Half a merger is no study.
            raise


def _common_settings(first: Path, second: Path) -> StudySettings:
    """The first's settings. Raises StudyError, with the reason, where what was searched or how it was scored differs."""

    def refuse(what: str, one: object, other: object) -> StudyError:
        return StudyError(
            f"{first.name} and {second.name} do not merge: {what} is {one} in one and {other} in the other",
            hint=f"compare them instead: lowsearch study diff {first.name} {second.name}",
        )

    if first.resolve() == second.resolve():
        raise StudyError(f"study {first.name!r} cannot be merged with itself", hint="name two studies")
    one, other = settings_of(first), settings_of(second)
    for field in dataclasses.fields(StudySettings):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if mine != theirs and field.name not in MAY_DIFFER:
            raise refuse(field.name, mine, theirs)
    for name in (DATABASE, SPACE_FILE, *table_files(one)):
        for folder in (first, second):
            if not (has_database(folder) if name == DATABASE else (folder / name).exists()):
                raise StudyError(f"study {folder.name!r} holds no {name}, so it cannot be merged", hint="merge studies where they were run")
    if (first / SPACE_FILE).read_text(encoding="utf-8") != (second / SPACE_FILE).read_text(encoding="utf-8"):
        raise refuse("the search space", f"that of {first / SPACE_FILE}", f"that of {second / SPACE_FILE}")
    stated = [read_study_file(folder) or {} for folder in (first, second)]
    hashes = [values.get("data_hash") for values in stated]
    if hashes[0] != hashes[1]:
        raise refuse("the hash of the data", *hashes)
    if one.supernet:
        supernets = [values.get("supernet", {}).get("supernet_hash") for values in stated]
        if supernets[0] != supernets[1]:
            raise refuse("the hash of the supernet", *supernets)
    recipes = [{record.recipe_hash for record in AccuracyRecords(folder / "records.jsonl")} for folder in (first, second)]
    if len(recipes[0] | recipes[1]) > 1:
        raise refuse("the hash of the recipe", *map(sorted, recipes))
    return one


def _write(first: Path, second: Path, folder: Path, settings: StudySettings) -> dict[str, int]:
    for file in (SPACE_FILE, RECIPE_FILE, INHERITED_FILE, *table_files(settings), "networks.json"):
        if (first / file).exists():
            shutil.copyfile(first / file, folder / file)
    records = AccuracyRecords(folder / "records.jsonl")
    for source in (first, second):
        for record in AccuracyRecords(source / "records.jsonl"):
            records.append(record)
    clocks = [Clock(source / CLOCK).seconds("search") for source in (first, second)]
    (folder / CLOCK).write_text(json.dumps({"search": sum(clocks)}) + "\n", encoding="utf-8")
    known = of_study(first, settings)
    verifications = _merge_verified(first, second, folder)
    merged = open_study(folder, settings.objectives)
    estimator, seen, counts = known.estimator_with(verifications), set(), {}
    for which, source, earlier_s in (("first", first, 0.0), ("second", second, clocks[0])):
        study = open_study(source, settings.objectives)
        trials = {trial.number: trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
        new = [c for c in candidates(study, known.space) if c.number in trials and c.genome.tobytes() not in seen]
        for c in new:
            seen.add(c.genome.tobytes())
            trial = trials[c.number]
            estimates = estimator.estimate(c.genome[None])
            mean = {metric: float(value[0]) for metric, value in estimates.mean.items()} | {"accuracy": c.accuracy}
            attrs = {k: v for k, v in trial.user_attrs.items() if k in KEPT}
            if not np.isnan(c.elapsed_s):
                attrs["elapsed_s"] = round(c.elapsed_s + earlier_s, 2)
            values = [mean[metric] for metric in settings.objectives.metrics]
            broken = {LIMITS: float(excess(estimates, settings.limits)[0])} if settings.limits else {}
            broken |= accuracy_constraint(settings.limits, c.accuracy)
            add_scored(merged, known.space, c.genome, values=values, attrs=attrs, constraints=broken)
        counts[which] = len(new)
    stated: dict[str, Any] = {k: v for k, v in (read_study_file(first) or {}).items() if k not in ("spent_s", "pace", SERVER_STUDY)}
    stated["settings"] = dataclasses.replace(settings, storage=None).to_dict()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # Last: without it the folder is no study.
    write_study_file(folder, stated | {"name": folder.name, "created": created, "merged_from": [first.name, second.name]})
    return {**counts, "records": len(records)}


def _merge_verified(first: Path, second: Path, folder: Path) -> Verifications:
    """What either measured before training; the second's is brought to the pace of the first's table, by the blocks that both hold."""
    merged = Verifications(folder / VERIFIED)
    here, there = (LatencyTable.load(source / TABLE_FILE).entries for source in (first, second))
    both = [block for block in here if block in there]
    pace = pace_since([here[block].hot_ms for block in both], [there[block].hot_ms for block in both])
    found = dict(Verifications(first / VERIFIED).found())
    for genome, v in Verifications(second / VERIFIED).found().items():
        moved = dataclasses.replace(v, latency_ms=v.latency_ms * pace, latency_std_ms=v.latency_std_ms * pace, pace=v.pace / pace)
        found.setdefault(genome, moved)
    for verification in found.values():
        merged.append(verification)
    return merged
