# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .checks import CheckPaird, CheckVolumed
from .io import LoadVolumed
from .labels import SelectLabelsd, number_labels
from .save import SaveRegistrationd, save_displacement
from .spatial import (
    ComposeDDFd,
    DDFToDisplacementd,
    FieldOfViewd,
    PadPaird,
    RestoreGridd,
    WarpDDFd,
    ddf_to_displacement,
    warp_labels,
)

__all__ = [
    "CheckPaird",
    "CheckVolumed",
    "ComposeDDFd",
    "DDFToDisplacementd",
    "FieldOfViewd",
    "LoadVolumed",
    "PadPaird",
    "RestoreGridd",
    "SaveRegistrationd",
    "SelectLabelsd",
    "WarpDDFd",
    "ddf_to_displacement",
    "number_labels",
    "save_displacement",
    "warp_labels",
]
