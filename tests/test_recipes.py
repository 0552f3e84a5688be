"""Recipes beyond the micro one: what timm adds is drawn by (seed, step), says what it should, and changes no hash where it is off."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from few_images import few_images
from safetensors.torch import save_file
from test_train import SMALL, TrainingCuda, assert_same, network

from lowsearch.accuracy.records import AccuracyRecords
from lowsearch.cli import invoke
from lowsearch.data import IMAGE_MEAN, IMAGE_STD, ImageData, Split
from lowsearch.errors import CheckpointError, StudyError, UsageError
from lowsearch.model.blocks import randomise
from lowsearch.model.lowformer import build_model
from lowsearch.model.teacher import Teacher
from lowsearch.study.assembly import prepare, schedule_of_study
from lowsearch.study.settings import StudySettings
from lowsearch.train import RECIPES, Recipe, TrainResult, check_recipe, feed, recipe, train
from lowsearch.train.augment import Augmentation, drawing_from
from lowsearch.train.engine import _distillation, _loss, _Run
from lowsearch.train.recipe import recipe_spec
from lowsearch.train.recorded import Recorded

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
PLAIN = Recipe(name="plain", epochs=1, train_images=96, batch_size=24, flip=False, shift=0.0)


@pytest.fixture(scope="module")
def images() -> ImageData:
    return few_images(train=96, val=50, test=50)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `lowsearch train` leaves it, of a network for 48 px."""
    folder = tmp_path_factory.mktemp("teacher")
    arch = network(resolution_px=48)
    model = build_model(arch)
    randomise(model, seed=1)
    (folder / "arch.json").write_text(arch.to_json())
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def everything(teacher: Path) -> Recipe:
    """All that a recipe can do to a batch, at once."""
    return dataclasses.replace(
        PLAIN, name="everything", flip=True, shift=0.1, ema_decay=0.9, drop_path=0.1, mlp_dropout=0.1, loss="bce", random_crop=0.3,
        auto_augment="rand-m9-n2-mstd0.5-inc1", erasing=0.5, mixup=0.4, cutmix=1.0, resolutions=(0.5, 1.0), teacher=str(teacher),
        teacher_weight=0.3, teacher_temperature=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(images: ImageData, everything: Recipe) -> TrainResult:
    return train(SMALL, images, everything, seed=0)


# --- reproducible -----------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at_step", range(1, STEPS))
def test_interrupted_training_with_everything_on_ends_bit_identical(
    at_step: int, images: ImageData, everything: Recipe, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    def kill(done: float) -> None:
        if round(done * STEPS) == at_step:
            raise Killed

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        train(SMALL, images, everything, seed=0, checkpoint=checkpoint, progress=kill)
    for draw in (random.random, np.random.rand):
        draw()
    assert_same(train(SMALL, images, everything, seed=0, checkpoint=checkpoint), uninterrupted)


@pytest.mark.parametrize("loaders", [0, 2])
def test_processes_that_prepare_batches_change_no_weight(
    loaders: int, images: ImageData, everything: Recipe, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    assert_same(train(SMALL, images, everything, seed=0, loaders=loaders), uninterrupted)
    half = train(SMALL, images, everything, seed=0, loaders=loaders, until=0.5, checkpoint=tmp_path / "c.safetensors")
    assert half.fraction == 0.5
    assert_same(train(SMALL, images, everything, seed=0, loaders=loaders, checkpoint=tmp_path / "c.safetensors"), uninterrupted)


@pytest.mark.parametrize("loaders", [0, 2])
def test_images_on_disk_are_read_batch_by_batch_and_give_the_same_weights(
    loaders: int, images: ImageData, everything: Recipe, uninterrupted: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = dataclasses.replace(PLAIN, flip=True, shift=0.1)
    in_memory = train(SMALL, images, shifted, seed=0)
    read: list[int] = []

    def counted(stored: np.ndarray, *rest: Any) -> torch.Tensor:
        read.append(len(stored))
        return feed_resized(stored, *rest)

    feed_resized = feed.resized
    monkeypatch.setattr(feed, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(feed, "resized", counted)
    splits = {name: _on_disk(getattr(images, name), tmp_path / f"{name}.npy") for name in ("train", "val", "test")}
    on_disk = dataclasses.replace(images, **splits)
    assert on_disk.data_hash == images.data_hash
    assert_same(train(SMALL, on_disk, everything, seed=0, loaders=loaders), uninterrupted)
    assert_same(train(SMALL, on_disk, shifted, seed=0, loaders=loaders), in_memory)
    assert len(images.val) in read and len(images.train) not in read


def _on_disk(split: Split, path: Path) -> Split:
    np.save(path, split.images)
    return Split(images=np.load(path, mmap_mode="r"), labels=split.labels)


def test_training_with_everything_on_reads_and_moves_no_global_generator(
    images: ImageData, everything: Recipe, uninterrupted: TrainResult
) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state())  # noqa: NPY002
    assert_same(train(SMALL, images, everything, seed=0), uninterrupted)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[2])
    other = train(SMALL, images, everything, seed=1)
    assert any(not torch.equal(other.weights[k], uninterrupted.weights[k]) for k in other.weights)


@pytest.mark.parametrize(
    "change",
    [
        {"random_crop": 0.3}, {"auto_augment": "original"}, {"auto_augment": "augmix-m3-w3"}, {"auto_augment": "3a"}, {"erasing": 1.0},
        {"mixup": 0.4}, {"cutmix": 1.0}, {"resolutions": (0.5,)}, {"loss": "bce"},
    ],
    ids=str,
)  # fmt: skip
def test_each_choice_changes_the_training_and_nothing_else(change: dict[str, Any], images: ImageData) -> None:
    short = dataclasses.replace(PLAIN, train_images=24, ema_decay=None)
    chosen, plain = train(SMALL, images, short.changed(change), seed=0), train(SMALL, images, short, seed=0)
    assert not chosen.diverged
    assert any(not torch.equal(chosen.weights[k], plain.weights[k]) for k in plain.weights)
    assert dataclasses.replace(short.changed(change), name="plain", **{k: getattr(short, k) for k in change}) == short


def test_recorded_steps_mix_and_distil_to_the_same_weights(images: ImageData, everything: Recipe) -> None:
    still = dataclasses.replace(everything, drop_path=0.0, mlp_dropout=0.0, resolutions=(), epochs=2)
    run = _Run(SMALL, images, still, seed=0, checkpoint=None, device="cpu", cpu_clock=time.process_time)
    cuda = TrainingCuda(run.model)
    run._gradients = Recorded(run._compute_gradients, cuda)
    assert_same(run.to(1.0, None), train(SMALL, images, still, seed=0))
    assert cuda.said[-1] == "record"


# --- what the choices mean --------------------------------------------------------------------------------------------------------


def augmentation(**choices: Any) -> Augmentation:
    made = dataclasses.replace(PLAIN, **choices)
    assert Augmentation.wanted(made)
    return Augmentation(made, resolution_px=32, total_stride=16, num_classes=10)


def test_nothing_of_timm_is_wanted_where_all_is_off() -> None:
    assert not Augmentation.wanted(PLAIN) and not Augmentation.wanted(recipe("micro"))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_proportion_of_the_images(kind: str) -> None:
    """Image i is the constant i: what is left of it in the mixture is the share of its label."""
    with drawing_from(np.random.default_rng(3)):
        x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone()
        mixed, shares = augmentation(**{kind: 1.0}).mixed(x, torch.arange(4), range(4))
    assert torch.allclose(shares.sum(1), torch.ones(4))
    for i, image in enumerate(mixed):
        other = 3 - i
        assert shares[i].nonzero().flatten().tolist() == sorted({i, other})
        expected = shares[i, i] * i + shares[i, other] * other
        assert image.mean().item() == pytest.approx(expected.item(), abs=1e-4)
        assert image.unique().numel() == (1 if kind == "mixup" else 2)
    assert 0.02 < shares[0, 0] < 0.98


def test_both_mixtures_take_turns_and_lambda_is_the_step_s_own() -> None:
    both = augmentation(mixup=1.0, cutmix=1.0)

    def shares(step: int) -> tuple[int, float]:
        with drawing_from(np.random.default_rng([0, step])):
            x, targets = both.mixed(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone(), torch.arange(4), range(4))
        return x[0].unique().numel(), targets[0, 0].item()

    drawn = [shares(step) for step in range(30)]
    assert {n for n, _ in drawn} == {1, 2} and len({share for _, share in drawn}) > 20
    assert drawn == [shares(step) for step in range(30)]


def test_erasing_replaces_one_rectangle_of_an_image() -> None:
    with drawing_from(np.random.default_rng(0)):
        x, labels = augmentation(erasing=1.0).mixed(torch.full((20, 3, 32, 32), 9.0), torch.arange(20) % 10, range(20))
    assert labels.ndim == 1
    for image in x:
        rows, columns = (image != 9).any(0).nonzero().unbind(1)
        height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert height * width == len(rows) and 0.01 < len(rows) / 1024 < 0.4


@pytest.mark.parametrize("string", ["rand-m10-n15-inc1", "augmix-m10-w5", "original", "v0", "3a"])
def test_every_operation_of_timm_runs_at_its_largest_magnitude(string: str, images: ImageData) -> None:
    """Pillow 13 refuses what timm's `posterize` asks for there."""
    pixels = torch.from_numpy(images.train.images[:48])
    with drawing_from(np.random.default_rng(0)):
        assert augmentation(auto_augment=string).pixels(pixels, range(48)).shape == pixels.shape


def test_crops_come_from_the_stored_image_and_fill_the_network_s_resolution(images: ImageData) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    with drawing_from(np.random.default_rng(0)):
        out = augmentation(random_crop=0.25).pixels(torch.from_numpy(np.stack([ramp] * 20)), range(20))
    assert out.shape == (20, 32, 32, 3)
    spans = (out[:, :, -1, 0].int() - out[:, :, 0, 0].int()).float().mean(1)
    assert 25 < spans.min() < 45 and spans.max() <= 64  # at least a quarter of the area, at an aspect of 3/4 to 4/3
    cropped = dataclasses.replace(PLAIN, random_crop=0.5)
    run = _Run(network(resolution_px=48), images, cropped, seed=0, checkpoint=None, device="cpu", cpu_clock=time.process_time)
    assert run.feed._images.px == 32 and run.val_images.px == 48


def test_batches_are_drawn_at_the_recipe_s_resolutions_and_at_no_others(images: ImageData) -> None:
    several = augmentation(resolutions=(0.5, 0.6, 1.0))
    assert several.resolutions_px == [16, 32]  # rounded to the total stride
    seen = set()
    for step in range(20):
        with drawing_from(np.random.default_rng([0, step])):
            seen.add(several.pixels(torch.zeros((2, 32, 32, 3), dtype=torch.uint8), range(2)).shape[1])
    assert seen == {16, 32}


def test_binary_cross_entropy_is_the_mean_over_classes() -> None:
    logits, labels = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([2])
    smoothed = dataclasses.replace(PLAIN, loss="bce", label_smoothing=0.3)
    p = torch.sigmoid(logits[0].double())
    y = torch.tensor([0.1, 0.1, 0.8], dtype=torch.float64)
    expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert _loss(logits, labels, smoothed).item() == pytest.approx(expected.item(), rel=1e-5)
    assert _loss(logits, F.one_hot(labels, 3).float(), smoothed).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_of_whole_shares_is_that_of_labels() -> None:
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    assert torch.allclose(_loss(logits, labels, PLAIN), _loss(logits, F.one_hot(labels, 4).float(), PLAIN))


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    ours, theirs, temperature = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]]), 2.0
    q = torch.softmax(ours[0] / temperature, 0)
    expected = temperature**2 * (0.5 * (0.5 / q).log()).sum()
    assert _distillation(ours, theirs, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert _distillation(theirs, theirs, temperature).item() == pytest.approx(0.0, abs=1e-7)


# --- teachers ---------------------------------------------------------------------------------------------------------------------


def test_teacher_sees_its_own_normalisation_and_size() -> None:
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    pixels = torch.rand(2, 3, 16, 16)
    ours = (pixels - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)
    spied = Teacher(Spy(), mean=IMAGE_MEAN, std=IMAGE_STD, own_mean=(0.5,) * 3, own_std=(0.25,) * 3, own_px=None)
    spied(ours)
    assert torch.allclose(seen[0], (pixels - 0.5) / 0.25, atol=1e-5)
    spied.own_px = 24
    spied(ours)
    assert seen[1].shape == (2, 3, 24, 24)
    assert not spied.train().training


def test_distilled_network_comes_nearer_to_its_teacher(images: ImageData, teacher: Path) -> None:
    alone = dataclasses.replace(PLAIN, epochs=3)
    taught = dataclasses.replace(alone, teacher=str(teacher), teacher_weight=1.0)
    run = _Run(SMALL, images, taught, seed=0, checkpoint=None, device="cpu", cpu_clock=time.process_time)
    assert run.teacher is not None
    x = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distances = [
        _distillation(train(SMALL, images, how, seed=0).model()(x).detach(), run.teacher(x), 1.0).item() for how in (taught, alone)
    ]
    assert distances[0] < distances[1]
    assert all(not p.requires_grad for p in run.teacher.parameters())


def test_any_network_of_timm_with_a_file_of_weights_teaches(images: ImageData, tmp_path: Path) -> None:
    import timm

    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=10).state_dict(), file)
    taught = dataclasses.replace(PLAIN, train_images=24, teacher=f"timm:mobilenetv3_small_050:{file}")
    assert not train(SMALL, images, taught, seed=0).diverged
    with pytest.raises(CheckpointError, match="knows 10 classes, the data have 7"):
        check_recipe(taught, num_classes=7)
    with pytest.raises(CheckpointError, match="does not hold the weights of timm's resnet10t"):
        check_recipe(dataclasses.replace(PLAIN, teacher=f"timm:resnet10t:{file}"), num_classes=10)


def test_teacher_enters_the_hash_by_its_weights_not_by_its_place(teacher: Path, tmp_path: Path) -> None:
    taught = dataclasses.replace(PLAIN, teacher=str(teacher))
    for file in teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = dataclasses.replace(PLAIN, teacher=str(tmp_path))
    assert moved.recipe_hash == taught.recipe_hash != PLAIN.recipe_hash
    changed = [dataclasses.replace(taught, teacher_weight=0.9), dataclasses.replace(taught, teacher_temperature=3.0)]
    assert len({r.recipe_hash for r in (taught, *changed)}) == 3
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert dataclasses.replace(PLAIN, teacher=str(tmp_path)).recipe_hash != taught.recipe_hash
    assert dataclasses.replace(PLAIN, teacher_weight=0.9) == PLAIN  # without effect


@pytest.mark.parametrize("wrong", ["nowhere", "timm:resnet18", "timm:resnet18:nowhere.pth"])
def test_absent_teacher_is_told(wrong: str) -> None:
    with pytest.raises(UsageError, match="recipe: teacher is"):
        dataclasses.replace(PLAIN, teacher=wrong)


# --- names, files and hashes ------------------------------------------------------------------------------------------------------


def test_hash_of_the_recipe_of_earlier_studies_is_unchanged() -> None:
    (stored,) = {record.recipe_hash for record in AccuracyRecords(ROOT / "studies" / "example" / "records.jsonl")}
    assert stored == recipe("micro").recipe_hash == "628c8798f2"
    assert schedule_of_study(ROOT / "studies" / "example") == recipe("micro")


def test_recipe_is_a_name_or_a_file_and_changed_fields(tmp_path: Path) -> None:
    changed = recipe("micro,epochs=12,evaluate_at=[0.5,1],learning_rate=1e-3,ema_decay=null")
    assert (changed.epochs, changed.evaluate_at, changed.learning_rate, changed.ema_decay) == (12, (0.5, 1.0), 1e-3, None)
    assert changed.name == f"micro-{changed.recipe_hash[:6]}"
    assert recipe("micro,evaluate_at=[1]").name == "micro"  # the weights are those of micro
    file = tmp_path / "mine.yaml"
    file.write_text("base: micro\nepochs: 12\nlearning_rate: 1e-3\nweight_decay: 0\n")
    assert recipe(str(file)).name == "mine" and recipe(str(file)).epochs == 12
    assert recipe(f"{file},epochs=4,learning_rate=3e-3,weight_decay=0.05").recipe_hash == recipe("micro").recipe_hash
    assert recipe_spec("micro", ["epochs=12", "mixup=0.2"]) == "micro,epochs=12,mixup=0.2"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_its_yaml(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(name).to_dict()))
    assert recipe(str(tmp_path / "r.yaml")) == recipe(name)
    assert recipe(str(tmp_path / "r.yaml")).recipe_hash == recipe(name).recipe_hash


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_can_be_followed(name: str) -> None:
    assert recipe(name).name == name
    check_recipe(recipe(name), num_classes=10)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("micro,epoch=3", "did you mean 'epochs'"), ("micro,epochs=many", "epochs is 'many', expected a whole number"),
        ("micro,epochs=1.5", "whole number"), ("micro,flip=1", "true or false"), ("micro,epochs=[", "cannot be read"),
        ("micro,mixup=-1", "mixup is -1"), ("micro,random_crop=0", "random_crop is"), ("micro,erasing=2", "erasing is"),
        ("micro,loss=mse", "loss is 'mse'"), ("micro,auto_augment=best", "auto_augment is 'best'"),
        ("micro,resolutions=[2]", "resolutions"), ("micro,resolutions=1", "list of numbers"),
        ("micro,mixup=0.1,batch_size=25", "even"), ("micro,epochs=true", "whole number"),
        ("nowhere.yaml", "no recipe at nowhere.yaml"), ("micor", "did you mean 'micro'"),
    ],
)  # fmt: skip
def test_impossible_recipe_is_one_clear_line(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match="recipe") as caught:
        recipe(spec)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["- 1", "epochs: {", "epochs: 3\nbase: unknown", "learning: 3", "name: x", "\xff"])
def test_impossible_file_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"r\.yaml"):
        recipe(str(tmp_path / "r.yaml"))


def test_string_that_timm_refuses_is_told_before_anything_is_trained() -> None:
    with pytest.raises(UsageError, match="which timm refuses"):
        check_recipe(dataclasses.replace(PLAIN, auto_augment="rand-z9"), num_classes=10)


# --- at the command line ----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*RECIPES, "auto_augment", "teacher_temperature"))
    assert invoke(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert Recipe.from_dict(listed["lowformer-imagenet"]) == recipe("lowformer-imagenet")


def test_train_follows_a_file_and_changed_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: ImageData) -> None:
    monkeypatch.chdir(tmp_path)
    arrays = {
        f"{axis}_{n}": getattr(getattr(images, n), f) for n in ("train", "val", "test") for axis, f in (("x", "images"), ("y", "labels"))
    }
    np.savez("d.npz", **arrays)
    Path("arch.json").write_text(SMALL.to_json())
    Path("mine.yaml").write_text("base: micro\nepochs: 1\nbatch_size: 24\n")
    command = ["train", "arch.json", "--data", "npz:d.npz", "--recipe", "mine.yaml", "--recipe-set", "mixup=0.2", "--out", "out"]
    assert invoke(command) == 0
    metrics = json.loads(Path("out/metrics.json").read_text())
    expected = recipe("mine.yaml,mixup=0.2")
    assert (metrics["recipe_hash"], metrics["recipe_values"]["mixup"]) == (expected.recipe_hash, 0.2)
    assert invoke([*command, "--recipe-set", "mixup=0.3"]) == 2  # another training than the folder's
    assert invoke(["train", "arch.json", "--data", "npz:d.npz", "--recipe-set", "mixup"]) == 2


def test_study_keeps_the_recipe_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("base: micro\nepochs: 2\n")
    settings = StudySettings(recipe="mine.yaml,mixup=0.2", data="fashion-mnist-mini", device="cpu", runtime="onnxruntime")
    monkeypatch.setattr("lowsearch.study.assembly.usable_table", lambda *_, **__: (_ for _ in ()).throw(StudyError("stop here")))
    folder = tmp_path / "study"
    folder.mkdir()
    with pytest.raises(StudyError, match="stop here"):
        prepare(folder, settings, None)
    with pytest.raises(StudyError, match="stop here"):  # no study yet: another recipe may still be asked for
        prepare(folder, dataclasses.replace(settings, recipe="mine.yaml"), None)
    assert recipe(str(folder / "recipe.yaml")) == recipe("mine.yaml")
    with pytest.raises(StudyError, match="stop here"):
        prepare(folder, settings, None)
    began_with = recipe("mine.yaml,mixup=0.2")
    file.write_text("base: micro\nepochs: 9\n")
    (folder / "study.yaml").write_text(
        yaml.safe_dump({"schema": "lowsearch-study", "version": 1, "settings": settings.to_dict()}, sort_keys=False)
    )
    assert schedule_of_study(folder) == began_with
    with pytest.raises(StudyError, match="stop here"):
        prepare(folder, settings, None)
    assert schedule_of_study(folder) == began_with


def test_run_with_an_impossible_recipe_leaves_no_half_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flags in (["--recipe", "imagenet"], ["--recipe-set", "epoch=2"], ["--recipe-set", "auto_augment=rand-z9"]):
        assert invoke(["run", "--study", "s", *flags]) == 2
    assert not (tmp_path / "studies" / "s" / "study.yaml").exists()
    assert not (tmp_path / "studies" / "s" / "space.yaml").exists()


@pytest.mark.gpu
def test_a_real_gpu_mixes_and_distils_as_well_from_a_recording(images: ImageData, everything: Recipe) -> None:
    still = dataclasses.replace(everything, drop_path=0.0, mlp_dropout=0.0, resolutions=(), epochs=3)
    recorded = train(SMALL, images, still, seed=0, device="cuda")
    run = _Run(SMALL, images, still, seed=0, checkpoint=None, device="cuda", cpu_clock=time.process_time)
    assert isinstance(run._gradients, Recorded)
    run._gradients = run._compute_gradients
    step_by_step = run.to(1.0, None)
    assert [point.train_loss for point in recorded.curve] == pytest.approx([point.train_loss for point in step_by_step.curve], rel=1e-2)
    several = dataclasses.replace(still, resolutions=(0.5, 1.0))
    run = _Run(SMALL, images, several, seed=0, checkpoint=None, device="cuda", cpu_clock=time.process_time)
    assert not isinstance(run._gradients, Recorded)
    assert not run.to(1.0, None).diverged
