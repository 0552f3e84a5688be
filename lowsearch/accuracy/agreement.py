"""How well one signal ranks networks as another does, and by how much better than a third: with bootstrap intervals over networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_NETWORKS = 3
"""Fewer have no rank correlation worth a number."""
MIN_FOR_INTERVAL = 5
N_BOOTSTRAP = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Rank correlation of two scores of the same networks; None where networks are too few or a score does not vary."""

    n_networks: int
    spearman: float | None = None
    low: float | None = None
    high: float | None = None
    """95 % bootstrap interval of `spearman` over networks."""
    kendall: float | None = None
    """tau-b, which counts ties."""
    kendall_low: float | None = None
    kendall_high: float | None = None


def agreement(signal: Any, outcome: Any, *, seed: int = 0, n_bootstrap: int = N_BOOTSTRAP) -> Agreement:
    """How `signal` (n,) ranks the networks by `outcome` (n,), larger meaning better in both."""
    a, b = np.asarray(signal, dtype=float), np.asarray(outcome, dtype=float)
    n = len(a)
    rho = spearman(a, b) if n >= MIN_NETWORKS else None
    if rho is None:
        return Agreement(n_networks=n)
    tau = float(_kendall(a[None], b[None])[0])
    if n < MIN_FOR_INTERVAL:
        return Agreement(n_networks=n, spearman=rho, kendall=tau)
    picks = np.random.default_rng(seed).integers(n, size=(n_bootstrap, n))
    (low, high), (tau_low, tau_high) = (
        np.nanquantile(values, [0.025, 0.975]).tolist() for values in (_spearmans(a[picks], b[picks]), _kendall(a[picks], b[picks]))
    )
    return Agreement(n_networks=n, spearman=rho, low=low, high=high, kendall=tau, kendall_low=tau_low, kendall_high=tau_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """By how much one score ranks the same networks better than another: Spearman minus Spearman."""

    difference: float
    low: float
    high: float
    """95 % interval of a bootstrap over networks that draws both scores together: what is hard to rank is hard for both."""


def lead(signal: Any, other: Any, outcome: Any, *, seed: int = 0, n_bootstrap: int = N_BOOTSTRAP) -> Lead | None:
    """How far `signal` (n,) ranks the networks by `outcome` (n,) better than `other` (n,) does.

    None where networks are too few for an interval, or either score does not vary.
    """
    a, b, truth = (np.asarray(values, dtype=float) for values in (signal, other, outcome))
    ours, theirs = spearman(a, truth), spearman(b, truth)
    if len(truth) < MIN_FOR_INTERVAL or ours is None or theirs is None:
        return None
    picks = np.random.default_rng(seed).integers(len(truth), size=(n_bootstrap, len(truth)))
    differences = _spearmans(a[picks], truth[picks]) - _spearmans(b[picks], truth[picks])
    low, high = np.nanquantile(differences, [0.025, 0.975]).tolist()
    return Lead(difference=ours - theirs, low=low, high=high)


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation with ties averaged; None where either side does not vary."""
    value = float(_spearmans(np.asarray(a)[None], np.asarray(b)[None])[0])
    return None if np.isnan(value) else value


def _spearmans(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row of (m, n); NaN where a row does not vary."""
    from scipy.stats import rankdata  # Half a second that only the end of a study needs.

    ranks = [rankdata(x, axis=1) for x in (a, b)]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    scale = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return np.divide((centred[0] * centred[1]).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tau-b row by row of (m, n): concordant minus discordant pairs, over the geometric mean of the pairs that each side tells apart."""
    first, second = np.triu_indices(a.shape[1], k=1)

    def tau(x: np.ndarray, y: np.ndarray) -> float:
        dx, dy = np.sign(x[first] - x[second]), np.sign(y[first] - y[second])
        scale = np.sqrt(np.abs(dx).sum() * np.abs(dy).sum())
        return float((dx * dy).sum() / scale) if scale else np.nan

    return np.array([tau(x, y) for x, y in zip(a, b, strict=True)])
