# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""SACB-Net image registration for MONAI."""

from __future__ import annotations

from . import apps, data, engines, handlers, inferers, losses, metrics, networks, transforms, utils, visualize
from .version import __version__

__all__ = [
    "__version__",
    "apps",
    "data",
    "engines",
    "handlers",
    "inferers",
    "losses",
    "metrics",
    "networks",
    "transforms",
    "utils",
    "visualize",
]
