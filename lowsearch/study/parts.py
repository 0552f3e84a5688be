"""What a study is made of: the space, the frozen latency table, the training ladder, the final training, the device.

`study.run` and its workers see these only through `Parts`; `build_parts` makes the real ones from a study's folder, tests make others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lowsearch.accuracy.scores import Scores, Unit
from lowsearch.arch import Arch, Block
from lowsearch.footprint import Precision
from lowsearch.search.devices import Fleet
from lowsearch.search.estimates import AccuracyModel, EnergyPredictor, Estimator, LatencyModel
from lowsearch.search.verification import Measured, Verifications, VerifiedLatency
from lowsearch.space import SearchSpace
from lowsearch.study.settings import StudySettings
from lowsearch.train.order import Order

Progress = Callable[[int, int, str], None]
"""Called with (done, total, label)."""
INHERITED_FILE = "inherited.json"
"""Where a study keeps what networks inherited from the supernet that it searches by."""


HeldOutSet = Literal["range", "band"]
"""Networks from the whole range of latency, or from a narrow band of it."""


class Record(Protocol):
    """One training, or part of one; `accuracy.records.AccuracyRecord` is one."""

    @property
    def arch(self) -> Arch: ...
    @property
    def arch_id(self) -> str: ...
    @property
    def rung(self) -> float:
        """By which records of one network are ordered; 1 is the full training."""
        ...

    @property
    def val_accuracy(self) -> float: ...
    @property
    def cpu_seconds(self) -> float: ...


class Scorer(AccuracyModel, Protocol):
    """A fitted accuracy model that can also read a partial training."""

    def predict_record(self, record: Any) -> tuple[float, float]:
        """Mean and standard deviation of the full-schedule accuracy of a candidate trained to the record's rung."""
        ...


class Training(Protocol):
    """The ladder of one study. What it trained is recorded on disk before `run` returns."""

    @property
    def rungs(self) -> Sequence[float]: ...

    def run(self, arch: Arch, rung: float, *, progress: Callable[[float], None] | None = None) -> Record:
        """Train on from the rung below, or from the start where the rung is apart; a rung on record is returned at once. `progress`
        hears the fraction done."""
        ...

    def record(self, arch: Arch, rung: float) -> Record | None:
        """What is on record for `arch` at `rung`."""
        ...

    def order(self, arch: Arch, rung: float) -> Order:
        """`run` as an order for another machine; accepted, it gives the record."""
        ...

    def discard(self, arch: Arch) -> None:
        """Remove what is kept of `arch` for training on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalScore:
    """One full training of a finalist, with a seed that the search did not use."""

    val_accuracy: float
    test_accuracy: float
    n_val: int
    n_test: int
    cpu_seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)
    """More for metrics.json: the curve, the recipe."""


class Share(Protocol):
    """One block's part of a predicted latency; `latency.predictor.BlockShare` is one."""

    @property
    def place(self) -> str: ...
    @property
    def block(self) -> Block: ...
    @property
    def ms(self) -> float: ...
    @property
    def source(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a study works with. The functions that need torch import it when they are called."""

    space: SearchSpace
    latency: LatencyModel
    """As predicted, on the study's device, the first where there are several."""
    latency_source: Literal["predicted", "table"]
    """`table` where the device is not attached: nothing can be measured again."""
    explain: Callable[[Arch], Sequence[Share]]
    chance_accuracy: float
    training: Callable[[], Training] | None
    """Opens the ladder; None where the study trains nothing."""
    records: Callable[[], Sequence[Record]]
    """Everything the study has trained so far, by any worker, in an order that does not depend on who was first."""
    fit: Callable[[Sequence[Any]], Scorer | None]
    """An accuracy model of such records; None where they are too few."""
    train_final: Callable[[Arch, int, Path], FinalScore] | None
    """Trains a network with a seed on the full schedule, resumably, and leaves `<path>.safetensors`."""
    measure: Callable[[Sequence[Arch], Progress | None], Sequence[Measured]] | None
    """Measures networks in fresh processes, interleaved; None where the device is not attached."""
    order_final: Callable[[Arch, int, Path], Order] | None = None
    """`train_final` as an order for another machine; accepted, it gives the score. None where the study trains nothing."""
    batch: int = 1
    """Images of the forward pass that latency is of."""
    precision: Precision = "fp32"
    """What latency is measured in; memory and file size are of it too."""
    fleet: Fleet | None = None
    """All devices of the study, where there are several."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """`latency_source` on every device of the fleet, by label."""
    energy: EnergyPredictor | None = None
    """None where the latency table holds no energy."""
    verify: Callable[[Sequence[Arch]], Sequence[Measured]] | None = None
    """As `measure`, in seconds and beside the study's trainings; None where that says nothing."""
    verifications: Verifications = field(default_factory=Verifications)
    """What `verify` has said in this study."""
    anchors: Sequence[tuple[Arch, float]] = ()
    """Some networks of the latency table and their latency_ms there: measured again, they tell the pace of the machine."""
    held_out: Callable[[int, HeldOutSet], Training] | None = None
    """Opens a ladder of one rung, the whole schedule, with a seed: trainings that no predictor may learn from."""
    held_out_records: Callable[[HeldOutSet], Sequence[Record]] = lambda kept_in: ()
    """What `held_out` has trained so far for a set, in the order it was trained."""
    proxies: Callable[[Sequence[Arch], Progress | None], Mapping[str, Scores]] | None = None
    """Training-free scores of networks on a batch of the study's images, by name."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What study.yaml states beside the settings: the device's name, versions, hashes, sizes."""

    @property
    def estimator(self) -> Estimator:
        """Scores populations of the space, on the study's target, with the measured latency of networks that were verified."""
        return self._estimator(VerifiedLatency(self.latency, self.verifications))

    @property
    def prediction(self) -> Estimator:
        """As `estimator`, by predictions alone."""
        return self._estimator(self.latency)

    def _estimator(self, latency: LatencyModel) -> Estimator:
        latency = latency if self.fleet is None else self.fleet.with_first(latency)
        return Estimator(self.space, latency, batch=self.batch, precision=self.precision, energy=self.energy)


class StandIn(AccuracyModel, Protocol):
    """What stands in for accuracy in a study that trains nothing: `predict` gives a score, never called accuracy in any output."""

    @property
    def margin(self) -> float:
        """How far below the family's lowest score hypervolume is counted from."""
        ...

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much each genome of `after` (n, n_genes) scores more than `before` (n_genes,): mean (n,), standard deviation (n,)."""
        ...


def stand_in_of(settings: StudySettings, space: SearchSpace, folder: Path) -> StandIn | None:
    """What stands in for accuracy in the study in `folder`; None where networks are trained."""
    if settings.supernet:
        from lowsearch.accuracy.supernet_prior import ScoredNetworks, SupernetPrior

        return SupernetPrior(space, ScoredNetworks.read(folder / INHERITED_FILE))
    if settings.accuracy == "published":
        from lowsearch.accuracy.prior import PublishedPrior

        return PublishedPrior(space)
    return ProxyAccuracy(space, settings.accuracy) if settings.accuracy in ("params", "macs") else None


@dataclass(frozen=True)
class ProxyAccuracy:
    """MACs or parameters in place of accuracy, as log10. How far off they are as such is not known: it has no error to give."""

    space: SearchSpace
    metric: Literal["macs", "params"]
    margin: float = math.log10(1 / 0.9)
    unit: Unit = "rank"

    @property
    def source(self) -> str:
        return f"proxy:{self.metric}"

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        score = np.log10(Estimator(self.space, None).estimate(genomes).mean[self.metric])
        return score, np.zeros(len(genomes))

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.predict(after)[0] - self.predict(before[None])[0], np.zeros(len(after))
