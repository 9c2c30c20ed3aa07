# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import sys
from pathlib import Path

from monai.utils import optional_import

__all__ = ["available_memory_mb", "peak_memory_mb"]

resource, has_resource = optional_import("resource")

BYTES_PER_MB = 1e6
# where Linux tells
MEMINFO, CGROUP, OWN = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/statm")


def peak_memory_mb() -> float:
    """Largest resident size of the process so far, MB (10⁶ bytes); NaN where the system does not tell."""
    if not has_resource:
        return float("nan")
    # macOS counts bytes, Linux kibibytes
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit / BYTES_PER_MB


def _number(path: Path, pattern: str = r"\s*(\d+)\s*$") -> int | None:
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def available_memory_mb() -> float | None:
    """
    Memory that the process may come to have, with what it has already, MB (10⁶ bytes): what is free on the machine, or
    left of a container's limit. None where the system does not tell.
    """
    free = _number(MEMINFO, r"^MemAvailable:\s*(\d+) kB")
    own = _number(OWN, r"^\d+ (\d+)")
    if free is None or own is None or not has_resource:
        return None
    available = free * 1024
    limit, used = _number(CGROUP / "memory.max"), _number(CGROUP / "memory.current")
    if limit is not None and used is not None:
        # files that the system keeps in memory count as used, but make room
        cached = _number(CGROUP / "memory.stat", r"^inactive_file (\d+)") or 0
        available = min(available, limit - used + cached)
    return float(available + own * resource.getpagesize()) / BYTES_PER_MB
