"""What an estimator of accuracy says of networks: how good, how sure, in which unit, from where, and at what cost.

Every estimator answers in one of two units, and tables, plots and files name it: a training, the predictor and a calibrated supernet
in `top1`; the published trend, an uncalibrated supernet and all proxies in `rank`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Unit = Literal["top1", "rank"]
"""`top1`: the fraction of images that is classified correctly. `rank`: a score that orders networks and is no accuracy."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What one estimator says of n networks, larger meaning better."""

    source: str
    """As in the column `accuracy_source`: `estimated`, `prior:published`, `proxy:macs`, `supernet`, ..."""
    unit: Unit
    mean: np.ndarray
    """(n,)"""
    std: np.ndarray | None = None
    """(n,); None where the estimator knows no error of its own."""
    cpu_seconds: float = 0.0
    """What these n cost here, trainings that the estimator learned from apart; 0 where it is but arithmetic on the architecture."""
