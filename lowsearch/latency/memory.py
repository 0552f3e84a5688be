"""How long memory takes to be read, by how much of it is read in turn: what a network pays for weights that its caches do not hold.

Read again and again, a few megabytes come from the caches of a core, more of them from a cache that cores share, and many from memory.
Where these steps lie, and how high they are, no data sheet of a virtual machine tells; so `profile` measures them as it measures blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

READ_BYTES = tuple(2**18 * 2 ** (i // 2) * (3 if i % 2 else 2) // 2 for i in range(21))
"""256 KiB to 256 MiB, two an octave: from inside the caches of any core to beyond those of most processors."""


@dataclass(frozen=True, slots=True)
class MemoryRead:
    """Reading `n_bytes` of memory once, from its first to its last."""

    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLatency:
    """Measured time of reading `n_bytes` that were read just before."""

    n_bytes: int
    latency_ms: float
    samples_ms: tuple[tuple[float, ...], ...] = ()
    """A tuple for every process, in it a number for every round."""
    wall_over_cpu: float = 1.0


class MemoryCurve:
    """Time of a byte that a network reads once a pass, by the bytes of the whole pass."""

    def __init__(self, rows: Sequence[MemoryLatency]) -> None:
        """Without rows, memory is as fast as the caches."""
        ordered = sorted(rows, key=lambda row: row.n_bytes)
        self._log_bytes = np.log([row.n_bytes for row in ordered])
        rates = np.array([row.latency_ms / row.n_bytes for row in ordered])
        # More memory is not faster: what a small read takes longer than a large one is its call, or noise.
        self._ms_per_byte = np.minimum.accumulate(rates[::-1])[::-1]

    def ms_per_byte(self, footprint_bytes: np.ndarray | float) -> np.ndarray:
        """Time of reading one byte in passes over `footprint_bytes` (n,), (n,)."""
        if not len(self._log_bytes):
            return np.zeros_like(np.asarray(footprint_bytes, dtype=float))
        return np.interp(np.log(np.maximum(footprint_bytes, 1)), self._log_bytes, self._ms_per_byte)

    def extra_ms_per_byte(self, footprint_bytes: np.ndarray | float) -> np.ndarray:
        """The same beyond what the smallest read takes: what leaving the nearest caches costs."""
        return self.ms_per_byte(footprint_bytes) - self.ms_per_byte(1.0)
