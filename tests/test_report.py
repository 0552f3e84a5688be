"""The report: its tables against hand-computed values, its page against what a browser and a hostile name would do to it.

The studies here are made up (`make_study`): real members of the micro space with invented latencies and accuracies.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lowsearch import cost
from lowsearch.arch import Arch
from lowsearch.errors import StudyError
from lowsearch.presets import PRESETS
from lowsearch.report import figures, sections, tables
from lowsearch.report.page import build_report, page, page_data, script_json
from lowsearch.report.study_files import Network, StudyFiles, read_study
from lowsearch.report.tables import Estimate
from lowsearch.space import SearchSpace

MS_PER_MMAC = {"stem": 0.03, "conv": 0.02, "downsampler": 0.022, "attention": 0.05, "mlp": 0.018, "head": 0.06}
OVERHEAD_MS = 0.004
CHANCE = 0.1


def blocks_of(arch: Arch) -> list[dict[str, Any]]:
    """Invented per-block latencies: a rate per kind of block and an overhead; depthwise convolutions get fewer MACs a second."""
    rows = []
    for i, (place, block, its_cost) in enumerate(cost.count(arch).per_block):
        slow = 2.2 if not getattr(block, "fused", True) else 1.0
        ms = OVERHEAD_MS + its_cost.macs / 1e6 * MS_PER_MMAC[block.kind] * slow
        source = "predicted" if i % 5 == 3 else "measured"
        rows.append({"place": place, "kind": block.kind, "ms": ms, "source": source, "macs": its_cost.macs, "params": its_cost.params})
    return rows


def invented_accuracy(arch: Arch, latency_ms: float, rng: np.random.Generator) -> float:
    attention = sum(stage.attention is not None for stage in arch.stages)
    return float(0.905 - 0.035 / math.sqrt(latency_ms / 0.1) + 0.006 * attention + rng.normal(0, 0.006))


def network_row(arch: Arch, rng: np.random.Generator, **values: Any) -> dict[str, Any]:
    blocks = blocks_of(arch)
    predicted_ms = sum(block["ms"] for block in blocks)
    total = cost.count(arch)
    return {
        "arch_id": arch.arch_id, "name": "", "origin": "proposed", "state": "complete", "rung": 1.0,
        "val_accuracy": invented_accuracy(arch, predicted_ms, rng), "accuracy_std": 0.006, "accuracy_source": "trained",
        "latency_ms": predicted_ms, "latency_std_ms": 0.03 * predicted_ms, "latency_source": "predicted",
        "macs": total.macs, "params": total.params, "resolution_px": arch.resolution_px, **values,
    }  # fmt: skip


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_study(folder: Path, *, finished: bool = True, seed: int = 0, limit_ms: float | None = None, n_proposed: int = 40) -> Path:
    """A made-up study in `folder`, in the form that `lowsearch run` leaves; `finished=False` stops before the final training."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    space = SearchSpace.load("lowformer-micro")
    archs = {name: arch for name, arch in space.family.items()}
    proposed = sorted((space.decode(g) for g in space.sample(4 * n_proposed, rng=rng)), key=lambda a: a.arch_id)[:n_proposed]
    candidates = [
        network_row(arch, rng, number=i, name=name, origin="family", elapsed_s=60 + 6 * i) for i, (name, arch) in enumerate(archs.items())
    ]
    for i, arch in enumerate(proposed, start=len(archs)):
        row = network_row(arch, rng, number=i, rung=float(rng.choice([0.25, 0.5, 1.0])), elapsed_s=100 + 9 * i)
        if row["rung"] < 1:
            row |= {"accuracy_source": "predicted", "accuracy_std": 0.012}
        candidates.append(row)
    by_id = {arch.arch_id: arch for arch in (*archs.values(), *proposed)}
    write_csv(folder / "candidates.csv", candidates)
    sample = []
    for genome in space.sample(300, rng=rng):
        row = network_row(space.decode(genome), rng, accuracy_source="predicted", accuracy_std=0.02, origin="random", state="", rung="")
        sample.append(row)
    write_csv(folder / "space_sample.csv", sample)
    steps = np.cumsum(rng.exponential(0.01, len(candidates)))
    volume = 0.62 + 0.2 * (1 - np.exp(-steps * 8))
    rows = [{"elapsed_s": c["elapsed_s"], "trial": c["number"], "hypervolume": float(v)} for c, v in zip(candidates, volume, strict=True)]
    write_csv(folder / "hypervolume.csv", rows)
    networks = {arch_id: {"arch": arch.to_dict(), "blocks": blocks_of(arch)} for arch_id, arch in by_id.items()}
    (folder / "networks.json").write_text(json.dumps(networks))
    slowest = max(c["latency_ms"] for c in candidates if c["origin"] == "family")
    spent_s = {"profile": 96.0, "calibrate": 41.0, "search": 480.0, "finals": 171.0} if finished else {"profile": 96.0, "search": 120.0}
    settings = {
        "schema": 1, "name": folder.name, "objective": "acc-latency", "space": "lowformer-micro", "space_size": space.size(),
        "device": "cpu", "device_name": "Made-up Processor 9000", "runtime": "onnxruntime", "precision": "fp32", "batch": 1, "threads": 1,
        "data": "fashion-mnist-mini", "data_hash": "0123456789abcdef", "images": {"train": 8000, "val": 2000, "test": 2000}, "classes": 10,
        "seed": seed, "sampler": "lowsearch", "budget": "8m", "created": "2026-11-23T06:30:00+00:00",
        "spent_s": spent_s, "reference_point": {"accuracy": CHANCE, "latency_ms": 1.1 * slowest},
        "versions": {"lowsearch": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.32.0", "python": "3.11.7"},
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    if finished:
        finalists = []
        best = [c for c in candidates if c["origin"] != "family" and c["rung"] == 1]
        best = [c for c in best if not any(o["latency_ms"] < c["latency_ms"] and o["val_accuracy"] > c["val_accuracy"] for o in best)]
        for row in [c for c in candidates if c["origin"] == "family"] + best:
            predicted_ms = row["latency_ms"]
            ours = row["origin"] != "family"
            val = row["val_accuracy"] + rng.normal(0, 0.003) + 0.02 * ours
            latency_ms = predicted_ms * float(rng.normal(1.0, 0.03)) * (0.8 if ours else 1)
            finalists.append({
                "arch_id": row["arch_id"], "name": row["name"], "origin": row["origin"], "val_accuracy": val,
                "test_accuracy": val + rng.normal(-0.002, 0.005), "accuracy_std": 0.0055, "accuracy_std_origin": "seeds and test images",
                "accuracy_source": "trained", "latency_ms": latency_ms, "latency_std_ms": 0.015 * latency_ms, "latency_source": "measured",
                "predicted_latency_ms": predicted_ms * (0.8 if ours else 1), "limit_ms": limit_ms or "",
                "over_limit": bool(limit_ms and latency_ms > limit_ms), "macs": row["macs"], "params": row["params"],
                "resolution_px": row["resolution_px"], "on_front": False, "weights": f"models/{row['arch_id']}/model.safetensors",
            })  # fmt: skip
        for row in finalists:
            row["on_front"] = not any(o["latency_ms"] < row["latency_ms"] and o["val_accuracy"] > row["val_accuracy"] for o in finalists)
        write_csv(folder / "finalists.csv", finalists)
        write_csv(folder / "front.csv", [row for row in finalists if row["on_front"]])
        names = (
            "arch_id",
            "name",
            "origin",
            "latency_ms",
            "latency_std_ms",
            "latency_source",
            "predicted_latency_ms",
            "limit_ms",
            "over_limit",
        )
        write_csv(folder / "shortlist.csv", [{name: row[name] for name in names} for row in finalists])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    return read_study(make_study(tmp_path_factory.mktemp("finished") / "made-up", limit_ms=0.6))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> StudyFiles:
    return read_study(make_study(tmp_path_factory.mktemp("running") / "made-up", finished=False))


def final(arch_id: str, *, ms: float, val: float, test: float | None = None, origin: str = "proposed", **values: Any) -> Network:
    """A finalist with standard errors of 0.4 points and 1 % of the latency."""
    given = {"accuracy_std": 0.004, "latency_std_ms": 0.01 * ms, "latency_source": "measured", "accuracy_source": "trained", **values}
    test = val if test is None else test
    return Network(arch_id=arch_id, origin=origin, val_accuracy=val, test_accuracy=test, latency_ms=ms, **given)


def study_of(*finalists: Network, **settings: Any) -> StudyFiles:
    return StudyFiles(folder=Path("made-up"), settings=settings, finalists=finalists, shortlist=finalists)


# ---- reading


def test_missing_files_are_named_and_tolerated(tmp_path: Path):
    (tmp_path / "study.yaml").write_text("objective: acc-latency\n")
    study = read_study(tmp_path)
    assert set(study.missing) == {
        "candidates.csv", "finalists.csv", "front.csv", "space_sample.csv", "hypervolume.csv", "networks.json"
    }  # fmt: skip
    assert "not finished" in page(study)


def test_a_folder_without_a_study_is_refused_with_the_command(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StudyError) as caught:
            build_report(folder)
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("lowsearch run")


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("finalists.csv", ",trained,", ",trained,fast", "latency_ms"),
        ("finalists.csv", ",measured,", ",measured,-", "predicted_latency_ms"),
        ("finalists.csv", ",True,", ",maybe,", "on_front"),
        ("finalists.csv", ",trained,", ",", "expected 19 values"),
        ("candidates.csv", ",complete,", ",complete,7", "rung"),
        ("candidates.csv", ",complete,1.0,", ",complete,inf,", "rung"),
        ("networks.json", '"arch"', '"architecture"', "arch_id to arch and blocks"),
        ("networks.json", "{", "", "not JSON"),
        ("study.yaml", "objective:", "objective: [", "not YAML"),
        ("study.yaml", "acc-latency", "acc-speed", "objective"),
        ("study.yaml", "search: 480.0", "search: soon", "spent_s"),
    ],
)
def test_a_damaged_file_is_refused_by_name_line_and_column(tmp_path: Path, file: str, old: str, new: str, said: str):
    folder = make_study(tmp_path / "made-up", n_proposed=8)
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    before = sorted(folder.iterdir())
    with pytest.raises(StudyError) as caught:
        build_report(folder)
    assert file in caught.value.message
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert sorted(folder.iterdir()) == before


def test_unknown_numbers_are_nan_and_flags_are_read(finished: StudyFiles):
    assert all(math.isnan(network.rung) for network in finished.finalists)
    assert 0 < sum(network.on_front for network in finished.finalists) < len(finished.finalists)
    assert all(network.limit_ms == 0.6 for network in finished.finalists)


# ---- tables: fronts and comparisons


def test_non_dominated_agrees_with_comparing_every_pair(running: StudyFiles):
    networks = tables.scored_candidates(running)

    def is_beaten(n: Network) -> bool:
        return any(o.latency_ms <= n.latency_ms and o.val_accuracy >= n.val_accuracy and o is not n for o in networks)

    assert tables.non_dominated(running, networks) == sorted((n for n in networks if not is_beaten(n)), key=lambda n: n.latency_ms)


def test_a_network_is_scored_by_its_furthest_rung():
    low = Network(arch_id="a", rung=0.25, val_accuracy=0.9, latency_ms=1.0)
    study = StudyFiles(folder=Path(), settings={}, candidates=(low, replace(low, rung=1.0, val_accuracy=0.8), replace(low, rung=0.5)))
    assert [n.rung for n in tables.scored_candidates(study)] == [1.0]


def test_comparison_picks_on_validation_and_compares_on_test():
    member = final("m", ms=1.0, val=0.80, test=0.80, origin="family")
    lucky = final("lucky", ms=0.9, val=0.84, test=0.81)
    better_on_test = final("other", ms=0.9, val=0.83, test=0.90)
    (comparison,) = tables.against_family(study_of(member, lucky, better_on_test))
    assert comparison.at_equal_latency is lucky
    assert comparison.accuracy_gain.value == pytest.approx(0.01)
    assert comparison.accuracy_gain.std == pytest.approx(0.004 * math.sqrt(2))


def test_comparison_at_equal_accuracy_takes_the_fastest_that_is_not_less_accurate():
    member = final("m", ms=1.0, val=0.80, origin="family")
    fast_but_worse, slow, fast = final("a", ms=0.2, val=0.79), final("b", ms=0.8, val=0.85), final("c", ms=0.5, val=0.80)
    (comparison,) = tables.against_family(study_of(member, fast_but_worse, slow, fast))
    assert comparison.at_equal_accuracy is fast
    assert comparison.latency_change.value == pytest.approx(-0.5)
    assert comparison.latency_change.std == pytest.approx(0.5 * math.hypot(0.01, 0.01))


def test_comparison_says_where_there_is_nothing_to_compare():
    member = final("m", ms=0.1, val=0.95, origin="family")
    (comparison,) = tables.against_family(study_of(member, final("a", ms=1.0, val=0.9)))
    assert comparison.at_equal_latency is None
    assert comparison.at_equal_accuracy is None
    assert math.isnan(comparison.accuracy_gain.value)
    assert tables.against_family(study_of(member)) == []
    assert tables.against_family(study_of(member, final("a", ms=0.1, val=0.99), objective="acc-params")) == []


@pytest.mark.parametrize(
    ("ms", "accuracy", "beaten"),
    [(0.90, 0.85, True), (0.98, 0.85, False), (0.90, 0.805, False), (1.1, 0.9, False), (0.5, 0.7, False)],
)
def test_beaten_needs_two_standard_errors_in_both_axes(ms: float, accuracy: float, beaten: bool):
    member = final("m", ms=1.0, val=0.80, origin="family")
    (comparison,) = tables.against_family(study_of(member, final("a", ms=ms, val=accuracy)))
    assert (comparison.beaten_by is not None) is beaten


def test_unknown_errors_never_count_as_beaten():
    member = final("m", ms=1.0, val=0.8, origin="family")
    network = final("a", ms=0.1, val=0.99, accuracy_std=float("nan"))
    assert not tables.clearly_better(network, member)


def test_error_of_a_mean_counts_a_shared_network_in_full():
    one, m1, m2 = final("a", ms=0.5, val=0.9), final("m1", ms=1.0, val=0.8), final("m2", ms=1.1, val=0.8)
    gain = tables.mean_accuracy_gain([(one, m1), (one, m2)])
    assert gain.value == pytest.approx(0.1)
    assert gain.std == pytest.approx(0.004 * math.sqrt(1 + 0.25 + 0.25))


def test_error_of_a_mean_agrees_with_simulation():
    rng = np.random.default_rng(0)
    networks = [final(str(i), ms=1.0 + i, val=0.8 + 0.01 * i, accuracy_std=0.003 * (i + 1)) for i in range(4)]
    pairs = [(networks[0], networks[2]), (networks[0], networks[3]), (networks[1], networks[3])]
    noise = rng.normal(size=(20_000, 4)) * [n.accuracy_std for n in networks]
    means = sum(noise[:, networks.index(a)] - noise[:, networks.index(b)] for a, b in pairs) / len(pairs)
    assert tables.mean_accuracy_gain(pairs).std == pytest.approx(np.std(means), rel=0.03)


def test_hypervolume_of_one_point_is_a_rectangle_in_log_ms():
    study = study_of(
        final("a", ms=0.5, val=0.9), final("m", ms=1.0, val=0.6, origin="family"), reference_point={"accuracy": 0.1, "latency_ms": 2.0}
    )
    volumes = tables.hypervolumes(study)
    assert volumes is not None
    assert volumes.proposed == pytest.approx(0.8 * math.log(4))
    assert volumes.family == pytest.approx(0.5 * math.log(2))


def test_hypervolume_needs_a_reference_point_and_both_sides():
    family, ours = final("m", ms=1.0, val=0.6, origin="family"), final("a", ms=0.5, val=0.9)
    assert tables.hypervolumes(study_of(family, ours)) is None
    assert tables.hypervolumes(study_of(ours, reference_point={"accuracy": 0.1, "latency_ms": 2.0})) is None


def test_limits_count_the_searchs_own_networks_and_name_the_worst():
    kept = final("a", ms=0.9, val=0.9, limit_ms=1.0)
    broken = final("b", ms=1.2, val=0.9, limit_ms=1.0, over_limit=True)
    slow_member = final("m", ms=9.0, val=0.9, origin="family", limit_ms=1.0, over_limit=True)
    limits = tables.limits(study_of(kept, broken, slow_member))
    assert (limits.n_limited, limits.n_broken, limits.limit_ms) == (2, 1, 1.0)
    assert limits.worst_excess == pytest.approx(0.2)


def test_throughput_is_an_axis_on_which_more_is_better():
    batch, ms = 8, (1.0, 2.0, 4.0)
    values = [{"throughput_ips": 1000 * batch / x, "time_per_image_ms": x / batch, "limit_ms": 3.0, "peak_memory_mb": 12.5} for x in ms]
    finalists = [final(str(i), ms=x, val=0.7 + 0.05 * i, on_front=True, **values[i]) for i, x in enumerate(ms)]
    study = study_of(*finalists, objective="acc-throughput", batch=batch, limits=["peak_memory_mb <= 20"])
    x, y = tables.plot_axes(study, "validation")
    assert (x.title, y.title) == ("Throughput, images/s", "Validation accuracy, %")
    assert x.std(finalists[1]) / x.value(finalists[1]) == pytest.approx(finalists[1].latency_std_ms / 2.0)
    assert [n.arch_id for n in tables.non_dominated(study, finalists)] == ["0", "1", "2"]
    at, text = tables.limit_on(study, x)
    assert at == pytest.approx(8000 / 3) and text == "limit 2667 images/s"
    assert tables.limit_on(study, y) is None
    drawn = figures.front_figure(study, split="validation")
    front = next(trace for trace in drawn.data if trace.name == "Final front")
    assert list(front.x) == [2000, 4000, 8000] and front.line.shape == "vh"  # What is dominated lies to the left of each point.
    assert tables.asked_metrics(study) == {"accuracy", "throughput_ips", "peak_memory_mb"}
    table = sections._networks(study)
    assert "Peak memory" in table and "12.5 MB" in table and "4000 images/s" in table and "File size" not in table


def test_prediction_error_is_of_measured_networks_only():
    measured = [final(str(i), ms=ms, val=0.9, predicted_latency_ms=1.0) for i, ms in enumerate((0.9, 1.02, 1.3))]
    from_table = final("t", ms=5.0, val=0.9, predicted_latency_ms=1.0, latency_source="table")
    error = tables.prediction_error(study_of(*measured, from_table))
    assert error.n_networks == 3
    assert error.median == pytest.approx(0.1)
    assert error.worst == pytest.approx(0.3)
    assert math.isnan(error.beyond_pace)


def test_the_pace_of_the_machine_is_told_from_the_error_of_the_prediction():
    measured = [final(str(i), ms=1.2 * ms, val=0.9, predicted_latency_ms=1.0) for i, ms in enumerate((0.9, 1.0, 1.02))]
    study = study_of(*measured, pace=1.2)
    assert tables.prediction_error(study).beyond_pace == pytest.approx(0.02)
    assert "20.0 % slower" in sections.limit_card(study).explanation


# ---- tables: costs, stages, numbers


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_the_correlation_of_scipys_ranks(ties: bool):
    from scipy.stats import rankdata

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 50))
    if ties:
        a, b = a.round(), (a + b).round()
    assert tables.spearman(a, b) == pytest.approx(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def test_spearman_of_a_constant_is_not_a_number():
    assert math.isnan(tables.spearman(np.ones(5), np.arange(5)))


def test_largest_ratio_at_equal_macs_agrees_with_comparing_every_pair(finished: StudyFiles):
    pairs = [(a, b) for a in finished.sample for b in finished.sample if a.macs <= b.macs <= 1.05 * a.macs]
    expected = max(max(a.latency_ms / b.latency_ms, b.latency_ms / a.latency_ms) for a, b in pairs)
    result = tables.cost_against_latency(finished.sample)
    assert result is not None
    # A window may hold two networks that lie further apart than its first and each of them.
    assert expected <= result.largest_ratio <= expected * 1.2


def test_cost_against_latency_needs_three_networks():
    assert tables.cost_against_latency([final("a", ms=1.0, val=0.9, macs=1e6)] * 2) is None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_stage_rows_state_what_the_preset_is(name: str):
    arch = PRESETS[name]
    stem, *stages, head = tables.stage_rows(arch.to_dict())
    assert [row["part"] for row in (stem, *stages, head)] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]
    for number, (row, stage) in enumerate(zip(stages, arch.stages, strict=True), start=1):
        assert (row["px"], row["width"], row["depth"]) == (str(arch.stage_px(number)), str(stage.width), str(stage.depth))
        assert bool(row["attention"]) == (stage.attention is not None)
        assert bool(row["mlp"]) == (stage.mlp_ratio > 0)
        assert row["conv"].startswith(("fused " if stage.fused else "MBConv ") if stage.depth > 1 else "")
        assert row["entry"].startswith("fused" if stage.down_fused else "MBConv")
    assert head["conv"] == f"{arch.num_classes} classes"


def test_details_of_a_network_share_out_its_predicted_latency(finished: StudyFiles):
    details = tables.network_details(finished)
    assert details.keys() == {n.arch_id for n in (*finished.candidates, *finished.finalists)}
    for arch_id, network in details.items():
        assert sum(share for _, _, _, share, *_ in network["blocks"]) == pytest.approx(1)
        arch = Arch.from_dict(finished.networks[arch_id]["arch"])
        assert [row[0] for row in network["blocks"]] == [place for place, _ in arch.named_blocks()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (tables.percent(0.9123, 0.0041), "91.2 ± 0.4 %"),
        (tables.percent(-0.283, 0.03, signed=True), "−28.3 ± 3.0 %"),
        (tables.percent(float("nan")), ""),
        (tables.percent(0.5), "50.0 %"),
        (tables.milliseconds(0.35212, 0.006), "0.352 ± 0.006 ms"),
        (tables.milliseconds(0.0703, 0.00004084), "0.0703 ± 0.00004 ms"),
        (tables.milliseconds(0.0703, 0.00006), "0.0703 ± 0.0001 ms"),
        (tables.milliseconds(0.0703, 0.0), "0.0703 ± 0.0000 ms"),
        (tables.milliseconds(18.04), "18.0 ms"),
        (tables.milliseconds(0.0962), "0.0962 ms"),
        (tables.milliseconds(1234.5), "1234 ms"),
        (tables.milliseconds(float("nan")), ""),
        (tables.count(1_411_000_000), "1.41 G"),
        (tables.count(537_232), "537 K"),
        (tables.count(64), "64"),
        (tables.duration(42.4), "42 s"),
        (tables.duration(485), "8 min 5 s"),
        (tables.duration(480), "8 min"),
        (tables.duration(4320), "1 h 12 min"),
    ],
)
def test_numbers_are_written_for_people(text: str, expected: str):
    assert text == expected


# ---- figures


def traces(figure: Any) -> list[dict[str, Any]]:
    """The traces as the page gets them."""
    return json.loads(figure.to_json())["data"]


def test_front_figure_draws_every_finalist_once_on_both_splits(finished: StudyFiles):
    for split in ("validation", "test"):
        drawn = [t for t in traces(figures.front_figure(finished, split=split)) if t["meta"]["role"] in ("front", "family")]
        ids = [arch_id for trace in drawn for arch_id in trace.get("customdata", ())]
        assert sorted(ids) == sorted(network.arch_id for network in finished.finalists)


def test_front_figure_of_the_test_split_holds_no_validation_numbers(finished: StudyFiles):
    known = {round(100 * n.test_accuracy, 9) for n in finished.finalists}
    assert {round(y, 9) for trace in traces(figures.front_figure(finished, split="test")) for y in trace["y"]} <= known


def test_marker_shape_says_where_the_latency_is_from(finished: StudyFiles):
    def shapes(study: StudyFiles) -> dict[str, set[str]]:
        drawn = [t for t in traces(figures.front_figure(study, split="validation")) if "customdata" in t]
        return {trace["meta"]["role"]: set(trace["marker"]["symbol"]) for trace in drawn}

    assert shapes(finished) == {"random": {"circle-open"}, "candidate": {"circle-open"}, "front": {"circle"}, "family": {"circle"}}
    table = replace(finished, finalists=tuple(replace(n, latency_source="table") for n in finished.finalists))
    assert shapes(table)["front"] == {"square"}


def test_a_study_of_other_objectives_is_drawn_in_them(running: StudyFiles):
    of_params = replace(running, settings={**running.settings, "objective": "acc-params"})
    x, y = tables.plot_axes(of_params, "validation")
    assert (x.title, y.title) == ("Parameters, thousands", "Validation accuracy, %")
    front = tables.best_known_front(of_params)
    others = tables.scored_candidates(of_params)
    assert not any(o.params <= n.params and o.val_accuracy > n.val_accuracy for n in front for o in others)
    of_costs = replace(running, settings={**running.settings, "objective": "latency-macs"})
    assert [axis.title for axis in tables.plot_axes(of_costs, "validation")] == ["Latency, ms", "MACs, millions"]
    for study in (of_params, of_costs):
        assert "The front" in sections.body(study)
        assert page_data(study)["networks"]


def test_a_front_of_three_objectives_is_not_a_line(running: StudyFiles):
    three = replace(running, settings={**running.settings, "objective": "acc-latency-params"})
    lines = [trace for trace in traces(figures.front_figure(three, split="validation")) if trace["mode"] == "lines"]
    assert lines == []


@pytest.mark.parametrize(
    ("objective", "title", "axes"),
    [
        ("acc", "Accuracy against latency", ("Latency, ms", "Validation accuracy, %")),
        ("latency", "The best network", ("Latency, ms", "MACs, millions")),
        ("throughput", "The best network", ("Throughput, images/s", "MACs, millions")),
        ("params", "The best network", ("Latency, ms", "Parameters, thousands")),
        ("macs", "The best network", ("Latency, ms", "MACs, millions")),
    ],
)
def test_a_single_objective_has_a_best_network_and_its_value_over_time(running: StudyFiles, objective: str, title: str, axes: tuple):
    candidates = tuple(replace(n, throughput_ips=1000 / n.latency_ms) for n in running.candidates)
    study = replace(running, candidates=candidates, settings={**running.settings, "objective": objective})
    assert tuple(axis.title for axis in tables.plot_axes(study, "validation")) == axes
    [best] = tables.best_known_front(study)
    [wanted] = tables.objectives(study)
    values = [tables.search_values(n)[wanted.metric] for n in tables.scored_candidates(study)]
    assert tables.search_values(best)[wanted.metric] == (max(values) if wanted.direction == "maximize" else min(values))
    worst = 0.1 if objective == "acc" else 3.0
    distances = wanted.cost(np.array(worst)) - wanted.cost(np.array(values))
    points = tuple(replace(p, hypervolume=float(d)) for p, d in zip(running.hypervolume, distances, strict=False))
    study = replace(study, hypervolume=points, settings={**study.settings, "reference_point": {wanted.metric: worst}})
    assert tables.best_so_far(study) == pytest.approx(values[: len(points)])
    study = replace(study, finalists=(replace(best, on_front=True),))
    body = sections.body(study)
    assert f"<h2>{title}</h2>" in body and "The best over time" in body
    assert f"<h3>Best {'validation accuracy' if objective == 'acc' else wanted.word}</h3>" in body
    assert "Points on the front" not in body
    assert page_data(study)["figures"].keys() == {"validation", "hypervolume", "cost"}


def test_objectives_that_the_main_plot_leaves_out_have_plots_of_their_own(running: StudyFiles):
    study = replace(running, settings={**running.settings, "objective": "acc-latency-macs-params"})
    drawn = page_data(study)["figures"]
    assert {"further-macs", "further-params"} < drawn.keys() and "further-latency_ms" not in drawn
    body = sections.body(study)
    assert "two of 4 objectives" in body and all(f'id="further-{metric}"' in body for metric in ("macs", "params"))
    found = tables.best_known_front(study)
    [front] = [trace for trace in drawn["further-params"]["data"] if trace["meta"]["role"] == "front"]
    assert sorted(front["x"]) == pytest.approx(sorted(n.params / 1e3 for n in found if not n.is_family))
    assert "further-" not in sections.body(running)


def test_a_proxy_is_drawn_as_one_and_never_called_accuracy(running: StudyFiles):
    def with_proxy(network: Network) -> Network:
        unknown = {"val_accuracy": float("nan"), "accuracy_std": float("nan")}
        return replace(network, score=math.log10(network.params), accuracy_source="proxy:params", **unknown)

    study = replace(running, candidates=tuple(map(with_proxy, running.candidates)), sample=())
    study = replace(study, finalists=tuple(replace(n, on_front=True) for n in tables.best_known_front(study)))
    figure = json.loads(str(figures.front_figure(study, split="validation").to_json()))
    assert figure["layout"]["yaxis"]["title"]["text"] == "Rank score (log10 of params), not accuracy"
    assert max(y for trace in figure["data"] for y in trace["y"]) == pytest.approx(max(n.score for n in study.candidates))
    assert tables.against_family(study) == []
    assert tables.hypervolumes(study) is None
    assert "%" not in sections.key_figures(study)[0].explanation
    assert "Nothing was trained: params stand in for accuracy" in sections.body(study)


def test_page_says_whether_the_front_was_measured_again(finished: StudyFiles):
    assert "timed again in fresh processes" in sections.body(finished)
    table = replace(finished, finalists=tuple(replace(n, latency_source="table") for n in finished.finalists))
    assert "were not measured again" in sections.body(table)


def test_every_figure_is_drawn_without_finals(running: StudyFiles):
    assert page_data(running)["figures"].keys() == {"validation", "hypervolume", "cost"}


# ---- the page


@pytest.mark.parametrize("finals", [True, False])
def test_report_is_one_file_that_loads_nothing(tmp_path: Path, finals: bool):
    folder = make_study(tmp_path / "made-up", finished=finals)
    path = build_report(folder)
    assert path == folder / "report.html"
    text = path.read_text()
    outside = text[: text.index("<body>")] + text[text.index('<script type="application/json"') :]
    assert "http://" not in outside
    assert "https://" not in outside
    assert "src=" not in outside.replace("script-src=", "")
    assert "default-src 'none'" in text
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_report_written_twice_is_the_same(tmp_path: Path):
    folder = make_study(tmp_path / "made-up")
    first = build_report(folder).read_bytes()
    assert build_report(folder).read_bytes() == first


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def test_text_from_files_never_becomes_markup(tmp_path: Path):
    folder = make_study(tmp_path / "made-up", n_proposed=8)
    for name in ("candidates.csv", "finalists.csv", "front.csv"):
        with (folder / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        texts = ("name", "origin", "accuracy_source", "accuracy_std_origin", "latency_source")
        write_csv(folder / name, [row | {c: HOSTILE for c in texts if c in row} for row in rows])
    settings = yaml.safe_load((folder / "study.yaml").read_text())
    settings |= dict.fromkeys(("name", "device_name", "space", "data", "sampler", "runtime", "budget", "created"), HOSTILE)
    settings["versions"] = settings["images"] = {}
    settings["versions"] = {HOSTILE: HOSTILE, "lowsearch": HOSTILE}
    (folder / "study.yaml").write_text(yaml.safe_dump(settings))
    networks = json.loads((folder / "networks.json").read_text())
    for network in networks.values():
        for block in network["blocks"]:
            block |= {"place": HOSTILE, "source": HOSTILE}
    (folder / "networks.json").write_text(json.dumps(networks))
    study = read_study(folder)
    assert "<script" not in sections.body(study)
    assert "<img" not in sections.body(study)
    whole = page(study)
    data = whole[whole.index('id="data">') + len('id="data">') :]
    data = data[: data.index("</script>")]
    assert "<" not in data
    shown = json.loads(data)
    assert any(network["label"] == HOSTILE for network in shown["networks"].values())
    hovers = [text for figure in shown["figures"].values() for trace in figure["data"] for text in trace.get("hovertext") or ()]
    assert hovers
    assert not any("<img" in text or "<script" in text for text in hovers)


def test_script_json_round_trips():
    value = {"text": "</script><!--", "number": 0.1, "accents": "é÷×"}
    assert json.loads(script_json(value)) == value
    assert "<" not in script_json(value)


def test_every_finalist_has_a_row_a_choice_and_sources(finished: StudyFiles):
    text = sections.body(finished)
    for network in finished.finalists:
        row = text[text.index(f'<tr data-arch="{network.arch_id}"') :]
        row = row[: row.index("</tr>")]
        assert f'data-choose="{network.arch_id}"' in row
        assert "trained, measured" in row
        assert tables.milliseconds(network.latency_ms, network.latency_std_ms) in row


def test_key_figures_state_numbers_with_their_errors(finished: StudyFiles):
    cards = {card.word: card for card in sections.key_figures(finished)}
    comparisons = tables.against_family(finished)
    gain, n_gain = tables.gain_at_equal_latency(comparisons)
    assert cards["Points on the front"].value == str(len(finished.front))
    assert cards["Accuracy at equal latency"].value == f"{100 * gain.value:+.1f}"
    assert cards["Accuracy at equal latency"].beside == f"± {100 * gain.std:.1f} points"
    assert f"{n_gain} of {len(comparisons)} hand-made networks" in cards["Accuracy at equal latency"].explanation
    assert cards["Broke the latency limit"].value == str(tables.limits(finished).n_broken)
    assert "before training" not in cards["Broke the latency limit"].explanation


@pytest.mark.parametrize(("over", "says"), [(2, "near the limit: 5, over it: 2, the worst by 3.1 %"), (0, "near the limit: 5, over it: 0")])
def test_the_page_says_how_candidates_near_the_limit_fared(finished: StudyFiles, over: int, says: str):
    summary = {"verified": {"networks": 5, "over": over, "worst_excess": 0.031 if over else 0.0}}
    explanation = sections.limit_card(replace(finished, summary={**finished.summary, **summary})).explanation
    assert explanation.endswith(says)


def test_a_study_without_a_limit_says_so(finished: StudyFiles):
    free = replace(finished, shortlist=tuple(replace(n, limit_ms=float("nan"), over_limit=False) for n in finished.shortlist))
    assert sections.key_figures(free)[-1].word == "Latency off its prediction"


def test_page_of_a_running_study_says_what_is_not_there_yet(running: StudyFiles):
    text = sections.body(running)
    assert "not finished" in text
    assert "finalists.csv, front.csv" in text
    assert sections.key_figures(running) == []
    assert "Candidates so far" in text


def test_facts_leave_out_what_is_not_known():
    facts = sections.facts(study_of(objective="acc-latency", batch=1, threads=2))
    assert [fact[:2] for fact in facts] == [("Batch and threads", "batch 1 · 2 threads"), ("Objective", "acc-latency")]


def test_estimate_of_nothing_is_not_a_number():
    empty = tables.mean_accuracy_gain([])
    assert isinstance(empty, Estimate)
    assert math.isnan(empty.value)
    assert math.isnan(empty.std)


# ---- the page in a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=10000", "--window-size=1280,900",
)  # fmt: skip
# What a visitor does, and what the page then shows, as JSON in the title.
VISIT = """
const seen = { errors };
const press = selector => document.querySelector(selector).click();
const panel = () => document.getElementById("panel").textContent;
const names = () => [...document.querySelectorAll("table.sortable tbody tr")].map(row => row.dataset.arch);
const column = i => [...document.querySelectorAll("table.sortable tbody tr")].map(row => Number(row.cells[i].dataset.value));
setTimeout(() => {
  seen.first = panel();
  const last = names().at(-1);
  press(`tr[data-arch="${last}"] button`);
  seen.rowChosen = panel().includes(document.querySelector(`tr[data-arch="${last}"]`).cells[0].textContent);
  const plot = document.getElementById("pareto");
  seen.traces = plot.data.filter(trace => trace.name).map(trace => trace.name);
  const family = plot.data.find(trace => trace.name === "Hand-made family");
  plot.emit("plotly_click", { points: [{ customdata: family.customdata[1] }] });
  seen.clicked = panel();
  seen.command = document.querySelector("[data-command]").textContent;
  const ring = plot.data.at(-1);
  seen.ring = ring.x[0] === family.x[1] && ring.y[0] === family.y[1];
  press("[data-split=test]");
  seen.yTitle = plot.layout.yaxis.title.text;
  const heads = [...document.querySelectorAll("table.sortable th")];
  const latency = heads.findIndex(head => head.textContent === "Latency");
  heads[latency].querySelector("button").click();
  heads[latency].querySelector("button").click();
  seen.sorted = column(latency);
  const before = plot.layout.font.color;
  press("#theme");
  seen.themed = plot.layout.font.color !== before;
  document.title = JSON.stringify(seen);
}, 1500);
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_page_answers_a_visitor_without_an_error(tmp_path: Path):
    folder = make_study(tmp_path / "made-up")
    text = build_report(folder).read_text()
    catch = "<script>const errors = []; onerror = message => errors.push(message);</script></head>"
    (tmp_path / "visit.html").write_text(text.replace("</head>", catch, 1).replace("</body>", f"<script>{VISIT}</script></body>"))
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/visit.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    title = done.stdout[done.stdout.index("<title>") + 7 : done.stdout.index("</title>")]
    seen = json.loads(title.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    study = read_study(folder)
    assert seen["errors"] == []
    assert "Latency by block" in seen["first"]
    assert seen["rowChosen"]
    assert seen["ring"]
    assert seen["themed"]
    member = [n for n in study.finalists if n.is_family][1]
    assert member.name in seen["clicked"]
    assert f"--arch {member.arch_id}" in seen["command"]
    assert seen["yTitle"] == "Test accuracy, %"
    assert seen["sorted"] == sorted((float(f"{n.latency_ms:.9g}") for n in study.finalists), reverse=True)
