"""Runtimes: they compute what torch computes, and the gate refuses those that do not."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from lowsearch.arch import Arch, Attention, Block, ConvBranch, Downsampler, Head, Lowtention, Mlp, Stage, Stem, StemConv, input_channels
from lowsearch.errors import DeviceError, ParityError
from lowsearch.latency import worker
from lowsearch.latency.measure import Effort, Request
from lowsearch.latency.memory import MemoryRead
from lowsearch.latency.runtimes import RUNTIMES, Program, Runtime, check_parity, check_supported, reference, runtime
from lowsearch.latency.target import Target, attached_devices
from lowsearch.latency.timers import CpuTimer
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
INSTALLED = [name for name, one in RUNTIMES.items() if find_spec(one.package)]
BENCH = Bench(CPU, CpuTimer(flush_bytes=1 << 16))
QUICK = Effort(processes=1, rounds=1, warmups=1, sample_ms=0.001, round_ms=0.01, min_samples=1, turns_ms=0.01, min_turns=1, cold_samples=1)


def prepared(block: Block) -> tuple[nn.Module, torch.Tensor]:
    module = build_block(block).eval()
    randomise(module, seed=0)
    return module, torch.randn(
        2, input_channels(block), block.resolution_px, block.resolution_px, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.kind)
def test_every_runtime_computes_what_torch_does(name: str, block: Block) -> None:
    module, x = prepared(block)
    expected = reference(module, x)
    program = runtime(name).prepare(module, x, precision="fp32", device=CPU)
    assert check_parity(program, expected, precision="fp32", what="block") < 1e-5


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

    def versions(self) -> dict[str, str]:
        return {"fast": "1"}

    def options(self) -> dict[str, str | int]:
        return {}

    def prepare(self, module: nn.Module, x: torch.Tensor, *, precision: str, device: torch.device) -> Program:
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


@pytest.mark.parametrize("name", INSTALLED)
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


def test_what_cannot_be_measured_honestly_is_refused() -> None:
    with pytest.raises(DeviceError, match="unknown runtime 'tvm'; known: onnxruntime, openvino, torchscript, eager"):
        runtime("tvm")
    with pytest.raises(DeviceError, match="does not run on a cuda device; runtimes that do: torchscript, eager"):
        check_supported(Target("rtx3090", "onnxruntime"), "cuda")
    with pytest.raises(DeviceError, match="no fp16"):
        check_supported(Target("amd-epyc-9654", "eager", "fp16"), "cpu")
    with pytest.raises(DeviceError, match="threads is 2"):
        check_supported(Target("amd-epyc-9654", "eager", threads=2), "cpu")
    check_supported(Target("rtx3090", "eager", "fp16"), "cuda")


def test_a_runtime_that_is_not_installed_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIMES["openvino"], "package", "no_such_package")
    with pytest.raises(DeviceError, match=r"openvino is not installed.*pip install 'lowsearch\[openvino\]'"):
        check_supported(Target("amd-epyc-9654", "openvino"), "cpu")


def test_openvino_keeps_to_fp32_where_the_processor_could_round() -> None:
    """Left alone, it computes in bfloat16 on processors that have it: three digits instead of seven."""
    pytest.importorskip("openvino")
    module, x = prepared(BLOCKS[2])
    program = runtime("openvino").prepare(module, x, precision="fp32", device=CPU)
    assert check_parity(program, reference(module, x), precision="fp32", what="block") < 1e-5
    assert runtime("openvino").options()["INFERENCE_PRECISION_HINT"] == "f32"
