"""Latency of whole networks from the table of their blocks: for populations of genomes, for single networks, and block by block.

A network is the sum of its blocks, corrected for what a block alone cannot show (docs/measurement.md):

    network_ms = sum over blocks of  h hot_ms + w warm_ms + c cold_ms + f fetch_ms - o - t elements

How near `h` and `w` are to a block that is called again and again depends on what else the network reads in a pass: one that fits in the
caches of its core runs hotter than one that does not (`crowding`). `fetch_ms` is the time of reading the block's weights from where
they lie, by the memory curve of the table. `o` is the overhead of a call, which every measured block pays and a network pays once;
`t` the cost of handing over a tensor at a block's edges, which a network mostly saves. All weights are at least 0, and fitted on the
whole networks of the table, relatively and robustly. The spread they leave is the `±` of every prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm as normal
from scipy.stats import t as student_t

from lowsearch import cost
from lowsearch.arch import Arch, Block, Downsampler, Head, StemConv, input_channels
from lowsearch.errors import TableError
from lowsearch.latency.block_model import BlockModel, Prediction
from lowsearch.latency.measure import BLOCKS_PER_STEP
from lowsearch.latency.memory import MemoryCurve
from lowsearch.latency.table import BlockLatency, LatencyTable, Source
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

MIN_NETWORKS = 3
"""A correction fitted on fewer networks than this says nothing about its own error."""
MIN_SHARE = 0.1
"""No correction takes a block below this share of its hot time."""
_HUBER_STEPS = 12
_FIRST_DEVIATION = 0.03
_DOUBTED = 1.5
"""Networks beyond this many deviations count less in the fit."""
_OUTLYING = 4.0
"""Networks beyond this many deviations count no more than this for the spread."""
_ACTIVATIONS_SHARE = 0.25
"""Of all activations of a network, what passes through the caches between two uses of its weights."""
_CONFLICTS = 1.35
"""A cache is lost somewhat before it is full: its lines compete for places, and other code runs as well. As measured on one CPU."""
_DRIFT_STD = 0.015
"""The calibration networks were measured within minutes. An hour later networks differ by 1 to 2 % beyond the pace that is common to all
(the same networks timed again on a shared machine), the large ones together, which no calibration network shows. The pace itself is no
part of a prediction's error: it is measured wherever predictions and measurements meet, and divided out."""
_LEAST_SHARE = 0.25
"""Of the spread of the calibration networks, what is laid on whole networks at the least, whatever predicted blocks seem to explain."""
_REPEATS_VARIANCE = 2.0
"""A predicted block often stands several times in a network, and errs there in the same direction."""
_N_COLUMNS = 5  # of `LatencyPredictor._block_row`


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShare:
    """What one block contributes to a network's predicted latency."""

    place: str
    block: Block
    ms: float
    source: Source


class Correction(NamedTuple):
    """How blocks alone become a part of a network. A slower block never makes a network faster: no weight of a time is negative."""

    hot: float
    """Weights of the three states where a network reads more than its core's caches hold."""
    warm: float
    cold: float
    hot_resident: float
    """Weights of `hot` and `warm` in a network that stays in the caches."""
    warm_resident: float
    fetch: float
    """Weight of the time that reading a block's weights takes."""
    branch_overhead_ms: float
    """Taken off for every residual branch."""
    joint_overhead_ms: float
    """Taken off for every other block: stem, downsamplers and head."""
    ms_per_element: float
    """Taken off for every element that enters or leaves a block."""

    def block_ms(self, block: Block, latency: BlockLatency, *, crowding: float) -> float:
        """What `block` contributes to a network, without fetching its weights. `crowding` is 0 where the network stays in the caches of
        its core, 1 where it does not."""
        return (1 - crowding) * self._part_ms(block, latency, self.hot_resident, self.warm_resident) + crowding * self._part_ms(
            block, latency, self.hot, self.warm
        )

    def _part_ms(self, block: Block, latency: BlockLatency, hot: float, warm: float) -> float:
        time_ms = hot * latency.hot_ms + warm * latency.warm_ms + self.cold * latency.cold_ms
        overhead_ms = self.branch_overhead_ms if _is_branch(block) else self.joint_overhead_ms
        return max(time_ms - overhead_ms - self.ms_per_element * _elements(block), MIN_SHARE * latency.hot_ms)


class _Traffic:
    """What networks read in a pass, and what that means on the memory of the table's device."""

    def __init__(self, table: LatencyTable, space: SearchSpace) -> None:
        self._bytes_per_number = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}[table.target.precision]
        self._batch = table.target.batch
        self._curve = MemoryCurve(table.memory)
        measured = [block for block in space.blocks if block in table.entries] or list(table.entries)
        company = BLOCKS_PER_STEP * float(np.mean([self.footprint_bytes(block) for block in measured] or [0.0]))
        self._company_ms = float(self._curve.extra_ms_per_byte(_CONFLICTS * company))
        """Extra time of a byte while warm blocks were timed: what they read in a turn."""
        self.handing_over_ms = 2 * self._batch * self._bytes_per_number * float(self._curve.ms_per_byte(_CONFLICTS * company))
        """Time of writing and reading an element of every image of the batch between two blocks."""

    def weight_bytes(self, block: Block) -> int:
        return self._bytes_per_number * cost.of_block(block).params

    def footprint_bytes(self, block: Block) -> float:
        """What running `block` reads."""
        return self.weight_bytes(block) + self._bytes_per_number * self._batch * _ACTIVATIONS_SHARE * cost.of_block(block).activations

    def crowding(self, footprint_bytes: np.ndarray | float) -> np.ndarray:
        """How far a network that reads so much is from staying in its caches (n,), 0 to 1: 1 from where warm blocks were timed."""
        if self._company_ms <= 0:
            return np.ones_like(np.asarray(footprint_bytes, dtype=float))
        return np.minimum(self._curve.extra_ms_per_byte(_CONFLICTS * np.asarray(footprint_bytes)) / self._company_ms, 1.0)

    def fetch_ms_per_byte(self, footprint_bytes: np.ndarray | float) -> np.ndarray:
        """Extra time of a byte of weights in a network that reads so much (n,)."""
        return self._curve.extra_ms_per_byte(_CONFLICTS * np.asarray(footprint_bytes))


class LatencyPredictor:
    """Predicts networks of `space` on the target of `table`."""

    def __init__(self, space: SearchSpace, table: LatencyTable) -> None:
        self.space = space
        self.table = table
        self._model = BlockModel(table)
        self._traffic = _Traffic(table, space)
        self._predictions: dict[Block, Prediction] = {}
        calibration = table.calibration.get(space.name, ())
        if len(calibration) < MIN_NETWORKS:
            raise TableError(
                f"the table of {table.target} holds {len(calibration)} networks of space {space.name!r}, needed are {MIN_NETWORKS}",
                hint=f"{table.target.profile_command} --space {space.name}",
            )
        self._predict_missing([block for row in calibration for block in row.arch.blocks()])
        self._block_scale = 1.0
        self.correction, left_out, fitted = self._fit(calibration)
        self.relative_std, self._block_scale = self._spread(calibration, left_out, fitted)
        """`relative_std`: spread of networks of measured blocks. `_block_scale`: how many times the variance that the block models state
        of unmeasured blocks shows in networks."""

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> mean_ms (n,), std_ms (n,)."""
        return self._joined(self._score(genomes))

    def predict_archs(self, archs: Sequence[Arch]) -> tuple[np.ndarray, np.ndarray]:
        """mean_ms (n,), std_ms (n,) of networks that need not be in the space."""
        self._predict_missing([block for arch in archs for block in arch.blocks()])
        rows = [np.sum([self._block_row(block) for block in arch.blocks()], axis=0) for arch in archs]
        return self._joined(np.array(rows).reshape(-1, _N_COLUMNS))

    def explain(self, arch: Arch) -> list[BlockShare]:
        """Block by block, in the order they run, what adds up to the predicted latency of `arch`."""
        self._predict_missing(arch.blocks())
        footprint_bytes = sum(self._traffic.footprint_bytes(block) for block in arch.blocks())
        crowding = float(self._traffic.crowding(footprint_bytes))
        fetch_ms = self.correction.fetch * float(self._traffic.fetch_ms_per_byte(footprint_bytes))
        return [
            BlockShare(
                place=place, block=block, source=latency.source,
                ms=self.correction.block_ms(block, latency, crowding=crowding) + fetch_ms * self._traffic.weight_bytes(block),
            )
            for place, block in arch.named_blocks()
            for latency in [self.latency(block)]
        ]  # fmt: skip

    def changes(self, before: Arch, after: Sequence[Arch]) -> tuple[np.ndarray, np.ndarray]:
        """How much longer each network of `after` takes than `before`: mean_ms (n,), std_ms (n,).

        Two networks that share most of their blocks err together, so the deviation of their difference is not that of two networks. The
        error of a whole network is laid on its blocks, independently and in proportion to their times; what both networks spend on a
        block errs in both alike, and only the rest counts.
        """
        old = self._ms_by_block(before)
        total_ms = sum(old.values())
        relative_var = (self.relative_std * total_ms) ** 2 / sum(ms**2 for ms in old.values())
        mean, variance = np.empty(len(after)), np.empty(len(after))
        for i, arch in enumerate(after):
            new = self._ms_by_block(arch)
            mean[i] = sum(new.values()) - total_ms
            variance[i] = sum(
                (relative_var + self._unmeasured_var(block)) * (new.get(block, 0.0) - old.get(block, 0.0)) ** 2
                for block in old.keys() | new.keys()
            )
        return mean, np.sqrt(variance)

    def _ms_by_block(self, arch: Arch) -> dict[Block, float]:
        """What the repeats of every distinct block of `arch` take together."""
        sums: dict[Block, float] = {}
        for share in self.explain(arch):
            sums[share.block] = sums.get(share.block, 0.0) + share.ms
        return sums

    def latency(self, block: Block) -> BlockLatency:
        """What was measured of `block`, or what its kind's model predicts."""
        self._predict_missing([block])
        measured = self.table.entries.get(block)
        return self._predictions[block].latency if measured is None else measured

    @cached_property
    def _score(self):
        """Scorer of populations: the columns of `_block_row`, summed."""
        self._predict_missing(self.space.blocks)
        return self.space.block_sums(np.array([self._block_row(block) for block in self.space.blocks]))

    def _predict_missing(self, blocks: Sequence[Block]) -> None:
        missing = [b for b in dict.fromkeys(blocks) if b not in self.table.entries and b not in self._predictions]
        if missing:
            self._predictions |= self._model.predict(missing)

    def _block_row(self, block: Block) -> tuple[float, ...]:
        """What `block` adds to a network that stays in the caches and to one that does not, its weights and footprint in bytes, and the
        variance beyond that of networks of measured blocks."""
        latency = self.latency(block)
        resident, crowded = (self.correction.block_ms(block, latency, crowding=crowding) for crowding in (0.0, 1.0))
        variance = self._block_variance(block, max(resident, crowded))
        return resident, crowded, self._traffic.weight_bytes(block), self._traffic.footprint_bytes(block), variance

    def _joined(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums of `_block_row` over networks (n, _N_COLUMNS) as mean_ms (n,) and std_ms (n,)."""
        resident, crowded, weight_bytes, footprint_bytes, variance = sums.T
        crowding = self._traffic.crowding(footprint_bytes)
        mean = resident + crowding * (crowded - resident)
        mean += self.correction.fetch * weight_bytes * self._traffic.fetch_ms_per_byte(footprint_bytes)
        return mean, np.sqrt((self.relative_std * mean) ** 2 + variance)

    def _block_variance(self, block: Block, mean_ms: float) -> float:
        return _REPEATS_VARIANCE * self._unmeasured_var(block) * mean_ms**2

    def _unmeasured_var(self, block: Block) -> float:
        """Relative variance of what a model says of a block, as far as it shows in networks; 0 for a measured one."""
        return 0.0 if block in self.table.entries else self._block_scale * self._predictions[block].relative_std ** 2

    def _fit(self, networks: Sequence[NetworkLatency]) -> tuple[Correction, np.ndarray, np.ndarray]:
        """The correction, and the relative error (n,) of every network's prediction: from the others, and from all."""
        measured_ms = np.array([row.latency_ms for row in networks])
        inputs = np.array([self._inputs(row.arch) for row in networks]) / measured_ms[:, None]
        usual, usual_std = self._usual()
        noise = float(np.median([row.latency_std_ms / row.latency_ms for row in networks]))
        weights = _fit_weights(inputs, usual, usual_std, noise=noise)
        kept = ~np.eye(len(networks), dtype=bool)
        left_out = np.array([
            inputs[i] @ _fit_weights(inputs[kept[i]], usual, usual_std, noise=noise) - 1 for i in range(len(networks))
        ])  # fmt: skip
        return Correction(*map(float, weights)), left_out, inputs @ weights - 1

    def _spread(self, networks: Sequence[NetworkLatency], left_out: np.ndarray, fitted: np.ndarray) -> tuple[float, float]:
        """`relative_std` and `_block_scale` from errors (n,) of networks that were left out of the fit, and of the same in it.

        A network at the edge of its space pulls the fit towards itself, and is far off without: its leverage h shrinks the error that is
        left to (1 - h) of the one without it, whose square overstates the variance by 1 / (1 - h). Their product is that variance (for
        least squares), and a new network adds the leverage that networks have on average.

        The block models say how the spread is shared out: networks with more unmeasured blocks are less certain. How large it is, the
        errors themselves say (as in locally weighted conformal prediction, arXiv 1604.04173). As it stands, a block model's error is no
        measure of that: the noise of timing single blocks is in it, which a sum averages out, and the gaps of a sparse sample.
        """
        explained = np.array([self._block_share(row.arch) for row in networks])
        outlying = _OUTLYING * _deviation(left_out)  # One disturbed measurement is not the spread of all the others.
        remaining = np.clip(np.divide(fitted, left_out, out=np.ones_like(fitted), where=left_out != 0), 0, 1)  # 1 - leverage
        squares = np.minimum(left_out**2, outlying**2) * remaining * (2 - float(np.mean(remaining)))
        total = float(np.mean(squares))
        whole = max(total - float(np.mean(explained)), _LEAST_SHARE * total, 1e-12)
        n = len(networks)
        unknown = float(student_t.ppf(0.95, n) / normal.ppf(0.95)) ** 2  # The spread itself is known from n networks only.
        scale = unknown * float(np.mean(squares / (whole + explained)))
        return float(np.sqrt(scale * whole + _DRIFT_STD**2)), scale

    def _block_share(self, arch: Arch) -> float:
        """Relative variance of the prediction of `arch` that its unmeasured blocks state."""
        variance = sum(self._block_row(block)[-1] for block in arch.blocks())
        return variance / sum(share.ms for share in self.explain(arch)) ** 2

    def _inputs(self, arch: Arch) -> np.ndarray:
        """What every weight of a Correction multiplies, (9,)."""
        blocks = arch.blocks()
        hot, warm, cold = np.sum([(row.hot_ms, row.warm_ms, row.cold_ms) for row in map(self.latency, blocks)], axis=0)
        footprint_bytes = sum(map(self._traffic.footprint_bytes, blocks))
        crowding = float(self._traffic.crowding(footprint_bytes))
        fetch_ms = float(self._traffic.fetch_ms_per_byte(footprint_bytes)) * sum(map(self._traffic.weight_bytes, blocks))
        n_branches = sum(map(_is_branch, blocks))
        return np.array([
            crowding * hot, crowding * warm, cold, (1 - crowding) * hot, (1 - crowding) * warm, fetch_ms,
            -n_branches, n_branches - len(blocks), -sum(map(_elements, blocks)),
        ])  # fmt: skip

    def _usual(self) -> tuple[np.ndarray, np.ndarray]:
        """The weights where the networks do not say otherwise, and how far they usually are from that, (9,) each.

        Overheads are counted in the time of a small block of the space, which is little more than its call.
        """
        times = [self.latency(block).hot_ms for block in self.space.blocks if block in self.table.entries]
        call_ms = float(np.percentile(times, 10)) if times else 0.0
        element_ms = self._traffic.handing_over_ms
        usual = Correction(
            hot=0.5, warm=0.55, cold=0.05, hot_resident=0.5, warm_resident=0.55, fetch=0.7, branch_overhead_ms=0.3 * call_ms,
            joint_overhead_ms=call_ms, ms_per_element=element_ms,
        )  # fmt: skip
        std = Correction(
            hot=0.2, warm=0.2, cold=0.1, hot_resident=0.2, warm_resident=0.2, fetch=0.3, branch_overhead_ms=call_ms,
            joint_overhead_ms=3 * call_ms, ms_per_element=element_ms or 1e-6,
        )  # fmt: skip
        return np.array(usual), np.maximum(np.array(std), 1e-12)


def _fit_weights(inputs: np.ndarray, usual: np.ndarray, usual_std: np.ndarray, *, noise: float) -> np.ndarray:
    """Weights (n_inputs,), none negative, with `inputs @ weights` close to 1 for every network.

    A network far from the line counts less (Huber), and the weights are pulled towards the usual ones as far as the networks, whose
    measurements have the relative error `noise`, leave them open.
    """
    weights = usual
    deviation, trust = _FIRST_DEVIATION, np.ones(len(inputs))
    for _ in range(_HUBER_STEPS):
        # In units of `usual_std`, or elements (1e-7 ms) would drown in rounding beside shares.
        rows = np.vstack([inputs * (trust / deviation)[:, None] * usual_std, np.eye(len(usual))])
        weights = nnls(rows, np.concatenate([trust / deviation, usual / usual_std]))[0] * usual_std
        residuals = np.abs(inputs @ weights - 1)
        deviation = max(_deviation(residuals), noise)
        trust = np.sqrt(np.minimum(1.0, _DOUBTED * deviation / np.maximum(residuals, 1e-12)))
    return weights


def _deviation(residuals: np.ndarray) -> float:
    """Standard deviation of most of the residuals around 0, whatever the few others do."""
    return float(1.4826 * np.median(np.abs(residuals))) + 1e-9


def _is_branch(block: Block) -> bool:
    """Whether `block` is a residual branch, whose output is added to its input."""
    return not isinstance(block, StemConv | Downsampler | Head)


def _elements(block: Block) -> int:
    """Elements of the tensors that enter and leave a block, of one image of the batch."""
    entering = input_channels(block) * block.resolution_px**2
    return entering + (block.num_classes if isinstance(block, Head) else block.out_channels * block.out_px**2)
