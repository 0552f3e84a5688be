"""The page of `lowsearch insights`: a verdict for every claim, then the evidence, with plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from lowsearch.insights.evidence import Finding, Plot
from lowsearch.insights.study import Insights
from lowsearch.report.figures import log_ticks
from lowsearch.report.plots_page import write_plots_page

_COLOURS = ("#0067b1", "#c75300", "#3a8f3a", "#8a4fb5")
_GREY = "#7a828c"
_MARKS = {"confirmed": "✓", "refuted": "✗", "not decided": "?"}


def build_insights(found: Insights, path: Path) -> Path:
    """Write the page of `found` to `path`: self-contained, needs no network."""
    figures = {f"plot-{f.claim.number}-{i}": figure(p) for f in found.findings for i, p in enumerate(f.plots)}
    counts = Counter(f.verdict for f in found.findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in _MARKS if counts[verdict])
    context = found.context
    lead = (
        f"{len(found.findings)} claims of the LowFormer papers about execution time, on {context.device_name}: {told}. "
        f"Measured {context.date_utc[:10]} on {found.target}; {context.statistic}. A difference counts where it is beyond "
        "two standard errors and 5 %."
    )
    verdicts = "".join(_verdict_row(f) for f in found.findings)
    head = '<th class="number">#</th><th>verdict</th><th>subject</th><th>claim</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{verdicts}</tbody></table>"
    body = f'<section><div class="card tablecard">{table}</div></section>' + "".join(_section(f) for f in found.findings)
    heading = "Where MACs and time part on this device"
    return write_plots_page(path, title="Beyond MACs on this device", heading=heading, lead=lead, body=body, figures=figures)


def _verdict_row(finding: Finding) -> str:
    claim = finding.claim
    return (
        f'<tr><td class="number">{claim.number}</td><td>{_badge(finding)}</td>'
        f'<td><a href="#claim-{claim.number}">{escape(claim.title)}</a></td><td>{escape(claim.statement)}</td></tr>'
    )


def _badge(finding: Finding) -> str:
    kind = finding.verdict.replace(" ", "-")
    return f'<span class="verdict {kind}">{_MARKS[finding.verdict]} {escape(finding.verdict)}</span>'


def _section(finding: Finding) -> str:
    claim = finding.claim
    plots = "".join(
        f'<div class="card plotcard"><div class="plot" id="plot-{claim.number}-{i}"></div></div>' for i in range(len(finding.plots))
    )
    return (
        f'<section id="claim-{claim.number}"><h2>{claim.number}. {escape(claim.title)} {_badge(finding)}</h2>'
        f'<p class="claim">{escape(claim.statement)} <small>{escape(claim.source)}</small></p>'
        f"<p>{escape(finding.evidence)}</p>{plots}"
        f"<details><summary>Every number ({len(finding.rows)} rows)</summary>{_table(finding)}</details></section>"
    )


def _table(finding: Finding) -> str:
    columns = list(dict.fromkeys(key for row in finding.rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(_cell(row.get(column)))}</td>" for column in columns) + "</tr>" for row in finding.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def figure(plot: Plot) -> go.Figure:
    """`plot` drawn."""
    traces = []
    for i, series in enumerate(plot.series):
        grey = series.name in ("random members", "in proportion")
        colour = _GREY if grey else _COLOURS[i % len(_COLOURS)]
        marks = "markers+text" if series.named else "markers"
        trace = go.Scatter(
            x=list(series.x),
            y=list(series.y),
            name=series.name,
            mode="lines" if series.name == "in proportion" else "lines+markers" if series.lines else marks,
            marker={"size": 5 if grey else 9, "color": colour},
            line={"color": colour, "width": 1.5, **({"dash": "dot"} if series.name.endswith("MACs") or grey else {})},
            text=[label if label in series.named else "" for label in series.labels] or None,
            textposition="middle right",
            hovertext=list(series.labels) or None,
            hovertemplate=("%{hovertext}<br>" if series.labels else "") + "%{x}<br>%{y:.3g}<extra></extra>",
        )
        if series.std:
            trace.update(error_y={"type": "data", "array": list(series.std), "thickness": 1, "width": 0})
        traces.append(trace)
    made = go.Figure(traces)
    made.update_layout(
        template="none", margin={"l": 60, "r": 24, "t": 8, "b": 52}, hovermode="closest", showlegend=len(traces) > 1,
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
    )  # fmt: skip
    made.update_xaxes(_axis(plot.x_title, [v for s in plot.series for v in s.x], log=plot.log_x))
    made.update_yaxes(_axis(plot.y_title, [v for s in plot.series for v in s.y], log=plot.log_y))
    if plot.line_y is not None:
        made.add_hline(y=plot.line_y, line={"width": 1, "dash": "dash", "color": _GREY})
    return made


def _axis(title: str, values: Sequence[float | str], *, log: bool) -> dict[str, object]:
    shared: dict[str, object] = {"title": title, "zeroline": False, "automargin": True}
    return {**shared, **log_ticks([float(value) for value in values])} if log else shared
