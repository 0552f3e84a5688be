"""A step of training as a CUDA graph: recorded once, replayed ever after.

The layers of a small network take a GPU microseconds, and Python ten times as long to ask for them. A recording asks for all at once:
the same kernels on the same memory, so the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Step = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""Of inputs and labels, always of the same shapes; what it returns and what it leaves behind must always lie in the same memory."""


class Recorded:
    """`step`, called as it is for the first few times and recorded then. `cuda` is `torch.cuda`, or a fake."""

    WARM_UPS = 3
    """Calls in which libraries choose their kernels and take their memory, neither of which may happen in a graph."""

    def __init__(self, step: Step, cuda: Any) -> None:
        self._step, self._cuda = step, cuda
        self._calls = 0
        self._graph: Any = None

    def __call__(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self._calls += 1
        if self._calls <= self.WARM_UPS:
            return self._beside(x, labels)
        if self._graph is None:
            self._x, self._labels = x.clone(), labels.clone()
            self._graph = self._cuda.CUDAGraph()
            with self._cuda.graph(self._graph):
                self._result = self._step(self._x, self._labels)
        self._x.copy_(x)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._result

    def _beside(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """On a stream of its own, as a recording will be."""
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            result = self._step(x, labels)
        self._cuda.current_stream().wait_stream(stream)
        return result
