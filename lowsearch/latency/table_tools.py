"""What can be done with tables as files: find one by name, say whether it may be used here, put two together, hold two side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowsearch import locations
from lowsearch.arch import BLOCK_TYPES
from lowsearch.errors import LowsearchError, TableError
from lowsearch.latency.profile import current_context
from lowsearch.latency.table import SHIPPED, LatencyTable, check_fits, known_tables, shipped_tables
from lowsearch.latency.target import require_attached
from lowsearch.latency.timing import STATES

MAX_INVALID_SHARE = 0.05


def open_table(name: str) -> LatencyTable:
    """The table in the file `name`, or the one called `DEVICE/RUNTIME-PRECISION-bBATCH-tTHREADS` in a folder of tables; of two, that which
    did not come with lowsearch, whose name begins with `shipped/`."""
    path = Path(name)
    if not path.is_file():
        wanted = name if name.endswith(".jsonl") else f"{name}.jsonl"
        folders = locations.folders("latency_tables")
        places = [*folders, *(folder / SHIPPED for folder in folders)]
        found = next((place / wanted for place in places if (place / wanted).is_file()), None)
        if found is None:
            targets = dict.fromkeys([*known_tables(), *shipped_tables()])
            known = ", ".join(str(target.table_path.with_suffix("")) for target in targets) or "none"
            raise TableError(f"no latency table {name!r}; known: {known}", hint="give its file, or `lowsearch profile` measures one")
        path = found
    return LatencyTable.load(path)


def why_unusable(table: LatencyTable) -> str:
    """Why a search on this machine may not use `table`, or nothing. A table of a device that is not attached may always be named."""
    try:
        device = require_attached(table.target)
    except LowsearchError:
        return ""
    try:
        check_fits(table, table.target, current_context(table.target, device))
    except LowsearchError as error:
        return str(error)
    return ""


def why_unreliable(table: LatencyTable) -> str:
    """Why what `table` holds should be measured anew, or nothing: more than MAX_INVALID_SHARE of its rows are invalid."""
    counts = table.verdicts
    share = counts["invalid"] / max(1, sum(counts.values()))
    if share <= MAX_INVALID_SHARE:
        return ""
    return f"{share:.0%} of its rows are invalid, more than {MAX_INVALID_SHARE:.0%}: {table.advice}"


def merge(first: LatencyTable, second: LatencyTable) -> LatencyTable:
    """Both tables' blocks, networks and reads of memory; where both have one, the first's.

    Raises TableError where they are of two targets, devices or versions: such times do not add up.
    """
    if first.target != second.target:
        raise TableError(f"one table is of {first.target}, the other of {second.target}", hint="merge tables of one target only")
    then, now = first.context.fingerprint, second.context.fingerprint
    if then != now:
        names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        changed = ", ".join(f"{name}: {then.get(name, 'none')} and {now.get(name, 'none')}" for name in names)
        raise TableError(f"the tables were measured on different devices or versions ({changed})", hint=first.target.profile_command)
    calibration = {space: first.calibration.get(space, ()) for space in {**first.calibration, **second.calibration}}
    for space, rows in second.calibration.items():
        known = {row.arch for row in calibration[space]}
        calibration[space] = (*calibration[space], *(row for row in rows if row.arch not in known))
    return dataclasses.replace(
        first, entries={**second.entries, **first.entries}, calibration=calibration, memory=first.memory or second.memory,
        sibling=first.sibling or second.sibling,
    )  # fmt: skip


def difference(first: LatencyTable, second: LatencyTable) -> list[dict[str, Any]]:
    """How many times longer the second table's rows took: for every kind of block and state, for whole networks, for memory.

    Rows with `what`, `state`, `common` (rows in both), `only_first`, `only_second`, `median`, `p5`, `p95` (of the ratio; None without
    common rows).
    """
    rows: list[dict[str, Any]] = []
    for kind in BLOCK_TYPES:
        mine, theirs = ({b: row for b, row in table.entries.items() if b.kind == kind} for table in (first, second))
        for state in STATES:
            rows.append(_ratios(kind, state, *({b: getattr(row, f"{state}_ms") for b, row in of.items()} for of in (mine, theirs))))
    networks = ({row.arch: row.latency_ms for found in table.calibration.values() for row in found} for table in (first, second))
    rows.append(_ratios("network", "", *networks))
    rows.append(_ratios("memory", "", *({row.n_bytes: row.latency_ms for row in table.memory} for table in (first, second))))
    return [row for row in rows if row["common"] or row["only_first"] or row["only_second"]]


def _ratios(what: str, state: str, first: Mapping[Any, float], second: Mapping[Any, float]) -> dict[str, Any]:
    common = [key for key in first if key in second]
    ratios = np.array([second[key] / first[key] for key in common])
    quantiles = dict(zip(("median", "p5", "p95"), map(float, np.percentile(ratios, [50, 5, 95])), strict=True)) if common else {}
    return {
        "what": what, "state": state, "common": len(common), "only_first": len(first) - len(common),
        "only_second": len(second) - len(common), **{name: quantiles.get(name) for name in ("median", "p5", "p95")},
    }  # fmt: skip
