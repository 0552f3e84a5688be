"""What a recipe does to a batch beyond moving and mirroring it: timm's crops, AutoAugment, erasing, mixup and cutmix.

timm draws from the global generators of Python, numpy and torch; `drawing_from` gives these a state that a step's own key determines,
so that a resumed training sees the same batches. What is drawn for one image has a key of its own, so that several processes, each with
some of a batch's images, make of these what one process would. Used by `engine`.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lowsearch.data import IMAGE_MEAN, IMAGE_STD
from lowsearch.errors import UsageError
from lowsearch.train.recipe import Recipe
from lowsearch.train.rung import part_of

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def drawing_from(rng: np.random.Generator) -> Iterator[None]:
    """While entered, the global generators of Python and numpy draw what `rng` determines; torch's is left where it then stands."""
    with _returning():
        _seed(int(rng.integers(2**63)))
        yield


@contextmanager
def _returning() -> Iterator[None]:
    """Leaves the global generators of Python and numpy as they were."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 timm draws from it
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _seed(key: int) -> None:
    import torch

    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    torch.manual_seed(key)


class Augmentation:
    """The random part of `recipe` that is timm's, for networks of `resolution_px` with `num_classes`. Raises UsageError where timm
    refuses the recipe's strings."""

    def __init__(self, recipe: Recipe, *, resolution_px: int, total_stride: int, num_classes: int) -> None:
        from timm.data.mixup import Mixup

        self._recipe = recipe
        parts = recipe.resolutions or (1.0,)
        several = sorted({part_of(part, resolution_px, total_stride) for part in parts})
        self.resolutions_px = several if recipe.resolutions else [resolution_px]
        self._mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes) if recipe.mixes else None
        self._transforms = cache(self._made_transforms)
        for px in self.resolutions_px:
            self._transforms(px)

    @staticmethod
    def wanted(recipe: Recipe) -> bool:
        """Whether `recipe` asks for any of it."""
        return bool(recipe.random_crop or recipe.auto_augment or recipe.erasing or recipe.mixes or recipe.resolutions)

    def pixels(self, images_BHWC: Tensor, keys: Sequence[int]) -> Tensor:
        """uint8 images, cropped and changed one by one, each by its key, and brought to the resolution that this batch draws."""
        import torch
        from PIL import Image

        px = random.choice(self.resolutions_px)
        transforms = self._transforms(px)
        if not self._recipe.random_crop:
            images_BHWC = resampled(images_BHWC, px)
        if not transforms:
            return images_BHWC
        out = torch.empty((len(images_BHWC), px, px, 3), dtype=torch.uint8)
        with _returning():
            for i, (pixels, key) in enumerate(zip(images_BHWC.cpu().numpy(), keys, strict=True)):
                _seed(key)
                image: Any = Image.fromarray(pixels)
                for transform in transforms:
                    image = transform(image)
                out[i] = torch.from_numpy(np.array(image))
        return out.to(images_BHWC.device)

    def mixed(self, x_BCHW: Tensor, labels: Tensor, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised images with rectangles erased, in each by its key, mixed in pairs from both ends; and their labels, as shares
        (B, classes) where they are mixed. Works in place."""
        from timm.data.random_erasing import RandomErasing

        if self._recipe.erasing:
            # The rectangles' noise is drawn where the images lie.
            erase = RandomErasing(self._recipe.erasing, mode="pixel", device=str(x_BCHW.device))
            with _returning():
                for x_CHW, key in zip(x_BCHW, keys, strict=True):
                    _seed(key)
                    erase(x_CHW)
        return (x_BCHW, labels) if self._mixup is None else self._mixup(x_BCHW, labels)

    def _made_transforms(self, px: int) -> tuple[Callable[[Any], Any], ...]:
        """Of PIL images, in the order they are applied."""
        from timm.data.transforms_factory import transforms_imagenet_train

        recipe = self._recipe
        try:
            parts: Any = transforms_imagenet_train(
                px, scale=(recipe.random_crop or 1.0, 1.0), hflip=0.0, color_jitter=cast(Any, None), auto_augment=recipe.auto_augment,
                mean=IMAGE_MEAN, std=IMAGE_STD, separate=True,
            )  # fmt: skip
            crop, change, _ = parts
        except (AssertionError, KeyError, ValueError) as error:
            raise UsageError(
                f"recipe: auto_augment is {recipe.auto_augment!r}, which timm refuses ({error or type(error).__name__})",
                hint="such as rand-m9-n2-mstd0.5-inc1, original or augmix-m3-w3",
            ) from error
        if recipe.auto_augment:
            _mend_posterize(change.transforms[0])
        chosen = [crop] if recipe.random_crop else []
        return tuple(chosen + ([change] if recipe.auto_augment else []))


def _mend_posterize(transform: Any) -> None:
    """At its largest magnitude timm asks Pillow to keep 0 bits of a pixel, which Pillow 13 refuses; earlier ones made the image black."""
    from PIL import Image
    from timm.data.auto_augment import posterize

    def mended(image: Any, bits_to_keep: int, **options: Any) -> Any:
        return posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)

    ops = transform.ops if hasattr(transform, "ops") else [op for policy in transform.policy for op in policy]
    for op in ops:
        if op.aug_fn is posterize:
            op.aug_fn = mended


def resampled(images_BHWC: Tensor, px: int) -> Tensor:
    """uint8 images of side `px`, resampled with antialiasing where they have another."""
    import torch
    import torch.nn.functional as F

    if images_BHWC.shape[1] == px:
        return images_BHWC
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    x_BCHW = F.interpolate(x_BCHW, size=(px, px), mode="bilinear", antialias=True, align_corners=False)
    return x_BCHW.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
