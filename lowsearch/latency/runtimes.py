"""What executes a network while it is timed: one class per runtime behind the protocol `Runtime`, in torch_runtimes.py,
onnx_runtimes.py and executorch_runtime.py. To add one, write a class and list it in `RUNTIMES`; nothing else knows their names.

A runtime prepares a module once into a `Program`, which runs on an input that is already in place: what is timed is the forward
pass, without copies from or to the caller. Before any time is believed, `check_parity` compares the program's output with torch's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lowsearch.errors import DeviceError, ParityError
from lowsearch.latency.executorch_runtime import ExecuTorchRuntime
from lowsearch.latency.onnx_runtimes import OnnxRuntime, OnnxTensorRt, OpenVinoRuntime, TensorRtRuntime
from lowsearch.latency.target import DeviceKind, Target
from lowsearch.latency.torch_runtimes import AotInductorRuntime, CompileRuntime, CudaGraphsRuntime, EagerRuntime, TorchScriptRuntime

TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 5e-2, "int8": 0.1}
"""Largest accepted difference from torch in fp32, as a share of the largest output: 2 to 10 times what whole networks were seen to have."""


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
    max_blocks: int
    """How many blocks of a space are measured at most; fewer where preparing one takes seconds. The others are predicted."""

    def versions(self) -> dict[str, str]:
        """Versions of what executes; a table measured with others does not fit."""
        ...

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        """What the runtime is told on such a device, for the record."""
        ...

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> Program:
        """`module` (in eval mode, fp32, on the CPU) compiled for the input `x` and placed on `device`."""
        ...


_TORCH = (EagerRuntime, CompileRuntime, AotInductorRuntime, TorchScriptRuntime, CudaGraphsRuntime)
RUNTIMES: dict[str, Runtime] = {
    one.name: one
    for one in (
        OnnxRuntime(), OpenVinoRuntime(), *(make() for make in _TORCH), *(make("channels-last") for make in _TORCH), OnnxTensorRt(),
        TensorRtRuntime(), ExecuTorchRuntime(),
    )
}  # fmt: skip


def runtime(name: str) -> Runtime:
    """The runtime called `name`."""
    if name not in RUNTIMES:
        raise DeviceError(f"unknown runtime {name!r}; known: {', '.join(RUNTIMES)}", hint=f"--runtime {next(iter(RUNTIMES))}")
    return RUNTIMES[name]


def check_supported(target: Target, kind: DeviceKind) -> None:
    """Raise DeviceError where `target` asks for something that its runtime cannot do, or that we cannot time honestly, on such a device."""
    chosen = runtime(target.runtime)
    if kind not in chosen.precisions:
        able = [name for name, other in RUNTIMES.items() if kind in other.precisions]
        raise DeviceError(
            f"runtime {chosen.name} does not run on a {kind} device; runtimes that do: {', '.join(able)}", hint=f"--runtime {able[0]}"
        )
    if find_spec(chosen.package) is None:
        raise DeviceError(f"runtime {chosen.name} is not installed", hint=f"pip install 'lowsearch[{chosen.name}]'")
    precisions = chosen.precisions[kind]
    if target.precision not in precisions:
        raise DeviceError(f"runtime {chosen.name} on a {kind} device has no {target.precision}; it has {', '.join(precisions)}")
    cores = os.cpu_count() or 1
    if target.threads > 1 and (kind != "cpu" or target.threads > cores):
        able = f"this machine has {cores} cores" if kind == "cpu" else f"they are a CPU's, not a {kind} device's"
        raise DeviceError(f"threads is {target.threads}: {able}", hint=f"--threads {cores if kind == 'cpu' else 1}")


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
