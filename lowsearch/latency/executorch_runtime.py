"""ExecuTorch, torch's runtime for phones and boards, with the XNNPACK delegate on a CPU.

What the delegate does not take (group and layer norms, and the guard of torch's softmax against rows that are masked whole) runs by
ExecuTorch's own kernels, as it would on a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowsearch.errors import DeviceError
from lowsearch.latency.target import DeviceKind, Target
from lowsearch.latency.torch_runtimes import FEW_BLOCKS


class ExecuTorchRuntime:
    """ExecuTorch with all that XNNPACK can execute delegated to it. int8 is quantised by the delegate's own quantiser."""

    name = "executorch"
    package = "executorch"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32", "int8")}
    max_blocks = FEW_BLOCKS

    def versions(self) -> dict[str, str]:
        return {"executorch": metadata.version("executorch"), "torch": torch.__version__}  # torch says what operators a network becomes.

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        quantised = {"quantisation": "static, symmetric, per channel"} if target.precision == "int8" else {}
        return {"delegate": "xnnpack", "threadpool": target.threads, "exporter": "torch.export", "memory_format": "contiguous", **quantised}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> _ExecuTorchProgram:
        x = x.contiguous()
        with _quiet():
            library = _library()
            # XNNPACK keeps a pointer to the pool that it finds when a program is loaded, so a pool of another size must come before any.
            if library._threadpool_get_thread_count() != threads:
                library._unsafe_reset_threadpool(threads)
            return _ExecuTorchProgram(library, _lowered(module, x, precision=precision), x)


class _ExecuTorchProgram:
    """The input is set once, where it lies, and the output has one place: a call moves no data through Python."""

    def __init__(self, library: Any, program: bytes, x: Tensor) -> None:
        self._program, self._x = program, x  # Both are read where they lie.
        self._method = library._load_program_from_buffer(program).load_method("forward")
        self._method.set_inputs([x])

    def run(self) -> None:
        self._method.execute()

    def output(self) -> np.ndarray:
        self.run()
        (y,) = self._method.get_outputs(clone_outputs=True)
        return y.numpy()


def _library() -> Any:
    """ExecuTorch's native library. Raises DeviceError where it does not load beside this torch."""
    try:
        return import_module("executorch.extension.pybindings.portable_lib")
    except ImportError as error:
        raise DeviceError(
            f"executorch {metadata.version('executorch')} does not load beside torch {torch.__version__}: {error}",
            hint="install the executorch that was built for this torch: pip install --upgrade executorch",
        ) from error


def _lowered(module: nn.Module, x: Tensor, *, precision: str) -> bytes:
    """`module` as a program of ExecuTorch for inputs of the shape of `x`, which calibrates int8."""
    exir = import_module("executorch.exir")
    xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    with torch.no_grad():
        exported = torch.export.export(module, (x,))
        if precision == "int8":
            exported = torch.export.export(_quantised(exported.module(), x), (x,))
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=[xnnpack.XnnpackPartitioner()])
        # Planned memory would hold a copy of the input, made in every call, that later operators may overwrite.
        in_place = import_module("executorch.exir.passes").MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        return lowered.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=in_place)).buffer


def _quantised(module: Any, x: Tensor) -> Any:
    """`module` with weights and activations in 8 bits, which span what the activations of the input `x` span."""
    xnnpack = import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    pt2e = import_module("torchao.quantization.pt2e.quantize_pt2e")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    observed = pt2e.prepare_pt2e(module, xnnpack.XNNPACKQuantizer().set_global(config))
    observed(x)
    return pt2e.convert_pt2e(observed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what ExecuTorch, torchao and torch warn of in their own code: that it is experimental, and calls what is deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(executorch|torchao|torch|importlib)\.")
        warnings.filterwarnings("ignore", "This API is experimental")
        yield
