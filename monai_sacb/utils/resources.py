# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

from monai.utils import optional_import

__all__ = ["peak_memory_mb"]

resource, has_resource = optional_import("resource")

BYTES_PER_MB = 1e6


def peak_memory_mb() -> float:
    """Largest resident size of the process so far, MB (10⁶ bytes); NaN where the system does not tell."""
    if not has_resource:
        return float("nan")
    # macOS counts bytes, Linux kibibytes
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit / BYTES_PER_MB
