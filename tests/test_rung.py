"""Rungs: what their text means, how they are ordered, and which are refused."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import numpy as np
import pytest

from lowsearch.accuracy.ladder import RUNGS
from lowsearch.errors import StudyError, UsageError
from lowsearch.study.settings import StudySettings, check_resumable
from lowsearch.train import Rung, rungs_of
from lowsearch.train.rung import part_of

SHARES = [1.0, 0.5, 0.25, 1 / 3, 0.123456789, 1e-7]


def test_text_copies_and_pickles_mean_the_same_rung() -> None:
    for fraction, images, resolution in itertools.product(SHARES, repeat=3):
        rung = Rung(fraction, images, resolution)
        for other in (Rung.of(str(rung)), copy.deepcopy(rung), pickle.loads(pickle.dumps(rung))):
            assert other == rung and hash(other) == hash(rung) and str(other) == str(rung)
            assert (other.fraction, other.images, other.resolution) == (fraction, images, resolution)
        assert float(rung) == pytest.approx(fraction * images * resolution**2, rel=1e-12)
        assert rung.apart == (images < 1 or resolution < 1)


def test_a_plain_rung_is_its_fraction_and_one_apart_is_no_number() -> None:
    assert Rung(0.5) == 0.5 and {0.5: "known"}[Rung(0.5)] and 1.0 in (Rung(1.0),)
    apart = Rung.of("1@0.5px")
    assert float(apart) == 0.25 and apart != 0.25 and apart != Rung(0.25) and len({apart, 0.25, Rung(0.25)}) == 2
    assert apart < 0.5 and Rung(0.2) < apart and not apart >= 1
    assert f"{apart} {apart.label} {Rung(0.5).label}" == "1@0.5px 1@0.5px 50 %"
    assert Rung.of("0.25@0.2img@0.5px") == Rung.of(" 0.25@0.5px@0.2img") == Rung(0.25, 0.2, 0.5)
    assert json.loads(json.dumps({"rung": apart})) == {"rung": 0.25}


def test_a_share_of_the_resolution_is_the_nearest_multiple_of_the_stride() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        stride, steps, share = int(rng.choice([8, 16, 32])), int(rng.integers(1, 10)), float(rng.uniform(0.01, 1))
        px = part_of(share, stride * steps, stride)
        nearest = min(range(stride, stride * steps + 1, stride), key=lambda one: abs(one - share * stride * steps))
        assert px == nearest
    assert Rung(0.5).resolution_px(28, 16) == 28


def test_the_default_is_what_it_was() -> None:
    assert rungs_of(RUNGS) == rungs_of("0.5,1") == (0.5, 1.0) and StudySettings().rungs == "0.5,1"
    values = {name: value for name, value in StudySettings().to_dict().items() if name != "rungs"}
    assert StudySettings.from_dict(values).rungs == "0.5,1", "studies from before there was a choice"


def test_a_study_keeps_its_rungs_however_they_are_spelled() -> None:
    made = StudySettings(rungs="0.250@.5px, 0.5,1.0")
    assert made.rungs == "0.25@0.5px,0.5,1" and StudySettings.from_dict(made.to_dict()) == made
    with pytest.raises(StudyError, match=r"rungs 0.25@0.5px,0.5,1, not 0.5,1; hint: resume with --rungs 0.25@0.5px,0.5,1"):
        check_resumable("mine", made, StudySettings())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no rung"), ("0.5,,1", "is no rung"), ("half,1", "'half' is no rung"), ("0.5@1", "is no rung"), ("0.5px,1", "is no rung"),
        ("0.25@0.5px@0.4px,1", "is no rung"), ("-0.5,1", "is no rung"), ("nan,1", "is no rung"), ("0.25@0.5px@,1", "is no rung"),
        ("0,1", "no share"), ("0.5,1.5", "no share"), ("0.25@2px,1", "2 is no share"), ("0.25@0img,1", "no share"),
        ("0.5", "last to be 1"), ("0.5,1@0.5px", "last to be 1"), ("1,0.5", "last to be 1"),
        ("0.5,0.25,1", "cost more"), ("0.5,0.5,1", "cost more"),
        ("0.3,1@0.5px,1", "1@0.5px after it 0.25"), ("1@0.5px,0.25,1", "cost more"),
    ],
)  # fmt: skip
def test_other_rungs_are_refused_with_one_that_works(text: str, why: str) -> None:
    for make in (rungs_of, lambda text: StudySettings(rungs=text)):
        with pytest.raises(UsageError, match=r"rungs are .*; hint: --rungs 0.5,1,") as caught:
            make(text)
        assert why in caught.value.message


def test_too_few_images_for_the_classes_are_refused() -> None:
    assert Rung.of("1@0.5img").n_images(101, 10) == 50
    with pytest.raises(UsageError, match="rung 0.25@0.09img has 9 of 100 training images, fewer than the 10 classes"):
        Rung.of("0.25@0.09img").n_images(100, 10)
