"""A worker of a study: one process (`study.workers.process`), one torch thread, one network at a time.

It dies rather than let Optuna mark an interrupted trial as failed, so that the trial is taken up again under the same number.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from filelock import FileLock
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from lowsearch.arch import Arch
from lowsearch.errors import NothingLeftError, StudyError
from lowsearch.search.estimates import AccuracyModel, excess, scores_of
from lowsearch.search.feasible import networks_within
from lowsearch.search.objectives import Metric
from lowsearch.search.promotion import standing
from lowsearch.search.sampler import LIMITS, WHOLE_SCHEDULE, accuracy_constraint, suggest_genome
from lowsearch.search.samplers import SAMPLERS, Task, without_predictor
from lowsearch.search.verification import broken_limit, is_near_limit, verify
from lowsearch.study.gate import SIGNALS, Gate
from lowsearch.study.parts import Parts, Record, Scorer, stand_in_of
from lowsearch.study.settings import StudySettings, read_study_file, stored_settings
from lowsearch.study.storage import Candidate, candidates, crew_of, n_proposals, open_study, set_exhausted, set_missed, why_ended
from lowsearch.study.workers.database import PATIENCE_S
from lowsearch.study.workers.leases import WORKER, Overtaken, is_held, kept
from lowsearch.train import Rung

logger = logging.getLogger(__name__)

PROPOSAL_LOCK = ".proposal.lock"
WORKER_LOCK = ".{slot}.lock"
"""Held by a worker for as long as it lives."""
USER_ERROR_EXIT = 3
MAX_PRUNED_IN_A_ROW = 300
"""A sampler that only finds networks over a limit, or only repeats, is stopped and the user told."""
START = 24
"""Networks of the diverse start, which are trained to the end whatever they promise; benchmarks/first_networks.py says why."""
UNKNOWN_STD = 0.05
"""Of a score while there are too few records for a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a worker needs of study.yaml."""

    settings: StudySettings
    reference: dict[Metric, float]
    """Worst value by metric, fixed at the study's creation."""
    slice_edges: list[float]
    """Edges of the slices within which candidates compete for further training, as costs of what networks are spread over."""

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of the study in `folder`. Raises StudyError where study.yaml is damaged."""
        settings, values = stored_settings(folder), read_study_file(folder)
        if settings is None or values is None:
            raise StudyError(f"{folder} holds no study.yaml, so it is not a study", hint=f"lowsearch run --study {folder.name}")
        try:
            reference = {metric: float(value) for metric, value in values["reference_point"].items()}
            return cls(settings=settings, reference=reference, slice_edges=[float(edge) for edge in values["slice_edges"]])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StudyError(
                f"{folder / 'study.yaml'}: reference_point or slice_edges are damaged", hint=f"mend the file, or remove {folder}"
            ) from error

    @property
    def reference_costs(self) -> np.ndarray:
        """The reference point as costs, (n_objectives,)."""
        objectives = self.settings.objectives
        return objectives.costs({metric: np.array([self.reference[metric]]) for metric in objectives.metrics})[0]


class Abandoned(BaseException):
    """Leaves a trial RUNNING, to be taken up again. No Exception: those Optuna would catch, and mark the trial as failed."""


class SearchWorker:
    """Runs trials until the study has enough of them or is told to stop."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        parts: Parts,
        *,
        name: str,
        stopped: threading.Event,
        clock: Callable[[], float],
        url: str | None = None,
    ) -> None:
        """`clock` gives the seconds of search so far, over all runs; `url` is where this machine reaches the database's server."""
        self._plan, self._parts, self._name, self._stopped, self._clock = plan, parts, name, stopped, clock
        self._lock = FileLock(folder / PROPOSAL_LOCK)
        self._estimator = parts.estimator
        self._all = networks_within(self._estimator, plan.settings.limits)
        self._objectives = plan.settings.objectives
        self._reference = plan.reference_costs
        self._stand_in = stand_in_of(plan.settings, parts.space, folder)
        self._training = parts.training() if plan.settings.trains and parts.training else None
        self._study = open_study(folder, self._objectives, url=url, patience_s=PATIENCE_S)
        self._is_steered = True
        self._study.sampler = self._sampler(is_steered=True)
        signals = SIGNALS if plan.settings.sampler == "lowsearch" else ("promotion",)
        trained = self._training is not None and self._objectives.metrics[0] == "accuracy"
        self._gate = Gate(folder, parts.space, parts.fit, signals=signals) if trained else None
        self._pruned_in_a_row = 0

    def run(self) -> None:
        """Run trials to the end of the search. Raises Abandoned, from the error, where a candidate could not be finished."""
        while not self._stopped.is_set():
            self._lock.acquire()  # From asking for a trial to signing and checking it, no other worker asks.
            try:
                if self._enough():
                    return
                self._judge_signals()
                self._study.optimize(self._objective, n_trials=1, callbacks=[self._tidy, self._count_pruned])
            except (Abandoned, NothingLeftError) as error:
                # Abandoned by an error of the sampler, which Optuna asks when the trial needs its first gene.
                missed = error if isinstance(error, NothingLeftError) else error.__cause__
                if not isinstance(missed, NothingLeftError) or not self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                    raise
                with self._lock:  # A trial that was pruned has let go of it.
                    set_missed(self._study, missed.message)
                return
            except Overtaken:
                logger.warning("a trial was handed to another worker; what was trained of it is on record")
            finally:
                self._lock.release(force=True)

    def _records(self) -> Sequence[Record]:
        """The trainings that the next decision may know of."""
        return self._parts.records()

    def _judge_signals(self) -> None:
        """Before a trial is asked for."""
        if self._gate is None:
            return
        number = len(self._study.get_trials(deepcopy=False))
        self._gate.judge(self._records(), n_trials=number)
        is_steered = self._gate.follows("steering", trial=number)
        if is_steered != self._is_steered:
            self._study.sampler, self._is_steered = self._sampler(is_steered=is_steered), is_steered

    def _is_random(self, number: int) -> bool:
        """Whether trial `number` is proposed at random."""
        return self._plan.settings.sampler == "random" or not (self._gate is None or self._gate.follows("steering", trial=number))

    def _trains_whole(self, trial: Trial) -> bool:
        """Whether the network of `trial` is trained to the end, whatever it promises.

        A predictor that does not steer stops nobody either: it is learned and examined from whole trainings, and would get no more.
        """
        chosen = trial.user_attrs["origin"] == "family" or bool(trial.user_attrs.get(WHOLE_SCHEDULE))
        return chosen or not (self._gate is None or all(self._gate.follows(signal, trial=trial.number) for signal in SIGNALS))

    def _enough(self) -> bool:
        """Whether nothing is waiting and the sampler has proposed all it may, or all there is."""
        if self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return False
        if self._all is not None and not self._acceptable(self._all).any():
            set_exhausted(self._study)
        if why_ended(self._study):
            return True
        trials = self._plan.settings.trials
        return trials is not None and n_proposals(self._study) >= trials

    def _tidy(self, _: optuna.Study, trial: FrozenTrial) -> None:
        if self._training is not None and trial.state == TrialState.COMPLETE:
            genome = np.array([trial.params[gene.name] for gene in self._parts.space.genes], dtype=np.int8)
            self._training.discard(self._parts.space.decode(genome))

    def _count_pruned(self, _: optuna.Study, trial: FrozenTrial) -> None:
        self._pruned_in_a_row = self._pruned_in_a_row + 1 if trial.state == TrialState.PRUNED else 0
        if self._pruned_in_a_row >= MAX_PRUNED_IN_A_ROW:
            raise NothingLeftError(
                f"{self._pruned_in_a_row} proposals of sampler {self._plan.settings.sampler!r} in a row break a limit or were tried before",
                hint="loosen --max or --min, or start another study with --sampler lowsearch",
            )

    def _objective(self, trial: Trial) -> tuple[float, ...]:
        try:
            trial.set_user_attr(WORKER, self._name)
            with kept(self._study._storage, trial._trial_id, self._name):
                return self._judged(trial)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            raise Abandoned from error

    def _judged(self, trial: Trial) -> tuple[float, ...]:
        """The values of `trial`, trained if need be. Raises TrialPruned where it must not be."""
        genome, reason = self._proposal(trial)
        self._lock.release(force=True)
        if reason:
            raise optuna.TrialPruned(reason)
        score = self._score(self._parts.space.decode(genome), genome, whole=self._trains_whole(trial))
        return self._values(trial, genome, score)

    def _proposal(self, trial: Trial) -> tuple[np.ndarray, str]:
        """The genome of `trial`, and why it must not be trained, or nothing. Call it under the proposal lock."""
        if "origin" not in trial.user_attrs:
            trial.set_user_attr("origin", "random" if self._is_random(trial.number) else "proposed")
        genome = suggest_genome(trial, self._parts.space)
        reason = self._refusal(trial, genome)
        if reason:
            trial.set_user_attr("reason", reason)
            self._sign_off(trial)
        return genome, reason

    def _values(self, trial: Trial, genome: np.ndarray, score: Score) -> tuple[float, ...]:
        """What Optuna is told of a scored trial. Raises Overtaken where another worker holds it by now."""
        if not is_held(self._study._storage, trial._trial_id, self._name):
            raise Overtaken
        if score.stopped:
            logger.info("trial %d: %s", trial.number, score.stopped)
        trial.set_user_attr("score", dataclasses.asdict(score))
        known = {} if score.accuracy is None else accuracy_constraint(self._plan.settings.limits, score.accuracy)
        for name, broken in known.items():
            if name not in trial.constraints:  # Set by a worker that died before it could end the trial.
                trial.set_constraint(name, broken)
        self._sign_off(trial)
        mean = {metric: float(values[0]) for metric, values in self._estimator.estimate(genome[None]).mean.items()}
        mean["accuracy"] = float("nan") if score.accuracy is None else score.accuracy
        return tuple(mean[metric] for metric in self._objectives.metrics)

    def _sign_off(self, trial: Trial) -> None:
        trial.set_user_attr("elapsed_s", round(self._clock(), 2))

    def _refusal(self, trial: Trial, genome: np.ndarray) -> str:
        """Why `genome` must not be trained, or nothing. Tells Optuna's samplers how far a limit is broken."""
        limits = self._plan.settings.limits
        tried = self._tried(genome, but=trial.number)
        broken = self._excess(genome)
        if not broken and not tried and self._verified(genome):
            broken = self._excess(genome)
        if limits and LIMITS not in trial.constraints:
            trial.set_constraint(LIMITS, broken)
        measured, held = self._parts.verifications.of(genome), self._plan.settings.measured_limits
        if measured is not None and (limit := broken_limit(held, measured.latency_ms, batch=self._parts.batch)) is not None:
            return f"measured {'over' if limit.caps_latency else 'under'} limit: {measured.latency_ms:.4g} ms, {limit}"
        if broken > 0:
            return f"breaks {', '.join(map(str, limits))} by {100 * broken:.1f} %"
        return "was tried before" if tried else ""

    def _excess(self, genome: np.ndarray) -> float:
        return float(excess(self._estimator.estimate(genome[None]), self._plan.settings.limits)[0])

    def _verified(self, genome: np.ndarray) -> bool:
        """Measure a network that is to be trained and whose limit is in doubt; whether that was so."""
        parts = self._parts
        if parts.verify is None or self._training is None or parts.verifications.of(genome) is not None:
            return False
        if crew_of(self._name):  # It joined, maybe from a machine that is not the one searched for.
            return False
        mean_ms, std_ms = (float(values[0]) for values in parts.latency.predict(genome[None]))
        if not is_near_limit(self._plan.settings.measured_limits, mean_ms, std_ms, batch=parts.batch):
            return False
        found = verify(parts.space.decode(genome), genome, (mean_ms, std_ms), anchors=parts.anchors, measure=parts.verify)
        parts.verifications.append(found)
        logger.info("%s takes %.4g ms, predicted %.4g ± %.2g", found.arch_id, found.latency_ms, mean_ms, std_ms)
        return True

    def _tried(self, genome: np.ndarray, *, but: int) -> bool:
        others = candidates(self._study, self._parts.space)
        return any((other.genome == genome).all() for other in others if other.number != but and _counts_as_tried(other))

    def _acceptable(self, genomes: np.ndarray) -> np.ndarray:
        """Whether each genome (n, n_genes) keeps the limits and was not tried, (n,)."""
        genomes = self._parts.space.canonical(genomes)
        tried = {other.genome.tobytes() for other in candidates(self._study, self._parts.space) if _counts_as_tried(other)}
        allowed = excess(self._estimator.estimate(genomes), self._plan.settings.limits) == 0
        return allowed & np.array([genome.tobytes() not in tried for genome in genomes], dtype=bool)

    def _sampler(self, *, is_steered: bool) -> BaseSampler:
        settings = self._plan.settings
        task = Task(
            space=self._parts.space, estimator=self._estimator, accuracy=self._newest_model, objectives=self._objectives,
            limits=settings.limits, reference=self._plan.reference, seed=settings.seed, acceptable=self._acceptable,
            start=START if self._training is not None else 0, prediction=self._parts.prediction,
        )  # fmt: skip
        return SAMPLERS[settings.sampler](task) if is_steered else without_predictor(task)

    def _newest_model(self) -> AccuracyModel | None:
        if self._stand_in is not None:
            return self._stand_in
        return self._parts.fit(self._records()) if self._training is not None else None

    # Training ----------------------------------------------------------------------------------------------------------

    def _score(self, arch: Arch, genome: np.ndarray, *, whole: bool) -> Score:
        if self._stand_in is not None:
            said = scores_of(self._stand_in, genome[None])
            return Score(accuracy=float(said.mean[0]), accuracy_std=0.0 if said.std is None else float(said.std[0]), rung=0.0)
        if self._training is None:
            return Score(accuracy=None, accuracy_std=None, rung=0.0)
        score = None
        for rung in self._training.rungs:
            score = self._judged_at(self._training.run(arch, rung), rung, whole=whole)
            if score.stopped:
                break
        assert score is not None, "a ladder has at least one rung"
        return score

    def _judged_at(self, record: Record, rung: float, *, whole: bool) -> Score:
        """What a training to `rung` says, and why it does not go on, if so."""
        # What a candidate recorded above this rung before it was interrupted must not change what is decided at this one.
        records = [r for r in self._records() if r.arch_id != record.arch_id or r.rung <= rung]
        scorer = self._parts.fit(records)
        mean, std = scorer.predict_record(record) if scorer else (record.val_accuracy, UNKNOWN_STD)
        against = "" if whole or rung >= 1 else self._against(record, records, scorer)
        if self._stopped.is_set() and rung < 1:
            against = "the search is over"
        return Score(
            accuracy=float(mean), accuracy_std=float(std), rung=rung, val_accuracy=float(record.val_accuracy),
            stopped=f"stopped at {Rung.of(rung).label}: {against}" if against else "",
        )  # fmt: skip

    def _against(self, record: Record, records: Sequence[Record], scorer: Scorer | None) -> str:
        """What speaks against training the network of `record` further, or nothing."""
        if self._objectives.metrics[0] != "accuracy":
            return "it has but to keep a limit, and the first rung tells"
        latest: dict[str, Record] = {}
        for other in records:
            if other.arch_id not in latest or other.rung > latest[other.arch_id].rung:
                latest[other.arch_id] = other
        members = list(latest.values())
        scores = [scorer.predict_record(m) if scorer else (m.val_accuracy, UNKNOWN_STD) for m in members]
        mean = dict(self._estimator.estimate(np.stack([self._parts.space.encode(m.arch) for m in members])).mean)
        mean["accuracy"] = np.array([s[0] for s in scores])
        axis = self._objectives.spread_over
        return standing(
            self._objectives.costs({metric: mean[metric] for metric in self._objectives.metrics}),
            np.array([s[1] for s in scores]),
            axis.cost(mean[axis.metric]),
            own=next(i for i, m in enumerate(members) if m.arch_id == record.arch_id),
            at_rung=np.array([m.rung >= record.rung for m in members]),
            edges=self._plan.slice_edges,
            reference=self._reference,
        ).why


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a candidate's training says about it."""

    accuracy: float | None
    """Estimated accuracy after the full schedule, or what stands in for it; None where neither was asked for."""
    accuracy_std: float | None
    rung: float
    """Fraction of the full schedule that was trained; of a rung apart, what it takes of its computation."""
    val_accuracy: float | None = None
    """As measured at that rung."""
    stopped: str = ""
    """Why it was not trained further; empty where it was trained to the end, or not at all."""


def _counts_as_tried(candidate: Candidate) -> bool:
    return candidate.state != "pruned" and (candidate.state != "failed" or bool(candidate.reason))  # Without: being retried.
