"""What networks inherit from a supernet as a score of every network of its space: for a search that trains nothing.

The inherited score of one network takes a second or two, and a search asks for millions. So some random networks are scored, and the
regression of `accuracy.predictor` learns from them what the architecture says. The score is the geometric mean, over validation images, of
the probability that the inherited network gives to the right class: the exponential of minus its mean cross-entropy, which orders
networks as the loss does. It ranks (`unit` is `rank`): a training of their own would give other numbers. What was scored is kept in a file
of the study, so that the study means the same when the supernet is gone.
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
from lowsearch.accuracy.predictor import AccuracyPredictor
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.accuracy.scores import Unit
from lowsearch.accuracy.supernet import InheritedScore, SupernetEstimator
from lowsearch.errors import LowsearchError, StudyError
from lowsearch.files import write_atomically
from lowsearch.space import SearchSpace
from lowsearch.train import CurvePoint
from lowsearch.train.supernet import sample_within

SCHEMA = 1
N_SCORED = 150
"""Random networks that are scored, beside the hand-made family."""


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
    """Scores of all networks of a space, learned from those that some inherited from a supernet."""

    unit: Unit = "rank"
    source = "supernet"
    margin = 0.02
    """How far below the family's lowest score hypervolume is counted from."""

    def __init__(self, space: SearchSpace, known: ScoredNetworks) -> None:
        self.space, self.known = space, known
        self._model = AccuracyPredictor(space).fit(_as_record(score) for score in known.scores)

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, n_genes) -> score (n,) and its standard deviation (n,). For populations."""
        return self._model.predict(genomes)

    def predict_exact(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, with what is not linear: for a shortlist."""
        return self._model.predict_exact(genomes)

    def changes(self, before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much each genome of `after` (n, n_genes) scores more than `before` (n_genes,): mean (n,), standard deviation (n,)."""
        return self._model.changes(before, after)

    def examined(self) -> dict[str, Agreement]:
        """How the scores that networks inherited are ranked by the regression, each network left out, and by MACs."""
        left_out = self._model.leave_one_out()
        macs = {score.arch.arch_id: math.log(cost.count(score.arch).macs) for score in self.known.scores}
        log_macs = [macs[arch_id] for arch_id in left_out.arch_ids]
        return {"left out": agreement(left_out.predicted, left_out.observed), "macs": agreement(log_macs, left_out.observed)}


def _as_record(score: InheritedScore) -> AccuracyRecord:
    """The score in the form that the regression learns from."""
    likelihood = math.exp(-score.val_loss)
    point = CurvePoint(fraction=1.0, step=0, train_loss=0.0, val_accuracy=likelihood, val_loss=score.val_loss, cpu_seconds=0.0)
    return AccuracyRecord(
        arch=score.arch,
        recipe="inherited",
        recipe_hash="inherited",
        data="inherited",
        data_hash="inherited",
        seed=0,
        rung=1.0,
        curve=(point,),
    )
