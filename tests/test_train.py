"""Training: the same numbers with and without interruption, schedules and augmentation as stated, faults recorded, not fatal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from few_images import few_images
from PIL import Image

from lowsearch.arch import Arch, Attention, Stage, Stem
from lowsearch.data import ImageData, Split
from lowsearch.errors import DataError, StudyError, UsageError
from lowsearch.model.lowformer import build_model
from lowsearch.train import RECIPES, OtherNetwork, Recipe, TrainResult, evaluate, recipe, train
from lowsearch.train.checkpoint import load_tensors
from lowsearch.train.engine import _Run, _score, learning_rate_factor
from lowsearch.train.feed import Images, augmented, resized
from lowsearch.train.recorded import Recorded


def network(*, depth: int = 2, width: int = 8, resolution_px: int = 32) -> Arch:
    late: dict[str, Any] = {"depth": depth, "mlp_ratio": 2, "down_expansion": 2, "expansion": 2}
    return Arch(
        resolution_px=resolution_px, stem=Stem(width=4, stride=1), num_classes=10, head_widths=(32, 32),
        stages=(
            Stage(width=width, down_expansion=2),
            Stage(width=width, down_expansion=2),
            Stage(width=2 * width, attention=Attention(stride=2), **late),
            Stage(width=2 * width, attention=Attention(projection="nearest"), fused=False, **late),
        ),
    )  # fmt: skip


SMALL = network()
BRIEF = Recipe(
    name="brief", epochs=2, train_images=96, batch_size=24, ema_decay=0.9, drop_path=0.1, mlp_dropout=0.1, evaluate_at=(0.25, 0.5, 1.0)
)
"""Eight steps, with everything that draws at random or carries state."""
STEPS = 8


@pytest.fixture(scope="module")
def images() -> ImageData:
    return few_images(train=1500, val=200, test=100)


@pytest.fixture(scope="module")
def uninterrupted(images: ImageData) -> TrainResult:
    return train(SMALL, images, BRIEF, seed=0)


def assert_same(result: TrainResult, expected: TrainResult) -> None:
    def without_time(curve: Any) -> list[Any]:
        return [dataclasses.replace(point, cpu_seconds=0) for point in curve]

    assert without_time(result.curve) == without_time(expected.curve)
    assert result.weights.keys() == expected.weights.keys()
    assert all(torch.equal(result.weights[k], expected.weights[k]) for k in expected.weights)


# --- recorded steps ---------------------------------------------------------------------------------------------------------------


class TrainingCuda(FakeCuda):
    """Operators are carried out while this fake records them, which a GPU does not do: what they did to `model` is undone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Any:
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with super().graph(graph):
            yield
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])


def test_recorded_steps_train_the_same_weights(images: ImageData) -> None:
    plain = dataclasses.replace(BRIEF, drop_path=0.0, mlp_dropout=0.0)
    run = _Run(SMALL, images, plain, seed=0, checkpoint=None, device="cpu", cpu_clock=time.process_time)
    cuda = TrainingCuda(run.model)
    steps = 0

    def step(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal steps
        steps += 1
        return run._compute_gradients(x, labels)

    run._gradients = Recorded(step, cuda)
    assert_same(run.to(1.0, None), train(SMALL, images, plain, seed=0))
    assert steps == Recorded.WARM_UPS + 1 < STEPS and cuda.said[-1] == "record", "Python ran to warm up and to record, and never again"


# --- interruption -----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_step", range(1, STEPS + 1))
def test_interrupted_training_ends_bit_identical(at_step: int, images: ImageData, uninterrupted: TrainResult, tmp_path: Path) -> None:
    def kill(done: float) -> None:
        if round(done * STEPS) == at_step:
            raise Killed

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint, progress=kill)
    steps: list[int] = []
    result = train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint, progress=lambda done: steps.append(round(done * STEPS)))
    assert steps == list(range(at_step + 1, STEPS + 1))  # nothing is done twice
    assert_same(result, uninterrupted)


def test_climbing_rung_by_rung_ends_bit_identical(images: ImageData, uninterrupted: TrainResult, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    first = train(SMALL, images, BRIEF, seed=0, until=0.25, checkpoint=checkpoint)
    assert first.fraction == 0.25 and len(first.curve) == 1
    train(SMALL, images, BRIEF, seed=0, until=0.5, checkpoint=checkpoint)
    assert_same(train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint), uninterrupted)


def test_finished_training_is_not_repeated(images: ImageData, uninterrupted: TrainResult, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint)
    again = train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint, progress=lambda done: pytest.fail("a step was trained"))
    assert_same(again, uninterrupted)


def test_training_survives_kill_9(images: ImageData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    lasting = dataclasses.replace(BRIEF, epochs=16)
    script = (
        "import dataclasses, sys, pathlib, numpy as np\n"
        "from lowsearch.arch import Arch\nfrom lowsearch.data import load_data\nfrom lowsearch.train import Recipe, train\n"
        "data = load_data('fashion-mnist-mini')\n"
        "take = {k: getattr(data, k).take(np.arange(n)) for k, n in (('train', 1500), ('val', 200), ('test', 100))}\n"
        "arch, recipe = Arch.from_json(sys.argv[1]), Recipe(**eval(sys.argv[2]))\n"
        "train(arch, dataclasses.replace(data, **take), recipe, seed=0, checkpoint=pathlib.Path(sys.argv[3]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, SMALL.to_json(), repr(dataclasses.asdict(lasting)), str(checkpoint)])
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < load_tensors(checkpoint)[1]["step"] < 16 * STEPS // 2
    resumed = train(SMALL, images, lasting, seed=0, checkpoint=checkpoint)
    assert_same(resumed, train(SMALL, images, lasting, seed=0))


def test_cpu_seconds_of_resumed_parts_add_up(images: ImageData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    ticks = iter(range(1000))
    half = train(SMALL, images, BRIEF, seed=0, until=0.5, checkpoint=checkpoint, cpu_clock=lambda: next(ticks))
    whole = train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint, cpu_clock=lambda: 1000.0)
    assert half.cpu_seconds > 0
    assert whole.cpu_seconds >= half.cpu_seconds


# --- randomness -------------------------------------------------------------------------------------------------------------------


def test_result_depends_on_the_seed_and_on_nothing_global(images: ImageData, uninterrupted: TrainResult) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert_same(train(SMALL, images, BRIEF, seed=0), uninterrupted)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = train(SMALL, images, BRIEF, seed=1)
    assert any(not torch.equal(other.weights[k], uninterrupted.weights[k]) for k in other.weights)


def test_evaluating_more_often_does_not_change_the_training(images: ImageData, uninterrupted: TrainResult) -> None:
    often = dataclasses.replace(BRIEF, evaluate_at=(0.1, 0.25, 0.4, 0.5, 0.75, 1.0))
    result = train(SMALL, images, often, seed=0)
    assert often.recipe_hash == BRIEF.recipe_hash
    assert all(torch.equal(result.weights[k], uninterrupted.weights[k]) for k in result.weights)


# --- what the engine does ---------------------------------------------------------------------------------------------------------


def test_training_learns(images: ImageData) -> None:
    short = Recipe(name="short", epochs=3, train_images=900, batch_size=32)
    result = train(SMALL, images, short, seed=0)
    assert result.val_accuracy > 0.5
    assert result.curve[-1].train_loss < result.curve[0].train_loss
    assert result.val_accuracy == evaluate(result.model(), images.val, 32)


def two_layers(resolution_px: int = 32) -> OtherNetwork:
    """Two convolutions with norms: no network of ours."""

    def build(seed: int, drop_path: float) -> torch.nn.Module:
        torch.manual_seed(seed)
        layers = [torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(drop_path)]
        return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(32, 10))

    return OtherNetwork(arch_id="two-layers", resolution_px=resolution_px, num_classes=10, total_stride=4, build=build)


def test_another_network_is_trained_as_ours_are_and_resumes_bit_identical(images: ImageData, tmp_path: Path) -> None:
    schedule = dataclasses.replace(BRIEF, mlp_dropout=0.0, epochs=8, learning_rate=0.03)
    through = train(two_layers(48), images, schedule, seed=3)
    assert through.val_accuracy == evaluate(through.model(), images.val, 48) > 0.2
    train(two_layers(48), images, schedule, seed=3, until=0.4, checkpoint=tmp_path / "c.safetensors")
    resumed = train(two_layers(48), images, schedule, seed=3, checkpoint=tmp_path / "c.safetensors")
    assert all(torch.equal(through.weights[name], resumed.weights[name]) for name in through.weights)
    assert not torch.equal(through.weights["0.weight"], train(two_layers(48), images, schedule, seed=4).weights["0.weight"])


def test_what_only_our_networks_have_is_refused_for_another(images: ImageData) -> None:
    with pytest.raises(UsageError, match="mlp_dropout 0.1, which two-layers does not know"):
        train(two_layers(), images, BRIEF, seed=0)


def test_deeper_network_starts_as_its_shallower_neighbour_and_trains_no_worse(images: ImageData) -> None:
    shallow, deep = network(depth=2), network(depth=4)
    first, second = build_model(shallow, seed=0).eval(), build_model(deep, seed=1).eval()
    second.load_state_dict(first.state_dict(), strict=False)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(x), second(x))
    short = Recipe(name="short", epochs=3, batch_size=64)
    losses = {arch.stages[2].depth: train(arch, images, short, seed=0).curve[-1].val_loss for arch in (shallow, deep)}
    assert losses[4] < losses[2] + 0.1, losses


def test_saved_weights_build_the_same_network(uninterrupted: TrainResult, images: ImageData, tmp_path: Path) -> None:
    uninterrupted.save_weights(tmp_path / "w.safetensors")
    model = build_model(SMALL, pretrained=tmp_path / "w.safetensors").eval()
    assert evaluate(model, images.val, 32) == uninterrupted.val_accuracy


def test_learning_rate_rises_linearly_and_falls_as_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 1000, 0.1) for step in range(1000)]
    assert factors[0] < 0.01 and factors[-1] < 1e-5 and max(factors) > 0.999
    assert np.allclose(np.diff(factors[:99], 2), 0, atol=1e-12)
    assert factors[550] == pytest.approx(0.5, abs=0.01)  # middle of the cosine
    assert [learning_rate_factor(s, 4, 0.0) for s in (0, 3)] == pytest.approx([0.962, 0.038], abs=0.001)


def test_augmentation_shifts_with_repeated_border_and_mirrors() -> None:
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    chosen = torch.tensor([3, 0, 3, 4] * 10)
    out = augmented(torch.from_numpy(stored), chosen, dataclasses.replace(BRIEF, shift=0.125), np.random.default_rng(1)).numpy()
    padded = np.pad(stored, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    seen = set()
    for image, index in zip(out, chosen.tolist(), strict=True):
        variants = {
            (y, x, mirrored): window[:, ::-1] if mirrored else window
            for y in range(5)
            for x in range(5)
            for mirrored in (False, True)
            for window in (padded[index, y : y + 16, x : x + 16],)
        }
        matches = [key for key, variant in variants.items() if np.array_equal(variant, image)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len({key[:2] for key in seen}) > 10 and len({key[2] for key in seen}) == 2


def test_augmentation_that_is_off_changes_nothing() -> None:
    stored = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    off = dataclasses.replace(BRIEF, shift=0.0, flip=False)
    assert torch.equal(augmented(stored, torch.tensor([2, 5]), off, np.random.default_rng(0)), stored[[2, 5]])


@pytest.mark.parametrize("px", [24, 32, 48, 64])
def test_resizing_agrees_with_pillow(px: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    stored = np.stack([np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in coarse])
    expected = np.stack([np.asarray(Image.fromarray(i).resize((px, px), Image.Resampling.BILINEAR)) for i in stored])
    assert np.abs(resized(stored, px).numpy().astype(int) - expected).max() <= 1


def test_score_counts_hits_and_averages_the_loss() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0.0, math.log(3.0)]).expand(len(x), 2)

    accuracy, loss = _score(Fixed(), Images(np.zeros((600, 8, 8, 3), dtype=np.uint8), 8), torch.tensor([1] * 450 + [0] * 150))
    assert accuracy == 0.75
    assert loss == pytest.approx(0.75 * -math.log(0.75) + 0.25 * -math.log(0.25))


def test_networks_of_other_resolution_see_resized_images(images: ImageData) -> None:
    result = train(network(resolution_px=48), images, dataclasses.replace(BRIEF, epochs=1), seed=0)
    assert result.fraction == 1.0 and 0 <= result.val_accuracy <= 1


# --- faults -----------------------------------------------------------------------------------------------------------------------


def test_divergence_is_recorded_as_guessing_not_raised(images: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wild = dataclasses.replace(BRIEF, learning_rate=1e30, ema_decay=None)
    with caplog.at_level(logging.WARNING):
        result = train(SMALL, images, wild, seed=0, until=0.5, checkpoint=tmp_path / "c.safetensors")
    assert result.diverged and result.val_accuracy == 0.1 and "diverged at step" in caplog.text
    resumed = train(SMALL, images, wild, seed=0, checkpoint=tmp_path / "c.safetensors")
    assert resumed.diverged and resumed.fraction == 1.0 and resumed.val_accuracy == 0.1


@pytest.mark.parametrize("change", ["arch", "recipe", "seed", "data"])
def test_checkpoint_of_another_training_is_refused(change: str, images: ImageData, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train(SMALL, images, BRIEF, seed=0, until=0.25, checkpoint=checkpoint)
    content = checkpoint.read_bytes()
    other: dict[str, Any] = {"arch": SMALL, "data": images, "recipe": BRIEF, "seed": 0}
    fewer = images.val.take(np.arange(100))
    other[change] = {
        "arch": network(depth=3), "recipe": dataclasses.replace(BRIEF, epochs=3), "seed": 1, "data": dataclasses.replace(images, val=fewer),
    }[change]  # fmt: skip
    with pytest.raises(StudyError, match="was made with"):
        train(other["arch"], other["data"], other["recipe"], seed=other["seed"], checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_damaged_checkpoint_costs_time_but_no_number(
    kept: float, images: ImageData, uninterrupted: TrainResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train(SMALL, images, BRIEF, seed=0, until=0.5, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[: int(kept * checkpoint.stat().st_size)])
    with caplog.at_level(logging.WARNING):
        assert_same(train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint), uninterrupted)
    assert "training starts again" in caplog.text


def test_failed_write_leaves_the_old_checkpoint_and_no_litter(images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "c.safetensors"
    train(SMALL, images, BRIEF, seed=0, until=0.25, checkpoint=checkpoint)
    content = checkpoint.read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        train(SMALL, images, BRIEF, seed=0, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content and list(tmp_path.iterdir()) == [checkpoint]


def test_data_with_other_classes_is_refused(images: ImageData) -> None:
    with pytest.raises(DataError, match="the network has 7 classes"):
        train(dataclasses.replace(SMALL, num_classes=7), images, BRIEF, seed=0)


@pytest.mark.parametrize("until", [0.0, -1.0, 1.5])
def test_impossible_fraction_is_refused(until: float, images: ImageData) -> None:
    with pytest.raises(UsageError, match="until is"):
        train(SMALL, images, BRIEF, seed=0, until=until)


def test_more_batch_than_images_still_trains(images: ImageData) -> None:
    tiny = dataclasses.replace(images, train=images.train.take(np.arange(20)))
    result = train(SMALL, tiny, dataclasses.replace(BRIEF, batch_size=64, epochs=1), seed=0)
    assert result.fraction == 1.0


# --- recipes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""), ("epochs", 0), ("train_images", 0), ("batch_size", 1), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("warmup_fraction", 1.0), ("weight_decay", -0.1),
        ("beta2", 1.0), ("grad_clip", 0.0), ("label_smoothing", 1.0), ("shift", 0.5), ("ema_decay", 1.0),
        ("drop_path", 1.0), ("mlp_dropout", -0.1), ("evaluate_at", ()), ("evaluate_at", (0.5,)), ("evaluate_at", (0.5, 0.25, 1.0)),
    ],
)  # fmt: skip
def test_impossible_recipe_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"recipe: {field} is"):
        dataclasses.replace(BRIEF, **{field: value})


def test_recipe_hash_follows_what_influences_the_weights() -> None:
    changes: dict[str, Any] = {
        "epochs": 3, "train_images": 48, "batch_size": 12, "learning_rate": 0.1, "warmup_fraction": 0.2, "weight_decay": 0.1,
        "beta2": 0.95, "grad_clip": 2.0, "label_smoothing": 0.0, "flip": False, "shift": 0.1,
        "ema_decay": None, "drop_path": 0.2, "mlp_dropout": 0.2, "loss": "bce", "random_crop": 0.5, "auto_augment": "original",
        "erasing": 0.1, "mixup": 0.1, "cutmix": 0.1, "resolutions": (0.5, 1.0),
    }  # fmt: skip
    hashes = {dataclasses.replace(BRIEF, **{k: v}).recipe_hash for k, v in changes.items()}
    assert len(hashes | {BRIEF.recipe_hash}) == len(changes) + 1
    of_teacher = {"teacher", "teacher_hash", "teacher_weight", "teacher_temperature"}  # tests/test_recipes.py
    assert changes.keys() | of_teacher | {"name", "evaluate_at"} == {f.name for f in dataclasses.fields(Recipe)}
    assert dataclasses.replace(BRIEF, name="x", evaluate_at=(1.0,)).recipe_hash == BRIEF.recipe_hash
    json.dumps(BRIEF.to_dict())


def test_recipes_are_found_by_name_and_misses_are_helped() -> None:
    for name in RECIPES:
        assert recipe(name).name == name
    with pytest.raises(UsageError, match="did you mean 'micro'"):
        recipe("micor")


def test_splits_are_not_modified_by_training(images: ImageData) -> None:
    before = images.data_hash
    train(SMALL, images, dataclasses.replace(BRIEF, epochs=1), seed=0)
    assert dataclasses.replace(images, train=Split(images=images.train.images, labels=images.train.labels)).data_hash == before


@pytest.mark.gpu
def test_a_real_gpu_trains_as_well_from_a_recording(images: ImageData) -> None:
    plain = dataclasses.replace(BRIEF, drop_path=0.0, mlp_dropout=0.0)
    recorded = train(SMALL, images, plain, seed=0, device="cuda")
    run = _Run(SMALL, images, plain, seed=0, checkpoint=None, device="cuda", cpu_clock=time.process_time)
    run._gradients = run._compute_gradients
    step_by_step = run.to(1.0, None)
    assert [point.train_loss for point in recorded.curve] == pytest.approx([point.train_loss for point in step_by_step.curve], rel=1e-3)
    assert evaluate(recorded.model(), images.test, 32, device="cuda") == pytest.approx(step_by_step.val_accuracy, abs=0.2)
