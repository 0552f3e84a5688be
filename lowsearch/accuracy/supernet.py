"""How networks score with weights inherited from a supernet, and what that says about their accuracy after a training of their own.

An inherited score ranks (`unit` is `rank`): minus the loss on the validation images, which still tells networks apart where all
accuracies are close to guessing, and neither is what a training would give. Calibrated on a few trained networks it becomes an estimate of
theirs (`top1`), whose interval is rescaled by leave-one-out errors: see `Calibration`. Scores are kept beside the supernet.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from lowsearch import cost
from lowsearch.accuracy.gaussian import GaussianProcess, Points
from lowsearch.accuracy.predictor import SEED_STD, Coordinates
from lowsearch.accuracy.records import AccuracyRecord
from lowsearch.accuracy.scores import Unit
from lowsearch.arch import Arch
from lowsearch.data import ImageData
from lowsearch.errors import DataError, LowsearchError, StudyError, UsageError
from lowsearch.train.supernet import inherit, load_supernet, read_plan, require_trained, validate

SCORES = "scores.jsonl"
MIN_TRAINED = 5
"""Fewer trained networks do not calibrate."""
_DOUBT = 4
"""Networks whose errors are as the process expects, added to those that were left out when its interval is rescaled."""
_WORST_LOSS = 1000.0
GAIN = 0.015
"""Accuracy expected of one standard deviation less inherited loss, before any network is trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InheritedScore:
    """What one network scored on the validation images with the supernet's weights and BatchNorm statistics of its own."""

    arch: Arch
    val_accuracy: float
    val_loss: float
    """Mean cross-entropy."""
    val_loss_std: float
    """Its standard error over images."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values; `from_dict` inverts it."""
        return {
            "arch_id": self.arch.arch_id, "val_accuracy": self.val_accuracy, "val_loss": self.val_loss, "val_loss_std": self.val_loss_std,
            "arch": self.arch.to_dict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> InheritedScore:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        arch = Arch.from_dict(values["arch"])  # pyright: ignore[reportArgumentType]
        if values["arch_id"] != arch.arch_id:
            raise ValueError(f"arch_id {values['arch_id']!r} is not that of its network")
        numbers = {name: float(values[name]) for name in ("val_accuracy", "val_loss", "val_loss_std")}  # pyright: ignore[reportArgumentType]
        return cls(arch=arch, **numbers)


class SupernetEstimator:
    """Scores and estimates of the networks of one supernet: the finished one in `folder`."""

    source = "supernet"

    def __init__(self, folder: Path, data: ImageData, *, device: str = "cpu") -> None:
        """Raises StudyError where there is no finished supernet, DataError where it was trained on other images."""
        self.supernet = load_supernet(folder, device=device)
        plan = read_plan(folder)
        assert plan is not None, "its weights are loaded"
        if plan.data_hash != data.data_hash:
            raise DataError(f"supernet {folder.name!r} was trained on {plan.data}, not on {data.name}", hint=f"--data {plan.data}")
        self.plan, self.data, self.folder, self.device = plan, data, folder, device
        self.space = self.supernet.space
        self._known = self._read()
        self._fitted: Calibration | None = None

    @property
    def unit(self) -> Unit:
        """What `predict` answers in: `rank` before `calibrate`, `top1` after it."""
        return "rank" if self._fitted is None else "top1"

    def holds(self, arch: Arch) -> bool:
        """Whether `arch` is one of the networks that the supernet was trained for."""
        return self.space.contains(arch) and (self.plan.max_macs is None or cost.count(arch).macs <= self.plan.max_macs)

    def score(self, archs: Sequence[Arch], *, progress: Callable[[int, int, str], None] | None = None) -> list[InheritedScore]:
        """The score of every network, from file where it is there: seconds a network on a CPU otherwise, and on file then.

        Raises NotInSpaceError, or StudyError for a network larger than any that was trained.
        """
        for arch in archs:
            self.space.encode(arch)
            require_trained(self.plan, arch, self.folder.name)
        scores = []
        for number, arch in enumerate(archs, start=1):
            if arch.arch_id not in self._known:
                model = inherit(self.supernet, arch, self.data, device=self.device)
                accuracy, loss, loss_std = validate(model, self.data, arch.resolution_px, device=self.device)
                if not math.isfinite(loss + loss_std):  # It ranks below all others.
                    loss, loss_std = _WORST_LOSS, 0.0
                self._append(InheritedScore(arch=arch, val_accuracy=accuracy, val_loss=loss, val_loss_std=loss_std))
            scores.append(self._known[arch.arch_id])
            if progress is not None:
                progress(number, len(archs), "supernet scores")
        return scores

    def calibrate(self, records: Iterable[AccuracyRecord], *, progress: Callable[[int, int, str], None] | None = None) -> SupernetEstimator:
        """Learn what inherited scores mean from networks that were fully trained, all by one recipe; partial trainings are left out.

        Scores the networks that are not on file. Raises UsageError where fewer than MIN_TRAINED networks of the space are there, or recipes
        mix, and DataError where the records are of other images.
        """
        trained: dict[Arch, list[float]] = defaultdict(list)
        recipes = set()
        for record in records:
            if record.data_hash != self.data.data_hash:
                raise DataError(f"the trained networks saw other images than {self.data.name} holds", hint="calibrate on the same data")
            if record.rung == 1.0 and self.holds(record.arch):
                trained[record.arch].append(record.val_accuracy)
                recipes.add(record.recipe_hash)
        if len(recipes) > 1:
            raise UsageError("trainings of several recipes", hint="accuracies compare only within one")
        if len(trained) < MIN_TRAINED:
            raise UsageError(
                f"{len(trained)} fully trained networks of the supernet's space, calibration needs {MIN_TRAINED}",
                hint="train more, or read the scores as ranks",
            )
        losses = _losses(self.score(list(trained), progress=progress))
        self._fitted = Calibration(
            Coordinates(self.space), self._genomes(trained), losses, np.array([np.mean(a) for a in trained.values()]),
            np.array([SEED_STD**2 / len(a) for a in trained.values()]),
        )  # fmt: skip
        return self

    def estimate(self, archs: Sequence[Arch], *, progress: Callable[[int, int, str], None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of every network, (n,) each, in `unit`. In `rank`, std is that of a finite number of validation images."""
        scores = self.score(archs, progress=progress)
        if self._fitted is not None:
            return self._fitted.predict(self._genomes(archs), _losses(scores))
        return np.array([-score.val_loss for score in scores]), np.array([score.val_loss_std for score in scores])

    def predict(self, genomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `estimate`, of genomes (n, n_genes). For shortlists: what is not on file takes seconds a network."""
        return self.estimate([self.space.decode(genome) for genome in genomes])

    def _genomes(self, archs: Iterable[Arch]) -> np.ndarray:
        return np.array([self.space.encode(arch) for arch in archs], dtype=np.int8).reshape(-1, self.space.n_genes)

    def _read(self) -> dict[str, InheritedScore]:
        path, known = self.folder / SCORES, {}
        if not path.exists():
            return known
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                values = json.loads(line)
                if values.pop("supernet_hash") == self.plan.supernet_hash:
                    score = InheritedScore.from_dict(values)
                    known[score.arch.arch_id] = score
            except (KeyError, TypeError, ValueError, AttributeError, LowsearchError) as error:
                raise StudyError(f"{path}, line {number}: not a score ({error})", hint="remove the line; it is computed again") from error
        return known

    def _append(self, score: InheritedScore) -> None:
        path = self.folder / SCORES
        line = json.dumps({"supernet_hash": self.plan.supernet_hash, **score.to_dict()}, separators=(",", ":")).encode() + b"\n"
        with FileLock(f"{path}.lock"):
            torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
            if torn:
                content = path.read_bytes()
                with path.open("r+b") as file:
                    file.truncate(content.rfind(b"\n") + 1)
            with path.open("ab") as file:
                file.write(line)
        self._known[score.arch.arch_id] = score


class Calibration:
    """From a network and its inherited loss to its accuracy after a training of its own, as learned from some that were trained.

    A Gaussian process, linear in the inherited loss, log MACs, log params and the features of the architecture; before it has learned
    anything it expects GAIN more of a network whose loss is lower by one standard deviation.
    """

    def __init__(
        self, coordinates: Coordinates, genomes: np.ndarray, losses: np.ndarray, accuracy: np.ndarray, noise_var: np.ndarray
    ) -> None:
        """`genomes` (n, n_genes) inherited `losses` (n,) and were trained to `accuracy` (n,); `noise_var` (n,) is what seeds add to its
        variance."""
        self._coordinates = coordinates
        self._center, self._scale = float(losses.mean()), max(float(losses.std()), 1e-9)
        points, prior = self._placed(genomes, losses)
        self._mean = float(accuracy.mean())
        residual = accuracy - self._mean - prior
        self._process = GaussianProcess(points, residual, noise_var, curved=False)
        left_out, variance = self._process.leave_one_out()
        squares = float((((residual - left_out) ** 2) / variance).sum())
        self._factor = math.sqrt((squares + _DOUBT) / (len(accuracy) + _DOUBT))

    def predict(self, genomes: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of one training's accuracy, (n,) each."""
        points, prior = self._placed(genomes, losses)
        mean, variance = self._process.predict(points)
        return np.clip(self._mean + prior + mean, 0, 1), np.sqrt(self._factor**2 * variance + SEED_STD**2)

    def _placed(self, genomes: np.ndarray, losses: np.ndarray) -> tuple[Points, np.ndarray]:
        """Where networks lie, and what is expected of each before anything is learned, (n,)."""
        points, lower = self._coordinates(genomes), (self._center - losses) / self._scale
        return Points(cost=np.column_stack([points.cost, lower]), features=points.features), GAIN * lower


def _losses(scores: Sequence[InheritedScore]) -> np.ndarray:
    return np.array([score.val_loss for score in scores], dtype=float)
