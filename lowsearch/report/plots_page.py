"""A self-contained page of plots: the frame that `lowsearch compare` and `lowsearch insights` fill. plots.html is its template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template

import plotly.graph_objects as go

from lowsearch import __version__
from lowsearch.files import write_atomically
from lowsearch.report.page import script_json

_HERE = Path(__file__).resolve().parent


def write_plots_page(path: Path, *, title: str, heading: str, lead: str, body: str, figures: Mapping[str, go.Figure]) -> Path:
    """Write the page to `path`; it needs no network. `body` is HTML, the other texts are not; `figures` by the ids of their elements."""
    from plotly.offline import get_plotlyjs

    drawn = {name: json.loads(figure.to_json() or "{}") for name, figure in figures.items()}
    write_atomically(
        path,
        Template((_HERE / "plots.html").read_text(encoding="utf-8")).substitute(
            version=escape(__version__),
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            plotly=get_plotlyjs(),
            data=script_json(drawn),
            title=escape(title),
            heading=escape(heading),
            lead=escape(lead),
            body=body,
        ),
    )
    return path
