"""Runtimes that are part of torch: eager, CUDA graphs, TorchScript, torch.compile and AOTInductor, each in two memory formats.

A tensor of shape (batch, channels, height, width) lies in memory as it is written (contiguous), or channels last, the order in which
the convolutions of many devices compute. A runtime whose name ends in `-nhwc` has everything channels last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils._python_dispatch import TorchDispatchMode

from lowsearch.errors import DeviceError
from lowsearch.latency.target import DeviceKind, Target
from lowsearch.memory import KEEPS_FREED_MEMORY, keep_freed_memory

MemoryFormat = Literal["contiguous", "channels-last"]

ALL_BLOCKS = 1400
"""`max_blocks` where a block is prepared in milliseconds: all of a small space."""
FEW_BLOCKS = 200
"""`max_blocks` where preparing one takes seconds; the others are predicted."""

_MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
# What is quantised to int8 is given to its runtime in fp32.
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
_INDUCTOR: Mapping[str, Any] = {"freezing": True}
"""Weights are constants, as in deployment: norms fold into convolutions, whose weights are stored as a CPU's kernels want them."""
_WARM_UPS = 2
"""Calls after which TorchScript and torch.compile have specialised the program."""


class TorchRuntime:
    """What the runtimes of torch have in common."""

    base: str
    package = "torch"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}
    max_blocks = ALL_BLOCKS

    def __init__(self, memory_format: MemoryFormat = "contiguous") -> None:
        self.memory_format: MemoryFormat = memory_format
        self.name = self.base if memory_format == "contiguous" else f"{self.base}-nhwc"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        memory = {"freed_memory": "kept"} if kind == "cpu" and KEEPS_FREED_MEMORY else {}
        return {"memory_format": self.memory_format, **memory, "cudnn_benchmark": 0, "tf32": 0}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> TorchProgram:
        """The worker has told torch how many threads; they belong to the process."""
        if device.type == "cpu":
            keep_freed_memory()
        module, x = placed(module, x, precision=precision, device=device, memory_format=self.memory_format)
        with torch.inference_mode():
            return self._compiled(module, x)

    def _compiled(self, module: nn.Module, x: Tensor) -> TorchProgram:
        return TorchProgram(module, x)


class EagerRuntime(TorchRuntime):
    """torch as it is: one operator after the other, on the CPU or a CUDA device."""

    base = "eager"


class CudaGraphsRuntime(TorchRuntime):
    """Eager, recorded once as a CUDA graph and replayed: the kernels of eager without the launches. `cuda` is `torch.cuda`, or a fake."""

    base = "cudagraphs"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cuda": ("fp32", "fp16", "bf16")}

    def __init__(self, memory_format: MemoryFormat = "contiguous", *, cuda: Any = torch.cuda) -> None:
        super().__init__(memory_format)
        self._cuda = cuda

    def _compiled(self, module: nn.Module, x: Tensor) -> TorchProgram:
        return _CudaGraph(module, x, self._cuda)


class TorchScriptRuntime(TorchRuntime):
    """torch.jit: traced, frozen and optimised for inference, as the LowFormer papers time. torch has deprecated it."""

    base = "torchscript"

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        return {"graph": "traced, optimize_for_inference", **super().options(target, kind)}

    def _compiled(self, module: nn.Module, x: Tensor) -> TorchProgram:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
            # torch.jit as a whole is deprecated, and tracing warns of every size it fixes: they are fixed here.
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)
            traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(module, x)))
        return _warmed(TorchProgram(traced, x))


class CompileRuntime(TorchRuntime):
    """torch.compile with Inductor, which needs a C++ compiler. What it made is kept in torch's own cache on disk."""

    base = "compile"
    max_blocks = FEW_BLOCKS

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        return {"backend": "inductor", "freezing": 1, **super().options(target, kind)}

    def _compiled(self, module: nn.Module, x: Tensor) -> TorchProgram:
        _prepare_inductor(self.name, x.device)
        return _warmed(TorchProgram(torch.compile(_alone(module), fullgraph=True, dynamic=False, options=dict(_INDUCTOR)), x))


class AotInductorRuntime(TorchRuntime):
    """torch.export and AOTInductor: a shared library that runs without Python inside. It needs a C++ compiler."""

    base = "aoti"
    max_blocks = FEW_BLOCKS

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        return {"backend": "aot inductor", "freezing": 1, **super().options(target, kind)}

    def _compiled(self, module: nn.Module, x: Tensor) -> TorchProgram:
        from torch import _inductor as inductor  # Where torch's documentation has the two functions, in spite of its name.

        _prepare_inductor(self.name, x.device)
        with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory(prefix="lowsearch-") as folder:
            exported = torch.export.export(module, (x,))
            package = str(Path(folder) / "program.pt2")
            inductor.aoti_compile_and_package(exported, package_path=package, inductor_configs=dict(_INDUCTOR))
            return TorchProgram(inductor.aoti_load_package(package), x)


class TorchProgram:
    """Anything that is called like a module."""

    def __init__(self, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._call = call
        self._x = x

    def run(self) -> None:
        with torch.inference_mode():
            self._call(self._x)

    def output(self) -> np.ndarray:
        with torch.inference_mode():
            return self._call(self._x).float().cpu().numpy()


class _CudaGraph(TorchProgram):
    WARM_UPS = 3
    """Calls beside the recording in which libraries choose their kernels and take their memory: neither may happen in a graph."""

    def __init__(self, module: nn.Module, x: Tensor, cuda: Any) -> None:
        super().__init__(module, x)  # Keeps alive what the graph reads.
        beside = cuda.Stream()
        beside.wait_stream(cuda.current_stream())
        with cuda.stream(beside):
            with _OnOneDevice():  # A recording that fails is not cleaned up by every torch; so what would fail is noticed here.
                module(x)
            for _ in range(self.WARM_UPS - 1):
                module(x)
        cuda.current_stream().wait_stream(beside)
        self._graph = cuda.CUDAGraph()
        with cuda.graph(self._graph):
            self._y = module(x)

    def run(self) -> None:
        self._graph.replay()

    def output(self) -> np.ndarray:
        self.run()
        with torch.inference_mode():
            return self._y.float().cpu().numpy()


class _OnOneDevice(TorchDispatchMode):
    """Refuses copies between the host and another device, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # In inference mode composite operators arrive as they were called, not as what they consist of.
        if func.overloadpacket.__name__ in ("to", "_to_copy", "copy_", "item", "_local_scalar_dense"):
            places = {value.device.type if isinstance(value, Tensor) else "cpu" for value in (*args[:2], result) if not _is_setting(value)}
            if len(places) > 1:
                raise RuntimeError(f"it copies between {' and '.join(sorted(places))} while it runs")
        return result


def _is_setting(value: object) -> bool:
    """Whether an argument of a copy says how, not what."""
    return isinstance(value, bool | torch.dtype | torch.device | torch.memory_format | None)


def placed(
    module: nn.Module, x: Tensor, *, precision: str, device: torch.device, memory_format: MemoryFormat = "contiguous"
) -> tuple[nn.Module, Tensor]:
    """Both on `device` in `precision`. fp32 means fp32: cuDNN would otherwise round convolution inputs to ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    order = _MEMORY_FORMATS[memory_format]
    module = module.to(device, _DTYPES[precision]).to(memory_format=order)
    return module, x.to(device, _DTYPES[precision]).contiguous(memory_format=order)


def _warmed(program: TorchProgram) -> TorchProgram:
    for _ in range(_WARM_UPS):
        program.run()
    return program


def _prepare_inductor(name: str, device: torch.device) -> None:
    """Raise DeviceError without a compiler. On a CPU it compiles in this process: a pool would work beside what is timed."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not (shutil.which(compiler) or shutil.which("clang++")):
        raise DeviceError(f"runtime {name} needs a C++ compiler, and there is no {compiler}", hint="install g++, or set CXX")
    if device.type == "cpu":
        from torch._inductor import config

        config.compile_threads = 1


def _alone(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that calls `module`, with code of its own: torch.compile keeps its results by code, so blocks of one class would
    share one place, which holds eight and is searched in every call."""

    def forward(x: Tensor) -> Tensor:
        return module(x)

    return FunctionType(forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__)
