# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .clusters import plot_clusters
from .registration import plot_registration
from .report import write_report
from .structures import plot_structures

__all__ = ["plot_clusters", "plot_registration", "plot_structures", "write_report"]
