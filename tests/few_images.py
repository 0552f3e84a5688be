"""The embedded images, cut down to what a test needs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lowsearch.data import ImageData, load_data


def few_images(*, train: int, val: int, test: int) -> ImageData:
    """The first so many images of each split."""
    data = load_data("fashion-mnist-mini")
    take = {name: getattr(data, name).take(np.arange(n)) for name, n in (("train", train), ("val", val), ("test", test))}
    return dataclasses.replace(data, **take)
