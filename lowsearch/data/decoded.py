"""Image files decoded once: their splits lie on disk as plain arrays, which every process maps into its memory.

So the workers of a study decode nothing, and share the pages of one copy. An entry is of one folder and one way of reading it; a change of
any file's name, size or time of modification makes it anew, as does damage, which the hash of the content tells. Images are written as they
are decoded, so that no data set has to fit into memory, and a process that was killed leaves what it decoded to the next. Entries may be
deleted at any time. Used by `sources`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lowsearch.data.images import SPLIT_NAMES, ImageData, Split
from lowsearch.errors import DataError
from lowsearch.files import write_atomically

SCHEMA = 1
WORTH_BYTES = 8_000_000
"""Of files: smaller data sets are decoded in about half a second."""
TRUSTED_BYTES = 2**30
"""Entries of more bytes are told from damaged ones by the sizes and times of their files; to hash them would take seconds every time."""
_NOTE, _BEGUN = "data.json", "begun.json"
_CHUNK = 1024
"""Images after which what was decoded is counted as done."""
_log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Hears (done, of how many, of what)."""


class InMemory:
    """Where decoded images go: into arrays, one a split."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def filled(self, split: str, shape: tuple[int, ...], read: Callable[[int], np.ndarray]) -> np.ndarray:
        """uint8 of `shape`, whose row i is `read(i)`, by as many threads as there are processors: what is slow in it holds no lock.

        Raises what `read` raises of the first row that it cannot read.
        """
        return self._fill(np.empty(shape, np.uint8), split, read, start=0)

    def _fill(self, rows: np.ndarray, split: str, read: Callable[[int], np.ndarray], *, start: int) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for first in range(start, len(rows), _CHUNK):
                places = range(first, min(first + _CHUNK, len(rows)))
                for i, image in zip(places, threads.map(read, places), strict=True):
                    rows[i] = image
                self._is_done(split, rows, places.stop)
                if self._progress is not None:
                    self._progress(places.stop, len(rows), f"decode {split} images")
        return rows

    def _is_done(self, split: str, rows: np.ndarray, n: int) -> None:
        """The first `n` of `rows` are filled."""


class OnDisk(InMemory):
    """Into files in `folder`. Of what was begun there from files of the same `state`, the rest."""

    def __init__(self, folder: Path, state: str, progress: Progress | None = None) -> None:
        super().__init__(progress)
        self._folder, self._state = folder, state
        begun = _read_note(folder / _BEGUN)
        if begun.get("state") != state:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begun = {}
        self._done: dict[str, int] = {split: int(n) for split, n in begun.get("done", {}).items()}

    def filled(self, split: str, shape: tuple[int, ...], read: Callable[[int], np.ndarray]) -> np.ndarray:
        path, done = _array_file(self._folder, split, "images"), self._done.get(split, 0)
        rows: np.ndarray | None = None
        if done:
            with suppress(OSError, ValueError):  # Damaged, it is made anew.
                rows = np.load(path, mmap_mode="r+", allow_pickle=False)
        if rows is None or rows.shape != shape:
            _require_room(self._folder, math.prod(shape))
            rows, done = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape), 0
        return self._fill(rows, split, read, start=done)

    def _is_done(self, split: str, rows: np.ndarray, n: int) -> None:
        assert isinstance(rows, np.memmap)
        rows.flush()
        self._done[split] = n
        write_atomically(self._folder / _BEGUN, json.dumps({"state": self._state, "done": self._done}) + "\n")

    def finish(self, entry: Path, data: ImageData) -> None:
        """Make of the folder the `entry` that holds `data`."""
        for split in SPLIT_NAMES:
            np.save(_array_file(self._folder, split, "labels"), getattr(data, split).labels, allow_pickle=False)
        note = {
            "state": self._state,
            "classes": data.classes,
            "data_hash": data.data_hash,
            "name": data.name,
            "files": _sizes_and_times(self._folder),
        }
        (self._folder / _NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        (self._folder / _BEGUN).unlink()
        shutil.rmtree(entry, ignore_errors=True)
        self._folder.rename(entry)


Decode = Callable[[InMemory], ImageData]


def decoded_once(
    decode: Decode, *, name: str, root: Path, options: Mapping[str, Any], folder: Path, progress: Progress | None = None
) -> ImageData:
    """What `decode` makes of the files below `root`, by `options` alone: mapped from its entry in `folder`, which is made where it lacks.

    Of several processes that ask at once one decodes and the others wait. Where `folder` cannot be written, everyone decodes. Raises
    DataError where the images would fill the disk.
    """
    files = sorted(_files(root)) if root.is_dir() else []
    if sum(size for _, size, _ in files) < WORTH_BYTES:
        return decode(InMemory())
    entry = folder / _digest([str(root.resolve()), dict(options)])
    state = _digest([_decoder(), files])
    if (found := _opened(entry, state, name)) is not None:  # Without the lock: an entry is replaced as a whole.
        return found
    lock = FileLock(f"{entry}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        return _decoded_in_memory(decode, error, progress)
    try:
        if (found := _opened(entry, state, name)) is not None:
            return found
        staging = entry.with_name(f".{entry.name}.tmp")
        try:
            place = OnDisk(staging, state, progress)
            data = decode(place)
            place.finish(entry, data)
        except DataError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            return _decoded_in_memory(decode, error, progress)
        return _opened(entry, state, name) or data
    finally:
        lock.release()


def _decoded_in_memory(decode: Decode, error: OSError, progress: Progress | None) -> ImageData:
    _log.warning("decoded images are not kept: %s", error)
    return decode(InMemory(progress))


def _require_room(folder: Path, n_bytes: int) -> None:
    """Raise DataError where `n_bytes` more would fill the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if n_bytes > 0.95 * free:
        raise DataError(
            f"decoded images take {n_bytes / 1e9:.1f} GB, and the disk of {folder.parent} has {free / 1e9:.1f} GB left",
            hint="XDG_CACHE_HOME=/a/larger/disk lowsearch …",
        )


def _opened(entry: Path, state: str, name: str) -> ImageData | None:
    """The data set of `entry`, or None where it is not there, is of another `state` of the files, or is damaged."""
    if not (entry / _NOTE).is_file():
        return None
    try:
        note = json.loads((entry / _NOTE).read_text(encoding="utf-8"))
        if note["state"] != state:
            return None
        splits: dict[str, Any] = {
            split: Split(images=_mapped(entry, split, "images"), labels=_mapped(entry, split, "labels")) for split in SPLIT_NAMES
        }
        trusted = sum(split.images.nbytes for split in splits.values()) > TRUSTED_BYTES and note["files"] == _sizes_and_times(entry)
        known_hash = note["data_hash"] if trusted else None
        data = ImageData(name=name, classes=tuple(note["classes"]), known_hash=known_hash, **splits)
        if data.data_hash == note["data_hash"]:
            return data
        reason = "its content is not what was written"
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
    _log.warning("decoded images in %s are damaged (%s); they are decoded again", entry, reason)
    return None


def _mapped(entry: Path, split: str, what: str) -> np.ndarray:
    return np.load(_array_file(entry, split, what), mmap_mode="r", allow_pickle=False)


def _array_file(folder: Path, split: str, what: str) -> Path:
    return folder / f"{split}-{what}.npy"


def _sizes_and_times(folder: Path) -> list[list[Any]]:
    """[name, size, time of modification in ns] of its arrays."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.npy"))]


def _read_note(path: Path) -> dict[str, Any]:
    """What `path` holds; nothing where that is no mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _files(root: Path) -> Iterator[tuple[str, int, int]]:
    """(path below root, size, time of modification in ns) of every file, behind links too."""
    seen = set()
    for at, folders, names in os.walk(root, followlinks=True):
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        for file in names:
            path = os.path.join(at, file)
            if os.path.exists(path):
                found = os.stat(path)
                yield os.path.relpath(path, root), found.st_size, found.st_mtime_ns


def _decoder() -> list[Any]:
    import PIL

    return [SCHEMA, PIL.__version__]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
