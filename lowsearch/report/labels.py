"""Where the names of points stand in a plot, so that they cover neither points nor each other as far as there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PLOT_PX = (640, 480)
"""Of a plot's inside, about: names keep their size when a page is wider."""
_LETTER_PX, _LINE_PX, _GAP_PX = 6.5, 15.0, 6.0
_PAD = 0.06
"""Of the range of the marks, what Plotly leaves free on every side."""
_NAME, _OUTSIDE = 20.0, 40.0
"""What covering another name costs, and leaving the plot, where covering a mark costs the mark's weight."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something drawn, at `x` from `low` to `high`: a point, or a point with its error bar."""

    x: float
    low: float
    high: float
    weight: float = 1.0


def label_positions(
    x: Sequence[float], y: Sequence[float], names: Sequence[str], marks: Sequence[Mark], *, log_x: bool, log_y: bool = False
) -> list[str]:
    """Plotly's `textposition` for the name of every point (`x`, `y`), among everything drawn, the points themselves included.

    One name after the other, from left to right, takes the place that covers least; a tie goes to the right.
    """
    if not marks:
        return []
    across = _Axis([m.x for m in marks], PLOT_PX[0], log=log_x)
    up = _Axis([value for m in marks for value in (m.low, m.high)], PLOT_PX[1], log=log_y)
    lines = [(across(m.x), up(m.low), up(m.high), m.weight) for m in marks]
    taken: list[_Box] = []
    positions = [""] * len(names)
    for i in sorted(range(len(names)), key=lambda i: across(x[i])):
        boxes = _boxes(across(x[i]), up(y[i]), _LETTER_PX * len(names[i]))
        costs = {position: _cost(box, lines, taken) for position, box in boxes.items()}
        positions[i] = min(costs, key=lambda position: costs[position])
        taken.append(boxes[positions[i]])
    return positions


class _Axis:
    """Pixels of a value."""

    def __init__(self, values: Sequence[float], px: float, *, log: bool) -> None:
        self._log = log
        low, high = (self._scaled(end(values)) for end in (min, max))
        self._start, self._px = low, px
        self._per_px = (high - low) / (1 - 2 * _PAD) / px or 1.0

    def __call__(self, value: float) -> float:
        return _PAD * self._px + (self._scaled(value) - self._start) / self._per_px

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float


def _boxes(x: float, y: float, width: float) -> dict[str, _Box]:
    """What a name covers, by its position, as Plotly places it; the best to read first."""
    starts = {"right": x + _GAP_PX, "left": x - _GAP_PX - width, "center": x - width / 2}
    level = {"bottom": y - _GAP_PX - _LINE_PX, "top": y + _GAP_PX, "middle": y - _LINE_PX / 2}
    return {
        f"{vertical} {horizontal}": _Box(left, level[vertical], left + width, level[vertical] + _LINE_PX)
        for horizontal, left in starts.items()
        for vertical in ("bottom", "top", "middle")
        if (vertical, horizontal) != ("middle", "center")
    }


def _cost(box: _Box, lines: Sequence[tuple[float, float, float, float]], taken: Sequence[_Box]) -> float:
    covered = sum(weight for x, low, high, weight in lines if box.left < x < box.right and low < box.top and high > box.bottom)
    names = sum(
        other.left < box.right and box.left < other.right and other.bottom < box.top and box.bottom < other.top for other in taken
    )  # fmt: skip
    outside = box.left < 0 or box.right > PLOT_PX[0] or box.bottom < 0 or box.top > PLOT_PX[1]
    return covered + _NAME * names + _OUTSIDE * outside
