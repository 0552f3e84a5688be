"""The page's plots as Plotly figures. Colours are roles (`meta.role`) that the page fills in from its light or dark palette.

Colour says where a network comes from; the shape of its marker says where its latency comes from. Error bars are one standard error.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from lowsearch.report import tables
from lowsearch.report.labels import Mark, label_positions
from lowsearch.report.study_files import Network, StudyFiles
from lowsearch.report.tables import Axis
from lowsearch.search.objectives import Metric

SHAPES = {"measured": "circle", "table": "square", "predicted": "circle-open", "estimated": "diamond-open", "published": "star"}
"""Marker of a network by the source of its latency."""
LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "itemsizing": "constant"}


def front_figure(study: StudyFiles, *, split: str) -> go.Figure:
    """What the study searches for in one plot: the search's networks, the hand-made family, and what else the space holds.

    `split` is `validation`, where everything can be drawn, or `test`, which only finally trained networks have.
    """
    x, y = tables.plot_axes(study, split)
    final = tables.finals_are_known(study)
    final_ids = {network.arch_id for network in study.finalists}
    candidates = [n for n in tables.scored_candidates(study) if n.arch_id not in final_ids]
    front = tables.best_known_front(study)
    shown = study.finalists if final else (*front, *(n for n in candidates if n.is_family and n not in front))
    family, proposed = [n for n in shown if n.is_family], [n for n in shown if not n.is_family]
    others = [*study.sample, *(n for n in candidates if n not in shown)] if split == "validation" else []
    marks = _marks(shown, x, y, bars=True) + _marks(others, x, y, bars=False)
    traces = [
        _points(study, "Hand-made family", "family", family, x, y, size=10, among=marks),
        _points(study, "Proposed by the search", "front", proposed, x, y, size=10),
    ]
    if tables.has_two_objectives(study):
        family_front = _steps("Hand-made front", "family", tables.non_dominated(study, family), x, y, dash="dot")
        traces = [family_front, _steps("Final front" if final else "Front so far", "front", front, x, y), *traces]
    if split == "validation":
        traces = [
            _points(study, "Random members (predicted)", "random", study.sample, x, y, size=5, bars=False),
            _points(study, "Candidates", "candidate", [n for n in candidates if n not in shown], x, y, size=6, bars=False),
            *traces,
        ]
    figure = _drawn(traces, x, y)
    if (limit := tables.limit_on(study, x)) is not None:
        at, text = limit
        figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line={"width": 1, "dash": "dash"})
        figure.add_annotation(x=math.log10(at), y=1, yref="paper", text=text, showarrow=False, xanchor="left", yanchor="top")
    return _styled(figure, legend=LEGEND)


def hypervolume_figure(study: StudyFiles) -> go.Figure:
    """Hypervolume of everything known, or the best value of a single objective, over the time of the search in minutes."""
    minutes, name = [point.elapsed_s / 60 for point in study.hypervolume], "Hypervolume"
    values = [point.hypervolume for point in study.hypervolume]
    if len(tables.objectives(study)) == 1:
        [objective] = tables.objectives(study)
        name, values = f"Best {objective.word}, {objective.unit}", tables.best_so_far(study)
    figure = go.Figure(
        go.Scatter(
            x=minutes,
            y=values,
            mode="lines",
            line={"shape": "hv", "width": 2},
            hovertemplate="%{x:.1f} min<br>%{y:.4g}<extra></extra>",
            meta={"role": "front"},
        )
    )
    figure.update_layout(xaxis_title="Minutes of search", yaxis_title=name)
    return _styled(figure)


def further_figure(study: StudyFiles, metric: Metric) -> go.Figure:
    """The front of more than two objectives along one that the main plot leaves out."""
    x, (_, y) = tables.AXES[metric], tables.plot_axes(study, "validation")
    front = tables.best_known_front(study)
    shown = study.finalists or (*front, *(n for n in tables.scored_candidates(study) if n.is_family))
    drawn = {network.arch_id for network in shown}
    others = [network for network in tables.scored_candidates(study) if network.arch_id not in drawn]
    traces = [
        _points(study, "Candidates", "candidate", others, x, y, size=5, bars=False),
        _points(study, "Hand-made family", "family", [n for n in shown if n.is_family], x, y, size=8, bars=False),
        _points(study, "Proposed by the search", "front", [n for n in shown if not n.is_family], x, y, size=8, bars=False),
    ]
    figure = _drawn(traces, x, y)
    if tables.stand_in(study):
        figure.update_yaxes(title="Score")  # What it is stands beside the main plot; here it would be cut off.
    return _styled(figure, legend=LEGEND)


def cost_figure(study: StudyFiles) -> go.Figure:
    """Latency against MACs: how far a count of operations stands for time on this device."""
    x, y = tables.AXES["macs"], tables.latency_axis(study)
    final_ids = {network.arch_id for network in study.finalists}
    groups = [
        ("Random members", "random", study.sample, 5),
        ("Candidates", "candidate", [n for n in study.candidates if n.arch_id not in final_ids], 5),
        ("Proposed", "front", [n for n in study.finalists if not n.is_family], 9),
        ("Hand-made", "family", [n for n in study.finalists if n.is_family], 9),
    ]
    traces = [_points(study, name, role, networks, x, y, size=size, bars=False) for name, role, networks, size in groups]
    figure = _drawn(traces, x, y)
    return _styled(figure, legend=LEGEND)


def device_figure(study: StudyFiles, device: str) -> go.Figure:
    """What sharing costs on one device: the front of the networks that are for all, beside the front of that device alone."""
    x, (_, y) = tables.latency_axis(study, device), tables.plot_axes(study, "validation")
    fronts = {front.name: front.networks for front in tables.shared_fronts(study)}
    shared, own = fronts["shared"], fronts.get(device, ())
    drawn = {network.arch_id for network in (*shared, *own)}
    others = [network for network in tables.scored_candidates(study) if network.arch_id not in drawn]
    traces = [
        _points(study, "Candidates", "random", others, x, y, size=5, bars=False),
        _points(study, "Front of this device alone", "candidate", own, x, y, size=7, bars=False),
        _points(study, "Front for all devices", "front", shared, x, y, size=9, bars=False),
    ]
    if tables.has_two_objectives(study):
        traces = [_steps("", "candidate", own, x, y, dash="dot"), *traces]
    symbol = SHAPES.get(tables.device_sources(study).get(device, ""), "circle")  # Not that of the first device's latency.
    for trace in (trace for trace in traces if trace.mode == "markers"):
        trace.update(marker_symbol=symbol)
    figure = _drawn(traces, x, y)
    if tables.stand_in(study):
        figure.update_yaxes(title="Score")  # What it is stands beside the main plot; here it would be cut off.
    return _styled(figure, legend=LEGEND)


def _drawn(traces: Sequence[go.Scatter], x: Axis, y: Axis) -> go.Figure:
    """The traces that have points, on axes that hold them all."""
    shown = [trace for trace in traces if trace.x]
    figure = go.Figure(shown)
    figure.update_xaxes(_scale(x, [value for trace in shown for value in trace.x or ()]))
    figure.update_yaxes(_scale(y, [value for trace in shown for value in trace.y or ()]))
    return figure


def _steps(name: str, role: str, front: Sequence[Network], x: Axis, y: Axis, dash: str = "solid") -> go.Scatter:
    """The border of what `front` dominates, as a staircase."""
    known = sorted(_drawable(front, x, y), key=x.value)
    return go.Scatter(
        x=[x.value(network) for network in known],
        y=[y.value(network) for network in known],
        name=name,
        mode="lines",
        line={"shape": "vh" if x.more_is_better else "hv", "width": 2 if dash == "solid" else 1.5, "dash": dash},
        hoverinfo="skip",
        legendgroup=role if role == "family" else None,
        showlegend=dash == "solid",  # The dotted line goes with the markers of its group.
        meta={"role": role},
    )


def _points(
    study: StudyFiles, name: str, role: str, networks: Sequence[Network], x: Axis, y: Axis,
    *, size: int, bars: bool = True, among: Sequence[Mark] | None = None,
) -> go.Scatter:  # fmt: skip
    """With their names where it is said what else these stand `among`."""
    known = _drawable(networks, x, y)
    trace = go.Scatter(
        x=[x.value(n) for n in known],
        y=[y.value(n) for n in known],
        name=name,
        mode="markers",
        marker={"size": size, "symbol": [_shape(n) for n in known]},
        hovertext=[_hover(study, n) for n in known],
        hovertemplate="%{hovertext}<extra></extra>",
        customdata=[n.arch_id for n in known],
        legendgroup=role if role == "family" else None,
        meta={"role": role},
    )
    if among is not None:
        xs, ys, names = [x.value(n) for n in known], [y.value(n) for n in known], [n.name for n in known]
        positions = label_positions(xs, ys, names, among, log_x=x.log, log_y=y.log)
        trace.update(mode="markers+text", text=[html.escape(name) for name in names], textposition=positions, cliponaxis=False)
    if bars:
        trace.update(error_x=_bars([x.std(n) for n in known]), error_y=_bars([y.std(n) for n in known]))
    return trace


def _marks(networks: Sequence[Network], x: Axis, y: Axis, *, bars: bool) -> list[Mark]:
    """What names should not cover: points, and the error bars of those that have them."""
    known = _drawable(networks, x, y)
    points = [Mark(x.value(n), y.value(n), y.value(n), 2.0 if bars else 1.0) for n in known]
    barred = [n for n in known if bars and math.isfinite(y.std(n)) and (y.value(n) > y.std(n) or not y.log)]
    return points + [Mark(x.value(n), y.value(n) - y.std(n), y.value(n) + y.std(n), 0.5) for n in barred]


def _drawable(networks: Sequence[Network], x: Axis, y: Axis) -> list[Network]:
    """The networks that have a place: both values known, and positive on a logarithmic axis."""

    def has_place(axis: Axis, network: Network) -> bool:
        value = axis.value(network)
        return math.isfinite(value) and (value > 0 or not axis.log)

    return [network for network in networks if has_place(x, network) and has_place(y, network)]


def _bars(stds: Sequence[float]) -> dict[str, object]:
    return {"type": "data", "array": [std if math.isfinite(std) else 0 for std in stds], "thickness": 1, "width": 0}


def _shape(network: Network) -> str:
    return SHAPES.get(network.latency_source, "x")


def _hover(study: StudyFiles, network: Network) -> str:
    """What a pointer over a network shows; every text from a file is escaped, because Plotly reads markup in hover labels."""
    lines = [f"<b>{html.escape(network.label or 'random member')}</b>"]
    for word, value, source in tables.number_rows(network, tables.device_sources(study)):
        lines.append(html.escape(f"{word} {value}" + (f" ({source})" if source else "")))
    known = study.networks.get(network.arch_id)
    if known:
        lines += html.escape(tables.short_description(known["arch"])).split(", ")
    lines += [html.escape(reason) for reason in network.why.split("; ") if reason]
    return "<br>".join(lines)


def _styled(figure: go.Figure, *, legend: dict[str, object] | None = None) -> go.Figure:
    figure.update_layout(
        template="none",
        margin={"l": 56, "r": 16, "t": 8, "b": 48},
        showlegend=legend is not None,
        legend=legend,
        hovermode="closest",
        hoverlabel={"align": "left"},
        dragmode="zoom",
        clickmode="event",
    )
    figure.update_xaxes(zeroline=False, automargin=True)
    figure.update_yaxes(zeroline=False, automargin=True)
    return figure


def log_ticks(values: Sequence[float]) -> dict[str, object]:
    """A logarithmic axis for `values` whose labels are whole numbers: plotly's own ticks of a short one are single digits."""
    low, high = min(values, default=1), max(values, default=1)
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 12 else (1, 2, 3, 5) if high / low < 60 else (1, 3)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _scale(axis: Axis, values: Sequence[float]) -> dict[str, object]:
    """The plot axis of `axis` for `values`."""
    return {"title": axis.title, **(log_ticks(values) if axis.log else {})}
