"""Latency of whole networks from the table of their blocks: for populations of genomes, for single networks, and block by block.

A network is the sum of its blocks, corrected for what a block alone cannot show (docs/measurement.md):

    network_ms = sum over blocks of  h hot_ms + w warm_ms + c cold_ms + s * weights - o - t * elements

`h, w, c` place the state of the caches in a network between the three that were measured; `s` is the cost of fetching weights that
the network's other blocks have pushed out; `o` is the overhead of a call, which every
measured block pays and a network pays once; `t` the cost of handing over a tensor at a block's edges, which a network mostly saves. All
are at least 0, and fitted on the whole networks of the table, relatively and robustly. The spread they leave is the `±` of every
prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import nnls

from lowsearch import cost
from lowsearch.arch import Arch, Block, Head, input_channels
from lowsearch.errors import TableError
from lowsearch.latency.block_model import BlockModel, Prediction
from lowsearch.latency.table import BlockLatency, LatencyTable, Source
from lowsearch.space import SearchSpace

MIN_NETWORKS = 3
"""A correction fitted on fewer networks than this says nothing about its own error."""
MIN_SHARE = 0.1
"""No correction takes a block below this share of its hot time."""
_HUBER_STEPS = 10
_DOUBTED = 1.5
"""Networks beyond this many deviations count less in the fit."""
_OUTLYING = 3.0
"""Networks beyond this many deviations count no more than this for the spread."""
_USUAL_SHARES = np.array([0.25, 0.5, 0.25])
"""Hot, warm and cold weight where the networks do not say otherwise, and how far they usually are from it."""
_SHARE_STD = 0.2
_DRIFT_STD = 0.02
"""All networks of a table were measured within minutes. From one hour to the next the clock of a shared machine drifts by 2 to 4 %."""
_REPEATS_VARIANCE = 2.0
"""A predicted block often stands several times in a network, and errs there in the same direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShare:
    """What one block contributes to a network's predicted latency."""

    place: str
    block: Block
    ms: float
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How blocks alone become a part of a network. A slower block never makes a network faster: no weight of a time is negative."""

    hot: float
    warm: float
    cold: float
    ms_per_weight: float
    """Added for every parameter."""
    overhead_ms: float
    """Taken off for every block."""
    ms_per_element: float
    """Taken off for every element that enters or leaves a block."""
    relative_std: float
    """Spread of the calibration networks around their prediction from the others."""

    def block_ms(self, block: Block, latency: BlockLatency) -> float:
        """What `block` contributes to a network."""
        time_ms = self.hot * latency.hot_ms + self.warm * latency.warm_ms + self.cold * latency.cold_ms
        time_ms += self.ms_per_weight * cost.of_block(block).params
        return max(time_ms - self.overhead_ms - self.ms_per_element * _elements(block), MIN_SHARE * latency.hot_ms)


class LatencyPredictor:
    """Predicts networks of `space` on the target of `table`."""

    def __init__(self, space: SearchSpace, table: LatencyTable) -> None:
        self.space = space
        self.table = table
        self._model = BlockModel(table)
        self._predictions: dict[Block, Prediction] = {}
        calibration = table.calibration.get(space.name, ())
        if len(calibration) < MIN_NETWORKS:
            raise TableError(
                f"the table of {table.target} holds {len(calibration)} networks of space {space.name!r}, needed are {MIN_NETWORKS}",
                hint=f"{table.target.profile_command} --space {space.name}",
            )
        archs = [row.arch for row in calibration]
        self._predict_missing([block for arch in archs for block in arch.blocks()])
        self.correction = self._fit(archs, np.array([row.latency_ms for row in calibration]))

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,)."""
        mean, variance = self._score(genomes).T
        return mean, self._std(mean, variance)

    def predict_archs(self, archs: Sequence[Arch]) -> tuple[np.ndarray, np.ndarray]:
        """mean_ms (n,), std_ms (n,) of networks that need not be in the space."""
        self._predict_missing([block for arch in archs for block in arch.blocks()])
        rows = [[self._block_row(block) for block in arch.blocks()] for arch in archs]
        sums = np.array([np.sum(row, axis=0) for row in rows]).reshape(-1, 2)
        return sums[:, 0], self._std(sums[:, 0], sums[:, 1])

    def explain(self, arch: Arch) -> list[BlockShare]:
        """Block by block, in the order they run, what adds up to the predicted latency of `arch`."""
        self._predict_missing(arch.blocks())
        return [
            BlockShare(place=place, block=block, ms=self.correction.block_ms(block, latency), source=latency.source)
            for place, block in arch.named_blocks()
            for latency in [self.latency(block)]
        ]

    def latency(self, block: Block) -> BlockLatency:
        """What was measured of `block`, or what its kind's model predicts."""
        self._predict_missing([block])
        measured = self.table.entries.get(block)
        return measured if measured is not None else self._predictions[block].latency

    @cached_property
    def _score(self):
        """Scorer of populations: the two columns of `_block_row`, summed."""
        self._predict_missing(self.space.blocks)
        return self.space.block_sums(np.array([self._block_row(block) for block in self.space.blocks]))

    def _predict_missing(self, blocks: Sequence[Block]) -> None:
        missing = [b for b in dict.fromkeys(blocks) if b not in self.table.entries and b not in self._predictions]
        if missing:
            self._predictions |= self._model.predict(missing)

    def _block_row(self, block: Block) -> tuple[float, float]:
        """What `block` adds to the mean, and to the variance beyond that of networks of measured blocks."""
        mean = self.correction.block_ms(block, self.latency(block))
        return mean, self._block_variance(block, mean)

    def _block_variance(self, block: Block, mean_ms: float) -> float:
        return 0.0 if block in self.table.entries else _REPEATS_VARIANCE * (self._predictions[block].relative_std * mean_ms) ** 2

    def _std(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        return np.sqrt((self.correction.relative_std * mean) ** 2 + variance)

    def _fit(self, archs: Sequence[Arch], measured_ms: np.ndarray) -> Correction:
        """The correction, and its spread from leaving out one network after the other."""
        inputs = np.array([np.sum([self._inputs(block) for block in arch.blocks()], axis=0) for arch in archs]) / measured_ms[:, None]
        weights = _fit_weights(inputs)
        kept = ~np.eye(len(archs), dtype=bool)
        left_out = np.array([inputs[i] @ _fit_weights(inputs[kept[i]]) - 1 for i in range(len(archs))])
        hot, warm, cold, ms_per_weight, overhead_ms, ms_per_element = (float(weight) for weight in weights)
        fitted = Correction(
            hot=hot, warm=warm, cold=cold, ms_per_weight=ms_per_weight, overhead_ms=overhead_ms, ms_per_element=ms_per_element,
            relative_std=0.0,
        )  # fmt: skip
        # Predicted blocks of the calibration networks are part of their spread already; elsewhere they count by themselves.
        explained = [
            sum(self._block_variance(b, fitted.block_ms(b, self.latency(b))) for b in arch.blocks()) / time_ms**2
            for arch, time_ms in zip(archs, measured_ms, strict=True)
        ]
        outlying = _OUTLYING * _deviation(left_out)  # One disturbed measurement is not the spread of all the others.
        total = float(np.mean(np.clip(left_out, -outlying, outlying) ** 2))
        spread = max(total - float(np.mean(explained)), 0.25 * total) + _DRIFT_STD**2
        return replace(fitted, relative_std=float(np.sqrt(spread)))

    def _inputs(self, block: Block) -> tuple[float, ...]:
        latency = self.latency(block)
        return latency.hot_ms, latency.warm_ms, latency.cold_ms, float(cost.of_block(block).params), -1.0, -float(_elements(block))


def _fit_weights(inputs: np.ndarray) -> np.ndarray:
    """Weights (n_inputs,), none negative, with `inputs @ weights` close to 1 for every network.

    A network far from the line counts less (Huber), and the three states of the caches are pulled towards their usual shares, as far
    as the noise of the networks leaves them open.
    """
    ones = np.ones(len(inputs))
    weights = nnls(inputs, ones)[0]
    for _ in range(_HUBER_STEPS):
        residuals = np.abs(inputs @ weights - 1)
        deviation = _deviation(residuals)
        trust = np.sqrt(np.minimum(1.0, _DOUBTED * deviation / np.maximum(residuals, 1e-12)))
        pull = np.eye(3, inputs.shape[1]) * deviation / _SHARE_STD
        rows = np.vstack([inputs * trust[:, None], pull])
        weights = nnls(rows, np.concatenate([trust, np.diag(pull) * _USUAL_SHARES]))[0]
    return weights


def _deviation(residuals: np.ndarray) -> float:
    """Standard deviation of most of the residuals around 0, whatever the few others do."""
    return float(1.4826 * np.median(np.abs(residuals))) + 1e-9


def _elements(block: Block) -> int:
    """Elements of the tensors that enter and leave a block, of one image."""
    entering = input_channels(block) * block.resolution_px**2
    return entering + (block.num_classes if isinstance(block, Head) else block.out_channels * block.out_px**2)
