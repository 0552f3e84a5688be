"""Predicted energy: the fit against devices whose energy is known in closed form, and the refusal where there is no counter."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import made_knowledge
import numpy as np
import pytest

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.errors import StudyError, UsageError
from lowsearch.latency.energy_model import MIN_COUNTED, counted_networks, fit_energy
from lowsearch.latency.predictor import LatencyPredictor
from lowsearch.latency.table import LatencyTable
from lowsearch.latency.target import Device, Target
from lowsearch.search.estimates import Estimator
from lowsearch.search.objectives import parse_limits
from lowsearch.search.sampler import LowSearchSampler
from lowsearch.space import SearchSpace
from lowsearch.study import assembly
from lowsearch.study.settings import StudySettings

SPACE = SearchSpace.load("lowformer-micro")
PLAIN: LatencyTable = made_knowledge.table_of(SPACE)
GENOMES = SPACE.sample(50, rng=np.random.default_rng(9))


def table(energy_mj: Callable[[Arch, float], float], *, n: int = 12, batch: int = 1) -> LatencyTable:
    """A table of a device whose networks take so much energy; of `n` of its twelve networks it is known."""
    rows = PLAIN.calibration[SPACE.name]
    counted = [dataclasses.replace(row, energy_mj=energy_mj(row.arch, row.latency_ms), idle_power_w=1.0) for row in rows[:n]]
    target = dataclasses.replace(PLAIN.target, batch=batch)
    return dataclasses.replace(PLAIN, target=target, calibration={SPACE.name: (*counted, *rows[n:])})


def by_power(arch: Arch, latency_ms: float) -> float:
    return 30 * latency_ms


def by_work(arch: Arch, latency_ms: float) -> float:
    return 5 * latency_ms + 4e-7 * cost.count(arch).macs


@pytest.mark.parametrize("energy_mj", [by_power, by_work])
def test_energy_of_a_known_device_is_found_again(energy_mj: Callable[[Arch, float], float]) -> None:
    predictor = LatencyPredictor(SPACE, table(energy_mj))
    model = fit_energy(predictor)
    assert model is not None
    latency_ms, _ = predictor.predict(GENOMES)
    mean_mj, std_mj = model.predict(GENOMES, latency_ms)
    expected = [energy_mj(SPACE.decode(genome), ms) for genome, ms in zip(GENOMES, latency_ms, strict=True)]
    assert mean_mj == pytest.approx(np.array(expected), rel=0.05)
    assert std_mj == pytest.approx(model.relative_std * mean_mj) and model.relative_std < 0.05
    assert (model.weights >= 0).all()


def test_the_error_is_that_of_networks_left_out() -> None:
    rng = np.random.default_rng(0)
    model = fit_energy(LatencyPredictor(SPACE, table(lambda arch, ms: 30 * ms * float(np.exp(0.1 * rng.normal())))))
    assert model is not None and 0.05 < model.relative_std < 0.2


def test_too_few_counted_networks_make_no_model() -> None:
    few = table(by_power, n=MIN_COUNTED - 1)
    assert len(counted_networks(few, SPACE)) == MIN_COUNTED - 1
    assert fit_energy(LatencyPredictor(SPACE, few)) is None
    assert fit_energy(LatencyPredictor(SPACE, table(by_power, n=MIN_COUNTED))) is not None
    assert fit_energy(LatencyPredictor(SPACE, PLAIN)) is None


def test_energy_is_a_metric_only_where_it_can_be_predicted() -> None:
    predictor = LatencyPredictor(SPACE, table(by_power))
    model = fit_energy(predictor)
    known = Estimator(SPACE, predictor, energy=model).estimate(GENOMES)
    assert model is not None and known.mean["energy_mj"] == pytest.approx(model.predict(GENOMES, known.mean["latency_ms"])[0])
    assert "energy_mj" not in Estimator(SPACE, predictor).estimate(GENOMES).mean
    model.predict(GENOMES, known.mean["latency_ms"])
    again = pickle.loads(pickle.dumps(model))
    assert again.predict(GENOMES, known.mean["latency_ms"])[0] == pytest.approx(known.mean["energy_mj"])
    with pytest.raises(UsageError, match="no energy model"):
        LowSearchSampler(SPACE, latency=predictor, objectives="acc-energy")
    with pytest.raises(UsageError, match="no energy model"):
        LowSearchSampler(SPACE, latency=predictor, limits=parse_limits(maxima=["energy_mj=3"]))
    sampler = LowSearchSampler(SPACE, latency=predictor, energy=model, objectives="acc-energy", limits=parse_limits(maxima=["energy_mj=3"]))
    assert sampler.directions == ["maximize", "minimize"]


def test_a_study_of_energy_is_refused_where_there_is_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Device(slug="some-board", kind="cpu", name="Fake")
    target = Target("some-board", "onnxruntime")
    monkeypatch.setattr(assembly, "resolve_device", lambda name: here)
    with pytest.raises(StudyError, match="this machine exposes no energy counter: no RAPL") as caught:
        assembly.require_counter(target, why_not=lambda kind: "no RAPL here")
    assert "leave energy out" in (caught.value.hint or "")
    assembly.require_counter(target, why_not=lambda kind: "")
    monkeypatch.setattr(assembly, "resolve_device", lambda name: dataclasses.replace(here, kind="absent"))
    with pytest.raises(StudyError, match="the latency table of some-board .* holds none"):
        assembly.require_counter(target)


@pytest.mark.parametrize("asked", [{"objective": "acc-energy"}, {"limits": parse_limits(maxima=["energy_mj=5"])}])
def test_energy_that_the_table_lacks_is_counted_before_the_study_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object]
) -> None:
    settings = StudySettings(device="some-board", accuracy="macs", **asked)  # type: ignore[arg-type]
    tables = [PLAIN]

    def profile(*_: object, **__: object) -> None:
        tables.append(table(by_power))

    monkeypatch.setattr(assembly, "usable_table", lambda *_, **__: tables[-1])
    monkeypatch.setattr(assembly, "profile", profile)
    monkeypatch.setattr(assembly, "require_counter", lambda target: (_ for _ in ()).throw(StudyError("no counter")))
    with pytest.raises(StudyError, match="no counter"):
        assembly.prepare(tmp_path, settings, None)
    assert not (tmp_path / "latency_table.jsonl").exists() and len(tables) == 1
    monkeypatch.setattr(assembly, "require_counter", lambda target: None)
    assembly.prepare(tmp_path, settings, None)
    assert len(counted_networks(LatencyTable.load(tmp_path / "latency_table.jsonl"), SPACE)) == 12
    assert assembly.build_parts(tmp_path, settings).energy is not None
    tables[:] = [PLAIN]
    monkeypatch.setattr(assembly, "profile", lambda *_, **__: None)  # The counter stood still.
    with pytest.raises(StudyError, match="gave none"):
        assembly.prepare(tmp_path / "other", settings, None)
