"""Names of points: out of the way of what is drawn and of each other, and inside the plot."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lowsearch.report.labels import Mark, label_positions

CORNERS = (Mark(0, 0, 0), Mark(10, 10, 10))
"""The range of the axes."""


def position(*others: Mark, x: float = 5, y: float = 5, name: str = "micro-b-s") -> str:
    return label_positions([x], [y], [name], [*CORNERS, Mark(x, y, y), *others], log_x=False)[0]


def test_a_name_stands_below_to_the_right_where_nothing_is_in_the_way() -> None:
    assert position() == "bottom right"


def test_a_name_goes_out_of_the_way_of_points_and_bars() -> None:
    below, above, beside = Mark(5.4, 4.8, 4.8), Mark(5.4, 5.2, 5.2), Mark(5.4, 5, 5)
    assert position(below) == "top right"
    assert position(below, above) == "middle right"
    assert position(below, above, beside) == "bottom left"
    assert position(Mark(5.6, 0, 10), Mark(4.4, 0, 10)) == "bottom center"


def test_a_large_point_counts_more_than_a_small_one() -> None:
    small = [Mark(px, 5 + py, 5 + py) for px, py in ((4.6, 0.2), (4.6, -0.2), (4.6, 0), (5.05, 0.25), (5.05, -0.25))]
    large = [Mark(5.4, 5 + py, 5 + py, 2.0) for py in (0.2, 0, -0.2)]
    assert position(*small, *large).endswith("left")


def test_a_name_stays_in_the_plot() -> None:
    assert position(x=10, y=5).endswith("left")
    assert position(x=0, y=0).endswith("right")
    assert position(x=5, y=10, name="a-name-of-thirty-letters-or-so").startswith("bottom")


def test_neighbours_do_not_overprint_each_other() -> None:
    """micro-b-s and micro-e-l of the example study, 1 ms/100 apart."""
    x, y = [0.150, 0.157], [86.55, 86.35]
    marks = [Mark(a, b, b) for a, b in zip(x, y, strict=True)] + [Mark(0.05, 83, 83), Mark(0.6, 88, 88)]
    assert label_positions(x, y, ["micro-b-s", "micro-e-l"], marks, log_x=True) == ["top right", "bottom right"]


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(1, 90)), min_size=1, max_size=12), st.booleans())
def test_every_point_gets_a_position_that_plotly_knows(points: list[tuple[float, float]], log_y: bool) -> None:
    x, y = [p[0] for p in points], [p[1] for p in points]
    found = label_positions(x, y, ["name"] * len(x), [Mark(a, b, b) for a, b in points], log_x=True, log_y=log_y)
    assert len(found) == len(x)
    assert {tuple(text.split()) for text in found} <= {(v, h) for v in ("top", "middle", "bottom") for h in ("left", "center", "right")}


def test_nothing_drawn_has_no_names() -> None:
    assert label_positions([], [], [], [], log_x=True) == []
