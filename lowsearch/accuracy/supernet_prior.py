"""What networks inherit from a supernet as a score of every network of its space: for a search that trains nothing.

The inherited score of one network, minus its loss on the validation images, takes a second or two, and a search asks for millions. So some
random networks are scored, and a regression learns from them what the architecture says. The score ranks (`unit` is `rank`): a training of
their own would give other numbers. What was scored is kept in a file of the study, so that the study means the same when the supernet is
gone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowsearch import cost
from lowsearch.accuracy.agreement import Agreement, agreement
from lowsearch.accuracy.gaussian import GaussianProcess
from lowsearch.accuracy.predictor import Coordinates
from lowsearch.accuracy.scores import Unit
from lowsearch.accuracy.supernet import InheritedScore, SupernetEstimator
from lowsearch.errors import LowsearchError, StudyError
from lowsearch.files import write_atomically
from lowsearch.space import SearchSpace
from lowsearch.train.supernet import sample_within

SCHEMA = 1
N_SCORED = 150
"""Random networks that are scored, beside the hand-made family."""
_SPREAD = 0.025
"""Standard deviation of the accuracies of random networks, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredNetworks:
    """Networks of a supernet with the scores that they inherited, and what the supernet was."""

    name: str
    supernet_hash: str
    data: str
    num_classes: int
    max_macs: float | None
    scores: tuple[InheritedScore, ...]

    @classmethod
    def draw(
        cls, estimator: SupernetEstimator, n: int | None = None, *, seed: int = 0, progress: Callable[[int, int, str], None] | None = None
    ) -> ScoredNetworks:
        """Score `n` (N_SCORED) random networks that the supernet was trained for, and the family's; what is on file is taken from there."""
        n = N_SCORED if n is None else n
        plan, space, rng = estimator.plan, estimator.space, np.random.default_rng(seed)
        genomes = space.sample(n, rng=rng) if plan.max_macs is None else sample_within(space, n, plan.max_macs, rng=rng)
        family = [arch for arch in space.family.values() if estimator.holds(arch)]
        archs = dict.fromkeys([*map(space.decode, genomes), *family])
        return cls(
            name=estimator.folder.name, supernet_hash=plan.supernet_hash, data=plan.data, num_classes=plan.num_classes,
            max_macs=plan.max_macs, scores=tuple(estimator.score(list(archs), progress=progress)),
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> ScoredNetworks:
        """Inverse of `write`. Raises StudyError on a missing or damaged file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA:
                raise ValueError("of another version")
            return cls(**{**values, "scores": tuple(InheritedScore.from_dict(score) for score in values["scores"])})
        except (OSError, KeyError, TypeError, ValueError, AttributeError, LowsearchError) as error:
            raise StudyError(f"{path} does not hold a supernet's scores: {error}", hint="search again, in another study") from error

    def write(self, path: Path) -> None:
        values = {name: getattr(self, name) for name in ("name", "supernet_hash", "data", "num_classes", "max_macs")}
        write_atomically(path, json.dumps({"schema": SCHEMA, **values, "scores": [score.to_dict() for score in self.scores]}) + "\n")


class SupernetPrior:
    """Scores of all networks of a space, learned from those that some inherited from a supernet.

    Two Gaussian processes on the architecture, one linear, for populations, and one that is not, for shortlists. The priors of their scales
    are made for accuracies, so scores are brought to the spread that those usually have.
    """

    unit: Unit = "rank"
    source = "supernet"

    def __init__(self, space: SearchSpace, known: ScoredNetworks) -> None:
        self.space, self.known = space, known
        scores = np.array([-score.val_loss for score in known.scores])
        self._center, self._scale = float(scores.mean()), max(float(scores.std()), 1e-9) / _SPREAD
        self._coordinates = Coordinates(space)
        points = self._coordinates(np.array([space.encode(score.arch) for score in known.scores], dtype=np.int8))
        residual, no_noise = (scores - self._center) / self._scale, np.zeros(len(scores))  # All were scored on the same images.
        self._linear = GaussianProcess(points, residual, no_noise, curved=False)
        self._exact = GaussianProcess(points, residual, no_noise, curved=True)
        self._weights, self._covariance = self._linear.linear_weights()
        self._linear_factor, self._exact_factor = (_calibration(process) for process in (self._linear, self._exact))

    @property
    def margin(self) -> float:
        """How far below the family's lowest score hypervolume is counted from: a standard deviation of the scored networks."""
        return self._scale * _SPREAD

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> score (n,) and its standard deviation (n,). For populations."""
        points = self._coordinates(genomes)
        design = np.hstack([np.ones((len(points), 1)), points.cost, points.features])
        variance = np.einsum("ij,ij->i", design @ self._covariance, design) + self._linear.lack_of_fit_var
        return self._as_scores(design @ self._weights, np.maximum(variance, 0), self._linear_factor)

    def predict_exact(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, with what is not linear: for a shortlist."""
        return self._as_scores(*self._exact.predict(self._coordinates(genomes)), self._exact_factor)

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much each genome of `after` (n, n_genes) scores more than `before` (n_genes,): mean (n,), standard deviation (n,)."""
        mean, variance = self._exact.predict_differences(self._coordinates(before[None]), self._coordinates(after))
        return self._scale * mean, self._scale * self._exact_factor * np.sqrt(np.maximum(variance, 0))

    def examined(self) -> dict[str, Agreement]:
        """How the scores that networks inherited are ranked by the regression, each network left out, and by MACs."""
        left_out, _ = self._exact.leave_one_out()
        log_macs = [math.log(cost.count(score.arch).macs) for score in self.known.scores]
        observed = self._exact.residual
        return {"left out": agreement(left_out, observed), "macs": agreement(log_macs, observed)}

    def _as_scores(self, residual: np.ndarray, variance: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
        return self._center + self._scale * residual, self._scale * factor * np.sqrt(variance)


def _calibration(process: GaussianProcess) -> float:
    """What its standard deviations are off by, as each network left out says."""
    left_out, variance = process.leave_one_out()
    return float(np.sqrt(np.mean((process.residual - left_out) ** 2 / variance)))
