"""What a machine tells about itself: its processor, caches, frequency governor and load.

Also carried to machines that lowsearch is not installed on (bundle.py), so that both describe a machine in the same words: standard
library only, and Python 3.8.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import lru_cache
from pathlib import Path

_QUERY_TIMEOUT_S = 10


def system_name() -> str:
    """Operating system, its release and the kind of machine."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def load_average() -> float | None:
    """Processes that wanted to run, averaged over the last minute; None where the system does not count them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def cpu_facts() -> dict[str, str]:
    """What the system tells about the first processor, in the words of Linux's /proc/cpuinfo."""
    if platform.system() == "Darwin":
        return {"model name": query("sysctl", "-n", "machdep.cpu.brand_string")}
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    facts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip() and "model name" in facts:
            break
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:  # Arm kernels give part numbers only; lscpu knows their names.
        listed = dict(line.split(":", 1) for line in query("lscpu").splitlines() if ":" in line)
        facts["model name"] = facts.get("Model") or listed.get("Model name", "").strip()
    return facts


def cpu_name(facts: dict[str, str]) -> str:
    """The processor as its maker calls it, from `cpu_facts`."""
    return facts.get("model name") or platform.processor() or platform.machine() or "unknown processor"


def cpu_detail(facts: dict[str, str], n_cpus: int) -> str:
    """What tells a processor from others of the same name: its signature, the number of CPUs, its caches."""
    signature = "/".join(facts[key] for key in ("vendor_id", "cpu family", "model", "stepping") if key in facts)
    caches = ", ".join(f"L{level} {size >> 10} KiB" for level, size in sorted(cache_bytes().items()))
    return "; ".join(part for part in (signature, f"{n_cpus} CPUs", caches) if part)


@lru_cache(maxsize=None)
def cache_bytes() -> dict[int, int]:
    """Bytes of the first core's data caches by level, as far as the kernel tells (level 3 as its hypervisor claims it)."""
    sizes: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match:
            sizes[int(level)] = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
    return sizes


def governor() -> str:
    """Frequency governor of the first core, or `unknown` where the kernel does not tell."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def query(*command: str) -> str:
    """Standard output of `command`, or nothing where it does not exist or fails: what it would tell is then unknown."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
