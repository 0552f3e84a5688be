"""The process that measures a part of a bundle: reads one request (JSON) from stdin, writes a line for every item to stdout, and ends.

What worker.py is where torch is; here are ONNX models, made and checked elsewhere. Carried along in every bundle (bundle.py) and started
fresh for every request by bundle_runner.py: numpy and onnxruntime only, and Python 3.8.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from lowsearch.errors import LowsearchError, ParityError
from lowsearch.latency.machine import load_average
from lowsearch.latency.onnx_program import OnnxProgram
from lowsearch.latency.rounds import Prepared, time_step
from lowsearch.latency.timers import CpuTimer, Timer

EXPECTED = "expected.npz"
N_COMPARED = 512
"""Elements of a model's output that travel for comparison, spread at random over all of them."""


def input_of(shape: Sequence[int], index: int) -> np.ndarray:
    """Input of the bundle's model `index`: uniform with mean 0 and variance 1, the same numbers with every version of numpy."""
    return ((np.random.RandomState(index).random_sample(tuple(shape)) - 0.5) * np.sqrt(12.0)).astype(np.float32)


def compared(output: np.ndarray, index: int) -> np.ndarray:
    """The elements of an output of model `index` that are compared with torch's, (n,) with n at most `N_COMPARED`."""
    flat = output.reshape(-1)
    if flat.size <= N_COMPARED:
        return flat
    return flat[(np.random.RandomState(index).random_sample(N_COMPARED) * flat.size).astype(np.int64)]


def serve(folder: Path, request: Mapping[str, Any], timer: Timer) -> Iterator[dict[str, Any]]:
    """Measure every step of `request` that begins before its time is up: a line of results.jsonl for every item."""
    models = _Models(folder)
    effort: Any = SimpleNamespace(**request["effort"])
    rng = np.random.default_rng(request["seed"])
    began = int(time.time())
    for number, step in enumerate(request["steps"]):
        if time.time() >= request["until_s"]:
            return
        prepared = [models.prepare(index) for index in step]
        time_step(prepared, timer, effort, rng=rng, again=lambda one, _: models.prepare(one.item))
        load = load_average()
        for one in prepared:
            yield {"item": one.item, "process": request["process"], **one.times(), "load_average": load, "step": f"{began}.{number}"}


class _Models:
    """The items of a bundle, made ready to be timed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._expected = np.load(folder / EXPECTED)
        self._memory = np.empty(0, np.float32)

    def prepare(self, index: int) -> Prepared:
        """Item `index`. Raises ParityError where its model computes something else than torch."""
        item = self._manifest["items"][index]
        if "memory_bytes" in item:
            return Prepared(index, _Reading(self._values(item["memory_bytes"])), parity=0.0, is_block=False)
        x = input_of(item["input_shape"], index)
        program = OnnxProgram(gzip.decompress((self._folder / item["model"]).read_bytes()), x)
        return Prepared(index, program, parity=self._parity(program.output(), index), is_block="block" in item)

    def _parity(self, output: np.ndarray, index: int) -> float:
        """Largest difference between an output and torch's, as a share of torch's largest value."""
        item, tolerance = self._manifest["items"][index], self._manifest["tolerance"]
        if list(output.shape) != item["output_shape"] or not np.isfinite(output).all():
            raise ParityError(f"{item['model']}: output of shape {output.shape} is not finite, or not of shape {item['output_shape']}")
        difference = float(np.abs(compared(output, index) - self._expected[str(index)]).max()) / item["output_range"]
        if not difference <= tolerance:
            raise ParityError(
                f"{item['model']}: onnxruntime's output differs from torch's by {difference:.2g} of its range, more than {tolerance:.0e}",
                hint="its time was not stored; try another version of onnxruntime",
            )
        return difference

    def _values(self, n_bytes: int) -> np.ndarray:
        """A part of the memory that every read is a part of."""
        if not self._memory.size:
            self._memory = np.ones(max(item.get("memory_bytes", 0) for item in self._manifest["items"]) // 4, np.float32)
        return self._memory[: n_bytes // 4]


class _Reading:
    """A program that reads memory and does next to nothing with it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def run(self) -> None:
        np.dot(self._values, self._values)


def main() -> None:
    """Entry point of the process."""
    # Results have the real stdout to themselves; anything a library prints goes to stderr.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        for line in serve(Path(sys.argv[1]), json.load(sys.stdin), CpuTimer()):
            results.write(json.dumps(line) + "\n")
    except LowsearchError as error:
        results.write(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}) + "\n")
    except BrokenPipeError:
        os._exit(1)  # Nobody listens any more.


if __name__ == "__main__":
    main()
