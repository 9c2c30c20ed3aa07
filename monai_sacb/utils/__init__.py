# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .bundle import find_bundle_root
from .files import replacing
from .weights import read_checkpoint

__all__ = ["find_bundle_root", "read_checkpoint", "replacing"]
