"""Measuring a bundle on another machine over ssh: copy it there, run it, and bring its results back.

Everything goes through the user's own `ssh` (or the command in LOWSEARCH_SSH), so that its keys, names and jumps hold. Each step leaves
its result on one side or the other: interrupted, the same call goes on.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from lowsearch.errors import BundleError
from lowsearch.files import write_atomically
from lowsearch.latency.bundle import Bundle
from lowsearch.latency.bundle_runner import MANIFEST, RESULTS
from lowsearch.latency.measure import Progress

SSH_VARIABLE = "LOWSEARCH_SSH"
_UNREACHABLE = 255  # ssh's own code; any other is the remote command's.
_NO_SUCH_COMMAND = 127
_CHECK = "import sys; assert sys.version_info >= (3, 8), 'Python is older than 3.8'; import numpy, onnxruntime"
_DONE_OF_TOTAL = re.compile(r"(\d+)/(\d+) ")


def measure_on_host(bundle: Bundle, host: str, *, python: str = "python3", progress: Progress | None = None) -> str:
    """Measure `bundle` on `host` (`user@machine`) with its `python`, so that its folder here holds the results; the folder there.

    Raises BundleError where the host cannot be reached or lacks something, and with what the runner there complains of.
    """
    remote = _Remote(host)
    place = f"lowsearch-bundles/{bundle.target.device}-{bundle.sha256[:10]}"
    remote.run(f"{python} -c {shlex.quote(_CHECK)}", failing=lambda said: _unfit(host, python, said))
    here = (bundle.folder / MANIFEST).read_bytes()
    if remote.run(f"cat {place}/{MANIFEST} 2>/dev/null || true") != here:
        _copy(bundle, remote, place, progress)
    label = f"{bundle.space.name} on {host}"

    def tell(line: str) -> None:
        match = _DONE_OF_TOTAL.match(line)
        if match and progress is not None:
            progress(int(match[1]), int(match[2]), label)

    remote.run(f"cd {place} && exec {python} run.py", each_line=tell)
    write_atomically(bundle.folder / RESULTS, remote.run(f"cat {place}/{RESULTS}").decode("utf-8"))
    return f"{host}:{place}"


def _copy(bundle: Bundle, remote: _Remote, place: str, progress: Progress | None) -> None:
    """The bundle's files, its manifest last: where that stands, everything does."""
    names = [*bundle.manifest["files"], MANIFEST]

    def write(pipe: IO[bytes]) -> None:
        with tarfile.open(fileobj=pipe, mode="w|") as archive:
            for done, name in enumerate(names, start=1):
                archive.add(bundle.folder / name, name)
                if progress is not None:
                    progress(done, len(names), f"copy to {remote.host}")

    remote.run(f"mkdir -p {place} && tar -xf - -C {place}", write=write)


def _unfit(host: str, python: str, said: str) -> BundleError:
    missing = re.search(r"No module named '(\w+)'", said)
    if missing:
        return BundleError(f"{python} on {host} has no {missing[1]}", hint=f"ssh {host} {python} -m pip install numpy onnxruntime")
    return BundleError(f"{python} on {host} cannot measure: {_last_line(said)}", hint="name another with --remote-python")


@dataclass(frozen=True, slots=True)
class _Remote:
    """A machine that commands run on through ssh."""

    host: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^\s-]\S*", self.host):
            raise BundleError(f"host {self.host!r} is no machine's name", hint="--host user@machine")

    def run(
        self,
        command: str,
        *,
        write: Callable[[IO[bytes]], None] | None = None,
        each_line: Callable[[str], None] | None = None,
        failing: Callable[[str], BundleError] | None = None,
    ) -> bytes:
        """What `command` prints there, or nothing where `each_line` takes it as it comes. `write` feeds its input.

        Raises BundleError where it fails, as `failing` makes it of what it said on stderr.
        """
        ssh = shlex.split(os.environ.get(SSH_VARIABLE, "ssh"))
        stdin = subprocess.DEVNULL if write is None else subprocess.PIPE
        with tempfile.TemporaryFile() as complaints:
            try:
                process = subprocess.Popen([*ssh, self.host, command], stdin=stdin, stdout=subprocess.PIPE, stderr=complaints)
            except OSError as error:
                hint = f"install OpenSSH's client, or name another in {SSH_VARIABLE}"
                raise BundleError(f"cannot run {ssh[0]}: {error.strerror}", hint=hint) from error
            assert process.stdout
            try:
                if write is not None and process.stdin is not None:
                    _feed(process.stdin, write)
                if each_line is None:
                    printed = process.stdout.read()
                else:
                    printed = b""
                    for line in process.stdout:
                        each_line(line.decode("utf-8", errors="replace"))
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                process.stdout.close()
            complaints.seek(0)
            said = complaints.read().decode("utf-8", errors="replace")
        if code != 0:
            raise self._failure(command, code, said, failing)
        return printed

    def _failure(self, command: str, code: int, said: str, failing: Callable[[str], BundleError] | None) -> BundleError:
        if code == _UNREACHABLE:
            hint = f"try `ssh {self.host} true`; the same command goes on"
            return BundleError(f"ssh could not reach {self.host}, or lost it: {_last_line(said)}", hint=hint)
        if code == _NO_SUCH_COMMAND:
            return BundleError(f"{self.host} lacks a command: {_last_line(said)}", hint="name its Python with --remote-python")
        if failing is not None:
            return failing(said)
        last = _last_line(said)
        message, _, hint = last.removeprefix("error: ").partition("; hint: ")
        what = message if last.startswith("error: ") else f"`{command}` ended with code {code}: {last}"
        return BundleError(f"on {self.host}: {what}", hint=hint or "the same command goes on")


def _feed(pipe: IO[bytes], write: Callable[[IO[bytes]], None]) -> None:
    try:
        with pipe:
            write(pipe)
    except BrokenPipeError:
        pass  # Its reader has ended, and its code and complaint say why.


def _last_line(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else "no message"
