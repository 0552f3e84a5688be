"""Data sets by name: three disjoint splits from every source, and one clear line for every way a source can be malformed."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowsearch.data import ImageData, Split, decoded, load_data, sources
from lowsearch.data import images as image_values
from lowsearch.data.images import as_rgb, split_off, stratified_order
from lowsearch.errors import DataError
from lowsearch.train.feed import resized

SPLITS = ("train", "val", "test")
TINY_IMAGENET = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinyimagenet20_jpeg_boxes.npz"
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def embedded() -> ImageData:
    return load_data("fashion-mnist-mini")


def rows(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_embedded_splits_are_balanced_and_padded_to_32_px(embedded: ImageData) -> None:
    assert (len(embedded.train), len(embedded.val), len(embedded.test)) == (6000, 2000, 2000)
    for name in SPLITS:
        split: Split = getattr(embedded, name)
        assert set(np.bincount(split.labels)) == {len(split) // 10}
        assert split.images.shape[1:] == (32, 32, 3)
        assert not split.images[:, :2].any() and not split.images[:, :, -2:].any()
        assert (split.images[..., 0] == split.images[..., 2]).all()


def test_embedded_splits_share_no_image_not_even_a_near_copy(embedded: ImageData) -> None:
    distinct = [rows(getattr(embedded, name)) for name in SPLITS]
    assert sum(map(len, distinct)) == 10_000 == len(set.union(*distinct))

    def flat(split: Split) -> np.ndarray:
        return split.images[:, 2:30, 2:30, 0].reshape(len(split), -1).astype(np.float32)

    for later, earlier in (("val", "train"), ("test", "train"), ("test", "val")):
        a, b = flat(getattr(embedded, later)), flat(getattr(embedded, earlier))
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        assert np.sqrt(squared.min() / 784) > 8  # of 255; unrelated neighbours lie at about 36


def test_embedded_file_is_small_has_its_licence_beside_it_and_needs_no_pickle() -> None:
    folder = files("lowsearch.data") / "embedded"
    assert len((folder / "fashion-mnist-mini.npz").read_bytes()) < 4_000_000
    assert "MIT License" in (folder / "LICENSE-fashion-mnist.txt").read_text()


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_embedded_images_are_the_original_ones_with_the_original_labels(embedded: ImageData) -> None:
    def original(part: str) -> dict[bytes, int]:
        images = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
        return {images[784 * i : 784 * (i + 1)]: label for i, label in enumerate(labels)}

    train, test = original("train"), original("t10k")
    for name, source in (("train", train), ("val", train), ("test", test)):
        split: Split = getattr(embedded, name)
        assert all(source[i[2:30, 2:30, 0].tobytes()] == label for i, label in zip(split.images, split.labels, strict=True))


def test_every_prefix_of_a_stratified_order_is_nearly_balanced() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    order = stratified_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    for n in (10, 40, 70):
        assert np.abs(np.bincount(labels[order[:n]], minlength=3) - n * np.array([0.5, 0.3, 0.2])).max() <= 2


def test_split_off_partitions_and_keeps_every_class() -> None:
    labels = np.repeat([0, 1], [2, 18])
    split = Split(images=np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8), labels=labels)
    rest, part = split_off(split, 0.2, np.random.default_rng(0))
    assert sorted([*rest.images[:, 0, 0, 0], *part.images[:, 0, 0, 0]]) == list(range(20))
    assert set(part.labels) == set(rest.labels) == {0, 1}


def test_oblong_images_are_cropped_to_their_centre() -> None:
    images = np.zeros((1, 4, 8), np.uint8)
    images[:, :, 2:6] = 9
    assert (as_rgb(images, "x") == 9).all() and as_rgb(images, "x").shape == (1, 4, 4, 3)


# --- folder -----------------------------------------------------------------------------------------------------------------------


def write_images(folder: Path, n: int, *, px: tuple[int, int] = (16, 16), seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(str(folder))])
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*px, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_folder_of_classes_is_split_in_three_by_seed(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 20, seed=len(name + name[0]) + ord(name[0]))
    data = load_data(f"folder:{tmp_path}", seed=3)
    assert data.classes == ("cat", "dog") and data.image_px == 16
    sets = [rows(getattr(data, name)) for name in SPLITS]
    assert [len(s) for s in sets] == [26, 6, 8] and len(set.union(*sets)) == 40
    assert load_data(f"folder:{tmp_path}", seed=3).data_hash == data.data_hash
    assert load_data(f"folder:{tmp_path}", seed=4).data_hash != data.data_hash


def test_folder_with_given_splits_keeps_them_and_takes_val_from_train(tmp_path: Path) -> None:
    for split, n in (("train", 10), ("test", 4)):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, n, seed=ord(name))
    data = load_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 8)
    write_images(tmp_path / "val" / "a", 3)
    write_images(tmp_path / "val" / "b", 3)
    assert len(load_data(f"folder:{tmp_path}").val) == 6


def test_folder_images_of_any_size_and_mode_become_one_square_size(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 6, px=(20, 30))
    write_images(tmp_path / "b", 3, px=(40, 20))
    for i in range(3):
        Image.new("L", (50, 60), 7).save(tmp_path / "b" / f"grey{i}.gif")
    assert load_data(f"folder:{tmp_path}").image_px == 20
    assert load_data(f"folder:{tmp_path}", image_px=24).image_px == 24


# --- decoded once -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images that is worth keeping decoded."""
    monkeypatch.setattr(decoded, "WORTH_BYTES", 1)
    for name in ("cat", "dog"):
        write_images(tmp_path / "photos" / name, 12, px=(20, 24), seed=ord(name[0]))
    return tmp_path / "photos"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every image file that is decoded."""
    found: list[Path] = []
    read = sources._read_square
    monkeypatch.setattr(sources, "_read_square", lambda path, *rest: (found.append(path), read(path, *rest))[1])
    return found


def assert_same(data: ImageData, other: ImageData) -> None:
    assert (data.data_hash, data.name, data.classes) == (other.data_hash, other.name, other.classes)
    for name in SPLITS:
        ours, theirs = getattr(data, name), getattr(other, name)
        assert np.array_equal(ours.images, theirs.images) and np.array_equal(ours.labels, theirs.labels)


def test_images_are_decoded_once_and_are_the_same(
    photos: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    name, cache = f"folder:{photos}", tmp_path / "cache"
    with monkeypatch.context() as patched:
        patched.setattr(decoded, "WORTH_BYTES", 10**9)
        plain = load_data(name, cache=cache)
    assert len(reads) == 24 and not cache.exists(), "too few to be kept"
    for _ in range(3):
        assert_same(load_data(name, cache=cache), plain)
    assert len(reads) == 48
    kept = load_data(name, cache=cache)
    assert isinstance(kept.train.images, np.memmap) and not kept.train.images.flags.writeable
    held = resized(kept.train.images, kept.image_px)
    assert held.data_ptr() == kept.train.images.ctypes.data and not recwarn.list, "not copied, and no warning"
    sent = pickle.loads(pickle.dumps(kept))
    assert_same(sent, plain)
    assert type(sent.train.images) is np.ndarray

    monkeypatch.chdir(tmp_path)
    assert load_data("folder:photos", cache=cache).data_hash == plain.data_hash and len(reads) == 48, "the same folder by another name"
    assert load_data(name, cache=cache, seed=1).data_hash != plain.data_hash and load_data(name, cache=cache, image_px=8).image_px == 8
    assert len(reads) == 96
    assert_same(load_data(name, cache=cache), plain)
    assert len(reads) == 96


def _touch(photos: Path) -> None:
    path = photos / "cat" / "3.png"
    os.utime(path, ns=(1, 1))


def _rewrite(photos: Path) -> None:
    Image.new("RGB", (20, 24), 7).save(photos / "cat" / "3.png")


@pytest.mark.parametrize(
    "change",
    [
        _touch,
        _rewrite,
        lambda photos: (photos / "dog" / "3.png").unlink(),
        lambda photos: (photos / "dog" / "3.png").rename(photos / "cat" / "30.png"),
        lambda photos: write_images(photos / "emu", 5),
    ],
)
def test_a_changed_folder_is_decoded_anew(change: Callable[[Path], None], photos: Path, reads: list[Path], tmp_path: Path) -> None:
    load_data(f"folder:{photos}", cache=tmp_path / "cache")
    change(photos)
    reads.clear()
    anew = load_data(f"folder:{photos}", cache=tmp_path / "cache")
    assert len(reads) in (23, 24, 29)
    assert_same(load_data(f"folder:{photos}", cache=tmp_path / "cache"), anew)
    assert_same(load_data(f"folder:{photos}", cache=tmp_path / "other"), anew)
    assert len(list((tmp_path / "cache" / "decoded").glob("*/data.json"))) == 1


def _flip_a_pixel(entry: Path) -> None:
    content = bytearray((entry / "train-images.npy").read_bytes())
    content[-1] ^= 1
    (entry / "train-images.npy").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_pixel,
        lambda entry: (entry / "val-images.npy").unlink(),
        lambda entry: (entry / "test-labels.npy").write_bytes(b""),
        lambda entry: os.truncate(entry / "train-images.npy", 400),
        lambda entry: np.save(entry / "train-labels.npy", np.zeros(3)),
        lambda entry: (entry / "data.json").write_text("{"),
        lambda entry: (entry / "data.json").write_text("[]"),
    ],
)
def test_damaged_decoded_images_are_made_anew(damage: Callable[[Path], None], photos: Path, reads: list[Path], tmp_path: Path) -> None:
    name, cache = f"folder:{photos}", tmp_path / "cache"
    plain, _ = load_data(name, cache=tmp_path / "other"), load_data(name, cache=cache)
    reads.clear()
    (note,) = (cache / "decoded").glob("*/data.json")
    damage(note.parent)
    for _ in range(2):
        assert_same(load_data(name, cache=cache), plain)
        assert len(reads) == 24


def test_where_nothing_can_be_kept_everyone_decodes(photos: Path, reads: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    for n in (1, 2):
        assert len(load_data(f"folder:{photos}", cache=tmp_path / "cache").train) == 16 and len(reads) == 24 * n


def test_a_malformed_folder_is_refused_and_nothing_is_kept(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "3.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match="not a readable image"):
            load_data(f"folder:{photos}", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "decoded").glob("*/"))


class Killed(BaseException):
    pass


def test_a_killed_process_leaves_what_it_decoded_to_the_next(
    photos: Path, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cache = f"folder:{photos}", tmp_path / "cache"
    plain = load_data(name, cache=tmp_path / "other")
    monkeypatch.setattr(decoded, "_CHUNK", 5)
    reads.clear()
    heard: list[tuple[int, int, str]] = []

    def kill(*said: int | str) -> None:
        heard.append(said)  # pyright: ignore[reportArgumentType]
        if "val" in str(said[2]):
            raise Killed

    with pytest.raises(Killed):
        load_data(name, cache=cache, progress=kill)
    n_train, n_val = len(plain.train), len(plain.val)
    assert n_train == 16 and heard == [(n, 16, "decode train images") for n in (5, 10, 15, 16)] + [(n_val, n_val, "decode val images")]
    assert len(reads) == n_train + n_val
    assert_same(load_data(name, cache=cache), plain)
    assert len(reads) == 24, "nothing was decoded twice"
    load_data(name, cache=cache)
    assert len(reads) == 24

    (photos / "cat" / "3.png").unlink()  # What was begun from other files is of no use.
    heard.clear()
    with pytest.raises(Killed):
        load_data(name, cache=cache, progress=kill)
    write_images(photos / "cat" / "more", 3, px=(20, 24), seed=7)
    assert_same(load_data(name, cache=cache), load_data(name, cache=tmp_path / "third"))


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x"), lambda path: np.save(path, np.zeros(3))]
)
def test_what_was_begun_and_is_damaged_is_begun_anew(
    damage: Callable[[Path], None], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(decoded, "_CHUNK", 5)
    with pytest.raises(Killed):
        load_data(f"folder:{photos}", cache=tmp_path / "cache", progress=kill)
    (begun,) = (tmp_path / "cache" / "decoded").glob(".*.tmp/train-images.npy")
    damage(begun)
    assert_same(load_data(f"folder:{photos}", cache=tmp_path / "cache"), load_data(f"folder:{photos}", cache=tmp_path / "other"))


def test_images_that_would_fill_the_disk_are_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=16 * 20 * 20 * 3)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="take 0.0 GB") as refused:
        load_data(f"folder:{photos}", cache=tmp_path / "cache")
    assert "XDG_CACHE_HOME" in refused.value.hint
    assert not list((tmp_path / "cache" / "decoded").glob("*/"))


def test_large_entries_are_not_read_to_be_trusted(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cache = f"folder:{photos}", tmp_path / "cache"
    plain, _ = load_data(name, cache=tmp_path / "other"), load_data(name, cache=cache)
    monkeypatch.setattr(decoded, "TRUSTED_BYTES", 0)
    hashed: list[ImageData] = []
    content_hash = image_values._content_hash
    monkeypatch.setattr(image_values, "_content_hash", lambda data: (hashed.append(data), content_hash(data))[1])
    assert_same(load_data(name, cache=cache), plain)
    assert not hashed
    (note,) = (cache / "decoded").glob("*/data.json")
    _flip_a_pixel(note.parent)
    assert_same(load_data(name, cache=cache), plain)
    assert hashed
    assert dataclasses.replace(plain, classes=("a", "b")).data_hash != plain.data_hash, "a known hash is of one value alone"


TOGETHER = """
import sys, time
from pathlib import Path
from lowsearch.data import decoded, load_data, sources
decoded.WORTH_BYTES, read = 1, sources._read_square
def noted(path, *rest):
    time.sleep(0.02)  # Long enough for the other to come.
    with open(sys.argv[2], "a") as log:
        log.write(f"{path}\\n")
    return read(path, *rest)
sources._read_square = noted
Path(sys.argv[4]).touch()
while not Path(sys.argv[5]).exists():
    time.sleep(0.005)
print(load_data(f"folder:{sys.argv[1]}", cache=Path(sys.argv[3])).data_hash)
"""


def test_of_two_processes_one_decodes(photos: Path, tmp_path: Path) -> None:
    log, cache, ready = tmp_path / "log", tmp_path / "cache", [tmp_path / "a", tmp_path / "b"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(photos), str(log), str(cache), str(mine), str(other)], stdout=subprocess.PIPE, text=True
        )
        for mine, other in (ready, ready[::-1])
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert said == [load_data(f"folder:{photos}", cache=tmp_path / "other").data_hash] * 2
    assert sorted(log.read_text().split()) == sorted(map(str, photos.rglob("*.png")))


def test_changing_one_pixel_changes_the_data_hash(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 4)
    before = load_data(f"folder:{tmp_path}").data_hash
    image = np.array(Image.open(tmp_path / "a" / "0.png"))
    image[3, 3, 1] ^= 1
    Image.fromarray(image).save(tmp_path / "a" / "0.png")
    assert load_data(f"folder:{tmp_path}").data_hash != before


# --- Tiny-ImageNet ----------------------------------------------------------------------------------------------------------------


def write_tiny_imagenet(root: Path, images: dict[str, list[Image.Image]], *, n_val: int) -> None:
    """`images` by class in the folders that the published archive unpacks to: the last `n_val` of every class are its val."""
    lines = []
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)
    for wnid, of_class in images.items():
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i, image in enumerate(of_class):
            if i < len(of_class) - n_val:
                image.save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95)
            else:
                name = f"val_{len(lines)}.JPEG"
                image.save(root / "val" / "images" / name, quality=95)
                lines.append(f"{name}\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    images[next(iter(images))][0].save(root / "test" / "images" / "test_0.JPEG")


def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Images of class i are about 60 i grey: labels belong to their images, whichever file names them."""
    grey = {f"n0{i}": [Image.new("L" if i == 1 else "RGB", (64, 64), 60 * i if i == 1 else (60 * i,) * 3)] * 14 for i in range(3)}
    write_tiny_imagenet(tmp_path, grey, n_val=4)
    data = load_data(f"tiny-imagenet:{tmp_path}", seed=1)
    assert data.classes == ("n00", "n01", "n02") and data.image_px == 64
    assert [len(getattr(data, s)) for s in SPLITS] == [24, 6, 12]
    for name in SPLITS:
        split: Split = getattr(data, name)
        assert np.abs(split.images.mean((1, 2, 3)) - 60 * split.labels).max() < 3
    assert load_data(f"tiny-imagenet:{tmp_path}", image_px=32).image_px == 32


@pytest.mark.parametrize("fault", ["no annotations", "unknown class", "missing image"])
def test_damaged_tiny_imagenet_is_one_clear_line(fault: str, tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path, {w: [Image.new("RGB", (64, 64))] * 4 for w in ("n1", "n2")}, n_val=1)
    annotations = tmp_path / "val" / "val_annotations.txt"
    if fault == "no annotations":
        annotations.unlink()
    elif fault == "unknown class":
        annotations.write_text("val_0.JPEG\tn9\t0\t0\t1\t1\n")
    else:
        (tmp_path / "val" / "images" / "val_0.JPEG").unlink()
    with pytest.raises(DataError, match="tiny-imagenet"):
        load_data(f"tiny-imagenet:{tmp_path}")


@pytest.mark.skipif(not TINY_IMAGENET.is_file(), reason=f"needs {TINY_IMAGENET.name} beside the checkout, in ../shared/data")
def test_real_images_of_tiny_imagenet_keep_their_labels(tmp_path: Path) -> None:
    arrays = np.load(TINY_IMAGENET, allow_pickle=False)
    labels, blob, offsets = arrays["train_y"], arrays["train_blob"].tobytes(), arrays["train_off"]
    names = [str(c) for c in arrays["classes"][:3]]
    images: dict[str, list[Image.Image]] = {}
    for label, name in enumerate(names):
        chosen = np.flatnonzero(labels == label)[:12]
        images[name] = [Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]])) for i in chosen]
    write_tiny_imagenet(tmp_path, images, n_val=2)
    data = load_data(f"tiny-imagenet:{tmp_path}")
    assert data.image_px == 64 and set(data.classes) == set(names) and len(data.test) == 6
    for split in (data.train, data.val, data.test):
        for stored, label in zip(split.images, split.labels, strict=True):
            distances = {
                name: min(np.abs(np.asarray(i.convert("RGB"), int) - stored).mean() for i in of_class) for name, of_class in images.items()
            }
            assert min(distances, key=lambda name: distances[name]) == data.classes[label]


# --- npz --------------------------------------------------------------------------------------------------------------------------


def arrays(n: int = 20, classes: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    y = np.arange(n) % classes
    return {"x_train": x, "y_train": y, "x_test": x[:8], "y_test": y[:8]}


def test_npz_takes_val_from_train_and_pads_28_px(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", allow_pickle=False, **arrays())
    data = load_data(f"npz:{tmp_path / 'd.npz'}")
    assert (len(data.train), len(data.val), len(data.test), data.image_px) == (16, 4, 8, 32)
    assert not rows(data.train) & rows(data.val)


def test_npz_keeps_val_and_class_names(tmp_path: Path) -> None:
    given = arrays()
    given |= {"x_val": given["x_train"][:6], "y_val": given["y_train"][:6], "classes": np.array(["no", "yes"])}
    np.savez(tmp_path / "d.npz", allow_pickle=False, **given)
    data = load_data(f"npz:{tmp_path / 'd.npz'}")
    assert len(data.val) == 6 and len(data.train) == 20 and data.classes == ("no", "yes")


# --- torchvision ------------------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvision_mnist_is_read_from_the_cache_without_a_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        write_idx(tmp_path / "MNIST/raw" / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / "MNIST/raw" / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    data = load_data("torchvision:MNIST", cache=tmp_path)
    assert (len(data.train), len(data.val), len(data.test), len(data.classes), data.image_px) == (50, 10, 20, 10, 32)


@pytest.mark.parametrize(("set_name", "label_bytes", "n_classes"), [("CIFAR10", 1, 10), ("CIFAR100", 2, 100)])
def test_torchvision_cifar_is_read_from_its_binary_form(tmp_path: Path, set_name: str, label_bytes: int, n_classes: int) -> None:
    from lowsearch.data.sources import _CIFAR_BINARY

    _, _, names, train_files, test_file = _CIFAR_BINARY[set_name]
    (tmp_path / names).parent.mkdir()
    (tmp_path / names).write_text("\n".join(f"class {i}" for i in range(n_classes)) + "\n\n")
    labels = np.arange(3 * n_classes) % n_classes
    records = np.zeros((len(labels), label_bytes + 3072), np.uint8)
    records[:, label_bytes - 1] = labels
    records[:, label_bytes : label_bytes + 1024] = 200  # the red plane
    records[:, -1] = labels  # the last blue pixel
    for file in (*train_files, test_file):
        (tmp_path / file).write_bytes(records.tobytes())
    data = load_data(f"torchvision:{set_name}", cache=tmp_path)
    assert len(data.test) == 3 * n_classes and data.classes[1] == "class 1"
    assert (data.test.images[..., 0] == 200).all() and not data.test.images[..., 1].any()
    assert (data.test.images[:, 31, 31, 2] == data.test.labels).all()


# --- what a user can get wrong ----------------------------------------------------------------------------------------------------


def _npz_case(**changes: object) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        given: dict[str, object] = {**arrays(), **changes}
        kept = {k: np.asarray(v) for k, v in given.items() if v is not None}
        np.savez(folder / "d.npz", **kept)  # pyright: ignore[reportArgumentType]
        return f"npz:{folder / 'd.npz'}"

    return make


def _file_case(content: bytes) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / "d.npz").write_bytes(content)
        return f"npz:{folder / 'd.npz'}"

    return make


def _single_npy(folder: Path) -> str:
    with (folder / "d.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    return f"npz:{folder / 'd.npz'}"


def _truncated_npz(folder: Path) -> str:
    name = _npz_case()(folder)
    path = folder / "d.npz"
    path.write_bytes(path.read_bytes()[:-200])
    return name


def _folder_case(*classes: str, n: int = 4) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name in classes:
            write_images(folder / "d" / name, n)
        return f"folder:{folder / 'd'}"

    return make


def _empty_class(folder: Path) -> str:
    name = _folder_case("a", "b")(folder)
    (folder / "d" / "c").mkdir()
    return name


def _text_as_image(folder: Path) -> str:
    name = _folder_case("a", "b")(folder)
    (folder / "d" / "a" / "zz.png").write_text("not an image")
    return name


def _truncated_image(folder: Path) -> str:
    name = _folder_case("a", "b")(folder)
    path = folder / "d" / "a" / "2.png"
    path.write_bytes(path.read_bytes()[:-300])
    return name


def _empty_folder(folder: Path) -> str:
    return f"folder:{folder}"


def _class_only_in_test(folder: Path) -> str:
    for split, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            write_images(folder / split / name, 4)
    return f"folder:{folder}"


def _test_lacks_class(folder: Path) -> str:
    for split, names in (("train", "ab"), ("test", "a")):
        for name in names:
            write_images(folder / split / name, 4)
    return f"folder:{folder}"


MALFORMED: dict[str, tuple[Callable[[Path], str], str]] = {
    "unknown name": (lambda f: "cifar", "unknown data set 'cifar'"),
    "near miss": (lambda f: "fashion-mnist-min", "did you mean 'fashion-mnist-mini'"),
    "argument where none is": (lambda f: "fashion-mnist-mini:x", "unknown data set"),
    "no path": (lambda f: "folder:", "unknown data set"),
    "missing folder": (lambda f: f"folder:{f / 'nowhere'}", "is not a folder"),
    "empty folder": (_empty_folder, "holds no class folders"),
    "one class": (_folder_case("a"), "1 class, expected at least 2"),
    "empty class": (_empty_class, "class 'c' has no image"),
    "one image a class": (_folder_case("a", "b", n=1), "has no image"),
    "text as image": (_text_as_image, "zz.png is not a readable image"),
    "truncated image": (_truncated_image, "2.png is not a readable image"),
    "class only in test": (_class_only_in_test, "has class 'c', which train has not"),
    "class missing in test": (_test_lacks_class, "class 'b' has no image"),
    "missing npz": (lambda f: f"npz:{f / 'no.npz'}", "is not a file"),
    "empty file": (_file_case(b""), "not a readable npz"),
    "garbage file": (_file_case(b"\x00garbage" * 50), "not a readable npz"),
    "npy as npz": (_single_npy, "holds one array"),
    "truncated npz": (_truncated_npz, "not a readable npz"),
    "no labels": (_npz_case(y_train=None), "'y_train' is missing"),
    "half of test": (_npz_case(y_test=None), "only one of x_test and y_test"),
    "object images": (_npz_case(x_train=np.array([[1], [2, 3]], dtype=object)), "holds Python objects"),
    "float images": (_npz_case(x_train=np.zeros((20, 28, 28), np.float32)), "float32, expected uint8"),
    "channels first": (_npz_case(x_train=np.zeros((20, 3, 28, 28), np.uint8)), "have shape (20, 3, 28, 28)"),
    "flat images": (_npz_case(x_train=np.zeros((20, 784), np.uint8)), "have shape (20, 784)"),
    "no pixels": (_npz_case(x_train=np.zeros((20, 0, 28), np.uint8)), "no pixels"),
    "sides differ": (_npz_case(x_test=np.zeros((8, 24, 24), np.uint8)), "splits differ in image side"),
    "float labels": (_npz_case(y_train=np.zeros(20)), "expected whole numbers"),
    "one-hot labels": (_npz_case(y_train=np.eye(20, dtype=int)), "expected whole numbers"),
    "too few labels": (_npz_case(y_train=np.zeros(19, int)), "20 images but 19 labels"),
    "negative label": (_npz_case(y_train=np.arange(20) % 3 - 1), "outside"),
    "label past the classes": (_npz_case(y_test=np.array([0, 1, 2, 0, 1, 0, 1, 0])), "label 2 is outside 0 to 1"),
    "class without images": (_npz_case(y_train=np.where(np.arange(20) % 2, 2, 0)), "class '1' has no image"),
    "only one label": (_npz_case(y_train=np.zeros(20, int), y_test=np.zeros(8, int)), "1 class, expected at least 2"),
    "no training images": (_npz_case(x_train=np.zeros((0, 28, 28), np.uint8), y_train=np.zeros(0, int)), "holds no images"),
    "repeated class names": (_npz_case(classes=np.array(["a", "a"])), "class names repeat"),
    "unknown torchvision set": (lambda f: "torchvision:ImageNet", "unknown torchvision data set 'ImageNet'"),
    "lower-case torchvision set": (lambda f: "torchvision:cifar10", "did you mean 'torchvision:CIFAR10'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_data_is_refused_in_one_line_with_a_hint(case: str, tmp_path: Path) -> None:
    make, expected = MALFORMED[case]
    with pytest.raises(DataError) as caught:
        load_data(make(tmp_path))
    assert expected in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_torchvision_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.error
    import urllib.request

    def offline(*_: object, **__: object) -> object:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    for name in ("torchvision:CIFAR10", "torchvision:FashionMNIST"):
        with pytest.raises(DataError, match="cannot be downloaded or read") as caught:
            load_data(name, cache=tmp_path)
        assert caught.value.hint and "copy" in caught.value.hint
