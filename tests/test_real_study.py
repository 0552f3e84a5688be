"""The verdict that benchmarks/real_study.py draws, its choice of points, and the whole of it on a handful of images."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from few_images import few_images

from lowsearch.latency.timing import TimmNetwork
from lowsearch.space import SearchSpace

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_study.py"
_spec = importlib.util.spec_from_file_location("real_study", SCRIPT)
assert _spec and _spec.loader
real_study = importlib.util.module_from_spec(_spec)
sys.modules["real_study"] = real_study  # Where dataclasses look for the names of their annotations.
_spec.loader.exec_module(real_study)

TINY = Path(__file__).parent / "tiny_space.yaml"


# The rule --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "points_se", "speedup", "speedup_se", "verdict"),
    [
        (0.0, 0.25, 1.3, 0.01, "faster"),  # Both at their bounds.
        (0.0, 0.26, 1.3, 0.01, ""),  # It may lose more than half a point.
        (-0.4, 0.05, 2.0, 0.01, "faster"),
        (-0.6, 0.01, 9.0, 0.01, ""),
        (0.0, 0.1, 1.29, 0.001, ""),
        (0.9, 0.1, 1.29, 0.001, ""),
        (0.0, 0.1, 1.4, 0.2, ""),  # It may be no faster at all.
        (1.0, 0.4, 1.0, 0.0, "better"),
        (1.0, 0.5, 1.0, 0.0, ""),  # It may be no better at all.
        (0.99, 0.1, 1.0, 0.0, ""),
        (1.5, 0.1, 0.99, 0.01, "better"),  # Slower, but not beyond what measuring leaves open.
        (1.5, 0.1, 0.97, 0.01, ""),
        (1.0, 0.4, 1.5, 0.01, "faster and better"),
        (1.5, 1.1, 1.5, 0.01, ""),  # Its lower end is below the margin, for all that its mean is high.
    ],
)
def test_a_point_dominates_by_the_rule_that_is_stated(points, points_se, speedup, speedup_se, verdict):
    found = real_study.Difference(points=points, points_se=points_se, speedup=speedup, speedup_se=speedup_se)
    assert found.verdict == verdict


def row(right: np.ndarray, latency_ms: float, latency_std_ms: float = 0.0, key: str = "x") -> dict[str, Any]:
    return {"key": key, "correct": right, "latency_ms": latency_ms, "latency_std_ms": latency_std_ms}


def test_a_difference_is_of_means_over_seeds_and_its_speed_up_has_both_errors():
    a, b = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool), np.array([[1, 0, 0, 0], [1, 0, 0, 0]], dtype=bool)
    found = real_study.difference(row(a, 2.0, 0.06), row(b, 4.0, 0.16), 0.0)
    assert (found.points, found.speedup) == pytest.approx((37.5, 2.0))
    assert found.speedup_se == pytest.approx(2.0 * 0.05)


def latency_set(ms: dict[str, float], relative_std: float = 0.01) -> dict[str, dict[str, float]]:
    return {key: {"latency_ms": value, "latency_std_ms": relative_std * value, "wall_over_cpu": 1.0} for key, value in ms.items()}


def test_a_set_that_a_neighbour_slowed_down_does_not_count():
    quiet, slower = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 1.0}, {"a": 1.05, "b": 2.1, "c": 4.2, "d": 1.05}
    disturbed = {"a": 1.5, "b": 2.6, "c": 4.8, "d": 1.5, "refused elsewhere": 1.0}
    latencies, paces = real_study.joined([latency_set(found) for found in (disturbed, quiet, slower)])
    assert paces == pytest.approx([1.4, 1.0, 1.05], abs=0.03)
    assert set(latencies) == {"a", "b", "c", "d"}
    for key, ms in quiet.items():  # Halfway between the two that count, and exactly as they are to each other.
        assert latencies[key]["latency_ms"] == pytest.approx(ms * 1.05**0.5)
        assert latencies[key]["latency_std_ms"] / latencies[key]["latency_ms"] == pytest.approx(0.01 / 2**0.5)


def test_what_sets_disagree_by_is_part_of_the_error():
    rng = np.random.default_rng(0)
    truth = np.exp(rng.uniform(-2, 0, 40))
    sets = [latency_set({str(i): ms * np.exp(0.05 * rng.normal()) for i, ms in enumerate(truth)}) for _ in range(4)]
    latencies, _ = real_study.joined(sets)
    log_ms = np.log([found["latency_ms"] for found in latencies.values()])
    relative_std = np.array([found["latency_std_ms"] / found["latency_ms"] for found in latencies.values()])
    assert np.std((log_ms - np.log(truth)) / relative_std) == pytest.approx(1.0, abs=0.3)


def test_the_pace_since_a_study_is_that_of_its_finalists():
    studies = [{"seed": 3, "measured_ms": {"a": 1.0, "b": 2.0, "c": 4.0, "gone": 1.0}}]
    assert real_study.paces_since(studies, latency_set({"a": 1.3, "b": 2.6, "c": 4.0})) == {"3": 1.3}


def test_the_standard_error_is_that_of_repeated_experiments():
    """New images and new seeds every time; both networks see the same images."""
    rng = np.random.default_rng(0)
    n_seeds, n_images, repeats = 3, 250, 800
    differences, stated = [], []
    for _ in range(repeats):
        image = rng.normal(0.6, 0.3, n_images)
        a, b = (
            image + rng.normal(0, 0.2, n_images) + rng.normal(0, 0.04, (n_seeds, 1)) > rng.random((n_seeds, n_images)) for _ in range(2)
        )
        seed_var = np.mean([real_study.pooled_seed_variance([x.mean(1)]) for x in (a, b)])
        differences.append(a.mean() - b.mean())
        stated.append(real_study.standard_error(a.astype(float), b.astype(float), seed_var) ** 2)
    assert np.mean(stated) == pytest.approx(np.var(differences), rel=0.2)


def test_the_noise_of_single_images_is_counted_once():
    rng = np.random.default_rng(1)
    noise = rng.random((3, 4000)) < 0.5
    assert real_study.interaction(noise.astype(float)) == pytest.approx(0.25, rel=0.05)
    assert real_study.interaction(np.repeat(noise[:1], 3, axis=0).astype(float)) == pytest.approx(0.0)
    assert real_study.interaction(noise[:1].astype(float)) == 0.0


def test_the_variance_over_seeds_is_pooled_by_degrees_of_freedom():
    equal = [[0.5, 0.6, 0.7], [0.1, 0.1, 0.4]]
    assert real_study.pooled_seed_variance(equal) == pytest.approx(np.mean([np.var(x, ddof=1) for x in equal]))
    assert real_study.pooled_seed_variance([[0.5, 0.7], [0.3]]) == pytest.approx(0.02)
    assert real_study.pooled_seed_variance([[0.3]]) == 0.0


def test_against_a_member_stands_the_point_that_dominates_it_or_else_the_nearest():
    right = {share: np.arange(100) < share for share in (50, 70, 90)}
    member = row(np.stack([right[70]] * 2), 1.0)
    slow, fast, better = (
        row(np.stack([right[s]] * 2), ms, key=key) for s, ms, key in ((90, 1.5, "slow"), (50, 0.5, "fast"), (90, 1.0, "better"))
    )
    assert real_study.best_against([slow, fast, better], member, 0.0)[0] == "better"
    key, difference = real_study.best_against([slow, fast], member, 0.0)
    assert key == "fast" and not difference.verdict, "a slower one is no replacement, however accurate"


# The choice of points --------------------------------------------------------------------------------------------------


def point(name: str, latency_ms: float, val_accuracy: float) -> dict[str, Any]:
    return {"arch_id": name, "latency_ms": latency_ms, "val_accuracy": val_accuracy}


FRONT = [point("a", 1.0, 0.50), point("b", 2.0, 0.60), point("c", 3.9, 0.70), point("d", 8.0, 0.75), point("e", 30.0, 0.80)]


def names(points) -> list[str]:
    return [p["arch_id"] for p in points]


def test_every_member_gets_the_most_accurate_point_that_is_clearly_faster():
    members = [point("m", 5.2, 0.6), point("n", 10.4, 0.7)]
    assert names(real_study.choose(FRONT, members, 2)) == ["c", "d"]


def test_a_member_with_no_clearly_faster_point_gets_one_that_is_no_slower():
    assert names(real_study.choose(FRONT, [point("m", 1.1, 0.4)], 1)) == ["a"]
    assert names(real_study.choose(FRONT[1:], [point("m", 1.1, 0.4)], 1)) == ["e"], "and with neither, any of the front"


@pytest.mark.parametrize("n", range(1, 7))
def test_the_number_of_points_is_bounded_and_they_are_spread(n):
    members = [point(f"m{ms}", ms, 0.6) for ms in (1.3, 2.6, 5.2, 10.4, 39.0)]
    chosen = names(real_study.choose(FRONT, members, n))
    assert len(chosen) == len(set(chosen)) == min(n, len(FRONT))
    if n > 1:
        assert chosen[0] == "a" and chosen[-1] == "e" and chosen == sorted(chosen)
    assert real_study.choose([], members, n) == []


def test_test_images_choose_nothing(tmp_path):
    """What is read of a study's finalists holds no test accuracy."""
    columns = "arch_id,name,origin,val_accuracy,test_accuracy,latency_ms,on_front"
    lines = [columns, "a1,,proposed,0.5,0.9,1.0,true", "a2,,proposed,0.4,0.9,2.0,false", "f1,micro,family,0.6,0.1,3.0,true"]
    (tmp_path / "finalists.csv").write_text("\n".join(lines))
    front, members = real_study.front_of(tmp_path)
    assert (names(front), names(members)) == (["a1"], ["f1"])
    assert not any("test_accuracy" in found for found in front + members)


# Small parts -----------------------------------------------------------------------------------------------------------


def test_which_images_were_right_is_kept_bit_for_bit():
    right = np.random.default_rng(0).random(203) < 0.6
    stored = {"correct": np.packbits(right).tobytes().hex(), "n_test": 203}
    assert (real_study._unpacked(json.loads(json.dumps(stored))) == right).all()


def test_a_network_of_timm_starts_from_weights_that_its_seed_determines():
    network = real_study.as_trained(TimmNetwork("test_efficientnet", 32, 10))
    first, again, other = (network.build(seed, 0.0).state_dict() for seed in (3, 3, 4))
    assert all((first[name] == again[name]).all() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds 1: the spread between seeds needs at least 2"),
        (["--timm", "resnet18"], "--timm 'resnet18': expected NAME@PX"),
        (["--timm", "resnet_18@32"], "unknown network 'resnet_18'"),
        (["--data", "npz:absent.npz"], "is not a file"),
        (["--report"], "holds no finished studies"),
    ],
)
def test_a_wrong_flag_is_one_clear_line_before_anything_runs(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["real_study.py", "--folder", str(tmp_path / "work"), *flags])
    monkeypatch.setattr(real_study, "invoke", lambda _: pytest.fail("a study was begun"))
    with pytest.raises(SystemExit) as stop:
        real_study.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[0]


# The whole -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_survives_kills_repeats_nothing_and_ends_with_a_verdict(tmp_path):
    images, arrays = few_images(train=384, val=100, test=203), {}
    for name in ("train", "val", "test"):
        split = getattr(images, name)
        arrays |= {f"x_{name}": split.images, f"y_{name}": split.labels}
    np.savez(tmp_path / "few.npz", **arrays)
    command = [sys.executable, str(SCRIPT), "--data", "npz:few.npz", "--space", str(TINY), "--recipe-set", "epochs=1"]
    command += ["--studies", "0", "1", "--trials", "3", "--points", "2", "--seeds", "2", "--timm", "test_efficientnet@32"]
    command += ["--folder", "work", "--out", "result.json"]
    trainings = tmp_path / "work" / "trainings"

    def killed_when(reached) -> None:
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while running.poll() is None and not reached():
            time.sleep(0.05)
        assert running.poll() is None, "it was to be killed before its end"
        running.send_signal(signal.SIGKILL)  # It alone: its children have to notice.
        running.wait()

    def finished() -> dict[Path, tuple[str, int]]:
        return {path: (path.read_text(), path.stat().st_mtime_ns) for path in trainings.glob("*.json")}

    killed_when(lambda: (tmp_path / "work" / "studies" / "real-0" / "records.jsonl").exists())
    killed_when(lambda: len(list(trainings.glob("*.json"))) >= 2)
    before = finished()
    subprocess.run(command, cwd=tmp_path, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    after = finished()
    assert before.items() <= after.items(), "a training that was done is not done again"
    n_networks = len(result["networks"])
    assert result["trainings"] == {"asked": 2 * n_networks, "done": 2 * n_networks} and len(after) == 2 * n_networks
    origins = [network["origin"] for network in result["networks"]]
    assert origins.count("family") == len(SearchSpace.load(TINY).family) == 2
    chosen = {found["seed"]: [p["arch_id"] for p in found["points"]] for found in result["studies"]}
    assert origins.count("timm") == 1 and origins.count("proposed") == len({arch_id for points in chosen.values() for arch_id in points})
    judged = {(member, study) for member in ("tiny-plain", "tiny-deep") for study, points in chosen.items() if points}
    assert {(v["against"], v["study"]) for v in result["verdicts"]} == judged
    assert "/" not in result["data"] + result["space"] and str(tmp_path) not in json.dumps(result)
    assert len(result["latency_sets"]) == 4 and set(result["pace_since_studies"]) == {"0", "1"}
    assert all(network["latency_ms"] > 0 and len(network["test_accuracies"]) == 2 for network in result["networks"])

    measured = (tmp_path / "work" / "latencies.json").stat().st_mtime_ns
    subprocess.run(command, cwd=tmp_path, check=True)
    assert finished() == after and (tmp_path / "work" / "latencies.json").stat().st_mtime_ns == measured, "all of it was done"
    subprocess.run([*command[:2], "--report", "--folder", "work", "--out", "again.json"], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "result.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "trainings").mkdir(parents=True)
    for name in ("contest.json", "latencies.json"):
        (elsewhere / name).write_text((tmp_path / "work" / name).read_text())
    for path in sorted(trainings.glob("*.json"))[1:]:
        (elsewhere / "trainings" / path.name).write_text(path.read_text())
    subprocess.run([*command[:2], "--contest", "--folder", "elsewhere", "--out", "again.json"], cwd=tmp_path, check=True)
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["verdicts"] == json.loads((tmp_path / "result.json").read_text())["verdicts"], "one training made anew, the others copied"
    # Bit for bit what an undisturbed training gives.
    path = next(iter(before))
    content = path.read_text()
    path.unlink()
    subprocess.run(command, cwd=tmp_path, check=True)
    alike, again = json.loads(content), json.loads(path.read_text())
    assert {**again, "cpu_seconds": 0} == {**alike, "cpu_seconds": 0}
