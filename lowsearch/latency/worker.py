"""The process that measures: reads one Request (JSON) from stdin, writes one Timing a line to stdout, and ends.

Started fresh for every request by `measure.launch_worker`, so that nothing of an earlier measurement is left in its memory.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import nn

from lowsearch.arch import Arch, input_channels
from lowsearch.errors import DeviceError, LowsearchError
from lowsearch.latency.measure import Effort, Request
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.runtimes import Program, check_parity, check_supported, reference, runtime
from lowsearch.latency.target import Device, Target, cuda_slug, load_average, require_attached
from lowsearch.latency.timers import CpuTimer, CudaTimer, Timer, WallTimer, cpu_flush_bytes
from lowsearch.latency.timing import Item, Layer, Network, Timing, TimmNetwork
from lowsearch.model.blocks import LowtentionModule, build_block, conv2d, randomise
from lowsearch.model.linear_attention import LinearAttention
from lowsearch.model.lowformer import build_model
from lowsearch.model.zoo import build_timm

MIN_COMPANY = 16


@dataclass(frozen=True, slots=True)
class Bench:
    """What the programs run on: where tensors are placed, and the clock that times them."""

    torch_device: torch.device
    timer: Timer


@dataclass(slots=True)
class _Prepared:
    """One item, compiled and checked, and what has been timed of it so far."""

    item: Item
    program: Program
    parity: float
    once_ms: float = 0.0
    hot_ms: list[float] = field(default_factory=list)
    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    total_ms: float = 0.0
    total_wall_ms: float = 0.0


class _Reading:
    """A program that reads memory and does next to nothing with it."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._values = _memory(device)[: n_bytes // 4]

    def run(self) -> None:
        torch.dot(self._values, self._values)

    def output(self) -> np.ndarray:
        return torch.dot(self._values, self._values).cpu().numpy()


@cache
def _memory(device: torch.device) -> torch.Tensor:
    """What every `MemoryRead` is a part of."""
    return torch.ones(max(READ_BYTES) // 4, device=device)


def open_bench(device: Device, threads: int = 1) -> Bench:
    """The bench of an attached device, for as many threads of a CPU."""
    if device.kind == "cpu":
        timer = CpuTimer() if threads == 1 else WallTimer(torch.zeros(threads * cpu_flush_bytes() // 4))
        return Bench(torch.device("cpu"), timer)
    for index in range(torch.cuda.device_count()):
        if cuda_slug(torch.cuda.get_device_name(index)) == device.slug:
            torch.cuda.set_device(index)
            torch.cuda.set_stream(torch.cuda.Stream(index))  # Everything runs on one stream; ONNX Runtime refuses the default one.
            place = torch.device("cuda", index)
            l2_bytes = torch.cuda.get_device_properties(index).L2_cache_size
            evicting = torch.empty(max(2 * l2_bytes, 64 << 20), dtype=torch.int8, device=place)
            return Bench(place, CudaTimer(torch.cuda, index=index, evicting=evicting))
    raise DeviceError(
        f"device {device.slug} is attached, but this torch ({torch.__version__}) cannot use it", hint="install a torch built for CUDA"
    )


def serve(request: Request, bench: Bench, *, device: Device) -> Iterator[Timing]:
    """Measure every step of `request` on `bench`."""
    check_supported(request.target, device.kind)
    rng = np.random.default_rng(request.seed)
    began = int(time.time())
    for number, step in enumerate(request.steps):
        yield from measure_step(step, request, bench, rng=rng, label=f"{began}.{number}")


def measure_step(step: Sequence[Item], request: Request, bench: Bench, *, rng: np.random.Generator, label: str = "") -> Iterator[Timing]:
    """Prepare and check every item of `step`, then time them in interleaved rounds."""
    prepared = [_prepare(item, request.target, bench, seed=request.seed) for item in step]
    blocks = [one for one in prepared if not isinstance(one.item, Network | MemoryRead)]
    # A few blocks alone would stay warmer than in a network: copies of them, timed for nobody, take turns with them.
    n_company = max(0, MIN_COMPANY - len(blocks)) if blocks else 0
    company = [_prepare(blocks[i % len(blocks)].item, request.target, bench, seed=request.seed + i) for i in range(n_company)]
    bench.timer.settle(prepared[0].program.run)
    for _ in range(request.effort.rounds):
        for index in rng.permutation(len(prepared)):
            _time_hot(prepared[index], bench.timer, request.effort)
        for index in rng.permutation(len(blocks)):
            _time_cold(blocks[index], bench.timer, request.effort)
        if blocks:
            _time_warm(blocks, company, bench.timer, request.effort, rng=rng)
    load = load_average()
    for one in prepared:
        yield Timing(
            item=one.item, process=request.process, hot_ms=tuple(one.hot_ms), warm_ms=tuple(one.warm_ms), cold_ms=tuple(one.cold_ms),
            wall_over_cpu=round(one.total_wall_ms / one.total_ms, 4) if one.total_ms else 1.0, load_average=load,
            parity=float(f"{one.parity:.1e}"), step=label,
        )  # fmt: skip


def _prepare(item: Item, target: Target, bench: Bench, *, seed: int) -> _Prepared:
    """Compile `item` with random weights, and refuse it where the runtime computes something else than torch."""
    if isinstance(item, MemoryRead):
        return _Prepared(item, _Reading(item.n_bytes, bench.torch_device), parity=0.0)
    if isinstance(item, TimmNetwork):
        module, channels, px, what = build_timm(item.name, item.resolution_px), 3, item.resolution_px, f"network {item.name}"
    elif isinstance(item, Arch):
        module, channels, px, what = build_model(item), 3, item.resolution_px, f"network {item.arch_id}"
    elif isinstance(item, Layer):
        module, channels, px, what = _build_layer(item), item.channels, item.resolution_px, str(item)
    else:
        module, channels, px, what = build_block(item), input_channels(item), item.resolution_px, str(item)
    module.eval()
    # Random everywhere, ends that training starts at zero included: parity of an identity would prove nothing.
    randomise(module, seed=seed)
    x = torch.randn(target.batch, channels, px, px, generator=torch.Generator().manual_seed(seed))
    _calm_attention(module, x)
    expected = reference(module, x)
    program = runtime(target.runtime).prepare(
        module, x, precision=target.precision, device=bench.torch_device, threads=target.threads
    )  # fmt: skip
    return _Prepared(item, program, check_parity(program, expected, precision=target.precision, what=what))


def _build_layer(layer: Layer) -> nn.Module:
    if layer.kind == "conv":
        return conv2d(layer.channels, layer.channels, layer.kernel, groups=layer.groups)
    return LinearAttention(layer.channels, head_dim=layer.head_dim)


def _calm_attention(module: nn.Module, x: torch.Tensor) -> None:
    """Scale the random queries and keys to variance one, as they are in a trained network. Without it activations that grow from
    branch to branch saturate the softmax, and a deep network turns the rounding of one addition into a difference of 0.1 %."""

    def scale(layer: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        std = output.std()
        for weight in layer.parameters():
            weight.div_(std)
        return output / std

    hooks = [part.qkv.register_forward_hook(scale) for part in module.modules() if isinstance(part, LowtentionModule)]
    if hooks:
        with torch.no_grad():
            module(x)
    for hook in hooks:
        hook.remove()


def _time_hot(one: _Prepared, timer: Timer, effort: Effort) -> None:
    """One round of back-to-back calls."""
    run = one.program.run
    for _ in range(effort.warmups - 1):
        run()
    one.once_ms = max(timer.time(run, repeats=1).ms, 1e-6)  # The last warm-up call also tells how many repeats a sample needs.
    repeats = max(1, round(effort.sample_ms / one.once_ms))
    n_samples = int(np.clip(effort.round_ms / (one.once_ms * repeats), effort.min_samples, effort.max_samples))
    samples = [timer.time(run, repeats=repeats) for _ in range(n_samples)]
    one.hot_ms.append(_quartile([sample.ms for sample in samples]))
    one.total_ms += sum(sample.ms for sample in samples)
    one.total_wall_ms += sum(sample.wall_ms for sample in samples)


def _time_cold(one: _Prepared, timer: Timer, effort: Effort) -> None:
    """One round of calls that each find the caches flushed."""
    samples = []
    for _ in range(effort.cold_samples):
        timer.flush()
        samples.append(timer.time(one.program.run, repeats=1).ms)
    one.cold_ms.append(_quartile(samples))


def _time_warm(
    blocks: Sequence[_Prepared], company: Sequence[_Prepared], timer: Timer, effort: Effort, *, rng: np.random.Generator
) -> None:
    """One round of calls in turn, each turn in an order of its own: between two calls of a block run all the others, as in a network."""
    everyone = [*blocks, *company]
    turn_ms = sum(one.once_ms for one in blocks) * len(everyone) / len(blocks)
    n_turns = int(np.clip(effort.turns_ms / turn_ms, effort.min_turns, effort.max_turns))
    samples = np.empty((len(everyone), n_turns))
    for turn in range(n_turns):
        for index in rng.permutation(len(everyone)):
            samples[index, turn] = timer.time(everyone[index].program.run, repeats=1).ms
    for one, row in zip(blocks, samples, strict=False):
        one.warm_ms.append(_quartile(row))


def _quartile(values: Sequence[float] | np.ndarray) -> float:
    """25th percentile, to 10 nanoseconds."""
    return round(float(np.percentile(values, 25)), 5)


def main() -> None:
    """Entry point of the process."""
    # Results have the real stdout to themselves; anything a library prints goes to stderr.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = Request.from_json(sys.stdin.read())
    torch.set_num_threads(request.target.threads)
    torch.set_num_interop_threads(1)
    try:
        device = require_attached(request.target)
        for timing in serve(request, open_bench(device, request.target.threads), device=device):
            results.write(json.dumps(timing.to_dict()) + "\n")
    except LowsearchError as error:
        results.write(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}) + "\n")
    except BrokenPipeError:
        os._exit(1)  # Nobody listens any more.


if __name__ == "__main__":
    main()
