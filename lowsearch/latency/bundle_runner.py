"""Measure a bundle on the machine that it was carried to: `python3 run.py`. Needs Python 3.8 or newer, numpy and onnxruntime.

Copied into every bundle as run.py, beside the modules that it imports (bundle.py). The protocol is that of docs/measurement.md: how
often things are timed, and in which groups, stands in manifest.json. Everything measured is appended to results.jsonl as it comes, so
that a killed run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Generator, Iterator, Mapping, Sequence

from lowsearch.errors import BundleError, DeviceError, LowsearchError, ParityError
from lowsearch.latency.machine import cpu_detail, cpu_facts, cpu_name, governor, load_average, system_name

MANIFEST, RESULTS = "manifest.json", "results.jsonl"
RESULTS_SCHEMA, RESULTS_VERSION = "lowsearch-bundle-results", 1
TIME_IS_UP_EXIT = 3
_WORKER = ("-m", "lowsearch.latency.bundle_worker")
_ERRORS = {error.__name__: error for error in (BundleError, DeviceError, ParityError)}
_PROGRESS_EVERY_S = 5.0

Line = Dict[str, Any]
"""One line of results.jsonl."""


def main() -> int:
    """Entry point of run.py; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description="Measure the blocks and networks of this folder on this machine. Interrupted, the same command goes on.",
        epilog=f"What comes of it is {RESULTS}: bring it back into the folder that you copied here, and run "
        f"`lowsearch profile --import FOLDER`. Exit codes: 0 done, 2 an error, {TIME_IS_UP_EXIT} --minutes were over.",
    )
    parser.add_argument("--minutes", type=float, help="stop after about so many minutes; the next run goes on")
    minutes = parser.parse_args().minutes
    try:
        whole = measure(Path(__file__).resolve().parent, until_s=float("inf") if minutes is None else time.time() + 60 * minutes)
    except LowsearchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os._exit(1)  # Nobody listens any more.
    print(f"done: {RESULTS} holds everything" if whole else "time is up; the same command goes on", flush=True)
    return 0 if whole else TIME_IS_UP_EXIT


def measure(folder: Path, *, until_s: float = float("inf")) -> bool:
    """Measure what results.jsonl lacks; whether all of it was done before `until_s` (seconds since the epoch).

    Raises BundleError for a damaged folder or results of another machine, DeviceError where packages are missing or a process dies,
    ParityError where a model computes something else than torch.
    """
    _require_packages()
    text = (folder / MANIFEST).read_bytes()
    manifest = json.loads(text)
    wrong = damaged_files(folder, manifest["files"]) + [name for name in manifest["files"] if not (folder / name).is_file()]
    if wrong:
        raise BundleError(f"{len(wrong)} files are missing or damaged, such as {wrong[0]}", hint="copy the whole folder here again")
    header = {
        "schema": RESULTS_SCHEMA, "version": RESULTS_VERSION, "manifest_sha256": hashlib.sha256(text).hexdigest(), "machine": _machine(),
    }  # fmt: skip
    with _locked(folder), _Session(folder, manifest, header) as session:
        for phase in manifest["phases"]:
            processes = phase["effort"]["processes"]
            for process in range(processes):
                session.run(phase, process, session.items(phase), until_s)
            session.run(phase, processes, session.disputed_items(phase), until_s)
        return session.done == session.total


def damaged_files(folder: Path, sha256: Mapping[str, str]) -> list[str]:
    """Those of the files (relative path -> hash) that `folder` holds and that are not what they were."""
    present = ((name, folder / name, wanted) for name, wanted in sha256.items())
    return [name for name, path, wanted in present if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != wanted]


def disputed(lines: Sequence[Mapping[str, Any]], by: float) -> bool:
    """Whether the processes disagree about an item by more than `by`; a further one then decides.

    As `doubt.disputed`, but without numpy, whose versions differ in the last digit: both ends of a bundle must agree.
    """
    for state in ("hot_ms", "warm_ms"):
        found = [_quartile(line[state]) for line in lines if line[state]]
        if found and max(found) > (1 + by) * min(found):
            return True
    return False


def regrouped(
    steps: Sequence[Sequence[int]], wanted: set[int], n_bytes: Sequence[int], *, max_items: int, max_bytes: int
) -> list[list[int]]:
    """The planned groups less what is not wanted; what is left of neighbours is put together while it fits in one group."""
    groups: list[list[int]] = []
    for step in steps:
        left = [item for item in step if item in wanted]
        joined = [*groups[-1], *left] if groups else left
        if groups and len(joined) <= max_items and sum(n_bytes[item] for item in joined) <= max_bytes:
            groups[-1] = joined
        elif left:
            groups.append(left)
    return groups


def _quartile(rounds: Sequence[float]) -> float:
    """25th percentile, linear between its neighbours."""
    ordered = sorted(rounds)
    place = 0.25 * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


class _Session:
    """One run under way: results.jsonl, what stands in it, and how far it is."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], header: Line) -> None:
        self._folder, self._manifest = folder, manifest
        self._n_bytes = [item["bytes"] for item in manifest["items"]]
        self._found: dict[int, dict[int, Line]] = {}
        lines = read_lines(folder / RESULTS, cut=True)
        if lines:
            _check_same(header, lines[0])
        for line in lines[1:]:
            self._found.setdefault(line["item"], {})[line["process"]] = line
        self._file = (folder / RESULTS).open("a", encoding="utf-8")
        if not lines:
            self._append(header)
        self.done = sum(len(self._found.get(item, {})) for item in range(len(self._n_bytes)))
        self.total = sum(len(self.items(phase)) * phase["effort"]["processes"] for phase in manifest["phases"])
        for phase in manifest["phases"]:
            self.total += sum(phase["effort"]["processes"] in self._found.get(item, {}) for item in self.items(phase))
        self._began_s, self._done_before = time.time(), self.done
        self._told, self._told_s = -1, 0.0

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def items(self, phase: Mapping[str, Any]) -> set[int]:
        return {item for step in phase["steps"][0] for item in step}

    def disputed_items(self, phase: Mapping[str, Any]) -> set[int]:
        """The items that need one more process; none while others are missing, and not those that had it."""
        processes, by = phase["effort"]["processes"], self._manifest["dispute"]
        found = {item: [self._found.get(item, {}).get(process) for process in range(processes)] for item in self.items(phase)}
        unclear = {item for item, lines in found.items() if all(lines) and disputed([line for line in lines if line], by)}
        self.total += sum(processes not in self._found[item] for item in unclear)
        return unclear

    def run(self, phase: Mapping[str, Any], process: int, wanted: set[int], until_s: float) -> None:
        """Time the `wanted` items that `process` has not timed yet in a fresh process, until the time is up."""
        missing = {item for item in wanted if process not in self._found.get(item, {})}
        limits = {"max_items": self._manifest["items_per_step"], "max_bytes": self._manifest["bytes_per_step"]}
        steps = regrouped(phase["steps"][process], missing, self._n_bytes, **limits)
        self._tell()
        if not steps or time.time() >= until_s:
            return
        request = {
            "process": process, "seed": self._manifest["seed"] + process, "effort": phase["effort"], "steps": steps, "until_s": until_s,
        }  # fmt: skip
        with contextlib.closing(_launch(self._folder, request)) as lines:
            for line in lines:
                self._append(line)
                self._found.setdefault(line["item"], {})[process] = line
                self.done += 1
                self._tell()

    def _append(self, line: Line) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _tell(self) -> None:
        now = time.time()
        if self.done == self._told or (self.done < self.total and now - self._told_s < _PROGRESS_EVERY_S):
            return
        self._told, self._told_s = self.done, now
        fresh = self.done - self._done_before
        left_min = (now - self._began_s) / fresh * (self.total - self.done) / 60 if fresh else None
        print(f"{self.done}/{self.total} timings" + (f", about {max(1, left_min):.0f} min left" if left_min else ""), flush=True)


def read_lines(path: Path, *, cut: bool = False) -> list[Line]:
    """The whole lines of a results file; a torn last one is left out, and cut off the file with `cut`. Raises BundleError."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if cut and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, text in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
            named = number == 1 or (isinstance(line["item"], int) and isinstance(line["process"], int))
            if not isinstance(line, dict) or not named:
                raise ValueError("no timing")
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"{path.name}:{number}: damaged line ({error})", hint=f"remove that line of {path}, and measure again"
            ) from error
        lines.append(line)
    return lines


def _check_same(header: Line, then: Line) -> None:
    """Raise BundleError unless results that begin with `then` may go on under `header`."""
    for name in ("schema", "version", "manifest_sha256"):
        if then.get(name) != header[name]:
            raise BundleError(f"{RESULTS} belongs to another bundle ({name} differs)", hint=f"move {RESULTS} away to measure anew")
    for name in ("device_name", "device_detail", "versions"):
        before, now = then.get("machine", {}).get(name), header["machine"][name]
        if before != now:
            raise BundleError(
                f"{RESULTS} was begun on another machine or with other versions ({name}: {before} then, {now} now)",
                hint=f"move {RESULTS} away to measure anew",
            )


def _require_packages() -> None:
    missing = [name for name in ("numpy", "onnxruntime") if find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise DeviceError(f"{sys.executable} has no {' and no '.join(missing)}", hint=f"{sys.executable} -m pip install {names}")


def _machine() -> Line:
    """What a latency measured now would depend on."""
    import numpy
    import onnxruntime

    from lowsearch.latency.timers import cpu_flush_bytes

    facts = cpu_facts()
    return {
        "device_name": cpu_name(facts), "device_detail": cpu_detail(facts, os.cpu_count() or 1), "os": system_name(),
        "python": platform.python_version(), "versions": {"onnxruntime": onnxruntime.__version__},
        "runtime_options": {"flush_bytes": cpu_flush_bytes(), "memory_read": f"numpy {numpy.__version__} dot"},
        "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_average": load_average(), "governor": governor(),
    }  # fmt: skip


def _launch(folder: Path, request: Mapping[str, Any]) -> Generator[Line, None, None]:
    """Run `request` in a fresh process (bundle_worker.py), and yield its lines as they come.

    One after the other, also on many cores: on small boards these share caches and clocks.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    command = [sys.executable, *_WORKER, str(folder)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=str(folder), encoding="utf-8")
    assert worker.stdin and worker.stdout
    try:
        with contextlib.suppress(BrokenPipeError), worker.stdin as pipe:  # Of one that died at once, the code below tells.
            pipe.write(json.dumps(request))
        for text in worker.stdout:
            line = json.loads(text)
            if "error" in line:
                raise _ERRORS.get(line["error"], LowsearchError)(line["message"], hint=line["hint"])
            yield line
        if worker.wait() != 0:
            raise DeviceError(
                f"the measuring process ended with code {worker.returncode} (-9: out of memory)", hint="the same command goes on"
            )
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
        worker.stdout.close()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process, where the system can; it frees the lock of a killed one."""
    with (folder / ".lock").open("w") as file:
        if find_spec("fcntl"):  # Not on Windows.
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BundleError("another run.py is measuring this folder", hint="wait for it to end, or end it") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
