# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The two frames of physical space: MONAI's, RAS, and that of ITK and of files, LPS, with two axes backwards."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["LPS_TO_RAS", "lps_affine", "turned_vectors"]

# its own inverse
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def lps_affine(affine: torch.Tensor) -> np.ndarray:
    """Voxels to LPS millimetres, from voxels to RAS millimetres, or back."""
    return np.asarray(LPS_TO_RAS @ affine.double().cpu().numpy())


def turned_vectors(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors ``(3, *spatial)`` of RAS in LPS, or the other way round."""
    return vectors * vectors.new_tensor([-1.0, -1.0, 1.0]).view(3, *[1] * (vectors.dim() - 1))
