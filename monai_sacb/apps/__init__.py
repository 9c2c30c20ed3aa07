# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .applying import apply
from .atlas_bundle import label_bundle
from .atlas_segmentation import AtlasSegmentation
from .bundle_copy import bundle
from .convert_field import convert
from .evaluating import evaluate
from .exporting import export
from .information import info
from .registering import register
from .registration import RegistrationResult
from .reporting import report

__all__ = [
    "AtlasSegmentation",
    "RegistrationResult",
    "apply",
    "bundle",
    "convert",
    "evaluate",
    "export",
    "info",
    "label_bundle",
    "register",
    "report",
]
