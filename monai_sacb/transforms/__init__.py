# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .augment import RefuseFieldsd
from .checks import CheckGridd, CheckPaird, CheckVolumed
from .io import LoadVolumed
from .labels import CommonLabelsd, SelectLabelsd, number_labels
from .learn2reg import SaveLearn2Regd, displacement_to_ddf, load_learn2reg_field, save_learn2reg_field
from .points import LoadPointsd, PointsToVoxelsd, WarpPointsd, read_points, transform_points
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
    "CheckGridd",
    "CheckPaird",
    "CheckVolumed",
    "CommonLabelsd",
    "ComposeDDFd",
    "DDFToDisplacementd",
    "FieldOfViewd",
    "LoadPointsd",
    "LoadVolumed",
    "PadPaird",
    "PointsToVoxelsd",
    "RefuseFieldsd",
    "RestoreGridd",
    "SaveLearn2Regd",
    "SaveRegistrationd",
    "SelectLabelsd",
    "WarpDDFd",
    "WarpPointsd",
    "ddf_to_displacement",
    "displacement_to_ddf",
    "load_learn2reg_field",
    "number_labels",
    "read_points",
    "save_displacement",
    "save_learn2reg_field",
    "transform_points",
    "warp_labels",
]
