"""The processes that train one network or one supernet together, as torchrun starts them.

Each holds all weights and all images, takes its share of every batch, and makes the same step by the sum of everybody's gradients. They
are summed by hand, once a step: torch's own wrapper expects equal shares, and of a supernet the same weights in every pass. The first
process alone reads and writes files, and tells the others. Used by `engine`, `full` and `supernet`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lowsearch.errors import StudyError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ranks:
    """The processes that train together; alone, there is nothing to say to each other."""

    rank, size = 0, 1

    def share(self, n: int) -> np.ndarray:
        """The positions in a batch of `n` that are this process's.

        They are whole pairs (i, n - 1 - i), in an order whose reversal swaps the two, because that is how mixup pairs the images of a
        batch: mixed within the shares, the batch is mixed as one process does it. Alone: 0 to n - 1.
        """
        first = np.arange((n + 1) // 2)[self.rank :: self.size]
        second = n - 1 - first[::-1]
        return np.concatenate([first, second[2 * second > n - 1]])  # The middle of an odd number is its own partner.

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace every tensor, all of one type, by its sum over the processes, in place."""

    def total(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over the processes."""
        return values

    def agreed(self, value: Any) -> Any:
        """What the first process says, whatever can be pickled."""
        return value

    def wait(self) -> None:
        """Until every process is here."""

    def share_norms(self, model: nn.Module) -> nn.Module:
        """`model`, whose BatchNorms normalise by the images of all processes in training. Their state dict stays what it was."""
        return model


class _Launched(Ranks):
    """As torchrun started them."""

    def __init__(self, device: str) -> None:
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def sum(self, tensors: list[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, *values: float) -> tuple[float, ...]:
        import torch
        import torch.distributed as dist

        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def agreed(self, value: Any) -> Any:
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said)
        return said[0]

    def wait(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def share_norms(self, model: nn.Module) -> nn.Module:
        from torch import nn

        if self._device != "cpu":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        from lowsearch.model.shared_norm import share_batch_norms  # torch's refuses a CPU

        return share_batch_norms(model)


@contextmanager
def launched_ranks(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started with this one; just this one where it did not.

    Raises UsageError where this process has no GPU of its own, and StudyError where another process ended while this one waited for it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    if device != "cpu":
        number, available = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= available:
            raise UsageError(
                f"torchrun started more processes than this machine has GPUs, {available}",
                hint=f"torchrun --nproc-per-node {available} -m lowsearch …",
            )
        torch.cuda.set_device(number)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield _Launched(device)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise StudyError(
            "another process of this training ended, and with it this one", hint="its own message says why; the same command resumes"
        ) from error
    # Not after an error: leaving in order would wait for the others.
    dist.destroy_process_group()


def broken() -> bool:
    """Whether this process trained with others and had to leave them: torch still holds what joined them."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def require_shares(batch_size: int, processes: int) -> None:
    """Raise UsageError where a batch has too few images for so many processes."""
    if processes > 1 and batch_size < 2 * processes:
        raise UsageError(f"a batch of {batch_size} images is too small for {processes} processes", hint="2 images each, at least")
