"""What each step of a training learns from: the images it takes, moved, mirrored, cropped and changed as the recipe says.

Everything that a step draws follows from the seed and the step's number. So other processes can prepare steps ahead, and images too many
for the memory are read from disk when their step comes; neither changes a pixel. Used by `engine`.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lowsearch.data import IMAGE_MEAN, IMAGE_STD
from lowsearch.errors import UsageError
from lowsearch.train.augment import Augmentation, drawing_from, resampled
from lowsearch.train.distributed import Ranks
from lowsearch.train.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

IN_MEMORY_BYTES = 4 * 2**30
"""Images that lie on disk (a memory map, as `data` keeps a decoded folder) stay there where they are more."""
MAX_LOADERS = 8
_ORDER, _AUGMENTATION, _TIMM, _IMAGES = 1, 2, 4, 5  # Streams of random numbers; 3 is the engine's.


class Images:
    """uint8 images of `px`, resampled from stored ones (n, side, side, 3): in memory on `device`, or read from disk when asked for."""

    def __init__(self, stored: np.ndarray, px: int, device: str = "cpu") -> None:
        self.px, self.on_disk = px, stays_on_disk(stored)
        self._stored, self._device = stored, device
        self._held = None if self.on_disk else resized(stored, px, device)

    def __len__(self) -> int:
        return len(self._stored)

    def at(self, places: np.ndarray | slice) -> Tensor:
        """(B, px, px, 3) on the device."""
        if self._held is None:
            return resized(self._stored[places], self.px, self._device)
        return self._held[places if isinstance(places, slice) else as_tensor(places).to(self._device)]

    def moved(self, places: np.ndarray, recipe: Recipe, rng: np.random.Generator, part: tuple[np.ndarray, int]) -> Tensor:
        """As `at`, each moved and mirrored (`augmented`)."""
        if self._held is None:
            return augmented(self.at(places), as_tensor(np.arange(len(places))), recipe, rng, part=part)
        return augmented(self._held, as_tensor(places).to(self._device), recipe, rng, part=part)


class Feed:
    """The steps of a training, by their numbers. `px`: of the stored images that a step begins with."""

    def __init__(
        self, images: np.ndarray, px: int, recipe: Recipe, augmentation: Augmentation | None, *,
        seed: int, batch_size: int, steps_per_epoch: int, ranks: Ranks, device: str, loaders: int | None,
    ) -> None:  # fmt: skip
        """`loaders`: processes that prepare steps ahead; by default some where a GPU would wait for what a CPU prepares."""
        prepared_on_cpu = augmentation is not None or stays_on_disk(images)
        self.loaders = _loaders(device, ranks) if loaders is None and prepared_on_cpu else loaders or 0
        if self.loaders and "fork" not in multiprocessing.get_all_start_methods():
            raise UsageError("processes that load images need fork, which this system lacks", hint="--loaders 0")
        self._images = Images(images, px, "cpu" if self.loaders else device)  # A forked process has no GPU.
        self._recipe, self._augmentation, self._device = recipe, augmentation, device
        self._seed, self._batch_size, self._steps_per_epoch = seed, batch_size, steps_per_epoch
        self._mine = ranks.share(batch_size)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def places(self, step: int) -> np.ndarray:
        """(B,) of the images that this process takes in `step`."""
        epoch, position = divmod(step, self._steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, _ORDER, epoch]).permutation(len(self._images))
        return self._order[1][position * self._batch_size : (position + 1) * self._batch_size][self._mine]

    def keys(self, step: int) -> np.ndarray:
        """(2, B) of what is drawn for each image alone: in `pixels`, and when it is erased."""
        return np.random.default_rng([self._seed, _IMAGES, step]).integers(2**63, size=(2, self._batch_size))[:, self._mine]

    def draws(self, step: int) -> np.random.Generator:
        """Of what is drawn for a whole batch."""
        return np.random.default_rng([self._seed, _TIMM, step])

    def __getitem__(self, step: int) -> Tensor:
        """(B, H, W, 3) uint8: the pixels of `step`, before they are normalised and mixed."""
        rng = np.random.default_rng([self._seed, _AUGMENTATION, step])
        images_BHWC = self._images.moved(self.places(step), self._recipe, rng, (self._mine, self._batch_size))
        if self._augmentation is None:
            return images_BHWC
        with drawing_from(self.draws(step)):
            return self._augmentation.pixels(images_BHWC, self.keys(step)[0].tolist())

    def steps(self, start: int, stop: int) -> Iterator[Tensor]:
        """The pixels of each step from `start` to before `stop`, on the device."""
        if not self.loaders:
            yield from (self[step].to(self._device) for step in range(start, stop))
            return
        from torch.utils.data import DataLoader

        ahead = DataLoader(
            self, batch_size=None, sampler=range(start, stop), num_workers=self.loaders, multiprocessing_context="fork",  # pyright: ignore[reportArgumentType]
            pin_memory=self._device != "cpu",
        )  # fmt: skip
        yield from (images_BHWC.to(self._device, non_blocking=True) for images_BHWC in ahead)


def stays_on_disk(images: np.ndarray) -> bool:
    """Whether `images` are a file that is not read into memory as a whole."""
    return isinstance(images, np.memmap) and images.nbytes > IN_MEMORY_BYTES


def _loaders(device: str, ranks: Ranks) -> int:
    if device == "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    return min(MAX_LOADERS, max(1, (os.cpu_count() or 1) // ranks.size))


def augmented(
    images_BHWC: Tensor, chosen: Tensor, recipe: Recipe, rng: np.random.Generator, *, part: tuple[np.ndarray, int] | None = None
) -> Tensor:
    """The `chosen` of uint8 `images_BHWC`, each shifted and mirrored at random.

    `part`: the places of the chosen in a batch, and its size, where they are not all of it; `rng` draws for the whole batch.
    """
    import torch

    n, px = len(chosen), images_BHWC.shape[1]
    places, drawn = (np.arange(n), n) if part is None else part
    device = images_BHWC.device
    reach = round(recipe.shift * px)
    shifts = rng.integers(-reach, reach + 1, size=(2, drawn, 1))[:, places]
    rows, columns = np.clip(np.arange(px) + shifts, 0, px - 1)
    if recipe.flip:
        columns = np.where((rng.random((drawn, 1)) < 0.5)[places], columns[:, ::-1], columns)
    # One gather from a flat list of pixels: a third of the time of indexing with three tensors.
    pixels = (
        chosen.to(device)[:, None, None] * (px * px) + as_tensor(rows * px).to(device)[:, :, None] + as_tensor(columns).to(device)[:, None]
    )
    return torch.index_select(images_BHWC.reshape(-1, 3), 0, pixels.reshape(-1)).reshape(n, px, px, 3)


def resized(images: np.ndarray, px: int, device: str = "cpu") -> Tensor:
    """`images` (n, side, side, 3) as a uint8 tensor (n, px, px, 3) on `device`, resampled once with antialiasing."""
    import torch

    if images.shape[1] == px:
        return as_tensor(images).to(device)
    out = torch.empty((len(images), px, px, 3), dtype=torch.uint8, device=device)
    for start in range(0, len(images), 500):
        out[start : start + 500] = resampled(as_tensor(images[start : start + 500]).to(device), px)
    return out


def network_input(images: np.ndarray, resolution_px: int) -> Tensor:
    """uint8 `images` (n, side, side, 3) as a network of `resolution_px` sees them, (n, 3, resolution_px, resolution_px)."""
    return normalised(resized(images, resolution_px))


def normalised(images_BHWC: Tensor) -> Tensor:
    """uint8 pixels as the network's input; NHWC memory seen as NCHW is the channels-last layout, so nothing is copied for it."""
    import torch

    mean = torch.tensor(IMAGE_MEAN, device=images_BHWC.device) * 255
    std = torch.tensor(IMAGE_STD, device=images_BHWC.device) * 255
    return ((images_BHWC.float() - mean) / std).permute(0, 3, 1, 2)


def as_tensor(values: np.ndarray) -> Tensor:
    """`values` on the CPU, not copied where they are contiguous: to be read, not written."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Images of a file that was opened to be read.
        return torch.from_numpy(np.ascontiguousarray(values))
