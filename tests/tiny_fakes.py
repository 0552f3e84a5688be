"""The fakes of study_fakes.py over the space of tiny_space.yaml: `from tiny_fakes import fakes`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
with mock.patch.dict(os.environ, {"FAKE_SPACE": str(TESTS / "tiny_space.yaml")}):
    _spec = importlib.util.spec_from_file_location("tiny_study_fakes", TESTS / "study_fakes.py")
    assert _spec and _spec.loader
    fakes = importlib.util.module_from_spec(_spec)
    sys.modules["tiny_study_fakes"] = fakes
    _spec.loader.exec_module(fakes)
