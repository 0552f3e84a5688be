"""How long trainings take, against the CPU seconds that the example study has on record."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from lowsearch import cost
from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.search.sampler import Evolution, LowSearchSampler
from lowsearch.search.training_time import TrainingTime
from lowsearch.space import SearchSpace

SPACE = SearchSpace.load("lowformer-micro")
RECORDS = Path(__file__).parents[1] / "studies" / "example" / "records.jsonl"


@pytest.fixture(scope="module")
def trained():
    """(archs, genomes, CPU seconds of a whole training) of the networks that were trained to the end."""
    records = [record for record in AccuracyRecords(RECORDS) if record.rung == 1]
    archs = [record.arch for record in records]
    return archs, np.stack([SPACE.encode(arch) for arch in archs]), np.array([record.cpu_seconds for record in records])


def test_it_tells_the_seconds_of_real_trainings_up_to_a_factor_and_better_than_macs(trained):
    archs, genomes, seconds = trained
    assert len(seconds) > 30 and np.std(np.log(seconds)) > 0.4
    spread = np.std(np.log(TrainingTime(SPACE)(genomes) / seconds))
    macs = np.array([cost.count(arch).macs for arch in archs])
    assert spread < 0.2 and spread < np.std(np.log(macs / seconds)) / 2


def test_it_agrees_with_the_closed_form_of_single_networks_and_the_family_has_mean_one(trained):
    archs, genomes, _ = trained
    counted = [cost.count(arch) for arch in archs]
    powers = np.array([c.macs ** (1 / 3) * c.activations**0.45 for c in counted])
    time = TrainingTime(SPACE)(genomes)
    assert time / powers == pytest.approx(time[0] / powers[0])
    family = np.stack([SPACE.encode(arch) for arch in SPACE.family.values()])
    assert TrainingTime(SPACE)(family).mean() == pytest.approx(1)


def test_a_power_damps_it(trained):
    _, genomes, _ = trained
    assert TrainingTime(SPACE, power=0.5)(genomes) == pytest.approx(np.sqrt(TrainingTime(SPACE)(genomes)))
    assert (TrainingTime(SPACE, power=0.0)(genomes) == 1).all()


def test_a_sampler_that_used_it_can_be_pickled_and_proposes_the_same():
    small = Evolution(initial=256, parents=32, children=64, generations=3)
    sampler = LowSearchSampler(SPACE, latency=None, objectives="macs-params", evolution=small, train_cost=TrainingTime(SPACE))
    first = sampler.propose([], number=0)
    again = pickle.loads(pickle.dumps(sampler))
    assert (again.propose([], number=0) == first).all()
