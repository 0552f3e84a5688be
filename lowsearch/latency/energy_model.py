"""Energy of networks nobody has counted: a non-negative sum of what a pass takes, fitted on the calibration networks of a table.

A device takes power for as long as a pass lasts, and energy for every operation and every byte moved. Of latency alone, with MACs, with
memory traffic, and with both, the sum is used that foretells each calibration network best from the others; what is left of that is
its `±`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import nnls

from lowsearch import cost
from lowsearch.arch import Arch, Block
from lowsearch.footprint import ACTIVATION_BYTES, weight_bytes
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import Scorer, SearchSpace

MIN_COUNTED = 6
"""Networks whose energy is known; fewer do not tell three terms apart."""
TERMS = ("latency", "MACs", "memory traffic")
_CHOICES = ((0,), (0, 1), (0, 2), (0, 1, 2))


def counted_networks(table: LatencyTable, space: SearchSpace) -> list[NetworkLatency]:
    """The calibration networks of `space` whose energy is known."""
    return [row for row in table.calibration.get(space.name, ()) if row.energy_mj is not None]


def fit_energy(latency: LatencyPredictor) -> EnergyModel | None:
    """The energy model of a predictor's table; None where the table holds the energy of too few networks."""
    rows = counted_networks(latency.table, latency.space)
    return EnergyModel(latency, rows) if len(rows) >= MIN_COUNTED else None


class EnergyModel:
    """Predicts `energy_mj`, millijoules of one pass at the table's batch, rest included."""

    def __init__(self, latency: LatencyPredictor, rows: list[NetworkLatency]) -> None:
        self._space, self._target = latency.space, latency.table.target
        archs = [row.arch for row in rows]
        energy_mj = np.array([row.energy_mj for row in rows], dtype=float)
        inputs = np.column_stack([latency.predict_archs(archs)[0], *np.transpose([self._of_arch(arch) for arch in archs])])
        errors = {choice: _left_out_error(inputs[:, choice], energy_mj) for choice in _CHOICES}
        best = min(_CHOICES, key=lambda choice: errors[choice])  # Of equals the shortest, which comes first.
        self.relative_std = errors[best]
        """Root mean square of the relative errors about each network, foretold from the others."""
        self.weights = np.zeros(len(TERMS))
        """Millijoules for a millisecond, for 10^9 MACs and for 10^6 bytes."""
        self.weights[list(best)] = _fit(inputs[:, best], energy_mj)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sums"}  # A compiled scorer cannot be pickled.

    @cached_property
    def _sums(self) -> Scorer:
        return self._space.block_sums(np.array([self._of_block(block) for block in self._space.blocks]))

    def predict(self, genomes: np.ndarray, latency_ms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of genomes (n, n_genes) with the predicted `latency_ms` (n,): mean_mj (n,), std_mj (n,)."""
        mean_mj = self.weights[0] * latency_ms + self._sums(genomes) @ self.weights[1:]
        return mean_mj, self.relative_std * mean_mj

    def _of_arch(self, arch: Arch) -> np.ndarray:
        return np.sum([self._of_block(block) for block in arch.blocks()], axis=0)

    def _of_block(self, block: Block) -> tuple[float, float]:
        """10^9 MACs, and 10^6 bytes read and written: every weight once, every activation twice."""
        counted, batch = cost.of_block(block), self._target.batch
        n_bytes = weight_bytes(block, self._target.precision)
        n_bytes += 2 * batch * ACTIVATION_BYTES[self._target.precision] * counted.activations
        return batch * counted.macs / 1e9, n_bytes / 1e6


def _fit(inputs: np.ndarray, energy_mj: np.ndarray) -> np.ndarray:
    """Weights (k,) of `inputs` (n, k), at least 0, of least relative error."""
    return nnls(inputs / energy_mj[:, None], np.ones(len(energy_mj)))[0]


def _left_out_error(inputs: np.ndarray, energy_mj: np.ndarray) -> float:
    """Root mean square of the relative errors of a fit without the network it foretells."""
    everyone = np.arange(len(energy_mj))
    errors = [inputs[i] @ _fit(inputs[everyone != i], energy_mj[everyone != i]) / energy_mj[i] - 1 for i in everyone]
    return float(np.sqrt(np.mean(np.square(errors))))
