"""Runtimes: they compute what torch computes, and the gate refuses those that do not."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

from lowsearch.arch import Arch, Attention, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, Stage, Stem, StemConv, input_channels
from lowsearch.errors import DeviceError, ParityError
from lowsearch.latency import executorch_runtime, onnx_runtimes, torch_runtimes, worker
from lowsearch.latency.measure import Effort, Request
from lowsearch.latency.memory import MemoryRead
from lowsearch.latency.onnx_runtimes import OnnxRuntime, OnnxTensorRt, OpenVinoRuntime, TensorRtRuntime
from lowsearch.latency.runtimes import RUNTIMES, TOLERANCE, Program, Runtime, check_parity, check_supported, reference, runtime
from lowsearch.latency.target import Target, attached_devices
from lowsearch.latency.timers import CpuTimer, WallTimer
from lowsearch.latency.timing import Timing, TimmNetwork
from lowsearch.latency.torch_runtimes import ALL_BLOCKS, CudaGraphsRuntime
from lowsearch.latency.worker import Bench
from lowsearch.model.blocks import build_block, randomise

BLOCKS: list[Block] = [
    StemConv(out_channels=8, resolution_px=16, stride=2),
    ConvBranch(channels=8, resolution_px=7, fused=True, expansion=2, kernel=3, groups=1, bias=True),
    ConvBranch(channels=16, resolution_px=8, fused=False, expansion=4, kernel=2, groups=2, bias=True),
    Downsampler(in_channels=8, out_channels=16, resolution_px=8, fused=True, expansion=4, groups=2),
    Downsampler(in_channels=8, out_channels=16, resolution_px=8, fused=False, expansion=4, groups=1),
    Lowtention(channels=32, resolution_px=7, stride=2, kernel=5, heads=1, head_dim=16, projection="fused", norm=True),
    Lowtention(channels=32, resolution_px=8, stride=2, kernel=2, heads=2, head_dim=8, projection="nearest", norm=False),
    Lowtention(channels=32, resolution_px=4, stride=1, kernel=3, heads=1, head_dim=16, projection="unfused", norm=True),
    Mlp(channels=16, resolution_px=4, ratio=4),
    Head(channels=16, resolution_px=2, conv_width=32, linear_width=24, num_classes=10),
]
NETWORK = Arch(
    resolution_px=32, stem=Stem(width=8, stride=1),
    stages=(Stage(width=8), Stage(width=16), Stage(width=16, depth=2, attention=Attention(stride=2), mlp_ratio=2), Stage(width=32)),
    head_widths=(32, 32), num_classes=10,
)  # fmt: skip
CPU = torch.device("cpu")
INSTALLED = [name for name, one in RUNTIMES.items() if "cpu" in one.precisions and find_spec(one.package)]
FAST = [name for name in INSTALLED if RUNTIMES[name].max_blocks == ALL_BLOCKS]
SLOW = [name for name in INSTALLED if name not in FAST]
COMPILED = [name for name in SLOW if isinstance(RUNTIMES[name], torch_runtimes.TorchRuntime)]
REDUCED = [(name, precision) for name in INSTALLED for precision in RUNTIMES[name].precisions["cpu"] if precision != "fp32"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
BENCH = Bench(CPU, CpuTimer(flush_bytes=1 << 16))
QUICK = Effort(processes=1, rounds=1, warmups=1, sample_ms=0.001, round_ms=0.01, min_samples=1, turns_ms=0.01, min_turns=1, cold_samples=1)


def prepared(block: Block) -> tuple[nn.Module, torch.Tensor]:
    module = build_block(block).eval()
    randomise(module, seed=0)
    return module, torch.randn(
        2, input_channels(block), block.resolution_px, block.resolution_px, generator=torch.Generator().manual_seed(0)
    )


def difference(name: str, block: Block, precision: str = "fp32", device: torch.device = CPU) -> float:
    """Of the runtime's output from torch's, after the gate."""
    module, x = prepared(block)
    expected = reference(module, x)
    program = runtime(name).prepare(module, x, precision=precision, device=device)
    return check_parity(program, expected, precision=precision, what="block")


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.kind)
def test_every_runtime_computes_what_torch_does(name: str, block: Block) -> None:
    assert difference(name, block) < 1e-5


@pytest.mark.parametrize(
    ("name", "precision"),
    [pytest.param(*one, marks=[pytest.mark.slow, needs_compiler] if one[0] in SLOW else []) for one in REDUCED],
)
def test_fewer_bits_compute_nearly_what_torch_does_and_not_the_same(name: str, precision: str) -> None:
    """A difference of nothing would mean that the runtime computed in fp32 in spite of what its table says."""
    for block in (BLOCKS[2], BLOCKS[5], BLOCKS[9]):
        assert 3e-4 < difference(name, block, precision) < TOLERANCE[precision]


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_block_computes_what_torch_does() -> None:
    assert difference("compile", BLOCKS[6]) < 1e-5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", SLOW)
def test_compiled_blocks_compute_what_torch_does(name: str) -> None:
    for block in BLOCKS:
        assert difference(name, block) < 1e-5


@pytest.mark.slow
@needs_compiler
def test_many_blocks_of_one_kind_stay_compiled() -> None:
    """torch.compile holds eight results for one piece of code; a table has hundreds of blocks that share theirs."""
    blocks = [Mlp(channels=8 * i, resolution_px=4, ratio=2) for i in range(1, 12)]
    programs = [(runtime("compile").prepare(*prepared(block), precision="fp32", device=CPU), block) for block in blocks]
    with torch.compiler.set_stance("fail_on_recompile"):
        for program, block in programs:
            assert program.output() == pytest.approx(reference(*prepared(block)), abs=1e-4)


def test_a_runtime_that_compiles_says_that_it_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_runtimes.shutil, "which", lambda name: None)
    for name in COMPILED:
        with pytest.raises(DeviceError, match=f"{name} needs a C\\+\\+ compiler.*install g"):
            difference(name, BLOCKS[0])


def test_channels_last_is_how_tensors_lie_and_part_of_the_name() -> None:
    program = runtime("eager-nhwc").prepare(*prepared(BLOCKS[2]), precision="fp32", device=CPU)
    module: Any = program._call  # type: ignore[attr-defined]
    assert module.expand.weight.is_contiguous(memory_format=torch.channels_last)
    assert module(torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert runtime("eager-nhwc").options(Target("amd-epyc-9654", "eager-nhwc"), "cpu")["memory_format"] == "channels-last"
    assert Target("amd-epyc-9654", "eager-nhwc").table_path.name == "eager-nhwc-fp32-b1-t1.jsonl"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_pass_of_torch_on_a_cpu_fetches_no_new_pages() -> None:
    """In a process that has done nothing else, whose C library would return the 8 MB of every tensor to the system."""
    code = """
import resource, torch
from lowsearch.latency.runtimes import runtime
module = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Hardswish()).eval()
program = runtime("eager").prepare(module, torch.zeros(1, 3, 256, 256), precision="fp32", device=torch.device("cpu"))
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        program.run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3)
print(faults(10))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100
    assert runtime("eager").options(Target("amd-epyc-9654", "eager"), "cpu")["freed_memory"] == "kept"
    assert "freed_memory" not in runtime("eager").options(Target("rtx3090", "eager"), "cuda")


class Answer:
    """A program with a fixed output."""

    def __init__(self, output: np.ndarray) -> None:
        self._output = output

    def run(self) -> None:
        pass

    def output(self) -> np.ndarray:
        return self._output


@pytest.mark.parametrize("spoil", [lambda y: y * 1.001, lambda y: -y, lambda y: y * np.nan, lambda y: y[:1], lambda y: np.roll(y, 1)])
def test_a_wrong_output_is_refused(spoil) -> None:
    expected = np.random.default_rng(0).normal(size=(2, 8, 4, 4)).astype(np.float32)
    check_parity(Answer(expected), expected, precision="fp32", what="block")
    with pytest.raises(ParityError, match="block"):
        check_parity(Answer(spoil(expected)), expected, precision="fp32", what="block")


def test_an_output_of_zeros_proves_nothing() -> None:
    zeros = np.zeros((1, 4), np.float32)
    with pytest.raises(ParityError):
        check_parity(Answer(zeros), zeros, precision="fp32", what="block")


class BranchDropped:
    """A fast runtime that returns its input: right for a residual branch that starts as the identity, wrong for any other."""

    name = "fast"
    package = "torch"
    precisions = {"cpu": ("fp32",)}
    max_blocks = 1

    def versions(self) -> dict[str, str]:
        return {"fast": "1"}

    def options(self, target: Target, kind: object) -> dict[str, str | int]:
        return {}

    def prepare(self, module: nn.Module, x: torch.Tensor, *, precision: str, device: torch.device, threads: int = 1) -> Program:
        return Answer(x.numpy())


def test_no_time_of_a_wrong_runtime_leaves_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Runtime = BranchDropped()
    monkeypatch.setitem(RUNTIMES, "fast", fast)
    cpu = attached_devices()[0]
    for block in BLOCKS[:2]:  # one of another shape than its input, one residual
        request = Request(target=Target(cpu.slug, "fast"), process=0, seed=0, effort=QUICK, steps=((block,),))
        with pytest.raises(ParityError, match=type(block).__name__):
            list(worker.serve(request, BENCH, device=cpu))


def test_deep_attention_stays_comparable() -> None:
    """Random weights alone saturate the softmax of a deep network without norms, and rounding then shows in the third digit."""
    stage = Stage(width=64, depth=8, attention=Attention(), mlp_ratio=0)
    arch = Arch(resolution_px=32, stem=Stem(width=8, stride=1), stages=(Stage(width=16), Stage(width=32), stage, stage), num_classes=10)
    cpu = attached_devices()[0]
    request = Request(target=Target(cpu.slug, "onnxruntime"), process=0, seed=0, effort=QUICK, steps=((arch,),))
    (timing,) = worker.serve(request, BENCH, device=cpu)
    assert timing.parity < 1e-5


@pytest.mark.parametrize("name", [*FAST, pytest.param("compile", marks=[pytest.mark.slow, needs_compiler])])
def test_a_worker_times_blocks_in_three_states_and_what_is_used_whole_in_one(name: str) -> None:
    cpu = attached_devices()[0]
    effort = Effort(processes=1, rounds=2, sample_ms=0.01, round_ms=0.1, turns_ms=1, min_turns=2, cold_samples=1)
    reads = MemoryRead(2**18), MemoryRead(2**22)
    request = Request(target=Target(cpu.slug, name), process=1, seed=0, effort=effort, steps=(reads, (BLOCKS[1], BLOCKS[8]), (NETWORK,)))
    timings = {timing.item: timing for timing in worker.serve(request, BENCH, device=cpu)}
    assert set(timings) == {*reads, BLOCKS[1], BLOCKS[8], NETWORK}
    for item, timing in timings.items():
        rounds = (2, 2, 2) if item in BLOCKS else (2, 0, 0)
        assert tuple(map(len, (timing.hot_ms, timing.warm_ms, timing.cold_ms))) == rounds
        assert all(ms > 0 for ms in (*timing.hot_ms, *timing.warm_ms, *timing.cold_ms))
        assert timing.process == 1 and timing.parity < 1e-5


def test_a_device_works_for_a_process_only_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = attached_devices()[0]
    inside: list[bool] = []
    happened: list[tuple[str, bool]] = []

    @contextlib.contextmanager
    def turn() -> Any:
        inside.append(True)
        yield
        inside.pop()

    class Watched(CpuTimer):
        def time(self, run: Any, *, repeats: int) -> Any:
            happened.append(("time", bool(inside)))
            return super().time(run, repeats=repeats)

    def watched(name: str, real: Any) -> Any:
        return lambda *args, **options: (happened.append((name, bool(inside))), real(*args, **options))[1]

    monkeypatch.setattr(worker, "_expect", watched("get ready", worker._expect))
    monkeypatch.setattr(worker, "_prepare", watched("prepare", worker._prepare))
    request = Request(target=Target(cpu.slug, "eager"), process=0, seed=0, effort=QUICK, steps=((NETWORK,), (NETWORK, MemoryRead(2**18))))
    assert len(list(worker.serve(request, Bench(CPU, Watched(flush_bytes=1 << 10), turn=turn), device=cpu))) == 3
    assert set(happened) == {("get ready", False), ("prepare", True), ("time", True)}


def test_several_threads_are_timed_in_wall_time() -> None:
    cpu = attached_devices()[0]
    bench = Bench(CPU, WallTimer(torch.zeros(1 << 14)))
    request = Request(target=Target(cpu.slug, "onnxruntime", threads=2), process=0, seed=0, effort=QUICK, steps=((BLOCKS[1], BLOCKS[8]),))
    for timing in worker.serve(request, bench, device=cpu):
        assert timing.wall_over_cpu == 1.0 and timing.hot_ms[0] > 0 and timing.parity < 1e-5


def test_what_cannot_be_measured_honestly_is_refused() -> None:
    with pytest.raises(DeviceError, match="unknown runtime 'tvm'; known: onnxruntime, openvino, eager, compile, aoti, torchscript"):
        runtime("tvm")
    with pytest.raises(DeviceError, match="openvino does not run on a cuda device; runtimes that do: onnxruntime, eager, compile"):
        check_supported(Target("rtx3090", "openvino"), "cuda")
    with pytest.raises(DeviceError, match="cudagraphs-nhwc does not run on a cpu device"):
        check_supported(Target("amd-epyc-9654", "cudagraphs-nhwc"), "cpu")
    with pytest.raises(DeviceError, match="no fp16"):
        check_supported(Target("amd-epyc-9654", "eager", "fp16"), "cpu")
    with pytest.raises(DeviceError, match="threads is 4096: this machine has"):
        check_supported(Target("amd-epyc-9654", "eager", threads=4096), "cpu")
    with pytest.raises(DeviceError, match="threads is 2: they are a CPU's"):
        check_supported(Target("rtx3090", "eager", threads=2), "cuda")
    check_supported(Target("rtx3090", "eager", "fp16"), "cuda")


@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_a_runtime_that_is_not_installed_is_refused_with_the_command_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIMES[name], "package", "no_such_package")
    with pytest.raises(DeviceError, match=rf"{name} is not installed.*pip install 'lowsearch\[{name}\]'"):
        check_supported(Target("amd-epyc-9654", name), "cpu")


def test_openvino_keeps_to_fp32_where_the_processor_could_round() -> None:
    """Left alone, it computes in bfloat16 on processors that have it: three digits instead of seven."""
    pytest.importorskip("openvino")
    module, x = prepared(BLOCKS[2])
    program = runtime("openvino").prepare(module, x, precision="fp32", device=CPU)
    assert check_parity(program, reference(module, x), precision="fp32", what="block") < 1e-5
    assert runtime("openvino").options(Target("amd-epyc-9654", "openvino"), "cpu")["INFERENCE_PRECISION_HINT"] == "f32"


@pytest.mark.parametrize("block", [b for b in BLOCKS if isinstance(b, ConvBranch | Downsampler)], ids=lambda b: b.kind)
def test_openvino_transposes_nothing_at_the_edges_of_a_block(block: Block) -> None:
    """It keeps tensors channels-last between layers. Changing layouts at an edge can take longer than the block, and is in no network."""
    pytest.importorskip("openvino")
    module, x = prepared(block)
    model = OpenVinoRuntime().prepare(module, x, precision="fp32", device=CPU).compiled.get_runtime_model()
    operators = [node.get_rt_info()["layerType"].astype(str) for node in model.get_ordered_ops()]
    assert "Convolution" in operators and "Transpose" not in operators
    assert list(model.input(0).shape) == [2, block.resolution_px, block.resolution_px, input_channels(block)]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_a_signal_reaches_a_process_after_its_openvino_programs_went_in_any_order() -> None:
    """Every core of OpenVINO sets the stack that signals are handled on, and restores the one before: of two, perhaps one that is gone."""
    pytest.importorskip("openvino")
    script = """
import gc, os, signal, torch
from lowsearch.latency.runtimes import runtime
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
layer, x, cpu = torch.nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 8, 8), torch.device("cpu")
programs = [runtime("openvino").prepare(layer, x, precision="fp32", device=cpu) for _ in range(2)]
while programs:
    programs.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
print(len(heard))
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "1\n"), ended.stderr


def test_executorch_computes_what_torch_does_of_the_input_where_it_lies() -> None:
    pytest.importorskip("executorch")
    module, x = prepared(BLOCKS[7])  # Softmax and norms beside what the delegate takes.
    program = runtime("executorch").prepare(module, x, precision="fp32", device=CPU)
    for _ in range(2):  # The second call finds what the first left in planned memory.
        assert check_parity(program, reference(module, x), precision="fp32", what="block") < 1e-5
    x.mul_(2)
    assert check_parity(program, reference(module, x), precision="fp32", what="block") < 1e-5
    assert executorch_runtime._library()._threadpool_get_thread_count() == 1


class FakeExecuTorch:
    """ExecuTorch's library on a machine with four cores. It notes in what order it is used."""

    def __init__(self, threads: int = 4) -> None:
        self.threads, self.said = threads, list[str]()

    def _threadpool_get_thread_count(self) -> int:
        return self.threads

    def _unsafe_reset_threadpool(self, threads: int) -> None:
        self.threads = threads
        self.said.append(f"{threads} threads")

    def _load_program_from_buffer(self, program: bytes) -> Any:
        self.said.append(f"load {program.decode()}")
        return SimpleNamespace(load_method=lambda name: SimpleNamespace(set_inputs=lambda inputs: self.said.append(f"{name} on {inputs}")))


@pytest.mark.parametrize("threads", [1, 2])
def test_executorch_has_its_threads_before_a_program_is_loaded(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """XNNPACK keeps the pool that it finds then; another one later would leave it with memory that was freed."""
    library = FakeExecuTorch()
    monkeypatch.setattr(executorch_runtime, "_library", lambda: library)
    monkeypatch.setattr(executorch_runtime, "_lowered", lambda *_, **__: b"program")
    x = torch.zeros(1)
    for _ in range(2):
        runtime("executorch").prepare(nn.Identity(), x, precision="fp32", device=CPU, threads=threads)
    assert library.said == [f"{threads} threads", *["load program", f"forward on {[x]}"] * 2]


def test_executorch_that_does_not_load_beside_this_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch_runtime.metadata, "version", lambda name: "0.1")
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings.portable_lib", None)
    with pytest.raises(DeviceError, match="executorch 0.1 does not load beside torch.*pip install --upgrade executorch"):
        runtime("executorch").prepare(*prepared(BLOCKS[0]), precision="fp32", device=CPU)


# CUDA devices, played by this CPU -----------------------------------------------------------------------------------------

GPU = torch.device("cuda", 1)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.kind)
def test_a_cuda_graph_computes_eager_without_its_python(block: Block, memory_format: Any) -> None:
    module, x = prepared(block)
    expected, other = reference(module, x), reference(module, 2 * x)
    cuda = FakeCuda()
    program = CudaGraphsRuntime(memory_format, cuda=cuda).prepare(module, x, precision="fp32", device=CPU)
    assert cuda.said == ["side waits for main", "on side", "main waits for side", "record"]
    module.forward = lambda x: pytest.fail("a replay went through Python")
    assert check_parity(program, expected, precision="fp32", what="block") < 1e-5
    with torch.inference_mode():
        program._x.mul_(2)  # The graph reads the input where it lies.
    assert check_parity(program, other, precision="fp32", what="block") < 1e-5


class HostCopy(nn.Module):
    """Makes a tensor on the CPU in every call, as some networks of timm do."""

    def __init__(self, *, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(1, device=x.device if self.everywhere else "cpu")
        return x.to(torch.float32) + (ones if self.everywhere else ones.to(x.device))


def test_a_network_that_copies_from_the_host_is_refused_before_it_is_recorded() -> None:
    x = torch.zeros(3, device="meta")  # Stands for a device other than the CPU.
    with torch.inference_mode(), torch_runtimes._OnOneDevice():
        HostCopy(everywhere=True)(x)
        HostCopy(everywhere=False)(torch.zeros(3))
        with pytest.raises(RuntimeError, match="copies between cpu and meta"):
            HostCopy(everywhere=False)(x)


def test_what_a_runtime_cannot_execute_is_left_out_and_the_others_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = attached_devices()[0]
    bad, good = TimmNetwork("resnet10t", 32), TimmNetwork("mobilenetv3_small_050", 32)

    class Choosy(type(RUNTIMES["eager"])):  # type: ignore[misc]
        def prepare(self, module: nn.Module, x: torch.Tensor, **options: Any) -> Program:
            if "ResNet" in type(module).__name__:
                raise RuntimeError("no kernel for this\nand a long trace")
            return super().prepare(module, x, **options)

    monkeypatch.setitem(RUNTIMES, "eager", Choosy())
    request = Request(target=Target(cpu.slug, "eager"), process=0, seed=0, effort=Effort(rounds=1), steps=((bad, good),))
    timings = {timing.item: timing for timing in worker.serve(request, BENCH, device=cpu)}
    assert timings[bad].refused == "network resnet10t: runtime eager cannot execute it: no kernel for this" and not timings[bad].hot_ms
    assert timings[good].hot_ms and not timings[good].refused
    assert Timing.from_dict(timings[bad].to_dict()) == timings[bad]

    monkeypatch.setattr(worker, "build", lambda item: (HostCopy(everywhere=True), 3, 8, "block"))
    monkeypatch.setattr(Choosy, "prepare", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel")))
    with pytest.raises(DeviceError, match="runtime eager cannot execute it: no kernel"):  # The space's own must run.
        list(worker.serve(dataclasses.replace(request, steps=((BLOCKS[0],),)), BENCH, device=cpu))


class GpuSession:
    """A session of ONNX Runtime on a GPU. It knows who was asked to execute, and whether a call waited for the device."""

    loads = True
    asked: list[tuple[str, dict[str, str]]]
    options: list[Any]

    def __init__(self, model: bytes, options: Any, providers: Any) -> None:
        type(self).asked, type(self).options = providers, []
        self._cpu = SESSION(model, options, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs, self.io_binding = self._cpu.get_inputs, self._cpu.get_outputs, self._cpu.io_binding

    def get_providers(self) -> list[str]:
        return [*(name for name, _ in self.asked if self.loads), "CPUExecutionProvider"]

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.options.append(options)
        self._cpu.run_with_iobinding(binding, options)


SESSION = ort.InferenceSession


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime and TensorRT as on a machine with a GPU, whose tensors lie in this machine's memory."""
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.InferenceSession", GpuSession)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: providers)
    monkeypatch.setattr(onnx_runtimes, "placed", lambda *given, **options: torch_runtimes.placed(*given, **{**options, "device": CPU}))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())


PLACE = {"device_id": "1", "user_compute_stream": "4711"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("make", [OnnxRuntime, OnnxTensorRt])
def test_onnx_runtime_is_told_to_use_the_gpu_and_torchs_stream(make: type[OnnxRuntime], precision: str) -> None:
    module, x = prepared(BLOCKS[6])
    expected = reference(module, x)
    program = make(cuda=FakeCuda()).prepare(module, x, precision=precision, device=GPU)
    (first, told), *others = GpuSession.asked
    if make is OnnxTensorRt:
        assert first == "TensorrtExecutionProvider" and told["trt_fp16_enable"] == str(int(precision == "fp16"))
        ((second, second_told),) = others
        assert second == "CUDAExecutionProvider" and second_told["use_tf32"] == "0" and second_told.items() >= PLACE.items()
    else:
        assert first == "CUDAExecutionProvider" and told["use_tf32"] == "0" and not others
    assert told.items() >= PLACE.items()
    assert check_parity(program, expected, precision=precision, what="block") < TOLERANCE[precision] / 4
    GpuSession.options.clear()
    program.run()
    program.output()
    timed, read = GpuSession.options
    assert timed.get_run_config_entry("disable_synchronize_execution_providers") == "1"  # The clock waits, not every call.
    assert read is None
    options = make().options(Target("rtx3090", make.name, precision), "cuda")  # type: ignore[arg-type]
    assert options["provider"] == first and not {"user_compute_stream", "device_id"} & options.keys()


@pytest.mark.usefixtures("gpu")
def test_onnx_runtime_never_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = prepared(BLOCKS[0])
    monkeypatch.setattr(GpuSession, "loads", False)  # As where cuDNN is missing: a warning, and a session on the CPU.
    with pytest.raises(DeviceError, match=r"cannot use its CUDAExecutionProvider here.*onnxruntime-gpu"):
        OnnxRuntime(cuda=FakeCuda()).prepare(module, x, precision="fp32", device=GPU)
    monkeypatch.undo()
    assert "CUDAExecutionProvider" not in ort.get_available_providers(), "this test wants the package for CPUs"
    monkeypatch.setattr(onnx_runtimes, "placed", lambda module, x, **_: (module, x))
    with pytest.raises(DeviceError, match="it has .*CPUExecutionProvider"):
        OnnxRuntime(cuda=FakeCuda()).prepare(module, x, precision="fp32", device=GPU)


def fake_tensorrt() -> Any:
    """TensorRT's Python API as far as it is used. An engine reads and writes memory by address, and works when its stream does."""

    class Dict(dict[str, Any]):
        __getattr__ = dict.__getitem__

    class Config:
        flags = {"TF32"}
        cache = b""

        def clear_flag(self, flag: str) -> None:
            self.flags = self.flags - {flag}

        def create_timing_cache(self, known: bytes) -> bytes:
            return known

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
            self.cache = cache

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: self.cache + b"+")

    class Builder:
        seen_caches: list[bytes] = []

        def __init__(self, log: Any) -> None: ...

        def create_network(self, flags: int) -> Any:
            assert flags == 1 << 3, "strongly typed"
            return SimpleNamespace(model=b"")

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            assert not config.flags, "TF32 is not fp32"
            self.seen_caches.append(config.cache)
            return None if network.model == b"too large" else network.model

    class Parser:
        num_errors = 1

        def __init__(self, network: Any, log: Any) -> None:
            self._network = network

        def parse(self, model: bytes) -> bool:
            self._network.model = model
            return model != b"no model"

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(desc=lambda: "no such operator")

    class Engine:
        def __init__(self, plan: bytes) -> None:
            self._session = SESSION(plan, providers=["CPUExecutionProvider"])
            self._addresses: dict[str, int] = {}

        def create_execution_context(self) -> Engine:
            return self

        def get_tensor_shape(self, name: str) -> list[int]:
            return self._session.get_outputs()[0].shape

        def set_tensor_address(self, name: str, address: int) -> None:
            self._addresses[name] = address

        def _memory(self, name: str, tensor: Any) -> np.ndarray:
            kind = np.dtype(np.float32 if tensor.type == "tensor(float)" else np.float16)
            size = int(np.prod(tensor.shape)) * kind.itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(self._addresses[name]), kind).reshape(tensor.shape)

        def execute_async_v3(self, stream: int) -> None:
            assert stream == 4711
            (x,), (y,) = self._session.get_inputs(), self._session.get_outputs()
            self._memory("output", y)[...] = self._session.run(None, {"input": self._memory("input", x)})[0]

    module: Any = ModuleType("tensorrt")
    module.__spec__, module.__version__ = SimpleNamespace(name="tensorrt"), "10.9"
    module.Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
    module.Builder, module.OnnxParser = Builder, Parser
    module.NetworkDefinitionCreationFlag, module.BuilderFlag = Dict(STRONGLY_TYPED=3), Dict(TF32="TF32")
    module.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=Engine)
    return module


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_an_engine_that_reads_and_writes_torchs_memory(precision: str) -> None:
    trt = TensorRtRuntime(cuda=FakeCuda())
    for block in (BLOCKS[2], BLOCKS[5], BLOCKS[9]):
        module, x = prepared(block)
        expected = reference(module, x)
        program = trt.prepare(module, x, precision=precision, device=GPU)
        assert check_parity(program, expected, precision=precision, what="block") < TOLERANCE[precision] / 4
    assert sys.modules["tensorrt"].Builder.seen_caches == [b"", b"+", b"++"]  # Kernels that are known are not timed again.
    assert trt.versions() == {"tensorrt": "10.9"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("model", "says"), [(b"no model", "cannot read the model: no such operator"), (b"too large", "cannot build")])
def test_what_tensorrt_cannot_do_is_told(model: bytes, says: str) -> None:
    with pytest.raises(DeviceError, match=says):
        TensorRtRuntime(cuda=FakeCuda())._engine(model)


ON_A_GPU = [(name, precision) for name, one in RUNTIMES.items() for precision in one.precisions.get("cuda", ()) if find_spec(one.package)]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "precision"), ON_A_GPU)
def test_every_runtime_computes_on_a_real_gpu_what_torch_does(name: str, precision: str) -> None:
    if name.startswith("onnxruntime") and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime is installed, not onnxruntime-gpu")
    device = next(device for device in attached_devices() if device.kind == "cuda")
    bench = worker.open_bench(device)
    for block in BLOCKS:
        assert difference(name, block, precision, bench.torch_device) < TOLERANCE[precision]
