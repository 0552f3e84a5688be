"""One experiment for every claim: it asks for latencies, compares them, and says what they mean on this device.

What is asked for never depends on the answers, so the same function first tells what has to be measured (`evidence.Wanted`).
Blocks and layers are compared at the shapes that the published networks have them in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from lowsearch import cost
from lowsearch.arch import Arch, Attention, Block, ConvBranch, Head, Lowtention, Mlp, Projection, Stage
from lowsearch.insights.claims import CLAIMS
from lowsearch.insights.evidence import (
    MARGIN,
    Finding,
    Latency,
    Plot,
    Ratio,
    Series,
    Times,
    Verdict,
    geometric_mean,
    misranked,
    rank_correlations,
    rank_verdict,
    verdict_of,
)
from lowsearch.latency.timing import Layer, Network, TimmNetwork
from lowsearch.presets import PRESETS
from lowsearch.space import SearchSpace

N_RANDOM = 40
N_SURPRISES = 5
TIMM = (
    "convnext_atto", "deit_tiny_patch16_224", "edgenext_small", "efficientformerv2_s1", "efficientnet_b0", "efficientvit_b0",
    "efficientvit_b1", "efficientvit_b2", "fastvit_sa12", "fastvit_t8", "ghostnetv2_100", "mobilenetv3_large_100",
    "mobilenetv4_conv_medium", "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "mobileone_s1", "mobileone_s4", "mobilevitv2_100",
    "poolformerv2_s12", "regnety_008", "repvit_m0_9", "repvit_m1_1", "repvit_m1_5", "resnet18", "resnet50",
)  # fmt: skip
"""Backbones of timm that MACs are asked to rank, at 224 px."""
STAGE_SHAPES = ((32, 56), (64, 28), (128, 14), (256, 7))
"""(channels, pixels) of B1's stages: convolutions at constant width have the same MACs in all of them."""

CountTimm = Callable[[str, int], cost.Cost]
Experiment = Callable[[Times], Finding]


def experiments(count_timm: CountTimm) -> dict[int, Experiment]:
    """The experiment for every claim, by its number. `count_timm` counts a network of timm; it needs torch."""
    return {
        1: lambda times: macs_and_time(times, count_timm), 2: dense_grouped_depthwise, 3: fused_or_unfused, 4: all_unfused,
        5: early_and_late, 6: lowtention_is_cheap, 7: stride_of_attention, 8: linear_attention, 9: output_projection,
        10: without_attention, 11: pure_convolution, 12: lambda times: batch_size(times, count_timm), 13: groups_and_small_kernels,
        14: the_head, 15: higher_resolution,
    }  # fmt: skip


# MACs and time ----------------------------------------------------------------------------------------------------------


def macs_and_time(times: Times, count_timm: CountTimm) -> Finding:
    backbones = _backbones(times)
    members = _random_members()
    counts = {name: _count(network, count_timm) for name, network in backbones.items()}
    latencies = {name: times.of(network) for name, network in backbones.items()}
    random_counts, random_ms = [cost.count(arch) for arch in members], [times.of(arch) for arch in members]
    macs, params = [c.macs for c in counts.values()], [c.params for c in counts.values()]
    ms = [latency.ms for latency in latencies.values()]
    wrong, pairs = misranked(macs, list(latencies.values()))
    share = wrong / max(pairs, 1)
    (rho, tau), (rho_params, tau_params) = rank_correlations(macs, ms), rank_correlations(params, ms)
    rho_random, tau_random = rank_correlations([c.macs for c in random_counts], [latency.ms for latency in random_ms])
    rho_rp, tau_rp = rank_correlations([c.params for c in random_counts], [latency.ms for latency in random_ms])
    surprises = _surprises(list(backbones), macs, ms)
    missing = [name for name in TIMM if name not in backbones]
    told = "; ".join(surprises.values())

    def beside(name: str, other: str) -> str:
        share = counts[name].macs / counts[other].macs
        return f"{name} takes {Ratio.of(latencies[name], latencies[other])} times {other}'s time with {share:.2f} times its MACs"

    evidence = (
        f"Of {pairs} pairs among {len(backbones)} backbones that differ clearly in both, MACs rank {100 * share:.0f} % wrongly "
        f"(Spearman {rho:.2f}, Kendall {tau:.2f}; parameters {rho_params:.2f}, {tau_params:.2f}). Over {len(members)} random members of "
        f"the LowFormer space MACs reach {rho_random:.2f} and {tau_random:.2f}, parameters {rho_rp:.2f} and {tau_rp:.2f}. The "
        f"{N_SURPRISES} backbones whose time their MACs miss most: {told}. "
        + "; ".join(
            beside(name, other) for name, other in (("lowformer_e1", "lowformer_b0"), ("efficientvit_b1", "lowformer_b1")) if name in counts
        )
        + "."
        + (f" Left out, as the runtime cannot execute them: {', '.join(missing)}." if missing else "")
    )
    rows = [
        {"network": name, "macs": counts[name].macs, "params": counts[name].params, **_as_row(latencies[name])} for name in backbones
    ] + [
        {"network": arch.arch_id, "macs": c.macs, "params": c.params, **_as_row(latency)}
        for arch, c, latency in zip(members, random_counts, random_ms, strict=True)
    ]  # fmt: skip
    ours = [name for name in backbones if name in PRESETS]
    others = [name for name in backbones if name not in PRESETS]
    series = [
        Series(
            name="random members", x=[c.macs / 1e6 for c in random_counts], y=[latency.ms for latency in random_ms],
            labels=[arch.arch_id for arch in members], lines=False,
        ),
        *(
            Series(
                name=title, x=[counts[n].macs / 1e6 for n in names], y=[latencies[n].ms for n in names], labels=names,
                named=[*surprises, "lowformer_b0", "lowformer_e1"], lines=False,
            )
            for title, names in (("timm", others), ("LowFormer and CPUBone", ours))
        ),
    ]  # fmt: skip
    plot = Plot(x_title="MMACs", y_title="latency, ms", series=series, log_x=True, log_y=True)
    return Finding(claim=CLAIMS[1], verdict=rank_verdict(wrong, pairs), evidence=evidence, rows=rows, plots=[plot])


def _surprises(names: Sequence[str], macs: Sequence[int], ms: Sequence[float]) -> dict[str, str]:
    """By name, in words: the networks farthest from the line of log time over log MACs, and how many times longer or shorter they take."""
    x, y = np.log(np.array(macs, dtype=float)), np.log(np.array(ms))
    slope, level = np.polyfit(x, y, 1)
    off = y - (slope * x + level)
    worst = [int(i) for i in np.argsort(-np.abs(off))[:N_SURPRISES]]
    return {names[i]: f"{names[i]} {np.exp(abs(off[i])):.1f} times {'slower' if off[i] > 0 else 'faster'}" for i in worst}


# Convolutions -----------------------------------------------------------------------------------------------------------


def dense_grouped_depthwise(times: Times) -> Finding:
    rows, sides = [], []
    by_kind: dict[str, list[tuple[str, Ratio]]] = {"4 groups": [], "depthwise": []}
    for px in (56, 28, 14):
        for c in (16, 24, 32):
            dense = Layer(kind="conv", channels=c, resolution_px=px)
            # k x k weights are channels^2 / groups: twice the channels in 4 groups, or the square of them in as many groups, are equal.
            grouped = Layer(kind="conv", channels=2 * c, resolution_px=px, groups=4)
            depthwise = Layer(kind="conv", channels=c * c, resolution_px=px, groups=c * c)
            base = times.of(dense)
            for kind, layer in (("4 groups", grouped), ("depthwise", depthwise)):
                assert layer.cost.macs == dense.cost.macs
                ratio = Ratio.of(times.of(layer), base)
                by_kind[kind].append((f"{c} ch, {px} px", ratio))
                sides.append(ratio.side())
                rows.append(
                    {"px": px, "dense channels": c, "kind": kind, "channels": layer.channels, "macs": layer.cost.macs}
                    | {"dense ms": base.ms, "ms": times.of(layer).ms, "ratio": ratio.value, "ratio std": ratio.std}
                )  # fmt: skip
    evidence = " ".join(
        f"{kind.capitalize()}: {geometric_mean([r.value for _, r in found]):.2f} times the dense convolution's time in the mean, "
        f"{min(r.value for _, r in found):.2f} to {max(r.value for _, r in found):.2f} over {len(found)} shapes."
        for kind, found in by_kind.items()
    )
    series = [
        Series(name=kind, x=[at for at, _ in found], y=[r.value for _, r in found], std=[r.std for _, r in found], lines=False)
        for kind, found in by_kind.items()
    ]
    plot = Plot(
        x_title="shape of the dense 3x3 convolution", y_title="time / dense, equal MACs", series=series, log_y=True, line_y=1.0
    )  # fmt: skip
    return Finding(claim=CLAIMS[2], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


def fused_or_unfused(times: Times) -> Finding:
    widths = (16, 32, 64, 96, 128, 192, 256, 384)
    rows, series, first, last, turns = [], [], [], [], []
    for px in (56, 28, 14, 7):
        at = [c for c in widths if c * px <= 128 * 28]  # Wider ones at that resolution are in no network of this class.
        ratios = []
        for c in at:
            fused, unfused = _conv(c, px, fused=True), _conv(c, px, fused=False)
            ratio = Ratio.of(times.of(fused), times.of(unfused))
            ratios.append(ratio)
            rows.append(
                {"px": px, "channels": c, "fused ms": times.of(fused).ms, "unfused ms": times.of(unfused).ms, "ratio": ratio.value}
                | {"ratio std": ratio.std, "ratio of MACs": _macs(fused) / _macs(unfused)}
            )  # fmt: skip
        first.append(-ratios[0].side())
        last.append(ratios[-1].side())
        turns.append(f"{_crossing(at, [r.value for r in ratios])} at {px} px")
        series.append(Series(name=f"{px} px", x=at, y=[r.value for r in ratios], std=[r.std for r in ratios]))
    few, many = verdict_of(first), verdict_of(last)
    verdict: Verdict = "confirmed" if few == many == "confirmed" else "refuted" if "refuted" in (few, many) else "not decided"
    evidence = (
        f"Fused takes {' / '.join(f'{s.y[0]:.2f}' for s in series)} times the unfused time at 16 channels and 56 / 28 / 14 / 7 px, and "
        f"{' / '.join(f'{s.y[-1]:.2f}' for s in series)} times at the widest. Up to where fusing pays: {', '.join(turns)}; the published "
        "rule fuses below 256 channels."
    )
    plot = Plot(x_title="channels", y_title="time fused / unfused", series=series, log_x=True, log_y=True, line_y=1.0)
    return Finding(claim=CLAIMS[3], verdict=verdict, evidence=evidence, rows=rows, plots=[plot])


def _crossing(channels: Sequence[int], ratios: Sequence[float]) -> str:
    """Where the ratio rises through 1, interpolated in logarithms."""
    if ratios[0] >= 1:
        return f"below {channels[0]} channels"
    for i in range(1, len(ratios)):
        if ratios[i] >= 1:
            a, b = np.log(ratios[i - 1]), np.log(ratios[i])
            share = -a / (b - a)
            return f"{np.exp(np.log(channels[i - 1]) * (1 - share) + np.log(channels[i]) * share):.0f} channels"
    return f"beyond {channels[-1]} channels"


def all_unfused(times: Times) -> Finding:
    b1 = PRESETS["lowformer_b1"]
    stages = [dataclasses.replace(stage, fused=False, down_fused=False) for stage in b1.stages]
    unfused = dataclasses.replace(b1, stages=tuple(stages))
    ratio = Ratio.of(times.of(unfused), times.of(b1))
    macs = cost.count(unfused).macs / cost.count(b1).macs
    side = ratio.side(macs)
    evidence = f"{ratio} times B1's time with {macs:.2f} times its MACs."
    rows = [{"network": name, "macs": cost.count(a).macs, **_as_row(times.of(a))} for name, a in (("B1", b1), ("B1 unfused", unfused))]
    return Finding(claim=CLAIMS[4], verdict=verdict_of([side]), evidence=evidence, rows=rows)


def early_and_late(times: Times) -> Finding:
    rows, sides, series = [], [], []
    for fused in (True, False):
        latencies = [times.of(_conv(c, px, fused=fused)) for c, px in STAGE_SHAPES]
        macs = [_macs(_conv(c, px, fused=fused)) for c, px in STAGE_SHAPES]
        # MACs of an unfused block differ by its depthwise share, so rates are compared: time per MAC.
        per_mac = [Latency(lat.ms / m, lat.std_ms / m) for lat, m in zip(latencies, macs, strict=True)]
        sides += [Ratio.of(per_mac[early], per_mac[late]).side() for early in (0, 1) for late in (2, 3)]
        name = "fused" if fused else "unfused"
        for (c, px), latency, m in zip(STAGE_SHAPES, latencies, macs, strict=True):
            rows.append({"block": name, "channels": c, "px": px, "macs": m, **_as_row(latency), "gmacs_per_s": m / latency.ms / 1e6})
        rates = [m / latency.ms / 1e6 for m, latency in zip(macs, latencies, strict=True)]
        series.append(Series(name=name, x=[f"{c} ch, {px} px" for c, px in STAGE_SHAPES], y=rates))
    listed = " and ".join(f"{s.name} {' / '.join(f'{y:.0f}' for y in s.y)}" for s in series)
    evidence = f"GMACs/s of an MBConv in the four stages of B1, early to late: {listed}."
    plot = Plot(x_title="stage of LowFormer-B1", y_title="GMACs/s", series=series)
    return Finding(claim=CLAIMS[5], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


# Attention --------------------------------------------------------------------------------------------------------------


def lowtention_is_cheap(times: Times) -> Finding:
    rows, sides, series = [], [], []
    for c in (128, 256):
        ratios = []
        for px in (14, 20, 28, 40):
            low, full = _attention(c, px, stride=2, compression=0.5), _attention(c, px, stride=1, compression=1.0)
            ratio = Ratio.of(times.of(full), times.of(low))
            ratios.append(ratio)
            sides.append(ratio.side(1.25))
            rows.append(
                {"channels": c, "px": px, "lowtention ms": times.of(low).ms, "full ms": times.of(full).ms, "ratio": ratio.value}
                | {"ratio std": ratio.std, "ratio of MACs": _macs(full) / _macs(low)}
            )  # fmt: skip
        series.append(
            Series(name=f"{c} channels", x=[14, 20, 28, 40], y=[r.value for r in ratios], std=[r.std for r in ratios])
        )  # fmt: skip
    b1 = PRESETS["lowformer_b1"]
    ms = {block: times.of(block).ms for block in dict.fromkeys(b1.blocks())}
    attention = [block for block in b1.blocks() if isinstance(block, Lowtention)]
    time_share = sum(ms[block] for block in attention) / sum(ms[block] for block in b1.blocks())
    macs_share = sum(_macs(block) for block in attention) / cost.count(b1).macs
    found = [row["ratio"] for row in rows]
    evidence = (
        f"Attention at full resolution and width takes {min(found):.1f} to {max(found):.1f} times as long as Lowtention at the same place. "
        f"In LowFormer-B1 Lowtention is {100 * macs_share:.0f} % of the MACs and {100 * time_share:.0f} % of the time of all blocks."
    )
    plot = Plot(x_title="pixels of the stage", y_title="time full / Lowtention", series=series, log_x=True, log_y=True, line_y=1.0)
    return Finding(claim=CLAIMS[6], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


def stride_of_attention(times: Times) -> Finding:
    b1 = PRESETS["lowformer_b1"]
    rows, ratios = [], []
    for px in (224, 512, 1024):
        strided = dataclasses.replace(b1, resolution_px=px)
        third = _with_stride(b1.stages[2], 1)
        unstrided = dataclasses.replace(strided, stages=(*b1.stages[:2], third, b1.stages[3]))
        ratio = Ratio.of(times.of(unstrided), times.of(strided))
        macs = cost.count(unstrided).macs / cost.count(strided).macs
        ratios.append(ratio)
        rows.append(
            {"px": px, "stride 2 ms": times.of(strided).ms, "stride 1 ms": times.of(unstrided).ms, "ratio": ratio.value}
            | {"ratio std": ratio.std, "ratio of MACs": macs}
        )  # fmt: skip
    grows = ratios[-1].value - ratios[0].value > 2 * np.hypot(ratios[-1].std, ratios[0].std)
    verdict: Verdict = "confirmed" if grows and ratios[-1].side(1.5) > 0 else "refuted" if ratios[-1].side(1.2) < 0 else "not decided"
    told = "; ".join(f"{r['px']} px {ratio} ({r['ratio of MACs']:.2f} times the MACs)" for r, ratio in zip(rows, ratios, strict=True))
    evidence = (
        f"Time of LowFormer-B1 without the stride in stage 3, over its time with it: {told}. On the authors' GPU: about 2 at 1024 px."
    )
    series = [
        Series(name="time", x=[r["px"] for r in rows], y=[r.value for r in ratios], std=[r.std for r in ratios]),
        Series(name="MACs", x=[r["px"] for r in rows], y=[r["ratio of MACs"] for r in rows]),
    ]
    plot = Plot(x_title="input resolution, px", y_title="stride 1 / stride 2", series=series, line_y=1.0)
    return Finding(claim=CLAIMS[7], verdict=verdict, evidence=evidence, rows=rows, plots=[plot])


def _with_stride(stage: Stage, stride: int) -> Stage:
    assert stage.attention is not None
    return dataclasses.replace(stage, attention=dataclasses.replace(stage.attention, stride=stride))


def linear_attention(times: Times) -> Finding:
    rows, sides, series = [], [], []
    places = (14, 20, 28, 40, 64)
    for c in (128, 256):
        ratios = []
        for px in places:
            low = _attention(c, px, stride=2, compression=0.5)
            linear = Layer(kind="linear_attention", channels=c, resolution_px=px)
            ratio = Ratio.of(times.of(linear), times.of(low))
            ratios.append(ratio)
            sides.append(ratio.side())
            rows.append(
                {"channels": c, "px": px, "lowtention ms": times.of(low).ms, "linear ms": times.of(linear).ms, "ratio": ratio.value}
                | {"ratio std": ratio.std, "ratio of MACs": linear.cost.macs / _macs(low)}
            )  # fmt: skip
        series.append(Series(name=f"{c} channels", x=places, y=[r.value for r in ratios], std=[r.std for r in ratios]))
    found = [row["ratio"] for row in rows]
    evidence = (
        f"Linear attention takes {min(found):.1f} to {max(found):.1f} times as long as Lowtention in stages of 14 to 64 px (images of "
        "224 to 1024 px). Which of the two is more accurate is not measured here."
    )
    plot = Plot(x_title="pixels of the stage", y_title="time linear / Lowtention", series=series, log_x=True, log_y=True, line_y=1.0)
    return Finding(claim=CLAIMS[8], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


def output_projection(times: Times) -> Finding:
    rows, sides = [], []
    projections: tuple[Projection, ...] = ("unfused", "nearest")
    found: dict[str, list[tuple[str, Ratio]]] = {name: [] for name in projections}
    for c, px, stride in ((128, 14, 2), (192, 14, 2), (256, 14, 2), (256, 7, 1), (384, 7, 1), (512, 7, 1)):
        fused = _attention(c, px, stride=stride, compression=0.5)
        for projection in projections:
            other = _attention(c, px, stride=stride, compression=0.5, projection=projection)
            ratio = Ratio.of(times.of(other), times.of(fused))
            found[projection].append((f"{c} ch, {px} px", ratio))
            rows.append(
                {"channels": c, "px": px, "stride": stride, "projection": projection, "fused ms": times.of(fused).ms}
                | {"ms": times.of(other).ms, "ratio": ratio.value, "ratio std": ratio.std, "ratio of MACs": _macs(other) / _macs(fused)}
            )  # fmt: skip
        sides.append(found["unfused"][-1][1].side())
    told = " and ".join(
        f"{name} {geometric_mean([r.value for _, r in pairs]):.2f} ({min(r.value for _, r in pairs):.2f} to "
        f"{max(r.value for _, r in pairs):.2f})"
        for name, pairs in found.items()
    )
    evidence = f"Time of a whole Lowtention beside the one with the fused projection: {told}; nearest upsampling is CPUBone's choice."
    series = [
        Series(name=name, x=[at for at, _ in pairs], y=[r.value for _, r in pairs], std=[r.std for _, r in pairs], lines=False)
        for name, pairs in found.items()
    ]
    plot = Plot(x_title="place", y_title="time / fused projection", series=series, line_y=1.0)
    return Finding(claim=CLAIMS[9], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


def without_attention(times: Times) -> Finding:
    rows, sides, told = [], [], []
    for small, large in (("lowformer_e1", "lowformer_b15"), ("lowformer_e2", "lowformer_b3"), ("lowformer_e3", "lowformer_b3")):
        ratio = Ratio.of(times.of(PRESETS[small]), times.of(PRESETS[large]))
        macs = cost.count(PRESETS[small]).macs / cost.count(PRESETS[large]).macs
        sides.append(-ratio.side(macs))
        rows.append({"network": small, "beside": large, "ratio": ratio.value, "ratio std": ratio.std, "ratio of MACs": macs})
        told.append(f"{small} {ratio} of {large}'s time with {macs:.2f} of its MACs")
    rates = []
    for name in ("lowformer_b1", "lowformer_b3"):
        for kind, kinds in (("attention", Lowtention), ("MLP", Mlp), ("convolution", ConvBranch)):
            late = [
                block for place, block in PRESETS[name].named_blocks() if place[:6] in ("stage3", "stage4") and isinstance(block, kinds)
            ]
            rate = sum(_macs(block) for block in late) / sum(times.of(block).ms for block in late) / 1e6
            rows.append({"network": name, "late blocks": kind, "gmacs_per_s": rate})
            rates.append(f"{kind} {rate:.0f}")
    evidence = f"{'; '.join(told)}. GMACs/s of the blocks in stages 3 and 4: B1 {', '.join(rates[:3])}; B3 {', '.join(rates[3:])}."
    return Finding(claim=CLAIMS[10], verdict=verdict_of(sides), evidence=evidence, rows=rows)


def pure_convolution(times: Times) -> Finding:
    e2, b2 = PRESETS["lowformer_e2"], PRESETS["lowformer_b2"]
    ratio = Ratio.of(times.of(e2), times.of(b2))
    macs = cost.count(e2).macs / cost.count(b2).macs
    # "Not faster" needs no difference, but it needs to be known that there is none.
    not_faster = math.log(ratio.value) - 2 * ratio.std / ratio.value >= -math.log1p(MARGIN)
    verdict: Verdict = "confirmed" if not_faster else "refuted" if ratio.side() < 0 else "not decided"
    rows = [{"network": name, "macs": cost.count(a).macs, **_as_row(times.of(a))} for name, a in (("E2", e2), ("B2", b2))]
    evidence = f"E2 takes {ratio} times B2's time with {macs:.2f} times its MACs."
    return Finding(claim=CLAIMS[11], verdict=verdict, evidence=evidence, rows=rows)


# Whole networks ---------------------------------------------------------------------------------------------------------


def batch_size(times: Times, count_timm: CountTimm) -> Finding:
    names = [
        *(name for name in PRESETS if name not in ("lowformer_b3", "lowformer_e2", "lowformer_e3", "cpubone_b3")), "efficientvit_b0",
        "efficientvit_b1", "mobilenetv4_conv_medium", "mobilenetv4_conv_small", "mobileone_s1", "repvit_m0_9", "repvit_m1_1", "resnet18",
    ]  # fmt: skip
    backbones = {name: network for name, network in _backbones(times).items() if name in names}
    single = [times.of(network) for network in backbones.values()]
    large = [times.batched(network) for network in backbones.values()]
    wrong, pairs = misranked([latency.ms for latency in single], large)
    rho, tau = rank_correlations([a.ms for a in single], [b.ms for b in large])
    gains = [a.ms / (b.ms / times.batch) for a, b in zip(single, large, strict=True)]
    least, most = int(np.argmin(gains)), int(np.argmax(gains))
    listed = list(backbones)
    evidence = (
        f"Time at batch 1 and time per image at batch {times.batch} over {len(listed)} networks: Spearman {rho:.2f}, Kendall {tau:.2f}; of "
        f"{pairs} pairs that differ clearly in both, {wrong} change places. A batch gains a factor of {gains[least]:.2f} "
        f"({listed[least]}) to {gains[most]:.2f} ({listed[most]}) per image."
    )
    rows = [
        {"network": name, "macs": _count(network, count_timm).macs, **_as_row(a), "time_per_image_ms": b.ms / times.batch}
        for (name, network), a, b in zip(backbones.items(), single, large, strict=True)
    ]
    series = [
        Series(name=title, x=[single[i].ms for i in which], y=[gains[i] for i in which], labels=[listed[i] for i in which], lines=False)
        for title, which in (
            ("timm", [i for i, name in enumerate(listed) if name not in PRESETS]),
            ("LowFormer and CPUBone", [i for i, name in enumerate(listed) if name in PRESETS]),
        )
    ]
    plot = Plot(x_title="latency at batch 1, ms", y_title=f"gain per image at batch {times.batch}", series=series, log_x=True, line_y=1.0)
    return Finding(claim=CLAIMS[12], verdict=rank_verdict(wrong, pairs), evidence=evidence, rows=rows, plots=[plot])


def groups_and_small_kernels(times: Times) -> Finding:
    rows, sides = [], []

    def compare(what: str, changed: Block | Arch, plain: Block | Arch) -> Ratio:
        ratio = Ratio.of(times.of(changed), times.of(plain))
        macs = _macs(changed) / _macs(plain)
        sides.append(-ratio.side(1.1 * macs))
        rows.append({"what": what, "ratio": ratio.value, "ratio std": ratio.std, "ratio of MACs": macs})
        return ratio

    for c, px in STAGE_SHAPES:
        for fused in (True, False):
            name = f"{'fused' if fused else 'unfused'}, {c} ch, {px} px"
            plain = _conv(c, px, fused=fused)
            compare(f"2 groups: {name}", dataclasses.replace(plain, groups=2), plain)
            if px <= 14:
                compare(f"2x2 kernel: {name}", dataclasses.replace(plain, kernel=2), plain)
    networks = []
    for size in ("b0", "b1", "b3"):
        cpu, gpu = PRESETS[f"cpubone_{size}"], PRESETS[f"lowformer_{size}"]
        ratio = compare(f"cpubone_{size} beside lowformer_{size}", cpu, gpu)
        networks.append(f"CPUBone-{size.upper()} {ratio} of LowFormer-{size.upper()}'s time with {_macs(cpu) / _macs(gpu):.2f} of its MACs")
    blocks = [row for row in rows if "beside" not in row["what"]]
    extra = geometric_mean([row["ratio"] / row["ratio of MACs"] for row in blocks])
    evidence = (
        f"Over {len(blocks)} blocks time falls to {extra:.2f} times what the MACs fall to (1 is in proportion). {'; '.join(networks)}."
    )
    series = [
        Series(
            name=what, x=[row["ratio of MACs"] for row in found], y=[row["ratio"] for row in found],
            std=[row["ratio std"] for row in found],
            labels=[row["what"] for row in found], lines=False,
        )
        for what, found in (
            ("2 groups", [r for r in blocks if r["what"].startswith("2 groups")]),
            ("2x2 kernel", [r for r in blocks if r["what"].startswith("2x2")]),
            ("whole networks", [r for r in rows if "beside" in r["what"]]),
        )
    ]  # fmt: skip
    series.append(Series(name="in proportion", x=[0.3, 1.0], y=[0.3, 1.0]))
    plot = Plot(x_title="ratio of MACs", y_title="ratio of time", series=series)
    return Finding(claim=CLAIMS[13], verdict=verdict_of(sides), evidence=evidence, rows=rows, plots=[plot])


def the_head(times: Times) -> Finding:
    rows, sides, told = [], [], []
    for name in ("lowformer_b0", "lowformer_b1", "lowformer_b3", "lowformer_e1"):
        arch = PRESETS[name]
        head = next(block for block in arch.blocks() if isinstance(block, Head))
        total = cost.count(arch)
        time_share = Ratio.of(times.of(head), times.of(arch))
        macs_share, params_share = _macs(head) / total.macs, cost.of_block(head).params / total.params
        sides.append(time_share.side(macs_share))
        rows.append({"network": name, "share of time": time_share.value, "share of MACs": macs_share, "share of parameters": params_share})
        told.append(f"{name} {100 * time_share.value:.1f} % of the time, {100 * macs_share:.1f} % of the MACs, {100 * params_share:.0f} % of the parameters")  # fmt: skip  # noqa: E501
    evidence = f"{'; '.join(told)}. The head is timed alone with its weights in the caches; in a network it has to fetch them."
    return Finding(claim=CLAIMS[14], verdict=verdict_of(sides), evidence=evidence, rows=rows)


def higher_resolution(times: Times) -> Finding:
    rows, series = [], []
    for name in ("lowformer_b1", "lowformer_e1"):
        archs = [dataclasses.replace(PRESETS[name], resolution_px=px) for px in (160, 192, 224, 256, 288)]
        base = archs[2]
        ratios = [Ratio.of(times.of(arch), times.of(base)) for arch in archs]
        macs = [cost.count(arch).macs / cost.count(base).macs for arch in archs]
        for arch, ratio, m in zip(archs, ratios, macs, strict=True):
            rows.append({"network": name, "px": arch.resolution_px, "ratio": ratio.value, "ratio std": ratio.std, "ratio of MACs": m})
        x = [arch.resolution_px for arch in archs]
        series.append(Series(name=f"{name}: time", x=x, y=[r.value for r in ratios], std=[r.std for r in ratios]))
        series.append(Series(name=f"{name}: MACs", x=x, y=macs))
    at = {(row["network"], row["px"]): row for row in rows}
    told = ", ".join(
        f"{name} {at[name, 288]['ratio']:.2f} times the time with {at[name, 288]['ratio of MACs']:.2f} times the MACs"
        for name in ("lowformer_b1", "lowformer_e1")
    )
    evidence = (
        f"The accuracy (0.4 to 0.9 points at 288 px, as published) cannot be measured without ImageNet. 288 px beside 224 px: {told}."
    )
    plot = Plot(x_title="input resolution, px", y_title="beside 224 px", series=series, line_y=1.0)
    return Finding(claim=CLAIMS[15], verdict="not decided", evidence=evidence, rows=rows, plots=[plot])


# What is compared -------------------------------------------------------------------------------------------------------


def _backbones(times: Times) -> dict[str, Network]:
    """By name; without those that the runtime cannot execute."""
    return {**{name: network for name in TIMM if times.has(network := TimmNetwork(name, 224))}, **PRESETS}


def _random_members() -> list[Arch]:
    space = SearchSpace.load("lowformer")
    return [space.decode(genome) for genome in space.sample(N_RANDOM, rng=np.random.default_rng(0))]


def _conv(channels: int, px: int, *, fused: bool) -> ConvBranch:
    return ConvBranch(channels=channels, resolution_px=px, fused=fused, expansion=4, kernel=3, groups=1, bias=px <= 14)


def _attention(channels: int, px: int, *, stride: int, compression: float, projection: Projection = "fused") -> Lowtention:
    heads, head_dim = Attention(stride=stride, compression=compression).heads_and_dim(channels)
    return Lowtention(
        channels=channels, resolution_px=px, stride=stride, kernel=5 if stride == 2 else 3, heads=heads, head_dim=head_dim,
        projection=projection, norm=True,
    )  # fmt: skip


def _macs(item: Block | Arch) -> int:
    return cost.count(item).macs if isinstance(item, Arch) else cost.of_block(item).macs


def _count(network: Network, count_timm: CountTimm) -> cost.Cost:
    if isinstance(network, TimmNetwork):
        return count_timm(network.name, network.resolution_px)
    counted = cost.count(network)
    return cost.Cost(macs=counted.macs, params=counted.params, activations=counted.activations)


def _as_row(latency: Latency) -> dict[str, float]:
    return {"latency_ms": latency.ms, "latency_std_ms": latency.std_ms}
