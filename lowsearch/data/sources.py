"""Data sets by name: the embedded one, an image folder, Tiny-ImageNet, an npz file, torchvision's downloads.

`load_data("fashion-mnist-mini")`, `load_data("folder:PATH")`, `load_data("npz:PATH")`, `load_data("torchvision:CIFAR10")`,
`load_data("tiny-imagenet:PATH")`. Whatever the source, three disjoint splits come out; a split that the source lacks is split off the
training images, seeded. Nothing here unpickles: the CIFAR sets are read from their binary form for that reason.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from platformdirs import user_cache_path

from lowsearch.data.decoded import InMemory, Progress, decoded_once
from lowsearch.data.images import SPLIT_NAMES, ImageData, Split, as_labels, as_rgb, split_off, stratified_order
from lowsearch.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

VAL_FRACTION = 0.2
TEST_FRACTION = 0.2
MAX_IMAGE_PX = 224
"""Images of a folder are stored at no more than this side, whatever their files hold, unless `image_px` says otherwise."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def load_data(
    name: str, *, seed: int = 0, image_px: int | None = None, cache: Path | None = None, progress: Progress | None = None
) -> ImageData:
    """The data set called `name`, in three disjoint splits. Raises DataError with the reason when it cannot be read.

    `seed` draws the splits that the source lacks. `image_px`: side that a folder's images are brought to (default: that of most
    images, at most MAX_IMAGE_PX). `cache`: where torchvision's downloads and what image files hold are kept (default: the user's cache).
    `progress` hears of image files that are decoded, which is done once.
    """
    kind, colon, argument = name.partition(":")
    if kind not in SOURCES or bool(colon) != (kind in _WITH_ARGUMENT) or (colon and not argument):
        close = get_close_matches(kind, SOURCES, n=1)
        guess = f"did you mean {_USAGE[close[0]]!r}?" if close else f"one of: {', '.join(_USAGE.values())}"
        raise DataError(f"unknown data set {name!r}", hint=guess)

    def read(place: InMemory) -> ImageData:
        return SOURCES[kind](name, argument, seed=seed, image_px=image_px, cache=cache, place=place)

    if kind not in _OF_IMAGE_FILES:
        return read(InMemory())
    return decoded_once(
        read, name=name, root=Path(argument).expanduser(), options={"kind": kind, "seed": seed, "image_px": image_px},
        folder=(cache or user_cache_path("lowsearch")) / "decoded", progress=progress,
    )  # fmt: skip


def _embedded(name: str, _: str, **_options: Any) -> ImageData:
    path = files("lowsearch.data") / "embedded" / f"{name}.npz"
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        classes = tuple(str(c) for c in arrays["classes"])
        train, val, test = (_mosaic_split(arrays[f"{s}_blob"], arrays[f"{s}_offsets"], name) for s in SPLIT_NAMES)
    return ImageData(name=name, classes=classes, train=train, val=val, test=test)


def _mosaic_split(blob: np.ndarray, offsets: np.ndarray, name: str) -> Split:
    """The images of one split, its classes taking turns, from one mosaic of 28 px images a class."""
    images: list[np.ndarray] = []
    for start, stop in zip(offsets, offsets[1:], strict=False):
        mosaic = np.asarray(_decode(blob[start:stop].tobytes(), name).convert("L"))
        rows, columns = mosaic.shape[0] // 28, mosaic.shape[1] // 28
        images.append(mosaic.reshape(rows, 28, columns, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28))
    by_turn = np.stack(images, axis=1)
    labels = np.tile(np.arange(len(images), dtype=np.int64), len(by_turn))
    return Split(images=as_rgb(by_turn.reshape(-1, 28, 28), name), labels=labels)


def _folder(name: str, argument: str, *, seed: int, image_px: int | None, place: InMemory, **_options: Any) -> ImageData:
    """`PATH/{train,val,test}/CLASS/IMAGE` (val or test may be missing), or `PATH/CLASS/IMAGE`."""
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise DataError(f"{name}: {root} is not a folder", hint="give the folder that holds train/CLASS/IMAGE or CLASS/IMAGE")
    has_splits = (root / "train").is_dir()
    parts = {s: root / s for s in SPLIT_NAMES if (root / s).is_dir()} if has_splits else {"train": root}
    classes = tuple(folder.name for folder in _subfolders(parts["train"]))
    if not classes:
        hint = "put every class's images into a folder of its own"
        raise DataError(f"{name}: {parts['train']} holds no class folders", hint=hint)
    listed = {split: _listed_images(folder, classes, name) for split, folder in parts.items()}
    if image_px is None:
        image_px = _common_side([path for pairs in listed.values() for path, _ in pairs], name)
    return _of_files(name, classes, listed, image_px, seed, place)


def _of_files(
    name: str, classes: tuple[str, ...], listed: dict[str, list[tuple[Path, int]]], image_px: int, seed: int, place: InMemory
) -> ImageData:
    """The data set of (path, label) pairs by split, at `image_px`. Who goes where is decided before anything is decoded."""
    pairs = [pair for split in listed.values() for pair in split]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    starts = np.cumsum([0, *map(len, listed.values())])
    parts = {split: np.arange(start, stop) for split, start, stop in zip(listed, starts, starts[1:], strict=False)}
    complete = _complete(name, {split: Split(images=places, labels=labels[places]) for split, places in parts.items()}, seed)

    def read(path: Path) -> np.ndarray:
        return as_rgb(_read_square(path, image_px, name)[None], name)[0]

    splits: dict[str, Any] = {}
    shape = as_rgb(np.empty((0, image_px, image_px, 3), np.uint8), name).shape[1:]
    for split, chosen in complete.items():
        paths = [pairs[i][0] for i in chosen.images]
        images = place.filled(split, (len(paths), *shape), lambda i, paths=paths: read(paths[i]))
        splits[split] = Split(images=images, labels=chosen.labels)
    return ImageData(name=name, classes=classes, **splits)


def _listed_images(folder: Path, classes: tuple[str, ...], name: str) -> list[tuple[Path, int]]:
    """Every image file below `folder` with the index of its class."""
    found = [f.name for f in _subfolders(folder)]
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise DataError(f"{name}: {folder} has class {unknown[0]!r}, which train has not", hint="use the same class folders in every split")
    pairs: list[tuple[Path, int]] = []
    for label, class_name in enumerate(classes):
        paths = sorted(p for p in (folder / class_name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not paths:
            hint = "add images or remove the folder"
            raise DataError(f"{name}: class {class_name!r} has no image in {folder}", hint=hint)
        pairs += [(path, label) for path in paths]
    return pairs


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _common_side(paths: list[Path], name: str) -> int:
    """The shorter side that most of (up to 500 of) the images have, at most MAX_IMAGE_PX."""
    sides = Counter(_shorter_side(path, name) for path in paths[:: max(1, len(paths) // 500)])
    return min(MAX_IMAGE_PX, sides.most_common(1)[0][0])


def _shorter_side(path: Path, name: str) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, name, error) from error


def _read_square(path: Path, image_px: int, name: str) -> np.ndarray:
    """The image's centre square as (image_px, image_px, 3) uint8."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, name, error) from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if side != image_px:
        image = image.resize((image_px, image_px), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _decode(encoded: bytes, name: str) -> Image:
    from PIL import Image, features

    if not features.check("webp"):
        raise DataError(f"{name}: this Pillow cannot decode WebP", hint="pip install --force-reinstall pillow")
    return Image.open(io.BytesIO(encoded))


def _unreadable(path: Path, name: str, error: Exception) -> DataError:
    return DataError(f"{name}: {path} is not a readable image ({type(error).__name__})", hint="remove or replace the file")


def _tiny_imagenet(name: str, argument: str, *, seed: int, image_px: int | None, place: InMemory, **_options: Any) -> ImageData:
    """Tiny-ImageNet as its archive unpacks: `train/WNID/images/IMAGE`, `val/images/IMAGE` with `val/val_annotations.txt`.

    Its `test` has no labels, so its `val` is the test split here, and val is split off its `train`.
    """
    root = Path(argument).expanduser()
    annotations = root / "val" / "val_annotations.txt"
    if not (root / "train").is_dir() or not annotations.is_file():
        hint = "give the folder that holds train/WNID/images and val/val_annotations.txt, or use folder:PATH for another layout"
        raise DataError(f"{name}: {root} does not hold Tiny-ImageNet as it is published", hint=hint)
    classes = tuple(folder.name for folder in _subfolders(root / "train"))
    number = {wnid: i for i, wnid in enumerate(classes)}
    val: list[tuple[Path, int]] = []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        file, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in number:
            raise DataError(
                f"{name}: {annotations} gives {file!r} the class {wnid!r}, which train has not", hint="unpack the archive again"
            )
        val.append((root / "val" / "images" / file, number[wnid]))
    listed = {"train": _listed_images(root / "train", classes, name), "test": val}
    return _of_files(name, classes, listed, image_px or 64, seed, place)


def _npz(name: str, argument: str, *, seed: int, **_options: Any) -> ImageData:
    """Arrays x_train y_train x_test y_test [x_val y_val] [classes] of one npz file."""
    path = Path(argument).expanduser()
    arrays = _npz_arrays(path, name)
    missing = [key for key in ("x_train", "y_train") if key not in arrays]
    if missing:
        hint = "save x_train y_train x_test y_test [x_val y_val] with numpy.savez"
        raise DataError(f"{name}: array {missing[0]!r} is missing; it holds {', '.join(sorted(arrays)) or 'nothing'}", hint=hint)
    splits: dict[str, Split] = {}
    for split in SPLIT_NAMES:
        x, y = arrays.get(f"x_{split}"), arrays.get(f"y_{split}")
        if (x is None) != (y is None):
            hint = "save both or none of the two"
            raise DataError(f"{name}: only one of x_{split} and y_{split} is there", hint=hint)
        if x is not None and y is not None:
            images = as_rgb(x, f"{name}: x_{split}")
            splits[split] = Split(images=images, labels=as_labels(y, len(images), f"{name}: y_{split}"))
    if "classes" in arrays:
        classes = tuple(str(c) for c in arrays["classes"].ravel())
    else:
        labels = splits["train"].labels
        classes = tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))
    return _with_missing_splits(name, classes, splits, seed)


def _npz_arrays(path: Path, name: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{name}: {path} is not a file", hint="give the path of an .npz file")
    try:
        with path.open("rb") as raw:
            file = np.load(raw, allow_pickle=False)
            if not isinstance(file, np.ndarray):
                with file:
                    return {key: file[key] for key in file}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = "holds Python objects" if "pickle" in str(error).lower() and zipfile.is_zipfile(path) else "is not a readable npz file"
        raise DataError(f"{name}: {path} {reason}", hint="save plain uint8 images and whole-number labels with numpy.savez") from error
    raise DataError(f"{name}: {path} holds one array, expected an .npz", hint="save with numpy.savez")


def _torchvision(name: str, argument: str, *, seed: int, cache: Path | None, **_options: Any) -> ImageData:
    if argument not in TORCHVISION_SETS:
        close = get_close_matches(argument.lower(), [known.lower() for known in TORCHVISION_SETS], n=1)
        guess = next((known for known in TORCHVISION_SETS if close and known.lower() == close[0]), None)
        hint = f"did you mean 'torchvision:{guess}'?" if guess else f"known: {', '.join(TORCHVISION_SETS)}"
        raise DataError(f"{name}: unknown torchvision data set {argument!r}", hint=hint)
    folder = cache or user_cache_path("lowsearch") / "torchvision"
    try:
        classes, train, test = TORCHVISION_SETS[argument](argument, folder)
    except (OSError, RuntimeError) as error:  # torchvision reports failed downloads and wrong checksums with either
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        hint = f"download it on a machine with a network and copy {folder} here, or use npz:PATH or fashion-mnist-mini"
        raise DataError(f"{name}: cannot be downloaded or read ({reason})", hint=hint) from error
    return _with_missing_splits(name, classes, {"train": train, "test": test}, seed)


_Loaded = tuple[tuple[str, ...], Split, Split]


def _mnist_like(set_name: str, folder: Path) -> _Loaded:
    from torchvision import datasets

    cls = getattr(datasets, set_name)
    parts = [cls(str(folder), train=train, download=True) for train in (True, False)]
    splits = [Split(images=as_rgb(p.data.numpy(), set_name), labels=as_labels(p.targets.numpy(), len(p.data), set_name)) for p in parts]
    return tuple(str(c) for c in parts[0].classes), splits[0], splits[1]


def _svhn(set_name: str, folder: Path) -> _Loaded:
    from torchvision import datasets

    parts = [datasets.SVHN(str(folder / set_name), split=split, download=True) for split in ("train", "test")]
    splits = [
        Split(images=as_rgb(p.data.transpose(0, 2, 3, 1), set_name), labels=as_labels(p.labels, len(p.data), set_name)) for p in parts
    ]
    return tuple(str(digit) for digit in range(10)), splits[0], splits[1]


_CIFAR_BINARY: dict[str, tuple[str, str, str, tuple[str, ...], str]] = {
    # set: (archive, md5 as published beside it, class names, training files, test file); the folder inside follows from the file names
    "CIFAR10": (
        "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin/batches.meta.txt",
        tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)), "cifar-10-batches-bin/test_batch.bin",
    ),
    "CIFAR100": (
        "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary/fine_label_names.txt",
        ("cifar-100-binary/train.bin",), "cifar-100-binary/test.bin",
    ),
}  # fmt: skip


def _cifar(set_name: str, folder: Path) -> _Loaded:
    """CIFAR from its binary form: records of one (CIFAR-100: two, the second counts) label bytes and 3 x 32 x 32 pixel bytes."""
    from torchvision.datasets.utils import download_and_extract_archive

    archive, md5, names, train_files, test_file = _CIFAR_BINARY[set_name]
    if not all((folder / file).is_file() for file in (names, *train_files, test_file)):
        download_and_extract_archive(f"https://www.cs.toronto.edu/~kriz/{archive}", str(folder), md5=md5)
    classes = tuple(line for line in (folder / names).read_text().split("\n") if line.strip())
    label_bytes = 2 if set_name == "CIFAR100" else 1
    train = _cifar_records([folder / file for file in train_files], label_bytes)
    return classes, train, _cifar_records([folder / test_file], label_bytes)


def _cifar_records(paths: Iterable[Path], label_bytes: int) -> Split:
    rows: list[np.ndarray] = []
    for path in paths:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        if raw.size == 0 or raw.size % (label_bytes + 3072):
            raise DataError(f"{path} has {raw.size} bytes, not a whole number of records", hint="delete the file to download it again")
        rows.append(raw.reshape(-1, label_bytes + 3072))
    records = np.concatenate(rows)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(images=np.ascontiguousarray(images), labels=records[:, label_bytes - 1].astype(np.int64))


def _with_missing_splits(name: str, classes: tuple[str, ...], splits: dict[str, Split], seed: int) -> ImageData:
    """The data set of `splits`, completed."""
    parts: dict[str, Any] = _complete(name, splits, seed)
    return ImageData(name=name, classes=classes, **parts)


def _complete(name: str, splits: dict[str, Split], seed: int) -> dict[str, Split]:
    """`splits` with test and val split off train where missing, and the training images in a random order, classes spread evenly."""
    for split, split_images in splits.items():
        if not len(split_images):
            raise DataError(f"{name}: {split} holds no images", hint="give every split some images")
    rng = np.random.default_rng(seed)
    complete = dict(splits)
    for split, fraction in (("test", TEST_FRACTION), ("val", VAL_FRACTION)):
        if split not in complete:
            complete["train"], complete[split] = split_off(complete["train"], fraction, rng)
    train = complete["train"]
    complete["train"] = train.take(stratified_order(train.labels, rng))
    return {split: complete[split] for split in SPLIT_NAMES}


TORCHVISION_SETS: dict[str, Callable[[str, Path], _Loaded]] = {
    "CIFAR10": _cifar,
    "CIFAR100": _cifar,
    "FashionMNIST": _mnist_like,
    "KMNIST": _mnist_like,
    "MNIST": _mnist_like,
    "SVHN": _svhn,
}
SOURCES: dict[str, Callable[..., ImageData]] = {
    "fashion-mnist-mini": _embedded,
    "folder": _folder,
    "npz": _npz,
    "tiny-imagenet": _tiny_imagenet,
    "torchvision": _torchvision,
}
_WITH_ARGUMENT = ("folder", "npz", "tiny-imagenet", "torchvision")
_OF_IMAGE_FILES = ("folder", "tiny-imagenet")
_USAGE = {kind: f"{kind}:{'NAME' if kind == 'torchvision' else 'PATH'}" if kind in _WITH_ARGUMENT else kind for kind in SOURCES}
