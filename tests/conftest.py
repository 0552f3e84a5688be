"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything loads NumPy or PyTorch. On one thread trainings are the same bit for bit, and test processes side by side do not fight
# for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

from lowsearch import locations


@pytest.fixture
def only_own_tables() -> Iterator[None]:
    """No latency table of the checkout is seen: neither what a demo measured there, nor what it ships."""
    beside = Path(locations.__file__).resolve().parents[1]
    everywhere = locations.folders
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(locations, "folders", lambda kind: [f for f in everywhere(kind) if kind != "latency_tables" or f.parent != beside])
        yield
