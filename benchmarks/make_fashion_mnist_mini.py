"""Make the embedded data set `fashion-mnist-mini` from the original Fashion-MNIST files.

    python benchmarks/make_fashion_mnist_mini.py --source /usr/share/datasets/fashion-mnist

The source folder holds the four original `*-ubyte.gz` files (Debian: `apt-get install dataset-fashion-mnist`). Train and val come
from the official training images, test from the official test images; every split has equally many images of every class, and no
image of val or test is nearly equal to one of another split. Same source, same file: the choice is seeded.

File: an npz of plain arrays. `classes`; for each split `<split>_blob` (uint8, lossless WebP mosaics one after the other) and
`<split>_offsets` (n_classes + 1,): mosaic c holds the split's images of class c, 28 px each, ten in a row.
"""

from __future__ import annotations

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PER_CLASS = {"train": 600, "val": 200, "test": 200}
IMAGE_PX = 28
IMAGES_A_ROW = 10
NEAR_RMS = 12.0
"""Two images whose pixels differ by less than this (root mean square, of 255) count as copies; unrelated neighbours differ by about 36."""
MAX_BYTES = 4_000_000


def read_idx(path: Path) -> np.ndarray:
    """The array of one gzipped IDX file, the format of MNIST: magic number, sides as big-endian integers, bytes."""
    raw = gzip.decompress(path.read_bytes())
    n_axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(n_axes)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_axes).reshape(shape)


def nearest_rms(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of `images` (n, px, px) the root-mean-square pixel difference to the nearest of `others` (m, px, px)."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) for x in (images, others))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squared.min(1), 0) / a.shape[1])


def choose(images: np.ndarray, count: int, rng: np.random.Generator, *, away_from: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, left over) of one class's `images`: `count` random ones that are no near copy of any image in `away_from`."""
    order = rng.permutation(len(images))
    kept = [i for i in order if not any(nearest_rms(images[i : i + 1], others)[0] < NEAR_RMS for others in away_from)][:count]
    return images[kept], np.delete(images, kept, axis=0)


def mosaic_webp(images: np.ndarray) -> bytes:
    """`images` (n, px, px) as one lossless WebP, IMAGES_A_ROW in a row."""
    rows = images.reshape(-1, IMAGES_A_ROW, IMAGE_PX, IMAGE_PX).transpose(0, 2, 1, 3).reshape(-1, IMAGES_A_ROW * IMAGE_PX)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "lowsearch/data/embedded/fashion-mnist-mini.npz")
    args = parser.parse_args()
    train_x, train_y = (read_idx(args.source / f"train-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    test_x, test_y = (read_idx(args.source / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))

    rng = np.random.default_rng(0)
    blobs: dict[str, list[bytes]] = {split: [] for split in PER_CLASS}
    for label, class_name in enumerate(CLASSES):
        train, rest = choose(train_x[train_y == label], PER_CLASS["train"], rng, away_from=[])
        val, _ = choose(rest, PER_CLASS["val"], rng, away_from=[train])
        test, _ = choose(test_x[test_y == label], PER_CLASS["test"], rng, away_from=[train, val])
        for split, images in (("train", train), ("val", val), ("test", test)):
            assert len(images) == PER_CLASS[split]
            blobs[split].append(mosaic_webp(images))
        print(f"{class_name:12} val to train {nearest_rms(val, train).min():5.1f}   test to train {nearest_rms(test, train).min():5.1f}")

    arrays: dict[str, np.ndarray] = {"classes": np.array(CLASSES)}
    for split, parts in blobs.items():
        arrays[f"{split}_blob"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, parts)])
    np.savez(args.out, allow_pickle=False, **arrays)
    size = args.out.stat().st_size
    print(f"{args.out}: {size:,} bytes, {sum(PER_CLASS.values()) * len(CLASSES):,} images")
    if size > MAX_BYTES:
        raise SystemExit(f"larger than {MAX_BYTES:,} bytes: lower PER_CLASS")


if __name__ == "__main__":
    main()
