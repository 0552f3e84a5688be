"""What the fake study's trainings do in a process of their own: light, because every task of Ray imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from lowsearch.errors import DataError


def train_rung(shared, *, folder, arch_id, rung, step_s):
    """Takes up to four times `step_s`, so that trainings end in another order than they began; notes who was trained."""
    assert len(shared) == 8
    misbehave(Path(folder), arch_id)
    time.sleep(step_s * (int(arch_id, 16) % 5))
    with (Path(folder) / "tasks.log").open("a") as file:
        file.write(f"{arch_id} {rung} {os.getpid()}\n")
    return 10 * rung


def process_id(shared):
    return os.getpid()


def misbehave(folder, arch_id):
    """As the files in the study's folder say."""
    while (folder / "hold").exists():
        time.sleep(0.02)
    for name in ("crash-on", "crash-once"):
        path = folder / name
        if path.exists() and arch_id in path.read_text().split():
            if name == "crash-once":
                path.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
    if (folder / "mistake").exists():
        raise DataError("the images are gone", hint="bring them back")
    if (folder / "bug").exists():
        raise ZeroDivisionError("a bug")
