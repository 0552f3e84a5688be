"""lowsearch: latency-aware neural architecture search over the LowFormer space.

The names below load on first use, so that importing lowsearch costs nothing and torch is imported only where networks run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowsearch import cost
    from lowsearch.arch import Arch
    from lowsearch.errors import LowsearchError
    from lowsearch.model.lowformer import build_model
    from lowsearch.presets import PRESETS, preset
    from lowsearch.search.front import search_front
    from lowsearch.search.sampler import LowSearchSampler
    from lowsearch.space import SearchSpace

__version__ = "0.1.0"
__all__ = ["PRESETS", "Arch", "LowSearchSampler", "LowsearchError", "SearchSpace", "build_model", "cost", "preset", "search_front"]

_HOMES = {
    "Arch": "lowsearch.arch",
    "LowsearchError": "lowsearch.errors",
    "PRESETS": "lowsearch.presets",
    "preset": "lowsearch.presets",
    "SearchSpace": "lowsearch.space",
    "LowSearchSampler": "lowsearch.search.sampler",
    "search_front": "lowsearch.search.front",
    "build_model": "lowsearch.model.lowformer",
}


def __getattr__(name: str) -> Any:
    if name == "cost":
        return import_module("lowsearch.cost")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowsearch' has no attribute {name!r}")
