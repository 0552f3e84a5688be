"""Files of weights: safetensors with a JSON note, written so that a crash leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowsearch.errors import StudyError

if TYPE_CHECKING:
    from torch import Tensor

_NOTE = "lowsearch"
_log = logging.getLogger(__name__)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-ready `note` to `path`: temporary file, fsync, rename."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(dict(tensors), metadata={_NOTE: json.dumps(note)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, note) of a file written by `save_tensors`. Raises StudyError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            note = json.loads((file.metadata() or {})[_NOTE])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, note  # noqa: SIM118 safe_open is no mapping
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise StudyError(f"{path} is not a readable weights file ({type(error).__name__})", hint="delete it to train again") from error


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint at `path`, or None to start from the beginning: there is none, or it is damaged, which costs time but no number.

    Raises StudyError when it belongs to another training than `identity`.
    """
    if not path.exists():
        return None
    try:
        tensors, note = load_tensors(path)
    except StudyError as error:
        _log.warning("%s; training starts again", error.message)
        return None
    for key, expected in identity.items():
        if note.get(key) != expected:
            raise StudyError(
                f"checkpoint {path} was made with {key} {note.get(key)!r}, not {expected!r}", hint="delete it or give another study name"
            )
    return tensors, note
