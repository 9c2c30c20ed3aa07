# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from .base import PairwiseMetric
from .field_error import FieldErrorMetric, compute_field_error
from .jacobian import FoldsMetric, compute_folds, jacobian_determinant
from .similarity import SimilarityMetric

__all__ = [
    "FieldErrorMetric",
    "FoldsMetric",
    "PairwiseMetric",
    "SimilarityMetric",
    "compute_field_error",
    "compute_folds",
    "jacobian_determinant",
]
