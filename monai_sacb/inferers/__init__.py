# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .affine import AffineRegistration, estimate_affine
from .contrast import match_contrast
from .label_fusion import LabelFusion, fuse_labels
from .refinement import InstanceOptimization, refine_ddf
from .registration import RegistrationInferer

__all__ = [
    "AffineRegistration",
    "InstanceOptimization",
    "LabelFusion",
    "RegistrationInferer",
    "estimate_affine",
    "fuse_labels",
    "match_contrast",
    "refine_ddf",
]
