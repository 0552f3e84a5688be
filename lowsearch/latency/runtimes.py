"""What executes a network while it is timed: one class per runtime behind the protocol `Runtime`. To add one, write a class and list
it in `RUNTIMES`; nothing else knows their names.

A runtime prepares a module once into a `Program`, which runs on an input that is already in place: what is timed is the forward
pass, without copies from or to the caller. Before any time is believed, `check_parity` compares the program's output with torch's.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from lowsearch.errors import DeviceError, ParityError
from lowsearch.latency.onnx_program import OnnxProgram
from lowsearch.latency.target import DeviceKind, Target

OPSET = 17  # The last one that torch's TorchScript exporter and every ONNX Runtime since 1.13 agree on; 18 and 20 gave the same graph.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest accepted difference from torch in fp32, as a share of the largest output."""


class Program(Protocol):
    """One network or block, compiled, with its input in place."""

    def run(self) -> None:
        """One forward pass. Asynchronous on a device that is."""

    def output(self) -> np.ndarray:
        """What one forward pass computes, in fp32."""
        ...


class Runtime(Protocol):
    """Software that executes networks."""

    name: str
    package: str
    """What has to be installed, by the name it is imported by."""
    precisions: Mapping[DeviceKind, Sequence[str]]
    """What it can execute, by the kind of device."""

    def versions(self) -> dict[str, str]:
        """Versions of what executes; a table measured with others does not fit."""
        ...

    def options(self) -> dict[str, str | int]:
        """What the runtime is told, for the record."""
        ...

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> Program:
        """`module` (in eval mode, fp32, on the CPU) compiled for the input `x` and placed on `device`."""
        ...


class EagerRuntime:
    """torch as it is: one operator after the other, on the CPU or a CUDA device."""

    name = "eager"
    package = "torch"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32",), "cuda": ("fp32", "fp16")}

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def options(self) -> dict[str, str | int]:
        return {"memory_format": "contiguous", "cudnn_benchmark": 0, "tf32": 0}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> Program:
        return _TorchProgram(*_placed(module, x, precision=precision, device=device))


class TorchScriptRuntime:
    """torch.jit: traced, frozen and optimised for inference, as the LowFormer papers time. torch has deprecated it."""

    name = "torchscript"
    package = "torch"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32",), "cuda": ("fp32", "fp16")}
    WARM_UPS = 2
    """Calls after which the profiling executor has specialised the graph."""

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def options(self) -> dict[str, str | int]:
        return {"graph": "traced, optimize_for_inference", "cudnn_benchmark": 0, "tf32": 0}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> Program:
        module, x = _placed(module, x, precision=precision, device=device)
        with warnings.catch_warnings(), torch.no_grad():
            # torch.jit as a whole is deprecated, and tracing warns of every size it fixes: they are fixed here.
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            warnings.filterwarnings("ignore", category=TracerWarning)
            traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(module, x)))
        program = _TorchProgram(traced, x)
        for _ in range(self.WARM_UPS):
            program.run()
        return program


def _placed(module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    """Both on `device` in `precision`. fp32 means fp32: cuDNN would otherwise round convolution inputs to ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.float16 if precision == "fp16" else torch.float32
    return module.to(device, dtype), x.to(device, dtype)


class _TorchProgram:
    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self._module = module
        self._x = x

    def run(self) -> None:
        with torch.inference_mode():
            self._module(self._x)

    def output(self) -> np.ndarray:
        with torch.inference_mode():
            return self._module(self._x).float().cpu().numpy()


class OnnxRuntime:
    """ONNX Runtime on the CPU: one thread that does not spin, all graph optimisations."""

    name = "onnxruntime"
    package = "onnxruntime"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32",)}

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": metadata.version("onnxruntime")}

    def options(self) -> dict[str, str | int]:
        return {
            "provider": "CPUExecutionProvider", "graph_optimization": "all", "exporter": f"torch {torch.__version__} TorchScript",
            "opset": OPSET,
        }  # fmt: skip

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> Program:
        return OnnxProgram(export_onnx(module, x), x.numpy())


class OpenVinoRuntime:
    """OpenVINO on the CPU: one thread and one stream, the precision pinned: it would choose bfloat16 by itself where the processor can."""

    name = "openvino"
    package = "openvino"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32",)}
    SETTINGS: Mapping[str, str | int] = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": "NO",
    }  # fmt: skip

    def versions(self) -> dict[str, str]:
        return {"openvino": metadata.version("openvino")}

    def options(self) -> dict[str, str | int]:
        return {**self.SETTINGS, "exporter": f"torch {torch.__version__} TorchScript", "opset": OPSET}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device) -> Program:
        return _OpenVinoProgram(export_onnx(module, x), x.numpy(), self.SETTINGS)


class _OpenVinoProgram:
    def __init__(self, model: bytes, x: np.ndarray, settings: Mapping[str, str | int]) -> None:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", dict(settings))
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(openvino.Tensor(x, shared_memory=False))

    def run(self) -> None:
        self._request.infer()

    def output(self) -> np.ndarray:
        self.run()
        return np.array(self._request.get_output_tensor().data, dtype=np.float32)


RUNTIMES: dict[str, Runtime] = {
    one.name: one for one in (OnnxRuntime(), OpenVinoRuntime(), TorchScriptRuntime(), EagerRuntime())
}  # fmt: skip


def runtime(name: str) -> Runtime:
    """The runtime called `name`."""
    if name not in RUNTIMES:
        raise DeviceError(f"unknown runtime {name!r}; known: {', '.join(RUNTIMES)}", hint=f"--runtime {next(iter(RUNTIMES))}")
    return RUNTIMES[name]


def check_supported(target: Target, kind: DeviceKind) -> None:
    """Raise DeviceError where `target` asks for something that its runtime cannot do, or that we cannot time honestly, on such a device."""
    chosen = runtime(target.runtime)
    if find_spec(chosen.package) is None:
        raise DeviceError(f"runtime {chosen.name} is not installed", hint=f"pip install 'lowsearch[{chosen.name}]'")
    if kind not in chosen.precisions:
        able = ", ".join(name for name, other in RUNTIMES.items() if kind in other.precisions) or "none"
        raise DeviceError(f"runtime {chosen.name} does not run on a {kind} device; runtimes that do: {able}", hint=f"--runtime {able}")
    precisions = chosen.precisions[kind]
    if target.precision not in precisions:
        raise DeviceError(f"runtime {chosen.name} on a {kind} device has no {target.precision}; it has {', '.join(precisions)}")
    if target.threads != 1:
        raise DeviceError(
            f"threads is {target.threads}: only one thread has an honest statistic here (CPU time), see docs/measurement.md",
            hint="--threads 1",
        )


def export_onnx(module: nn.Module, x: Tensor) -> bytes:
    """`module` as an ONNX model with the fixed input shape of `x`.

    torch's TorchScript exporter: deprecated, but 0.02 s a block where its successor takes 0.7 s. A table needs hundreds of blocks.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed. Please remove usage of this function", DeprecationWarning)
        # Group norm checks its input's size in Python; sizes are fixed here.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", TracerWarning)
        # The exporter accepts a buffer; its signature of today speaks of paths only.
        torch.onnx.export(
            module, (x,), cast(Any, buffer), dynamo=False, opset_version=OPSET, input_names=["input"], output_names=["output"]
        )
    return buffer.getvalue()


def check_parity(program: Program, expected: np.ndarray, *, precision: str, what: str) -> float:
    """Largest difference between the program's output and `expected`, relative to the largest expected value.

    Raises ParityError where it is too large: a runtime may be fast because it computes something else.
    """
    got = program.output()
    scale = float(np.abs(expected).max())
    if got.shape != expected.shape or not np.isfinite(got).all() or not np.isfinite(scale) or scale == 0.0:
        raise ParityError(f"{what}: output of shape {got.shape} is not finite, not random, or not of shape {expected.shape}")
    difference = float(np.abs(got - expected).max()) / scale
    if difference > TOLERANCE[precision]:
        raise ParityError(
            f"{what}: the runtime's output differs from torch's by {difference:.2g} of its range, more than {TOLERANCE[precision]:.0e}",
            hint="its time was not stored; choose another --runtime",
        )
    return difference


def reference(module: nn.Module, x: Tensor) -> np.ndarray:
    """torch's own output for `x`, in fp32 on the CPU."""
    with torch.inference_mode():
        return module(x).numpy().copy()
