"""Where the trainings of a study run: in the process that asks for them, or as tasks of a Ray cluster.

An engine carries out orders (`train.order`). What it returns is on disk here by then; what a task leaves behind on its own machine
is nobody's.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from lowsearch.errors import LowsearchError, StudyError, UsageError
from lowsearch.train.order import Order

log = logging.getLogger(__name__)

MAX_DEATHS = 2
"""A training whose process died this often is given up, as in `storage`. That a node died is not laid to its charge."""
_EXAMPLES = "--engine ray, --engine ray:auto or --engine ray://host:10001"
_CLIENT = re.compile(r"ray://(?P<host>[^/:@\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_ANSWER_S = 10.0


class DiedError(Exception):
    """The process of a task died again and again."""


class Job:
    """An order under way."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.ref: Any = None
        self.found: tuple[Any] | Exception | None = None
        """What a task returned, or why it did not."""


class Engine(Protocol):
    """Carries out orders."""

    def start(self, order: Order) -> Job: ...

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of `jobs` that have ended; waits for the first. At least one is given, the most urgent first."""
        ...

    def result(self, job: Job) -> Any:
        """What an ended job made, accepted. Raises DiedError, or what the training raised."""
        ...


class HereEngine:
    """Trains in this process, the most urgent first."""

    def start(self, order: Order) -> Job:
        return Job(order)

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        return [jobs[0]]

    def result(self, job: Job) -> Any:
        return job.order.here()


def check_engine(name: str) -> None:
    """Raise UsageError where `name` is no engine."""
    if name in ("local", "ray", "ray:auto") or ((found := _CLIENT.fullmatch(name)) and 0 < int(found["port"]) < 65536):
        return
    raise UsageError(f"unknown engine {name!r}", hint=f"local, {_EXAMPLES}")


def require_engine(name: str) -> None:
    """Raise StudyError where Ray is needed and not installed, or its cluster does not answer. Starts nothing."""
    if name == "local":
        return
    if importlib.util.find_spec("ray") is None:
        raise StudyError(f"--engine {name} needs Ray, which is not installed", hint='pip install "lowsearch[ray]"')
    if found := _CLIENT.fullmatch(name):
        try:
            with socket.create_connection((found["host"].strip("[]"), int(found["port"])), timeout=_ANSWER_S):
                pass
        except OSError as error:
            raise _no_cluster(name, error) from error


class RayEngine:
    """Trains as tasks of a Ray cluster. The images go to the cluster once; nodes need no folder of ours, only lowsearch and Ray."""

    def __init__(self, name: str, *, at_once: int, cpus: float, gpus: float) -> None:
        """`name` as `--engine` takes it. `at_once`: tasks for which a cluster of our own (`ray`) has room; each takes `cpus` and `gpus`.

        Raises StudyError where there is no cluster, or none of its nodes has room for one task.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Before the import: Ray would report home.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = self._ray = importlib.import_module("ray")
        own = {"num_cpus": max(1, math.ceil(at_once * cpus)), "include_dashboard": False} if name == "ray" else {}
        try:
            ray.init(
                address={"ray": "local", "ray:auto": "auto"}.get(name, name), log_to_driver=False, configure_logging=False,
                **own,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise _no_cluster(name, error) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise StudyError(
                f"no node of the Ray cluster {name} has the {cpus:g} CPUs and {gpus:g} GPUs that a task takes",
                hint="lower --trial-cpus or --trial-gpus, or start such a node first",
            )
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_DEATHS - 1)(_carried_out)
        self._threads = max(1, int(cpus))
        self._shared: dict[int, tuple[Any, Any]] = {}

    def start(self, order: Order) -> Job:
        job = Job(order)
        self._submit(job)
        return job

    def _submit(self, job: Job) -> None:
        order = job.order
        if id(order.shared) not in self._shared:  # Held with its reference, so that its id stays its own.
            self._shared[id(order.shared)] = order.shared, self._ray.put(order.shared)
        shared = self._shared[id(order.shared)][1]
        job.ref = self._task.options(name=order.name).remote(_version(), self._threads, order.function, shared, dict(order.values))

    def wait(self, jobs: Sequence[Job]) -> list[Job]:
        while not (ended := [job for job in jobs if job.found is not None]):
            by_ref = {job.ref: job for job in jobs}
            for ref in self._ray.wait(list(by_ref), num_returns=1)[0]:
                self._collect(by_ref[ref])
        return ended

    def _collect(self, job: Job) -> None:
        """Take what the task of `job` returned or raised; one that was lost with its node is started again."""
        lost = self._ray.exceptions
        try:
            job.found = (self._ray.get(job.ref),)
        except lost.RayTaskError as error:
            job.found = error.cause if isinstance(error.cause, LowsearchError) else error
        except (lost.WorkerCrashedError, lost.OutOfMemoryError):
            job.found = DiedError(f"its process died {MAX_DEATHS} times")
        except (lost.NodeDiedError, lost.LocalRayletDiedError, lost.ObjectLostError) as error:
            log.warning("%s was lost with its node, and is started again: %s", job.order.name, _first_line(error))
            self._submit(job)

    def result(self, job: Job) -> Any:
        assert job.found is not None, "waited for"
        if isinstance(job.found, Exception):
            raise job.found
        return job.order.accept(job.found[0])


def _carried_out(version: str, threads: int, function: Callable[..., Any], shared: Any, values: Mapping[str, Any]) -> Any:
    """On a node: `function(shared, **values)` on `threads` threads. Raises StudyError where the node has another lowsearch."""
    import sys

    if version != _version():
        raise StudyError(f"a node of the cluster has lowsearch {_version()}, not {version}", hint="install the same on every node")
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))
    if (torch := sys.modules.get("torch")) is not None:  # Of an earlier task; else it reads the environment.
        torch.set_num_threads(threads)
    # The images are shared by the processes of a node, so they are read-only; nobody writes to them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    return function(shared, **values)


def _version() -> str:
    from lowsearch import __version__

    return __version__


def _no_cluster(name: str, error: BaseException) -> StudyError:
    how = {"ray": "free some memory", "ray:auto": "ray start --address=HEAD:6379 here, or --engine ray://HEAD:10001"}
    return StudyError(f"no Ray cluster answers at {name}: {_first_line(error)}", hint=how.get(name, "on its head: ray start --head"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
