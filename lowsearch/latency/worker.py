"""The process that measures: reads one Request (a line of JSON) from stdin, writes one Timing a line to stdout, and ends.

It ends at once where its stdin does: whoever started it is gone, and compiling a step of networks for nobody can take minutes.

Started fresh for every request by `measure.launch_worker`, so that nothing of an earlier measurement is left in its memory.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from lowsearch.arch import Arch, Block, input_channels
from lowsearch.errors import DeviceError, LowsearchError, ParityError
from lowsearch.latency.energy import EnergyCounter, Stopwatch, energy_of_pass_mj, open_counter, power_at_rest_w
from lowsearch.latency.machine import load_average
from lowsearch.latency.measure import Request
from lowsearch.latency.memory import READ_BYTES, MemoryRead
from lowsearch.latency.rounds import Prepared, time_step
from lowsearch.latency.runtimes import check_parity, check_supported, reference, runtime
from lowsearch.latency.target import Device, Target, cuda_slug, gpu_clock_mhz, require_attached
from lowsearch.latency.timers import CpuTimer, CudaTimer, Timer, WallTimer, cpu_flush_bytes
from lowsearch.latency.timing import Item, Layer, Network, Timing, TimmNetwork
from lowsearch.model.blocks import LowtentionModule, build_block, conv2d, randomise
from lowsearch.model.linear_attention import LinearAttention
from lowsearch.model.lowformer import build_model
from lowsearch.model.zoo import build_timm

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the programs run on: where tensors are placed, and the clock that times them."""

    torch_device: torch.device
    timer: Timer
    turn: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered while the device works for this process: on a GPU one process works at a time, and others get ready on other cores."""


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
            lock = Path(tempfile.gettempdir()) / f"lowsearch-{getpass.getuser()}-{device.slug}-{index}.lock"
            return Bench(place, CudaTimer(torch.cuda, index=index, evicting=evicting), turn=partial(FileLock, lock))
    raise DeviceError(
        f"device {device.slug} is attached, but this torch ({torch.__version__}) cannot use it", hint="install a torch built for CUDA"
    )


def serve(request: Request, bench: Bench, *, device: Device) -> Iterator[Timing]:
    """Measure every step of `request` on `bench`."""
    check_supported(request.target, device.kind)
    rng = np.random.default_rng(request.seed)
    if request.energy:
        yield from count_energy(request, bench)
        return
    began = int(time.time())
    for number, step in enumerate(request.steps):
        yield from measure_step(step, request, bench, rng=rng, label=f"{began}.{number}")


def measure_step(step: Sequence[Item], request: Request, bench: Bench, *, rng: np.random.Generator, label: str = "") -> Iterator[Timing]:
    """Prepare and check every item of `step`, then time them in interleaved rounds."""
    expected = [_expect(item, request.target, seed=request.seed) for item in step]
    prepared: list[Prepared] = []
    refused: list[Timing] = []
    with bench.turn():
        while expected:
            one = expected.pop(0)  # Nothing is kept twice in memory.
            try:
                prepared.append(_prepare(one, request.target, bench))
            except (DeviceError, ParityError) as error:
                if not isinstance(one.item, TimmNetwork):
                    raise
                refused.append(Timing(item=one.item, process=request.process, hot_ms=(), step=label, refused=error.message))
        if prepared:
            time_step(
                prepared, bench.timer, request.effort, rng=rng,
                again=lambda one, i: _prepare(_expect(one.item, request.target, seed=request.seed + i), request.target, bench),
            )  # fmt: skip
        clock_mhz = gpu_clock_mhz(request.target.device) if isinstance(bench.timer, CudaTimer) else None
    yield from refused
    load = load_average()
    for one in prepared:
        yield Timing(item=one.item, process=request.process, load_average=load, clock_mhz=clock_mhz, step=label, **one.times())


def count_energy(
    request: Request, bench: Bench, *, counter: EnergyCounter | None = None, watch: Stopwatch | None = None
) -> Iterator[Timing]:
    """The energy of a pass of every network of `request`, one after the other. `counter`: None for the device's own.

    A network that cannot run or a counter that stands still gives a Timing without energy: its latency is worth having without it.
    """
    wait = partial(torch.cuda.synchronize, bench.torch_device) if bench.torch_device.type == "cuda" else lambda: None
    for item in (item for step in request.steps for item in step):
        timing = Timing(item=item, process=request.process, hot_ms=())
        try:
            counter = _counter(bench.torch_device) if counter is None else counter
            expected = _expect(item, request.target, seed=request.seed)
            with bench.turn():
                program = _prepare(expected, request.target, bench).program
                idle_power_w = power_at_rest_w(counter, watch=watch)
                bench.timer.settle(program.run)
                energy_mj = energy_of_pass_mj(program.run, counter, wait=wait, watch=watch)
        except (DeviceError, ParityError, OSError) as error:
            log.warning("no energy of %s: %s", item, error)
            yield timing
            continue
        yield dataclasses.replace(timing, energy_mj=float(f"{energy_mj:.6g}"), idle_power_w=float(f"{idle_power_w:.4g}"))


def _counter(device: torch.device) -> EnergyCounter:
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None
    return open_counter(device.type, uuid=uuid)


@dataclass(frozen=True, slots=True)
class _Expected:
    """An item with random weights, its input, and what torch computes of it; for a read of memory there is neither."""

    item: Item
    what: str = ""
    module: nn.Module | None = None
    x: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    output: np.ndarray = field(default_factory=lambda: np.empty(0))


def _expect(item: Item, target: Target, *, seed: int) -> _Expected:
    """What is done for `item` without its device."""
    if isinstance(item, MemoryRead):
        return _Expected(item)
    module, channels, px, what = build(item)
    x = torch.randn(target.batch, channels, px, px, generator=torch.Generator().manual_seed(seed))
    fill_at_random(module, x, seed=seed)
    return _Expected(item, what, module, x, reference(module, x))


def _prepare(expected: _Expected, target: Target, bench: Bench) -> Prepared:
    """Compile an item for its device, and refuse it where the runtime computes something else than torch."""
    item = expected.item
    if expected.module is None:
        assert isinstance(item, MemoryRead)
        return Prepared(item, _Reading(item.n_bytes, bench.torch_device), parity=0.0, is_block=False)
    try:
        program = runtime(target.runtime).prepare(
            expected.module, expected.x, precision=target.precision, device=bench.torch_device, threads=target.threads
        )  # fmt: skip
    except LowsearchError:
        raise
    except Exception as error:  # Whatever a compiler raises of a network that it does not know how to run.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DeviceError(
            f"{expected.what}: runtime {target.runtime} cannot execute it: {reason}", hint="choose another --runtime"
        ) from error
    parity = check_parity(program, expected.output, precision=target.precision, what=expected.what)
    return Prepared(item, program, parity=parity, is_block=not isinstance(item, Network))


def build(item: Block | Layer | Network) -> tuple[nn.Module, int, int, str]:
    """`item` as a module; channels and resolution (px) of its input; what to call it in a message."""
    if isinstance(item, TimmNetwork):
        return build_timm(item.name, item.resolution_px, item.num_classes), 3, item.resolution_px, f"network {item.name}"
    if isinstance(item, Arch):
        return build_model(item), 3, item.resolution_px, f"network {item.arch_id}"
    if isinstance(item, Layer):
        return _build_layer(item), item.channels, item.resolution_px, str(item)
    return build_block(item), input_channels(item), item.resolution_px, str(item)


def fill_at_random(module: nn.Module, x: torch.Tensor, *, seed: int) -> None:
    """Make `module` ready for comparing what it computes of `x`: random everywhere, ends that training starts at zero included, as
    parity of an identity would prove nothing."""
    module.eval()
    randomise(module, seed=seed)
    _calm_attention(module, x)


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


def main() -> None:
    """Entry point of the process."""
    # Results have the real stdout to themselves; anything a library prints goes to stderr.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = Request.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
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


def _end_with_stdin() -> None:
    os.read(0, 1)  # Nothing comes any more but its end.
    os._exit(1)


if __name__ == "__main__":
    main()
