"""Runtimes that execute an ONNX model: ONNX Runtime with its providers for the CPU, CUDA and TensorRT, TensorRT alone, and OpenVINO.

All of them are given the model that torch's exporter writes for one input shape, and read and write tensors that stay where they are.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from lowsearch.errors import DeviceError
from lowsearch.latency.onnx_program import session_options
from lowsearch.latency.target import DeviceKind, Target
from lowsearch.latency.torch_runtimes import ALL_BLOCKS, FEW_BLOCKS, placed

OPSET = 17  # The last one that torch's TorchScript exporter and every ONNX Runtime since 1.13 agree on; 18 and 20 gave the same graph.
_EXPORTER: Mapping[str, str | int] = {"exporter": f"torch {torch.__version__} TorchScript", "opset": OPSET, "memory_format": "contiguous"}
_IMAGE_CHANNELS = 3
_NUMPY_TYPES = {torch.float32: np.float32, torch.float16: np.float16}

Provider = tuple[str, dict[str, str]]
"""An execution provider of ONNX Runtime and what it is told."""


class OnnxRuntime:
    """ONNX Runtime with all graph optimisations and the provider of the device: on a CPU its own kernels, on a CUDA device the CUDA
    provider, on torch's stream. int8 is quantised from fp32 by its own tools. `cuda` is `torch.cuda`, or a fake of it in tests."""

    name = "onnxruntime"
    package = "onnxruntime"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16")}
    max_blocks = ALL_BLOCKS

    def __init__(self, *, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def versions(self) -> dict[str, str]:
        import onnxruntime  # The package is called onnxruntime-gpu where it can use one; both are imported by this name.

        return {"onnxruntime": onnxruntime.__version__}

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", 0)
        name, told = self.providers(device, target.precision, stream=0)[0]
        told = {key: value for key, value in told.items() if key not in ("device_id", "user_compute_stream", "trt_timing_cache_path")}
        quantised = {"quantisation": "static, QDQ, per channel"} if target.precision == "int8" else {}
        return {"provider": name, "graph_optimization": "all", **told, **quantised, **_EXPORTER}

    def providers(self, device: torch.device, precision: str, *, stream: int) -> list[Provider]:
        """The providers that may execute on `device`, the wanted one first. `stream` is where torch's own work goes."""
        if device.type == "cpu":
            return [("CPUExecutionProvider", {})]
        return [("CUDAExecutionProvider", {**_place(device, stream), "use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"})]

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> _OnnxProgram:
        module, x = placed(module, x, precision=precision, device=device)
        stream = self._cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        model = export_onnx(module, x)
        model = quantised(model, x.numpy()) if precision == "int8" else model
        return _OnnxProgram(model, x, self.providers(device, precision, stream=stream), threads=threads)


class OnnxTensorRt(OnnxRuntime):
    """ONNX Runtime with the TensorRT provider, which builds an engine for every block: seconds each. What TensorRT cannot execute
    goes to the CUDA provider."""

    name = "onnxruntime-tensorrt"
    package = "tensorrt"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cuda": ("fp32", "fp16")}
    max_blocks = FEW_BLOCKS

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "tensorrt": import_module("tensorrt").__version__}

    def providers(self, device: torch.device, precision: str, *, stream: int) -> list[Provider]:
        fp16 = "1" if precision == "fp16" else "0"
        # Timings of kernels, kept so that the same layers are not timed again by the next block's build.
        kept = {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(user_cache_path("lowsearch") / "tensorrt")}
        tensorrt = ("TensorrtExecutionProvider", {**_place(device, stream), "trt_fp16_enable": fp16, **kept})
        return [tensorrt, *super().providers(device, precision, stream=stream)]

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> _OnnxProgram:
        import_module("tensorrt")  # Brings the libraries that the provider loads.
        return super().prepare(module, x, precision=precision, device=device, threads=threads)


def _place(device: torch.device, stream: int) -> dict[str, str]:
    return {"device_id": str(device.index or 0), "user_compute_stream": str(stream)}


class _OnnxProgram:
    """Input and output are bound once, where they lie: a call moves no data. On a CUDA device a call returns when its work is queued."""

    def __init__(self, model: bytes, x: Tensor, providers: Sequence[Provider], *, threads: int) -> None:
        import onnxruntime as ort

        options = session_options(threads=threads)
        (wanted, _), *_ = providers
        available = ort.get_available_providers()
        session = ort.InferenceSession(model, options, providers=list(providers)) if wanted in available else None
        if session is None or session.get_providers()[0] != wanted:  # It would fall back to the CPU, with a warning at most.
            raise DeviceError(
                f"onnxruntime {ort.__version__} cannot use its {wanted} here; it has {', '.join(available)}",
                hint="pip uninstall onnxruntime && pip install onnxruntime-gpu, with the CUDA libraries that its release names",
            )
        self._session = session
        (given,), (found,) = session.get_inputs(), session.get_outputs()
        self._x, self._y = x.contiguous(), torch.empty(found.shape, dtype=x.dtype, device=x.device)
        self._binding = session.io_binding()
        for bind, name, tensor in ((self._binding.bind_input, given.name, self._x), (self._binding.bind_output, found.name, self._y)):
            bind(name, x.device.type, x.device.index or 0, _NUMPY_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        self._no_wait = ort.RunOptions()
        self._no_wait.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._no_wait)

    def output(self) -> np.ndarray:
        self._session.run_with_iobinding(self._binding)
        return self._y.float().cpu().numpy().copy()


class TensorRtRuntime:
    """TensorRT itself: an engine built from the ONNX model, whose types it keeps, on torch's stream. `cuda` is `torch.cuda`, or a fake."""

    name = "tensorrt"
    package = "tensorrt"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cuda": ("fp32", "fp16")}
    max_blocks = FEW_BLOCKS

    def __init__(self, *, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._timings = b""
        """How long kernels took in earlier builds of this process, as TensorRT keeps it."""

    def versions(self) -> dict[str, str]:
        return {"tensorrt": import_module("tensorrt").__version__}

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        return {"network": "strongly typed", "tf32": 0, **_EXPORTER}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> _TensorRtProgram:
        module, x = placed(module, x, precision=precision, device=device)
        return _TensorRtProgram(self._engine(export_onnx(module, x)), x, self._cuda.current_stream(device).cuda_stream)

    def _engine(self, model: bytes) -> Any:
        """The engine of `model`. Raises DeviceError where TensorRT cannot build one."""
        trt = import_module("tensorrt")
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse(model):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise DeviceError(f"tensorrt cannot read the model: {reasons}", hint="--runtime onnxruntime-tensorrt")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        config.set_timing_cache(config.create_timing_cache(self._timings), ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        engine = trt.Runtime(log).deserialize_cuda_engine(plan) if plan is not None else None
        if engine is None:
            raise DeviceError("tensorrt cannot build an engine of the model; its log says why", hint="--runtime onnxruntime-tensorrt")
        self._timings = bytes(config.get_timing_cache().serialize())
        return engine


class _TensorRtProgram:
    def __init__(self, engine: Any, x: Tensor, stream: int) -> None:
        self._engine, self._stream = engine, stream
        self._context = engine.create_execution_context()
        self._x = x.contiguous()
        self._y = torch.empty(tuple(engine.get_tensor_shape("output")), dtype=x.dtype, device=x.device)
        self._context.set_tensor_address("input", self._x.data_ptr())
        self._context.set_tensor_address("output", self._y.data_ptr())

    def run(self) -> None:
        self._context.execute_async_v3(self._stream)

    def output(self) -> np.ndarray:
        self.run()
        return self._y.float().cpu().numpy().copy()


class OpenVinoRuntime:
    """OpenVINO on the CPU: one stream, the precision pinned: it would choose bfloat16 by itself where the processor can.

    Between the layers of a network its tensors lie channels-last. So a block gets and gives them so; from and to plain tensors it would
    also change layouts, which no network does there, and where a plane is a multiple of a memory page (32, 64, 96, 128 px) that takes up
    to three times as long as the block. Images arrive plain, alone or in front of a network.
    """

    name = "openvino"
    package = "openvino"
    precisions: Mapping[DeviceKind, Sequence[str]] = {"cpu": ("fp32", "bf16")}
    max_blocks = ALL_BLOCKS

    def versions(self) -> dict[str, str]:
        return {"openvino": metadata.version("openvino")}

    def settings(self, precision: str, threads: int) -> dict[str, str | int]:
        """What a model is compiled with."""
        return {
            "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": "NO",
        }  # fmt: skip

    def options(self, target: Target, kind: DeviceKind) -> dict[str, str | int]:
        return {**self.settings(target.precision, target.threads), **_EXPORTER, "memory_format": "channels-last between layers"}

    def prepare(self, module: nn.Module, x: Tensor, *, precision: str, device: torch.device, threads: int = 1) -> _OpenVinoProgram:
        return _OpenVinoProgram(export_onnx(module, x), x.numpy(), self.settings(precision, threads))


class _OpenVinoProgram:
    def __init__(self, model: bytes, x: np.ndarray, settings: Mapping[str, str | int]) -> None:
        import openvino

        read = _openvino_core().read_model(model)
        self._maps_in, self._maps_out = x.ndim == 4 and x.shape[1] > _IMAGE_CHANNELS, len(read.output().shape) == 4
        self.compiled = compiled = _openvino_core().compile_model(
            _channels_last(read, self._maps_in, self._maps_out), "CPU", dict(settings)
        )
        hint = "INFERENCE_PRECISION_HINT"
        used = str(compiled.get_property(hint).to_string())
        if used != settings[hint]:
            raise DeviceError(f"openvino computes in {used} on this processor, not in {settings[hint]}", hint="--precision fp32")
        self._request = compiled.create_infer_request()
        given = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if self._maps_in else x
        self._request.set_input_tensor(openvino.Tensor(given, shared_memory=False))

    def run(self) -> None:
        self._request.infer()

    def output(self) -> np.ndarray:
        self.run()
        found = np.array(self._request.get_output_tensor().data, dtype=np.float32)
        return found.transpose(0, 3, 1, 2) if self._maps_out else found


@cache
def _openvino_core() -> Any:
    """The only one of this process. Each that compiles gives the thread a stack for signals and takes it away when it goes, so of two
    that overlap the first to go leaves the thread with one that is no longer there, and the next signal kills the process."""
    import openvino

    return openvino.Core()


def _channels_last(model: Any, maps_in: bool, maps_out: bool) -> Any:
    """`model` with its input and its output laid out channels-last where they are feature maps."""
    from openvino import Layout, opset15
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    if maps_in:
        steps.input().tensor().set_layout(Layout("NHWC"))
        steps.input().model().set_layout(Layout("NCHW"))
    if maps_out:
        # A copy: OpenVINO does not let a convolution that adds its result to a residual write in another layout.
        steps.output().postprocess().custom(
            lambda found: opset15.max_pool(found, [1, 1], [1, 1], [0, 0], [0, 0], [1, 1]).output(0)
        )  # fmt: skip
        steps.output().model().set_layout(Layout("NCHW"))
        steps.output().tensor().set_layout(Layout("NHWC"))
    return steps.build()


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


def quantised(model: bytes, x: np.ndarray) -> bytes:
    """`model` with weights and activations in 8 bits, which span what the activations of the input `x` span."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Calibration(CalibrationDataReader):
        def __init__(self) -> None:
            self._inputs = iter([{"input": x}])

        def get_next(self) -> Any:  # None at the end, whatever its base says.
            return next(self._inputs, None)

    with tempfile.TemporaryDirectory(prefix="lowsearch-") as folder:
        path = Path(folder) / "model.onnx"
        quantize_static(
            onnx.load_from_string(model), str(path), Calibration(), per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
        return path.read_bytes()
