"""Training-free proxies against cases worked out by hand, and on real networks of both spaces."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lowsearch import cost
from lowsearch.accuracy import proxies
from lowsearch.accuracy.proxies import AzNasParts, az_nas, az_nas_of, naswot_of, proxy_scores, synflow_of, zico_of, zico_of_gradients
from lowsearch.data import Split, load_data
from lowsearch.space import SearchSpace

SPACE = SearchSpace.load("lowformer-micro").with_num_classes(10)


@pytest.fixture(scope="module")
def batch() -> Split:
    return load_data("fashion-mnist-mini").train.take(np.arange(16))


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    return layer


def conv(weight: list[list[float]]) -> nn.Conv2d:
    layer = nn.Conv2d(len(weight[0]), len(weight), 1, bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)[:, :, None, None]
    return layer


# --- NASWOT -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardswish(), nn.GELU()])
def test_naswot_is_the_log_determinant_of_shared_codes(activation: nn.Module) -> None:
    network = nn.Sequential(linear([[1, 0], [0, 1], [1, 1]]), activation)
    images = torch.tensor([[1.0, 1.0], [1.0, -3.0]])  # codes 111 and 100: two of three differ
    assert naswot_of(network, images) == pytest.approx(math.log(3 * 3 - 1 * 1))


def test_naswot_adds_the_codes_of_all_layers() -> None:
    network = nn.Sequential(linear([[1, 0], [0, 1]]), nn.ReLU(), linear([[1, -1]]), nn.ReLU())
    images = torch.tensor([[1.0, 2.0], [2.0, 1.0], [-1.0, 1.0]])  # codes 110, 111, 010
    kernel = np.array([[3, 2, 2], [2, 3, 1], [2, 1, 3]])
    assert naswot_of(network, images) == pytest.approx(math.log(np.linalg.det(kernel)))


def test_naswot_of_two_equal_images_is_minus_infinity() -> None:
    network = nn.Sequential(linear([[1, 0], [0, 1]]), nn.ReLU())
    assert naswot_of(network, torch.ones(2, 2)) == -math.inf


# --- SynFlow ----------------------------------------------------------------------------------------------------------------------


def test_synflow_of_a_two_layer_linear_network_by_hand() -> None:
    network = nn.Sequential(linear([[1, -2], [3, 4]]), linear([[5, -6]]))
    # |W2| |W1| 1 = 5 * (1 + 2) + 6 * (3 + 4) = 57, and every layer's weights carry all of it.
    assert synflow_of(network, (1, 2)) == pytest.approx(math.log(2 * 57))


def test_synflow_sees_through_norms_and_activation_functions() -> None:
    plain = nn.Sequential(conv([[1, -2], [3, 4]]), conv([[5, -6]]))
    dressed = nn.Sequential(conv([[1, -2], [3, 4]]), nn.GroupNorm(1, 2), nn.BatchNorm2d(2), nn.Hardswish(), nn.GELU(), conv([[5, -6]]))
    assert synflow_of(dressed, (1, 2, 3, 3)) == pytest.approx(synflow_of(plain, (1, 2, 3, 3))) == pytest.approx(math.log(9 * 2 * 57))


# --- ZiCo -------------------------------------------------------------------------------------------------------------------------


def test_zico_by_hand() -> None:
    # First layer: means 2 and 4, deviations 1 and 2: 2 + 2. Second: the last weight's gradient never changes.
    layers = [np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[1.0, 5.0], [2.0, 5.0]])]
    assert zico_of_gradients(layers) == pytest.approx(math.log(4) + math.log(3))


def test_zico_reads_the_size_of_real_gradients() -> None:
    weight = [[0.5, -1.0], [0.25, 2.0]]
    images, labels = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0], [-1.0, 1.0]]), np.array([0, 1, 1, 0])
    sizes = []
    for part in (slice(0, 2), slice(2, 4)):  # softmax regression: the gradient is (p - y) x^T, averaged
        x, y = images[part].numpy().astype(float), np.eye(2)[labels[part]]
        logits = x @ np.array(weight).T
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        sizes.append(np.abs((p - y).T @ x / 2).ravel())
    assert zico_of(linear(weight), images, labels) == pytest.approx(zico_of_gradients([np.stack(sizes)]), rel=1e-4)


# --- AZ-NAS -----------------------------------------------------------------------------------------------------------------------


def of_blocks(*blocks: nn.Module, x: torch.Tensor) -> AzNasParts:
    return az_nas_of(nn.Sequential(*blocks), x, blocks, generator=torch.Generator().manual_seed(0))


def uncorrelated(n_channels: int) -> torch.Tensor:
    """Images (2^n, n, 1, 1) whose channels are independent signs: all principal components are equally large."""
    signs = [[1.0 if number >> bit & 1 else -1.0 for bit in range(n_channels)] for number in range(2**n_channels)]
    return torch.tensor(signs)[:, :, None, None]


def test_expressivity_is_the_entropy_of_principal_components() -> None:
    flat, narrow = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]
    found = of_blocks(conv(flat), conv(narrow), x=uncorrelated(2))
    assert found.expressivity == pytest.approx(math.log(2), abs=1e-5)  # log 2 for the first block, 0 for the second
    assert found.progressivity == pytest.approx(-math.log(2), abs=1e-5)


def test_trainability_of_a_block_that_scales_gradients_by_hand() -> None:
    found = of_blocks(conv([[1.0]]), conv([[2.0]]), conv([[-0.5]]), x=uncorrelated(1))
    assert found.trainability == pytest.approx(2 - 2.5, abs=1e-5)  # 2 - 2 - 1/2 and 2 - 1/2 - 2
    assert of_blocks(conv([[1.0]]), conv([[-1.0]]), x=uncorrelated(1)).trainability == pytest.approx(0, abs=1e-5)


def test_trainability_pairs_the_pixels_that_a_stride_covers() -> None:
    pooling = nn.AvgPool2d(2)  # every pixel gets a quarter of the gradient: a Jacobian (4, 1) of quarters, norm 1/2
    found = of_blocks(conv([[1.0]]), pooling, x=torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert found.trainability == pytest.approx(2 - 0.5 - 2, abs=1e-5)


def test_aggregate_is_the_sum_of_log_ranks() -> None:
    best = AzNasParts(expressivity=3, progressivity=0.1, trainability=-1, complexity=9)
    mixed = AzNasParts(expressivity=2, progressivity=0.0, trainability=-2, complexity=1)
    worst = AzNasParts(expressivity=1, progressivity=-1, trainability=-3, complexity=5)
    expected = [0, 3 * math.log(2 / 3) + math.log(1 / 3), 3 * math.log(1 / 3) + math.log(2 / 3)]
    assert az_nas([best, mixed, worst]) == pytest.approx(expected)


# --- networks ---------------------------------------------------------------------------------------------------------------------


def test_every_proxy_is_finite_repeatable_and_its_own_on_random_networks(batch: Split) -> None:
    archs = [SPACE.decode(g) for g in SPACE.sample(4, rng=np.random.default_rng(3))]
    found = [proxy_scores(archs, batch, seed=seed) for seed in (0, 0, 1)]
    assert all(s.unit == "rank" and s.std is None and s.source == f"proxy:{name}" for name, s in found[0].items())
    first, again, other = ({name: scores.mean for name, scores in one.items()} for one in found)
    for name, values in first.items():
        assert np.isfinite(values).all() and len(np.unique(values)) > 1, name
        assert (values == again[name]).all(), name
    assert (first["AZ-NAS complexity"] == [cost.count(a).macs for a in archs]).all()
    assert (first["SynFlow"] != other["SynFlow"]).all() and (first["ZiCo"] != other["ZiCo"]).all()


def test_every_proxy_is_charged_for_its_own_time(batch: Split) -> None:
    ticks = itertools.accumulate([0.0, 1.0, 0.0, 2.0, 0.0, 4.0, 0.0, 8.0] * 2)
    archs = [SPACE.decode(g) for g in SPACE.sample(2, rng=np.random.default_rng(3))]
    found = proxy_scores(archs, batch, cpu_clock=lambda: next(ticks))
    assert [found[name].cpu_seconds for name in ("NASWOT", "SynFlow", "ZiCo", "AZ-NAS", "AZ-NAS complexity")] == [2.0, 4.0, 8.0, 16.0, 16.0]


def test_residual_branches_are_visible(batch: Split) -> None:
    """With our own initialisation every branch is the identity, and no proxy could tell a deeper network."""
    arch = next(iter(SPACE.family.values()))
    deeper = replace(arch, stages=(*arch.stages[:3], replace(arch.stages[3], depth=arch.stages[3].depth + 1)))
    for name, score in proxies.PROXIES.items():
        assert score(arch, batch, seed=0) != score(deeper, batch, seed=0), name


def test_proxies_leave_the_random_state_alone(batch: Split) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    proxy_scores([next(iter(SPACE.family.values()))], batch)
    assert torch.rand(1) == expected
