"""The page of `lowsearch compare`: measured networks side by side, against published accuracy where it is known, else against MACs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from lowsearch.latency.compare import ComparedNetwork
from lowsearch.report.figures import log_ticks
from lowsearch.report.labels import Mark, label_positions
from lowsearch.report.plots_page import write_plots_page

_COLUMNS = ("network", "px", "latency, ms", "±", "MMACs", "GMACs/s", "params, M", "top-1, % (published)")
_OURS, _OTHERS = "#0067b1", "#c75300"


def build_comparison(rows: Sequence[ComparedNetwork], target: str, path: Path) -> Path:
    """Write the page of `rows`, measured on `target`, to `path`: self-contained, needs no network."""
    known = [row for row in rows if row.top1_percent is not None]
    lead = f"{len(rows)} networks, measured on {target}, fastest first."
    if known:
        lead += " Accuracies are published ones, of their authors' recipes; the line joins the networks that no other dominates."
    body = (
        '<section><div class="card plotcard"><div class="plot tall" id="plot"></div></div></section>'
        f'<section><div class="card tablecard">{_table(rows)}</div></section>'
    )
    return write_plots_page(path, title="Comparison", heading="Networks side by side", lead=lead, body=body, figures={"plot": figure(rows)})


def figure(rows: Sequence[ComparedNetwork]) -> go.Figure:
    """Latency against published top-1, with the front; against MACs where no accuracy is known."""
    known = [row for row in rows if row.top1_percent is not None]
    drawn, title = (known, "published ImageNet top-1, %") if known else (list(rows), "MMACs")
    heights = {row.name: row.top1_percent if known else row.macs / 1e6 for row in drawn}
    traces: list[go.Scatter] = []
    x, y = [row.latency_ms for row in drawn], [heights[row.name] or 0.0 for row in drawn]
    marks = [Mark(*place, place[1]) for place in zip(x, y, strict=True)]
    sides = label_positions(x, y, [row.name for row in drawn], marks, log_x=True, log_y=not known)
    if known:
        best = _front(known)
        traces.append(
            go.Scatter(
                x=[row.latency_ms for row in best],
                y=[heights[row.name] for row in best],
                mode="lines",
                name="front",
                line={"shape": "hv", "width": 1.5, "dash": "dot", "color": "#7a828c"},
                hoverinfo="skip",
            )
        )
    for name, colour, ours in (("LowFormer space", _OURS, True), ("other networks", _OTHERS, False)):
        members = [row for row in drawn if _is_ours(row.name) == ours]
        if not members:
            continue
        traces.append(
            go.Scatter(
                x=[row.latency_ms for row in members],
                y=[heights[row.name] for row in members],
                mode="markers+text",
                name=name,
                text=[row.name for row in members],
                textposition=[sides[drawn.index(row)] for row in members],
                textfont={"size": 11},
                marker={"size": 10, "color": colour},
                error_x={"array": [row.latency_std_ms for row in members], "thickness": 1},
                hovertemplate="%{text}<br>%{x:.3g} ms<br>%{y:.4g}<extra></extra>",
            )
        )
    made = go.Figure(traces)
    made.update_layout(
        template="none", margin={"l": 60, "r": 24, "t": 8, "b": 52}, hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
    )  # fmt: skip
    made.update_xaxes({"title": "latency, ms", "zeroline": False, "automargin": True, **log_ticks([row.latency_ms for row in drawn])})
    made.update_yaxes(title=title, zeroline=False, automargin=True, type="linear" if known else "log")
    return made


def _front(rows: Sequence[ComparedNetwork]) -> list[ComparedNetwork]:
    """Those that none is faster than at no less accuracy, fastest first."""
    ordered = sorted(rows, key=lambda row: (row.latency_ms, -(row.top1_percent or 0)))
    best = np.maximum.accumulate([row.top1_percent or 0 for row in ordered])
    return [row for i, row in enumerate(ordered) if i == 0 or (row.top1_percent or 0) > best[i - 1]]


def _is_ours(name: str) -> bool:
    return name.startswith(("lowformer_", "cpubone_")) or name.endswith(".json")


def _table(rows: Sequence[ComparedNetwork]) -> str:
    counted = any(row.energy_mj is not None for row in rows)
    columns = [*_COLUMNS, *(["energy, mJ"] if counted else [])]
    head = "".join(f"<th{'' if column == 'network' else ' class=number'}>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + f"<td>{escape(row.name)}</td>"
        + "".join(
            f'<td class="number">{value}</td>'
            for value in (
                row.resolution_px, f"{row.latency_ms:.4g}", f"{row.latency_std_ms:.2g}", f"{row.macs / 1e6:,.0f}", f"{row.gmacs_per_s:.1f}",
                f"{row.params / 1e6:.2f}", "" if row.top1_percent is None else f"{row.top1_percent:.1f}",
                *(["" if row.energy_mj is None else f"{row.energy_mj:.4g}"] if counted else []),
            )
        )
        + "</tr>"
        for row in rows
    )  # fmt: skip
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
