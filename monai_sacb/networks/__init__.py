# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .official import load_official_checkpoint
from .pretrained import available_models, find_model, load_pretrained, stored_base_channels

__all__ = [
    "available_models",
    "find_model",
    "load_official_checkpoint",
    "load_pretrained",
    "stored_base_channels",
]
