"""A rung of the ladder: how much of a full training a network gets before it is judged.

A plain rung is a fraction of the schedule: the training stops there, and goes on to the next. One with fewer images or a lower resolution
is a training apart: a whole schedule of its own, compressed to the rung's fraction of the passes, that ends there. Written as `0.5`,
`0.25@0.5px` (a quarter of the passes, at half the resolution) or `1@0.5px@0.2img` (all passes, at half the resolution, over a fifth of the
images). Read by `engine`, by `accuracy.ladder` and the records, and by a study's settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lowsearch.errors import UsageError

_SHARE = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)(px|img)?")
_HINT = "--rungs 0.5,1, or a cheap rung first: --rungs 0.25@0.5px,0.5,1"


class Rung(float):
    """What a rung takes of the computation of the full training, so that rungs are ordered by it; and of what it is made.

    A plain rung equals its fraction as a number, one apart equals no number. 1 is the full training.
    """

    fraction: float
    """Of the passes over its images."""
    images: float
    """Share of the recipe's training images: the first so many, which hold the classes in their proportions."""
    resolution: float
    """Share of a network's resolution, rounded to its total stride; images are validated at it, too."""

    def __new__(cls, fraction: float, images: float = 1.0, resolution: float = 1.0) -> Rung:
        """Raises UsageError on a share outside (0, 1]."""
        for share in (fraction, images, resolution):
            if not 0 < share <= 1:
                raise UsageError(f"{share:g} is no share in (0, 1]", hint=_HINT)
        self = super().__new__(cls, fraction * images * resolution**2)
        self.fraction, self.images, self.resolution = float(fraction), float(images), float(resolution)
        return self

    @classmethod
    def of(cls, value: float | str) -> Rung:
        """The rung that a number or a text means; `str` writes the text. Raises UsageError."""
        if isinstance(value, Rung):
            return value
        if not isinstance(value, str):
            return cls(value)
        fraction, *cuts = (_SHARE.fullmatch(part.strip()) for part in value.split("@"))
        shares = {cut[2]: float(cut[1]) for cut in cuts if cut and cut[2]}
        if not fraction or fraction[2] or len(shares) < len(cuts):
            raise UsageError(f"{value!r} is no rung, which is FRACTION, FRACTION@SHAREpx, FRACTION@SHAREimg or both", hint=_HINT)
        return cls(float(fraction[1]), shares.get("img", 1.0), shares.get("px", 1.0))

    @property
    def apart(self) -> bool:
        """Whether it is a training of its own, that no other rung goes on from."""
        return self.images < 1 or self.resolution < 1

    @property
    def label(self) -> str:
        """For people: `50 %`, or the text of a rung apart."""
        return str(self) if self.apart else f"{100 * self.fraction:.0f} %"

    def n_images(self, available: int, n_classes: int) -> int:
        """Training images where the recipe has `available`. Raises UsageError where the share has fewer images than there are classes."""
        n = round(self.images * available)
        if self.images < 1 and n < n_classes:
            raise UsageError(f"rung {self} has {n} of {available} training images, fewer than the {n_classes} classes", hint=_HINT)
        return n

    def resolution_px(self, resolution_px: int, total_stride: int) -> int:
        """Side of the images for a network of `resolution_px`."""
        return part_of(self.resolution, resolution_px, total_stride) if self.resolution < 1 else resolution_px

    def __str__(self) -> str:
        cuts = {"px": self.resolution, "img": self.images}
        return _shortest(self.fraction) + "".join(f"@{_shortest(share)}{unit}" for unit, share in cuts.items() if share < 1)

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rung):
            return (self.fraction, self.images, self.resolution) == (other.fraction, other.images, other.resolution)
        return not self.apart and float(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self.fraction, self.images, self.resolution)) if self.apart else super().__hash__()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.fraction, self.images, self.resolution)


def rungs_of(values: str | Iterable[float]) -> tuple[Rung, ...]:
    """The rungs of a ladder, from a text as `0.25@0.5px,0.5,1` or from numbers: the cheapest first, the full training last.

    Raises UsageError on anything else.
    """
    listed = values.split(",") if isinstance(values, str) else list(values)
    shown = ",".join(map(str, listed))
    try:
        rungs = tuple(map(Rung.of, listed))
    except UsageError as error:
        raise UsageError(f"rungs are {shown!r}: {error.message}", hint=error.hint) from error
    if not rungs or rungs[-1] != 1.0:
        raise UsageError(f"rungs are {shown!r}, expected the last to be 1, the full training", hint=_HINT)
    for low, high in zip(rungs, rungs[1:], strict=False):
        if not float(low) < float(high):
            costs = f"{low} takes {float(low):.3g} of a full training, {high} after it {float(high):.3g}"
            raise UsageError(f"rungs are {shown!r}, expected each to cost more than the one before: {costs}", hint=_HINT)
    return rungs


def part_of(share: float, resolution_px: int, total_stride: int) -> int:
    """The multiple of `total_stride` that is nearest to a `share` of `resolution_px`, at least one."""
    return total_stride * max(1, round(share * resolution_px / total_stride))


def _shortest(share: float) -> str:
    return "1" if share == 1 else repr(share)
