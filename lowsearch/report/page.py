"""The report page of a study: one HTML file that needs no network, from the plain files of studies/NAME/.

page.html is the frame, page.css and page.js stand beside it; `sections` and `figures` fill it. Texts from a study's files are escaped in
those two, or reach the page as data that page.js sets as text.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from lowsearch import __version__
from lowsearch.files import write_atomically
from lowsearch.report import sections, tables
from lowsearch.report.study_files import Network, StudyFiles, read_study

PAGE = "report.html"
_HERE = Path(__file__).resolve().parent


def build_report(study_folder: Path) -> Path:
    """Write the page of the study in `study_folder` and return its path. A study in progress gives a page that says what is missing."""
    study = read_study(Path(study_folder))
    path = study.folder / PAGE
    write_atomically(path, page(study))
    return path


def page(study: StudyFiles) -> str:
    """The whole page as text."""
    from plotly.offline import get_plotlyjs

    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        version=escape(__version__),
        title=escape(f"{study.name} · lowsearch"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        data=script_json(page_data(study)),
        body=sections.body(study),
    )


def page_data(study: StudyFiles) -> dict[str, Any]:
    """What page.js works on: the figures, and every network that can be chosen."""
    from lowsearch.report import figures

    drawn = {"validation": figures.front_figure(study, split="validation")}
    if tables.test_was_read(study):
        drawn["test"] = figures.front_figure(study, split="test")
    if study.hypervolume:
        drawn["hypervolume"] = figures.hypervolume_figure(study)
    if tables.cost_networks(study):
        drawn["cost"] = figures.cost_figure(study)
    drawn |= {f"further-{metric}": figures.further_figure(study, metric) for metric in tables.further_metrics(study)}
    if tables.shared_fronts(study):
        drawn |= {f"device-{i}": figures.device_figure(study, device) for i, device in enumerate(tables.device_sources(study))}
    networks = tables.network_details(study)
    return {
        "study": study.name,
        "figures": {name: json.loads(figure.to_json() or "{}") for name, figure in drawn.items()},
        "networks": networks,
        "selected": next((n.arch_id for n in _most_telling(study) if n.arch_id in networks), None),
    }


def script_json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _most_telling(study: StudyFiles) -> list[Network]:
    """Networks to show first, best first: the middle of the front, then anything."""
    front = tables.best_known_front(study)
    return [*front[len(front) // 2 :], *front, *study.finalists, *study.candidates]
