"""The latency predictor: planted corrections come back, shares add up, slower blocks never help, and guesses say that they are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowsearch import cost
from lowsearch.arch import Arch, Block, Mlp
from lowsearch.errors import TableError
from lowsearch.latency.block_model import _PENALTIES, BlockModel, Prediction, _Ridge
from lowsearch.latency.measure import BLOCKS_PER_STEP
from lowsearch.latency.memory import READ_BYTES, MemoryCurve, MemoryLatency
from lowsearch.latency.predictor import _CONFLICTS, _DRIFT_STD, Correction, LatencyPredictor, _elements
from lowsearch.latency.profile import choose_blocks, choose_networks
from lowsearch.latency.table import BlockLatency, LatencyTable, Sibling
from lowsearch.latency.target import Device, Target, context
from lowsearch.latency.timing import NetworkLatency
from lowsearch.space import SearchSpace

SPACE = SearchSpace.load("lowformer-micro")
TARGET = Target("fake-cpu", "onnxruntime")
HERE = context(TARGET, Device(slug="fake-cpu", kind="cpu", name="Fake"), statistic="t", versions={}, runtime_options={})
TRUTH = Correction(
    hot=0.3, warm=0.5, cold=0.15, hot_resident=0.5, warm_resident=0.4, fetch=0.6, branch_overhead_ms=0.003, joint_overhead_ms=0.005,
    ms_per_element=2e-8,
)  # fmt: skip
CORE_BYTES, SHARED_BYTES = 2**20, 2**23
"""Where the caches of the made device end: every micro network reads more than half of the first, none reads the second."""


def read_ms(n_bytes: int) -> float:
    """Reading memory: three speeds, with a slope of an octave between them."""
    octaves = np.interp(np.log2(n_bytes / CORE_BYTES), [0, 1, 3, 4], [0, 1, 1, 2])
    return n_bytes * (1e-8 + 4e-8 * float(octaves))


@cache
def block_latency(block: Block) -> BlockLatency:
    """Closed-form times of a block whose three states are not proportional to each other."""
    counted = cost.of_block(block)
    hot = 0.01 + 2e-8 * counted.macs + 1e-7 * counted.activations
    warm = hot + 0.006 + 3e-9 * counted.macs + 5e-7 * counted.params**0.9
    return BlockLatency(hot_ms=hot, warm_ms=warm, cold_ms=warm + 0.03 + 4e-8 * counted.activations * len(block.kind))


def reads(arch: Arch) -> tuple[int, float]:
    """Bytes of the weights of a network, and of all that it reads in a pass as the predictor counts it."""
    counted = cost.count(arch)
    return 4 * counted.params, 4 * counted.params + counted.activations


def network_ms(arch: Arch, truth: Correction = TRUTH) -> float:
    weight_bytes, footprint_bytes = reads(arch)
    extra = CURVE.extra_ms_per_byte(_CONFLICTS * footprint_bytes)
    crowding = min(1.0, float(extra / COMPANY_MS))
    hot = crowding * truth.hot + (1 - crowding) * truth.hot_resident
    warm = crowding * truth.warm + (1 - crowding) * truth.warm_resident
    total = truth.fetch * weight_bytes * float(extra)
    for block in arch.blocks():
        row = block_latency(block)
        overhead_ms = truth.joint_overhead_ms if block.kind in ("stem", "downsampler", "head") else truth.branch_overhead_ms
        total += hot * row.hot_ms + warm * row.warm_ms + truth.cold * row.cold_ms - overhead_ms - truth.ms_per_element * _elements(block)
    return total


MEMORY = tuple(MemoryLatency(n_bytes=n, latency_ms=read_ms(n)) for n in READ_BYTES)
CURVE = MemoryCurve(MEMORY)
COMPANY_MS = float(
    CURVE.extra_ms_per_byte(
        _CONFLICTS * BLOCKS_PER_STEP * np.mean([4 * cost.of_block(b).params + cost.of_block(b).activations for b in SPACE.blocks])
    )
)


def made_table(*, measured: int | None = None, noise: float = 0.0, n: int = 20, seed: int = 0) -> LatencyTable:
    rng = np.random.default_rng(seed)
    blocks = SPACE.blocks if measured is None else choose_blocks(SPACE, measured, seed=seed)
    networks = [(arch, network_ms(arch) * float(np.exp(noise * rng.normal()))) for arch in choose_networks(SPACE, n, seed=seed)]
    rows = tuple(NetworkLatency(arch=arch, latency_ms=ms, samples_ms=((ms,),)) for arch, ms in networks)
    return LatencyTable(
        target=TARGET, context=HERE, entries={b: block_latency(b) for b in blocks}, calibration={SPACE.name: rows}, memory=MEMORY
    )


def held_out(n: int, seed: int = 99) -> tuple[np.ndarray, list[Arch], np.ndarray]:
    genomes = SPACE.sample(n, rng=np.random.default_rng(seed))
    archs = [SPACE.decode(genome) for genome in genomes]
    return genomes, archs, np.array([network_ms(arch) for arch in archs])


@pytest.fixture(scope="module")
def predictor() -> LatencyPredictor:
    return LatencyPredictor(SPACE, made_table())


@pytest.fixture(scope="module")
def partial_predictor() -> LatencyPredictor:
    return LatencyPredictor(SPACE, made_table(measured=400))


def test_a_planted_correction_is_recovered(predictor: LatencyPredictor) -> None:
    for name, planted in TRUTH._asdict().items():
        assert getattr(predictor.correction, name) == pytest.approx(planted, rel=1e-3, abs=1e-6), name
    assert predictor.relative_std == pytest.approx(_DRIFT_STD, rel=1e-3)


def test_networks_it_never_saw_are_exact_without_noise(predictor: LatencyPredictor) -> None:
    genomes, _, truth_ms = held_out(100)
    mean_ms, std_ms = predictor.predict(genomes)
    assert mean_ms.shape == std_ms.shape == (100,)
    assert mean_ms == pytest.approx(truth_ms, rel=1e-4)
    assert (std_ms <= 1.001 * _DRIFT_STD * mean_ms).all()  # nothing but the drift of the machine between sessions


def test_genomes_networks_and_explanations_agree(partial_predictor: LatencyPredictor) -> None:
    genomes, archs, _ = held_out(20)
    mean_ms, std_ms = partial_predictor.predict(genomes)
    by_arch, std_by_arch = partial_predictor.predict_archs(archs)
    assert mean_ms == pytest.approx(by_arch) and std_ms == pytest.approx(std_by_arch)
    for arch, ms in zip(archs, mean_ms, strict=True):
        shares = partial_predictor.explain(arch)
        assert [(share.place, share.block) for share in shares] == list(arch.named_blocks())
        assert sum(share.ms for share in shares) == pytest.approx(ms)
        assert all(share.ms > 0 for share in shares)


def test_no_network_is_no_prediction(predictor: LatencyPredictor) -> None:
    mean_ms, std_ms = predictor.predict(np.empty((0, SPACE.n_genes), np.int8))
    assert mean_ms.shape == std_ms.shape == (0,)
    assert all(part.shape == (0,) for part in predictor.predict_archs([]))


def test_what_was_not_measured_says_so_and_is_less_certain(partial_predictor: LatencyPredictor) -> None:
    _, archs, _ = held_out(20)
    for arch in archs:
        for share in partial_predictor.explain(arch):
            assert share.source == ("measured" if share.block in partial_predictor.table.entries else "predicted")
    genomes, _, truth_ms = held_out(200)
    mean_ms, std_ms = partial_predictor.predict(genomes)
    guessed = [any(share.source == "predicted" for share in partial_predictor.explain(SPACE.decode(genome))) for genome in genomes]
    floor_ms = partial_predictor.relative_std * mean_ms
    assert (std_ms[guessed] > floor_ms[guessed]).all() and any(guessed)
    assert np.mean(np.abs(mean_ms / truth_ms - 1)) < 0.03
    assert np.mean(np.abs(mean_ms - truth_ms) <= 2 * std_ms) > 0.9


def own_factor(block: Block, std: float, seed: int) -> float:
    """What no model of blocks can foresee: by how much longer than its formula a block takes."""
    number = int(hashlib.sha256(f"{block}{seed}".encode()).hexdigest()[:8], 16)
    return float(np.exp(std * np.random.default_rng(number).normal()))


def peculiar_ms(arch: Arch, std: float, seed: int) -> float:
    """A network of blocks with their own factors."""
    total = network_ms(arch)
    for block in arch.blocks():
        row = block_latency(block)
        total += (own_factor(block, std, seed) - 1) * (TRUTH.hot * row.hot_ms + TRUTH.warm * row.warm_ms + TRUTH.cold * row.cold_ms)
    return total


def peculiar_table(*, measured: int | None = None, noise: float, own: float, block_noise: float, seed: int) -> LatencyTable:
    """A table of blocks with their own factors, of which `measured` were timed with an error of `block_noise`, and 20 networks."""
    rng = np.random.default_rng(seed)
    blocks = SPACE.blocks if measured is None else choose_blocks(SPACE, measured, seed=seed)
    entries = {b: scaled(block_latency(b), own_factor(b, own, seed) * float(np.exp(block_noise * rng.normal()))) for b in blocks}
    networks = [
        (arch, peculiar_ms(arch, own, seed) * float(np.exp(noise * rng.normal()))) for arch in choose_networks(SPACE, 20, seed=seed)
    ]
    rows = tuple(NetworkLatency(arch=arch, latency_ms=ms, samples_ms=((ms,),)) for arch, ms in networks)
    return LatencyTable(target=TARGET, context=HERE, entries=entries, calibration={SPACE.name: rows}, memory=MEMORY)


@pytest.mark.parametrize(
    ("measured", "noise", "own", "block_noise"),
    [
        (None, 0.02, 0.0, 0.0),
        (None, 0.06, 0.05, 0.02),
        (150, 0.02, 0.08, 0.0),  # What was not measured errs, each block in its own way.
        (150, 0.02, 0.0, 0.15),  # Single blocks look worse than their sum is.
    ],
)
def test_ninety_of_a_hundred_new_measurements_lie_in_the_ninety_percent_interval(
    measured: int | None, noise: float, own: float, block_noise: float
) -> None:
    """On average over tables: one table of 20 networks knows its own spread to 16 %, which is 6 points of coverage."""
    covered, stated, real = [], [], []
    for seed in range(12):
        predictor = LatencyPredictor(SPACE, peculiar_table(measured=measured, noise=noise, own=own, block_noise=block_noise, seed=seed))
        genomes = SPACE.sample(60, rng=np.random.default_rng(100 + seed))
        truth_ms = np.array([peculiar_ms(SPACE.decode(genome), own, seed) for genome in genomes])
        noise_now = np.random.default_rng(1000 + seed).normal(size=60)
        seen_ms = truth_ms * np.exp(np.hypot(noise, _DRIFT_STD) * noise_now)
        mean_ms, std_ms = predictor.predict(genomes)
        covered.append(np.abs(seen_ms - mean_ms) < 1.645 * std_ms)
        stated.append(std_ms / mean_ms)
        real.append(seen_ms / mean_ms - 1)
    assert 0.85 < np.mean(covered) < 0.95
    assert 0.9 < np.mean(stated) / np.sqrt(np.mean(np.square(real))) < 1.25


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_the_networks_say_how_much_of_the_block_models_errors_counts(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Block models that state five times their error, or a fifth, share the spread out otherwise; there is not more or less of it."""
    table = peculiar_table(measured=150, noise=0.02, own=0.08, block_noise=0.0, seed=0)
    genomes, *_ = held_out(200)
    mean_ms, std_ms = LatencyPredictor(SPACE, table).predict(genomes)
    honest = BlockModel.predict

    def predict(model: BlockModel, blocks: Sequence[Block]) -> dict[Block, Prediction]:
        return {b: dataclasses.replace(p, relative_std=factor * p.relative_std) for b, p in honest(model, blocks).items()}

    monkeypatch.setattr(BlockModel, "predict", predict)
    same_ms, boasted_ms = LatencyPredictor(SPACE, table).predict(genomes)
    assert np.array_equal(same_ms, mean_ms)
    assert np.mean(boasted_ms / mean_ms) == pytest.approx(np.mean(std_ms / mean_ms), rel=0.25)


def test_one_disturbed_network_does_not_widen_every_interval() -> None:
    table = made_table(noise=0.03)
    first, *others = table.calibration[SPACE.name]
    disturbed = NetworkLatency(arch=first.arch, latency_ms=2 * first.latency_ms, samples_ms=((2 * first.latency_ms,),))
    stds = [
        LatencyPredictor(SPACE, dataclasses.replace(table, calibration={SPACE.name: rows})).relative_std
        for rows in ((first, *others), (disturbed, *others))
    ]
    assert stds[1] < 1.6 * stds[0]


times = st.floats(1e-3, 10)
weights = st.floats(0, 2)


@given(row=st.tuples(times, times, times), slower=times, weight=st.tuples(*[weights] * 5), overhead=st.floats(0, 1), per=st.floats(0, 1e-3))
@pytest.mark.parametrize("crowding", [0.0, 0.3, 1.0])
def test_a_slower_block_never_lowers_the_estimate(
    crowding: float, row: tuple[float, float, float], slower: float, weight: tuple[float, ...], overhead: float, per: float
) -> None:
    correction = Correction(*weight, fetch=1.0, branch_overhead_ms=overhead, joint_overhead_ms=overhead, ms_per_element=per)
    block = Mlp(channels=8, resolution_px=4, ratio=2)
    base = BlockLatency(hot_ms=row[0], warm_ms=row[1], cold_ms=row[2])
    base_ms = correction.block_ms(block, base, crowding=crowding)
    assert base_ms > 0
    for change in ({"hot_ms": row[0] + slower}, {"warm_ms": row[1] + slower}, {"cold_ms": row[2] + slower}):
        assert correction.block_ms(block, dataclasses.replace(base, **change), crowding=crowding) >= base_ms


@pytest.mark.parametrize("seed", range(5))
def test_no_fitted_weight_is_negative(seed: int) -> None:
    correction = LatencyPredictor(SPACE, made_table(noise=0.3, n=6, seed=seed)).correction
    assert min(correction) >= 0


def test_a_network_need_not_be_in_the_space(partial_predictor: LatencyPredictor) -> None:
    arch = dataclasses.replace(SPACE.decode(SPACE.sample(1, rng=np.random.default_rng(0))[0]), num_classes=37)
    mean_ms, std_ms = partial_predictor.predict_archs([arch])
    assert mean_ms[0] == pytest.approx(network_ms(arch), rel=0.1) and std_ms[0] > 0
    assert partial_predictor.explain(arch)[-1].source == "predicted"


def test_the_same_space_with_other_classes_is_predicted_from_the_same_table() -> None:
    predictor = LatencyPredictor(SPACE.with_num_classes(100), made_table())
    genomes = SPACE.sample(50, rng=np.random.default_rng(0))
    mean_ms, _ = predictor.predict(genomes)
    truth_ms = [network_ms(dataclasses.replace(SPACE.decode(g), num_classes=100)) for g in genomes]
    assert mean_ms == pytest.approx(truth_ms, rel=0.05)


def test_a_table_without_networks_of_the_space_cannot_predict() -> None:
    table = dataclasses.replace(made_table(), calibration={"another": made_table().calibration[SPACE.name]})
    with pytest.raises(TableError, match=r"holds 0 networks of space 'lowformer-micro'.*--space lowformer-micro"):
        LatencyPredictor(SPACE, table)


def test_a_kind_that_was_hardly_measured_cannot_be_predicted() -> None:
    table = made_table()
    kept = {b: row for b, row in table.entries.items() if b.kind != "attention"}
    with pytest.raises(TableError, match="holds 0 attention blocks, too few"):
        LatencyPredictor(SPACE, dataclasses.replace(table, entries=kept))


@pytest.mark.parametrize("kind", ["conv", "downsampler", "attention"])
def test_unmeasured_blocks_are_predicted_within_the_stated_error(kind: str) -> None:
    every = [b for b in SPACE.blocks if b.kind == kind]
    chosen = set(choose_blocks(SPACE, 400, seed=0))
    rng = np.random.default_rng(0)
    table = made_table()
    noisy = {b: scaled(block_latency(b), float(np.exp(0.05 * rng.normal()))) for b in every if b in chosen}
    predictions = BlockModel(dataclasses.replace(table, entries=noisy)).predict([b for b in every if b not in chosen])
    errors = np.array([p.latency.warm_ms / block_latency(b).warm_ms - 1 for b, p in predictions.items()])
    stated = np.array([p.relative_std for p in predictions.values()])
    assert len(errors) and all(p.latency.source == "predicted" for p in predictions.values())
    assert np.sqrt(np.mean(errors**2)) < 1.2 * stated.mean() and stated.mean() < 0.15


def scaled(row: BlockLatency, factor: float) -> BlockLatency:
    return BlockLatency(hot_ms=row.hot_ms * factor, warm_ms=row.warm_ms * factor, cold_ms=row.cold_ms * factor)


@pytest.mark.parametrize(("rows", "quadratic"), [(40, False), (40, True), (200, True)])
def test_the_error_of_leaving_one_out_is_that_of_leaving_it_out(rows: int, quadratic: bool) -> None:
    """With 14 features a quadratic has 119 columns, more than 40 rows: noise must not look learned."""
    rng = np.random.default_rng(0)
    features, noise = rng.normal(size=(rows, 14)), rng.normal(size=(rows, 2))
    stated = _Ridge(features, noise, quadratic=quadratic).leave_one_out()
    assert np.sqrt(np.mean(stated**2)) > 0.9
    model = _Ridge(features, features[:, :2] + 0.1 * noise, quadratic=quadratic)
    centre, weights = model._centre, model._weights
    inputs = model._inputs(features)
    penalty = _penalty_of(inputs - centre, features[:, :2] + 0.1 * noise, weights)
    for i in range(0, rows, 9):
        others = np.arange(rows) != i
        kept, targets = inputs[others], (features[:, :2] + 0.1 * noise)[others]
        gram = (kept - kept.mean(axis=0)).T @ (kept - kept.mean(axis=0)) + penalty * np.eye(inputs.shape[1])
        fitted = np.linalg.solve(gram, (kept - kept.mean(axis=0)).T @ (targets - targets.mean(axis=0)))
        predicted = (inputs[i] - kept.mean(axis=0)) @ fitted + targets.mean(axis=0)
        assert model.leave_one_out()[i] == pytest.approx(features[i, :2] + 0.1 * noise[i] - predicted, abs=1e-6)


def _penalty_of(inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Which of the penalties gives these weights."""
    centred = targets - targets.mean(axis=0)
    misfits = [
        np.abs((inputs.T @ inputs + p * np.eye(inputs.shape[1])) @ weights - inputs.T @ centred).max() for p in _PENALTIES * len(inputs)
    ]
    return float((_PENALTIES * len(inputs))[int(np.argmin(misfits))])


def test_the_block_model_does_not_run_away_outside_what_was_measured() -> None:
    table = made_table()
    small = {b: row for b, row in table.entries.items() if getattr(b, "resolution_px", 0) <= 16}
    far = [b for b in table.entries if b.kind == "conv" and b not in small]
    predicted = BlockModel(dataclasses.replace(table, entries=small)).predict(far)
    slowest = max(row.warm_ms for b, row in small.items() if b.kind == "conv")
    assert all(0 < p.latency.warm_ms < 20 * slowest for p in predicted.values())


def batch_ms(block: Block, batch: int) -> BlockLatency:
    """A block with a factor of its own at every batch: a call, weights once, and arithmetic that is cheaper by the image for many."""
    row, counted = block_latency(block), cost.of_block(block)
    own = own_factor(block, 0.3, seed=0)
    grown = (2 + 3e-6 * counted.params + 2e-5 * batch**0.8 * counted.macs) / (2 + 3e-6 * counted.params + 2e-5 * counted.macs)
    return scaled(row, own * grown)


CONVOLUTIONS = [block for block in SPACE.blocks if block.kind == "conv"]


def leaning_errors(sibling: Sibling | None, measured: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors at batch 8 of the warm times of convolutions that were not measured there, and what is stated of them, by block."""
    chosen = choose_blocks(SPACE, measured, seed=0)
    table = dataclasses.replace(made_table(n=3), entries={block: batch_ms(block, 8) for block in chosen}, sibling=sibling)
    others = [block for block in CONVOLUTIONS if block not in table.entries]
    found = BlockModel(table).predict(others)
    errors = [found[block].latency.warm_ms / batch_ms(block, 8).warm_ms - 1 for block in others]
    return np.array(errors), np.array([found[block].relative_std for block in others])


def made_sibling(entries: Mapping[Block, BlockLatency]) -> Sibling:
    return Sibling(batch=1, date_utc="2026-11-27T09:31:25Z", sha256="0" * 64, entries=entries)


def test_what_another_batch_knows_of_a_block_needs_no_measuring_again() -> None:
    alone, _ = leaning_errors(None)
    leaning, stated = leaning_errors(made_sibling({block: batch_ms(block, 1) for block in CONVOLUTIONS}))
    assert np.sqrt(np.mean(leaning**2)) < 0.25 * np.sqrt(np.mean(alone**2))
    assert 0.5 < np.sqrt(np.mean((leaning / stated) ** 2)) < 2


def test_a_sibling_that_says_nothing_of_a_block_does_no_harm() -> None:
    rows = [block_latency(block) for block in CONVOLUTIONS]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    alone, _ = leaning_errors(None)
    leaning, _ = leaning_errors(made_sibling(dict(zip(CONVOLUTIONS, shuffled, strict=True))))
    assert np.sqrt(np.mean(leaning**2)) < 1.1 * np.sqrt(np.mean(alone**2))


def test_what_was_measured_at_neither_batch_is_less_certain() -> None:
    known = {block: batch_ms(block, 1) for block in choose_blocks(SPACE, 500, seed=0) if block.kind == "conv"}
    errors, stated = leaning_errors(made_sibling(known))
    measured = set(choose_blocks(SPACE, 150, seed=0))
    others = [block for block in CONVOLUTIONS if block not in measured]
    guessed = np.array([block not in known for block in others])
    assert np.mean(stated[guessed]) > 2 * np.mean(stated[~guessed])
    assert np.sqrt(np.mean(errors[guessed] ** 2)) > 2 * np.sqrt(np.mean(errors[~guessed] ** 2))


def test_predictions_are_the_same_in_every_process() -> None:
    genomes = SPACE.sample(50, rng=np.random.default_rng(0))
    table = made_table(measured=300)
    first, second = (LatencyPredictor(SPACE, table).predict(genomes) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def test_without_a_memory_curve_every_network_counts_as_crowded() -> None:
    table = dataclasses.replace(made_table(), memory=())
    genomes, _, truth_ms = held_out(100)
    mean_ms, _ = LatencyPredictor(SPACE, table).predict(genomes)
    assert np.isfinite(mean_ms).all() and np.median(np.abs(mean_ms / truth_ms - 1)) < 0.1


def test_networks_that_stay_in_the_caches_are_told_from_those_that_do_not() -> None:
    """One set of weights for both misses what the two corrections get right."""
    genomes, archs, truth_ms = held_out(200)
    with_curve, without = (
        LatencyPredictor(SPACE, table).predict(genomes)[0] for table in (made_table(), dataclasses.replace(made_table(), memory=()))
    )
    crowded = np.array([reads(arch)[1] for arch in archs]) * _CONFLICTS > 2 * CORE_BYTES
    assert 0.2 < crowded.mean() < 0.95, "both kinds are here"
    assert np.abs(with_curve / truth_ms - 1).mean() < 0.2 * np.abs(without / truth_ms - 1).mean()
