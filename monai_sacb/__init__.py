# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""SACB-Net image registration for MONAI."""

from __future__ import annotations

from . import data, engines, handlers, losses, metrics, networks, transforms, utils, visualize

__version__ = "0.1.0"

__all__ = ["data", "engines", "handlers", "losses", "metrics", "networks", "transforms", "utils", "visualize"]
