# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from monai_sacb.data.voxel_fields import (
    ddf_to_displacement,
    displacement_to_ddf,
    load_learn2reg_field,
    save_learn2reg_field,
)

from .augment import RefuseFieldsd
from .checks import CheckGridd, CheckPaird, CheckVolumed
from .cluster_files import SaveClusterMapsd
from .field_files import LoadDDFd, SaveDDFd
from .fields import ComposeDDFd, DDFToDisplacementd, InvertDDFd, MaskDDFd
from .io import LoadVolumed, MetaToResultd, ReadVolumed
from .labels import CommonLabelsd, SelectLabelsd, number_labels
from .learn2reg import SaveLearn2Regd
from .points import LoadPointsd, PointsToVoxelsd, TransformPointsd, read_points, transform_points
from .register import RegisterPaird
from .save import SaveRegistrationd, save_displacement
from .spatial import FieldOfViewd, PadPaird, RestoreGridd, WarpByDDFd, warp_labels
from .synthesis import (
    RandDiffeomorphism,
    RandFieldOfView,
    RandLabelsToImage,
    labels_to_image,
    random_diffeomorphism,
    sample_labels,
)
from .synthesis_dictionary import (
    LabelsToImaged,
    RandDiffeomorphismd,
    RandFieldOfViewd,
    RandKeepLabelsd,
    RandLabelsToImaged,
)

__all__ = [
    "CheckGridd",
    "CheckPaird",
    "CheckVolumed",
    "CommonLabelsd",
    "ComposeDDFd",
    "DDFToDisplacementd",
    "FieldOfViewd",
    "InvertDDFd",
    "LabelsToImaged",
    "LoadDDFd",
    "LoadPointsd",
    "LoadVolumed",
    "MaskDDFd",
    "MetaToResultd",
    "PadPaird",
    "PointsToVoxelsd",
    "RandDiffeomorphism",
    "RandDiffeomorphismd",
    "RandFieldOfView",
    "RandFieldOfViewd",
    "RandKeepLabelsd",
    "RandLabelsToImage",
    "RandLabelsToImaged",
    "ReadVolumed",
    "RefuseFieldsd",
    "RegisterPaird",
    "RestoreGridd",
    "SaveClusterMapsd",
    "SaveDDFd",
    "SaveLearn2Regd",
    "SaveRegistrationd",
    "SelectLabelsd",
    "TransformPointsd",
    "WarpByDDFd",
    "ddf_to_displacement",
    "displacement_to_ddf",
    "labels_to_image",
    "load_learn2reg_field",
    "number_labels",
    "random_diffeomorphism",
    "read_points",
    "sample_labels",
    "save_displacement",
    "save_learn2reg_field",
    "transform_points",
    "warp_labels",
]
