"""Images as values: three disjoint splits of square RGB images with labels, and the checks that every source must pass.

Made by `sources`, read by `train`. `val` steers everything a search decides; `test` is read once, for the final front.
"""

from __future__ import annotations

import hashlib
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np

from lowsearch.errors import DataError

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Every network sees `(pixel / 255 - IMAGE_MEAN) / IMAGE_STD`: ImageNet's constants, as the published weights expect."""

SPLIT_NAMES = ("train", "val", "test")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Images with their labels."""

    images: np.ndarray
    """(n, px, px, 3) uint8."""
    labels: np.ndarray
    """(n,) int64, indices into the data set's classes."""

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        # What is mapped from a file goes to other machines as a plain array, which Ray's processes share.
        return _split, (np.asarray(self.images), np.asarray(self.labels))

    def take(self, indices: np.ndarray) -> Split:
        """The images at `indices`, in that order."""
        return Split(images=self.images[indices], labels=self.labels[indices])


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    return Split(images=images, labels=labels)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageData:
    """A classification data set in three disjoint splits. Raises DataError when a split is malformed or lacks a class."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    data_hash: str = ""
    """Sixteen hexadecimal digits of the SHA-256 of classes, pixels and labels of all splits; computed here."""
    known_hash: InitVar[str | None] = None
    """It, where it was computed of these very images before: reading hundreds of gigabytes takes minutes."""

    def __post_init__(self, known_hash: str | None) -> None:
        _check_classes(self.name, self.classes)
        for split_name in SPLIT_NAMES:
            _check_split(f"{self.name}: {split_name}", getattr(self, split_name), self.classes)
        sides = {split_name: getattr(self, split_name).images.shape[1] for split_name in SPLIT_NAMES}
        if len(set(sides.values())) > 1:
            raise DataError(f"{self.name}: splits differ in image side: {sides}", hint="bring all images to one size")
        object.__setattr__(self, "data_hash", known_hash or _content_hash(self))

    @property
    def image_px(self) -> int:
        """Side of the stored images; networks of another resolution see them resized."""
        return int(self.train.images.shape[1])


def as_rgb(images: np.ndarray, name: str) -> np.ndarray:
    """`images` as (n, px, px, 3) uint8: grey repeated to three channels, oblong ones cropped to the centre, 28 px padded to 32.

    The padding is black, the background of the 28 px data sets (MNIST and its relatives); 32 px divides by every micro network's stride.
    """
    if images.dtype != np.uint8:
        raise DataError(f"{name}: images are {images.dtype}, expected uint8 (0 to 255)", hint="convert with (x * 255).astype('uint8')")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        expected = "(n, height, width), (n, height, width, 1) or (n, height, width, 3)"
        raise DataError(f"{name}: images have shape {images.shape}, expected {expected}", hint="move the channels to the last axis")
    height, width = images.shape[1:3]
    side = min(height, width)
    if side < 1:
        raise DataError(f"{name}: images have shape {images.shape}: no pixels", hint="check how the arrays were written")
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, top : top + side, left : left + side]
    if side == 28:
        images = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return np.ascontiguousarray(images) if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def as_labels(labels: np.ndarray, n_images: int, name: str) -> np.ndarray:
    """`labels` as (n,) int64. Raises DataError unless they are `n_images` whole numbers."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DataError(
            f"{name}: labels are {labels.dtype} of shape {labels.shape}, expected whole numbers of shape (n,)",
            hint="store class indices, 0 to n_classes - 1",
        )
    if len(labels) != n_images:
        raise DataError(f"{name}: {n_images} images but {len(labels)} labels", hint="store one label for every image")
    return labels.astype(np.int64)


def stratified_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of `labels` (n,) in which every prefix holds the classes in nearly their overall proportions."""
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + rng.uniform(size=len(members))) / len(members)
    return np.argsort(position, kind="stable")


def split_off(split: Split, fraction: float, rng: np.random.Generator) -> tuple[Split, Split]:
    """(rest, part) where `part` holds about `fraction` of every class, and at least one image where the class has two."""
    part: list[np.ndarray] = []
    for label in np.unique(split.labels):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        part.append(members[:count])
    chosen = np.sort(np.concatenate(part))
    rest = np.setdiff1d(np.arange(len(split)), chosen)
    return split.take(rest), split.take(chosen)


def _check_classes(name: str, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DataError(f"{name}: {len(classes)} class, expected at least 2", hint="a classifier needs two classes to tell apart")
    if len(set(classes)) < len(classes):
        raise DataError(f"{name}: class names repeat", hint="give every class its own name")


def _check_split(name: str, split: Split, classes: tuple[str, ...]) -> None:
    images: Any = split.images
    labels: Any = split.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.shape[1] != images.shape[2]:
        raise DataError(f"{name}: images are {images.dtype} {images.shape}, expected uint8 (n, px, px, 3)", hint="use load_data")
    if labels.dtype != np.int64 or labels.shape != (len(images),):
        raise DataError(f"{name}: labels are {labels.dtype} {labels.shape}, expected int64 ({len(images)},)", hint="use load_data")
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if outside.size:
        raise DataError(f"{name}: label {outside[0]} is outside 0 to {len(classes) - 1}", hint="labels are indices into the classes")
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        empty = classes[int(np.argmin(counts > 0))]
        raise DataError(f"{name}: class {empty!r} has no image", hint="give every class an image in every split, or remove the class")


def _content_hash(data: ImageData) -> str:
    digest = hashlib.sha256(repr(data.classes).encode())
    for split_name in SPLIT_NAMES:
        split: Split = getattr(data, split_name)
        digest.update(f"{split_name} {split.images.shape}".encode())
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels.astype("<i8")).data)
    return digest.hexdigest()[:16]
