# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .base import PairwiseMetric
from .bootstrap import bootstrap_interval
from .field_error import FieldErrorMetric, compute_field_error
from .jacobian import (
    FoldsMetric,
    NDVMetric,
    SDLogJMetric,
    compute_folds,
    compute_ndv,
    compute_sdlogj,
    jacobian_determinant,
)
from .landmarks import LandmarkErrorMetric, compute_tre
from .overlap import compute_label_dice, lowest_mean, lowest_quantile
from .similarity import SimilarityMetric
from .surface import (
    LabelHausdorffMetric,
    LabelSurfaceDiceMetric,
    SurfaceDistances,
    compute_label_hausdorff,
    compute_label_surface_dice,
    compute_surface_distances,
)

__all__ = [
    "FieldErrorMetric",
    "FoldsMetric",
    "LabelHausdorffMetric",
    "LabelSurfaceDiceMetric",
    "LandmarkErrorMetric",
    "NDVMetric",
    "PairwiseMetric",
    "SDLogJMetric",
    "SimilarityMetric",
    "SurfaceDistances",
    "bootstrap_interval",
    "compute_field_error",
    "compute_folds",
    "compute_label_dice",
    "compute_label_hausdorff",
    "compute_label_surface_dice",
    "compute_ndv",
    "compute_sdlogj",
    "compute_surface_distances",
    "compute_tre",
    "jacobian_determinant",
    "lowest_mean",
    "lowest_quantile",
]
