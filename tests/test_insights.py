"""The Beyond-MACs study: its verdicts on devices whose behaviour we make up, its numbers, its files, its page."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lowsearch import cost
from lowsearch.arch import Arch, Block, ConvBranch, Head, Lowtention
from lowsearch.errors import UsageError
from lowsearch.insights import experiments as ex
from lowsearch.insights.claims import CLAIMS
from lowsearch.insights.evidence import Latency, Ratio, Wanted, misranked, verdict_of
from lowsearch.insights.study import insights, insights_path
from lowsearch.latency.measure import Effort
from lowsearch.latency.target import Device, Target
from lowsearch.latency.timing import Layer, Timing, TimmNetwork, item_from_dict, item_to_dict
from lowsearch.model.linear_attention import LinearAttention
from lowsearch.presets import PRESETS
from lowsearch.report.insights import build_insights

CPU = Device(slug="made-up-cpu", kind="cpu", name="Made-up CPU")
TARGET = Target("made-up-cpu", "onnxruntime")


def timm_cost(name: str, px: int) -> cost.Cost:
    """Made up: a count for every name, the same in every run."""
    number = sum(map(ord, name))
    return cost.Cost(macs=10**7 * (1 + number % 97), params=10**5 * (1 + number % 89))


def macs_of(item) -> int:
    if isinstance(item, TimmNetwork):
        return timm_cost(item.name, item.resolution_px).macs
    return cost.count(item).macs if isinstance(item, Arch) else item.cost.macs if isinstance(item, Layer) else cost.of_block(item).macs


class Rule:
    """A device on which every item takes what a function says, per image."""

    def __init__(self, ms, *, batched=None, std=0.001):
        self.batch, self._ms, self._batched, self._std = 8, ms, batched or ms, std

    def has(self, item):
        return True

    def of(self, item):
        return Latency(self._ms(item), self._std * self._ms(item))

    def batched(self, item):
        return Latency(8 * self._batched(item), self._std * 8 * self._batched(item))


MACS_ONLY = Rule(lambda item: macs_of(item) / 1e7)
"""A device on which MACs are all that counts."""


def finding(number, times):
    return ex.experiments(timm_cost)[number](times)


# Verdicts


@pytest.mark.parametrize(
    ("number", "verdict"),
    [
        (1, "refuted"), (2, "not decided"), (3, "refuted"), (4, "not decided"), (5, "not decided"), (6, "confirmed"),
        (9, "refuted"), (10, "not decided"), (12, "refuted"), (13, "confirmed"), (15, "not decided"),
    ],
)  # fmt: skip
def test_where_macs_are_all_that_counts_no_claim_against_them_is_confirmed(number, verdict):
    """Claims 6 and 13 follow from the MACs alone; at equal MACs there is nothing to decide."""
    assert finding(number, MACS_ONLY).verdict == verdict


def noisy_rates(item):
    return macs_of(item) / 1e7 * float(np.exp(np.random.default_rng(macs_of(item)).normal(0, 1.0)))


def slow_depthwise(item):
    slow = isinstance(item, Layer) and item.groups > 1
    return macs_of(item) / 1e7 * (3.0 if slow else 1.0)


def crossover(item):
    """A fused block takes half the time of an unfused one at 16 channels, twice at 256, in proportion between."""
    if not isinstance(item, ConvBranch):
        return 1.0
    return (item.channels / 64) ** 0.5 if item.fused else 1.0


def slow_early(item):
    return macs_of(item) * (2.0 if isinstance(item, ConvBranch) and item.resolution_px >= 28 else 1.0)


def resolution_squared(item):
    """Attention that pays for every pair of tokens, and nothing else."""
    if not isinstance(item, Arch):
        return 1.0
    attention = [block for block in item.blocks() if isinstance(block, Lowtention)]
    return 10.0 + sum(block.attention_px**4 for block in attention) / 1e6


def slow_attention(item):
    return macs_of(item) * (3.0 if isinstance(item, Arch) and any(isinstance(b, Lowtention) for b in item.blocks()) else 1.0)


@pytest.mark.parametrize(
    ("number", "times", "verdict"),
    [
        (1, Rule(noisy_rates), "confirmed"),
        (2, Rule(slow_depthwise), "confirmed"),
        (2, Rule(lambda i: macs_of(i) / (3.0 if isinstance(i, Layer) and i.groups > 1 else 1.0)), "refuted"),
        (3, Rule(crossover), "confirmed"),
        (3, Rule(lambda i: 1.0 / crossover(i)), "refuted"),
        (4, Rule(lambda i: 1.0), "confirmed"),
        (4, Rule(lambda i: macs_of(i) ** 2), "refuted"),
        (5, Rule(slow_early), "confirmed"),
        (5, Rule(lambda i: macs_of(i) * (0.5 if i.resolution_px >= 28 else 1.0)), "refuted"),
        (6, Rule(lambda i: 1.0), "refuted"),
        (7, Rule(resolution_squared), "confirmed"),
        (7, Rule(lambda i: 1.0), "refuted"),
        (8, Rule(lambda i: 2.0 if isinstance(i, Layer) else 1.0), "confirmed"),
        (8, Rule(lambda i: 0.5 if isinstance(i, Layer) else 1.0), "refuted"),
        (9, Rule(lambda i: 1.0 if i.projection == "fused" else 1.5), "confirmed"),
        (10, Rule(slow_attention), "confirmed"),
        (11, Rule(lambda i: 1.0), "confirmed"),
        (11, Rule(slow_attention), "refuted"),
        (12, Rule(lambda i: macs_of(i), batched=lambda i: 1e9 / macs_of(i)), "confirmed"),
        (13, Rule(lambda i: 1.0), "refuted"),
        (14, Rule(lambda i: 0.5 if isinstance(i, Head) else 1.0), "confirmed"),
        (14, Rule(lambda i: 1e-4 if isinstance(i, Head) else 1.0), "refuted"),
    ],
)
def test_a_device_that_behaves_as_the_claim_says_or_the_other_way_is_recognised(number, times, verdict):
    found = finding(number, times)
    assert found.verdict == verdict, found.evidence
    assert found.claim == CLAIMS[number]
    assert found.rows


@pytest.mark.parametrize("number", list(CLAIMS))
def test_noise_that_hides_everything_decides_nothing(number):
    """With a standard error three times as large as the time itself, nothing may be called confirmed or refuted."""
    assert finding(number, Rule(lambda item: macs_of(item) / 1e7, std=3.0)).verdict == "not decided"


def test_the_crossover_is_found_where_the_ratio_is_one():
    evidence = finding(3, Rule(crossover)).evidence
    assert "64 channels at 28 px" in evidence


def test_the_verdict_needs_two_thirds_and_hardly_any_against():
    assert verdict_of([1, 1, 0]) == "confirmed"
    assert verdict_of([-1, -1, 0]) == "refuted"
    assert verdict_of([1, 0, 0]) == "not decided"
    assert verdict_of([1, 1, 1, 1, -1]) == "not decided"


def test_a_ratio_decides_only_beyond_two_standard_errors_and_five_percent():
    assert Ratio.of(Latency(1.2, 0.01), Latency(1.0, 0.01)).side() == 1
    assert Ratio.of(Latency(0.8, 0.01), Latency(1.0, 0.01)).side() == -1
    assert Ratio.of(Latency(1.04, 0.0), Latency(1.0, 0.0)).side() == 0
    assert Ratio.of(Latency(1.2, 0.15), Latency(1.0, 0.0)).side() == 0


def test_misranked_pairs_are_those_that_differ_clearly_in_both():
    exact = [Latency(ms, 0.0) for ms in (1.0, 2.0, 2.02, 3.0)]
    assert misranked([1, 3, 2, 4], exact) == (0, 5), "2.0 and 2.02 ms are equal"
    assert misranked([4, 3, 2, 1], exact) == (5, 5)


# What is compared


def test_convolutions_are_compared_at_equal_macs():
    for row in finding(2, MACS_ONLY).rows:
        assert row["macs"] == 9 * row["dense channels"] ** 2 * row["px"] ** 2


def test_linear_attention_is_counted_as_torch_counts_it():
    layer = Layer(kind="linear_attention", channels=64, resolution_px=12)
    module = LinearAttention(64).eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 64, 12, 12))
    assert layer.cost.macs == counter.get_total_flops() // 2
    assert layer.cost.params == sum(p.numel() for p in module.parameters())


def test_linear_attention_is_attention_with_relu_weights():
    """Against the quadratic form: each pixel's output is the mean of the values, weighted by relu(q) . relu(k)."""
    torch.manual_seed(0)
    module = LinearAttention(32, head_dim=16).double().eval()
    x = torch.randn(2, 32, 5, 4, dtype=torch.double)
    qkv = module.qkv(x)
    both = torch.cat([qkv, module.mix(module.aggregate(qkv))], dim=1).reshape(2, 4, 3, 16, 20)
    q, k, v = both[:, :, 0].relu(), both[:, :, 1].relu(), both[:, :, 2]
    weights = torch.einsum("bhdi,bhdj->bhij", q, k)
    out = torch.einsum("bhij,bhdj->bhdi", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    expected = x + module.norm(module.project(out.reshape(2, 64, 5, 4)))
    assert torch.allclose(module(x), expected)


def test_a_layer_survives_json():
    for layer in (Layer(kind="conv", channels=64, resolution_px=7, groups=4), Layer(kind="linear_attention", channels=32, resolution_px=8)):
        assert item_from_dict(json.loads(json.dumps(item_to_dict(layer)))) == layer


def test_everything_asked_for_can_be_counted_and_is_asked_for_once():
    wanted = Wanted()
    for experiment in ex.experiments(timm_cost).values():
        experiment(wanted)
    assert all(macs_of(item) > 0 for item in (*wanted.single, *wanted.large))
    assert set(PRESETS.values()) <= set(wanted.single)
    assert len([item for item in wanted.single if isinstance(item, TimmNetwork)]) == 25


# The study


def launch(request):
    """A made-up device on which time goes with the MACs, a little slower in every later process."""
    for step in request.steps:
        for item in step:
            ms = request.target.batch * macs_of(item) / 1e7 * (1 + 0.001 * request.process)
            warm = (ms,) if isinstance(item, Block | Layer) else ()
            yield Timing(item=item, process=request.process, hot_ms=(ms, ms, ms), warm_ms=warm, cold_ms=warm, step="0")


def study(folder, **changes):
    given = {"folder": folder, "launch": launch, "devices": [CPU], "count_timm": timm_cost, **changes}
    return insights(TARGET, **given)


def test_the_study_judges_every_claim_and_leaves_its_numbers(tmp_path):
    found = study(tmp_path)
    assert [f.claim.number for f in found.findings] == list(CLAIMS)
    path = insights_path(TARGET, tmp_path)
    values = json.loads(path.read_text())
    assert [claim["verdict"] for claim in values["claims"]] == [f.verdict for f in found.findings]
    assert values["claims"][0]["verdict"] == "refuted"
    assert values["target"]["device"] == "made-up-cpu"
    assert not list(path.parent.glob("*partial*")), "nothing is left of the measurement"


def test_a_backbone_that_the_runtime_cannot_execute_is_left_out_and_named(tmp_path):
    def without(request):
        for timing in launch(request):
            bad = timing.item == TimmNetwork("efficientvit_b1", 224)
            yield dataclasses.replace(timing, hot_ms=(), refused="no kernel") if bad else timing

    one, twelve = study(tmp_path, claims=[1, 12], launch=without).findings
    whole, _ = study(tmp_path / "whole", claims=[1, 12]).findings
    assert [row for row in whole.rows if row not in one.rows] == [row for row in whole.rows if row["network"] == "efficientvit_b1"]
    assert (
        one.evidence.endswith("Left out, as the runtime cannot execute them: efficientvit_b1.")
        and "efficientvit_b1 takes" not in one.evidence
    )
    assert "efficientvit_b1" not in {row["network"] for row in twelve.rows}


def test_only_the_claims_asked_for_are_measured(tmp_path):
    measured = []

    def counted(request):
        for timing in launch(request):
            measured.append(timing.item)
            yield timing

    found = study(tmp_path, claims=[8], launch=counted)
    assert [f.claim.number for f in found.findings] == [8]
    wanted = Wanted()
    finding(8, wanted)
    assert set(measured) == set(wanted.single)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    measured = []

    def dies_after(n):
        def counted(request):
            for timing in launch(request):
                if len(measured) == n:
                    raise KeyboardInterrupt
                measured.append((timing.item, timing.process))
                yield timing

        return counted

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, claims=[2, 8], launch=dies_after(7))
    found = study(tmp_path, claims=[2, 8], launch=dies_after(10**9))
    assert len(measured) - len(set(measured)) <= 2, "at most what was on its way is measured twice"
    assert [f.claim.number for f in found.findings] == [2, 8]


@pytest.mark.parametrize("claims", [[0], [16], [3, 99]])
def test_an_unknown_claim_is_refused(tmp_path, claims):
    with pytest.raises(UsageError, match="known: 1 to 15"):
        study(tmp_path, claims=claims)


def test_a_large_batch_is_refused_as_the_study_measures_its_own(tmp_path):
    with pytest.raises(UsageError, match="batch is 4"):
        insights(Target("made-up-cpu", "onnxruntime", batch=4), folder=tmp_path, devices=[CPU], count_timm=timm_cost)


def test_layers_run_for_real_and_pass_the_parity_gate(tmp_path):
    from lowsearch.latency.target import resolve_target

    effort = Effort(processes=1, rounds=1, min_samples=1, max_samples=1, cold_samples=1, turns_ms=1.0, min_turns=1, max_turns=1)
    found = insights(resolve_target("cpu", "onnxruntime"), claims=[8], folder=tmp_path, block_effort=effort)
    assert all(row["linear ms"] > 0 for row in found.findings[0].rows)


def test_the_page_shows_every_claim_its_verdict_and_its_evidence(tmp_path):
    found = study(tmp_path)
    text = build_insights(found, tmp_path / "page.html").read_text()
    for f in found.findings:
        assert f'id="claim-{f.claim.number}"' in text
        assert text.count(f.claim.title) >= 2
    assert text.count('class="verdict confirmed"') == 2 * sum(f.verdict == "confirmed" for f in found.findings)
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    drawn = json.loads(data[1])
    assert set(drawn) == {f"plot-{f.claim.number}-{i}" for f in found.findings for i in range(len(f.plots))}
    outside_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?:", outside_scripts)
