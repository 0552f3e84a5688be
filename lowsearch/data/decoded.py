"""Image files decoded once: their splits lie on disk as plain arrays, which every process maps into its memory.

So the workers of a study decode nothing, and share the pages of one copy. An entry is of one folder and one way of reading it; a change of
any file's name, size or time of modification makes it anew, as does damage, which the hash of the content tells. Entries may be deleted at
any time. Used by `sources`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lowsearch.data.images import SPLIT_NAMES, ImageData, Split

SCHEMA = 1
WORTH_BYTES = 8_000_000
"""Of files: smaller data sets are decoded in about half a second."""
_NOTE = "data.json"
_log = logging.getLogger(__name__)


def decoded_once(decode: Callable[[], ImageData], *, name: str, root: Path, options: Mapping[str, Any], folder: Path) -> ImageData:
    """What `decode` makes of the files below `root`, by `options` alone: mapped from its entry in `folder`, which is made where it lacks.

    Of several processes that ask at once one decodes and the others wait. Where `folder` cannot be written, everyone decodes.
    """
    files = sorted(_files(root)) if root.is_dir() else []
    if sum(size for _, size, _ in files) < WORTH_BYTES:
        return decode()
    entry = folder / _digest([str(root.resolve()), dict(options)])
    state = _digest([_decoder(), files])
    if (found := _opened(entry, state, name)) is not None:  # Without the lock: an entry is replaced as a whole.
        return found
    lock = FileLock(f"{entry}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        _log.warning("decoded images are not kept: %s", error)
        return decode()
    try:
        if (found := _opened(entry, state, name)) is not None:
            return found
        data = decode()
        try:
            _store(entry, state, data)
        except OSError as error:
            _log.warning("decoded images are not kept: %s", error)
            return data
        return _opened(entry, state, name) or data
    finally:
        lock.release()


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
        data = ImageData(name=name, classes=tuple(note["classes"]), **splits)
        if data.data_hash == note["data_hash"]:
            return data
        reason = "its content is not what was written"
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
    _log.warning("decoded images in %s are damaged (%s); they are decoded again", entry, reason)
    return None


def _mapped(entry: Path, split: str, what: str) -> np.ndarray:
    return np.load(entry / f"{split}-{what}.npy", mmap_mode="r", allow_pickle=False)


def _store(entry: Path, state: str, data: ImageData) -> None:
    """Replace `entry`. Call it with the lock held."""
    staging = entry.with_name(f".{entry.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        for split in SPLIT_NAMES:
            for what in ("images", "labels"):
                np.save(staging / f"{split}-{what}.npy", getattr(getattr(data, split), what), allow_pickle=False)
        note = {"state": state, "classes": data.classes, "data_hash": data.data_hash, "name": data.name}
        (staging / _NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        staging.rename(entry)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
