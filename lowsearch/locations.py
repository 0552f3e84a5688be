"""Where files are looked for: an explicit path, the current directory, the user's data directory, what the wheel shipped.

One resolver for search spaces, latency tables and studies. New files go to the current directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from platformdirs import user_data_path

from lowsearch.errors import StudyError

Kind = Literal["search_spaces", "latency_tables", "studies", "insights", "supernets"]

_PACKAGE = Path(__file__).resolve().parent


def folders(kind: Kind) -> list[Path]:
    """Existing folders that may hold `kind`, the first to be searched first."""
    home = os.environ.get("LOWSEARCH_HOME")
    user = Path(home) if home else user_data_path("lowsearch")
    # The wheel carries the shipped folders inside the package; in a checkout they stand beside it.
    candidates = [Path.cwd() / kind, user / kind, _PACKAGE / "shipped" / kind, _PACKAGE.parent / kind]
    return list(dict.fromkeys(folder for folder in candidates if folder.is_dir()))


def find(kind: Kind, relative: str | Path) -> Path | None:
    """First existing file or folder `relative` among `folders(kind)`, or None."""
    return next((folder / relative for folder in folders(kind) if (folder / relative).exists()), None)


def study_folder(name: str) -> Path:
    """The study that a user calls `name`: a folder, or a name to be looked for. Raises StudyError where there is none."""
    found = Path(name) if (Path(name) / "study.yaml").is_file() else find("studies", name)
    if found is None or not (found / "study.yaml").is_file():
        known = sorted({p.parent.name for folder in folders("studies") for p in folder.glob("*/study.yaml")})
        raise StudyError(f"no study {name!r}", hint=f"known: {', '.join(known)}" if known else "lowsearch run --objective acc-latency")
    return found


def new(kind: Kind) -> Path:
    """Folder of the current directory that new files of `kind` go to; made by whoever writes first."""
    return Path.cwd() / kind
