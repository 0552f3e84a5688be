"""CUDA graphs, played by this CPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FakeCuda:
    """`torch.cuda` as far as runtimes and training use it. A graph records every operator and replays them into the same memory."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def current_stream(self, device: torch.device | None = None) -> Any:
        return SimpleNamespace(cuda_stream=4711, wait_stream=lambda other: self.said.append(f"main waits for {other.name}"), name="main")

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.said.append(f"side waits for {other.name}"), name="side")

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        self.said.append(f"on {stream.name}")
        return contextlib.nullcontext()

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph()

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph):
        self.said.append("record")
        with graph:
            yield


class FakeGraph(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    results = result if isinstance(result, list | tuple) else [result]
    return [one for one in results if isinstance(one, torch.Tensor)]
