"""A training as an order that another machine may carry out: everything it needs goes along, everything it made comes back.

The machines share no folder. Made by `accuracy.ladder` and `study.assembly`, carried out by an engine of `study.workers.engines`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One training, or part of one."""

    name: str
    """Of the training, the same whenever it is ordered again."""
    function: Callable[..., Any]
    """Called there as `function(shared, **values)`; importable there by its name."""
    shared: Any
    """What many orders have in common, sent once: the images."""
    values: Mapping[str, Any]
    accept: Callable[[Any], Any]
    """Called here with what `function` returned: leaves it on disk, and returns what `here` does."""
    here: Callable[[], Any]
    """The same training in this process and this study's folder."""


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder of this machine for the training `name`, its own while it lasts.

    It is in the user's cache and is removed when the training is done: one whose process dies finds its checkpoint there when it is
    ordered again on this machine.
    """
    folder = user_cache_path("lowsearch") / "trainings" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.lock").unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
