"""What a search found, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowsearch.cli.output import percent, print_rows, tell
from lowsearch.latency.pace import DISTURBED


def print_front(study: Any, front: Sequence[Mapping[str, Any]]) -> None:
    """`study`: its files. Metrics beyond the usual ones are shown where it has objectives or limits on them."""
    from lowsearch.report.tables import UNITS, asked_metrics, objectives

    headings = {"throughput_ips": "images/s", "time_per_image_ms": "ms/image", "peak_memory_mb": "memory MB", "artifact_mb": "file MB"}
    headings["energy_mj"] = "energy mJ"
    asked = [metric for metric in UNITS if metric in headings and metric in asked_metrics(study)]
    trained = any(row.get("test_accuracy") is not None for row in front)
    rows = [
        {"network": row.get("name") or row["arch_id"], "origin": row["origin"]}
        | (
            {"val %": percent(row, "val_accuracy"), "test %": percent(row, "test_accuracy"), "± %": percent(row, "accuracy_std")}
            if trained
            else {"score (rank)": row["score"], "± score": row.get("score_std"), "score source": row["accuracy_source"]}
            if "score" in row
            else {}
        )
        | {"latency_ms": row["latency_ms"], "±": row["latency_std_ms"], "source": row["latency_source"]}
        | _on_other_devices(study, row)
        | {headings[metric]: _whole_where_large(row.get(metric)) for metric in asked}
        | {"MMACs": row["macs"] / 1e6, "Mparams": row["params"] / 1e6, "px": row["resolution_px"]}
        for row in sorted(front, key=lambda row: row["latency_ms"])
    ]
    if rows:
        is_one = len(objectives(study)) == 1
        print_rows(f"Best of {study.name}" if is_one else f"Front of {study.name}: {len(rows)} networks", rows)
    else:
        tell("the front is empty: no network kept the limits")


def _on_other_devices(study: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a front's row that a study of several devices adds: latency on all but the first, and the worst case."""
    others = list(study.settings.get("devices") or ())[1:]
    columns = {f"ms on {other['device']} ({other['latency_source']})": row[f"latency_ms@{other['device']}"] for other in others}
    return {**columns, "worst": row["worst_latency"]} if others else {}


def print_sharing(summary: Mapping[str, Any]) -> None:
    """What one network for all devices costs, in a search of several."""
    if "sharing" not in summary:
        return
    rows = [
        {"network for": "all devices" if name == "shared" else f"{name} alone", "networks": front["networks"]}
        | {f"on {device} %": _slower(front["mean_regret"][device]) for device in summary["sharing"]["devices"]}
        | {"worst device %": _slower(front["mean_worst_regret"]), "at most %": _slower(front["worst_regret"])}
        for name, front in summary["sharing"]["fronts"].items()
    ]
    print_rows("What sharing costs: % slower than a device's own networks of no lower score", rows)


def print_summary(summary: Mapping[str, Any]) -> None:
    judged = {
        "steering": "predictions by the architecture alone, which steer,",
        "forecast": "forecasts from the lowest rung, which promote,",
    }
    for name, words in judged.items():
        if (found := summary[name])["low"] is not None:
            tell(
                f"{words} rank {found['n_networks']} fully trained networks, each left out, with Spearman {found['spearman']:.2f} "
                f"({found['low']:.2f} to {found['high']:.2f})"
            )
    for why in filter(None, (summary["steering_ended"], summary["promotion_ended"])):
        tell(why)
    if summary["steering"]["low"] is not None:
        if summary["unjudged"]:
            tell(f"{summary['steering']['n_networks']} networks are {summary['unjudged']}")
        tell("on networks held out for it: lowsearch trust")
    if (verified := summary["verified"])["networks"]:
        worst = f", the worst by {100 * verified['worst_excess']:.1f} %; those were not trained" if verified["over"] else ""
        tell(f"candidates near the latency limit, measured before training: {verified['networks']}; over it: {verified['over']}{worst}")
    limit = summary["limit"]
    if summary.get("none_kept"):
        tell(f"{summary['none_kept']}; hint: another study with a looser limit, or with a higher --confidence")
    elif limit["broken"]:
        tell(
            f"{limit['broken']} of {limit['limited']} shortlisted networks broke the latency limit when measured, "
            f"the worst by {100 * limit['worst_excess']:.1f} %; those are no finalists"
        )
    elif limit["limited"]:
        tell(f"all {limit['limited']} shortlisted networks kept the latency limit when measured")
    if summary["broken_in_finals"]:
        tell(summary["broken_in_finals"])
    pace = summary["pace"]
    if pace is not None and abs(pace - 1) >= 0.02:
        change = f"{100 * abs(pace - 1):.0f} % {'slower' if pace > 1 else 'faster'}"
        tell(f"the machine was {change} when it measured the shortlist than when it measured the table{_what_then(pace)}")
    if summary["search_ended"]:
        tell(f"the search has ended early: {summary['search_ended']}")
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in summary["spent_s"].items())
    known = f", {summary['known']} of them in earlier studies" if summary.get("known") else ""
    tell(f"{summary['candidates']['complete']} networks scored{known}, {summary['finalists']} finalists ({spent})")


def _what_then(pace: float) -> str:
    if pace <= DISTURBED:
        return ""
    return (
        ", and so it was whenever it was tried: some networks suffer more than others, so ratios may be off; hint: when it is quiet, "
        "remove measurements.json from the study and run the same command again, which trains nothing anew"
    )


def _slower(regret: float | None) -> float | None:
    return None if regret is None else round(100 * (regret - 1), 1)


def _whole_where_large(value: float | None) -> float | None:
    return round(value) if value is not None and value >= 1000 else value
