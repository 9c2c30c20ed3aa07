# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .official import load_official_checkpoint

__all__ = ["load_official_checkpoint"]
